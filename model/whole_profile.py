"""The whole profile as a `Scorer`: four signals and a ranker, retrained as the side worker does it.

It is judged like any baseline, in event time: between two trainings only counters and sums move,
and a training sees what was told before it and nothing else. The gate decides as it does live: a
candidate that it rejects is not swapped in. Knows columns of numbers; knows no archive and no
release.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field, replace
from typing import Final

import numpy as np

from . import gate, ranker, trainer
from .baselines import DAY_MS, HALF_LIVES_MS, baskets
from .comparison import Contender, compare
from .evaluate import Floats, Ints
from .prequential import NO_ITEM, Events
from .profile_signals import Read, Shop
from .ranker import Cases, Weights
from .trainer import Candidate, TrainSettings
from .transition import fit_transition
from .windows import Labelled

_CASES: Final = 3_000  # newest rankings that the ranker learns from


@dataclass(frozen=True)
class Schedule:
    """When the whole profile is trained, in event time."""

    every_ms: float = 28 * DAY_MS
    newest_ms: float = 90 * DAY_MS
    """What is older is replayed in part only."""
    every_case: int = 2
    """Of so many rankings one becomes a case for the ranker."""
    swaps: float = np.inf
    """After so many, the encoder stays as it is."""
    fits: float = np.inf
    """After so many, the ranker stays as it is."""


@dataclass(frozen=True)
class Training:
    """A candidate that was trained, and what the gate said of it."""

    t_ms: int
    windows: int
    reasons: tuple[str, ...]
    """Why it was rejected; none: it was swapped in."""

    @property
    def accepted(self) -> bool:
        """Whether it was swapped in."""
        return not self.reasons


@dataclass
class Foretold:
    """What the heads said while events went by."""

    told: int = 0
    event: list[Ints] = field(default_factory=list)  # places among the events told
    chance: dict[str, list[Floats]] = field(default_factory=dict)  # head -> as many


class WholeProfile:
    """What a shop's recommender would rank by; see `Scorer`."""

    def __init__(self, shop: Shop, schedule: Schedule, settings: TrainSettings) -> None:
        self._shop, self._schedule, self._settings = shop, schedule, settings
        self._base = shop.base
        self._signals = shop.signals(settings.events)
        self._weights = ranker.first_weights()
        self._cases: deque[Cases] = deque(maxlen=_CASES)
        self._rankings = self._fits = 0
        self._told: list[Events] = []
        self._candidate: Candidate | None = None
        self._next_ms: float | None = None
        # What was read for rankings whose outcome is not known yet: (user, time) -> signals.
        self._asked: dict[tuple[int, int], Read] = {}
        self.trainings: list[Training] = []
        self.foretold = Foretold()

    @property
    def weights(self) -> Weights:
        """The ranker's."""
        return self._weights

    def scores(self, users: Ints, t_ms: Ints) -> Floats:
        signals, items, shopper = self._signals.read(users, t_ms)
        for row, key in enumerate(zip(users.tolist(), t_ms.tolist(), strict=True)):
            one = slice(row, row + 1)
            self._asked[key] = signals[one], items[one], shopper[one]
        return ranker.score(self._weights, signals, items, shopper)

    def next_interest(self, users: Ints, t_ms: Ints) -> Floats:
        """(n, N) the first signal by itself, of rankings that were asked for a moment ago."""
        keys = zip(users.tolist(), t_ms.tolist(), strict=True)
        return np.concatenate([self._asked[key][0][..., 0] for key in keys])

    def update(self, events: Events) -> None:
        self._remember_cases(events)
        self._signals.update(events)
        self._told.append(events)
        self._foretell(events)
        latest = float(events.t_ms.max(initial=0))
        if self._next_ms is None:
            self._next_ms = latest + self._schedule.every_ms
        elif latest >= self._next_ms:
            self._learn(int(latest))
            self._next_ms = latest + self._schedule.every_ms

    def _foretell(self, events: Events) -> None:
        """What the heads say after some of these events, on which nobody will look back."""
        at = self.foretold.told + np.arange(len(events))
        self.foretold.told += len(events)
        asked = np.flatnonzero(at % self._schedule.every_case == 0)
        if self._candidate is None or not len(asked):
            return
        users = np.unique(events.user[asked])
        last = {user: place for place, user in zip(at.tolist(), events.user.tolist(), strict=True)}
        self.foretold.event.append(np.array([last[user] for user in users.tolist()]))
        for name, chance in self._signals.chances(users).items():
            self.foretold.chance.setdefault(name, []).append(chance)

    # --- learning

    def _remember_cases(self, events: Events) -> None:
        wanted = events.take((events.item != NO_ITEM) & (events.weight > 0))
        for user, t_ms, basket in baskets(wanted):
            self._rankings += 1
            if self._rankings % self._schedule.every_case:
                continue
            asked = self._asked.get((user, t_ms))
            read = asked or self._signals.read(np.array([user]), np.array([t_ms]))
            target = np.zeros(read[0].shape[:2], dtype=np.float32)
            target[0, basket] = 1
            whole = Cases(*read, target, np.zeros_like(target))
            self._cases.append(ranker.thinned(whole, seed=self._rankings))
        self._asked.clear()

    def _learn(self, now_ms: int) -> None:
        if sum(training.accepted for training in self.trainings) < self._schedule.swaps:
            self._train(now_ms)
        if self._cases and self._fits < self._schedule.fits:
            self._weights = ranker.fit(ranker.joined(self._cases), self._weights)
            self._fits += 1

    def _train(self, now_ms: int) -> None:
        events = _concatenated(self._told)
        self._told = [events]
        whole = self._shop.label(events)
        newest = whole.t_ms >= now_ms - self._schedule.newest_ms
        first = self._candidate is None
        windows = whole.take_events(newest)
        number = len(self.trainings)
        candidate = trainer.train(
            windows,
            self._shop.catalogue,
            replace(self._base, earlier=self._candidate),
            self._shop.types,
            self._shop.folder / f"{number:03}",
            replace(self._settings, seed=self._settings.seed + number),
            replay=whole.take_events(~newest) if not newest.all() else None,
        )
        decision = self._decide(whole, candidate)
        self.trainings.append(Training(now_ms, len(windows), tuple(decision.reasons)))
        if not decision.accepted:
            return
        if first:  # without a next interest, cases say that it is worth nothing
            self._cases.clear()
        self._candidate = candidate
        self._base = replace(self._base, projection=candidate.projection)
        self._signals.swap(candidate, events)

    def _decide(self, windows: Labelled, candidate: Candidate) -> gate.Decision:
        earlier = self._candidate
        live = Contender.of(earlier) if earlier else Contender(self._signals.vectors)
        transition = fit_transition("", "", self._signals.vectors, candidate.vectors)
        comparison = compare(
            windows,
            live,
            Contender.of(candidate),
            cut_ms=candidate.metrics["cut_ms"],
            item_events=candidate.counts,
            events=self._settings.events,
            half_lives_s=[each / 1000.0 for each in HALF_LIVES_MS],
            seed=self._settings.seed,
            transition_cosine=transition.error.cosine,
        )
        return gate.decide(comparison)


@dataclass(frozen=True)
class NextInterest:
    """What the encoder of a whole profile is worth by itself; a `Scorer` to be asked after it."""

    of: WholeProfile

    def scores(self, users: Ints, t_ms: Ints) -> Floats:
        return self.of.next_interest(users, t_ms)

    def update(self, events: Events) -> None:
        """Nothing: the profile is told by itself."""


def _concatenated(parts: list[Events]) -> Events:
    return Events(
        *(
            np.concatenate([getattr(part, name) for part in parts])
            for name in ("user", "item", "type", "t_ms", "weight")
        )
    )
