from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from model import training_rows as tr
from model.windows import Labelled
from tests.learnable_shop import labelled

EVENT = st.tuples(st.integers(-1, 5), st.integers(0, 6), st.sampled_from([-1.0, 0.0, 1.0]))
SHOPPERS = st.lists(st.lists(EVENT, min_size=1, max_size=12), min_size=1, max_size=6)


def windows_of(shoppers: list[list[tuple[int, int, float]]]) -> Labelled:
    events = [sorted(each, key=lambda e: e[1]) for each in shoppers]
    flat = [event for each in events for event in each]
    columns = labelled(
        np.array([[e[0] for e in flat]]), np.array([[e[1] for e in flat]]),
        weight=np.array([e[2] for e in flat], dtype=np.float32),
    )  # fmt: skip
    start = np.cumsum([0, *map(len, events)])
    return Labelled(**vars(columns) | {"start": start, "user": [""] * len(events)})


@given(SHOPPERS)
def test_targets_are_the_next_instant_with_something_wanted(
    shoppers: list[list[tuple[int, int, float]]],
) -> None:
    windows = windows_of(shoppers)
    targets, user = tr.find_targets(windows), tr.owners(windows)
    wanted = (windows.item >= 0) & (windows.weight > 0)
    for e in range(len(user)):
        later = wanted & (user == user[e]) & (windows.t_ms > windows.t_ms[e])
        after = windows.t_ms[later]
        expected = windows.item[later & (windows.t_ms == after.min())] if len(after) else []
        found = targets.item[targets.first[e] : targets.stop[e]]
        assert sorted(found) == sorted(expected)


@given(SHOPPERS, st.integers(0, 7))
def test_no_target_of_training_is_as_late_as_the_newest_slice(
    shoppers: list[list[tuple[int, int, float]]], cut: int
) -> None:
    targets = tr.find_targets(windows_of(shoppers))
    before, since = targets.before(cut), targets.since(cut)
    for e in np.flatnonzero(before):
        assert (targets.t_ms[targets.first[e] : targets.stop[e]] < cut).all()
    assert not (before & since).any()
    assert ((before | since) == (targets.first < targets.stop)).all()


@given(SHOPPERS, st.integers(1, 5), st.integers(0, 99))
def test_rows_hold_each_useful_event_once_and_one_shopper_each(
    shoppers: list[list[tuple[int, int, float]]], events: int, seed: int
) -> None:
    windows = windows_of(shoppers)
    rng = np.random.default_rng(seed)
    useful = rng.random(len(windows.t_ms)) < 0.6
    rows = tr.cut_rows(windows, useful, events, rng)
    user = tr.owners(windows)
    covered = np.zeros(len(user), dtype=int)
    for first, length in zip(rows.first, rows.length, strict=True):
        assert 1 <= length <= events
        assert len(set(user[first : first + length])) == 1
        assert useful[first + length - 1]
        covered[first : first + length] += 1
    assert (covered <= 1).all()
    assert (covered[useful] == 1).all()


@given(st.lists(st.integers(1, 50), max_size=60), st.integers(1, 200), st.integers(0, 99))
def test_batches_hold_every_row_once_within_the_budget(
    lengths: list[int], budget: int, seed: int
) -> None:
    rows = tr.Rows(np.zeros(len(lengths), dtype=np.int64), np.array(lengths, dtype=np.int64))
    plan = tr.plan_rows(rows, budget, np.random.default_rng(seed))
    assert sorted(np.concatenate([[], *plan]).astype(int)) == list(range(len(lengths)))
    for batch in plan:
        assert len(batch) == 1 or rows.length[batch].max() * len(batch) <= budget


@given(SHOPPERS, st.integers(1, 5))
def test_a_window_ends_with_its_event_and_begins_no_earlier_than_its_shopper(
    shoppers: list[list[tuple[int, int, float]]], events: int
) -> None:
    windows = windows_of(shoppers)
    ends = np.arange(len(windows.t_ms))
    first, length = tr.windows_ending_at(windows, ends, events)
    start = windows.start[tr.owners(windows)]
    assert (first + length - 1 == ends).all()
    assert (length == np.minimum(events, ends - start + 1)).all()
