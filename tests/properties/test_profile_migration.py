"""What must hold of profiles that move to another embedding space."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from model.transition import fit_orthogonal
from profiles import Profile, arithmetic
from profiles.arithmetic import Floats, Keys64, Layout
from profiles.comparison import differing
from profiles.kernel import Kernel
from profiles.schema import Keys
from tests import oracle
from tests.oracle import Event
from tests.profile_events import (
    DIMENSIONS,
    ITEM_KEYS,
    LAYOUT,
    SPACE,
    VECTOR_OF,
    Shelf,
    columns,
    histories,
    in_topic,
    item_event,
)

NEXT_SPACE = 0xBEEF
ROOMY = Layout(DIMENSIONS, window=100, seen=4, categories=1_000)
ROOMY_RULES = oracle.Rules(ROOMY.half_lives_s, ROOMY.window, ROOMY.seen, ROOMY.categories)

_drawn = np.random.default_rng(31).standard_normal((len(ITEM_KEYS), DIMENSIONS))
_unit = (_drawn / np.linalg.norm(_drawn, axis=1, keepdims=True)).astype(np.float32)
NEXT_VECTOR_OF = dict(zip(ITEM_KEYS, _unit, strict=True))
KERNEL = Kernel(LAYOUT, Keys("shop"), "0" * 40, 0, 64)
IDENTITY = np.eye(DIMENSIONS, dtype=np.float32)


def maps() -> st.SearchStrategy[Floats]:
    """Any map at all: exactness must not hang on a good one."""
    return st.integers(0, 1_000).map(
        lambda seed: (
            np.random.default_rng(seed).standard_normal((DIMENSIONS,) * 2).astype(np.float32)
        )
    )


def folded(events: Sequence[Event], layout: Layout) -> Shelf:
    shelf = Shelf(layout)
    if events:
        shelf.fold(events)
    return shelf


def migrated(
    shelf: Shelf,
    transition: Floats,
    old: Mapping[int, Floats],
    new: Mapping[int, Floats],
    space: int = NEXT_SPACE,
) -> dict[str, Profile]:
    users = sorted(shelf.states)
    profiles = shelf.load(users)
    rows = np.flatnonzero(profiles.header["space"] != 0).tolist()
    arithmetic.migrate(profiles, rows, transition, old, new, shelf.layout, space)
    shelf.save(users, profiles)
    return shelf.profiles()


def in_next_space(event: Event) -> Event:
    known = event.vector is not None
    return replace(event, vector=tuple(NEXT_VECTOR_OF[event.item_key].tolist()) if known else None)


def without_text(events: Sequence[Event]) -> list[Event]:
    return [replace(event, text=False) for event in events]


@given(histories())
def test_the_identity_into_the_same_vectors_changes_nothing_but_the_space(
    events: list[Event],
) -> None:
    shelf = folded(events, LAYOUT)
    before = shelf.profiles()
    after = migrated(shelf, IDENTITY, VECTOR_OF, VECTOR_OF)
    for user, profile in before.items():
        moved = after[user]
        assert moved.space == (f"{NEXT_SPACE:016x}" if profile.space else "")
        scale = np.maximum(profile.masses, 1e-20)[:, None]
        np.testing.assert_allclose(moved.sums / scale, profile.sums / scale, atol=1e-6)
        for name in ("masses", "window", "seen"):
            np.testing.assert_array_equal(getattr(moved, name), getattr(profile, name))
        assert (moved.watermark, moved.categories) == (profile.watermark, profile.categories)
        assert moved.own == profile.own
        assert (moved.events, moved.pending) == (profile.events, profile.pending)


@given(histories(), maps())
def test_bytes_are_carried_as_profiles_are_moved(events: list[Event], transition: Floats) -> None:
    shelf = folded(events, LAYOUT)
    users, states = list(shelf.states), list(shelf.states.values())
    elsewhere = set(arithmetic.elsewhere([*states, b""], NEXT_SPACE))
    assert elsewhere == set(range(len(states)))
    assert arithmetic.elsewhere(states, SPACE) == [
        i for i, user in enumerate(users) if not shelf.profile(user).space
    ]
    spaces = arithmetic.plain_spaces(states, LAYOUT)
    rows = np.flatnonzero(spaces)
    assert rows.tolist() == [
        i
        for i, user in enumerate(users)
        if shelf.profile(user).space and not shelf.profile(user).pending
    ]
    mine = [states[row] for row in rows]
    new = {key: NEXT_VECTOR_OF[key] for key in sorted(ITEM_KEYS)[1:]}  # one is not there yet

    def changes_of(items: Keys64) -> tuple[Keys64, Floats]:
        known = np.asarray([key for key in items.tolist() if key in new], dtype=np.uint64)
        change = [new[key] - VECTOR_OF[key] @ transition for key in known.tolist()]
        return known, np.asarray(change, dtype=np.float32).reshape(-1, DIMENSIONS)

    carried = KERNEL.carry(mine, transition, changes_of, NEXT_SPACE)
    moved = migrated(shelf, transition, VECTOR_OF, new)
    for row, state in zip(rows.tolist(), carried, strict=True):
        profile = arithmetic.decode(users[row], state, shelf.fences[users[row]])
        assert differing(profile, moved[users[row]], LAYOUT.own_items, 1e-6) == []
        assert state[LAYOUT.header.itemsize :] == shelf.states[users[row]][LAYOUT.header.itemsize :]


@given(histories(), maps())
def test_a_history_that_lies_in_the_window_is_as_if_folded_in_the_new_space(
    events: list[Event], transition: Floats
) -> None:
    events = without_text(events)
    after = migrated(folded(events, ROOMY), transition, VECTOR_OF, NEXT_VECTOR_OF)
    expected = oracle.fold([in_next_space(event) for event in events], ROOMY_RULES)
    for user, profile in after.items():
        assert oracle.compare(profile, expected[user]) == []
        assert profile.space in ("", f"{NEXT_SPACE:016x}")


@given(histories(), st.integers(0, 1_000))
def test_a_rotation_keeps_the_norms_of_what_goes_through_it(events: list[Event], seed: int) -> None:
    random = np.random.default_rng(seed).standard_normal((2, 9, DIMENSIONS)).astype(np.float32)
    rotation = fit_orthogonal(random[0], random[1])
    shelf = folded(events, LAYOUT)
    before = shelf.profiles()
    for user, profile in migrated(shelf, rotation, {}, {}).items():
        norms = np.linalg.norm(before[user].sums, axis=1)
        np.testing.assert_allclose(np.linalg.norm(profile.sums, axis=1), norms, rtol=1e-4)


@given(histories(), maps())
def test_there_and_back_by_exact_vectors_returns(events: list[Event], transition: Floats) -> None:
    events = without_text(events)
    shelf = folded(events, ROOMY)
    before = shelf.profiles()
    migrated(shelf, transition, VECTOR_OF, NEXT_VECTOR_OF)
    back = migrated(shelf, transition, NEXT_VECTOR_OF, VECTOR_OF, SPACE)
    for user, profile in before.items():
        scale = np.maximum(profile.masses, 1e-20)[:, None]
        np.testing.assert_allclose(back[user].sums / scale, profile.sums / scale, atol=1e-3)


@pytest.mark.parametrize("own_items", [0, 2])
def test_what_the_window_has_lost_is_moved_as_own_items_tell_and_else_by_the_map(
    own_items: int,
) -> None:
    layout = replace(LAYOUT, own_items=own_items)
    old = [item_event(0, t_ms=1_000 + i) for i in range(3)]
    recent = [item_event(1, t_ms=2_000 + i) for i in range(layout.window)]
    shelf = folded(in_topic(old + recent), layout)
    mapped = VECTOR_OF[ITEM_KEYS[0]] @ (2 * IDENTITY)
    profile = migrated(shelf, 2 * IDENTITY, VECTOR_OF, NEXT_VECTOR_OF)["u"]
    lost = NEXT_VECTOR_OF[ITEM_KEYS[0]] if own_items else mapped
    expected = 3 * lost + layout.window * NEXT_VECTOR_OF[ITEM_KEYS[1]]
    np.testing.assert_allclose(profile.sums[-1], expected, rtol=1e-3, atol=1e-3)


def test_own_items_stand_for_no_more_than_the_window_has_lost() -> None:
    layout = replace(LAYOUT, own_items=1)  # the lighter of two is known to the sums alone
    lost = [item_event(i, t_ms=1_000) for i in (0, 0, 2)]
    shelf = folded(in_topic(lost + [item_event(1, t_ms=2_000)] * layout.window), layout)
    users = list(shelf.states)
    profiles = shelf.load(users)
    header = profiles.header[0]
    before = header["sums"][-1].copy()
    arithmetic.migrate(profiles, [0], IDENTITY, VECTOR_OF, NEXT_VECTOR_OF, layout, NEXT_SPACE)
    change = {i: NEXT_VECTOR_OF[ITEM_KEYS[i]] - VECTOR_OF[ITEM_KEYS[i]] for i in (0, 1)}
    moved = header["sums"][-1] - before - layout.window * change[1]
    assert arithmetic.decode("u", shelf.states["u"]).own.keys() == {ITEM_KEYS[1]}
    np.testing.assert_allclose(moved, 0, atol=1e-3)


def test_an_event_that_waits_for_its_text_is_folded_in_the_new_space_alone() -> None:
    waiting = replace(item_event(2, t_ms=1_000), vector=None)
    shelf = folded(in_topic([item_event(0, t_ms=1_000), waiting]), ROOMY)
    migrated(shelf, IDENTITY, VECTOR_OF, NEXT_VECTOR_OF)
    profiles = shelf.load(["u"])
    arithmetic.resolve_pending(profiles, NEXT_VECTOR_OF, {}, ROOMY, NEXT_SPACE)
    expected = NEXT_VECTOR_OF[ITEM_KEYS[0]] + NEXT_VECTOR_OF[ITEM_KEYS[2]]
    np.testing.assert_allclose(profiles.header["sums"][0, 0], expected, atol=1e-5)


def test_other_rows_stay_and_a_map_of_another_shape_is_refused() -> None:
    shelf = folded(in_topic([item_event(0), replace(item_event(1), user_id="v")]), LAYOUT)
    profiles = shelf.load(["u", "v"])
    before = profiles.header["sums"].copy()
    arithmetic.migrate(profiles, [1], -IDENTITY, {}, {}, LAYOUT, NEXT_SPACE)
    np.testing.assert_array_equal(profiles.header["sums"][0], before[0])
    np.testing.assert_array_equal(profiles.header["sums"][1], -before[1])
    assert profiles.header["space"].tolist() == [SPACE, NEXT_SPACE]
    with pytest.raises(ValueError, match="cannot carry"):
        arithmetic.migrate(profiles, [0], np.eye(3, dtype=np.float32), {}, {}, LAYOUT, NEXT_SPACE)


def test_a_profile_takes_events_of_its_new_space() -> None:
    shelf = folded(in_topic([item_event(0)]), LAYOUT)
    migrated(shelf, IDENTITY, VECTOR_OF, NEXT_VECTOR_OF)
    profiles = shelf.load(["u"])
    more = [replace(in_next_space(item_event(1)), offset=7)]
    arithmetic.fold(profiles, columns(more, ["u"]), LAYOUT, NEXT_SPACE)
    assert profiles.header["events"].tolist() == [2]
