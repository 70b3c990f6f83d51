"""A shop's traffic for the proof, and what the profiles must be after it.

The expectation is taken from the topics themselves, read back record by record and parsed with
`json` alone: what the broker holds is what must be in the profiles, once.
"""

from __future__ import annotations

import json
import random
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final

import redis
from confluent_kafka import Consumer, TopicPartition

from model.encoder import TextEncoder
from model.releases import Release
from model.text import item_text
from profiles import Profile, arithmetic
from profiles.generations import follow
from profiles.schema import FENCE, STATE, Keys, key64, source_key
from stream.datasets import load
from stream.events import Event, Forget, Item, ItemEvent, Message, Purchase, Search
from stream.producer import EventProducer
from stream.settings import Settings
from stream.topics import connect, topic_ids
from tests import oracle

# Written down here once more: the expectation must not follow a mistake in the code under test.
WEIGHTS: Final = {
    "impression": 0.0,
    "view": 0.2,
    "click": 0.3,
    "add_to_cart": 0.6,
    "remove_from_cart": -0.4,
    "purchase": 1.0,
    "search": 0.5,
    "review": 1.0,
    "message": 0.1,
}
QUERIES: Final = ("alien invasion", "love story", "court drama", "talking animals", "heist")
BAD: Final = "test.bad"  # header of records that must be rejected


@dataclass(frozen=True)
class Bad:
    """A record that is no event."""

    key: bytes
    value: bytes


Sendable = Event | Item | Bad


def films(seed: int, heavy: int, light: int) -> list[Sendable]:
    """MovieLens shoppers in event time, some with up to 150 events and many with up to 8, and all
    that makes it hard: every fourth film's text arrives after its first events or at the very
    end; searches, messages, producers' repeats, late events, prices in two currencies, shoppers
    who want to be forgotten, records that are bad. Every other shopper's events bear no event id,
    so that nothing but the watermark keeps them from counting twice."""
    chance = random.Random(seed)
    data = load("movielens")
    everybody = sorted({event.user_id for event in data.events})
    chance.shuffle(everybody)
    left = dict.fromkeys(everybody[:heavy], 150) | dict.fromkeys(everybody[-light:], 8)
    recorded = []
    for event in data.events:
        if left.get(event.user_id, 0) > 0:
            left[event.user_id] -= 1
            anonymous = {"event_id": None} if int(event.user_id) % 2 else {}
            recorded.append(event.model_copy(update=anonymous))
    events = len(recorded)
    seen = {event.item_id for event in recorded if isinstance(event, ItemEvent)}
    items = [item for item in data.items if item.item_id in seen]
    chance.shuffle(items)
    late = items[: len(items) // 4]
    traffic: list[tuple[float, Sendable]] = [(-1.0, item) for item in items[len(late) :]]
    for item in late:
        at = events + 1.0 if chance.random() < 0.3 else chance.uniform(0, events)
        traffic.append((at, item))
    for i, event in enumerate(recorded):
        traffic += _around(chance, float(i), event)
    return [record for _, record in sorted(traffic, key=lambda pair: pair[0])]


def _around(chance: random.Random, at: float, event: Event) -> Iterator[tuple[float, Sendable]]:
    """An event, perhaps late, and what its shopper's browser might send besides."""
    draw = chance.random()
    if isinstance(event, Purchase) and draw < 0.5:
        currency = chance.choice([None, "USD", "EUR"])
        event = event.model_copy(update={"price": round(20 * draw, 2), "currency": currency})
    yield at + (chance.uniform(0, 200) if draw < 0.05 else 0.0), event
    if 0.10 < draw < 0.14 and event.event_id:  # a producer that sends again, mostly soon
        yield at + chance.uniform(0, 20), event
    if 0.20 < draw < 0.24:
        query = chance.choice(QUERIES)
        yield at, Search(event_id=f"s{at}", user_id=event.user_id, ts=event.ts + 1, query=query)
    if 0.30 < draw < 0.32:
        text = f"Where is my order? {chance.choice(QUERIES)}"
        yield at, Message(event_id=f"m{at}", user_id=event.user_id, ts=event.ts + 2, text=text)
    if 0.400 < draw < 0.402:
        yield at, Forget(event_id=f"f{at}", user_id=event.user_id, ts=event.ts + 3)
    if 0.50 < draw < 0.51:
        yield at, Bad(event.user_id.encode(), chance.choice([b"{", b"\xff\xfe", b'{"type":"nod"}']))


class Traffic:
    """Sends records at a pace from a thread of its own, until told to hurry."""

    def __init__(self, settings: Settings, records: Sequence[Sendable], per_s: float) -> None:
        self._settings = settings
        self._records = records
        self._pause_s = 0.1
        self._burst = max(1, round(per_s * self._pause_s))
        self._hurry = threading.Event()
        self._error: BaseException | None = None
        self.sent = 0
        self._thread = threading.Thread(target=self._run, daemon=True)

    def start(self) -> Traffic:
        self._thread.start()
        return self

    def finish(self) -> None:
        """Send what is left without a pause; return when all of it is in the topic."""
        self._hurry.set()
        self._thread.join()
        if self._error is not None:
            raise self._error

    def _run(self) -> None:
        try:
            config, name = self._settings.kafka.client_config(), self._settings.namespace
            with EventProducer(config, name, delivery_timeout_s=120) as producer:
                for i, record in enumerate(self._records):
                    _send(producer, record)
                    self.sent = i + 1
                    if self.sent % self._burst == 0:
                        self._hurry.wait(self._pause_s)
        except BaseException as error:
            self._error = error


def _send(producer: EventProducer, record: Sendable) -> None:
    if isinstance(record, Bad):
        producer.send_bytes("events", record.key, record.value, [(BAD, b"")])
    elif isinstance(record, Item):
        producer.send_item(record)
    elif record.event_id is None:  # `send` would give it one
        producer.send_bytes("events", record.user_id.encode(), record.to_json())
    else:
        producer.send(record)


@dataclass(frozen=True)
class Stored:
    """A record as the broker holds it."""

    topic: str
    partition: int
    offset: int
    timestamp_ms: int
    key: bytes | None
    value: bytes | None
    bad: bool


def read_back(settings: Settings, name: str) -> list[Stored]:
    """All records of a topic, each partition in order."""
    topic = settings.topic(name)
    config = {"group.id": "test-reader", "enable.auto.commit": False, "log_level": 0}
    consumer = Consumer(settings.kafka.client_config() | config)
    try:
        partitions = consumer.list_topics(topic, timeout=10).topics[topic].partitions
        places = [TopicPartition(topic, p, 0) for p in partitions]
        left = {}
        for place in places:
            low, high = consumer.get_watermark_offsets(place, timeout=10)
            place.offset = low
            if high > low:
                left[place.partition] = high
        consumer.assign([place for place in places if place.partition in left])
        records = []
        while left:
            message = consumer.poll(30)
            assert message is not None, f"{topic} could not be read to its end"
            assert message.error() is None, message.error()
            headers = dict(message.headers() or ())
            records.append(
                Stored(
                    topic,
                    message.partition(),
                    message.offset(),
                    message.timestamp()[1],
                    message.key(),
                    message.value(),
                    BAD in headers,
                )
            )
            if message.offset() + 1 >= left[message.partition()]:
                del left[message.partition()]
        return records
    finally:
        consumer.close()


class Expectation:
    """What the topics hold, as the oracle's events."""

    def __init__(self, settings: Settings, release: Release) -> None:
        self.records = read_back(settings, "events")
        admin, _ = connect(settings.kafka)
        self._topic_id = topic_ids(admin, [settings.topic("events")])[settings.topic("events")]
        self._items = {
            record.key.decode(): json.loads(record.value)
            for record in read_back(settings, "items")
            if record.key and record.value
        }
        self._currency = settings.profile.currency
        self._vectors = _Vectors(release.load_encoder(device="cpu"))

    def events(self) -> list[oracle.Event]:
        """The events that count, in an order that keeps each partition's."""
        return [self._event(record) for record in self.records if not record.bad]

    def profiles(self, rules: oracle.Rules | None = None) -> dict[str, oracle.Expected]:
        return oracle.fold(self.events(), rules)

    def _event(self, record: Stored) -> oracle.Event:
        told = json.loads(record.value or b"{}")
        kind = told["type"]
        event_id = told.get("event_id")
        bare = oracle.Event(
            told["user_id"],
            source_key(self._topic_id or record.topic, record.partition),
            record.offset,
            key64(event_id).to_bytes(8, "little") if event_id else None,
            told.get("ts", record.timestamp_ms),
            kind,
        )
        if kind == "forget":
            return bare
        bare = replace(bare, weight=WEIGHTS[kind])
        if kind in ("search", "message"):
            words = told["query"] if kind == "search" else told["text"]
            return replace(bare, text=True, vector=self._vectors.of(words, "query"))
        return self._with_item(bare, told)

    def _with_item(self, bare: oracle.Event, told: Mapping[str, Any]) -> oracle.Event:
        weight = bare.weight
        if bare.type == "review":
            weight *= (told["rating"] - 3) / 2
        item = self._items.get(told["item_id"], told)
        path = item.get("category", ())
        words = item_text(
            item.get("title", ""), path, item.get("brand", ""), item.get("description", "")
        )
        ours = told.get("currency") in (None, self._currency)
        bought = bare.type == "purchase"
        return replace(
            bare,
            weight=weight,
            item_key=key64(told["item_id"]),
            category_key=key64(" > ".join(path[:2])) if path else 0,
            vector=self._vectors.of(words, "passage") if words else None,
            spend=told.get("price", 0.0) * told.get("quantity", 1) if bought and ours else 0.0,
            foreign=bought and not ours,
        )


class _Vectors:
    def __init__(self, encoder: TextEncoder) -> None:
        self._encoder = encoder
        self._known: dict[tuple[str, str], list[float]] = {}

    def of(self, text: str, kind: Any) -> list[float]:
        if (text, kind) not in self._known:
            self._known[(text, kind)] = self._encoder.encode([text], kind)[0].tolist()
        return self._known[(text, kind)]


def stored_profiles(
    client: redis.Redis, namespace: str, generation: int | None = None
) -> dict[str, Profile]:
    """Every profile of a generation, or of the live one, those of erased users too."""
    keys = Keys(namespace, generation or 0)
    if generation is None:
        follow(client, keys)
    prefix, suffix = (part.encode() for part in keys.profile("\0").split("\0"))
    found = {}
    for key in client.scan_iter(match=prefix.replace(b"[", b"\\[") + b"*", count=1000):
        user_id = key.removeprefix(prefix).removesuffix(suffix).decode()
        state, fence = client.hmget(key, [STATE, FENCE])
        found[user_id] = arithmetic.decode(user_id, state, fence)
    return found


def differences(
    stored: Mapping[str, Profile], expected: Mapping[str, oracle.Expected]
) -> dict[str, list[str]]:
    """User -> what is wrong with the profile; nothing is wrong where this is empty."""
    wrong = {user: ["should not exist"] for user in stored.keys() - expected.keys()}
    wrong |= {user: ["is missing"] for user in expected.keys() - stored.keys()}
    for user in stored.keys() & expected.keys():
        if found := oracle.compare(stored[user], expected[user]):
            wrong[user] = found
    return wrong
