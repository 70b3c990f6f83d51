"""Computes what may come next of the shoppers whose profiles were just saved, beside the fold.

The updater leaves their names in a queue, which takes each once and only so many; a thread of its
own reads the profiles as they are by then, asks the live release, and writes the outlooks beside
them, if they are still the same. Nothing else depends on it: whoever does not fit, or was in the
queue when the worker ended, keeps an older outlook until they act again.

On a GPU that costs little. On a CPU, 64 windows take as long as the fold of a micro-batch, so there
the thread rests after each batch: see `Pace`. It has the lowest priority that a thread may have.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from itertools import islice
from typing import Final

import numpy as np
import torch

from profiles import outlook
from profiles.arithmetic import Floats, Profiles, read_fence_header, take
from profiles.errors import ProfilesError, RedisUnavailable
from profiles.schema import WINDOW_ENTRY
from profiles.store import ProfileStore

from . import metrics
from .catalogue import Catalogue
from .window_rows import window_rows

log = logging.getLogger(__name__)

# Windows at a time: one pass of the encoder.
_BATCH_ON_CPU: Final = 64
_BATCH_ON_GPU: Final = 1024
_RETRY_S: Final = 2.0
_LOOKS_UP_S: Final = 0.2
_LOOKED_BACK_S: Final = 1.0
_NICENESS: Final = 19  # whoever waits for an event goes first, brokers and Redis beside it too


class Waiting:
    """Shoppers in the order in which they first waited, each once. Any thread may ask."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._users: dict[str, None] = {}
        self._changed = threading.Condition()

    def __len__(self) -> int:
        return len(self._users)

    def add(self, users: Sequence[str], places: float = 1.0) -> None:
        """Whoever does not wait yet, as far as there is room; the rest are counted as left out.
        places: the share of all that may be taken in the end."""
        with self._changed:
            waiting = self._users
            new = [user for user in users if user not in waiting]
            room = max(0, int(self._most * places) - len(waiting))
            waiting.update(dict.fromkeys(new[:room]))
            self._changed.notify()
        metrics.OUTLOOKS_LEFT_OUT.inc(max(0, len(new) - room))
        metrics.OUTLOOKS_WAITING.set(len(waiting))

    def take(self, most: int, wait_s: float) -> list[str]:
        """Up to `most` of those who waited longest; none after `wait_s` without any."""
        with self._changed:
            self._changed.wait_for(lambda: self._users, wait_s)
            users = list(islice(self._users, most))
            for user in users:
                del self._users[user]
        metrics.OUTLOOKS_WAITING.set(len(self._users))
        return users


class Pace:
    """How long to rest so that `share` of a core is what is spent while the fold is busy, and
    together with the fold one core otherwise. Knows no clock."""

    def __init__(self, share: float) -> None:
        self._share = share
        self._seen: tuple[float, float] | None = None
        self._busy = 1.0

    def rest_s(self, spent_s: float, took_s: float, now_s: float, fold_s: float) -> float:
        """After a batch that spent `spent_s` of a core in `took_s`; fold_s: how long the fold has
        been at work, ever, at `now_s`."""
        if self._seen is None:
            self._seen = now_s, fold_s
        then_s, before_s = self._seen
        if now_s - then_s >= _LOOKED_BACK_S:
            self._busy = min(1.0, (fold_s - before_s) / (now_s - then_s))
            self._seen = now_s, fold_s
        return max(0.0, spent_s / max(self._share, 1.0 - self._busy) - took_s)


class Outlooks:
    """One worker's, on a thread of its own."""

    def __init__(
        self,
        waiting: Waiting,
        store: ProfileStore,
        catalogue: Callable[[], Catalogue],
        fold_s: Callable[[], float],
        failed: Callable[[BaseException], None],
        *,
        share: float,
    ) -> None:
        """`store` is not shared, and remembers nothing. `catalogue` gives the one that serves,
        `fold_s` how long the fold has been at work; `failed` is told what ends the thread."""
        self._waiting = waiting
        self._store = store
        self._catalogue = catalogue
        self._fold_s = fold_s
        self._failed = failed
        self._pace = Pace(share)
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, name="outlooks", daemon=True)

    def start(self) -> None:
        """Compute until `stop`."""
        self._thread.start()

    def stop(self, wait_s: float = 1.0) -> None:
        """Stop after the batch in hand; whoever waits keeps the outlook they have."""
        self._ended.set()
        if self._thread.is_alive():
            self._thread.join(wait_s)

    def _run(self) -> None:
        with suppress(OSError, AttributeError):  # a courtesy, where the system has it
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _NICENESS)
        try:
            while not self._ended.is_set():
                self._turn()
        except Exception as error:
            self._failed(error)

    def _turn(self) -> None:
        device = self._catalogue().engine.device.type
        users = self._waiting.take(_BATCH_ON_CPU if device == "cpu" else _BATCH_ON_GPU, _LOOKS_UP_S)
        if not users:
            return
        catalogue = self._catalogue()  # now: whoever waits may wait because it is another
        began_s, spent_s = time.monotonic(), time.thread_time()
        try:
            self.compute(users, catalogue)
        except RedisUnavailable:
            self._waiting.add(users)
            self._ended.wait(_RETRY_S)
        except ProfilesError as error:
            log.warning("%d outlooks are not computed: %s", len(users), error)
        if device == "cpu":
            # This thread's time, and as much at most on each other thread that torch takes for it.
            self._rest(began_s, (time.thread_time() - spent_s) * torch.get_num_threads())

    def _rest(self, began_s: float, spent_s: float) -> None:
        """Until the pace allows for the next batch; the fold may come to rest meanwhile."""
        while not self._ended.is_set():
            now_s = time.monotonic()
            rest_s = self._pace.rest_s(spent_s, now_s - began_s, now_s, self._fold_s())
            if not rest_s:
                return
            self._ended.wait(min(rest_s, _LOOKED_BACK_S))

    def compute(self, users: Sequence[str], catalogue: Catalogue) -> None:
        """Outlooks of these users, as far as their profiles live in the catalogue's space: the
        others are moved there, or this worker is behind and another computes them. Raises
        RedisUnavailable and what the profiles' state may raise."""
        foreteller = catalogue.engine.foreteller
        if foreteller is None:
            return
        profiles = self._store.load(users)
        here = profiles.header["space"] == catalogue.space
        rows = [row for row in np.flatnonzero(here).tolist() if profiles.window[row]]
        if not rows:
            return
        users, profiles = [users[row] for row in rows], take(profiles, rows)

        def vectors_of(items: list[int]) -> Floats:
            return catalogue.resolve(items, {}).vectors

        foretold = foreteller(*window_rows(_windows(profiles), foreteller.events, vectors_of))
        fields = outlook.encode(
            foretold.next_interest,
            foretold.heads,
            catalogue.engine.release.id,
            catalogue.space,
            [read_fence_header(fence)[0] for fence in profiles.fences],
            profiles.header["updated_ms"].tolist(),
            int(time.time() * 1000),
        )
        refused = self._store.put_outlooks(users, profiles.fences, fields)
        metrics.OUTLOOKS_COMPUTED.inc(len(users) - len(refused))
        metrics.OUTLOOKS_OVERTAKEN.inc(len(refused))


def _windows(profiles: Profiles) -> list[np.ndarray]:
    return [np.frombuffer(raw, dtype=WINDOW_ENTRY) for raw in profiles.window]
