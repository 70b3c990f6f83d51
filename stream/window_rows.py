"""Windows as profiles keep them -> what a window encoder reads.

PURE. What is served and what the ranker's cases are made of go through here; a test holds it to
the rows that training reads. It knows neither networks nor where vectors come from.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from profiles.arithmetic import Floats, Ints
from profiles.schema import WINDOW_ENTRY

Rows = tuple[Floats, NDArray[np.uint8], Ints, Ints]


def window_rows(
    windows: Sequence[NDArray[Any]], events: int, vectors_of: Callable[[list[int]], Floats]
) -> Rows:
    """Item vectors (n, L, D), types and times (n, L) and lengths (n,) of the last `events` entries
    of n windows of WINDOW_ENTRY, none of them empty.

    vectors_of: (u,) item keys -> (u, D), zeros where an item has no vector. An event without an
    item, such as a search, has zeros too: the encoder knows it by its type.
    """
    latest = [window[-events:] for window in windows]
    lengths = np.fromiter(map(len, latest), np.int64, len(latest))
    entries = np.zeros((len(latest), int(lengths.max(initial=0))), WINDOW_ENTRY)  # (n, L)
    real = np.arange(entries.shape[1]) < lengths[:, None]
    if len(latest):
        entries[real] = np.concatenate(latest)
    items, place = np.unique(entries["item"], return_inverse=True)
    known = items[items != 0]
    vectors = vectors_of(known.tolist())
    if len(known) < len(items):
        vectors = np.concatenate([np.zeros((1, vectors.shape[1]), np.float32), vectors])
    return vectors[place.reshape(entries.shape)], entries["type"], entries["t_ms"], lengths
