"""Metrics of rankings and of probabilities, and intervals that resample users.

PURE: numpy only, no I/O, no clock, random numbers from a seed. Knows ranks, labels and which
user each belongs to; knows nothing of events, of models or of where scores come from.

Everything said of a ranking follows from the rank of each target in the *full* catalogue.
No sampled negatives: sampled metrics order models differently from exact ones (Krichene and
Rendle, KDD 2020).

Ties are resolved against the scorer: a target that shares its score with others gets the worst
place among them. A scorer that does not tell items apart has then found nothing (a constant one
has recall 0, not 20/n), the same scores give the same figures everywhere, and one integer per
target is enough for every metric. Breaking ties at random would be right on average, and would
reward counters for all the items that they know nothing about.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]
Doubles = NDArray[np.float64]
Ints = NDArray[np.int64]
Int32s = NDArray[np.int32]
Bools = NDArray[np.bool_]

METRICS: Final = ("recall@10", "recall@20", "ndcg@10", "ndcg@20", "mrr")
LEVEL: Final = 0.95
_RESAMPLES: Final = 1000  # the ends of a 95 % interval then move by 3 % of its width
_BINS: Final = 15


# --- rankings ------------------------------------------------------------------------------


def ranks(scores: Floats, row: Ints, item: NDArray[Any]) -> Int32s:
    """The place of `item[i]` in ranking `row[i]`, 1 for the highest score, ties at their worst.

    scores: (n, n_items), -inf for what must not be shown; row, item: (m,). Returns (m,).
    Raises ValueError for scores that are not numbers, which would otherwise rank first or last
    by accident.
    """
    n_items = scores.shape[1]
    ordered = np.sort(scores, axis=1)  # ascending, NaN last
    if np.isnan(ordered[:, -1]).any():
        raise ValueError("a score is not a number")
    wanted = scores[row, item]  # (m,)
    out = np.empty(len(row), dtype=np.int32)
    by_row = np.argsort(row, kind="stable")
    bounds = np.searchsorted(row[by_row], np.arange(len(scores) + 1))
    for r, (first, last) in enumerate(pairwise(bounds.tolist())):
        mine = by_row[first:last]
        out[mine] = n_items - np.searchsorted(ordered[r], wanted[mine], side="left")
    return out


def at_or_above(scores: Floats, limits: Floats) -> Int32s:
    """How many of `scores` (n,) reach each of `limits` (m,). Returns (m,)."""
    below = np.searchsorted(np.sort(scores), limits, side="left")
    return (len(scores) - below).astype(np.int32)


def top(scores: Floats, count: int) -> Ints:
    """(n, count) items of the highest scores of each row, in no order; ties as they fall."""
    count = min(count, scores.shape[1])
    return np.argpartition(scores, scores.shape[1] - count, axis=1)[:, -count:]


def metric(name: str, rank: NDArray[Any]) -> Doubles:
    """One of `METRICS` for each target by itself, from its rank (m,). Returns (m,), 0 to 1.

    recall@k: whether the target is among the first k. ndcg@k: 1 / log2(1 + rank) if so, which is
    NDCG for a single relevant item (Järvelin and Kekäläinen, TOIS 2002). mrr: 1 / rank.
    """
    kind, _, depth = name.partition("@")
    if name not in METRICS and not (kind in ("recall", "ndcg") and depth.isdigit()):
        raise ValueError(f"no metric {name!r}: recall@K, ndcg@K or mrr")
    places = rank.astype(np.float64)
    if kind == "mrr":
        return 1.0 / places
    shown = places <= int(depth)
    return shown / np.log2(1.0 + places) if kind == "ndcg" else shown.astype(np.float64)


# --- probabilities -------------------------------------------------------------------------


def auc(score: NDArray[Any], label: NDArray[Any], weight: NDArray[Any] | None = None) -> float:
    """The chance that a positive scores above a negative, ties counting half (Mann-Whitney).

    score, label (0 or 1), weight: (m,). NaN where one class is absent.
    """
    weights = np.ones(len(score)) if weight is None else weight.astype(np.float64)
    _, place = np.unique(score, return_inverse=True)
    positive = np.bincount(place, weights * (label == 1))
    negative = np.bincount(place, weights * (label != 1))
    pairs = positive.sum() * negative.sum()
    if pairs == 0:
        return float("nan")
    below = np.cumsum(negative) - negative
    return float((positive * (below + negative / 2)).sum() / pairs)


def brier(probability: NDArray[Any], label: NDArray[Any]) -> float:
    """Mean squared error of probabilities (Brier, 1950); NaN for none."""
    if not len(label):
        return float("nan")
    return float(np.square(probability.astype(np.float64) - label).mean())


def calibration_error(probability: NDArray[Any], label: NDArray[Any], bins: int = _BINS) -> float:
    """Expected calibration error: the mean gap between what is promised and what happens.

    Bins hold equally many predictions (Nixon et al., CVPR-W 2019); those of equal width would
    put nearly all rare events into one bin. NaN for no predictions.
    """
    if not len(label):
        return float("nan")
    order = np.argsort(probability, kind="stable")
    gaps = [
        abs(float((probability[part].astype(np.float64) - label[part]).sum()))
        for part in np.array_split(order, min(bins, len(order)))
    ]
    return sum(gaps) / len(order)


# --- intervals -----------------------------------------------------------------------------


@dataclass(frozen=True)
class Interval:
    """An estimate and the interval that holds it at the level asked for."""

    value: float
    low: float
    high: float
    count: int
    """Targets that the estimate is made of."""

    @property
    def above_zero(self) -> bool:
        """For a difference: whether it is an improvement beyond noise."""
        return self.low > 0


@dataclass(frozen=True)
class UserBootstrap:
    """Intervals for means over targets, by resampling whole users with replacement.

    A user's targets go together, because they resemble each other: resampling single targets
    makes intervals too narrow. One object draws once, so that everything it says is paired.
    Percentile intervals (Efron and Tibshirani, 1993).
    """

    user: NDArray[Any]  # (m,) whose target each is
    resamples: int = _RESAMPLES
    level: float = LEVEL
    seed: int = 0
    _row: Ints = field(init=False, repr=False)  # (m,) user as 0 to u - 1
    _drawn: NDArray[np.uint8] = field(init=False, repr=False)  # (resamples, u) times drawn

    def __post_init__(self) -> None:
        names, row = np.unique(self.user, return_inverse=True)
        rng = np.random.default_rng(self.seed)
        drawn = np.zeros((self.resamples, len(names)), dtype=np.uint8)
        for times in drawn if len(names) else ():
            picked = rng.integers(0, len(names), size=len(names))
            times[:] = np.bincount(picked, minlength=len(names))  # 255 times has no chance
        object.__setattr__(self, "_row", row)
        object.__setattr__(self, "_drawn", drawn)

    def mean(self, values: NDArray[Any], where: Bools | None = None) -> Interval:
        """The mean of values (m,) over all targets, or over those of `where`.

        NaN with a count of 0 where there are none.
        """
        return self._ratio(values, None, where)

    def difference(
        self, ours: NDArray[Any], theirs: NDArray[Any], where: Bools | None = None
    ) -> Interval:
        """mean(ours) - mean(theirs), both (m,) on the same targets."""
        return self._ratio(ours.astype(np.float64) - theirs, None, where)

    def lift(
        self, ours: NDArray[Any], theirs: NDArray[Any], where: Bools | None = None
    ) -> Interval:
        """mean(ours) / mean(theirs) - 1: 0.05 is five per cent better."""
        found = self._ratio(ours, theirs, where)
        return Interval(found.value - 1, found.low - 1, found.high - 1, found.count)

    def statistic(self, of: Callable[[Doubles], float], resamples: int = 200) -> Interval:
        """Any statistic of weighted targets, as `lambda w: auc(score, label, w)`.

        `of` gets the weights (m,) of each resample: how often its user was drawn.
        """
        drawn = [of(times[self._row].astype(np.float64)) for times in self._drawn[:resamples]]
        return self._interval(of(np.ones(len(self._row))), np.asarray(drawn), len(self._row))

    def _ratio(
        self, above: NDArray[Any], below: NDArray[Any] | None, where: Bools | None
    ) -> Interval:
        """sum(above) / sum(below); below None counts targets."""
        chosen = np.ones(len(self._row)) if where is None else where.astype(np.float64)
        count = int(chosen.sum())
        over = self._by_user(above * chosen)
        under = self._by_user(chosen if below is None else below * chosen)
        with np.errstate(divide="ignore", invalid="ignore"):
            value = float(np.divide(over.sum(), under.sum()))
            sums = self._drawn @ np.stack([over, under], axis=1)  # (resamples, 2)
            drawn = sums[:, 0] / sums[:, 1]
        return self._interval(value, drawn, count)

    def _by_user(self, values: NDArray[Any]) -> Doubles:
        users = self._drawn.shape[1]
        return np.bincount(self._row, values, minlength=users).astype(np.float64)

    def _interval(self, value: float, drawn: Doubles, count: int) -> Interval:
        drawn = drawn[np.isfinite(drawn)]  # a resample without any of the slice's users
        if not count or not len(drawn):
            return Interval(float("nan"), float("nan"), float("nan"), count)
        tail = (1 - self.level) / 2
        low, high = np.quantile(drawn, [tail, 1 - tail])
        return Interval(value, float(low), float(high), count)


def summary(
    rank: Mapping[str, NDArray[Any]], bootstrap: UserBootstrap, where: Bools | None = None
) -> dict[str, dict[str, Interval]]:
    """{scorer: {metric: interval}} over all targets, or over those of `where`."""
    return {
        name: {m: bootstrap.mean(metric(m, places), where) for m in METRICS}
        for name, places in rank.items()
    }
