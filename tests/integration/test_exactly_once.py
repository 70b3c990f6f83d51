"""The proof: whatever dies, stalls or restarts, each event is in its profile once.

Real shoppers' events go through Apache Kafka, two to four worker processes and a Redis with its
append-only file on, while workers, Redis and the broker are killed. Then every profile in Redis
is compared, field by field, with what the oracle makes of the topic's records.

`EXACTLY_ONCE_SEED=7 pytest tests/integration/test_exactly_once.py` does other harm to others.
"""

from __future__ import annotations

import os
import random
import signal
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from hashlib import sha1
from pathlib import Path
from urllib.parse import urlsplit

import pytest
import redis

from model.releases import Release
from profiles.schema import LOAD_SCRIPT, SAVE_SCRIPT, source_key
from stream import dead_letter
from stream.local_stack import ApacheKafka, RedisServer
from stream.settings import (
    KafkaSettings,
    ModelSettings,
    ProfileSettings,
    RedisSettings,
    Settings,
    StreamSettings,
)
from stream.topics import connect, create_topics, topic_ids
from tests import oracle
from tests.between import Between
from tests.integration.shop_traffic import (
    Expectation,
    Traffic,
    differences,
    films,
    stored_profiles,
)
from tests.integration.worker_process import (
    WorkerProcess,
    build_tiny_release,
    committed,
    eventually,
    wait_until_folded,
    workers,
)

pytestmark = [pytest.mark.kafka, pytest.mark.redis, pytest.mark.timeout(600)]

SEED = int(os.environ.get("EXACTLY_ONCE_SEED", "20261122"))
HEAVY, LIGHT = 10, 240  # shoppers, with about 3,000 events
SESSION_TIMEOUT_S = 6.0
RULES = oracle.Rules(categories=1_000)  # no bound is reached, so that every category is compared

Start = Callable[[Settings, str], WorkerProcess]


@pytest.fixture(scope="module")
def release(tmp_path_factory: pytest.TempPathFactory) -> Release:
    return build_tiny_release(tmp_path_factory.mktemp("release"))


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    with workers(tmp_path) as starter:
        yield starter


def _settings(
    namespace: str, kafka: ApacheKafka, redis_url: str, release: Release, protocol: str
) -> Settings:
    settings = Settings(
        namespace=namespace,
        kafka=KafkaSettings(
            bootstrap=kafka.bootstrap,
            partitions=6,
            group_protocol=protocol,
            session_timeout_s=SESSION_TIMEOUT_S,
        ),
        redis=RedisSettings(url=redis_url),
        stream=StreamSettings(batch_records=64),
        model=ModelSettings(releases=release.path.parent),
        profile=ProfileSettings(categories=RULES.categories),
    )
    create_topics(settings)
    return settings


def _assert_all_profiles_right(settings: Settings, redis_url: str, release: Release) -> str:
    """Compare every profile with the oracle; what was compared, in words."""
    expectation = Expectation(settings, release)
    expected = expectation.profiles(RULES)
    with redis.Redis.from_url(redis_url) as client:
        stored = stored_profiles(client, settings.namespace)
    wrong = differences(stored, expected)
    assert not wrong, f"{len(wrong)} of {len(expected)} profiles are wrong: {wrong}"
    _assert_rejects_kept(settings, expectation)
    counted = sum(profile.events for profile in stored.values())
    return f"{len(expectation.records)} records, {counted} events in {len(stored)} profiles"


def _assert_rejects_kept(settings: Settings, expectation: Expectation) -> None:
    """Every bad record, and nothing else, is in the dead-letter topic; some perhaps twice."""
    bad = {(r.partition, r.offset): r.value for r in expectation.records if r.bad}
    letters = dead_letter.read(settings, limit=10_000)
    assert {(x.partition, x.offset): x.value for x in letters} == bad


class _Chaos:
    """Does harm at seeded random moments while events flow, and counts it."""

    def __init__(self, start: Start, settings: Settings) -> None:
        self.chance = random.Random(SEED)
        self.alive: list[WorkerProcess] = []
        self.done: list[str] = []
        self.replayed = self.refused = self.went_back = 0.0
        self.saved_only: set[int] = set()  # partitions of those killed between save and commit
        self._start, self._settings = start, settings

    def join(self, name: str) -> WorkerProcess:
        self.alive.append(self._start(self._settings, name))
        return self.alive[-1]

    def amid_the_flow(self, worker: WorkerProcess) -> None:
        """Return at a random moment within half a second after this worker applied events."""
        before = worker.metric("penchant_events_applied")
        eventually(
            f"{worker.name} applies events\n{worker.log}",
            lambda: worker.metric("penchant_events_applied") > before,
        )
        threading.Event().wait(self.chance.uniform(0, 0.5))

    def kill_one(self) -> None:
        """One of those that were there before the latest came."""
        victim = self.chance.choice(self.alive[:-1])
        self.amid_the_flow(victim)
        self._note(victim)
        victim.kill()
        self.alive.remove(victim)
        self.done.append(f"kill -9 {victim.name}")

    def kill_one_between_save_and_commit(self) -> None:
        """Stop a worker at random moments, until one is found at which it has saved what it has not
        committed; it never goes on from there."""
        victim = self.chance.choice(self.alive[:-1])

        def is_between() -> bool:
            self.amid_the_flow(victim)
            victim.send(signal.SIGSTOP)
            threading.Event().wait(0.3)  # what is on the slow wire arrives
            before = self._saved_only()
            threading.Event().wait(0.5)  # twice as long as others take from a save to its commit
            now = self._saved_only()
            self.saved_only = {p for p in before if now.get(p) == before[p]}
            if not self.saved_only:
                victim.send(signal.SIGCONT)
            return bool(self.saved_only)

        eventually(f"{victim.name} is between a save and its commit", is_between)
        victim.kill()  # it cannot be asked what it counted
        self.alive.remove(victim)
        self.done.append(f"kill -9 {victim.name} between save and commit")

    def _saved_only(self) -> dict[int, tuple[int, int]]:
        """Partition -> offsets saved and committed, where there is more saved."""
        topic = self._settings.topic("events")
        topic_id = topic_ids(connect(self._settings.kafka)[0], [topic])[topic] or ""
        places = [(topic, p) for p in range(self._settings.kafka.partitions)]
        done = committed(self._settings, places)
        saved: Counter[int] = Counter()
        with redis.Redis.from_url(self._settings.redis.url) as client:
            for profile in stored_profiles(client, self._settings.namespace).values():
                for source, offset in profile.watermark.items():
                    saved[source] = max(saved[source], offset)
        ahead = {p: (saved[source_key(topic_id, p)], at) for (_, p), at in done.items()}
        return {p: (at, was) for p, (at, was) in ahead.items() if at > max(was, 0)}

    def stall_one(self) -> None:
        """Stop a worker for longer than its session, until the others have all partitions."""
        victim = self.chance.choice(self.alive)
        self.amid_the_flow(victim)
        victim.send(signal.SIGSTOP)
        others = [worker for worker in self.alive if worker is not victim]
        eventually(
            "the others took over",
            lambda: sum(w.metric("penchant_partitions_assigned") for w in others) == 12,
        )
        victim.send(signal.SIGCONT)
        eventually(f"{victim.name} knows that it lost", lambda: "lost " in victim.log)
        victim.wait_ready()
        self.done.append(f"stalled {victim.name}")

    def kill_server(self, name: str, server: RedisServer | ApacheKafka) -> None:
        self.amid_the_flow(self.chance.choice(self.alive))
        server.kill()
        server.restart()
        self.amid_the_flow(self.chance.choice(self.alive))
        self.done.append(f"kill -9 {name}")

    def note_all(self) -> None:
        """Take down what the workers that are left have counted."""
        for worker in self.alive:
            self._note(worker)

    def _note(self, worker: WorkerProcess) -> None:
        self.replayed += worker.metric("penchant_events_replayed")
        self.refused += worker.metric("penchant_profile_saves_refused")
        self.went_back += worker.metric("penchant_redis_went_back")


def _script(lua: str) -> bytes:
    """The name by which clients call it."""
    return sha1(lua.encode()).hexdigest().encode()


class _SlowWire(Between):
    """A Redis that answers loads and saves after up to a quarter of a second: so a worker is mostly
    killed while it has events in hand, before, within or after their save."""

    def __init__(self, upstream: int) -> None:
        super().__init__(upstream, on_request=self._delay)
        self._chance = random.Random(SEED)

    def _delay(self, request: bytes) -> bytes:
        if _LOAD in request or _SAVE in request:
            threading.Event().wait(self._chance.uniform(0, 0.25))
        return request


_LOAD, _SAVE = _script(LOAD_SCRIPT), _script(SAVE_SCRIPT)


@pytest.mark.parametrize("protocol", ["consumer", "classic"])
def test_every_event_counts_once_while_workers_and_servers_die(
    protocol: str,
    namespace: str,
    release: Release,
    start: Start,
    start_apache_kafka: Callable[..., ApacheKafka],
    start_redis: Callable[..., RedisServer],
) -> None:
    kafka = start_apache_kafka()
    # What Redis loses is read again (test_failover); here it loses nothing, and nobody thinks so.
    store = start_redis(appendonly=True, appendfsync="always")
    wire = _SlowWire(store.port)
    through = store.url.replace(f":{store.port}/", f":{wire.port}/")
    settings = _settings(namespace, kafka, through, release, protocol)
    chaos = _Chaos(start, settings)
    for name in ("ann", "bob"):
        chaos.join(name)
    for worker in chaos.alive:
        worker.wait_ready()
    traffic = Traffic(settings, films(SEED, HEAVY, LIGHT), per_s=80).start()

    third = chaos.join("cem")
    chaos.kill_one()
    third.wait_ready()
    chaos.stall_one()
    if protocol == "consumer":  # the servers do not care which
        chaos.kill_server("redis", store)
        chaos.kill_server("broker", kafka)
    chaos.join("dee")
    chaos.kill_one_between_save_and_commit()

    flowing = traffic.sent
    traffic.finish()
    wait_until_folded(settings, timeout_s=180)
    compared = _assert_all_profiles_right(settings, store.url, release)
    chaos.note_all()
    wire.close()
    # A repeat for Redis' sake replays nothing: these were read again by somebody else.
    assert chaos.saved_only
    assert chaos.replayed > 0
    assert chaos.went_back == 0
    print(
        f"\n{protocol}: {'; '.join(chaos.done)} (during the first {flowing} records)\n{compared}; "
        f"{chaos.replayed:.0f} events were found applied before, {chaos.refused:.0f} saves refused"
    )


@pytest.mark.parametrize("protocol", ["consumer", "classic"])
def test_the_save_of_a_stalled_worker_is_refused_once_its_successor_has_saved(
    protocol: str,
    namespace: str,
    release: Release,
    start: Start,
    apache_kafka: ApacheKafka,
    redis_url: str,
) -> None:
    settings = _settings(namespace, apache_kafka, redis_url, release, protocol)
    save = _HeldSave()
    wire = Between(_port(redis_url), on_request=save)
    through = redis_url.replace(f":{_port(redis_url)}/", f":{wire.port}/")
    stalled = start(settings.model_copy(update={"redis": RedisSettings(url=through)}), "stalled")
    successor = start(settings, "successor")
    for worker in (stalled, successor):
        worker.wait_ready()
    traffic = films(SEED, heavy=3, light=60)
    Traffic(settings, traffic[:-200], per_s=10_000).start().finish()
    wait_until_folded(settings)

    save.wanted.set()
    Traffic(settings, traffic[-200:], per_s=10_000).start().finish()
    assert save.holding.wait(60), "no save was on its way"
    stalled.send(signal.SIGSTOP)
    wait_until_folded(settings)  # by the successor, which got the partitions and read again
    save.let_go.set()
    stalled.send(signal.SIGCONT)
    eventually("a refused save", lambda: stalled.metric("penchant_profile_saves_refused") > 0)
    eventually("events found applied", lambda: stalled.metric("penchant_events_replayed") > 0)
    eventually("it knows that it lost", lambda: "lost " in stalled.log)
    stalled.wait_ready()
    wait_until_folded(settings)
    compared = _assert_all_profiles_right(settings, redis_url, release)
    refused = stalled.metric("penchant_profile_saves_refused")
    wire.close()
    print(f"\n{protocol}: {refused:.0f} stale saves refused; {compared}")


class _HeldSave:
    """On the wire to Redis: keeps saves back from when they are wanted until they are let go."""

    def __init__(self) -> None:
        self.wanted = threading.Event()
        self.holding = threading.Event()
        self.let_go = threading.Event()

    def __call__(self, request: bytes) -> bytes:
        if self.wanted.is_set() and _SAVE in request:
            self.holding.set()
            self.let_go.wait()
        return request


def _port(redis_url: str) -> int:
    return urlsplit(redis_url).port or 0
