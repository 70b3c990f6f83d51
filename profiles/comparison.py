"""Two profiles of one shopper, field by field: equal but for the rounding of floats, or not.

PURE. It does not know where the two came from.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Any, Final

import numpy as np

from .arithmetic import Profile

# Sums are float32, added up in another order and decayed in other steps: relative to the mass
# behind them they agree to about 1e-6; events that cancel out leave the rounding of both.
TOLERANCE: Final = 1e-4
_NOTHING: Final = 1e-30  # what float32 leaves of a sum that has decayed away
_LEFT_OUT: Final = frozenset({"user_id", "watermark", "outlook"})


def differing(
    one: Profile, other: Profile, own_items: int, tolerance: float = TOLERANCE
) -> list[str]:
    """The names of the fields in which they differ; watermark and outlook are not looked at.

    Floats may differ by `tolerance`, relative to the mass of what was folded. Which categories
    stay within their bound depends on how events were cut into batches, so beyond it only the sum
    of all is compared; own items are not looked at where both hold as many as their bound allows,
    `own_items`.
    """
    if one.sums.shape != other.sums.shape:
        return ["dimensions"]
    masses = np.maximum(np.abs(one.masses), np.abs(other.masses)).astype(np.float64)
    own = float(sum(map(abs, one.own.values())))
    scales: dict[str, Any] = {"sums": masses[:, None], "masses": masses, "own": own}
    longest = float(masses[-1])
    found = []
    for name in (field.name for field in fields(Profile)):
        a, b = getattr(one, name), getattr(other, name)
        if name in _LEFT_OUT or name in ("categories", "other_categories"):
            continue
        if name == "own" and len(a) == len(b) == own_items:
            continue
        if name in ("sums", "masses") and one.space != other.space:
            continue  # said by `space`
        if not _near(a, b, tolerance * scales.get(name, longest)):
            found.append(name)
    if not _near_tallies(one, other, tolerance * longest):
        found.append("categories")
    return found


def _near(a: Any, b: Any, allowed: Any) -> bool:
    if isinstance(a, np.ndarray):
        return a.shape == b.shape and _near_arrays(a, b, allowed)
    if isinstance(a, float):
        return bool(abs(a - b) <= TOLERANCE * max(abs(a), abs(b)) + _NOTHING)
    if isinstance(a, Mapping) and any(isinstance(x, float) for x in [*a.values(), *b.values()]):
        return all(
            abs(a.get(key, 0.0) - b.get(key, 0.0)) <= allowed + _NOTHING for key in a.keys() | b
        )
    return bool(a == b)


def _near_arrays(a: np.ndarray, b: np.ndarray, allowed: Any) -> bool:
    if a.dtype.names:
        return all(_near_arrays(a[name], b[name], allowed) for name in a.dtype.names)
    if a.dtype.kind == "f":
        difference = np.abs(a.astype(np.float64) - b.astype(np.float64))
        return bool((difference <= allowed + _NOTHING).all())
    return bool((a == b).all())


def _near_tallies(one: Profile, other: Profile, allowed: float) -> bool:
    total, others = (sum(p.categories.values()) + p.other_categories for p in (one, other))
    if abs(total - others) > allowed + _NOTHING:
        return False
    if one.other_categories or other.other_categories:
        return True
    return _near(one.categories, other.categories, allowed)
