from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.nn.functional import normalize

from model.objective import drift, log_chances, sampled_softmax


def unit_rows(n: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return normalize(torch.randn((n, 8), generator=generator), dim=1)


def test_the_whole_catalogue_needs_no_correction() -> None:
    items, queries = unit_rows(20), unit_rows(5, seed=1)
    target = torch.tensor([0, 3, 3, 19, 7])
    by_hand = -torch.log_softmax(10 * queries @ items.T, dim=1)[torch.arange(5), target].mean()
    loss = sampled_softmax(queries, items, target, torch.tensor(10.0))
    assert loss.item() == pytest.approx(by_hand.item(), rel=1e-5)


def test_corrected_samples_sum_up_to_the_whole_catalogue_on_average() -> None:
    items, query = unit_rows(30), unit_rows(1, seed=1)
    shares = np.random.default_rng(0).dirichlet(np.full(30, 0.5))
    chance = log_chances(torch.from_numpy(shares).float(), draws=20, uniform=4)
    logits = 3 * (query @ items.T)[0]  # (30,)
    rng = np.random.default_rng(1)
    corrected, plain = [], []
    for _ in range(2000):
        drawn = np.unique(np.r_[rng.choice(30, 20, p=shares), rng.integers(0, 30, 4)])
        corrected.append(float((logits - chance)[drawn].exp().sum()))
        plain.append(float(logits[drawn].exp().sum()))
    whole = float(logits.exp().sum())
    assert np.mean(corrected) == pytest.approx(whole, rel=0.05)
    assert np.mean(plain) < 0.8 * whole


def test_the_correction_is_taken_off_the_logits() -> None:
    items, queries, scale = unit_rows(6), unit_rows(2, seed=1), torch.tensor(7.0)
    target, chance = torch.tensor([5, 2]), torch.tensor([0.5, 0.1, 0.9, 0.2, 0.3, 0.7]).log()
    by_hand = -torch.log_softmax(7 * queries @ items.T - chance, dim=1)[torch.arange(2), target]
    loss = sampled_softmax(queries, items, target, scale, chance)
    assert loss.item() == pytest.approx(by_hand.mean().item(), rel=1e-5)


def test_chances_are_those_of_being_drawn_at_least_once() -> None:
    shares = torch.tensor([0.5, 0.3, 0.2, 0.0])
    chances = log_chances(shares, draws=3, uniform=2).exp()
    missed = [(1 - p) ** 3 * (3 / 4) ** 2 for p in (0.5, 0.3, 0.2, 0.0)]
    torch.testing.assert_close(chances, torch.tensor([1 - each for each in missed]))


def test_a_catalogue_of_one_item_has_finite_chances_and_no_loss() -> None:
    one = unit_rows(1)
    chances = log_chances(torch.ones(1), draws=8, uniform=8)
    assert torch.isfinite(chances).all()
    loss = sampled_softmax(
        unit_rows(3), one, torch.zeros(3, dtype=torch.long), torch.tensor(9.0), chances
    )
    assert loss.item() == pytest.approx(0.0, abs=1e-6)


def test_hard_negatives_count_for_their_own_query_only() -> None:
    queries, items = unit_rows(2), unit_rows(6, seed=1)
    target, scale = torch.tensor([0, 1]), torch.tensor(10.0)
    hard = torch.stack([queries[0:1], -queries[1:2]])  # the worst for 0, harmless for 1
    harmless = torch.stack([-queries[0:1], -queries[1:2]])
    assert sampled_softmax(queries, items, target, scale, hard=hard) > 1 + sampled_softmax(
        queries, items, target, scale, hard=harmless
    )


def test_drift_is_none_for_the_same_directions_and_two_for_opposite_ones() -> None:
    rows = unit_rows(5)
    assert drift(3 * rows, rows).item() == pytest.approx(0.0, abs=1e-6)
    assert drift(-rows, rows).item() == pytest.approx(2.0, abs=1e-6)
