"""A release that foretells, without training."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from model.heads import HEADS_FILE, Heads
from model.projection import Projection
from model.releases import Release, publish
from model.window_encoder import WINDOW, WindowEncoder, WindowShape
from profiles.schema import EVENT_TYPES


def build_foretelling_release(
    parent: Release, seed: int, *, events: int = 8, layers: int = 1
) -> Release:
    """A release of its parent's space, with a window encoder and heads of random weights: what it
    foretells is no use, but costs and depends on the window as what is learned does."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        window = WindowEncoder(WindowShape(parent.dimensions, events, EVENT_TYPES, layers=layers))
        heads = Heads(len(EVENT_TYPES))
        torch.nn.init.normal_(heads.out.weight)
    heads.trained.fill_(1.0)
    projection = Projection.load(parent.path / "projection.safetensors")
    with TemporaryDirectory() as folder:
        parts = {name: Path(folder) / name for name in (WINDOW, HEADS_FILE)}
        window.save(parts[WINDOW])
        heads.save(parts[HEADS_FILE])
        return publish(parent, projection, parts=parts, now=datetime.now(UTC))
