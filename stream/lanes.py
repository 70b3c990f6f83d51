"""Users of a micro-batch by lanes: whoever is in a lane is in the same one in every micro-batch.

PURE.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from profiles.compiled import compiled
from profiles.compiled_rows import hashed
from profiles.ids import Ids

Ints = NDArray[np.int64]


class InLanes(NamedTuple):
    """n users, those of a lane together."""

    users: Ids
    row: Ints  # (n,) of each user as they were -> the row now
    begin: Ints  # the first row of each lane, and n


def in_lanes(users: Ids, lane: Ints, count: int) -> InLanes:
    """By the lane of each of n users; `count`: how many there are."""
    n = len(users)
    row, text = np.empty(n, np.int64), np.empty(users.end[-1] - users.end[0], np.uint8)
    begin, end = np.zeros(count + 1, np.int64), np.zeros(n + 1, np.int64)
    _arrange(users.text, users.end, lane, row, begin, text, end)
    return InLanes(Ids(text, end), row, begin)


def lanes_of(users: Ids, count: int) -> Ints:
    """(n,) lanes of users, of a number of them that is a power of two."""
    lane = np.empty(len(users), np.int64)
    _hash(users.text, users.end, np.int64(count - 1), lane)
    return lane


@compiled
def _hash(text, end, mask, lane):
    for i in range(lane.size):
        lane[i] = np.int64(hashed(text, end[i], end[i + 1], np.uint64(0))) & mask


@compiled
def _arrange(text, end, lane, row, begin, out, out_end):
    """A stable sort by counting."""
    for i in range(lane.size):
        begin[lane[i] + 1] += 1
    for k in range(1, begin.size):
        begin[k] += begin[k - 1]
    for i in range(lane.size):
        row[i] = begin[lane[i]]
        begin[lane[i]] += 1
    for k in range(begin.size - 1, 0, -1):
        begin[k] = begin[k - 1]
    begin[0] = 0
    for i in range(lane.size):
        out_end[row[i] + 1] = end[i + 1] - end[i]
    for i in range(lane.size):
        out_end[i + 1] += out_end[i]
    for i in range(lane.size):
        at = out_end[row[i]]
        for j in range(end[i + 1] - end[i]):
            out[at + j] = text[end[i] + j]
