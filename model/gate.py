"""The gate: whether a candidate may take the place of the current release.

PURE. It gets figures of both, measured on the same windows, with the interval of their
difference (by resampling users, see `evaluate.py`), and answers Accept or Reject with
reasons. Knows nothing of files or of how a figure came about.

Two kinds of doubt pull apart. An improvement must be shown, so on the newest windows it is
the lower end of the interval that has to pass the margin. A loss is looked for in many
slices, most of them small: a point estimate alone would nearly always find one somewhere.
So a loss counts where it exceeds the tolerance and the interval says that it is no chance.
Slices are the many and the small: theirs must exceed the tolerance with the whole interval,
which is wide enough for as many as there are, and few targets say nothing.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass(frozen=True)
class Figure:
    """One figure of both releases. Higher is better."""

    name: str
    current: float
    candidate: float
    low: float  # the interval of candidate - current
    high: float
    count: int  # targets behind it; with 0 it says nothing, and NaN is no fault

    @property
    def difference(self) -> float:
        """Candidate minus current."""
        return self.candidate - self.current


@dataclass(frozen=True)
class Comparison:
    """All that the gate looks at."""

    newest: Figure
    """The figure that a candidate has to improve, on the newest windows."""
    older: tuple[Figure, ...] = ()
    heads: tuple[Figure, ...] = ()
    lost_heads: tuple[str, ...] = ()
    """Those of the current release that say something and of the candidate do not."""
    slices: tuple[Figure, ...] = ()
    """New users, rare items and categories, scripts, …; intervals are for all of them at once."""
    served: tuple[Figure, ...] = ()
    """By what readers search and rank: the newest figure is of one signal among several."""
    calibration: tuple[Figure, ...] = ()
    """Negative calibration errors, so that higher is better here as well."""
    non_finite: int = 0
    """Numbers of weights and vectors that are NaN or infinite."""
    norms: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    """Of weights, or of vectors before they are scaled: name -> (current, candidate)."""
    transition_cosine: float | None = None
    """Of mapped and true vectors on held-out items; None where the space stays."""


@dataclass(frozen=True)
class Bounds:
    """How much better, and how much worse, a candidate may be. All settable."""

    margin: float = 0.0  # on the newest windows, beyond noise
    older_tolerance: float = 0.005
    head_tolerance: float = 0.01
    slice_tolerance: float = 0.01
    served_tolerance: float = 0.005
    calibration_tolerance: float = 0.02
    norm_ratio: float = 4.0  # candidate to current, or the reverse
    least_transition_cosine: float = 0.7
    least_count: int = 100
    """Targets of the newest windows below which nothing is shown."""
    least_slice_count: int = 200
    """Targets of a slice below which it has no say."""


@dataclass(frozen=True)
class Accept:
    """The candidate may go live."""

    figures: Mapping[str, Any]
    accepted = True
    reasons: tuple[str, ...] = ()


@dataclass(frozen=True)
class Reject:
    """The current release stays."""

    reasons: tuple[str, ...]
    figures: Mapping[str, Any]
    accepted = False


Decision = Accept | Reject


def decide(comparison: Comparison, bounds: Bounds | None = None) -> Decision:
    """Accept, or Reject with every reason that was found, not only the first."""
    bounds = bounds or Bounds()
    reasons = [*_broken(comparison, bounds), *_not_better(comparison.newest, bounds)]
    for figures, tolerance, where in (
        (comparison.older, bounds.older_tolerance, "older windows"),
        (comparison.heads, bounds.head_tolerance, "head"),
        (comparison.served, bounds.served_tolerance, "served"),
        (comparison.calibration, bounds.calibration_tolerance, "calibration"),
    ):
        reasons += _worse(figures, tolerance, where)
    reasons += _worse_slices(comparison.slices, bounds)
    seen = {"comparison": _plain(asdict(comparison)), "bounds": asdict(bounds)}
    return Reject(tuple(reasons), seen) if reasons else Accept(seen)


def record(decision: Decision, candidate: str, parent: str, at: str) -> dict[str, Any]:
    """A decision as JSON can hold it, with all its figures. `candidate`: its release, "" where it
    became none."""
    return {
        "at": at,
        "candidate": candidate,
        "parent": parent,
        "decision": "accept" if decision.accepted else "reject",
        "reasons": list(decision.reasons),
        "figures": dict(decision.figures),
    }


def _broken(comparison: Comparison, bounds: Bounds) -> Iterable[str]:
    if comparison.non_finite:
        yield f"{comparison.non_finite} numbers are NaN or infinite"
    for name in comparison.lost_heads:
        yield f"head {name}: the live release's has learned, the candidate's has not"
    for name, (current, candidate) in comparison.norms.items():
        sane = current > 0 and candidate > 0 and math.isfinite(candidate)
        if not sane or not 1 / bounds.norm_ratio <= candidate / current <= bounds.norm_ratio:
            yield f"norm of {name} went from {current:.4g} to {candidate:.4g}"
    cosine = comparison.transition_cosine
    if cosine is not None and not cosine >= bounds.least_transition_cosine:
        yield (
            f"the transition maps held-out items with cosine {cosine:.3f}, "
            f"{bounds.least_transition_cosine:g} is needed"
        )


def _not_better(newest: Figure, bounds: Bounds) -> Iterable[str]:
    if newest.count < bounds.least_count:
        yield f"{newest.name}: {newest.count} targets show nothing, {bounds.least_count} are needed"
    elif not newest.low > bounds.margin:  # NaN too
        yield (f"{newest.name}: {_change(newest)} is not better by {bounds.margin:g} beyond noise")


def _worse(figures: Iterable[Figure], tolerance: float, where: str) -> Iterable[str]:
    for figure in figures:
        if not figure.count:
            continue
        if not _is_known(figure):
            yield f"{where} {figure.name}: a figure is no number"
        elif figure.difference < -tolerance and figure.high < 0:
            yield f"{where} {figure.name}: {_change(figure)} is worse by more than {tolerance:g}"


def _worse_slices(figures: Iterable[Figure], bounds: Bounds) -> Iterable[str]:
    for figure in figures:
        if figure.count < bounds.least_slice_count:
            continue
        if not _is_known(figure):
            yield f"slice {figure.name}: a figure is no number"
        elif figure.high < -bounds.slice_tolerance:
            yield (
                f"slice {figure.name}: {_change(figure)}, {figure.count} targets, "
                f"is worse by more than {bounds.slice_tolerance:g} beyond noise"
            )


def _is_known(figure: Figure) -> bool:
    return all(map(math.isfinite, (figure.current, figure.candidate, figure.low, figure.high)))


def _change(figure: Figure) -> str:
    return (
        f"{figure.current:.4f} -> {figure.candidate:.4f} "
        f"({figure.difference:+.4f}, interval {figure.low:+.4f} to {figure.high:+.4f})"
    )


def _plain(value: Any) -> Any:
    """NaN and infinity as words: JSON has no numbers for them."""
    if isinstance(value, dict):
        return {k: _plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value
