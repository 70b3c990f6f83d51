"""One simulated world: a shop, workers on it, and whatever can happen to them. See `play`.

Each worker is a process with the updater's real parts, wired as `updater_app.Worker` wires them:
intake on a thread of its own (`Intake._run`, all of it), the pipeline's stages on theirs, Redis
through redis-py and its connection pool, all under `seams.under`. Faust is left out: it only runs
the process, so a queue stands for its channel, and a coroutine for its agent.

Which faults there are, and how often, is drawn per world, so that some worlds see one kind alone
and others all of them. They end at some time; what crashed is started again, and the world goes on
until all is folded and committed.
"""

from __future__ import annotations

import asyncio
import gc
import logging
import random
import tempfile
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from profiles.errors import RedisUnavailable
from stream.intake import Intake, MicroBatch
from stream.producer import ProducerError
from stream.settings import (
    KafkaSettings,
    ModelSettings,
    ProfileSettings,
    RedisSettings,
    Settings,
    StreamSettings,
)
from stream.updater_app import Patience, Pipeline, build_marks, build_updater

from . import shop as shops
from .broker_double import Cluster
from .ledger import NAMESPACE, Ledger, Violation
from .redis_double import Keyspace
from .scheduling import Loop, Process, Scheduler, Stuck, Task
from .seams import EPOCH_S, under
from .wires import Chances, Network

# After the last fault; an idle worker looks after Redis every five seconds.
_DRAIN_S: Final = 240.0
_LOOK_S: Final = 0.5
_SESSION_S: Final = 3.0
_FOLDER: Final = Path(tempfile.gettempdir()) / "penchant-simulated"  # never made
# What may end a worker, who is then started again.
_EXPECTED: Final = (RedisUnavailable, ProducerError)


@dataclass
class Outcome:
    """Of one seed."""

    seed: int
    failure: str = ""
    events: int = 0
    saves: int = 0
    commits: int = 0
    turns: int = 0
    simulated_s: float = 0.0
    faults: Counter[str] = field(default_factory=Counter)
    trace: list[tuple[float, str, str]] = field(default_factory=list)


class Worker:
    """One incarnation of an updater's process."""

    def __init__(self, world: World, name: str) -> None:
        self.process = Process(name)
        self.error: BaseException | None = None
        self._world = world
        self._stop: asyncio.Event | None = None
        self._loop: Loop | None = None
        world.scheduler.spawn(self.process, f"{name}.main", self._main)

    def stop(self) -> None:
        """SIGTERM."""
        if self._loop is not None and self._stop is not None:
            self._loop.call_soon_threadsafe(self._stop.set)
        else:
            self._world.kill(self)

    def _main(self) -> None:
        world, settings = self._world, self._world.settings
        patience = Patience(settings.redis.patience_s)
        loop = Loop(world.scheduler)
        try:
            marks = patience(lambda: build_marks(settings))
            updater = patience(
                lambda: build_updater(settings, world.engine(), shops.PARTITIONS, marks)
            )
            pipeline = Pipeline(settings, updater, patience, self._failed, marks)
            self._loop = loop
            loop.run_until_complete(self._serve(settings, pipeline, marks))
            pipeline.close(0.5)
        except Exception as error:
            self.error = self.error or error
        finally:
            world.scheduler.kill(self.process)  # threads end with their process
            _abandon(loop)
        world.ended(self)

    async def _serve(self, settings: Settings, pipeline: Pipeline, marks: Any) -> None:
        self._stop = asyncio.Event()
        channel: asyncio.Queue[MicroBatch] = asyncio.Queue()
        intake = Intake(settings, list(_TOPICS), channel.put, self._failed, marks=marks)
        self._intake = intake

        async def take() -> None:
            while True:
                batch = await channel.get()
                try:
                    await pipeline.feed(batch, intake)
                except Exception as error:
                    self._failed(error)
                    await asyncio.Event().wait()

        agent = asyncio.create_task(take())
        await intake.on_start()
        await self._stop.wait()
        await intake.on_stop()
        agent.cancel()

    def _failed(self, error: BaseException) -> None:
        if self.error is None:
            self.error = error
            self._intake.abort()
            assert self._stop is not None
            self._stop.set()


_TOPICS: Final = (shops.EVENTS_TOPIC, shops.ITEMS_TOPIC)


def _abandon(loop: Loop) -> None:
    """Close what coroutines a dead process leaves."""
    for task in asyncio.all_tasks(loop):
        task._log_destroy_pending = False  # type: ignore[attr-defined]
        task.get_coro().close()
    loop.close()


class World:
    """All that a seed leads to."""

    def __init__(self, seed: int, kinds: Sequence[str] | None = None) -> None:
        """`kinds`: of faults, often, in place of those that the seed would draw."""
        self.scheduler = scheduler = Scheduler(seed)
        self.chance = chance = scheduler.chance
        self.keyspace = Keyspace(lambda: EPOCH_S + scheduler.now_s)
        self.network = Network(scheduler, self.keyspace)
        self.cluster = Cluster(scheduler, lambda: EPOCH_S + scheduler.now_s)
        self.ledger = Ledger(self.cluster, self.keyspace)
        self.faults: Counter[str] = Counter()
        self.workers: list[Worker] = []
        self.everybody: list[Worker] = []
        self._names = 0
        self._began_s = scheduler.now_s
        self._healed = False
        self._drained_s: float | None = None
        self._plan(chance, kinds)

    def _plan(self, chance: random.Random, given: Sequence[str] | None) -> None:
        """Draw what this world is like."""
        self._lasts_s = chance.choice((2.0, 5.0, 12.0))
        events = chance.choice((50, 80, 120, 200))
        now_ms = int(1000 * (EPOCH_S + self.scheduler.now_s))
        self.shop = shops.Shop.draw(chance, events, self._lasts_s, now_ms)
        self._most_workers = chance.choice((1, 2, 2, 3))
        self.settings = Settings(
            namespace=NAMESPACE,
            kafka=KafkaSettings(
                group_protocol=chance.choice(("classic", "consumer")),
                session_timeout_s=_SESSION_S,
                partitions=shops.PARTITIONS,
            ),
            redis=RedisSettings(url="redis://simulated:6379/0", patience_s=10.0),
            stream=StreamSettings(
                batch_records=chance.choice((4, 8, 64)),
                batch_deadline_ms=chance.choice((150.0, 400.0, 800.0)),
                buffered_batches=chance.choice((1, 2, 4)),
                cached_profiles=chance.choice((0, 4, 100)),
                drain_s=chance.choice((1.0, 5.0)),
                data_dir=_FOLDER,
            ),
            model=ModelSettings(releases=_FOLDER, dimensions=shops.DIMENSIONS),
            profile=ProfileSettings(
                window=shops.RULES.window,
                dedupe=shops.RULES.seen,
                categories=shops.RULES.categories,
            ),
        )
        kinds = given or [kind for kind in FAULTS if chance.random() < 0.4]
        self._rate = chance.choice((0.0, 0.005, 0.01, 0.02, 0.04)) if kinds else 0.0
        if given:
            self._rate = 0.02
        self._kinds = kinds
        self._heals_s = self._lasts_s + chance.uniform(0, 8)

        def some(most: float) -> float:
            return chance.choice((0.0, 0.0, most / 4, most))

        self.network.chances = Chances(some(0.03), some(0.05), some(0.1), some(0.02))
        self.network.latency_s = chance.choice((0.002, 0.002, 0.02, 0.1))
        self.cluster.session_s = _SESSION_S
        self.cluster.commit_fails = some(0.2)
        self.cluster.commit_unanswered = some(0.2)
        self.cluster.refetch = some(0.02)
        self.lane_users = chance.choice((0, 0, 256))

    def engine(self) -> Any:
        """For a worker that starts."""
        return shops.Engine()

    # --- the course of it

    def play(self) -> None:
        """From the first event until all is folded. Raises what is wrong."""
        scheduler, cluster = self.scheduler, self.cluster
        for topic in _TOPICS:
            cluster.create(topic, shops.PARTITIONS)
        cluster.create(f"{NAMESPACE}.dead-letter", 1)
        self.keyspace.on_change = self.ledger.redis_changed
        cluster.on_commit = self.ledger.committed
        scheduler.on_point = self._at_point
        for record in self.shop.traffic:
            scheduler.after(record.at_s, lambda r=record: self._produce(r))
        for _ in range(self._most_workers):
            scheduler.after(self.chance.choice((0.0, 0.0, 2.0)), self._start)
        scheduler.after(self._heals_s, self._heal)
        scheduler.after(_LOOK_S, self._look)
        scheduler.run()
        self.ledger.check_end()

    def _produce(self, record: shops.Produced) -> None:
        self.cluster.append(record.topic, record.key, record.value, record.headers)

    def _start(self) -> None:
        if len(self.workers) < self._most_workers:
            self._names += 1
            self._note(f"w{self._names} starts")
            worker = Worker(self, f"w{self._names}")
            self.workers.append(worker)
            self.everybody.append(worker)

    def ended(self, worker: Worker) -> None:
        """A worker's process is over; an orchestrator starts another."""
        if worker.error is not None and not isinstance(worker.error, _EXPECTED):
            raise Violation(f"{worker.process.name} ended: {worker.error!r}") from worker.error
        self._note(f"{worker.process.name} ended: {worker.error!r}")
        self._replace(worker)

    def kill(self, worker: Worker) -> None:
        """A crash."""
        self.scheduler.kill(worker.process)
        self._replace(worker)

    def _replace(self, worker: Worker) -> None:
        if worker in self.workers:
            self.workers.remove(worker)
            self.scheduler.after(self.chance.uniform(0.1, 2.0), self._start)

    def _heal(self) -> None:
        """No more faults from here on."""
        self._note("all heals")
        self._healed = True
        self.network.chances = Chances()
        self.cluster.commit_fails = self.cluster.commit_unanswered = self.cluster.refetch = 0.0
        self.cluster.away = False
        self.network.resume()
        self.network.come_up()
        for worker in self.everybody:
            if worker.process.frozen:
                self.scheduler.thaw(worker.process)

    def _look(self) -> None:
        """Whether it is over."""
        scheduler = self.scheduler
        if self._healed and self.ledger.drained():
            # A moment longer: whoever is late must be refused.
            self._drained_s = self._drained_s or scheduler.now_s
            if scheduler.now_s - self._drained_s >= 2 * _LOOK_S:
                scheduler.finish()
        elif scheduler.now_s > self._began_s + self._heals_s + _DRAIN_S:
            raise Violation("not all is folded and committed, long after the last fault")
        else:
            self._drained_s = None
        scheduler.after(_LOOK_S, self._look)

    # --- faults

    def _note(self, what: str) -> None:
        self.scheduler.trace.append((self.scheduler.now_s, "world", what))

    def _at_point(self, task: Task, what: str) -> None:
        if self._healed or not self._rate:
            return
        rate = self._rate / 4 if what == "poll" else self._rate  # most of them find nothing
        if self.chance.random() < rate:
            worker = next((w for w in self.workers if w.process is task.process), None)
            if worker is not None:
                kind = self.chance.choice(self._kinds)
                if FAULTS[kind](self, worker):
                    self.faults[kind] += 1
                    self._note(f"{kind}: {worker.process.name}")

    def _crash(self, worker: Worker) -> bool:
        self.kill(worker)
        return True

    def _stall(self, worker: Worker) -> bool:
        """Frozen, mostly past its session; it wakes up and goes on where it was."""
        scheduler = self.scheduler
        wakes_s = self.chance.choice((0.5, 2.0, 4.0, 8.0)) * self.chance.uniform(0.5, 1.5)
        scheduler.freeze(worker.process)

        def thaw() -> None:
            if worker.process.frozen:
                self._note(f"{worker.process.name} wakes up")
                scheduler.thaw(worker.process)

        scheduler.after(wakes_s, thaw)
        if self.chance.random() < 0.5:  # it is given up, and another takes its place
            self._replace(worker)
        return True

    def _stop(self, worker: Worker) -> bool:
        worker.stop()
        return True

    def _clock(self, worker: Worker) -> bool:
        worker.process.clock_error_s += self.chance.choice((-86_400, -30, 20, 3_600, 86_400 * 20))
        return True

    def _redis_dies(self, worker: Worker) -> bool:
        self.network.go_down()
        self.scheduler.after(self.chance.uniform(0.05, 8.0), self.network.come_up)
        return True

    def _redis_stalls(self, worker: Worker) -> bool:
        if self.network.stalled:
            return False
        self.network.stall()
        self.scheduler.after(self.chance.uniform(0.5, 9.0), self.network.resume)
        return True

    def _redis_fails_over(self, worker: Worker) -> bool:
        """To a replica that lacks the newest writes, now and then all of them."""
        lost = min(self.keyspace.age, self.chance.choice((1, 2, 5, 20, 100, 1_000_000)))
        self.network.go_down()
        self.keyspace.go_back(self.keyspace.age - lost)
        self.ledger.redis_went_back()
        self.scheduler.after(self.chance.choice((0.0, 0.3, 2.0)), self.network.come_up)
        self._note(f"redis lost {lost} writes")
        return True

    def _brokers_away(self, worker: Worker) -> bool:
        if self.cluster.away:
            return False
        self.cluster.away = True

        def back() -> None:
            self.cluster.away = False

        self.scheduler.after(self.chance.uniform(0.1, 10.0), back)
        return True

    def outcome(self, seed: int, failure: str) -> Outcome:
        """What there is to say of it."""
        scheduler = self.scheduler
        faults = self.faults + Counter(self.network.counted) + Counter(self.cluster.counted)
        return Outcome(
            seed,
            failure,
            sum(len(log) for log in self.cluster.logs[shops.EVENTS_TOPIC]),
            self.ledger.saves,
            self.ledger.commits,
            scheduler.turns,
            scheduler.now_s - self._began_s,
            faults,
            scheduler.trace,
        )


FAULTS: Final[dict[str, Callable[[World, Worker], bool]]] = {
    "crash": World._crash,
    "stall": World._stall,
    "stop": World._stop,
    "clock jump": World._clock,
    "redis dies": World._redis_dies,
    "redis stalls": World._redis_stalls,
    "redis loses writes": World._redis_fails_over,
    "brokers away": World._brokers_away,
}


def play(seed: int, kinds: Sequence[str] | None = None) -> Outcome:
    """All that happens in the world of this seed; `kinds`: see `World`."""
    world = World(seed, kinds)
    log = logging.getLogger("stream")
    level, collecting, failure = log.level, gc.isenabled(), ""
    log.setLevel(logging.CRITICAL + 1)
    gc.disable()  # so that all a killed process leaves is young, and goes here, at little cost
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # coroutines that were never awaited
            with under(world.scheduler, world.network, world.cluster, world.lane_users):
                try:
                    world.play()
                except (Violation, Stuck) as error:
                    failure = f"{error}"
                finally:
                    world.scheduler.close([worker.process for worker in world.everybody])
            outcome = world.outcome(seed, failure)
            del world
            gc.collect(0)
            return outcome
    finally:
        log.setLevel(level)
        if collecting:
            gc.enable()
