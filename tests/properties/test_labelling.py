"""Labels look forward only, and do not depend on how the archive is cut."""

from __future__ import annotations

import dataclasses

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from model import training_rows as tr
from model.windows import HELD_BACK, Labelled
from profiles.schema import EVENT_TYPES, TYPE_CODE
from stream.contributions import DEFAULT_WEIGHTS
from stream.labelling import Archived, Rules, label

HORIZON_MS, RETURNS_MS = 7, 12
RULES = Rules(DEFAULT_WEIGHTS, purchase_ms=HORIZON_MS, returns_ms=RETURNS_MS, user_events=6)
ITEMS = ["a", "b", "c", "unknown"]
CATALOGUE = {"a": 0, "b": 1, "c": 2}
PURCHASE, IMPRESSION = TYPE_CODE["purchase"], TYPE_CODE["impression"]

# user, item code, type, t_ms, event key, source; the place in the list is the offset
Row = tuple[int, int, int, int, int, int]
rows = st.lists(
    st.tuples(
        st.integers(0, 2),
        st.integers(-1, 3),
        st.sampled_from([*range(len(EVENT_TYPES)), *[PURCHASE] * 3]),
        st.integers(0, 40),
        st.sampled_from([0, 0, 0, 1, 2, 3]),
        st.integers(1, 2),
    ),
    max_size=30,
)


def archived(events: list[Row], at: list[int] | None = None) -> Archived:
    at = list(range(len(events))) if at is None else at
    user, item, type_, t_ms, event, source = ([events[i][k] for i in at] for k in range(6))
    return Archived(
        users=["zoe", "ann", "max"],
        item_ids=ITEMS,
        user=np.array(user, np.int32),
        item=np.array(item, np.int32),
        type=np.array(type_, np.uint8),
        t_ms=np.array(t_ms, np.int64),
        event=np.array(event, np.uint64),
        rating=np.full(len(at), 5, np.float32),
        label=np.full(len(at), "", object),
        source=np.array(source, np.uint64),
        offset=np.array(at, np.int64),
    )


def labelled(
    events: Archived, reached: tuple[int, int] = (40, 40), rules: Rules = RULES
) -> Labelled:
    """reached: up to when sources 1 and 2 are known; -1: not of today."""
    told = {source: t_ms for source, t_ms in zip((1, 2), reached, strict=True) if t_ms >= 0}
    return label(events, CATALOGUE, EVENT_TYPES, rules, told)


def known_until(events: list[Row], reached: tuple[int, int]) -> dict[str, int]:
    """User -> up to when all is known of them."""
    today = [t_ms for t_ms in reached if t_ms >= 0]
    until = {}
    for code, name in enumerate(["zoe", "ann", "max"]):
        of_user = [reached[e[5] - 1] for e in events if e[0] == code]
        until[name] = min([t for t in of_user if t >= 0] or today or [0])
    return until


def same(a: Labelled, b: Labelled) -> bool:
    return all(
        np.array_equal(x, y, equal_nan=name == "rating") if name != "user" else x == y
        for name, x, y in (
            (f.name, getattr(a, f.name), getattr(b, f.name)) for f in dataclasses.fields(a)
        )
    )


@given(rows, st.data())
def test_any_order_any_pieces_and_copies_give_the_same_windows(
    events: list[Row], data: st.DataObject
) -> None:
    order = data.draw(st.permutations(range(len(events))))
    copies = data.draw(st.lists(st.sampled_from(order), max_size=10)) if order else []
    assert same(labelled(archived(events)), labelled(archived(events, [*order, *copies])))


reaches = st.tuples(st.integers(-1, 40), st.integers(-1, 40))


@given(rows, reaches)
def test_labels_are_what_a_plain_reading_of_the_future_says(
    events: list[Row], reached: tuple[int, int]
) -> None:
    out = labelled(archived(events), reached)
    rules = dataclasses.replace(RULES, user_events=1_000)
    whole = labelled(archived(events), reached, rules)
    assert out.user == whole.user
    until = known_until(events, reached)
    targets = tr.find_targets(whole)
    for j in range(len(whole.user)):
        lo, hi = whole.start[j], whole.start[j + 1]
        kept = int(min(hi - lo, RULES.user_events))
        assert out.start[j + 1] - out.start[j] == kept
        for i in range(lo, hi):
            later = [k for k in range(i + 1, hi) if whole.t_ms[k] > whole.t_ms[i]]
            following = [k for k in later if whole.weight[k] > 0 and whole.item[k] >= 0]
            first, stop = targets.first[i], targets.stop[i]
            assert targets.item[first:stop][:1].tolist() == whole.item[following[:1]].tolist()
            for column, horizon_ms, wanted in (
                (whole.purchase, HORIZON_MS, lambda k: whole.type[k] == PURCHASE),
                (whole.returns, RETURNS_MS, lambda k: whole.type[k] != IMPRESSION),
            ):
                near = any(wanted(k) and whole.t_ms[k] - whole.t_ms[i] <= horizon_ms for k in later)
                passed = whole.t_ms[i] + horizon_ms < until[whole.user[j]]
                assert column[i] == (int(near) if passed else HELD_BACK)
        for name in ("item", "purchase", "returns"):
            mine = getattr(out, name)[out.start[j] : out.start[j + 1]]
            assert (mine == getattr(whole, name)[hi - kept : hi]).all()


@given(rows, st.integers(0, 40))
def test_inputs_up_to_a_time_do_not_change_with_what_happens_later(
    events: list[Row], until_ms: int
) -> None:
    rules = dataclasses.replace(RULES, user_events=1_000)
    early = [i for i, e in enumerate(events) if e[3] <= until_ms]
    before = labelled(archived(events, early), rules=rules)
    after = labelled(archived(events), rules=rules)
    for j, user in enumerate(before.user):
        mine = slice(before.start[j], before.start[j + 1])
        theirs = after.start[after.user.index(user)]
        for name in ("item", "type", "t_ms", "weight"):
            column = getattr(before, name)[mine]
            assert (getattr(after, name)[theirs : theirs + len(column)] == column).all()


@given(rows, reaches)
def test_labels_do_not_change_with_what_partitions_that_lag_bring_later(
    events: list[Row], reached: tuple[int, int]
) -> None:
    rules = dataclasses.replace(RULES, user_events=1_000)
    by_key = [(*e[:5], 1 + e[0] % 2) for e in events]
    early = [i for i, e in enumerate(by_key) if e[3] <= reached[e[5] - 1]]
    before = labelled(archived(by_key, early), reached, rules)
    after = labelled(archived(by_key), rules=rules)
    for j, user in enumerate(before.user):
        theirs = int(after.start[after.user.index(user)])
        for name in ("purchase", "returns"):
            known = getattr(before, name)[before.start[j] : before.start[j + 1]]
            later = getattr(after, name)[theirs : theirs + len(known)]
            assert ((known == later) | (known == HELD_BACK)).all()


@given(rows, reaches)
def test_a_window_whose_horizon_has_not_passed_is_held_back(
    events: list[Row], reached: tuple[int, int]
) -> None:
    out = labelled(archived(events), reached)
    until = known_until(events, reached)
    now_ms = np.repeat([until[user] for user in out.user], np.diff(out.start))
    assert ((out.purchase == HELD_BACK) == (out.t_ms + HORIZON_MS >= now_ms)).all()
    assert ((out.returns == HELD_BACK) == (out.t_ms + RETURNS_MS >= now_ms)).all()
