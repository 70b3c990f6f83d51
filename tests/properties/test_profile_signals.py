"""What the evaluation reads of a shopper is what a reader of their profile would."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from model.prequential import NO_ITEM, Events
from model.profile_signals import ProfileSignals
from profiles import ranking
from profiles.arithmetic import Profile
from profiles.schema import TYPE_CODE
from tests.oracle import Event
from tests.profile_events import (
    ITEM_KEYS,
    ITEMS,
    LAYOUT,
    NOW_MS,
    after,
    histories,
    in_topic,
    item_event,
)


def told(events: list[Event], users: list[str]) -> Events:
    row = {key: i for i, key in enumerate(ITEM_KEYS)}
    return Events(
        np.array([users.index(e.user_id) for e in events], np.int64),
        np.array([row.get(e.item_key, NO_ITEM) for e in events], np.int32),
        np.array([TYPE_CODE[e.type] for e in events], np.uint8),
        np.array([e.t_ms for e in events], np.int64),
        np.array([e.weight for e in events], np.float32),
    )


def own_items(profile: Profile) -> list[float]:
    """Of each of ITEMS, as a reader knows it."""
    of_profile = profile.own, profile.window, profile.updated_ms, profile.half_lives_s
    own = ranking.own_items(*of_profile)
    return [own.get(key, 0.0) for key in ITEM_KEYS]


@given(histories(forgets=False, ids=False, min_size=1), st.integers(0, 10**9))
def test_own_items_and_features_are_those_of_the_profile(events: list[Event], later: int) -> None:
    events = in_topic(sorted(events, key=lambda event: event.t_ms))
    profiles = after(events)
    users, now_ms = sorted(profiles), events[-1].t_ms + later
    vectors = np.zeros((len(ITEMS), 1), np.float32)
    signals = ProfileSignals(len(users), ITEMS, vectors, LAYOUT.window)
    # An instant is told as a whole.
    cuts = np.flatnonzero(np.diff([event.t_ms for event in events])) + 1
    for part in np.split(np.arange(len(events)), cuts):
        signals.update(told([events[i] for i in part.tolist()], users))
    at = np.arange(len(users))
    read, items, shoppers = signals.read(at, np.full(len(users), now_ms))
    for row, user in enumerate(users):
        profile = profiles[user]
        # Events that cancel out leave the rounding of both.
        scale = 1e-5 * sum(abs(e.weight) for e in events)
        np.testing.assert_allclose(read[row, :, 3], own_items(profile), rtol=1e-4, atol=scale)
        days = ranking.own_days(profile.window, now_ms)
        want = [np.log1p(max(days.get(key, 0.0), 0.0)) for key in ITEM_KEYS]
        np.testing.assert_allclose(items[row, :, 2], want, rtol=1e-5)
        features = ranking.shopper_features(profile.window, profile.events)
        np.testing.assert_allclose(shoppers[row], features, rtol=1e-5, atol=1e-6)


@given(st.data(), st.integers(1, 12), st.integers(0, len(ITEMS)))
def test_items_too_light_for_the_tally_are_own_items_while_the_window_has_them(
    data: st.DataObject, count: int, kept: int
) -> None:
    weights = data.draw(st.permutations([2.0**i for i in range(count)]))  # no two sums are equal
    signs = data.draw(st.lists(st.sampled_from([1, 1, -1]), min_size=count, max_size=count))
    items = data.draw(st.lists(st.integers(0, len(ITEMS) - 1), min_size=count, max_size=count))
    events = in_topic(
        item_event(item, NOW_MS + 1000 * i, sign * weight)
        for i, (item, sign, weight) in enumerate(zip(items, signs, weights, strict=True))
    )
    profile = after(events, replace(LAYOUT, own_items=kept), cuts=range(1, count))["u"]
    signals = ProfileSignals(
        1, ITEMS, np.zeros((len(ITEMS), 1), np.float32), LAYOUT.window, own_items=kept
    )
    for event in events:
        signals.update(told([event], ["u"]))
    read, _, _ = signals.read(np.array([0]), np.array([events[-1].t_ms]))
    np.testing.assert_allclose(read[0, :, 3], own_items(profile), rtol=1e-4)
    liked = {event.item_key for event in events[-LAYOUT.window :] if event.weight > 0}
    disliked = {event.item_key for event in events if event.weight < 0}
    known = {key for key, mass in zip(ITEM_KEYS, own_items(profile), strict=True) if mass > 0}
    assert liked - disliked <= known
