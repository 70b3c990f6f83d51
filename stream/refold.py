"""Where events come from that are folded once more: the events topic, and the trainer's archive.

Both give micro-batches for an updater, in an order in which a watermark may rise: by offset within
each source partition. It knows nothing of profiles, and commits nothing.
"""

from __future__ import annotations

import hashlib
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Final

import confluent_kafka as kafka
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from profiles.arithmetic import FORGET
from profiles.ids import Ids
from profiles.schema import TYPE_CODE, source_key

from .archive import SCHEMA, Archive, Command, events, hashed
from .contributions import columns
from .errors import UserError
from .intake import MicroBatch, Slice, client_config
from .settings import Settings
from .topics import connect, topic_ids
from .updater import TakenApart
from .user_rows import UserRows

_ANSWER_S: Final = 10.0
_SILENCE_S: Final = 60.0
# Of one part, before compression: it is sorted in memory, and a row's text may be long.
_PART_ROWS: Final = 500_000
_MOST_PARTS: Final = 256
_CHUNK: Final = 4096


# Of a consumer without a group; librdkafka tries the rest again.
_FINAL: Final = (
    kafka.KafkaError._AUTO_OFFSET_RESET,
    kafka.KafkaError.OFFSET_OUT_OF_RANGE,
    kafka.KafkaError._AUTHENTICATION,
    kafka.KafkaError.TOPIC_AUTHORIZATION_FAILED,
    kafka.KafkaError.UNKNOWN_TOPIC_OR_PART,
)

# --- the topic


@dataclass(frozen=True)
class Topic:
    """One incarnation of the events topic."""

    name: str
    id: str | None  # None: the brokers have no ids, and the name must do
    partitions: int

    def source(self, partition: int) -> int:
        """See `schema.source_key`."""
        return source_key(self.id or self.name, partition)

    @property
    def sources(self) -> dict[int, int]:
        """Source -> partition."""
        return {self.source(p): p for p in range(self.partitions)}


def find_topic(settings: Settings, name: str = "events") -> Topic:
    """The topic as it is now. Raises UserError."""
    topic = settings.topic(name)
    admin, metadata = connect(settings.kafka)
    if topic not in metadata.topics:
        raise UserError(f"no topic {topic}: run `penchant topics create`")
    return Topic(topic, topic_ids(admin, [topic])[topic], len(metadata.topics[topic].partitions))


class TopicReader:
    """Reads from some offsets to the ends, as often as wanted."""

    def __init__(self, settings: Settings, topic: Topic) -> None:
        self._topic = topic
        self._batch_records = settings.stream.batch_records
        self._admin, _ = connect(settings.kafka)
        self._consumer = kafka.Consumer(
            client_config(settings)
            | {
                "group.id": settings.topic("rebuild"),  # required, never joined
                "enable.auto.commit": False,
                "enable.partition.eof": True,
                "auto.offset.reset": "error",  # what is not there must not be passed over
                "isolation.level": "read_committed",
                "fetch.wait.max.ms": 50,
            }
        )

    def close(self) -> None:
        """Leave the brokers."""
        self._consumer.close()

    @property
    def topic(self) -> Topic:
        """What is read."""
        return self._topic

    def require(self, starts: Mapping[int, int]) -> int:
        """Make sure that the topic holds all from these offsets on (partition -> offset); how many
        records that are, about. Raises UserError."""
        total = 0
        for p, (low, end) in self._bounds().items():
            if low > (at := starts.get(p, 0)):
                raise UserError(
                    f"{self._topic.name}[{p}] begins at offset {low:,}, and what lies between "
                    f"{at:,} and there is deleted: a trainer's archive may have it, `penchant "
                    "rebuild --from archive`"
                )
            total += max(0, end - at)
        return total

    def ends(self) -> dict[int, int]:
        """Partition -> where it ends now, of those that hold records. Raises UserError."""
        return {p: end for p, (low, end) in self._bounds().items() if end > low}

    def _bounds(self) -> dict[int, tuple[int, int]]:
        found = {}
        for p in range(self._topic.partitions):
            place = kafka.TopicPartition(self._topic.name, p)
            try:
                found[p] = self._consumer.get_watermark_offsets(place, timeout=_ANSWER_S)
            except kafka.KafkaException as error:
                raise self._unreadable(error.args[0]) from error
        return found

    def batches(self, starts: Mapping[int, int]) -> Iterator[MicroBatch]:
        """From these offsets (partition -> offset) until each partition was read to its end once.
        Raises UserError."""
        name, sources = self._topic.name, frozenset(self._topic.sources)
        self._consumer.assign([kafka.TopicPartition(name, p, at) for p, at in starts.items()])
        left, heard_s = set(starts), time.monotonic()
        while left:
            messages = self._consumer.consume(self._batch_records, 0.5)
            slices: dict[int, Slice] = {}
            for message in messages:
                if (error := message.error()) is None:
                    _add(slices, self._topic, message)
                elif error.code() == kafka.KafkaError._PARTITION_EOF:
                    left.discard(message.partition())
                elif error.fatal() or error.code() in _FINAL:
                    raise self._unreadable(error)
            if messages:
                heard_s = time.monotonic()
            elif time.monotonic() - heard_s > _SILENCE_S:
                raise UserError(f"the brokers gave nothing of {name} for {_SILENCE_S:.0f} s")
            if slices:
                self._make_sure()
                yield MicroBatch(tuple(slices.values()), sources)

    def _make_sure(self) -> None:
        """As the intake: an answer younger than the records says which topic they are of."""
        if topic_ids(self._admin, [self._topic.name])[self._topic.name] != self._topic.id:
            raise UserError(f"{self._topic.name} was made again while it was read: start again")

    def _unreadable(self, error: kafka.KafkaError) -> UserError:
        return UserError(f"{self._topic.name} cannot be read on: {error.str()}")


def _add(slices: dict[int, Slice], topic: Topic, message: kafka.Message) -> None:
    partition = message.partition()
    piece = slices.get(partition)
    if piece is None:
        piece = slices[partition] = Slice(topic.name, partition, 0, topic.source(partition))
    clock, timestamp_ms = message.timestamp()
    piece.offsets.append(message.offset())
    piece.keys.append(message.key())
    piece.values.append(message.value())
    piece.timestamps_ms.append(timestamp_ms)
    piece.headers.append(None)  # the events topic has no origins
    piece.clocks.add(clock)


# --- the archive


def archived_to(settings: Settings, topic: Topic) -> dict[int, int]:
    """Partition -> offset up to which the trainer has put the topic into the archive, and carried
    out what was to be forgotten: what it committed. Raises UserError."""
    consumer = kafka.Consumer(client_config(settings) | {"group.id": settings.topic("trainer")})
    try:
        places = [kafka.TopicPartition(topic.name, p) for p in range(topic.partitions)]
        committed = consumer.committed(places, timeout=_ANSWER_S)
    except kafka.KafkaException as error:
        raise UserError(f"what the trainer committed is not known: {error.args[0].str()}") from None
    finally:
        consumer.close()
    ours = [p for p in committed if p.offset > 0 and (p.metadata or None) == topic.id]
    return {p.partition: p.offset for p in ours}


@dataclass
class Lacking:
    """What segments of before this version could not tell."""

    rows: int = 0
    purchases: int = 0  # with a price, and in an unknown currency


@dataclass
class Parts:
    """The rows of an archive in files of some shoppers each, every row once.

    An archive is in order of event time, and a shopper's events must come by offset; so all that
    is known of some shoppers is brought together, and sorted in memory.
    """

    folder: Path
    count: int
    lacking: Lacking = field(default_factory=Lacking)
    _forgotten: Mapping[str, Sequence[Command]] = field(default_factory=dict)
    _ends: Mapping[int, int] = field(default_factory=dict)

    def read(
        self, part: int, weights: Mapping[str, float], currency: str, today: frozenset[int]
    ) -> Iterator[TakenApart]:
        """The events of one part, some at a time."""
        path = self.folder / f"{part}.arrow"
        if not path.exists():
            return
        with pa.memory_map(str(path)) as file:
            table = pa.ipc.open_stream(file).read_all()
        table = pa.concat_tables([self._commands(table), table])
        # What was erased is not there; so a command comes before all that is left of its shopper,
        # and what came in topics of before comes before today's.
        keys = [
            table["offset"].to_numpy(),
            table["source"].to_numpy(),
            np.isin(table["source"].to_numpy(), list(today)),
            table["type"].to_numpy() != FORGET,
        ]
        table = table.take(np.lexsort(keys))
        for first in range(0, len(table), _CHUNK):
            yield _taken_apart(table.slice(first, _CHUNK), weights, currency, today)

    def _commands(self, table: pa.Table) -> pa.Table:
        users = table["user"].unique().to_pylist() if self._forgotten else ()
        rows = [
            _command_row(user, command)
            for user in users
            for command in self._forgotten.get(hashed(user), ())
            if command.offset < self._ends.get(command.source, command.offset + 1)
        ]
        return pa.Table.from_pylist(rows, schema=table.schema)

    def remove(self) -> None:
        """Give the disk back."""
        shutil.rmtree(self.folder, ignore_errors=True)


def _command_row(user: str, command: Command) -> dict[str, Any]:
    none = {"t_ms": 0, "item": "", "rating": 0.0, "price": 0.0, "quantity": 0, "text": ""}
    return none | {
        "source": command.source,
        "offset": command.offset,
        "user": user,
        "type": FORGET,
        "event": command.event,
    }


def spill(
    archive: Archive,
    folder: Path,
    ends: Mapping[int, int],
    user: str,
    report: Callable[[int, int | None], None],
    latest_ms: int,
    count: int = 0,
) -> Parts:
    """Bring the archive's rows together by shopper. ends: source -> the offset behind the last row
    to take; of sources that are not named, all. user: only theirs; "" is everybody. latest_ms: of
    what is later the clock was wrong, and workers rejected it. count: of parts, where it was
    settled before."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    total = archive.stats().rows
    count = count or min(_MOST_PARTS, 1 + total // _PART_ROWS)
    parts = Parts(folder, count, Lacking(), archive.forgotten(), ends)
    writers: dict[int, Any] = {}
    rows = 0
    try:
        for table in archive.read(end_ms=latest_ms + 1):
            rows += len(table)
            report(rows, total)
            table = _within(table, ends, user)
            _note_lacking(parts.lacking, table)
            place = _places(table["user"], count)
            for part in np.unique(place).tolist():
                if part not in writers:
                    path = str(folder / f"{part}.arrow")
                    writers[part] = pa.ipc.new_stream(path, SCHEMA.remove_metadata())
                chosen = table.take(np.flatnonzero(place == part))
                writers[part].write_table(chosen.replace_schema_metadata())
    finally:
        for writer in writers.values():
            writer.close()
    return parts


def _within(table: pa.Table, ends: Mapping[int, int], user: str) -> pa.Table:
    source, offset = table["source"].to_numpy(), table["offset"].to_numpy()
    kept = np.ones(len(table), np.bool_)
    for key, end in ends.items():
        kept &= (source != np.uint64(key)) | (offset < end)
    table = table.filter(pa.array(kept))
    return table.filter(pc.equal(table["user"], user)) if user else table


def _note_lacking(lacking: Lacking, table: pa.Table) -> None:
    old = table.filter(pc.is_null(table["currency"]))
    bought = pc.equal(old["type"], TYPE_CODE["purchase"])
    priced = pc.invert(pc.is_nan(old["price"]))
    lacking.rows += len(old)
    lacking.purchases += pc.sum(pc.and_(bought, priced)).as_py() or 0


def _places(users: pa.ChunkedArray, count: int) -> NDArray[np.int64]:
    """(m,) the part of each row's user."""
    codes = users.combine_chunks().dictionary_encode()
    of = [
        int.from_bytes(hashlib.sha256(user.encode()).digest()[:8], "little") % count
        for user in codes.dictionary.to_pylist()
    ]
    places: NDArray[np.int64] = np.asarray(of, np.int64)[codes.indices.to_numpy()]
    return places


def _taken_apart(
    table: pa.Table, weights: Mapping[str, float], currency: str, today: frozenset[int]
) -> TakenApart:
    taken = columns(events(table), weights, currency)
    taken.event = table["event"].to_pylist()  # rows have no ids, but their keys
    users = UserRows(len(taken.users))
    arrays = taken.arrays(users)
    sources = np.asarray(table["source"].to_numpy(), np.uint64)
    offsets = np.asarray(table["offset"].to_numpy(), np.int64)
    return TakenApart(users.ids(), arrays, sources, offsets, [], 0, {}, -1, today)


# --- either


def only(taken: TakenApart, user: str) -> TakenApart:
    """What it holds of one user."""
    row = np.flatnonzero([who == user for who in taken.users])
    at = np.flatnonzero(np.isin(taken.columns.row, row))
    kept = taken.columns.at(at)
    return replace(
        taken,
        users=Ids.of([user] if len(at) else []),
        columns=replace(kept, row=np.zeros_like(kept.row)),
        sources=taken.sources[at],
        offsets=taken.offsets[at],
        items=[],
        forwarded={},
    )


class NoRejects:
    """Takes what is no event and keeps nothing: it was rejected when it was read first."""

    def put(self, **_: Any) -> None:
        pass

    def flush(self, timeout_s: float = 0.0) -> None:
        pass
