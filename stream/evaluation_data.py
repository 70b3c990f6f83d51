"""Recorded sets as columns of numbers, and a vector for every item: what an evaluation is run on.

Knows data sets, event weights, releases and where vectors are kept. Knows no scorer and no
metric.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Final

import numpy as np

from model.evaluate import Floats
from model.prequential import NO_ITEM, Events
from model.projection import Projection
from model.text import text_version
from model.windows import Labelled
from profiles.arithmetic import FORGET
from profiles.schema import EVENT_TYPES

from .base_release import texts_of
from .contributions import columns, event_weights
from .datasets import Dataset, load
from .labelling import NEUTRAL_RATING, RATING_SPAN, Archived, Rules, label
from .settings import ModelSettings

if TYPE_CHECKING:
    from model.releases import Release

_FOLDER: Final = "evaluation"
_TEXTS_AT_ONCE: Final = 512


@dataclass(frozen=True)
class Recorded:
    """A data set over a catalogue: row i of everything about items is item i."""

    name: str
    events: Events
    user_ids: list[str]
    item_ids: list[str]
    texts: list[str]  # "" for an item that the catalogue does not describe
    only_order: bool = False
    """The times are made up."""

    @property
    def type_names(self) -> tuple[str, ...]:
        """Names of the event types, by their number in `events.type`."""
        return EVENT_TYPES


def loaded(
    dataset: str,
    path: Sequence[Path] | None,
    mapping: Mapping[str, str] | None = None,
    *,
    event_type: str = "",
    utc_offset: str = "",
) -> Recorded:
    """A set by the name it has on the command line, as `datasets.load` reads it and with its
    errors."""
    data = recorded(
        load(dataset, path, mapping, event_type=event_type or None, utc_offset=utc_offset or None)
    )
    if dataset != "amazon":
        return data
    name = path[0].stem.removesuffix("_events") if path else dataset
    return replace(data, name=name, only_order=True)


def recorded(data: Dataset) -> Recorded:
    """All events of a set, in event-time order, with the default weights.

    The catalogue is the set's items, and after them the items that only events name.
    """
    items = list(data.items)
    row_of = {item.item_id: row for row, item in enumerate(items)}
    texts = texts_of(items)
    taken = columns(list(data.events), event_weights({}), currency="")
    rows = [row_of.setdefault(i, len(row_of)) if i else NO_ITEM for i in taken.item_id]
    kind = np.asarray(taken.type, dtype=np.uint8)
    events = Events(
        np.asarray(taken.row, dtype=np.int64),
        np.asarray(rows, dtype=np.int32),
        kind,
        np.asarray(taken.t_ms, dtype=np.int64),
        np.asarray(taken.weight, dtype=np.float32),
    )
    return Recorded(
        name=data.name,
        events=events.take(kind != FORGET),
        user_ids=list(taken.users),
        item_ids=list(row_of),
        texts=texts + [""] * (len(row_of) - len(texts)),
    )


def windows_of(data: Recorded, events: Events, user_events: int = 2_000) -> Labelled:
    """Some of a set's events as labelled windows, by the rules of the learning loop: of each user
    the newest `user_events`. A review's rating is found again in its weight.
    """
    weights = event_weights({})
    review = EVENT_TYPES.index("review")
    rating = np.full(len(events), np.nan, dtype=np.float32)
    reviews = events.type == review
    rating[reviews] = NEUTRAL_RATING + RATING_SPAN * events.weight[reviews] / weights["review"]
    archived = Archived(
        users=data.user_ids,
        item_ids=data.item_ids,
        user=events.user.astype(np.int32),
        item=events.item,
        type=events.type,
        t_ms=events.t_ms,
        event=np.zeros(len(events), dtype=np.uint64),
        rating=rating,
        label=np.full(len(events), "", dtype=object),
        source=np.zeros(len(events), dtype=np.uint64),
        offset=np.arange(len(events)),
    )
    rows = {item_id: row for row, item_id in enumerate(data.item_ids)}
    now_ms = int(events.t_ms.max(initial=0))
    rules = Rules(weights, user_events=user_events)
    return label(archived, rows, EVENT_TYPES, rules, {0: now_ms})


@dataclass(frozen=True)
class Encoded:
    """n texts through the base release that is fitted on them; zeros for an item without text."""

    features: Floats  # (n, W) unit rows of the text tower
    vectors: Floats  # (n, D) unit rows, projected
    projection: Projection


def encoded(
    texts: Sequence[str],
    model: ModelSettings,
    data_dir: Path,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Encoded:
    """Texts as vectors. Kept under `data_dir`, so that the next run does not encode again.

    Raises what `model.releases.build_base` raises.
    """
    import torch  # two seconds

    from model.releases import PROJECTION, build_base

    torch.set_num_threads(model.threads or max(1, (os.cpu_count() or 2) - 1))
    folder = data_dir / _FOLDER
    release = build_base(
        folder / "releases",
        model.base,
        list(texts),
        model.dimensions,
        pooling=model.pooling,
        query_prefix=model.query_prefix,
        passage_prefix=model.passage_prefix,
        max_tokens=model.max_tokens,
        device=model.device,
        now=datetime.now(UTC),
        progress=progress,
    )
    named = "".join(map(text_version, texts))
    digest = hashlib.sha256(f"{release.space}{named}".encode()).hexdigest()[:16]
    file = folder / f"features-{digest}.npy"
    features = np.load(file) if file.exists() else _features(texts, release, model, progress)
    if not file.exists():
        draft = file.with_suffix(".draft")
        with draft.open("wb") as out:
            np.save(out, features)
        draft.replace(file)
    projection = Projection.load(release.path / PROJECTION)
    vectors = projection.apply(features)
    vectors[~features.any(axis=1)] = 0.0
    return Encoded(features, vectors, projection)


def _features(
    texts: Sequence[str],
    release: Release,
    model: ModelSettings,
    progress: Callable[[int, int], None],
) -> Floats:
    encoder = release.load_encoder(device=model.device, dtype=model.dtype, projected=False)
    described = [row for row, text in enumerate(texts) if text.strip()]
    features = np.zeros((len(texts), release.width), dtype=np.float32)
    for first in range(0, len(described), _TEXTS_AT_ONCE):
        rows = described[first : first + _TEXTS_AT_ONCE]
        features[rows] = encoder.encode([texts[row] for row in rows])
        progress(first + len(rows), len(described))
    return features
