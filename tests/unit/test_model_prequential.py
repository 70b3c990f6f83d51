"""The loop on a log that fits on a page."""

from __future__ import annotations

import numpy as np
import pytest

from model.evaluate import Floats, Ints
from model.prequential import NO_ITEM, Events, prequential


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


class Counts:
    """How often each item happened."""

    def __init__(self, n_items: int) -> None:
        self.counts = np.zeros(n_items, dtype=np.float32)
        self.calls: list[list[int]] = []  # users of each call

    def scores(self, users: Ints, t_ms: Ints) -> Floats:
        self.calls.append(users.tolist())
        return np.tile(self.counts, (len(users), 1))

    def update(self, events: Events) -> None:
        np.add.at(self.counts, events.item[events.item >= 0], 1)


# User 0 buys a basket of 1 and 2, user 1 buys 1, user 0 buys 1 again and, new to everybody, 3.
DAY = log((10, 0, 1), (10, 0, 2), (20, 1, 1), (30, 0, 1), (30, 0, 3))


def test_every_basket_is_ranked_with_what_came_before_it() -> None:
    found = prequential(DAY, 2, 4, {"counts": Counts(4)})
    # Nothing is known at 10: all tie, and take the worst place. At 20 items 1 and 2 lead with one
    # each; at 30 item 1 leads, and 3 ties with 0 at the end.
    assert found.rank["counts"].tolist() == [4, 4, 2, 1, 4]
    assert found.targets.basket.tolist() == [0, 0, 1, 2, 2]
    assert found.targets.event.tolist() == [0, 1, 2, 3, 4]


def test_targets_are_described_by_what_came_before_them() -> None:
    of = prequential(DAY, 2, 4, {}).targets
    assert of.repeat.tolist() == [False, False, False, True, False]
    assert of.user_events.tolist() == [0, 0, 0, 2, 2]
    assert of.item_age_ms.tolist() == [-1, -1, 10, 20, -1]


def test_among_new_items_the_users_own_are_left_out() -> None:
    found = prequential(DAY, 2, 4, {"counts": Counts(4)})
    # At 30 user 0 had 1 and 2: item 3 ties with 0 for the places 1 and 2; item 1 is no discovery.
    assert found.rank_new["counts"].tolist() == [4, 4, 2, 0, 2]


def test_an_item_twice_in_a_basket_is_one_target() -> None:
    found = prequential(log((10, 0, 1), (10, 0, 1), (11, 0, 1)), 1, 3, {"counts": Counts(3)})
    assert found.targets.event.tolist() == [0, 2]


def test_events_before_the_start_are_learned_and_not_ranked() -> None:
    counts = Counts(4)
    found = prequential(DAY, 2, 4, {"counts": counts}, start=2)
    assert found.targets.event.tolist() == [2, 3, 4]
    assert found.rank["counts"].tolist() == [2, 1, 4]
    assert counts.calls == [[1], [0]]


def test_events_after_the_stop_are_not_told() -> None:
    counts = Counts(4)
    found = prequential(DAY, 2, 4, {"counts": counts}, stop=3)
    assert len(found.targets) == 3
    assert counts.counts.tolist() == [0, 2, 1, 0]


def test_what_has_no_item_or_no_positive_weight_is_told_and_not_looked_up() -> None:
    counts = Counts(4)
    searches = log((10, 0, NO_ITEM), (20, 1, 2))
    assert len(prequential(searches, 2, 4, {"counts": counts}).targets) == 1
    assert counts.calls == [[1]]
    assert len(prequential(log((10, 0, 1), weight=-0.4), 1, 2, {}).targets) == 0


def test_simultaneous_baskets_are_ranked_in_one_call() -> None:
    counts = Counts(4)
    prequential(log((10, 0, 1), (10, 1, 2), (11, 0, 1)), 2, 4, {"counts": counts})
    assert counts.calls == [[0, 1], [0]]


def test_larger_blocks_ask_for_more_at_once_and_never_twice_for_one_user() -> None:
    counts = Counts(4)
    rows = log((10, 0, 1), (11, 1, 2), (12, 2, 3), (13, 0, 1), (14, 1, 1))
    found = prequential(rows, 3, 4, {"counts": counts}, block=8)
    assert counts.calls == [[0, 1, 2], [0, 1]]
    assert found.rank["counts"].tolist() == [4, 4, 4, 3, 3]  # of three that tie


def test_coverage_counts_what_surely_stood_among_the_first() -> None:
    rows = log(*((t, 0, t % 3) for t in range(30)))
    found = prequential(rows, 1, 50, {"counts": Counts(50)})
    # The other 47 items tie at zero for the places 4 to 50.
    assert found.coverage["counts"] == pytest.approx(3 / 50)


def test_a_scorer_whose_scores_are_not_numbers_is_named() -> None:
    class Broken(Counts):
        def scores(self, users: Ints, t_ms: Ints) -> Floats:
            return super().scores(users, t_ms) * np.float32("nan")

    with pytest.raises(ValueError, match="broken: a score is not a number"):
        prequential(DAY, 2, 4, {"broken": Broken(4)})


def test_a_log_out_of_order_is_refused() -> None:
    with pytest.raises(ValueError, match="not in the order"):
        prequential(log((10, 0, 1), (9, 0, 1)), 1, 2, {})


def test_an_empty_log_has_no_targets() -> None:
    found = prequential(DAY.take(slice(0, 0)), 2, 4, {"counts": Counts(4)})
    assert len(found.targets) == 0
    assert found.rank["counts"].tolist() == []
    assert found.coverage == {"counts": 0.0}
