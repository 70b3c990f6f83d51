"""Labelled windows -> what a training step reads.

PURE. All windows of a shopper overlap, so a row of N consecutive events trains N windows at
once. Cuts shoppers into rows, says what each position should have predicted, keeps the
newest slice apart, and plans batches. Knows nothing of networks.
"""

from __future__ import annotations

from dataclasses import dataclass
from hashlib import blake2b

import numpy as np
import numpy.typing as npt

from .windows import Labelled

Ints = npt.NDArray[np.int64]
Int32s = npt.NDArray[np.int32]
Floats = npt.NDArray[np.float32]
Bools = npt.NDArray[np.bool_]


@dataclass(frozen=True)
class Targets:
    """What follows each event: the shopper's next positive item events, all of one instant.

    The lines of an invoice share their time, so what follows a line is the next invoice and
    not the next line: their order says nothing, and a shopper is never asked in between.
    """

    item: Int32s  # (p,) items of all positive item events, by user and time
    t_ms: Ints  # (p,)
    weight: Floats  # (p,) of the events, above 0
    first: Ints  # (m,) targets of event e are item[first[e]:stop[e]]; first = stop: none
    stop: Ints  # (m,)

    def before(self, cut_ms: int) -> Bools:
        """Events (m,) with a target earlier than `cut_ms`."""
        return self._known() & (self._time() < cut_ms)

    def since(self, cut_ms: int) -> Bools:
        """Events (m,) with a target at `cut_ms` or later."""
        return self._known() & (self._time() >= cut_ms)

    def _known(self) -> Bools:
        return np.asarray(self.first < self.stop)

    def _time(self) -> Ints:
        if not len(self.t_ms):
            return np.zeros(len(self.first), dtype=np.int64)
        return self.t_ms[np.minimum(self.first, len(self.t_ms) - 1)]


@dataclass(frozen=True)
class Rows:
    """k rows of consecutive events of one shopper each."""

    first: Ints  # (k,) position of a row's first event
    length: Ints  # (k,)


def owners(windows: Labelled) -> Ints:
    """The user (m,) of each event, as a number."""
    return np.repeat(np.arange(len(windows.user)), np.diff(windows.start))


def stopping(windows: Labelled) -> Bools:
    """(u,) half of the users, by their ids: those whose newest windows decide when a training
    stops. The others judge what came of it; best of several epochs on the very windows that it
    is judged by would look better than it is."""
    digests = (blake2b(user.encode(), digest_size=1).digest()[0] for user in windows.user)
    return np.fromiter(digests, np.uint8, len(windows.user)) < 128


def find_targets(windows: Labelled) -> Targets:
    """The targets of every event. Needs each user's events in time order."""
    user = owners(windows)
    positive = np.flatnonzero((windows.item >= 0) & (windows.weight > 0))
    # One number that orders by user, then time: times are made small ranks first.
    _, rank = np.unique(windows.t_ms, return_inverse=True)
    span = int(rank.max()) + 2 if len(rank) else 1
    key = user * span + rank  # (m,) ascending
    later = np.searchsorted(key[positive], key, side="right")  # first positive after this instant
    inside = np.minimum(later, max(len(positive) - 1, 0))
    same = later < len(positive)
    if len(positive):
        same &= user[positive[inside]] == user
        end = np.searchsorted(key[positive], key[positive[inside]], side="right")
    else:
        end = later
    return Targets(
        item=windows.item[positive].astype(np.int32),
        t_ms=windows.t_ms[positive],
        weight=windows.weight[positive],
        first=later,
        stop=np.where(same, end, later),
    )


def asked_at(windows: Labelled) -> Bools:
    """Events (m,) after which a shopper would be asked: the last of an instant."""
    user = owners(windows)
    last = np.ones(len(user), dtype=bool)
    last[:-1] = (user[1:] != user[:-1]) | (windows.t_ms[1:] != windows.t_ms[:-1])
    return last


def cut_rows(windows: Labelled, useful: Bools, events: int, rng: np.random.Generator) -> Rows:
    """Cut each user into rows of at most `events` events, at another place in every epoch.

    A row without any `useful` event is left out, and nothing follows a row's last useful one.
    """
    if not useful.any():
        return Rows(np.zeros(0, dtype=np.int64), np.zeros(0, dtype=np.int64))
    count = np.diff(windows.start)
    # The first row is short by a random part, or the same events would always lack their past.
    lead = np.where(count > events, rng.integers(0, events, len(count)), 0)
    pieces = -(-(count + lead) // events)
    user = np.repeat(np.arange(len(count)), pieces)
    piece = np.arange(len(user)) - np.repeat(np.cumsum(pieces) - pieces, pieces)
    first = np.maximum(piece * events - lead[user], 0) + windows.start[user]
    stop = np.minimum((piece + 1) * events - lead[user], count[user]) + windows.start[user]
    at = np.flatnonzero(useful)
    last = np.searchsorted(at, stop) - 1  # the last useful event before `stop`
    stop = np.where(last >= 0, at[np.maximum(last, 0)] + 1, 0)
    kept = stop > first
    return Rows(first[kept], (stop - first)[kept])


def plan_rows(rows: Rows, batch_events: int, rng: np.random.Generator) -> list[Ints]:
    """Batches of row numbers: rows of like length, at most `batch_events` positions, shuffled."""
    order = np.lexsort((rng.random(len(rows.length)), rows.length))[::-1]
    batches, start = [], 0
    while start < len(order):
        size = max(batch_events // int(rows.length[order[start]]), 1)
        batches.append(order[start : start + size])
        start += size
    return [batches[i] for i in rng.permutation(len(batches))]


def windows_ending_at(windows: Labelled, ends: Ints, events: int) -> tuple[Ints, Ints]:
    """First event and length (k,) of the window that ends with each of `ends` (k,)."""
    user = np.searchsorted(windows.start, ends, side="right") - 1
    first = np.maximum(windows.start[user], ends + 1 - events)
    return first, ends + 1 - first
