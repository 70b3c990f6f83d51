from __future__ import annotations

import json
import math
from dataclasses import replace

import pytest

from model.gate import Accept, Bounds, Comparison, Figure, Reject, decide, record


def figure(name: str, current: float, candidate: float, noise: float = 0.01) -> Figure:
    difference = candidate - current
    return Figure(name, current, candidate, difference - noise, difference + noise, 1_000)


BETTER = Comparison(newest=figure("recall@20", 0.10, 0.15))


def reasons(comparison: Comparison, bounds: Bounds | None = None) -> tuple[str, ...]:
    return decide(comparison, bounds).reasons


def test_better_on_the_newest_and_no_worse_elsewhere_is_accepted() -> None:
    comparison = replace(
        BETTER,
        older=(figure("recall@20", 0.2, 0.199),),
        heads=(figure("purchase AUC", 0.7, 0.71),),
        norms={"projection": (3.0, 4.0)},
        transition_cosine=0.95,
    )
    assert isinstance(decide(comparison), Accept)


@pytest.mark.parametrize("candidate", [0.09, 0.10, 0.109])
def test_an_improvement_that_may_be_noise_is_none(candidate: float) -> None:
    (reason,) = reasons(Comparison(newest=figure("recall@20", 0.10, candidate)))
    assert "not better by 0 beyond noise" in reason
    assert "0.1000" in reason


def test_the_margin_counts_beyond_noise() -> None:
    assert not reasons(BETTER, Bounds(margin=0.039))
    assert reasons(BETTER, Bounds(margin=0.041))


@pytest.mark.parametrize("part", ["older", "heads", "slices", "served", "calibration"])
def test_a_loss_beyond_tolerance_and_noise_is_refused_wherever_it_is(part: str) -> None:
    bad = figure("here", 0.30, 0.25)
    (reason,) = reasons(replace(BETTER, **{part: (bad, figure("there", 0.3, 0.3))}))
    assert "here" in reason
    assert "worse by more than" in reason


def test_a_loss_within_tolerance_or_within_noise_is_let_pass() -> None:
    within_tolerance = figure("a", 0.300, 0.296, noise=0.001)
    within_noise = figure("b", 0.30, 0.25, noise=0.06)
    assert not reasons(replace(BETTER, older=(within_tolerance, within_noise)))


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"non_finite": 3}, "3 numbers are NaN"),
        ({"norms": {"projection": (1.0, 5.0)}}, "norm of projection"),
        ({"norms": {"projection": (1.0, 0.1)}}, "norm of projection"),
        ({"norms": {"projection": (1.0, math.nan)}}, "norm of projection"),
        ({"norms": {"projection": (1.0, math.inf)}}, "norm of projection"),
        ({"transition_cosine": 0.5}, "cosine 0.500"),
        ({"transition_cosine": math.nan}, "cosine nan"),
        ({"heads": (figure("churn AUC", 0.7, math.nan),)}, "no number"),
        ({"newest": figure("recall", 0.1, math.nan)}, "not better"),
        ({"newest": replace(BETTER.newest, count=99)}, "99 targets show nothing"),
    ],
)
def test_what_is_broken_is_refused_and_named(changes: dict[str, object], word: str) -> None:
    (reason,) = reasons(replace(BETTER, **changes))  # type: ignore[arg-type]
    assert word in reason


def rare(current: float, candidate: float, high: float, count: int) -> Figure:
    difference = candidate - current
    return Figure("rare items", current, candidate, 2 * difference - high, high, count)


def test_a_fall_of_few_targets_is_no_veto_and_the_same_fall_of_many_is() -> None:
    few, many = (rare(0.083, 0.0, -0.02, count) for count in (70, 700))
    assert not reasons(replace(BETTER, slices=(few,)))
    (reason,) = reasons(replace(BETTER, slices=(many,)))
    assert "slice rare items" in reason
    assert "700 targets" in reason
    assert reasons(replace(BETTER, slices=(few,)), Bounds(least_slice_count=70))


def test_a_slice_must_be_worse_than_the_tolerance_with_its_whole_interval() -> None:
    maybe, surely = rare(0.083, 0.06, -0.005, 700), rare(0.083, 0.06, -0.011, 700)
    assert not reasons(replace(BETTER, slices=(maybe,)))
    assert reasons(replace(BETTER, slices=(surely,)))


def test_a_slice_nobody_is_in_says_nothing() -> None:
    empty = Figure("rare", math.nan, math.nan, math.nan, math.nan, 0)
    assert not reasons(replace(BETTER, slices=(empty,)))


def test_every_reason_is_given() -> None:
    bad = Comparison(
        newest=figure("recall@20", 0.1, 0.1), older=(figure("old", 0.3, 0.1),), non_finite=1
    )
    decision = decide(bad)
    assert isinstance(decision, Reject)
    assert len(decision.reasons) == 3


def test_a_decision_is_recorded_with_all_its_figures() -> None:
    empty = Figure("rare", math.nan, math.nan, math.nan, math.nan, 0)
    decision = decide(replace(BETTER, slices=(empty,)))
    line = record(decision, "trained-2", "base-1", "2026-03-01T00:00:00+00:00")
    again = json.loads(json.dumps(line, allow_nan=False))
    assert again["decision"] == "accept"
    assert again["figures"]["comparison"]["newest"]["candidate"] == 0.15
    assert again["figures"]["comparison"]["slices"][0]["low"] == "nan"
    assert again["figures"]["bounds"]["margin"] == 0.0
