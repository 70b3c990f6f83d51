"""The whole profile where only the order of events is real: everything is fitted once.

A `Scorer` for `leave_one_out`. The last item of every history it is told is its validation: the
encoder is trained on what comes before, the ranker on where that puts these items; then the
encoder is trained again, on the whole history. Knows columns of numbers. For the profile that
learns while events go by see `whole_profile.py`.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Final

import numpy as np

from . import ranker, trainer
from .evaluate import Floats, Ints
from .leave_one_out import split
from .prequential import Events
from .profile_signals import ProfileSignals
from .ranker import Cases
from .trainer import Base, Catalogue, TrainSettings
from .windows import Labelled

_CASE_NUMBERS: Final = 250_000_000  # a gigabyte of signals


class FittedOnce:
    """It can be told a history once, and then be asked; see `Scorer`."""

    def __init__(
        self,
        catalogue: Catalogue,
        base: Base,
        types: tuple[str, ...],
        n_users: int,
        label: Callable[[Events], Labelled],
        folder: Path,
        settings: TrainSettings,
    ) -> None:
        """`label`: events -> windows. Trainings leave their files in `folder`."""
        self._catalogue, self._base, self._types = catalogue, base, types
        self._n_users, self._label = n_users, label
        self._folder, self._settings = folder, settings
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
        n_items = len(self._catalogue.item_ids)
        most = _CASE_NUMBERS // (n_items * len(ranker.SIGNALS))
        rng = np.random.default_rng(self._settings.seed)
        chosen = np.sort(rng.permutation(len(part.user))[:most])
        read = signals.read(part.user[chosen], part.t_ms[chosen])
        target = np.zeros((len(chosen), n_items), dtype=np.float32)
        target[np.arange(len(chosen)), part.item[chosen]] = 1.0
        return Cases(*read, target, np.zeros_like(target))

    def _trained(self, events: Events, name: str) -> ProfileSignals:
        signals = self._no_signals()
        signals.update(events)
        candidate = trainer.train(
            self._label(events),
            self._catalogue,
            self._base,
            self._types,
            self._folder / name,
            self._settings,
        )
        signals.swap(candidate, events)
        return signals

    def _no_signals(self) -> ProfileSignals:
        vectors = self._base.vectors(self._catalogue)
        # Times are made up, so no count fades.
        return ProfileSignals(self._n_users, vectors, self._settings.events, np.inf)
