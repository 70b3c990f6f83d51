"""Redis fails over and loses what it had acknowledged; no event is lost, and none counts twice.

A Redis that starts again from an older file, and a replica that is promoted while it was behind, on
a wire that a worker holds on to. What was saved in between had its offsets committed.
"""

from __future__ import annotations

import random
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import redis

from model.releases import Release
from profiles.items import ItemStore
from profiles.schema import OLDER, Keys, key64
from stream import metrics
from stream.events import Forget, Item
from stream.local_stack import ApacheKafka, RedisServer
from stream.settings import (
    KafkaSettings,
    LearnSettings,
    ModelSettings,
    ProfileSettings,
    RedisSettings,
    Settings,
    StreamSettings,
)
from stream.topics import create_topics
from tests import neighbour_oracle, oracle
from tests.between import Between
from tests.integration.shop_traffic import (
    Expectation,
    Sendable,
    Traffic,
    differences,
    films,
    stored_profiles,
)
from tests.integration.test_neighbours import stored_neighbours
from tests.integration.worker_process import (
    LocalWorker,
    build_tiny_release,
    eventually,
    wait_until_folded,
    workers,
)

pytestmark = [pytest.mark.kafka, pytest.mark.redis, pytest.mark.timeout(300)]

SEED = 20261125
RULES = oracle.Rules(categories=1_000)  # no bound is reached, so that every category is compared


class Store:
    """A Redis that workers reach over a wire, with a past that it can be thrown back into."""

    def __init__(self, start: Callable[..., RedisServer]) -> None:
        self._start = start
        self._serving = start()
        self._wire = Between(self._serving.port)
        self._behind: RedisServer | None = None
        self.url = self._serving.url.replace(f":{self._serving.port}/", f":{self._wire.port}/")

    @property
    def client(self) -> redis.Redis:
        return redis.Redis.from_url(self._serving.url)

    def remember(self) -> None:
        """What is there now is what will be left."""
        with self.client as client:
            client.save()

    def go_back(self) -> None:
        """Die, and start from the older file."""
        self._serving.kill()
        self._serving.restart()

    def fall_behind(self) -> None:
        """A replica has all up to now, and nothing of what comes."""
        self._behind = self._start(options={"replicaof": f"127.0.0.1 {self._serving.port}"})
        with redis.Redis.from_url(self._behind.url) as replica:
            eventually("the replica follows", lambda: _in_step(self.client, replica))
            replica.replicaof("NO", "ONE")

    def fail_over(self) -> None:
        """The primary dies, and the replica serves in its place."""
        assert self._behind is not None
        self._wire.lead_to(self._behind.port)
        self._serving.kill()
        self._serving = self._behind

    def close(self) -> None:
        self._wire.close()


def _in_step(primary: redis.Redis, replica: redis.Redis) -> bool:
    told, got = primary.info("replication"), replica.info("replication")
    up = got["master_link_status"] == "up"
    return bool(up and got["slave_repl_offset"] >= told["master_repl_offset"])


@pytest.fixture
def store(start_redis: Callable[..., RedisServer]) -> Iterator[Store]:
    made = Store(start_redis)
    yield made
    made.close()


@pytest.fixture(scope="module")
def release(tmp_path_factory: pytest.TempPathFactory) -> Release:
    return build_tiny_release(tmp_path_factory.mktemp("release"))


class Shop:
    """Traffic in three parts, and what must come of it."""

    def __init__(self, settings: Settings, release: Release, store: Store) -> None:
        self.settings = settings
        self._release = release
        self._store = store
        self.records = films(SEED, heavy=5, light=80)

    def part(self, number: int) -> list[Sendable]:
        third = len(self.records) // 3
        return self.records[number * third : (number + 1) * third if number < 2 else None]

    def send(self, number: int) -> None:
        Traffic(self.settings, self.part(number), per_s=10_000).start().finish()

    def fold(self, number: int) -> None:
        """Send, and wait until all of it is saved and committed."""
        self.send(number)
        wait_until_folded(self.settings)

    def assert_all_right(self) -> None:
        """Every profile as the oracle has it, and every item findable, within a minute."""
        expected = Expectation(self.settings, self._release).profiles(RULES)
        with self._store.client as client:

            def wrong() -> dict[str, list[str]]:
                return differences(stored_profiles(client, self.settings.namespace), expected)

            try:
                eventually("profiles as expected", lambda: not wrong(), 60)
            except AssertionError:
                found = wrong()
                raise AssertionError(f"{len(found)} of {len(expected)}: {found}") from None
            sent = [r for r in self.records if isinstance(r, Item)]
            items = ItemStore(client, Keys(self.settings.namespace))
            stored = items.records([key64(item.item_id) for item in sent])
            versions = {record.item_id: version for record, version in stored.values()}
            assert versions.keys() == {item.item_id for item in sent}
            assert items.vectors(self._release.space, versions).keys() == versions.keys()


@pytest.fixture
def shop(
    namespace: str, apache_kafka: ApacheKafka, store: Store, release: Release, tmp_path: Path
) -> Shop:
    settings = Settings(
        namespace=namespace,
        kafka=KafkaSettings(bootstrap=apache_kafka.bootstrap, partitions=4),
        redis=RedisSettings(url=store.url),
        stream=StreamSettings(batch_records=64, data_dir=tmp_path),
        model=ModelSettings(releases=release.path.parent),
        profile=ProfileSettings(categories=RULES.categories),
    )
    create_topics(settings)
    return Shop(settings, release, store)


def _read_again() -> float:
    return metrics.REGISTRY.get_sample_value("penchant_records_read_again_total") or 0.0


def test_what_a_restart_from_an_older_file_lost_is_folded_again(shop: Shop, store: Store) -> None:
    again = _read_again()
    with LocalWorker(shop.settings) as worker:
        shop.fold(0)
        store.remember()
        shop.fold(1)
        store.go_back()
        shop.send(2)
        shop.assert_all_right()
        assert worker.error is None
    assert _read_again() > again


def test_what_a_replica_lacked_is_folded_again(shop: Shop, store: Store) -> None:
    with LocalWorker(shop.settings) as worker:
        shop.fold(0)
        store.fall_behind()
        shop.fold(1)
        store.fail_over()
        shop.send(2)
        shop.assert_all_right()
        assert worker.error is None


def test_a_worker_with_nothing_to_do_notices(shop: Shop, store: Store) -> None:
    with LocalWorker(shop.settings) as worker:
        shop.fold(0)
        store.remember()
        shop.fold(1)
        shop.fold(2)
        store.go_back()
        shop.assert_all_right()
        assert worker.error is None


def test_a_worker_that_starts_afterwards_begins_where_redis_is(shop: Shop, store: Store) -> None:
    with LocalWorker(shop.settings):
        shop.fold(0)
        store.remember()
        shop.fold(1)
    store.go_back()
    shop.send(2)
    with LocalWorker(shop.settings) as worker:
        shop.assert_all_right()
        assert worker.error is None


def test_an_emptied_redis_is_filled_from_the_topics(shop: Shop, store: Store) -> None:
    with LocalWorker(shop.settings) as worker:
        shop.fold(0)
        shop.fold(1)
        with store.client as client:
            client.flushall()
        shop.send(2)
        shop.assert_all_right()
        with store.client as client:
            # Else a worker that starts now takes what was committed before for saved.
            assert client.hget(Keys(shop.settings.namespace).marks(), OLDER) == b"0"
        assert worker.error is None


@pytest.mark.parametrize("cached", [100_000, 0])
def test_neighbours_lose_nothing_either(
    shop: Shop, store: Store, release: Release, tmp_path: Path, cached: int
) -> None:
    """Pairs leave the worker before its save is refused, made of what it remembers or loads."""
    settings = shop.settings.model_copy(
        update={
            "learn": LearnSettings(neighbours=True),
            "stream": shop.settings.stream.model_copy(update={"cached_profiles": cached}),
        }
    )
    create_topics(settings)
    shop.settings = settings
    shop.records = [record for record in shop.records if not isinstance(record, Forget)]
    with workers(tmp_path) as start:
        worker = start(settings, "ann").wait_ready()
        shop.fold(0)
        store.remember()
        shop.fold(1)
        store.go_back()
        shop.send(2)
        shop.assert_all_right()
        expected = neighbour_oracle.fold(Expectation(settings, release).events())
        with store.client as client:

            def wrong() -> list[str]:
                stored = stored_neighbours(client, settings.namespace)
                return neighbour_oracle.compare(stored, expected)

            eventually(f"neighbours as expected\n{worker.log}", lambda: not wrong(), 60)
        assert worker.metric("penchant_redis_went_back") == 2  # for profiles, and for neighbours


def test_failovers_amid_the_flow_lose_nothing(shop: Shop, store: Store) -> None:
    chance = random.Random(SEED)
    with LocalWorker(shop.settings) as first, LocalWorker(shop.settings) as second:
        traffic = Traffic(shop.settings, shop.records, per_s=150).start()
        for _ in range(4):
            threading.Event().wait(chance.uniform(0.3, 1))
            store.remember()
            threading.Event().wait(chance.uniform(0.3, 1))
            store.go_back()
        traffic.finish()
        shop.assert_all_right()
        assert (first.error, second.error) == (None, None)
