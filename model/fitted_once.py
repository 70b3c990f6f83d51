"""The whole profile where only the order of events is real: everything is fitted once.

A `Scorer` for `leave_one_out`. The last item of every history it is told is its validation: the
encoder is trained on what comes before, the ranker on where that puts these items; then the
encoder is trained again, on the whole history. Knows columns of numbers. For the profile that
learns while events go by see `whole_profile.py`.
"""

from __future__ import annotations

from typing import Final

import numpy as np

from . import ranker, trainer
from .evaluate import Floats, Ints
from .leave_one_out import split
from .prequential import Events
from .profile_signals import ProfileSignals, Shop
from .ranker import Cases
from .trainer import TrainSettings

_CASES: Final = 6_000
_AT_ONCE: Final = 64  # users whose whole catalogue is read before it is thinned


class FittedOnce:
    """It can be told a history once, and then be asked; see `Scorer`."""

    def __init__(self, shop: Shop, settings: TrainSettings) -> None:
        self._shop, self._settings = shop, settings
        self.weights = ranker.first_weights()
        self._signals = self._no_signals()

    def scores(self, users: Ints, t_ms: Ints) -> Floats:
        return ranker.score(self.weights, *self._signals.read(users, t_ms))

    def update(self, events: Events) -> None:
        self.weights = ranker.fit(self._cases(events))
        self._signals = self._trained(events, "test")

    def _cases(self, events: Events) -> Cases:
        """The last item of some users, as signals that know what came before it."""
        part = split(events)
        signals = self._trained(part.history, "validation")
        n_items, seed = len(self._shop.catalogue.item_ids), self._settings.seed
        chosen = np.random.default_rng(seed).permutation(len(part.user))[:_CASES]
        thin = []
        for first in range(0, len(chosen), _AT_ONCE):
            rows = chosen[first : first + _AT_ONCE]
            target = np.zeros((len(rows), n_items), dtype=np.float32)
            target[np.arange(len(rows)), part.item[rows]] = 1.0
            read = signals.read(part.user[rows], part.t_ms[rows])
            whole = Cases(*read, target, np.zeros_like(target))
            thin.append(ranker.thinned(whole, seed + first))
        return ranker.joined(thin)

    def _trained(self, events: Events, name: str) -> ProfileSignals:
        signals = self._no_signals()
        signals.update(events)
        candidate = trainer.train(
            self._shop.label(events),
            self._shop.catalogue,
            self._shop.base,
            self._shop.types,
            self._shop.folder / name,
            self._settings,
        )
        signals.swap(candidate, events)
        return signals

    def _no_signals(self) -> ProfileSignals:
        return self._shop.signals(self._settings.events, fading=False)
