"""Test, then learn, in event time: rank the catalogue with what is known, then tell what happened.

PURE: numpy only. Knows events as columns of numbers and scorers as two methods; knows nothing
of texts, of Kafka or of how a scorer comes to its scores. For one held-out item per user see
`leave_one_out.py`; for the figures that come out of ranks, `evaluate.py`.

Dawid (1984) called a forecast that is judged by the next outcome only, and then told it,
prequential; Gama et al. (2013) use it to judge learners on streams. Nothing is held out and
nothing is seen early, so a scorer that learns while it runs is judged as it will be used.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Final, Protocol

import numpy as np
from numpy.typing import NDArray

from .evaluate import Bools, Floats, Int32s, Ints, at_or_above, ranks, top

NO_ITEM: Final = -1
SHOWN: Final = 20  # items of a ranking that count as shown, for coverage


@dataclass(frozen=True)
class Events:
    """m events of n users over a catalogue, in event-time order.

    Events of one user with the same time happened at once: a basket.
    """

    user: Ints  # (m,) 0 to n - 1
    item: Int32s  # (m,) row in the catalogue, NO_ITEM = the event has none
    type: NDArray[np.uint8]  # (m,) index into the names of event types
    t_ms: Ints  # (m,) event time
    weight: Floats  # (m,) signed event weight

    def __len__(self) -> int:
        return len(self.user)

    def take(self, chosen: Any) -> Events:
        """The events of an index, a slice or a mask."""
        return Events(
            self.user[chosen],
            self.item[chosen],
            self.type[chosen],
            self.t_ms[chosen],
            self.weight[chosen],
        )


class Scorer(Protocol):
    """What can be judged. It is told everything that happened, and only after it was asked."""

    def scores(self, users: Ints, t_ms: Ints) -> Floats:
        """(n, n_items) scores of the whole catalogue for n users, each at a time of its own.

        Every event of `users[i]` before `t_ms[i]` has been told, and none at or after it.
        Higher is better; only the order within a row counts.
        """
        ...

    def update(self, events: Events) -> None:
        """These events happened. A user's events come in event-time order, over all calls;
        those of one basket come in one call, side by side."""
        ...


@dataclass(frozen=True)
class Targets:
    """m items that were ranked before they happened, in the order of the events.

    An item that a basket holds twice is one target.
    """

    event: Ints  # (m,) position in the events
    user: Ints  # (m,)
    item: Int32s  # (m,)
    type: NDArray[np.uint8]  # (m,)
    t_ms: Ints  # (m,)
    basket: Ints  # (m,) number of the ranking that it was looked up in
    repeat: Bools  # (m,) the user had an event with this item before
    user_events: Ints  # (m,) events of the user before this basket
    item_age_ms: Ints  # (m,) since the first event with this item; -1 = there was none

    def __len__(self) -> int:
        return len(self.event)


@dataclass(frozen=True)
class Ranked:
    """Where every scorer put every target."""

    targets: Targets
    rank: dict[str, Int32s]  # scorer -> (m,) place in the whole catalogue, from 1
    rank_new: dict[str, Int32s]
    """scorer -> (m,) place among the items that are new to the user; 0 for a repeat."""
    coverage: dict[str, float]
    """scorer -> share of the catalogue that stood among the first SHOWN at least once."""


def prequential(
    events: Events,
    n_users: int,
    n_items: int,
    scorers: Mapping[str, Scorer],
    *,
    start: int = 0,
    stop: int | None = None,
    is_target: Bools | None = None,
    block: int = 1,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Ranked:
    """Rank the whole catalogue before every basket of `events[start:stop]`, then tell it.

    Events before `start` are told and not ranked. is_target: (m,) which events are looked up in
    the ranking; by default those with an item and a positive weight. All of them are told.

    block: at least so many rankings are asked for at once, where no user would come twice. With 1
    everything that happened before a basket has been told, to the millisecond. With more, what
    *others* did during a block comes later, which is faster for scorers that love batches; of a
    user's own events none is ever late, and of the future nothing is ever known.

    Raises ValueError for events out of order, or scores that are not numbers.
    """
    stop = len(events) if stop is None else stop
    if (np.diff(events.t_ms) < 0).any():
        raise ValueError("events are not in the order of their times")
    if is_target is None:
        is_target = (events.item != NO_ITEM) & (events.weight > 0)
    log = _Log(n_users, n_items, tuple(scorers))
    for first, last in blocks(events.user[:stop], events.t_ms[:stop], block):
        told = events.take(slice(first, last))
        if last > start:
            wanted = is_target[first:last].copy()
            wanted[: max(start - first, 0)] = False
            log.ask(scorers, told, first, np.flatnonzero(wanted))
        for scorer in scorers.values():
            scorer.update(told)
        log.tell(told)
        progress(last, stop)
    return log.result()


def blocks(user: Ints, t_ms: Ints, size: int) -> Iterator[tuple[int, int]]:
    """Cut events in time order: [first, last) of each block.

    A block holds whole instants, at least `size` baskets unless a user would come back, and no
    user at two times.
    """
    instants = np.flatnonzero(np.diff(t_ms, prepend=t_ms[0] - 1)) if len(t_ms) else np.zeros(0, int)
    ends = [*instants[1:].tolist(), len(t_ms)]
    first, members = 0, set[int]()
    for begin, end in zip(instants.tolist(), ends, strict=True):
        now = set(user[begin:end].tolist())
        if members and (len(members) >= size or not members.isdisjoint(now)):
            yield first, begin
            first, members = begin, set()
        members |= now
    if members:
        yield first, len(t_ms)


class _Log:
    """What the loop itself remembers, to describe the targets, and the ranks so far."""

    def __init__(self, n_users: int, n_items: int, names: tuple[str, ...]) -> None:
        self._seen: dict[int, set[int]] = {}
        self._user_events = np.zeros(n_users, dtype=np.int64)
        self._item_first_ms = np.full(n_items, -1, dtype=np.int64)
        self._shown = {name: np.zeros(n_items, dtype=bool) for name in names}
        self._columns: list[tuple[NDArray[Any], ...]] = []
        self._ranks: dict[str, list[Int32s]] = {name: [] for name in names}
        self._ranks_new: dict[str, list[Int32s]] = {name: [] for name in names}
        self._baskets = 0

    def ask(self, scorers: Mapping[str, Scorer], told: Events, offset: int, chosen: Ints) -> None:
        """Rank for the users of the targets `chosen` (positions in `told`)."""
        if not len(chosen):
            return
        pairs = told.user[chosen] * len(self._item_first_ms) + told.item[chosen]
        chosen = chosen[np.sort(np.unique(pairs, return_index=True)[1])]
        user, item, t_ms = told.user[chosen], told.item[chosen], told.t_ms[chosen]
        users, at, row = np.unique(user, return_index=True, return_inverse=True)
        seen = [self._seen.get(u, set()) for u in users.tolist()]
        repeat = np.fromiter(
            (i in seen[r] for r, i in zip(row.tolist(), item.tolist(), strict=True)),
            bool,
            len(item),
        )
        first_ms = self._item_first_ms[item]
        self._columns.append(
            (
                chosen + offset,
                user,
                item,
                told.type[chosen],
                t_ms,
                row + self._baskets,
                repeat,
                self._user_events[user],
                np.where(first_ms < 0, -1, t_ms - first_ms),
            )
        )
        self._baskets += len(users)
        known = [np.fromiter(s, np.int64, len(s)) for s in seen]
        for name, scorer in scorers.items():
            self._rank(name, scorer.scores(users, t_ms[at]), row, item, repeat, known)

    def _rank(
        self, name: str, scores: Floats, row: Ints, item: Int32s, repeat: Bools, known: list[Ints]
    ) -> None:
        try:
            place = ranks(scores, row, item)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from error
        among_new = np.zeros_like(place)
        for r, items in enumerate(known):
            mine = np.flatnonzero((row == r) & ~repeat)
            reached = at_or_above(scores[r, items], scores[r, item[mine]])
            among_new[mine] = place[mine] - reached
        self._ranks[name].append(place)
        self._ranks_new[name].append(among_new)
        self._shown[name][top(scores, SHOWN)] = True

    def tell(self, told: Events) -> None:
        """Remember what happened."""
        has_item = told.item != NO_ITEM
        user, item = told.user[has_item], told.item[has_item]
        for u, i in zip(user.tolist(), item.tolist(), strict=True):
            self._seen.setdefault(u, set()).add(i)
        np.add.at(self._user_events, told.user, 1)
        new = self._item_first_ms[item] < 0
        # Backwards, because the last of several assignments stays.
        self._item_first_ms[item[new][::-1]] = told.t_ms[has_item][new][::-1]

    def result(self) -> Ranked:
        empty = (*(np.zeros(0, t) for t in (int, int, np.int32, np.uint8, int, int, bool, int)),)
        columns = self._columns or [(*empty, np.zeros(0, int))]
        return Ranked(
            targets=Targets(*(np.concatenate(c) for c in zip(*columns, strict=True))),
            rank={n: _joined(r) for n, r in self._ranks.items()},
            rank_new={n: _joined(r) for n, r in self._ranks_new.items()},
            coverage={n: float(s.mean()) if s.size else 0.0 for n, s in self._shown.items()},
        )


def _joined(parts: list[Int32s]) -> Int32s:
    return np.concatenate(parts) if parts else np.zeros(0, dtype=np.int32)
