"""A candidate beside what is live, on the same windows: the figures that the gate decides on.

PURE but for the networks it runs. Both rank the whole catalogue after windows whose target is
newer than anything the candidate was trained on, and after older ones; on the newest only
shoppers that had no say in when the training stopped. They do so by the window encoder, which is
what training improves, and by the decayed interests, which is what readers search by. Intervals are
of paired differences, by resampling users (`evaluate.UserBootstrap`); those of slices are wider, so
that all of them hold at once (Bonferroni).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
from torch import nn

from . import training_rows as tr
from .candidate import Candidate
from .evaluate import LEVEL, UserBootstrap, auc, calibration_error, metric, ranks
from .gate import Comparison, Figure
from .head_training import chances, judged
from .heads import Heads
from .training_data import decayed_interests, next_interests, sample
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


def compare(
    windows: Labelled,
    current: Contender,
    candidate: Contender,
    *,
    cut_ms: int,
    item_events: Ints,
    events: int,
    half_lives_s: Sequence[float],
    item_slices: Mapping[str, tr.Bools] | None = None,
    most: int = 2_000,
    seed: int = 0,
    transition_cosine: float | None = None,
    norms: Mapping[str, tuple[float, float]] | None = None,
) -> Comparison:
    """Both on the same windows. `cut_ms`: the candidate has seen nothing since; `item_events`
    (n,): training events of each item; `half_lives_s`: of a profile's time scales; `item_slices`:
    name -> (n,) items to look at by themselves, beside those that happened rarely; `most`: windows
    ranked of either age, drawn with `seed`.
    """
    numbers = (candidate.vectors, *_weights(candidate))
    non_finite = sum(int((~np.isfinite(array)).sum()) for array in numbers)
    if non_finite:  # it cannot rank anything
        return Comparison(Figure(METRIC, np.nan, np.nan, np.nan, np.nan, 0), non_finite=non_finite)
    targets = tr.find_targets(windows)
    asked = tr.asked_at(windows)
    judging = ~tr.stopping(windows)[tr.owners(windows)]
    contenders = (current, candidate)
    by_window = [partial(c.interests, windows, events=events) for c in contenders]
    vectors = [c.vectors for c in contenders]
    fresh = sample(np.flatnonzero(asked & judging & targets.since(cut_ms)), most, seed)
    aged = sample(np.flatnonzero(asked & targets.before(cut_ms)), most, seed)
    newest = _Ranked.of(windows, targets, fresh, vectors, by_window)
    older = _Ranked.of(windows, targets, aged, vectors, by_window)
    by_decay = [partial(_interests, windows, each, half_lives_s) for each in vectors]
    served = _Ranked.of(windows, targets, fresh, vectors, by_decay)
    place = newest.end - windows.start[newest.user] + 1  # how many events the user had
    slices = {
        "new users": place <= _NEW_USER_EVENTS,
        "returning users": place > _NEW_USER_EVENTS,
        "rare items": item_events[newest.item] <= _RARE_EVENTS,
    } | {name: items[newest.item] for name, items in (item_slices or {}).items()}
    present = sum(bool(at.any()) for at in slices.values())
    heads, calibration = _heads(windows, contenders, events, most, seed)
    return Comparison(
        newest=newest.figure(METRIC),
        older=(older.figure(METRIC),),
        heads=heads,
        lost_heads=_lost(current.heads, candidate.heads),
        slices=tuple(
            newest.figure(f"{METRIC} of {name}", at, one_of=present) for name, at in slices.items()
        ),
        served=(served.figure(f"{METRIC} by decayed interests"),),
        calibration=calibration,
        norms=norms or {},
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
        ends: Ints,
        vectors: Sequence[Floats],
        interests: Sequence[Callable[[Ints], Floats]],
    ) -> _Ranked:
        """`interests`: of each contender, ends (k,) -> rows (k, D) that its `vectors` (n, D) are
        ranked by."""
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
        for items, interest in zip(vectors, interests, strict=True):
            places = [np.zeros(0, np.int32)]
            for part in _parts(ends):
                scores = interest(part) @ items.T  # (k, n)
                mine = np.isin(end, part)
                places.append(ranks(scores, np.searchsorted(part, end[mine]), item[mine]))
            found.append(np.concatenate(places))
        return cls(tr.owners(windows)[end], end, item, (found[0], found[1]))

    def figure(self, name: str, where: tr.Bools | None = None, one_of: int = 1) -> Figure:
        """`one_of` so many that are looked at together."""
        count = len(self.item) if where is None else int(where.sum())
        if not count:
            return Figure(name, np.nan, np.nan, np.nan, np.nan, 0)
        current, candidate = (metric(METRIC, rank) for rank in self.rank)
        bootstrap = UserBootstrap(self.user, level=1 - (1 - LEVEL) / one_of)
        change = bootstrap.difference(candidate, current, where)
        means = [
            float(v[where].mean() if where is not None else v.mean()) for v in (current, candidate)
        ]
        return Figure(name, means[0], means[1], change.low, change.high, count)


def _interests(
    windows: Labelled, vectors: Floats, half_lives_s: Sequence[float], ends: Ints
) -> Floats:
    """(k, D) what readers search and rank by after events `ends` (k,): all time scales together."""
    found = [decayed_interests(windows, end, vectors, half_lives_s) for end in ends.tolist()]
    return np.stack([scales.mean(axis=0) for scales in found])


def weight_norms(
    current: Candidate | None, candidate: Candidate
) -> Mapping[str, tuple[float, float]]:
    """Lengths of what both learned; {} where the current release was never trained, whose weights
    are of another scale."""
    if current is None:
        return {}
    both = (current, candidate)
    of: dict[str, Callable[[Candidate], Iterable[npt.NDArray[Any]]]] = {
        "the projection": lambda c: [c.projection.matrix],
        "the window encoder": lambda c: _arrays(c.window),
    }
    norms = {name: tuple(map(_length, map(arrays, both))) for name, arrays in of.items()}
    return {name: (before, after) for name, (before, after) in norms.items()}


def _length(arrays: Iterable[npt.NDArray[Any]]) -> float:
    return float(np.sqrt(sum(float(np.square(a, dtype=np.float64).sum()) for a in arrays)))


def _arrays(module: nn.Module) -> list[npt.NDArray[Any]]:
    return [value.detach().cpu().numpy() for value in module.parameters()]


def _heads(
    windows: Labelled, contenders: tuple[Contender, Contender], events: int, most: int, seed: int
) -> tuple[tuple[Figure, ...], tuple[Figure, ...]]:
    """AUC, and calibration errors with their sign turned, of heads that both contenders have, on
    windows from which the candidate's have not learned."""
    right: list[Figure] = []
    calibrated: list[Figure] = []
    current, candidate = (contender.heads for contender in contenders)
    if current is None or candidate is None:
        return (), ()
    for name in candidate.names:
        ends = judged(windows, candidate, name, most, seed)
        label = getattr(windows, name)[ends]
        of = [chances(windows, heads, ends, events)[name] for heads in (current, candidate)]
        if np.isnan(of).any() or not 0 < int(label.sum()) < len(label):
            continue  # what has learned nothing, or one class only, says nothing
        right.append(_auc(name, of, label, tr.owners(windows)[ends]))
        errors = [calibration_error(p, label) for p in of]
        change = errors[0] - errors[1]  # without an interval: the error is of bins, not of windows
        calibrated.append(
            Figure(f"{name} -ECE", -errors[0], -errors[1], change, change, len(label))
        )
    return tuple(right), tuple(calibrated)


def _lost(current: Heads | None, candidate: Heads | None) -> tuple[str, ...]:
    before, after = (heads.learned() if heads else set[str]() for heads in (current, candidate))
    return tuple(sorted(before - after))


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
