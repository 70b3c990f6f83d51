"""What a profile has to beat: counters, neighbours and untrained text, each a `Scorer`.

PURE: numpy only. They learn from every event and need no training. Item x item counts are held
dense, so a catalogue of more than `MOST_ITEMS` items is refused: these are yardsticks for
recorded sets, not what serves a shop.

Only events with an item and a positive weight count; text profiles take negative weights too.
Neural yardsticks stand in `sequence_baselines.py`, because they need torch and a training.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Final

import numpy as np
from numpy.typing import NDArray

from .evaluate import Floats, Int32s, Ints
from .prequential import NO_ITEM, Events, Scorer

MOST_ITEMS: Final = 30_000  # 3.6 GB of pair counts
DAY_MS: Final = 86_400_000.0
HALF_LIVES_MS: Final = (1_800_000.0, DAY_MS, 30 * DAY_MS)  # of a profile's time scales
OWN_HALF_LIFE_MS: Final = 3 * HALF_LIVES_MS[-1]  # of its own items
OWN_ITEMS: Final = 64  # that it keeps

Window = tuple[Int32s, Ints, Floats]
"""Items (NO_ITEM = none), times and weights of shoppers' latest events, (n, L) each."""

_TIE_BREAK: Final = 1e-6
_NO_ITEMS: Final[Int32s] = np.zeros(0, dtype=np.int32)


class Popular:
    """The most popular items of late: event counts with a half-life."""

    def __init__(self, n_items: int, half_life_ms: float = 14 * DAY_MS) -> None:
        self._counts = np.zeros(n_items, dtype=np.float64)
        self._half_life_ms = half_life_ms
        self._now_ms = 0

    def scores(self, users: Ints, t_ms: Ints) -> Floats:
        row = self._counts / max(float(self._counts.max(initial=0.0)), 1e-30)
        return np.broadcast_to(row.astype(np.float32), (len(users), len(row)))

    def counts(self, t_ms: int) -> NDArray[np.float64]:
        """(n_items,) decayed to `t_ms`."""
        gone = max(t_ms - self._now_ms, 0) / self._half_life_ms
        return np.asarray(self._counts * 2.0**-gone)

    def update(self, events: Events) -> None:
        events = _positive(events)
        if not len(events):
            return
        latest = max(int(events.t_ms.max()), self._now_ms)
        self._counts *= 2.0 ** ((self._now_ms - latest) / self._half_life_ms)
        self._now_ms = latest
        share = 2.0 ** ((events.t_ms - latest) / self._half_life_ms)
        np.add.at(self._counts, events.item, share)


class OwnFrequency:
    """The shopper's own items, each basket counting `decay` of the next.

    Items that the shopper never had are ordered by popularity: without it they would all tie.
    """

    def __init__(self, n_items: int, decay: float = 0.9) -> None:
        self._n_items, self._decay = n_items, decay
        self._popular = Popular(n_items)
        self._own: dict[int, tuple[Ints, NDArray[np.float64]]] = {}

    def scores(self, users: Ints, t_ms: Ints) -> Floats:
        masses = np.zeros((len(users), self._n_items), dtype=np.float32)
        for row, user in enumerate(users.tolist()):
            if user in self._own:
                items, mass = self._own[user]
                masses[row, items] = mass
        return masses + np.float32(_TIE_BREAK) * self._popular.scores(users, t_ms)

    def update(self, events: Events) -> None:
        self._popular.update(events)
        nothing = np.zeros(0, np.int64), np.zeros(0)
        for user, _, basket in baskets(_positive(events)):
            items, mass = self._own.get(user, nothing)
            items, place = np.unique(
                np.concatenate([items, basket.astype(np.int64)]), return_inverse=True
            )
            share = np.concatenate([mass * self._decay, np.ones(len(basket))])
            self._own[user] = items, np.bincount(place, share).astype(np.float64)


class OwnItems:
    """The shopper's own items as a profile tallies them: weights that fade in time, and of each
    shopper the `most` heaviest.

    What the shopper never had, or disliked, is ordered by popularity.
    """

    def __init__(
        self,
        n_users: int,
        n_items: int,
        half_life_ms: float = OWN_HALF_LIFE_MS,
        most: int = OWN_ITEMS,
    ) -> None:
        self._n_items, self._half_life_ms, self._most = n_items, half_life_ms, most
        self._popular = Popular(n_items)
        self._now_ms = np.zeros(n_users, dtype=np.int64)
        # Items and masses of each shopper, and the time that these are of.
        self._own: dict[int, tuple[Ints, NDArray[np.float64], int]] = {}

    def scores(self, users: Ints, t_ms: Ints) -> Floats:
        masses = self.masses(users)
        heaviest = masses.max(axis=1, keepdims=True, initial=np.float32(1e-30))
        popular = np.float32(_TIE_BREAK) * self._popular.scores(users, t_ms)
        return np.asarray(masses / heaviest + popular)

    def masses(self, users: Ints, window: Window | None = None) -> Floats:
        """(n, n_items) decayed to the shopper's latest event; 0 = not kept, or disliked. An item
        of the shoppers' windows that is not kept counts by its entries there."""
        masses = np.zeros((len(users), self._n_items), dtype=np.float32)
        if window is not None:
            item, t_ms, weight = window
            at = np.nonzero(item != NO_ITEM)
            share = self._share(self._now_ms[users[at[0]]] - t_ms[at])
            np.add.at(masses, (at[0], item[at]), weight[at] * share)
        for row, user in enumerate(users.tolist()):
            if user in self._own:
                items, mass, told_ms = self._own[user]
                masses[row, items] = mass * self._share(self._now_ms[user] - told_ms)
        return np.maximum(masses, 0.0)

    def update(self, events: Events) -> None:
        self._popular.update(events)
        np.maximum.at(self._now_ms, events.user, events.t_ms)
        events = events.take((events.item != NO_ITEM) & (events.weight != 0))
        order = np.lexsort((events.t_ms, events.user))
        bounds = np.flatnonzero(np.diff(events.user[order], prepend=-1, append=-1))
        for first, last in pairwise(bounds.tolist()):
            self._tell(int(events.user[order[first]]), events.take(order[first:last]))

    def _tell(self, user: int, events: Events) -> None:
        now_ms = int(events.t_ms[-1])
        items, mass, t_ms = self._own.get(user, (np.zeros(0, np.int64), np.zeros(0), now_ms))
        added = events.weight * self._share(now_ms - events.t_ms)
        items, place = np.unique(np.concatenate([items, events.item]), return_inverse=True)
        both = np.concatenate([mass * self._share(now_ms - t_ms), added])
        mass = np.bincount(place, both).astype(np.float64)
        kept = np.sort(np.argsort(-np.abs(mass), kind="stable")[: self._most])
        self._own[user] = items[kept], mass[kept], now_ms

    def _share(self, age_ms: Ints | int) -> NDArray[np.float64]:
        return np.asarray(2.0 ** (-np.asarray(age_ms) / self._half_life_ms))


class LastBasket:
    """What other baskets held after a basket like the shopper's last.

    C[i, j] counts baskets with j whose shopper's previous basket had i; the score of j is the sum
    of C[i, j] / sqrt((n_i + 1)(n_j + 1)) over the items i of the last basket.
    """

    def __init__(self, n_items: int) -> None:
        _check_size(n_items)
        self._pairs = np.zeros((n_items, n_items), dtype=np.float32)
        self._counts = np.zeros(n_items, dtype=np.float32)
        self._last: dict[int, Int32s] = {}

    def scores(self, users: Ints, t_ms: Ints) -> Floats:
        scores = np.zeros((len(users), len(self._counts)), dtype=np.float32)
        norm = 1 / np.sqrt(self._counts + 1)
        for row, user in enumerate(users.tolist()):
            last = self._last.get(user, _NO_ITEMS)
            scores[row] = norm[last] @ self._pairs[last]
        return np.asarray(scores * norm, dtype=np.float32)

    def update(self, events: Events) -> None:
        for user, _, basket in baskets(_positive(events)):
            last = self._last.get(user)
            if last is not None:
                self._pairs[np.ix_(last, basket)] += 1
            self._counts[basket] += 1
            self._last[user] = basket


class ItemNeighbours:
    """Item-kNN over sequences: items near each other in a history, either way round.

    A pair at distance d <= 7 counts 1/d forward and `backward`/d backward;
    K[i, j] = C[i, j] / ((n_i + 1)^.5 (n_j + 1)^.3). The score of j is the sum of
    `decay`^age K[i, j] over the last items i of the shopper, age 0 for the latest; `depth` 1 is
    last-item co-visitation.
    """

    def __init__(
        self, n_items: int, decay: float = 0.8, backward: float = 0.7, depth: int = 20
    ) -> None:
        _check_size(n_items)
        self._pairs = np.zeros((n_items, n_items), dtype=np.float32)
        self._counts = np.zeros(n_items, dtype=np.float32)
        self._decay, self._backward, self._depth = decay, backward, depth
        self._tail: dict[int, Int32s] = {}

    def scores(self, users: Ints, t_ms: Ints) -> Floats:
        scores = np.zeros((len(users), len(self._counts)), dtype=np.float32)
        start = (self._counts + 1) ** -0.5
        for row, user in enumerate(users.tolist()):
            last = self._tail.get(user, _NO_ITEMS)[-self._depth :]
            share = self._decay ** np.arange(len(last) - 1, -1, -1, dtype=np.float32)
            scores[row] = (share * start[last]) @ self._pairs[last]
        return scores * (self._counts + 1) ** -0.3

    def update(self, events: Events) -> None:
        events = _positive(events)
        longest = max(self._depth, _DISTANCE)
        for user, items in by_user(events):
            tail = self._tail.get(user, _NO_ITEMS)
            near = np.concatenate([tail[-_DISTANCE:], items])
            old = len(near) - len(items)
            earlier, later, d = _pairs_within(len(near), old)
            np.add.at(self._pairs, (near[earlier], near[later]), 1 / d)
            np.add.at(self._pairs, (near[later], near[earlier]), self._backward / d)
            self._tail[user] = np.concatenate([tail, items])[-longest:]
        np.add.at(self._counts, events.item, 1)


class FadingNeighbours:
    """Item-kNN that forgets, and takes what happened at once as one step.

    Pairs and counts as in `ItemNeighbours`, with a half-life; in a score, `decay` is per instant
    of the shopper, not per item: the lines of an invoice are equally old. `depth` instants are
    looked at. What readers compute from neighbour lists (`profiles/ranking.py`).
    """

    def __init__(
        self,
        n_items: int,
        half_life_ms: float = 30 * DAY_MS,
        decay: float = 0.8,
        backward: float = 0.7,
        depth: int = 20,
    ) -> None:
        _check_size(n_items)
        self._pairs = np.zeros((n_items, n_items), dtype=np.float32)
        self._counts = np.zeros(n_items, dtype=np.float32)
        self._half_life_ms = half_life_ms
        self._decay, self._backward, self._depth = decay, backward, depth
        self._tail: dict[int, Int32s] = {}
        self._latest: dict[int, deque[Int32s]] = {}
        # New pairs grow instead of old ones fading: 2^((now - since) / half-life), made 1 again
        # before float32 notices.
        self._since_ms: float | None = None
        self._grown = 1.0

    def scores(self, users: Ints, t_ms: Ints) -> Floats:
        scores = np.zeros((len(users), len(self._counts)), dtype=np.float32)
        counts = self._counts / np.float32(self._grown)
        start = (counts + 1) ** -0.5 / np.float32(self._grown)
        for row, user in enumerate(users.tolist()):
            for age, items in enumerate(reversed(self._latest.get(user, ()))):
                scores[row] += self._decay**age * (start[items] @ self._pairs[items])
        return np.asarray(scores * (counts + 1) ** -0.3, dtype=np.float32)

    def update(self, events: Events) -> None:
        events = _positive(events)
        if not len(events):
            return
        self._grow(float(events.t_ms.max()))
        grown = np.float32(self._grown)
        for user, items in by_user(events):
            tail = self._tail.get(user, _NO_ITEMS)
            near = np.concatenate([tail, items])
            earlier, later, d = _pairs_within(len(near), len(tail))
            np.add.at(self._pairs, (near[earlier], near[later]), grown / d)
            np.add.at(self._pairs, (near[later], near[earlier]), grown * self._backward / d)
            self._tail[user] = near[-_DISTANCE:]
        np.add.at(self._counts, events.item, grown)
        for user, _, basket in baskets(events):
            self._latest.setdefault(user, deque(maxlen=self._depth)).append(basket)

    def _grow(self, now_ms: float) -> None:
        if self._since_ms is None:
            self._since_ms = now_ms
        # After a thousand half-lives nothing is left, and a float64 still holds the number.
        gone = min((now_ms - self._since_ms) / self._half_life_ms, 1_000.0)
        self._grown = 2.0 ** max(gone, 0.0)
        if self._grown > _MOST_GROWN:
            self._pairs *= np.float32(1.0 / self._grown)
            self._counts *= np.float32(1.0 / self._grown)
            self._since_ms, self._grown = now_ms, 1.0


_DISTANCE: Final = 7
_MOST_GROWN: Final = 2.0**20


def _pairs_within(count: int, old: int) -> tuple[Ints, Ints, Floats]:
    """Places (p,), (p,) and distances (p,) of all pairs within reach of `count` items whose first
    `old` are paired with each other already."""
    later, d = np.divmod(np.arange(old * _DISTANCE, count * _DISTANCE), _DISTANCE)
    d += 1
    reached = later >= d
    return later[reached] - d[reached], later[reached], d[reached].astype(np.float32)


class TextSteps:
    """Cosine to the sum of the shopper's item vectors, `decay` per step back; 1 is the mean.

    Steps are instants, not seconds: items of one basket are equally old.
    """

    def __init__(self, vectors: Floats, n_users: int, decay: float) -> None:
        self._vectors, self._decay = vectors, decay
        self._sums = np.zeros((n_users, vectors.shape[1]), dtype=np.float32)

    def scores(self, users: Ints, t_ms: Ints) -> Floats:
        return np.asarray(_unit(self._sums[users]) @ self._vectors.T)

    def update(self, events: Events) -> None:
        for user, _, basket in baskets(_positive(events)):
            self._sums[user] *= self._decay
            self._sums[user] += self._vectors[basket].sum(axis=0)


class TextProfile:
    """The interests of a profile: decayed sums at several time scales, as the store keeps them.

    The score is the mean cosine over the scales; negative weights push away.
    """

    def __init__(
        self, vectors: Floats, n_users: int, half_lives_ms: Sequence[float] = HALF_LIVES_MS
    ) -> None:
        self._vectors = vectors
        self._half_lives_ms = np.asarray(half_lives_ms)  # (K,)
        self._sums = np.zeros((n_users, len(half_lives_ms), vectors.shape[1]), dtype=np.float32)
        self._now_ms = np.zeros(n_users, dtype=np.int64)

    def scores(self, users: Ints, t_ms: Ints) -> Floats:
        # Decay until t changes the length of a sum, and cosines do not see it.
        return np.asarray(_unit(self._sums[users]).mean(axis=1) @ self._vectors.T)

    def update(self, events: Events) -> None:
        events = events.take((events.item != NO_ITEM) & (events.weight != 0))
        before = self._now_ms.copy()
        np.maximum.at(self._now_ms, events.user, events.t_ms)
        users = np.unique(events.user)
        gone = (self._now_ms - before)[users, None] / self._half_lives_ms
        self._sums[users] *= (2.0**-gone)[..., None].astype(np.float32)
        age = (self._now_ms[events.user] - events.t_ms)[:, None] / self._half_lives_ms
        share = (2.0**-age * events.weight[:, None]).astype(np.float32)  # (m, K)
        added = share[:, :, None] * self._vectors[events.item][:, None]  # (m, K, D)
        np.add.at(self._sums, events.user, added)


@dataclass(frozen=True)
class Blend:
    """Several scorers, each of which learns from every event, and one rule for their scores."""

    parts: tuple[Scorer, ...]
    combine: Callable[[Sequence[Floats]], Floats]

    def scores(self, users: Ints, t_ms: Ints) -> Floats:
        return self.combine([part.scores(users, t_ms) for part in self.parts])

    def update(self, events: Events) -> None:
        for part in self.parts:
            part.update(events)


def total(parts: Sequence[Floats]) -> Floats:
    """The plain sum of scores."""
    return np.asarray(np.sum(parts, axis=0), dtype=np.float32)


def neighbours_and_text(text: float) -> Callable[[Sequence[Floats]], Floats]:
    """The rule log(1 + s / .02) + text * 10 * cosine, for neighbours' s and a text's cosine."""

    def combine(parts: Sequence[Floats]) -> Floats:
        near, alike = parts
        return np.asarray(np.log1p(near / 0.02) + 10 * text * alike, dtype=np.float32)

    return combine


def baskets(events: Events) -> Iterator[tuple[int, int, Int32s]]:
    """(user, time, items once each) of every instant of every user, in order."""
    if not len(events):
        return
    order = np.lexsort((np.arange(len(events)), events.t_ms, events.user))
    user, t_ms, item = events.user[order], events.t_ms[order], events.item[order]
    starts = np.flatnonzero(
        (np.diff(user, prepend=user[0] - 1) != 0) | (np.diff(t_ms, prepend=t_ms[0]) != 0)
    )
    for first, last in pairwise([*starts.tolist(), len(user)]):
        yield int(user[first]), int(t_ms[first]), np.unique(item[first:last])


def by_user(events: Events) -> Iterator[tuple[int, Int32s]]:
    """(user, items in order) of every user."""
    if not len(events):
        return
    order = np.argsort(events.user, kind="stable")
    users, starts = np.unique(events.user[order], return_index=True)
    for user, (first, last) in zip(
        users.tolist(), pairwise([*starts.tolist(), len(order)]), strict=True
    ):
        yield user, events.item[order[first:last]]


def _positive(events: Events) -> Events:
    return events.take((events.item != NO_ITEM) & (events.weight > 0))


def _check_size(n_items: int) -> None:
    if n_items > MOST_ITEMS:
        raise ValueError(f"{n_items} items: pair counts are dense here, for at most {MOST_ITEMS}")


def _unit(vectors: Floats) -> Floats:
    length = np.linalg.norm(vectors, axis=-1, keepdims=True)
    return np.asarray(vectors / np.maximum(length, 1e-12), dtype=np.float32)
