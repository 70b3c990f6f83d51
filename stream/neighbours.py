"""Co-visitation as a stream: pairs out of the updater to the pairs topic, and from there into the
tallies of items.

`PairSender` is the updater's: it is called between a fold and its save. `NeighbourFolder` reads the
topic in a consumer group of its own, in large micro-batches, because an item that comes often is
then loaded and saved once for many pairs; a second of delay harms nobody. Why each pair counts
once is told in `profiles/neighbours.py`.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Final, TypeVar

import numpy as np
from numpy.typing import NDArray

from profiles import neighbours
from profiles.arithmetic import EventColumns, Folded, Ints, Keys64, Profiles
from profiles.errors import WritesLost
from profiles.marks import Marks
from profiles.neighbour_store import NeighbourStore
from profiles.neighbours import Pairs, TallyLayout
from profiles.schema import Keys

from . import metrics
from .errors import UserError
from .intake import Intake, MicroBatch
from .producer import EventProducer
from .settings import Settings
from .topics import connect

log = logging.getLogger(__name__)

T = TypeVar("T")

TOPIC: Final = "pairs"
GROUP: Final = "neighbours"
_SAVE_ROUNDS: Final = 20
# A batch of pairs: gathered for so long, and of at most so many bytes (4 per token), about 15,000
# events' worth.
_GATHER_MS: Final = 1_000.0
_BATCH_RECORDS: Final = 16_384
_BATCH_TOKENS: Final = 2_000_000

Place = tuple[int, int]  # source, offset


@dataclass(frozen=True)
class Fold:
    """n users' profiles after a fold, and what it was made of."""

    users: Sequence[str]  # n
    before: Sequence[bytes]  # n windows before it
    profiles: Profiles
    events: EventColumns  # m
    folded: Folded


class PairSender:
    """Sends the pairs of a micro-batch. Several threads may use it, each for other lanes."""

    def __init__(self, settings: Settings, partitions: int) -> None:
        """`partitions`: how many the pairs topic has."""
        # Nothing times out by itself: a record given up while a later one of its origin went
        # through would be taken for a copy when it is sent again.
        config = settings.kafka.client_config() | {
            "message.timeout.ms": 0,
            "compression.type": "lz4",
        }
        self._producer = EventProducer(config, settings.namespace)
        self._partitions = partitions
        self._window = settings.profile.window

    def send(self, folds: Sequence[Fold], forwarded: Mapping[Place, Place]) -> None:
        """Return once the pairs of all that was folded are in the topic. `forwarded`: where events
        were read that count under the place they were forwarded from.

        Raises DeliveryFailed, FlushTimedOut; then nothing of the folds may be saved.
        """
        found = [self._pairs(fold, forwarded) for fold in folds]
        entries = np.concatenate([entries for entries, _ in found])
        origins = np.concatenate([origins for _, origins in found])
        sent = neighbours.records(entries, origins, self._partitions)
        for partition, value in sent:
            self._producer.send_bytes(TOPIC, None, value, partition=partition)
        if sent:
            self._producer.flush()
            metrics.PAIRS_SENT.inc(len(entries))

    def _pairs(self, fold: Fold, forwarded: Mapping[Place, Place]) -> tuple[NDArray[Any], Keys64]:
        """(p,) of PAIR_ENTRY and (p,) origins."""
        events, header, applied = fold.events, fold.profiles.header, fold.folded.applied
        # Somebody whose counter is what was counted now began now, or was forgotten on the way.
        counted = np.bincount(events.row[applied], minlength=len(header))
        began = header["events"] == counted
        entries, of = neighbours.arisen(fold.before, events, applied, began, self._window)
        lanes = np.array([neighbours.lane_of(user) for user in fold.users], np.uint64)
        sources = np.asarray(events.source, np.uint64)[of]
        if forwarded:
            places = zip(sources.tolist(), entries["offset"].tolist(), strict=True)
            read = [forwarded.get(place, place) for place in places]
            sources = np.array([source for source, _ in read], np.uint64)
            entries["offset"] = [offset for _, offset in read]
        return entries, neighbours.origins(sources, lanes[events.row[of]])


class NeighbourFolder:
    """Folds micro-batches of the pairs topic. One thread at a time."""

    def __init__(self, store: NeighbourStore, clock: Callable[[], float] = time.time) -> None:
        self._store = store
        self._clock = clock

    def fold(self, batch: MicroBatch) -> None:
        """Fold and save; may be repeated. Raises RedisUnavailable and what stored tallies raise."""
        values = [value for piece in batch.slices for value in piece.values]
        pairs, unreadable = neighbours.read_records(values)
        if unreadable:
            metrics.PAIRS_UNREADABLE.inc(unreadable)
            log.error("%d records of the pairs topic are of no known version", unreadable)
        items, rows = np.unique(pairs.entries["item"], return_inverse=True)
        for _ in range(_SAVE_ROUNDS):
            if not len(items):
                return
            tallies = self._store.load(items.tolist())
            folded = neighbours.fold(tallies, rows, pairs, self._store.layout)
            refused = self._store.save(items.tolist(), tallies, folded.touched, self._clock())
            metrics.PAIRS_REPLAYED.inc(folded.replayed)
            metrics.PAIRS_APPLIED.inc(folded.applied - int(np.isin(rows, refused).sum()))
            items, rows, pairs = _of_items(items, rows, pairs, refused)
        raise UserError(
            f"another writer kept overtaking this one on {len(items)} items: does a second "
            "updater write this NAMESPACE from other topics?"
        )


def _of_items(
    items: Keys64, rows: Ints, pairs: Pairs, chosen: Sequence[int]
) -> tuple[Keys64, Ints, Pairs]:
    """Only some of the items, which become rows 0, 1, …"""
    new_row = np.full(len(items), -1)
    new_row[list(chosen)] = np.arange(len(chosen))
    at = np.flatnonzero(new_row[rows] >= 0)
    kept = Pairs(pairs.entries[at], pairs.origin[at], pairs.record[at])
    return items[list(chosen)], new_row[rows[at]], kept


class NeighbourPart:
    """A worker's part in folding pairs: a consumer, a thread, a store of its own."""

    def __init__(
        self,
        settings: Settings,
        deliver: Callable[[MicroBatch], Any],
        on_failure: Callable[[BaseException], None],
        patience: Callable[[Callable[[], None]], None],
    ) -> None:
        """`deliver` takes the micro-batches to wherever `feed` is called with them; `patience`
        calls again what Redis was away for."""
        stream = settings.stream.model_copy(
            update={
                "batch_records": _BATCH_RECORDS,
                "batch_tokens": _BATCH_TOKENS,
                "batch_deadline_ms": _GATHER_MS,
            }
        )
        client, keys = settings.redis.connection().open(), Keys(settings.namespace)
        self._marks = Marks(client, keys, settings.redis.url)
        self.intake = Intake(
            settings.model_copy(update={"stream": stream}),
            [settings.topic(TOPIC)],
            deliver,
            on_failure,
            GROUP,
            metrics.PAIRS_GAUGES,
            self._marks,
        )
        self._folder = NeighbourFolder(
            NeighbourStore(
                client,
                keys,
                TallyLayout(half_life_s=settings.profile.half_lives_s[-1]),
                ttl_s=settings.profile.ttl_days * 86_400,
                writer=secrets.randbits(64),
                where=settings.redis.url,
                marks=self._marks,
            )
        )
        self._patience = patience
        self._thread = ThreadPoolExecutor(1, "neighbours")

    async def feed(self, batch: MicroBatch) -> None:
        """Fold one micro-batch, and let its offsets be committed."""
        begun = self.intake.begin(batch)
        try:
            await self._call(lambda: self._folder.fold(begun))
            await self._call(lambda: self._marks.advance(begun.ends()))
        except WritesLost as lost:
            log.error("%s: pairs are read again", lost)
            self._marks.begin_anew()
            self.intake.rewind()
            begun = MicroBatch(())
        self.intake.done(begun)

    async def _call(self, work: Callable[[], None]) -> None:
        await asyncio.wrap_future(self._thread.submit(self._patience, work))

    def close(self) -> None:
        """Take no more work."""
        self._thread.shutdown(wait=False)


def pairs_partitions(settings: Settings) -> int:
    """How many partitions the pairs topic has. Raises UserError where it is missing."""
    name = settings.topic(TOPIC)
    _, metadata = connect(settings.kafka)
    if name not in metadata.topics:
        raise UserError(f"no topic {name}: run `penchant topics create`")
    return len(metadata.topics[name].partitions)
