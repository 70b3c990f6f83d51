"""Training shared by two processes on CPUs, through accelerate."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from model.peers import PATIENCE, peers
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


def _wait(rank: int, folder: Path) -> None:
    peers(True).wait()
    group = torch.distributed.group.WORLD
    options = group._get_backend(torch.device("cpu")).options
    (folder / str(rank)).write_text(str(options._timeout.total_seconds()))


def test_those_who_wait_for_the_first_to_encode_do_not_give_up_within_hours(tmp_path: Path) -> None:
    run_by_two(_wait, tmp_path)
    patience_s = [float((tmp_path / str(rank)).read_text()) for rank in range(2)]
    assert patience_s == [PATIENCE.total_seconds()] * 2
    assert patience_s[0] > 6 * 3600
