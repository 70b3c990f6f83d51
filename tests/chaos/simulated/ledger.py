"""What must hold in a simulated world, kept apart from the code that is to make it hold.

It sees what Redis and the brokers see, at the moment they see it:

    saves     a profile's watermark never goes back
    commits   no offset is committed before all below it was saved once
    marks     no mark lies beyond what Redis has, also after it lost writes
    the end   every profile is what the oracle says, every reject is among the dead letters

Offsets and watermarks are all it reads of what the code wrote; profiles are decoded at the end.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from profiles import arithmetic
from profiles.schema import Keys, key64, source_key
from tests import oracle

from .broker_double import Cluster, Place
from .redis_double import Keyspace
from .shop import BAD, EVENTS_TOPIC, ITEMS_TOPIC, Expectation, is_bad, user_of

NAMESPACE = "sim"
KEYS = Keys(NAMESPACE)
_PREFIX, _SUFFIX = (part.encode() for part in KEYS.profile("\0").split("\0"))


class Violation(Exception):
    """Something that must never be."""


@dataclass
class Ledger:
    """Of one world."""

    cluster: Cluster
    keyspace: Keyspace
    saves: int = 0
    commits: int = 0
    _saved: dict[bytes, dict[int, int]] = field(default_factory=dict)  # user -> source -> offset
    _ever: dict[bytes, dict[int, int]] = field(default_factory=dict)
    _items_ever: dict[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._marks_key = KEYS.marks().encode()

    # --- what Redis sees

    def redis_changed(self, keys: Iterable[bytes]) -> None:
        """After each command that changed something."""
        for key in keys:
            if key.startswith(_PREFIX):
                self._profile_saved(key)
            elif key == self._marks_key:
                self.check_marks()
            elif b":item:" in key:
                self._item_saved(key)

    def redis_went_back(self) -> None:
        """What it had is what it has now."""
        self._saved = {}
        for key in self.keyspace.names():
            if key.startswith(_PREFIX):
                self._saved[key] = self._watermark(key)
        self.check_marks()

    def _profile_saved(self, key: bytes) -> None:
        self.saves += 1
        before, now = self._saved.get(key, {}), self._watermark(key)
        for source, offset in before.items():
            if now.get(source, 0) < offset:
                raise Violation(
                    f"{key.decode()}: a save took the watermark of {source:x} from {offset} back "
                    f"to {now.get(source, 0)}"
                )
        self._saved[key] = now
        ever = self._ever.setdefault(key, {})
        for source, offset in now.items():
            ever[source] = max(offset, ever.get(source, 0))

    def _watermark(self, key: bytes) -> dict[int, int]:
        fence = self.keyspace.hash(key.decode()).get(b"fence")
        return arithmetic.read_fence(fence)[3] if fence else {}

    def _item_saved(self, key: bytes) -> None:
        fields = self.keyspace.hash(key.decode())
        if fields.get(b"source"):
            name = key.decode()
            self._items_ever[name] = max(self._items_ever.get(name, -1), int(fields[b"offset"]))

    # --- what the brokers see

    def committed(self, place: Place, offset: int) -> None:
        """Before an offset is taken."""
        self.commits += 1
        if offset > self.cluster.end(place):
            raise Violation(f"{place}: {offset} was committed, which does not exist yet")
        missing = self._missing(place, offset, self._ever, self._items_ever)
        if missing:
            raise Violation(f"{place}: {offset} was committed before it was saved: {missing}")

    def check_marks(self) -> None:
        """None lies beyond what Redis has now."""
        marks = self.keyspace.hash(KEYS.marks())
        items = {
            key.decode(): int(fields[b"offset"])
            for key in self.keyspace.names()
            if b":item:" in key and (fields := self.keyspace.hash(key.decode())).get(b"source")
        }
        for place in self.places():
            mark = marks.get(f"{self._source(place):016x}".encode())
            if mark is not None and (
                missing := self._missing(place, int(mark), self._saved, items)
            ):
                raise Violation(f"{place}: the mark is at {int(mark)}, but Redis lacks {missing}")

    def _missing(
        self, place: Place, offset: int, saved: dict[bytes, dict[int, int]], items: dict[str, int]
    ) -> str:
        """Something below an offset that is not saved; "" for nothing."""
        source, seen = self._source(place), set()
        for record in reversed(self.cluster.logs[place[0]][place[1]][:offset]):
            who = user_of(record)
            if who in seen or is_bad(record):
                continue
            seen.add(who)
            if place[0] == ITEMS_TOPIC:
                at = items.get(KEYS.item(key64(who)), -1)
            else:
                at = saved.get(KEYS.profile(who).encode(), {}).get(source, 0) - 1
            if at < record.offset():
                return f"{who} at {record.offset()}"
        return ""

    # --- the end

    def places(self) -> list[Place]:
        """Every partition that workers read."""
        topics = (EVENTS_TOPIC, ITEMS_TOPIC)
        return [(topic, p) for topic in topics for p in range(len(self.cluster.logs[topic]))]

    def drained(self) -> bool:
        """Whether all is committed, and marked in Redis."""
        group = self.cluster.groups.get(f"{NAMESPACE}.updater")
        marks = self.keyspace.hash(KEYS.marks())
        for place in self.places():
            end = self.cluster.end(place)
            if end and (
                group is None
                or group.committed.get(place, (0, ""))[0] != end
                or marks.get(f"{self._source(place):016x}".encode()) != b"%d" % end
            ):
                return False
        return True

    def check_end(self) -> None:
        """Nothing lost, nothing twice. Raises Violation."""
        expected = Expectation(self.cluster).profiles()
        wrong = {}
        for user in expected:
            fields = self.keyspace.hash(KEYS.profile(user))
            if b"state" not in fields:
                wrong[user] = ["is missing"]
                continue
            profile = arithmetic.decode(user, fields[b"state"], fields[b"fence"])
            if differences := oracle.compare(profile, expected[user]):
                wrong[user] = differences
        found = {key for key in self.keyspace.names() if key.startswith(_PREFIX)}
        for key in found - {KEYS.profile(user).encode() for user in expected}:
            wrong[key.decode()] = ["should not exist"]
        if wrong:
            raise Violation(f"{len(wrong)} of {len(expected)} profiles are wrong: {wrong}")
        self._check_dead_letters()

    def _check_dead_letters(self) -> None:
        letters = [r for log in self.cluster.logs[f"{NAMESPACE}.dead-letter"] for r in log]
        told = {
            (h[b"penchant.partition"], h[b"penchant.offset"])
            for h in ({n.encode(): v for n, v in letter.headers() or ()} for letter in letters)
            if BAD.encode() in h
        }
        for log in self.cluster.logs[EVENTS_TOPIC]:
            for record in log:
                origin = (b"%d" % record.partition(), b"%d" % record.offset())
                if is_bad(record) and origin not in told:
                    raise Violation(f"a reject is lost: {record}")

    def _source(self, place: Place) -> int:
        return source_key(self.cluster.ids[place[0]], place[1])
