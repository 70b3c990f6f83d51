"""The plain events among a slice's records, read by a compiled scanner without the interpreter's
lock; all others are left to `events.parse`.

PURE. `events.py` says what an event is. The scanner takes an item event of ASCII without escapes,
with fields it knows, each once, numbers of few digits, and no text about its item. What it takes,
`parse` would take, and `add_columns` would make the same of it; tests compare the two. What it
does not take may be good or bad: it says nothing about it. What it finds stays in arrays: no object
is made for an event.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from profiles.compiled import compiled, inlined, inner
from profiles.schema import TYPE_CODE

from . import events as ev
from .contributions import NEUTRAL_RATING, RATING_SPAN, Contributions
from .user_rows import UserRows

Bytes = NDArray[np.uint8]
Ints = NDArray[np.int64]

_FIELDS: Final = (
    "schema_version", "event_id", "user_id", "ts", "session_id", "item_id", "type", "price",
    "currency", "quantity", "rating", "text", "placement", "campaign", "title", "category", "brand",
)  # fmt: skip
(
    _VERSION, _EVENT_ID, _USER_ID, _TS, _SESSION_ID, _ITEM_ID, _TYPE, _PRICE,
    _CURRENCY, _QUANTITY, _RATING, _TEXT, _PLACEMENT, _CAMPAIGN, _TITLE, _CATEGORY, _BRAND,
) = range(len(_FIELDS))  # fmt: skip
_TYPES: Final = (
    "impression", "view", "click", "add_to_cart", "remove_from_cart", "purchase", "review",
)  # fmt: skip
_IMPRESSION, _PURCHASE, _REVIEW = 0, 5, 6
# Written out, because a compiled scanner is kept on disk for as long as this file does not change.
_MIN_TS_MS, _MAX_TS_MS = 631_152_000_000, 4_102_444_799_999
_ID, _SHORT_ID, _NAME, _LONG = 256, 128, 256, 20_000
_MOST_PRICE, _MOST_QUANTITY = 1e12, 1_000_000
_NEUTRAL, _SPAN = 3.0, 2.0
_DIGITS = 15  # a float64 holds so many exactly

if (
    *(ev.MIN_TS_MS, ev.MAX_TS_MS, ev.ID_LIMIT, ev.SHORT_ID_LIMIT, ev.NAME_LIMIT, ev.TEXT_LIMIT),
    *(ev.PRICE_LIMIT, ev.QUANTITY_LIMIT, NEUTRAL_RATING, RATING_SPAN, ev.SCHEMA_VERSION),
) != (
    *(_MIN_TS_MS, _MAX_TS_MS, _ID, _SHORT_ID, _NAME, _LONG),
    *(_MOST_PRICE, _MOST_QUANTITY, _NEUTRAL, _SPAN, 1),
):
    raise AssertionError("stream/scanning.py and stream/events.py disagree: bring them together")


class Words(NamedTuple):
    """Words one after the other."""

    bytes: Bytes
    end: Ints


class Found(NamedTuple):
    """What is in n records; rows of records that are not `plain` mean nothing."""

    plain: NDArray[np.bool_]
    user: Ints  # (n, 2) where the user id begins and ends
    item: NDArray[np.uint64]  # key of the item id
    event: NDArray[np.uint64]  # key of the event id, 0 without one
    t_ms: Ints
    type: Ints  # position in _TYPES
    factor: NDArray[np.float64]  # of the type's weight
    spend: NDArray[np.float64]
    foreign: NDArray[np.bool_]


@inner
def _spaces(raw, p, end):
    while p < end and raw[p] == 32:
        p += 1
    return p


@inner
def _string(raw, p, end):
    """Where the text of a string that begins at p ends; -1 if it is none, or not a plain one."""
    if p >= end or raw[p] != 34:
        return -1
    p += 1
    while p < end and raw[p] != 34:
        if raw[p] < 32 or raw[p] > 126 or raw[p] == 92:
            return -1
        p += 1
    return p if p < end else -1


@inner
def _is_id(raw, begin, end, most):
    size = end - begin
    return 0 < size <= most and raw[begin] != 32 and raw[end - 1] != 32


@inner
def _is_null(raw, p, end):
    return (
        end - p > 4
        and raw[p] == 110
        and raw[p + 1] == 117
        and raw[p + 2] == 108
        and raw[p + 3] == 108
    )


@inner
def _word(raw, begin, end, words):
    """Which of the words stands there; -1 for none."""
    size = end - begin
    for w in range(words.end.size - 1):
        first = words.end[w]
        if words.end[w + 1] - first != size:
            continue
        i = 0
        while i < size and raw[begin + i] == words.bytes[first + i]:
            i += 1
        if i == size:
            return w
    return -1


@inner
def _integer(raw, p, end):
    """(value, where it ends) of digits; -1 for none, or too many."""
    begin, value = p, 0
    while p < end and 48 <= raw[p] <= 57:
        value = 10 * value + np.int64(raw[p] - 48)
        p += 1
        if p - begin > _DIGITS:
            return -1, p
    if p == begin or (raw[begin] == 48 and p - begin > 1):
        return -1, p
    return value, p


@inner
def _number(raw, p, end):
    """(value, where it ends) of digits with or without a fraction; -1 for none, or too many. One
    division of two exact numbers rounds as it should."""
    begin = p
    value, p = _integer(raw, p, end)
    if value < 0 or p >= end or raw[p] != 46:
        return np.float64(value), p
    p += 1
    first, scale = p, 1.0
    while p < end and 48 <= raw[p] <= 57:
        value = 10 * value + np.int64(raw[p] - 48)
        scale *= 10.0
        p += 1
        if p - begin > _DIGITS:
            return -1.0, p
    if p == first:
        return -1.0, p
    return value / scale, p


@inlined
def _turned(x, n):
    return np.uint32(np.uint32(x >> np.uint32(n)) | np.uint32(x << np.uint32(32 - n)))


@inner
def _key64(raw, begin, end, rounds, w):
    """`profiles.schema.key64`: SHA-256 (FIPS 180-4), the first 8 bytes of it. `w`: room for 64
    numbers of a block, and 8 of the state."""
    size = end - begin
    for j in range(8):
        w[64 + j] = rounds[64 + j]
    blocks = (size + 9 + 63) // 64
    for block in range(blocks):
        for t in range(16):
            w[t] = 0
        first = 64 * block
        for at in range(first, min(first + 64, size)):
            w[(at - first) >> 2] |= np.uint32(raw[begin + at]) << np.uint32(24 - 8 * (at & 3))
        if first <= size < first + 64:
            w[(size - first) >> 2] |= np.uint32(128) << np.uint32(24 - 8 * (size & 3))
        if block == blocks - 1:
            w[15] = 8 * size
        for t in range(16, 64):
            a, b = w[t - 15], w[t - 2]
            a = _turned(a, 7) ^ _turned(a, 18) ^ np.uint32(a >> np.uint32(3))
            b = _turned(b, 17) ^ _turned(b, 19) ^ np.uint32(b >> np.uint32(10))
            w[t] = np.uint32(w[t - 16] + a + w[t - 7] + b)
        a, b, c, d = w[64], w[65], w[66], w[67]
        e, f, g, h = w[68], w[69], w[70], w[71]
        for t in range(64):
            mixed = _turned(e, 6) ^ _turned(e, 11) ^ _turned(e, 25)
            one = np.uint32(h + mixed + (g ^ (e & (f ^ g))) + rounds[t] + w[t])
            mixed = _turned(a, 2) ^ _turned(a, 13) ^ _turned(a, 22)
            two = np.uint32(mixed + ((a & b) | (c & (a | b))))
            h, g, f, e = g, f, e, np.uint32(d + one)
            d, c, b, a = c, b, a, np.uint32(one + two)
        for j, part in enumerate((a, b, c, d, e, f, g, h)):
            w[64 + j] += part
    return _swapped(w[64]) | (_swapped(w[65]) << np.uint64(32))


@inlined
def _swapped(x):
    """Its four bytes the other way round."""
    x = np.uint64(x)
    low = ((x & np.uint64(0xFF)) << np.uint64(24)) | ((x & np.uint64(0xFF00)) << np.uint64(8))
    return low | ((x >> np.uint64(8)) & np.uint64(0xFF00)) | (x >> np.uint64(24))


@inner
def _record(raw, p, end, i, fields, types, currency, rounds, w, out):
    """Whether the record is a plain event; then it is in row i."""
    if p >= end or raw[p] != 123:
        return False
    p = _spaces(raw, p + 1, end)
    seen = 0
    kind, price, quantity, rating = -1, 0.0, 1, _NEUTRAL
    foreign = False
    out.event[i], out.t_ms[i] = 0, 0
    while True:
        stop = _string(raw, p, end)
        if stop < 0:
            return False
        field = _word(raw, p + 1, stop, fields)
        if field < 0 or seen >> field & 1:
            return False
        seen |= 1 << field
        p = _spaces(raw, stop + 1, end)
        if p >= end or raw[p] != 58:
            return False
        p = _spaces(raw, p + 1, end)
        begin = p + 1
        if _is_null(raw, p, end):
            if field in (_VERSION, _USER_ID, _ITEM_ID, _TYPE, _QUANTITY, _RATING, _TEXT):
                return False
            p += 4
        elif field in (_TS, _QUANTITY, _VERSION):
            value, p = _integer(raw, p, end)
            if field == _TS:
                if not _MIN_TS_MS <= value <= _MAX_TS_MS:
                    return False
                out.t_ms[i] = value
            elif field == _VERSION:
                if value != 1:
                    return False
            else:
                if not 1 <= value <= _MOST_QUANTITY:
                    return False
                quantity = value
        elif field in (_PRICE, _RATING):
            number, p = _number(raw, p, end)
            if field == _PRICE:
                if not 0.0 <= number <= _MOST_PRICE:
                    return False
                price = number
            else:
                if not 1.0 <= number <= 5.0:
                    return False
                rating = number
        else:
            p = _string(raw, p, end)
            if p < 0:
                return False
            if field == _TYPE:
                kind = _word(raw, begin, p, types)
                if kind < 0:
                    return False
            elif field in (_USER_ID, _ITEM_ID):
                if not _is_id(raw, begin, p, _ID):
                    return False
                if field == _USER_ID:
                    out.user[i, 0], out.user[i, 1] = begin, p
                else:
                    out.item[i] = _key64(raw, begin, p, rounds, w)
            elif field in (_EVENT_ID, _SESSION_ID):
                if not _is_id(raw, begin, p, _SHORT_ID):
                    return False
                if field == _EVENT_ID:
                    out.event[i] = _key64(raw, begin, p, rounds, w)
            elif field == _CURRENCY:
                if p - begin != 3:
                    return False
                for j in range(3):
                    letter = raw[begin + j]
                    if not 65 <= letter <= 90:
                        return False
                    foreign |= letter != currency[j]
            elif field == _TEXT:
                if p - begin > _LONG:
                    return False
            elif field in (_PLACEMENT, _CAMPAIGN):
                if p - begin > _NAME:
                    return False
            else:
                return False
            p += 1
        p = _spaces(raw, p, end)
        if p >= end:
            return False
        if raw[p] == 125:
            break
        if raw[p] != 44:
            return False
        p = _spaces(raw, p + 1, end)
    needed = 1 << _USER_ID | 1 << _ITEM_ID | 1 << _TYPE
    if p + 1 != end or seen & needed != needed:
        return False
    # Elsewhere these are fields that nobody knows, and such are ignored.
    if (
        (seen >> _QUANTITY & 1 and kind != _PURCHASE)
        or ((seen >> _RATING & 1) != (kind == _REVIEW))
        or (seen >> _TEXT & 1 and kind != _REVIEW)
        or ((seen >> _PLACEMENT & 1 or seen >> _CAMPAIGN & 1) and kind != _IMPRESSION)
    ):
        return False
    out.type[i] = kind
    out.factor[i] = (rating - _NEUTRAL) / _SPAN if kind == _REVIEW else 1.0
    out.foreign[i] = foreign and kind == _PURCHASE
    out.spend[i] = price * quantity if kind == _PURCHASE and not foreign else 0.0
    return True


@compiled
def _scan(
    raw, record_end, record_ms, max_ahead_ms, latest_ms, fields, types, currency, rounds, w, out
):
    for i in range(record_ms.size):
        begin, end = record_end[i], record_end[i + 1]
        plain = _record(raw, begin, end, i, fields, types, currency, rounds, w, out)
        if plain:
            if out.t_ms[i] == 0:
                out.t_ms[i] = record_ms[i]
                plain = _MIN_TS_MS <= record_ms[i] <= min(latest_ms, _MAX_TS_MS)
            elif out.t_ms[i] > min(latest_ms, record_ms[i] + max_ahead_ms):
                plain = False
        out.plain[i] = plain


# --- the side of Python --------------------------------------------------------------------


@dataclass(frozen=True)
class Scanned:
    """k plain events among n records."""

    index: Ints  # (k,) their positions
    others: Ints  # (n - k,) positions of the records that are left to `parse`
    text: Bytes  # that the user ids are in
    user: Ints  # (k, 2) where they begin and end
    event: NDArray[np.uint64]
    t_ms: Ints
    type: NDArray[np.uint8]  # profiles.schema.TYPE_CODE
    weight: NDArray[np.float64]
    item: NDArray[np.uint64]
    spend: NDArray[np.float64]
    foreign: NDArray[np.bool_]

    def contributions(self, users: UserRows) -> Contributions:
        """The events, with rows among `users`."""
        return Contributions(
            users.rows_of(self.text, self.user),
            self.event,
            self.t_ms,
            self.type,
            self.weight,
            self.item,
            self.spend,
            self.foreign,
            {},
            {},
        )


class Scanner:
    """For one set of weights and one currency. Several threads may use it."""

    def __init__(self, weights: Mapping[str, float], currency: str) -> None:
        self._fields, self._types = _words(_FIELDS), _words(_TYPES)
        self._weights = np.array([weights.get(name, 0.0) for name in _TYPES])
        self._codes = np.array([TYPE_CODE[name] for name in _TYPES], np.uint8)
        self._currency = np.frombuffer(currency.encode(), np.uint8)

    def scan(
        self,
        values: Sequence[bytes | None],
        record_ms: Sequence[int],
        max_ahead_ms: int,
        latest_ms: int = _MAX_TS_MS,
    ) -> Scanned:
        """Arguments as of `events.parse`."""
        n = len(values)
        joined = b"".join([value or b"" for value in values])
        end = np.zeros(n + 1, np.int64)
        np.cumsum(np.fromiter((len(v or b"") for v in values), np.int64, n), out=end[1:])
        out = Found(
            np.zeros(n, np.bool_),
            np.empty((n, 2), np.int64),
            np.empty(n, np.uint64),
            np.empty(n, np.uint64),
            np.empty(n, np.int64),
            np.empty(n, np.int64),
            np.empty(n, np.float64),
            np.empty(n, np.float64),
            np.empty(n, np.bool_),
        )
        text = np.frombuffer(joined, np.uint8)
        _scan(
            text, end, np.asarray(record_ms, np.int64), max_ahead_ms,
            latest_ms, self._fields, self._types, self._currency, _ROUNDS,
            np.empty(len(_ROUNDS), np.uint32), out,
        )  # fmt: skip
        at = np.flatnonzero(out.plain)
        kind = out.type[at]
        return Scanned(
            at,
            np.flatnonzero(~out.plain),
            text,
            out.user[at],
            out.event[at],
            out.t_ms[at],
            self._codes[kind],
            self._weights[kind] * out.factor[at],
            out.item[at],
            out.spend[at],
            out.foreign[at],
        )


def _words(words: Sequence[str]) -> Words:
    end = np.zeros(len(words) + 1, np.int64)
    end[1:] = np.cumsum([len(word) for word in words])
    return Words(np.frombuffer("".join(words).encode(), np.uint8), end)


def _rounds() -> NDArray[np.uint32]:
    """The 64 constants of SHA-256 and its 8 initial values: fractions of the cube and square
    roots of the first primes, in whole numbers."""
    primes = [n for n in range(2, 312) if all(n % d for d in range(2, n))]
    cubes = [_root(prime << 96, 3) & 0xFFFFFFFF for prime in primes[:64]]
    squares = [_root(prime << 64, 2) & 0xFFFFFFFF for prime in primes[:8]]
    return np.array(cubes + squares, np.uint32)


def _root(n: int, degree: int) -> int:
    """The whole part of the root."""
    low, high = 0, 1 << 48
    while low + 1 < high:
        middle = (low + high) // 2
        low, high = (middle, high) if middle**degree <= n else (low, middle)
    return low


_ROUNDS: Final = _rounds()
