"""Who takes part in a training: this process alone, or several that share each step.

Knows gradients; knows nothing of what is trained.
"""

from __future__ import annotations

import importlib
from datetime import timedelta
from typing import Any, Final

import torch
from torch import nn

from .encoder import pick_device

PATIENCE: Final = timedelta(days=1)
"""The first process encodes the catalogue while the others wait, which takes hours for millions of
items on a CPU; by themselves groups give up after ten minutes (NCCL) or thirty (Gloo). A process
that died is the launcher's to notice."""


class Alone:
    first = True
    count = 1

    def device(self, name: str) -> torch.device:
        return pick_device(name)

    def share(self, group: list[Any]) -> list[Any]:
        return group

    def add_up(self, parameters: list[nn.Parameter]) -> None:
        pass

    def wait(self) -> None:
        pass


class Together:
    """Processes that each take part of a step's batches and add up their gradients."""

    def __init__(self, accelerator: Any) -> None:
        self._accelerator = accelerator
        self.first = bool(accelerator.is_main_process)
        self.count = int(accelerator.num_processes)

    def device(self, name: str) -> torch.device:
        return torch.device(self._accelerator.device)

    def share(self, group: list[Any]) -> list[Any]:
        return group[self._accelerator.process_index :: self._accelerator.num_processes]

    def add_up(self, parameters: list[nn.Parameter]) -> None:
        for parameter in parameters:
            # Every process must take part, also with a parameter that its batches did not touch.
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            parameter.grad = self._accelerator.reduce(parameter.grad, "sum")

    def wait(self) -> None:
        """Until all have come here."""
        self._accelerator.wait_for_everyone()


def peers(distributed: bool) -> Alone | Together:
    if not distributed:
        return Alone()
    try:
        accelerate = importlib.import_module("accelerate")
    except ImportError:
        return Alone()
    patient = accelerate.InitProcessGroupKwargs(timeout=PATIENCE)
    return Together(accelerate.Accelerator(kwargs_handlers=[patient]))
