"""Fits the ranker that readers use, and keeps it only if it ranks better than the live one.

No I/O. Fitted on the older part of the newest cases, judged on the newer.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import numpy as np

from model.evaluate import UserBootstrap, metric, ranks
from model.gate import Figure
from model.ranker import Weights, first_weights, fit, thinned
from profiles.ranking import score

from .ranker_cases import Timed

_METRIC: Final = "recall@20"
_FITTED_SHARE: Final = 2 / 3
# 700 cases lost to the weights by hand (docs/decisions.md).
LEAST_CASES: Final = 900
_CASES_AT_ONCE: Final = 256


@dataclass(frozen=True)
class FittedRanker:
    """What became of a fit."""

    weights: Weights | None
    """None: there were too few cases, or it was not better beyond noise."""
    figure: Figure


def fit_ranker(timed: Timed, live: Weights | None, margin: float, seed: int = 0) -> FittedRanker:
    """Fit from the live weights (None: those by hand) and compare with them."""
    before = first_weights() if live is None else live
    split = fitted_until(timed)
    if not split:
        nothing = Figure(f"{_METRIC} of the ranker", np.nan, np.nan, np.nan, np.nan, 0)
        return FittedRanker(None, nothing)
    rows = np.arange(len(timed.t_ms))
    fitted = fit(thinned(timed.take(rows[:split]).cases, seed), before, seed=seed)
    judged = timed.take(rows[split:])
    figure = compare_scores(f"{_METRIC} of the ranker", (judged, before), (judged, fitted))
    return FittedRanker(fitted if figure.low > margin else None, figure)


def fitted_until(timed: Timed) -> int:
    """How many cases a ranker is fitted on; 0: there are too few for one."""
    split = int(len(timed.t_ms) * _FITTED_SHARE)
    return split if split >= LEAST_CASES else 0


def compare_scores(
    name: str, current: tuple[Timed, Weights], candidate: tuple[Timed, Weights]
) -> Figure:
    """What readers would have shown by either's signals and weights, for the same cases."""
    row, item = np.nonzero(current[0].cases.target)
    if not len(item):
        return Figure(name, np.nan, np.nan, np.nan, np.nan, 0)
    found = [metric(_METRIC, _ranks(weights, timed)) for timed, weights in (current, candidate)]
    change = UserBootstrap(current[0].user[row]).difference(found[1], found[0])
    means = [float(each.mean()) for each in found]
    return Figure(name, means[0], means[1], change.low, change.high, len(item))


def _ranks(weights: Weights, timed: Timed) -> np.ndarray[tuple[int], np.dtype[np.int32]]:
    """The place of every target, in the order of `np.nonzero(target)`."""
    places = []
    for rows in np.array_split(np.arange(len(timed.t_ms)), -(-len(timed.t_ms) // _CASES_AT_ONCE)):
        part = timed.take(rows).cases
        scores = score(weights, part.signals, part.items, part.shopper)
        places.append(ranks(scores, *np.nonzero(part.target)))
    return np.concatenate(places)
