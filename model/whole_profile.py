"""The whole profile as a `Scorer`: four signals and a ranker, retrained as the side worker does it.

It is judged like any baseline, in event time: between two trainings only counters and sums move,
and a training sees what was told before it and nothing else. Knows columns of numbers; knows no
archive, no release and no gate.
"""

from __future__ import annotations

import hashlib
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Final

import numpy as np
from numpy.typing import NDArray

from . import ranker, trainer
from .baselines import DAY_MS, ItemNeighbours, OwnFrequency, Popular, TextSteps, baskets
from .evaluate import Floats, Int32s, Ints
from .prequential import NO_ITEM, Events
from .ranker import Cases
from .trainer import Base, Candidate, Catalogue, TrainSettings
from .windows import Labelled

_ITEM_HALF_LIFE_MS: Final = 21 * DAY_MS
_STEP: Final = 0.7  # what each instant counts of the next, in the text signal
_CASES: Final = 2_000  # newest rankings that the ranker learns from
_CASE_BYTES: Final = 400_000_000


@dataclass(frozen=True)
class Schedule:
    """When the whole profile is trained, in event time, and for how long."""

    every_ms: float = 28 * DAY_MS
    first_epochs: int = 8
    epochs: int = 2  # of every later training, which goes on from the weights there are
    newest_ms: float = 90 * DAY_MS
    """What is older is replayed in part only."""
    every_case: int = 2
    """Of so many rankings one becomes a case for the ranker."""


@dataclass
class Swap:
    """A training that took place."""

    t_ms: int
    windows: int
    figures: dict[str, float] = field(default_factory=dict)


@dataclass
class Foretold:
    """What the heads said while events went by."""

    told: int = 0
    event: list[Ints] = field(default_factory=list)  # places among the events told
    chance: dict[str, list[Floats]] = field(default_factory=dict)  # head -> as many


class WholeProfile:
    """What a shop's recommender would rank by; see `Scorer`."""

    def __init__(
        self,
        catalogue: Catalogue,
        base: Base,
        types: tuple[str, ...],
        n_users: int,
        label: Callable[[Events], Labelled],
        folder: Path,
        schedule: Schedule,
        settings: TrainSettings,
    ) -> None:
        """`label`: events told so far -> windows. A training leaves its files in `folder`."""
        n_items = len(catalogue.item_ids)
        self._catalogue, self._base, self._types = catalogue, base, types
        self._label, self._folder = label, folder
        self._schedule, self._settings = schedule, settings
        self._n_users = n_users
        self._own = OwnFrequency(n_items)
        self._near = ItemNeighbours(n_items)
        self._items = Popular(n_items, _ITEM_HALF_LIFE_MS)
        self._users = _Users(n_users, settings.events, catalogue.item_ids)
        self._vectors = base.vectors(catalogue)
        self._text = TextSteps(self._vectors, n_users, _STEP)
        self._weights = ranker.first_weights()
        self._cases: deque[Cases] = deque(
            maxlen=min(_CASES, max(_CASE_BYTES // (n_items * 24), 100))
        )
        self._rankings = 0
        self._told: list[Events] = []
        self._candidate: Candidate | None = base.earlier
        self._next_ms: float | None = None
        self.swaps: list[Swap] = []
        self.foretold = Foretold()

    def scores(self, users: Ints, t_ms: Ints) -> Floats:
        return ranker.score(self._weights, *self.signals(users, t_ms))

    def signals(self, users: Ints, t_ms: Ints) -> tuple[Floats, Floats, Floats]:
        """What the ranker reads: signals (n, N, 4), log counts (n, N), shoppers (n, 3)."""
        own = self._own.masses(users)
        signals = np.stack(
            [
                self._next_interests(users) @ self._vectors.T,
                self._text.scores(users, t_ms),
                self._near.scores(users, t_ms),
                own,
            ],
            axis=-1,
        ).astype(np.float32)
        log_events = np.log1p(self._items.counts(int(t_ms.max(initial=0)))).astype(np.float32)
        had = (own > 0).sum(axis=1)
        events = self._users.count[users]
        shopper = np.stack(
            [np.log1p(events), np.log1p(had), 1 - had / np.maximum(events, 1)], axis=-1
        )
        item = np.tile(log_events, (len(users), 1))
        return signals, item, shopper.astype(np.float32)

    def update(self, events: Events) -> None:
        self._remember_cases(events)
        for part in (self._own, self._near, self._items, self._text):
            part.update(events)
        self._users.update(events)
        self._told.append(events)
        self._foretell(events)
        latest = float(events.t_ms.max(initial=0))
        if self._next_ms is None:
            self._next_ms = latest + self._schedule.every_ms
        elif latest >= self._next_ms:
            self._learn(int(latest))
            self._next_ms = latest + self._schedule.every_ms

    def _next_interests(self, users: Ints) -> Floats:
        out = np.zeros((len(users), self._vectors.shape[1]), dtype=np.float32)
        known = np.flatnonzero(self._users.count[users] > 0)
        if self._candidate is None or not len(known):
            return out
        item, types, t_ms, length = self._users.windows(users[known])
        inputs = self._vectors[np.maximum(item, 0)] * (item != NO_ITEM)[..., None]
        out[known] = self._candidate.window.encode(inputs, types, t_ms, length)
        return out

    def _foretell(self, events: Events) -> None:
        """What the heads say after some of these events, on which nobody will look back."""
        at = self.foretold.told + np.arange(len(events))
        self.foretold.told += len(events)
        asked = np.flatnonzero(at % self._schedule.every_case == 0)
        if self._candidate is None or not len(asked):
            return
        users = np.unique(events.user[asked])
        item, types, t_ms, length = self._users.windows(users)
        inputs = self._vectors[np.maximum(item, 0)] * (item != NO_ITEM)[..., None]
        hidden = self._candidate.window.hidden(inputs, types, t_ms, length)
        last = {user: place for place, user in zip(at.tolist(), events.user.tolist(), strict=True)}
        self.foretold.event.append(np.array([last[user] for user in users.tolist()]))
        for name, chance in self._candidate.heads.predict(hidden).items():
            self.foretold.chance.setdefault(name, []).append(chance)

    # --- learning

    def _remember_cases(self, events: Events) -> None:
        wanted = events.take((events.item != NO_ITEM) & (events.weight > 0))
        for user, t_ms, basket in baskets(wanted):
            self._rankings += 1
            if self._rankings % self._schedule.every_case:
                continue
            signals, item, shopper = self.signals(np.array([user]), np.array([t_ms]))
            target = np.zeros(item.shape, dtype=np.float32)
            target[0, basket] = 1
            self._cases.append(Cases(signals, item, shopper, target, np.zeros_like(target)))

    def _learn(self, now_ms: int) -> None:
        events = _concatenated(self._told)
        self._told = [events]
        newest = events.t_ms >= now_ms - self._schedule.newest_ms
        first = self._candidate is None
        epochs = self._schedule.first_epochs if first else self._schedule.epochs
        windows = self._label(events.take(newest))
        candidate = trainer.train(
            windows,
            self._catalogue,
            replace(self._base, earlier=self._candidate),
            self._types,
            self._folder / f"{len(self.swaps):03}",
            replace(self._settings, epochs=epochs, seed=self._settings.seed + len(self.swaps)),
            replay=self._label(events.take(~newest)) if not newest.all() else None,
        )
        if first:  # without a next interest, cases say that it is worth nothing
            self._cases.clear()
        elif self._cases:
            self._weights = ranker.fit(_stacked(self._cases), self._weights)
        self._candidate, self._vectors = candidate, candidate.vectors
        self._base = replace(self._base, projection=candidate.projection)
        self._text = TextSteps(self._vectors, self._n_users, _STEP)
        self._text.update(events)
        figures = {name: float(v) for name, v in candidate.metrics["newest"].items()}
        self.swaps.append(Swap(now_ms, len(windows), figures))


class _Users:
    """The last events of n users, newest last, as rings of `length`; those of one instant stand as
    in the windows that training reads, by the hash of their item."""

    def __init__(self, n_users: int, length: int, item_ids: list[str]) -> None:
        hashes = [hashlib.sha256(item_id.encode()).digest()[:8] for item_id in item_ids]
        self._order = np.frombuffer(b"".join([*hashes, bytes(8)]), "<u8")  # NO_ITEM is the last
        self.count = np.zeros(n_users, dtype=np.int64)
        self._item = np.full((n_users, length), NO_ITEM, dtype=np.int32)
        self._type = np.zeros((n_users, length), dtype=np.uint8)
        self._t_ms = np.zeros((n_users, length), dtype=np.int64)

    def update(self, events: Events) -> None:
        length = self._item.shape[1]
        order = np.lexsort((events.type, events.weight, self._order[events.item], events.t_ms))
        for i, user in zip(order.tolist(), events.user[order].tolist(), strict=True):
            at = self.count[user] % length
            self._item[user, at] = events.item[i]
            self._type[user, at] = events.type[i]
            self._t_ms[user, at] = events.t_ms[i]
            self.count[user] += 1

    def windows(self, users: Ints) -> tuple[Int32s, NDArray[np.uint8], Ints, Ints]:
        """Items, types and times (n, L), oldest first, and lengths (n,)."""
        size = self._item.shape[1]
        length = np.minimum(self.count[users], size)
        first = np.where(self.count[users] > size, self.count[users] % size, 0)
        at = (first[:, None] + np.arange(int(length.max()))) % size
        rows = users[:, None]
        return self._item[rows, at], self._type[rows, at], self._t_ms[rows, at], length


def _concatenated(parts: list[Events]) -> Events:
    return Events(
        *(
            np.concatenate([getattr(part, name) for part in parts])
            for name in ("user", "item", "type", "t_ms", "weight")
        )
    )


def _stacked(cases: deque[Cases]) -> Cases:
    return Cases(
        *(
            np.concatenate([getattr(case, name) for case in cases])
            for name in ("signals", "item_log_events", "shopper", "target", "log_chance")
        )
    )
