from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from model.trainer import Candidate
from model.window_encoder import WindowEncoder
from tests.learnable_shop import DIMENSIONS, SMALL, trained

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]


@pytest.fixture(scope="module")
def candidate(tmp_path_factory: pytest.TempPathFactory) -> Candidate:
    return trained(tmp_path_factory.mktemp("candidate"), replace(SMALL, device="cuda"))


def test_mixed_precision_learns_the_planted_pattern(candidate: Candidate) -> None:
    assert candidate.metrics["newest"]["mrr"] > 0.9


def test_windows_get_the_vectors_of_the_cpu(candidate: Candidate) -> None:
    rng = np.random.default_rng(0)
    vectors = rng.normal(size=(90, 8, DIMENSIONS)).astype(np.float32)
    t_ms = np.cumsum(rng.integers(0, 10**8, (90, 8)), axis=1)
    inputs = vectors, np.ones((90, 8), dtype=np.uint8), t_ms, rng.integers(1, 9, 90)
    path = candidate.path / "window.safetensors"
    on_cpu, on_gpu = WindowEncoder.load(path), WindowEncoder.load(path, device="cuda")
    np.testing.assert_allclose(on_gpu.encode(*inputs), on_cpu.encode(*inputs), atol=1e-4)


def test_a_killed_run_is_finished(tmp_path: Path) -> None:
    settings = replace(SMALL, checkpoint_steps=3, device="auto")

    class Stop(Exception):
        pass

    def stop(stage: str, done: int, total: int) -> None:
        if done == 20:
            raise Stop

    with pytest.raises(Stop):
        trained(tmp_path, settings, progress=stop)
    assert trained(tmp_path, settings).metrics["newest"]["mrr"] > 0.8
