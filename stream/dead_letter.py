"""Where records go that cannot be events: kept whole, with the reason and where they came from.

It does not know what makes a record bad (events.py does), and never commits an offset: the
updater commits once `flush` has returned.
"""

from __future__ import annotations

import time
from collections import Counter, deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Final, Protocol

from confluent_kafka import (
    Consumer,
    KafkaError,
    KafkaException,
    Message,
    TopicPartition,
)

from .errors import UserError
from .events import Rejected
from .producer import DeliveryFailed, EventProducer, Headers, RawRecord, Undelivered
from .settings import Settings

TOPIC: Final = "dead-letter"
HEADER_PREFIX: Final = "penchant."
"""Of the headers that a dead letter adds; the originals keep their names and come before."""

# Whether a record is too large is the broker's to say, not the client's (whose default is 1 MB);
# but one that exceeds the producer's whole buffer (256 MiB) would wait for room for ever.
_MESSAGE_MAX_BYTES: Final = 200_000_000
# What is left of a record that the dead-letter topic refuses for its size (our headers make it
# larger than the original, which may have had the very size the brokers allow).
_CUT_VALUE_BYTES: Final = 64 * 1024
_CUT_KEY_BYTES: Final = 1024
_OWN_HEADERS: Final = ("reason", "detail", "topic", "partition", "offset", "timestamp")


class Rejects(Protocol):
    """Where records go that are no events."""

    def put(
        self,
        *,
        key: bytes | None,
        value: bytes | None,
        headers: Headers | None,
        topic: str,
        partition: int,
        offset: int,
        timestamp_ms: int,
        reason: str,
        detail: str,
    ) -> None: ...
    def flush(self, timeout_s: float = 30.0) -> None: ...


class DeadLetters:
    """Sends rejected records to `{namespace}.dead-letter`. Not for several threads at once."""

    def __init__(self, settings: Settings) -> None:
        self._producer = EventProducer(
            settings.kafka.client_config() | {"message.max.bytes": _MESSAGE_MAX_BYTES},
            settings.namespace,
        )
        self._topic = settings.topic(TOPIC)
        self._unflushed = 0
        self._too_large: list[Undelivered] = []
        self._lost: DeliveryFailed | None = None

    def put(
        self,
        *,
        key: bytes | None,
        value: bytes | None,
        headers: Headers | None,
        topic: str,
        partition: int,
        offset: int,
        timestamp_ms: int,
        reason: str,
        detail: str,
    ) -> None:
        """Buffer one reject, as it was read, with its origin. Raises DeliveryFailed for earlier
        ones that were given up; `flush` is what tells that all have arrived.
        """
        texts = (reason, detail, topic, str(partition), str(offset), str(timestamp_ms))
        origin = [
            (HEADER_PREFIX + name, text.encode(errors="backslashreplace"))
            for name, text in zip(_OWN_HEADERS, texts, strict=True)
        ]
        self._send(RawRecord(self._topic, key, value, (*(headers or ()), *origin)))

    def flush(self, timeout_s: float = 30.0) -> None:
        """Return once every reject is in the topic. Raises DeliveryFailed or FlushTimedOut, and
        never passes again once a reject was given up.

        A record that the topic refuses for its size is cut to its first 64 KiB, without its own
        headers; `penchant.truncated` then holds the original's size in bytes, and
        `penchant.topic`, `.partition` and `.offset` say where all of it is.
        """
        if self._lost is not None:
            raise self._lost
        if not self._unflushed:
            return
        self._flush_once(timeout_s)
        if self._too_large:
            large, self._too_large = self._too_large, []
            for failure in large:
                assert isinstance(failure.sent, RawRecord)  # nothing else is sent here
                self._send(_cut(failure.sent))
            self._flush_once(timeout_s)
            if self._too_large:
                self._lost = DeliveryFailed(self._too_large)
                raise self._lost
        self._unflushed = 0

    def _send(self, record: RawRecord) -> None:
        self._unflushed += 1
        while True:
            try:
                self._producer.send_bytes(TOPIC, record.key, record.value, record.headers)
                return
            except DeliveryFailed as failed:
                self._keep_too_large(failed)
                if any(failure.sent == record for failure in failed.failures):
                    return  # it was this one that the client refused: flush cuts it

    def _flush_once(self, timeout_s: float) -> None:
        try:
            self._producer.flush(timeout_s)
        except DeliveryFailed as failed:
            self._keep_too_large(failed)

    def _keep_too_large(self, failed: DeliveryFailed) -> None:
        if not all(failure.too_large for failure in failed.failures):
            self._lost = failed
            raise failed
        self._too_large.extend(failed.failures)


def _cut(record: RawRecord) -> RawRecord:
    ours = record.headers[-len(_OWN_HEADERS) :]
    size = len(record.key or b"") + len(record.value or b"")
    size += sum(len(name) + len(text or b"") for name, text in record.headers)
    return RawRecord(
        record.topic,
        record.key and record.key[:_CUT_KEY_BYTES],
        record.value and record.value[:_CUT_VALUE_BYTES],
        (*ours, (HEADER_PREFIX + "truncated", str(size).encode())),
    )


@dataclass(frozen=True, slots=True)
class DeadLetter:
    """A reject as `read` finds it."""

    reason: str
    detail: str
    topic: str
    """Where it came from, with partition, offset and the record's own timestamp."""
    partition: int
    offset: int
    timestamp_ms: int
    rejected_ms: int
    """When it was put into the dead-letter topic."""
    key: bytes | None
    value: bytes | None
    headers: tuple[tuple[str, bytes | None], ...]
    """The original's."""
    original_bytes: int | None
    """Size of the original where it had to be cut, else None."""


def read(settings: Settings, limit: int, timeout_s: float = 10.0) -> list[DeadLetter]:
    """The newest `limit` rejects, newest first. Raises UserError where there is no topic to read.

    Keeps no more than `limit` records of each partition, and joins no group.
    """
    topic = settings.topic(TOPIC)
    last_error = ""

    def remember(error: KafkaError) -> None:
        nonlocal last_error
        last_error = error.str()

    config = settings.kafka.client_config() | {
        "group.id": settings.topic("dead-letter-reader"),  # required, never joined
        "enable.auto.commit": False,
        "enable.partition.eof": True,
        "fetch.wait.max.ms": 50,  # the end of a partition is told after this wait
        "auto.offset.reset": "earliest",
        "error_cb": remember,
        "log_level": 2,  # what goes wrong is raised, once
    }
    consumer = None
    try:
        consumer = Consumer(config)
        messages = _newest(consumer, topic, limit, timeout_s)
    except KafkaException as error:
        if consumer is not None:
            consumer.poll(0)  # hands over what went wrong below
        raise UserError(
            f"cannot read {topic} from {settings.kafka.bootstrap}: "
            f"{last_error or error.args[0].str()}; check KAFKA_BOOTSTRAP, the password, and that "
            "the broker is up"
        ) from error
    finally:
        if consumer is not None:
            consumer.close()
    messages.sort(key=lambda m: (m.timestamp()[1], m.offset()), reverse=True)
    return [_dead_letter(message) for message in messages[:limit]]


def distinct(letters: Iterable[DeadLetter]) -> list[tuple[DeadLetter, int]]:
    """Each rejected record once, in the order given, and how many copies there are: a worker that
    ends before it commits rejects the same ones again. PURE."""
    first: dict[object, DeadLetter] = {}
    copies: Counter[object] = Counter()
    for letter in letters:
        # Without an origin, of what something else put there, none is another's copy.
        origin = (
            (letter.topic, letter.partition, letter.offset) if letter.offset >= 0 else id(letter)
        )
        first.setdefault(origin, letter)
        copies[origin] += 1
    return [(letter, copies[origin]) for origin, letter in first.items()]


def _newest(consumer: Consumer, topic: str, limit: int, timeout_s: float) -> list[Message]:
    """The newest `limit` messages of each partition, as far as they are there now."""
    found = consumer.list_topics(topic, timeout=timeout_s).topics[topic]
    if found.error is not None or not found.partitions:
        raise UserError(f"there is no topic {topic}; create it with `penchant topics create`")
    starts = []
    for partition in found.partitions:
        low, high = consumer.get_watermark_offsets(
            TopicPartition(topic, partition), timeout=timeout_s
        )
        # A place to start, and no end: Tansu counts the latest batch as one record here.
        starts.append(TopicPartition(topic, partition, max(low, high - limit)))
    consumer.assign(starts)
    deadline = time.monotonic() + timeout_s
    newest: dict[int, deque[Message]] = {p: deque(maxlen=limit) for p in found.partitions}
    unread = set(newest)
    while unread:
        message = consumer.poll(max(0.0, deadline - time.monotonic()))
        if message is None:
            raise UserError(
                f"{topic} could not be read within {timeout_s:g} s; try again, or ask for fewer"
            )
        partition, error = message.partition(), message.error()
        if error is None:
            newest[partition].append(message)
        elif error.code() == KafkaError._PARTITION_EOF:
            unread.discard(partition)
        else:
            raise KafkaException(error)
    return [message for messages in newest.values() for message in messages]


def _dead_letter(message: Message) -> DeadLetter:
    headers: list[tuple[str, bytes | None]] = list(message.headers() or ())
    # Ours are the last ones: a dead letter may itself have been sent again, and failed again.
    ours = {
        name.removeprefix(HEADER_PREFIX): (text or b"").decode(errors="replace")
        for name, text in headers
        if name.startswith(HEADER_PREFIX)
    }
    size = ours.get("truncated")
    own = headers[-len(_OWN_HEADERS) :]
    is_ours = [name for name, _ in own] == [HEADER_PREFIX + name for name in _OWN_HEADERS]
    return DeadLetter(
        reason=ours.get("reason", ""),
        detail=ours.get("detail", ""),
        topic=ours.get("topic", ""),
        partition=_number(ours.get("partition")),
        offset=_number(ours.get("offset")),
        timestamp_ms=_number(ours.get("timestamp")),
        rejected_ms=message.timestamp()[1],
        key=message.key(),
        value=message.value(),
        headers=tuple(headers[: -len(own)] if is_ours else headers) if size is None else (),
        original_bytes=None if size is None else _number(size),
    )


def _number(text: str | None) -> int:
    """-1 for a record that something else than DeadLetters put into the topic."""
    try:
        return int(text or "")
    except ValueError:
        return -1


class TooManyRejects(UserError):
    """So many records are bad that the producer, not a record, is broken: stop and look."""

    def __init__(self, rejected: int, size: int, max_share: float, worst: Rejected) -> None:
        self.share = rejected / size
        self.reason = worst.reason
        self.detail = worst.detail
        super().__init__(
            f"{rejected:,} of the last {size:,} records were rejected ({self.share:.0%}; "
            f"STREAM_MAX_REJECT_SHARE allows {max_share:.0%}), most often {worst.reason}: "
            f"{worst.detail}. Look at `penchant dlq show` and mend the producer; the bad records "
            "stay in the topic, so start once with STREAM_MAX_REJECT_SHARE=1 to get past them"
        )


class RejectWindow:
    """PURE. The share of rejects over the last `size` records, exactly."""

    def __init__(self, size: int, max_share: float) -> None:
        self._size = size
        self._max_share = max_share
        self._seen = 0
        self._rejects: deque[tuple[int, Rejected]] = deque()  # (number of the record, reject)

    @property
    def share(self) -> float:
        """Rejects per record, of the records seen so far or the last `size`; 0 before any."""
        return len(self._rejects) / max(1, min(self._seen, self._size))

    def add(self, records: int, rejects: Sequence[Rejected]) -> None:
        """Count a slice of `records`, of which `rejects` failed (as `parse` lists them).

        Raises TooManyRejects when, after it, at least `size` records were seen and more than
        `max_share` of the last `size` were rejected.
        """
        self._rejects.extend((self._seen + reject.index, reject) for reject in rejects)
        self._seen += records
        while self._rejects and self._rejects[0][0] < self._seen - self._size:
            self._rejects.popleft()
        if self._seen >= self._size and self.share > self._max_share:
            raise TooManyRejects(len(self._rejects), self._size, self._max_share, self._worst())

    def _worst(self) -> Rejected:
        """The latest reject of the commonest reason."""
        counts = Counter(reject.reason for _, reject in self._rejects)
        reason = counts.most_common(1)[0][0]
        return next(reject for _, reject in reversed(self._rejects) if reject.reason == reason)
