"""EventProducer against a broker: librdkafka's own, which runs inside a client."""

from __future__ import annotations

import threading
import time
from collections import defaultdict
from collections.abc import Iterator
from uuid import UUID

import numpy as np
import pytest
from confluent_kafka import Consumer, KafkaError, Producer, TopicPartition

from stream.errors import UserError
from stream.events import Item, Message, Search, View, parse, parse_items
from stream.producer import (
    DeliveryFailed,
    EventProducer,
    FlushTimedOut,
    RawRecord,
    murmur2,
    partition_for,
    partitions_for,
)

PARTITIONS = 4  # of a topic that the mock broker creates
NOBODY = "127.0.0.1:1"  # a port where nothing listens
VIEW = View(user_id="u1", item_id="i1")

# From Kafka's own UtilsTest.testMurmur2.
JAVA_MURMUR2 = {
    b"21": -973932308,
    b"foobar": -790332482,
    b"a-little-bit-long-string": -985981536,
    b"a-little-bit-longer-string": -1486304829,
    b"lkjh234lh9fiuh90y23oiuhsafujhadof229phr9h19h89h8": -58897971,
    b"abc": 479470107,
}


@pytest.fixture(scope="module")
def bootstrap() -> Iterator[str]:
    owner = Producer({"bootstrap.servers": NOBODY, "test.mock.num.brokers": 1, "log_level": 0})
    (broker,) = owner.list_topics(timeout=10).brokers.values()
    yield f"{broker.host}:{broker.port}"
    owner.flush(0)


def records(bootstrap: str, topic: str) -> list:
    """All records of a topic, each partition in order."""
    consumer = Consumer(
        {
            "bootstrap.servers": bootstrap,
            "group.id": "test",
            "enable.partition.eof": True,
            "fetch.wait.max.ms": 10,
        }
    )
    consumer.assign([TopicPartition(topic, p, 0) for p in range(PARTITIONS)])
    found, at_end = [], set()
    while len(at_end) < PARTITIONS:
        message = consumer.poll(10)
        assert message is not None, "the mock broker did not answer"
        if message.error() is None:
            found.append(message)
        else:
            assert message.error().code() == KafkaError._PARTITION_EOF
            at_end.add(message.partition())
    consumer.close()
    return found


@pytest.mark.parametrize("key", JAVA_MURMUR2, ids=lambda key: key.decode())
def test_murmur2_is_javas(key: bytes) -> None:
    assert murmur2(key) == JAVA_MURMUR2[key]


def test_a_slice_of_keys_is_hashed_as_single_keys_are() -> None:
    random = np.random.default_rng(5)
    keys = [random.bytes(int(n)) for n in random.integers(0, 70, 500)]
    keys += [b"", "用户1".encode(), *JAVA_MURMUR2]
    for n_partitions in (1, 12, 64):
        expected = [partition_for(key, n_partitions) for key in keys]
        assert partitions_for(keys, n_partitions).tolist() == expected
    assert partitions_for([], 12).tolist() == []


def test_partition_for_is_where_the_producer_puts_a_user(bootstrap: str) -> None:
    users = [f"user-{i}" for i in range(300)] + ["用户1", "x" * 256]
    with EventProducer(bootstrap, "placed") as producer:
        for user in users:
            producer.send(View(user_id=user, item_id="i1"))
    found = {message.key(): message.partition() for message in records(bootstrap, "placed.events")}
    assert found == {user.encode(): partition_for(user.encode(), PARTITIONS) for user in users}
    assert set(found.values()) == set(range(PARTITIONS))


def test_a_sent_event_arrives_with_an_id_and_the_time_of_sending(bootstrap: str) -> None:
    before_ms = int(time.time() * 1000)
    with EventProducer(bootstrap, "one") as producer:
        producer.send(VIEW)
    after_ms = int(time.time() * 1000)
    (message,) = records(bootstrap, "one.events")
    record_ms = message.timestamp()[1]
    assert message.key() == b"u1"
    assert before_ms <= record_ms <= after_ms
    (event,) = parse([message.value()], [record_ms], 0).events
    assert event.ts == record_ms
    assert event.event_id is not None
    assert UUID(event.event_id).version == 4
    assert event.model_copy(update={"event_id": None, "ts": VIEW.ts}) == VIEW


def test_an_id_and_a_time_that_an_event_has_are_kept(bootstrap: str) -> None:
    event = Search(user_id="u1", query="lamp", event_id="mine", ts=1_000_000_000_000)
    with EventProducer(bootstrap, "kept") as producer:
        producer.send(event)
    (message,) = records(bootstrap, "kept.events")
    assert parse([message.value()], [message.timestamp()[1]], 0).events == [event]


def test_items_are_upserted_and_deleted_by_key(bootstrap: str) -> None:
    lamp = Item(item_id="i1", title="Lamp", category="Home > Light")
    with EventProducer(bootstrap, "shop") as producer:
        producer.send_item(lamp)
        producer.delete_item("i2")
    found = records(bootstrap, "shop.items")
    parsed = parse_items([m.key() for m in found], [m.value() for m in found])
    assert (parsed.upserts, parsed.deletions, parsed.rejects) == ([lamp], ["i2"], [])


def test_a_deletion_needs_a_valid_item_id(bootstrap: str) -> None:
    with EventProducer(bootstrap) as producer, pytest.raises(ValueError, match="pattern"):
        producer.delete_item(" i1")


def test_bytes_travel_as_they_are(bootstrap: str) -> None:
    headers = [("a", b"\xff"), ("b", None), ("a", b"again")]
    with EventProducer(bootstrap, "raw") as producer:
        producer.send_bytes("any-topic", None, b"\x00\xff", headers, 1_234_567_890_123)
        producer.send_bytes("any-topic", b"k", None)
    found = {message.key(): message for message in records(bootstrap, "raw.any-topic")}
    assert found[None].value() == b"\x00\xff"
    assert found[None].headers() == headers
    assert found[None].timestamp()[1] == 1_234_567_890_123
    assert found[b"k"].value() is None
    assert found[b"k"].headers() is None


def test_a_full_buffer_makes_send_wait_and_loses_nothing(bootstrap: str) -> None:
    with EventProducer(bootstrap, "narrow", max_buffered=10) as producer:
        for i in range(500):
            producer.send(View(user_id=f"u{i}", item_id="i1"))
    assert len(records(bootstrap, "narrow.events")) == 500


def test_threads_share_a_producer_and_each_users_order_is_kept(bootstrap: str) -> None:
    with EventProducer(bootstrap, "shared", max_buffered=50) as producer:

        def send_all(user: str) -> None:
            for i in range(200):
                producer.send(View(user_id=user, item_id=str(i)))

        threads = [threading.Thread(target=send_all, args=(f"u{n}",)) for n in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    order = defaultdict(list)
    for message in records(bootstrap, "shared.events"):
        (event,) = parse([message.value()], [message.timestamp()[1]], 0).events
        assert isinstance(event, View)
        order[event.user_id].append(int(event.item_id))
    assert order == {f"u{n}": list(range(200)) for n in range(4)}


def test_an_undelivered_event_is_raised_with_the_id_to_send_again() -> None:
    producer = EventProducer(NOBODY, delivery_timeout_s=0.3)
    producer.send(VIEW)
    with pytest.raises(DeliveryFailed, match="refused") as failed:
        producer.flush()
    event = failed.value.event
    assert isinstance(event, View)
    assert event.event_id is not None
    assert event.model_copy(update={"event_id": None}) == VIEW
    assert "timed out" in failed.value.reason
    producer.flush()  # told once


def test_a_broker_that_is_down_ends_a_full_buffer_with_an_error_not_a_hang() -> None:
    producer = EventProducer(NOBODY, max_buffered=10, delivery_timeout_s=0.3)
    sent = 0
    lost = []

    def send_many() -> None:
        nonlocal sent
        for _ in range(100):
            producer.send(VIEW)
            sent += 1

    with pytest.raises(DeliveryFailed) as failed:
        send_many()
    lost += failed.value.failures
    try:
        producer.flush()
    except DeliveryFailed as rest:
        lost += rest.failures
    assert sent == 10
    assert len(lost) == 10
    assert len({failure.sent.event_id for failure in lost}) == 10


def test_a_flush_that_ends_early_says_how_much_is_waiting() -> None:
    producer = EventProducer(NOBODY, delivery_timeout_s=30)
    producer.send(VIEW)
    with pytest.raises(FlushTimedOut, match="check that it is up") as waiting:
        producer.flush(0.3)
    assert waiting.value.waiting == 1


def send_and_break(producer: EventProducer) -> None:
    with producer:
        producer.send(VIEW)
        raise KeyError("the body's own")


def test_leaving_the_context_raises_what_was_not_delivered() -> None:
    def send() -> None:
        with EventProducer(NOBODY, delivery_timeout_s=0.3) as producer:
            producer.send(VIEW)

    with pytest.raises(DeliveryFailed):
        send()


def test_leaving_the_context_does_not_hide_the_bodys_exception() -> None:
    with pytest.raises(KeyError, match="the body's own") as raised:
        send_and_break(EventProducer(NOBODY, delivery_timeout_s=0.3))
    (note,) = raised.value.__notes__
    assert "1 record was not delivered" in note


def test_what_the_body_sent_before_it_failed_still_arrives(bootstrap: str) -> None:
    with pytest.raises(KeyError):
        send_and_break(EventProducer(bootstrap, "broken"))
    assert len(records(bootstrap, "broken.events")) == 1


def test_an_event_that_the_client_refuses_is_raised_at_once(bootstrap: str) -> None:
    letter = Message(user_id="u1", event_id="e1", text="x" * 5000)
    with EventProducer({"bootstrap.servers": bootstrap, "message.max.bytes": 1000}) as producer:
        with pytest.raises(DeliveryFailed, match="too large") as failed:
            producer.send(letter)
        assert failed.value.event == letter
        (failure,) = failed.value.failures
        assert failure.too_large


def test_a_raw_record_that_fails_is_named_by_topic_and_key() -> None:
    producer = EventProducer(NOBODY, delivery_timeout_s=0.3)
    producer.send_bytes("somewhere", b"k", b"v")
    with pytest.raises(DeliveryFailed, match=r"penchant\.somewhere key b'k'") as failed:
        producer.flush()
    assert failed.value.event == RawRecord("penchant.somewhere", b"k", b"v")


def test_the_partitioner_is_not_negotiable() -> None:
    with pytest.raises(ValueError, match="partitioner"):
        EventProducer({"bootstrap.servers": NOBODY, "partitioner": "random"})


def test_a_property_that_librdkafka_does_not_know_is_one_line() -> None:
    with pytest.raises(UserError, match=r"no\.such"):
        EventProducer({"bootstrap.servers": NOBODY, "no.such": 1})
