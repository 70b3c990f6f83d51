"""One turn of the learning loop: archive -> windows -> candidate -> gate -> release.

It knows where things are and in which order; labelling, training, judging and publishing are
others' work. What was begun and killed goes on where it was, and nothing is live before the gate
has said so: the pointer moves last.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import Any, Final

import numpy as np

from model import candidate as parts
from model import gate, trainer
from model.catalogue_vectors import CatalogueVectors
from model.comparison import Contender, compare
from model.encoder import TextEncoder
from model.errors import NothingToLearn
from model.gate import Bounds, Decision
from model.projection import Projection
from model.ranker import RANKER, load_weights, save_weights
from model.releases import (
    ENCODER,
    PROJECTION,
    Release,
    load_current,
    make_current,
    publish,
    record_decision,
)
from model.text import item_text, text_version
from model.trainer import Base, Candidate, Catalogue, TrainSettings
from model.transition import Transition, fit_transition
from model.windows import Labelled
from profiles.arithmetic import Floats
from profiles.items import ItemStore
from profiles.schema import EVENT_TYPES, ItemRecord

from .archive import Archive, archived, open_store
from .contributions import event_weights
from .labelling import Rules, label
from .ranker_cases import make_cases
from .ranker_learning import FittedRanker, fit_ranker
from .settings import Settings

# Files of a candidate that a release takes as they are.
_PARTS: Final = (parts.WINDOW, parts.HEADS_FILE, parts.ITEMS, parts.ITEM_IDS)
_DAY_MS: Final = 86_400_000

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Outcome:
    """What became of a turn."""

    windows: int
    parent: Release
    decision: Decision
    release: Release | None
    """The new live release; None where the gate rejected the candidate."""


@dataclass(frozen=True)
class _Texts:
    """The catalogue in words."""

    item_ids: list[str]
    texts: list[str]


def learn(settings: Settings, items: ItemStore, now: datetime, progress: Progress) -> Outcome:
    """Fine-tune on the archive and, if the gate accepts, make the result live.

    Raises NothingToLearn, UserError, RedisUnavailable and the errors of releases and training.
    """
    parent = load_current(settings.model.releases)
    catalogue = _catalogue(items)
    windows = labelled(settings, catalogue.item_ids)
    features = _features(settings, parent, catalogue.texts, progress)
    of_items = Catalogue(catalogue.item_ids, features)
    base = _base(parent)
    folder = settings.stream.data_dir / "training" / parent.id
    folder.mkdir(parents=True, exist_ok=True)
    tuned = TrainSettings(
        seed=settings.learn.seed,
        epochs=settings.learn.epochs,
        events=settings.learn.window,
        compatibility=settings.learn.compatibility,
        device=settings.model.device,
    )
    newest, older = _by_age(windows, settings.learn.newest_days)
    candidate = trainer.train(
        newest, of_items, base, EVENT_TYPES, folder, tuned, replay=older, progress=progress
    )
    current = base.vectors(of_items)
    transition = fit_transition(parent.space, "", current, candidate.vectors)
    ranker = _fit_ranker(settings, parent, windows, candidate)
    decision = _judge(settings, windows, base, current, candidate, transition)
    release = None
    if decision.accepted:
        release = _publish(parent, catalogue, candidate, decision, transition, ranker, now)
    about = gate.record(
        decision, release.id if release else str(folder), parent.id, now.isoformat()
    )
    record_decision(settings.model.releases, about)
    if release is not None:
        make_current(release, expected=parent.id, why="learned", now=now)
    shutil.rmtree(folder)
    return Outcome(len(windows), parent, decision, release)


def _by_age(windows: Labelled, days: float) -> tuple[Labelled, Labelled | None]:
    """What the newest days of events hold, and what is older, if anything is."""
    newest = windows.t_ms >= windows.t_ms.max(initial=0) - int(days * _DAY_MS)
    if newest.all():
        return windows, None
    return windows.take_events(newest), windows.take_events(~newest)


def labelled(settings: Settings, item_ids: Sequence[str]) -> Labelled:
    """The archive's windows. Raises NothingToLearn where there are none."""
    events = archived(Archive(open_store(settings.archive.url)).read())
    if not len(events):
        raise NothingToLearn(
            f"the archive {settings.archive.url} is empty: let `penchant trainer` fill it"
        )
    rules = Rules(
        event_weights(settings.profile.weights),
        purchase_ms=int(settings.learn.purchase_days * _DAY_MS),
        returns_ms=int(settings.learn.return_days * _DAY_MS),
        user_events=settings.archive.user_events,
    )
    rows = {item_id: row for row, item_id in enumerate(item_ids)}
    return label(events, rows, EVENT_TYPES, rules, int(events.t_ms.max()))


def _catalogue(items: ItemStore) -> _Texts:
    records = sorted(items.all_records(), key=lambda record: record.item_id)
    texts = {record.item_id: text for record in records if (text := _text(record))}
    if not texts:
        raise NothingToLearn("no item has a text: send the catalogue to the items topic first")
    return _Texts(list(texts), list(texts.values()))


def _text(record: ItemRecord) -> str:
    if record.deleted:
        return ""
    return item_text(record.title, record.category, record.brand, record.description)


def _features(
    settings: Settings, release: Release, texts: Sequence[str], progress: Progress
) -> Floats:
    """(n, W) unit rows of the release's tower. What was encoded once is kept beside other caches:
    texts seldom change, and a frozen tower never does."""
    versions = [text_version(text) for text in texts]
    file = settings.stream.data_dir / "features" / f"{release.base.replace('/', '_')[-80:]}.npz"
    known = _read_features(file, release.width)
    missing = {v: t for v, t in zip(versions, texts, strict=True) if v not in known}
    if missing:
        encoder = TextEncoder.from_pretrained(
            release.path / ENCODER,
            device=settings.model.device,
            dtype=settings.model.dtype,
            max_tokens=release.max_tokens,
            pooling=release.pooling,
            query_prefix=release.query_prefix,
            passage_prefix=release.passage_prefix,
        )
        wanted = list(missing.items())
        for begin in range(0, len(wanted), 256):
            part = wanted[begin : begin + 256]
            progress("encoding", begin, len(wanted))
            known |= dict(
                zip((v for v, _ in part), encoder.encode([t for _, t in part]), strict=True)
            )
        file.parent.mkdir(parents=True, exist_ok=True)
        np.savez(file, versions=np.array(list(known)), rows=np.stack(list(known.values())))
    return np.stack([known[version] for version in versions])


def _read_features(file: Path, width: int) -> dict[str, Floats]:
    try:
        with np.load(file) as kept:
            rows = kept["rows"]
            versions = kept["versions"].tolist()
    except (OSError, ValueError, KeyError, EOFError):
        return {}  # none yet, or cut off by a crash: encoded again
    return dict(zip(versions, rows, strict=True)) if rows.shape[1] == width else {}


def _base(parent: Release) -> Base:
    trained = set(_PARTS) <= set(parent.parts)
    earlier = Candidate.load(parent.path) if trained else None
    return Base(Projection.load(parent.path / PROJECTION), earlier)


def _judge(
    settings: Settings,
    windows: Labelled,
    base: Base,
    current: Floats,
    candidate: Candidate,
    transition: Transition,
) -> Decision:
    earlier = base.earlier
    live = Contender(current)
    if earlier is not None:
        live = replace(live, window=earlier.window, heads=earlier.heads)
    comparison = compare(
        windows,
        live,
        Contender.of(candidate),
        cut_ms=candidate.metrics["cut_ms"],
        item_events=candidate.counts,
        events=settings.learn.window,
        seed=settings.learn.seed,
        transition_cosine=transition.error.cosine,
    )
    return gate.decide(comparison, Bounds(margin=settings.learn.margin))


def _fit_ranker(
    settings: Settings, parent: Release, windows: Labelled, candidate: Candidate
) -> FittedRanker | None:
    """On windows that the candidate was not trained on, from the live release's ranker. None where
    neighbours are not kept: readers would lack the signal that it leans on."""
    if not settings.learn.neighbours:
        return None
    cases = make_cases(
        windows,
        candidate.vectors,
        settings.profile.half_lives_s,
        cut_ms=candidate.metrics["cut_ms"],
        window=settings.profile.window,
        seed=settings.learn.seed,
    )
    live = load_weights(parent.path / RANKER) if RANKER in parent.parts else None
    return fit_ranker(cases, live, settings.learn.margin, settings.learn.seed)


def _publish(
    parent: Release,
    catalogue: _Texts,
    candidate: Candidate,
    decision: Decision,
    transition: Transition,
    ranker: FittedRanker | None,
    now: datetime,
) -> Release:
    metrics: dict[str, Any] = {"training": candidate.metrics, "gate": dict(decision.figures)}
    parts = {name: candidate.path / name for name in _PARTS}
    if RANKER in parent.parts:
        parts[RANKER] = parent.path / RANKER
    if ranker is not None and ranker.figure.count:
        metrics["ranker"] = {"kept": ranker.weights is not None, **asdict(ranker.figure)}
        if ranker.weights is not None:
            parts[RANKER] = candidate.path / RANKER
            save_weights(ranker.weights, parts[RANKER])
    return publish(
        parent,
        candidate.projection,
        parts=parts,
        item_vectors=CatalogueVectors(
            catalogue.item_ids, [text_version(t) for t in catalogue.texts], candidate.vectors
        ),
        learned_items=True,
        transition=transition,
        metrics=metrics,
        now=now,
    )
