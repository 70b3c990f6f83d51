"""Training shared by two processes on CPUs, through accelerate."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from tests.learnable_shop import SMALL, trained
from tests.process_group import run_by_two

pytest.importorskip("accelerate", reason="accelerate is not installed")


def _work(rank: int, folder: Path) -> None:
    candidate = trained(folder / "candidate", replace(SMALL, distributed=True))
    np.savez(
        folder / f"{rank}.npz",
        vectors=candidate.vectors,
        mrr=candidate.metrics["newest"]["mrr"],
        steps=candidate.metrics["steps"],
    )


def test_two_processes_learn_together_and_end_with_the_same_weights(tmp_path: Path) -> None:
    run_by_two(_work, tmp_path)
    first, second = (np.load(tmp_path / f"{rank}.npz") for rank in range(2))
    np.testing.assert_array_equal(first["vectors"], second["vectors"])
    assert first["mrr"] > 0.8
    alone = trained(tmp_path / "alone")
    assert first["steps"] < 0.6 * alone.metrics["steps"]  # each step took a batch of each
