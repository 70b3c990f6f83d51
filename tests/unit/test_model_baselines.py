"""Baselines against scores worked out by hand."""

from __future__ import annotations

import numpy as np
import pytest

from model.baselines import (
    MOST_ITEMS,
    Blend,
    FadingNeighbours,
    ItemNeighbours,
    LastBasket,
    OwnFrequency,
    OwnItems,
    Popular,
    TextProfile,
    TextSteps,
    baskets,
    neighbours_and_text,
    total,
)
from model.prequential import NO_ITEM, Events, Scorer


def log(*rows: tuple[int, int, int], weight: float = 1.0) -> Events:
    """(t_ms, user, item)."""
    t_ms, user, item = zip(*rows, strict=True)
    return Events(
        np.asarray(user, dtype=np.int64),
        np.asarray(item, dtype=np.int32),
        np.zeros(len(rows), dtype=np.uint8),
        np.asarray(t_ms, dtype=np.int64),
        np.full(len(rows), weight, dtype=np.float32),
    )


def scores(scorer: Scorer, user: int = 0, t_ms: int = 10_000) -> list[float]:
    (row,) = scorer.scores(np.asarray([user]), np.asarray([t_ms]))
    return [float(value) for value in row]


def test_popularity_halves_with_every_half_life() -> None:
    popular = Popular(3, half_life_ms=100)
    popular.update(log((0, 0, 0), (0, 1, 0), (0, 2, 0), (0, 3, 0)))
    popular.update(log((200, 0, 1)))
    assert scores(popular) == pytest.approx([1, 1, 0])  # four at two half-lives are one


def test_popularity_without_a_half_life_is_the_plain_count() -> None:
    popular = Popular(3, half_life_ms=np.inf)
    popular.update(log((0, 0, 0), (0, 1, 0), (9_000_000, 0, 1)))
    assert scores(popular) == [1, 0.5, 0]


def test_own_items_count_per_basket_and_the_rest_by_popularity() -> None:
    own = OwnFrequency(4, decay=0.5)
    own.update(log((0, 0, 1), (0, 0, 2), (1, 0, 1), (2, 1, 3), (3, 1, 3)))
    found = scores(own)
    assert found[1] == pytest.approx(1.5, abs=1e-4)
    assert found[2] == pytest.approx(0.5, abs=1e-4)
    assert 1e-4 > found[3] > found[0] == 0


def test_own_items_fade_in_time_and_the_lightest_are_forgotten() -> None:
    own = OwnItems(2, 4, half_life_ms=100, most=2)
    own.update(log((0, 0, 1), (0, 0, 2), (100, 0, 1), (0, 1, 3)))
    masses = own.masses(np.array([0, 1]))
    assert masses.tolist() == [[0, 1.5, 0.5, 0], [0, 0, 0, 1]]
    own.update(log((100, 0, 3), weight=0.75))
    assert own.masses(np.array([0])).tolist() == [[0, 1.5, 0, 0.75]]
    own.update(log((100, 0, 3), weight=-2.0))
    own.update(log((200, 0, NO_ITEM)))
    assert own.masses(np.array([0])).tolist() == [[0, 0.75, 0, 0]]  # the other is disliked
    found = scores(own)
    assert found[1] == pytest.approx(1, abs=1e-4)
    assert 1e-4 > found[3] > found[0] == 0


def test_last_basket_counts_what_followed_baskets_like_it() -> None:
    last = LastBasket(3)
    last.update(log((0, 0, 0), (1, 0, 1)))  # 0 was followed by 1
    last.update(log((2, 1, 0)))
    # n = 2, 1, 0: C[0, 1] / sqrt(3 * 2).
    assert scores(last, user=1) == pytest.approx([0, 1 / 6**0.5, 0])
    assert scores(last, user=0) == [0, 0, 0]  # nothing has followed 1 so far


def test_neighbours_weigh_distance_direction_and_age() -> None:
    near = ItemNeighbours(3, decay=0.5, backward=0.7)
    near.update(log((0, 0, 0), (1, 0, 1), (2, 0, 2)))
    near.update(log((3, 1, 0), (4, 1, 1)))
    # Counts 2, 2, 1. Pairs: 0->1 twice, 1->2 once, 0->2 once at distance 2; back with .7.
    expected_of_2 = (1.0 * 3**-0.5 * 1 + 0.5 * 3**-0.5 * 0.5) * 2**-0.3
    expected_of_0 = (1.0 * 3**-0.5 * 2 * 0.7) * 3**-0.3
    found = scores(near, user=1)
    assert found[2] == pytest.approx(expected_of_2)
    assert found[0] == pytest.approx(expected_of_0)
    assert found[1] == pytest.approx(0.5 * 3**-0.5 * 2 * 3**-0.3)


def test_neighbours_reach_seven_items_and_no_further() -> None:
    near = ItemNeighbours(9)
    near.update(log(*((t, 0, t) for t in range(9))))
    near.update(log((99, 1, 0)))
    found = scores(near, user=1)
    assert found[7] > 0
    assert found[8] == 0


def test_last_item_knows_one_item() -> None:
    last = ItemNeighbours(4, depth=1)
    last.update(log((0, 0, 0), (1, 0, 1), (2, 0, 2), (3, 1, 3), (4, 1, 2)))
    both = ItemNeighbours(4)
    both.update(log((0, 0, 0), (1, 0, 1), (2, 0, 2), (3, 1, 3), (4, 1, 2)))
    assert scores(last, user=1)[3] == scores(both, user=1)[3] > 0
    assert scores(last, user=1)[2] == 0 < scores(both, user=1)[2]


def test_fading_neighbours_take_an_instant_as_one_step() -> None:
    told = log((0, 0, 0), (1, 0, 1), (2, 0, 2))
    invoice, one_by_one = log((3, 1, 0), (3, 1, 1)), log((3, 1, 1), (4, 1, 0))
    found = []
    for own in (invoice, one_by_one):
        near = FadingNeighbours(3, half_life_ms=np.inf, decay=0.5)
        near.update(told)
        near.update(own)
        found.append(scores(near, user=1)[2])
    # Counts 2, 2, 1; pairs 0->2 of weight 1/2 and 1->2 of weight 1.
    assert found[0] == pytest.approx((0.5 + 1.0) * 3**-0.5 * 2**-0.3)
    assert found[1] == pytest.approx((0.5 + 0.5 * 1.0) * 3**-0.5 * 2**-0.3)


def test_pairs_and_counts_fade_and_stay_exact_for_a_hundred_half_lives() -> None:
    near = FadingNeighbours(3, half_life_ms=10.0)
    near.update(log((0, 0, 0), (0, 0, 1)))
    near.update(log((10, 1, 0)))
    # A pair of 1/2 there and .7/2 back; counts 1.5 and .5.
    assert scores(near, user=1)[1] == pytest.approx(0.5 * 2.5**-0.5 * 1.5**-0.3)
    for t in range(100, 1_010, 10):
        near.update(log((t, 2, 2)))
    near.update(log((1_010, 3, 0), (1_010, 3, 1)))
    near.update(log((1_010, 4, 0)))
    assert scores(near, user=4)[1] == pytest.approx(1.0 * 3.0**-0.5 * 2.0**-0.3, rel=1e-4)


VECTORS = np.eye(3, dtype=np.float32)


def test_the_mean_forgets_nothing_and_steps_do() -> None:
    for decay, expected in ((1.0, [1 / 2**0.5, 1 / 2**0.5, 0]), (0.5, [0.5, 1, 0])):
        text = TextSteps(VECTORS, n_users=1, decay=decay)
        text.update(log((0, 0, 0), (50, 0, 1)))
        unit = np.asarray(expected) / np.linalg.norm(expected)
        assert scores(text) == pytest.approx(unit.tolist())


def test_a_profile_is_the_mean_cosine_over_time_scales() -> None:
    text = TextProfile(VECTORS, n_users=1, half_lives_ms=(100.0, 200.0))
    text.update(log((0, 0, 0)))
    text.update(log((200, 0, 1)))
    quick, slow = np.asarray([0.25, 1, 0]), np.asarray([0.5, 1, 0])
    expected = (quick / np.linalg.norm(quick) + slow / np.linalg.norm(slow)) / 2
    assert scores(text) == pytest.approx(expected.tolist())


def test_a_profile_takes_late_events_and_negative_weights() -> None:
    late = TextProfile(VECTORS, n_users=1, half_lives_ms=(100.0,))
    late.update(log((200, 0, 1)))
    late.update(log((0, 0, 0)))
    ordered = TextProfile(VECTORS, n_users=1, half_lives_ms=(100.0,))
    ordered.update(log((0, 0, 0), (200, 0, 1)))
    assert scores(late) == pytest.approx(scores(ordered))
    late.update(log((200, 0, 2), weight=-0.4))
    assert scores(late)[2] < 0


def test_what_says_nothing_of_an_item_changes_no_baseline() -> None:
    makers = (
        lambda: Popular(3),
        lambda: OwnFrequency(3),
        lambda: LastBasket(3),
        lambda: ItemNeighbours(3),
        lambda: FadingNeighbours(3),
        lambda: TextSteps(VECTORS, 1, decay=0.7),
        lambda: TextProfile(VECTORS, 1),
    )
    for make in makers:
        scorer: Scorer = make()
        scorer.update(log((0, 0, 1), (1, 0, 2)))
        before = scores(scorer)
        scorer.update(log((2, 0, NO_ITEM)))
        scorer.update(log((2, 0, 0), weight=0.0))
        assert scores(scorer) == before


def test_a_blend_learns_in_every_part_and_combines_by_its_rule() -> None:
    blend = Blend((Popular(2), Popular(2, half_life_ms=1)), total)
    blend.update(log((0, 0, 0), (5, 0, 1)))
    one, other = Popular(2), Popular(2, half_life_ms=1)
    for part in (one, other):
        part.update(log((0, 0, 0), (5, 0, 1)))
    expected = np.asarray(scores(one)) + np.asarray(scores(other))
    assert scores(blend) == pytest.approx(expected.tolist())


def test_neighbours_and_text_by_hand() -> None:
    near, alike = np.asarray([[0.02, 0.0]]), np.asarray([[0.1, -0.1]])
    found = neighbours_and_text(0.3)([near.astype(np.float32), alike.astype(np.float32)])
    assert found[0].tolist() == pytest.approx([np.log(2) + 0.3, -0.3])


def test_baskets_are_instants_of_a_user_with_every_item_once() -> None:
    rows = log((1, 1, 5), (1, 0, 2), (1, 0, 2), (1, 0, 1), (3, 0, 4))
    found = [(user, t, items.tolist()) for user, t, items in baskets(rows)]
    assert found == [(0, 1, [1, 2]), (0, 3, [4]), (1, 1, [5])]


@pytest.mark.parametrize("make", [LastBasket, ItemNeighbours, FadingNeighbours])
def test_a_catalogue_too_large_for_dense_pairs_is_refused(make: type) -> None:
    with pytest.raises(ValueError, match="at most 30000"):
        make(MOST_ITEMS + 1)
