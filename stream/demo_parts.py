"""The parts of the demo, started in order and stopped in the reverse: Redis, broker, topics,
base release, worker, replay.

It knows how each is started and when it is ready. It does not know what is watched, or drawn.
"""

from __future__ import annotations

import os
import shutil
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final, Literal, Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from profiles import ProfileReader

from .base_release import build, build_live, texts_of
from .datasets import Dataset, load
from .demo_signals import Signals
from .demo_watch import Crowd, Sample, answer, parse_sample
from .errors import UserError
from .events import Event, Item
from .local_stack import RedisServer, ServerRecord, Stack, Tansu, set_aside, status
from .processes import ServerProcess, free_port
from .producer import EventProducer
from .replay import Plan, Replay
from .settings import KafkaSettings, RedisSettings, Settings
from .topics import create_topics

if TYPE_CHECKING:
    from .local_servers import LocalServer

_POLL_S: Final = 0.2
_READY_S: Final = 120.0
_JOIN_S: Final = 5.0
# The worker drains for STREAM_DRAIN_S, and then leaves its group and ends.
_WORKER_GRACE_S: Final = 10.0
# Tansu lets a group wait for half of its session timeout before it assigns partitions.
_SESSION_S: Final = 6.0
# What a worker may need of this process' environment; all else is in its settings.
_PASSED_ON: Final = ("PATH", "HOME", "TMPDIR", "PYTHONPATH", "LD_LIBRARY_PATH", "OMP_NUM_THREADS")
# Learning by the clock of a demo: a day of events goes by in a second.
_LEARN_EVERY_S: Final = 20.0
_FLUSH_S: Final = 2.0
_WATCH_S: Final = 0.5
_FROM_THE_DEMO: Final = "from-the-demo"


class Steps:
    """The steps of the start-up: bars on a terminal, a line each elsewhere."""

    def __init__(self, console: Console, *, with_bars: bool) -> None:
        self._console = console
        self._bars = Progress(
            TextColumn("{task.description}"), BarColumn(24), MofNCompleteColumn(),
            TimeElapsedColumn(), console=console, refresh_per_second=4, disable=not with_bars,
        )  # fmt: skip

    def __enter__(self) -> Self:
        self._bars.start()
        return self

    def __exit__(self, *failure: object) -> None:
        self._bars.stop()

    @contextmanager
    def step(self, what: str) -> Iterator[Callable[[int, int], None]]:
        """Yields report(done, total), for steps that can tell."""
        began_s = time.monotonic()
        task = self._bars.add_task(what, total=None)
        yield lambda done, total: self._bars.update(task, completed=done, total=total)
        total = self._bars.tasks[task].total or 1
        self._bars.update(task, completed=total, total=total)
        if self._bars.disable:
            self._console.print(f"{what}: {time.monotonic() - began_s:.1f} s", highlight=False)


class Feed(threading.Thread):
    """The replay on a thread of its own. It is also its own sink: between the catalogue and
    the first event it waits for `begin`, so that figures are of events alone."""

    def __init__(self, dataset: Dataset, settings: Settings, plan: Plan, crowd: Crowd) -> None:
        super().__init__(name="replay", daemon=True)
        self._producer = EventProducer(settings.kafka.client_config(), settings.namespace)
        self._replay = Replay(dataset, self, plan)
        self._crowd = crowd
        self.begin = threading.Event()
        self.error: Exception | None = None

    def run(self) -> None:
        """Send everything, or until `end`."""
        try:
            self._replay.run()
        except Exception as error:
            self.error = error

    def end(self) -> None:
        """Stop after the event in hand, and wait for that."""
        self._replay.stop()
        self.begin.set()
        if self.is_alive():
            self.join(_JOIN_S)

    def send(self, event: Event) -> None:
        """As EventProducer does, and noted."""
        self._producer.send(event)
        self._crowd.note(event, time.monotonic())

    def send_item(self, item: Item) -> None:
        """As EventProducer does."""
        self._producer.send_item(item)

    def flush(self) -> None:
        """As EventProducer does; and nothing follows before `begin`."""
        self._producer.flush()
        self.begin.wait()


@dataclass(frozen=True)
class Parts:
    """What the demo is made of once it has started."""

    releases: Path
    trainer_log: Path
    dataset: Dataset
    processes: tuple[ServerProcess, ...]
    metrics_url: str
    reader: ProfileReader
    crowd: Crowd
    feed: Feed

    def check(self) -> None:
        """Raises what went wrong in any part."""
        for process in self.processes:
            if not process.alive:
                raise process.failure("ended while the demo was running")
        if self.feed.error is not None:
            raise self.feed.error

    def sample(self) -> Sample | None:
        """The worker's metrics now; None if it does not answer just now."""
        code, body = answer(f"{self.metrics_url}/metrics")
        return parse_sample(body, time.monotonic()) if code == 200 else None


def start(
    settings: Settings,
    plan: Plan,
    steps: Steps,
    signals: Signals,
    running: ExitStack,
    *,
    learn: bool = False,
) -> tuple[Parts, Sample]:
    """Start everything; `running` stops it again. Returns once the catalogue is in, with the
    worker's metrics at that moment: what comes after it comes of events. `learn`: with a
    trainer, and releases of the demo's own.

    Raises Stopped, UserError, and what the parts raise.
    """
    folder = settings.stream.data_dir
    with signals.heeded(), steps.step("reading the data set"):
        dataset = load("movielens")
    with steps.step("starting Redis, broker and topics"):
        own, servers = _servers(settings, running)
    if learn:
        own = _with_own_releases(own, dataset, steps, signals)
    else:
        _build_release_if_missing(own, dataset, steps, signals)
    with steps.step("starting the worker"):
        worker = _worker(own, folder / "demo" / "updater.log")
        running.callback(worker.stop, _WORKER_GRACE_S + own.stream.drain_s)
        worker.start()
        url = f"http://127.0.0.1:{own.stream.metrics_port}"
        _await_ready(worker, f"{url}/healthz/ready", signals)
    processes = (*servers, worker)
    trainer_log = folder / "demo" / "trainer.log"
    if learn:
        trainer = _trainer(own, trainer_log)
        running.callback(trainer.stop, _WORKER_GRACE_S + own.stream.drain_s)
        trainer.start()
        processes += (trainer,)
    crowd = Crowd()
    feed = Feed(dataset, own, plan, crowd)
    running.callback(feed.end)
    reader = running.enter_context(ProfileReader(own.redis.connection(), own.namespace))
    parts = Parts(own.model.releases, trainer_log, dataset, processes, url, reader, crowd, feed)
    return parts, _send_catalogue(parts, steps, signals)


# --- broker, Redis, topics -----------------------------------------------------------------


def _servers(settings: Settings, running: ExitStack) -> tuple[Settings, tuple[ServerProcess, ...]]:
    """A broker and a Redis on free ports, and the settings that name them."""
    for record in status(settings).records().values():
        if record.running:
            raise UserError(
                f"a stack runs here already ({record.kind} at {record.address}): end it with "
                "`penchant down`, or with Ctrl-C if it is another demo's"
            )
    folder = settings.stream.data_dir / "stack"
    redis = running.enter_context(RedisServer(_empty_redis_folder(folder), appendonly=True))
    tansu = Tansu(folder / "tansu").start()
    # Killed: it keeps nothing, and it does not react to SIGTERM while clients are connected.
    running.callback(tansu.kill)
    running.enter_context(_on_record(settings, tansu, redis))
    own = settings.model_copy(
        update={
            "kafka": KafkaSettings(bootstrap=tansu.bootstrap, session_timeout_s=_SESSION_S),
            "redis": RedisSettings(url=redis.url),
            "stream": settings.stream.model_copy(update={"metrics_port": free_port()}),
        }
    )
    create_topics(own)
    return own, (*redis.processes, *tansu.processes)


def _empty_redis_folder(stack: Path) -> Path:
    """The folder that `penchant up` will use: the profiles outlive the demo there. What an
    earlier demo left is deleted, what somebody else left is set aside."""
    folder = stack / "redis"
    if (folder / _FROM_THE_DEMO).exists():
        shutil.rmtree(folder)
    else:
        set_aside(folder)
    folder.mkdir(parents=True)
    (folder / _FROM_THE_DEMO).touch()
    return folder


@contextmanager
def _on_record(settings: Settings, tansu: Tansu, redis: RedisServer) -> Iterator[None]:
    """Lets commands in other terminals find these servers, as those of `penchant up`."""
    stack = Stack(
        kafka=_record(tansu, "tansu", tansu.bootstrap), redis=_record(redis, "bundled", redis.url)
    )
    path = settings.stream.data_dir / "stack.json"
    path.write_text(stack.model_dump_json(indent=2) + "\n", encoding="utf-8")
    try:
        yield
    finally:
        path.unlink(missing_ok=True)


def _record(server: LocalServer, kind: Literal["tansu", "bundled"], address: str) -> ServerRecord:
    return ServerRecord(
        kind=kind,
        address=address,
        version=server.version,
        logs=tuple(process.log for process in server.processes),
        processes=tuple(process.identity for process in server.processes if process.identity),
    )


# --- release and worker --------------------------------------------------------------------


def _build_release_if_missing(
    settings: Settings, dataset: Dataset, steps: Steps, signals: Signals
) -> None:
    model = settings.model
    if (model.releases / "CURRENT").exists():  # whether it is sound, the worker will say
        return
    with signals.heeded(), steps.step("building the base release") as report:
        build_live(model, texts_of(dataset.items), report, _ids_of(dataset))


def _with_own_releases(
    settings: Settings, dataset: Dataset, steps: Steps, signals: Signals
) -> Settings:
    """Settings to learn by: releases and an archive of the demo's own, so that what it learns of
    films serves no shop, and a fine-tune every so often. It begins with the base release."""
    from model.releases import load as load_release
    from model.releases import make_current

    folder = settings.stream.data_dir / "demo"
    releases, archive = folder / "releases", folder / "archive"
    for old in (releases, archive):
        shutil.rmtree(old, ignore_errors=True)
    with signals.heeded(), steps.step("building the base release") as report:
        base = build(settings.model, texts_of(dataset.items), report, _ids_of(dataset))
    shutil.copytree(base.path, releases / base.path.name)
    make_current(load_release(releases / base.path.name))
    update: dict[str, object] = {
        "model": settings.model.model_copy(update={"releases": releases, "watch_s": _WATCH_S}),
        "archive": settings.archive.model_copy(update={"url": str(archive), "flush_s": _FLUSH_S}),
        "learn": settings.learn.model_copy(
            update={"every_s": settings.learn.every_s or _LEARN_EVERY_S}
        ),
    }
    return settings.model_copy(update=update)


def _ids_of(dataset: Dataset) -> list[str]:
    return [item.item_id for item in dataset.items]


def _trainer(settings: Settings, log: Path) -> ServerProcess:
    """`penchant trainer` likewise, with a port of its own for its metrics."""
    stream = settings.stream.model_copy(update={"metrics_port": free_port()})
    own = settings.model_copy(update={"stream": stream})
    return _process("The trainer", "trainer", own, log)


def _worker(settings: Settings, log: Path) -> ServerProcess:
    """`penchant updater` as a process of its own, under the same guard as the servers."""
    return _process("The worker", "updater", settings, log)


def _process(name: str, command: str, settings: Settings, log: Path) -> ServerProcess:
    log.unlink(missing_ok=True)
    passed_on = {name: os.environ[name] for name in _PASSED_ON if name in os.environ}
    environment = passed_on | settings.environment()
    pairs = [f"{name}={value}" for name, value in environment.items()]
    # Servers start in an empty environment; env(1) fills it and becomes the worker.
    program = ["env", *pairs, sys.executable, "-m", "stream.cli", command]
    return ServerProcess(name, program, log)


def _await_ready(worker: ServerProcess, url: str, signals: Signals) -> None:
    deadline_s = time.monotonic() + _READY_S
    while answer(url)[0] != 200:
        if not worker.alive:
            raise worker.failure("ended while it was starting")
        if time.monotonic() > deadline_s:
            raise worker.failure(f"was not ready after {_READY_S:g} s")
        signals.pause(_POLL_S)


def _send_catalogue(parts: Parts, steps: Steps, signals: Signals) -> Sample:
    total = len(parts.dataset.items)
    with steps.step(f"encoding {total:,} film titles") as report:
        parts.feed.start()
        while True:
            parts.check()
            sample = parts.sample()
            if sample is not None:
                report(min(sample.items, total), total)
                if sample.items >= total and sample.batches_done >= sample.batches_begun:
                    return sample
            signals.pause(_POLL_S)
