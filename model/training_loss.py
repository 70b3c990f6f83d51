"""What a step of training minimises: the next item among others, and nearness to the base.

Knows weights and batches; knows nothing of epochs, of judging or of files.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from .item_vectors import ItemVectors
from .objective import drift, log_chances, sampled_softmax
from .train_settings import TrainSettings
from .training_data import Batch
from .window_encoder import WindowEncoder, unit

Floats = npt.NDArray[np.float32]
Ints = npt.NDArray[np.int64]
Tensor = torch.Tensor

_FIRST_SCALE = 14.0  # 1 / 0.07, the first inverse temperature of CLIP (Radford et al. 2021)
_LAST_SCALE = 100.0
_FRESH_ITEMS = 64  # items of a step that the tower reads anew


class Tower(Protocol):
    """A text tower that learns along (see `tower_tuning`)."""

    rate_share: float
    """Of the learning rate: what was trained for long is spoilt by steps that suit a beginner."""

    def parameters(self) -> list[nn.Parameter]: ...

    def features(self, rows: Tensor) -> Tensor:
        """Unit rows (k, W) of catalogue rows (k,), with gradients."""
        ...

    def all_features(self) -> Floats:
        """Unit rows (n, W) of the whole catalogue, as it is now."""
        ...

    def state_dict(self) -> dict[str, Tensor]: ...

    def load_state_dict(self, state: dict[str, Tensor]) -> None: ...

    def save(self, folder: Path) -> None: ...


class Learner(nn.Module):
    """What is trained by steps, as one module."""

    def __init__(self, items: ItemVectors, window: WindowEncoder) -> None:
        super().__init__()
        self.items = items
        self.window = window
        self.log_scale = nn.Parameter(torch.tensor(math.log(_FIRST_SCALE)))

    def scale(self) -> Tensor:
        return self.log_scale.exp().clamp(max=_LAST_SCALE)


class StepLoss:
    """The loss of one batch."""

    def __init__(
        self,
        learner: Learner,
        tower: Tower | None,
        old: Tensor,
        counts: Ints,
        settings: TrainSettings,
    ) -> None:
        """`old` (n, D): the base's item vectors; `counts` (n,): training events."""
        self._learner, self._tower, self._old = learner, tower, old
        self._settings = settings
        # Only items that were met are negatives: an item that is always one learns to hide.
        known = np.flatnonzero(counts)
        self._known = torch.from_numpy(known).to(old.device)
        self._whole = len(known) <= settings.full_below
        self._column = torch.full((len(counts),), -1, dtype=torch.long, device=old.device)
        self._column[self._known] = torch.arange(len(known), device=old.device)
        shares = counts[known] / max(counts.sum(), 1)
        self._shares = torch.from_numpy(shares.astype(np.float32)).to(old.device)

    def __call__(self, batch: Batch, rng: np.random.Generator) -> Tensor:
        settings, learner = self._settings, self._learner
        wanted = torch.unique(batch.target)  # (t,)
        if self._whole:
            candidates, chance = self._known, None
        else:
            numbers = rng.integers(0, len(self._known), settings.negatives)
            drawn = self._known[torch.from_numpy(numbers).to(self._old.device)]
            candidates = torch.unique(torch.cat([wanted, drawn]))  # (c,)
            chance = log_chances(self._shares, len(batch.target), settings.negatives)
            chance = chance[self._column[candidates]]
        rows, back = torch.unique(torch.cat([candidates, batch.item]), return_inverse=True)
        vectors = self._vectors(rows, wanted)  # (u, D)
        events = vectors[back[len(candidates) :]].view(*batch.types.shape, -1)  # (r, L, D)
        events = events * batch.has_item[..., None]
        hidden = learner.window(events, batch.types, batch.t_ms)  # (r, L, D)
        choices = vectors[back[: len(candidates)]]  # (c, D)
        queries = unit(hidden[batch.asked])  # (q, D)
        target = torch.searchsorted(candidates, batch.target)
        loss = sampled_softmax(
            queries,
            choices,
            target,
            learner.scale(),
            chance,
            self._hard(batch.target),
            batch.weight,
        )
        if settings.compatibility:
            moved = drift(vectors, self._old[rows])
            loss = loss + settings.compatibility * moved
        return loss

    def _vectors(self, rows: Tensor, wanted: Tensor) -> Tensor:
        items = self._learner.items
        if self._tower is None:
            plain: Tensor = items(rows)
            return plain
        # Fresh features for some of the targets only: a tower costs a thousand times a window.
        fresh = wanted[torch.randperm(len(wanted), device=wanted.device)[:_FRESH_ITEMS]]
        features = self._tower.features(fresh)  # (k, W)
        whitened = items.whitened(features.float()).float()
        items.features[fresh] = whitened.detach()
        known = items.features[rows].index_copy(0, torch.searchsorted(rows, fresh), whitened)
        return items.from_whitened(rows, known)

    def _hard(self, target: Tensor) -> Tensor | None:
        """Vectors (q, h, D) of the items nearest to each target in the base's space."""
        count = min(self._settings.hard_negatives, len(self._known) - 1)
        if count < 1:
            return None
        near = self._old[target] @ self._old[self._known].T  # (q, known)
        near.scatter_(1, self._column[target][:, None], -2.0)
        rows = self._known[near.topk(count, dim=1).indices]  # (q, h)
        hard: Tensor = self._learner.items(rows.flatten())
        return hard.view(*rows.shape, -1)
