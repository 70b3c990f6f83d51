"""What the evaluation reads of a shopper is what a reader of their profile would."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from model.prequential import NO_ITEM, Events
from model.profile_signals import ProfileSignals
from profiles import ranking
from profiles.schema import TYPE_CODE
from tests.oracle import Event
from tests.profile_events import ITEM_KEYS, ITEMS, LAYOUT, after, histories, in_topic


def told(events: list[Event], users: list[str]) -> Events:
    row = {key: i for i, key in enumerate(ITEM_KEYS)}
    return Events(
        np.array([users.index(e.user_id) for e in events], np.int64),
        np.array([row.get(e.item_key, NO_ITEM) for e in events], np.int32),
        np.array([TYPE_CODE[e.type] for e in events], np.uint8),
        np.array([e.t_ms for e in events], np.int64),
        np.array([e.weight for e in events], np.float32),
    )


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
        own = ranking.own_items(profile.own)
        want = [own.get(key, 0.0) for key in ITEM_KEYS]
        np.testing.assert_allclose(read[row, :, 3], want, rtol=1e-4, atol=scale)
        days = ranking.own_days(profile.window, now_ms)
        want = [np.log1p(max(days.get(key, 0.0), 0.0)) for key in ITEM_KEYS]
        np.testing.assert_allclose(items[row, :, 2], want, rtol=1e-5)
        features = ranking.shopper_features(profile.window, profile.events)
        np.testing.assert_allclose(shoppers[row], features, rtol=1e-5, atol=1e-6)
