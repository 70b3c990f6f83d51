"""What a turn of the learning loop learns from, as it was when the turn began.

Events keep arriving. A training that was killed could not go on where it was if it were given
others, so windows and catalogue are put down at the start, and taken up again for a day, as long
as release, labelling and erasures are the same. Shoppers have no names in it.

Knows the archive, the catalogue and files; knows no training.
"""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, fields, replace
from datetime import datetime
from functools import cached_property
from pathlib import Path
from typing import Any, Final
from zipfile import BadZipFile

import numpy as np
import pyarrow as pa

from model.catalogue_vectors import CatalogueVectors
from model.errors import NothingToLearn
from model.releases import Release
from model.text import text_version
from model.windows import Labelled
from profiles.arithmetic import Floats
from profiles.items import ItemStore
from profiles.schema import EVENT_TYPES, key64

from .archive import LEARNED, Archive, archived, open_store
from .catalogue import text_of
from .contributions import event_weights
from .features import features_of
from .labelling import Archived, Rules, label
from .settings import LearnSettings, Settings
from .times import DAY_MS

log = logging.getLogger(__name__)

_VERSION: Final = 1  # of the files below
_MANIFEST: Final = "material.json"  # written last: where it is, the others are whole
_WINDOWS: Final = "windows.npz"
_FEATURES: Final = "features.npy"
_CATALOGUE: Final = "catalogue.json"
Progress = Callable[[int, int], None]

KEPT_S: Final = 86_400
"""Older material is not taken up again: what came since is worth more than part of a training."""


@dataclass(frozen=True)
class Material:
    """Row i of everything about items is item i."""

    windows: Labelled
    item_ids: list[str]
    texts: list[str]
    categories: list[str]  # the highest, "" without
    features: Floats  # (n, W) unit rows of the release's tower

    @cached_property
    def kept(self) -> Labelled:
        """What networks learn from and are judged on: the windows as profiles keep them."""
        return self.windows.as_kept()

    def vectors(self, rows: Floats) -> CatalogueVectors:
        """Rows (n, D) as a release ships them."""
        return CatalogueVectors(self.item_ids, [text_version(t) for t in self.texts], rows)


def gather(
    settings: Settings,
    items: ItemStore,
    parent: Release,
    folder: Path,
    now: datetime,
    progress: Progress,
) -> Material:
    """What lies in `folder`, if it is still good; else anew, and `folder` then holds that alone.

    Raises NothingToLearn, UserError, RedisUnavailable and the errors of encoders.
    """
    archive = Archive(open_store(settings.archive.url))
    about = {"made of": _recipe(settings, parent), "erased": _erasures(archive)}
    kept = _manifest(folder)
    age_s = (now - datetime.fromisoformat(kept["at"])).total_seconds() if kept else -1.0
    if kept and kept["about"] == about and 0 <= age_s <= KEPT_S:
        # What a crash of the machine cut short is gathered anew.
        with suppress(OSError, EOFError, KeyError, TypeError, ValueError, BadZipFile):
            return load(folder)
    shutil.rmtree(folder, ignore_errors=True)
    item_ids, texts, categories = _catalogue(items)
    windows = _nameless(labelled(settings, item_ids, archive, now))
    folder.mkdir(parents=True)
    _save_windows(windows, folder / _WINDOWS)
    del windows  # and then they come from there
    features = features_of(
        parent, texts, settings.model, settings.stream.data_dir / "features", progress
    )
    np.save(folder / _FEATURES, features)
    _write_json(
        folder / _CATALOGUE, {"item_ids": item_ids, "texts": texts, "categories": categories}
    )
    _write_json(folder / _MANIFEST, {"at": now.isoformat(), "about": about})
    return load(folder)


def load(folder: Path) -> Material:
    """What `gather` put down there."""
    with (folder / _WINDOWS).open("rb") as stream, np.load(stream) as kept:
        columns = dict(kept)
    user = columns.pop("user").tolist()
    catalogue = json.loads((folder / _CATALOGUE).read_text(encoding="utf-8"))
    return Material(
        Labelled(user=user, **columns), features=np.load(folder / _FEATURES), **catalogue
    )


def labelled(
    settings: Settings, item_ids: Sequence[str], archive: Archive, now: datetime
) -> Labelled:
    """The archive's windows, without events of wrong clocks, which `now` tells. Raises
    NothingToLearn where there are none."""
    end_ms = int((now.timestamp() + settings.stream.max_ahead_s) * 1000) + 1
    part = _part(settings.learn, archive, end_ms, now.isoformat())
    tables = archive.read(end_ms=end_ms, columns=LEARNED)
    events = archived(map(part.of, tables))
    if not len(events):
        raise NothingToLearn(
            f"the archive {settings.archive.url} is empty: let `penchant trainer` fill it"
        )
    rules = Rules(
        event_weights(settings.profile.weights),
        purchase_ms=int(settings.learn.purchase_days * DAY_MS),
        returns_ms=int(settings.learn.return_days * DAY_MS),
        user_events=settings.archive.user_events,
    )
    rows = {item_id: row for row, item_id in enumerate(item_ids)}
    return label(events, rows, EVENT_TYPES, rules, _reached_ms(events, archive))


_OLDER_SHARE: Final = 0.25  # of what is read, kept for events that are older than the newest days


@dataclass(frozen=True)
class _Part:
    """Some shoppers, by a hash, with all their newest events; of fewer the older ones, too. So
    no label of what is taken lacks the events that it is made of."""

    newest: float  # shares of the shoppers
    older: float
    from_ms: int  # where the newest days begin
    drawn: str

    def of(self, table: pa.Table) -> pa.Table:
        """The rows of these shoppers."""
        if min(self.newest, self.older) >= 1:
            return table
        user = table["user"].combine_chunks().dictionary_encode()
        names = user.dictionary.to_pylist()
        place = np.array([key64(f"{self.drawn} {name}") for name in names], np.float64) / 2.0**64
        share = np.where(table["t_ms"].to_numpy() >= self.from_ms, self.newest, self.older)
        return table.filter(place[user.indices.to_numpy()] < share)


def _part(learn: LearnSettings, archive: Archive, end_ms: int, drawn: str) -> _Part:
    """What of the archive `LEARN_MOST_EVENTS` allows to be read."""
    rows = {s: count for s, count in archive.rows().items() if count and s.start_ms < end_ms}
    latest_ms = max((segment.end_ms for segment in rows), default=0)
    from_ms = latest_ms - int(learn.newest_days * DAY_MS)
    newest = sum(count for segment, count in rows.items() if segment.end_ms > from_ms)
    older = sum(rows.values()) - newest
    if newest + older <= learn.most_events:
        return _Part(1.0, 1.0, from_ms, drawn)
    room = learn.most_events
    share = min(1.0, room * (1 - _OLDER_SHARE if older else 1) / max(newest, 1))
    share_older = min(share, (room - share * newest) / max(older, 1))
    log.warning(
        "of %d events LEARN_MOST_EVENTS lets %d be read: the newest %g days of %.1f%% of the "
        "shoppers, and what is older of %.1f%%",
        newest + older, room, learn.newest_days, 100 * share, 100 * share_older,
    )  # fmt: skip
    return _Part(share, share_older, from_ms, drawn)


def _reached_ms(events: Archived, archive: Archive) -> dict[int, int]:
    """See `label`. What is read of a partition tells how far it is, too; more lately where it is
    busy, and alone before a trainer has put anything down."""
    sources, at = np.unique(events.source, return_inverse=True)
    latest_ms = np.zeros(len(sources), np.int64)
    np.maximum.at(latest_ms, at, events.t_ms)
    seen = dict(zip(sources.tolist(), latest_ms.tolist(), strict=True))
    noted = archive.reached()
    return {source: max(noted.get(source, 0), seen.get(source, 0)) for source in noted or seen}


def _catalogue(items: ItemStore) -> tuple[list[str], list[str], list[str]]:
    """Ids, texts and highest categories of the items that can be read."""
    records = sorted(items.all_records(), key=lambda record: record.item_id)
    kept = [r for r in records if not r.deleted and text_of(r)]
    if not kept:
        raise NothingToLearn("no item has a text: send the catalogue to the items topic first")
    return (
        [r.item_id for r in kept],
        [text_of(r) for r in kept],
        [r.category[0] if r.category else "" for r in kept],
    )


def _recipe(settings: Settings, parent: Release) -> dict[str, Any]:
    """All that decides what is made of the same events and items."""
    learn = settings.learn
    return {
        "version": _VERSION,
        "release": parent.id,
        "archive": settings.archive.url,
        "user_events": settings.archive.user_events,
        "weights": event_weights(settings.profile.weights),
        "days": [learn.purchase_days, learn.return_days],
        "most_events": [learn.most_events, learn.newest_days],
        "tower": [learn.tower, learn.tower_layers],
    }


def _erasures(archive: Archive) -> str:
    """Who asked to be forgotten must not be learned from because a turn was killed."""
    names = sorted(name for name in archive.store.sizes() if name.startswith("receipts/"))
    return hashlib.sha256("\n".join(names).encode()).hexdigest()


def _nameless(windows: Labelled) -> Labelled:
    names = [hashlib.blake2b(user.encode(), digest_size=8).hexdigest() for user in windows.user]
    return replace(windows, user=names, rating=None, label=None)


def _save_windows(windows: Labelled, file: Path) -> None:
    columns = {f.name: getattr(windows, f.name) for f in fields(windows)}
    kept: dict[str, Any] = {name: np.asarray(c) for name, c in columns.items() if c is not None}
    np.savez(file, **kept)


def _manifest(folder: Path) -> dict[str, Any] | None:
    try:
        found: dict[str, Any] = json.loads((folder / _MANIFEST).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return found


def _write_json(file: Path, value: Any) -> None:
    draft = file.with_suffix(".draft")
    draft.write_text(json.dumps(value, ensure_ascii=False), encoding="utf-8")
    draft.replace(file)
