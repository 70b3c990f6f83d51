"""The updater as a Faust app: intake service -> channel -> agent -> updater. Only wiring.

Faust runs the process (service graph, agents, signals, supervision). Its own Kafka consumer
is left out through the boot strategy: records come from `intake.py`, and so do offsets.
"""

from __future__ import annotations

import asyncio
import gc
import logging
import os
import secrets
import signal
import threading
import time
from collections.abc import Awaitable, Callable, Container, Iterable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Final, TypeVar

import faust
from faust.app.base import BootStrategy
from redis.exceptions import AuthenticationError
from threadpoolctl import threadpool_limits

from model.engine import Engine
from model.releases import load_current
from profiles.arithmetic import Layout
from profiles.connection import address, refuse_cluster
from profiles.errors import GenerationRetired, RedisUnavailable, WritesLost
from profiles.items import ItemStore
from profiles.marks import Marks
from profiles.schema import Keys
from profiles.store import ProfileStore

from . import forwarding, metrics
from .catalogue import Catalogue
from .contributions import event_weights
from .dead_letter import DeadLetters, Rejects
from .errors import UserError
from .forwarding import Forwarder
from .intake import Intake, MicroBatch
from .migration import Migrator
from .neighbours import GROUP, NeighbourPart, PairSender, pairs_partitions
from .outlooks import Outlooks
from .settings import Settings
from .swapping import Swapper, open_space, reopen_space
from .topics import connect, keeps_arrival_times
from .updater import Prepared, Started, Updater

if TYPE_CHECKING:
    import redis

log = logging.getLogger(__name__)

T = TypeVar("T")
A = TypeVar("A")

_RETRY_FIRST_S: Final = 0.1
_RETRY_MOST_S: Final = 5.0
# A micro-batch makes tens of thousands of objects and drops them. At Python's own pace (700, 10,
# 10) the collector walks all that torch and Faust have loaded for it: a sixth of the CPU time. What
# was loaded at the start stays for good, so it is frozen: no collection walks it any more.
_GC_THRESHOLDS: Final = (50_000, 10, 10)
# A start that takes longer than this has compiled.
_WARM_S: Final = 5.0
_NOTHING: Final = MicroBatch(())
# At the end, for threads to notice that nothing more is expected of them.
_REST_S: Final = 0.5
# Micro-batches that are folded and saved at a time.
_AT_ONCE: Final = 2


def worker_topics(settings: Settings, existing: Container[str]) -> list[str]:
    """The topics that a worker reads. What was forwarded before forwarding was turned off is
    still to be folded, so that topic is read wherever it exists."""
    topics = [settings.topic("events"), settings.topic("items")]
    forwarded = settings.topic(forwarding.TOPIC)
    if settings.stream.repartition or forwarded in existing:
        topics.append(forwarded)
    return topics


def profile_layout(settings: Settings, dimensions: int) -> Layout:
    """What the settings want profiles to keep. ValueError says what cannot be."""
    profile = settings.profile
    return Layout(
        dimensions,
        profile.half_lives_s,
        profile.window,
        profile.dedupe,
        profile.categories,
        profile.own_items,
        profile.currency,
    )


def build_engine(settings: Settings) -> Engine:
    """Of the live release, for a process that serves. Raises ModelError."""
    model = settings.model
    # Of numpy: its threads would wait for the next small product of a fold at full speed, and take
    # a core for it.
    threadpool_limits(1, user_api="blas")
    return Engine(
        load_current(model.releases),
        device=model.device,
        dtype=model.dtype,
        batch_tokens=model.batch_tokens,
        threads=model.threads or max(1, (os.cpu_count() or 2) - 1),
        item_rows=model.item_rows,
    )


def build_marks(settings: Settings) -> Marks:
    """Of this process' saves in the live generation of profiles, on a connection of their own.
    Before anything is written."""
    client, keys = settings.redis.connection().open(), Keys(settings.namespace)
    marks = Marks(client, keys, settings.redis.url, follows=True)
    metrics.GENERATION.set(keys.generation)
    marks.first(may_be_older=True)
    return marks


def build_updater(
    settings: Settings, engine: Engine, partitions: int, marks: Marks | None = None
) -> Updater:
    """An updater on real stores. `partitions`: of the events topic; `marks`: of what it saves."""
    return updater_on(
        settings,
        engine,
        marks,
        marks.keys if marks is not None else Keys(settings.namespace),
        DeadLetters(settings),
        forwarder=Forwarder(settings, partitions) if settings.stream.repartition else None,
        pairs=(
            PairSender(settings, pairs_partitions(settings)) if settings.learn.neighbours else None
        ),
    )


def updater_on(
    settings: Settings,
    engine: Engine,
    marks: Marks | None,
    keys: Keys,
    rejects: Rejects,
    *,
    forwarder: Forwarder | None = None,
    pairs: PairSender | None = None,
) -> Updater:
    """One that folds into the profiles behind `keys`, and puts what is no event into `rejects`."""
    client = settings.redis.connection().open()
    refuse_cluster(client, address(settings.redis.url))
    try:
        layout = profile_layout(settings, engine.dimensions)
        weights = event_weights(settings.profile.weights)
    except ValueError as error:
        raise UserError(f"the profile settings (PROFILE_…) cannot be used: {error}") from error
    items = ItemStore(client, keys, settings.redis.url, marks)
    catalogue = Catalogue(engine, items, engine.release.load_item_vectors())
    store = ProfileStore(
        client,
        keys,
        layout,
        ttl_s=settings.profile.ttl_days * 86_400,
        writer=secrets.randbits(64),
        where=settings.redis.url,
        cached=settings.stream.cached_profiles,
        marks=marks,
    )
    updater = Updater(
        settings,
        catalogue,
        store,
        items,
        rejects,
        Migrator(settings.model.releases, items, layout),
        layout=layout,
        weights=weights,
        forwarder=forwarder,
        pairs=pairs,
    )
    try:
        open_space(items, catalogue)
    except WritesLost as lost:
        assert marks is not None
        _begin_anew(settings, updater, marks, lost)
    _warm_up(updater)
    return updater


def _begin_anew(settings: Settings, updater: Updater, marks: Marks, lost: WritesLost) -> None:
    """Drop what is remembered, and rely on nothing that was written before. Raises
    RedisUnavailable."""
    flipped = isinstance(lost, GenerationRetired)
    level = logging.WARNING if flipped else logging.ERROR
    log.log(level, "%s: what is remembered is dropped, and read again", lost)
    try:
        updater.forget()
        marks.begin_anew()
        metrics.GENERATION.set(marks.keys.generation)
        # Before the space: where a namespace without this has one, a worker that starts takes
        # committed offsets for saved.
        marks.first(may_be_older=False)
        reopen_space(settings.model.releases, updater.items, updater.catalogue)
    except WritesLost as once_more:
        _begin_anew(settings, updater, marks, once_more)


def _warm_up(updater: Updater) -> None:
    """Before the first event, which would wait. Raises UserError."""
    began_s = time.monotonic()
    try:
        updater.warm_up()
    except RuntimeError as error:  # numba finds no folder to keep what it compiled
        raise UserError(f"{error}: set NUMBA_CACHE_DIR to a writable folder") from error
    took_s = time.monotonic() - began_s
    if took_s > _WARM_S:
        log.info("compiled the scanner and the fold in %.0f s, for later starts too", took_s)


def build_swapper(
    settings: Settings, updater: Updater, failed: Callable[[BaseException], None]
) -> Swapper:
    """What puts new releases into this updater. It sweeps with a store of its own."""
    client, keys = settings.redis.connection().open(), updater.items.keys
    store = _own_store(settings, updater.layout, client, keys)
    return Swapper(settings, updater, client, keys, store, updater.items, failed)


def build_outlooks(
    settings: Settings, updater: Updater, failed: Callable[[BaseException], None]
) -> Outlooks:
    """What foretells beside this updater, on a store of its own."""
    return Outlooks(
        updater.outlooks,
        _own_store(
            settings, updater.layout, settings.redis.connection().open(), updater.items.keys
        ),
        lambda: updater.catalogue,
        lambda: updater.apply_s,
        failed,
        share=settings.stream.outlook_share,
    )


def _own_store(settings: Settings, layout: Layout, client: redis.Redis, keys: Keys) -> ProfileStore:
    """Beside the updater's: another writer, that remembers nothing. `keys` are the updater's, and
    lead wherever it goes."""
    return ProfileStore(
        client,
        keys,
        layout,
        ttl_s=settings.profile.ttl_days * 86_400,
        writer=secrets.randbits(64),
        where=settings.redis.url,
    )


@dataclass(eq=False)
class _InHand:
    """A micro-batch that is being applied."""

    begun: MicroBatch
    started: Started | None  # None: Redis lost writes, and it comes again
    finishing: asyncio.Task[None] | None = None  # from when on it is there


class Pipeline:
    """Runs the updater's stages on threads of their own: one batch is prepared while the lanes are
    at work on the one or two before."""

    def __init__(
        self,
        settings: Settings,
        updater: Updater,
        patience: Patience,
        on_failure: Callable[[BaseException], None],
        marks: Marks,
    ) -> None:
        """`marks`: of what the updater saves."""
        self._settings = settings
        self._patience = patience
        self._updater = updater
        self._on_failure = on_failure
        self._marks = marks
        self._prepare = ThreadPoolExecutor(1, "prepare")
        self._apply = ThreadPoolExecutor(1, "apply")
        self._calls: set[Future[Any]] = set()
        self._in_hand: list[_InHand] = []
        self._rewinds = 0

    async def feed(self, batch: MicroBatch, intake: Intake) -> None:
        """Prepare a batch, and start to apply it once its turn has come."""
        rewinds, begun = self._rewinds, intake.begin(batch)
        metrics.BATCH_RECORDS.observe(begun.records)
        prepared: Prepared | WritesLost
        try:
            prepared = await self._call(self._prepare, self._prepared, begun)
        except WritesLost as lost:
            prepared = lost
        while self._in_hand and not self._may_start(prepared):
            await _finished(self._in_hand[0])
        if rewinds != self._rewinds:
            intake.done(_NOTHING)  # it came behind what was lost, and comes again
            return
        before = self._in_hand[-1] if self._in_hand else None
        mine = _InHand(begun, self._start(prepared, before))
        self._in_hand.append(mine)
        mine.finishing = asyncio.create_task(self._finish(mine, prepared, before, rewinds, intake))
        mine.finishing.add_done_callback(self._surface)

    def _may_start(self, prepared: Prepared | WritesLost) -> bool:
        """Beside what is in hand."""
        last = self._in_hand[-1].started
        return (
            len(self._in_hand) < _AT_ONCE
            and not isinstance(prepared, WritesLost)
            and last is not None
            and self._updater.may_start(prepared, last)
        )

    def _start(self, prepared: Prepared | WritesLost, before: _InHand | None) -> Started | None:
        if isinstance(prepared, WritesLost):
            return None
        return self._updater.start(prepared, before.started if before is not None else None)

    def close(self, wait_s: float) -> bool:
        """Give up what waits for Redis; whether all threads came to rest in time."""
        self._patience.end()
        lanes = [lane for one in self._in_hand if one.started for lane in one.started.at_work]
        return not wait([*self._calls, *lanes], wait_s).not_done

    def _prepared(self, begun: MicroBatch) -> Prepared:
        taken = self._updater.take_apart(begun)
        return self._patience(lambda: self._updater.prepare(taken))

    async def _finish(
        self,
        mine: _InHand,
        prepared: Prepared | WritesLost,
        before: _InHand | None,
        rewinds: int,
        intake: Intake,
    ) -> None:
        done = mine.begun
        if before is not None:
            await _finished(before)
        try:
            if isinstance(prepared, WritesLost):
                raise prepared
            if rewinds == self._rewinds:
                await self._call(self._apply, self._applied, mine)
            else:
                done = _NOTHING  # as in `feed`
        except WritesLost as lost:
            await self._go_back(lost, intake)
            done = _NOTHING
        self._in_hand.remove(mine)
        intake.done(done)

    async def _go_back(self, lost: WritesLost, intake: Intake) -> None:
        """To where Redis has everything."""
        at_work = [one.started for one in self._in_hand if one.started is not None]
        for one in self._in_hand:
            one.started = None  # so nothing is started beside it
        for started in at_work:
            await self._call(self._apply, self._updater.come_to_rest, started)
        before = self._marks.keys.generation
        # On the thread that prepares: behind what it has in hand, which goes back to before.
        anew = partial(_begin_anew, self._settings, self._updater, self._marks, lost)
        await self._call(self._prepare, self._patience, anew)
        self._rewinds += 1
        intake.rewind(lost=before == self._marks.keys.generation)

    def _applied(self, mine: _InHand) -> None:
        started = mine.started
        assert started is not None
        self._patience(lambda: self._updater.finish(started))
        self._patience(lambda: self._marks.advance(mine.begun.ends()))

    async def _call(self, thread: ThreadPoolExecutor, function: Callable[[A], T], argument: A) -> T:
        call = thread.submit(function, argument)
        self._calls.add(call)
        call.add_done_callback(self._calls.discard)
        return await asyncio.wrap_future(call)

    def _surface(self, applied: asyncio.Task[None]) -> None:
        """Report a failure even if no further batch comes to meet it."""
        if not applied.cancelled() and (error := applied.exception()) is not None:
            self._on_failure(error)


async def _finished(one: _InHand) -> None:
    """Raises if it failed: a later batch must never pass a failed one."""
    assert one.finishing is not None
    await one.finishing


class Patience:
    """Calls again what Redis was away for, until `limit_s` have passed or it is ended."""

    def __init__(self, limit_s: float) -> None:
        self._limit_s = limit_s
        self._ended = threading.Event()

    def __call__(self, work: Callable[[], T]) -> T:
        """What `work` returns. It must be safe to repeat. Raises RedisUnavailable in the end, and
        at once where the login is refused: no waiting mends a password."""
        started_s, pause_s = time.monotonic(), _RETRY_FIRST_S
        while True:
            try:
                return work()
            except RedisUnavailable as error:
                refused = isinstance(error.__cause__, AuthenticationError)
                if refused or time.monotonic() - started_s > self._limit_s:
                    raise
                metrics.REDIS_RETRIES.inc()
                log.warning("%s; nothing is lost, trying again in %.1f s", error, pause_s)
                if self._ended.wait(pause_s):
                    raise
                pause_s = min(2 * pause_s, _RETRY_MOST_S)

    def end(self) -> None:
        """Try nothing again from now on."""
        self._ended.set()


class _WithoutKafka(BootStrategy):  # type: ignore[misc]
    """Agents and our intake, none of Faust's Kafka clients. Services stop in reverse order, so
    the intake drains while the agent still runs."""

    enable_kafka = False

    def server(self) -> Iterable[Any]:
        """The services of a worker, in starting order."""
        return (*self.sensors(), *self.agents(), *self.app.penchant_services)


class UpdaterApp(faust.App):  # type: ignore[misc]
    """A Faust app that runs `penchant_services` in place of Faust's consumer."""

    BootStrategy = _WithoutKafka
    penchant_services: tuple[Any, ...] = ()

    async def on_start(self) -> None:
        """Let streams flow: Faust holds them back until its own consumer has partitions."""
        await super().on_start()
        self.flow_control.resume()


class Worker:
    """One updater process."""

    def __init__(self, settings: Settings) -> None:
        """Load the release and connect. Raises UserError and the errors of model and profiles."""
        self._settings = settings
        topics, partitions = find_topics(settings)
        engine = build_engine(settings)
        patience = Patience(settings.redis.patience_s)
        marks = patience(lambda: build_marks(settings))
        updater = patience(lambda: build_updater(settings, engine, partitions, marks))
        self._swapper = build_swapper(settings, updater, self._failed)
        self._outlooks = build_outlooks(settings, updater, self._failed)
        self._pipeline = Pipeline(settings, updater, patience, self._failed, marks)
        self.error: BaseException | None = None
        self._neighbours: NeighbourPart | None = None
        settings.stream.data_dir.mkdir(parents=True, exist_ok=True)
        self.app = UpdaterApp(
            settings.topic("updater"),
            broker=f"kafka://{settings.kafka.bootstrap}",
            datadir=settings.stream.data_dir / "faust",
            store="memory://",
            web_enabled=False,
            topic_disable_leader=True,
            autodiscover=False,
        )
        channel = self.app.channel()
        self.intake = Intake(settings, topics, channel.put, self._failed, marks=marks)
        self.app.penchant_services = (self.intake,)

        self._feed_from(channel, "updater", lambda batch: self._pipeline.feed(batch, self.intake))
        if settings.learn.neighbours:
            self._neighbours = self._with_neighbours(patience)

    def _with_neighbours(self, patience: Patience) -> NeighbourPart:
        """The second half of the process: from the pairs topic into items' neighbours."""
        channel = self.app.channel()
        part = NeighbourPart(self._settings, channel.put, self._failed, patience)
        self.app.penchant_services += (part.intake,)

        self._feed_from(channel, GROUP, part.feed)
        return part

    def _feed_from(
        self, channel: Any, name: str, feed: Callable[[MicroBatch], Awaitable[None]]
    ) -> None:
        """An agent that hands micro-batches on. An exception that leaves an agent makes Faust
        restart it without the batch it had. Ours never leaves: the process stops, and the batch
        is read again."""

        @self.app.agent(channel, name=name)  # type: ignore[untyped-decorator]
        async def take(batches: Any) -> None:
            async for batch in batches:
                try:
                    await feed(batch)
                except Exception as error:
                    self._failed(error)
                    await asyncio.Event().wait()

    def run(self) -> None:
        """Run until a signal; raises what made it stop otherwise."""
        gc.collect()
        gc.freeze()
        gc.set_threshold(*_GC_THRESHOLDS)
        server = metrics.serve(self._settings.stream.metrics_port, self.live, self.ready)
        self._swapper.start()
        self._outlooks.start()
        worker = FaustWorker(
            self.app, loglevel="INFO", logging_config=None, override_logging=False,
            redirect_stdouts=False, quiet=True,
        )  # fmt: skip
        worker.spinner = None  # it writes control characters into logs
        try:
            worker.execute_from_commandline()
        except SystemExit as stop:
            if stop.code and self.error is None:
                raise
        finally:
            gc.unfreeze()  # or libraries complain at the end of what was never collected
            self._outlooks.stop()
            self._swapper.stop()
            if server is not None:
                server.stop()
        at_rest = self._pipeline.close(_REST_S)
        if self._neighbours is not None:
            self._neighbours.close()
        if self.error is not None:
            raise self.error
        if not at_rest:
            # A thread that hangs in a socket would keep the interpreter from ending.
            log.warning("left while Redis owed an answer: what was in hand will be read again")
            os._exit(0)

    def live(self) -> tuple[bool, str]:
        """Whether the consumer turns, and what it hands out is finished."""
        stuck = self.intake.stuck(time.monotonic())
        if self._neighbours is not None:
            stuck = stuck or self._neighbours.intake.stuck(time.monotonic())
        return not stuck, stuck or "ok"

    def ready(self) -> tuple[bool, str]:
        """Whether the worker holds partitions and has not failed."""
        if self.error is not None:
            return False, str(self.error)
        if not self.intake.assigned():
            return False, "no partitions assigned (yet, or more workers than partitions)"
        return True, "ok"

    def _failed(self, error: BaseException) -> None:
        """Remember the first failure and stop the process, in order."""
        if self.error is None:
            self.error = error
            self.intake.abort()
            if self._neighbours is not None:
                self._neighbours.intake.abort()
            os.kill(os.getpid(), signal.SIGTERM)


class FaustWorker(faust.Worker):  # type: ignore[misc]
    """The first signal drains, a second one ends the process at once: what is saved but not
    committed is read again and found applied."""

    def _schedule_shutdown(self, signal: signal.Signals) -> None:
        if self._signal_stop_time:
            os._exit(128 + signal)
        super()._schedule_shutdown(signal)

    async def _sentinel_task(self) -> None:
        """Mode sleeps here for a second, out of the few that an orchestrator gives."""


def find_topics(settings: Settings) -> tuple[list[str], int]:
    """The topics to read, and the number of partitions of the events topic. Raises UserError if
    the brokers cannot be reached or a topic is missing."""
    admin, metadata = connect(settings.kafka)
    topics = worker_topics(settings, metadata.topics)
    missing = [name for name in topics if name not in metadata.topics]
    if missing:
        raise UserError(f"no topic {', '.join(missing)}: run `penchant topics create`")
    if not keeps_arrival_times(admin, settings.topic("events")):
        log.warning(
            "%s keeps the time that producers give: an event from the future is told by this "
            "worker's clock only, and not once that time has come. Set its "
            "message.timestamp.type=LogAppendTime (kafka-configs --alter)",
            settings.topic("events"),
        )
    forwarded = metadata.topics.get(settings.topic(forwarding.TOPIC))
    if forwarded is not None and not settings.stream.repartition:
        _refuse_undrained(settings, len(forwarded.partitions))
    return topics, len(metadata.topics[settings.topic("events")].partitions)


def _refuse_undrained(settings: Settings, partitions: int) -> None:
    """Folding a user's events here while earlier ones wait in the forwarded topic would move the
    watermark past those."""
    waiting = forwarding.undrained(settings, partitions)
    if waiting:
        raise UserError(
            f"{waiting} forwarded events are not folded yet: keep STREAM_REPARTITION=true until "
            f"{settings.topic(forwarding.TOPIC)} has no lag, then turn it off"
        )
