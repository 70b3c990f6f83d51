"""Events on another partition than their user's: sent on, with their origin, to a topic that
is keyed by user.

Java clients and `EventProducer` place a key by murmur2, librdkafka by CRC32 unless told
otherwise, and some producers set no key at all, so one user may arrive on two partitions. A
forwarded event keeps its origin's partition and offset in headers, and it is that origin
which the profile's watermark counts: forwarding twice changes nothing. It does not know
profiles.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from typing import Final

import numpy as np
from confluent_kafka import Consumer, TopicPartition
from numpy.typing import NDArray

from . import events as ev
from . import metrics
from .intake import Slice
from .producer import EventProducer, partitions_for
from .settings import Settings

TOPIC: Final = "events-by-user"
_ORIGIN_HEADER: Final = "penchant.origin"
_ORIGIN: Final = struct.Struct("<Qq")  # source key, offset


class Forwarder:
    """Keeps the events that are where their user belongs and sends the others on."""

    def __init__(self, settings: Settings, partitions: int) -> None:
        """`partitions`: how many the events topic has."""
        # Nothing times out by itself: an event given up while a later one of its user went through
        # would be taken for applied when it is sent again. `flush` has the patience, and the
        # process ends with it.
        config = settings.kafka.client_config() | {"message.timeout.ms": 0}
        self._producer = EventProducer(config, settings.namespace)
        self._events_topic = settings.topic("events")
        self._partitions = partitions

    def keep_local(
        self, piece: Slice, events: Sequence[ev.Event], index: Sequence[int]
    ) -> tuple[list[ev.Event], list[int]]:
        """The events (and their positions in the slice) that are to be folded here."""
        if piece.topic != self._events_topic or not events:
            return list(events), list(index)
        home = partitions_for([e.user_id.encode() for e in events], self._partitions).tolist()
        kept: list[ev.Event] = []
        kept_index: list[int] = []
        for event, i, partition in zip(events, index, home, strict=True):
            if partition == piece.partition:
                kept.append(event)
                kept_index.append(i)
            else:
                self._send(piece, event, i)
        return kept, kept_index

    def flush(self) -> None:
        """Return once all that was sent on has arrived. Raises DeliveryFailed, FlushTimedOut."""
        self._producer.flush()

    def _send(self, piece: Slice, event: ev.Event, i: int) -> None:
        metrics.EVENTS_FORWARDED.inc()
        origin = _ORIGIN.pack(piece.source, piece.offsets[i])
        # The event goes as it was parsed, with the time it took from its record if it had none,
        # and under its record's timestamp, so that it is judged there as it was here.
        self._producer.send_bytes(
            TOPIC,
            event.user_id.encode(),
            event.to_json(),
            [(_ORIGIN_HEADER, origin)],
            piece.timestamps_ms[i],
        )


def origin_of(
    piece: Slice, index: NDArray[np.int64], forwarded: bool
) -> tuple[NDArray[np.uint64], NDArray[np.int64]]:
    """Sources and offsets that the watermark counts, of the records at these positions.

    Only records of the `forwarded` topic carry an origin; anybody may set a header elsewhere.
    """
    sources = np.full(len(index), piece.source, np.uint64)
    offsets = np.asarray(piece.offsets, np.int64)[index]
    for at, i in enumerate(index.tolist() if forwarded else ()):
        origin = dict(piece.headers[i] or ()).get(_ORIGIN_HEADER)
        if origin is not None and len(origin) == _ORIGIN.size:
            sources[at], offsets[at] = _ORIGIN.unpack(origin)
    return sources, offsets


def undrained(settings: Settings, partitions: int) -> int:
    """Forwarded events that the group has not folded yet."""
    consumer = Consumer(settings.kafka.client_config() | {"group.id": settings.topic("updater")})
    try:
        at = [TopicPartition(settings.topic(TOPIC), p) for p in range(partitions)]
        left = 0
        for position in consumer.committed(at, timeout=10):
            low, high = consumer.get_watermark_offsets(position, timeout=10)
            # Tansu counts the latest batch as one record, so `high` may lie below the position.
            left += max(0, high - max(low, position.offset))
        return left
    finally:
        consumer.close()
