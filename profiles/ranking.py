"""Four signals of a shopper and an item -> one score. What the trainer fits, readers compute.

PURE: numpy only. The meaning of the weights is told in `model/ranker.py`, which trains them; a
test holds both to the same numbers. Without a trained ranker `BY_HAND` serves: the sum that
was best by hand on three data sets.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from .arithmetic import Floats, own_of
from .neighbours import Neighbours, closeness

Weights = Mapping[str, Floats]

SIGNALS: Final = ("next_interest", "text", "covisitation", "own")
_COUNTS: Final = 2  # the signals from here on are counts, those before cosines
_COSINE_SCALE: Final = 10.0
_USUAL: Final = (3.0, 1.0, 0.0)
# The first axis of 2: items that are new to the shopper, and items that they had before.
SHAPES: Final[Mapping[str, tuple[int, ...]]] = {
    "gate": (2, 4),
    "gate_shopper": (2, 4, 3),
    "gate_item": (2, 4),
    "knee": (2, 2),
    "item": (2, 3),
    "had": (1,),
    "had_shopper": (3,),
    "mix": (2, 16, 7),
    "mix_shopper": (2, 16, 3),
    "mix_bias": (2, 16),
    "mix_out": (2, 16),
}
BY_HAND: Final[Weights] = {
    **{name: np.zeros(shape, dtype=np.float32) for name, shape in SHAPES.items()},
    "gate": np.tile(np.log(np.expm1([1.0, 0.3, 1.0, 1.0])), (2, 1)).astype(np.float32),
    "knee": np.full((2, 2), np.log(1 / 0.02), dtype=np.float32),
}

_DAY_MS: Final = 86_400_000.0
DEPTH: Final = 50  # latest items whose neighbours are looked at
STEP_DECAY: Final = 0.8  # of an item's neighbours, per instant after it


def score(weights: Weights, signals: Floats, items: Floats, shopper: Floats) -> Floats:
    """Scores (..., C) of C items from signals (..., C, 4), items (..., C, 3), shopper (..., 3).

    Any leading axes. Counts of nothing are 0, cosines of nothing are 0.
    """
    known = items - np.asarray(_USUAL, dtype=np.float32)  # (..., C, 3)
    had = signals[..., -1] > 0
    new, again = (_score_of(weights, kind, signals, known, shopper) for kind in (0, 1))
    again += weights["had"][0] + (shopper @ weights["had_shopper"])[..., None]
    return np.where(had, again, new).astype(np.float32)


def _score_of(
    weights: Weights, kind: int, signals: Floats, known: Floats, shopper: Floats
) -> Floats:
    """As if all C items were of one kind."""
    gate = (shopper @ weights["gate_shopper"][kind].T + weights["gate"][kind])[..., None, :]
    gate = np.logaddexp(0.0, gate + known[..., :1] * weights["gate_item"][kind])  # (..., C, 4)
    shaped = signals * np.float32(_COSINE_SCALE)
    shaped[..., _COUNTS:] = np.log1p(signals[..., _COUNTS:] * np.exp(weights["knee"][kind]))
    read = np.concatenate([shaped, known], axis=-1)  # (..., C, 7)
    about = shopper @ weights["mix_shopper"][kind].T + weights["mix_bias"][kind]
    units = np.maximum(read @ weights["mix"][kind].T + about[..., None, :], 0.0)  # (..., C, 16)
    total: Floats = np.einsum("...k,...k->...", gate, shaped) + known @ weights["item"][kind]
    total += units @ weights["mix_out"][kind]
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


def own_items(
    tally: Mapping[int, float],
    window: NDArray[Any],
    updated_ms: int,
    half_lives_s: Sequence[float],
) -> dict[int, float]:
    """Item key -> mass, of a shopper's own items that they liked more than not: those of the
    tally, and those too light for it that are in the window still."""
    lately = own_of(window, updated_ms, half_lives_s, len(window))
    return {item: mass for item, mass in {**lately, **tally}.items() if mass > 0}


def item_features(count: float, recent: float, own_days: float) -> tuple[float, float, float]:
    """What the ranker knows of an item, from decayed counts and the days since the shopper last
    had it; 0 for none."""
    return math.log1p(count), math.log1p(recent), math.log1p(max(own_days, 0.0))


def own_days(window: NDArray[Any], now_ms: int) -> dict[int, float]:
    """Item key -> days since a shopper's latest event with it."""
    entries = liked(window)
    ages = (now_ms - entries["t_ms"]) / _DAY_MS
    # The window's order is of time, and the last of equal keys stays.
    return dict(zip(entries["item"].tolist(), ages.tolist(), strict=True))


def shopper_features(window: NDArray[Any], events: int) -> Floats:
    """(3,) log(1 + events), log(1 + items had), share of repeats among the window's events."""
    items = liked(window)["item"]
    had = len(np.unique(items))
    repeats = 1.0 - had / len(items) if len(items) else 0.0
    return np.array([np.log1p(events), np.log1p(had), repeats], dtype=np.float32)


def nearby(window: NDArray[Any], of: Mapping[int, Neighbours]) -> dict[int, float]:
    """Item key -> decayed pair weights with a shopper's latest items, each by the root of its own
    count; what is missing to `covisitation` is the other item's count. Items of one instant are
    equally old, and count once in it."""
    latest = liked(window)[-DEPTH:]
    times, instant = np.unique(latest["t_ms"], return_inverse=True)
    ages = (len(times) - 1 - instant).tolist()
    now_ms = max((n.updated_ms for n in of.values()), default=0)
    sums: dict[int, float] = {}
    for item, age in dict.fromkeys(zip(latest["item"].tolist(), ages, strict=True)):
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
