"""`penchant eval`: which scorers are run on a recorded set, how, and what is said of them.

Knows protocols, baselines and slices. Does not know how a report is shown (`evaluation_view.py`),
nor where data and vectors come from (`evaluation_data.py`).

Two protocols. Sets with real times are run in event time: rank, then learn (`prequential`). The
Amazon sets only have an order, and published tables leave the last item out (`leave_one_out`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Final

import numpy as np
from numpy.typing import NDArray

from model import baselines
from model.evaluate import (
    METRICS,
    Bools,
    Doubles,
    Floats,
    Int32s,
    Interval,
    UserBootstrap,
    auc,
    calibration_error,
    metric,
)
from model.leave_one_out import LeftOut, rank_targets, split
from model.prequential import NO_ITEM, Ranked, Scorer, prequential

from .errors import UserError
from .evaluation_data import Encoded, Recorded, windows_of
from .times import DAY_MS

if TYPE_CHECKING:
    from model.fitted_once import FittedOnce
    from model.profile_signals import Shop
    from model.whole_profile import WholeProfile

Progress = Callable[[int, int], None]
Make = Callable[[], Scorer]

START: Final = 0.4
"""Share of the events that are only learned from, before the first ranking."""
MIDDLE: Final = 0.65
"""Where the ranked part is cut in two: what holds in spring should hold before Christmas."""

LEARNING: Final = "whole profile, learning"
ENCODER_FROZEN: Final = "whole profile, encoder frozen"
FROZEN: Final = "whole profile, frozen"
ONCE: Final = "whole profile, fitted once"

_LIFT_OF: Final = "recall@20"
_MOST_RANKINGS: Final = 15_000
_CASES_OF_A_SET: Final = 10_000  # rankings of a whole set that a ranker may learn from
_PARTS_OF_TIME: Final = 24
_NEW_ITEM_MS: Final = 30 * DAY_MS
_TEXT_WEIGHTS: Final = (0.05, 0.1, 0.15, 0.2, 0.3, 0.4, 0.6)
_CHOSEN_ON_USERS: Final = 5000

# Leave-one-out, full ranking, Recall@10 and NDCG@10, as their authors print them.
PUBLISHED: Final[Mapping[str, tuple[tuple[str, str, float, float], ...]]] = {
    "amazon_beauty": (
        ("popularity (S3-Rec repository)", "masked", 0.0152, 0.0068),
        ("GRU4Rec (S3-Rec repository)", "masked", 0.0283, 0.0137),
        ("BERT4Rec (S3-Rec repository)", "masked", 0.0347, 0.0170),
        ("FDSA (S3-Rec repository)", "masked", 0.0407, 0.0208),
        ("SASRec (S3-Rec repository)", "masked", 0.0605, 0.0318),
        ("S3-Rec", "masked", 0.0647, 0.0327),
        ("TIGER (transformer_benchmark)", "masked", 0.0648, 0.0384),
        ("HSTU (transformer_benchmark)", "masked", 0.0704, 0.0389),
        ("ActionPiece (transformer_benchmark)", "masked", 0.0775, 0.0424),
        ("SASRec, sampled softmax (transformer_benchmark)", "masked", 0.0921, 0.0531),
        ("eSASRec (transformer_benchmark)", "masked", 0.0928, 0.0523),
    ),
    "amazon_scientific": (("VQ-Rec (its repository)", "kept", 0.1238, 0.0645),),
}


@dataclass(frozen=True)
class Row:
    """One scorer in one table."""

    name: str
    metrics: dict[str, Interval]
    coverage: float | None = None
    lift: Interval | None = None
    """Recall relative to the reference: 0.05 is five per cent better; None for itself, and where
    the reference finds nothing."""


@dataclass(frozen=True)
class Section:
    """A table: the same targets for every row."""

    title: str
    targets: int
    users: int
    rows: tuple[Row, ...]


@dataclass(frozen=True)
class Timeline:
    """Recall over event time, in parts of equal length."""

    starts_ms: tuple[int, ...]
    targets: tuple[int, ...]
    recall: dict[str, tuple[float, ...]]  # scorer -> NaN where a part has no target
    swaps_ms: tuple[int, ...] = ()
    """When the whole profile went over to new weights."""
    rejections_ms: tuple[int, ...] = ()
    """When the gate kept new weights out."""


@dataclass(frozen=True)
class Head:
    """What a head foresaw after events, against what came of it."""

    name: str
    events: int
    positive: float  # share of the events
    auc: Interval
    calibration_error: float


@dataclass(frozen=True)
class Report:
    """What an evaluation found."""

    dataset: str
    protocol: str
    reference: str
    """What `Row.lift` compares with: the scorer that is strongest over all targets."""
    lift_of: str
    """The metric that `Row.lift` compares, and that slices are shown by."""
    sections: tuple[Section, ...]
    slices: tuple[Section, ...] = ()
    """Parts of the targets of the first section."""
    timeline: Timeline | None = None
    heads: tuple[Head, ...] = ()


def evaluate(
    data: Recorded,
    texts: Encoded | None,
    more: Mapping[str, Make],
    learned: Path | None,
    *,
    progress: Callable[[str], Progress] = lambda what: lambda done, total: None,
) -> Report:
    """All baselines, those that know text where there are `texts`, and `more` scorers.

    With `learned`, an empty folder for weights, the whole profile as well, and beside it two
    twins: of one the encoder stays as the first training left it, of the other the ranker, too.
    `progress`: what is done -> its reporter.
    """
    if data.only_order:
        makers = counters_of_order(data)
        if texts is not None:
            makers |= steps_of_text(data, texts.vectors)
            makers |= dict([with_text(data, texts.vectors, progress("choosing weights"))])
            if learned is not None:
                makers[ONCE] = lambda: fitted_once(data, texts, learned)
        return by_last_item(data, makers | dict(more), progress=progress("ranking"))
    makers = counters(data)
    if texts is not None:
        makers |= untrained_text(data, texts.vectors)
    makers |= more
    if texts is None or learned is None:
        return in_event_time(data, makers, progress=progress("ranking"))
    from model.whole_profile import NextInterest

    whole = whole_profile(data, texts, learned / "learning")
    half = whole_profile(data, texts, learned / "half", swaps=1)
    frozen = whole_profile(data, texts, learned / "frozen", swaps=1, fits=1)
    makers |= {FROZEN: lambda: frozen, ENCODER_FROZEN: lambda: half, LEARNING: lambda: whole}
    makers |= {
        "its next interest alone, frozen": lambda: NextInterest(half),
        "its next interest alone, learning": lambda: NextInterest(whole),
    }
    return with_learning(data, in_event_time(data, makers, progress=progress("ranking")), whole)


def counters(data: Recorded) -> dict[str, Make]:
    """Baselines that know no text, for sets with real times.

    Raises UserError for a catalogue that is too large for them.
    """
    n, users = _checked_size(data), len(data.user_ids)
    return {
        "popular": lambda: baselines.Popular(n),
        "last item": lambda: baselines.ItemNeighbours(n, depth=1),
        "item-kNN": lambda: baselines.ItemNeighbours(n),
        "co-visitation of a profile": lambda: baselines.FadingNeighbours(n),
        "last basket": lambda: baselines.LastBasket(n),
        "own frequency": lambda: baselines.OwnFrequency(n),
        "own items of a profile": lambda: baselines.OwnItems(users, n),
        "own + last basket": lambda: baselines.Blend(
            (baselines.OwnFrequency(n), baselines.LastBasket(n)), baselines.total
        ),
    }


def untrained_text(data: Recorded, vectors: Floats) -> dict[str, Make]:
    """Baselines that know text, through an encoder that was not trained on the shop, for sets with
    real times."""
    users = len(data.user_ids)
    return steps_of_text(data, vectors) | {
        "text: profile, three time scales": lambda: baselines.TextProfile(vectors, users),
    }


def whole_profile(
    data: Recorded,
    texts: Encoded,
    folder: Path,
    swaps: float = np.inf,
    fits: float = np.inf,
) -> WholeProfile:
    """The whole profile, trained every four weeks of event time until its encoder was swapped
    `swaps` times and its ranker fitted `fits` times; it leaves its weights in `folder`. For sets
    with real times."""
    from model.trainer import TrainSettings
    from model.whole_profile import Schedule, WholeProfile

    return WholeProfile(
        _shop(data, texts, folder),
        Schedule(
            swaps=swaps,
            fits=fits,
            every_case=max(2, int(_baskets(data)[1].max(initial=0)) // _CASES_OF_A_SET),
        ),
        TrainSettings(),
    )


def fitted_once(data: Recorded, texts: Encoded, folder: Path) -> FittedOnce:
    """The whole profile for sets of which only the order is real."""
    from model.fitted_once import FittedOnce
    from model.trainer import TrainSettings

    return FittedOnce(
        _shop(data, texts, folder),
        # Everything is for training: nobody may look at the items that are left out.
        TrainSettings(epochs=14, newest_share=0.0),
    )


def _shop(data: Recorded, texts: Encoded, folder: Path) -> Shop:
    from model.profile_signals import Shop
    from model.trainer import Base, Catalogue

    return Shop(
        Catalogue(data.item_ids, texts.features),
        Base(texts.projection),
        data.type_names,
        len(data.user_ids),
        lambda events: windows_of(data, events),
        folder,
    )


def counters_of_order(data: Recorded) -> dict[str, Make]:
    """Baselines that know no text, for sets of which only the order is real.

    Raises UserError for a catalogue that is too large for them.
    """
    n = _checked_size(data)
    return {
        "popular": lambda: baselines.Popular(n, half_life_ms=np.inf),
        "last item": lambda: baselines.ItemNeighbours(n, depth=1),
        "item-kNN": lambda: baselines.ItemNeighbours(n),
    }


def steps_of_text(data: Recorded, vectors: Floats) -> dict[str, Make]:
    """Untrained text by the order of events alone."""
    users = len(data.user_ids)
    return {
        "text: mean": lambda: baselines.TextSteps(vectors, users, decay=1.0),
        "text: decayed by 0.7 a step": lambda: baselines.TextSteps(vectors, users, decay=0.7),
    }


def _checked_size(data: Recorded) -> int:
    n = len(data.item_ids)
    if n > baselines.MOST_ITEMS:
        raise UserError(
            f"{data.name} has {n:,} items, and the baselines count pairs of at most "
            f"{baselines.MOST_ITEMS:,}: take a part of the set"
        )
    return n


# --- in event time -------------------------------------------------------------------------


def in_event_time(
    data: Recorded,
    makers: Mapping[str, Make],
    *,
    block: int = 1,
    progress: Progress = lambda done, total: None,
) -> Report:
    """Rank before every basket from `START` of the events on, then learn it; of many baskets
    before `_MOST_RANKINGS` that are drawn.

    Raises UserError where nothing can be ranked.
    """
    start = int(START * len(data.events))
    target, drawn = _drawn(data, start)
    ranked = prequential(
        data.events,
        len(data.user_ids),
        len(data.item_ids),
        {name: make() for name, make in makers.items()},
        start=start,
        is_target=target,
        block=block,
        progress=progress,
    )
    if not len(ranked.targets):
        raise UserError(
            f"{data.name} has no item event of positive weight in its last {1 - START:.0%}: there "
            "is nothing to foresee"
        )
    protocol = (
        f"In event time: the first {START:.0%} of the events are learned from; from then on, all "
        f"{len(data.item_ids):,} items are ranked before {drawn} and looked up for each of "
        "its items, and then it is learned. Intervals: 95 %, bootstrap over users."
    )
    return replace(_report(data, ranked, protocol), timeline=_timeline(ranked))


def _baskets(data: Recorded) -> tuple[Bools, NDArray[np.int64]]:
    """Events (m,) that could be looked up, and the number of each one's basket (p,)."""
    events = data.events
    wanted = (events.item != NO_ITEM) & (events.weight > 0)
    both = np.stack([events.user[wanted], events.t_ms[wanted]], axis=1)
    return wanted, np.unique(both, axis=0, return_inverse=True)[1].ravel()


def _drawn(data: Recorded, start: int) -> tuple[Bools, str]:
    """Events (m,) that are looked up, and of which baskets they are in words."""
    wanted, basket = _baskets(data)
    wanted[:start] &= False
    late = basket[len(basket) - int(wanted.sum()) :]
    found = np.unique(late)
    if len(found) <= _MOST_RANKINGS:
        return wanted, "every basket"
    few = np.random.default_rng(0).permutation(found)[:_MOST_RANKINGS]
    wanted[wanted] = np.isin(late, few)
    return wanted, f"{_MOST_RANKINGS:,} of {len(found):,} baskets"


def with_learning(data: Recorded, report: Report, whole: WholeProfile) -> Report:
    """The report of a run in which `whole` took part, with its trainings and its heads."""
    timeline = report.timeline and replace(
        report.timeline,
        swaps_ms=tuple(t.t_ms for t in whole.trainings if t.accepted),
        rejections_ms=tuple(t.t_ms for t in whole.trainings if not t.accepted),
    )
    return replace(report, timeline=timeline, heads=_heads(data, whole))


def _timeline(ranked: Ranked) -> Timeline:
    t_ms = ranked.targets.t_ms
    edges = np.linspace(t_ms.min(), t_ms.max() + 1, _PARTS_OF_TIME + 1)
    part = np.searchsorted(edges, t_ms, side="right") - 1
    count = np.bincount(part, minlength=_PARTS_OF_TIME)
    with np.errstate(invalid="ignore"):
        recall = {
            name: np.bincount(part, metric(_LIFT_OF, rank), _PARTS_OF_TIME) / count
            for name, rank in ranked.rank.items()
        }
    return Timeline(
        tuple(int(edge) for edge in edges[:-1]),
        tuple(count.tolist()),
        {name: tuple(values.tolist()) for name, values in recall.items()},
    )


def _heads(data: Recorded, whole: WholeProfile) -> tuple[Head, ...]:
    """The heads of `whole`, where their labels are known and of both kinds."""
    if not whole.foretold.event:
        return ()
    event = np.concatenate(whole.foretold.event)
    labelled = windows_of(data, data.events, user_events=max(len(data.events), 1))
    # Windows stand by user, then in the order of the events.
    names = np.argsort(np.argsort(np.array(data.user_ids)))
    place = np.empty(len(data.events), dtype=np.int64)
    place[np.lexsort((np.arange(len(place)), data.events.t_ms, names[data.events.user]))] = (
        np.arange(len(place))
    )
    found = []
    for name, parts in whole.foretold.chance.items():
        chance = np.concatenate(parts)
        label = getattr(labelled, name)[place[event]]
        known = (label >= 0) & np.isfinite(chance)
        truth, said = label[known].astype(float), chance[known]
        if len(np.unique(truth)) < 2:
            continue
        bootstrap = UserBootstrap(data.events.user[event[known]])

        def weighted(weight: Doubles, said: Floats = said, truth: Doubles = truth) -> float:
            return auc(said, truth, weight)

        found.append(
            Head(
                name,
                int(known.sum()),
                float(truth.mean()),
                bootstrap.statistic(weighted),
                calibration_error(said, truth),
            )
        )
    return tuple(found)


def slices(data: Recorded, ranked: Ranked) -> dict[str, Bools]:
    """Which targets belong to which slice; `docs/evaluation.md` says what the names mean."""
    of = ranked.targets
    returning = of.user_events > 0
    early = of.event < MIDDLE * len(data.events)
    parts = {
        "new users": ~returning,
        "returning users": returning,
        f"returning, {START:.0%} to {MIDDLE:.0%}": returning & early,
        f"returning, {MIDDLE:.0%} to 100%": returning & ~early,
        "repeats": of.repeat,
        "discovery": ~of.repeat,
        "unseen items": of.item_age_ms < 0,
        "items < 30 days": (of.item_age_ms >= 0) & (of.item_age_ms < _NEW_ITEM_MS),
        "older items": of.item_age_ms >= _NEW_ITEM_MS,
    }
    kinds = np.unique(of.type)
    if len(kinds) > 1:
        parts |= {f"type {data.type_names[k]}": of.type == k for k in kinds.tolist()}
    return parts


def _report(data: Recorded, ranked: Ranked, protocol: str) -> Report:
    user = ranked.targets.user
    bootstrap = UserBootstrap(user)
    lift_of = _LIFT_OF
    reference = _strongest(ranked.rank, lift_of)
    everything = np.ones(len(user), dtype=bool)
    first = _section("all", user, ranked.rank, bootstrap, everything, reference, lift_of)
    covered = tuple(
        Row(row.name, row.metrics, ranked.coverage[row.name], row.lift) for row in first.rows
    )
    sections = [Section(first.title, first.targets, first.users, covered)]
    new = ~ranked.targets.repeat
    if new.any():
        among_new = {name: np.maximum(rank, 1) for name, rank in ranked.rank_new.items()}
        title = "discovery, ranked among the items new to the user"
        sections.append(_section(title, user, among_new, bootstrap, new, reference, lift_of))
    parts = tuple(
        _section(title, user, ranked.rank, bootstrap, where, reference, lift_of)
        for title, where in slices(data, ranked).items()
        if where.any()
    )
    return Report(data.name, protocol, reference, lift_of, tuple(sections), parts)


def _strongest(rank: Mapping[str, Int32s], by: str) -> str:
    return max(rank, key=lambda name: float(metric(by, rank[name]).mean()))


def _section(
    title: str,
    user: NDArray[np.int64],
    rank: Mapping[str, Int32s],
    bootstrap: UserBootstrap,
    where: Bools,
    reference: str,
    lift_of: str,
) -> Section:
    base = metric(lift_of, rank[reference])
    comparable = base[where].any()
    rows = tuple(
        Row(
            name,
            {m: bootstrap.mean(metric(m, places), where) for m in METRICS},
            lift=None
            if name == reference or not comparable
            else bootstrap.lift(metric(lift_of, places), base, where),
        )
        for name, places in rank.items()
    )
    return Section(title, int(where.sum()), len(np.unique(user[where])), rows)


# --- by the last item ----------------------------------------------------------------------


def by_last_item(
    data: Recorded,
    makers: Mapping[str, Make],
    *,
    progress: Progress = lambda done, total: None,
) -> Report:
    """Leave-one-out on the test items, the user's own items masked and kept.

    Raises UserError where nobody has three events.
    """
    test = split(data.events)
    if not len(test.user):
        raise UserError(f"{data.name} has no user with three events: there is nothing to leave out")
    n_items = len(data.item_ids)
    found: dict[str, LeftOut] = {}
    for number, (name, make) in enumerate(makers.items()):
        scorer = make()
        scorer.update(test.history)
        found[name] = rank_targets(scorer, n_items, test)
        progress(number + 1, len(makers))
    bootstrap = UserBootstrap(test.user)
    everyone = np.ones(len(test.user), dtype=bool)
    masked = {name: left.masked for name, left in found.items()}
    kept = {name: left.kept for name, left in found.items()}
    protocol = (
        f"Leave-one-out: the last item of each of {len(test.user):,} users, among all "
        f"{n_items:,} items; what is chosen is chosen on the item before it. Intervals: 95 %, "
        "bootstrap over users."
    )
    lift_of = "recall@10"
    reference = _strongest(masked, lift_of)
    sections = tuple(
        _section(title, test.user, rank, bootstrap, everyone, reference, lift_of)
        for title, rank in (
            ("the user's own items masked", masked),
            ("the user's own items kept", kept),
        )
    )
    return Report(data.name, protocol, reference, lift_of, sections)


def with_text(
    data: Recorded, vectors: Floats, progress: Progress = lambda done, total: None
) -> tuple[str, Make]:
    """Item-kNN and decayed text, the weight of the text chosen on the validation items."""
    n_items, n_users = len(data.item_ids), len(data.user_ids)
    part = split(data.events, "validation")
    chosen = np.random.default_rng(0).permutation(len(part.user))[:_CHOSEN_ON_USERS]
    part = type(part)(part.history, part.user[chosen], part.item[chosen], part.t_ms[chosen])
    parts = _neighbours_and_text(n_items, vectors, n_users)
    for scorer in parts:
        scorer.update(part.history)
    recalls: list[float] = []
    for weight in _TEXT_WEIGHTS:
        blend = baselines.Blend(parts, baselines.neighbours_and_text(weight))
        left = rank_targets(blend, n_items, part)
        recalls.append(float(metric("recall@10", left.masked).mean()))
        progress(len(recalls), len(_TEXT_WEIGHTS))
    weight = _TEXT_WEIGHTS[int(np.argmax(recalls))]
    return (
        f"item-kNN + decayed text ({weight:g})",
        lambda: baselines.Blend(
            _neighbours_and_text(n_items, vectors, n_users),
            baselines.neighbours_and_text(weight),
        ),
    )


def _neighbours_and_text(n_items: int, vectors: Floats, n_users: int) -> tuple[Scorer, ...]:
    return (
        baselines.ItemNeighbours(n_items),
        baselines.TextSteps(vectors, n_users, decay=0.7),
    )


def published(name: str) -> Sequence[tuple[str, str, float, float]]:
    """(model, masked or kept, Recall@10, NDCG@10) of the tables for a set of that name."""
    return PUBLISHED.get(name, ())
