"""Who takes part in a training: this process alone, or several that share each step.

Knows gradients; knows nothing of what is trained.
"""

from __future__ import annotations

import importlib
from typing import Any

import torch
from torch import nn

from .encoder import pick_device


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
    return Together(accelerate.Accelerator())
