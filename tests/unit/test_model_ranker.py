from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from model.errors import NothingToLearn, WeightsUnavailable
from model.ranker import (
    Cases,
    Weights,
    first_weights,
    fit,
    load_weights,
    save_weights,
    score,
    thinned,
)
from profiles import ranking


def inputs(n: int, items: int, seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    cosines = rng.uniform(-1, 1, (n, items, 2))
    counts = rng.exponential(1, (n, items, 2)) * rng.integers(0, 2, (n, items, 2))
    signals = np.concatenate([cosines, counts], axis=2)
    return (
        signals.astype(np.float32),
        np.log1p(rng.integers(0, 500, (n, items, 3))).astype(np.float32),
        rng.uniform(0, 5, (n, 3)).astype(np.float32),
    )


def random_weights(seed: int) -> Weights:
    rng = np.random.default_rng(seed)
    return {k: rng.normal(size=v.shape).astype(np.float32) for k, v in first_weights().items()}


@settings(max_examples=40)
@given(seed=st.integers(0, 10_000))
def test_numpy_and_torch_rank_alike(seed: int) -> None:
    weights, given_ = random_weights(seed), inputs(3, 11, seed)
    others = ranking.score(weights, *given_)
    np.testing.assert_allclose(score(weights, *given_), others, rtol=2e-4, atol=2e-4)


def test_readers_and_trainer_mean_the_same_weights() -> None:
    by_hand = first_weights()
    assert {name: array.shape for name, array in by_hand.items()} == ranking.SHAPES
    for name, array in by_hand.items():
        np.testing.assert_array_equal(ranking.BY_HAND[name], array)
    fields = {name.encode(): raw for name, raw in ranking.to_fields(by_hand).items()}
    for name, array in ranking.from_fields(fields).items():
        np.testing.assert_array_equal(array, by_hand[name])
    assert ranking.from_fields({**fields, b"knee": b""}) is ranking.BY_HAND


def without_layer(weights: Weights) -> Weights:
    return weights | {"mix_out": np.zeros_like(weights["mix_out"])}


@settings(max_examples=40)
@given(seed=st.integers(0, 10_000), signal=st.integers(0, 3))
def test_more_of_a_signal_never_lowers_a_score_of_the_gates(seed: int, signal: int) -> None:
    weights, (signals, counts, shopper) = without_layer(random_weights(seed)), inputs(2, 9, seed)
    signals[..., 3] += 0.01  # had before: that alone may count against an item
    more = signals.copy()
    more[..., signal] += 0.5
    lower = score(weights, signals, counts, shopper)
    assert (score(weights, more, counts, shopper) >= lower - 1e-4).all()


def test_one_shopper_needs_no_leading_axis() -> None:
    signals, counts, shopper = inputs(2, 9, 0)
    both = score(first_weights(), signals, counts, shopper)
    one = score(first_weights(), signals[1], counts[1], shopper[1])
    np.testing.assert_allclose(one, both[1], rtol=1e-5, atol=1e-5)


def whole(
    signals: np.ndarray, counts: np.ndarray, shopper: np.ndarray, target: np.ndarray
) -> Cases:
    """Cases over the whole catalogue."""
    return Cases(signals, counts, shopper, target, np.zeros_like(target))


def planted(n: int, seed: int) -> Cases:
    """Shoppers with much history return to what they had; new ones follow the text."""
    signals, counts, shopper = inputs(n, 30, seed)
    rng = np.random.default_rng(seed)
    regular = rng.random(n) < 0.5
    shopper[:] = 0.0
    shopper[regular, 0] = 4.0
    follows = np.where(regular[:, None], signals[..., 3], signals[..., 1])  # (n, 30)
    target = (np.arange(30) == follows.argmax(axis=1)[:, None]).astype(np.float32)
    return whole(signals, counts, shopper, target)


def found(weights: Weights, cases: Cases) -> float:
    scores = score(weights, cases.signals, cases.items, cases.shopper)
    return float((scores.argmax(axis=1) == cases.target.argmax(axis=1)).mean())


def test_training_learns_whom_to_believe_which_signal_of() -> None:
    learned = fit(planted(600, seed=1))
    unseen = planted(300, seed=2)
    assert found(first_weights(), unseen) < 0.5
    assert found(learned, unseen) > 0.7


def of_two_minds(n: int, seed: int) -> Cases:
    """Old items follow how often they were had, new ones the text, whoever the shopper is."""
    signals, counts, shopper = inputs(n, 30, seed)
    rng = np.random.default_rng(seed)
    had = signals[..., 3] > 0
    old = np.where(had, signals[..., 3], -np.inf)
    new = np.where(had, -np.inf, signals[..., 1])
    follows = np.where((rng.random(n) < 0.5)[:, None], old, new)
    target = (np.arange(30) == follows.argmax(axis=1)[:, None]).astype(np.float32)
    return whole(signals, counts, np.zeros_like(shopper), target)


def test_items_that_are_new_to_a_shopper_have_weights_of_their_own() -> None:
    learned = fit(of_two_minds(600, seed=1))
    unseen = of_two_minds(300, seed=2)
    scores = score(learned, unseen.signals, unseen.items, unseen.shopper)
    had = unseen.signals[..., 3] > 0
    for kind in (had, ~had):  # best of either kind is what may come next
        asked = (unseen.target > 0)[kind.nonzero()].any() and (unseen.target * kind).any(axis=1)
        best = np.where(kind, scores, -np.inf).argmax(axis=1)
        right = best[asked] == unseen.target[asked].argmax(axis=1)
        assert right.mean() > 0.8


def agreeing(n: int, seed: int) -> Cases:
    """What comes next is high in two signals at once, and never only in one."""
    signals, items, shopper = inputs(n, 30, seed)
    signals[..., 3] = 0.0
    both = np.minimum(signals[..., 0], signals[..., 1])
    target = (np.arange(30) == both.argmax(axis=1)[:, None]).astype(np.float32)
    return whole(signals, items, np.zeros_like(shopper), target)


def test_it_learns_that_signals_agree() -> None:
    unseen = agreeing(300, seed=2)
    learned = fit(agreeing(1_500, seed=1))
    assert found(learned, unseen) > found(without_layer(learned), unseen) + 0.1


def test_thinned_cases_keep_targets_and_say_what_chance_the_others_had() -> None:
    full = planted(40, seed=1)
    thin = thinned(full, 0, top=2, others=8)
    assert thin.target.shape == (40, 20)
    np.testing.assert_array_equal(thin.target.sum(axis=1), full.target.sum(axis=1))
    for row in range(40):
        drawn = thin.log_chance[row] < 0
        highest = np.sort(full.signals[row, :, 1])[-2:]
        np.testing.assert_array_equal(np.sort(thin.signals[row, :, 1])[-2:], highest)
        outside = 30 - (~drawn).sum()
        np.testing.assert_allclose(
            np.exp(thin.log_chance[row][drawn]), drawn.sum() / outside, rtol=1e-5
        )
    again = thinned(full, 0, top=2, others=8)
    np.testing.assert_array_equal(again.signals, thin.signals)
    assert thinned(full, 0, top=30, others=8) is full


def test_a_ranker_of_thinned_cases_ranks_as_one_of_whole_catalogues() -> None:
    unseen = planted(300, seed=2)
    thin = found(fit(thinned(planted(600, seed=1), 0, top=2, others=6)), unseen)
    assert thin == pytest.approx(found(fit(planted(600, seed=1)), unseen), abs=0.08)


def text_only(log_chance: float) -> float:
    """How much text is found to count, where it counts 0.4, from the 6 best of 30 items and 6
    of the others, one of which makes way for the target."""
    rng = np.random.default_rng(0)
    text = -np.sort(-rng.uniform(-1, 1, (1500, 30)), axis=1)  # the best first
    target = (4 * text + rng.gumbel(size=text.shape)).argmax(axis=1)
    order = 6 + rng.permuted(np.tile(np.arange(24), (1500, 1)), axis=1)[:, :6]
    late = (target >= 6) & (order != target[:, None]).all(axis=1)
    order[late, 0] = target[late]
    chosen = np.concatenate([np.tile(np.arange(6), (1500, 1)), order], axis=1)  # (1500, 12)
    signals = np.zeros((1500, 12, 4), dtype=np.float32)
    signals[..., 1] = np.take_along_axis(text, chosen, axis=1)
    chances = np.zeros((1500, 12), dtype=np.float32)
    chances[:, 6:] = log_chance
    wanted = (chosen == target[:, None]).astype(np.float32)
    usual = np.tile(np.float32([3.0, 1.0, 0.0]), (1500, 12, 1))
    nobody = np.zeros((1500, 3), dtype=np.float32)
    weights = fit(Cases(signals, usual, nobody, wanted, chances), epochs=12)
    return float(np.logaddexp(0, weights["gate"][0, 1]))


def test_candidates_drawn_by_a_signal_do_not_make_it_distrusted() -> None:
    assert text_only(float(np.log(6 / 24))) == pytest.approx(0.4, rel=0.15)
    assert text_only(0.0) < 0.3


def test_the_same_seed_gives_the_same_weights() -> None:
    one, other = fit(planted(50, 1), epochs=2), fit(planted(50, 1), epochs=2)
    for name in one:
        np.testing.assert_array_equal(one[name], other[name])


def test_a_catalogue_of_one_item_is_no_reason_to_fail() -> None:
    cases = whole(*inputs(4, 1, 0), np.ones((4, 1), dtype=np.float32))
    assert all(np.isfinite(array).all() for array in fit(cases, epochs=2).values())


def test_cases_without_targets_say_what_would_help() -> None:
    cases = whole(*inputs(4, 5, 0), np.zeros((4, 5), dtype=np.float32))
    with pytest.raises(NothingToLearn, match="wait for shoppers"):
        fit(cases)


def test_cases_of_other_shapes_are_refused() -> None:
    signals, counts, shopper = inputs(4, 5, 0)
    with pytest.raises(ValueError, match="signals: expected"):
        whole(signals[..., :3], counts, shopper, np.zeros((4, 5), dtype=np.float32))


def test_what_was_saved_is_loaded_and_other_files_are_refused(tmp_path: Path) -> None:
    weights = random_weights(5)
    save_weights(weights, tmp_path / "r.safetensors")
    loaded = load_weights(tmp_path / "r.safetensors")
    assert all((loaded[name] == weights[name]).all() for name in weights)
    save_weights(weights | {"gate": np.zeros(3, dtype=np.float32)}, tmp_path / "r.safetensors")
    with pytest.raises(WeightsUnavailable, match="other names or shapes"):
        load_weights(tmp_path / "r.safetensors")
    with pytest.raises(WeightsUnavailable, match="train again"):
        load_weights(tmp_path / "none.safetensors")
