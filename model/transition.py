"""The linear map from one embedding space to the next, and how far it can be trusted.

A profile's sums are linear in item vectors, so a map W fitted on a catalogue's vectors
(old row @ W ~ new row) carries a sum as well as it carries the items, and independent
errors average out. Two fits are compared on items that neither has seen:

    ridge         least squares, drawn towards the identity where data says little
    orthogonal    the rotation nearest to the data (Schönemann, Psychometrika 1966)

Numpy only. Knows nothing of profiles, or of which release is live.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final, Literal

import numpy as np
import numpy.typing as npt
from safetensors import safe_open
from safetensors.numpy import save

from .projection import unit_rows

Floats = npt.NDArray[np.float32]
Doubles = npt.NDArray[np.float64]
Kind = Literal["ridge", "orthogonal"]

HELD_OUT_SHARE: Final = 0.1
LEAST_HELD_OUT: Final = 20  # below this the error is measured on the items of the fit
MOST_COMPARED: Final = 2_000  # held-out items whose neighbours are looked up
NEIGHBOURS: Final = 10
# Per item, against a mean square of 1/D per dimension. Between these lies the best for
# catalogues of a hundred items to a hundred thousand.
RIDGES: Final = (1e-4, 1e-3, 1e-2, 1e-1)


@dataclass(frozen=True)
class Error:
    """How mapped vectors lie to the true ones."""

    items: int
    held_out: bool  # False: too few items to keep some from the fit
    cosine: float  # mean of mapped against true
    cosine_p05: float  # 5% of the items lie below
    overlap: float  # share of the NEIGHBOURS nearest items that are the same


@dataclass(frozen=True)
class Transition:
    """The maps between two spaces, there and back."""

    from_space: str
    to_space: str
    kind: Kind
    forward: Floats  # (D_from, D_to)
    backward: Floats  # (D_to, D_from)
    errors: Mapping[str, Error]  # by kind, of the forward map

    @property
    def error(self) -> Error:
        """Of the map that was chosen."""
        return self.errors[self.kind]

    def save(self, path: Path) -> None:
        """Write both maps and all that is known of them."""
        # One key: the order of several differs from run to run, and so would the checksum.
        about = {
            "from_space": self.from_space,
            "to_space": self.to_space,
            "kind": self.kind,
            "errors": {kind: asdict(error) for kind, error in self.errors.items()},
        }
        tensors = {"forward": self.forward, "backward": self.backward}
        path.write_bytes(save(tensors, {"about": json.dumps(about, sort_keys=True)}))

    @classmethod
    def load(cls, path: Path) -> Transition:
        """Read what `save` wrote. Raises ValueError for other names, types or shapes."""
        with safe_open(path, "numpy") as file:
            if set(file.keys()) != {"forward", "backward"}:
                raise ValueError(f"expected forward and backward, found {sorted(file.keys())}")
            forward, backward = file.get_tensor("forward"), file.get_tensor("backward")
            about: dict[str, Any] = file.metadata() or {}
        if forward.ndim != 2 or backward.shape != forward.shape[::-1]:
            raise ValueError(f"shapes {forward.shape} and {backward.shape} do not fit")
        if forward.dtype != np.float32 or backward.dtype != np.float32:
            raise ValueError("expected float32 tensors")
        if not (np.isfinite(forward).all() and np.isfinite(backward).all()):
            raise ValueError("a map holds NaN or infinity")
        try:
            about = json.loads(about["about"])
            kind = about["kind"]
            errors = {k: Error(**e) for k, e in about["errors"].items()}
            spaces = about["from_space"], about["to_space"]
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"its metadata lacks {error}") from error
        if kind not in ("ridge", "orthogonal") or kind not in errors:
            raise ValueError(f"unknown kind {kind!r}")
        return cls(*spaces, kind, forward, backward, errors)


def fit_transition(
    from_space: str, to_space: str, old: Floats, new: Floats, *, seed: int = 0
) -> Transition:
    """Fit on a catalogue: old (n, D_from) and new (n, D_to) unit rows of the same items.

    The kind of smaller held-out error is taken, then fitted again on all items. Any n will
    do, none included; for few items see `Error.held_out`. Raises ValueError for vectors
    that do not belong together or are not finite.
    """
    if old.ndim != 2 or new.ndim != 2 or len(old) != len(new):
        raise ValueError(f"shapes {old.shape} and {new.shape} are not of the same items")
    if not (np.isfinite(old).all() and np.isfinite(new).all()):
        raise ValueError("item vectors hold NaN or infinity")
    order = np.random.default_rng(seed).permutation(len(old))
    held = int(len(old) * HELD_OUT_SHARE)
    if held < LEAST_HELD_OUT:
        held = 0
    kept = order[held:]
    asked = order[:held] if held else kept
    ridge = _best_ridge(old[kept], new[kept])
    trials = {
        "ridge": fit_ridge(old[kept], new[kept], ridge),
        "orthogonal": fit_orthogonal(old[kept], new[kept]),
    }
    errors = {
        kind: measure(w, old[asked], new[asked], new, held_out=held > 0)
        for kind, w in trials.items()
    }
    kind: Kind = "ridge" if errors["ridge"].cosine >= errors["orthogonal"].cosine else "orthogonal"
    if kind == "orthogonal":
        forward = fit_orthogonal(old, new)
        backward = np.ascontiguousarray(forward.T)
    else:
        forward, backward = fit_ridge(old, new, ridge), fit_ridge(new, old, ridge)
    return Transition(from_space, to_space, kind, forward, backward, errors)


def fit_ridge(old: Floats, new: Floats, ridge: float) -> Floats:
    """(D_from, D_to): least squares of `old @ W - new`, W drawn towards the identity.

    `ridge` counts per item, in units of an item's mean square in one dimension.
    """
    size = old.shape[1]
    prior = np.eye(size, new.shape[1])
    x, y = old.astype(np.float64), new.astype(np.float64)
    strength = ridge * max(len(old), 1) / size
    gram = x.T @ x + strength * np.eye(size)
    w = prior + np.linalg.solve(gram, x.T @ (y - x @ prior))
    return np.ascontiguousarray(w, dtype=np.float32)


def fit_orthogonal(old: Floats, new: Floats) -> Floats:
    """(D_from, D_to): the map with orthonormal rows or columns nearest to the data.

    Directions that the items do not span are kept as they are as far as that goes.
    """
    size = max(old.shape[1], 1)
    cross = old.astype(np.float64).T @ new.astype(np.float64)  # (D_from, D_to)
    # So little that data outweighs it wherever there is any.
    cross += 1e-6 * max(len(old), 1) / size * np.eye(*cross.shape)
    left, _, right = np.linalg.svd(cross, full_matrices=False)
    return np.ascontiguousarray(left @ right, dtype=np.float32)


def measure(w: Floats, old: Floats, new: Floats, catalogue: Floats, *, held_out: bool) -> Error:
    """The error of `w` on items old (m, D_from), new (m, D_to), among all new rows (n, D_to)."""
    if not len(old):
        return Error(0, False, 1.0, 1.0, 1.0)
    mapped = unit_rows(old @ w)
    cosines = np.einsum("md,md->m", mapped, unit_rows(new))
    some = slice(0, MOST_COMPARED)
    return Error(
        items=len(old),
        held_out=held_out,
        cosine=float(cosines.mean()),
        cosine_p05=float(np.quantile(cosines, 0.05)),
        overlap=overlap(mapped[some], new[some], catalogue),
    )


def overlap(one: Floats, other: Floats, catalogue: Floats, k: int = NEIGHBOURS) -> float:
    """Mean share of the k nearest rows of `catalogue` (n, D) that two queries have in common,
    over pairs of queries `one` (m, D) and `other` (m, D)."""
    k = min(k, len(catalogue))
    if not k or not len(one):
        return 1.0
    shared = 0
    for start in range(0, len(one), 256):  # (256, n) scores at a time
        part = slice(start, start + 256)
        a, b = _nearest(one[part], catalogue, k), _nearest(other[part], catalogue, k)
        shared += sum(len(set(x) & set(y)) for x, y in zip(a, b, strict=True))
    return shared / (k * len(one))


def _nearest(queries: Floats, catalogue: Floats, k: int) -> list[list[int]]:
    scores = queries @ catalogue.T
    rows: list[list[int]] = np.argpartition(-scores, k - 1, axis=1)[:, :k].tolist()
    return rows


def _best_ridge(old: Floats, new: Floats) -> float:
    """By a fifth of the items, kept from a trial fit."""
    kept = len(old) - len(old) // 5
    if kept == len(old):
        return RIDGES[-1]
    errors = [
        float(np.square(old[kept:] @ fit_ridge(old[:kept], new[:kept], r) - new[kept:]).sum())
        for r in RIDGES
    ]
    return RIDGES[int(np.argmin(errors))]
