"""The side worker as a Faust app: intake service -> channel -> agent -> archive. Only wiring.

It reads the events topic in a consumer group of its own, so it neither waits for the updater nor
makes it wait. Micro-batches are parsed as they come and written together; their offsets are
committed once their segments are durable. What is no event is left to the updater, which sends it
to the dead-letter topic.
"""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import sys
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Final

from mode import Service

from model.errors import ModelError
from model.releases import current_name

from . import events as ev
from . import metrics
from .archive import Archive, Pending, open_store
from .errors import UserError
from .intake import Intake, MicroBatch, Slice
from .settings import ArchiveSettings, Settings
from .times import DAY_MS
from .topics import connect
from .updater_app import FaustWorker, UpdaterApp

log = logging.getLogger(__name__)

GROUP: Final = "trainer"
_GB: Final = 10**9
# The intake holds batches back until they are done, and they are done when they are written: so
# it must allow more of them than a flush holds. Large ones, gathered slowly, keep them few.
_BATCHES: Final = 40
_AHEAD: Final = 8
_BATCH_RECORDS: Final = 16_384
_GATHER_MS: Final = 500.0
_LOOK_S: Final = 0.1
_TIDY_EVERY_S: Final = 60.0
# A flush of events of months leaves a segment for each day or hour: who has nothing else to do
# merges them soon, and in steps, so that events which come meanwhile wait for a step at most.
_TIDY_IDLE_S: Final = 3.0
_RELEASE_EVERY_S: Final = 10.0
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
        self._flushed = (float("inf"), 0)  # the last flush: when, and what the latest was then

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
            or len(self._batches) >= _BATCHES
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
        """A partition in which nothing happens tells no time. But what was at its end after the
        last flush holds all of the time before that, by the events of the others: not by a wall
        clock, which tells nothing of a replay."""
        (flushed_s, latest_ms), before = self._flushed, self._reached_ms
        self._flushed = (time.monotonic(), self._latest_ms)
        today = frozenset[int]().union(*(batch.sources for batch in self._batches[-1:])) or before
        self._reached_ms = {
            source: max(before.get(source, 0), latest_ms)
            if at_end_s.get(source, float("-inf")) > flushed_s
            else before.get(source, 0)
            for source in today
        }
        if self._reached_ms != before:
            self._archive.note_reached(self._reached_ms)

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


class _Clock(Service):  # type: ignore[misc]
    """Calls `look` every so often."""

    def __init__(self, look: Callable[[], Awaitable[None]]) -> None:
        super().__init__()
        self._look = look

    @Service.task  # type: ignore[untyped-decorator]
    async def _tick(self) -> None:
        while not self.should_stop:
            await asyncio.sleep(_LOOK_S)
            await self._look()


class _Schedule(Service):  # type: ignore[misc]
    """Runs `penchant learn` every so often, as a process of its own: its memory is given back, and
    the archive is written while it computes. It yields to workers on the same machine."""

    def __init__(self, every_s: float, releases: Path) -> None:
        super().__init__()
        self._every_s = every_s
        self._releases = releases

    @Service.task  # type: ignore[untyped-decorator]
    async def _run(self) -> None:
        while not self.should_stop:
            await self.sleep(self._every_s)
            if not self.should_stop:
                await self._learn()

    async def _learn(self) -> None:
        before, begun_s = _live(self._releases), time.monotonic()
        learning = await asyncio.create_subprocess_exec(
            "nice", "-n", "10", sys.executable, "-m", "stream.cli", "learn",
            stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT,
            env=os.environ | {"OMP_WAIT_POLICY": "passive"},
        )  # fmt: skip
        try:
            said, _ = await learning.communicate()
        except asyncio.CancelledError:
            learning.terminate()  # a killed turn goes on where it was
            await learning.wait()
            raise
        for line in said.decode(errors="replace").splitlines():
            log.log(logging.WARNING if learning.returncode else logging.INFO, "learn: %s", line)
        outcome = "accepted" if _live(self._releases) != before else "rejected"
        metrics.LEARN_TURNS.labels("failed" if learning.returncode else outcome).inc()
        metrics.LEARN_LAST_S.set(time.monotonic() - begun_s)
        metrics.LEARN_ENDED_S.set_to_current_time()


def _live(releases: Path) -> str:
    """The id of the live release; "" where there is none."""
    try:
        return current_name(releases)
    except ModelError:
        return ""


def schedule(settings: Settings) -> tuple[Any, ...]:
    """The services that fine-tune as the settings say."""
    every_s = settings.learn.every_s
    return (_Schedule(every_s, settings.model.releases),) if every_s else ()


class Trainer:
    """One trainer process. It archives; what is to run beside that (fine-tuning on a schedule) is
    a Faust service in `services`, started after the intake and stopped before it."""

    def __init__(self, settings: Settings, services: tuple[Any, ...] = ()) -> None:
        """Lock the archive and look for the topic. Raises UserError."""
        topics = [settings.topic("events")]
        _, metadata = connect(settings.kafka)
        missing = [name for name in topics if name not in metadata.topics]
        if missing:
            raise UserError(f"no topic {', '.join(missing)}: run `penchant topics create`")
        try:
            self.archive = Archive(open_store(settings.archive.url), self._progressed)
            self._unlock: Callable[[], None] = self.archive.lock()
        except OSError as error:
            raise UserError(
                f"cannot use {settings.archive.url}: {error.strerror}; make it a folder that can "
                "be written to, or name another in ARCHIVE_URL"
            ) from error
        self._ingest = Ingest(
            self.archive, settings.archive, int(settings.stream.max_ahead_s * 1000)
        )
        self._thread = ThreadPoolExecutor(1, "archive")
        self._settings = settings
        self._release_seen_s = float("-inf")
        self.error: BaseException | None = None
        settings.stream.data_dir.mkdir(parents=True, exist_ok=True)
        self.app = UpdaterApp(
            settings.topic(GROUP),
            broker=f"kafka://{settings.kafka.bootstrap}",
            datadir=settings.stream.data_dir / "faust-trainer",
            store="memory://",
            web_enabled=False,
            topic_disable_leader=True,
            autodiscover=False,
        )
        self._channel = self.app.channel()
        stream = settings.stream.model_copy(
            update={
                "batch_records": _BATCH_RECORDS,
                "batch_deadline_ms": min(_GATHER_MS, settings.archive.flush_s * 1000),
                "buffered_batches": _BATCHES + _AHEAD,
            }
        )
        self.intake = Intake(
            settings.model_copy(update={"stream": stream}),
            topics,
            self._channel.put,
            self._failed,
            GROUP,
        )
        # Stopped in reverse: while the intake drains, something must write what it waits for.
        self.app.penchant_services = (_Clock(self.look), self.intake, *services)

        @self.app.agent(self._channel, name=GROUP)  # type: ignore[untyped-decorator]
        async def ingest(batches: Any) -> None:
            # As in the updater: nothing leaves the agent, a failure stops the process.
            async for batch in batches:
                try:
                    await self._take(batch)
                except Exception as error:
                    self._failed(error)
                    await asyncio.Event().wait()

    async def look(self) -> None:
        """Write what is due, or what the intake waits for."""
        try:
            await self._flush()
        except Exception as error:
            self._failed(error)

    def run(self) -> None:
        """Run until a signal; raises what made it stop otherwise."""
        worker = FaustWorker(
            self.app, loglevel="INFO", logging_config=None, override_logging=False,
            redirect_stdouts=False, quiet=True,
        )  # fmt: skip
        worker.spinner = None
        server = metrics.serve(self._settings.stream.metrics_port, self.live, self.ready)
        try:
            worker.execute_from_commandline()
        except SystemExit as stop:
            if stop.code and self.error is None:
                raise
        finally:
            if server is not None:
                server.stop()
            self._thread.shutdown()
            self._unlock()
        if self.error is not None:
            raise self.error

    def live(self) -> tuple[bool, str]:
        """Whether the consumer turns, and what it hands out gets written, or erased, in time."""
        # A batch rightly waits for its flush.
        stuck = self.intake.stuck(time.monotonic() - self._settings.archive.flush_s)
        return not stuck, stuck or "ok"

    def ready(self) -> tuple[bool, str]:
        """Whether the trainer holds partitions and has not failed."""
        if self.error is not None:
            return False, str(self.error)
        if not self.intake.assigned():
            return False, "no partitions assigned (yet, or another trainer has them)"
        return True, "ok"

    def _progressed(self) -> None:
        # Erasing a shopper reads the whole archive: long, and no reason to be restarted.
        self.intake.last_progress_s = time.monotonic()

    async def _take(self, batch: MicroBatch) -> None:
        begun = self.intake.begin(batch)
        metrics.BATCH_RECORDS.observe(begun.records)
        await self._call(lambda: self._ingest.take(begun))
        await self._flush()

    async def _flush(self) -> None:
        for batch in await self._call(self._written):
            self.intake.done(batch)

    def _written(self) -> list[MicroBatch]:
        """The batches that are durable now. On the archive's thread, so one at a time."""
        draining = self.intake.draining()
        at_end_s = self.intake.at_end_s()
        done = self._ingest.flush(at_end_s) if self._ingest.due() or draining else []
        if not draining:
            self._ingest.tidy()
            self._look_at_release()
        return done

    def _look_at_release(self) -> None:
        if time.monotonic() - self._release_seen_s > _RELEASE_EVERY_S:
            self._release_seen_s = time.monotonic()
            metrics.RELEASE.clear()
            if name := _live(self._settings.model.releases):
                metrics.RELEASE.labels(name).set(1)

    async def _call(self, work: Callable[[], Any]) -> Any:
        return await asyncio.wrap_future(self._thread.submit(work))

    def _failed(self, error: BaseException) -> None:
        """Remember the first failure and stop the process, in order."""
        if self.error is None:
            self.error = error
            self.intake.abort()
            os.kill(os.getpid(), signal.SIGTERM)
