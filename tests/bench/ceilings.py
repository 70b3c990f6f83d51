"""What no pipeline on this machine can pass: each part of the work alone, with nothing beside it.

The parts are Penchant's own, on the records and profiles of the measured run.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final

import confluent_kafka as kafka
import numpy as np

from profiles.arithmetic import Layout
from profiles.schema import Keys
from profiles.store import ProfileStore
from stream import events as ev
from stream.intake import consumer_config
from stream.settings import Settings

_CONSUME: Final = 1024
_SECONDS: Final = 4.0


@dataclass(frozen=True)
class Ceilings:
    """Per second, one process."""

    consumed: float
    consumed_and_parsed: float
    loads: float
    saves: float
    state_bytes: float  # of a profile, mean


def measure(settings: Settings, users: Sequence[str], events: int) -> Ceilings:
    """Of the first `events` records of the events topic, and of these users' profiles."""
    parse_max_ms = int(settings.stream.max_ahead_s * 1000)

    def parse(messages: list[kafka.Message]) -> None:
        values = [message.value() for message in messages]
        times_ms = [message.timestamp()[1] for message in messages]
        ev.parse(values, times_ms, parse_max_ms)

    consumed = _consume(settings, events, lambda messages: None)
    parsed = _consume(settings, events, parse)
    return Ceilings(consumed, parsed, *_profiles(settings, users))


def _consume(settings: Settings, events: int, work: Callable[[Any], None]) -> float:
    consumer = kafka.Consumer(consumer_config(settings, "classic", lambda error, positions: None))
    topic = settings.topic("events")
    consumer.assign(
        [
            kafka.TopicPartition(topic, p, kafka.OFFSET_BEGINNING)
            for p in range(settings.kafka.partitions)
        ]
    )
    first = consumer.consume(1, 30)  # connected, and fetching
    done, begin_s = len(first), time.perf_counter()
    while done < events:
        messages = consumer.consume(min(_CONSUME, events - done), 1.0)
        work(messages)
        done += len(messages)
    seconds = time.perf_counter() - begin_s
    consumer.close()
    return events / seconds


def _profiles(settings: Settings, users: Sequence[str]) -> tuple[float, float, float]:
    """Loads per second, saves per second, mean bytes of the state field."""
    client = settings.redis.connection().open()
    keys = Keys(settings.namespace)
    store = ProfileStore(
        client,
        keys,
        Layout(settings.model.dimensions, settings.profile.half_lives_s),
        ttl_s=settings.profile.ttl_days * 86_400,
        writer=1,
    )
    size = settings.stream.batch_records
    batches = [users[i : i + size] for i in range(0, len(users), size)]
    load_s: list[float] = []
    save_s: list[float] = []
    done = 0
    names: dict[int, str] = {}
    until_s = time.perf_counter() + 2 * _SECONDS
    while time.perf_counter() < until_s:
        batch = batches[len(load_s) % len(batches)]
        begin_s = time.perf_counter()
        loaded = store.load(batch)
        between_s = time.perf_counter()
        store.save(batch, loaded, range(len(batch)), names, time.time())
        load_s.append(between_s - begin_s)
        save_s.append(time.perf_counter() - between_s)
        done += len(batch)
    asking = client.pipeline(transaction=False)
    for user in users[:1000]:
        asking.hstrlen(keys.profile(user), "state")
    return done / sum(load_s), done / sum(save_s), float(np.mean(asking.execute()))
