"""What no pipeline on this machine can pass: each part of the work alone, with nothing beside it.

The parts are Penchant's own fastest, on the records and profiles of the measured run: records are
scanned as the worker scans them, and saves are sent as the worker packs them, over as many
connections at a time as it has lanes; packing is not timed.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Final

import confluent_kafka as kafka
import numpy as np

from profiles import store as store_module
from profiles.arithmetic import EventColumns, Layout
from profiles.cache import Row, Rows
from profiles.kernel import Folded
from profiles.marks import Marks, steps_of
from profiles.neighbours import LANES
from profiles.schema import TYPE_CODE, Keys
from profiles.store import ProfileStore
from stream import events as ev
from stream.contributions import event_weights
from stream.intake import consumer_config
from stream.scanning import Scanner
from stream.settings import Settings
from stream.updater_app import profile_layout

_CONSUME: Final = 1024
_SECONDS: Final = 8.0


@dataclass(frozen=True)
class Ceilings:
    """Per second, one process."""

    consumed: float
    consumed_and_parsed: float
    loads: float
    saves: float
    state_bytes: float  # of a profile, mean


def measure(settings: Settings, users: Sequence[str], events: int, space: str) -> Ceilings:
    """Of the first `events` records of the events topic, and of these users' profiles, which live
    in `space`."""
    scanner = Scanner(event_weights(settings.profile.weights), settings.profile.currency)
    ahead_ms = int(settings.stream.max_ahead_s * 1000)

    def parse(messages: list[kafka.Message]) -> None:
        values = [message.value() for message in messages]
        times_ms = [message.timestamp()[1] for message in messages]
        others = scanner.scan(values, times_ms, ahead_ms).others.tolist()
        ev.parse([values[i] for i in others], [times_ms[i] for i in others], ahead_ms)

    scanner.scan([], [], 0)  # compiled
    consumed = _consume(settings, events, lambda messages: None)
    parsed = _consume(settings, events, parse)
    return Ceilings(consumed, parsed, *profiles(settings, users, int(space, 16)))


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


def profiles(
    settings: Settings, users: Sequence[str], space: int, seconds: float = _SECONDS
) -> tuple[float, float, float]:
    """Loads per second, saves per second, mean bytes of the state field."""
    client = settings.redis.connection().open()
    keys = Keys(settings.namespace)
    layout = profile_layout(settings, settings.model.dimensions)
    ttl_s, marks = settings.profile.ttl_days * 86_400, Marks(client, keys)
    store = ProfileStore(client, keys, layout, ttl_s=ttl_s, writer=1, marks=marks)
    asking = client.pipeline(transaction=False)
    for user in users[:1000]:
        asking.hstrlen(keys.profile(user), "state")
    state_bytes = float(np.mean(asking.execute()))
    size = settings.stream.batch_records
    batches = [users[i : i + size] for i in range(0, len(users), size)]
    load_s: list[float] = []
    save_s: list[float] = []
    done, saved, until_s = 0, 0, time.perf_counter() + seconds
    with ThreadPoolExecutor(LANES) as lanes:
        while time.perf_counter() < until_s:
            batch = batches[len(load_s) % len(batches)]
            ends = [len(batch) * lane // LANES for lane in range(LANES + 1)]
            parts = [batch[begin:end] for begin, end in pairwise(ends)]
            begin_s = time.perf_counter()
            loaded = list(lanes.map(store._fetch, parts))
            load_s.append(time.perf_counter() - begin_s)
            packed = [
                _packed(store, part, rows, clicks(len(part), len(load_s), layout), space)
                for part, rows in zip(parts, loaded, strict=True)
            ]
            begin_s = time.perf_counter()
            list(lanes.map(lambda one: store._send(one.payload, one.calls), packed))
            save_s.append(time.perf_counter() - begin_s)
            done += len(batch)
            saved += sum(len(one.written) for one in packed)
    return done / sum(load_s), saved / sum(save_s), state_bytes


def _packed(
    store: ProfileStore, users: Sequence[str], rows: list[Row], events: EventColumns, space: int
) -> Folded:
    """The saves of these users after one more event each, as commands to Redis."""
    calls = -(-len(users) // store_module._CHUNK)
    with steps_of(store._marks, store._keys, calls) as steps:
        folded = store._kernel.fold(
            users, Rows.of(rows), events, 0, space, int(events.offset[0]), time.time(),
            lambda keys: {}, {1}, steps,
        )  # fmt: skip
        steps.made = 0  # what the other lane has is not waited for
    folded.payload = memoryview(bytes(folded.payload))  # the other lanes' go into the same buffer
    return folded


def clicks(n: int, turn: int, layout: Layout) -> EventColumns:
    """One event for each of n users."""
    d = layout.dimensions
    return EventColumns(
        row=np.arange(n),
        source=np.ones(n, dtype=np.uint64),
        offset=np.full(n, turn),
        event=np.zeros(n, dtype=np.uint64),
        t_ms=np.full(n, int(time.time() * 1000)),
        type=np.full(n, TYPE_CODE["click"], dtype=np.uint8),
        weight=np.ones(n, dtype=np.float32),
        item=np.full(n, turn, dtype=np.uint64),
        category=np.zeros(n, dtype=np.uint64),
        vector=np.full((n, d), d**-0.5, dtype=np.float32),
        resolved=np.ones(n, dtype=bool),
        text=np.zeros(n, dtype=bool),
        spend=np.zeros(n),
        foreign=np.zeros(n, dtype=bool),
    )
