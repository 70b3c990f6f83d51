"""The intake on Apache Kafka, with a test in the updater's place: what is handed out, what may be
begun, and what is committed."""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from typing import Any, Self

import pytest
import redis
from confluent_kafka import Consumer, KafkaException, Producer, TopicPartition
from confluent_kafka.admin import AdminClient, NewTopic

from profiles.errors import WritesLost
from profiles.marks import Marks
from profiles.schema import Keys, source_key
from stream import metrics
from stream.intake import Intake, IntakeFailed, MicroBatch, Slice
from stream.local_stack import ApacheKafka, Tansu
from stream.settings import KafkaSettings, Settings, StreamSettings
from stream.topics import create_topics, topic_ids
from tests.integration.worker_process import committed, ends, eventually

pytestmark = pytest.mark.kafka

PROTOCOLS = ["consumer", "classic"]
NEVER = -1001  # the committed offset of a partition without one


class Reader:
    """An intake in an event loop of its own, on a thread. Batches queue up until the test takes
    them, or are begun and done as they come."""

    def __init__(
        self,
        settings: Settings,
        topics: Sequence[str],
        *,
        at_once: bool,
        marks: Marks | None = None,
    ) -> None:
        self.waiting: list[MicroBatch] = []
        self.begun: list[MicroBatch] = []
        self.error: BaseException | None = None
        self._at_once = at_once
        self._marks = marks
        self._failed = threading.Event()
        self._ready: Future[Intake] = Future()
        self._stop: asyncio.Event | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread = threading.Thread(target=asyncio.run, args=(self._run(settings, topics),))

    @property
    def intake(self) -> Intake:
        return self._ready.result(30)

    def take(self) -> MicroBatch:
        """Begin the oldest waiting batch, as the updater would; what of it is still ours."""
        eventually("a batch waits", lambda: self.waiting)
        batch = self.intake.begin(self.waiting.pop(0))
        self.begun.append(batch)
        return batch

    def done(self, batch: MicroBatch) -> None:
        self.intake.done(batch)

    def slices(self) -> Iterator[Slice]:
        return (piece for batch in self.begun for piece in batch.slices)

    def records(self) -> int:
        return sum(len(piece.offsets) for piece in self.slices())

    def stop(self) -> None:
        assert self._loop is not None
        assert self._stop is not None
        self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join(60)
        assert not self._thread.is_alive(), "the intake did not stop"

    def wait_failed(self) -> BaseException:
        eventually("the intake fails", lambda: self.error, 60)
        assert self.error is not None
        return self.error

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *failure: object) -> None:
        if self._thread.is_alive():
            self.intake.abort()
            self.stop()

    async def _run(self, settings: Settings, topics: Sequence[str]) -> None:
        self._loop, self._stop = asyncio.get_running_loop(), asyncio.Event()
        intake = Intake(settings, topics, self._deliver, self._fail, marks=self._marks)
        await intake.start()
        self._ready.set_result(intake)
        await self._stop.wait()
        await intake.stop()

    async def _deliver(self, batch: MicroBatch) -> None:
        self.waiting.append(batch)
        if self._at_once:
            self.done(self.take())

    def _fail(self, error: BaseException) -> None:
        self.error = self.error or error


class Topic:
    """The events topic of a test, and its intakes."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.name = settings.topic("events")
        create_topics(settings)
        self._producer = Producer(settings.kafka.client_config())

    def read(self, *, at_once: bool = True, marks: Marks | None = None) -> Reader:
        return Reader(self.settings, [self.name], at_once=at_once, marks=marks)

    def source(self, partition: int = 0) -> int:
        admin = AdminClient(self.settings.kafka.client_config())
        return source_key(topic_ids(admin, [self.name])[self.name] or "", partition)

    def send(self, count: int, partition: int = 0, value: bytes = b"{}", **record: Any) -> None:
        for _ in range(count):
            self._producer.produce(self.name, value, partition=partition, **record)
            self._producer.poll(0)
        assert self._producer.flush(30) == 0

    def committed(self, partition: int = 0) -> int:
        return committed(self.settings, [(self.name, partition)])[(self.name, partition)]

    def wait_committed(self, offset: int, partition: int = 0) -> None:
        def is_committed() -> bool:
            try:
                return self.committed(partition) == offset
            except KafkaException:  # a broker that is just coming back
                return False

        eventually(f"{offset} is committed for partition {partition}", is_committed, 60)


MakeTopic = Callable[..., Topic]


@pytest.fixture
def make_topic(apache_kafka: ApacheKafka, namespace: str) -> MakeTopic:
    """`make_topic(partitions=2, group_protocol=…, batch_records=…)`"""

    def make(kafka: ApacheKafka | Tansu = apache_kafka, **options: Any) -> Topic:
        of_kafka = {"partitions": 1, "group_protocol": "consumer", "session_timeout_s": 6.0}
        of_kafka |= {name: options.pop(name) for name in list(options) if name in of_kafka}
        settings = Settings(
            namespace=namespace,
            kafka=KafkaSettings(bootstrap=kafka.bootstrap, **of_kafka),
            stream=StreamSettings(**options),
        )
        return Topic(settings)

    return make


# --- what is handed out --------------------------------------------------------------------


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize("partitions", [1, 64])
def test_every_record_is_handed_out_once_in_the_order_of_its_partition(
    make_topic: MakeTopic, partitions: int, protocol: str
) -> None:
    topic = make_topic(partitions=partitions, group_protocol=protocol, batch_records=100)
    for partition in range(partitions):
        topic.send(640 // partitions, partition)
    with topic.read() as reader:
        eventually("all are handed out", lambda: reader.records() >= 640)
        offsets: dict[int, list[int]] = {}
        for piece in reader.slices():
            offsets.setdefault(piece.partition, []).extend(piece.offsets)
        each = list(range(640 // partitions))
        assert offsets == dict.fromkeys(range(partitions), each)
        for partition in range(partitions):
            topic.wait_committed(len(each), partition)


def test_a_record_comes_as_it_was_sent_with_key_headers_time_and_source(
    make_topic: MakeTopic,
) -> None:
    topic = make_topic(partitions=2)
    topic.send(1, 1, value=b"\xff\x00", key=b"k", headers=[("a", b"1"), ("b", None)])
    topic.send(1, 1, value=None)  # type: ignore[arg-type]
    with topic.read() as reader:
        eventually("both are handed out", lambda: reader.records() == 2)
        pieces = list(reader.slices())
    assert [value for p in pieces for value in p.values] == [b"\xff\x00", None]
    assert [key for p in pieces for key in p.keys] == [b"k", None]
    assert [headers for p in pieces for headers in p.headers] == [[("a", b"1"), ("b", None)], None]
    assert all(abs(t - time.time() * 1000) < 300_000 for p in pieces for t in p.timestamps_ms)
    topic_id = topic_ids(AdminClient(topic.settings.kafka.client_config()), [topic.name])
    assert {p.source for p in pieces} == {source_key(topic_id[topic.name] or "", 1)}


def test_records_of_every_compression_are_read(make_topic: MakeTopic) -> None:
    topic = make_topic()
    for codec in ("gzip", "snappy", "lz4", "zstd"):
        config = topic.settings.kafka.client_config() | {"compression.type": codec, "linger.ms": 50}
        producer = Producer(config)
        for i in range(200):
            producer.produce(topic.name, f"{codec} {i}".encode() * 20)
        assert producer.flush(30) == 0
    with topic.read() as reader:
        eventually("all are handed out", lambda: reader.records() == 800)
        values = [value for piece in reader.slices() for value in piece.values]
    want = [f"{c} {i}".encode() * 20 for c in ("gzip", "snappy", "lz4", "zstd") for i in range(200)]
    assert values == want


def test_a_micro_batch_closes_at_its_number_of_records(make_topic: MakeTopic) -> None:
    topic = make_topic(batch_records=50, batch_deadline_ms=2_000)
    topic.send(500)
    with topic.read() as reader:
        eventually("all are handed out", lambda: reader.records() == 500)
        assert max(batch.records for batch in reader.begun) == 50


def test_a_micro_batch_closes_sooner_when_its_records_are_long(make_topic: MakeTopic) -> None:
    topic = make_topic(batch_records=4096, batch_tokens=256, batch_deadline_ms=2_000)
    topic.send(4096, value=b"x" * 1500)
    with topic.read() as reader:
        eventually("all are handed out", lambda: reader.records() == 4096)
        assert max(batch.records for batch in reader.begun) <= 1024


@pytest.mark.parametrize(("grow_ms", "grows"), [(0, False), (1_500, True)])
def test_a_micro_batch_grows_while_the_updater_is_busy_and_no_longer_than_it_may(
    make_topic: MakeTopic, grow_ms: float, grows: bool
) -> None:
    topic = make_topic(batch_deadline_ms=20, batch_grow_ms=grow_ms)
    with topic.read(at_once=False) as reader:
        began_s = time.monotonic()
        while len(reader.waiting) < 3:  # the first two keep the updater busy
            topic.send(1)
            time.sleep(0.05)
            assert time.monotonic() < began_s + 60
        third = reader.waiting[2]
    clock_ms = [ms for piece in third.slices for ms in piece.timestamps_ms]
    assert (third.records > 5) == grows
    assert max(clock_ms) - min(clock_ms) <= 20 + grow_ms + 500  # of a busy machine


# --- what is committed ---------------------------------------------------------------------


def test_nothing_is_committed_before_it_is_done(make_topic: MakeTopic) -> None:
    topic = make_topic(partitions=2)
    with topic.read(at_once=False) as reader:
        topic.send(10, 0)
        first = reader.take()
        topic.send(10, 1)
        reader.done(reader.take())
        topic.wait_committed(10, 1)  # commits are made, and not for the first
        assert topic.committed(0) == NEVER
        reader.done(first)
        topic.wait_committed(10, 0)


def test_a_later_slice_that_is_done_first_waits_for_the_earlier_one(make_topic: MakeTopic) -> None:
    topic = make_topic(partitions=2)
    with topic.read(at_once=False) as reader:
        topic.send(10, 0)
        first = reader.take()
        topic.send(10, 0)
        second = reader.take()
        reader.done(second)
        topic.send(1, 1)
        reader.done(reader.take())
        topic.wait_committed(1, 1)
        assert topic.committed(0) == NEVER
        reader.done(first)
        topic.wait_committed(20, 0)


def test_a_commit_that_the_broker_could_not_take_is_made_again(
    make_topic: MakeTopic, start_apache_kafka: Callable[..., ApacheKafka]
) -> None:
    kafka = start_apache_kafka()
    topic = make_topic(kafka)
    topic.send(10)
    with topic.read(at_once=False) as reader:
        batch = reader.take()
        kafka.kill()
        reader.done(batch)  # nothing more comes that would carry a later offset
        kafka.start()
        topic.wait_committed(10)
        assert reader.error is None


# --- giving partitions back ----------------------------------------------------------------


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_a_partition_is_given_back_when_what_is_begun_of_it_is_done_and_committed(
    make_topic: MakeTopic, protocol: str
) -> None:
    topic = make_topic(partitions=2, group_protocol=protocol, drain_s=60, batch_records=20)
    with topic.read(at_once=False) as first:
        topic.send(20, 0)
        topic.send(20, 1)
        in_hand = [first.take(), first.take()]
        topic.send(20, 0)
        topic.send(20, 1)
        eventually("two more wait", lambda: len(first.waiting) == 2)
        with topic.read() as second:
            eventually("partitions are leaving", lambda: first.intake._leaving, 60)
            assert second.records() == 0
            for batch in in_hand:
                first.done(batch)
            eventually("the other worker has one", lambda: second.intake.assigned() == 1, 60)

            def all_is_done() -> bool:
                while first.waiting:
                    first.done(first.take())
                return _done(first, second) == 80

            eventually("all is done", all_is_done, 60)
            for partition in (0, 1):
                topic.wait_committed(40, partition)
        (given,) = {piece.partition for piece in second.slices()}
        # What was begun is not read again, and what waited is, by the other worker alone.
        assert [o for p in second.slices() for o in p.offsets] == list(range(20, 40))
        kept = [o for p in first.slices() if p.partition != given for o in p.offsets]
        assert sorted(kept)[:20] == list(range(20))
        assert set(kept) == set(range(40))


def _done(*readers: Reader) -> int:
    """Different records that were begun, by all."""
    return len({(p.partition, o) for r in readers for p in r.slices() for o in p.offsets})


def test_an_updater_that_hangs_does_not_keep_a_partition_and_its_late_end_is_not_committed(
    make_topic: MakeTopic,
) -> None:
    topic = make_topic(partitions=2, drain_s=0.2, batch_records=10)
    with topic.read(at_once=False) as first:
        topic.send(10, 0)
        topic.send(10, 1)
        in_hand = [first.take(), first.take()]
        with topic.read(at_once=False) as second:
            eventually("the other worker has one", lambda: second.intake.assigned() == 1, 60)
            again = second.take()
            (given,) = {piece.partition for piece in again.slices}
            for batch in in_hand:
                first.done(batch)
            topic.wait_committed(10, 1 - given)
            assert topic.committed(given) == NEVER
            second.done(again)
            topic.wait_committed(10, given)


# --- stopping ------------------------------------------------------------------------------


def test_stopping_waits_for_what_is_begun_and_begins_nothing_more(make_topic: MakeTopic) -> None:
    topic = make_topic(batch_records=10, drain_s=60)
    with topic.read(at_once=False) as reader:
        topic.send(30)
        begun = reader.take()
        eventually("two more wait", lambda: len(reader.waiting) == 2)
        stopping = threading.Thread(target=reader.stop)
        stopping.start()
        eventually("it is stopping", lambda: reader.intake._stopping)
        assert reader.take().slices == ()
        assert stopping.is_alive()
        reader.done(begun)
        stopping.join(30)
        assert not stopping.is_alive()
    assert topic.committed() == 10


def test_stopping_gives_up_on_an_updater_that_hangs_when_the_drain_time_is_over(
    make_topic: MakeTopic,
) -> None:
    topic = make_topic(drain_s=0.3)
    with topic.read(at_once=False) as reader:
        topic.send(10)
        reader.take()
        reader.stop()
    assert topic.committed() == NEVER


def test_after_a_failure_nothing_is_waited_for(make_topic: MakeTopic) -> None:
    topic = make_topic(drain_s=600)
    with topic.read(at_once=False) as reader:
        topic.send(10)
        reader.take()
        reader.intake.abort()
        reader.stop()
    assert topic.committed() == NEVER


# --- holding back --------------------------------------------------------------------------


def test_a_slow_updater_holds_the_stream_back_and_nothing_is_lost_or_read_twice(
    make_topic: MakeTopic,
) -> None:
    topic = make_topic(partitions=2, batch_records=10, buffered_batches=1)
    for partition in (0, 1):
        topic.send(100, partition)
    with topic.read(at_once=False) as reader:
        eventually("a batch waits", lambda: reader.waiting)
        # Longer than the intake waits before it pauses its partitions and polls on.
        held_since = time.monotonic()
        eventually("a while has passed", lambda: time.monotonic() - held_since > 2)
        assert len(reader.waiting) == 1
        assert reader.intake.last_turn_s > held_since  # paused, it still shows that it lives
        while reader.records() < 200:
            reader.done(reader.take())
        offsets: dict[int, list[int]] = {}
        for piece in reader.slices():
            offsets.setdefault(piece.partition, []).extend(piece.offsets)
        assert offsets == {0: list(range(100)), 1: list(range(100))}
        topic.wait_committed(100, 0)


def test_lag_is_what_is_not_finished_also_while_nothing_is_fetched(make_topic: MakeTopic) -> None:
    topic = make_topic(partitions=2, batch_records=10, buffered_batches=1)
    topic.send(10, 0)
    with topic.read() as reader:
        topic.wait_committed(10, 0)
    topic.send(90, 0)
    topic.send(20, 1)
    with topic.read(at_once=False) as reader:
        eventually("all is told, also what is in hand", lambda: _lag() == 110)
        held_since = time.monotonic()
        eventually("it has paused", lambda: time.monotonic() - held_since > 2)
        topic.send(40, 1)
        eventually("what came since is told", lambda: _lag() == 150)
        _do_until(reader, lambda: topic.committed(0) == 100 and topic.committed(1) == 60)
        eventually("nothing is left", lambda: _lag() == 0)


def test_lag_on_the_embedded_broker_misses_nothing_that_was_fetched(
    make_topic: MakeTopic, tansu: Tansu
) -> None:
    topic = make_topic(tansu, group_protocol="classic")
    topic.send(30)  # a batch, which it takes for one record when it is asked for the end
    with topic.read(at_once=False) as reader:
        eventually("all are in hand", lambda: sum(b.records for b in reader.waiting) == 30)
        eventually("all are told", lambda: _lag() == 30)
        _do_until(reader, lambda: topic.committed() == 30)
        eventually("nothing is left", lambda: _lag() == 0)


def _lag() -> float:
    value: float = metrics.LAG._value.get()
    return value


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_a_partition_that_was_taken_away_while_paused_is_read_when_it_comes_back(
    make_topic: MakeTopic, protocol: str
) -> None:
    topic = make_topic(
        partitions=2, group_protocol=protocol, batch_records=10, buffered_batches=1, drain_s=60
    )
    for partition in (0, 1):
        topic.send(50, partition)
    with topic.read(at_once=False) as first:
        in_hand = first.take()
        paused_since = time.monotonic()
        eventually("it has paused", lambda: time.monotonic() - paused_since > 2)
        with topic.read() as second:
            eventually(
                "partitions are leaving or gone",
                lambda: first.intake._leaving or second.intake.assigned(),
                60,
            )
            first.done(in_hand)
            eventually("each has one", lambda: first.intake.assigned() == 1, 60)
            _do_until(first, lambda: topic.committed(0) == topic.committed(1) == 50)
        eventually("the other one has left", lambda: first.intake.assigned() == 2, 60)
        for partition in (0, 1):
            topic.send(5, partition)
        _do_until(first, lambda: topic.committed(0) == topic.committed(1) == 55)


def _do_until(reader: Reader, holds: Callable[[], bool]) -> None:
    """Do whatever comes."""

    def done() -> bool:
        while reader.waiting:
            reader.done(reader.take())
        return holds()

    eventually("all is read and committed", done, 60)


def test_a_stream_that_was_silent_does_not_look_stuck_when_it_goes_on(
    make_topic: MakeTopic,
) -> None:
    topic = make_topic()
    with topic.read(at_once=False) as reader:
        reader.intake.last_progress_s = 0.0  # the last batch was done long ago
        topic.send(1)
        eventually("a batch waits", lambda: reader.waiting)
        assert time.monotonic() - reader.intake.last_progress_s < 60


def test_an_idle_consumer_shows_that_it_lives_and_one_that_hangs_does_not(
    make_topic: MakeTopic, monkeypatch: pytest.MonkeyPatch
) -> None:
    topic = make_topic()
    with topic.read() as reader:
        topic.send(1)
        topic.wait_committed(1)
        reader.intake.last_turn_s = 0.0
        eventually("it turned", lambda: reader.intake.last_turn_s)
        assert reader.intake.stuck(time.monotonic()) == ""
        hangs, goes_on = threading.Event(), threading.Event()

        def hang(*_: Any, **__: Any) -> None:
            hangs.set()
            goes_on.wait()

        with monkeypatch.context() as patch:
            patch.setattr(reader.intake, "_commit", hang)
            assert hangs.wait(30)
            last = reader.intake.last_turn_s
            time.sleep(1)  # fifty times as long as a turn
            assert reader.intake.last_turn_s == last
            assert "did nothing for 130 s" in reader.intake.stuck(last + 130)
        goes_on.set()
        eventually("it turns again", lambda: reader.intake.last_turn_s > last)


def test_an_updater_that_finishes_nothing_is_stuck_and_one_without_work_is_not(
    make_topic: MakeTopic,
) -> None:
    topic = make_topic()
    with topic.read(at_once=False) as reader:
        topic.send(1)
        batch = reader.take()
        reader.intake.last_turn_s += 1000
        later_s = reader.intake.last_progress_s + 130
        assert reader.intake.stuck(later_s) == "no micro-batch finished for 130 s"
        reader.done(batch)
        assert reader.intake.stuck(later_s) == ""


def test_a_worker_without_partitions_says_so_once(
    make_topic: MakeTopic, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("stream.intake._UNEMPLOYED_S", 2.0)
    monkeypatch.setattr("stream.intake._LOOK_EVERY_S", 0.2)
    topic = make_topic()
    with topic.read() as one:
        eventually("it has the partition", one.intake.assigned)
        with topic.read() as two:
            eventually("it is told", lambda: "no partition was assigned" in caplog.text)
            time.sleep(3)
            idle = two if one.intake.assigned() else one
            assert idle.intake.assigned() == 0
    assert caplog.text.count("no partition was assigned") == 1
    assert f"look at the group {topic.settings.namespace}.updater with" in caplog.text


# --- what goes wrong in the topic ----------------------------------------------------------


def _delete_up_to(topic: Topic, offset: int) -> None:
    admin = AdminClient(topic.settings.kafka.client_config())
    for future in admin.delete_records([TopicPartition(topic.name, 0, offset)]).values():
        future.result(30)


def test_records_that_retention_took_before_they_were_read_are_counted_and_told(
    make_topic: MakeTopic, caplog: pytest.LogCaptureFixture
) -> None:
    before = _expired()
    topic = make_topic()
    topic.send(10)
    with topic.read() as reader:
        topic.wait_committed(10)
    topic.send(40)
    _delete_up_to(topic, 35)
    with caplog.at_level(logging.ERROR), topic.read() as reader:
        eventually("the rest is read", lambda: reader.records() == 15)
    assert _expired() - before == 25
    assert "25 records were deleted by retention" in caplog.text


def test_records_that_retention_takes_from_a_worker_that_is_behind_are_counted_and_told(
    make_topic: MakeTopic, caplog: pytest.LogCaptureFixture
) -> None:
    before = _expired()
    topic = make_topic(batch_records=10, buffered_batches=1)
    topic.send(100)
    with caplog.at_level(logging.ERROR), topic.read(at_once=False) as reader:
        first = reader.take()
        paused_since = time.monotonic()
        eventually("it has paused", lambda: time.monotonic() - paused_since > 2)
        _delete_up_to(topic, 60)
        reader.done(first)
        while reader.records() < 50:
            reader.done(reader.take())
        eventually("it is counted", lambda: _expired() - before == 50, 30)
        assert [o for piece in reader.slices() for o in piece.offsets] == [
            *range(10),
            *range(60, 100),
        ]
    assert "50 records were deleted by retention" in caplog.text


def _expired() -> float:
    value: float = metrics.RECORDS_EXPIRED._value.get()
    return value


def _make_again(topic: Topic, records: int) -> None:
    admin = AdminClient(topic.settings.kafka.client_config())
    for future in admin.delete_topics([topic.name]).values():
        future.result(30)

    def created() -> bool:  # the old one takes its time to go
        future = admin.create_topics([NewTopic(topic.name, 1, 1)])[topic.name]
        return future.exception(30) is None

    eventually("the topic is made again", created)
    topic.send(records)


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_a_topic_that_is_made_again_is_not_taken_for_the_old_one(
    make_topic: MakeTopic, protocol: str
) -> None:
    topic = make_topic(group_protocol=protocol)
    topic.send(10)
    with topic.read() as reader:
        eventually("the old one is read", lambda: reader.records() == 10)
        topic.wait_committed(10)
        old = {piece.source for piece in reader.slices()}
        _make_again(topic, records=15)
        error = reader.wait_failed()
        assert isinstance(error, IntakeFailed)
        assert f"{topic.name} was made again" in str(error)
        assert reader.records() == 10
    with topic.read() as reader:  # started again, it takes the new one for what it is
        eventually("the new one is read", lambda: reader.records() == 15)
        assert [o for piece in reader.slices() for o in piece.offsets] == list(range(15))
        assert {piece.source for piece in reader.slices()}.isdisjoint(old)


def test_an_offset_committed_for_the_old_topic_does_not_skip_records_of_the_new_one(
    make_topic: MakeTopic,
) -> None:
    topic = make_topic()
    topic.send(10)
    with topic.read(at_once=False) as reader:
        batch = reader.take()
        _make_again(topic, records=0)
        reader.done(batch)  # its commit meets a topic of the same name
        reader.stop()
    topic.send(15)
    with topic.read() as reader:
        eventually("the new one is read", lambda: reader.records() == 15)


def test_a_silent_topic_that_is_made_again_is_read_on_under_the_consumer_protocol(
    make_topic: MakeTopic,
) -> None:
    topic = make_topic(group_protocol="consumer")
    topic.send(10)
    with topic.read() as reader:
        eventually("the old one is read", lambda: reader.records() == 10)
        old = reader.intake._topic_ids[topic.name]
        _make_again(topic, records=0)
        eventually(
            "it is assigned anew",
            lambda: reader.intake._topic_ids[topic.name] != old and reader.intake.assigned() == 1,
            60,
        )
        topic.send(15)
        eventually("the new one is read", lambda: reader.records() == 25)
        offsets: dict[int, list[int]] = {}
        for piece in reader.slices():
            offsets.setdefault(piece.source, []).extend(piece.offsets)
        assert reader.error is None
    assert list(offsets.values()) == [list(range(10)), list(range(15))]


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_a_broker_that_dies_and_comes_back_is_waited_for(
    make_topic: MakeTopic, start_apache_kafka: Callable[..., ApacheKafka], protocol: str
) -> None:
    kafka = start_apache_kafka()
    topic = make_topic(kafka, partitions=3, group_protocol=protocol)
    topic.send(10, 1)
    with topic.read() as reader:
        eventually("the first are read", lambda: reader.records() == 10)
        kafka.kill()
        kafka.start()
        topic.send(10, 1)
        eventually("the others are read", lambda: _done(reader) == 20)
        topic.wait_committed(20, 1)
        assert reader.error is None
        assert ends(topic.settings, [topic.name]) == {(topic.name, 1): 20}


# --- where Redis has less than was committed ----------------------------------------------


@pytest.fixture
def marks(redis_client: redis.Redis, namespace: str) -> Marks:
    return Marks(redis_client, Keys(namespace))


def offsets_of(batches: Sequence[MicroBatch]) -> list[int]:
    return [offset for batch in batches for piece in batch.slices for offset in piece.offsets]


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_after_a_rewind_what_waits_is_stale_and_the_mark_is_where_it_goes_on(
    make_topic: MakeTopic, marks: Marks, protocol: str
) -> None:
    topic = make_topic(group_protocol=protocol)
    topic.send(10)
    with topic.read(at_once=False, marks=marks) as reader:
        begun = []
        while len(offsets_of(begun)) < 10:
            begun.append(reader.take())
        marks.advance({topic.source(): 4})
        for batch in begun:
            reader.done(batch)
        topic.send(5)
        eventually("more waits", lambda: len(offsets_of(reader.waiting)) == 5)
        fetched_before = len(reader.waiting)
        reader.intake.rewind()
        stale = [reader.take() for _ in range(fetched_before)]
        assert offsets_of(stale) == []
        for batch in stale:
            reader.done(batch)
        again: list[MicroBatch] = []
        while len(offsets_of(again)) < 11:
            again.append(reader.take())
            reader.done(again[-1])
        assert offsets_of(again) == list(range(4, 15))
        topic.wait_committed(15)


def test_what_retention_took_before_it_could_be_read_again_is_counted_and_told(
    make_topic: MakeTopic, marks: Marks, caplog: pytest.LogCaptureFixture
) -> None:
    before = _expired()
    topic = make_topic()
    topic.send(10)
    with caplog.at_level(logging.ERROR), topic.read(marks=marks) as reader:
        topic.wait_committed(10)
        marks.advance({topic.source(): 4})
        _delete_up_to(topic, 7)
        reader.intake.rewind()
        eventually("the rest is read again", lambda: reader.records() == 13)
        assert offsets_of(reader.begun)[10:] == [7, 8, 9]
        eventually("it is counted", lambda: _expired() - before == 3, 30)
    assert "3 records were deleted by retention before they were saved" in caplog.text


def test_a_worker_that_was_told_of_a_loss_goes_back_although_the_next_answer_is_good(
    make_topic: MakeTopic, marks: Marks, redis_client: redis.Redis, namespace: str
) -> None:
    """As between two primaries: else it would hold back for good."""
    topic = make_topic(partitions=1)
    topic.send(3)
    with topic.read(at_once=False, marks=marks) as reader:
        eventually("it holds the partition", lambda: reader.intake.assigned())
        reader.done(reader.take())
        trail = next(redis_client.scan_iter(f"{namespace}:trail:*"))
        held = redis_client.dump(trail)
        redis_client.delete(trail)
        eventually("it noticed", lambda: reader.waiting, 30)
        redis_client.restore(trail, 0, held)
        with pytest.raises(WritesLost):
            marks.advance({})
        reader.done(reader.take())
        marks.begin_anew()
        reader.intake.rewind()
        again = reader.take()
        assert offsets_of([again]) == [0, 1, 2]
        reader.done(again)


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_a_partition_that_is_taken_away_during_a_rewind_begins_at_its_mark_elsewhere(
    make_topic: MakeTopic, marks: Marks, protocol: str
) -> None:
    topic = make_topic(partitions=2, group_protocol=protocol)
    for partition in range(2):
        topic.send(10, partition)
    with topic.read(at_once=False, marks=marks) as one:
        while one.records() < 20:
            one.done(one.take())
        for partition in range(2):
            topic.wait_committed(10, partition)
            topic.send(2, partition)
        begun: list[MicroBatch] = []
        while len(offsets_of(begun)) < 4:
            begun.append(one.take())
        marks.advance({topic.source(partition): 4 for partition in range(2)})
        with topic.read(marks=marks) as two:
            eventually("it waits for what is in hand", one.intake.draining, 30)
            one.intake.rewind()
            for batch in begun:
                one.done(batch)
            eventually("each has one", lambda: two.intake.assigned() == 1, 30)
            eventually("what was lost is read", lambda: two.records() == 8)
            mine = one.take()
            assert offsets_of(two.begun) == offsets_of([mine]) == list(range(4, 12))
            one.done(mine)


def test_a_reader_begins_at_the_mark_where_more_was_committed(
    make_topic: MakeTopic, marks: Marks, redis_client: redis.Redis, namespace: str
) -> None:
    topic = make_topic()
    topic.send(10)
    with topic.read(marks=marks):
        topic.wait_committed(10)
    redis_client.hset(Keys(namespace).marks(), f"{topic.source():016x}", 7)
    with topic.read(marks=marks) as reader:
        eventually("what was lost is read again", lambda: reader.records() == 3)
        assert offsets_of(reader.begun) == [7, 8, 9]


def test_offsets_from_before_there_were_marks_are_believed(
    make_topic: MakeTopic, marks: Marks, redis_client: redis.Redis, namespace: str
) -> None:
    topic = make_topic()
    topic.send(10)
    with topic.read():
        topic.wait_committed(10)
    redis_client.set(Keys(namespace).current_space(), "space")
    marks.first(may_be_older=True)
    with topic.read(marks=marks) as reader:
        eventually("it holds the partition", lambda: reader.intake.assigned())
        topic.send(1)
        eventually("it goes on", lambda: reader.records() == 1)
        assert offsets_of(reader.begun) == [10]
    assert marks.claim([topic.source()])[0] == {topic.source(): 10}


def test_a_redis_without_marks_has_nothing_of_what_was_committed(
    make_topic: MakeTopic, marks: Marks
) -> None:
    topic = make_topic()
    topic.send(10)
    with topic.read():
        topic.wait_committed(10)
    with topic.read(marks=marks) as reader:
        eventually("all is read again", lambda: reader.records() == 10)


def test_an_offset_that_a_person_set_is_believed(make_topic: MakeTopic, marks: Marks) -> None:
    topic = make_topic()
    topic.send(10)
    with topic.read(marks=marks):
        eventually("nothing is saved of it", lambda: topic.committed() == 10)
    config = topic.settings.kafka.client_config() | {"group.id": topic.settings.topic("updater")}
    person = Consumer(config)
    person.commit(offsets=[TopicPartition(topic.name, 0, 6)], asynchronous=False)
    person.close()
    with topic.read(marks=marks) as reader:
        eventually("it goes on there", lambda: reader.records() == 4)
        assert offsets_of(reader.begun) == [6, 7, 8, 9]
    assert marks.claim([topic.source()])[0] == {topic.source(): 6}


def test_a_redis_that_lost_a_claim_is_told_to_whoever_folds(
    make_topic: MakeTopic, marks: Marks, redis_client: redis.Redis
) -> None:
    topic = make_topic()
    with topic.read(at_once=False, marks=marks) as reader:
        eventually("it holds the partition", lambda: reader.intake.assigned())
        redis_client.flushdb()
        eventually("an empty micro-batch", lambda: reader.waiting, 30)
        assert reader.waiting[0].slices == ()
