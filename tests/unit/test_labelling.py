from __future__ import annotations

import numpy as np
import pytest

from model.windows import HELD_BACK, Labelled
from profiles.schema import EVENT_TYPES, TYPE_CODE
from stream.contributions import DEFAULT_WEIGHTS
from stream.labelling import Archived, Rules, label, signed_weights

DAY_MS = 86_400_000
RULES = Rules(DEFAULT_WEIGHTS)


def events(*rows: tuple[str, str, int, int]) -> Archived:
    """User, type, t_ms, event key; item "a" each."""
    users = sorted({r[0] for r in rows})
    return Archived(
        users=users,
        item_ids=["a"],
        user=np.array([users.index(r[0]) for r in rows], np.int32),
        item=np.zeros(len(rows), np.int32),
        type=np.array([TYPE_CODE[r[1]] for r in rows], np.uint8),
        t_ms=np.array([r[2] for r in rows], np.int64),
        event=np.array([r[3] for r in rows], np.uint64),
        rating=np.full(len(rows), np.nan, np.float32),
        label=np.full(len(rows), "", object),
        source=np.ones(len(rows), np.uint64),
        offset=np.arange(len(rows), dtype=np.int64),
    )


def labelled(archived: Archived, now_ms: int = 100 * DAY_MS, rules: Rules = RULES) -> Labelled:
    return label(archived, {"a": 4}, EVENT_TYPES, rules, {1: now_ms})


def test_an_empty_archive_has_no_windows() -> None:
    out = labelled(events())
    assert len(out) == 0
    assert out.user == []


def test_a_user_with_one_event_has_one_window_without_a_future() -> None:
    out = labelled(events(("ann", "view", 0, 0)))
    assert out.start.tolist() == [0, 1]
    assert out.purchase.tolist() == [0]
    assert out.returns.tolist() == [0]


def test_everything_is_held_back_when_no_horizon_has_passed() -> None:
    out = labelled(events(("ann", "view", 0, 0), ("ann", "purchase", 1, 0)), now_ms=1)
    assert set(out.purchase.tolist()) == {HELD_BACK}
    assert set(out.returns.tolist()) == {HELD_BACK}


def test_a_clock_that_goes_backwards_is_put_in_event_time() -> None:
    out = labelled(events(("ann", "purchase", 5, 0), ("ann", "view", 3, 0)))
    assert out.t_ms.tolist() == [3, 5]
    assert out.purchase.tolist() == [1, 0]


def test_a_repeated_event_id_counts_once_for_its_user_only() -> None:
    out = labelled(events(("ann", "view", 1, 7), ("ann", "view", 1, 7), ("max", "view", 1, 7)))
    assert out.user == ["ann", "max"]
    assert out.start.tolist() == [0, 1, 2]


def test_a_flood_keeps_its_newest_events_and_their_labels() -> None:
    flood = [("bot", "view", t, 0) for t in range(1_000)]
    out = labelled(events(*flood), rules=Rules(DEFAULT_WEIGHTS, user_events=10))
    assert out.t_ms.tolist() == list(range(990, 1_000))


def test_an_impression_is_no_return() -> None:
    out = labelled(events(("ann", "view", 0, 0), ("ann", "impression", 1, 0)))
    assert out.returns.tolist() == [0, 0]


def test_a_review_is_worth_what_its_stars_say() -> None:
    review = TYPE_CODE["review"]
    types = np.array([review, review, review], np.uint8)
    stars = np.array([1, 3, 5], np.float32)
    assert signed_weights(types, stars, EVENT_TYPES, DEFAULT_WEIGHTS).tolist() == [-1, 0, 1]


def test_rules_that_cannot_be_are_refused() -> None:
    with pytest.raises(ValueError, match="user_events"):
        Rules(DEFAULT_WEIGHTS, user_events=0)


def test_taken_users_keep_their_events() -> None:
    out = labelled(events(("ann", "view", 1, 0), ("max", "view", 2, 0), ("max", "view", 3, 0)))
    taken = out.take_users(np.array([1]))
    assert taken.user == ["max"]
    assert taken.t_ms.tolist() == [2, 3]


def test_given_ratings_and_labels_are_the_labels_of_their_windows() -> None:
    given = events(("ann", "review", 1, 7), ("ann", "message", 2, 8), ("ann", "view", 3, 0))
    given.rating[0], given.label[1] = 2.0, "refund"
    out = labelled(given)
    assert out.rating is not None
    assert out.rating[0] == 2.0
    assert np.isnan(out.rating[1:]).all()
    assert out.label == ["", "refund", ""]


def test_a_label_may_come_later_with_a_repeat_and_the_last_one_counts() -> None:
    rows = (
        ("ann", "message", 5, 8),
        ("ann", "message", 5, 8),
        ("ann", "message", 5, 8),
        ("bob", "message", 5, 8),
        ("bob", "message", 6, 0),
        ("bob", "message", 6, 0),
    )
    given = events(*rows)
    given.label[[1, 2, 5]] = ["negative", "refund", "praise"]
    out = labelled(given)
    assert out.label == ["refund", "", "", "praise"]  # events without an id are no repeats


def test_labels_are_the_same_in_any_order_of_rows() -> None:
    given = events(*[("ann", "message", 5, 8)] * 3)
    given.label[:] = ["negative", "", "refund"]
    for order in ([0, 1, 2], [2, 1, 0], [1, 2, 0]):
        shuffled = Archived(
            given.users,
            given.item_ids,
            **{
                name: getattr(given, name)[order]
                for name in (
                    "user", "item", "type", "t_ms", "event", "rating", "label", "source", "offset",
                )
            },
        )  # fmt: skip
        assert labelled(shuffled).label == ["refund"]


def test_chosen_events_keep_their_users_and_labels() -> None:
    out = labelled(
        events(
            ("ann", "view", 1, 0),
            ("ann", "purchase", 9, 1),
            ("max", "view", 2, 0),
            ("max", "view", 3, 1),
        )
    )
    late = out.take_events(out.t_ms >= 3)
    assert late.user == ["ann", "max"]
    assert late.start.tolist() == [0, 1, 2]
    assert late.t_ms.tolist() == [9, 3]
    early = out.take_events(out.t_ms < 2)
    assert early.start.tolist() == [0, 1, 1]
    # As it was: a label may lie beyond what is taken.
    assert early.purchase.tolist() == out.purchase[:1].tolist() == [1]
