"""A row for each user of a micro-batch, given by the bytes of their ids in compiled code.

PURE.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from profiles.compiled import compiled
from profiles.compiled_rows import hashed, same
from profiles.ids import Ids

Bytes = NDArray[np.uint8]
Ints = NDArray[np.int64]

_MEAN_BYTES = 40  # room that is taken at first: a UUID with a letter or two before it


class UserRows:
    """Users in the order in which they come first. One thread at a time."""

    def __init__(self, most: int) -> None:
        """`most`: how many there may be."""
        self._table = np.full(1 << (2 * most).bit_length(), -1, np.int64)
        self._hashes = np.empty(most, np.uint64)
        self._text = np.empty(most * _MEAN_BYTES, np.uint8)
        self._end = np.zeros(most + 1, np.int64)
        self._n = 0

    def rows_of(self, text: Bytes, at: Ints) -> Ints:
        """The rows of k users, whose ids are text[at[i, 0] : at[i, 1]]."""
        used, more = int(self._end[self._n]), int((at[:, 1] - at[:, 0]).sum())
        if used + more > len(self._text):
            room = np.empty(2 * (used + more), np.uint8)
            room[:used] = self._text[:used]
            self._text = room
        text = text.view()
        text.flags.writeable = False  # as all are: else it would be compiled for both
        rows = np.empty(len(at), np.int64)
        self._n = _enter(text, at, self._table, self._hashes, self._text, self._end, self._n, rows)
        return rows

    def rows_of_ids(self, ids: Sequence[str]) -> Ints:
        """The same of ids that are strings."""
        given = Ids.of(ids)
        return self.rows_of(given.text, np.stack([given.end[:-1], given.end[1:]], axis=1))

    def ids(self) -> Ids:
        """Of all rows by now."""
        return Ids(self._text, self._end[: self._n + 1])


@compiled
def _enter(text, at, table, hashes, known, end, n, rows):
    """Open addressing: an entry of the table is a row, or -1. How many rows there are then."""
    mask = np.uint64(table.size - 1)
    for i in range(len(at)):
        begin, size = at[i, 0], at[i, 1] - at[i, 0]
        mixed = hashed(text, begin, begin + size, np.uint64(0))
        place = mixed & mask
        while True:
            row = table[place]
            if row < 0:
                table[place] = row = n
                hashes[n] = mixed
                for j in range(size):
                    known[end[n] + j] = text[begin + j]
                end[n + 1] = end[n] + size
                n += 1
                break
            if (
                hashes[row] == mixed
                and end[row + 1] - end[row] == size
                and same(known, end[row], text, begin, size)
            ):
                break
            place = (place + np.uint64(1)) & mask
        rows[i] = row
    return n
