"""One turn of the learning loop: archive -> windows -> candidate -> gate -> release.

It knows where things are and in which order; labelling, training, judging and publishing are
others' work. What was begun and killed goes on where it was, and nothing is live before the gate
has said so: the pointer moves, and then the verdict is noted.
"""

from __future__ import annotations

import errno
import fcntl
import logging
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import Any, Final

from model import gate, trainer
from model.candidate import ENCODER, ITEM_IDS, ITEMS
from model.comparison import Contender, compare, weight_norms
from model.errors import ReleaseOvertaken, ReleaseUnwritable, WeightsUnavailable
from model.foreteller import Foreteller
from model.gate import Accept, Bounds, Comparison, Decision, Figure
from model.heads import HEADS_FILE
from model.item_slices import item_slices
from model.peers import peers
from model.projection import Projection
from model.ranker import RANKER, Weights, first_weights, load_weights, save_weights
from model.releases import (
    PROJECTION,
    Hold,
    Release,
    decisions,
    held,
    load_current,
    make_current,
    prune,
    publish,
    record_decision,
)
from model.tower_tuning import TunableTower
from model.trainer import Base, Candidate, Catalogue, TrainSettings
from model.training_rows import stopping
from model.transition import Transition, fit_transition
from model.window_encoder import WINDOW
from model.windows import Labelled
from profiles.items import ItemStore
from profiles.schema import EVENT_TYPES

from . import learning_material
from .errors import UserError
from .learning_material import Material, gather
from .ranker_cases import Timed, make_cases, of_release
from .ranker_learning import FittedRanker, compare_scores, fit_ranker, fitted_until
from .settings import LearnSettings, Settings
from .times import DAY_MS

log = logging.getLogger(__name__)

# Files of a candidate that a release takes as they are.
_PARTS: Final = (WINDOW, HEADS_FILE, ITEMS, ITEM_IDS)
_LOCK: Final = ".lock"
_NO_ROOM: Final = (
    errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM,
)  # fmt: skip

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Outcome:
    """What became of a turn."""

    windows: int
    parent: Release
    decision: Decision
    verdict: str
    """Its id, by which `penchant releases show` opens it."""
    release: Release | None
    """The new live release; None where the gate rejected the candidate, or releases are on hold."""
    hold: Hold | None = None
    """What kept a candidate that the gate accepted from going live."""


def learn(
    settings: Settings, items: ItemStore, now: datetime, progress: Progress
) -> Outcome | None:
    """Fine-tune on the archive and, if the gate accepts, make the result live. None for a process
    that only helped another one to train (`LEARN_DISTRIBUTED`).

    Raises NothingToLearn, UserError, RedisUnavailable and the errors of releases and training.
    """
    training = settings.stream.data_dir / "training"
    company = peers(settings.learn.distributed)
    if not company.first:
        company.wait()
        parent = load_current(settings.model.releases)
        material = learning_material.load(training / parent.id)
        _train(settings, parent, material, training / parent.id, progress)
        return None
    with _room(settings.stream.data_dir), _alone(training):
        _note_verdict(settings.model.releases)
        parent = load_current(settings.model.releases)
        folder = training / parent.id
        _clear(training, but=folder)
        material = gather(
            settings, items, parent, folder, now, lambda done, of: progress("encoding", done, of)
        )
        company.wait()
        candidate = _train(settings, parent, material, folder, progress)
        outcome = _decide(settings, parent, material, candidate, now)
        shutil.rmtree(folder)
    return outcome


def _train(
    settings: Settings, parent: Release, material: Material, folder: Path, progress: Progress
) -> Candidate:
    learn, how = settings.learn, _train_settings(settings)
    if (done := _trained(folder, how)) is not None:
        return done
    newest, older = _by_age(material.kept, learn.newest_days)
    tower = None
    if learn.tower != "frozen":
        tower = TunableTower(
            parent.path / ENCODER,
            material.texts,
            learn.tower,
            last_layers=learn.tower_layers,
            max_tokens=parent.max_tokens,
            pooling=parent.pooling,
            passage_prefix=parent.passage_prefix,
            device=settings.model.device,
        )
    return trainer.train(
        newest,
        Catalogue(material.item_ids, material.features),
        _base(parent),
        EVENT_TYPES,
        folder,
        how,
        replay=older,
        tower=tower,
        tensorboard=Path(learn.tensorboard) / parent.id if learn.tensorboard else None,
        progress=progress,
    )


def _trained(folder: Path, how: TrainSettings) -> Candidate | None:
    """What a turn that was killed after its training left."""
    try:
        found = Candidate.load(folder)
    except WeightsUnavailable:
        return None
    return found if found.metrics.get("settings") == asdict(how) else None


def _train_settings(settings: Settings) -> TrainSettings:
    learn = settings.learn
    return TrainSettings(
        seed=learn.seed,
        epochs=learn.epochs,
        events=_window_events(settings),
        accumulate=learn.accumulate,
        learning_rate=learn.rate,
        hard_negatives=learn.hard_negatives,
        compatibility=learn.compatibility,
        device=settings.model.device,
        distributed=learn.distributed,
    )


def _window_events(settings: Settings) -> int:
    """More events than a profile keeps would be learned from and never be there."""
    return min(settings.learn.window, settings.profile.window)


def _by_age(windows: Labelled, days: float) -> tuple[Labelled, Labelled | None]:
    """What the newest days of events hold, and what is older, if anything is."""
    newest = windows.t_ms >= windows.t_ms.max(initial=0) - int(days * DAY_MS)
    if newest.all():
        return windows, None
    return windows.take_events(newest), windows.take_events(~newest)


def _base(parent: Release) -> Base:
    trained = set(_PARTS) <= set(parent.parts)
    earlier = Candidate.load(parent.path) if trained else None
    return Base(Projection.load(parent.path / PROJECTION), earlier)


def _decide(
    settings: Settings, parent: Release, material: Material, candidate: Candidate, now: datetime
) -> Outcome:
    base = _base(parent)
    live = _contender(base, Catalogue(material.item_ids, material.features))
    transition = fit_transition(parent.space, "", live.vectors, candidate.vectors)
    comparison = _compare(settings, material, base, live, candidate, transition)
    ranker = None
    if settings.learn.neighbours:  # else readers would lack the signal that a ranker leans on
        ranker, served = _fit_ranker(settings, parent, material.windows, live, candidate)
        comparison = replace(comparison, served=(*comparison.served, served))
    decision = gate.decide(comparison, _bounds(settings.learn))
    hold = held(settings.model.releases) if decision.accepted else None
    release = None
    if decision.accepted and hold is None:
        release = _publish(settings, parent, material, candidate, decision, transition, ranker, now)
    about = gate.record(decision, release.id if release else "", parent.id, now.isoformat())
    if hold is not None:
        about |= {"decision": "held", "reasons": [f"on hold since {hold.at}: {hold.why}"]}
    if release is not None:
        try:
            make_current(release, expected=parent.id, why="learned", now=now)
        except ReleaseOvertaken as error:
            about |= {"decision": "overtaken", "reasons": [str(error)]}
            record_decision(settings.model.releases, about)
            shutil.rmtree(candidate.path)
            raise
    verdict = record_decision(settings.model.releases, about)
    if release is not None:
        _prune(settings)
    return Outcome(len(material.kept), parent, decision, verdict, release, hold)


def _contender(base: Base, catalogue: Catalogue) -> Contender:
    """The live release, as it serves."""
    vectors, earlier = base.vectors(catalogue), base.earlier
    return Contender(vectors, earlier.window, earlier.heads) if earlier else Contender(vectors)


def _compare(
    settings: Settings,
    material: Material,
    base: Base,
    live: Contender,
    candidate: Candidate,
    transition: Transition,
) -> Comparison:
    return compare(
        material.kept,
        live,
        Contender.of(candidate),
        cut_ms=candidate.metrics["cut_ms"],
        item_events=candidate.counts,
        events=_window_events(settings),
        half_lives_s=settings.profile.half_lives_s,
        item_slices=item_slices(material.texts, material.categories, candidate.counts),
        seed=settings.learn.seed,
        transition_cosine=transition.error.cosine,
        norms=weight_norms(base.earlier, candidate),
    )


def _bounds(learn: LearnSettings) -> Bounds:
    return Bounds(
        margin=learn.margin,
        older_tolerance=learn.older_tolerance,
        head_tolerance=learn.head_tolerance,
        slice_tolerance=learn.slice_tolerance,
        served_tolerance=learn.served_tolerance,
        calibration_tolerance=learn.calibration_tolerance,
        norm_ratio=learn.norm_ratio,
        least_transition_cosine=learn.transition_cosine,
        least_count=learn.least_targets,
        least_slice_count=learn.least_slice_targets,
    )


def _fit_ranker(
    settings: Settings,
    parent: Release,
    windows: Labelled,
    live: Contender,
    candidate: Candidate,
) -> tuple[FittedRanker, Figure]:
    """A ranker, on windows that the candidate was not trained on and from the live release's; and
    what readers would get by the live release and by the candidate."""
    profile = settings.profile
    cases = make_cases(
        windows,
        candidate.vectors,
        profile.half_lives_s,
        cut_ms=candidate.metrics["cut_ms"],
        window=profile.window,
        own_items=profile.own_items,
        foreteller=_foreteller(settings, Contender.of(candidate)),
        seed=settings.learn.seed,
    )
    current = load_weights(parent.path / RANKER) if RANKER in parent.parts else None
    fitted = fit_ranker(cases, current, settings.learn.margin, settings.learn.seed)
    unseen = _unseen(cases, windows)
    before: Weights = first_weights() if current is None else current
    after = before if fitted.weights is None else fitted.weights
    as_now = of_release(
        unseen,
        windows,
        live.vectors,
        profile.half_lives_s,
        window=profile.window,
        foreteller=_foreteller(settings, live),
    )
    return fitted, compare_scores("recall@20 of recommend", (as_now, before), (unseen, after))


def _foreteller(settings: Settings, of: Contender) -> Foreteller | None:
    """None also where workers compute no outlooks: readers have no next interest then."""
    if not settings.stream.outlook_share or of.window is None or of.heads is None:
        return None
    return Foreteller(of.window, of.heads)


def _unseen(cases: Timed, windows: Labelled) -> Timed:
    """The cases that neither the ranker nor the decision when to stop has seen."""
    judging = ~stopping(windows)[cases.user]
    judging[: fitted_until(cases)] = False
    return cases.take(judging.nonzero()[0])


def _publish(
    settings: Settings,
    parent: Release,
    material: Material,
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
    tuned = settings.learn.tower != "frozen"
    return publish(
        parent,
        candidate.projection,
        encoder=candidate.path / ENCODER if tuned else None,
        parts=parts,
        item_vectors=material.vectors(candidate.vectors),
        learned_items=True,
        transition=transition,
        metrics=metrics,
        now=now,
    )


def _prune(settings: Settings) -> None:
    try:
        gone = prune(settings.model.releases, settings.learn.keep_releases)
    except ReleaseUnwritable as error:  # the turn has done what it was for
        log.warning("old releases could not be pruned: %s", error)
    else:
        if gone:
            log.info("pruned, but for their maps: %s", ", ".join(gone))


def _note_verdict(releases_dir: Path) -> None:
    """A turn that was killed after it moved the pointer has left no verdict: its release has it."""
    live = load_current(releases_dir)
    figures = live.metrics().get("gate")
    if figures is None or any(d.get("candidate") == live.id for d in decisions(releases_dir)):
        return
    about = gate.record(Accept(figures), live.id, live.parent, live.created_at)
    record_decision(releases_dir, about)


def _clear(training: Path, but: Path) -> None:
    """What was begun from releases that are no longer live."""
    for folder in training.iterdir():
        if folder.is_dir() and folder != but:
            shutil.rmtree(folder)


@contextmanager
def _alone(training: Path) -> Iterator[None]:
    """One turn at a time in a folder; the kernel lets go of the lock of one that dies."""
    training.mkdir(parents=True, exist_ok=True)
    with (training / _LOCK).open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(
                f"another `penchant learn` is at work in {training}: wait until it is done, "
                "or set STREAM_DATA_DIR to a folder of its own"
            ) from None
        yield


@contextmanager
def _room(data_dir: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno not in _NO_ROOM:
            raise
        raise UserError(
            f"cannot write under {data_dir} ({error.strerror or error}); make room and learn "
            "again: what was done by then is kept"
        ) from error
