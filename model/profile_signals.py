"""What a ranker reads of n shoppers, kept up to date by every event: counters, sums, windows.

Knows columns of numbers and a trained candidate where there is one; knows nothing of when
anything is trained. For what readers compute from Redis see `profiles/ranking.py`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np
from numpy.typing import NDArray

from .baselines import (
    DAY_MS,
    OWN_HALF_LIFE_MS,
    OWN_ITEMS,
    FadingNeighbours,
    OwnItems,
    Popular,
    TextSteps,
    Window,
)
from .candidate import Candidate
from .evaluate import Floats, Int32s, Ints
from .prequential import NO_ITEM, Events
from .ranker import ITEM
from .trainer import Base, Catalogue
from .windows import Labelled

_HALF_LIFE_MS: Final = 30 * DAY_MS  # of counts and pairs
_RECENT_MS: Final = 3 * DAY_MS  # of recent counts
_STEP: Final = 0.7  # what each instant counts of the next, in the text signal

Read = tuple[Floats, Floats, Floats]
"""Signals (n, N, 4), items (n, N, 3), shoppers (n, 3); see `ranker.Cases`."""


@dataclass(frozen=True)
class Shop:
    """What is known of a shop before its first event, and where it leaves what it learns."""

    catalogue: Catalogue
    base: Base
    types: tuple[str, ...]
    n_users: int
    label: Callable[[Events], Labelled]
    """Events told so far -> windows."""
    folder: Path
    """A training leaves its files in a folder of its own below."""

    def signals(self, window_events: int, *, fading: bool = True) -> ProfileSignals:
        """As they are before the first event."""
        ids, vectors = self.catalogue.item_ids, self.base.vectors(self.catalogue)
        return ProfileSignals(self.n_users, ids, vectors, window_events, fading=fading)


class ProfileSignals:
    """Of a catalogue of N items; to be told everything that happens, as a `Scorer` is."""

    def __init__(
        self,
        n_users: int,
        item_ids: Sequence[str],
        vectors: Floats,
        window_events: int,
        *,
        own_items: int = OWN_ITEMS,
        fading: bool = True,
    ) -> None:
        """`vectors` (N, D) unit rows of the items, until `swap`; window_events, own_items: how many
        entries a profile keeps. Counts, pairs and own items fade, unless the times are made up."""
        self._n_users, n_items = n_users, len(vectors)
        half_life_ms = OWN_HALF_LIFE_MS if fading else np.inf
        self._own = OwnItems(n_users, n_items, half_life_ms, own_items)
        self._near = FadingNeighbours(n_items, _HALF_LIFE_MS if fading else np.inf)
        self._items = Popular(n_items, _HALF_LIFE_MS if fading else np.inf)
        self._recent = Popular(n_items, _RECENT_MS if fading else np.inf)
        self._users = _Users(n_users, window_events, item_ids)
        self._candidate: Candidate | None = None
        self.vectors = vectors
        self._text = TextSteps(vectors, n_users, _STEP)

    def update(self, events: Events) -> None:
        for part in (self._own, self._near, self._items, self._recent, self._text, self._users):
            part.update(events)

    def swap(self, candidate: Candidate, told: Events) -> None:
        """From now on by the candidate's networks; `told` is everything that was told so far."""
        self._candidate, self.vectors = candidate, candidate.vectors
        self._text = TextSteps(self.vectors, self._n_users, _STEP)
        self._text.update(told)

    def read(self, users: Ints, t_ms: Ints) -> Read:
        """What is known of `users` (n,) at times (n,)."""
        own = self._own.masses(users, self._users.entries(users))
        signals = np.stack(
            [
                self._next_interests(users) @ self.vectors.T,
                self._text.scores(users, t_ms),
                self._near.scores(users, t_ms),
                own,
            ],
            axis=-1,
        ).astype(np.float32)
        latest = int(t_ms.max(initial=0))
        items = np.zeros((*own.shape, len(ITEM)), dtype=np.float32)
        items[..., 0] = np.log1p(self._items.counts(latest))
        items[..., 1] = np.log1p(self._recent.counts(latest))
        last_ms, shopper = self._users.liked(users, own.shape[1])
        had = last_ms >= 0
        items[..., 2] = np.log1p(np.where(had, t_ms[:, None] - last_ms, 0) / DAY_MS)
        return signals, items, shopper

    def chances(self, users: Ints) -> dict[str, Floats]:
        """What the heads say (n,) of `users` (n,), who have events; {} before the first swap."""
        if self._candidate is None:
            return {}
        _, types, t_ms, length = self._users.windows(users)
        return self._candidate.heads.read(types, t_ms, length, self._users.length)

    def _next_interests(self, users: Ints) -> Floats:
        out = np.zeros((len(users), self.vectors.shape[1]), dtype=np.float32)
        known = np.flatnonzero(self._users.count[users] > 0)
        if self._candidate is not None and len(known):
            out[known] = self._candidate.window.encode(*self._windows(users[known]))
        return out

    def _windows(self, users: Ints) -> tuple[Floats, NDArray[np.uint8], Ints, Ints]:
        item, types, t_ms, length = self._users.windows(users)
        inputs = self.vectors[np.maximum(item, 0)] * (item != NO_ITEM)[..., None]
        return inputs, types, t_ms, length


class _Users:
    """The last events of n users, newest last, as rings of `length`; those of one instant stand as
    in the windows that training reads, by the hash of their item."""

    def __init__(self, n_users: int, length: int, item_ids: Sequence[str]) -> None:
        hashes = [hashlib.sha256(item_id.encode()).digest()[:8] for item_id in item_ids]
        self._order = np.frombuffer(b"".join([*hashes, bytes(8)]), "<u8")  # NO_ITEM is the last
        self.length = length
        self.events = np.zeros(n_users, dtype=np.int64)
        self.count = np.zeros(n_users, dtype=np.int64)  # of events with a weight
        self._item = np.full((n_users, length), NO_ITEM, dtype=np.int32)
        self._type = np.zeros((n_users, length), dtype=np.uint8)
        self._t_ms = np.zeros((n_users, length), dtype=np.int64)
        self._weight = np.zeros((n_users, length), dtype=np.float32)

    def update(self, events: Events) -> None:
        np.add.at(self.events, events.user, 1)
        events = events.take(events.weight != 0)
        length = self._item.shape[1]
        order = np.lexsort((events.type, events.weight, self._order[events.item], events.t_ms))
        for i, user in zip(order.tolist(), events.user[order].tolist(), strict=True):
            at = self.count[user] % length
            self._item[user, at] = events.item[i]
            self._type[user, at] = events.type[i]
            self._t_ms[user, at] = events.t_ms[i]
            self._weight[user, at] = events.weight[i]
            self.count[user] += 1

    def windows(self, users: Ints) -> tuple[Int32s, NDArray[np.uint8], Ints, Ints]:
        """Items, types and times (n, L), oldest first, and lengths (n,)."""
        at, length = self._places(users)
        rows = users[:, None]
        return self._item[rows, at], self._type[rows, at], self._t_ms[rows, at], length

    def entries(self, users: Ints) -> Window:
        """Oldest first; places that nothing has filled yet have no item."""
        at, _ = self._places(users)
        rows = users[:, None]
        return self._item[rows, at], self._t_ms[rows, at], self._weight[rows, at]

    def liked(self, users: Ints, n_items: int) -> tuple[Ints, Floats]:
        """When each item (n, n_items) was last in the window and liked, -1 = is not; and the
        shoppers' features (n, 3), as `profiles/ranking.py` has them."""
        item, t_ms, weight = self.entries(users)
        good = (item != NO_ITEM) & (weight > 0)
        last_ms = np.full((len(users), n_items), -1, dtype=np.int64)
        row, place = np.nonzero(good)  # oldest first, and the last of equals stays
        last_ms[row, item[row, place]] = t_ms[row, place]
        had, times = (last_ms >= 0).sum(axis=1), good.sum(axis=1)
        repeats = np.where(times, 1 - had / np.maximum(times, 1), 0)
        shopper = np.stack([np.log1p(self.events[users]), np.log1p(had), repeats], axis=-1)
        return last_ms, shopper.astype(np.float32)

    def _places(self, users: Ints) -> tuple[Ints, Ints]:
        """Where the windows lie in the rings (n, L), oldest first, and lengths (n,)."""
        size = self._item.shape[1]
        length = np.minimum(self.count[users], size)
        first = np.where(self.count[users] > size, self.count[users] % size, 0)
        return (first[:, None] + np.arange(int(length.max(initial=0)))) % size, length
