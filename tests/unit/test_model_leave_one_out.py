"""The split of the published tables, and both ways of counting."""

from __future__ import annotations

import numpy as np

from model.evaluate import Floats, Ints
from model.leave_one_out import rank_targets, split
from model.prequential import Events


def events(*rows: tuple[int, int]) -> Events:
    """(user, item) in order; the time is the position."""
    user, item = zip(*rows, strict=True)
    n = len(rows)
    return Events(
        np.asarray(user, dtype=np.int64),
        np.asarray(item, dtype=np.int32),
        np.zeros(n, dtype=np.uint8),
        np.arange(n, dtype=np.int64),
        np.ones(n, dtype=np.float32),
    )


class Fixed:
    """The same scores for everybody."""

    def __init__(self, scores: list[float]) -> None:
        self._scores = np.asarray(scores, dtype=np.float32)

    def scores(self, users: Ints, t_ms: Ints) -> Floats:
        return np.broadcast_to(self._scores, (len(users), len(self._scores)))

    def update(self, events: Events) -> None:
        pass


LOG = events((0, 1), (1, 4), (0, 2), (1, 3), (0, 3), (1, 2), (0, 0), (2, 1), (2, 2))


def test_the_last_item_is_the_test_and_the_one_before_it_the_validation() -> None:
    test, validation = split(LOG), split(LOG, "validation")
    assert (test.user.tolist(), test.item.tolist()) == ([0, 1], [0, 2])
    assert test.t_ms.tolist() == [6, 5]
    assert validation.item.tolist() == [3, 3]


def test_the_validation_item_belongs_to_the_history_of_the_test_only() -> None:
    assert split(LOG).history.item.tolist() == [1, 2, 3, 4, 3, 1, 2]
    assert split(LOG, "validation").history.item.tolist() == [1, 2, 4, 1, 2]


def test_users_with_two_events_are_history_and_no_target() -> None:
    of = split(LOG)
    assert 2 not in of.user.tolist()
    assert of.history.item[of.history.user == 2].tolist() == [1, 2]


def test_seen_items_are_kept_or_masked() -> None:
    scorer = Fixed([1.0, 5.0, 4.0, 3.0, 2.0])
    found = rank_targets(scorer, 5, split(LOG))
    assert found.kept.tolist() == [5, 2]  # items 0 and 2
    assert found.masked.tolist() == [2, 2]  # user 0 had 1, 2, 3; user 1 had 4, 3
    assert found.repeat.tolist() == [False, False]


def test_a_repeated_item_ranks_last_where_seen_items_are_masked() -> None:
    found = rank_targets(Fixed([9.0, 1.0, 0.0]), 3, split(events((0, 0), (0, 1), (0, 0))))
    assert found.repeat.tolist() == [True]
    assert (found.kept.tolist(), found.masked.tolist()) == ([1], [3])


def test_nobody_with_enough_events_gives_no_targets() -> None:
    found = rank_targets(Fixed([1.0, 0.0]), 2, split(events((0, 0), (0, 1))))
    assert len(found.user) == len(found.kept) == len(found.repeat) == 0
