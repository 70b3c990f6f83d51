"""Items as the updater needs them: a vector and a category for every item key.

Vectors are looked for in the engine's table, then in Redis, and only then encoded: an item's
text is encoded once for all workers, and again only when it changes. It does not know events,
offsets or profiles' contents.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from model.catalogue_vectors import CatalogueVectors
from model.engine import Engine
from model.text import item_text, text_version
from profiles.arithmetic import Profiles
from profiles.items import ItemStore, Origin
from profiles.schema import CATEGORY_ENTRY, ItemRecord, key64

from . import metrics

log = logging.getLogger(__name__)

Floats = NDArray[np.float32]

# A shop has thousands of categories at most; a producer that makes them up must not fill memory.
_CATEGORIES_KEPT: Final = 100_000
# Items stored and encoded at a time. A batch that fails resumes after its last full chunk, and
# the other thread waits for the lock no longer than one takes.
_CHUNK: Final = 256
_FILLED_AT_ONCE: Final = 64
# How long after a swap this worker also indexes what others change: they may serve the release
# before for a while yet.
_COMPLETES_S: Final = 600.0


@dataclass(frozen=True)
class Resolved:
    """n items, in the order asked for."""

    vectors: Floats  # (n, D) unit rows; zeros where not found
    found: NDArray[np.bool_]  # (n,)
    categories: NDArray[np.uint64]  # (n,) category key, 0 = none
    told: list[int]  # items that got a text here, or may have before a failure: users wait for them


class _Held(NamedTuple):
    """What is known of an item beside its vector."""

    category: int  # category key, 0 = none
    version: str  # of the text that the vector in the table was made from


class _Shipped:
    """Vectors that came with the release and are not in Redis yet, as far as is known."""

    def __init__(self, shipped: CatalogueVectors) -> None:
        self._vectors = shipped.vectors
        ids, versions = map(key64, shipped.item_ids), shipped.versions
        self._row_of = {item: row for row, item in enumerate(zip(ids, versions, strict=True))}

    def take(self, wanted: Mapping[int, str]) -> dict[int, Floats]:
        """item key -> vector, of those shipped for this text version, which are not held any
        longer: they go into Redis."""
        found = {}
        for item in wanted.items():
            row = self._row_of.pop(item, None)
            if row is not None:
                found[item[0]] = self._vectors[row]
        if not self._row_of:
            self._vectors = self._vectors[:0]
        return found

    def discard(self, known: Mapping[int, str]) -> None:
        """Redis has these."""
        for item in known.items():
            self._row_of.pop(item, None)


class Catalogue:
    """Two threads of the updater ask it. The lock makes a change of the table one step: else an
    item read before another worker changed it could be put in after it was discarded."""

    def __init__(
        self, engine: Engine, store: ItemStore, shipped: CatalogueVectors | None = None
    ) -> None:
        """`shipped`: vectors of the engine's release, taken before any text is encoded."""
        self._engine = engine
        self._store = store
        self._shipped = _Shipped(shipped) if shipped is not None else None
        # By item key. More than the table has rows, so that an item is seldom forgotten here
        # while its vector is there; one that is counts as not found, and is fetched again.
        self._held: dict[int, _Held] = {}
        self._held_limit = 2 * engine.table.capacity
        self._category_names: dict[int, str] = {}
        self._changes = store.changes_end()
        self._lock = threading.RLock()
        self._completes_until_s = 0.0
        self._filled = store.beginnings

    @property
    def engine(self) -> Engine:
        """What its vectors come from."""
        return self._engine

    @property
    def space(self) -> int:
        """Of its vectors, as profiles name it."""
        return int(self._engine.space, 16)

    def fill(self, given_up: Callable[[], bool] = lambda: False, *, beside: bool = False) -> int:
        """Make every item that Redis knows findable in this engine's space, and warm the table:
        from Redis, else from the vectors that were shipped, else by encoding; the number of
        items. What is there already is not made again, so it may be repeated. `beside`: leave
        Redis and the processor half of the time to who serves meanwhile. Raises RedisUnavailable,
        WritesLost."""
        self._filled = self._store.beginnings
        self._store.keep_space(self._engine.space)
        count = 0
        for keys in self._store.item_pages():
            for start in range(0, len(keys), _FILLED_AT_ONCE):
                if given_up():
                    return count
                began_s = time.monotonic()
                count += self._complete(keys[start : start + _FILLED_AT_ONCE])
                if beside:
                    time.sleep(time.monotonic() - began_s)
        self._store.rely()  # most may be there because another worker put it there
        # A worker of the space before may go on for a while, and index what changes there alone.
        self._completes_until_s = time.monotonic() + _COMPLETES_S
        self.refresh()
        return count

    def refill(self) -> None:
        """Fill again, if what was filled may have been lost since. Raises RedisUnavailable,
        WritesLost."""
        while self._filled != self._store.beginnings:
            self.forget()
            self.fill(lambda: self._filled != self._store.beginnings)

    def _complete(self, keys: list[int]) -> int:
        """Index these items as their records stand; how many have a text."""
        with self._lock:
            records = self._store.records(keys)
            gone = [record.item_id for record, _ in records.values() if record.deleted]
            if gone:
                self._store.drop_vectors(self._engine.space, gone)
            there = {key: kept for key, kept in records.items() if not kept[0].deleted}
            return len(self._learn(there))

    def resolve(self, keys: Sequence[int], inline: Mapping[int, ItemRecord]) -> Resolved:
        """Vectors and categories of n items. `inline`: what events said of their items, used
        for those that the catalogue does not know, among `keys` or not. Raises RedisUnavailable."""
        # Before the vectors: an item forgotten in between is not found, rather than half known.
        held = [self._held.get(key) for key in keys]
        vectors, found = self._engine.table.lookup(keys)
        found &= np.fromiter((h is not None for h in held), np.bool_, len(keys))
        categories = np.fromiter((h.category if h else 0 for h in held), np.uint64, len(keys))
        missing = np.flatnonzero(~found).tolist()
        metrics.ITEM_HITS.inc(len(keys) - len(missing))
        metrics.ITEM_MISSES.inc(len(missing))
        vectors[missing] = 0.0
        new = dict.fromkeys(keys[i] for i in missing)
        new |= dict.fromkeys(key for key in inline if key not in self._held)
        fetched = self._fetch(list(new), inline) if new else {}
        for i in missing:
            if (got := fetched.get(keys[i])) is not None:
                (vectors[i], categories[i]), found[i] = got, True
        # Not only those fetched now: a batch that failed after its texts were stored finds them
        # known the second time, and those who wait for them have not been served.
        with_text = list(fetched.keys() | {key for key in inline if key in self._held})
        told = self._store.awaited(with_text)
        return Resolved(vectors, found, categories, sorted(told))

    def upsert(self, records: Sequence[ItemRecord], origin: Origin) -> list[int]:
        """Items of one slice of the items topic: store, encode what changed, index; the keys of
        those that have a text now. A record marked deleted takes its item out of the index; the
        text stays, for events that are late and windows that name it. A deletion also keeps out
        what later events say of the item; a later upsert brings it back. Raises
        RedisUnavailable; what was stored by then is not encoded again."""
        arrived: list[int] = []
        for start in range(0, len(records), _CHUNK):
            with self._lock:
                arrived += self._upsert(records[start : start + _CHUNK], origin)
        return arrived

    def refresh(self) -> None:
        """Drop cached vectors of items whose text changed on another worker."""
        with self._lock:
            self._changes, changed = self._store.changes_since(self._changes)
            # This worker's own changes come back here, and their vectors are the newest.
            stale = [
                key
                for key, version in changed.items()
                if (held := self._held.get(key)) is None or held.version != version
            ]
            self._engine.table.discard(stale)
            for key in stale:
                self._held.pop(key, None)
        if stale and time.monotonic() < self._completes_until_s:
            for start in range(0, len(stale), _CHUNK):
                self._complete(stale[start : start + _CHUNK])

    def forget(self) -> None:
        """Look everything up in Redis again, which may have lost what is remembered here, and put
        there what it lacks. Raises RedisUnavailable."""
        with self._lock:
            self._changes = self._store.changes_end()
            self._engine.table.discard(list(self._held))
            self._held.clear()
            self._category_names = {}

    def held(self, most: int) -> list[int]:
        """Up to so many of the items whose vectors are at hand, those met last."""
        with self._lock:
            return list(islice(reversed(self._held), most))

    def names_of(self, categories: Sequence[int]) -> dict[int, str]:
        """category key -> name, of those that profiles hold and any worker has met. Raises
        RedisUnavailable."""
        known = self._category_names
        names = {c: known[c] for c in categories if c in known}
        if len(names) < len(categories):
            fetched = self._store.category_names([c for c in categories if c not in names])
            self._remember_names(fetched)
            names |= fetched
        return names

    def _upsert(self, records: Sequence[ItemRecord], origin: Origin) -> list[int]:
        records = self._with_last_text(records)
        versions = [text_version(text_of(record)) for record in records]
        self._store.put(records, versions, [origin] * len(records))
        # Read back, because what is stored may be of a later offset: a replay, or a worker
        # that was stalled, must not bring an old text back.
        stored = self._store.records([key64(record.item_id) for record in records])
        gone = [record.item_id for record, _ in stored.values() if record.deleted]
        if gone:
            self._store.drop_vectors(self._engine.space, gone)
        there = {key: kept for key, kept in stored.items() if not kept[0].deleted}
        self._learn(there)
        metrics.ITEMS_STORED.inc(len(records))
        return list(there)

    def _with_last_text(self, records: Sequence[ItemRecord]) -> list[ItemRecord]:
        """Deletions name an item and nothing else: they get what was last known of it."""
        gone = [key64(record.item_id) for record in records if record.deleted]
        known = self._store.records(gone) if gone else {}
        return [
            replace(known[key][0], deleted=True)
            if record.deleted and (key := key64(record.item_id)) in known
            else record
            for record in records
        ]

    def _fetch(
        self, missing: list[int], inline: Mapping[int, ItemRecord]
    ) -> dict[int, tuple[Floats, int]]:
        """Bring missing items into the table; vector and category key of those that have a text."""
        fetched: dict[int, tuple[Floats, int]] = {}
        for start in range(0, len(missing), _CHUNK):
            chunk = missing[start : start + _CHUNK]
            with self._lock:
                records = self._store.records(chunk)
                new = {k: inline[k] for k in chunk if k not in records and k in inline}
                if new:
                    versions = [text_version(text_of(record)) for record in new.values()]
                    self._store.put(list(new.values()), versions, [None] * len(new))
                    # Another worker's may have been there first.
                    records |= self._store.records(list(new))
                vectors = self._learn(records)
            fetched |= {k: (v, _category(records[k][0])) for k, v in vectors.items()}
        return fetched

    def _learn(self, records: Mapping[int, tuple[ItemRecord, str]]) -> dict[int, Floats]:
        """Put items into the table, with vectors from Redis or, where it has none of this text
        and space, shipped or newly encoded; the vectors of those that have a text."""
        texts = {k: text for k, (r, _) in records.items() if (text := text_of(r))}
        ids = {k: records[k][0].item_id for k in texts}
        known = self._store.vectors(self._engine.space, {ids[k]: records[k][1] for k in texts})
        vectors = {k: known[ids[k]] for k in texts if ids[k] in known}
        fresh = [k for k in texts if k not in vectors]
        if self._shipped is not None:
            self._shipped.discard({k: records[k][1] for k in vectors})
            vectors |= self._shipped.take({k: records[k][1] for k in fresh})
        unknown = [k for k in fresh if k not in vectors]
        if unknown:
            encoded = self._engine.encode([texts[k] for k in unknown], "passage")
            vectors |= dict(zip(unknown, encoded, strict=True))
        # Who stores a vector puts it into the index, where a deleted item has no place.
        kept = [k for k in fresh if not records[k][0].deleted]
        if kept:
            self._store.put_vectors(
                self._engine.space,
                [ids[k] for k in kept],
                [records[k][1] for k in kept],
                np.stack([vectors[k] for k in kept]),
            )
        self._name_categories([record for record, _ in records.values()])
        if vectors:
            # The vector last: an item is known when it has both.
            self._hold({k: _Held(_category(records[k][0]), records[k][1]) for k in vectors})
            self._engine.table.put(list(vectors), np.stack(list(vectors.values())))
        return vectors

    def _hold(self, items: Mapping[int, _Held]) -> None:
        # An eighth at a time: a dictionary is slow to give up its oldest entry alone.
        while self._held and len(self._held) + len(items) > self._held_limit:
            for key in list(islice(self._held, max(1, self._held_limit // 8))):
                del self._held[key]
        self._held.update(items)

    def _name_categories(self, records: Sequence[ItemRecord]) -> None:
        names = {_category(record): name for record in records if (name := record.category_name)}
        known = self._category_names
        names = {category: name for category, name in names.items() if category not in known}
        self._store.name_categories(names)
        self._remember_names(names)

    def _remember_names(self, names: Mapping[int, str]) -> None:
        # Made anew, because the other thread may be reading it.
        kept = self._category_names if len(self._category_names) < _CATEGORIES_KEPT else {}
        if names:
            self._category_names = kept | dict(names)


def categories_of(profiles: Profiles, rows: Sequence[int]) -> list[int]:
    """The categories that some users' tallies hold, each once."""
    entries = np.frombuffer(
        b"".join([profiles.categories[row] for row in rows]), dtype=CATEGORY_ENTRY
    )
    found: list[int] = np.unique(entries["category"]).tolist()
    return found


def _category(record: ItemRecord) -> int:
    """The key of an item's category; 0 = none."""
    return key64(record.category_name) if record.category_name else 0


def text_of(record: ItemRecord) -> str:
    """What the encoder reads for an item; "" if nothing is known of it."""
    return item_text(record.title, record.category, record.brand, record.description)
