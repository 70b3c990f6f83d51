"""The proof for neighbours: whenever workers die, each pair of events counts once.

Real shoppers' events go through Apache Kafka and worker processes into Redis. Workers are killed
with a profile's save on the wire (its pairs are in the topic, the profile is not saved), with an
item's save on the wire, and at any moment. Then every item's tally is compared with what plain
Python makes of the topic's records.
"""

from __future__ import annotations

import random
import threading
from collections.abc import Callable, Iterator
from hashlib import sha1
from pathlib import Path
from urllib.parse import urlsplit

import pytest
import redis

from model.releases import Release
from profiles import neighbours
from profiles.neighbour_store import NeighbourStore
from profiles.neighbours import Neighbours, TallyLayout
from profiles.schema import NEAR, SAVE_NEIGHBOURS_SCRIPT, SAVE_SCRIPT, TALLY, Keys
from stream.errors import UserError
from stream.events import Forget, Item, View
from stream.intake import MicroBatch, Slice
from stream.local_stack import ApacheKafka
from stream.neighbours import NeighbourFolder, pairs_partitions
from stream.producer import EventProducer
from stream.settings import (
    KafkaSettings,
    LearnSettings,
    ModelSettings,
    RedisSettings,
    Settings,
    StreamSettings,
)
from stream.topics import create_topics
from tests import neighbour_oracle
from tests.between import Between
from tests.integration.shop_traffic import (
    Expectation,
    Traffic,
    differences,
    films,
    read_back,
    stored_profiles,
)
from tests.integration.worker_process import (
    LocalWorker,
    WorkerProcess,
    build_tiny_release,
    eventually,
    wait_until_folded,
    workers,
)

pytestmark = [pytest.mark.kafka, pytest.mark.redis]

SEED = 20261124
Start = Callable[[Settings, str], WorkerProcess]


@pytest.fixture(scope="module")
def release(tmp_path_factory: pytest.TempPathFactory) -> Release:
    return build_tiny_release(tmp_path_factory.mktemp("release"))


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    with workers(tmp_path) as starter:
        yield starter


class _Trap:
    """On the wire to Redis: holds the next call of a script until its worker is dead, and then
    lets it vanish."""

    def __init__(self) -> None:
        self._script = b""
        self._caught = threading.Event()
        self._sprung = threading.Event()

    def __call__(self, request: bytes) -> bytes:
        if self._script and self._script in request:
            self._caught.set()
            self._sprung.wait()
            raise OSError("the worker is gone")
        return request

    def kill(self, worker: WorkerProcess, script: str) -> None:
        self._script = sha1(script.encode()).hexdigest().encode()
        assert self._caught.wait(60), f"no such call\n{worker.log}"
        worker.kill()
        self._sprung.set()


def stored_neighbours(client: redis.Redis, namespace: str) -> dict[int, Neighbours]:
    """Every item's tally of a namespace."""
    pattern = Keys(namespace).neighbours(0)[:-16] + "*"
    return {
        int(key[-16:], 16): neighbours.decode(*client.hmget(key, [TALLY, NEAR]))
        for key in client.scan_iter(match=pattern, count=1000)
    }


def test_every_pair_counts_once_while_workers_die(
    namespace: str,
    release: Release,
    start: Start,
    apache_kafka: ApacheKafka,
    redis_url: str,
) -> None:
    settings = Settings(
        namespace=namespace,
        kafka=KafkaSettings(bootstrap=apache_kafka.bootstrap, partitions=4, session_timeout_s=6.0),
        redis=RedisSettings(url=redis_url),
        stream=StreamSettings(batch_records=64),
        model=ModelSettings(releases=release.path.parent),
        learn=LearnSettings(neighbours=True),
    )
    create_topics(settings)
    port = urlsplit(redis_url).port or 0
    replayed = 0.0

    def through(trap: _Trap) -> Settings:
        wire = Between(port, on_request=trap)
        url = redis_url.replace(f":{port}/", f":{wire.port}/")
        return settings.model_copy(update={"redis": RedisSettings(url=url)})

    first, second = _Trap(), _Trap()
    ann, bob = start(through(first), "ann"), start(settings, "bob")
    for worker in (ann, bob):
        worker.wait_ready()
    traffic = [r for r in films(SEED, heavy=5, light=100) if not isinstance(r, Forget)]
    third = len(traffic) // 3
    flow = Traffic(settings, traffic[:third], per_s=60).start()
    cem = start(through(second), "cem")
    first.kill(ann, SAVE_SCRIPT)
    cem.wait_ready()
    flow.finish()
    flow = Traffic(settings, traffic[third : 2 * third], per_s=60).start()
    second.kill(cem, SAVE_NEIGHBOURS_SCRIPT)
    dee = start(settings, "dee").wait_ready()
    flow.finish()
    before = bob.metric("penchant_pairs_applied")
    flow = Traffic(settings, traffic[2 * third :], per_s=60).start()
    eventually("bob folds pairs", lambda: bob.metric("penchant_pairs_applied") > before)
    threading.Event().wait(random.Random(SEED).uniform(0, 0.5))
    replayed += bob.metric("penchant_pairs_replayed")
    bob.kill()
    flow.finish()
    wait_until_folded(settings)

    expectation = Expectation(settings, release)
    with redis.Redis.from_url(redis_url) as client:
        stored = stored_neighbours(client, namespace)
        profiles = stored_profiles(client, namespace)
    wrong = neighbour_oracle.compare(stored, neighbour_oracle.fold(expectation.events()))
    assert not wrong, f"{len(wrong)} differences in {len(stored)} items: {wrong[:20]}"
    assert differences(profiles, expectation.profiles()) == {}
    replayed += dee.metric("penchant_pairs_replayed")
    assert replayed > 0  # or nobody ever sent a pair twice, and nothing was shown
    pairs = sum(len(item.near) for item in stored.values())
    print(
        f"\n3 workers killed during {len(traffic)} records: "
        f"{len(stored)} items, {pairs} neighbours right, {replayed:.0f} copies of pairs left out"
    )


def test_large_batches_and_forwarded_events_give_every_pair_once(
    namespace: str, release: Release, apache_kafka: ApacheKafka, redis_url: str
) -> None:
    """Shoppers folded in lanes, and half of them sent on from a partition that is not theirs; the
    pairs are folded by a reader of its own."""
    settings = Settings(
        namespace=namespace,
        kafka=KafkaSettings(bootstrap=apache_kafka.bootstrap, partitions=3),
        redis=RedisSettings(url=redis_url),
        stream=StreamSettings(repartition=True),
        model=ModelSettings(releases=release.path.parent),
        learn=LearnSettings(neighbours=True),
    )
    create_topics(settings)
    chance = random.Random(SEED)
    with EventProducer(settings.kafka.client_config(), namespace) as producer:
        for i in range(30):
            producer.send_item(Item(item_id=f"i{i}", title=f"thing {i}"))
        for step in range(4):
            for u in range(900):
                seen = View(
                    user_id=f"u{u}",
                    item_id=f"i{chance.randrange(30)}",
                    ts=1_760_000_000_000 + step * 60_000 + u % 7,
                )
                raw, partition = seen.to_json(), u % 3  # wherever it belongs
                producer.send_bytes("events", b"", raw, partition=partition)
    with LocalWorker(settings), LocalWorker(settings):
        wait_until_folded(settings.model_copy(update={"learn": LearnSettings()}))
    with redis.Redis.from_url(redis_url) as client:
        store = NeighbourStore(
            client, Keys(namespace), TallyLayout(), ttl_s=1e9, writer=1, where=redis_url
        )
        folder = NeighbourFolder(store)
        values = [
            [r.value for r in read_back(settings, "pairs") if r.partition == p] for p in (0, 1, 2)
        ]
        for _ in range(2):  # and once more, as after a crash
            folder.fold(
                MicroBatch(tuple(Slice("pairs", p, 0, p, values=v) for p, v in enumerate(values)))
            )
        stored = stored_neighbours(client, namespace)
    wrong = neighbour_oracle.compare(
        stored, neighbour_oracle.fold(Expectation(settings, release).events())
    )
    assert not wrong, f"{len(wrong)} differences in {len(stored)} items: {wrong[:20]}"
    assert len(stored) == 30


def test_neighbours_need_their_topic(namespace: str, apache_kafka: ApacheKafka) -> None:
    kafka = KafkaSettings(bootstrap=apache_kafka.bootstrap, partitions=5)
    without = Settings(namespace=namespace, kafka=kafka)
    create_topics(without)
    settings = without.model_copy(update={"learn": LearnSettings(neighbours=True)})
    with pytest.raises(UserError, match="pairs: run `penchant topics create`"):
        pairs_partitions(settings)
    create_topics(settings)
    assert pairs_partitions(settings) == 5
