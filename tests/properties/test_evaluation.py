"""What must hold of every evaluation: ranks depend on order only, intervals cover, and nothing is
known before it happens."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from model.baselines import (
    Blend,
    ItemNeighbours,
    LastBasket,
    OwnFrequency,
    OwnItems,
    Popular,
    TextProfile,
    TextSteps,
    total,
)
from model.evaluate import Floats, Ints, UserBootstrap, metric, ranks
from model.prequential import Events, Scorer, blocks, prequential

USERS, ITEMS = 5, 8
VECTORS = np.random.default_rng(0).normal(size=(ITEMS, 4)).astype(np.float32)

acts = st.lists(
    st.tuples(
        st.integers(0, USERS - 1),
        st.integers(-1, ITEMS - 1),
        st.integers(0, 30),
        st.sampled_from([1.0, 0.3, 0.0, -0.5]),
    ),
    min_size=1,
    max_size=40,
)


def log_of(rows: list[tuple[int, int, int, float]]) -> Events:
    rows = sorted(rows, key=lambda row: row[2])
    user, item, t_ms, weight = zip(*rows, strict=True)
    return Events(
        np.asarray(user, dtype=np.int64),
        np.asarray(item, dtype=np.int32),
        np.zeros(len(rows), dtype=np.uint8),
        np.asarray(t_ms, dtype=np.int64),
        np.asarray(weight, dtype=np.float32),
    )


def baselines() -> dict[str, Scorer]:
    return {
        "popular": Popular(ITEMS, half_life_ms=10),
        "own": OwnFrequency(ITEMS),
        "own items": OwnItems(USERS, ITEMS, half_life_ms=10, most=2),
        "last basket": LastBasket(ITEMS),
        "neighbours": ItemNeighbours(ITEMS),
        "blend": Blend((OwnFrequency(ITEMS), LastBasket(ITEMS)), total),
        "mean": TextSteps(VECTORS, USERS, decay=1.0),
        "profile": TextProfile(VECTORS, USERS, half_lives_ms=(3.0, 30.0)),
    }


class Watching:
    """Notes what it was told before it was asked, and scores by all of it."""

    def __init__(self, *, strictly: bool) -> None:
        self._strictly = strictly
        self.told: list[tuple[int, int]] = []  # (user, t_ms)
        self.asked: list[tuple[int, int]] = []

    def scores(self, users: Ints, t_ms: Ints) -> Floats:
        for user, now in zip(users.tolist(), t_ms.tolist(), strict=True):
            assert (user, now) not in self.asked
            self.asked.append((user, now))
            assert all(then < now for who, then in self.told if who == user or self._strictly)
        assert len(set(users.tolist())) == len(users)
        return np.zeros((len(users), ITEMS), dtype=np.float32)

    def update(self, events: Events) -> None:
        self.told += zip(events.user.tolist(), events.t_ms.tolist(), strict=True)


@given(
    st.lists(st.integers(-50, 50), min_size=2, max_size=30),
    st.sampled_from([lambda x: 3 * x + 7, lambda x: x**3, lambda x: x / 128, np.arctan]),
)
def test_ranks_depend_on_the_order_of_scores_alone(values: list[int], transform: object) -> None:
    scores = np.asarray([values], dtype=np.float64)
    row, item = np.zeros(len(values), dtype=np.int64), np.arange(len(values))
    moved = np.asarray(transform(scores))  # type: ignore[operator]
    assert ranks(moved, row, item).tolist() == ranks(scores, row, item).tolist()  # type: ignore[arg-type]


@given(st.lists(st.integers(-3, 3), min_size=2, max_size=30), st.randoms(use_true_random=False))
def test_the_order_of_the_catalogue_makes_no_difference(values: list[int], random: object) -> None:
    order = list(range(len(values)))
    random.shuffle(order)  # type: ignore[attr-defined]
    scores = np.asarray(values, dtype=np.float32)
    row = np.zeros(len(values), dtype=np.int64)
    before = ranks(scores[None], row, np.arange(len(values)))
    after = ranks(scores[order][None], row, np.arange(len(values)))
    assert after.tolist() == before[order].tolist()


@given(st.lists(st.integers(1, 400), min_size=1, max_size=20))
def test_metrics_lie_between_zero_and_one_and_grow_with_the_place(places: list[int]) -> None:
    rank = np.sort(np.asarray(places))
    for name in ("recall@10", "recall@20", "ndcg@10", "ndcg@20", "mrr"):
        values = metric(name, rank)
        assert ((values >= 0) & (values <= 1)).all()
        assert (np.diff(values) <= 0).all()
    assert (metric("ndcg@20", rank) <= metric("recall@20", rank)).all()


def test_an_interval_covers_the_truth_as_often_as_it_says() -> None:
    rng = np.random.default_rng(0)
    covered = 0
    for seed in range(200):
        rate = rng.beta(3, 7, size=80)  # users differ; their mean is .3
        user = np.repeat(np.arange(80), 6)
        hit = rng.uniform(size=len(user)) < rate[user]
        found = UserBootstrap(user, resamples=300, seed=seed).mean(hit.astype(np.float64))
        covered += found.low <= 0.3 <= found.high
    assert 0.90 <= covered / 200 <= 0.99


@given(acts, st.integers(1, 6))
def test_blocks_hold_whole_instants_and_no_user_at_two_times(
    rows: list[tuple[int, int, int, float]], size: int
) -> None:
    log = log_of(rows)
    cut = list(blocks(log.user, log.t_ms, size))
    assert [first for first, _ in cut] == [0, *(last for _, last in cut)][:-1]
    assert cut[-1][1] == len(log)
    for first, last in cut:
        assert last == len(log) or log.t_ms[last - 1] != log.t_ms[last]
        times: dict[int, set[int]] = {}
        for user, t in zip(
            log.user[first:last].tolist(), log.t_ms[first:last].tolist(), strict=True
        ):
            times.setdefault(user, set()).add(t)
        assert all(len(at) == 1 for at in times.values())


@given(acts, st.integers(1, 6))
def test_nothing_is_told_before_it_was_asked_for(
    rows: list[tuple[int, int, int, float]], size: int
) -> None:
    log = log_of(rows)
    watching = Watching(strictly=size == 1)
    ranked = prequential(log, USERS, ITEMS, {"watching": watching}, block=size)
    assert watching.told == list(zip(log.user.tolist(), log.t_ms.tolist(), strict=True))
    wanted = {
        (u, t, i)
        for u, t, i, w in zip(
            log.user.tolist(),
            log.t_ms.tolist(),
            log.item.tolist(),
            log.weight.tolist(),
            strict=True,
        )
        if i >= 0 and w > 0
    }
    of = ranked.targets
    found = list(zip(of.user.tolist(), of.t_ms.tolist(), of.item.tolist(), strict=True))
    assert len(found) == len(wanted)
    assert set(found) == wanted


@given(acts, acts, st.integers(0, 30))
def test_another_future_gives_the_same_past(
    rows: list[tuple[int, int, int, float]], others: list[tuple[int, int, int, float]], now: int
) -> None:
    past = [row for row in rows if row[2] < now]
    ranks_of = []
    for future in (rows, others):
        log = log_of([*past, (0, 0, now, 1.0), *(row for row in future if row[2] >= now)])
        ranked = prequential(log, USERS, ITEMS, baselines())
        early = ranked.targets.t_ms < now
        ranks_of.append({name: rank[early].tolist() for name, rank in ranked.rank.items()})
    assert ranks_of[0] == ranks_of[1]


@given(acts)
def test_a_scorer_that_repeats_what_it_was_told_last_gains_nothing_where_nothing_repeats(
    rows: list[tuple[int, int, int, float]],
) -> None:
    class Echo:
        def __init__(self) -> None:
            self.last = np.zeros(ITEMS, dtype=np.float32)

        def scores(self, users: Ints, t_ms: Ints) -> Floats:
            return np.tile(self.last, (len(users), 1))

        def update(self, events: Events) -> None:
            self.last[:] = 0
            self.last[events.item[events.item >= 0]] = 1

    once = {item: (user, item, t, 1.0) for user, item, t, _ in rows if item >= 0}
    if once:
        ranked = prequential(log_of(list(once.values())), USERS, ITEMS, {"echo": Echo()})
        assert (ranked.rank["echo"] > 1).all()


@given(acts, st.integers(1, 6))
def test_ranks_among_new_items_leave_out_what_the_user_had(
    rows: list[tuple[int, int, int, float]], size: int
) -> None:
    log = log_of(rows)
    scores = np.random.default_rng(1).normal(size=ITEMS).astype(np.float32)

    class Fixed:
        def scores(self, users: Ints, t_ms: Ints) -> Floats:
            return np.tile(scores, (len(users), 1))

        def update(self, events: Events) -> None:
            pass

    ranked = prequential(log, USERS, ITEMS, {"fixed": Fixed()}, block=size)
    of = ranked.targets
    for n in range(len(of)):
        had = {
            i
            for u, i, t in zip(log.user.tolist(), log.item.tolist(), log.t_ms.tolist(), strict=True)
            if u == of.user[n] and t < of.t_ms[n] and i >= 0
        }
        item = int(of.item[n])
        assert bool(of.repeat[n]) == (item in had)
        left = [i for i in range(ITEMS) if i not in had]
        expected = 0 if item in had else sum(scores[i] >= scores[item] for i in left)
        assert ranked.rank_new["fixed"][n] == expected
        before = [
            t for u, t in zip(log.user.tolist(), log.t_ms.tolist(), strict=True) if u == of.user[n]
        ]
        assert of.user_events[n] == sum(t < of.t_ms[n] for t in before)


@given(acts)
def test_batches_of_updates_may_be_cut_anywhere(rows: list[tuple[int, int, int, float]]) -> None:
    log = log_of(rows)
    users, now = np.arange(USERS), np.full(USERS, 31, dtype=np.int64)
    for name, whole in baselines().items():
        parts = baselines()[name]
        whole.update(log)
        for first, last in blocks(log.user, log.t_ms, 1):
            parts.update(log.take(slice(first, last)))
        found, again = (scorer.scores(users, now) for scorer in (whole, parts))
        np.testing.assert_allclose(found, again, rtol=1e-4, atol=1e-5, err_msg=name)
