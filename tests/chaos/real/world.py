"""A shop on three brokers of Apache Kafka 4, a Redis with a replica and two workers, with traffic;
a schedule that does it harm; and the verdict: what the oracle makes of the topic against what is in
Redis, profile by profile.

Knows no schedule.
"""

from __future__ import annotations

import random
import tempfile
import threading
import time
import uuid
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, nullcontext, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from model.releases import Release
from profiles import Profile
from stream import dead_letter
from stream.local_stack import ApacheKafka
from stream.settings import (
    KafkaSettings,
    ModelSettings,
    ProfileSettings,
    RedisSettings,
    Settings,
    StreamSettings,
)
from stream.topics import create_topics
from tests import oracle
from tests.integration.shop_traffic import (
    Bad,
    Expectation,
    Sendable,
    Traffic,
    differences,
    films,
    stored_profiles,
)
from tests.integration.worker_process import (
    WorkerProcess,
    eventually,
    wait_until_folded,
    workers,
)

from .network import Networks
from .store import Store
from .watch import Watch

NODES: Final = 3
SESSION_S: Final = 6.0
PARTITIONS: Final = 6
NAMES: Final = ("ann", "bob")
RULES: Final = oracle.Rules(categories=1_000)  # no bound is reached: every category is compared
_CALM_S: Final = 3.0  # before the first fault
_FOLDED_S: Final = 240.0
_REPAIRED_S: Final = 60.0  # what Redis lost, where no event follows that would tell


@dataclass(frozen=True)
class Terms:
    """What a schedule wants to happen in."""

    name: str
    harm: Callable[[World], None]
    seconds: float = 30.0  # of harm
    per_s: float = 150.0
    redis_s: float = 0.0
    """Before each request to Redis: workers are seldom without something in hand."""
    small_disk: bool = False
    own_networks: bool = False
    no_letter_twice: bool = False
    """No worker ends and no partition moves, so each bad record is rejected once."""
    records: Callable[[random.Random, list[Sendable]], list[Sendable]] | None = None
    """What becomes of the shop's usual traffic."""


@dataclass
class Outcome:
    """What a schedule did, and what came of it."""

    name: str
    seed: int
    faults: Counter[str] = field(default_factory=Counter)
    first_save_s: list[float] = field(default_factory=list)
    back_s: list[float] = field(default_factory=list)
    events: int = 0  # in the topic
    bad: int = 0
    profiles: int = 0
    replayed: int = 0
    read_again: int = 0
    refused: int = 0
    lost: int = 0
    double: int = 0
    seconds: float = 0.0
    notes: list[str] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)


class World:
    """What a schedule may lay hands on."""

    def __init__(
        self, terms: Terms, seed: int, kafka: ApacheKafka, release: Release, folder: Path
    ) -> None:
        self.terms = terms
        self.kafka = kafka
        self.chance = random.Random(f"{terms.name} {seed}")
        self.outcome = Outcome(terms.name, seed)
        self.alive: list[WorkerProcess] = []
        self._stack = ExitStack()
        self._release = release
        self._started = Counter[str]()
        self._faults: list[float] = []
        self._began_s = time.monotonic()
        enter = self._stack.enter_context
        self.store = enter(Store(folder, small_disk=terms.small_disk))
        self.store.delay_s = terms.redis_s
        self.networks = enter(Networks())
        self.settings = Settings(
            namespace=f"chaos-{uuid.uuid4().hex[:12]}",
            kafka=KafkaSettings(
                bootstrap=kafka.bootstrap,
                partitions=PARTITIONS,
                replication=NODES,
                session_timeout_s=SESSION_S,
            ),
            redis=RedisSettings(url=self.store.url),
            stream=StreamSettings(batch_records=64, data_dir=folder / "data"),
            model=ModelSettings(releases=release.path.parent),
            profile=ProfileSettings(categories=RULES.categories),
        )
        create_topics(self.settings, patience_s=60)
        self._start = enter(workers(folder))
        self.watch = Watch(self.settings, lambda: list(self.alive))
        self._traffic: list[tuple[Traffic, Sequence[Sendable]]] = []

    # --- for schedules

    def fault(self, kind: str) -> None:
        """It happens now."""
        self.outcome.faults[kind] += 1
        self._faults.append(time.monotonic())

    def going_on(self) -> bool:
        """Whether there is time for more harm."""
        return time.monotonic() < self._until_s

    def pause(self, least_s: float, most_s: float) -> None:
        threading.Event().wait(self.chance.uniform(least_s, most_s))

    def start(self, name: str) -> WorkerProcess:
        """A worker of that name, the first or one more; with its own network if so agreed."""
        self._started[name] += 1
        ports = [int(address.rpartition(":")[2]) for address in self.kafka.bootstrap.split(",")]
        reaches = {f"broker {n}": port for n, port in enumerate(ports, 1)}
        own = self.terms.own_networks
        party = self.networks.party(name, reaches | {"redis": self.store.port}) if own else None
        with party or nullcontext():
            worker = self._start(self.settings, f"{name}-{self._started[name]}")
        if own:
            self.networks.show(name, worker.port)
        self.alive.append(worker)
        return worker

    def kill(self, worker: WorkerProcess) -> None:
        """No goodbye; it is started again as whoever minds it would."""
        self.alive.remove(worker)
        worker.kill()
        self.start(worker.name.partition("-")[0])

    def send(self, records: Sequence[Sendable], per_s: float) -> Traffic:
        """Besides the traffic that there is."""
        traffic = Traffic(self.settings, records, per_s).start()
        self._traffic.append((traffic, records))
        return traffic

    # --- the run

    def run(self) -> Outcome:
        """Let it happen, and compare."""
        with self._stack:
            for name in NAMES:
                self.start(name)
            for worker in self.alive:
                worker.wait_ready()
            with self.watch:
                self.send(self._usual(), self.terms.per_s)
                threading.Event().wait(_CALM_S)
                self._until_s = time.monotonic() + self.terms.seconds
                self.terms.harm(self)
                for traffic, _ in self._traffic:
                    traffic.finish()
                self._mind()
                wait_until_folded(self.settings, _FOLDED_S)
                self._compare()
                eventually("the watch sees the end of it", self.watch.sees_all_done)
            self._measure()
        return self.outcome

    def _usual(self) -> list[Sendable]:
        """As much as there is time for, and a little more."""
        wanted = int(self.terms.per_s * (self.terms.seconds + _CALM_S))
        seed = self.chance.randrange(2**32)
        records = films(seed, heavy=max(1, wanted // 300), light=min(600, wanted // 16))
        change = self.terms.records
        return records if change is None else change(self.chance, records)

    def _mind(self) -> None:
        """Nobody but us may have ended a worker."""
        for worker in list(self.alive):
            if not worker.running:
                tail = "\n".join(worker.log.splitlines()[-15:])
                code = worker.process.returncode
                self.outcome.wrong.append(f"{worker.name} ended by itself with {code}:\n{tail}")
                self.alive.remove(worker)
                self.start(worker.name.partition("-")[0])

    def _compare(self) -> None:
        expectation = Expectation(self.settings, self._release)
        self.counting = expectation.events()
        expected = oracle.fold(self.counting, RULES)
        with self.store.client as client:

            def is_right() -> bool:
                self.stored = stored_profiles(client, self.settings.namespace)
                return not differences(self.stored, expected)

            with suppress(AssertionError):  # `judge` says what is wrong
                eventually("every profile as expected", is_right, _REPAIRED_S)
        outcome = self.outcome
        outcome.lost, outcome.double, wrong = judge(self.stored, expected)
        outcome.wrong += wrong
        outcome.profiles = len(expected)
        outcome.events = len(expectation.records)
        sent = sum(_events(records[: traffic.sent]) for traffic, records in self._traffic)
        if sent != outcome.events:
            outcome.wrong.append(f"{sent} records were sent, {outcome.events} are in the topic")
        self._compare_letters(expectation)

    def _compare_letters(self, expectation: Expectation) -> None:
        """Every bad record, and nothing else, is in the dead-letter topic."""
        bad = {(r.partition, r.offset): r.value for r in expectation.records if r.bad}
        letters = dead_letter.distinct(dead_letter.read(self.settings, 100_000, timeout_s=60))
        got = {(letter.partition, letter.offset): letter.value for letter, _ in letters}
        twice = sum(copies > 1 for _, copies in letters)
        self.outcome.bad = len(bad)
        if got != bad:
            self.outcome.wrong.append(f"{len(got)} dead letters, not {len(bad)}, or other ones")
        if twice and self.terms.no_letter_twice:
            self.outcome.wrong.append(f"{twice} bad records are in the dead-letter topic twice")
        elif twice:
            self.outcome.notes.append(f"{twice} of {len(bad)} dead letters more than once")

    def _measure(self) -> None:
        outcome, watch = self.outcome, self.watch
        outcome.replayed, outcome.read_again = watch.replayed, watch.read_again
        outcome.refused = watch.refused
        for fault_s in self._faults:
            back_s = watch.back_after_s(fault_s, usual_lag=self.terms.per_s)  # of one second
            if back_s is None:
                outcome.wrong.append(
                    f"no recovery from the fault at {fault_s - self._began_s:.0f} s"
                )
            else:
                outcome.back_s.append(back_s)
            if (first_s := watch.first_save_s(fault_s)) is not None:
                outcome.first_save_s.append(first_s)
        outcome.seconds = time.monotonic() - self._began_s


def _events(records: Sequence[Sendable]) -> int:
    return sum(isinstance(record, Bad) or hasattr(record, "user_id") for record in records)


def judge(
    stored: Mapping[str, Profile], expected: Mapping[str, oracle.Expected]
) -> tuple[int, int, list[str]]:
    """Events lost and events counted twice, by the count of each profile; and all that differs."""
    lost = double = 0
    for user in stored.keys() | expected.keys():
        got = stored[user].events if user in stored else 0
        want = expected[user].events if user in expected else 0
        lost += max(0, want - got)
        double += max(0, got - want)
    wrong = differences(stored, expected)
    return lost, double, [f"{user}: {'; '.join(found)}"[:300] for user, found in wrong.items()]


def play(
    terms: Terms, seed: int, kafka: ApacheKafka, release: Release, folder: Path | None = None
) -> Outcome:
    """One schedule. What breaks it is in the outcome, too."""
    with ExitStack() as stack:
        folder = folder or Path(
            stack.enter_context(tempfile.TemporaryDirectory(prefix="penchant-chaos-"))
        )
        world = World(terms, seed, kafka, release, folder)
        try:
            return world.run()
        except AssertionError as error:
            world.outcome.wrong.append(str(error))
            return world.outcome
