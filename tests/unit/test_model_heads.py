from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from model.errors import WeightsUnavailable
from model.heads import Heads
from model.objective import balanced_bce


def fitted(labels: torch.Tensor, states: torch.Tensor) -> Heads:
    torch.manual_seed(0)
    heads = Heads(4, ("purchase",))
    weights = heads.set_balance({"purchase": labels})
    optimizer = torch.optim.Adam(heads.parameters(), lr=0.02)
    for _ in range(200):
        optimizer.zero_grad()
        balanced_bce(heads(states)[:, 0], labels, weights["purchase"]).backward()
        optimizer.step()
    return heads


def test_probabilities_are_those_that_happen_though_classes_weighed_the_same() -> None:
    rng = np.random.default_rng(0)
    states = torch.from_numpy(rng.normal(size=(4000, 4)).astype(np.float32))
    truth = torch.sigmoid(states[:, 0] * 1.5 - 3)  # one in twelve
    labels = (torch.from_numpy(rng.random(4000)) < truth).long()
    chances = fitted(labels, states).predict(states.numpy())["purchase"]
    assert labels.float().mean() < 0.12
    assert chances.mean() == pytest.approx(float(labels.float().mean()), abs=0.02)
    assert np.abs(chances - truth.numpy()).mean() < 0.04


@pytest.mark.parametrize("label", [0, 1, -1])
def test_a_head_that_saw_one_class_says_that_it_does_not_know(label: int) -> None:
    heads = fitted(torch.full((50,), label), torch.randn(50, 4))
    assert np.isnan(heads.predict(np.zeros((2, 4), dtype=np.float32))["purchase"]).all()


def test_what_was_saved_predicts_the_same_and_other_files_are_refused(tmp_path: Path) -> None:
    states = np.random.default_rng(1).normal(size=(9, 4)).astype(np.float32)
    heads = fitted(torch.arange(50) % 3 // 2, torch.randn(50, 4))
    heads.save(tmp_path / "h.safetensors")
    loaded = Heads.load(tmp_path / "h.safetensors")
    np.testing.assert_array_equal(
        loaded.predict(states)["purchase"], heads.predict(states)["purchase"]
    )
    (tmp_path / "h.safetensors").write_bytes(b"no")
    with pytest.raises(WeightsUnavailable, match="train again"):
        Heads.load(tmp_path / "h.safetensors")
