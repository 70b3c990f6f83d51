from __future__ import annotations

import numpy as np
import pytest
import torch

from model.item_vectors import ItemVectors
from model.projection import fit_projection, unit_rows


def features(n: int, seed: int = 0) -> np.ndarray:
    return unit_rows(np.random.default_rng(seed).normal(size=(n, 24)) + 0.3)


@pytest.mark.parametrize("n", [1, 3, 60])
def test_training_starts_where_the_base_is(n: int) -> None:
    base = fit_projection(features(50, seed=1), 16)
    items = ItemVectors(features(n), base, np.zeros((n, 16), dtype=np.float32))
    vectors, residual = items.serving(np.full(n, 9), least=3)
    np.testing.assert_allclose(vectors, base.apply(features(n)), atol=1e-4)
    assert not residual.any()


def test_the_projection_left_behind_is_the_text_part() -> None:
    items = ItemVectors(features(60), fit_projection(features(60), 16))
    with torch.no_grad():
        items.text.weight += 0.05 * torch.randn_like(items.text.weight)
        items.text.bias += 0.05 * torch.randn_like(items.text.bias)
    vectors, _ = items.serving(np.zeros(60, dtype=np.int64), least=3)
    np.testing.assert_allclose(items.projection().apply(features(60)), vectors, atol=1e-4)


def test_a_residual_counts_from_the_fourth_event_on() -> None:
    items = ItemVectors(features(3), fit_projection(features(50), 16))
    _, residual = items.serving(np.array([0, 3, 4]), least=3)
    assert [bool(row.any()) for row in residual] == [False, False, True]


def test_residuals_survive_a_round_of_training_to_serving_to_training() -> None:
    base = fit_projection(features(50), 16)
    items = ItemVectors(features(20), base)
    counts = np.full(20, 9)
    vectors, residual = items.serving(counts, least=3)
    again = ItemVectors(features(20), items.projection(), residual)
    np.testing.assert_allclose(again.serving(counts, least=3)[0], vectors, atol=1e-4)
