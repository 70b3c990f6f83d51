"""Two profiles of one shopper: what counts as the same, and what is noticed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields, replace
from typing import Any

import numpy as np
import pytest

from profiles import arithmetic
from profiles.arithmetic import Profile
from profiles.comparison import differing as differing_fields
from profiles.schema import WINDOW_ENTRY
from stream.profile_diff import Coverage, Difference, _compare

OLD, P0, P1 = 5, 7, 9


def differing(one: Profile, other: Profile, own_items: int = 64) -> list[str]:
    return differing_fields(one, other, own_items)


def _profile(**changed: Any) -> Profile:
    window = np.zeros(2, WINDOW_ENTRY)
    window["t_ms"], window["weight"], window["item"] = [1, 2], [0.5, -0.4], [3, 4]
    made = Profile(
        user_id="ann",
        space="0" * 16,
        updated_ms=2,
        first_ms=1,
        events=2,
        counts={"view": 2},
        spend=12.5,
        foreign_purchases=0,
        half_lives_s=(1.0, 2.0),
        masses=np.array([1.0, 2.0], np.float32),
        sums=np.array([[0.1, 0.2], [0.3, 1e-7]], np.float32),
        window=window,
        categories={1: 0.5, 2: -0.25},
        other_categories=0.0,
        own={3: 2.0, 4: 0.25},
        seen=np.array([8, 9], np.uint64),
        pending=0,
        pending_lost=0,
        watermark={P0: 4},
    )
    return replace(made, **changed)


def test_rounding_is_no_difference() -> None:
    other = _profile(
        sums=_profile().sums + np.float32(5e-6),
        masses=_profile().masses * np.float32(1 + 1e-6),
        spend=12.5 + 1e-9,
        categories={1: 0.5 + 1e-6, 2: -0.25, 3: 1e-6},
    )
    assert differing(_profile(), other) == []


@pytest.mark.parametrize(
    ("changed", "name"),
    [
        ({"events": 3}, "events"),
        ({"counts": {"view": 1, "click": 1}}, "counts"),
        ({"spend": 12.51}, "spend"),
        ({"sums": _profile().sums + np.float32(1e-3)}, "sums"),
        ({"masses": np.array([1.0, 2.1], np.float32)}, "masses"),
        ({"window": _profile().window[:1]}, "window"),
        ({"window": _profile().window[::-1]}, "window"),
        ({"categories": {1: 0.5, 2: 0.0}}, "categories"),
        ({"categories": {1: 0.25, 2: 0.0}}, "categories"),
        ({"own": {3: 2.0}}, "own"),
        ({"own": {3: 1.5, 4: 0.25}}, "own"),
        ({"seen": np.array([8], np.uint64)}, "seen"),
        ({"space": "1" * 16}, "space"),
        ({"pending": 1}, "pending"),
    ],
)
def test_what_differs_is_named(changed: Mapping[str, Any], name: str) -> None:
    assert differing(_profile(), _profile(**changed)) == [name]


def test_beyond_their_bound_only_the_sum_of_categories_counts() -> None:
    one = _profile(categories={1: 0.5}, other_categories=0.25)
    assert differing(one, _profile(categories={2: 0.25}, other_categories=0.5)) == []
    assert differing(one, _profile(categories={2: 0.25}, other_categories=0.25)) == ["categories"]


def test_own_items_are_not_looked_at_where_there_are_as_many_as_may_be() -> None:
    other = _profile(own={3: 2.0, 5: 0.2})
    assert differing(_profile(), other, 2) == []
    assert differing(_profile(), other, 3) == ["own"]
    assert differing(_profile(), _profile(own={3: 2.0}), 2) == ["own"]


def test_own_items_that_outlast_all_else_still_differ_by_rounding_only() -> None:
    faded = {"masses": np.full(2, 1e-9, np.float32), "sums": np.zeros((2, 2), np.float32)}
    one, other = _profile(**faded), _profile(**faded, own={3: 2.0 + 1e-6, 4: 0.25})
    assert differing(one, other) == []


def test_every_field_is_looked_at() -> None:
    looked = {"user_id", "watermark", "outlook"}  # by design not
    for field in fields(Profile):
        if field.name in looked:
            continue
        value = getattr(_profile(), field.name)
        if isinstance(value, np.ndarray):
            changed: Any = value[:0] if field.name in ("window", "seen") else value + 1
        elif isinstance(value, dict):
            changed = {key: x + 1 for key, x in value.items()}
        elif isinstance(value, tuple):
            changed = (3.0, 4.0)
        else:
            changed = "1" * 16 if isinstance(value, str) else value + 1
        assert differing(_profile(), _profile(**{field.name: changed})), field.name


def _lost(one: Profile, other: Profile | None) -> Difference:
    found = Difference()
    _compare(found, "ann", one, other, Coverage({P0: 4}, {P0, P1}), 64)
    return found


def test_what_will_still_be_read_is_not_lost() -> None:
    assert _lost(_profile(), _profile()).equal
    ahead = _lost(_profile(watermark={P0: 5}), _profile())
    assert (ahead.apart, ahead.lost) == (1, {})
    new = _lost(_profile(watermark={P1: 1}), None)
    assert (new.apart, new.lost) == (1, {})


def test_who_waits_for_a_text_on_one_side_only_is_apart() -> None:
    found = _lost(_profile(), _profile(pending=1))
    assert (found.compared, found.apart, found.lost) == (0, 1, {})


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (_profile(), None),
        (_profile(), _profile(watermark={P0: 3})),
        (_profile(watermark={P0: 4, OLD: 1}), _profile()),
        (_profile(), _profile(events=1)),
        (_profile(events=0), _profile()),
    ],
    ids=["missing", "read over", "of a deleted topic", "fewer events", "not forgotten"],
)
def test_what_will_not_be_read_again_is_lost(one: Profile, other: Profile | None) -> None:
    found = _lost(one, other)
    assert found.lost
    assert not found.equal


def test_an_erased_profile_may_be_missing() -> None:
    assert _lost(_profile(events=0), None).equal


def test_a_stored_profile_equals_itself() -> None:
    layout = arithmetic.Layout(4)
    state = arithmetic.blank_header(layout).tobytes()
    one = arithmetic.decode("ann", state)
    assert differing(one, arithmetic.decode("ann", state)) == []
