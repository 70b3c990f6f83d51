"""Kafka in: micro-batches of partition slices to the agent, offsets back after the save.

A Faust service around a librdkafka consumer on a thread of its own. It knows topics,
partitions, offsets and the group; it never looks inside a record.

The rules that keep events exactly once in their profile:
 - an offset is committed only after the slice that holds it was saved;
 - a partition that is taken away is finished (the slice in hand) or dropped (slices waiting),
   committed, and only then given back;
 - a failure stops the process with nothing further committed;
 - where Redis has lost what was committed or finished, its marks say where to begin again.
"""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import groupby
from typing import Any, Final, TypeVar

import confluent_kafka as kafka
from confluent_kafka.admin import AdminClient, OffsetSpec
from mode import Service

from profiles.errors import RedisUnavailable, WritesLost
from profiles.marks import Marks
from profiles.schema import source_key

from . import metrics
from .asked_offsets import AskedOffsets
from .errors import UserError
from .group_protocol import choose_protocol
from .offsets import OffsetTracker, TopicPartition
from .settings import Settings
from .topics import partition_counts, topic_ids

log = logging.getLogger(__name__)

T = TypeVar("T")

_COMMIT_EVERY_S: Final = 0.2
_LOOK_EVERY_S: Final = 1.0
# librdkafka throws its prefetched records away when a partition is paused, so a short wait for
# the updater is spent waiting, and only a long one paused and polling.
_WAIT_BEFORE_PAUSE_S: Final = 1.0
# A micro-batch is gathered in steps, so that its text budget is checked on the way.
_STEP_RECORDS: Final = 1024
_BYTES_PER_TOKEN: Final = 4
# Micro-batches that the updater works on at a time: one is prepared while one is applied.
_IN_WORK: Final = 2
_BUSY_STEP_S: Final = 0.005
_TEXTLESS_BYTES: Final = 256
# A broker that just started may not know a topic for a moment.
_ABSENCES: Final = 5
_ASK_AGAIN_S: Final = 0.2
_STUCK_S: Final = 120.0  # without a sign of life, before the liveness probe fails
_UNEMPLOYED_S: Final = 30.0  # without a partition, before it is told
_ANSWER_S: Final = 2.0  # then it is asked again, unless the worker is to stop

# Without records to fold, Redis is asked so often whether it still has what it had.
_MAKE_SURE_S: Final = 5.0

_SliceKey = tuple[str, int, int]  # topic, partition, epoch


@dataclass(frozen=True)
class Slice:
    """Consecutive records of one partition, in offset order."""

    topic: str
    partition: int
    epoch: int  # of the assignment; stale once the partition is given away
    source: int  # schema.source_key of the partition
    offsets: list[int] = field(default_factory=list)
    keys: list[bytes | None] = field(default_factory=list)
    values: list[bytes | None] = field(default_factory=list)
    timestamps_ms: list[int] = field(default_factory=list)
    headers: list[list[tuple[str, bytes | None]] | None] = field(default_factory=list)
    clocks: set[int] = field(default_factory=set)  # whose timestamps_ms are: TIMESTAMP_…

    @property
    def has_producer_times(self) -> bool:
        """Whether its timestamps are what producers said, not the broker's."""
        return kafka.TIMESTAMP_CREATE_TIME in self.clocks

    @property
    def next_offset(self) -> int:
        """The offset to commit once this slice is saved."""
        return self.offsets[-1] + 1

    def at(self, positions: Sequence[int]) -> Slice:
        """Only the records at these positions."""
        return replace(
            self,
            offsets=[self.offsets[i] for i in positions],
            keys=[self.keys[i] for i in positions],
            values=[self.values[i] for i in positions],
            timestamps_ms=[self.timestamps_ms[i] for i in positions],
            headers=[self.headers[i] for i in positions],
        )


@dataclass(frozen=True)
class MicroBatch:
    """What the agent takes at a time: at most one slice per partition."""

    slices: tuple[Slice, ...]
    sources: frozenset[int] = frozenset()
    """Of all partitions that its topics have today: what is missing is of a deleted topic."""

    @property
    def records(self) -> int:
        """Records in all slices."""
        return sum(len(s.offsets) for s in self.slices)

    def ends(self) -> dict[int, int]:
        """Source -> the offset behind its slice."""
        return {s.source: s.next_offset for s in self.slices}


class IntakeFailed(UserError):
    """The consumer cannot go on: the process stops, and what is not saved stays uncommitted."""


class Intake(Service):  # type: ignore[misc]
    """The consumer thread, seen from the event loop."""

    def __init__(
        self,
        settings: Settings,
        topics: Sequence[str],
        deliver: Callable[[MicroBatch], Any],
        on_failure: Callable[[BaseException], None],
        group: str = "updater",
        gauges: metrics.IntakeGauges = metrics.INTAKE_GAUGES,
        marks: Marks | None = None,
    ) -> None:
        """`deliver` is awaited in the event loop with each micro-batch; `on_failure` is called
        there once if the consumer dies. `group`: the consumer group, without its namespace.
        `marks`: of what is saved in Redis, to begin at where less is there than was committed; an
        empty micro-batch is delivered when Redis is found to have lost writes."""
        super().__init__()
        self._group = group
        self._gauges = gauges
        self._marks = marks
        self._next_sure_s = 0.0
        self._settings = settings
        self._topics = list(topics)
        self._deliver = deliver
        self._on_failure = on_failure
        self._tracker = OffsetTracker()
        self._changed = threading.Condition()  # guards what follows
        self._waiting_batches = 0
        self._epochs: dict[TopicPartition, int] = {}  # assigned partitions
        self._leaving: set[TopicPartition] = set()  # being revoked: nothing more is begun
        self._epoch = 0
        self._stopping = False
        self._aborted = False
        self._halted = False  # nothing is begun: Redis lacks what lies before
        self._rewinding = False  # and the consumer is to go back
        self._finished: dict[TopicPartition, int] = {}  # before it was
        self._admin = AdminClient(client_config(settings))
        self._begins = AskedOffsets(self._admin, OffsetSpec.earliest())
        self._ends = AskedOffsets(self._admin, OffsetSpec.latest())
        self._at_end_s: dict[int, float] = {}
        self._next_look_s = 0.0
        self._protocol = ""
        self._topic_ids: dict[str, str | None] = {}
        self._sources: dict[str, frozenset[int]] = {}  # of each topic's partitions
        self._next_offset: dict[TopicPartition, int] = {}  # of assigned partitions, once read from
        self._jumped_from: dict[TopicPartition, int] = {}  # offsets where some were missing
        self._held_s = time.monotonic()  # when a partition was last held; 0 once that was told
        self._thread: threading.Thread | None = None
        self.last_progress_s = time.monotonic()
        self.last_turn_s = self.last_progress_s
        """When the consumer thread last showed that it lives."""

    # --- the event loop's side

    async def on_start(self) -> None:
        """Start the consumer thread."""
        loop = asyncio.get_running_loop()
        self._thread = threading.Thread(target=self._run, args=(loop,), name="intake", daemon=True)
        self._thread.start()

    async def on_stop(self) -> None:
        """Stop fetching, let the updater finish what it has begun, commit, leave the group."""
        with self._changed:
            self._stopping = True
            self._changed.notify_all()
        if self._thread is not None:
            await asyncio.to_thread(self._thread.join, self._settings.stream.drain_s + 5)

    def abort(self) -> None:
        """Something failed: wait for nothing any more. What is saved may still be committed."""
        with self._changed:
            self._aborted = True
            self._changed.notify_all()

    def begin(self, batch: MicroBatch) -> MicroBatch:
        """The part of a batch that is still ours to do; the rest is dropped, uncommitted, for
        whoever reads it next. Any thread."""
        current = []
        with self._changed:
            for piece in batch.slices:
                partition = (piece.topic, piece.partition)
                held = self._epochs.get(partition) == piece.epoch
                going = not (self._stopping or self._halted)
                if held and partition not in self._leaving and going:
                    self._tracker.begun(partition, piece.next_offset)
                    current.append(piece)
        metrics.SLICES_STALE.inc(len(batch.slices) - len(current))
        return MicroBatch(tuple(current), batch.sources)

    def done(self, begun: MicroBatch) -> None:
        """All that `begin` returned is saved. Any thread."""
        with self._changed:
            self._waiting_batches -= 1
            for piece in begun.slices:
                partition = (piece.topic, piece.partition)
                if self._epochs.get(partition) == piece.epoch:
                    self._tracker.finished(partition, piece.next_offset)
            self.last_progress_s = time.monotonic()
            self._changed.notify_all()

    def rewind(self, *, lost: bool = True) -> None:
        """Redis lost writes, or else other profiles are live: drop what waits, and read all
        partitions again from their marks. What was begun must be over, and `done` without its
        slices. Any thread."""
        if lost:
            metrics.REDIS_WENT_BACK.inc()
        with self._changed:
            self._halted = self._rewinding = True
            self._finished = self._finished | self._tracker.positions() if lost else {}
            self._tracker.forget(set(self._epochs))
            self._changed.notify_all()

    def assigned(self) -> int:
        """Partitions held now."""
        with self._changed:
            return len(self._epochs)

    def at_end_s(self) -> dict[int, float]:
        """Source -> when (monotonic) all that its partition held was finished, if it ever was."""
        with self._changed:
            return dict(self._at_end_s)

    def draining(self) -> bool:
        """The consumer waits for what was begun: it stops, or gives partitions back."""
        with self._changed:
            return self._stopping or bool(self._leaving)

    def stuck(self, now_s: float) -> str:
        """In words what hangs, or "" if nothing does. now_s: monotonic."""
        silent_s, unfinished_s = now_s - self.last_turn_s, now_s - self.last_progress_s
        if silent_s > _STUCK_S:
            return f"the consumer did nothing for {silent_s:.0f} s"
        with self._changed:
            if self._waiting_batches and unfinished_s > _STUCK_S:
                return f"no micro-batch finished for {unfinished_s:.0f} s"
        return ""

    # --- the consumer thread

    def _run(self, loop: asyncio.AbstractEventLoop) -> None:
        try:
            self._consume(loop)
        except Exception as error:
            log.debug("intake failed", exc_info=True)
            loop.call_soon_threadsafe(self._on_failure, error)

    def _consume(self, loop: asyncio.AbstractEventLoop) -> None:
        self._protocol = choose_protocol(self._settings.kafka)
        consumer = self._subscribed()
        next_commit_s = 0.0
        try:
            while not (self._stopping or self._aborted):
                batch = self._gather(consumer)
                if batch is not None and self._is_of_known_topics(batch):
                    self._hand_out(batch, loop)
                    self._wait_for_room(consumer, loop)
                now_s = time.monotonic()
                self._mind_redis(consumer, now_s, loop)
                if now_s >= next_commit_s:
                    self._commit(consumer, synchronous=False)
                    next_commit_s = now_s + _COMMIT_EVERY_S
                self._look_around(consumer, now_s)
            self._finish_in_hand(None)
            self._commit(consumer, synchronous=True)
        finally:
            self.abort()  # closing gives all partitions back, and there is nothing left to wait for
            consumer.close()

    def _mind_redis(
        self, consumer: kafka.Consumer, now_s: float, loop: asyncio.AbstractEventLoop
    ) -> None:
        """Go back if that is wanted; ask now and then whether it should be."""
        if self._marks is None:
            return
        if self._rewinding:
            self._go_back(consumer)
        elif now_s < self._next_sure_s or not self._epochs:
            return
        self._next_sure_s = now_s + _MAKE_SURE_S
        if self._halted or not self._is_sure(self._marks):
            # Whoever folds finds it out as well, and has things to forget before the way back.
            self._hand_out(MicroBatch(()), loop)

    def _is_sure(self, marks: Marks) -> bool:
        with self._changed:
            if self._waiting_batches:
                return True  # as the next save will tell
        try:
            marks.advance({})
        except RedisUnavailable:
            log.debug("Redis could not be asked", exc_info=True)
        except WritesLost:
            return False
        return True

    def _subscribed(self) -> kafka.Consumer:
        config = consumer_config(self._settings, self._protocol, self._commit_answered, self._group)
        consumer = kafka.Consumer(config)
        consumer.subscribe(
            self._topics, on_assign=self._assigned, on_revoke=self._revoked, on_lost=self._lost
        )
        return consumer

    def _gather(self, consumer: kafka.Consumer) -> MicroBatch | None:
        """Records until the budget is full, or until the deadline has passed and the updater has
        room for them; None if there are none. While it is busy, a batch that waits may as well
        grow: large ones cost less per record, and an event waits no longer in them."""
        stream = self._settings.stream
        deadline_s = time.monotonic() + stream.batch_deadline_ms / 1000
        slices: dict[_SliceKey, Slice] = {}
        records, budget_bytes = 0, stream.batch_tokens * _BYTES_PER_TOKEN
        self.last_turn_s = time.monotonic()
        while True:
            left_s = deadline_s - time.monotonic()
            wanted = min(_STEP_RECORDS, stream.batch_records - records)
            messages = consumer.consume(wanted, max(left_s, _BUSY_STEP_S if slices else 0.0))
            budget_bytes -= self._add(slices, messages)
            records += len(messages)
            if records >= stream.batch_records or budget_bytes <= 0:
                break
            if left_s <= 0 and not (
                slices and left_s > -stream.batch_grow_ms / 1000 and self._updater_is_busy()
            ):
                break
        if not slices:
            return None
        return MicroBatch(tuple(slices.values()), frozenset().union(*self._sources.values()))

    def _updater_is_busy(self) -> bool:
        with self._changed:
            return self._waiting_batches >= _IN_WORK and not (self._stopping or self._aborted)

    def _add(self, slices: dict[_SliceKey, Slice], messages: Sequence[kafka.Message]) -> int:
        """Put messages into their slices; the bytes that they weigh beyond events without text."""
        text_bytes = 0
        for message in messages:
            if (error := message.error()) is not None:
                _check(error)
        good = [message for message in messages if message.error() is None]
        for partition, grouped in groupby(good, lambda m: (m.topic(), m.partition())):
            run = list(grouped)
            offsets = [message.offset() for message in run]
            self._notice_jumps(partition, offsets)
            values = [message.value() for message in run]
            piece = self._slice_of(slices, partition)
            piece.offsets.extend(offsets)
            piece.keys.extend(message.key() for message in run)
            piece.values.extend(values)
            clocks, timestamps_ms = zip(*(message.timestamp() for message in run), strict=True)
            piece.clocks.update(clocks)
            piece.timestamps_ms.extend(timestamps_ms)
            piece.headers.extend(message.headers() for message in run)
            text_bytes += sum(
                len(v) - _TEXTLESS_BYTES for v in values if v and len(v) > _TEXTLESS_BYTES
            )
        return text_bytes

    def _slice_of(self, slices: dict[_SliceKey, Slice], partition: TopicPartition) -> Slice:
        # By epoch as well: a partition that is taken away and given back while a batch is gathered
        # starts again at its committed offset, and its old records must not be mixed in.
        key = (*partition, self._epochs.get(partition, -1))
        piece = slices.get(key)
        if piece is None:
            piece = slices[key] = Slice(*key, self._source_of(partition))
        return piece

    def _notice_jumps(self, partition: TopicPartition, offsets: list[int]) -> None:
        """Remember where offsets are missing: deleted, compacted, or the end of a transaction."""
        expected = self._next_offset.get(partition, offsets[0])
        self._next_offset[partition] = offsets[-1] + 1
        if offsets[0] <= expected and offsets[-1] - offsets[0] == len(offsets) - 1:
            return
        for offset in offsets:
            if offset > expected:
                self._jumped_from.setdefault(partition, expected)
            expected = offset + 1

    def _is_of_known_topics(self, batch: MicroBatch) -> bool:
        """Whether the batch was read from the topics that were assigned. Raises IntakeFailed if one
        was deleted or made again meanwhile: librdkafka goes on in the new topic at the offset of
        the old one, and offsets of the two must not be taken for each other. An id never comes
        back, so asking after the fetch makes sure. It costs a round trip per micro-batch."""
        assigned = {p.topic: self._topic_ids.get(p.topic) for p in batch.slices}
        found = self._ask_topic_ids([topic for topic, known in assigned.items() if known])
        if found is None:
            return False  # stopping
        for topic, topic_id in found.items():
            if topic_id != assigned[topic]:
                what = "made again" if topic_id else "deleted"
                raise IntakeFailed(f"{topic} was {what} while it was read: start again")
        return True

    def _hand_out(self, batch: MicroBatch, loop: asyncio.AbstractEventLoop) -> None:
        with self._changed:
            if self._waiting_batches == 0:
                self.last_progress_s = time.monotonic()  # a pause in the stream is not a standstill
            self._waiting_batches += 1
            for piece in batch.slices:
                partition = (piece.topic, piece.partition)
                if self._epochs.get(partition) == piece.epoch:  # else lost while gathering
                    self._tracker.handed_out(partition, piece.next_offset)
        delivered = asyncio.run_coroutine_threadsafe(self._deliver(batch), loop)
        delivered.add_done_callback(lambda future: self._surface(future, loop))

    def _surface(self, delivered: Future[Any], loop: asyncio.AbstractEventLoop) -> None:
        if not delivered.cancelled() and (error := delivered.exception()) is not None:
            loop.call_soon_threadsafe(self._on_failure, error)

    def _wait_for_room(self, consumer: kafka.Consumer, loop: asyncio.AbstractEventLoop) -> None:
        """Hold back while the updater has enough to do; pause partitions if that takes long."""
        limit = self._settings.stream.buffered_batches
        with self._changed:
            room = self._changed.wait_for(
                lambda: self._waiting_batches < limit or self._stopping or self._aborted,
                _WAIT_BEFORE_PAUSE_S,
            )
        if room:
            return
        consumer.pause(consumer.assignment())
        while not (self._stopping or self._aborted):
            # Polling serves rebalances and keeps the membership. Paused partitions give nothing;
            # one that was assigned meanwhile may, once.
            batch = self._gather(consumer)
            if batch is not None and self._is_of_known_topics(batch):
                self._hand_out(batch, loop)
            consumer.pause(consumer.assignment())
            self._commit(consumer, synchronous=False)
            self._look_around(consumer, time.monotonic())
            with self._changed:
                if self._waiting_batches < limit:
                    break
        consumer.resume(consumer.assignment())

    def _finish_in_hand(self, partitions: set[TopicPartition] | None) -> None:
        """Wait for what the updater has begun of these partitions, or of all, to be saved."""
        with self._changed:
            self._changed.wait_for(
                lambda: self._aborted or self._tracker.in_hand(partitions) == 0,
                self._settings.stream.drain_s,
            )

    def _commit(self, consumer: kafka.Consumer, *, synchronous: bool) -> None:
        with self._changed:
            if synchronous:
                self._tracker.wait_no_longer(self._leaving or set(self._epochs))
            offsets = self._tracker.committable()
            self._tracker.committed(offsets)
        if not offsets:
            return
        # The topic's id goes with the offset, because the broker keeps it under the topic's name.
        positions = [
            kafka.TopicPartition(topic, partition, offset, self._topic_ids.get(topic) or "")
            for (topic, partition), offset in offsets.items()
        ]
        try:
            if synchronous:
                self._commit_answered(None, consumer.commit(offsets=positions, asynchronous=False))
            else:
                consumer.commit(offsets=positions, asynchronous=True)
        except kafka.KafkaException as error:
            self._commit_answered(error.args[0], positions)

    def _commit_answered(self, error: kafka.KafkaError | None, positions: list[Any]) -> None:
        """Offer again what the broker did not take; without that the last commit before a
        silence would stay lost. Not committed is safe: read again, records are found applied."""
        taken, refused = (
            {(p.topic, p.partition): p.offset for p in positions if bool(error or p.error) is no}
            for no in (False, True)
        )
        with self._changed:
            self._tracker.answered(taken, refused)
        if refused:
            reason = error or next(p.error for p in positions if p.error)
            log.info("offsets of %s not committed yet: %s", _names(positions), reason)

    # --- rebalances, called by librdkafka inside consume()

    def _assigned(self, consumer: kafka.Consumer, partitions: list[Any]) -> None:
        if partitions:
            partitions = self._starting_points(consumer, partitions)
        if self._protocol == "classic":
            consumer.assign(partitions)
        else:
            consumer.incremental_assign(partitions)
        # librdkafka remembers a pause beyond the loss of a partition: one that was taken away
        # while paused and comes back would never be read again.
        consumer.resume(partitions)
        with self._changed:
            self._epoch += 1
            for p in partitions:
                self._epochs[(p.topic, p.partition)] = self._epoch
                if p.offset >= 0:
                    self._tracker.starts((p.topic, p.partition), p.offset)
            self._gauges.partitions.set(len(self._epochs))
        log.info("assigned %s", _names(partitions))

    def _revoked(self, consumer: kafka.Consumer, partitions: list[Any]) -> None:
        """Finish what is in hand, commit, give back. Slices still waiting turn stale at once."""
        taken = {(p.topic, p.partition) for p in partitions}
        log.info("giving back %s", _names(partitions))
        with self._changed:
            self._leaving |= taken
        self._finish_in_hand(taken)
        self._commit(consumer, synchronous=True)
        self._drop(taken)

    def _lost(self, consumer: kafka.Consumer, partitions: list[Any]) -> None:
        log.warning("lost %s: the group went on without this worker", _names(partitions))
        self._drop({(p.topic, p.partition) for p in partitions})

    def _go_back(self, consumer: kafka.Consumer) -> None:
        """Continue at the marks, under a new epoch: what was fetched before is stale."""
        with self._changed:
            self._rewinding = False
            finished, self._finished = self._finished, {}
        held = sorted(self._epochs)
        claimed = self._claim(held)
        if claimed is None:
            return  # stopping, or lost once more
        starts = {place: claimed[0].get(self._source_of(place), 0) for place in held}
        for place, offset in starts.items():
            self._ask(partial(consumer.seek, kafka.TopicPartition(*place, offset)))
        with self._changed:
            self._epoch += 1
            self._tracker.forget(set(held))
            for place, offset in starts.items():
                self._epochs[place] = self._epoch
                self._next_offset.pop(place, None)
                self._tracker.resumes(place, offset)
            self._halted = self._rewinding  # unless it was lost meanwhile
        self._report_lost({p: (starts[p], at) for p, at in finished.items() if p in starts})
        self._report_expired(consumer, starts)

    def _begin_at_marks(self, committed: list[Any]) -> None:
        """Move positions back to where Redis has everything, if more was committed. An offset that
        does not bear the topic's id was set by a person, who is believed."""
        claimed = self._claim([(p.topic, p.partition) for p in committed])
        if claimed is None:
            return
        marks, older = claimed
        lost: dict[TopicPartition, tuple[int, int]] = {}
        for p in committed:
            place = (p.topic, p.partition)
            mark = marks.get(self._source_of(place), p.offset if older else 0)
            if mark < p.offset and (p.metadata or self._topic_ids[p.topic] is None):
                lost[place] = (mark, p.offset)
                p.offset = mark
        starts = {self._source_of((p.topic, p.partition)): max(0, p.offset) for p in committed}
        self._ask_redis(lambda marks: marks.advance(starts))
        if lost:
            metrics.REDIS_WENT_BACK.inc()
            self._report_lost(lost)

    def _claim(self, places: Sequence[TopicPartition]) -> tuple[dict[int, int], bool] | None:
        sources = [self._source_of(place) for place in places]
        return self._ask_redis(lambda marks: marks.claim(sources))

    def _ask_redis(self, question: Callable[[Marks], T]) -> T | None:
        """What the marks answer. None when stopping, and where Redis lost writes: then nothing is
        begun until whoever folds has called `rewind`."""
        assert self._marks is not None
        gives_up_s = time.monotonic() + self._settings.redis.patience_s
        while not (self._stopping or self._aborted):
            self.last_turn_s = time.monotonic()
            try:
                return question(self._marks)
            except WritesLost:
                with self._changed:
                    self._halted = True
                self._next_sure_s = 0.0
                return None
            except RedisUnavailable as error:
                if time.monotonic() > gives_up_s:
                    raise
                log.warning("waiting for Redis: %s", error)
                time.sleep(_ASK_AGAIN_S)
        return None

    def _report_lost(self, lost: Mapping[TopicPartition, tuple[int, int]]) -> None:
        """Say what is read again: from where to where."""
        for (topic, partition), (mark, offset) in lost.items():
            if mark < offset:
                metrics.READ_AGAIN.inc(offset - mark)
                log.error(
                    "Redis is behind what it had acknowledged: %s[%d] is read again from %d on, %d "
                    "records; profiles come out right. Unless profiles were flipped, look at its "
                    "failover and at its append-only file",
                    topic, partition, mark, offset - mark,
                )  # fmt: skip

    def _source_of(self, place: TopicPartition) -> int:
        topic, partition = place
        return source_key(self._topic_ids.get(topic) or topic, partition)

    def _drop(self, partitions: set[TopicPartition]) -> None:
        with self._changed:
            self._leaving -= partitions
            self._tracker.forget(partitions)
            for partition in partitions:
                self._epochs.pop(partition, None)
                self._next_offset.pop(partition, None)
                self._jumped_from.pop(partition, None)
            self._gauges.partitions.set(len(self._epochs))

    def _starting_points(self, consumer: kafka.Consumer, partitions: list[Any]) -> list[Any]:
        """The partitions with the offsets to start at. The topics' ids are learned anew: a topic
        may have been made again, and then the offset that is committed is of the old one."""
        topics = sorted({p.topic for p in partitions})
        ids = self._ask_topic_ids(topics)
        counts = self._ask(lambda: partition_counts(self._admin, topics, _ANSWER_S))
        committed = self._ask(lambda: consumer.committed(partitions, timeout=_ANSWER_S))
        if ids is None or counts is None or committed is None:
            return partitions  # stopping
        self._topic_ids |= ids
        # A name stands in where brokers have no ids at all. Where they have, its events would
        # count again once the id is known.
        unknown = [topic for topic, topic_id in ids.items() if topic_id is None]
        if unknown and any(self._topic_ids.values()):
            raise IntakeFailed(f"the brokers do not know {unknown[0]}, which they assigned")
        self._sources |= {
            topic: frozenset(source_key(ids[topic] or topic, p) for p in range(counts[topic]))
            for topic in topics
        }
        for p in committed:
            if p.metadata and p.metadata != self._topic_ids[p.topic]:
                log.warning("%s[%d] was made again: read from its start", p.topic, p.partition)
                p.offset = kafka.OFFSET_BEGINNING
        if self._marks is not None:
            self._begin_at_marks(committed)
        self._report_expired(
            consumer, {(p.topic, p.partition): p.offset for p in committed if p.offset >= 0}
        )
        return [kafka.TopicPartition(p.topic, p.partition, p.offset) for p in committed]

    def _ask_topic_ids(self, topics: list[str]) -> dict[str, str | None] | None:
        """Topic -> id: None where a topic is unknown, or the brokers have no ids and a topic's name
        must do. None for all when stopping."""
        ids: dict[str, str | None] | None = {}
        for _ in range(_ABSENCES if topics else 0):
            ids = self._ask(lambda: topic_ids(self._admin, topics, _ANSWER_S))
            if ids is None or None not in ids.values():
                break
            time.sleep(_ASK_AGAIN_S)
        return ids

    def _ask(self, question: Callable[[], T]) -> T | None:
        """What the brokers answer, however long that takes them. None when stopping."""
        while not (self._stopping or self._aborted):
            self.last_turn_s = time.monotonic()
            try:
                return question()
            except kafka.KafkaException as error:
                if error.args[0].code() in _ADVICE:
                    _check(error.args[0])
                log.warning("waiting for the brokers: %s", error.args[0].str())
                time.sleep(_ASK_AGAIN_S)
        return None

    def _report_expired(
        self, consumer: kafka.Consumer, next_offsets: dict[TopicPartition, int]
    ) -> None:
        """Say how many records the broker deleted before they were saved."""
        left = dict(next_offsets)
        try:
            for (topic, partition), offset in next_offsets.items():
                place = kafka.TopicPartition(topic, partition)
                low, _ = consumer.get_watermark_offsets(place, timeout=_ANSWER_S)
                del left[(topic, partition)]
                if offset < low:
                    metrics.RECORDS_EXPIRED.inc(low - offset)
                    log.error(
                        "%s[%d]: %d records were deleted by retention before they were saved; "
                        "raise the topic's retention.ms, and run `penchant rebuild --from archive`",
                        topic, partition, low - offset,
                    )  # fmt: skip
        except kafka.KafkaException as error:
            log.warning("could not compare offsets with the topics' start: %s", error)
            self._jumped_from = left | self._jumped_from  # asked again with the next look

    def _report_idleness(self, now_s: float) -> None:
        """Say once when this worker has had no partition for long."""
        if self._epochs:
            self._held_s = now_s
        elif self._held_s and now_s - self._held_s > _UNEMPLOYED_S:
            self._held_s = 0.0
            log.warning(
                "no partition was assigned for %.0f s: run no more workers than topics have "
                "partitions; if there are fewer, look at the group %s with kafka-consumer-groups, "
                "and restart its workers",
                _UNEMPLOYED_S, self._settings.topic(self._group),
            )  # fmt: skip

    def _look_around(self, consumer: kafka.Consumer, now_s: float) -> None:
        """What is told once in a while."""
        if now_s >= self._next_look_s:
            self._next_look_s = now_s + _LOOK_EVERY_S
            self._measure_lag(consumer)
            self._report_idleness(now_s)
            jumped_from, self._jumped_from = self._jumped_from, {}
            self._report_expired(consumer, jumped_from)

    def _measure_lag(self, consumer: kafka.Consumer) -> None:
        """From what is finished to the end, by the answer to the last time's question."""
        with self._changed:
            held, finished = list(self._epochs), self._tracker.positions()
        begins = self._begins.look([place for place in held if place not in finished])
        ends, lag = self._ends.look(held), 0
        for place in held:
            at = finished.get(place, begins.get(place))
            if at is not None:
                # Tansu takes its latest batch for one record. What was fetched knows better, but
                # stands still while nothing is.
                seen = consumer.get_watermark_offsets(kafka.TopicPartition(*place), cached=True)[1]
                behind = max(0, ends.get(place, 0) - at, seen - at)
                lag += behind
                if behind == 0 and place in ends:
                    with self._changed:
                        self._at_end_s[self._source_of(place)] = self._ends.known_s[place]
        self._gauges.lag.set(lag)


def _check(error: kafka.KafkaError) -> None:
    """Raise for what does not mend itself; librdkafka retries the rest."""
    code = error.code()
    if code == kafka.KafkaError._PARTITION_EOF:
        return
    if error.fatal() or code in _ADVICE:
        advice = _ADVICE.get(code, "start again; what is not saved is not committed")
        raise IntakeFailed(f"the consumer cannot go on ({error.str()}): {advice}")
    log.warning("consumer: %s", error.str())


# What does not mend itself, and what to do about it.
_ADVICE: Final = {
    kafka.KafkaError.TOPIC_AUTHORIZATION_FAILED: "give this user Read on the topics",
    kafka.KafkaError.GROUP_AUTHORIZATION_FAILED: "give this user Read on the group",
    kafka.KafkaError._AUTHENTICATION: "check KAFKA_SASL_USERNAME and KAFKA_SASL_PASSWORD",
    kafka.KafkaError.UNKNOWN_TOPIC_OR_PART: "run `penchant topics create`, and start again",
    kafka.KafkaError.UNSUPPORTED_VERSION: "set KAFKA_GROUP_PROTOCOL=classic",
}


def _names(partitions: list[Any]) -> str:
    return ", ".join(f"{p.topic}[{p.partition}]" for p in partitions) or "nothing"


def client_config(settings: Settings) -> dict[str, Any]:
    """librdkafka properties for this process' clients, with their log in ours."""
    return settings.kafka.client_config() | {
        "logger": logging.getLogger("penchant.librdkafka"),
        "log_level": 4,  # warnings
        "topic.metadata.refresh.interval.ms": 30_000,
    }


def consumer_config(
    settings: Settings,
    protocol: str,
    on_commit: Callable[[Any, list[Any]], None],
    group: str = "updater",
) -> dict[str, Any]:
    """librdkafka properties of a consumer of this group under a group protocol."""
    config = client_config(settings) | {
        "group.id": settings.topic(group),
        "group.protocol": protocol,
        "enable.auto.commit": False,
        "enable.auto.offset.store": False,
        "auto.offset.reset": "earliest",  # a group that is new, or late, must not skip records
        "isolation.level": "read_committed",
        "fetch.wait.max.ms": 50,
        "fetch.queue.backoff.ms": 10,
        "queued.max.messages.kbytes": 32 * 1024,
        "max.poll.interval.ms": 300_000,
        "on_commit": on_commit,
    }
    if settings.kafka.instance_id:
        config["group.instance.id"] = settings.kafka.instance_id
    # Every worker its part of each topic. Assignors that only count partitions (the brokers'
    # default, cooperative-sticky) give one worker all events and another all items.
    if protocol == "classic":
        session_ms = int(settings.kafka.session_timeout_s * 1000)
        config |= {
            "partition.assignment.strategy": "range",
            "session.timeout.ms": session_ms,
            "heartbeat.interval.ms": max(session_ms // 10, 300),
        }
    else:
        config["group.remote.assignor"] = "range"
    return config
