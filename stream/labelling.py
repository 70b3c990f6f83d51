"""Archived events -> labelled windows.

PURE. It knows event types and what a label means; it does not know files, Kafka or models.

The result is a function of the set of events alone. Rows may come in any order, in any pieces,
and more than once (a segment read twice, ranges that overlap after a crash): each offset of a
source counts once, and event time orders what is left; events of one instant stand as in the window
of a profile, which does not know how they arrived. An event that was sent again counts once
too, with the label that arrived last.

No label looks back: it is made of events of later instants than the one that ends the window, and
the window of events up to that one. The lines of an invoice share their instant: none of them is
what follows another. A label whose horizon has not passed, by what is here of its shopper's own
partitions, is held back, also where its answer is known already: otherwise the newest windows
would be positive or absent.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from model.windows import (
    HELD_BACK,
    NO_ITEM,
    Bools,
    Floats,
    Int8s,
    Int32s,
    Ints,
    Labelled,
    Types,
)
from profiles.schema import key64

from .times import DAY_MS

Keys64 = NDArray[np.uint64]

NEUTRAL_RATING: Final = 3.0
RATING_SPAN: Final = 2.0


@dataclass(frozen=True)
class Archived:
    """n archived events, in any order."""

    users: list[str]  # names of the codes in `user`
    item_ids: list[str]  # names of the codes in `item`
    user: Int32s  # (n,)
    item: Int32s  # (n,) -1 = none
    type: Types  # (n,) index into the event types
    t_ms: Ints  # (n,) event time
    event: Keys64  # (n,) key of the event id, 0 = none
    rating: Floats  # (n,) NaN = none
    label: NDArray[np.object_]  # (n,) str, "" = none
    source: Keys64  # (n,) key of the partition that the event came from
    offset: Ints  # (n,) in that partition

    def __len__(self) -> int:
        return len(self.user)


@dataclass(frozen=True)
class Rules:
    """How windows are labelled."""

    weights: Mapping[str, float]  # by event type; a review's is scaled by its rating
    purchase_ms: int = 7 * DAY_MS
    returns_ms: int = 30 * DAY_MS
    user_events: int = 2_000
    """The newest so many events of a user are kept: a bot, or a flood, is one voice of many."""

    def __post_init__(self) -> None:
        """Raises ValueError for what cannot be."""
        for name in ("purchase_ms", "returns_ms", "user_events"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1")


def signed_weights(
    type_: Types, rating: Floats, types: Sequence[str], weights: Mapping[str, float]
) -> Floats:
    """(n,) what each event is worth: its type's weight, a review's times (rating - 3) / 2."""
    table = np.zeros(256, np.float32)
    table[: len(types)] = [weights.get(name, 0.0) for name in types]
    out: Floats = table[type_]
    rated = (type_ == types.index("review")) & ~np.isnan(rating)
    out[rated] *= (rating[rated] - NEUTRAL_RATING) / RATING_SPAN
    return out


def label(
    events: Archived,
    catalogue: Mapping[str, int],
    types: Sequence[str],
    rules: Rules,
    reached_ms: Mapping[int, int],
) -> Labelled:
    """Windows of all users. `catalogue`: item id -> row; `reached_ms`: source -> the event time up
    to which all that happened there is here, for the partitions that the topic has today. A
    shopper's horizons pass with the partitions that they were met in, those of a shopper who was
    met in none of today's with all of them.

    Events of unknown items keep their place in the window with item -1, and are no next item.
    """
    e = _take(events, _once(events.source, events.offset))
    user = _ranks(e.users)[e.user] if len(e) else e.user
    order = np.lexsort((e.offset, e.source, e.t_ms, user))
    e, user = _take(e, order), user[order]
    until_ms = _until_ms(user, e.source, reached_ms)
    e = replace(e, label=_latest_labels(user, e))
    fresh = np.flatnonzero(_is_first_of_its_id(user, e.event))
    e, user = _take(e, fresh), user[fresh]
    weight = signed_weights(e.type, e.rating, types, rules.weights)
    keys = np.array([key64(item_id) for item_id in e.item_ids] + [0], np.uint64)[e.item]
    order = np.lexsort((e.type, weight, keys, e.t_ms, user))
    e, user, weight = _take(e, order), user[order], weight[order]

    n = len(e)
    begins = np.flatnonzero(np.diff(user, prepend=-1))
    bounds = np.append(begins, n)
    end = np.repeat(bounds[1:], np.diff(bounds))
    rows = np.array([catalogue.get(i, NO_ITEM) for i in e.item_ids] + [NO_ITEM], np.int32)
    item = rows[e.item]  # code -1 is the last row: no item

    last = _last_of_instant(user, e.t_ms)
    now_ms = until_ms[user]
    # What the shop shows is no act of the shopper's.
    acts = e.type != types.index("impression")
    columns: dict[str, Any] = {
        "item": item,
        "type": e.type,
        "t_ms": e.t_ms,
        "weight": weight,
        "purchase": _within(
            e.type == types.index("purchase"), e.t_ms, last, end, rules.purchase_ms, now_ms
        ),
        "returns": _within(acts, e.t_ms, last, end, rules.returns_ms, now_ms),
        "rating": e.rating,
    }
    kept = np.flatnonzero(end - np.arange(n) <= rules.user_events)
    sizes = np.minimum(np.diff(bounds), rules.user_events)
    return Labelled(
        start=np.concatenate([np.zeros(1, np.int64), np.cumsum(sizes, dtype=np.int64)]),
        user=[e.users[code] for code in e.user[begins].tolist()],
        label=e.label[kept].tolist(),
        **{name: column[kept] for name, column in columns.items()},
    )


def _take(events: Archived, at: NDArray[np.intp]) -> Archived:
    columns = {
        f.name: getattr(events, f.name)[at]
        for f in fields(events)
        if f.name not in ("users", "item_ids")
    }
    return Archived(events.users, events.item_ids, **columns)


def _once(source: Keys64, offset: Ints) -> NDArray[np.intp]:
    """One row of each (source, offset): copies are equal, so it does not matter which."""
    order: NDArray[np.intp] = np.lexsort((offset, source))
    s, o = source[order], offset[order]
    new = np.ones(len(order), np.bool_)
    new[1:] = (s[1:] != s[:-1]) | (o[1:] != o[:-1])
    once: NDArray[np.intp] = order[new]
    return once


def _ranks(names: Sequence[str]) -> Int32s:
    """(u,) place of each name among the sorted names."""
    ranks = np.empty(len(names), np.int32)
    ranks[sorted(range(len(names)), key=names.__getitem__)] = np.arange(len(names), dtype=np.int32)
    return ranks


def _is_first_of_its_id(user: Int32s, event: Keys64) -> Bools:
    """(n,) False for later events of the same user and id. The rows are in order."""
    first: Bools = event == 0
    named = np.flatnonzero(~first)
    order = named[np.lexsort((named, event[named], user[named]))]
    new = np.ones(len(order), np.bool_)
    new[1:] = (user[order[1:]] != user[order[:-1]]) | (event[order[1:]] != event[order[:-1]])
    first[order[new]] = True
    return first


def _latest_labels(user: Int32s, e: Archived) -> NDArray[np.object_]:
    """(n,) labels, where a repeat of an event brings one: people look at a message later than the
    shop's producer did. Of several the one that arrived last counts."""
    given: NDArray[np.object_] = e.label.copy()
    places: dict[tuple[int, int], str] = {}
    told = np.flatnonzero((e.label != "") & (e.event != 0))
    for at in told[np.lexsort((e.offset[told], e.source[told]))].tolist():
        places[int(user[at]), int(e.event[at])] = e.label[at]
    if places:
        of_event = {event for _, event in places}
        named = np.flatnonzero(np.isin(e.event, np.array(sorted(of_event), np.uint64)))
        for at in named.tolist():
            given[at] = places.get((int(user[at]), int(e.event[at])), given[at])
    return given


def _last_of_instant(user: Int32s, t_ms: Ints) -> Ints:
    """(n,) the last row of each row's user and time. The rows are in order."""
    ends = np.ones(len(user), np.bool_)
    ends[:-1] = (user[1:] != user[:-1]) | (t_ms[1:] != t_ms[:-1])
    at = np.flatnonzero(ends)
    return np.asarray(at[np.searchsorted(at, np.arange(len(user)))])


def _next(wanted: Bools, end: Ints) -> Ints:
    """(n,) index of the next wanted row after each row; `end` or more where its user has none."""
    n = len(wanted)
    at = np.append(np.where(wanted, np.arange(n), n), n)
    nearest: Ints = np.minimum.accumulate(at[::-1])[::-1][1:]
    return nearest


def _until_ms(user: Int32s, source: Keys64, reached_ms: Mapping[int, int]) -> Ints:
    """(u,) up to when everything is known of each user."""
    never = np.iinfo(np.int64).max
    sources, at = np.unique(source, return_inverse=True)
    of_source = np.array([reached_ms.get(s, never) for s in sources.tolist()], np.int64)
    of_user = np.full(int(user.max(initial=-1)) + 1, never)
    np.minimum.at(of_user, user, of_source[at])
    of_user[of_user == never] = min(reached_ms.values(), default=0)
    return of_user


def _within(
    wanted: Bools, t_ms: Ints, last: Ints, end: Ints, horizon_ms: int, now_ms: Ints
) -> Int8s:
    """(n,) 1 where a wanted row of the same user follows within the horizon after this instant,
    whose last row is `last`, else 0; held back until a further event of that time can no longer be
    within it."""
    at = _next(wanted, end)[last]
    found = at < end
    near = found & (t_ms[np.where(found, at, 0)] - t_ms <= horizon_ms) if len(t_ms) else found
    out: Int8s = np.where(t_ms + horizon_ms < now_ms, near, HELD_BACK).astype(np.int8)
    return out
