"""Task heads on a window's state: will there be a purchase, will the shopper return.

Trained with both classes weighing the same, which inflates the rarer one; the logits are
shifted back before they become probabilities. Knows neither windows nor horizons.
"""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import nn

from .errors import WeightsUnavailable
from .objective import class_weights

Floats = npt.NDArray[np.float32]
Tensor = torch.Tensor

HEADS_FILE = "heads.safetensors"  # the part of a release that holds them
HEADS = ("purchase", "returns")  # as the columns of the labels are named; 1 - returns is churn


class Heads(nn.Module):
    """One logit for each name, from states of D numbers."""

    shift: Tensor
    trained: Tensor

    def __init__(self, dimensions: int, names: tuple[str, ...] = HEADS) -> None:
        super().__init__()
        self.names = names
        self.hidden = nn.Linear(dimensions, dimensions)
        self.out = nn.Linear(dimensions, len(names))
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.out.bias)
        self.register_buffer("shift", torch.zeros(len(names)))  # (k,) log of w_pos / w_neg
        self.register_buffer("trained", torch.zeros(len(names)))  # (k,) 1 where both classes were

    def forward(self, states: Tensor) -> Tensor:
        """States (n, D) to logits (n, k) in which both classes are as likely."""
        logits: Tensor = self.out(torch.nn.functional.gelu(self.hidden(states)))
        return logits

    def set_balance(self, labels: dict[str, Tensor]) -> dict[str, tuple[float, float]]:
        """The class weights of each head; remembers the shift that undoes them."""
        weights = {name: class_weights(labels[name]) for name in self.names}
        for k, name in enumerate(self.names):
            negative, positive = weights[name]
            self.trained[k] = float(positive > 0)
            self.shift[k] = math.log(positive / negative) if positive else 0.0
        return weights

    @torch.inference_mode()
    def predict(self, states: Floats) -> dict[str, Floats]:
        """Probabilities (n,) by name; NaN for a head that has seen one class only."""
        self.eval()
        device = self.shift.device
        logits = self(torch.from_numpy(states).to(device)) - self.shift  # (n, k)
        chances = torch.sigmoid(logits).masked_fill(self.trained == 0, math.nan).cpu().numpy()
        return {name: chances[:, k] for k, name in enumerate(self.names)}

    def save(self, path: Path) -> None:
        """One safetensors file, the names in its header."""
        tensors = {name: value.contiguous().cpu() for name, value in self.state_dict().items()}
        path.write_bytes(save(tensors, metadata={"names": json.dumps(self.names)}))

    @classmethod
    def load(cls, path: Path, device: str | torch.device = "cpu") -> Heads:
        """Read what `save` wrote. Raises WeightsUnavailable for anything else."""
        try:
            with safe_open(path, framework="pt") as file:
                names = tuple(json.loads((file.metadata() or {})["names"]))
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            heads = cls(tensors["hidden.weight"].shape[1], names)
            heads.load_state_dict(tensors)
        except (OSError, KeyError, TypeError, ValueError, RuntimeError, SafetensorError) as error:
            raise WeightsUnavailable(
                f"{path} is not a file of heads ({str(error).splitlines()[0][:120]}); "
                "delete its release and train again, or point CURRENT at another"
            ) from error
        return heads.to(device).eval()
