"""What `stream/` and `profiles/` rely on of Kafka and Redis, asked of real ones and of the doubles.

Each contract is a function that is run twice: against servers that the tests start, and inside a
simulated world. A double that passes what the real one passes may stand for it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Protocol

import confluent_kafka as kafka
import numpy as np
import pytest
import redis
from confluent_kafka import TopicCollection
from confluent_kafka.admin import AdminClient, NewTopic, OffsetSpec
from redis.exceptions import NoScriptError, ResponseError

from profiles import schema
from profiles.errors import WritesLost
from profiles.items import ItemStore, Origin
from profiles.marks import Marks
from profiles.schema import ItemRecord, Keys, key64
from profiles.scripts import script_sha
from profiles.store import ProfileStore
from stream.intake import consumer_config
from stream.local_stack import ApacheKafka
from stream.settings import KafkaSettings, Settings
from stream.topics import partition_counts, topic_ids
from tests.chaos.simulated import broker_double
from tests.chaos.simulated.broker_double import Cluster
from tests.chaos.simulated.redis_double import Keyspace
from tests.chaos.simulated.scheduling import Process, Scheduler
from tests.chaos.simulated.seams import EPOCH_S, under
from tests.chaos.simulated.wires import Network
from tests.profile_events import LAYOUT

NOW_S = 1_800_000_000.0
P0, P1 = 11, 2**64 - 1  # sources


def simulated(body: Callable[[Cluster], None]) -> None:
    """Run it on a thread of a simulated world in which nothing goes wrong."""
    scheduler = Scheduler(1)
    keyspace = Keyspace(lambda: EPOCH_S + scheduler.now_s)
    cluster = Cluster(scheduler, lambda: EPOCH_S + scheduler.now_s)
    process = Process("test")

    def main() -> None:
        body(cluster)
        scheduler.finish()

    with under(scheduler, Network(scheduler, keyspace), cluster):
        scheduler.spawn(process, "test", main)
        try:
            scheduler.run()
        finally:
            scheduler.close([process])


# --- Redis

RedisContract = Callable[[redis.Redis], None]
KEYS = Keys("contract")


def hashes(client: redis.Redis) -> None:
    assert client.hset("h", mapping={"a": "1", "b": b"\xff"}) == 2
    assert client.hset("h", "a", "2") == 0
    assert client.hmget("h", ["a", "c", "b"]) == [b"2", None, b"\xff"]
    assert client.hget("none", "a") is None
    assert client.hgetall("h") == {b"a": b"2", b"b": b"\xff"}
    assert client.hgetall("none") == {}
    assert (client.hsetnx("h", "a", "7"), client.hsetnx("h", "new", "8")) == (0, 1)
    assert client.hdel("h", "new") == 1
    assert client.hdel("h", "a", "c") == 1
    assert client.hdel("h", "b") == 1
    assert list(client.scan_iter("h")) == []  # an empty hash is none


def strings_and_expiry(client: redis.Redis) -> None:
    client.set("s", "x")
    assert client.get("s") == b"x"
    assert client.expire("s", 100) == 1
    assert 98 <= client.ttl("s") <= 100
    client.set("s", "y")
    assert client.ttl("s") == -1
    assert client.expire("none", 100) == 0
    assert client.unlink("s", "none") == 1
    assert client.get("s") is None
    client.hset("h", "a", "1")
    with pytest.raises(ResponseError, match="WRONGTYPE"):
        client.get("h")


def sets(client: redis.Redis) -> None:
    assert client.sadd("w", "ann", "ben") == 2
    assert client.sadd("w", "ann") == 0
    assert sorted(client.srandmember("w", 10)) == [b"ann", b"ben"]
    assert client.srandmember("none", 10) == []
    assert client.srandmember("none") is None
    assert client.srem("w", "ann", "cem") == 1
    assert client.smembers("w") == {b"ben"}


def streams(client: redis.Redis) -> None:
    first = client.xadd("x", {"item": "1"}, maxlen=100)
    second = client.xadd("x", {"item": "2"}, maxlen=100)
    assert client.xrevrange("x", count=1) == [(second, {b"item": b"2"})]
    ((_, entries),) = _pairs(client.xread({"x": first}, count=10))
    assert entries == [(second, {b"item": b"2"})]
    assert not client.xread({"x": second}, count=10)
    assert client.xrevrange("none", count=1) == []


def _pairs(reply: Any) -> Any:
    return reply.items() if isinstance(reply, dict) else reply


def scans_and_unknown_commands(client: redis.Redis) -> None:
    for name in ("n:item:1", "n:item:2", "n:other"):
        client.set(name, "")
    assert set(client.scan_iter("n:item:*")) == {b"n:item:1", b"n:item:2"}
    assert client.execute_command("COMMAND INFO", "NOSUCH") == [None]
    with pytest.raises(ResponseError, match="unknown command"):
        client.execute_command("NOSUCH")


def a_pipeline_goes_on_behind_an_error(client: redis.Redis) -> None:
    pipe = client.pipeline(transaction=False)
    pipe.set("s", "x")
    pipe.hget("s", "a")
    pipe.set("t", "y")
    with pytest.raises(ResponseError, match="WRONGTYPE"):
        pipe.execute()
    assert client.get("t") == b"y"


def scripts_are_forgotten_and_loaded(client: redis.Redis) -> None:
    sha = script_sha(schema.AWAITED_SCRIPT)
    client.script_flush()
    with pytest.raises(NoScriptError):
        client.evalsha(sha, 1, "w")
    assert client.script_load(schema.AWAITED_SCRIPT) == sha
    client.sadd("w", "ann")
    assert client.evalsha(sha, 2, "none", "w") == [2]
    assert client.evalsha(sha, 1, "none") == []


def saves_are_fenced(client: redis.Redis) -> None:
    ann, ben = (
        ProfileStore(client, KEYS, LAYOUT, ttl_s=1_000, writer=writer) for writer in (1, 2**40)
    )
    held, late = ann.load(["u"]), ben.load(["u"])
    assert ann.save(["u"], held, [0], {}, NOW_S) == []
    assert ben.save(["u"], late, [0], {}, NOW_S) == [0]
    assert ben.load(["u"]).fences == [client.hget(KEYS.profile("u"), "fence")]
    assert client.ttl(KEYS.profile("u")) > 0
    # A save that comes twice counts as done.
    sha, key = client.script_load(schema.SAVE_SCRIPT), KEYS.profile("v")
    for _ in range(2):
        five = ["", "fence", "state", "glance", "0"]
        assert client.evalsha(sha, 2, key, "trail", *five, "", "", "") == []
    assert client.evalsha(sha, 2, key, "trail", "", "other", "", "", "0", "", "", "") == [1]


def an_erased_profile_has_no_outlook(client: redis.Redis) -> None:
    key = KEYS.profile("u")
    client.hset(key, mapping={"fence": "a", "next": "n", "heads": "h"})
    sha = client.script_load(schema.PUT_OUTLOOK_SCRIPT)
    assert client.evalsha(sha, 1, key, "b", "", "") == [1]
    sha = client.script_load(schema.ERASE_SCRIPT)
    assert client.evalsha(sha, 2, key, "t", "a", "b", "s", "g", "0", "", "", "") == []
    assert client.hgetall(key) == {b"fence": b"b", b"state": b"s", b"glance": b"g"}


def writes_that_were_lost_are_noticed(client: redis.Redis) -> None:
    marks = Marks(client, KEYS)
    marks.first(may_be_older=True)
    assert marks.claim([P0, P1]) == ({}, False)
    marks.advance({P0: 7, P1: 2**40})
    marks.advance({P0: 5})
    assert marks.claim([P0, 3, P1]) == ({P0: 7, P1: 2**40}, False)
    for key in list(client.scan_iter(f"{KEYS.namespace}:trail:*")):
        assert 0 < client.ttl(key) <= schema.TRAIL_TTL_S
        client.unlink(key)
    with pytest.raises(WritesLost):
        marks.advance({P0: 9})
    marks.begin_anew()
    assert marks.claim([P0]) == ({P0: 7}, False)


def items_are_kept_by_the_latest_offset(client: redis.Redis) -> None:
    items = ItemStore(client, KEYS, marks=Marks(client, KEYS))
    lamp, key = ItemRecord("A-1", "Lamp"), key64("A-1")
    begin = items.changes_end()
    items.put([ItemRecord("A-1", "From an event")], ["1" * 16], [None])
    items.put([lamp], ["2" * 16], [Origin(P0, 5)])
    items.put([ItemRecord("A-1", "Older")], ["3" * 16], [Origin(P0, 4)])
    items.put([ItemRecord("A-1", "From an event")], ["1" * 16], [None])
    assert items.records([key, 1]) == {key: (lamp, "2" * 16)}
    end, changed = items.changes_since(begin)
    assert changed == {key: "2" * 16}
    assert items.changes_since(end) == (end, {})
    assert items.changes_end() == end
    assert list(items.item_pages()) == [[key]]
    vector = np.ones((1, 4), np.float32)
    items.put_vectors("space", ["A-1"], ["3" * 16], 2 * vector)
    items.put_vectors("space", ["A-1"], ["2" * 16], vector)
    found = items.vectors("space", {"A-1": "2" * 16})
    assert found["A-1"].tolist() == vector[0].tolist()
    items.drop_vectors("space", ["A-1"])
    assert items.vectors("space", {"A-1": "2" * 16}) == {}
    items.set_space("space")
    assert items.current_space() == "space"


def who_waits_is_served_once(client: redis.Redis) -> None:
    items = ItemStore(client, KEYS, marks=Marks(client, KEYS))
    items.wait_for({"ann": [5, 6], "ben": [5]})
    assert items.awaited([4, 5, 6]) == {5, 6}
    served: list[str] = []
    items.resolve_waiting(5, served.extend)
    assert sorted(served) == ["ann", "ben"]
    assert items.awaited([5, 6]) == {6}


REDIS: Sequence[RedisContract] = (
    hashes,
    strings_and_expiry,
    sets,
    streams,
    scans_and_unknown_commands,
    a_pipeline_goes_on_behind_an_error,
    scripts_are_forgotten_and_loaded,
    saves_are_fenced,
    an_erased_profile_has_no_outlook,
    writes_that_were_lost_are_noticed,
    items_are_kept_by_the_latest_offset,
    who_waits_is_served_once,
)


@pytest.mark.redis
@pytest.mark.parametrize("contract", REDIS, ids=lambda contract: contract.__name__)
def test_redis_does_what_the_double_does(
    contract: RedisContract, redis_client: redis.Redis
) -> None:
    contract(redis_client)


@pytest.mark.parametrize("contract", REDIS, ids=lambda contract: contract.__name__)
def test_the_double_does_what_redis_does(contract: RedisContract) -> None:
    def body(_: Cluster) -> None:
        with redis.Redis.from_url("redis://simulated:6379/0") as client:
            contract(client)

    simulated(body)


# --- Kafka

SESSION_S = 6.0


class Brokers(Protocol):
    """What a contract gets."""

    settings: Settings

    def create(self, topic: str, partitions: int) -> str:
        """The topic's name."""

    def send(self, topic: str, partition: int, values: Sequence[bytes]) -> None: ...
    def consumer(self, config: dict[str, Any]) -> Any: ...
    def admin(self) -> Any: ...


BrokerContract = Callable[[Brokers], None]


class Reader:
    """A consumer in a group, with a diary of what it is told."""

    def __init__(self, brokers: Brokers, topic: str, protocol: str, **more: Any) -> None:
        self.told: list[tuple[str, list[int]]] = []
        self.answers: list[Any] = []
        self.read: list[tuple[int, int]] = []
        config = consumer_config(brokers.settings, protocol, self._answered, topic) | more
        self.consumer = brokers.consumer(config)
        self.consumer.subscribe(
            [topic],
            on_assign=partial(self._told, "assigned"),
            on_revoke=partial(self._told, "revoked"),
            on_lost=partial(self._told, "lost"),
        )

    def _told(self, what: str, consumer: Any, partitions: list[Any]) -> None:
        if partitions:
            self.told.append((what, sorted(p.partition for p in partitions)))

    def _answered(self, error: Any, partitions: list[Any]) -> None:
        self.answers.append(error)

    @property
    def held(self) -> list[int]:
        return sorted(p.partition for p in self.consumer.assignment())

    def turn(self) -> None:
        for message in self.consumer.consume(100, 0.1):
            if message.error() is None:
                self.read.append((message.partition(), message.offset()))


def _until(condition: Callable[[], object], *readers: Reader) -> None:
    for _ in range(400):
        if condition():
            return
        for reader in readers:
            reader.turn()
    pytest.fail(f"never came true: {[(r.told, r.held, r.read) for r in readers]}")


def _place(
    topic: str, partition: int, offset: int = kafka.OFFSET_INVALID, metadata: str = ""
) -> Any:
    return kafka.TopicPartition(topic, partition, offset, metadata)


def offsets_are_kept_with_their_metadata(brokers: Brokers, protocol: str) -> None:
    topic = brokers.create("offsets", 2)
    brokers.send(topic, 0, [b"a", b"b", b"c"])
    first = Reader(brokers, topic, protocol)
    _until(lambda: len(first.read) == 3, first)
    assert first.read == [(0, 0), (0, 1), (0, 2)]
    first.consumer.commit(offsets=[_place(topic, 0, 1, "id")], asynchronous=False)
    first.consumer.commit(offsets=[_place(topic, 0, 2, "id")], asynchronous=True)
    _until(lambda: first.answers, first)
    assert [error for error in first.answers if error is not None] == []
    first.consumer.close()
    second = Reader(brokers, topic, protocol)
    _until(lambda: second.held == [0, 1], second)
    kept = second.consumer.committed([_place(topic, 0), _place(topic, 1)], timeout=10)
    assert [(p.offset, p.metadata or "") for p in kept] == [(2, "id"), (kafka.OFFSET_INVALID, "")]
    _until(lambda: second.read, second)
    assert second.read == [(0, 2)]
    second.consumer.close()


def a_seek_goes_back_and_a_pause_holds(brokers: Brokers, protocol: str) -> None:
    topic = brokers.create("seek", 1)
    brokers.send(topic, 0, [b"a", b"b", b"c"])
    reader = Reader(brokers, topic, protocol)
    _until(lambda: len(reader.read) == 3, reader)
    reader.consumer.seek(_place(topic, 0, 1))
    _until(lambda: len(reader.read) == 5, reader)
    assert reader.read[3:] == [(0, 1), (0, 2)]
    reader.consumer.pause(reader.consumer.assignment())
    brokers.send(topic, 0, [b"d"])
    for _ in range(10):
        reader.turn()
    assert len(reader.read) == 5
    reader.consumer.resume(reader.consumer.assignment())
    _until(lambda: len(reader.read) == 6, reader)
    assert reader.consumer.get_watermark_offsets(_place(topic, 0), timeout=10) == (0, 4)
    with pytest.raises(kafka.KafkaException):
        reader.consumer.seek(_place(topic, 7, 0))
    reader.consumer.close()


def partitions_are_shared_in_ranges(brokers: Brokers, protocol: str) -> None:
    topic = brokers.create("shared", 4)
    first, second = Reader(brokers, topic, protocol), None
    _until(lambda: first.held == [0, 1, 2, 3], first)
    second = Reader(brokers, topic, protocol)
    _until(lambda: sorted((first.held, second.held)) == [[0, 1], [2, 3]], first, second)
    given = first.told[1]
    if protocol == "classic":
        assert given == ("revoked", [0, 1, 2, 3])  # all of it, and half of it again
        assert first.told[2] == ("assigned", first.held)
    else:
        assert given == ("revoked", second.held)  # what goes, and no more
    assert second.told == [("assigned", second.held)]
    second.consumer.close()
    assert second.told[1:] == [("revoked", second.told[0][1])]
    _until(lambda: first.held == [0, 1, 2, 3], first)
    first.consumer.close()


def whoever_is_replaced_is_told_so_late(brokers: Brokers, protocol: str) -> None:
    """And what it was asked to give back while it slept does not count as lost."""
    topic = brokers.create("late", 2)
    brokers.send(topic, 0, [b"a", b"b"])
    zombie = Reader(brokers, topic, protocol, **_SILENT)
    _until(lambda: len(zombie.read) == 2, zombie)
    second = Reader(brokers, topic, protocol)
    _until(lambda: second.held == [0, 1], second)
    second.consumer.commit(offsets=[_place(topic, 0, 2)], asynchronous=False)
    with pytest.raises(kafka.KafkaException):
        zombie.consumer.commit(offsets=[_place(topic, 0, 1)], asynchronous=False)
    assert second.consumer.committed([_place(topic, 0)], timeout=10)[0].offset == 2
    _until(lambda: sorted((zombie.held, second.held)) == [[0], [1]], zombie, second)
    gone = zombie.told[1:-1]
    if protocol == "classic":
        assert gone == [("revoked", [0, 1])]
    else:
        assert [what for what, _ in gone] == ["revoked", "lost"]
        assert sorted(gone[0][1] + gone[1][1]) == [0, 1]
    zombie.consumer.close()
    second.consumer.close()


def whoever_is_silent_loses_what_it_has(brokers: Brokers, protocol: str) -> None:
    topic = brokers.create("lost", 2)
    silent = Reader(brokers, topic, protocol, **_SILENT)
    awake = Reader(brokers, brokers.create("other", 1), protocol)
    _until(lambda: silent.held == [0, 1], silent, awake)
    for _ in range(int(10 * (SESSION_S + 3))):
        awake.turn()
    _until(lambda: len(silent.told) == 3, silent, awake)
    assert silent.told[1:] == [("lost", [0, 1]), ("assigned", [0, 1])]
    silent.consumer.close()
    awake.consumer.close()


_SILENT = {"max.poll.interval.ms": int(SESSION_S * 1000)}


def topics_are_described(brokers: Brokers, protocol: str) -> None:
    topic, admin = brokers.create("described", 3), brokers.admin()
    brokers.send(topic, 1, [b"a", b"b"])
    assert partition_counts(admin, [topic]) == {topic: 3}
    ids = topic_ids(admin, [topic, "no.such"])
    assert ids[topic]
    assert ids["no.such"] is None
    places = {_place(topic, 1): OffsetSpec.latest(), _place(topic, 2): OffsetSpec.earliest()}
    assert _offsets(admin, places) == {1: 2, 2: 0}
    unknown = admin.describe_topics(TopicCollection(["no.such"]), request_timeout=10)["no.such"]
    with pytest.raises(kafka.KafkaException) as raised:
        unknown.result()
    assert raised.value.args[0].code() == kafka.KafkaError.UNKNOWN_TOPIC_OR_PART


def _offsets(admin: Any, places: Any) -> dict[int, int]:
    """A broker names itself a partition's leader a moment before it can answer as one."""
    deadline_s = time.monotonic() + 10
    while True:
        answers = admin.list_offsets(places, isolation_level=kafka.IsolationLevel.READ_COMMITTED)
        try:
            return {place.partition: f.result().offset for place, f in answers.items()}
        except kafka.KafkaException as error:
            is_early = error.args[0].code() == kafka.KafkaError.NOT_LEADER_FOR_PARTITION
            if not is_early or time.monotonic() > deadline_s:
                raise
            time.sleep(0.1)


KAFKA: Sequence[Callable[[Brokers, str], None]] = (
    offsets_are_kept_with_their_metadata,
    a_seek_goes_back_and_a_pause_holds,
    partitions_are_shared_in_ranges,
    whoever_is_replaced_is_told_so_late,
    whoever_is_silent_loses_what_it_has,
    topics_are_described,
)
both_protocols = pytest.mark.parametrize("protocol", ["classic", "consumer"])
each_contract = pytest.mark.parametrize("contract", KAFKA, ids=lambda contract: contract.__name__)


def _settings(namespace: str, bootstrap: str = "") -> Settings:
    kafka_settings = KafkaSettings(bootstrap=bootstrap, session_timeout_s=SESSION_S)
    return Settings(namespace=namespace, kafka=kafka_settings)


class Apache:
    """A real broker."""

    def __init__(self, server: ApacheKafka, namespace: str) -> None:
        self.settings = _settings(namespace, server.bootstrap)
        self._config = self.settings.kafka.client_config()
        self._admin = AdminClient(self._config)

    def create(self, topic: str, partitions: int) -> str:
        name = self.settings.topic(topic)
        for made in self._admin.create_topics([NewTopic(name, partitions, 1)]).values():
            made.result(30)
        self._until_led(name)
        return name

    def _until_led(self, topic: str) -> None:
        """A topic is made a moment before its partitions are led. Offsets are not asked before: a
        client keeps the answer that nobody leads, and gives it again and again."""
        deadline_s = time.monotonic() + 30
        while True:
            described = self._admin.describe_topics(TopicCollection([topic]))[topic]
            try:
                if all(partition.leader for partition in described.result(30).partitions):
                    return
            except kafka.KafkaException:
                pass
            assert time.monotonic() < deadline_s, f"{topic} is led by nobody"
            time.sleep(0.05)

    def send(self, topic: str, partition: int, values: Sequence[bytes]) -> None:
        producer = kafka.Producer(self._config)
        for value in values:
            producer.produce(topic, value, partition=partition)
        assert producer.flush(30) == 0

    def consumer(self, config: dict[str, Any]) -> kafka.Consumer:
        return kafka.Consumer(config)

    def admin(self) -> AdminClient:
        return self._admin


class Double:
    """The simulated ones."""

    def __init__(self, cluster: Cluster) -> None:
        self.settings = _settings("contract")
        self._cluster = cluster

    def create(self, topic: str, partitions: int) -> str:
        name = self.settings.topic(topic)
        self._cluster.create(name, partitions)
        return name

    def send(self, topic: str, partition: int, values: Sequence[bytes]) -> None:
        producer = broker_double.Producer(self._cluster)
        for value in values:
            producer.produce(topic, value, None, partition)
        assert producer.flush(30) == 0

    def consumer(self, config: dict[str, Any]) -> broker_double.Consumer:
        return broker_double.Consumer(self._cluster, config)

    def admin(self) -> broker_double.Admin:
        return broker_double.Admin(self._cluster)


@pytest.fixture
def apache(apache_kafka: ApacheKafka, namespace: str) -> Apache:
    return Apache(apache_kafka, namespace)


@pytest.mark.kafka
@both_protocols
@each_contract
def test_kafka_does_what_the_double_does(
    contract: Callable[[Brokers, str], None], protocol: str, apache: Apache
) -> None:
    contract(apache, protocol)


@both_protocols
@each_contract
def test_the_double_does_what_kafka_does(
    contract: Callable[[Brokers, str], None], protocol: str
) -> None:
    simulated(lambda cluster: contract(Double(cluster), protocol))
