"""Releases that follow each other as a shop's do: a base, a first training, then fine-tunes.

Each is what the learning loop runs: `model.trainer.train` from the release before, on what came
since and a share of what is older; then `publish`, with the map from the space before. No gate:
what it would refuse can be measured, too. Knows no profile and no Redis.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Final

import numpy as np

from model.catalogue_vectors import CatalogueVectors
from model.projection import Projection
from model.releases import PROJECTION, Release, build_base, publish
from model.text import text_version
from model.trainer import Base, Candidate, Catalogue, TrainSettings, train
from model.transition import Transition, fit_transition
from profiles.arithmetic import Floats
from profiles.schema import EVENT_TYPES
from stream.datasets import Dataset
from stream.evaluation_data import Recorded, recorded, windows_of

DIMENSIONS: Final = 128
FIRST_SHARE: Final = 0.4
"""Of the stream, before the first training ends."""
LAST_SHARE: Final = 0.9
"""Of the stream, before the last fine-tune: what follows is there to look ahead."""


@dataclass(frozen=True)
class Shop:
    """A recorded stream, and the release that it begins with."""

    recorded: Recorded
    base: Release
    features: Floats  # (n, W) unit rows of the tower

    @property
    def catalogue(self) -> Catalogue:
        """What training reads of it."""
        return Catalogue(self.recorded.item_ids, self.features)


@dataclass(frozen=True)
class Tuned:
    """A release, and how it came about."""

    release: Release
    candidate: Candidate
    transition: Transition  # from the release before
    before: Floats  # (n, D) item vectors of the release before
    events: int  # of the stream, that were seen by then
    seconds: float  # of training


def open_shop(data: Dataset, folder: Path) -> Shop:
    """Build the base release of a recorded set in `folder`/releases."""
    found = recorded(data)
    base = build_base(
        folder / "releases", "bundled", found.texts, DIMENSIONS, device="cpu", now=datetime.now(UTC)
    )
    encoder = base.load_encoder(device="cpu", projected=False)
    return Shop(found, base, encoder.encode(found.texts))


def borders(shop: Shop, swaps: int) -> list[int]:
    """Events seen by the first training and by each of `swaps` fine-tunes."""
    total = len(shop.recorded.events)
    return [int(share * total) for share in np.linspace(FIRST_SHARE, LAST_SHARE, swaps + 1)]


def fine_tune(
    shop: Shop,
    folder: Path,
    ends: Sequence[int],
    settings: TrainSettings,
    after: Tuned | None = None,
) -> Iterator[Tuned]:
    """One release for each of `ends`, events of the stream that it has seen; the first from
    `after`, or from the base release."""
    parent = after.release if after else shop.base
    earlier = after.candidate if after else None
    begin = after.events if after else 0
    for end in ends:
        base = Base(Projection.load(parent.path / PROJECTION), earlier)
        before = base.vectors(shop.catalogue)
        seen = shop.recorded.events.take(np.arange(end))
        windows = windows_of(shop.recorded, seen)
        newest = windows.t_ms >= seen.t_ms[begin]
        began_s = time.perf_counter()
        candidate = train(
            windows.take_events(newest),
            shop.catalogue,
            base,
            EVENT_TYPES,
            folder / f"{parent.id}-{end}",
            settings,
            replay=None if newest.all() else windows.take_events(~newest),
        )
        seconds = time.perf_counter() - began_s
        transition = fit_transition(parent.space, "", before, candidate.vectors)
        release = _publish(shop, parent, candidate, transition)
        yield Tuned(release, candidate, transition, before, end, seconds)
        parent, earlier, begin = release, candidate, end


def _publish(shop: Shop, parent: Release, candidate: Candidate, transition: Transition) -> Release:
    return publish(
        parent,
        candidate.projection,
        item_vectors=CatalogueVectors(
            shop.recorded.item_ids,
            [text_version(text) for text in shop.recorded.texts],
            candidate.vectors,
        ),
        learned_items=True,
        transition=transition,
        now=datetime.now(UTC),
    )
