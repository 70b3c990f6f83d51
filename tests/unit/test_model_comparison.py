from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from model import gate
from model import training_rows as tr
from model.candidate import Candidate
from model.comparison import Contender, compare, weight_norms
from model.gate import Comparison
from model.heads import Heads
from model.projection import unit_rows
from model.training_data import decayed_interests
from profiles import arithmetic
from profiles.arithmetic import EventColumns, Layout
from tests.learnable_shop import DIMENSIONS, base, catalogue, circle, trained

HALF_LIVES_S = (1_800.0, 86_400.0, 2_592_000.0)


@pytest.fixture(scope="module")
def candidate(tmp_path_factory: pytest.TempPathFactory) -> Candidate:
    return trained(tmp_path_factory.mktemp("candidate"))


def _compare(current: Contender, other: Contender, of: Candidate, **options: Any) -> Comparison:
    return compare(
        circle(),
        current,
        other,
        cut_ms=of.metrics["cut_ms"],
        item_events=of.counts,
        events=8,
        half_lives_s=HALF_LIVES_S,
        **options,
    )


def test_who_knows_what_comes_next_is_accepted_and_who_does_not_is_rejected(
    candidate: Candidate,
) -> None:
    shop = catalogue(60)  # Recall@20 among a dozen items would tell nobody apart
    vectors = np.concatenate([candidate.vectors, base(shop).vectors(shop)[12:]])
    learned = replace(Contender.of(candidate), vectors=vectors)
    text = Contender(base(shop).vectors(shop))
    better = compare(
        circle(), text, learned, cut_ms=candidate.metrics["cut_ms"],
        item_events=np.full(60, 100), events=8, half_lives_s=HALF_LIVES_S,
    )  # fmt: skip
    assert better.newest.candidate > better.newest.current + 0.1
    assert better.newest.low > 0
    assert gate.decide(better, gate.Bounds(least_count=10)).accepted
    worse = compare(
        circle(), learned, text, cut_ms=candidate.metrics["cut_ms"],
        item_events=np.full(60, 100), events=8, half_lives_s=HALF_LIVES_S,
    )  # fmt: skip
    refused = gate.decide(worse, gate.Bounds(least_count=10))
    assert not refused.accepted
    assert any("is not better" in reason for reason in refused.reasons)


def test_nobody_is_better_than_themselves(candidate: Candidate) -> None:
    same = Contender.of(candidate)
    found = _compare(same, same, candidate)
    assert found.newest.difference == found.newest.low == found.newest.high == 0.0
    assert [figure.difference for figure in found.heads] == [0.0] * len(found.heads)
    assert found.heads  # `purchase` has both classes
    assert not gate.decide(found).accepted


def test_a_head_that_was_learned_and_is_lost_is_refused(candidate: Candidate) -> None:
    """Its training met one class only, as after an archive was cut short."""
    live, after = Contender.of(candidate), Contender.of(candidate)
    assert candidate.heads.learned() == {"purchase"}
    one_class = Heads(candidate.heads.kinds)
    found = _compare(live, replace(after, heads=one_class), candidate)
    assert found.lost_heads == ("purchase",)
    better = replace(found, newest=gate.Figure("recall@20", 0.1, 0.2, 0.05, 0.15, 1_000), slices=())
    (reason,) = gate.decide(better).reasons
    assert reason == "head purchase: the live release's has learned, the candidate's has not"
    assert _compare(replace(live, heads=one_class), after, candidate).lost_heads == ()


def test_slices_hold_all_targets_once_and_rare_items_apart(candidate: Candidate) -> None:
    same = Contender.of(candidate)
    count = {f.name: f.count for f in _compare(same, same, candidate).slices}
    newest = _compare(same, same, candidate).newest.count
    assert count["recall@20 of new users"] + count["recall@20 of returning users"] == newest
    assert count["recall@20 of rare items"] == 0


def test_the_more_slices_are_looked_at_the_wider_their_intervals() -> None:
    rng = np.random.default_rng(0)
    one, other = (Contender(unit_rows(rng.normal(size=(60, 16)))) for _ in range(2))
    windows = circle(items=60, users=120)

    def width(slices: int) -> float:
        found = compare(
            windows, one, other, cut_ms=int(np.quantile(windows.t_ms, 0.9)),
            item_events=np.full(60, 100), events=8, half_lives_s=HALF_LIVES_S,
            item_slices={f"slice {k}": np.ones(60, dtype=bool) for k in range(slices)},
        )  # fmt: skip
        figure = found.slices[-1]
        assert figure.name == f"recall@20 of slice {slices - 1}"
        assert figure.low < figure.difference < figure.high
        return figure.high - figure.low

    assert width(8) > 1.1 * width(1)


def test_numbers_that_are_none_are_counted(candidate: Candidate) -> None:
    broken = candidate.vectors.copy()
    broken[0, 0] = np.nan
    found = _compare(
        Contender.of(candidate), replace(Contender.of(candidate), vectors=broken), candidate
    )
    assert found.non_finite == 1
    assert not gate.decide(found).accepted


def test_the_same_seed_draws_the_same_windows(candidate: Candidate) -> None:
    same = Contender.of(candidate)
    one, other = (_compare(same, same, candidate, most=20, seed=3) for _ in range(2))
    assert one == other
    assert one.newest.count <= 20


def test_what_readers_rank_by_must_not_fall_whatever_the_window_encoder_does() -> None:
    rng = np.random.default_rng(0)
    angle = 2 * np.pi * np.arange(60) / 60
    beside = np.stack([np.cos(angle), np.sin(angle)], axis=1)  # the next item is the nearest
    beside = unit_rows(np.concatenate([beside, 0.1 * rng.normal(size=(60, 14))], axis=1))
    anywhere = unit_rows(rng.normal(size=(60, 16)))
    windows = circle(items=60, users=120)
    found = compare(
        windows, Contender(beside), Contender(anywhere),
        cut_ms=int(np.quantile(windows.t_ms, 0.9)), item_events=np.full(60, 100), events=8,
        half_lives_s=HALF_LIVES_S,
    )  # fmt: skip
    (served,) = found.served
    assert served.current > 0.9 > 0.7 > served.candidate
    better = replace(found.newest, candidate=1.0, low=0.5, high=0.7)
    decision = gate.decide(replace(found, newest=better, older=(), slices=()))
    assert [reason.partition(":")[0] for reason in decision.reasons] == [
        "served recall@20 by decayed interests"
    ]


def test_decayed_interests_are_those_of_the_profile_arithmetic() -> None:
    windows, vectors = circle(users=3), base(catalogue()).vectors(catalogue())
    at = np.arange(windows.start[1], windows.start[1] + 7)
    windows.weight[at] = (1, 0.2, -0.4, 0, 1, 0.6, 1)
    layout = Layout(DIMENSIONS, half_lives_s=HALF_LIVES_S)
    profiles = arithmetic.unpack([None], [None], layout)
    m = len(at)
    events = EventColumns(
        row=np.zeros(m, dtype=np.int64),
        source=np.ones(m, dtype=np.uint64),
        offset=np.arange(m),
        event=np.zeros(m, dtype=np.uint64),
        t_ms=windows.t_ms[at],
        type=windows.type[at],
        weight=windows.weight[at],
        item=windows.item[at].astype(np.uint64) + 1,
        category=np.zeros(m, dtype=np.uint64),
        vector=vectors[windows.item[at]],
        resolved=np.ones(m, dtype=bool),
        text=np.zeros(m, dtype=bool),
        spend=np.zeros(m),
        foreign=np.zeros(m, dtype=bool),
    )
    arithmetic.fold(profiles, events, layout, 1)
    expected = arithmetic.unit(profiles.header["sums"][0])
    found = decayed_interests(windows, int(at[-1]), vectors, HALF_LIVES_S)
    np.testing.assert_allclose(found, expected, atol=1e-5)


def test_those_who_said_when_to_stop_do_not_judge(candidate: Candidate) -> None:
    windows = circle()
    owner = tr.owners(windows)
    stops = tr.stopping(windows)
    assert 0.3 < stops.mean() < 0.7
    targets = tr.find_targets(windows)
    asked = tr.asked_at(windows) & targets.since(candidate.metrics["cut_ms"])
    same = Contender.of(candidate)
    assert _compare(same, same, candidate).newest.count == (asked & ~stops[owner]).sum()
    assert candidate.metrics["newest"]["windows"] == (asked & stops[owner]).sum()


def test_lengths_of_weights_are_compared_with_what_was_trained_before(
    candidate: Candidate,
) -> None:
    assert weight_norms(None, candidate) == {}
    same = weight_norms(candidate, candidate)
    assert set(same) == {"the projection", "the window encoder"}
    assert all(before == after > 0 for before, after in same.values())
    grown = replace(
        candidate, projection=replace(candidate.projection, matrix=5 * candidate.projection.matrix)
    )
    found = _compare(
        Contender.of(candidate), Contender.of(grown), candidate,
        norms=weight_norms(candidate, grown),
    )  # fmt: skip
    assert any("norm of the projection" in reason for reason in gate.decide(found).reasons)
