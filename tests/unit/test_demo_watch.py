"""What the demo makes of metrics and activity: figures, quantiles, who is shown."""

from __future__ import annotations

import math

import pytest
from prometheus_client import generate_latest

from stream import metrics
from stream.demo_watch import (
    Activity,
    Meter,
    Sample,
    Slot,
    next_slots,
    noted,
    parse_sample,
    quantile_bound,
)

HALF_HOUR_MS = 30 * 60 * 1000
INF = math.inf


def sample(at_s: float, **values: int) -> Sample:
    counts = {
        name: values.get(name, 0)
        for name in (
            "applied", "settled", "lag_records", "saves", "hits", "misses", "items",
            "batches_begun", "swaps", "flip_s", "migrated",
        )
    }  # fmt: skip
    fast, slow = values.get("fast", 0), values.get("slow", 0)
    return Sample(
        at_s=at_s, freshness=((0.05, fast), (1.0, fast + slow), (INF, fast + slow)), **counts
    )


def test_the_workers_own_metrics_are_read_by_their_names() -> None:
    """The registry is the process': other tests may have counted in it."""
    before = parse_sample(generate_latest(metrics.REGISTRY).decode(), at_s=0.0)
    metrics.EVENTS_APPLIED.inc(5)
    metrics.EVENTS_REPEATED.inc(2)
    metrics.EVENTS_REJECTED.labels("a reason").inc(3)
    metrics.EVENTS_REJECTED.labels("another reason").inc(4)
    metrics.SAVES.inc(6)
    metrics.ITEMS_STORED.inc(7)
    metrics.LAG.set(8)
    metrics.ITEM_HITS.inc(9)
    metrics.ITEM_MISSES.inc(10)
    metrics.BATCH_RECORDS.observe(100)
    metrics.RELEASES_SWAPPED.inc()
    metrics.FLIP_S.observe(0.25)
    metrics.PROFILES_MIGRATED.labels("sweeper").inc(11)
    metrics.PROFILES_MIGRATED.labels("touch").inc(12)
    metrics.FRESHNESS_S.observe(0.03)
    metrics.FRESHNESS_S.observe(2.0)
    after = parse_sample(generate_latest(metrics.REGISTRY).decode(), at_s=1.0)
    assert after.applied - before.applied == 5
    assert after.settled - before.settled == 5 + 2 + 3 + 4
    assert after.saves - before.saves == 6
    assert after.items - before.items == 7
    assert after.lag_records == 8
    assert (after.hits - before.hits, after.misses - before.misses) == (9, 10)
    assert after.batches_begun - before.batches_begun == 1
    assert (after.swaps - before.swaps, after.flip_s - before.flip_s) == (1, 0.25)
    assert after.migrated - before.migrated == 11 + 12
    assert after.batches_done - before.batches_done == 2
    assert [bound for bound, _ in after.freshness] == sorted(b for b, _ in after.freshness)
    assert after.freshness[-1][0] == INF


def test_counts_are_since_the_first_sample_and_rates_of_the_last_ten_seconds() -> None:
    meter = Meter(sample(0.0, applied=1_000, hits=10, misses=90, saves=50, slow=100))
    meter.add(sample(10.0, applied=2_000, hits=100, misses=100, saves=60, slow=100, fast=1))
    meter.add(sample(20.0, applied=2_500, hits=190, misses=110, saves=80, slow=100, fast=90))
    now, whole = meter.now(), meter.whole()
    assert (now.events, whole.events) == (1_500, 1_500)
    assert (now.events_per_s, whole.events_per_s) == (50.0, 75.0)
    assert (now.saves_per_s, whole.saves_per_s) == (2.0, 1.5)
    assert now.cache_hits == 180 / 200
    assert (now.freshness_p50_s, now.freshness_p99_s) == (0.05, 0.05)  # the slow ones came before


def test_nothing_is_claimed_before_anything_was_measured() -> None:
    figures = Meter(sample(0.0, applied=7, slow=3)).now()
    assert figures.events == 0
    assert figures.events_per_s is None
    assert figures.cache_hits is None
    assert figures.freshness_p50_s is None


@pytest.mark.parametrize(
    ("counts", "q", "bound"),
    [
        ((0, 0, 0), 0.5, None),
        ((1, 1, 1), 0.5, 0.05),
        ((50, 100, 100), 0.5, 0.05),
        ((49, 100, 100), 0.5, 1.0),
        ((99, 100, 100), 0.99, 0.05),
        ((98, 100, 100), 0.99, 1.0),
        ((98, 98, 100), 0.99, INF),
    ],
)
def test_a_quantile_is_the_bound_that_so_many_lie_within(
    counts: tuple[int, ...], q: float, bound: float | None
) -> None:
    assert quantile_bound(list(zip((0.05, 1.0, INF), counts, strict=True)), q) == bound


def test_a_return_after_half_an_hour_of_event_time_is_another_visit() -> None:
    who = noted(None, 0, now_s=1.0)
    who = noted(who, HALF_HOUR_MS, now_s=1.1)
    assert who == Activity(1.1, HALF_HOUR_MS, visits=1)
    assert noted(who, 2 * HALF_HOUR_MS + 1, now_s=1.2).visits == 2


def users(slots: list[Slot]) -> list[str]:
    return [slot.user_id for slot in slots]


def test_free_places_go_to_who_came_back_most_often() -> None:
    activity = {
        "once": Activity(9.9, 0, visits=1),
        "often": Activity(9.0, 0, visits=5),
        "gone": Activity(7.0, 0, visits=9),
        "twice": Activity(9.5, 0, visits=2),
    }
    assert users(next_slots([], activity, 10.0, 2)) == ["often", "twice"]
    assert users(next_slots([], activity, 10.0, 4)) == ["often", "twice", "once"]


def test_a_shopper_stays_while_acting_and_until_readable() -> None:
    slots = [Slot("acting", 0.0), Slot("fresh", 16.0)]
    activity = {
        "acting": Activity(19.0, 0),
        "fresh": Activity(10.0, 0),
        "new": Activity(20.0, 0, visits=99),
    }
    assert next_slots(slots, activity, 20.0, 2) == slots


def test_one_idle_shopper_at_a_time_makes_room_in_place() -> None:
    slots = [Slot("idle", 0.0), Slot("idler", 0.0), Slot("acting", 0.0)]
    activity = {
        "idle": Activity(10.0, 0),
        "idler": Activity(9.0, 0),
        "acting": Activity(19.9, 0),
        "new": Activity(20.0, 0),
        "newer": Activity(20.0, 0, visits=2),
    }
    after = next_slots(slots, activity, 20.0, 3)
    assert users(after) == ["idle", "newer", "acting"]
    assert after[1] == Slot("newer", 20.0)


def test_nobody_leaves_for_nobody() -> None:
    slots = [Slot("idle", 0.0)]
    assert next_slots(slots, {"idle": Activity(1.0, 0)}, 100.0, 1) == slots


def test_a_smaller_screen_keeps_the_first() -> None:
    slots = [Slot("a", 0.0), Slot("b", 0.0)]
    activity = {"a": Activity(1.0, 0), "b": Activity(1.0, 0)}
    assert users(next_slots(slots, activity, 1.0, 1)) == ["a"]
