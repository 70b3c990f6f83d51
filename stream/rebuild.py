"""Profiles made anew beside the live ones, while those are served; then the new ones are live.

    seed       from the archive or a snapshot, where the topic no longer has the beginning
    catch up   with the events topic, by marks: the same fold as a worker's, into other keys
    verify     nothing may be missing that will not be read again
    flip       one key; workers are refused at their next write, and go on from the new marks

A generation in the making has fences, watermarks and marks of its own, so whatever dies, a second
run folds the rest, and what a worker reads again after the flip is found applied. Why that is
exact is told in docs/decisions.md.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable, Mapping
from contextlib import closing
from dataclasses import dataclass, field
from typing import Any, Final, cast

from profiles import arithmetic
from profiles.connection import redis_errors
from profiles.errors import WritesLost
from profiles.generations import BUILDING, READY, Generations, follow
from profiles.marks import Marks
from profiles.schema import BUILD_TURN_S, OLDER, Keys, key64
from profiles.store import ProfileStore

from .archive import Archive, open_store
from .catalogue import Catalogue, categories_of
from .contributions import event_weights
from .errors import UserError
from .profile_diff import Coverage, Difference, compare, lacks
from .refold import Lacking, NoRejects, TopicReader, archived_to, find_topic, only, spill
from .settings import Settings
from .snapshots import Snapshot, load_snapshot
from .terminal import Report
from .updater import TakenApart
from .updater_app import Patience, build_engine, updater_on

TOPIC: Final = "topic"
ARCHIVE: Final = "archive"
SNAPSHOT: Final = "snapshot "  # and its address

# So near to the end of the topic a flip is hardly seen by readers, and the rest is the workers'.
_NEAR_RECORDS: Final = 1_000
# How far a generation is, beside the topic: in its marks.
_SEEDED: Final = "seeded"
_NAMED: Final = 10  # damaged segments in a message
_PARTS: Final = "archive parts"
_COUNT: Final = "archive parts in all"
_END: Final = "archived to"
_KEEP_S: Final = 3.0
_INSTALL_ROUNDS: Final = 20


@dataclass(frozen=True)
class Outcome:
    """What came of it."""

    generation: int
    before: int  # the live generation at the end, or before the flip
    flipped: bool
    difference: Difference  # between the two, just before
    lacking: Lacking


@dataclass
class _Turn:
    """The right to make generations, held by one process at a time."""

    client: Any
    key: str
    token: bytes = field(default_factory=lambda: secrets.token_hex(8).encode())
    kept_s: float = 0.0

    def take(self) -> None:
        """Wait until another's is over, or it gave no sign for BUILD_TURN_S. Raises UserError."""
        gives_up_s = time.monotonic() + BUILD_TURN_S + _KEEP_S
        with redis_errors("REDIS_URL"):
            while not self.client.set(self.key, self.token, nx=True, ex=BUILD_TURN_S):
                if time.monotonic() > gives_up_s:
                    raise UserError("another rebuild is at work: wait for its end, or stop it")
                time.sleep(0.5)
        self.kept_s = time.monotonic()

    def keep(self) -> None:
        """Now and then while at work. Raises UserError where another took over."""
        if time.monotonic() - self.kept_s < _KEEP_S:
            return
        with redis_errors("REDIS_URL"):
            if self.client.get(self.key) not in (self.token, None):
                raise UserError("another rebuild took over, as this one stood still")
            self.client.set(self.key, self.token, ex=BUILD_TURN_S)
        self.kept_s = time.monotonic()

    def give_back(self) -> None:
        """At the end."""
        with redis_errors("REDIS_URL"):
            if self.client.get(self.key) == self.token:
                self.client.unlink(self.key)


class Rebuild:
    """One process', of one namespace: `with Rebuild(…) as rebuild: rebuild.everybody(…)`."""

    def __init__(
        self,
        settings: Settings,
        source: str,
        begin: Callable[[str], Report],
        *,
        per_s: float = 0,
        incomplete: bool = False,
    ) -> None:
        """source: TOPIC, ARCHIVE, or SNAPSHOT with the address of one. `begin`: what -> where to
        report progress. per_s: events folded per second at most; 0: as many as go. incomplete:
        from an archive with damaged segments, too. Raises UserError, ModelError, ProfilesError."""
        stream = settings.stream.model_copy(update={"max_reject_share": 1.0, "outlook_share": 0.0})
        self._settings = settings = settings.model_copy(update={"stream": stream})
        self._source = source
        self._begin = begin
        self._per_s = per_s
        self._incomplete = incomplete
        self._topic = find_topic(settings)
        self._reader = TopicReader(settings, self._topic)
        self._engine = build_engine(settings)
        self._client = settings.redis.connection().open()
        self._generations = Generations(self._client, settings.namespace, settings.redis.url)
        self._patience = Patience(settings.redis.patience_s)
        self._turn = _Turn(self._client, Keys(settings.namespace).build_turn())
        self._lacking = Lacking()

    def __enter__(self) -> Rebuild:
        self._require_space()
        self._require_items()
        self._turn.take()
        return self

    def __exit__(self, *_: object) -> None:
        self._reader.close()
        self._turn.give_back()

    def everybody(self, *, flip: bool) -> Outcome:
        """Rebuild all profiles, or go on with what another run left; and let them be live, unless
        something would be lost by that."""
        live = self._live_keys()
        number = self._take_up()
        try:
            making = self._making(number, live, "")
            self._come_near(making)
            making.serve_waiting()
            difference = self._compare(making, live)
            self._generations.ready(number)
            if difference.lost:  # by hand, or another time from the beginning
                with redis_errors(self._settings.redis.url):
                    self._client.hset(making.keys.build(), "refused", 1)
            flipped = flip and not difference.lost
            if flipped:
                making.catch_up()
                making.serve_waiting()
                if not self._generations.flip(number, live.generation):
                    raise UserError("other profiles went live meanwhile: run again")
        except WritesLost as lost:
            raise UserError(f"{lost}: run again, and it goes on from what is there") from lost
        return Outcome(number, live.generation, flipped, difference, self._lacking)

    def one(self, user: str) -> None:
        """Rebuild one user's profile, and put it in the place of the live one. Raises UserError
        where the source has nothing, or not all, of the user."""
        live = self._live_keys()
        for other, state in self._generations.states().items():
            if state == BUILDING and self._told(other).get("user"):
                self._discard(other)  # of a run that died
        number = self._new(user, live)
        try:
            self._install(self._making(number, live, user), live, user)
        except WritesLost as lost:
            raise UserError(f"{lost}: run again") from lost
        finally:
            self._discard(number)

    def _come_near(self, making: _Making) -> None:
        before = making.catch_up()
        while before > _NEAR_RECORDS:
            count = making.catch_up()
            if count >= before and self._per_s:
                raise UserError(
                    f"events come faster than {self._per_s:g} a second: raise --per-s, or leave it "
                    "out; the rebuild goes on where it is"
                )
            before = count

    # --- generations

    def _live_keys(self) -> Keys:
        keys = Keys(self._settings.namespace)
        with redis_errors(self._settings.redis.url):
            follow(self._client, keys)
        return keys

    def _require_space(self) -> None:
        with redis_errors(self._settings.redis.url):
            stored = cast(bytes | None, self._client.get(self._live_keys().current_space()))
        current, ours = (stored or b"").decode(), self._engine.space
        if current not in ("", ours):
            raise UserError(
                f"workers serve space {current}, the live release of MODEL_RELEASES is of {ours}: "
                "wait until they have swapped, or name their folder of releases"
            )

    def _require_items(self) -> None:
        """What is not in Redis cannot be folded; an emptied one gets the items from a worker."""
        topic, live = find_topic(self._settings, "items"), self._live_keys()
        with closing(TopicReader(self._settings, topic)) as reader:
            ends = reader.ends()
        if not ends:
            return
        sources = [f"{topic.source(p):016x}" for p in ends]
        with redis_errors(self._settings.redis.url):
            marks = cast(list[bytes | None], self._client.hmget(live.marks(), sources))
        missing = sum(
            max(0, end - int(mark or 0)) for end, mark in zip(ends.values(), marks, strict=True)
        )
        if missing > _NEAR_RECORDS:
            raise UserError(
                f"workers have not stored {missing:,} records of {topic.name} yet: wait for them, "
                "or start one"
            )

    def _take_up(self) -> int:
        """A generation that another run left of the same source and settings, or a new one."""
        found = None
        for number, state in self._generations.states().items():
            if state in (BUILDING, READY) and not (told := self._told(number)).get("user"):
                if found is None and told == self._made_from(""):
                    found = number
                else:
                    self._generations.give_up(number)
        return found if found is not None else self._new("", self._live_keys())

    def _new(self, user: str, live: Keys) -> int:
        number = self._generations.begin()
        keys = Keys(self._settings.namespace, number)
        with redis_errors(self._settings.redis.url):
            # Workers go on from here with what is not rebuilt: items, and what was forwarded.
            stored = cast(dict[bytes, bytes], self._client.hgetall(live.marks()))
            marks = {s.decode(): int(at) for s, at in stored.items() if s != OLDER.encode()}
            if (snapshot := self._snapshot()) is not None:
                both = marks.keys() & snapshot.marks.keys()
                marks = {source: min(marks[source], snapshot.marks[source]) for source in both}
            rebuilt = {f"{source:016x}" for source in self._topic.sources}
            kept: dict[Any, Any] = {s: at for s, at in marks.items() if s not in rebuilt}
            self._client.hset(keys.marks(), mapping=kept | {OLDER: 0})
            told: dict[Any, Any] = dict(self._made_from(user))
            self._client.hset(keys.build(), mapping=told)
        return number

    def _made_from(self, user: str) -> dict[str, str]:
        rules = key64(self._settings.profile.model_dump_json())
        return {
            "source": f"{self._source}, incomplete" if self._incomplete else self._source,
            "user": user,
            "rules": f"{rules:016x}",
            "space": self._engine.space,
        }

    def _told(self, number: int) -> dict[str, str]:
        with redis_errors(self._settings.redis.url):
            key = Keys(self._settings.namespace, number).build()
            stored = cast(dict[bytes, bytes], self._client.hgetall(key))
        return {name.decode(): value.decode() for name, value in stored.items()}

    def _discard(self, number: int) -> None:
        if self._generations.give_up(number):
            for _ in self._generations.remove(number, 0):
                self._turn.keep()

    # --- making one

    def _making(self, number: int, live: Keys, user: str) -> _Making:
        making = _Making(
            self._settings,
            Keys(self._settings.namespace, number),
            self._engine,
            self._reader,
            self._patience,
            self._turn.keep,
            self._begin,
            self._per_s,
            user,
        )
        if not making.progress(_SEEDED):
            if self._source == ARCHIVE:
                self._from_archive(making)
            elif (snapshot := self._snapshot()) is not None:
                making.seed(snapshot)
        return making

    def _snapshot(self) -> Snapshot | None:
        if not self._source.startswith(SNAPSHOT):
            return None
        return load_snapshot(self._source.removeprefix(SNAPSHOT))

    def _from_archive(self, making: _Making) -> None:
        settings, topic = self._settings, self._topic
        if not making.progress(_COUNT):
            archived = archived_to(settings, topic)
            for p in range(topic.partitions):
                making.note(f"{_END} {p}", archived.get(p, 0))
        ends = {source: making.progress(f"{_END} {p}") for source, p in topic.sources.items()}
        self._reader.require({p: ends[source] for source, p in topic.sources.items()})
        archive = Archive(open_store(settings.archive.url), self._turn.keep)
        folder = settings.stream.data_dir / f"rebuild-{making.keys.generation}"
        report = self._begin("reading the archive")
        latest_ms = int((time.time() + settings.stream.max_ahead_s) * 1000)
        parts = spill(
            archive, folder, ends, making.user, report, latest_ms, making.progress(_COUNT)
        )
        try:
            if not self._incomplete:
                _require_whole(archive)
            making.note(_COUNT, parts.count)
            weights = event_weights(settings.profile.weights)
            report = self._begin("folding the archive")
            for part in range(making.progress(_PARTS), parts.count):
                report(part, parts.count)
                today = frozenset(topic.sources)
                for taken in parts.read(part, weights, settings.profile.currency, today):
                    making.fold(taken, {})
                making.note(_PARTS, part + 1)
            report(parts.count, parts.count)
        finally:
            parts.remove()
        self._lacking = parts.lacking
        making.seeded(ends)

    def _compare(self, making: _Making, live: Keys) -> Difference:
        report = self._begin("comparing")

        def on_page(count: int) -> None:
            self._turn.keep()
            report(count, None)

        own_items = self._settings.profile.own_items
        return compare(self._client, live, making.keys, own_items, making.coverage(), on_page)

    # --- one user

    def _install(self, making: _Making, live: Keys, user: str) -> None:
        settings = self._settings
        marks = Marks(self._client, live, settings.redis.url, follows=True)
        serving = updater_on(settings, self._engine, marks, live, NoRejects())
        stores = [
            ProfileStore(
                self._client,
                keys,
                serving.layout,
                ttl_s=settings.profile.ttl_days * 86_400,
                writer=secrets.randbits(64),
                where=settings.redis.url,
                marks=of,
            )
            for keys, of in ((making.keys, making.marks), (live, marks))
        ]
        for _ in range(_INSTALL_ROUNDS):
            making.catch_up()
            making.serve_waiting()
            new, old = (store.load([user], anew=True) for store in stores)
            if not new.watermarks[0] and not old.watermarks[0]:
                raise UserError(f"there is nothing of user {user!r} to rebuild from")
            if words := lacks(old, new, making.coverage()):
                raise UserError(f"the profile of {user!r} stays as it is, or it would lose {words}")
            before = old.watermarks[0]
            if any(new.watermarks[0].get(source, 0) < at for source, at in before.items()):
                continue  # a worker is ahead: its events are in the topic by now
            new.fences = old.fences
            names = serving.catalogue.names_of(categories_of(new, [0]))
            if not stores[1].save([user], new, [0], names, time.time()):
                serving.resolve([user], serving.catalogue)
                return
        raise UserError(f"user {user!r} acts faster than can be caught up with: try again")


def require_readable(settings: Settings, number: int) -> None:
    """Make sure that the topic holds what a generation is still to fold. Raises UserError."""
    topic, keys = find_topic(settings), Keys(settings.namespace, number)
    marks = Marks(settings.redis.connection().open(), keys, settings.redis.url)
    found, _ = marks.claim(list(topic.sources))
    with closing(TopicReader(settings, topic)) as reader:
        reader.require({p: found.get(source, 0) for source, p in topic.sources.items()})


def _require_whole(archive: Archive) -> None:
    """UserError where segments of an archive that was read are damaged, or were set aside as such
    and not restored: nothing else would tell of their events if Redis lost the profiles."""
    there = archive.segments()
    missing = [name for name, was in archive.set_aside().items() if was not in there]
    missing += archive.passed_over
    if missing:
        raise UserError(
            f"{len(missing):,} segments of the archive are damaged, and their events would be "
            f"missing from profiles: {', '.join(sorted(missing)[:_NAMED])}"
            f"{', …' if len(missing) > _NAMED else ''}; restore them from a copy, or leave these "
            "events out with --incomplete"
        )


class _Making:
    """A generation on its way, or one user's profile in it."""

    def __init__(
        self,
        settings: Settings,
        keys: Keys,
        engine: Any,
        reader: TopicReader,
        patience: Patience,
        keep_turn: Callable[[], None],
        begin: Callable[[str], Report],
        per_s: float,
        user: str,
    ) -> None:
        self.keys = keys
        self.user = user
        self._client = settings.redis.connection().open()
        self.marks = Marks(self._client, keys, settings.redis.url)
        self._updater = updater_on(settings, engine, self.marks, keys, NoRejects())
        self._settings = settings
        self._reader = reader
        self._patience = patience
        self._keep_turn = keep_turn
        self._begin = begin
        self._per_s = per_s

    @property
    def _catalogue(self) -> Catalogue:
        return self._updater.catalogue

    def catch_up(self) -> int:
        """Fold what the topic holds beyond the marks, up to where it ends now; how many records.
        Raises UserError where some of that is no longer there."""
        starts, count = self._positions(), 0
        total = self._reader.require(starts)
        report = self._begin("catching up")
        for batch in self._reader.batches(starts):
            taken = self._updater.take_apart(batch)
            self.fold(only(taken, self.user) if self.user else taken, batch.ends())
            count += batch.records
            report(count, max(count, total))
        return count

    def fold(self, taken: TakenApart, ends: Mapping[int, int]) -> None:
        """Fold and save, and mark that it is (source -> next offset)."""
        began_s = time.monotonic()
        self._keep_turn()
        prepared = self._patience(lambda: self._updater.prepare(taken))
        self._patience(lambda: self._updater.apply(prepared))
        self.mark(ends)
        if self._per_s:
            pause_s = len(taken.offsets) / self._per_s - (time.monotonic() - began_s)
            time.sleep(max(0.0, pause_s))

    def mark(self, ends: Mapping[int, int]) -> None:
        """All below is in."""
        if ends:
            self._patience(lambda: self.marks.advance(ends))

    def progress(self, of: str) -> int:
        """How far the making itself is; 0 before that was noted."""
        key = self._progress_key(of)
        return self._patience(lambda: self.marks.claim([key]))[0].get(key, 0)

    def note(self, of: str, at: int) -> None:
        """A mark like others: it is there only if all that went before it is."""
        self.mark({self._progress_key(of): at})

    def seeded(self, ends: Mapping[int, int]) -> None:
        """All below these offsets is in (source -> offset), and the topic has the rest."""
        self.mark({**ends, self._progress_key(_SEEDED): 1})

    def _progress_key(self, of: str) -> int:
        return key64(f"{of}/{self.keys.generation}")

    def seed(self, snapshot: Snapshot) -> None:
        """Put a snapshot's profiles there; who is there already stays."""
        topic = self._reader.topic
        ends = {s: at for s, at in snapshot.sources().items() if s in topic.sources}
        self._reader.require({p: ends.get(source, 0) for source, p in topic.sources.items()})
        store = ProfileStore(
            self._client,
            self.keys,
            self._updater.layout,
            ttl_s=self._settings.profile.ttl_days * 86_400,
            writer=secrets.randbits(64),
            where=self._settings.redis.url,
            marks=self.marks,
        )
        report, count = self._begin("reading the snapshot"), 0
        for users, states, fences in snapshot.pages(self.user):
            self._keep_turn()
            profiles = arithmetic.unpack(states, fences, self._updater.layout)
            profiles.fences = [b""] * len(users)
            names = self._catalogue.names_of(categories_of(profiles, range(len(users))))
            store.save(users, profiles, range(len(users)), names, time.time())
            waiting = [users[row] for row in arithmetic.pending_items(profiles)]
            if waiting:
                self._updater.resolve(waiting, self._catalogue)
            count += len(users)
            report(count, snapshot.users)
        self.seeded(ends)

    def serve_waiting(self) -> None:
        """Fold the events whose items' texts came meanwhile."""
        for items in self._updater.items.awaited_pages():
            self._keep_turn()
            found = self._catalogue.resolve(items, {}).found
            known = [item for item, there in zip(items, found.tolist(), strict=True) if there]
            self._updater.serve(known, self._catalogue)

    def coverage(self) -> Coverage:
        """How far it is."""
        sources = self._reader.topic.sources
        marks = {source: self._positions()[p] for source, p in sources.items()}
        return Coverage(marks, frozenset(sources))

    def _positions(self) -> dict[int, int]:
        sources = self._reader.topic.sources
        marks, _ = self._patience(lambda: self.marks.claim(list(sources)))
        return {p: marks.get(source, 0) for source, p in sources.items()}
