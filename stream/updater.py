"""One micro-batch: parse, encode, fold, save. No Faust, no consumer, no commit.

Three steps, so that the next micro-batch is parsed and encoded while Redis works on this one:

    take_apart   bytes -> events and items; rejects to the dead-letter topic, strays sent on
    prepare      items stored, events -> columns with vectors
    apply        load profiles -> fold -> fenced save; whoever was refused, again

The first two never look at a profile and may run ahead. `apply` is `start` and `finish`: shoppers
are in lanes, always the same, and each lane folds and saves one micro-batch after the other, so
that the next may be started before the one before is finished. `prepare` and `finish` need Redis
and may be repeated after a failure: what is saved already is below the watermark the second time.
`take_apart` does not, and is done once: a reject counts once.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import pairwise
from typing import Final

import numpy as np
from numpy.typing import NDArray

from profiles import arithmetic
from profiles.arithmetic import EventColumns, Ints, Layout, Profiles
from profiles.fates import APPLIED, FORGOTTEN, REPEATED, REPLAYED, Fates
from profiles.ids import Ids
from profiles.items import ItemStore, Origin
from profiles.neighbours import LANES as PAIR_LANES
from profiles.neighbours import lane_of
from profiles.schema import ItemRecord, key64
from profiles.store import ProfileStore

from . import events as ev
from . import forwarding, metrics
from .catalogue import Catalogue, categories_of
from .contributions import Columns, Contributions, add_columns, joined
from .dead_letter import Rejects, RejectWindow
from .errors import UserError
from .forwarding import Forwarder, origin_of
from .intake import MicroBatch, Slice
from .lanes import InLanes, in_lanes, lanes_of
from .migration import Migrator
from .neighbours import Fold, PairSender, Place
from .outlooks import Waiting
from .scanning import Scanner
from .settings import Settings
from .user_rows import UserRows

log = logging.getLogger(__name__)

# A refusal means that another writer saved this user between our load and our save. Each round
# leaves only those that were refused again, so more rounds than this mean a writer gone mad.
_SAVE_ROUNDS: Final = 20
_REFRESH_EVERY_S: Final = 1.0
# The users of a large micro-batch are folded and saved in lanes at the same time: Redis works on
# some while the processor works on others. Where pairs are made there are fewer: they are counted
# once by their order in a lane.
_LANES: Final = 4
_LANE_USERS: Final = 256
# Records parsed and taken apart at a time: their events, a kilobyte each, must not leave the
# processor's cache in between (6.3 us per event, against 9.7 with a whole micro-batch).
_PART_RECORDS: Final = 128
# Of those that wait for an outlook: the others are for shoppers who act.
_PLACES_OF_MOVED: Final = 0.5


@dataclass(frozen=True)
class TakenApart:
    """A micro-batch in which nothing is bad or out of place."""

    users: Ids  # n
    columns: Contributions  # m events
    sources: NDArray[np.uint64]  # (m,), with offsets: what the watermark counts
    offsets: NDArray[np.int64]  # (m,)
    items: list[tuple[list[ItemRecord], Origin]]  # per slice of the items topic
    oldest_ms: int  # record timestamp, for freshness
    forwarded: dict[Place, Place]  # source and offset that count -> where it was read
    epoch: int  # of the newest assignment that it was read under
    today: frozenset[int]  # sources that there are, see MicroBatch


@dataclass(frozen=True)
class Prepared:
    """A micro-batch ready to be folded."""

    users: Ids  # n, those of a lane together
    lanes: Ints  # the first row of each, and n; one lane, where there are few users
    events: EventColumns  # m
    arrived_items: list[int]  # item keys whose text came in this batch
    oldest_ms: int
    catalogue: Catalogue  # whose vectors these are
    forwarded: dict[Place, Place]  # see TakenApart
    epoch: int
    today: frozenset[int]
    fates: Fates  # of the events; kept over repeats

    @property
    def alone(self) -> bool:
        """Whether nothing else may be folded meanwhile: few users are in one lane, and whoever
        waited for an item may be in any."""
        return len(self.lanes) == 2 or bool(self.arrived_items)


@dataclass(eq=False)
class Started:
    """A micro-batch that is folded and saved, lane by lane."""

    prepared: Prepared
    before: Started | None  # that is not finished yet
    work: Sequence[Callable[[], None]]  # of each lane
    began_s: float
    left: set[int] = field(default_factory=set)  # lanes that are not saved
    at_work: list[Future[None]] = field(default_factory=list)


@dataclass(frozen=True)
class _Work:
    """Users of a micro-batch, and what they did; without events, only what has been waiting is
    folded."""

    users: list[str]  # n
    catalogue: Catalogue
    events: EventColumns | None = None  # m
    at: Ints = field(default_factory=lambda: np.zeros(0, np.int64))  # (m,) in the micro-batch
    batch: Prepared | None = None

    def of(self, rows: Sequence[int]) -> _Work:
        """Only these users, who become rows 0, 1, …"""
        if list(rows) == list(range(len(self.users))):
            return self
        users = [self.users[row] for row in rows]
        if self.events is None:
            return replace(self, users=users)
        new_row = np.full(len(self.users), -1)
        new_row[list(rows)] = np.arange(len(rows))
        picked = np.flatnonzero(new_row[self.events.row] >= 0)
        columns = {name: column[picked] for name, column in vars(self.events).items()}
        events = EventColumns(**{**columns, "row": new_row[columns["row"]]})
        return replace(self, users=users, events=events, at=self.at[picked])


@dataclass(frozen=True)
class _Round:
    """n users of one space, folded and not yet saved."""

    work: _Work
    rows: Sequence[int]  # n, among all that were loaded
    profiles: Profiles
    touched: list[int]  # rows to save
    moved: set[int]  # rows that came from another space
    fold: Fold | None


class Updater:
    """Owns everything between a micro-batch and its profiles."""

    def __init__(
        self,
        settings: Settings,
        catalogue: Catalogue,
        profiles: ProfileStore,
        items: ItemStore,
        dead_letters: Rejects,
        migrator: Migrator,
        *,
        layout: Layout,
        weights: Mapping[str, float],
        forwarder: Forwarder | None = None,
        pairs: PairSender | None = None,
        clock: Callable[[], float] = time.time,
    ) -> None:
        """`forwarder` is set where events are sent on to their user's partition, `pairs` where
        items' neighbours are kept."""
        self._settings = settings
        self._profiles = profiles
        self._items = items
        self._dead_letters = dead_letters
        self._layout = layout
        self._weights = weights
        self._scanner = Scanner(weights, layout.currency)
        self._forwarder = forwarder
        self._pairs = pairs
        self._epoch = -1
        self._clock = clock
        self._migrator = migrator
        self._catalogue = catalogue
        self._rejects = RejectWindow(
            settings.stream.reject_window, settings.stream.max_reject_share
        )
        self._items_topic = settings.topic("items")
        self._forwarded_topic = settings.topic(forwarding.TOPIC)
        self._next_refresh_s = 0.0
        self._told_split = False
        self._outlooks = Waiting(settings.stream.outlook_waiting)
        self._apply_s = 0.0
        self._finished_s = 0.0
        self._lanes = [ThreadPoolExecutor(1, f"lane-{lane}") for lane in range(_LANES)]

    @property
    def catalogue(self) -> Catalogue:
        """The one that serves."""
        return self._catalogue

    @property
    def items(self) -> ItemStore:
        """What its items are kept by."""
        return self._items

    @property
    def layout(self) -> Layout:
        """What its profiles keep."""
        return self._layout

    @property
    def migrator(self) -> Migrator:
        """What brings its profiles from other spaces."""
        return self._migrator

    @property
    def outlooks(self) -> Waiting:
        """Whoever was saved and may be foretold anew."""
        return self._outlooks

    @property
    def apply_s(self) -> float:
        """How long it has been folding and saving, ever."""
        return self._apply_s

    def swap(self, catalogue: Catalogue) -> None:
        """Serve another release from the next micro-batch on; from any thread. A batch is of one
        release from its first vector to its save."""
        self._catalogue = catalogue

    def forget(self) -> None:
        """Remember nothing that Redis may have lost. Not while lanes are at work. Raises
        RedisUnavailable."""
        self._profiles.forget_cached()
        self._catalogue.forget()

    def warm_up(self) -> None:
        """Make ready what is compiled: half a minute where it never was on such a machine, a
        second where it was."""
        nobody = UserRows(0)
        self._scanner.scan([], [], 0).contributions(nobody)
        in_lanes(nobody.ids(), lanes_of(nobody.ids(), _LANES), _LANES)
        self._profiles.warm_up()

    # --- take apart

    def take_apart(self, batch: MicroBatch) -> TakenApart:
        """Everything that needs neither Redis nor the encoder. Raises DeliveryFailed,
        FlushTimedOut and TooManyRejects; then nothing of the batch may be committed."""
        with metrics.STAGE_S.labels("take_apart").time():
            items: list[tuple[list[ItemRecord], Origin]] = []
            users = UserRows(batch.records)
            taken: list[Contributions] = []
            places: list[tuple[NDArray[np.uint64], NDArray[np.int64]]] = []
            read: dict[Place, Place] = {}
            for piece in batch.slices:
                if piece.topic == self._items_topic:
                    items.append(self._take_items(piece))
                    continue
                events, index = self._take_events(piece, users)
                taken.append(events)
                forwarded = piece.topic == self._forwarded_topic
                sources, offsets = origin_of(piece, index, forwarded)
                places.append((sources, offsets))
                if forwarded and self._pairs is not None:
                    counted = zip(sources.tolist(), offsets.tolist(), strict=True)
                    for i, place in zip(index.tolist(), counted, strict=True):
                        read.setdefault(place, (piece.source, piece.offsets[i]))
            self._dead_letters.flush()
            if self._forwarder is not None:
                self._forwarder.flush()
            return TakenApart(
                users.ids(),
                joined(taken),
                np.concatenate([np.zeros(0, np.uint64), *(sources for sources, _ in places)]),
                np.concatenate([np.zeros(0, np.int64), *(offsets for _, offsets in places)]),
                items,
                min((min(s.timestamps_ms) for s in batch.slices), default=0),
                read,
                max((s.epoch for s in batch.slices), default=-1),
                batch.sources,
            )

    def _take_events(self, piece: Slice, users: UserRows) -> tuple[Contributions, Ints]:
        """The events of a slice, in order, and their positions in it."""
        ahead_ms = int(self._settings.stream.max_ahead_s * 1000)
        latest_ms = self._latest_ms(piece, ahead_ms)
        taken: list[Contributions] = []
        at: list[Ints] = []
        left: Sequence[int] = range(len(piece.values))
        if self._forwarder is None:  # which sends events on as they were parsed
            scanned = self._scanner.scan(piece.values, piece.timestamps_ms, ahead_ms, latest_ms)
            taken.append(scanned.contributions(users))
            at.append(scanned.index)
            left = scanned.others.tolist()
            self._rejects.add(len(scanned.index), [])
        if left:
            columns, index = Columns(), list[int]()
            for i in range(0, len(left), _PART_RECORDS):
                part = left[i : i + _PART_RECORDS]
                events, of_these = self._parse(piece.at(part), ahead_ms, latest_ms)
                add_columns(columns, events, self._weights, self._layout.currency)
                index += [part[k] for k in of_these]
            taken.append(columns.arrays(users))
            at.append(np.asarray(index, np.int64))
        if len(taken) == 1:
            return taken[0], at[0]
        positions = np.concatenate(at)
        order = np.argsort(positions)
        return joined(taken).at(order), positions[order]

    def _latest_ms(self, piece: Slice, ahead_ms: int) -> int:
        """The latest time of an event of this slice. A producer whose clock is wrong is no witness
        of its own future, so where records carry its time, this worker's clock is asked. Not about
        what was sent on: it passed here before, under the same timestamp."""
        if piece.has_producer_times and piece.topic != self._forwarded_topic:
            return int(self._clock() * 1000) + ahead_ms
        return ev.MAX_TS_MS

    def _parse(
        self, piece: Slice, ahead_ms: int, latest_ms: int
    ) -> tuple[list[ev.Event], list[int]]:
        parsed = ev.parse(piece.values, piece.timestamps_ms, ahead_ms, latest_ms)
        self._reject(piece, parsed.rejects)
        if self._forwarder is None:
            return parsed.events, parsed.index
        return self._forwarder.keep_local(piece, parsed.events, parsed.index)

    def _take_items(self, piece: Slice) -> tuple[list[ItemRecord], Origin]:
        parsed = ev.parse_items(piece.keys, piece.values)
        self._reject(piece, parsed.rejects)
        records = [_record(item) for item in parsed.upserts]
        records += [ItemRecord(item_id, deleted=True) for item_id in parsed.deletions]
        # Only the latest record of an item is left, so the slice's last offset orders them all.
        return records, Origin(piece.source, piece.offsets[-1])

    def _reject(self, piece: Slice, rejects: Sequence[ev.Rejected]) -> None:
        for reject in rejects:
            i = reject.index
            metrics.EVENTS_REJECTED.labels(reject.reason).inc()
            self._dead_letters.put(
                key=piece.keys[i],
                value=piece.values[i],
                headers=piece.headers[i],
                topic=piece.topic,
                partition=piece.partition,
                offset=piece.offsets[i],
                timestamp_ms=piece.timestamps_ms[i],
                reason=reject.reason,
                detail=reject.detail,
            )
        self._rejects.add(len(piece.values), rejects)

    # --- prepare

    def prepare(self, taken: TakenApart) -> Prepared:
        """Everything else that does not need profiles. Raises RedisUnavailable,
        WritesLost."""
        catalogue = self._catalogue  # read once: a swap may come at any moment
        with metrics.STAGE_S.labels("prepare").time():
            if self._clock() >= self._next_refresh_s:
                catalogue.refresh()
                self._next_refresh_s = self._clock() + _REFRESH_EVERY_S
            arrived: list[int] = []
            for records, origin in taken.items:
                arrived += catalogue.upsert(records, origin)
            events, told = self._with_vectors(taken, catalogue)
            users, row, lanes = self._in_lanes(taken.users)
            return Prepared(
                users,
                lanes,
                replace(events, row=row[events.row]),
                arrived + told,
                taken.oldest_ms,
                catalogue,
                taken.forwarded,
                taken.epoch,
                taken.today,
                Fates(len(events.row)),
            )

    def _in_lanes(self, users: Ids) -> InLanes:
        """Where pairs are made, by the lanes that these are counted in."""
        count = _LANES if self._pairs is None else PAIR_LANES
        if len(users) < count * _LANE_USERS:
            return InLanes(users, np.arange(len(users)), np.array([0, len(users)]))
        if self._pairs is None:
            return in_lanes(users, lanes_of(users, count), count)
        return in_lanes(users, np.fromiter(map(lane_of, users), np.int64, len(users)), count)

    def _with_vectors(
        self, batch: TakenApart, catalogue: Catalogue
    ) -> tuple[EventColumns, list[int]]:
        """The events with their vectors, and the items they tell of that users wait for."""
        taken, told = batch.columns, list[int]()
        m, dimensions = len(taken.row), self._layout.dimensions
        vector = np.zeros((m, dimensions), dtype=np.float32)
        resolved = np.ones(m, dtype=bool)  # an event without item and text has nothing to wait for
        category = np.zeros(m, dtype=np.uint64)
        at = np.flatnonzero((taken.item != 0) & (taken.weight != 0))
        if len(at) or taken.inline:  # an event without weight may still tell of its item
            items, of = np.unique(taken.item[at], return_inverse=True)
            inline = {key64(item_id): record for item_id, record in taken.inline.items()}
            got = catalogue.resolve(items.tolist(), inline)
            vector[at], resolved[at], category[at] = (
                got.vectors[of], got.found[of], got.categories[of]
            )  # fmt: skip
            told = got.told
        text = np.zeros(m, dtype=bool)
        if taken.text:
            where = list(taken.text)
            vector[where] = catalogue.engine.encode(list(taken.text.values()), "query")
            text[where] = True
        events = EventColumns(
            row=taken.row,
            source=batch.sources,
            offset=batch.offsets,
            event=taken.event,
            t_ms=taken.t_ms,
            type=taken.type,
            weight=taken.weight.astype(np.float32),
            item=taken.item,
            category=category,
            vector=vector,
            resolved=resolved,
            text=text,
            spend=taken.spend,
            foreign=taken.foreign,
        )
        return events, told

    # --- apply

    def apply(self, prepared: Prepared) -> None:
        """Fold and save. Raises RedisUnavailable, WritesLost and what the profiles' state may
        raise."""
        self.finish(self.start(prepared))

    def may_start(self, prepared: Prepared, before: Started) -> bool:
        """Whether this one may be folded before the one that was started last is finished."""
        return not (prepared.alone or before.prepared.alone or self._is_of_new_epoch(prepared))

    def start(self, prepared: Prepared, before: Started | None = None) -> Started:
        """Let the lanes fold and save this one behind what they have in hand. `before`: the one
        that was started last, where it is not finished. Returns at once."""
        if self._is_of_new_epoch(prepared):
            # Partitions came: between two turns at one, somebody else may have folded its
            # shoppers further, and pairs are sent before a save would find that out.
            self._profiles.forget_cached()
            self._epoch = prepared.epoch
        fold = self._fold_and_save if self._pairs is None else self._fold_with_pairs
        rows = list(pairwise(prepared.lanes.tolist()))
        work = [partial(fold, prepared, begin, end) for begin, end in rows]
        started = Started(prepared, before, work, time.monotonic(), set(range(len(work))))
        self._set_to_work(started)
        return started

    def finish(self, started: Started) -> None:
        """Return once all of it is saved; in the order of the starts. Once more after a failure
        does what is left. Raises as `apply`."""
        while started.left:
            if not started.at_work:
                self._set_to_work(started)
            self.come_to_rest(started)
            at_work, started.at_work = started.at_work, []
            for lane in at_work:
                lane.result()
        started.before = None
        prepared = started.prepared
        self.serve(prepared.arrived_items, prepared.catalogue)
        self._report(prepared)
        now_s = time.monotonic()
        took_s = now_s - max(started.began_s, self._finished_s)
        self._finished_s = now_s
        self._apply_s += took_s
        metrics.STAGE_S.labels("apply").observe(took_s)
        if prepared.oldest_ms:
            metrics.FRESHNESS_S.observe(max(0.0, self._clock() - prepared.oldest_ms / 1000))

    def come_to_rest(self, started: Started) -> None:
        """Return once no lane is at work on it, even where one failed."""
        wait(started.at_work)

    def _set_to_work(self, started: Started) -> None:
        started.at_work = [
            self._lanes[lane].submit(self._work_in_lane, started, lane)
            for lane in sorted(started.left)
        ]

    def _work_in_lane(self, started: Started, lane: int) -> None:
        """What failed in the one before goes first: a later save would move the watermark past
        it."""
        if started.before is None or lane not in started.before.left:
            started.work[lane]()
            started.left.discard(lane)

    def _is_of_new_epoch(self, prepared: Prepared) -> bool:
        return self._pairs is not None and prepared.epoch > self._epoch

    def serve(self, items: Sequence[int], catalogue: Catalogue) -> None:
        """Fold the events that waited for these items' texts. Raises as `apply`."""
        for item in items:
            self._items.resolve_waiting(item, lambda users: self.resolve(users, catalogue))

    def _fold_with_pairs(self, prepared: Prepared, begin: int, end: int) -> None:
        self._rounds_and_outlooks(_all_of(prepared).of(range(begin, end)))

    def _fold_and_save(self, prepared: Prepared, begin: int, end: int) -> None:
        """The users of these rows. The store does what is plain."""
        catalogue, users = prepared.catalogue, prepared.users[begin:end]
        done = self._profiles.fold(
            users,
            prepared.events,
            begin,
            catalogue.space,
            catalogue.names_of,
            self._clock(),
            prepared.fates,
            prepared.today,
            partial(self._migrator.carry, catalogue=catalogue),
        )
        metrics.SAVES.inc(done.saved)
        metrics.PROFILES_MIGRATED.labels("touch").inc(done.moved)
        metrics.SAVES_REFUSED.inc(done.refused)
        if done.again:
            self._rounds(_all_of(prepared).of([begin + row for row in done.again]))
        self.foretell(users, catalogue)

    def _rounds_and_outlooks(self, work: _Work) -> None:
        self._rounds(work)
        self.foretell(work.users, work.catalogue)

    def _rounds(self, left: _Work) -> None:
        """Load, migrate, fold, save; those whose save was refused, again."""
        for turn in range(_SAVE_ROUNDS):
            if not left.users:
                return
            loaded = self._profiles.load(left.users, anew=left.events is None)
            rounds = [
                self._fold_round(left.of(rows), rows, profiles, space, moved)
                for profiles, rows, space, moved in self._migrator.bring(loaded, left.catalogue)
            ]
            if self._pairs is not None and left.batch is not None and turn == 0:
                # Only once: whoever is refused is folded again, but their pairs are sent.
                folds = [each.fold for each in rounds if each.fold]
                self._pairs.send(folds, left.batch.forwarded)
            left = left.of([row for each in rounds for row in self._save_round(each)])
        raise UserError(
            f"another writer kept overtaking this one on {len(left.users)} users, such as "
            f"{left.users[0]!r}: does a second updater write this NAMESPACE from other topics?"
        )

    def _fold_round(
        self, work: _Work, rows: Sequence[int], profiles: Profiles, space: int, moved: set[int]
    ) -> _Round:
        """Fold into profiles that all live in `space` or in none yet."""
        before = list(profiles.window)
        touched, fold = set(moved), None
        if work.events is not None and work.batch is not None:
            events = self._expressed(work.events, work.catalogue, space)
            folded = arithmetic.fold(profiles, events, self._layout, space)
            today = work.batch.today
            split = [u for row, u in enumerate(work.users) if _is_split(profiles, row, today)]
            work.batch.fates.folded(work.at, folded.fate, split)
            touched |= set(folded.touched)
            fold = Fold(work.users, before, profiles, events, folded)
        touched |= self._resolve_pending(profiles, work.catalogue, space)
        return _Round(work, rows, profiles, sorted(touched), moved, fold)

    def _expressed(self, events: EventColumns, catalogue: Catalogue, space: int) -> EventColumns:
        if space == catalogue.space:
            return events
        items = np.where(events.text, np.uint64(0), events.item)
        vector = self._migrator.express(items, events.vector, catalogue.space, space)
        return replace(events, vector=vector)

    def _save_round(self, done: _Round) -> list[int]:
        """Save what was folded; which of all that were loaded were refused."""
        work, profiles, rows = done.work, done.profiles, done.touched
        names = work.catalogue.names_of(categories_of(profiles, rows))
        refused = self._profiles.save(work.users, profiles, rows, names, self._clock())
        metrics.SAVES.inc(len(rows) - len(refused))
        metrics.SAVES_REFUSED.inc(len(refused))
        metrics.PROFILES_MIGRATED.labels("touch").inc(len(done.moved - set(refused)))
        if refused and done.fold is not None and work.batch is not None:
            of_these = np.isin(done.fold.events.row, refused)
            fate = done.fold.folded.fate[of_these]
            work.batch.fates.refused(work.at[of_these], fate, [work.users[r] for r in refused])
        self._wait_for_items(work.users, profiles, work.catalogue)
        return [done.rows[row] for row in refused]

    def _report(self, prepared: Prepared) -> None:
        """Once per micro-batch, when all of it is saved."""
        fates, events = prepared.fates, prepared.events
        applied = fates.are(APPLIED)
        metrics.EVENTS_APPLIED.inc(int(applied.sum()))
        metrics.EVENTS_PENDING.inc(int((applied & ~events.resolved & (events.weight != 0)).sum()))
        metrics.EVENTS_REPLAYED.inc(int(fates.are(REPLAYED).sum()))
        metrics.EVENTS_REPEATED.inc(int(fates.are(REPEATED).sum()))
        metrics.USERS_FORGOTTEN.inc(int(fates.are(FORGOTTEN).sum()))
        self._report_split(fates.split())

    def _report_split(self, split: int) -> None:
        if split:
            metrics.USERS_SPLIT.inc(split)
            if not self._told_split and self._forwarder is None:
                self._told_split = True
                log.warning(
                    "%d users of one micro-batch have events on two partitions: producers disagree "
                    "on the partitioner. Their profiles stay right, but their saves collide: use "
                    "murmur2_random, or set STREAM_REPARTITION=true",
                    split,
                )

    def resolve(self, users: list[str], catalogue: Catalogue) -> None:
        """Fold what these users' pending events can now contribute, and see that the rest is waited
        for. Raises as `apply`."""
        self._rounds_and_outlooks(_Work(users, catalogue))

    def moved_elsewhere(self, users: Sequence[str], catalogue: Catalogue) -> None:
        """The sweeper moved these: what is remembered of them would be refused, and what was
        foretold is of the space before. From any thread."""
        self._profiles.forget_cached(users)
        self.foretell(users, catalogue, _PLACES_OF_MOVED)

    def foretell(self, users: Sequence[str], catalogue: Catalogue, places: float = 1.0) -> None:
        """Let these wait for an outlook, where the release has learned to tell; see `Waiting`."""
        if catalogue.engine.foreteller is not None and self._settings.stream.outlook_share:
            self._outlooks.add(users, places)

    def _resolve_pending(self, profiles: Profiles, catalogue: Catalogue, space: int) -> set[int]:
        waiting = arithmetic.pending_items(profiles)
        if not waiting:
            return set()
        keys = sorted({item for items in waiting.values() for item in items})
        got = catalogue.resolve(keys, {})
        known = got.vectors
        if space != catalogue.space:
            items = np.asarray(keys, dtype=np.uint64)
            known = self._migrator.express(items, known, catalogue.space, space)
        vectors = {k: v for k, v, ok in zip(keys, known, got.found, strict=True) if ok}
        categories = dict(zip(keys, got.categories.tolist(), strict=True))
        arithmetic.resolve_pending(profiles, vectors, categories, self._layout, space)
        still = arithmetic.pending_items(profiles)
        return {row for row, items in waiting.items() if still.get(row) != items}

    def _wait_for_items(
        self, users: Sequence[str], profiles: Profiles, catalogue: Catalogue
    ) -> None:
        """Register the users that hold pending events, then look once more: an item that came
        between our look-up and the registration would find nobody waiting."""
        waiting = arithmetic.pending_items(profiles)
        if not waiting:
            return
        self._items.wait_for({users[row]: items for row, items in waiting.items()})
        keys = sorted({item for items in waiting.values() for item in items})
        if catalogue.resolve(keys, {}).found.any():
            self.resolve([users[row] for row in waiting], catalogue)


def _all_of(prepared: Prepared) -> _Work:
    events = prepared.events
    at = np.arange(len(events.row))
    return _Work(list(prepared.users), prepared.catalogue, events, at, prepared)


def _is_split(profiles: Profiles, row: int, today: Collection[int]) -> bool:
    """Whether this fold brought a user events of a further partition than the ones before. Those of
    a topic that was deleted do not count, though the watermark keeps them: a worker that still
    holds records of it must find them there."""
    sources = profiles.watermarks[row]
    if len(sources) < 2:
        return False
    fence = profiles.fences[row]
    gained = len(sources) > (len(arithmetic.read_fence(fence)[3]) if fence else 0)
    return gained and sum(source in today for source in sources) > 1


def _record(item: ev.Item) -> ItemRecord:
    return ItemRecord(
        item_id=item.item_id,
        title=item.title,
        category=tuple(item.category),
        brand=item.brand or "",
        price=item.price,
        currency=item.currency,
        description=item.description or "",
    )
