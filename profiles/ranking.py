"""Four signals of a shopper and an item -> one score. What the trainer fits, readers compute.

PURE: numpy only. The meaning of the weights is told in `model/ranker.py`, which trains them; a
test holds both to the same numbers. Without a trained ranker `BY_HAND` serves: the sum that
was best by hand on three data sets.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from .arithmetic import Floats
from .neighbours import Neighbours, closeness

Weights = Mapping[str, Floats]

SIGNALS: Final = ("next_interest", "text", "covisitation", "own")
_COUNTS: Final = 2  # the signals from here on are counts, those before cosines
_COSINE_SCALE: Final = 10.0
_USUAL_LOG: Final = 3.0
# The first axis of 2: items that are new to the shopper, and items that they had before.
SHAPES: Final[Mapping[str, tuple[int, ...]]] = {
    "gate": (2, 4),
    "gate_shopper": (2, 4, 3),
    "gate_item": (2, 4),
    "knee": (2, 2),
    "item": (2,),
    "had": (1,),
    "had_shopper": (3,),
}
BY_HAND: Final[Weights] = {
    **{name: np.zeros(shape, dtype=np.float32) for name, shape in SHAPES.items()},
    "gate": np.tile(np.log(np.expm1([1.0, 0.3, 1.0, 1.0])), (2, 1)).astype(np.float32),
    "knee": np.full((2, 2), np.log(1 / 0.02), dtype=np.float32),
}

DEPTH: Final = 20  # latest items whose neighbours are looked at
STEP_DECAY: Final = 0.8  # of an item's neighbours, per item after it
BASKET_DECAY: Final = 0.9  # of an own item, per instant after it


def score(weights: Weights, signals: Floats, item_log_events: Floats, shopper: Floats) -> Floats:
    """Scores (..., C) of C items from signals (..., C, 4), counts (..., C), shopper (..., 3).

    Any leading axes. Counts of nothing are 0, cosines of nothing are 0.
    """
    known = item_log_events - _USUAL_LOG  # (..., C)
    had = signals[..., -1] > 0
    new, again = (_score_of(weights, kind, signals, known, shopper) for kind in (0, 1))
    again += weights["had"][0] + (shopper @ weights["had_shopper"])[..., None]
    return np.where(had, again, new).astype(np.float32)


def _score_of(
    weights: Weights, kind: int, signals: Floats, known: Floats, shopper: Floats
) -> Floats:
    """As if all C items were of one kind."""
    gate = (shopper @ weights["gate_shopper"][kind].T + weights["gate"][kind])[..., None, :]
    gate = np.logaddexp(0.0, gate + known[..., None] * weights["gate_item"][kind])  # (..., C, 4)
    shaped = signals * np.float32(_COSINE_SCALE)
    shaped[..., _COUNTS:] = np.log1p(signals[..., _COUNTS:] * np.exp(weights["knee"][kind]))
    total: Floats = np.einsum("...k,...k->...", gate, shaped) + weights["item"][kind] * known
    return total


def to_fields(weights: Weights) -> dict[str, bytes]:
    """As they are kept in Redis: little-endian float32, row by row."""
    return {name: np.ascontiguousarray(weights[name], dtype="<f4").tobytes() for name in SHAPES}


def from_fields(fields: Mapping[bytes, bytes]) -> Weights:
    """What `to_fields` gave; `BY_HAND` where something is missing or of another size."""
    sizes = {name.encode(): 4 * int(np.prod(shape)) for name, shape in SHAPES.items()}
    if any(len(fields.get(name, b"")) != size for name, size in sizes.items()):
        return BY_HAND
    return {
        name: np.frombuffer(fields[name.encode()], dtype="<f4").reshape(shape)
        for name, shape in SHAPES.items()
    }


def liked(window: NDArray[Any]) -> NDArray[Any]:
    """The entries of a window that have an item and no dislike, oldest first."""
    entries: NDArray[Any] = window[(window["item"] != 0) & (window["weight"] > 0)]
    return entries


def own_frequency(window: NDArray[Any]) -> dict[int, float]:
    """Item key -> how often it is among a shopper's latest events; items of one instant count
    once, and each instant counts `BASKET_DECAY` of the next."""
    entries = liked(window)
    _, instant = np.unique(entries["t_ms"], return_inverse=True)
    latest = int(instant.max(initial=0))
    own: dict[int, float] = {}
    for item, at in set(zip(entries["item"].tolist(), instant.tolist(), strict=True)):
        own[item] = own.get(item, 0.0) + BASKET_DECAY ** (latest - at)
    return own


def shopper_features(window: NDArray[Any], events: int) -> Floats:
    """(3,) log(1 + events), log(1 + items had), share of repeats among the window's events."""
    items = liked(window)["item"]
    had = len(np.unique(items))
    repeats = 1.0 - had / len(items) if len(items) else 0.0
    return np.array([np.log1p(events), np.log1p(had), repeats], dtype=np.float32)


def nearby(window: NDArray[Any], of: Mapping[int, Neighbours]) -> dict[int, float]:
    """Item key -> decayed pair weights with a shopper's latest items, each by the root of its own
    count; what is missing to `covisitation` is the other item's count."""
    latest = liked(window)["item"][-DEPTH:].tolist()
    now_ms = max((n.updated_ms for n in of.values()), default=0)
    sums: dict[int, float] = {}
    for age, item in enumerate(reversed(latest)):
        known = of.get(item)
        if known is None:
            continue
        left = known.share(now_ms)
        step = STEP_DECAY**age
        for other, weight in known.near.items():
            share = step * closeness(weight * left, known.count * left, 0.0)
            sums[other] = sums.get(other, 0.0) + share
    return sums


def covisitation(near: float, count: float) -> float:
    """The signal of an item with `nearby` weight and decayed count of events."""
    return closeness(near, 0.0, count)


def top(sums: Mapping[int, float], count: int) -> Sequence[int]:
    """The items of the `count` largest sums, largest first, ties by key."""
    return sorted(sums, key=lambda item: (-sums[item], item))[:count]
