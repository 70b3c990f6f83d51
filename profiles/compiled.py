"""The compiled half of `kernel.py`: one pass over n users, from stored bytes to commands for Redis.

PURE, and without the interpreter's lock. Each step says the same as its namesake in
`arithmetic.py`; users whom a step is not made for are LEFT. Nothing compiled makes an array: what
it works in comes from outside, see `scratch`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final, NamedTuple

import numpy as np
from numba import njit
from numpy.typing import NDArray

from . import fates, schema
from .arithmetic import FORGET

Bytes = NDArray[np.uint8]
Ints = NDArray[np.int64]
Keys64 = NDArray[np.uint64]
# Without a runtime that counts who holds an array, and so without arrays of its own: counting, an
# atomic step for each array of a tuple that is passed on, took a third of the fold.
_OPTIONS: Final = {"nogil": True, "cache": True, "error_model": "numpy", "_nrt": False}
# What is only called by compiled code needs none of the wrappers that take half of the compiling.
_INNER: Final = {**_OPTIONS, "no_cpython_wrapper": True, "no_cfunc_wrapper": True}
compiled: Callable[..., Any] = njit(**_OPTIONS)
inner: Callable[..., Any] = njit(**_INNER)
# Of one call site each, or short: passing a tuple of arrays on costs more than most steps.
inlined: Callable[..., Any] = njit(**_INNER, forceinline=True)

# What became of a user.
LEFT: Final = 0  # not done here
UNTOUCHED: Final = 1  # nothing new
WRITTEN: Final = 2
SPLIT: Final = 3  # written, and the first time with events of a further partition of today
# What became of an event.
_FATE_APPLIED, _FATE_REPLAYED, _FATE_REPEATED = 1, 2, 3

# The header as the kernel reads it, in units of each field's own size. Written out, because a
# compiled kernel is kept on disk for as long as this file does not change.
_VERSION, _DIMENSIONS, _SCALES, _WINDOW_N = range(4)  # 2 bytes each
_SEEN_N, _CATEGORIES_N, _PENDING_N, _OWN_N = range(4, 8)
_SPACE, _UPDATED_MS, _FIRST_MS, _SPEND = 2, 3, 4, 14  # 8 bytes each
_EVENTS, _COUNTS, _FOREIGN, _OTHER, _FLOATS = 10, 12, 30, 31, 32  # 4 bytes each
_COUNT_SLOTS, TYPES, _FLAG_TEXT = 16, 9, 1
_SCHEMA_VERSION = 2
_ENTRY, _SEEN, _TALLY, _FENCE, _WATERMARK = 24, 8, 12, 24, 16  # bytes
_FORGET = 255

_MOVES = 100_000  # a window in more disorder than that is left to a better sort
TOP = 5  # categories of a glance
_SPEND_LIMIT, _MASS_LIMIT = 4e13, 9e12  # beyond them decimals are not exact here
UNKNOWN = 64  # categories without a name that are told of at a time


def _agrees() -> bool:
    header = np.zeros(1, schema.header_dtype(1, 1))
    begin = header.__array_interface__["data"][0]
    at = {n: header[n].__array_interface__["data"][0] - begin for n in header.dtype.names or ()}
    counters = (
        "version",
        "dimensions",
        "scales",
        "window_n",
        "seen_n",
        "categories_n",
        "pending_n",
        "own_n",
    )
    eights = ("space", "updated_ms", "first_ms", "spend")
    fours = ("events", "counts", "foreign_purchases", "other_categories", "half_lives_s")
    return (
        [at[name] / 2 for name in counters] == list(range(8))
        and [at[name] / 8 for name in eights] == [_SPACE, _UPDATED_MS, _FIRST_MS, _SPEND]
        and [at[name] / 4 for name in fours] == [_EVENTS, _COUNTS, _FOREIGN, _OTHER, _FLOATS]
        and (schema.COUNT_SLOTS, len(schema.EVENT_TYPES), schema.FLAG_TEXT, schema.SCHEMA_VERSION)
        == (_COUNT_SLOTS, TYPES, _FLAG_TEXT, _SCHEMA_VERSION)
        and schema.WINDOW_ENTRY.itemsize == _ENTRY
        and schema.CATEGORY_ENTRY.itemsize == schema.OWN_ENTRY.itemsize == _TALLY
        and (schema.FENCE_HEADER.itemsize, schema.WATERMARK_ENTRY.itemsize) == (_FENCE, _WATERMARK)
        and FORGET == _FORGET
        and (fates.APPLIED, fates.REPLAYED, fates.REPEATED)
        == (_FATE_APPLIED, _FATE_REPLAYED, _FATE_REPEATED)
    )


if not _agrees():
    raise AssertionError(
        "profiles/compiled.py and profiles/schema.py disagree: bring them together"
    )


# --- what goes in and comes out ------------------------------------------------------------


class Shape(NamedTuple):
    """A layout."""

    scales: int
    dimensions: int
    window: int
    seen: int
    categories: int
    own_items: int
    own_half_life_ms: float
    half_lives_ms: NDArray[np.float64]  # (K,)
    half_lives_s: NDArray[np.float32]  # (K,)
    blank: Bytes  # the header of who has no profile


class Users(NamedTuple):
    """n users."""

    stored: Bytes
    state_at: Ints  # (n, 2) begin and end in what is stored
    fence_at: Ints  # (n, 2)
    ids: Bytes  # UTF-8
    id_end: Ints  # (n + 1,)


class Events(NamedTuple):
    """m events, as in `arithmetic.EventColumns`."""

    row: Ints
    source: Keys64
    offset: Ints
    event: Keys64
    t_ms: Ints
    type: Bytes
    weight: NDArray[np.float32]
    item: Keys64
    category: Keys64
    vector: NDArray[np.float32]
    resolved: NDArray[np.bool_]
    text: NDArray[np.bool_]
    spend: NDArray[np.float64]
    foreign: NDArray[np.bool_]


class Texts(NamedTuple):
    """Pieces of bytes, one after the other."""

    keys: Keys64  # ascending; empty for pieces that have none
    end: Ints
    bytes: Bytes


class Save(NamedTuple):
    """How users are written."""

    first: int  # the row of the first of the n users
    space: np.uint64
    writer: np.uint64
    now_s: float
    ttl_s: int
    renew_share: float
    chunk: int  # users per script call
    pieces: Texts  # of a glance, see `_glance_pieces`; then script call and key parts
    labels: Texts  # category key -> JSON string
    sources: Keys64  # of all partitions that there are today
    tails: Texts  # the key of the writer's trail, then what the guard of each call is told


class Out(NamedTuple):
    payload: Bytes  # commands for Redis
    arguments: Bytes  # of the call that is being written
    glance: Bytes
    status: Bytes  # (n,)
    state_at: Ints  # (n, 2) begin and end in the payload
    fence_at: Ints  # (n, 2)
    fate: Bytes  # (m,)
    unknown: Keys64  # (UNKNOWN,)


class _Tally(NamedTuple):
    """Categories or own items; `k1`, `k4` and `kf` are views of one buffer."""

    k1: Bytes
    k4: NDArray[np.uint32]
    kf: NDArray[np.float32]
    later: NDArray[np.float32]  # what is still to be added to an entry, of how many events
    later_n: Ints
    n: Ints  # (1,) entries


class Scratch(NamedTuple):
    """One user, taken apart. The views of one buffer have one letter."""

    h1: Bytes
    h2: NDArray[np.uint16]
    h4: NDArray[np.uint32]
    hi: Ints
    hf: NDArray[np.float32]
    hd: NDArray[np.float64]
    w1: Bytes
    wi: Ints
    wu: Keys64
    wf: NDArray[np.float32]
    s1: Bytes
    su: Keys64
    categories: _Tally
    own: _Tally
    f1: Bytes
    fi: Ints
    fu: Keys64
    applied: Ints
    sum: NDArray[np.float32]  # (D,) of one event, and of those after it
    later_sum: NDArray[np.float32]
    gone: NDArray[np.float32]  # masses that leave a tally
    n: Ints  # sizes, by the names below
    exact: NDArray[np.float64]  # (1,) whose bits are at hand as integers
    chosen: Ints  # users of the call that is being written


_W, _S, _S_BEGIN, _F, _APPLIED, _F_BEFORE = range(6)


def _tally(size: int) -> _Tally:
    entries = np.zeros(size * 3, np.uint32)
    return _Tally(
        entries.view(np.uint8),
        entries,
        entries.view(np.float32),
        np.zeros(size, np.float32),
        np.zeros(size, np.int64),
        np.zeros(1, np.int64),
    )


def scratch(shape: Shape, most: int, sources: int, chunk: int) -> Scratch:
    """Room to take users apart who have at most so many events, and so many partitions in their
    fences; chunk: users of a call."""
    head = np.zeros((shape.blank.size + 7) // 8, np.int64)
    window = np.zeros((shape.window + most) * 3, np.int64)
    seen = np.zeros(shape.seen + most + 1, np.uint64)
    fence = np.zeros(3 + 2 * (sources + most), np.int64)
    return Scratch(
        head.view(np.uint8),
        head.view(np.uint16),
        head.view(np.uint32),
        head,
        head.view(np.float32),
        head.view(np.float64),
        window.view(np.uint8),
        window,
        window.view(np.uint64),
        window.view(np.float32),
        seen.view(np.uint8),
        seen,
        _tally(shape.categories + most),
        _tally(shape.own_items + most),
        fence.view(np.uint8),
        fence,
        fence.view(np.uint64),
        np.zeros(most, np.int64),
        np.zeros(shape.dimensions, np.float32),
        np.zeros(shape.dimensions, np.float32),
        np.zeros(most, np.float32),
        np.zeros(6, np.int64),
        np.zeros(1, np.float64),
        np.zeros(chunk, np.int64),
    )


# --- bytes and decimals --------------------------------------------------------------------


@inlined
def copied(out, at, source, begin, n):
    to, of = out[at : at + n], source[begin : begin + n]
    for i in range(n):
        to[i] = of[i]
    return at + n


@inner
def _decimal(out, at, value):
    """`value` >= 0."""
    digits, rest = 1, value // 10
    while rest > 0:
        digits += 1
        rest //= 10
    i, rest = at + digits, value
    for _ in range(digits):
        i -= 1
        out[i] = 48 + rest % 10
        rest //= 10
    return at + digits


@inner
def _fixed(out, at, scaled, places):
    """`scaled` / 10**places, in full."""
    unit = 1
    for _ in range(places):
        unit *= 10
    at = _decimal(out, at, scaled // unit)
    out[at] = 46
    rest = scaled % unit
    for i in range(places):
        out[at + places - i] = 48 + rest % 10
        rest //= 10
    return at + 1 + places


@inlined
def _piece(out, at, texts, i):
    return copied(out, at, texts.bytes, texts.end[i], texts.end[i + 1] - texts.end[i])


@inlined
def _bulk_length(out, at, n):
    out[at] = 36  # $
    at = _decimal(out, at + 1, n)
    out[at], out[at + 1] = 13, 10
    return at + 2


@inlined
def _line_end(out, at):
    out[at], out[at + 1] = 13, 10
    return at + 2


@inlined
def _hundredths(value, exact):
    """round(100 * value), halves to even, of the exact product: what "%.2f" shows. The product
    is taken of two halves of the number, so that what its rounding lost is known. `exact`: (1,)
    float64, whose bits are at hand as integers."""
    exact[0] = value
    bits = exact.view(np.int64)
    bits[0] &= -134217728  # the upper 26 of 53 bits
    high = exact[0]
    upper, lower = high * 100.0, (value - high) * 100.0
    product = upper + lower
    lost = (upper - product) + lower
    nearest = np.rint(product)
    left = product - nearest
    if left == 0.5 and lost > 0.0:
        nearest += 1.0
    elif left == -0.5 and lost < 0.0:
        nearest -= 1.0
    return np.int64(nearest)


# --- one user ------------------------------------------------------------------------------


@inlined
def _key(tally, i):
    return np.uint64(tally.k4[3 * i]) | (np.uint64(tally.k4[3 * i + 1]) << np.uint64(32))


@inlined
def _read_tally(tally, stored, begin, count):
    """Whether its entries lie in order."""
    tally.n[0] = count
    copied(tally.k1, 0, stored, begin, count * _TALLY)
    for i in range(1, count):
        if _key(tally, i) <= _key(tally, i - 1):
            return False
    return True


@inlined
def _read_state(x, shape, users, u, space):
    """Whether it is a state that the kernel knows to handle."""
    size = shape.blank.size
    begin, end = users.state_at[u, 0], users.state_at[u, 1]
    n = x.n
    if begin == end:
        copied(x.h1, 0, shape.blank, 0, size)
        n[_W] = n[_S] = n[_S_BEGIN] = x.categories.n[0] = x.own.n[0] = 0
        return True
    if end - begin < size:
        return False
    copied(x.h1, 0, users.stored, begin, size)
    if x.h2[_VERSION] != _SCHEMA_VERSION or x.h2[_PENDING_N] != 0:
        return False
    if x.h2[_DIMENSIONS] != shape.dimensions or x.h2[_SCALES] != shape.scales:
        return False
    for k in range(shape.scales):
        if x.hf[_FLOATS + k] != shape.half_lives_s[k]:
            return False
    if x.hi[_SPACE] != 0 and np.uint64(x.hi[_SPACE]) != space:
        return False
    n[_W], n[_S], n[_S_BEGIN] = x.h2[_WINDOW_N], x.h2[_SEEN_N], 0
    categories_n, own_n = np.int64(x.h2[_CATEGORIES_N]), np.int64(x.h2[_OWN_N])
    if n[_W] > shape.window or n[_S] > shape.seen:
        return False
    if categories_n > shape.categories or own_n > shape.own_items:
        return False
    if end - begin != size + n[_W] * _ENTRY + n[_S] * _SEEN + (categories_n + own_n) * _TALLY:
        return False
    begin += size
    copied(x.w1, 0, users.stored, begin, n[_W] * _ENTRY)
    begin += n[_W] * _ENTRY
    copied(x.s1, 0, users.stored, begin, n[_S] * _SEEN)
    begin += n[_S] * _SEEN
    if not _read_tally(x.categories, users.stored, begin, categories_n):
        return False
    return _read_tally(x.own, users.stored, begin + categories_n * _TALLY, own_n)


@inlined
def _read_fence(x, users, u):
    """The fence stays as it lies in Redis: three numbers, then source and offset in turn."""
    begin, end = users.fence_at[u, 0], users.fence_at[u, 1]
    x.fi[0] = x.fi[1] = x.fi[2] = 0
    x.n[_F] = x.n[_F_BEFORE] = 0
    if begin == end:
        return True
    size = end - begin
    if size < _FENCE or (size - _FENCE) % _WATERMARK != 0:
        return False
    copied(x.f1, 0, users.stored, begin, size)
    x.n[_F] = x.n[_F_BEFORE] = (size - _FENCE) // _WATERMARK
    for i in range(1, x.n[_F]):
        if x.fu[3 + 2 * i] <= x.fu[1 + 2 * i]:
            return False
    return True


@inlined
def _is_new(x, source, offset):
    """Whether the watermark does not cover it; it does from here on."""
    i, n = 0, x.n[_F]
    while i < n and x.fu[3 + 2 * i] < source:
        i += 1
    if i < n and x.fu[3 + 2 * i] == source:
        if offset < x.fi[4 + 2 * i]:
            return False
    else:
        if offset < 0:
            return False
        for j in range(n, i, -1):
            x.fu[3 + 2 * j], x.fi[4 + 2 * j] = x.fu[1 + 2 * j], x.fi[2 + 2 * j]
        x.fu[3 + 2 * i] = source
        x.n[_F] = n + 1
    x.fi[4 + 2 * i] = offset + 1
    return True


@inlined
def _admit(x, shape, events, order, begin, end, fate):
    """LEFT, UNTOUCHED or WRITTEN; which events are applied is in `x.applied`."""
    n = x.n
    n[_APPLIED] = 0
    touched = False
    for at in range(begin, end):
        i = order[at]
        if events.type[i] == _FORGET or events.type[i] >= _COUNT_SLOTS:
            return LEFT
        if not _is_new(x, events.source[i], events.offset[i]):
            fate[i] = _FATE_REPLAYED
            continue
        touched = True
        key = events.event[i]
        if key != 0:
            repeated = False
            for s in range(n[_S_BEGIN], n[_S]):
                if x.su[s] == key:
                    repeated = True
            if repeated:
                fate[i] = _FATE_REPEATED
                continue
        if events.weight[i] != 0.0 and not events.resolved[i]:
            return LEFT
        fate[i] = _FATE_APPLIED
        x.applied[n[_APPLIED]] = i
        n[_APPLIED] += 1
        if key != 0 and shape.seen > 0:
            x.su[n[_S]] = key
            n[_S] += 1
            if n[_S] - n[_S_BEGIN] > shape.seen:
                n[_S_BEGIN] += 1
    return WRITTEN if touched else UNTOUCHED


@inlined
def _comes_after(x, a, b):
    """Whether entry a of the window belongs behind entry b."""
    if x.wi[3 * a] != x.wi[3 * b]:
        return x.wi[3 * a] > x.wi[3 * b]
    if x.wu[3 * a + 1] != x.wu[3 * b + 1]:
        return x.wu[3 * a + 1] > x.wu[3 * b + 1]
    if x.wf[6 * a + 4] != x.wf[6 * b + 4]:
        return x.wf[6 * a + 4] > x.wf[6 * b + 4]
    if x.w1[24 * a + 20] != x.w1[24 * b + 20]:
        return x.w1[24 * a + 20] > x.w1[24 * b + 20]
    return x.w1[24 * a + 21] > x.w1[24 * b + 21]


@inlined
def _sort_window(x):
    """Insertion: nearly all lie in order already."""
    moves = 0
    for i in range(x.n[_W]):
        if x.wf[6 * i + 4] != x.wf[6 * i + 4]:
            return False
    for i in range(1, x.n[_W]):
        for j in range(i, 0, -1):
            if not _comes_after(x, j - 1, j):
                break
            for part in range(3):
                a, b = 3 * j - 3 + part, 3 * j + part
                x.wi[a], x.wi[b] = x.wi[b], x.wi[a]
            moves += 1
        if moves > _MOVES:
            return False
    return True


@inlined
def _append_window(x, shape, events):
    n = x.n
    late = False
    for a in range(n[_APPLIED]):
        i = x.applied[a]
        if events.weight[i] == 0.0:
            continue
        w = n[_W]
        if w > 0 and events.t_ms[i] <= x.wi[3 * w - 3]:
            late = True
        x.wi[3 * w], x.wu[3 * w + 1], x.wi[3 * w + 2] = events.t_ms[i], events.item[i], 0
        x.wf[6 * w + 4] = events.weight[i]
        x.w1[24 * w + 20] = events.type[i]
        x.w1[24 * w + 21] = _FLAG_TEXT if events.text[i] else 0
        n[_W] += 1
    return not late or _sort_window(x)


@inlined
def _count(x, events):
    """Counters, and the latest event time."""
    latest, first = x.hi[_UPDATED_MS], x.hi[_FIRST_MS]
    known = x.h4[_EVENTS] > 0
    for a in range(x.n[_APPLIED]):
        i = x.applied[a]
        slot = _COUNTS + events.type[i]
        x.h4[slot] = x.h4[slot] + np.uint32(1)
        x.h4[_EVENTS] = x.h4[_EVENTS] + np.uint32(1)
        x.hd[_SPEND] += events.spend[i]
        if events.foreign[i]:
            x.h4[_FOREIGN] = x.h4[_FOREIGN] + np.uint32(1)
        t_ms = events.t_ms[i]
        latest = max(latest, t_ms)
        first = min(first, t_ms) if known else t_ms
        known = True
    x.hi[_FIRST_MS] = first
    return latest


@inlined
def _decay(x, shape, latest):
    age_ms = np.float64(latest - x.hi[_UPDATED_MS])
    x.hi[_UPDATED_MS] = latest
    if age_ms == 0.0:
        return
    scales, size = shape.scales, shape.dimensions
    factor = np.float32(1.0)
    for k in range(scales):
        factor = np.float32(np.exp2(-age_ms / shape.half_lives_ms[k]))
        x.hf[_FLOATS + scales + k] *= factor
        begin = _FLOATS + 2 * scales + k * size
        sums = x.hf[begin : begin + size]
        for d in range(size):
            sums[d] *= factor
    x.hf[_OTHER] *= factor
    _fade(x.categories, factor)
    _fade(x.own, np.float32(np.exp2(-age_ms / shape.own_half_life_ms)))


@inlined
def _fade(tally, factor):
    for i in range(tally.n[0]):
        tally.kf[3 * i + 2] *= factor


@inlined
def _add(x, shape, events, space):
    """What the applied events contribute. Summed as `np.add.reduceat` does: the first, and all
    others among themselves."""
    scales, size = shape.scales, shape.dimensions
    _begin(x.categories)
    for k in range(scales):
        mass, later_mass, count = np.float32(0.0), np.float32(0.0), 0
        total, later = x.sum, x.later_sum
        for a in range(x.n[_APPLIED]):
            i = x.applied[a]
            if events.weight[i] == 0.0:
                continue
            age_ms = np.float64(x.hi[_UPDATED_MS] - events.t_ms[i])
            decay = np.float32(np.exp2(-age_ms / shape.half_lives_ms[k]))
            share = decay * events.weight[i]
            vector = events.vector[i]
            if count == 0:
                mass = abs(share)
                for d in range(size):
                    total[d] = share * vector[d]
            elif count == 1:
                later_mass = abs(share)
                for d in range(size):
                    later[d] = share * vector[d]
            else:
                later_mass += abs(share)
                for d in range(size):
                    later[d] += share * vector[d]
            count += 1
            if k == scales - 1 and events.category[i] != 0:
                _add_to(x.categories, events.category[i], share)
        if count == 0:
            return
        if count > 1:
            mass += later_mass
            for d in range(size):
                total[d] += later[d]
        x.hf[_FLOATS + scales + k] += mass
        begin = _FLOATS + 2 * scales + k * size
        sums = x.hf[begin : begin + size]
        for d in range(size):
            sums[d] += total[d]
    _finish(x.categories)
    x.hi[_SPACE] = np.int64(space)


@inlined
def _add_own(x, shape, events):
    _begin(x.own)
    for a in range(x.n[_APPLIED]):
        i = x.applied[a]
        if events.weight[i] == 0.0 or events.item[i] == 0:
            continue
        age_ms = np.float64(x.hi[_UPDATED_MS] - events.t_ms[i])
        decay = np.float32(np.exp2(-age_ms / shape.own_half_life_ms))
        _add_to(x.own, events.item[i], decay * events.weight[i])
    _finish(x.own)


@inlined
def _begin(tally):
    for i in range(tally.n[0]):
        tally.later_n[i] = 0


@inlined
def _add_to(tally, key, mass):
    i, n = 0, tally.n[0]
    while i < n and _key(tally, i) < key:
        i += 1
    if i < n and _key(tally, i) == key:
        tally.later[i] = mass if tally.later_n[i] == 0 else tally.later[i] + mass
        tally.later_n[i] += 1
        return
    for j in range(n, i, -1):
        tally.later[j], tally.later_n[j] = tally.later[j - 1], tally.later_n[j - 1]
    for j in range(3 * n - 1, 3 * i - 1, -1):
        tally.k4[j + 3] = tally.k4[j]
    tally.k4[3 * i] = np.uint32(key & np.uint64(0xFFFFFFFF))
    tally.k4[3 * i + 1] = np.uint32(key >> np.uint64(32))
    tally.kf[3 * i + 2] = mass
    tally.later_n[i] = 0
    tally.n[0] = n + 1


@inlined
def _finish(tally):
    for i in range(tally.n[0]):
        if tally.later_n[i] > 0:
            tally.kf[3 * i + 2] += tally.later[i]


@inlined
def _bound(tally, most, gone):
    """Beyond the bound the smallest leave, of equal ones the last; their masses, in this order,
    are in `gone` then. How many; -1 where a better sort is wanted."""
    excess = tally.n[0] - most
    if excess <= 0:
        return 0
    if excess * tally.n[0] > _MOVES:
        return -1
    for e in range(excess):
        smallest = 0
        for i in range(tally.n[0]):
            mass = abs(tally.kf[3 * i + 2])
            if mass != mass:
                return -1
            if mass <= abs(tally.kf[3 * smallest + 2]):
                smallest = i
        gone[e] = tally.kf[3 * smallest + 2]
        tally.n[0] -= 1
        for j in range(3 * smallest, 3 * tally.n[0]):
            tally.k4[j] = tally.k4[j + 3]
    return excess


@inlined
def _bound_tallies(x, shape):
    """What leaves the categories goes to `other_categories`, what leaves the own items is
    forgotten."""
    left = _bound(x.categories, shape.categories, x.gone)
    if left > 0:
        rest = x.gone[left - 1]
        for e in range(left - 2, -1, -1):
            rest += x.gone[e]
        x.hf[_OTHER] += rest
    return left >= 0 and _bound(x.own, shape.own_items, x.gone) >= 0


@inlined
def _label(out, at, labels, key, unknown):
    """The category's name as a JSON string; its key in hex where the name is not known."""
    low, high = 0, labels.keys.size
    while low < high:
        middle = (low + high) // 2
        if labels.keys[middle] < key:
            low = middle + 1
        else:
            high = middle
    if low < labels.keys.size and labels.keys[low] == key:
        return _piece(out, at, labels, low)
    for i in range(unknown.size):
        if unknown[i] == key:
            break
        if unknown[i] == 0:
            unknown[i] = key
            break
    out[at] = 34
    for i in range(16):
        digit = np.int64((key >> np.uint64(60 - 4 * i)) & np.uint64(15))
        out[at + 1 + i] = 48 + digit if digit < 10 else 87 + digit
    out[at + 17] = 34
    return at + 18


@inlined
def _glance(out, x, save, unknown):
    """Length of the glance in `out`; -1 if a number in it is not one to show here."""
    spend, updated_ms = x.hd[_SPEND], x.hi[_UPDATED_MS]
    if not (x.hi[_SPEND] >= 0 and spend < _SPEND_LIMIT) or updated_ms < 0:
        return -1
    pieces = save.pieces
    at = _decimal(out, _piece(out, 0, pieces, 0), updated_ms)
    at = _decimal(out, _piece(out, at, pieces, 1), np.int64(x.h4[_EVENTS]))
    for t in range(TYPES):
        at = _decimal(out, _piece(out, at, pieces, 2 + t), np.int64(x.h4[_COUNTS + t]))
    at = _fixed(out, _piece(out, at, pieces, 2 + TYPES), _hundredths(spend, x.exact), 2)
    at = _piece(out, at, pieces, 3 + TYPES)
    above, above_at = np.float32(np.inf), -1
    for shown in range(TOP):
        best, best_at = np.float32(0.0), -1
        for i in range(x.categories.n[0]):
            mass = x.categories.kf[3 * i + 2]
            if (mass < above or (mass == above and i > above_at)) and mass > best:
                best, best_at = mass, i
        if best_at < 0:
            break
        if not best < _MASS_LIMIT:
            return -1
        if shown > 0:
            out[at] = 44
            at += 1
        at = _label(out, at, save.labels, _key(x.categories, best_at), unknown)
        out[at] = 58
        # Exact: a float32 times 1000 fits into a float64.
        at = _fixed(out, at + 1, np.int64(np.rint(np.float64(best) * 1000.0)), 3)
        above, above_at = best, best_at
    return _piece(out, at, pieces, 4 + TYPES)


@inlined
def _write(x, shape, users, u, save, out, at):
    """The five arguments of a save behind `at`; where they end, or -1."""
    glance_n = _glance(out.glance, x, save, out.unknown)
    if glance_n < 0:
        return -1
    n = x.n
    to = out.arguments
    old, old_n = users.fence_at[u, 0], users.fence_at[u, 1] - users.fence_at[u, 0]
    at = copied(to, _bulk_length(to, at, old_n), users.stored, old, old_n)
    x.fu[0] = x.fu[0] + np.uint64(1)
    x.fu[1] = save.writer
    left_s = np.float64(x.fi[2]) - save.now_s
    expires_s = 0
    if left_s < save.ttl_s * save.renew_share or left_s > save.ttl_s:
        expires_s = x.fi[2] = np.int64(save.now_s) + save.ttl_s
    fence_n = _FENCE + n[_F] * _WATERMARK
    at = _bulk_length(to, _line_end(to, at), fence_n)
    out.fence_at[u, 0], out.fence_at[u, 1] = at, at + fence_n
    at = copied(to, at, x.f1, 0, fence_n)
    size, first = shape.blank.size, max(0, n[_W] - shape.window)
    x.h2[_WINDOW_N], x.h2[_SEEN_N] = n[_W] - first, n[_S] - n[_S_BEGIN]
    categories_n, own_n = x.categories.n[0], x.own.n[0]
    x.h2[_CATEGORIES_N], x.h2[_OWN_N] = categories_n, own_n
    window_n, seen_n = (n[_W] - first) * _ENTRY, (n[_S] - n[_S_BEGIN]) * _SEEN
    state_n = size + window_n + seen_n + (categories_n + own_n) * _TALLY
    at = _bulk_length(to, _line_end(to, at), state_n)
    out.state_at[u, 0], out.state_at[u, 1] = at, at + state_n
    at = copied(to, at, x.h1, 0, size)
    at = copied(to, at, x.w1, first * _ENTRY, window_n)
    at = copied(to, at, x.s1, n[_S_BEGIN] * _SEEN, seen_n)
    at = copied(to, at, x.categories.k1, 0, categories_n * _TALLY)
    at = copied(to, at, x.own.k1, 0, own_n * _TALLY)
    at = _bulk_length(to, _line_end(to, at), glance_n)
    at = copied(to, at, out.glance, 0, glance_n)
    digits = _decimal(out.glance, 0, expires_s)
    at = _bulk_length(to, _line_end(to, at), digits)
    return _line_end(to, copied(to, at, out.glance, 0, digits))


@inner
def _of_today(x, sources):
    """How many partitions that there are today the watermark knows; it keeps those of topics that
    were deleted."""
    found = 0
    for i in range(x.n[_F]):
        for source in sources:
            if source == x.fu[3 + 2 * i]:
                found += 1
    return found


@inlined
def _fold_user(x, shape, users, u, events, order, begin, end, save, out, at):
    """Its status, and where its arguments end."""
    if not (_read_state(x, shape, users, u, save.space) and _read_fence(x, users, u)):
        return LEFT, at
    status = _admit(x, shape, events, order, begin, end, out.fate)
    if status != WRITTEN:
        return status, at
    if x.n[_APPLIED] > 0:
        if not _append_window(x, shape, events):
            return LEFT, at
        _decay(x, shape, _count(x, events))
        _add(x, shape, events, save.space)
        if shape.own_items > 0:
            _add_own(x, shape, events)
        if not _bound_tallies(x, shape):
            return LEFT, at
    stop = _write(x, shape, users, u, save, out, at)
    if stop < 0:
        return LEFT, at
    gained = x.n[_F] > 1 and x.n[_F] > x.n[_F_BEFORE]
    return (SPLIT if gained and _of_today(x, save.sources) > 1 else WRITTEN), stop


# --- all of them ---------------------------------------------------------------------------


@inlined
def _close_call(users, chosen, n, save, out, call, at, length):
    """EVALSHA of the script for n users, whose arguments are at hand; the first call is 0."""
    to, pieces = out.payload, save.pieces
    script, prefix, suffix = 5 + TYPES, 6 + TYPES, 7 + TYPES
    to[at] = 42  # *
    at = _line_end(to, _decimal(to, at + 1, 7 + 6 * n))
    at = _piece(to, at, pieces, script)
    digits = _decimal(out.glance, 0, n + 1)
    at = _line_end(to, copied(to, _bulk_length(to, at, digits), out.glance, 0, digits))
    around = pieces.end[suffix + 1] - pieces.end[prefix]
    for c in range(n):
        begin, end = users.id_end[chosen[c]], users.id_end[chosen[c] + 1]
        at = _piece(to, _bulk_length(to, at, around + end - begin), pieces, prefix)
        at = _piece(to, copied(to, at, users.ids, begin, end - begin), pieces, suffix)
        at = _line_end(to, at)
    at = _piece(to, at, save.tails, 0)
    for c in range(n):
        for side in range(2):
            out.state_at[chosen[c], side] += at
            out.fence_at[chosen[c], side] += at
    return _piece(to, copied(to, at, out.arguments, 0, length), save.tails, call + 1)


@compiled
def arrange(row, first, begin, order):
    """Bring together the events of each of n users, who are rows `first`, … of m events: user u's
    are order[begin[u] : begin[u + 1]]. The most that one of them has."""
    n, most = begin.size - 1, 0
    begin[:] = 0
    for i in range(row.size):
        u = row[i] - first
        if 0 <= u < n:
            begin[u + 1] += 1
    for u in range(n):
        most = max(most, begin[u + 1])
        begin[u + 1] += begin[u]
    for i in range(row.size):
        u = row[i] - first
        if 0 <= u < n:
            order[begin[u]] = i
            begin[u] += 1
    for u in range(n, 0, -1):
        begin[u] = begin[u - 1]
    begin[0] = 0
    return most


@compiled
def fold(shape, users, events, begin, order, save, x, out):
    """All n users, whose events `arrange` brought together; length of the payload."""
    n = len(users.state_at)
    count, length, call, total = 0, 0, 0, 0
    for u in range(n):
        status, length = _fold_user(
            x, shape, users, u, events, order, begin[u], begin[u + 1], save, out, length
        )
        out.status[u] = status
        if status == LEFT:
            for j in range(begin[u], begin[u + 1]):
                out.fate[order[j]] = 0
        if status >= WRITTEN:
            x.chosen[count] = u
            count += 1
        if count > 0 and (count == save.chunk or u == n - 1):
            total = _close_call(users, x.chosen, count, save, out, call, total, length)
            count = length = 0
            call += 1
    return total


# --- to another space ----------------------------------------------------------------------


@inlined
def _carry_item(shape, sums, user, change, share):
    for k in range(shape.scales):
        to, by = sums[user * shape.scales + k], np.float32(share[k])
        for d in range(shape.dimensions):
            to[d] += by * change[d]


@compiled
def carry(shape, sums, masses, window_end, own_end, items, at, age_ms, weight, mass, change, room):
    """Add to sums (n * K, D) what `arithmetic.migrate` adds to those that went through the map.
    items, at: of all window entries, then of all own items: key, 0 for an entry that is of none,
    and row of change (u, D), -1 for an item that is not known. mass: of own items; what the window
    knows of it is taken out. room: (2, K)."""
    entries = len(age_ms)
    lost, share = room[0], room[1]
    for user in range(len(window_end) - 1):
        for k in range(shape.scales):
            lost[k] = masses[user, k]
        begin, end = window_end[user], window_end[user + 1]
        for i in range(begin, end):
            for k in range(shape.scales):
                share[k] = np.exp2(-age_ms[i] / shape.half_lives_ms[k]) * weight[i]
                lost[k] -= abs(share[k])
            if at[i] >= 0:
                _carry_item(shape, sums, user, change[at[i]], share)
        total = 0.0
        for j in range(own_end[user], own_end[user + 1]):
            left = np.float64(mass[j])
            for i in range(begin, end):
                if items[i] == items[entries + j]:
                    left -= np.exp2(-age_ms[i] / shape.own_half_life_ms) * weight[i]
            mass[j] = max(0.0, left)
            total += mass[j]
        for j in range(own_end[user], own_end[user + 1]):
            if mass[j] <= 0.0 or at[entries + j] < 0:
                continue
            for k in range(shape.scales):
                rest = max(0.0, lost[k])
                share[k] = mass[j] * rest / max(rest, total)
            _carry_item(shape, sums, user, change[at[entries + j]], share)
