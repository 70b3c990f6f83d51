"""The arithmetic of profiles: decay, fold, merge, and what a profile says when it is read.

PURE: numpy only, no clock, no I/O. Time is an argument, always event time in ms.

A profile holds, per time scale k of half-life h_k, the decayed sum of what the shopper did:

    S_k(T) = sum_i w_i * 2^(-(T - t_i) / h_k) * v_i        T = the latest event time

which is an exponentially decayed sum with forward decay (Cormode et al., ICDE 2009): late
events fold in exactly, batches may be cut anywhere, and the order does not matter beyond
float32 rounding. Beside it: the mass sum |w_i| 2^(...), the last events, counters, decayed
tallies of categories and of the shopper's own items, and per source partition the offset up to
which events are in.

Writers fold many users at once (`Profiles`, a structure of arrays); readers look at one
(`Profile`). Both are views of the byte layout in `schema.py`.
"""

from __future__ import annotations

import json
import struct
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from . import schema
from .errors import LayoutMismatch, SchemaTooNew, SpaceMismatch, StateCorrupt
from .fates import APPLIED, ERASED, FORGOTTEN, REPEATED, REPLAYED
from .outlook import Outlook

Floats = NDArray[np.float32]
Ints = NDArray[np.int64]
Keys64 = NDArray[np.uint64]

_ENTRY: Final = schema.WINDOW_ENTRY.itemsize
# Categories and own items are tallied alike: an entry is a key and its decayed mass.
_TALLIED: Final = np.dtype([("key", "<u8"), ("mass", "<f4")])
_TALLY: Final = _TALLIED.itemsize
_FENCE: Final = schema.FENCE_HEADER.itemsize
_FIELDS: Final[Any] = schema.header_dtype(1, 1).fields
SPACE_AT: Final = slice(_FIELDS["space"][1], _FIELDS["space"][1] + 8)  # of a state
_SCALES: Final = slice(_FIELDS["scales"][1], _FIELDS["scales"][1] + 2)
_HALF_LIVES: Final = _FIELDS["half_lives_s"][1]
_T_MS: Final = struct.Struct("<q")
_FENCE_HEADER: Final = struct.Struct("<QQq")
_WATERMARK: Final = struct.Struct("<Qq")
_REBUILD: Final = "delete it, and run `penchant rebuild --user` for that user"
FORGET: Final = 255
"""The type code of a `forget` in event columns: it erases, it is not counted."""


@dataclass(frozen=True)
class Layout:
    """What profiles keep. Writers of one namespace must agree on it.

    Raises ValueError, in the words of the settings, for what cannot be kept.
    """

    dimensions: int
    half_lives_s: tuple[float, ...] = (1_800.0, 86_400.0, 2_592_000.0)  # shortest first
    window: int = 50  # entries
    seen: int = 64  # event ids
    categories: int = 32
    own_items: int = 64  # the heaviest; 0: none
    currency: str = "USD"

    def __post_init__(self) -> None:
        ordered = tuple(sorted(self.half_lives_s))
        possible = all(0 < half_life_s < 1e12 for half_life_s in ordered)  # NaN is not
        if not ordered or ordered != self.half_lives_s or not possible:
            raise ValueError("PROFILE_HALF_LIVES_S needs positive seconds, the shortest first")
        if not 0 < self.dimensions < 1 << 16:
            raise ValueError("MODEL_DIMENSIONS must lie between 1 and 65535")
        if self.window < 1 or self.categories < 1 or self.seen < 0:
            raise ValueError("PROFILE_WINDOW and PROFILE_CATEGORIES need at least 1")
        if not 0 <= self.own_items < 1 << 16:
            raise ValueError("PROFILE_OWN_ITEMS must lie between 0 and 65535")

    @property
    def header(self) -> np.dtype[Any]:
        """The numpy dtype of the fixed part of the state."""
        return schema.header_dtype(len(self.half_lives_s), self.dimensions)

    @property
    def half_lives_ms(self) -> NDArray[np.float64]:
        """(K,) in milliseconds."""
        return np.asarray(self.half_lives_s, dtype=np.float64) * 1000.0

    @property
    def own_half_life_ms(self) -> float:
        """Of own items, in milliseconds."""
        return self.half_lives_s[-1] * 1000.0 * schema.OWN_SCALES


@dataclass(frozen=True)
class EventColumns:
    """m events in arrival order, each for one of n users. Arrival order within a source
    partition is offset order."""

    row: Ints  # (m,) index of the user in the Profiles
    source: Keys64  # (m,) source keys (schema.source_key)
    offset: Ints  # (m,) offsets in that source
    event: Keys64  # (m,) schema.key64(event_id); 0 = no id, never a repeat
    t_ms: Ints  # (m,) event time, not before 1970
    type: NDArray[np.uint8]  # (m,) index into EVENT_TYPES, or FORGET
    weight: Floats  # (m,)
    item: Keys64  # (m,) schema.key64(item_id), 0 = none
    category: Keys64  # (m,) schema.key64(category), 0 = none
    vector: Floats  # (m, D) unit rows; zero rows where not resolved
    resolved: NDArray[np.bool_]  # (m,) False: the item's text is not known yet
    text: NDArray[np.bool_]  # (m,) the vector is of the event's own text
    spend: NDArray[np.float64]  # (m,) in the shop's currency
    foreign: NDArray[np.bool_]  # (m,) a purchase in another currency


@dataclass(frozen=True)
class Folded:
    """What became of the events of one fold."""

    applied: Ints  # indices of the events that count now
    touched: list[int]  # users whose profile or watermark moved
    fate: NDArray[np.uint8]  # (m,) see `fates`

    def count(self, fate: int) -> int:
        """How many events met it."""
        return int((self.fate == fate).sum())


@dataclass
class Profiles:
    """n users as a structure of arrays, mutable while a micro-batch is folded."""

    header: NDArray[Any]  # (n,) of Layout.header
    window: list[bytes]  # WINDOW_ENTRY, ordered by (t_ms, item, weight, type, flags)
    seen: list[bytes]  # event keys of 8 bytes, in arrival order
    categories: list[bytes]  # CATEGORY_ENTRY, ordered by category
    own: list[bytes]  # OWN_ENTRY, ordered by item
    pending: list[bytes]  # WINDOW_ENTRY whose item has no vector yet, in arrival order
    watermarks: list[dict[int, int]]  # source key -> next offset
    fences: list[bytes]  # as loaded; b"" = none
    erased: set[int] = field(default_factory=set)  # rows that a `forget` emptied since

    def __len__(self) -> int:
        return len(self.header)


def take(profiles: Profiles, rows: Sequence[int]) -> Profiles:
    """Some of the users, in this order. What a fold changes of them it does not change in
    `profiles`, but for the watermarks."""
    return Profiles(
        profiles.header[list(rows)],
        [profiles.window[r] for r in rows],
        [profiles.seen[r] for r in rows],
        [profiles.categories[r] for r in rows],
        [profiles.own[r] for r in rows],
        [profiles.pending[r] for r in rows],
        [profiles.watermarks[r] for r in rows],
        [profiles.fences[r] for r in rows],
        {i for i, r in enumerate(rows) if r in profiles.erased},
    )


# --- bytes -> profiles ---------------------------------------------------------------------


def read_fence(fence: bytes) -> tuple[int, int, int, dict[int, int]]:
    """(revision, writer, expires_s, {source: next offset}) of a fence field.

    Raises StateCorrupt.
    """
    watermark = _watermark(fence)
    return *read_fence_header(fence), watermark


def read_fence_header(fence: bytes) -> tuple[int, int, int]:
    """(revision, writer, expires_s) of a fence field that `unpack` has taken."""
    revision, writer, expires_s = _FENCE_HEADER.unpack_from(fence)
    return revision, writer, expires_s


def _watermark(fence: bytes) -> dict[int, int]:
    if len(fence) < _FENCE or (len(fence) - _FENCE) % _WATERMARK.size:
        raise StateCorrupt(f"its fence has {len(fence)} bytes; {_REBUILD}")
    return dict(_WATERMARK.iter_unpack(fence[_FENCE:]))


def write_fence(revision: int, writer: int, expires_s: int, watermark: Mapping[int, int]) -> bytes:
    """The bytes of a fence field."""
    return _FENCE_HEADER.pack(revision, writer, expires_s) + _watermark_bytes(watermark)


def next_fences(
    fences: Sequence[bytes],
    watermarks: Sequence[Mapping[int, int]],
    writer: int,
    now_s: float,
    ttl_s: int,
    *,
    may_renew: bool = True,
) -> tuple[list[bytes], list[int]]:
    """The fences to write over n stored ones, and the expiries to set (unix seconds; 0 = leave
    the one in force)."""
    raw = bytearray().join([fence[:_FENCE] or bytes(_FENCE) for fence in fences])
    header = np.frombuffer(raw, dtype=schema.FENCE_HEADER)
    header["revision"] += 1
    header["writer"] = writer
    left_s = header["expires_s"] - now_s
    renew = ((left_s < ttl_s * RENEW_SHARE) | (left_s > ttl_s)) & may_renew
    header["expires_s"][renew] = int(now_s) + ttl_s
    heads = _cut(header.tobytes(), [_FENCE] * len(header))
    written = [h + _watermark_bytes(w) for h, w in zip(heads, watermarks, strict=True)]
    return written, np.where(renew, header["expires_s"], 0).tolist()


# An expiry is renewed when a tenth of it is over, or when it outlasts a TTL that was made
# shorter: EXPIREAT on every save costs a sixth.
RENEW_SHARE: Final = 0.9


def _watermark_bytes(watermark: Mapping[int, int]) -> bytes:
    return b"".join([_WATERMARK.pack(source, at) for source, at in sorted(watermark.items())])


def unpack(
    states: Sequence[bytes | None], fences: Sequence[bytes | None], layout: Layout
) -> Profiles:
    """Stored fields of n users -> Profiles; None is a user without a profile.

    Raises SchemaTooNew, LayoutMismatch or StateCorrupt.
    """
    size = layout.header.itemsize
    blank = blank_header(layout).tobytes()
    stored = [blank if state is None else state for state in states]
    header = heads(stored, layout)
    lengths = np.fromiter(map(len, stored), np.int64, len(stored))
    _check(header, lengths, layout)
    a = size + header["window_n"].astype(np.int64) * _ENTRY
    b = a + header["seen_n"].astype(np.int64) * 8
    c = b + header["categories_n"].astype(np.int64) * _TALLY
    d = c + header["own_n"].astype(np.int64) * _TALLY
    e = d + header["pending_n"].astype(np.int64) * _ENTRY
    if (lengths != e).any():
        i = int((lengths != e).argmax())
        raise StateCorrupt(f"its state has {lengths[i]} bytes, its header says {e[i]}; {_REBUILD}")
    window_end, seen_end, categories_end, own_end = a.tolist(), b.tolist(), c.tolist(), d.tolist()
    profiles = Profiles(
        header,
        [state[size:end] for state, end in zip(stored, window_end, strict=True)],
        [s[i:j] for s, i, j in zip(stored, window_end, seen_end, strict=True)],
        [s[i:j] for s, i, j in zip(stored, seen_end, categories_end, strict=True)],
        [s[i:j] for s, i, j in zip(stored, categories_end, own_end, strict=True)],
        [state[start:] for state, start in zip(stored, own_end, strict=True)],
        [_watermark(fence) if fence else {} for fence in fences],
        [fence or b"" for fence in fences],
    )
    _bring_up_to_date(profiles, layout)
    return profiles


def _bring_up_to_date(profiles: Profiles, layout: Layout) -> None:
    """Version 1 kept no own items: what its window holds of them is all that is known."""
    version = profiles.header["version"]
    for row in np.flatnonzero(version < 2).tolist():
        entries = np.frombuffer(profiles.window[row], dtype=schema.WINDOW_ENTRY)
        at = np.full(len(entries), row)
        _add_own(profiles, at, entries["t_ms"], entries["weight"], entries["item"], layout)
    version[:] = schema.SCHEMA_VERSION


def blank_header(layout: Layout) -> NDArray[Any]:
    """(1,) the header of a user of whom nothing is known."""
    blank = np.zeros(1, dtype=layout.header)
    blank["version"], blank["dimensions"] = schema.SCHEMA_VERSION, layout.dimensions
    blank["scales"], blank["half_lives_s"] = len(layout.half_lives_s), layout.half_lives_s
    return blank


def _check(header: NDArray[Any], lengths: Ints, layout: Layout) -> None:
    """Refuse states that are cut short or of another layout. In this order: only the version
    says what the bytes after it mean, and only dimensions and scales how many they are."""
    if (lengths < schema.PREFIX.itemsize).any():
        raise StateCorrupt(f"its state has {lengths.min()} bytes; {_REBUILD}")
    _check_version(header["version"])
    want = np.asarray(layout.half_lives_s, dtype="<f4")
    sizes_agree = (header["dimensions"] == layout.dimensions) & (header["scales"] == len(want))
    if (sizes_agree & (lengths < header.dtype.itemsize)).any():
        raise StateCorrupt(f"its state is cut short; {_REBUILD}")
    if not sizes_agree.all() or (header["half_lives_s"] != want).any():
        raise LayoutMismatch(
            "written with another MODEL_DIMENSIONS or PROFILE_HALF_LIVES_S: "
            "restore those settings, or use another NAMESPACE"
        )


def _check_version(versions: NDArray[np.uint16]) -> None:
    newest = int(versions.max(initial=0))
    if newest > schema.SCHEMA_VERSION:
        raise SchemaTooNew(
            f"written with schema version {newest}, this penchant knows up to "
            f"{schema.SCHEMA_VERSION}: upgrade it"
        )
    if (versions == 0).any():
        raise StateCorrupt(f"its state has schema version 0; {_REBUILD}")


def pack(profiles: Profiles) -> list[bytes]:
    """The state fields of n users, ready to store."""
    header = profiles.header
    header["window_n"] = [len(b) // _ENTRY for b in profiles.window]
    header["seen_n"] = [len(b) // 8 for b in profiles.seen]
    header["categories_n"] = [len(b) // _TALLY for b in profiles.categories]
    header["own_n"] = [len(b) // _TALLY for b in profiles.own]
    header["pending_n"] = [len(b) // _ENTRY for b in profiles.pending]
    heads = _cut(header.tobytes(), [header.dtype.itemsize] * len(header))
    tails = (profiles.window, profiles.seen, profiles.categories, profiles.own, profiles.pending)
    return [b"".join(parts) for parts in zip(heads, *tails, strict=True)]


def _cut(raw: bytes, lengths: Sequence[int]) -> list[bytes]:
    """Consecutive pieces of the given lengths."""
    ends = list(accumulate(lengths))
    return [raw[i:j] for i, j in zip([0, *ends], ends, strict=False)]


# --- fold ----------------------------------------------------------------------------------


def fold(profiles: Profiles, events: EventColumns, layout: Layout, space: int) -> Folded:
    """Fold m events into n users' profiles, in place. Each event counts once: what the
    watermark covers, and what repeats a remembered event id, changes nothing.

    Raises SpaceMismatch if a profile's sums live in another space than `space`.
    """
    _check_space(profiles, space)
    folded = _admit(profiles, events, layout)
    applied = folded.applied
    if len(applied):
        _append_windows(profiles, events, applied, layout)
        _count(profiles, events, applied)
        _advance(profiles, _latest(profiles, events, applied), layout)
        _fold_own(profiles, events, applied, layout)
        _fold_vectors(profiles, events, applied, layout, space)
    return folded


def _check_space(profiles: Profiles, space: int) -> None:
    stored = profiles.header["space"]
    other = (stored != space) & (stored != 0)
    if other.any():
        raise SpaceMismatch(
            f"a profile lives in space {int(stored[other][0]):016x}, the encoder in {space:016x}: "
            "serve the release those profiles were written with, or migrate them"
        )


def _admit(profiles: Profiles, events: EventColumns, layout: Layout) -> Folded:
    """Decide, event by event in arrival order, what counts; move watermarks and event ids."""
    watermarks, seen = profiles.watermarks, profiles.seen
    touched: set[int] = set()
    erased: dict[int, int] = {}  # row -> position of its last `forget`
    fate = np.full(len(events.row), APPLIED, np.uint8)
    remembered = layout.seen * 8
    rows, types = events.row.tolist(), events.type.tolist()
    ids = [key.to_bytes(8, "little") if key else b"" for key in events.event.tolist()]
    for i, (row, source, offset, event, kind) in enumerate(
        zip(rows, events.source.tolist(), events.offset.tolist(), ids, types, strict=True)
    ):
        watermark = watermarks[row]
        if offset < watermark.get(source, 0):
            fate[i] = REPLAYED
            continue
        watermark[source] = offset + 1
        touched.add(row)
        # An unaligned match of 8 hashed bytes in 512 has odds of 2^-55: no need to align.
        if event and event in seen[row]:
            fate[i] = REPEATED
            continue
        if kind == FORGET:
            _erase(profiles, row, layout)
            erased[row] = i
            fate[i] = FORGOTTEN
        # The id of a `forget` stays as well: its repeat must not erase what came in between.
        if event and remembered:
            seen[row] = (seen[row] + event)[-remembered:]
    if erased:
        kept = np.flatnonzero(fate == APPLIED)
        fate[kept[[i < erased.get(rows[i], -1) for i in kept.tolist()]]] = ERASED
    return Folded(np.flatnonzero(fate == APPLIED), sorted(touched), fate)


def _erase(profiles: Profiles, row: int, layout: Layout) -> None:
    """Drop all that is known of a user but the watermark, which keeps replays out."""
    profiles.header[row] = blank_header(layout)[0]
    for part in (
        profiles.window, profiles.seen, profiles.categories, profiles.own, profiles.pending,
    ):  # fmt: skip
        part[row] = b""
    profiles.erased.add(row)


def _append_windows(
    profiles: Profiles, events: EventColumns, applied: Ints, layout: Layout
) -> None:
    """Put events with a weight into the window, those without a vector onto the pending list."""
    weighty = applied[events.weight[applied] != 0]
    weighty = weighty[np.argsort(events.row[weighty], kind="stable")]
    row, t_ms = events.row[weighty], events.t_ms[weighty]
    entries = np.zeros(len(weighty), dtype=schema.WINDOW_ENTRY)
    entries["t_ms"], entries["item"] = t_ms, events.item[weighty]
    entries["weight"], entries["type"] = events.weight[weighty], events.type[weighty]
    entries["flags"] = np.where(events.text[weighty], schema.FLAG_TEXT, 0)
    # Most events come in order and go to the end. Ties do not count as ordered: `_ordered`
    # settles them, so that a window does not depend on the order of arrival.
    late = set(row[1:][(row[1:] == row[:-1]) & (t_ms[1:] <= t_ms[:-1])].tolist())
    users, starts, counts = np.unique(row, return_index=True, return_counts=True)
    news = _cut(entries.tobytes(), (counts * _ENTRY).tolist())
    window, limit = profiles.window, layout.window * _ENTRY
    for user, first_ms, new in zip(users.tolist(), t_ms[starts].tolist(), news, strict=True):
        old = window[user]
        grown = old + new
        if user in late or (old and first_ms <= _T_MS.unpack_from(old, len(old) - _ENTRY)[0]):
            grown = _ordered(grown)
        window[user] = grown[-limit:]
    for i in np.flatnonzero(~events.resolved[weighty]).tolist():
        _append_pending(profiles, int(row[i]), entries[i].tobytes())


def _append_pending(profiles: Profiles, row: int, more: bytes) -> None:
    """Beyond the bound the earliest arrivals are given up, and counted."""
    pending = profiles.pending[row] + more
    excess = max(0, len(pending) // _ENTRY - schema.MAX_PENDING)
    profiles.header["pending_lost"][row] += excess
    profiles.pending[row] = pending[excess * _ENTRY :]


def _ordered(window: bytes) -> bytes:
    """Window entries ordered by time, and at one time by the rest, which settles ties."""
    entries = np.frombuffer(window, dtype=schema.WINDOW_ENTRY)
    order = np.lexsort(
        (entries["flags"], entries["type"], entries["weight"], entries["item"], entries["t_ms"])
    )
    return entries[order].tobytes()


def _count(profiles: Profiles, events: EventColumns, applied: Ints) -> None:
    header, row = profiles.header, events.row[applied]
    np.add.at(header["counts"], (row, events.type[applied]), 1)
    np.add.at(header["spend"], row, events.spend[applied])
    np.add.at(header["foreign_purchases"], row, events.foreign[applied].astype(np.uint32))
    first = np.full(len(header), np.iinfo(np.int64).max)
    np.minimum.at(first, row, events.t_ms[applied])
    known = header["events"] > 0
    first[known] = np.minimum(first[known], header["first_ms"][known])
    touched = np.unique(row)
    header["first_ms"][touched] = first[touched]
    np.add.at(header["events"], row, 1)


def _latest(profiles: Profiles, events: EventColumns, applied: Ints) -> Ints:
    """(n,) the new T of all users."""
    latest: Ints = profiles.header["updated_ms"].copy()
    np.maximum.at(latest, events.row[applied], events.t_ms[applied])
    return latest


def _fold_own(profiles: Profiles, events: EventColumns, applied: Ints, layout: Layout) -> None:
    """Count own items; whether their text is known does not matter here."""
    applied = applied[events.weight[applied] != 0]
    order = applied[np.argsort(events.row[applied], kind="stable")]
    _add_own(
        profiles,
        events.row[order],
        events.t_ms[order],
        events.weight[order],
        events.item[order],
        layout,
    )


def _fold_vectors(
    profiles: Profiles, events: EventColumns, applied: Ints, layout: Layout, space: int
) -> None:
    """Add what the events contribute to sums, masses and categories."""
    active = applied[events.resolved[applied] & (events.weight[applied] != 0)]
    _add(
        profiles,
        events.row[active],
        events.t_ms[active],
        events.weight[active],
        events.vector[active],
        events.category[active],
        layout,
        space,
    )


def _advance(profiles: Profiles, t_ms: Ints, layout: Layout) -> None:
    """Decay every user's sums, masses and tallies to t_ms (n,), which is not earlier than what
    they have. Decaying by a, then by b, equals decaying by a + b."""
    header = profiles.header
    age_ms = (t_ms - header["updated_ms"]).astype(np.float64)
    header["updated_ms"] = t_ms
    if not age_ms.any():
        return
    factor = np.exp2(-age_ms[:, None] / layout.half_lives_ms).astype(np.float32)  # (n, K)
    header["masses"] *= factor
    header["sums"] *= factor[:, :, None]
    header["other_categories"] *= factor[:, -1]
    _fade(profiles.categories, factor[:, -1])
    _fade(profiles.own, np.exp2(-age_ms / layout.own_half_life_ms).astype(np.float32))


def _fade(tallies: list[bytes], factor: Floats) -> None:
    """Decay the tally of each of n users by a factor (n,)."""
    lengths = [len(raw) for raw in tallies]
    entries = np.frombuffer(bytearray().join(tallies), dtype=_TALLIED)
    entries["mass"] *= np.repeat(factor, np.asarray(lengths, dtype=np.int64) // _TALLY)
    tallies[:] = _cut(entries.tobytes(), lengths)


def _add(
    profiles: Profiles,
    row: Ints,  # (m,)
    t_ms: Ints,  # (m,) not later than the user's T
    weight: Floats,  # (m,)
    vector: Floats,  # (m, D)
    category: Keys64,  # (m,)
    layout: Layout,
    space: int,
) -> None:
    if not len(row):
        return
    header = profiles.header
    age_ms = (header["updated_ms"][row] - t_ms).astype(np.float64)
    decay = np.exp2(-age_ms[:, None] / layout.half_lives_ms).astype(np.float32)  # (m, K)
    share = decay * weight[:, None]  # (m, K)
    order = np.argsort(row, kind="stable")
    users, starts = np.unique(row[order], return_index=True)
    share, vector = share[order], vector[order]
    header["masses"][users] += np.add.reduceat(np.abs(share), starts, axis=0)
    for k in range(share.shape[1]):  # one scale at a time keeps the (m, D) temporary in cache
        contribution = share[:, k, None] * vector  # (m, D)
        if len(users) != len(order):
            contribution = np.add.reduceat(contribution, starts, axis=0)  # (users, D)
        header["sums"][users, k] += contribution
    header["space"][users] = space
    _add_categories(profiles, row[order], category[order], share[:, -1], layout)


def _add_categories(
    profiles: Profiles, row: Ints, category: Keys64, mass: Floats, layout: Layout
) -> None:
    """Add decayed weights to the users' category tallies (on the longest scale). Beyond the
    bound the smallest leave for `other_categories`, so that no mass is lost."""
    left = _add_to(profiles.categories, row, category, mass, layout.categories)
    for user, rest in left.items():
        profiles.header["other_categories"][user] += rest


def _add_own(
    profiles: Profiles,
    row: Ints,  # (m,)
    t_ms: Ints,  # (m,) not later than the user's T
    weight: Floats,  # (m,)
    item: Keys64,  # (m,)
    layout: Layout,
) -> None:
    """Add weights, decayed to T, to the users' own items. Beyond the bound the smallest are
    forgotten: of items nobody asks how much the others weigh together."""
    age_ms = (profiles.header["updated_ms"][row] - t_ms).astype(np.float64)
    mass = np.exp2(-age_ms / layout.own_half_life_ms).astype(np.float32) * weight
    _add_to(profiles.own, row, item, mass, layout.own_items)


def own_of(
    entries: NDArray[Any], updated_ms: int, half_lives_s: Sequence[float], most: int
) -> dict[int, float]:
    """{item: mass}: what a profile knows of own items after these window entries, however many,
    the latest event time being `updated_ms`."""
    layout = Layout(1, tuple(half_lives_s), own_items=most)
    one = unpack([None], [None], layout)
    one.header["updated_ms"] = updated_ms
    row = np.zeros(len(entries), np.int64)
    _add_own(one, row, entries["t_ms"], entries["weight"], entries["item"], layout)
    return _masses(one.own[0])


def _masses(tally: bytes) -> dict[int, float]:
    entries = np.frombuffer(tally, dtype=_TALLIED)
    return dict(zip(entries["key"].tolist(), entries["mass"].tolist(), strict=True))


def _add_to(
    tallies: list[bytes], row: Ints, key: Keys64, mass: Floats, most: int
) -> dict[int, float]:
    """Add masses (m,) of keys (m,) to the tallies of users, of which each keeps the `most`
    largest: {row: mass that left}."""
    left: dict[int, float] = {}
    named = np.flatnonzero(key != 0)
    if not len(named):
        return left
    users = np.unique(row[named])
    old = [tallies[u] for u in users.tolist()]
    old_n = np.fromiter((len(b) // _TALLY for b in old), np.int64, len(old))
    stored = np.frombuffer(b"".join(old), dtype=_TALLIED)
    at = np.concatenate([np.repeat(users, old_n), row[named]])
    keys = np.concatenate([stored["key"], key[named]])
    masses = np.concatenate([stored["mass"], mass[named]])
    order = np.lexsort((keys, at))
    at, keys, masses = at[order], keys[order], masses[order]
    new_key = np.ones(len(at), dtype=bool)
    new_key[1:] = (at[1:] != at[:-1]) | (keys[1:] != keys[:-1])
    starts = np.flatnonzero(new_key)
    entries = np.empty(len(starts), dtype=_TALLIED)
    entries["key"] = keys[starts]
    entries["mass"] = np.add.reduceat(masses, starts)
    bounds = np.searchsorted(at[starts], users, side="right").tolist()
    raw, begin = entries.tobytes(), 0
    for user, end in zip(users.tolist(), bounds, strict=True):
        if end - begin <= most:
            tallies[user] = raw[begin * _TALLY : end * _TALLY]
        else:
            kept, left[user] = _largest(entries[begin:end], most)
            tallies[user] = kept.tobytes()
        begin = end
    return left


def _largest(entries: NDArray[Any], count: int) -> tuple[NDArray[Any], float]:
    """The `count` entries of largest |mass|, in key order, and the mass of the others."""
    order = np.lexsort((entries["key"], -np.abs(entries["mass"])))
    return entries[np.sort(order[:count])], float(entries["mass"][order[count:]].sum())


def pending_items(profiles: Profiles) -> dict[int, list[int]]:
    """Items that users wait for: {row: [item key, …]} of the users with pending events."""
    return {
        row: np.unique(np.frombuffer(raw, dtype=schema.WINDOW_ENTRY)["item"]).tolist()
        for row, raw in enumerate(profiles.pending)
        if raw
    }


def resolve_pending(
    profiles: Profiles,
    vectors: Mapping[int, Floats],
    categories: Mapping[int, int],
    layout: Layout,
    space: int,
) -> int:
    """Fold the pending events of items whose vector has become known; the number folded.

    vectors: item key -> (D,) unit vector; categories: item key -> category key.
    Raises SpaceMismatch if a profile's sums live in another space than `space`.
    """
    _check_space(profiles, space)
    rows: list[int] = []
    found: list[NDArray[Any]] = []
    for row, raw in enumerate(profiles.pending):
        if not raw:
            continue
        entries = np.frombuffer(raw, dtype=schema.WINDOW_ENTRY)
        known = np.fromiter((int(i) in vectors for i in entries["item"]), bool, len(entries))
        if known.any():
            profiles.pending[row] = entries[~known].tobytes()
            rows += [row] * int(known.sum())
            found.append(entries[known])
    if not rows:
        return 0
    entries = np.concatenate(found)
    items = entries["item"].tolist()
    _add(
        profiles,
        np.asarray(rows, dtype=np.int64),
        entries["t_ms"],
        entries["weight"],
        np.stack([vectors[item] for item in items]).astype(np.float32),
        np.asarray([categories.get(item, 0) for item in items], dtype=np.uint64),
        layout,
        space,
    )
    return len(rows)


# --- migrate -------------------------------------------------------------------------------


def migrate(
    profiles: Profiles,
    rows: Sequence[int],
    transition: Floats,
    old: Mapping[int, Floats],
    new: Mapping[int, Floats],
    layout: Layout,
    space: int,
) -> None:
    """Carry the sums of these rows, all of one space, into `space`, in place.

    transition: (D, D), old vector @ transition ~ new vector. old, new: item key -> (D,) vector
    in either space. Where both vectors of an item are given, what it contributed is replaced; the
    rest of a sum goes through the transition:

        S' = S W + sum_i w_i 2^(-(T - t_i) / h) (new_i - old_i W)        i in the window
                 + r / max(r, m) sum_j m_j (new_j - old_j W)             j of the own items

    The first is exact. The second is for what the window has lost: r of the mass of S, and of
    own item j the mass m_j, which fades otherwise; m is the sum of these. Masses, categories and
    all else do not depend on the space. Raises ValueError for another shape of the transition.
    """
    if transition.shape != (layout.dimensions, layout.dimensions):
        raise ValueError(
            f"a transition of {transition.shape} cannot carry {layout.dimensions} dimensions"
        )
    header, picked = profiles.header, np.asarray(rows, dtype=np.int64)
    header["sums"][picked] = header["sums"][picked] @ transition
    header["space"][picked] = space
    items = sorted(old.keys() & new.keys())
    if not items:
        return
    before, after = (np.stack([side[i] for i in items]) for side in (old, new))  # (u, D)
    change = (after - before.astype(np.float64) @ transition).astype(np.float32)
    keys = np.asarray(items, dtype=np.uint64)
    for row in picked.tolist():
        item, share = _shares(profiles, row, layout)
        at = np.minimum(np.searchsorted(keys, item), len(keys) - 1)
        known = keys[at] == item
        header["sums"][row] += share[known].T.astype(np.float32) @ change[at[known]]


def _shares(profiles: Profiles, row: int, layout: Layout) -> tuple[Keys64, NDArray[np.float64]]:
    """Items (m,), some of them twice, and what is of them in each of a user's sums (m, K)."""
    header = profiles.header[row]
    window = np.frombuffer(profiles.window[row], dtype=schema.WINDOW_ENTRY)
    weight = window["weight"].astype(np.float64)
    age_ms = (header["updated_ms"] - window["t_ms"]).astype(np.float64)
    decayed = np.exp2(-age_ms[:, None] / layout.half_lives_ms) * weight[:, None]
    decayed[_waiting(profiles, row)] = 0.0
    lost = np.maximum(0.0, header["masses"] - np.abs(decayed).sum(axis=0))  # (K,)
    of_item = is_of_item(window)
    item = window["item"][of_item]
    own = np.frombuffer(profiles.own[row], dtype=_TALLIED)
    mass = own["mass"].astype(np.float64)
    if len(own):
        at = np.minimum(np.searchsorted(own["key"], item), len(own) - 1)
        here = own["key"][at] == item
        had = (np.exp2(-age_ms / layout.own_half_life_ms) * weight)[of_item]
        np.subtract.at(mass, at[here], had[here])
    mass = np.maximum(0.0, mass)
    portion = lost / np.maximum(np.maximum(lost, mass.sum()), np.finfo(np.float64).tiny)
    share = np.concatenate([decayed[of_item], mass[:, None] * portion])
    return np.concatenate([item, own["key"]]), share


def elsewhere(states: Sequence[bytes], space: int) -> list[int]:
    """The positions of states in another space or in none; b"" is no state."""
    here = space.to_bytes(SPACE_AT.stop - SPACE_AT.start, "little")
    return [i for i, state in enumerate(states) if state and state[SPACE_AT] != here]


def plain_spaces(states: Sequence[bytes], layout: Layout) -> Keys64:
    """(n,) the spaces of states that `Kernel.carry` is made for; 0 where a state is of another
    layout or version, has events that wait for an item's text, or is in no space yet."""
    header = heads(states, layout)
    want = np.asarray(layout.half_lives_s, dtype="<f4")
    fit = (
        (header["version"] == schema.SCHEMA_VERSION)
        & (header["dimensions"] == layout.dimensions)
        & (header["scales"] == len(want))
        & (header["half_lives_s"] == want).all(axis=1)
        & (header["pending_n"] == 0)
    )
    return np.where(fit, header["space"], np.uint64(0))


def heads(states: Sequence[bytes], layout: Layout) -> NDArray[np.void]:
    """(n,) headers, to be written to; zeros beyond the end of a state that is shorter."""
    size = layout.header.itemsize
    joined = bytearray().join([state[:size].ljust(size, b"\0") for state in states])
    return np.frombuffer(joined, dtype=layout.header)


def entries_of(
    states: Sequence[bytes], header: NDArray[np.void], layout: Layout
) -> tuple[NDArray[np.void], Ints, NDArray[np.void], Ints]:
    """The entries of windows and of own items, and where those of each state end, (n + 1,) from 0
    on."""
    lengths = {name: header[name].astype(np.int64) for name in _TAIL}
    at = np.full(len(states), layout.header.itemsize)
    found: list[Any] = []
    for name, dtype in _TAIL.items():
        end = at + lengths[name] * dtype.itemsize
        if name in ("window_n", "own_n"):
            ends = zip(states, at.tolist(), end.tolist(), strict=True)
            found.append(np.frombuffer(b"".join([s[i:j] for s, i, j in ends]), dtype=dtype))
            found.append(np.concatenate([[0], np.cumsum(lengths[name])]))
        at = end
    window, window_end, own, own_end = found
    return window, window_end, own, own_end


# What stands between the header of a state and its pending events, in order.
_TAIL: Final = {
    "window_n": schema.WINDOW_ENTRY,
    "seen_n": np.dtype("<u8"),
    "categories_n": _TALLIED,
    "own_n": _TALLIED,
}


def is_of_item(entries: NDArray[np.void]) -> NDArray[np.bool_]:
    """Whether an entry is of an item's vector, and not of a text of its own."""
    folded: NDArray[np.bool_] = (entries["item"] != 0) & (entries["flags"] & schema.FLAG_TEXT == 0)
    return folded


def _waiting(profiles: Profiles, row: int) -> list[int]:
    """The positions in a user's window of what waits for a text. An entry that is there twice and
    waits once counts once."""
    raw, window = profiles.pending[row], profiles.window[row]
    left = Counter(raw[i : i + _ENTRY] for i in range(0, len(raw), _ENTRY))
    found = []
    for i in range(0, len(window) if raw else 0, _ENTRY):
        key = window[i : i + _ENTRY]
        if left[key] > 0:
            left[key] -= 1
            found.append(i // _ENTRY)
    return found


# --- merge ---------------------------------------------------------------------------------


def merge(left: Profiles, right: Profiles, layout: Layout) -> Profiles:
    """Row by row, one profile of two that hold different events of one person (an anonymous
    visitor who logs in). Associative and commutative within rounding, as long as the bounded
    parts (window, ids, categories) keep what they hold.

    Raises SpaceMismatch where the two live in different spaces.
    """
    a, b = left.header, right.header
    if ((a["space"] != b["space"]) & (a["space"] != 0) & (b["space"] != 0)).any():
        raise SpaceMismatch("profiles of two embedding spaces cannot be merged: migrate one first")
    left, right = _copy(left), _copy(right)
    latest = np.maximum(a["updated_ms"], b["updated_ms"])
    for side in (left, right):
        _advance(side, latest, layout)
    out, add = left.header, right.header
    known = np.stack([out["events"] > 0, add["events"] > 0])
    first = np.where(known, np.stack([out["first_ms"], add["first_ms"]]), np.iinfo(np.int64).max)
    out["first_ms"] = np.where(known.any(axis=0), first.min(axis=0), 0)
    for name in (
        "events", "pending_lost", "counts", "spend", "foreign_purchases",
        "other_categories", "masses", "sums",
    ):  # fmt: skip
        out[name] += add[name]
    out["space"] = np.maximum(out["space"], add["space"])
    for i in range(len(left)):
        entries = np.frombuffer(right.categories[i], dtype=_TALLIED)
        rows = np.full(len(entries), i)
        _add_categories(left, rows, entries["key"], entries["mass"], layout)
        entries = np.frombuffer(right.own[i], dtype=_TALLIED)
        rows = np.full(len(entries), i)
        _add_to(left.own, rows, entries["key"], entries["mass"], layout.own_items)
        window = _ordered(left.window[i] + right.window[i])
        left.window[i] = window[-layout.window * _ENTRY :]
        left.seen[i] = (left.seen[i] + right.seen[i])[-layout.seen * 8 :] if layout.seen else b""
        _append_pending(left, i, right.pending[i])
        sources = left.watermarks[i].keys() | right.watermarks[i].keys()
        left.watermarks[i] = {
            s: max(left.watermarks[i].get(s, 0), right.watermarks[i].get(s, 0)) for s in sources
        }
    return left


def _copy(profiles: Profiles) -> Profiles:
    return Profiles(
        profiles.header.copy(),
        list(profiles.window),
        list(profiles.seen),
        list(profiles.categories),
        list(profiles.own),
        list(profiles.pending),
        [dict(w) for w in profiles.watermarks],
        list(profiles.fences),
        set(profiles.erased),
    )


# --- one profile, as a reader sees it ------------------------------------------------------


@dataclass(frozen=True)
class Profile:
    """One shopper. Vectors may only be compared with vectors of the same `space`."""

    user_id: str
    space: str  # 16 hex digits; "" before the first vector
    updated_ms: int  # latest event time
    first_ms: int  # earliest event time
    events: int
    counts: dict[str, int]
    spend: float
    foreign_purchases: int
    half_lives_s: tuple[float, ...]
    masses: Floats  # (K,)
    sums: Floats  # (K, D)
    window: NDArray[Any]  # (<= N,) of schema.WINDOW_ENTRY, oldest first
    categories: dict[int, float]  # category key -> decayed mass
    other_categories: float  # decayed mass of the categories that the bound pushed out
    own: dict[int, float]  # key of an item that the shopper had -> decayed mass
    seen: Keys64  # event ids remembered, oldest first
    pending: int  # events waiting for their item's text
    pending_lost: int  # events given up, because too many were waiting
    watermark: dict[int, int]  # source key -> next offset
    outlook: Outlook | None = None  # what may come next; None: not computed (yet)

    @property
    def dimensions(self) -> int:
        """Length of the vectors."""
        return int(self.sums.shape[1])

    def interest(self, scale: int) -> Floats:
        """(D,) unit vector of one time scale (0 = shortest); zeros where nothing is known."""
        return unit(self.sums[scale])

    def similarity(self, other: Profile, scale: int) -> float:
        """Cosine of two shoppers' interests. Raises SpaceMismatch across spaces."""
        if self.space != other.space:
            raise SpaceMismatch(
                f"{self.user_id} lives in space {self.space}, {other.user_id} in {other.space}"
            )
        return float(self.interest(scale) @ other.interest(scale))


def unit(vectors: Floats) -> Floats:
    """Rows scaled to length 1; a zero row stays zero."""
    norm = np.linalg.norm(vectors.astype(np.float64), axis=-1, keepdims=True)
    out: Floats = np.zeros(vectors.shape, dtype=np.float32)
    np.divide(vectors, norm, out=out, where=norm > 0, casting="same_kind")
    return out


def decode(user_id: str, state: bytes, fence: bytes = b"") -> Profile:
    """One stored profile; its layout is read from its own header.

    Raises SchemaTooNew or StateCorrupt.
    """
    (profile,) = decode_many([user_id], [state], [fence])
    return profile


def decode_many(
    user_ids: Sequence[str], states: Sequence[bytes], fences: Sequence[bytes]
) -> list[Profile]:
    """`decode` of n stored profiles, those of one layout together, in a quarter of the time."""
    alike: dict[bytes, list[int]] = {}
    for i, state in enumerate(states):
        alike.setdefault(_layout_bytes(state), []).append(i)
    found: dict[int, Profile] = {}
    for at in alike.values():
        triples = [(user_ids[i], states[i], fences[i]) for i in at]
        try:
            found.update(zip(at, _decoded(*zip(*triples, strict=True)), strict=True))
        except (SchemaTooNew, StateCorrupt):
            for i, triple in zip(at, triples, strict=True):
                found[i] = _decoded_alone(*triple)
    return [found[i] for i in range(len(states))]


def _decoded_alone(user_id: str, state: bytes, fence: bytes) -> Profile:
    """An error names the user."""
    try:
        (profile,) = _decoded([user_id], [state], [fence])
    except (SchemaTooNew, StateCorrupt) as error:
        raise type(error)(f"the profile of user {user_id!r}: {error}") from None
    return profile


def _decoded(
    user_ids: Sequence[str], states: Sequence[bytes], fences: Sequence[bytes]
) -> list[Profile]:
    """Of one layout."""
    layout = _layout_of(states[0])
    profiles = unpack(states, [fence or None for fence in fences], layout)
    header = profiles.header
    if not (np.isfinite(header["masses"]).all() and np.isfinite(header["sums"]).all()):
        raise StateCorrupt(f"it holds NaN or infinity; {_REBUILD}")
    columns = [header[name].tolist() for name in _PLAIN_FIELDS]
    counts = header["counts"][:, : len(schema.EVENT_TYPES)].tolist()
    return [
        Profile(
            user_id=user_id,
            space=f"{space:016x}" if space else "",
            **dict(zip(_PLAIN_FIELDS, plain, strict=True)),
            counts=dict(zip(schema.EVENT_TYPES, counts[row], strict=True)),
            half_lives_s=layout.half_lives_s,
            masses=np.array(header["masses"][row]),
            sums=np.array(header["sums"][row]),
            window=np.frombuffer(profiles.window[row], dtype=schema.WINDOW_ENTRY),
            categories=_masses(profiles.categories[row]),
            own=_masses(profiles.own[row]),
            seen=np.frombuffer(profiles.seen[row], dtype="<u8"),
            pending=len(profiles.pending[row]) // _ENTRY,
            watermark=profiles.watermarks[row],
        )
        for row, (user_id, space, *plain) in enumerate(
            zip(user_ids, header["space"].tolist(), *columns, strict=True)
        )
    ]


# What a profile has of its header as it stands there.
_PLAIN_FIELDS: Final = (
    "updated_ms", "first_ms", "events", "spend", "foreign_purchases", "other_categories",
    "pending_lost",
)  # fmt: skip


def _layout_bytes(state: bytes) -> bytes:
    """What of a state says which layout it is of."""
    scales = int.from_bytes(state[_SCALES], "little")
    return state[: _SCALES.stop] + state[_HALF_LIVES : _HALF_LIVES + 4 * scales]


def _layout_of(state: bytes) -> Layout:
    """The layout that a state says it was written with."""
    prefix = np.frombuffer(state[: schema.PREFIX.itemsize].ljust(6, b"\0"), dtype=schema.PREFIX)
    _check_version(prefix["version"])
    scales, dimensions = int(prefix["scales"][0]), int(prefix["dimensions"][0])
    # What the sums alone take: made-up sizes must not make up a type of gigabytes.
    if scales * dimensions == 0 or len(state) < 4 * scales * dimensions:
        raise StateCorrupt(f"its state is cut short; {_REBUILD}")
    dtype = schema.header_dtype(scales, dimensions)
    header = np.frombuffer(state[: dtype.itemsize].ljust(dtype.itemsize, b"\0"), dtype=dtype)
    try:
        return Layout(dimensions, tuple(header["half_lives_s"][0].tolist()))
    except ValueError:
        raise StateCorrupt(f"its state has impossible half-lives; {_REBUILD}") from None


# --- the JSON a person reads ---------------------------------------------------------------


def glances(profiles: Profiles, category_names: Mapping[int, str]) -> list[str]:
    """The glance field of n users: {"v", "updated_ms", "events", "counts", "spend",
    "categories"}; categories: the five of largest positive decayed mass, largest first."""
    header = profiles.header
    columns = zip(
        header["updated_ms"].tolist(),
        header["events"].tolist(),
        header["counts"][:, : len(schema.EVENT_TYPES)].tolist(),
        header["spend"].tolist(),
        _top_categories(profiles, category_names),
        strict=True,
    )
    return [
        _GLANCE % (updated_ms, events, *counts, spend, ",".join(top))
        for updated_ms, events, counts, spend, top in columns
    ]


_GLANCE: Final = (
    f'{{"v":{schema.SCHEMA_VERSION},"updated_ms":%d,"events":%d,"counts":{{'
    + ",".join(f'"{name}":%d' for name in schema.EVENT_TYPES)
    + '},"spend":%.2f,"categories":{%s}}'
)


def _top_categories(
    profiles: Profiles, names: Mapping[int, str], count: int = 5
) -> list[list[str]]:
    """Per user the heaviest categories as members of a JSON object."""
    lengths = np.asarray([len(raw) // _TALLY for raw in profiles.categories], dtype=np.int64)
    entries = np.frombuffer(b"".join(profiles.categories), dtype=_TALLIED)
    held = np.arange(lengths.max(initial=0)) < lengths[:, None]  # (n, W), W the longest tally
    mass = np.zeros(held.shape, dtype=np.float32)
    mass[held] = entries["mass"]
    top = np.argsort(-mass, axis=1, kind="stable")[:, :count]  # (n, <= count)
    mass = np.take_along_axis(mass, top, axis=1)
    liked = mass > 0
    flat = (top + (np.cumsum(lengths) - lengths)[:, None])[liked]  # positions in entries
    keys, label = np.unique(entries["key"][flat], return_inverse=True)
    labels = [json.dumps(names.get(key, f"{key:016x}")) for key in keys.tolist()]
    members = [
        f"{labels[i]}:{m:.3f}" for i, m in zip(label.tolist(), mass[liked].tolist(), strict=True)
    ]
    ends = np.cumsum(liked.sum(axis=1)).tolist()
    return [members[i:j] for i, j in zip([0, *ends], ends, strict=False)]


# --- several interests ---------------------------------------------------------------------


def interests(vectors: Floats, weights: Floats, count: int) -> tuple[Floats, Floats]:
    """Up to `count` centroids of what a shopper did lately, and their mass.

    vectors: (n, D) unit rows of the window's items; weights: (n,) decayed weights; negative
    ones take no part. Ward's agglomerative clustering as in PinnerSage (Pal et al., KDD 2020),
    which needs no seed: the same window always gives the same interests.
    Returns (c, D) unit centroids, heaviest first, and (c,) masses; c = 0 for nothing positive.
    """
    positive = weights > 0
    points, mass = vectors[positive].astype(np.float64), weights[positive].astype(np.float64)
    while len(points) > count:
        gap = np.square(points[:, None] - points[None]).sum(axis=-1)  # (n, n)
        cost = gap * (mass[:, None] * mass[None]) / (mass[:, None] + mass[None])
        np.fill_diagonal(cost, np.inf)
        i, j = sorted(np.unravel_index(int(cost.argmin()), cost.shape))
        points[i] = (mass[i] * points[i] + mass[j] * points[j]) / (mass[i] + mass[j])
        mass[i] += mass[j]
        points, mass = np.delete(points, j, axis=0), np.delete(mass, j)
    order = np.argsort(-mass, kind="stable")
    return unit(points[order].astype(np.float32)), mass[order].astype(np.float32)
