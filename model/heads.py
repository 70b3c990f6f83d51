"""Task heads on when a shopper came: will there be a purchase, will the shopper return.

They are fitted by themselves, after the window encoder: its vector says what comes next, not when.
Late labels are weighed more than early ones, so that probabilities are those of now. Knows
features and labels; knows neither windows nor horizons.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Final

import numpy as np
import numpy.typing as npt
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import nn
from torch.nn.functional import binary_cross_entropy_with_logits, gelu

from .errors import WeightsUnavailable
from .objective import UNKNOWN
from .visits import FEATURES, visit_features

Floats = npt.NDArray[np.float32]
Ints = npt.NDArray[np.int64]
Tensor = torch.Tensor

HEADS_FILE = "heads.safetensors"  # the part of a release that holds them
HEADS = ("purchase", "returns")  # as the columns of the labels are named; 1 - returns is churn

_UNITS: Final = 32
_DECAY: Final = 3e-3  # of weights, so that few labels say little
_STEPS: Final = 100
_FURTHEST: Final = 5.0  # standard deviations: beyond what was seen nothing is known
_LEAST_SPREAD: Final = 1e-3  # of a feature; below it says nothing


class Heads(nn.Module):
    """One logit for each name, from the features of windows over `kinds` event types."""

    centre: Tensor
    spread: Tensor
    trained: Tensor
    since_ms: Tensor

    def __init__(self, kinds: int, names: tuple[str, ...] = HEADS) -> None:
        super().__init__()
        self.kinds, self.names = kinds, names
        width = len(FEATURES) + kinds
        self.hidden = nn.Linear(width, _UNITS)
        self.out = nn.Linear(_UNITS, len(names))
        self.register_buffer("centre", torch.zeros(width))
        self.register_buffer("spread", torch.ones(width))
        self.register_buffer("trained", torch.zeros(len(names)))  # (k,) 1 where both classes were
        # (k,) from when on shoppers who judge had no say; see `head_training`
        self.register_buffer("since_ms", torch.zeros(len(names), dtype=torch.int64))

    def forward(self, features: Tensor) -> Tensor:
        """Features (n, F) to logits (n, k)."""
        seen = ((features - self.centre) / self.spread).clamp(-_FURTHEST, _FURTHEST)
        logits: Tensor = self.out(gelu(self.hidden(seen)))
        return logits

    def learned(self) -> set[str]:
        """The names of the heads that have seen both classes; the others say nothing."""
        return {name for name, seen in zip(self.names, self.trained.tolist(), strict=True) if seen}

    def fit(self, features: Floats, labels: Mapping[str, Ints], weight: Floats) -> None:
        """On n windows: `features` (n, F), `labels` (n,) by name, 1, 0 or UNKNOWN; `weight` (n,) of
        each window. A head of one class only learns nothing.

        By cross-entropy without balancing classes, which is least where probabilities are true.
        """
        truth = torch.from_numpy(np.stack([labels[name] for name in self.names], axis=1))  # (n, k)
        known = (truth != UNKNOWN).float() * torch.from_numpy(weight)[:, None]
        both = ((truth == 1).any(dim=0) & (truth == 0).any(dim=0)).float()
        self.trained.copy_(both)
        if not both.any():
            return
        known = known / known.sum(dim=0).clamp(min=1e-9) * both
        x, y = torch.from_numpy(features), truth.clamp(min=0).float()
        self.centre.copy_(x.mean(dim=0))
        spread = x.std(dim=0, correction=0)
        self.spread.copy_(torch.where(spread > _LEAST_SPREAD, spread, torch.ones_like(spread)))
        weights = (self.hidden.weight, self.out.weight)
        optimizer = torch.optim.LBFGS(
            self.parameters(), max_iter=_STEPS, line_search_fn="strong_wolfe"
        )

        def loss() -> Tensor:
            optimizer.zero_grad()
            each = binary_cross_entropy_with_logits(self(x), y, reduction="none")
            total = (each * known).sum()
            for matrix in weights:
                total = total + _DECAY * matrix.square().sum()
            total.backward()  # type: ignore[no-untyped-call]
            return total

        optimizer.step(loss)  # type: ignore[no-untyped-call]

    @torch.inference_mode()
    def predict(self, features: Floats) -> dict[str, Floats]:
        """Probabilities (n,) by name; NaN for a head that has seen one class only."""
        logits = self(torch.from_numpy(features).to(self.centre.device))  # (n, k)
        chances = torch.sigmoid(logits).masked_fill(self.trained == 0, math.nan).cpu().numpy()
        return {name: chances[:, k] for k, name in enumerate(self.names)}

    def read(
        self, types: npt.NDArray[np.uint8], t_ms: Ints, lengths: Ints, most: int
    ) -> dict[str, Floats]:
        """`predict` after the last event of each of n windows; see `visits.visit_features`."""
        return self.predict(visit_features(types, t_ms, lengths, most, self.kinds))

    def save(self, path: Path) -> None:
        """One safetensors file; its header names heads and features."""
        tensors = {name: value.contiguous().cpu() for name, value in self.state_dict().items()}
        header = {
            "names": json.dumps(self.names),
            "kinds": str(self.kinds),
            "features": json.dumps(FEATURES),
        }
        path.write_bytes(save(tensors, metadata=header))

    @classmethod
    def load(cls, path: Path, device: str | torch.device = "cpu") -> Heads:
        """Read what `save` wrote; heads that read other features, as those of older releases, say
        nothing until the next training. Raises WeightsUnavailable for anything else."""
        try:
            with safe_open(path, framework="pt") as file:
                header = file.metadata() or {}
                names = tuple(json.loads(header["names"]))
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            kinds = int(header.get("kinds", 0))
            if not 0 <= kinds < 256:  # a type is a byte; what is made up must not take memory
                raise ValueError(f"{kinds} kinds of events")
            heads = cls(kinds, names)
            if header.get("features") == json.dumps(FEATURES):
                heads.load_state_dict(tensors)
        except (OSError, KeyError, TypeError, ValueError, RuntimeError, SafetensorError) as error:
            raise WeightsUnavailable(
                f"{path} is not a file of heads ({str(error).splitlines()[0][:120]}); "
                "delete its release and train again, or point CURRENT at another"
            ) from error
        return heads.to(device).eval()
