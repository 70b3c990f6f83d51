"""Item key -> vector, resident on the device, bounded.

The answer to most events: a known item costs a dictionary look-up and a row of a
gather. Keys are opaque unsigned 64-bit numbers; what they stand for, and when a vector
is out of date, is the caller's business.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from itertools import repeat

import numpy as np
import numpy.typing as npt
import torch

Floats = npt.NDArray[np.float32]
Bools = npt.NDArray[np.bool_]
Rows = npt.NDArray[np.int64]

FIRST_ROWS = 4096  # the table starts at this size and doubles, so a small catalogue stays small
SWEEP_ROWS = 4096  # rows that the clock's hand looks at in one step

# What the clock knows of a row. KEPT is HOT for as long as one `put` writes to it.
FREE, COLD, HOT, KEPT = 0, 1, 2, 3


class ItemTable:
    """At most `capacity` vectors; when full, what was not asked for lately goes.

    Eviction is the clock algorithm: a look-up makes its rows hot, the hand cools the hot
    rows it passes and takes the cold ones. Close to least-recently-used, and a look-up
    pays one vectorised store for it.

    Every method is atomic: look-ups on one thread may meet changes from another. `hits`
    and `misses` count the keys of all look-ups.
    """

    def __init__(self, capacity: int, dimensions: int, device: str | torch.device = "cpu") -> None:
        if capacity < 1 or dimensions < 1:
            raise ValueError("capacity and dimensions must be at least 1")
        self.capacity = capacity
        self.dimensions = dimensions
        self.hits = 0
        self.misses = 0
        self._lock = threading.Lock()
        self._row_of: dict[int, int] = {}
        self._free: list[int] = []
        self._hand = 0
        self._keys = np.zeros(0, dtype=np.uint64)  # (rows,)
        self._state = np.zeros(0, dtype=np.uint8)  # (rows,)
        self._vectors = torch.zeros((0, dimensions), device=device)  # (rows, D)
        self._grow(min(capacity, FIRST_ROWS))

    def __len__(self) -> int:
        return len(self._row_of)

    def lookup(self, keys: Sequence[int]) -> tuple[Floats, Bools]:
        """Vectors (n, D) and whether each key was known (n,); unknown keys get zeros."""
        count = len(keys)
        with self._lock:
            rows = np.fromiter(map(self._row_of.get, keys, repeat(-1)), np.int64, count)  # (n,)
            found = rows >= 0
            hits = int(np.count_nonzero(found))
            self.hits += hits
            self.misses += count - hits
            self._state[rows[found]] = HOT
            vectors = self._gather(rows)
        if hits < count:
            vectors[~found] = 0.0  # row -1 is some other item's
        return vectors, found

    def put(self, keys: Sequence[int], vectors: Floats) -> None:
        """Set `keys` (n) to `vectors` (n, D). A key given twice keeps its last vector.

        Of more keys than the table can hold, the last ones stay. Raises ValueError for
        another shape and OverflowError for a key outside 64 bits; nothing is stored then.
        """
        if vectors.shape != (len(keys), self.dimensions):
            raise ValueError(
                f"expected vectors of shape ({len(keys)}, {self.dimensions}), got {vectors.shape}"
            )
        last = {key: i for i, key in enumerate(keys)}
        kept = list(last)[-self.capacity :]
        packed = np.array(kept, dtype=np.uint64)
        values = torch.from_numpy(np.float32(vectors[[last[key] for key in kept]]))  # (m, D)
        values = values.to(self._vectors.device)
        with self._lock:
            rows = torch.from_numpy(self._rows_for(kept, packed)).to(values.device)
            self._vectors.index_copy_(0, rows, values)

    def discard(self, keys: Sequence[int]) -> None:
        """Forget these keys; unknown ones are passed over."""
        with self._lock:
            for key in keys:
                row = self._row_of.pop(key, None)
                if row is not None:
                    self._state[row] = FREE
                    self._free.append(row)

    def _gather(self, rows: Rows) -> Floats:
        """Rows (n,) to vectors (n, D); row -1 gives any vector."""
        if self._vectors.device.type == "cpu":
            # Not torch's gather: its threads wait for each other at the end, and on a busy
            # machine that took 14 ms for 4,096 rows where this takes 0.3.
            return self._vectors.numpy().take(rows, axis=0, mode="clip")
        where = torch.from_numpy(rows).to(self._vectors.device).clamp_(min=0)
        gathered: Floats = self._vectors.index_select(0, where).cpu().numpy()
        return gathered

    def _rows_for(self, keys: list[int], packed: npt.NDArray[np.uint64]) -> Rows:
        """A row for each of these different keys; others make room where the table is full."""
        rows = np.fromiter(map(self._row_of.get, keys, repeat(-1)), np.int64, len(keys))  # (m,)
        # Kept through the sweep below, or a key of this very call could lose its row.
        self._state[rows[rows >= 0]] = KEPT
        new = np.flatnonzero(rows < 0)
        while len(self._free) < len(new) and len(self._keys) < self.capacity:
            self._grow(min(self.capacity, 2 * len(self._keys)) - len(self._keys))
        self._evict(len(new) - len(self._free))
        fresh = [self._free.pop() for _ in range(len(new))]
        rows[new] = fresh
        self._keys[fresh] = packed[new]
        self._row_of.update(zip((keys[i] for i in new), fresh, strict=True))
        self._state[rows] = HOT
        # New rows start cold: a flood of items seen once must not drive out the popular.
        self._state[fresh] = COLD
        return rows

    def _grow(self, added: int) -> None:
        size = len(self._keys)
        self._free.extend(reversed(range(size, size + added)))
        self._keys = np.concatenate([self._keys, np.zeros(added, dtype=np.uint64)])
        self._state = np.concatenate([self._state, np.full(added, FREE, dtype=np.uint8)])
        zeros = self._vectors.new_zeros((added, self.dimensions))
        self._vectors = torch.cat([self._vectors, zeros])

    def _evict(self, wanted: int) -> None:
        """Free `wanted` rows within two turns of the hand: one cools, the next takes."""
        while wanted > 0:
            start, stop = self._hand, min(self._hand + SWEEP_ROWS, len(self._state))
            cold = np.flatnonzero(self._state[start:stop] == COLD)[:wanted] + start
            if len(cold) == wanted:
                stop = int(cold[-1]) + 1
            passed = self._state[start:stop]  # a view
            passed[passed == HOT] = COLD
            self._state[cold] = FREE
            for row in cold.tolist():
                del self._row_of[int(self._keys[row])]
                self._free.append(row)
            wanted -= len(cold)
            self._hand = stop % len(self._state)
