"""What training starts from and what it leaves: a catalogue, a base, a candidate's folder.

Knows no training, and no release.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError
from safetensors.numpy import load_file
from safetensors.numpy import save as save_arrays

from .catalogue_vectors import ITEM_VECTORS, CatalogueVectors
from .errors import WeightsUnavailable
from .heads import HEADS_FILE, Heads
from .projection import Projection, unit_rows
from .window_encoder import WINDOW, WindowEncoder

Floats = npt.NDArray[np.float32]
Ints = npt.NDArray[np.int64]

PROJECTION = "projection.safetensors"
ITEMS = "items.safetensors"
ITEM_IDS = "item_ids.json"
VECTORS = "vectors.safetensors"  # a release has them in the file that workers read
METRICS = "metrics.json"
ENCODER = "encoder"  # the folder of a tower that was tuned


@dataclass(frozen=True)
class Catalogue:
    """Row i is item i."""

    item_ids: list[str]
    features: Floats  # (n, W) unit rows of the text tower, before any projection


@dataclass(frozen=True)
class Candidate:
    """What a training leaves behind, as a folder and in memory."""

    path: Path
    projection: Projection
    window: WindowEncoder
    heads: Heads
    item_ids: list[str]
    vectors: Floats  # (n, D) unit rows, as served
    residual: Floats  # (n, D) their learned parts, in units of the text part
    counts: Ints  # (n,) training events
    metrics: dict[str, Any]

    def save(self) -> None:
        """Write its files; the figures last, so that what has figures is whole."""
        self.projection.save(self.path / PROJECTION)
        self.window.save(self.path / WINDOW)
        self.heads.save(self.path / HEADS_FILE)
        _save(self.path / ITEMS, residual=self.residual, counts=self.counts)
        _save(self.path / VECTORS, vectors=self.vectors)
        ids = json.dumps(self.item_ids, ensure_ascii=False)
        (self.path / ITEM_IDS).write_text(ids, encoding="utf-8")
        draft = self.path / f".{METRICS}"
        draft.write_text(json.dumps(self.metrics, indent=2) + "\n", encoding="utf-8")
        draft.replace(self.path / METRICS)

    @classmethod
    def load(cls, path: Path) -> Candidate:
        """Read a candidate's folder, or the release that it became. Raises WeightsUnavailable."""
        try:
            items = load_file(path / ITEMS)
            return cls(
                path=path,
                projection=Projection.load(path / PROJECTION),
                window=WindowEncoder.load(path / WINDOW),
                heads=Heads.load(path / HEADS_FILE),
                item_ids=json.loads((path / ITEM_IDS).read_text(encoding="utf-8")),
                vectors=_vectors(path, items),
                residual=items["residual"],
                counts=items["counts"],
                metrics=json.loads((path / METRICS).read_text(encoding="utf-8")),
            )
        except (OSError, KeyError, ValueError, SafetensorError) as error:
            raise WeightsUnavailable(
                f"{path} is no trained candidate ({error}); train again, or name another folder"
            ) from error


def _save(file: Path, **arrays: npt.NDArray[Any]) -> None:
    file.write_bytes(save_arrays({k: np.ascontiguousarray(v) for k, v in arrays.items()}))


def _vectors(path: Path, items: Mapping[str, npt.NDArray[Any]]) -> Floats:
    """Those of a candidate, of an older release, of a release."""
    if (path / VECTORS).exists():
        return load_file(path / VECTORS)["vectors"]
    return (
        items["vectors"]
        if "vectors" in items
        else CatalogueVectors.load(path / ITEM_VECTORS).vectors
    )


@dataclass(frozen=True)
class Base:
    """What training starts from: a projection, and an earlier candidate where there is one."""

    projection: Projection
    earlier: Candidate | None = None

    def vectors(self, catalogue: Catalogue) -> Floats:
        """The base's item vectors (n, D): its own where it has them, else from text alone."""
        text = self.projection.apply(catalogue.features)
        return unit_rows(text + self.residual(catalogue))

    def residual(self, catalogue: Catalogue) -> Floats:
        """Its learned parts (n, D), zero for items it did not know."""
        out = np.zeros((len(catalogue.item_ids), self.projection.dimensions), dtype=np.float32)
        if self.earlier is not None:
            row = {item: i for i, item in enumerate(self.earlier.item_ids)}
            old = np.array([row.get(item, -1) for item in catalogue.item_ids], dtype=np.int64)
            out[old >= 0] = self.earlier.residual[old[old >= 0]]
        return out
