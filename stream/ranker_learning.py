"""Fits the ranker that readers use, and keeps it only if it ranks better than the live one.

No I/O. Fitted on the older part of the newest cases, judged on the newer.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import numpy as np

from model.evaluate import UserBootstrap, metric, ranks
from model.gate import Figure
from model.ranker import Cases, Weights, first_weights, fit, thinned
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
    split = int(len(timed.t_ms) * _FITTED_SHARE)
    if split < LEAST_CASES:
        nothing = Figure(f"{_METRIC} of the ranker", np.nan, np.nan, np.nan, np.nan, 0)
        return FittedRanker(None, nothing)
    fitted = fit(thinned(_take(timed.cases, slice(0, split)), seed), before, seed=seed)
    judged, users = _take(timed.cases, slice(split, None)), timed.user[split:]
    row, item = np.nonzero(judged.target)
    found = [metric(_METRIC, _ranks(w, judged)) for w in (before, fitted)]
    change = UserBootstrap(users[row]).difference(found[1], found[0])
    figure = Figure(
        f"{_METRIC} of the ranker",
        float(found[0].mean()),
        float(found[1].mean()),
        change.low,
        change.high,
        len(item),
    )
    return FittedRanker(fitted if change.low > margin else None, figure)


def _ranks(weights: Weights, cases: Cases) -> np.ndarray[tuple[int], np.dtype[np.int32]]:
    """The place of every target, in the order of `np.nonzero(cases.target)`."""
    places = []
    for begin in range(0, len(cases.target), _CASES_AT_ONCE):
        part = _take(cases, slice(begin, begin + _CASES_AT_ONCE))
        scores = score(weights, part.signals, part.items, part.shopper)
        places.append(ranks(scores, *np.nonzero(part.target)))
    return np.concatenate(places)


def _take(cases: Cases, rows: slice) -> Cases:
    return Cases(
        cases.signals[rows],
        cases.items[rows],
        cases.shopper[rows],
        cases.target[rows],
        cases.log_chance[rows],
    )
