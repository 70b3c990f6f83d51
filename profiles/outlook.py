"""What may come next of a shopper, as it is kept beside their profile: the next-interest vector and
what the heads say.

PURE. An outlook is derived from a profile some time after a save, so a reader finds one that is a
little older than the profile, or of the space that the profile was moved out of; both are told.
It does not know how an outlook is computed.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from . import schema
from .errors import StateCorrupt

Floats = NDArray[np.float32]
Fields = tuple[bytes, str]  # next, heads


@dataclass(frozen=True)
class Outlook:
    """What one release foretold from the window of a shopper's events."""

    next_interest: Floats | None
    """(D,) unit vector in the profile's space; None where the profile has left that since."""
    heads: dict[str, float]
    """Probabilities: `purchase` within LEARN_PURCHASE_DAYS, `churn` (no return) within
    LEARN_RETURN_DAYS, after `updated_ms`."""
    release: str
    updated_ms: int  # latest event time of the profile that it was computed from
    computed_ms: int  # wall clock
    saves_since: int  # of the profile; 0: nothing happened since
    age_s: float  # since it was computed, by the reader's clock


def encode(
    vectors: Floats,
    heads: Mapping[str, Floats],
    release: str,
    space: int,
    revisions: Sequence[int],
    updated_ms: Sequence[int],
    computed_ms: int,
) -> list[Fields]:
    """The fields of n outlooks. vectors: (n, D) unit rows; heads: name -> (n,), NaN = not learned;
    revisions, updated_ms: of the profiles that they were computed from."""
    head = np.zeros(1, schema.NEXT_HEADER)
    head["version"], head["dimensions"] = schema.SCHEMA_VERSION, vectors.shape[1]
    head["space"] = space
    prefix, rows = head.tobytes(), np.ascontiguousarray(vectors, dtype="<f4")
    return [
        (
            prefix + rows[i].tobytes(),
            json.dumps(
                {
                    "v": schema.SCHEMA_VERSION,
                    "release": release,
                    "revision": revision,
                    "updated_ms": latest_ms,
                    "computed_ms": computed_ms,
                    "heads": {
                        name: round(float(chances[i]), 6)
                        for name, chances in heads.items()
                        if not math.isnan(chances[i])
                    },
                }
            ),
        )
        for i, (revision, latest_ms) in enumerate(zip(revisions, updated_ms, strict=True))
    ]


def decode(
    next_: bytes | None, heads: bytes | None, space: str, revision: int, now_s: float
) -> Outlook | None:
    """The outlook beside a profile that lives in `space` and was saved `revision` times; None where
    there is none, or one of a later schema. Raises StateCorrupt."""
    if next_ is None or heads is None:
        return None
    size = schema.NEXT_HEADER.itemsize
    if len(next_) < size:
        raise StateCorrupt(f"its next field has {len(next_)} bytes; delete that field")
    head = np.frombuffer(next_[:size], schema.NEXT_HEADER)[0]
    if head["version"] > schema.SCHEMA_VERSION:
        return None
    if len(next_) != size + 4 * int(head["dimensions"]):
        raise StateCorrupt(f"its next field has {len(next_)} bytes; delete that field")
    told = _told(heads)
    of_space = f"{int(head['space']):016x}" == space
    return Outlook(
        next_interest=np.frombuffer(next_, "<f4", offset=size) if of_space else None,
        heads=told.heads,
        release=told.release,
        updated_ms=told.updated_ms,
        computed_ms=told.computed_ms,
        saves_since=revision - told.revision,
        age_s=max(0.0, now_s - told.computed_ms / 1000),
    )


@dataclass(frozen=True)
class _Told:
    """What a heads field says."""

    heads: dict[str, float]
    release: str
    revision: int
    updated_ms: int
    computed_ms: int


def _told(raw: bytes) -> _Told:
    try:
        said: dict[str, Any] = json.loads(raw)
        told = _Told(**{name: said[name] for name in _Told.__dataclass_fields__})
        counts = (told.revision, told.updated_ms, told.computed_ms)
        chances = {name: float(chance) for name, chance in told.heads.items()}
        if all(type(n) is int and abs(n) < 1 << 63 for n in counts) and type(told.release) is str:
            return replace(told, heads=chances)
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError):
        pass
    raise StateCorrupt(f"its heads field of {len(raw)} bytes says no outlook; delete that field")
