"""The whole profile fitted once, for the last item of every shopper."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from model.evaluate import metric
from model.fitted_once import FittedOnce
from model.leave_one_out import LeftOut, rank_targets, split
from model.prequential import Events
from model.profile_signals import Shop
from model.projection import Projection
from model.ranker import first_weights
from model.trainer import Base, Catalogue, TrainSettings
from model.windows import Labelled
from profiles.schema import EVENT_TYPES
from stream.evaluation_data import Recorded, windows_of

ITEMS, USERS, STEPS, WIDTH = 30, 80, 9, 8
SETTINGS = TrainSettings(
    events=8, epochs=4, batch_events=128, warmup_steps=5, newest_share=0.0, device="cpu"
)


def shop() -> Recorded:
    """Everybody takes every third item of a ring, from a place of their own."""
    rng = np.random.default_rng(0)
    user, step = np.divmod(np.arange(USERS * STEPS), STEPS)
    start = rng.integers(0, ITEMS, USERS)
    return Recorded(
        "shop",
        Events(
            user,
            ((start[user] + 3 * step) % ITEMS).astype(np.int32),
            np.full(len(user), EVENT_TYPES.index("purchase"), np.uint8),
            (user * 100 + step) * 60_000,
            np.ones(len(user), np.float32),
        ),
        [f"user {n:02}" for n in range(USERS)],
        [f"item {n}" for n in range(ITEMS)],
        ["text"] * ITEMS,
        only_order=True,
    )


class Told:
    """A profile of the shop, the events it was told, and those that trainings saw."""

    def __init__(self, folder: Path) -> None:
        data = shop()
        rng = np.random.default_rng(1)
        features = rng.normal(size=(ITEMS, WIDTH)).astype(np.float32)
        features /= np.linalg.norm(features, axis=1, keepdims=True)
        self.trained_on: list[Events] = []

        def label(events: Events) -> Labelled:
            self.trained_on.append(events)
            return windows_of(data, events)

        projection = Projection(np.zeros(WIDTH, np.float32), np.eye(WIDTH, dtype=np.float32))
        known = Catalogue(data.item_ids, features), Base(projection), data.type_names
        self.profile = FittedOnce(Shop(*known, USERS, label, folder), SETTINGS)
        self.test = split(data.events)
        self.profile.update(self.test.history)
        self.left: LeftOut = rank_targets(self.profile, ITEMS, self.test)


@pytest.fixture(scope="module")
def told(tmp_path_factory: pytest.TempPathFactory) -> Told:
    return Told(tmp_path_factory.mktemp("weights"))


def test_the_ranker_learns_from_items_that_the_encoder_has_not_seen(told: Told) -> None:
    before, after = told.trained_on
    held_out = split(told.test.history)
    np.testing.assert_array_equal(before.item, held_out.history.item)
    np.testing.assert_array_equal(after.item, told.test.history.item)
    by_hand = first_weights()
    assert any((told.profile.weights[name] != by_hand[name]).any() for name in by_hand)


def test_it_finds_what_follows(told: Told) -> None:
    assert metric("recall@1", told.left.masked).mean() > 10 / ITEMS  # ten times what chance gives


def test_the_same_history_gives_the_same_places(told: Told, tmp_path: Path) -> None:
    np.testing.assert_array_equal(Told(tmp_path).left.kept, told.left.kept)
