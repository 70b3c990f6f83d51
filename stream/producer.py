"""What a shop imports to send events and items: typed, keyed by shopper, delivered or raised.

It does not know what happens to an event later, and has no opinion on event time: an event
without `ts` goes out without one, and the record's own timestamp (the moment of `send`, or the
broker's, as the topic is set) stands for it.
"""

from __future__ import annotations

import logging
import re
import time
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from types import TracebackType
from typing import Any, Final, Self
from uuid import uuid4

import numpy as np
from confluent_kafka import KafkaError, KafkaException, Producer
from numpy.typing import NDArray

from .errors import UserError
from .events import Event, Item, item_key

_log = logging.getLogger(__name__)

Headers = Sequence[tuple[str, bytes | None]]

_DEFAULTS: Final[dict[str, Any]] = {
    "acks": "all",
    "enable.idempotence": True,
    "compression.type": "zstd",
    # A shop sends one event at a time: 5 ms of company make batches, and no page waits for them.
    "linger.ms": 5,
    # librdkafka would take 1 GiB; 256 MiB are 2.6 KB for each of the 100,000 default records.
    "queue.buffering.max.kbytes": 256 * 1024,
    # A broker that is down would fill the log with every attempt to reach it: errors arrive by
    # callback, and are logged when they change.
    "log_level": 2,
}
# How long a blocking call stays in librdkafka before Python may act on a signal.
_SLICE_S: Final = 0.1
_MAX_TOPIC_WAIT_S: Final = 10.0
_MASK: Final = 0xFFFFFFFF
_SEED: Final = 0x9747B28C
_M: Final = 0x5BD1E995


@dataclass(frozen=True, slots=True)
class RawRecord:
    """A record sent as bytes; `topic` is the full name."""

    topic: str
    key: bytes | None
    value: bytes | None
    headers: tuple[tuple[str, bytes | None], ...] = ()


Sent = Event | Item | RawRecord


@dataclass(frozen=True, slots=True)
class Undelivered:
    """What did not reach the topic, and why."""

    sent: Sent
    reason: str
    too_large: bool = False
    """Refused for its size: sending it again will fail again."""


class ProducerError(UserError):
    """Something sent is not (yet) in the topic."""


class DeliveryFailed(ProducerError):
    """These were given up. Send them again, with the event_id they have now.

    One that timed out may have arrived all the same; its event_id keeps it from counting twice.
    """

    def __init__(self, failures: Sequence[Undelivered]) -> None:
        self.failures = tuple(failures)
        first = self.failures[0]
        self.event = first.sent
        """The first of them."""
        self.reason = first.reason
        count = "1 record was" if len(failures) == 1 else f"{len(failures):,} records were"
        super().__init__(f"{count} not delivered; first {_named(first.sent)}: {first.reason}")


class FlushTimedOut(ProducerError):
    """Nothing is given up yet: `waiting` records are still being tried. Flush again."""

    def __init__(self, waiting: int, timeout_s: float, last_error: str) -> None:
        self.waiting = waiting
        because = f" ({last_error})" if last_error else ""
        super().__init__(
            f"{waiting:,} record(s) still wait for the broker after {timeout_s:g} s"
            f"{because}; check that it is up and that the address is right, then flush again"
        )


class EventProducer:
    """Sends events and items; every shopper's events stay in order and in one partition.

    `bootstrap` is `host:port[,host:port]`, or any librdkafka properties (TLS, SASL, linger; the
    partitioner excepted). `send` returns as soon as the record is buffered. At most `max_buffered`
    records (and 256 MiB) wait for the broker; then `send` blocks. What is not acknowledged within
    `delivery_timeout_s` is given up, and the next `send` or `flush` raises DeliveryFailed with it,
    so neither a dead broker nor a missing topic passes unseen, or hangs.

    One producer may be shared by threads. A failure is then raised once, in whichever thread calls
    next. It does not survive a fork: create it in the child.

    Raises ValueError for a `partitioner`, UserError for properties that librdkafka refuses.
    """

    def __init__(
        self,
        bootstrap: str | Mapping[str, Any],
        namespace: str = "penchant",
        *,
        max_buffered: int = 100_000,
        delivery_timeout_s: float = 30.0,
    ) -> None:
        given = {"bootstrap.servers": bootstrap} if isinstance(bootstrap, str) else dict(bootstrap)
        if "partitioner" in given:
            raise ValueError("leave the partitioner out: another one splits a shopper in two")
        self._prefix = namespace + "."
        self._events_topic = self._prefix + "events"
        self._items_topic = self._prefix + "items"
        self._failures: deque[Undelivered] = deque()
        self._last_error = ""
        # A topic that is missing, not slow to appear, is told before its records time out.
        topic_wait_s = min(_MAX_TOPIC_WAIT_S, delivery_timeout_s / 2)
        config = (
            _DEFAULTS
            | {
                "queue.buffering.max.messages": max_buffered,
                "message.timeout.ms": int(delivery_timeout_s * 1000),
                "topic.metadata.propagation.max.ms": int(topic_wait_s * 1000),
                "error_cb": self._on_error,
            }
            | given
            | {
                # Java's default, so that a shop's Java and Python producers agree.
                "partitioner": "murmur2_random",
                "delivery.report.only.error": True,
            }
        )
        try:
            self._producer = Producer(config, logger=_log)
        except KafkaException as error:
            raise UserError(f"Kafka client: {error.args[0].str()}; mend that setting") from error

    def send(self, event: Event) -> None:
        """Buffer one event, with a new event_id where it has none.

        Raises DeliveryFailed for what earlier calls sent (`event` itself is then not buffered),
        or for `event` where the client refuses it.
        """
        if event.event_id is None:
            event = event.model_copy(update={"event_id": str(uuid4())})
        self._send(self._events_topic, event.user_id.encode(), event.to_json(), event)

    def send_item(self, item: Item) -> None:
        """Add an item to the catalogue, or replace it. Raises as `send` does."""
        self._send(self._items_topic, item.item_id.encode(), item.to_json(), item)

    def delete_item(self, item_id: str) -> None:
        """Take an item out of the catalogue. Raises as `send` does; ValueError for no valid id."""
        key = item_key(item_id)
        self._send(self._items_topic, key, None, RawRecord(self._items_topic, key, None))

    def send_bytes(
        self,
        topic: str,
        key: bytes | None,
        value: bytes | None,
        headers: Headers | None = None,
        timestamp_ms: int = 0,
        partition: int = -1,
    ) -> None:
        """Buffer a record as it is for `{namespace}.{topic}`; no timestamp: now. Raises as `send`.

        It goes to `partition`, or where its key belongs; a null key to a random one.
        """
        name = self._prefix + topic
        record = RawRecord(name, key, value, tuple(headers or ()))
        self._send(name, key, value, record, headers, timestamp_ms, partition)

    def flush(self, timeout_s: float = 30.0) -> None:
        """Wait until everything sent is in the topic.

        Raises DeliveryFailed for what was given up, FlushTimedOut while some is still tried.
        """
        deadline = time.monotonic() + timeout_s
        waiting = self._producer.flush(0)
        while waiting and (left_s := deadline - time.monotonic()) > 0:
            waiting = self._producer.flush(min(_SLICE_S, left_s))
        self._raise_failures()
        if waiting:
            raise FlushTimedOut(waiting, timeout_s, self._last_error)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if error is None:
            self.flush()
            return
        # The body's exception is the one to show, but what it had sent still counts.
        try:
            self.flush()
        except ProducerError as failed:
            error.add_note(f"Besides: {failed}")

    def _send(
        self,
        topic: str,
        key: bytes | None,
        value: bytes | None,
        sent: Sent,
        headers: Headers | None = None,
        timestamp_ms: int = 0,
        partition: int = -1,
    ) -> None:
        self._raise_failures()
        report = partial(self._on_failure, sent)
        while True:
            try:
                self._producer.produce(
                    topic,
                    value,
                    key,
                    partition,
                    on_delivery=report,
                    timestamp=timestamp_ms,
                    headers=list(headers) if headers else None,
                )
                break
            except BufferError:
                # Full: wait for acknowledgements. Timeouts free the buffer of a dead broker.
                self._producer.poll(_SLICE_S)
                self._raise_failures()
            except KafkaException as error:
                raise DeliveryFailed([self._undelivered(sent, error.args[0])]) from error
        self._producer.poll(0)

    def _on_failure(self, sent: Sent, error: KafkaError, _message: object) -> None:
        self._failures.append(self._undelivered(sent, error))

    def _undelivered(self, sent: Sent, error: KafkaError) -> Undelivered:
        code = error.code()
        reason = KafkaError(code).str().partition(": ")[2]  # without "Local: " or "Broker: "
        if code in _UNKNOWN_TOPIC:
            reason += "; create it with `penchant topics create`"
        elif self._last_error and code in _TIMED_OUT:
            reason += f" ({self._last_error})"
        return Undelivered(sent, reason, too_large=code == KafkaError.MSG_SIZE_TOO_LARGE)

    def _on_error(self, error: KafkaError) -> None:
        text = _ELAPSED.sub("", error.str())
        if error.code() != KafkaError._ALL_BROKERS_DOWN and text != self._last_error:
            self._last_error = text
            _log.warning("%s", text)

    def _raise_failures(self) -> None:
        if not self._failures:
            return
        taken = []
        while self._failures:
            try:
                taken.append(self._failures.popleft())
            except IndexError:  # another thread took the last one
                break
        if taken:
            raise DeliveryFailed(taken)


_UNKNOWN_TOPIC: Final = (KafkaError._UNKNOWN_TOPIC, KafkaError.UNKNOWN_TOPIC_OR_PART)
_ELAPSED: Final = re.compile(r" \(after \d+ms in state \w+[^)]*\)")
_TIMED_OUT: Final = (KafkaError._MSG_TIMED_OUT, KafkaError._TIMED_OUT)


def _named(sent: Sent) -> str:
    if isinstance(sent, RawRecord):
        return f"{sent.topic} key {sent.key!r:.80}"
    if isinstance(sent, Item):
        return f"item {sent.item_id!r}"
    return f"{sent.type} {sent.event_id} of user {sent.user_id!r}"


def murmur2(key: bytes) -> int:
    """Kafka's 32-bit hash of a key, signed as in Java."""
    length = len(key)
    h = _SEED ^ length
    whole = length & ~3
    for at in range(0, whole, 4):
        k = int.from_bytes(key[at : at + 4], "little") * _M & _MASK
        k = (k ^ (k >> 24)) * _M & _MASK
        h = (h * _M & _MASK) ^ k
    if whole < length:
        h = (h ^ int.from_bytes(key[whole:], "little")) * _M & _MASK
    h = (h ^ (h >> 13)) * _M & _MASK
    h ^= h >> 15
    return h - (1 << 32) if h >> 31 else h


def partition_for(key: bytes, n_partitions: int) -> int:
    """The partition that Java's default partitioner and EventProducer choose for a key."""
    return (murmur2(key) & 0x7FFFFFFF) % n_partitions


def partitions_for(keys: Sequence[bytes], n_partitions: int) -> NDArray[np.int64]:
    """`partition_for` of every key at once, (n,); for whole slices."""
    lengths = np.fromiter(map(len, keys), np.int64, len(keys))  # (n,)
    # One zero-padded row a key: a row has room for its longest key's last, partial word.
    width = 4 * (int(lengths.max(initial=0)) // 4 + 1)
    padded = b"".join([key.ljust(width, b"\0") for key in keys])
    words = np.frombuffer(padded, "<u4").reshape(len(keys), width // 4)  # (n, width / 4)
    whole = lengths >> 2  # (n,) full words of each key
    h = np.uint32(_SEED) ^ lengths.astype(np.uint32)  # (n,)
    m = np.uint32(_M)
    for at in range(width // 4 - 1):
        k = words[:, at] * m
        k = (k ^ (k >> np.uint32(24))) * m
        h = np.where(at < whole, (h * m) ^ k, h)
    rest = words[np.arange(len(keys)), whole]  # (n,) zero-padded
    h = np.where(lengths & 3, (h ^ rest) * m, h)
    h = (h ^ (h >> np.uint32(13))) * m
    h ^= h >> np.uint32(15)
    return (h & np.uint32(0x7FFFFFFF)).astype(np.int64) % n_partitions
