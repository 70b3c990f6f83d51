"""The vectors of a catalogue as a release ships them.

Item ids, the version of the text that each vector was made from, and the vectors: a worker
takes a vector where the version is that of the text it knows, and encodes the others. Numpy
only; knows nothing of how a vector came about.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from safetensors.numpy import load_file, save

Floats = npt.NDArray[np.float32]

ITEM_VECTORS = "item_vectors.safetensors"  # the part of a release that holds them
_VERSION_BYTES = 8


@dataclass(frozen=True)
class CatalogueVectors:
    """n items."""

    item_ids: list[str]
    versions: list[str]  # text_version of each text, 16 hexadecimal digits
    vectors: Floats  # (n, D) unit rows

    def __post_init__(self) -> None:
        shape = self.vectors.shape
        if len(shape) != 2 or not len(self.item_ids) == len(self.versions) == shape[0]:
            raise ValueError(
                f"{len(self.item_ids)} ids, {len(self.versions)} versions, vectors {shape}"
            )
        if len(set(self.item_ids)) != len(self.item_ids):
            raise ValueError("an item id is there twice")
        if not np.isfinite(self.vectors).all():
            raise ValueError("item vectors hold NaN or infinity")

    def __len__(self) -> int:
        return len(self.item_ids)

    def save(self, path: Path) -> None:
        """One file: ids as UTF-8 with the ends of each, versions as bytes, vectors."""
        ids = [item_id.encode() for item_id in self.item_ids]
        raw = b"".join(map(bytes.fromhex, self.versions))
        if len(raw) != _VERSION_BYTES * len(ids):
            raise ValueError("a text version is not of 16 hexadecimal digits")
        tensors: dict[str, npt.NDArray[Any]] = {
            "ids": np.frombuffer(b"".join(ids), dtype=np.uint8),
            "id_ends": np.cumsum([len(i) for i in ids], dtype=np.int64),
            "versions": np.frombuffer(raw, dtype=np.uint8).reshape(-1, _VERSION_BYTES),
            "vectors": np.ascontiguousarray(self.vectors, dtype=np.float32),
        }
        path.write_bytes(save(tensors))

    @classmethod
    def load(cls, path: Path) -> CatalogueVectors:
        """Read what `save` wrote. Raises ValueError for other names, types or shapes."""
        tensors = load_file(path)
        if set(tensors) != {"ids", "id_ends", "versions", "vectors"}:
            raise ValueError(f"expected ids, id_ends, versions and vectors, found {set(tensors)}")
        vectors, versions = tensors["vectors"], tensors["versions"]
        if vectors.dtype != np.float32 or versions.dtype != np.uint8:
            raise ValueError("tensors of other types than they should be")
        if (
            tensors["id_ends"].dtype != np.int64
            or tensors["id_ends"].ndim != 1
            or versions.ndim != 2
        ):
            raise ValueError("ids or versions of other types or shapes than they should be")
        raw, ends = tensors["ids"].tobytes(), tensors["id_ends"].tolist()
        if ends and (ends[-1] != len(raw) or sorted(ends) != ends or ends[0] < 0):
            raise ValueError("the ends of the ids do not fit")
        ids = _cut(raw, ends)
        return cls(ids, [row.tobytes().hex() for row in versions], vectors)


def _cut(raw: bytes, ends: Sequence[int]) -> list[str]:
    starts = [0, *ends[:-1]]
    return [raw[i:j].decode() for i, j in zip(starts, ends, strict=False)]
