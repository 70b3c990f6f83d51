"""What shoppers do next to an item: streaming co-visitation, bounded and decayed.

PURE: numpy only, no clock, no I/O. Time is an argument, always event time in ms.

`arisen` turns a fold's events into pairs with the items before them; `fold` adds pairs to
the tallies of items. A pair of distance d <= 7 in a shopper's window counts 1/d for the earlier
item (what comes after it) and .7/d for the later one, all decayed forward as the sums of a
profile are. With n the decayed count of events, the closeness of j to i is

    K[i, j] = C[i, j] / ((n_i + 1)^.5 (n_j + 1)^.3)

Each pair counts once, although pairs cross partitions and processes:

 - A worker sends a micro-batch's pairs, and waits until the brokers have them, before it saves
   the profiles. So a saved profile's pairs are in the topic: the watermark of the profile keeps a
   replayed event from giving pairs again, and no pair is lost.
 - A worker that dies between sending and saving is followed by one that sends again. Both read
   the shopper's window as it was before the event, which depends on the events before it alone,
   so they send the same pairs.
 - A pair names its origin: the partition its event was read from, the lane of its shopper (a
   worker folds the lanes of a partition at the same time, each in offset order) and the offset.
   A worker sends the pairs of an origin in offset order and as a whole; all pairs of an origin
   for one item lie in one partition of the topic. So first copies reach an item in offset order,
   and what lies below the item's watermark of that origin is a copy: of a successor that began
   further back, of a stalled worker that woke up, of a reader of the topic that began again.
 - An event's pairs for one item lie in one record, so they count together or not at all.
 - An item is saved as a profile is: Redis refuses what was not folded onto the stored fence.

Two things are looser. A shopper whose events arrive on two partitions is folded by two workers,
each of which pairs an event with what it knows then: once, but not in one certain order. And what
somebody did in the very micro-batch in which they asked to be forgotten leaves no pairs.
"""

from __future__ import annotations

import struct
import zlib
from bisect import insort
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Final

import numpy as np
from numpy.typing import ArrayLike, NDArray

from . import schema
from .arithmetic import EventColumns, Floats, Ints, Keys64, read_fence
from .errors import SchemaTooNew, StateCorrupt

DISTANCE: Final = 7  # steps back in the window that still make a pair
BACKWARD: Final = 0.7  # of a pair's weight, for the later item's tally
LANES: Final = 2  # of an origin; part of what a watermark means, so it cannot change
_ITEM_SHARE: Final = 0.5  # exponents of K
_NEAR_SHARE: Final = 0.3

RECENT: Final = 10  # half-lives of an item's recent count in one of all its weights
_HEADER: Final = schema.TALLY_HEADER.itemsize
_NEAR: Final = schema.NEAR_ENTRY.itemsize
_WINDOW: Final = schema.WINDOW_ENTRY.itemsize
_ENTRY: Final = struct.Struct("<qQfBBH")  # WINDOW_ENTRY
_PAIRS_HEADER: Final = schema.PAIRS_HEADER.itemsize
_PAIR: Final = schema.PAIR_ENTRY.itemsize
# A record stays far below the 1 MB that brokers take.
_RECORD_ENTRIES: Final = 10_000


@dataclass(frozen=True)
class TallyLayout:
    """What the neighbours of an item keep."""

    most: int = 128
    half_life_s: float = 2_592_000.0  # the longest of a profile


def lane_of(user_id: str) -> int:
    """The lane that a shopper's events are folded in."""
    return zlib.crc32(user_id.encode()) % LANES


def origins(sources: ArrayLike, lanes: ArrayLike) -> Keys64:
    """(m,) the origins of events: the source with the lane in its lowest bit."""
    lowest = np.uint64(LANES - 1)
    found: Keys64 = np.asarray(sources, np.uint64) & ~lowest | np.asarray(lanes, np.uint64)
    return found


# --- events -> pairs -----------------------------------------------------------------------


def arisen(
    before: Sequence[bytes],
    events: EventColumns,
    applied: Ints,
    began: NDArray[np.bool_],
    window: int,
) -> tuple[NDArray[Any], Ints]:
    """The pairs that m events make with what lies before them in their shoppers' windows.

    before: n windows before the fold; applied: the events that counted (`Folded.applied`); began:
    (n,) shoppers of whom the fold kept nothing from before; window: entries that a window has.
    Returns (p,) of PAIR_ENTRY and (p,) the event behind each, as index into `events`.

    Steps are entries of the window, so a search in between is a step as well. An event is
    paired with the latest entries that arrived before it, whatever its own time; so it does not
    matter how the events were cut into batches.
    """
    weighty = applied[events.weight[applied] != 0]
    weighty = weighty[np.argsort(events.row[weighty], kind="stable")]
    if not len(weighty):
        return np.zeros(0, schema.PAIR_ENTRY), weighty
    row, t_ms = events.row[weighty], events.t_ms[weighty]
    reach = min(DISTANCE, window)
    users, starts, counts = np.unique(row, return_index=True, return_counts=True)
    tails = [
        b"" if new else before[user][-reach * _WINDOW :]
        for user, new in zip(users.tolist(), began[users].tolist(), strict=True)
    ]
    tail_n = np.fromiter(map(len, tails), np.int64, len(tails)) // _WINDOW
    old: NDArray[Any] = np.frombuffer(b"".join(tails), schema.WINDOW_ENTRY)
    late = _late(old, tail_n, row, t_ms, starts)
    found = [
        _in_order(
            old, np.repeat(~late, tail_n), tail_n, events, weighty, np.repeat(~late, counts), reach
        )
    ]
    if late.any():
        mine = [weighty[starts[u] : starts[u] + counts[u]] for u in np.flatnonzero(late).tolist()]
        ends = [tails[u] for u in np.flatnonzero(late).tolist()]
        found.append(_out_of_order(ends, events, mine, reach))
    earlier = np.concatenate([part[0] for part in found])
    event = np.concatenate([part[1] for part in found])
    d = np.concatenate([part[2] for part in found])
    own = weighty[_counts(events.item[weighty], events.weight[weighty])]
    return _entries(events, earlier, event, d, own)


def _counts(item: Keys64, weight: Floats) -> NDArray[np.bool_]:
    """Whether an entry of the window takes part: an item, and no dislike."""
    counts: NDArray[np.bool_] = (item != 0) & (weight > 0)
    return counts


def _late(
    old: NDArray[Any], tail_n: Ints, row: Ints, t_ms: Ints, starts: Ints
) -> NDArray[np.bool_]:
    """(u,) users whose events do not all come after each other and after their window. Ties do
    not: the order of a window settles them by more than time."""
    late = np.zeros(len(starts), dtype=bool)
    latest = np.full(len(starts), np.iinfo(np.int64).min)
    known = tail_n > 0
    latest[known] = old["t_ms"][np.cumsum(tail_n)[known] - 1]
    late |= t_ms[starts] <= latest
    place = np.cumsum(np.isin(np.arange(len(row)), starts)) - 1
    np.logical_or.at(late, place[1:], (row[1:] == row[:-1]) & (t_ms[1:] <= t_ms[:-1]))
    return late


def _in_order(
    old: NDArray[Any],
    of_old: NDArray[np.bool_],
    tail_n: Ints,
    events: EventColumns,
    weighty: Ints,
    of_new: NDArray[np.bool_],
    reach: int,
) -> tuple[Keys64, Ints, Ints]:
    """Of users whose events come in order: (p,) earlier item, (p,) later event, (p,) distance."""
    new = weighty[of_new]
    user_old = np.repeat(np.unique(events.row[weighty]), tail_n)[of_old]
    user = np.concatenate([user_old, events.row[new]])
    order = np.argsort(user, kind="stable")
    user = user[order]
    item = np.concatenate([old["item"][of_old], events.item[new]])[order]
    weight = np.concatenate([old["weight"][of_old], events.weight[new]])[order]
    event = np.concatenate([np.full(len(user_old), -1), new])[order]
    counts = _counts(item, weight)
    later = counts & (event >= 0)
    found = [
        np.flatnonzero(later[d:] & counts[:-d] & (user[d:] == user[:-d])) + d
        for d in range(1, reach + 1)
    ]
    distance = np.repeat(np.arange(1, reach + 1), [len(at) for at in found])
    at = np.concatenate(found)
    return item[at - distance], event[at], distance


def _out_of_order(
    tails: Sequence[bytes], events: EventColumns, mine: Sequence[Ints], reach: int
) -> tuple[Keys64, Ints, Ints]:
    """The same for users whose events do not, event by event: what an event meets is the end of
    the window as it was then, in the order that `arithmetic` keeps it in."""
    index = np.concatenate(mine)
    news = list(
        zip(
            events.t_ms[index].tolist(),
            events.item[index].tolist(),
            events.weight[index].tolist(),
            events.type[index].tolist(),
            np.where(events.text[index], schema.FLAG_TEXT, 0).tolist(),
            strict=True,
        )
    )
    earlier: list[int] = []
    met: list[int] = []  # per event, how many
    distance: list[int] = []
    begin = 0
    for tail, own in zip(tails, mine, strict=True):
        end = [entry[:5] for entry in _ENTRY.iter_unpack(tail)]
        for new in news[begin : begin + len(own)]:
            before = len(earlier)
            if new[1] and new[2] > 0:
                for d, entry in enumerate(reversed(end), 1):
                    if entry[1] and entry[2] > 0:
                        earlier.append(entry[1])
                        distance.append(d)
            met.append(len(earlier) - before)
            if end and new <= end[-1]:
                insort(end, new)
            else:
                end.append(new)
            if len(end) > reach:
                del end[0]
        begin += len(own)
    return (
        np.array(earlier, np.uint64),
        np.repeat(index, met),
        np.array(distance, np.int64),
    )


def _entries(
    events: EventColumns, earlier: Keys64, event: Ints, d: Ints, own: Ints
) -> tuple[NDArray[Any], Ints]:
    p = len(event)
    of = np.concatenate([event, event, own])
    out = np.zeros(len(of), schema.PAIR_ENTRY)
    out["item"] = np.concatenate([earlier, events.item[event], events.item[own]])
    out["neighbour"][:p], out["neighbour"][p : 2 * p] = events.item[event], earlier
    out["weight"] = np.concatenate([1 / d, BACKWARD / d, np.ones(len(own))])
    out["offset"] = np.asarray(events.offset, dtype=np.int64)[of]
    out["t_ms"] = events.t_ms[of]
    return out, of


# --- pairs -> records of the topic, and back -----------------------------------------------


def records(entries: NDArray[Any], origin: Keys64, partitions: int) -> list[tuple[int, bytes]]:
    """(partition, value) of the records that carry (p,) entries of (p,) origins, to be sent in
    this order."""
    partition = entries["item"] % np.uint64(partitions)
    order = np.lexsort((entries["offset"], origin, partition))
    entries, origin, partition = entries[order], origin[order], partition[order]
    if not len(entries):
        return []
    group = np.flatnonzero((np.diff(partition) != 0) | (np.diff(origin) != 0)) + 1
    out: list[tuple[int, bytes]] = []
    for start, end in pairwise([0, *group.tolist(), len(entries)]):
        head = np.array([(schema.PAIRS_VERSION, origin[start])], schema.PAIRS_HEADER).tobytes()
        to = int(partition[start])
        out += [(to, head + piece.tobytes()) for piece in _pieces(entries[start:end])]
    return out


def _pieces(entries: NDArray[Any]) -> list[NDArray[Any]]:
    """Cut between two events: an event's pairs stay together."""
    if len(entries) <= _RECORD_ENTRIES:
        return [entries]
    firsts = np.flatnonzero(np.diff(entries["offset"])) + 1
    near = np.searchsorted(firsts, np.arange(_RECORD_ENTRIES, len(entries), _RECORD_ENTRIES))
    return np.split(entries, np.unique(firsts[near[near < len(firsts)]]))


@dataclass(frozen=True)
class Pairs:
    """p pairs as they arrived."""

    entries: NDArray[Any]  # (p,) of PAIR_ENTRY
    origin: Keys64  # (p,)
    record: Ints  # (p,) number of the record, ascending


def read_records(values: Sequence[bytes | None]) -> tuple[Pairs, int]:
    """The pairs of some records, in order, and how many records are none of a known version."""
    good = [
        value
        for value in values
        if value is not None
        and len(value) >= _PAIRS_HEADER
        and (len(value) - _PAIRS_HEADER) % _PAIR == 0
        and int.from_bytes(value[:8], "little") == schema.PAIRS_VERSION
    ]
    heads: NDArray[Any] = np.frombuffer(
        b"".join([value[:_PAIRS_HEADER] for value in good]), schema.PAIRS_HEADER
    )
    entries: NDArray[Any] = np.frombuffer(
        b"".join([value[_PAIRS_HEADER:] for value in good]), schema.PAIR_ENTRY
    )
    lengths = [(len(value) - _PAIRS_HEADER) // _PAIR for value in good]
    return Pairs(
        entries,
        np.repeat(heads["origin"], lengths),
        np.repeat(np.arange(len(good)), lengths),
    ), len(values) - len(good)


# --- tallies -------------------------------------------------------------------------------


@dataclass
class Tallies:
    """n items as a structure of arrays, mutable while pairs are folded."""

    header: NDArray[Any]  # (n,) of TALLY_HEADER
    near: list[bytes]  # NEAR_ENTRY, ordered by item
    watermarks: list[dict[int, int]]  # origin -> next offset
    fences: list[bytes]  # as loaded; b"" = none

    def __len__(self) -> int:
        return len(self.header)


def unpack(
    headers: Sequence[bytes | None],
    near: Sequence[bytes | None],
    fences: Sequence[bytes | None],
    layout: TallyLayout,
) -> Tallies:
    """Stored fields of n items -> Tallies; None is an item without neighbours.

    Raises SchemaTooNew or StateCorrupt. A tally of another half-life goes on with the layout's.
    """
    blank = np.zeros(1, schema.TALLY_HEADER)
    blank["version"] = schema.SCHEMA_VERSION
    empty = blank.tobytes()
    for head, entries in zip(headers, near, strict=True):
        if head is not None:
            _check(head, entries or b"")
    header = np.frombuffer(
        bytearray().join([empty if head is None else head for head in headers]),
        schema.TALLY_HEADER,
    )
    header["half_life_s"] = layout.half_life_s
    return Tallies(
        header,
        [entries or b"" for entries in near],
        [read_fence(fence)[3] if fence else {} for fence in fences],
        [fence or b"" for fence in fences],
    )


def _check(head: bytes, near: bytes) -> None:
    version = int.from_bytes(head[:2], "little")
    if version > schema.SCHEMA_VERSION:
        raise SchemaTooNew(
            f"neighbours written with schema version {version}, this penchant knows up to "
            f"{schema.SCHEMA_VERSION}: upgrade it"
        )
    if len(head) != _HEADER or len(near) != int.from_bytes(head[2:4], "little") * _NEAR:
        raise StateCorrupt(f"a tally of {len(head)} and {len(near)} bytes: delete it")


def pack(tallies: Tallies) -> list[bytes]:
    """The tally fields of n items; their near fields are `tallies.near` as they are."""
    tallies.header["near_n"] = [len(raw) // _NEAR for raw in tallies.near]
    raw = tallies.header.tobytes()
    return [raw[i : i + _HEADER] for i in range(0, len(raw), _HEADER)]


@dataclass(frozen=True)
class Folded:
    """What became of the pairs of one fold."""

    touched: list[int]  # items whose tally or watermark moved
    applied: int
    replayed: int  # copies of what counted before


def fold(tallies: Tallies, rows: Ints, pairs: Pairs, layout: TallyLayout) -> Folded:
    """Add p pairs to n items' tallies, in place; rows: (p,) index of the pair's item.

    Each pair counts once: what an origin's watermark covers changes nothing. Beyond
    `layout.most` neighbours the lightest leave for `other`, so that no weight is lost.
    """
    admitted = _admit(tallies, rows, pairs)
    entries, rows = pairs.entries[admitted], rows[admitted]
    touched = np.unique(rows)
    if len(touched):
        _add(tallies, touched, rows, entries, layout)
    return Folded(touched.tolist(), len(admitted), len(pairs.entries) - len(admitted))


def _admit(tallies: Tallies, rows: Ints, pairs: Pairs) -> Ints:
    """The pairs that count, as indices; moves watermarks."""
    order = np.lexsort((pairs.origin, rows))  # stable: in order of arrival within an origin
    row, origin = rows[order], pairs.origin[order]
    offset, record = pairs.entries["offset"][order], pairs.record[order]
    if not len(order):
        return order
    first = np.ones(len(order), dtype=bool)
    first[1:] = (row[1:] != row[:-1]) | (origin[1:] != origin[:-1])
    group = np.cumsum(first) - 1
    at = np.flatnonzero(first)
    moved = list(zip(row[at].tolist(), origin[at].tolist(), strict=True))
    known = np.array([tallies.watermarks[r].get(o, 0) for r, o in moved])
    # Behind what came before it is a copy; level with it, unless it is of the same record.
    distinct, rank = np.unique(offset, return_inverse=True)
    place = group * len(distinct) + rank
    highest = np.maximum.accumulate(place)
    _, met, which = np.unique(place, return_index=True, return_inverse=True)
    admitted = (place == highest) & (record == record[met][which]) & (offset >= known[group])
    last = highest[np.append(at[1:], len(order)) - 1]  # of each group
    ends = np.maximum(known, distinct[last % len(distinct)] + 1)
    for (r, o), end in zip(moved, ends.tolist(), strict=True):
        tallies.watermarks[r][o] = end
    kept: Ints = np.sort(order[admitted])
    return kept


def _add(
    tallies: Tallies, touched: Ints, rows: Ints, entries: NDArray[Any], layout: TallyLayout
) -> None:
    header = tallies.header
    half_life_ms = 1000.0 * layout.half_life_s
    latest = header["updated_ms"].copy()
    np.maximum.at(latest, rows, entries["t_ms"])
    gone = np.exp2((header["updated_ms"] - latest) / half_life_ms)  # (n,)
    header["updated_ms"] = latest
    header["count"] *= gone
    header["other"] *= gone
    header["recent"] *= gone**RECENT
    age = np.exp2((entries["t_ms"] - latest[rows]) / half_life_ms)  # (p,) 1 = the latest
    share = entries["weight"] * age
    own = entries["neighbour"] == 0
    header["count"] += np.bincount(rows[own], share[own], len(header)).astype(np.float32)
    recent = entries["weight"][own] * age[own] ** RECENT
    header["recent"] += np.bincount(rows[own], recent, len(header)).astype(np.float32)
    raw = [tallies.near[row] for row in touched.tolist()]
    held: NDArray[Any] = np.frombuffer(b"".join(raw), schema.NEAR_ENTRY)
    of_held = np.repeat(touched, [len(r) // _NEAR for r in raw])
    row = np.concatenate([of_held, rows[~own]])
    item = np.concatenate([held["item"], entries["neighbour"][~own]])
    weight = np.concatenate([held["weight"] * gone[of_held], share[~own]])
    order = np.lexsort((item, row))
    row, item = row[order], item[order]
    first = np.ones(len(row), dtype=bool)
    first[1:] = (row[1:] != row[:-1]) | (item[1:] != item[:-1])
    at = np.flatnonzero(first)
    if not len(at):
        return
    merged = np.empty(len(at), schema.NEAR_ENTRY)
    merged["item"], merged["weight"] = item[at], np.add.reduceat(weight[order], at)
    bounds = np.searchsorted(row[at], touched, side="right").tolist()
    begin = 0
    for r, end in zip(touched.tolist(), bounds, strict=True):
        mine, begin = merged[begin:end], end
        if len(mine) > layout.most:
            mine, lost = _heaviest(mine, layout.most)
            header["other"][r] += lost
        tallies.near[r] = mine.tobytes()


def _heaviest(entries: NDArray[Any], count: int) -> tuple[NDArray[Any], float]:
    """The `count` heaviest in the order of items, and the weight of the others."""
    order = np.lexsort((entries["item"], -entries["weight"]))
    return entries[np.sort(order[:count])], float(entries["weight"][order[count:]].sum())


# --- one item, as a reader sees it ---------------------------------------------------------


@dataclass(frozen=True)
class Neighbours:
    """An item and what shoppers did next to it. Weights are decayed to `updated_ms`."""

    updated_ms: int
    half_life_s: float
    count: float  # decayed events with the item
    near: Mapping[int, float]  # item key -> decayed pair weight
    other: float = 0.0  # of the neighbours beyond the bound
    recent: float = 0.0  # as `count`, with 1 / RECENT of the half-life

    def share(self, t_ms: int) -> float:
        """What is left of a weight at a time."""
        return float(2.0 ** (min(0, self.updated_ms - t_ms) / (1000.0 * self.half_life_s)))

    def recent_at(self, t_ms: int) -> float:
        """What is left of `recent` at a time."""
        return self.recent * self.share(t_ms) ** RECENT


NOTHING: Final = Neighbours(0, 1.0, 0.0, {})


def decode(tally: bytes | None, near: bytes | None = None) -> Neighbours:
    """The stored fields of one item, or of its tally alone. Raises SchemaTooNew, StateCorrupt."""
    if tally is None:
        return NOTHING
    if near is None:
        near = bytes(int.from_bytes(tally[2:4], "little") * _NEAR)
        _check(tally, near)
        near = b""
    else:
        _check(tally, near)
    header = np.frombuffer(tally, schema.TALLY_HEADER)[0]
    entries = np.frombuffer(near, schema.NEAR_ENTRY)
    numbers = [float(header[name]) for name in ("half_life_s", "count", "other", "recent")]
    if not (numbers[0] > 0 and np.isfinite(numbers).all() and np.isfinite(entries["weight"]).all()):
        raise StateCorrupt("a tally of impossible numbers: delete it")
    return Neighbours(
        int(header["updated_ms"]),
        float(header["half_life_s"]),
        float(header["count"]),
        dict(zip(entries["item"].tolist(), entries["weight"].tolist(), strict=True)),
        float(header["other"]),
        float(header["recent"]),
    )


def closeness(weight: float, item_count: float, near_count: float) -> float:
    """K: a pair weight between two items of these counts, all decayed to one time."""
    return weight / float((item_count + 1) ** _ITEM_SHARE * (near_count + 1) ** _NEAR_SHARE)
