"""Replays: order, pace, shift, stop, and what is reported."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stream.datasets import Dataset, load
from stream.errors import UserError
from stream.events import Event, Item
from stream.replay import Pacer, Plan, Progress, Replay, Summary, SystemClock

START_MS = 1_767_225_600_000  # 2026-01-01T00:00:00Z
NOW_MS = 1_800_000_000_000


class HandClock:
    """Time passes only by sleeping, or when a test says so."""

    def __init__(self) -> None:
        self.at_s = 1000.0
        self.longest_nap_s = 0.0

    def monotonic_s(self) -> float:
        return self.at_s

    def now_ms(self) -> int:
        return NOW_MS + round((self.at_s - 1000.0) * 1000)

    def sleep(self, seconds: float) -> None:
        assert seconds > 0
        self.longest_nap_s = max(self.longest_nap_s, seconds)
        self.at_s += seconds


class Log:
    """A sink that remembers what came when."""

    def __init__(self, clock: HandClock, on_event: Callable[[Event], None] | None = None) -> None:
        self._clock, self._on_event = clock, on_event
        self.calls: list[str] = []
        self.events: list[Event] = []
        self.at_s: list[float] = []  # since the clock began

    def send(self, event: Event) -> None:
        self.calls.append("event")
        self.events.append(event)
        self.at_s.append(self._clock.at_s - 1000.0)
        if self._on_event:
            self._on_event(event)

    def send_item(self, item: Item) -> None:
        self.calls.append("item")

    def flush(self) -> None:
        self.calls.append("flush")


def shop(folder: Path, *seconds: float, title: str = "Lamp", price: str = "1") -> Dataset:
    """A view at each second after the start, of one item."""
    path = folder / "shop.csv"
    rows = "".join(f"a,1,{START_MS + round(s * 1000)},{title},{price}\n" for s in seconds)
    path.write_text("user_id,item_id,ts,title,price\n" + rows)
    return load("csv", path, event_type="view")


def replayed(
    dataset: Dataset, plan: Plan, clock: HandClock | None = None
) -> tuple[Log, Summary, HandClock]:
    clock = clock or HandClock()
    log = Log(clock)
    return log, Replay(dataset, log, plan, clock=clock).run(), clock


def test_the_catalogue_is_in_its_topic_before_the_first_event(tmp_path: Path) -> None:
    log, summary, _ = replayed(shop(tmp_path, 0, 1), Plan(speed=None))
    assert log.calls == ["item", "flush", "event", "event", "flush"]
    assert (summary.items, summary.events, summary.stopped) == (1, {"view": 2}, False)


def test_events_go_out_at_their_recorded_distance_divided_by_the_speed(tmp_path: Path) -> None:
    log, summary, clock = replayed(shop(tmp_path, 0, 60, 90, 600), Plan(speed=60))
    assert log.at_s == pytest.approx([0, 1, 1.5, 10])
    assert (summary.span_s, summary.wall_s) == (600.0, pytest.approx(10))
    assert summary.speed_up == pytest.approx(60)
    assert clock.longest_nap_s <= 0.25  # a stop is heeded within one nap


def test_with_an_origin_even_the_first_event_waits_for_its_time(tmp_path: Path) -> None:
    plan = Plan(speed=2, origin_ms=START_MS - 10_000)
    log, *_ = replayed(shop(tmp_path, 0, 60), plan)
    assert log.at_s == pytest.approx([5, 35])


@pytest.mark.parametrize("speed", [0, None])
def test_without_a_speed_nothing_waits(tmp_path: Path, speed: float | None) -> None:
    log, *_ = replayed(shop(tmp_path, 0, 86_400), Plan(speed=speed))
    assert log.at_s == [0, 0]


def test_recorded_times_are_kept(tmp_path: Path) -> None:
    log, *_ = replayed(shop(tmp_path, 0, 5), Plan(speed=None))
    assert [event.ts for event in log.events] == [START_MS, START_MS + 5000]


def test_shifted_events_keep_their_distances_and_are_never_ahead_of_the_clock(
    tmp_path: Path,
) -> None:
    log, *_ = replayed(shop(tmp_path, 0, 60, 600), Plan(speed=60, shift_to_now=True))
    assert [event.ts - NOW_MS for event in log.events] == [-600_000, -540_000, 0]


def test_the_shift_is_taken_from_the_last_event_that_is_chosen(tmp_path: Path) -> None:
    plan = Plan(speed=None, shift_to_now=True, end_ms=START_MS + 60_001)
    log, *_ = replayed(shop(tmp_path, 0, 60, 600), plan)
    assert [event.ts - NOW_MS for event in log.events] == [-60_000, 0]


def test_start_is_inclusive_end_is_not_and_the_wait_begins_with_the_first_chosen(
    tmp_path: Path,
) -> None:
    plan = Plan(speed=1, start_ms=START_MS + 10_000, end_ms=START_MS + 13_000)
    log, *_ = replayed(shop(tmp_path, 0, 10, 12, 13), plan)
    assert [event.ts - START_MS for event in log.events] == [10_000, 12_000]
    assert log.at_s == pytest.approx([0, 2])


def test_a_limit_counts_events(tmp_path: Path) -> None:
    log, summary, _ = replayed(shop(tmp_path, 0, 1, 2), Plan(speed=None, limit=2))
    assert len(log.events) == summary.events.total() == 2
    none, *_ = replayed(shop(tmp_path, 0, 1, 2), Plan(speed=None, limit=0))
    assert none.events == []


def test_what_a_pause_delayed_goes_out_at_once_and_the_schedule_holds_again(
    tmp_path: Path,
) -> None:
    clock = HandClock()

    def stall_once(event: Event) -> None:
        if event.ts == START_MS + 1000:
            clock.at_s += 3

    log = Log(clock, stall_once)
    Replay(shop(tmp_path, 0, 1, 2, 3, 4, 5, 6), log, Plan(speed=1), clock=clock).run()
    assert log.at_s == pytest.approx([0, 1, 4, 4, 4, 5, 6], abs=0.01)


def test_a_rate_below_the_recorded_one_shows_as_a_growing_lag(tmp_path: Path) -> None:
    clock = HandClock()
    lags: list[float] = []
    dataset = shop(tmp_path, *(i / 10 for i in range(100)))
    plan = Plan(speed=1, rate=5)
    Replay(dataset, Log(clock), plan, lambda progress: lags.append(progress.lag_s), clock).run()
    assert lags == sorted(lags)
    assert lags[-1] == pytest.approx(99 / 5 - 99 / 10, abs=0.3)


def test_a_rate_caps_even_what_is_overdue(tmp_path: Path) -> None:
    clock = HandClock()

    def stall_once(event: Event) -> None:
        if event.ts == START_MS:
            clock.at_s += 30

    log = Log(clock, stall_once)
    dataset = shop(tmp_path, *(i / 100 for i in range(101)))
    Replay(dataset, log, Plan(speed=1, rate=10), clock=clock).run()
    assert log.at_s[1] == pytest.approx(30, abs=0.1)
    assert log.at_s[-1] - log.at_s[1] == pytest.approx(99 / 10, abs=0.1)


@given(
    st.lists(
        st.tuples(st.integers(0, 5000), st.floats(0, 2, allow_nan=False)), min_size=1, max_size=60
    ),
    st.sampled_from([None, 1.0, 3600.0]),
    st.sampled_from([1.0, 10.0, 1000.0]),
)
def test_no_stretch_of_time_holds_more_than_the_rate_and_its_slack(
    steps: list[tuple[int, float]], speed: float | None, rate: float
) -> None:
    pacer, now_s, ts_ms = Pacer(speed, rate), 0.0, 0
    sent_s: list[float] = []
    for gap_ms, stall_s in steps:
        ts_ms += gap_ms
        now_s = max(now_s, pacer.due_s(ts_ms, now_s))
        sent_s.append(now_s)
        now_s += stall_s
    for i, first in enumerate(sent_s):
        for j in range(i, len(sent_s)):
            assert j - i <= rate * (sent_s[j] - first + 0.05) + 1e-6


@given(st.lists(st.integers(0, 100_000), min_size=1, max_size=60), st.floats(0.5, 5000))
def test_a_sender_that_keeps_up_never_sends_before_the_schedule_and_never_lags(
    gaps_ms: list[int], speed: float
) -> None:
    pacer, now_s, ts_ms = Pacer(speed, None), 5.0, START_MS
    for gap_ms in gaps_ms:
        ts_ms += gap_ms
        now_s = max(now_s, pacer.due_s(ts_ms, now_s))
        assert now_s - 5 == pytest.approx((ts_ms - START_MS - gaps_ms[0]) / 1000 / speed, abs=1e-6)
        assert pacer.lag_s <= 1e-6


def test_stop_ends_after_the_event_in_hand_and_flushes(tmp_path: Path) -> None:
    clock = HandClock()
    log = Log(clock, lambda event: replay.stop())
    replay = Replay(shop(tmp_path, 0, 3600), log, Plan(speed=1), clock=clock)
    summary = replay.run()
    assert log.calls[-2:] == ["event", "flush"]
    assert (summary.events.total(), summary.stopped) == (1, True)
    assert clock.at_s == 1000.0


def test_ctrl_c_in_a_wait_flushes_and_still_says_what_was_sent(tmp_path: Path) -> None:
    ctrl_c = threading.Timer(0.05, os.kill, (os.getpid(), signal.SIGINT))
    log = Log(HandClock(), lambda event: ctrl_c.start())
    summary = Replay(shop(tmp_path, 0, 3600), log, Plan(speed=1), clock=SystemClock()).run()
    ctrl_c.join()
    assert log.calls[-1] == "flush"
    assert (summary.events.total(), summary.stopped) == (1, True)


def test_progress_is_told_at_least_every_second_and_at_the_end(tmp_path: Path) -> None:
    clock = HandClock()
    told: list[Progress] = []
    Replay(shop(tmp_path, 0, 30), Log(clock), Plan(speed=10), told.append, clock).run()
    walls_s = [progress.wall_s for progress in told]
    assert walls_s == sorted(walls_s)
    assert max(b - a for a, b in pairwise(walls_s)) <= 1
    last = told[-1]
    assert (last.items, last.events, last.ts_ms) == (1, 2, START_MS + 30_000)


def test_the_summary_tells_what_was_skipped(tmp_path: Path) -> None:
    path = tmp_path / "shop.csv"
    path.write_text(f"user_id,item_id,ts\na,1,{START_MS}\na,1,soon\n,1,{START_MS}\n")
    _, summary, _ = replayed(load("csv", path, event_type="view"), Plan(speed=None))
    assert sorted(skip.rows for skip in summary.skipped.values()) == [1, 1]
    assert {skip.example for skip in summary.skipped.values()} == {"row 2: 'soon'", "row 3"}


def test_a_replay_with_nothing_to_send_is_an_error_that_says_why(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no row of csv is an event.*price.*row 1: '-1'"):
        replayed(shop(tmp_path, 0, price="-1"), Plan(speed=None))
    with pytest.raises(UserError, match="between start and end"):
        replayed(shop(tmp_path, 0), Plan(speed=None, start_ms=START_MS + 1))


@pytest.mark.parametrize(
    "values", [{"speed": -1.0}, {"rate": float("nan")}, {"start_ms": 2, "end_ms": 1}]
)
def test_contradictory_plans_are_refused(values: dict[str, float]) -> None:
    with pytest.raises(UserError):
        Plan(**values)  # type: ignore[arg-type]
