"""Kafka in memory: partitions, a group coordinator, and what confluent-kafka's clients do of it.

`Cluster` is the brokers' side: logs, groups, generations, offsets. `Consumer`, `Producer` and
`Admin` have the methods that `stream/` calls, with librdkafka's manners: rebalance callbacks run
inside `consume`, a member whose session is over finds out the next time it polls, records of a
partition that is taken away in the middle of `consume` are dropped, a commit is answered later.
What they do is held against Apache Kafka in `test_contracts.py`.

Rebalances are eager and wait for every member where the group's protocol is `classic`; with
`consumer` (KIP-848) each member is told by itself, and partitions change hands one by one.
"""

from __future__ import annotations

import uuid
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import confluent_kafka as kafka
from confluent_kafka.admin import OffsetSpec

from stream.producer import partition_for

from .scheduling import Killed, Scheduler, Task

Place = tuple[str, int]
Headers = list[tuple[str, bytes | None]] | None

_LATENCY_S = (0.0002, 0.003)
# A member that polls does it at least so often, also where it asks for a longer wait.
_POLL_S = 0.5


@dataclass(frozen=True)
class Record:
    """As a partition keeps it; a message has these as methods."""

    place: Place
    at: int
    held_key: bytes | None
    held_value: bytes | None
    t_ms: int
    clock: int
    held_headers: Headers

    def error(self) -> None:
        return None

    def topic(self) -> str:
        return self.place[0]

    def partition(self) -> int:
        return self.place[1]

    def offset(self) -> int:
        return self.at

    def key(self) -> bytes | None:
        return self.held_key

    def value(self) -> bytes | None:
        return self.held_value

    def timestamp(self) -> tuple[int, int]:
        return self.clock, self.t_ms

    def headers(self) -> Headers:
        return self.held_headers


@dataclass
class Member:
    """A consumer in its group."""

    consumer: Consumer
    topics: list[str]
    generation: int = -1
    target: set[Place] = field(default_factory=set)
    owned: set[Place] = field(default_factory=set)  # as far as the coordinator knows
    joined: bool = True  # waits for the generation to come (classic)
    given: bool = True  # was told its part of the generation (classic)
    asked: bool = False  # to give back what it has (classic)
    gone: bool = False


class Group:
    """What the coordinator keeps."""

    def __init__(self, cluster: Cluster, protocol: str) -> None:
        self._cluster = cluster
        self.classic = protocol == "classic"
        self.members: list[Member] = []
        self.generation = 0
        self.preparing = False  # waits until all have given back and joined again (classic)
        self.committed: dict[Place, tuple[int, str]] = {}

    def join(self, member: Member) -> None:
        self.members.append(member)
        self._rebalance()

    def leave(self, member: Member) -> None:
        """Also called for whoever is not heard any more."""
        if member in self.members:
            member.gone = True
            self.members.remove(member)
            self._rebalance()

    def rejoin(self, member: Member) -> None:
        """It has given back what it had (classic)."""
        member.joined, member.owned = True, set()
        self._complete()

    def _rebalance(self) -> None:
        if not self.classic:
            self.generation += 1
            self._assign()
        else:
            if not self.preparing:
                self.preparing = True
                for member in self.members:
                    member.joined = member.generation < 0
                    member.asked = not member.joined
            self._complete()
        for member in self.members:
            member.consumer.nudge()

    def _complete(self) -> None:
        if self.preparing and all(member.joined for member in self.members):
            self.preparing = False
            self.generation += 1
            self._assign()
            for member in self.members:
                member.joined = member.given = member.asked = False
                member.generation = self.generation
                member.consumer.nudge()

    def _assign(self) -> None:
        """Each topic in ranges, as the assignor `range` does."""
        for member in self.members:
            member.target = set()
        topics = sorted({topic for member in self.members for topic in member.topics})
        for topic in topics:
            takers = [member for member in self.members if topic in member.topics]
            count = len(self._cluster.logs[topic])
            for i, member in enumerate(takers):
                begin, end = i * count // len(takers), (i + 1) * count // len(takers)
                member.target |= {(topic, p) for p in range(begin, end)}

    def free(self, member: Member) -> set[Place]:
        """What it is to have, and nobody else has any more (KIP-848)."""
        held = {p for other in self.members if other is not member for p in other.owned}
        return member.target - member.owned - held

    def may_commit(self, member: Member) -> bool:
        """Whether the coordinator takes its offsets."""
        return member in self.members and (not self.classic or member.generation >= 0)


class Cluster:
    """The brokers."""

    def __init__(self, scheduler: Scheduler, wall_s: Callable[[], float]) -> None:
        self.scheduler = scheduler
        self._wall_s = wall_s
        self.logs: dict[str, list[list[Record]]] = {}
        self.ids: dict[str, str] = {}
        self.groups: dict[str, Group] = {}
        self.session_s = 45.0
        self.away = False
        self.commit_fails = 0.0
        self.commit_unanswered = 0.0
        self.refetch = 0.0
        self.on_commit: Callable[[Place, int], None] = lambda place, offset: None
        self.counted: dict[str, int] = {}
        self._consumers: list[Consumer] = []

    def count(self, what: str) -> None:
        """A fault that was injected."""
        self.counted[what] = self.counted.get(what, 0) + 1

    def create(self, topic: str, partitions: int) -> None:
        """A topic."""
        self.logs[topic] = [[] for _ in range(partitions)]
        number = self.scheduler.chance.getrandbits(128)
        self.ids[topic] = uuid.UUID(int=number).hex[:22]

    def append(
        self,
        topic: str,
        key: bytes | None,
        value: bytes | None,
        headers: Headers = None,
        partition: int = -1,
        timestamp_ms: int = 0,
    ) -> Record:
        """A record, under the broker's time or the one given."""
        logs = self.logs[topic]
        if partition < 0:
            partition = partition_for(key or b"", len(logs))
        given = kafka.TIMESTAMP_CREATE_TIME if timestamp_ms else kafka.TIMESTAMP_LOG_APPEND_TIME
        record = Record(
            (topic, partition),
            len(logs[partition]),
            key,
            value,
            timestamp_ms or int(self._wall_s() * 1000),
            given,
            headers,
        )
        logs[partition].append(record)
        for consumer in self._consumers:
            consumer.nudge()
        return record

    def end(self, place: Place) -> int:
        """The offset behind the newest record."""
        return len(self.logs[place[0]][place[1]])

    def group(self, name: str, protocol: str) -> Group:
        """Made by whoever asks first."""
        if name not in self.groups:
            self.groups[name] = Group(self, protocol)
        return self.groups[name]

    def attend(self, consumer: Consumer) -> None:
        self._consumers.append(consumer)

    def forget(self, consumer: Consumer) -> None:
        if consumer in self._consumers:
            self._consumers.remove(consumer)

    def latency(self) -> None:
        """A round trip; it fails where the brokers are away. Raises KafkaException."""
        low_s, high_s = _LATENCY_S
        self.scheduler.sleep(low_s + self.scheduler.chance.random() * (high_s - low_s))
        if self.away:
            raise _failed(kafka.KafkaError._TRANSPORT)


def _failed(code: int) -> kafka.KafkaException:
    return kafka.KafkaException(kafka.KafkaError(code))


class Consumer:
    """`confluent_kafka.Consumer`. One thread at a time."""

    def __init__(self, cluster: Cluster, config: Mapping[str, Any]) -> None:
        self._cluster = cluster
        self._scheduler = cluster.scheduler
        self._process = self._scheduler.current.process
        self._protocol = config.get("group.protocol", "classic")
        self._group = cluster.group(config["group.id"], self._protocol)
        # With KIP-848 the brokers say how long a session lasts.
        self._session_s = cluster.session_s
        if self._protocol == "classic":
            self._session_s = config["session.timeout.ms"] / 1000
        self._max_poll_s = config.get("max.poll.interval.ms", 300_000) / 1000
        self._on_commit = config.get("on_commit")
        self._member: Member | None = None
        self._topics: list[str] = []
        self._on_assign: Any = None
        self._on_revoke: Any = None
        self._on_lost: Any = None
        self._positions: dict[Place, int] = {}  # of what is assigned
        self._paused: set[Place] = set()
        self._answered = True  # whether a callback dealt with the assignment itself
        self._commits: list[tuple[Any, list[Any]]] = []
        self._waiting: Task | None = None
        self._polled_s = self._scheduler.now_s
        self._process.on_death.append(self._fall_silent)

    # --- the group

    def subscribe(
        self, topics: Sequence[str], on_assign: Any = None, on_revoke: Any = None,
        on_lost: Any = None,
    ) -> None:  # fmt: skip
        self._topics = list(topics)
        self._on_assign, self._on_revoke, self._on_lost = on_assign, on_revoke, on_lost
        self._cluster.attend(self)
        self._join()

    def _join(self) -> None:
        self._member = Member(self, self._topics)
        self._group.join(self._member)
        self._listen(self._member)

    def _listen(self, member: Member) -> None:
        """The coordinator hears heartbeats as long as the process lives and is not frozen."""

        look_s = min(self._session_s, self._max_poll_s) / 4
        heard_s = self._scheduler.now_s

        def listen() -> None:
            nonlocal heard_s
            now_s = self._scheduler.now_s
            if not (self._process.dead or self._process.frozen):
                heard_s = now_s
            over = now_s - heard_s >= self._session_s or now_s - self._polled_s >= self._max_poll_s
            if over:
                self._group.leave(member)
            elif not member.gone:
                self._scheduler.after(look_s, listen)

        self._scheduler.after(look_s, listen)

    def _fall_silent(self) -> None:
        self._cluster.forget(self)

    def nudge(self) -> None:
        """There may be something to do."""
        if self._waiting is not None:
            self._scheduler.wake(self._waiting)

    def _rebalance(self) -> bool:
        """Call the callbacks that are due; whether any was."""
        member = self._member
        if member is None:
            return False
        if member.gone:  # the group went on without this one
            self._give_up(member)
            self._join()
            return True
        if self._protocol == "classic":
            return self._rebalance_eagerly(member)
        return self._rebalance_in_part(member)

    def _give_up(self, member: Member) -> None:
        """What it was asked to give back before its session was over, it is told to give back;
        only the rest is lost."""
        held = set(self._positions)
        asked = held if member.asked else member.owned - member.target
        if asked & held:
            self._take(sorted(asked & held))
        lost = sorted(self._positions)
        if lost:
            self._call(self._on_lost or self._on_revoke, lost, self._unassign)
        self._unassign(lost)

    def _rebalance_eagerly(self, member: Member) -> bool:
        if self._group.preparing:
            if member.joined:
                return False
            if self._positions:
                self._take(sorted(self._positions))
            if not member.gone:
                self._group.rejoin(member)
            return True
        if member.given:
            return False
        member.given, member.owned = True, set(member.target)
        self._give(sorted(member.target))
        return True

    def _rebalance_in_part(self, member: Member) -> bool:
        member.generation = self._group.generation
        taken = member.owned - member.target
        if taken:
            self._take(sorted(taken))
            member.owned -= taken
            for other in self._group.members:
                other.consumer.nudge()
            return True
        given = self._group.free(member)
        if given:
            member.owned |= given
            self._give(sorted(given))
            return True
        return False

    def _give(self, places: list[Place]) -> None:
        def assign(found: list[Place]) -> None:
            self.incremental_assign([kafka.TopicPartition(*place) for place in found])

        self._call(self._on_assign, places, assign)

    def _take(self, places: list[Place]) -> None:
        self._call(self._on_revoke, places, self._unassign)
        self._unassign(places)

    def _call(self, callback: Any, places: list[Place], otherwise: Any) -> None:
        self._scheduler.point(f"rebalance: {getattr(callback, '__name__', 'none')} {places}")
        self._answered = False
        if callback is not None:
            callback(self, [kafka.TopicPartition(*place) for place in places])
        if not self._answered:
            otherwise(places)

    def _unassign(self, places: Iterable[Place]) -> None:
        for place in places:
            self._positions.pop(place, None)

    # --- the assignment

    def assign(self, partitions: Sequence[Any]) -> None:
        self._alive()
        self._positions = {}
        self.incremental_assign(partitions)

    def incremental_assign(self, partitions: Sequence[Any]) -> None:
        self._alive()
        self._answered = True
        for p in partitions:
            self._positions[(p.topic, p.partition)] = self._start(p)

    def _start(self, p: Any) -> int:
        if p.offset >= 0:
            return int(p.offset)
        if p.offset == kafka.OFFSET_BEGINNING:
            return 0
        return self._group.committed.get((p.topic, p.partition), (0, ""))[0]

    def assignment(self) -> list[Any]:
        self._alive()
        return [kafka.TopicPartition(*place) for place in sorted(self._positions)]

    def pause(self, partitions: Sequence[Any]) -> None:
        self._alive()
        self._paused |= {(p.topic, p.partition) for p in partitions}

    def resume(self, partitions: Sequence[Any]) -> None:
        self._alive()
        self._paused -= {(p.topic, p.partition) for p in partitions}

    def seek(self, p: Any) -> None:
        self._cluster.latency()
        if (p.topic, p.partition) not in self._positions:
            raise _failed(kafka.KafkaError._STATE)
        self._positions[(p.topic, p.partition)] = self._start(p)

    # --- records

    def consume(self, num_messages: int = 1, timeout: float = -1) -> list[Any]:
        scheduler = self._scheduler
        end_s = scheduler.now_s + max(0.0, timeout)
        messages: list[Record] = []
        while True:
            scheduler.point("poll")
            self._polled_s = scheduler.now_s
            commits, self._commits = self._commits, []
            for answer in commits:
                self._on_commit(*answer)
            if self._rebalance():
                messages = [m for m in messages if m.place in self._positions]
                continue
            messages += self._fetched(num_messages - len(messages))
            left_s = end_s - scheduler.now_s
            if len(messages) >= num_messages or left_s <= 0:
                return messages
            self._waiting = scheduler.current
            scheduler.block(min(left_s, _POLL_S))
            self._waiting = None

    def _fetched(self, most: int) -> list[Record]:
        cluster, chance = self._cluster, self._scheduler.chance
        if cluster.away:
            return []
        places = sorted(self._positions.keys() - self._paused)
        chance.shuffle(places)
        found: list[Record] = []
        for place in places:
            log, position = cluster.logs[place[0]][place[1]], self._positions[place]
            if position and cluster.refetch and chance.random() < cluster.refetch:
                position = chance.randrange(position)  # as after a leader that lacked the newest
                cluster.count("fetch from an older offset")
            run = log[position : position + max(0, most - len(found))]
            if len(run) > 1 and chance.random() < 0.5:
                run = run[: chance.randint(1, len(run))]
            self._positions[place] = position + len(run)
            found += run
        return found

    def get_watermark_offsets(
        self, p: Any, timeout: float = -1, cached: bool = False
    ) -> tuple[int, int]:
        if not cached:
            self._cluster.latency()
        return 0, self._cluster.end((p.topic, p.partition))

    # --- offsets

    def committed(self, partitions: Sequence[Any], timeout: float = -1) -> list[Any]:
        self._scheduler.point("ask for offsets")
        self._cluster.latency()
        answer = []
        for p in partitions:
            offset, metadata = self._group.committed.get(
                (p.topic, p.partition), (kafka.OFFSET_INVALID, "")
            )
            answer.append(kafka.TopicPartition(p.topic, p.partition, offset, metadata))
        return answer

    def commit(self, offsets: Sequence[Any] = (), asynchronous: bool = True) -> list[Any] | None:
        self._scheduler.point(f"commit {_named(offsets)}")
        positions, member = list(offsets), self._member
        if not asynchronous:
            self._cluster.latency()
            error = self._take_offsets(member, positions)
            if error is not None:
                raise kafka.KafkaException(error)
            return positions

        def arrive() -> None:
            if self._cluster.away:
                error: Any = kafka.KafkaError(kafka.KafkaError._TRANSPORT)
            else:
                error = self._take_offsets(member, positions)
            self._commits.append((error, positions))
            self.nudge()

        self._scheduler.after(self._scheduler.chance.uniform(*_LATENCY_S), arrive)
        return None

    def _take_offsets(self, member: Member | None, positions: list[Any]) -> Any:
        """The coordinator's answer."""
        cluster, chance = self._cluster, self._scheduler.chance
        if member is None or not self._group.may_commit(member):
            return kafka.KafkaError(kafka.KafkaError.UNKNOWN_MEMBER_ID)
        if cluster.commit_fails and chance.random() < cluster.commit_fails:
            cluster.count("commit refused")
            return kafka.KafkaError(kafka.KafkaError.COORDINATOR_NOT_AVAILABLE)
        for p in positions:
            place = (p.topic, p.partition)
            cluster.on_commit(place, p.offset)
            self._group.committed[place] = (p.offset, p.metadata or "")
        if cluster.commit_unanswered and chance.random() < cluster.commit_unanswered:
            cluster.count("commit unanswered")
            return kafka.KafkaError(kafka.KafkaError._TIMED_OUT)
        return None

    def close(self) -> None:
        self._scheduler.point("leave the group")
        member = self._member
        if member is None:
            return
        if not member.gone and self._positions:
            self._take(sorted(self._positions))
        self._group.leave(member)
        self._cluster.forget(self)
        self._member = None

    def _alive(self) -> None:
        if self._scheduler.dead():
            raise Killed


class Producer:
    """`confluent_kafka.Producer`: what was produced is in its topic after a `flush`."""

    def __init__(self, cluster: Cluster) -> None:
        self._cluster = cluster
        self._buffer: list[tuple[Any, ...]] = []

    def produce(
        self, topic: str, value: bytes | None, key: bytes | None, partition: int = -1,
        on_delivery: Any = None, timestamp: int = 0, headers: Headers = None,
    ) -> None:  # fmt: skip
        self._buffer.append((topic, key, value, headers, partition, timestamp))

    def poll(self, timeout: float = 0) -> int:
        return 0

    def flush(self, timeout: float = -1) -> int:
        while self._buffer:
            self._cluster.scheduler.point("produce")
            self._cluster.scheduler.sleep(0.001)
            if self._cluster.away:
                self._cluster.scheduler.sleep(max(0.0, timeout))
                break
            self._cluster.append(*self._buffer.pop(0))
        return len(self._buffer)


class Admin:
    """`confluent_kafka.admin.AdminClient`."""

    def __init__(self, cluster: Cluster) -> None:
        self._cluster = cluster

    def describe_topics(self, topics: Any, request_timeout: float = 10) -> dict[str, Future[Any]]:
        self._cluster.scheduler.point("describe topics")
        self._cluster.latency()
        return {name: self._described(name) for name in topics.topic_names}

    def _described(self, name: str) -> Future[Any]:
        answer: Future[Any] = Future()
        if name in self._cluster.logs:
            partitions = [SimpleNamespace(id=p) for p in range(len(self._cluster.logs[name]))]
            found = SimpleNamespace(topic_id=self._cluster.ids[name], partitions=partitions)
            answer.set_result(found)
        else:
            answer.set_exception(_failed(kafka.KafkaError.UNKNOWN_TOPIC_OR_PART))
        return answer

    def list_offsets(
        self, asked: Mapping[Any, OffsetSpec], isolation_level: Any = None
    ) -> dict[Any, Future[Any]]:
        latest = type(OffsetSpec.latest())
        found: dict[Any, Future[Any]] = {}
        for p, kind in asked.items():
            found[p] = Future()
            end = self._cluster.end((p.topic, p.partition))
            found[p].set_result(SimpleNamespace(offset=end if isinstance(kind, latest) else 0))
        return found


def _named(positions: Iterable[Any]) -> str:
    return ", ".join(f"{p.topic}[{p.partition}]={p.offset}" for p in positions)
