"""A candidate beside what is live, on the same windows: the figures that the gate decides on.

PURE but for the networks it runs. Both rank the whole catalogue after windows whose target is
newer than anything the candidate was trained on, and after older ones. Intervals are of paired
differences, by resampling users (`evaluate.UserBootstrap`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from . import training_rows as tr
from .candidate import Candidate
from .evaluate import UserBootstrap, auc, calibration_error, metric, ranks
from .gate import Comparison, Figure
from .heads import HEADS, Heads
from .training_data import next_interests, sample, window_inputs
from .window_encoder import WindowEncoder
from .windows import Labelled

Floats = npt.NDArray[np.float32]
Ints = npt.NDArray[np.int64]

METRIC = "recall@20"
_CHUNK = 256  # windows ranked at a time
_NEW_USER_EVENTS = 5
_RARE_EVENTS = 3  # training events of an item that is rare


@dataclass(frozen=True)
class Contender:
    """What answers "what next": item vectors, and a window encoder and heads where there are."""

    vectors: Floats  # (n, D) unit rows
    window: WindowEncoder | None = None
    heads: Heads | None = None

    @classmethod
    def of(cls, candidate: Candidate) -> Contender:
        """A trained candidate, as it would serve."""
        return cls(candidate.vectors, candidate.window, candidate.heads)

    def interests(self, windows: Labelled, ends: Ints, events: int) -> Floats:
        """(k, D) next interests after the windows that end with events `ends` (k,)."""
        return next_interests(windows, ends, self.vectors, self.window, events)

    def chances(self, windows: Labelled, ends: Ints, events: int) -> dict[str, Floats]:
        """(k,) of each head after those windows; {} without heads."""
        if self.heads is None or self.window is None:
            return {}
        parts = [
            self.heads.predict(
                self.window.hidden(*window_inputs(windows, part, self.vectors, events))
            )
            for part in _parts(ends)
        ]
        return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def compare(
    windows: Labelled,
    current: Contender,
    candidate: Contender,
    *,
    cut_ms: int,
    item_events: Ints,
    events: int,
    most: int = 2_000,
    seed: int = 0,
    transition_cosine: float | None = None,
) -> Comparison:
    """Both on the same windows. `cut_ms`: the candidate has seen nothing since; `item_events`
    (n,): training events of each item; `most`: windows ranked of either age, drawn with `seed`.
    """
    numbers = (candidate.vectors, *_weights(candidate))
    non_finite = sum(int((~np.isfinite(array)).sum()) for array in numbers)
    if non_finite:  # it cannot rank anything
        return Comparison(Figure(METRIC, np.nan, np.nan, np.nan, np.nan, 0), non_finite=non_finite)
    targets = tr.find_targets(windows)
    asked = tr.asked_at(windows)
    contenders = (current, candidate)
    newest = _Ranked.of(
        windows, targets, asked & targets.since(cut_ms), contenders, events, most, seed
    )
    older = _Ranked.of(
        windows, targets, asked & targets.before(cut_ms), contenders, events, most, seed
    )
    place = newest.end - windows.start[newest.user] + 1  # how many events the user had
    slices = {
        "new users": place <= _NEW_USER_EVENTS,
        "returning users": place > _NEW_USER_EVENTS,
        "rare items": item_events[newest.item] <= _RARE_EVENTS,
    }
    heads, calibration = _heads(windows, cut_ms, contenders, events, most, seed)
    return Comparison(
        newest=newest.figure(METRIC),
        older=(older.figure(METRIC),),
        heads=heads,
        slices=tuple(newest.figure(f"{METRIC} of {name}", at) for name, at in slices.items()),
        calibration=calibration,
        transition_cosine=transition_cosine,
    )


@dataclass(frozen=True)
class _Ranked:
    """m targets with their ranks by both contenders."""

    user: Ints  # (m,)
    end: Ints  # (m,) the event that ended the window
    item: Ints  # (m,)
    rank: tuple[npt.NDArray[Any], npt.NDArray[Any]]  # by current and candidate

    @classmethod
    def of(
        cls,
        windows: Labelled,
        targets: tr.Targets,
        where: tr.Bools,
        contenders: Sequence[Contender],
        events: int,
        most: int,
        seed: int,
    ) -> _Ranked:
        ends = sample(np.flatnonzero(where), most, seed)
        spread = targets.stop[ends] - targets.first[ends]
        end = np.repeat(ends, spread)
        item = np.concatenate(
            [np.zeros(0, np.int32)]
            + [
                targets.item[a:b]
                for a, b in zip(targets.first[ends], targets.stop[ends], strict=True)
            ]
        ).astype(np.int64)
        found: list[npt.NDArray[Any]] = []
        for contender in contenders:
            places = [np.zeros(0, np.int32)]
            for part in _parts(ends):
                scores = contender.interests(windows, part, events) @ contender.vectors.T  # (k, n)
                mine = np.isin(end, part)
                places.append(ranks(scores, np.searchsorted(part, end[mine]), item[mine]))
            found.append(np.concatenate(places))
        return cls(tr.owners(windows)[end], end, item, (found[0], found[1]))

    def figure(self, name: str, where: tr.Bools | None = None) -> Figure:
        count = len(self.item) if where is None else int(where.sum())
        if not count:
            return Figure(name, np.nan, np.nan, np.nan, np.nan, 0)
        current, candidate = (metric(METRIC, rank) for rank in self.rank)
        bootstrap = UserBootstrap(self.user)
        change = bootstrap.difference(candidate, current, where)
        means = [
            float(v[where].mean() if where is not None else v.mean()) for v in (current, candidate)
        ]
        return Figure(name, means[0], means[1], change.low, change.high, count)


def _heads(
    windows: Labelled,
    cut_ms: int,
    contenders: tuple[Contender, Contender],
    events: int,
    most: int,
    seed: int,
) -> tuple[tuple[Figure, ...], tuple[Figure, ...]]:
    """AUC, and calibration errors with their sign turned, of heads that both contenders have."""
    ends = sample(np.flatnonzero(windows.t_ms >= cut_ms), most, seed)
    chances = [
        contender.chances(windows, ends, events) if len(ends) else {} for contender in contenders
    ]
    right, calibrated = [], []
    for name in HEADS:
        label = getattr(windows, name)[ends]
        known = label >= 0
        if any(name not in c or np.isnan(c[name]).any() for c in chances):
            continue
        if not 0 < int(label[known].sum()) < int(known.sum()):
            continue  # one class only says nothing
        users = tr.owners(windows)[ends[known]]
        of = [c[name][known] for c in chances]
        right.append(_auc(name, of, label[known], users))
        errors = [calibration_error(p, label[known]) for p in of]
        change = errors[0] - errors[1]  # without an interval: the error is of bins, not of windows
        calibrated.append(
            Figure(f"{name} -ECE", -errors[0], -errors[1], change, change, int(known.sum()))
        )
    return tuple(right), tuple(calibrated)


def _auc(name: str, of: Sequence[Floats], label: npt.NDArray[Any], users: Ints) -> Figure:
    change = UserBootstrap(users).statistic(
        lambda weight: auc(of[1], label, weight) - auc(of[0], label, weight)
    )
    current, candidate = (auc(p, label) for p in of)
    return Figure(f"{name} AUC", current, candidate, change.low, change.high, len(label))


def _weights(contender: Contender) -> list[npt.NDArray[Any]]:
    modules = [m for m in (contender.window, contender.heads) if m is not None]
    return [value.cpu().numpy() for m in modules for value in m.state_dict().values()]


def _parts(ends: Ints) -> list[Ints]:
    return [ends[i : i + _CHUNK] for i in range(0, len(ends), _CHUNK)]
