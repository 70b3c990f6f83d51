"""Profiles as this writer last saved them, so that a shopper who is active costs no load.

Right whoever else writes: a save names the fence it started from, and Redis refuses one that
starts from an old copy. A row is taken out while its profile is folded and put back once it is
saved, so a failure in between leaves nothing behind that Redis does not have.

It knows neither Redis nor what is in a row.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from . import compiled_rows
from .compiled_rows import FREE, HELD, NEWEST, NONE, OLDEST, Shelf
from .ids import Ids

Positions = NDArray[np.int64]

Row = tuple[bytes, bytes]  # state and fence, as Redis has them; b"" for what is not there


class Rows(NamedTuple):
    """State and fence of n users, in one buffer."""

    bytes: NDArray[np.uint8]
    state_at: Positions  # (n, 2) begin and end
    fence_at: Positions  # (n, 2)

    @classmethod
    def of(cls, rows: Sequence[Row]) -> Rows:
        """These, in order."""
        size = np.fromiter((len(part) for row in rows for part in row), np.int64, 2 * len(rows))
        end = np.cumsum(size)
        at = np.stack([end - size, end], axis=1).reshape(len(rows), 4)
        joined = bytearray().join([part for row in rows for part in row])
        return cls(
            np.frombuffer(joined, np.uint8),
            np.ascontiguousarray(at[:, :2]),
            np.ascontiguousarray(at[:, 2:]),
        )

    def row(self, user: int) -> Row:
        """Of one of them."""
        (a, b), (c, d) = self.state_at[user].tolist(), self.fence_at[user].tolist()
        return self.bytes[a:b].tobytes(), self.bytes[c:d].tobytes()

    def with_rows(self, at: Positions, rows: Sequence[Row]) -> Rows:
        """These in place of those at some positions."""
        more, first = Rows.of(rows), len(self.bytes)
        state_at, fence_at = self.state_at.copy(), self.fence_at.copy()
        state_at[at], fence_at[at] = more.state_at + first, more.fence_at + first
        return Rows(np.concatenate([self.bytes, more.bytes]), state_at, fence_at)


class ProfileCache:
    """At most `capacity` rows; whoever was saved longest ago goes first. Several threads may use
    it, each for other users."""

    def __init__(self, capacity: int, row_bytes: int, seed: int = 0) -> None:
        """`row_bytes`: of an id with its row at most; larger ones are not held. Memory is taken as
        it fills. `seed`: a number that nobody knows who chooses ids."""
        self._lock = threading.Lock()
        self._capacity = capacity
        self._row_bytes = row_bytes
        self._seed = np.uint64(seed)
        self._mine = threading.local()
        self.clear()

    def __len__(self) -> int:
        return int(self._shelf.counts[HELD])

    def take(self, ids: Sequence[str]) -> tuple[Rows, Positions]:
        """The rows of these users, no user twice, who are not held from here on; empty ones where
        none was, and the positions of these. They stand until this thread takes again."""
        given, n = Ids.of(ids), len(ids)
        slots, state_at, fence_at = np.empty(n, np.int64), _pairs(n), _pairs(n)
        with self._lock:
            shelf = self._shelf
            length = compiled_rows.locate(shelf, given.text, given.end, slots, state_at, fence_at)
            out = self._buffer(length)
            compiled_rows.take(shelf, slots, state_at, out)
        return Rows(out[:length], state_at, fence_at), np.flatnonzero(slots == NONE)

    def put(self, ids: Sequence[str], which: Positions, rows: Rows) -> None:
        """Hold what was saved of some of n users, given by their positions."""
        given = Ids.of(ids)
        with self._lock:
            compiled_rows.put(self._shelf, given.text, given.end, which, *rows)

    def warm_up(self) -> None:
        """Compile what it is made of, or load what was compiled before."""
        rows, _ = self.take([])
        self.put([], np.zeros(0, np.int64), rows)

    def clear(self) -> None:
        """Hold nothing."""
        slots = self._capacity
        counts = np.zeros(5, np.int64)
        counts[[OLDEST, NEWEST, FREE]] = NONE
        with self._lock:
            self._shelf = Shelf(
                np.full(1 << (2 * slots).bit_length(), NONE, np.int64),
                np.empty(slots, np.uint64),
                np.empty(slots, np.int64),
                np.empty(slots, np.int64),
                np.empty((slots, 3), np.int64),
                np.empty(slots * self._row_bytes, np.uint8),
                counts,
                self._row_bytes,
                self._seed,
            )

    def _buffer(self, size: int) -> NDArray[np.uint8]:
        """Of at least `size` bytes, kept for this thread: fresh memory costs more than the copy."""
        held: NDArray[np.uint8] | None = getattr(self._mine, "held", None)
        if held is None or len(held) < size:
            held = self._mine.held = np.empty(2 * size, np.uint8)
        return held


def _pairs(n: int) -> Positions:
    return np.empty((n, 2), np.int64)
