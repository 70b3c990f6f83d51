"""A linear map from the tower's width to the profile's dimensions.

Centre, multiply, scale to unit length. Fitted on a catalogue's vectors once, then frozen
in a release: it is part of what a vector means. Knows nothing of texts or of torch.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from safetensors.numpy import load_file, save

Floats = npt.NDArray[np.float32]

# From 1,000 texts on, more of them move the quality of a fit by less than its noise.
FIT_TEXTS = 4096
FIT_VERSION = 1  # another number where the same vectors would be fitted otherwise

# The variance that a direction would have by chance counts as much as this many texts.
# At 100, more texts never made a worse fit (beyond noise), from none at all up; without
# it, a fit on about D texts is worse than none.
PRIOR_TEXTS = 100

# 0 is plain PCA, 1 is full whitening. Between them: see docs/decisions.md.
WHITENING = 0.5


@dataclass(frozen=True)
class Projection:
    """`unit((x - centre) @ matrix)` for unit rows x."""

    centre: Floats  # (W,)
    matrix: Floats  # (W, D)

    @property
    def width(self) -> int:
        return int(self.matrix.shape[0])

    @property
    def dimensions(self) -> int:
        return int(self.matrix.shape[1])

    def apply(self, vectors: Floats) -> Floats:
        """Unit rows (n, W) to unit rows (n, D)."""
        return unit_rows((vectors - self.centre) @ self.matrix)

    def save(self, path: Path) -> None:
        # Not save_file, whose files only their owner may read.
        path.write_bytes(save({"centre": self.centre, "matrix": self.matrix}))

    @classmethod
    def load(cls, path: Path) -> Projection:
        """Read what `save` wrote. Raises ValueError for other names, types or shapes."""
        tensors = load_file(path)
        if set(tensors) != {"centre", "matrix"}:
            raise ValueError(f"expected tensors centre and matrix, found {sorted(tensors)}")
        centre, matrix = tensors["centre"], tensors["matrix"]
        if centre.dtype != np.float32 or matrix.dtype != np.float32:
            raise ValueError("expected float32 tensors")
        if matrix.ndim != 2 or centre.shape != matrix.shape[:1]:
            raise ValueError(f"shapes {centre.shape} and {matrix.shape} do not fit")
        return cls(centre, matrix)


def unit_rows(vectors: npt.NDArray[Any]) -> Floats:
    """Rows scaled to length 1; a row of zeros stays as it is."""
    lengths = np.linalg.norm(vectors, axis=1, keepdims=True)
    return np.asarray(vectors / np.maximum(lengths, 1e-12), dtype=np.float32)


def fit_projection(vectors: Floats, dimensions: int, *, seed: int = 0) -> Projection:
    """Centre, keep the directions in which the catalogue differs most, whiten by half.

    `vectors` are unit rows (n, W) of different texts, `dimensions` at most W. Any n will
    do, none included: centre and variances lean towards those of an unknown catalogue
    (0 and 1/W), and directions that n texts do not span are drawn at random, which keeps
    cosines on average. With no texts it is a random orthogonal map, and for D = W an
    exact one.
    """
    count, width = vectors.shape
    if not 1 <= dimensions <= width:
        raise ValueError(f"dimensions must be 1 to {width}, got {dimensions}")
    mean = vectors.mean(axis=0, dtype=np.float64) if count else np.zeros(width)
    sums, directions = _principal(vectors - mean, dimensions)  # (r,), (r, W)
    rank = len(sums)

    random = np.random.default_rng(seed).normal(size=(width, dimensions - rank))
    basis, _ = np.linalg.qr(np.concatenate([directions.T, random], axis=1))  # (W, D)
    basis[:, :rank] = directions.T  # QR may turn a sign

    variances = np.full(dimensions, PRIOR_TEXTS / width)  # (D,) PRIOR_TEXTS x 1/W
    variances[:rank] += sums
    variances /= count + PRIOR_TEXTS
    return Projection(
        centre=(mean * count / (count + PRIOR_TEXTS)).astype(np.float32),
        matrix=(basis * variances ** (-WHITENING / 2)).astype(np.float32),
    )


def _principal(centred: npt.NDArray[np.float64], most: int) -> tuple[Any, Any]:
    """Sums of squares (r,), largest first, and their directions (r, W), signs settled."""
    width = centred.shape[1]
    sums, columns = np.linalg.eigh(centred.T @ centred)  # ascending
    # Below this is rounding, as in the directions that identical texts span.
    rank = min(most, int((sums > 1e-9 * max(float(sums[-1]), 1e-6) * width).sum()))
    sums, directions = sums[::-1][:rank], columns.T[::-1][:rank]
    largest = directions[np.arange(rank), np.abs(directions).argmax(axis=1)]
    return sums, directions * np.sign(largest)[:, None]
