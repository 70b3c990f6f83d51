"""Two processes on CPUs that train together, as a launcher of accelerate would start them."""

from __future__ import annotations

import multiprocessing
import os
import socket
from collections.abc import Callable
from typing import Any, Final

_LONGEST_S: Final = 180


def run_by_two(work: Callable[..., None], *args: Any) -> None:
    """Call `work(rank, *args)` in two new processes of a group. AssertionError where one fails."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    context = multiprocessing.get_context("spawn")
    processes = [
        context.Process(target=_member, args=(rank, port, work, args)) for rank in range(2)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join(_LONGEST_S)
        process.kill()  # only where it hangs
    assert [process.exitcode for process in processes] == [0, 0]


def _member(rank: int, port: int, work: Callable[..., None], args: tuple[Any, ...]) -> None:
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "ACCELERATE_USE_CPU": "true",
        "OMP_NUM_THREADS": "1",
    }
    work(rank, *args)
    import torch

    torch.distributed.destroy_process_group()
