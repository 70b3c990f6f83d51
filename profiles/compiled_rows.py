"""The compiled half of `cache.py`: a shelf of slots of one size, found by the hash of an id.

PURE, and without the interpreter's lock. Nothing here makes an array, see `compiled.py`.
"""

from __future__ import annotations

from typing import Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from .compiled import Bytes, Ints, compiled, copied, inlined, inner

# Of `Shelf.counts`.
OLDEST, NEWEST, FREE, USED, HELD = range(5)
NONE: Final = -1


class Shelf(NamedTuple):
    """Room for as many ids as `hashes` has entries, each with a state and a fence."""

    table: Ints  # a slot or NONE; open addressing, never more than half full
    hashes: NDArray[np.uint64]  # of the slots' ids
    older: Ints  # slot -> the one that was put before it; or the next free one
    newer: Ints
    sizes: Ints  # (slots, 3) bytes of id, state and fence, which stand in this order
    bytes: Bytes
    counts: Ints
    stride: int  # bytes of a slot
    seed: np.uint64  # of the hashes: who chooses ids shall not choose where they stand


@inlined
def hashed(text, begin, end, seed):
    """FNV-1a, mixed once more for its lower bits."""
    mixed = np.uint64(0xCBF29CE484222325) ^ seed
    for j in range(begin, end):
        mixed = (mixed ^ np.uint64(text[j])) * np.uint64(0x100000001B3)
    return mixed ^ (mixed >> np.uint64(32))


@inlined
def same(a, begin, b, first, size):
    i = 0
    while i < size and a[begin + i] == b[first + i]:
        i += 1
    return i == size


@inner
def _place(shelf, mixed, text, begin, size):
    """Where in the table the id is, or would be."""
    mask = np.uint64(shelf.table.size - 1)
    place = mixed & mask
    while True:
        slot = shelf.table[place]
        if slot == NONE or (
            shelf.hashes[slot] == mixed
            and shelf.sizes[slot, 0] == size
            and same(shelf.bytes, slot * shelf.stride, text, begin, size)
        ):
            return place
        place = (place + np.uint64(1)) & mask


@inner
def _take_out(shelf, place):
    """The slot at this place of the table is free from here on."""
    table, counts = shelf.table, shelf.counts
    mask = np.uint64(table.size - 1)
    slot = table[place]
    older, newer = shelf.older[slot], shelf.newer[slot]
    if older == NONE:
        counts[OLDEST] = newer
    else:
        shelf.newer[older] = newer
    if newer == NONE:
        counts[NEWEST] = older
    else:
        shelf.older[newer] = older
    shelf.older[slot] = counts[FREE]
    counts[FREE] = slot
    counts[HELD] -= 1
    # Those behind it that were pushed away from their places move up.
    hole = place
    place = (place + np.uint64(1)) & mask
    while table[place] != NONE:
        wanted = shelf.hashes[table[place]] & mask
        if ((place - wanted) & mask) >= ((place - hole) & mask):
            table[hole] = table[place]
            hole = place
        place = (place + np.uint64(1)) & mask
    table[hole] = NONE


@compiled
def locate(shelf, text, end, slots, state_at, fence_at):
    """Which slots n ids are in, and where their rows would stand in one buffer; its length."""
    length = 0
    for i in range(end.size - 1):
        begin, size = end[i], end[i + 1] - end[i]
        place = _place(shelf, hashed(text, begin, begin + size, shelf.seed), text, begin, size)
        slots[i] = slot = shelf.table[place]
        state_n, fence_n = 0, 0
        if slot != NONE:
            state_n, fence_n = shelf.sizes[slot, 1], shelf.sizes[slot, 2]
        state_at[i, 0], state_at[i, 1] = length, length + state_n
        length += state_n
        fence_at[i, 0], fence_at[i, 1] = length, length + fence_n
        length += fence_n
    return length


@compiled
def take(shelf, slots, state_at, out):
    """Move what `locate` found into the buffer. No id twice."""
    mask = np.uint64(shelf.table.size - 1)
    for i in range(slots.size):
        slot = slots[i]
        if slot == NONE:
            continue
        id_n, state_n, fence_n = shelf.sizes[slot]
        copied(out, state_at[i, 0], shelf.bytes, slot * shelf.stride + id_n, state_n + fence_n)
        place = shelf.hashes[slot] & mask
        while shelf.table[place] != slot:
            place = (place + np.uint64(1)) & mask
        _take_out(shelf, place)


@compiled
def put(shelf, text, end, which, source, state_at, fence_at):
    """Keep the rows of these of the ids, as the newest; the oldest make room."""
    table, counts = shelf.table, shelf.counts
    slots = shelf.hashes.size
    for i in which:
        begin, id_n = end[i], end[i + 1] - end[i]
        state_n = state_at[i, 1] - state_at[i, 0]
        fence_n = fence_at[i, 1] - fence_at[i, 0]
        mixed = hashed(text, begin, begin + id_n, shelf.seed)
        place = _place(shelf, mixed, text, begin, id_n)
        if table[place] != NONE:
            _take_out(shelf, place)
        if id_n + state_n + fence_n > shelf.stride or slots == 0:
            continue
        if counts[FREE] == NONE and counts[USED] == slots:
            oldest = counts[OLDEST]
            place = shelf.hashes[oldest] & np.uint64(table.size - 1)
            while table[place] != oldest:
                place = (place + np.uint64(1)) & np.uint64(table.size - 1)
            _take_out(shelf, place)
        slot = counts[FREE]
        if slot == NONE:
            slot = counts[USED]
            counts[USED] += 1
        else:
            counts[FREE] = shelf.older[slot]
        # Sought again: what was taken out may have moved others.
        table[_place(shelf, mixed, text, begin, id_n)] = slot
        shelf.hashes[slot] = mixed
        shelf.sizes[slot, 0], shelf.sizes[slot, 1], shelf.sizes[slot, 2] = id_n, state_n, fence_n
        at = copied(shelf.bytes, slot * shelf.stride, text, begin, id_n)
        at = copied(shelf.bytes, at, source, state_at[i, 0], state_n)
        copied(shelf.bytes, at, source, fence_at[i, 0], fence_n)
        shelf.older[slot], shelf.newer[slot] = counts[NEWEST], NONE
        if counts[NEWEST] == NONE:
            counts[OLDEST] = slot
        else:
            shelf.newer[counts[NEWEST]] = slot
        counts[NEWEST] = slot
        counts[HELD] += 1
