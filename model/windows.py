"""Labelled windows: the columns that labelling hands to training.

PURE: numpy only. Knows nothing of archives, of horizons or of how a label came about.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]
Int32s = NDArray[np.int32]
Int8s = NDArray[np.int8]
Floats = NDArray[np.float32]


@dataclass(frozen=True)
class Labelled:
    """m events of u users, each the end of one window (its own last N events)."""

    start: Ints  # (u + 1,) events of user j are start[j]:start[j+1], in event-time order
    user: list[str]  # u
    item: Int32s  # (m,) row in the catalogue, -1 = the event has no item
    type: NDArray[np.uint8]  # (m,) index into the event types
    t_ms: Ints  # (m,)
    weight: Floats  # (m,) signed event weight
    next_item: Int32s  # (m,) the user's next positive item event, -1 = none yet (held back)
    next_type: Int8s  # (m,) its type, -1 = none
    purchase: Int8s  # (m,) 1/0: a purchase within the horizon; -1: not known yet (held back)
    returns: Int8s  # (m,) 1/0: any event within the return horizon; -1: not known yet
