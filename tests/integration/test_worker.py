"""A whole worker on Apache Kafka and Redis: hostile and awkward input, items that come late or
change, users on two partitions, servers that are down, and how it leaves.

Where nothing depends on the process, the worker runs on a thread here; signals and exit codes
are tested on `penchant updater` itself.
"""

from __future__ import annotations

import itertools
import json
import logging
import random
import signal
import socket
import struct
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import wait
from hashlib import sha1
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np
import pytest
import redis
from confluent_kafka import Producer
from confluent_kafka.admin import AlterConfigOpType, ConfigEntry, ConfigResource

from model.releases import Release
from profiles import Profile, ProfileReader, RedisUnavailable
from profiles.schema import SAVE_SCRIPT, key64, source_key
from stream import dead_letter, metrics
from stream.dead_letter import TooManyRejects
from stream.errors import UserError
from stream.events import Click, Event, Forget, Item, Purchase, Search, View
from stream.intake import MicroBatch, Slice
from stream.local_stack import ApacheKafka, RedisServer
from stream.processes import free_port
from stream.producer import EventProducer, partition_for
from stream.settings import (
    KafkaSettings,
    ModelSettings,
    ProfileSettings,
    RedisSettings,
    Settings,
    StreamSettings,
)
from stream.topics import connect, create_topics, keeps_arrival_times, topic_ids
from stream.updater import Prepared, Updater
from stream.updater_app import find_topics
from tests import oracle
from tests.between import Between
from tests.integration.shop_traffic import Expectation, differences, stored_profiles
from tests.integration.worker_process import (
    LocalWorker,
    WorkerProcess,
    build_tiny_release,
    committed,
    eventually,
    wait_until_folded,
    workers,
)

pytestmark = [pytest.mark.kafka, pytest.mark.redis]

SOURCES = (7, 8)
T_MS = 1_760_000_000_000
DAY_MS = 86_400_000
RULES = oracle.Rules(categories=1_000)
NEVER = -1001
LEAVING_S = 10.0  # for Faust and the interpreter to end, on a busy machine


class Shop:
    """A namespace: its settings, its producers, its profiles."""

    def __init__(self, settings: Settings, release: Release) -> None:
        self.settings, self.release = settings, release
        create_topics(settings)
        self.producer = EventProducer(settings.kafka.client_config(), settings.namespace)
        self._client = redis.Redis.from_url(settings.redis.url)

    def send(self, *records: Event | Item) -> None:
        """Returns when all are in the topics."""
        for record in records:
            if isinstance(record, Item):
                self.producer.send_item(record)
            else:
                self.producer.send(record)
        self.producer.flush()

    def send_raw(
        self,
        *values: bytes | None,
        key: bytes | None = None,
        bad: bool = False,
        timestamp_ms: int = 0,
        **config: Any,
    ) -> None:
        """Bytes, by a librdkafka producer that is set as `config` says (by default it places keys
        by CRC32). `bad`: to be rejected. timestamp_ms: of the records; 0 for now."""
        named = {name.replace("_", "."): value for name, value in config.items()}
        producer = Producer(self.settings.kafka.client_config() | {"linger.ms": 20} | named)
        failed: list[Any] = []
        for value in values:
            headers = [("test.bad", b"")] if bad else None
            producer.produce(
                self.settings.topic("events"),
                value,
                key,
                headers=headers,
                timestamp=timestamp_ms,
                on_delivery=lambda error, _: failed.append(error) if error else None,
            )
            producer.poll(0)
        assert producer.flush(30) == 0
        assert failed == []

    def keep_times_of(self, clock: str) -> None:
        """Let events carry the time of "CreateTime" or "LogAppendTime". Kafka 4 refuses what is
        more than an hour ahead, if not told otherwise; older brokers refuse nothing."""
        admin, _ = connect(self.settings.kafka)
        name = self.settings.topic("events")
        wanted = {
            "message.timestamp.type": clock,
            "message.timestamp.after.max.ms": str(2**63 - 1),
        }
        entries = [
            ConfigEntry(option, value, incremental_operation=AlterConfigOpType.SET)
            for option, value in wanted.items()
        ]
        resource = ConfigResource(ConfigResource.Type.TOPIC, name, incremental_configs=entries)
        for future in admin.incremental_alter_configs([resource]).values():
            future.result(30)
        arrival = clock == "LogAppendTime"
        eventually(clock, lambda: keeps_arrival_times(admin, name) is arrival)

    def make_events_again(self) -> None:
        """Delete the topic, and create one of the same name."""
        admin, _ = connect(self.settings.kafka)
        for future in admin.delete_topics([self.settings.topic("events")]).values():
            future.result(30)

        def created() -> bool:  # the old one takes its time to go
            try:
                return any(report.created for report in create_topics(self.settings))
            except UserError:
                return False

        eventually("the topic is made again", created)

    def batch(self, *records: Event, first: int = 0, partition: int = 0) -> MicroBatch:
        """Events as if read from a partition of two, from the offset `first` on."""
        n = len(records)
        piece = Slice(
            self.settings.topic("events"),
            partition,
            epoch=1,
            source=SOURCES[partition],
            offsets=list(range(first, first + n)),
            keys=[None] * n,
            values=[record.to_json() for record in records],
            timestamps_ms=[T_MS] * n,
            headers=[None] * n,
        )
        return MicroBatch((piece,), frozenset(SOURCES))

    def wait_folded(self) -> None:
        wait_until_folded(self.settings)

    def profiles(self) -> dict[str, Profile]:
        return stored_profiles(self._client, self.settings.namespace)

    def profile(self, user: str) -> Profile:
        return self.profiles()[user]

    def committed(self) -> int:
        """Of the first partition of the events."""
        place = (self.settings.topic("events"), 0)
        return committed(self.settings, [place])[place]

    def assert_right(self) -> Expectation:
        """Every profile as the oracle folds the topic, and every bad record a dead letter."""
        expectation = Expectation(self.settings, self.release)
        assert differences(self.profiles(), expectation.profiles(RULES)) == {}
        bad = {(r.partition, r.offset): (r.key, r.value) for r in expectation.records if r.bad}
        letters = dead_letter.read(self.settings, limit=100_000)
        assert {(x.partition, x.offset): (x.key, x.value) for x in letters} == bad
        return expectation

    def vector(self, title: str, kind: Any = "passage") -> np.ndarray[Any, Any]:
        return self.release.load_encoder(device="cpu").encode([title], kind)[0]


MakeShop = Callable[..., Shop]


@pytest.fixture(scope="module")
def release(tmp_path_factory: pytest.TempPathFactory) -> Release:
    return build_tiny_release(tmp_path_factory.mktemp("release"))


@pytest.fixture
def make_shop(
    apache_kafka: ApacheKafka, redis_url: str, namespace: str, release: Release
) -> MakeShop:
    """`make_shop(partitions=…, url=…, patience_s=…)`, and any setting of STREAM_…"""

    def make(
        partitions: int = 1, url: str = redis_url, patience_s: float = 60.0, **stream: Any
    ) -> Shop:
        settings = Settings(
            namespace=namespace,
            kafka=KafkaSettings(bootstrap=apache_kafka.bootstrap, partitions=partitions),
            redis=RedisSettings(url=url, patience_s=patience_s),
            stream=StreamSettings(**stream),
            model=ModelSettings(releases=release.path.parent),
            profile=ProfileSettings(categories=RULES.categories),
        )
        return Shop(settings, release)

    return make


Start = Callable[[Settings, str], WorkerProcess]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    with workers(tmp_path) as starter:
        yield starter


def _view(user: str, item: str = "i1", t_ms: int = T_MS, **more: Any) -> View:
    return View(user_id=user, item_id=item, ts=t_ms, **more)


def _item(item_id: str, title: str, *category: str) -> Item:
    return Item(item_id=item_id, title=title, category=category)


def _total(metric: Any) -> float:
    return float(sum(s.value for family in metric.collect() for s in family.samples[:1]))


ITEMS = [
    _item("i1", "Wool scarf, red", "Clothes", "Scarves"),
    _item("i2", "Ceramic mug", "Kitchen"),
    _item("i3", "Desk lamp", "Home", "Lamps", "Desk"),
]


# --- input ---------------------------------------------------------------------------------


BAD_VALUES = [
    None,
    b"",
    b"{",
    b"null",
    b"[]",
    b"\xff\xfe\x00",
    b'{"type": "view"}',
    b'{"type": "wink", "user_id": "u", "item_id": "i1"}',
    b'{"type": "view", "user_id": 7, "item_id": "i1"}',
    b'{"type": "view", "user_id": "", "item_id": "i1"}',
    b'{"type": "view", "user_id": "u", "item_id": "i1", "ts": NaN}',
    b'{"type": "view", "user_id": "u", "item_id": "i1", "ts": "1970-01-01T00:00:00Z"}',
    b'{"type": "view", "user_id": "u", "item_id": "i1", "ts": "2100-06-01T00:00:00Z"}',
    b'{"type": "view", "user_id": "u", "item_id": "i1", "ts": "2099-06-01T00:00:00Z"}',
    b'{"type": "view", "user_id": "u", "item_id": "i1", "price": -1.0}',
    b'{"type": "purchase", "user_id": "u", "item_id": "i1", "price": Infinity}',
    json.dumps({"type": "search", "user_id": "u", "query": "x" * 900_000}).encode(),
]


@pytest.mark.parametrize("partitions", [1, 64])
def test_bad_records_become_dead_letters_and_the_others_count(
    make_shop: MakeShop, partitions: int
) -> None:
    shop = make_shop(partitions, max_reject_share=1.0)
    shop.send(*ITEMS)
    with LocalWorker(shop.settings) as worker:
        shop.send_raw(*BAD_VALUES, bad=True)  # a slice of nothing but these
        shop.send(_view("ann"), Click(user_id="bob", item_id="i2", ts=T_MS))
        for value in BAD_VALUES:
            shop.send_raw(value, key=b"ann", bad=True)
            shop.send(_view("ann", "i2"))
        shop.wait_folded()
        assert worker.error is None
    shop.assert_right()
    assert shop.profile("ann").events == 1 + len(BAD_VALUES)


def test_what_java_clients_send_is_counted_however_it_is_compressed(
    make_shop: MakeShop, apache_kafka: ApacheKafka
) -> None:
    codecs = {1: "gzip", 2: "snappy", 3: "lz4", 4: "zstd"}  # by their number in a batch
    shop = make_shop(4)
    shop.send(*ITEMS)
    with LocalWorker(shop.settings) as worker:
        for codec in codecs.values():
            events = [_view(f"käthe-{codec}-{n % 20}", "i2") for n in range(100)]
            _send_with_java(apache_kafka, shop.settings.topic("events"), codec, events)
        shop.wait_folded()
        assert worker.error is None
    records = shop.assert_right().records
    keys = [record.key for record in records]
    assert [r.partition for r in records] == [partition_for(key, 4) for key in keys]
    assert {r.partition for r in records} == {0, 1, 2, 3}
    assert [profile.events for profile in shop.profiles().values()] == [5] * 80
    assert _codecs(apache_kafka, shop.settings.topic("events")) == set(codecs)


def _send_with_java(kafka: ApacheKafka, topic: str, codec: str, events: list[View]) -> None:
    """By Apache Kafka's console producer, a Java client with its own partitioner."""
    lines = [f"{event.user_id}|{event.model_dump_json()}" for event in events]
    options = ["--bootstrap-server", kafka.bootstrap, "--topic", topic]
    options += ["--compression-codec", codec, "--reader-property", "parse.key=true"]
    options += ["--reader-property", "key.separator=|"]
    ended = subprocess.run(
        [*kafka._java, "-Dfile.encoding=UTF-8", "org.apache.kafka.tools.ConsoleProducer", *options],
        input="\n".join(lines) + "\n",
        capture_output=True,
        encoding="utf-8",
        timeout=120,
        check=False,
    )
    assert ended.returncode == 0, ended.stdout + ended.stderr


def _codecs(kafka: ApacheKafka, topic: str) -> set[int]:
    """Of the record batches in the broker's own files."""
    found = set()
    for file in (kafka._data_dir / "node-1" / "data").glob(f"{topic}-*/*.log"):
        log, start = file.read_bytes(), 0
        while start + 61 <= len(log):  # offset 8, length 4, epoch 4, magic 1, CRC 4, attributes 2
            length, attributes = struct.unpack_from(">8xi9xh", log, start)
            found.add(attributes & 7)
            start += 12 + length
    return found


def test_awkward_but_good_input_counts_as_the_oracle_says(make_shop: MakeShop) -> None:
    shop = make_shop(4, batch_records=64)
    shop.send(*ITEMS)
    chance = random.Random(4)
    with LocalWorker(shop.settings) as worker:
        # Without a key, and without a time: the record's own stands in.
        shop.send_raw(b'{"type": "view", "user_id": "no-ts", "item_id": "i1"}')
        shop.send_raw(b'{"type": "view", "user_id": "no-key", "item_id": "i1", "ts": 900000000000}')
        # A producer that sends again, at once and later.
        for event_id in ("a", "b", "a", "c", "b", "a"):
            shop.send(_view("again", chance.choice(["i1", "i2"]), event_id=event_id))
        # In no order of time, over years.
        times = [T_MS + chance.randrange(-900 * DAY_MS, 0) for _ in range(150)]
        shop.send(*[_view("late", f"i{1 + t % 3}", t) for t in times])
        # Money, ours and not ours.
        shop.send(
            Purchase(user_id="money", item_id="i3", ts=T_MS, price=1e3, quantity=3, currency="USD"),
            Purchase(user_id="money", item_id="i3", ts=T_MS, price=5, currency="JPY"),
            Purchase(user_id="money", item_id="i3", ts=T_MS, price=0.1, quantity=7),
        )
        # Erased, and back again.
        shop.send(*[_view("erased", "i2", T_MS + i) for i in range(5)])
        shop.send(Forget(user_id="erased", ts=T_MS + 9))
        shop.send(*[_view("back", "i2", T_MS + i, event_id=f"x{i}") for i in range(5)])
        shop.send(Forget(user_id="back", ts=T_MS), _view("back", "i3", event_id="x1"))
        shop.wait_folded()
        assert worker.error is None
    shop.assert_right()
    assert shop.profile("erased").events == 0
    with ProfileReader(shop.settings.redis.url, shop.settings.namespace) as reader:
        assert not reader.exists("erased")
        assert reader.get("back").events == 1


@pytest.mark.parametrize("clock", ["LogAppendTime", "CreateTime"])
def test_an_event_from_the_future_is_rejected_whoever_gives_records_their_time(
    make_shop: MakeShop, clock: str
) -> None:
    shop = make_shop(max_reject_share=1.0)
    shop.keep_times_of(clock)
    shop.send(*ITEMS)
    now_ms = time.time_ns() // 1_000_000
    later = {"timestamp_ms": now_ms + DAY_MS}
    with LocalWorker(shop.settings) as worker:
        shop.send(_view("ann", t_ms=now_ms))
        for more in ({}, {"title": "Wool scarf"}):  # scanned, and not
            shop.send_raw(_view("ann", t_ms=now_ms + DAY_MS, **more).to_json(), bad=True, **later)
        # Without a time of its own an event has its record's.
        none = b'{"type": "view", "user_id": "bob", "item_id": "i1"}'
        shop.send_raw(none, bad=clock == "CreateTime", **later)
        shop.send_raw(_view("ann", t_ms=now_ms + 1).to_json(), **later)
        shop.wait_folded()
        assert worker.error is None
    shop.assert_right()
    assert shop.profile("ann").updated_ms == now_ms + 1
    assert ("bob" in shop.profiles()) == (clock == "LogAppendTime")
    letters = dead_letter.read(shop.settings, limit=10)
    assert {letter.reason for letter in letters} == {"future_ts"}


def test_ten_thousand_events_of_one_user_in_one_slice(make_shop: MakeShop) -> None:
    shop = make_shop()
    shop.send(*ITEMS)
    with LocalWorker(shop.settings):  # items first: few events can wait for theirs
        shop.wait_folded()
    chance = random.Random(9)
    shop.send(
        *[
            _view(
                "busy", f"i{1 + i % 3}", T_MS + chance.randrange(DAY_MS), event_id=f"e{i % 9_900}"
            )
            for i in range(10_000)
        ]
    )
    records = Expectation(shop.settings, shop.release).records
    topic = shop.settings.topic("events")
    topic_id = topic_ids(connect(shop.settings.kafka)[0], [topic])[topic] or ""
    piece = Slice(
        topic,
        0,
        epoch=1,
        source=source_key(topic_id, 0),
        offsets=[record.offset for record in records],
        keys=[record.key for record in records],
        values=[record.value for record in records],
        timestamps_ms=[record.timestamp_ms for record in records],
        headers=[None] * len(records),
    )
    assert len(piece.offsets) == 10_000
    _fold(LocalWorker(shop.settings).updater, MicroBatch((piece,)))
    shop.assert_right()
    assert shop.profile("busy").counts["view"] == 10_000  # 9,900 later an id is long forgotten


def _fold(updater: Updater, batch: MicroBatch) -> None:
    """As the pipeline does."""
    updater.apply(updater.prepare(updater.take_apart(batch)))


def test_a_lane_that_is_free_goes_on_with_the_next_batch_and_a_busy_one_does_not(
    make_shop: MakeShop,
) -> None:
    shop = make_shop()
    shop.send(*ITEMS)
    with LocalWorker(shop.settings):
        shop.wait_folded()
    updater = LocalWorker(shop.settings).updater
    first, second = _two_in_lanes(shop, updater)
    free = threading.Event()
    updater._lanes[1].submit(free.wait)
    before = updater.start(first)
    assert updater.may_start(second, before)
    after = updater.start(second, before)
    wait([lane for at, lane in enumerate(after.at_work) if at != 1])
    assert before.left == after.left == {1}
    free.set()
    updater.finish(before)
    updater.finish(after)
    assert {profile.counts["view"] for profile in shop.profiles().values()} == {2}


def _two_in_lanes(shop: Shop, updater: Updater) -> list[Prepared]:
    """Two micro-batches of the same shoppers, one event each."""
    n = 1_200
    return [
        updater.prepare(
            updater.take_apart(
                shop.batch(*[_view(f"u{i}", t_ms=T_MS + turn) for i in range(n)], first=n * turn)
            )
        )
        for turn in range(2)
    ]


def test_what_failed_in_a_lane_is_saved_before_what_came_behind_it(
    make_shop: MakeShop, redis_url: str
) -> None:
    wire = _Outage(_port(redis_url))
    shop = make_shop(2, url=_through(redis_url, wire))
    updater = LocalWorker(shop.settings).updater
    shop.send(*ITEMS)
    with LocalWorker(shop.settings):
        shop.wait_folded()
    first, second = _two_in_lanes(shop, updater)
    wire.saves_left = 1
    before = updater.start(first)
    with pytest.raises(RedisUnavailable):
        updater.finish(before)
    wire.away = False
    failed = set(before.left)
    assert failed
    after = updater.start(second, before)
    updater.come_to_rest(after)
    assert after.left == failed
    updater.finish(before)
    updater.finish(after)
    assert {profile.counts["view"] for profile in shop.profiles().values()} == {2}


@pytest.mark.parametrize("codec", ["gzip", "snappy", "lz4", "zstd"])
def test_records_of_every_compression_count(make_shop: MakeShop, codec: str) -> None:
    shop = make_shop()
    shop.send(*ITEMS)
    events = [_view(f"u{i % 7}", f"i{1 + i % 3}", T_MS + i) for i in range(300)]
    shop.send_raw(*[e.to_json() for e in events], key=b"u", compression_type=codec)
    with LocalWorker(shop.settings):
        shop.wait_folded()
    shop.assert_right()
    assert sum(p.events for p in shop.profiles().values()) == 300


def test_a_flood_of_rejects_stops_the_worker_with_the_commonest_reason(
    make_shop: MakeShop,
) -> None:
    shop = make_shop(reject_window=50, max_reject_share=0.5)
    shop.send_raw(*[_view(f"u{i}").to_json() for i in range(20)])
    with LocalWorker(shop.settings) as worker:
        shop.wait_folded()
        assert worker.error is None
    shop.send_raw(*[b"{"] * 10, *[b'{"type": "view", "item_id": "i1"}'] * 60, bad=True)
    with LocalWorker(shop.settings) as worker:
        error = worker.wait_failed()
    assert isinstance(error, TooManyRejects)
    assert "missing:user_id" in str(error)
    assert "penchant dlq show" in str(error)
    assert 20 <= shop.committed() < 20 + 50  # not what made the window full


# --- items ---------------------------------------------------------------------------------


def test_events_on_an_unknown_item_count_when_its_text_comes_to_another_worker(
    make_shop: MakeShop,
) -> None:
    shop = make_shop(2)
    with LocalWorker(shop.settings) as first:
        shop.send(*[_view(f"u{i}", "i1", T_MS + i) for i in range(40)])
        shop.wait_folded()
        assert {p.pending for p in shop.profiles().values()} == {1}
        assert {p.space for p in shop.profiles().values()} == {""}
        with LocalWorker(shop.settings) as second:
            eventually("each has a part", lambda: first.intake.assigned() == 2)
            shop.send(ITEMS[0])  # and no user ever acts again
            shop.wait_folded()
            assert first.error is second.error is None
    shop.assert_right()
    assert {p.pending for p in shop.profiles().values()} == {0}
    assert {key64("Clothes > Scarves")} == set(shop.profile("u7").categories)


def test_an_item_that_comes_between_look_up_and_registration_is_not_missed(
    make_shop: MakeShop, redis_url: str
) -> None:
    gate = _Gate(SAVES)
    wire = Between(_port(redis_url), on_request=gate)
    shop = make_shop(2)
    through = shop.settings.model_copy(
        update={"redis": RedisSettings(url=_through(redis_url, wire))}
    )
    with LocalWorker(through) as looks, LocalWorker(shop.settings) as stores:
        eventually("each has a part", lambda: looks.intake.assigned() == stores.intake.assigned())
        ((_, here),) = [p for p in looks.intake._epochs if p[0].endswith(".events")]
        user = _placed("u", here, 2)
        item = _placed("i", 1 - here, 2)
        gate.shut()
        shop.send(_view(user, item))
        assert gate.waited_for.wait(30)  # it has looked for the item, and is about to save
        shop.send(_item(item, "Wool scarf, red"))
        place = (shop.settings.topic("items"), 1 - here)
        eventually("the item is stored", lambda: committed(shop.settings, [place])[place] == 1)
        gate.open()
        shop.wait_folded()
    assert shop.profile(user).pending == 0
    shop.assert_right()
    wire.close()


def _placed(prefix: str, partition: int, partitions: int) -> str:
    """An id whose records lie in that partition."""
    ids = (f"{prefix}{i}" for i in itertools.count())
    return next(i for i in ids if partition_for(i.encode(), partitions) == partition)


def test_a_text_that_a_later_event_brings_along_serves_those_who_waited(
    make_shop: MakeShop,
) -> None:
    shop = make_shop()
    with LocalWorker(shop.settings):
        shop.send(_view("waits"), _view("waits", "never-told"))
        shop.wait_folded()
        assert shop.profile("waits").pending == 2
        shop.send(_view("tells", title="Wool scarf, red", category=("Clothes", "Scarves")))
        shop.wait_folded()
    waited = shop.profile("waits")
    assert waited.pending == 1
    np.testing.assert_allclose(
        waited.interest(0), shop.vector("Wool scarf, red. Clothes > Scarves"), atol=1e-5
    )


def test_a_catalogue_record_goes_before_what_events_say_of_the_item(make_shop: MakeShop) -> None:
    shop = make_shop()
    shop.send(ITEMS[1])
    with LocalWorker(shop.settings):
        shop.wait_folded()
        shop.send(_view("ann", "i2", title="CHEAP MUG BUY NOW"))
        shop.wait_folded()
    np.testing.assert_allclose(
        shop.profile("ann").interest(0), shop.vector("Ceramic mug. Kitchen"), atol=1e-5
    )


def test_a_new_text_of_an_item_is_encoded_once_and_serves_every_worker(
    make_shop: MakeShop,
) -> None:
    shop = make_shop(2)
    shop.send(ITEMS[0])
    with LocalWorker(shop.settings) as first, LocalWorker(shop.settings) as second:
        eventually("each has a part", lambda: first.intake.assigned() == 2)
        shop.send(*[_view(f"old{i}") for i in range(20)])  # both workers know the old text now
        shop.wait_folded()
        shop.send(_item("i1", "Silk shawl, blue", "Clothes", "Shawls"))
        shop.wait_folded()
        new = [_view(f"new{i}", "i1", T_MS) for i in range(20)]
        # A worker asks for changes at most once a second.
        time.sleep(1.1)
        shop.send(*new)
        shop.wait_folded()
        assert first.error is second.error is None
    for user, title in (
        ("old", "Wool scarf, red. Clothes > Scarves"),
        ("new", "Silk shawl, blue. Clothes > Shawls"),
    ):
        for i in range(20):
            interest = shop.profile(f"{user}{i}").interest(0)
            np.testing.assert_allclose(interest, shop.vector(title), atol=1e-5)
    assert set(shop.profile("new3").categories) == {key64("Clothes > Shawls")}


def test_an_item_record_that_is_read_again_does_not_bring_its_old_text_back(
    make_shop: MakeShop,
) -> None:
    shop = make_shop()
    old, new = _item("i1", "Wool scarf, red"), _item("i1", "Silk shawl, blue")
    worker, stalled = LocalWorker(shop.settings), LocalWorker(shop.settings)

    def read(by: LocalWorker, topic: str, offset: int, record: Event | Item) -> None:
        piece = Slice(
            shop.settings.topic(topic),
            0,
            epoch=1,
            source=7,
            offsets=[offset],
            keys=[record.item_id.encode() if isinstance(record, Item) else None],
            values=[record.to_json()],
            timestamps_ms=[T_MS],
            headers=[None],
        )
        batch = by.updater.take_apart(MicroBatch((piece,)))
        by.updater.apply(by.updater.prepare(batch))

    read(worker, "items", 5, old)
    read(worker, "items", 50, new)
    read(worker, "items", 5, old)  # after a crash
    read(stalled, "items", 5, old)  # in hand since before the new one
    for i, by in enumerate((worker, stalled)):
        read(by, "events", i, _view(f"u{i}"))
        interest = shop.profile(f"u{i}").interest(0)
        np.testing.assert_allclose(interest, shop.vector("Silk shawl, blue"), atol=1e-5)


def test_a_deleted_item_is_found_no_more_but_late_events_on_it_still_count(
    make_shop: MakeShop,
) -> None:
    shop = make_shop()
    shop.send(*ITEMS)
    with ProfileReader(shop.settings.redis.url, shop.settings.namespace) as reader:
        with LocalWorker(shop.settings):
            shop.send(_view("ann"))
            shop.wait_folded()
            assert "i1" in {near.item_id for near in reader.nearest_items("ann")}
            shop.producer.delete_item("i1")
            shop.producer.delete_item("never-was-there")
            shop.producer.flush()
            shop.wait_folded()
            assert {near.item_id for near in reader.nearest_items("ann")} == {"i2", "i3"}
        with LocalWorker(shop.settings):  # which has not the vector in memory
            shop.send(_view("late"))
            shop.wait_folded()
            assert shop.profile("late").pending == 0
            np.testing.assert_allclose(
                shop.profile("late").interest(0), shop.profile("ann").interest(0), atol=1e-5
            )
            assert {near.item_id for near in reader.nearest_items("ann")} == {"i2", "i3"}
            shop.send(ITEMS[0])
            shop.wait_folded()
            assert "i1" in {near.item_id for near in reader.nearest_items("ann")}


# --- users on two partitions ---------------------------------------------------------------


def _two_producers(shop: Shop, users: list[str], rounds: int) -> None:
    """The same users' events by Java's partitioner and by librdkafka's own, in turn."""
    for i in range(rounds):
        events = [_view(u, f"i{1 + i % 3}", T_MS + i) for u in users]
        shop.send(*events)
        for event in events:
            value = event.model_copy(update={"ts": T_MS + 1_000 + i}).to_json()
            shop.send_raw(value, key=event.user_id.encode())


@pytest.mark.parametrize("repartition", [False, True])
def test_users_on_two_partitions_have_right_profiles(
    make_shop: MakeShop, repartition: bool, caplog: pytest.LogCaptureFixture
) -> None:
    shop = make_shop(4, repartition=repartition, batch_records=16)
    shop.send(*ITEMS)
    users = [f"u{i}" for i in range(12)]
    split, sent_on = _total(metrics.USERS_SPLIT), _total(metrics.EVENTS_FORWARDED)
    applied = _total(metrics.EVENTS_APPLIED)
    with (
        caplog.at_level(logging.WARNING, "stream.updater"),
        LocalWorker(shop.settings) as first,
        LocalWorker(shop.settings) as second,
    ):
        _two_producers(shop, users, rounds=8)
        shop.wait_folded()
        assert first.error is second.error is None
    expectation = Expectation(shop.settings, shop.release)
    stored, expected = shop.profiles(), expectation.profiles(RULES)
    on_two = {user for user, profile in expected.items() if len(profile.watermark) == 2}
    assert len(on_two) > 4
    for user, wrong in differences(stored, expected).items():
        # Between two partitions there is no order, so that ids may be remembered in any.
        assert user in on_two
        assert [line for line in wrong if not line.startswith("seen:")] == []
        assert sorted(stored[user].seen.tobytes()) == sorted(b"".join(expected[user].seen))
    told = [record for record in caplog.records if "two partitions" in record.message]
    if repartition:
        home = {user: partition_for(user.encode(), 4) for user in users}
        strays = [
            r
            for r in expectation.records
            if home[json.loads(r.value or b"")["user_id"]] != r.partition
        ]
        assert _total(metrics.EVENTS_FORWARDED) - sent_on >= len(strays) > 0
        assert told == []
    else:
        assert _total(metrics.USERS_SPLIT) - split >= len(on_two)
        # A save that was refused is folded anew, and its events count then.
        in_all = sum(profile.events for profile in stored.values())
        assert _total(metrics.EVENTS_APPLIED) - applied == in_all
        assert 1 <= len(told) <= 2  # once per worker


def test_a_topic_that_was_made_again_makes_nobody_a_user_on_two_partitions(
    make_shop: MakeShop, caplog: pytest.LogCaptureFixture
) -> None:
    shop = make_shop(2)
    shop.send(*ITEMS)
    split = _total(metrics.USERS_SPLIT)
    users = [f"u{i}" for i in range(8)]
    for turn in range(2):
        if turn:
            shop.make_events_again()
        with caplog.at_level(logging.WARNING, "stream.updater"), LocalWorker(shop.settings):
            shop.send(*[_view(user, "i1", T_MS + turn) for user in users])
            shop.send(_view("waits", "i9", T_MS + turn))  # which is folded the general way
            shop.wait_folded()
    for user in [*users, "waits"]:
        profile = shop.profile(user)
        assert (profile.events, len(profile.watermark)) == (2, 2)
    assert _total(metrics.USERS_SPLIT) == split
    assert "two partitions" not in caplog.text


def test_who_waits_for_a_text_is_found_by_a_worker_with_an_old_copy_of_them(
    make_shop: MakeShop,
) -> None:
    """It folded them before another worker did, and is the one that gets the item."""
    shop = make_shop()
    shop.send(ITEMS[0], _view("u"))
    with LocalWorker(shop.settings):
        shop.wait_folded()
        other = LocalWorker(shop.settings).updater
        _fold(other, shop.batch(_view("u", "i9", T_MS + 1)))
        assert shop.profile("u").pending == 1
        shop.send(_item("i9", "Copper kettle"))
        shop.wait_folded()
        assert shop.profile("u").pending == 0


def test_forwarding_is_not_turned_off_before_what_was_sent_on_is_folded(
    make_shop: MakeShop,
) -> None:
    shop = make_shop(2, repartition=True)
    shop.send(*ITEMS)
    user = _placed("u", 1, 2)
    shop.producer.send_bytes("events-by-user", user.encode(), _view(user).to_json())
    shop.producer.flush()
    off = shop.settings.model_copy(update={"stream": StreamSettings(repartition=False)})
    with pytest.raises(UserError, match="1 forwarded events are not folded yet"):
        find_topics(off)
    with LocalWorker(shop.settings):
        shop.wait_folded()
    topics, _ = find_topics(off)
    assert shop.settings.topic("events-by-user") in topics


# --- Redis fails ---------------------------------------------------------------------------


def _port(url: str) -> int:
    return urlsplit(url).port or 0


def _through(url: str, wire: Between) -> str:
    return url.replace(f":{_port(url)}/", f":{wire.port}/")


def test_replies_that_get_lost_change_nothing(make_shop: MakeShop, redis_url: str) -> None:
    wire = Between(_port(redis_url))
    shop = make_shop(2, url=_through(redis_url, wire), batch_records=32)
    shop.send(*ITEMS[:2])
    with LocalWorker(shop.settings) as worker:
        for i in range(25):
            wire.lose_reply = True
            shop.send(*[_view(f"u{i % 9}", f"i{1 + (i + j) % 3}", T_MS + i) for j in range(10)])
            eventually("a reply is lost", lambda: not wire.lose_reply)
        wire.lose_reply = True
        shop.send(ITEMS[2])
        shop.wait_folded()
        assert worker.error is None
    assert wire.replies_lost == 26
    shop.assert_right()
    wire.close()


def _counted() -> dict[str, float]:
    return {
        "applied": _total(metrics.EVENTS_APPLIED),
        "replayed": _total(metrics.EVENTS_REPLAYED),
        "repeated": _total(metrics.EVENTS_REPEATED),
        "pending": _total(metrics.EVENTS_PENDING),
        "forgotten": _total(metrics.USERS_FORGOTTEN),
        "split": _total(metrics.USERS_SPLIT),
    }


def _more(before: dict[str, float]) -> dict[str, float]:
    return {name: value - before[name] for name, value in _counted().items()}


def _events_of_all_sorts(users: int) -> list[Event]:
    """Per user: two views, the second once more, and one of an item without a text; of the last
    user a `forget` and a view."""
    events: list[Event] = []
    for i in range(users):
        again = _view(f"u{i}", "i2", T_MS + 1, event_id="twice")
        events += [_view(f"u{i}"), again, again]
    events += [_view(f"u{i}", "i9", T_MS + 2) for i in range(0, users, 2)]
    return [*events, Forget(user_id=f"u{users - 1}", ts=T_MS + 3), _view(f"u{users - 1}")]


class _Outage(Between):
    """Armed, it lets some saves through, loses the reply to the last, and then is away."""

    def __init__(self, upstream: int) -> None:
        super().__init__(upstream, on_request=self._watch)
        self.saves_left = -1  # < 0: not armed
        self.away = False

    def _watch(self, request: bytes) -> bytes:
        if SAVES in request and self.saves_left >= 0:
            if self.saves_left == 0:
                self.lose_reply = self.away = True
            self.saves_left -= 1
        return request

    def _serve(self, client: socket.socket) -> None:
        with client:
            if not self.away:
                super()._serve(client)


@pytest.mark.parametrize("saves", [0, 1, 2])
def test_what_a_save_with_a_lost_reply_did_is_counted_once_and_as_what_it_was(
    make_shop: MakeShop, redis_url: str, saves: int
) -> None:
    wire = _Outage(_port(redis_url))
    shop = make_shop(2, url=_through(redis_url, wire))
    updater = LocalWorker(shop.settings).updater
    shop.send(*ITEMS)
    with LocalWorker(shop.settings):
        shop.wait_folded()
    users = 1_100  # enough for lanes
    events = _events_of_all_sorts(users)
    _fold(updater, shop.batch(*[_view(f"u{i}") for i in range(users)], partition=1))
    before = _counted()
    prepared = updater.prepare(updater.take_apart(shop.batch(*events)))
    wire.saves_left = saves
    with pytest.raises(RedisUnavailable):
        updater.apply(prepared)
    assert wire.replies_lost == 1
    wire.away = False
    updater.apply(prepared)
    # The last user's first events were erased, and changed no profile.
    assert _more(before) == {
        "applied": 2 * (users - 1) + users // 2 + 1,
        "replayed": 0,
        "repeated": users,
        "pending": users // 2,
        "forgotten": 1,
        "split": users,
    }
    again = _counted()
    _fold(updater, shop.batch(*events))
    assert _more(again) == dict.fromkeys(again, 0) | {"replayed": len(events)}
    wire.close()


def test_what_is_folded_anew_after_a_refusal_is_counted_once(make_shop: MakeShop) -> None:
    shop = make_shop(2)
    shop.send(*ITEMS)
    with LocalWorker(shop.settings):
        shop.wait_folded()
    first, second = (LocalWorker(shop.settings).updater for _ in range(2))
    users = 20
    events = _events_of_all_sorts(users)
    _fold(first, shop.batch(*[_view(f"u{i}", "i3") for i in range(users)]))
    refused = _total(metrics.SAVES_REFUSED)
    before = _counted()
    _fold(second, shop.batch(*[_view(f"u{i}", "i3") for i in range(users)], partition=1))
    assert _more(before)["split"] == users
    before = _counted()
    # From copies that the second has overtaken; the first of each were folded before.
    old = [_view(f"u{i}", "i3") for i in range(users)]
    _fold(first, shop.batch(*old, *events))
    assert _total(metrics.SAVES_REFUSED) - refused >= users
    assert _more(before) == {
        "applied": 2 * (users - 1) + users // 2 + 1,
        "replayed": users,
        "repeated": users,
        "pending": users // 2,
        "forgotten": 1,
        "split": 0,
    }


class _Gate:
    """On the wire to Redis: what contains `mark` waits while the gate is shut."""

    def __init__(self, mark: bytes = b"") -> None:
        self._mark = mark
        self._open = threading.Event()
        self._open.set()
        self.waited_for = threading.Event()

    def shut(self) -> None:
        self._open.clear()

    def open(self) -> None:
        self._open.set()

    def __call__(self, request: bytes) -> bytes:
        if not self._open.is_set() and self._mark in request:
            self.waited_for.set()
            self._open.wait()
        return request


SAVES = sha1(SAVE_SCRIPT.encode()).hexdigest().encode()


def test_nothing_is_committed_that_is_not_saved(make_shop: MakeShop, redis_url: str) -> None:
    gate = _Gate(SAVES)
    wire = Between(_port(redis_url), on_request=gate)
    shop = make_shop(1, url=_through(redis_url, wire))
    shop.send(*ITEMS, _view("ann"))
    with LocalWorker(shop.settings):
        shop.wait_folded()
        gate.shut()
        for i in range(30):  # several micro-batches
            shop.send(_view("ann", "i2", T_MS + i))
        assert gate.waited_for.wait(30)
        since = time.monotonic()
        while time.monotonic() - since < 2:  # ten times as long as a commit would take
            assert shop.committed() == 1
        gate.open()
        shop.wait_folded()
    shop.assert_right()
    wire.close()


def test_a_redis_that_dies_is_waited_for_in_either_stage_and_rejects_count_once(
    make_shop: MakeShop, start_redis: Callable[..., RedisServer]
) -> None:
    server = start_redis(appendonly=True, appendfsync="always")
    shop = make_shop(2, url=server.url, batch_records=64, reject_window=100)
    shop.send(*ITEMS)
    rejected = _rejected()
    with LocalWorker(shop.settings) as worker:
        for i in range(3):
            shop.send(*[_view(f"u{j}", f"i{1 + (i + j) % 3}", T_MS + i) for j in range(50)])
            server.kill()
            # An unknown text needs Redis while a batch is prepared, a view while it is applied.
            shop.send(Search(user_id="u1", ts=T_MS, query=f"query {i}"), _view("u2", f"new{i}"))
            shop.send_raw(*[b"{"] * 30, bad=True)
            tried = _total(metrics.REDIS_RETRIES)
            eventually("it tries again", lambda n=tried: _total(metrics.REDIS_RETRIES) > n + 1)
            server.restart()
            shop.send(_item(f"new{i}", f"New thing {i}"))
        shop.wait_folded()
        assert worker.error is None
    shop.assert_right()
    assert _rejected() - rejected == 90
    assert len(dead_letter.read(shop.settings, limit=1_000)) == 90


def _rejected() -> float:
    """Of all reasons."""
    samples = (s for family in metrics.EVENTS_REJECTED.collect() for s in family.samples)
    return sum(sample.value for sample in samples if sample.name.endswith("_total"))


def test_patience_with_redis_ends_and_nothing_more_is_committed(
    make_shop: MakeShop, start_redis: Callable[..., RedisServer]
) -> None:
    server = start_redis(appendonly=True, appendfsync="always")
    shop = make_shop(1, url=server.url, patience_s=0.5)
    shop.send(*ITEMS, _view("ann"))
    with LocalWorker(shop.settings) as worker:
        shop.wait_folded()
        server.kill()
        for i in range(5):  # micro-batches that queue up behind the one that fails
            shop.send(_view("ann", "i1", T_MS + i), _view(f"u{i}"))
        assert isinstance(worker.wait_failed(), RedisUnavailable)
    assert shop.committed() == 1
    server.restart()
    with LocalWorker(shop.settings):
        shop.wait_folded()
    shop.assert_right()


def test_a_refused_login_is_not_waited_for(
    make_shop: MakeShop, start_redis: Callable[..., RedisServer]
) -> None:
    server = start_redis(password="right")
    shop = make_shop(1, url=server.url.replace("right", "wrong"))
    with pytest.raises(RedisUnavailable, match="check REDIS_USERNAME and REDIS_PASSWORD"):
        LocalWorker(shop.settings)


# --- the process ---------------------------------------------------------------------------


def _last_line(worker: WorkerProcess) -> str:
    return worker.log.strip().splitlines()[-1]


def test_a_process_starts_before_redis_outlives_its_death_and_gives_up_with_one_line(
    make_shop: MakeShop, start_redis: Callable[..., RedisServer], start: Start
) -> None:
    server = start_redis(appendonly=True, appendfsync="always")
    server.kill()
    shop = make_shop(2, url=server.url, patience_s=60)
    shop.send(*ITEMS, *[_view(f"u{i}") for i in range(20)])
    worker = start(shop.settings, "patient")
    eventually("it waits", lambda: "trying again" in worker.log)
    server.restart()
    shop.wait_folded()
    server.kill()
    shop.send(*[_view(f"u{i}", "i2") for i in range(20)])
    tries = worker.log.count("trying again")
    eventually("it waits again", lambda: worker.log.count("trying again") > tries)
    server.restart()
    shop.wait_folded()
    shop.assert_right()

    hasty = shop.settings.model_copy(
        update={"redis": RedisSettings(url=server.url, patience_s=1.0)}
    )
    worker.send(signal.SIGINT)
    assert worker.wait() == 0
    worker = start(hasty, "hasty").wait_ready()
    server.kill()
    shop.send(*[_view(f"u{i}", "i3") for i in range(20)])
    assert worker.wait() == 1
    assert "Traceback" not in worker.log
    assert _last_line(worker).startswith("penchant: Redis at ")
    assert "start it, or set REDIS_URL" in _last_line(worker)
    server.restart()
    with LocalWorker(shop.settings):
        shop.wait_folded()
    shop.assert_right()


def test_a_broker_that_is_down_is_told_in_one_line(
    make_shop: MakeShop, start: Start, redis_url: str
) -> None:
    shop = make_shop()
    down = shop.settings.kafka.model_copy(update={"bootstrap": f"127.0.0.1:{free_port()}"})
    worker = start(shop.settings.model_copy(update={"kafka": down}), "lonely")
    assert worker.wait() == 1
    assert len(worker.log.strip().splitlines()) == 1
    assert _last_line(worker).startswith(f"penchant: No Kafka broker answered at {down.bootstrap}")


def test_a_signal_drains_what_is_begun_commits_it_and_leaves(
    make_shop: MakeShop, start: Start
) -> None:
    shop = make_shop(3, batch_records=32)
    shop.send(*ITEMS)
    worker = start(shop.settings, "leaves").wait_ready()
    feeding = threading.Thread(
        target=shop.send,
        args=[_view(f"u{i % 50}", f"i{1 + i % 3}", T_MS + i) for i in range(9_000)],
    )
    feeding.start()
    eventually("events flow", lambda: worker.metric("penchant_events_applied") > 0)
    asked = time.monotonic()
    worker.send(signal.SIGTERM)
    assert worker.wait() == 0
    took_s = time.monotonic() - asked
    feeding.join()
    # All that it saved it committed: nobody reads anything again.
    replayed = _total(metrics.EVENTS_REPLAYED)
    with LocalWorker(shop.settings):
        shop.wait_folded()
    assert _total(metrics.EVENTS_REPLAYED) == replayed
    shop.assert_right()
    assert took_s <= shop.settings.stream.drain_s + LEAVING_S


def test_with_a_save_that_hangs_a_second_signal_ends_the_process_at_once(
    make_shop: MakeShop, redis_url: str, start: Start
) -> None:
    gate = _Gate(SAVES)
    wire = Between(_port(redis_url), on_request=gate)
    shop = make_shop(1, url=_through(redis_url, wire), drain_s=60)
    shop.send(*ITEMS)
    worker = start(shop.settings, "hangs").wait_ready()
    gate.shut()
    shop.send(_view("ann"))
    assert gate.waited_for.wait(30)
    worker.send(signal.SIGTERM)
    eventually("it is stopping", lambda: "Signal received" in worker.log)
    assert worker.running
    worker.send(signal.SIGTERM)
    assert worker.wait(10) == 128 + signal.SIGTERM
    assert shop.committed() == NEVER
    gate.open()
    with LocalWorker(shop.settings):
        shop.wait_folded()
    shop.assert_right()
    wire.close()


def test_with_a_save_that_hangs_one_signal_is_enough_when_the_drain_time_is_over(
    make_shop: MakeShop, redis_url: str, start: Start
) -> None:
    gate = _Gate(SAVES)
    wire = Between(_port(redis_url), on_request=gate)
    shop = make_shop(1, url=_through(redis_url, wire), drain_s=0.5)
    shop.send(*ITEMS)
    worker = start(shop.settings, "hangs").wait_ready()
    gate.shut()
    shop.send(_view("ann"))
    assert gate.waited_for.wait(30)
    worker.send(signal.SIGTERM)
    assert worker.wait(15) == 0
    assert "what was in hand will be read again" in worker.log
    assert shop.committed() == NEVER
    gate.open()
    with LocalWorker(shop.settings):
        shop.wait_folded()
    shop.assert_right()
    wire.close()
