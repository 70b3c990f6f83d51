"""Items as the updater needs them: a vector and a category for every item key.

Vectors are looked for in the engine's table, then in Redis, and only then encoded: an item's
text is encoded once for all workers, and again only when it changes. It does not know events,
offsets or profiles' contents.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Final

import numpy as np
from numpy.typing import NDArray

from model.engine import Engine
from model.text import item_text, text_version
from profiles.items import ItemStore, Origin
from profiles.schema import ItemRecord, key64

from . import metrics

log = logging.getLogger(__name__)

Floats = NDArray[np.float32]

# Item ids whose key is remembered. A SHA-256 costs 0.7 us, a dict look-up 0.05.
_KEYS_KEPT: Final = 2_000_000


@dataclass(frozen=True)
class Resolved:
    """n items, in the order asked for."""

    vectors: Floats  # (n, D) unit rows; zeros where not found
    found: NDArray[np.bool_]  # (n,)
    categories: NDArray[np.uint64]  # (n,) category key, 0 = none
    told: list[int]  # items whose text was not known before, and came inline


class Catalogue:
    """Two threads of the updater ask it. The lock makes a change of the table one step: else an
    item read before another worker changed it could be put in after it was discarded."""

    def __init__(self, engine: Engine, store: ItemStore) -> None:
        self._engine = engine
        self._store = store
        self._keys: dict[str, int] = {}
        self._category_of: dict[int, int] = {}  # item key -> category key
        self._category_names: dict[int, str] = {}
        self._changes = store.changes_end()
        self._lock = threading.RLock()

    @property
    def category_names(self) -> Mapping[int, str]:
        """The names of all categories met so far."""
        return self._category_names

    def keys_of(self, item_ids: Sequence[str]) -> list[int]:
        """Item ids -> item keys."""
        known = self._keys
        keys = []
        for item_id in item_ids:
            key = known.get(item_id)
            if key is None:
                if len(known) >= _KEYS_KEPT:
                    known.clear()
                key = known[item_id] = key64(item_id)
            keys.append(key)
        return keys

    def resolve(self, keys: Sequence[int], inline: Mapping[int, ItemRecord]) -> Resolved:
        """Vectors and categories of n items. `inline`: what events said of their items, used
        for those that the catalogue does not know. Raises RedisUnavailable."""
        vectors, found = self._engine.table.lookup(keys)
        told: list[int] = []
        missing = np.flatnonzero(~found).tolist()
        if missing:
            with self._lock:
                fetched, told = self._fetch(list({keys[i]: None for i in missing}), inline)
            for i in missing:
                if (vector := fetched.get(keys[i])) is not None:
                    vectors[i], found[i] = vector, True
        metrics.ITEM_HITS.set(self._engine.table.hits)
        metrics.ITEM_MISSES.set(self._engine.table.misses)
        categories = np.fromiter((self._category_of.get(k, 0) for k in keys), np.uint64, len(keys))
        return Resolved(vectors, found, categories, told)

    def upsert(self, records: Sequence[ItemRecord], origin: Origin) -> list[int]:
        """Items of one slice of the items topic: store, encode what changed, index; the keys of
        those that have a text now. A record marked deleted takes its item out of the index; the
        text stays, for events that are late and windows that name it. Raises RedisUnavailable."""
        with self._lock:
            records = self._with_last_text(records)
            versions = [text_version(_text(record)) for record in records]
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

    def refresh(self) -> None:
        """Drop cached vectors of items whose text changed on another worker."""
        with self._lock:
            self._changes, changed = self._store.changes_since(self._changes)
            self._engine.table.discard(changed)

    def name_unknown(self, categories: Sequence[int]) -> None:
        """Learn the names of categories that profiles hold and this worker has not met."""
        unknown = [c for c in categories if c not in self._category_names]
        if unknown:
            self._category_names |= self._store.category_names(unknown)

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
    ) -> tuple[dict[int, Floats], list[int]]:
        """Bring missing items into the table: their vectors, and those that `inline` told."""
        records = self._store.records(missing)
        new = {k: inline[k] for k in missing if k not in records and k in inline}
        if new:
            versions = [text_version(_text(record)) for record in new.values()]
            self._store.put(list(new.values()), versions, [None] * len(new))
            records |= self._store.records(list(new))  # another worker's may have been there first
        return self._learn(records), list(new)

    def _learn(self, records: Mapping[int, tuple[ItemRecord, str]]) -> dict[int, Floats]:
        """Put items into the table, with vectors from Redis or, where it has none of this text
        and space, newly encoded; the vectors of those that have a text."""
        texts = {k: text for k, (r, _) in records.items() if (text := _text(r))}
        ids = {k: records[k][0].item_id for k in texts}
        known = self._store.vectors(self._engine.space, {ids[k]: records[k][1] for k in texts})
        vectors = {k: known[ids[k]] for k in texts if ids[k] in known}
        fresh = [k for k in texts if k not in vectors]
        if fresh:
            encoded = self._engine.encode([texts[k] for k in fresh], "passage")
            vectors |= dict(zip(fresh, encoded, strict=True))
        # Who stores a vector puts it into the index, where a deleted item has no place.
        kept = [k for k in fresh if not records[k][0].deleted]
        if kept:
            self._store.put_vectors(
                self._engine.space,
                [ids[k] for k in kept],
                [records[k][1] for k in kept],
                np.stack([vectors[k] for k in kept]),
            )
        self._name_categories(records)
        if vectors:
            self._engine.table.put(list(vectors), np.stack(list(vectors.values())))
        return vectors

    def _name_categories(self, records: Mapping[int, tuple[ItemRecord, str]]) -> None:
        names = {}
        for key, (record, _) in records.items():
            name = record.category_name
            category = key64(name) if name else 0
            self._category_of[key] = category
            if name and category not in self._category_names:
                names[category] = name
        self._store.name_categories(names)
        self._category_names |= names


def _text(record: ItemRecord) -> str:
    """What the encoder reads for an item; "" if nothing is known of it."""
    return item_text(record.title, record.category, record.brand, record.description)
