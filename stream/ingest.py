"""Micro-batches of the events topic -> the archive, and what the trainer puts down about them.

Knows events, the archive and metrics; does not know Kafka's consumer (`intake.py`) or Faust. What
is no event is counted and left to the updater, which sends it to the dead-letter topic.
"""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Mapping, Sequence
from typing import Final

from . import events as ev
from . import metrics
from .archive import Archive, Pending
from .intake import MicroBatch, Slice
from .settings import ArchiveSettings
from .times import DAY_MS

log = logging.getLogger(__name__)

BATCHES: Final = 40
"""Micro-batches that a flush holds at most."""
_FLUSHES: Final = 64  # remembered: ends of partitions are a second or two old when they are told
_GB: Final = 10**9
_TIDY_EVERY_S: Final = 60.0
# A flush of events of months leaves a segment for each day or hour: who has nothing else to do
# merges them soon, and in steps, so that events which come meanwhile wait for a step at most.
_TIDY_IDLE_S: Final = 3.0
_TIDY_STEP: Final = 200  # segments; a second or so on a disk


class Ingest:
    """Micro-batches -> archive. One thread at a time."""

    def __init__(self, archive: Archive, settings: ArchiveSettings, max_ahead_ms: int) -> None:
        self._archive = archive
        self._settings = settings
        self._max_ahead_ms = max_ahead_ms
        self._pending: dict[tuple[str, int, int], Pending] = {}
        self._batches: list[MicroBatch] = []
        self._rows = 0
        self._since_s = time.monotonic()
        self._tidied_s = time.monotonic()
        self._taken_s = time.monotonic()
        self._untidy = True  # what a process that died left
        self._told: set[str] = set()  # reasons of rejects
        self._reached_ms = archive.reached()
        self._latest_ms = 0  # of what was taken
        # The last flushes: when (monotonic), and what the latest was then.
        self._flushes: deque[tuple[float, int]] = deque(maxlen=_FLUSHES)

    @property
    def waiting(self) -> int:
        """Micro-batches taken and not yet durable."""
        return len(self._batches)

    def take(self, batch: MicroBatch) -> None:
        """Parse a micro-batch and keep its events for the next flush."""
        self._taken_s = time.monotonic()
        if not self._batches:
            self._since_s = self._taken_s
        self._batches.append(batch)
        # A clock that is ahead does not tell what time it is in the shop.
        believed_ms = time.time_ns() // 1_000_000 + self._max_ahead_ms
        for piece in batch.slices:
            # Not by this process's clock: what another clock let into a profile belongs here, and
            # what is taken now is not read again. Whoever reads the archive looks at a clock.
            parsed = ev.parse(piece.values, piece.timestamps_ms, self._max_ahead_ms)
            self._reject(piece, parsed.rejects)
            key = (piece.topic, piece.partition, piece.epoch)
            pending = self._pending.get(key)
            if pending is None:
                first = piece.offsets[0]
                pending = Pending(piece.source, piece.partition, first, first)
                self._pending[key] = pending
            offsets = [piece.offsets[i] for i in parsed.index]
            until_ms = [piece.timestamps_ms[i] + self._max_ahead_ms for i in parsed.index]
            pending.add(offsets, parsed.events, piece.next_offset, until_ms)
            self._rows += len(parsed.events)
            times_ms = (event.ts for event in parsed.events if event.ts <= believed_ms)
            self._latest_ms = max(self._latest_ms, max(times_ms, default=0))

    def _reject(self, piece: Slice, rejects: Sequence[ev.Rejected]) -> None:
        for reject in rejects:
            metrics.ARCHIVE_REJECTED.labels(reject.reason).inc()
            if reject.reason not in self._told:
                self._told.add(reject.reason)
                log.warning(
                    "%s[%d] at %d is not archived (%s): %s. Told once for each reason; the updater "
                    "sends such records to the dead-letter topic",
                    piece.topic, piece.partition, piece.offsets[reject.index],
                    reject.reason, reject.detail,
                )  # fmt: skip

    def due(self) -> bool:
        """Whether there is enough, or it has waited long enough."""
        settings, waited_s = self._settings, time.monotonic() - self._since_s
        return bool(self._batches) and (
            self._rows >= settings.flush_rows
            or waited_s >= settings.flush_s
            or len(self._batches) >= BATCHES
        )

    def flush(self, at_end_s: Mapping[int, float]) -> list[MicroBatch]:
        """Write what waits; the micro-batches that are durable now. at_end_s: source -> when
        (monotonic) all that its partition held was durable."""
        metrics.EVENTS_ARCHIVED.inc(self._archive.write(*self._pending.values()))
        self._untidy |= bool(self._pending)
        self._note_reached(at_end_s)
        done, self._batches = self._batches, []
        self._pending, self._rows = {}, 0
        return done

    def _note_reached(self, at_end_s: Mapping[int, float]) -> None:
        """A partition in which nothing happens tells no time. But what was at its end after a
        flush holds all of the time before that, by the events of the others: not by a wall clock,
        which tells nothing of a replay."""
        before = self._reached_ms
        today = frozenset[int]().union(*(batch.sources for batch in self._batches[-1:])) or before
        self._reached_ms = {
            source: max(before.get(source, 0), self._latest_before(at_end_s.get(source, 0.0)))
            for source in today
        }
        self._flushes.append((time.monotonic(), self._latest_ms))
        if self._reached_ms != before:
            self._archive.note_reached(self._reached_ms)

    def _latest_before(self, at_s: float) -> int:
        return next((ms for flushed_s, ms in reversed(self._flushes) if flushed_s < at_s), 0)

    def tidy(self) -> None:
        """Once in a while, and when idle: retention by age and size, and a step of merging small
        segments."""
        now_s = time.monotonic()
        waits = now_s - self._tidied_s < _TIDY_EVERY_S and now_s - self._taken_s < _TIDY_IDLE_S
        if not self._untidy or waits:
            return
        settings = self._settings
        expired = self._archive.expire(
            int(settings.retention_days * DAY_MS),
            int(settings.max_gb * _GB),
            time.time_ns() // 1_000_000 + self._max_ahead_ms,
        )
        saved = self._archive.compact(_TIDY_STEP)
        if expired or saved:
            log.info("archive: %d segments expired, %d merged away", expired, saved)
        sizes = self._archive.segments()
        metrics.ARCHIVE_SEGMENTS.set(len(sizes))
        metrics.ARCHIVE_BYTES.set(sum(sizes.values()))
        metrics.ARCHIVE_DAMAGED.set(len(self._archive.set_aside()))
        if saved < _TIDY_STEP:
            self._untidy, self._tidied_s = False, time.monotonic()
