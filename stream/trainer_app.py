"""The side worker as a Faust app: intake service -> channel -> agent -> archive. Only wiring.

It reads the events topic in a consumer group of its own, so it neither waits for the updater nor
makes it wait. Micro-batches are parsed as they come and written together (`ingest.py`); their
offsets are committed once their segments are durable.
"""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import sys
import time
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Final

from mode import Service

from model.errors import ModelError
from model.releases import current_name, decisions

from . import metrics
from .archive import Archive, open_store
from .errors import UserError
from .ingest import BATCHES, Ingest
from .intake import Intake, MicroBatch
from .settings import Settings
from .topics import connect
from .updater_app import FaustWorker, UpdaterApp

log = logging.getLogger(__name__)

GROUP: Final = "trainer"
# The intake holds batches back until they are done, and they are done when they are written: so
# it must allow more of them than a flush holds. Large ones, gathered slowly, keep them few.
_AHEAD: Final = 8
_BATCH_RECORDS: Final = 16_384
_GATHER_MS: Final = 500.0
_LOOK_S: Final = 0.1
_RELEASE_EVERY_S: Final = 10.0
_OUTCOMES: Final = {"accept": "accepted", "reject": "rejected", "held": "held"}


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
        begun_s = time.monotonic()
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
        metrics.LEARN_TURNS.labels(outcome_of(learning.returncode, self._releases)).inc()
        metrics.LEARN_LAST_S.set(time.monotonic() - begun_s)
        metrics.LEARN_ENDED_S.set_to_current_time()


def outcome_of(code: int | None, releases: Path) -> str:
    """Of the turn that ended just now, as the metric names it."""
    if code:
        return "failed"
    last = decisions(releases)[-1:]
    return _OUTCOMES.get(last[0].get("decision", ""), "failed") if last else "failed"


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
                "buffered_batches": BATCHES + _AHEAD,
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
