"""Training shared by two processes on CPUs, through accelerate."""

from __future__ import annotations

import multiprocessing
import os
import socket
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from tests.learnable_shop import SMALL, trained

pytest.importorskip("accelerate", reason="accelerate is not installed")


def _work(rank: int, port: int, folder: Path) -> None:
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "ACCELERATE_USE_CPU": "true",
        "OMP_NUM_THREADS": "1",
    }
    import torch

    candidate = trained(folder / "candidate", replace(SMALL, distributed=True))
    np.savez(
        folder / f"{rank}.npz",
        vectors=candidate.vectors,
        mrr=candidate.metrics["newest"]["mrr"],
        steps=candidate.metrics["steps"],
    )
    torch.distributed.destroy_process_group()


def test_two_processes_learn_together_and_end_with_the_same_weights(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    processes = [
        multiprocessing.get_context("spawn").Process(target=_work, args=(rank, port, tmp_path))
        for rank in range(2)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0, 0]
    first, second = (np.load(tmp_path / f"{rank}.npz") for rank in range(2))
    np.testing.assert_array_equal(first["vectors"], second["vectors"])
    assert first["mrr"] > 0.8
    alone = trained(tmp_path / "alone")
    assert first["steps"] < 0.6 * alone.metrics["steps"]  # each step took a batch of each
