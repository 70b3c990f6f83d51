"""The whole profile as a scorer: it learns while it is judged, and from the past alone."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from model.baselines import DAY_MS, HALF_LIVES_MS, OWN_HALF_LIFE_MS, OWN_ITEMS
from model.evaluate import metric
from model.prequential import Events, Ranked, prequential
from model.profile_signals import Shop
from model.projection import Projection
from model.ranker import first_weights
from model.trainer import Base, Catalogue, TrainSettings
from model.whole_profile import Schedule, WholeProfile
from profiles.arithmetic import Layout
from profiles.schema import EVENT_TYPES
from stream.evaluation_data import Recorded, windows_of
from stream.settings import LearnSettings, ProfileSettings

ITEMS, USERS, DAYS, WIDTH = 24, 120, 24, 8
SCHEDULE = Schedule(every_ms=6 * DAY_MS, newest_ms=12 * DAY_MS)
SETTINGS = TrainSettings(events=8, batch_events=64, warmup_steps=5, newest_share=0.2, device="cpu")


def shop(seed: int = 0) -> Recorded:
    """Everybody goes round the catalogue, an item a day, from a place of their own."""
    rng = np.random.default_rng(seed)
    day, user = np.divmod(np.arange(DAYS * USERS), USERS)
    start = rng.integers(0, ITEMS, USERS)
    purchase = EVENT_TYPES.index("purchase")
    return Recorded(
        "shop",
        Events(
            user,
            ((start[user] + day) % ITEMS).astype(np.int32),
            np.full(len(user), purchase, np.uint8),
            (day * DAY_MS + user * 10_000).astype(np.int64),
            np.ones(len(user), np.float32),
        ),
        [f"user {n:03}" for n in range(USERS)],
        [f"item {n}" for n in range(ITEMS)],
        ["text"] * ITEMS,
    )


def profile_of(data: Recorded, folder: Path, schedule: Schedule = SCHEDULE) -> WholeProfile:
    rng = np.random.default_rng(1)
    features = rng.normal(size=(ITEMS, WIDTH)).astype(np.float32)
    features /= np.linalg.norm(features, axis=1, keepdims=True)
    centre = np.zeros(WIDTH, np.float32)
    shop = Shop(
        Catalogue(data.item_ids, features),
        Base(Projection(centre, np.eye(WIDTH, dtype=np.float32))),
        data.type_names,
        USERS,
        lambda events: windows_of(data, events),
        folder,
    )
    return WholeProfile(shop, schedule, SETTINGS)


def judged(data: Recorded, scorer: WholeProfile, events: Events) -> Ranked:
    return prequential(events, USERS, ITEMS, {"whole": scorer}, start=USERS * 6)


@pytest.fixture(scope="module")
def learned(tmp_path_factory: pytest.TempPathFactory) -> tuple[WholeProfile, Ranked]:
    data = shop()
    whole = profile_of(data, tmp_path_factory.mktemp("weights"))
    return whole, judged(data, whole, data.events)


def test_it_is_trained_on_schedule_and_its_ranker_with_it(
    learned: tuple[WholeProfile, Ranked],
) -> None:
    whole, _ = learned
    days = [training.t_ms // DAY_MS for training in whole.trainings]
    assert days == [6, 12, 18]
    assert all(training.windows > 0 for training in whole.trainings)
    by_hand = first_weights()
    assert any((whole.weights[name] != by_hand[name]).any() for name in by_hand)


def test_it_gets_better_as_it_learns(learned: tuple[WholeProfile, Ranked]) -> None:
    _, ranked = learned
    found = metric("recall@1", ranked.rank["whole"])
    late = ranked.targets.t_ms >= 18 * DAY_MS
    assert found[late].mean() > found[~late].mean()
    assert found[late].mean() > 2 / ITEMS  # twice what chance gives


def test_what_it_says_does_not_depend_on_what_comes_later(
    learned: tuple[WholeProfile, Ranked], tmp_path: Path
) -> None:
    data = shop()
    cut = USERS * 15
    other = data.events.item.copy()
    other[cut:] = np.random.default_rng(3).integers(0, ITEMS, len(other) - cut)
    changed = Events(
        data.events.user, other, data.events.type, data.events.t_ms, data.events.weight
    )
    ranked = judged(data, profile_of(data, tmp_path), changed)
    before = ranked.targets.event < cut
    np.testing.assert_array_equal(
        ranked.rank["whole"][before], learned[1].rank["whole"][learned[1].targets.event < cut]
    )


def test_its_heads_speak_after_events_and_never_before_the_first_training(
    learned: tuple[WholeProfile, Ranked],
) -> None:
    whole, _ = learned
    events = np.concatenate(whole.foretold.event)
    assert whole.foretold.told == USERS * DAYS
    first = next(training.t_ms for training in whole.trainings if training.accepted)
    assert events.min() >= first // DAY_MS * USERS
    for chances in whole.foretold.chance.values():
        assert len(np.concatenate(chances)) == len(events)


def test_it_is_trained_for_as_long_as_a_shop_trains() -> None:
    assert TrainSettings().epochs == LearnSettings().epochs


def test_own_items_are_judged_as_a_profile_keeps_them() -> None:
    kept = Layout(1)
    assert kept.half_lives_ms.tolist() == list(HALF_LIVES_MS)
    assert (kept.own_half_life_ms, kept.own_items) == (OWN_HALF_LIFE_MS, OWN_ITEMS)
    assert ProfileSettings().own_items == OWN_ITEMS


def test_without_a_schedule_it_is_the_blend_by_hand(tmp_path: Path) -> None:
    data = shop()
    whole = profile_of(data, tmp_path, Schedule(every_ms=float("inf")))
    judged(data, whole, data.events)
    assert whole.trainings == []
    assert not list(tmp_path.iterdir())


def test_what_the_gate_rejects_is_not_swapped_in(learned: tuple[WholeProfile, Ranked]) -> None:
    """Six days are too few to show anything: until the next training, heads stay silent."""
    whole, _ = learned
    rejected, *later = whole.trainings
    assert not rejected.accepted
    assert "100 are needed" in rejected.reasons[0]
    assert any(training.accepted for training in later)
    spoken = np.concatenate(whole.foretold.event)
    assert spoken.min() >= later[0].t_ms // DAY_MS * USERS
