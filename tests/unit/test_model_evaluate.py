"""Metrics against values worked out by hand, and intervals against what they promise."""

from __future__ import annotations

import math

import numpy as np
import pytest

from model.evaluate import (
    METRICS,
    Ranking,
    UserBootstrap,
    at_or_above,
    auc,
    brier,
    calibration_error,
    metric,
    ranks,
    summary,
)


def test_the_highest_score_has_rank_one() -> None:
    scores = np.asarray([[0.1, 0.9, 0.5], [3.0, 2.0, 1.0]], dtype=np.float32)
    row, item = np.asarray([0, 0, 0, 1]), np.asarray([1, 2, 0, 2])
    assert ranks(scores, row, item).tolist() == [1, 2, 3, 3]


def test_a_tie_takes_the_worst_of_its_places() -> None:
    scores = np.asarray([[2.0, 1.0, 1.0, 1.0, 0.0]], dtype=np.float32)
    row = np.zeros(5, dtype=np.int64)
    assert ranks(scores, row, np.arange(5)).tolist() == [1, 4, 4, 4, 5]


def test_a_scorer_that_tells_nothing_apart_finds_nothing() -> None:
    constant = np.ones((1, 50), dtype=np.float32)
    place = ranks(constant, np.zeros(50, dtype=np.int64), np.arange(50))
    assert metric("recall@20", place).sum() == 0
    assert not Ranking(constant).shown(20).any()


def test_masked_items_rank_behind_all_others() -> None:
    scores = np.asarray([[-np.inf, 5.0, -1e30]], dtype=np.float32)
    assert ranks(scores, np.zeros(3, dtype=np.int64), np.arange(3)).tolist() == [3, 1, 2]


def test_scores_that_are_not_numbers_are_refused() -> None:
    with pytest.raises(ValueError, match="not a number"):
        Ranking(np.asarray([[1.0, np.nan, 0.0]], dtype=np.float32))


def test_what_is_shown_is_what_ranks_high_enough() -> None:
    scores = np.asarray([[4.0, 3.0, 2.0, 2.0, 0.0]], dtype=np.float32)
    ranking = Ranking(scores)
    place = ranking.ranks(np.zeros(5, dtype=np.int64), np.arange(5))
    for count in range(1, 7):
        assert ranking.shown(count).tolist() == (place <= count).tolist()


def test_at_or_above_counts_equals() -> None:
    scores = np.asarray([1.0, 3.0, 2.0, 2.0], dtype=np.float32)
    limits = np.asarray([2.0, 3.5, 0.0], dtype=np.float32)
    assert at_or_above(scores, limits).tolist() == [3, 0, 4]


def test_metrics_of_single_ranks_by_hand() -> None:
    rank = np.asarray([1, 3, 10, 11, 21])
    assert metric("recall@10", rank).tolist() == [1, 1, 1, 0, 0]
    assert metric("recall@20", rank).tolist() == [1, 1, 1, 1, 0]
    # 1 / log2(1 + rank): log2 2 = 1, log2 4 = 2, log2 11, log2 12.
    by_hand = [1, 0.5, 1 / math.log2(11), 1 / math.log2(12), 0]
    assert metric("ndcg@20", rank) == pytest.approx(by_hand)
    assert metric("ndcg@10", rank) == pytest.approx([*by_hand[:3], 0, 0])
    assert metric("mrr", rank) == pytest.approx([1, 1 / 3, 0.1, 1 / 11, 1 / 21])


@pytest.mark.parametrize("name", ["recall", "hits@10", "ndcg@", "mrr@5x"])
def test_an_unknown_metric_is_refused_by_name(name: str) -> None:
    with pytest.raises(ValueError, match="no metric"):
        metric(name, np.asarray([1]))


def test_auc_by_hand() -> None:
    # Positives .8, .4; negatives .6, .4, .1: pairs won 3 + 1.5 of 6.
    score = np.asarray([0.8, 0.4, 0.6, 0.4, 0.1])
    label = np.asarray([1, 1, 0, 0, 0])
    assert auc(score, label) == pytest.approx(4.5 / 6)
    assert auc(-score, label) == pytest.approx(1.5 / 6)


def test_auc_weights_count_as_copies() -> None:
    score, label = np.asarray([0.2, 0.9, 0.5, 0.4]), np.asarray([0, 1, 1, 0])
    weight = np.asarray([3, 1, 2, 0])
    repeated = np.repeat(np.arange(4), weight)
    assert auc(score, label, weight) == pytest.approx(auc(score[repeated], label[repeated]))


def test_auc_of_one_class_is_not_a_number() -> None:
    assert math.isnan(auc(np.asarray([0.1, 0.2]), np.asarray([1, 1])))


def test_brier_and_calibration_by_hand() -> None:
    probability = np.asarray([0.1, 0.1, 0.9, 0.9])
    label = np.asarray([0, 1, 1, 1])
    assert brier(probability, label) == pytest.approx((0.01 + 0.81 + 0.01 + 0.01) / 4)
    # Two bins of two: .1 promised and .5 happened; .9 promised and 1 happened.
    assert calibration_error(probability, label, bins=2) == pytest.approx((0.4 + 0.1) / 2)
    assert math.isnan(brier(np.zeros(0), np.zeros(0)))
    assert math.isnan(calibration_error(np.zeros(0), np.zeros(0)))


def test_a_calibrated_forecast_has_a_small_error_and_a_boastful_one_a_large_one() -> None:
    rng = np.random.default_rng(0)
    probability = rng.uniform(size=20_000)
    label = (rng.uniform(size=20_000) < probability).astype(np.int64)
    assert calibration_error(probability, label) < 0.02
    assert calibration_error(probability**3, label) > 0.1


def test_the_mean_is_over_targets_and_the_interval_over_users() -> None:
    # One user with 90 hits, nine with ten misses each: single targets would look certain.
    user = np.repeat(np.arange(10), [90, *[10] * 9])
    hit = (user == 0).astype(np.float64)
    found = UserBootstrap(user).mean(hit)
    assert found.value == pytest.approx(0.5)
    assert found.count == 180
    assert found.low == 0  # whole resamples without the one user
    assert found.high > 0.7


def test_paired_differences_are_narrower_than_the_parts() -> None:
    rng = np.random.default_rng(0)
    user = np.repeat(np.arange(200), 5)
    hard = np.repeat(rng.normal(size=200), 5)  # what both find hard
    ours, theirs = hard + 0.02 + rng.normal(size=1000) * 0.01, hard
    bootstrap = UserBootstrap(user)
    difference = bootstrap.difference(ours, theirs)
    assert difference.above_zero
    assert difference.value == pytest.approx(0.02, abs=0.002)
    assert not bootstrap.mean(ours).above_zero


def test_lift_is_relative() -> None:
    user = np.arange(100)
    theirs = np.tile([0.0, 1.0], 50)
    assert UserBootstrap(user).lift(theirs * 1.1, theirs).value == pytest.approx(0.1)


def test_an_empty_slice_is_said_to_be_empty() -> None:
    found = UserBootstrap(np.arange(5)).mean(np.ones(5), np.zeros(5, dtype=bool))
    assert found.count == 0
    assert math.isnan(found.value)
    assert not found.above_zero
    assert UserBootstrap(np.zeros(0, dtype=np.int64)).mean(np.zeros(0)).count == 0


def test_a_slice_with_few_users_survives_resamples_without_them() -> None:
    user = np.arange(50)
    found = UserBootstrap(user).mean(np.ones(50), user == 3)
    assert (found.value, found.low, found.high, found.count) == (1, 1, 1, 1)


def test_the_same_seed_gives_the_same_interval() -> None:
    user, values = np.arange(40) % 7, np.linspace(0, 1, 40)
    one, other = UserBootstrap(user, seed=3), UserBootstrap(user, seed=3)
    assert one.mean(values) == other.mean(values)
    assert one.mean(values) != UserBootstrap(user, seed=4).mean(values)


def test_any_statistic_can_be_resampled() -> None:
    rng = np.random.default_rng(1)
    label = rng.integers(0, 2, 400)
    score = label + rng.normal(size=400)
    found = UserBootstrap(np.arange(400) // 4).statistic(lambda w: auc(score, label, w))
    assert found.value == auc(score, label)
    assert 0.65 < found.low < found.value < found.high < 0.8


def test_a_summary_has_every_metric_of_every_scorer() -> None:
    user = np.arange(4)
    rank = {"a": np.asarray([1, 1, 30, 30]), "b": np.asarray([30, 30, 30, 30])}
    found = summary(rank, UserBootstrap(user))
    assert set(found) == {"a", "b"}
    assert set(found["a"]) == set(METRICS)
    assert found["a"]["recall@20"].value == 0.5
    assert found["b"]["recall@20"].value == 0
