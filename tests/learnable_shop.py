"""A tiny shop with a pattern to learn: after item i comes item i + 1, in a circle."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from model.projection import fit_projection, unit_rows
from model.trainer import Base, Candidate, Catalogue, TrainSettings, train
from model.windows import Labelled

TYPES = ("view", "purchase")
DAY_MS = 86_400_000
ITEMS, WIDTH, DIMENSIONS = 12, 24, 16

SMALL = TrainSettings(
    epochs=6,
    events=8,
    layers=1,
    dropout=0.1,
    batch_events=64,
    learning_rate=1e-2,
    warmup_steps=5,
    patience=6,
    compatibility=0.0,
    device="cpu",
)


def catalogue(items: int = ITEMS, seed: int = 0) -> Catalogue:
    rng = np.random.default_rng(seed)
    features = unit_rows(rng.normal(size=(items, WIDTH)) + 0.3)
    return Catalogue([f"i{i}" for i in range(items)], features)


def base(of: Catalogue) -> Base:
    return Base(fit_projection(of.features, DIMENSIONS))


def circle(users: int = 60, events: int = 20, items: int = ITEMS, seed: int = 0) -> Labelled:
    """Purchases a day apart; who is at an even item buys again soon, the others do not."""
    rng = np.random.default_rng(seed)
    item = (rng.integers(0, items, users)[:, None] + np.arange(events)) % items
    t_ms = rng.integers(0, DAY_MS, users)[:, None] + np.arange(events) * DAY_MS
    return labelled(item, t_ms, purchase=(item % 2 == 0).astype(np.int8))


def labelled(item: np.ndarray, t_ms: np.ndarray, **columns: Any) -> Labelled:
    """(u, e) events as labelled windows; labels are unknown where not given."""
    users, events = item.shape
    m = item.size
    given = {name: np.asarray(column).reshape(-1) for name, column in columns.items()}
    return Labelled(
        **{
            "start": np.arange(users + 1, dtype=np.int64) * events,
            "user": [f"u{j}" for j in range(users)],
            "item": item.reshape(-1).astype(np.int32),
            "type": np.ones(m, dtype=np.uint8),
            "t_ms": t_ms.reshape(-1).astype(np.int64),
            "weight": np.ones(m, dtype=np.float32),
            "purchase": np.full(m, -1, dtype=np.int8),
            "returns": np.full(m, -1, dtype=np.int8),
        }
        | given
    )


def trained(folder: Path, settings: TrainSettings = SMALL, **options: Any) -> Candidate:
    shop = catalogue()
    return train(circle(), shop, base(shop), TYPES, folder, settings, **options)
