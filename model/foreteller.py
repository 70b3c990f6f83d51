"""Windows of events -> what comes next: next-interest vectors and what the heads say, in one pass.

The serving twin of `trainer.py`: the same networks on the same inputs, without labels and
gradients. Knows nothing of profiles, nor of when it is asked.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from .heads import HEADS_FILE, Heads
from .releases import Release
from .window_encoder import WINDOW, WindowEncoder

Floats = npt.NDArray[np.float32]
Ints = npt.NDArray[np.int64]
Bytes = npt.NDArray[np.uint8]


@dataclass(frozen=True)
class Foretold:
    """Of n windows."""

    next_interest: Floats  # (n, D) unit rows
    heads: dict[str, Floats]  # name -> (n,) probabilities; NaN of a head that learned nothing


class Foreteller:
    """A release's window encoder and heads, on one device."""

    def __init__(self, window: WindowEncoder, heads: Heads) -> None:
        self._window = window
        self._heads = heads

    @classmethod
    def load(cls, release: Release, device: torch.device) -> Foreteller | None:
        """None for a release without a window encoder or heads. Raises WeightsUnavailable."""
        if not {WINDOW, HEADS_FILE} <= set(release.parts):
            return None
        return cls(
            WindowEncoder.load(release.part(WINDOW), device),
            Heads.load(release.part(HEADS_FILE), device),
        )

    @property
    def events(self) -> int:
        """N: events of a window at most; of a longer one the latest say more."""
        return self._window.shape.events

    def warm_up(self) -> None:
        """Run once, so that weights that cannot foretell fail here."""
        width = self._window.shape.dimensions
        self(
            np.zeros((1, 1, width), np.float32),
            np.zeros((1, 1), np.uint8),
            np.zeros((1, 1), np.int64),
            np.ones(1, np.int64),
        )

    def __call__(self, vectors: Floats, types: Bytes, t_ms: Ints, lengths: Ints) -> Foretold:
        """After the last event of each of n windows; arguments as of `WindowEncoder.encode`.

        `returns` is told as `churn`, which is its opposite and what shops ask for."""
        next_interest = self._window.encode(vectors, types, t_ms, lengths)
        heads = self._heads.read(types, t_ms, lengths, self.events)
        if "returns" in heads:
            heads["churn"] = 1 - heads.pop("returns")
        return Foretold(next_interest, heads)
