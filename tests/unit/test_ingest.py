"""What the trainer makes of micro-batches, on a real folder."""

from __future__ import annotations

import itertools
import json
import logging
import time
from pathlib import Path

import confluent_kafka as kafka
import pytest

from stream import metrics
from stream.archive import Archive, Folder
from stream.ingest import Ingest
from stream.intake import MicroBatch, Slice
from stream.settings import ArchiveSettings
from stream.times import DAY_MS
from tests.archived_events import T0_MS, records

AHEAD_MS = 300_000


@pytest.fixture
def archive(tmp_path: Path) -> Archive:
    return Archive(Folder(tmp_path / "archive"))


@pytest.fixture
def ingest(archive: Archive, monkeypatch: pytest.MonkeyPatch) -> Ingest:
    monkeypatch.setattr("stream.ingest._TIDY_IDLE_S", 0.0)
    return Ingest(archive, ArchiveSettings(retention_days=30), AHEAD_MS)


def batch(
    values: list[bytes],
    first: int = 0,
    *,
    partition: int = 0,
    record_ms: int = T0_MS + DAY_MS,
    clock: int = kafka.TIMESTAMP_LOG_APPEND_TIME,
    today: tuple[int, ...] = (),
) -> MicroBatch:
    m = len(values)
    offsets = list(range(first, first + m))
    piece = Slice("events", partition, 1, 7 + partition, offsets, [None] * m, list(values))
    piece.timestamps_ms.extend([record_ms] * m)
    piece.clocks.add(clock)
    return MicroBatch((piece,), frozenset(today))


def event(type_: str, user: str, ts: int, item: str = "i") -> bytes:
    told = {"type": type_, "user_id": user, "ts": ts}
    return json.dumps(told | ({} if type_ == "forget" else {"item_id": item})).encode()


def times(archive: Archive) -> list[int]:
    return [t for table in archive.read() for t in table["t_ms"].to_pylist()]


@pytest.mark.parametrize("clock", [kafka.TIMESTAMP_CREATE_TIME, kafka.TIMESTAMP_LOG_APPEND_TIME])
def test_a_clock_that_was_set_back_loses_no_event(
    archive: Archive, ingest: Ingest, clock: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(time, "time_ns", lambda: (T0_MS - DAY_MS) * 1_000_000)
    ingest.take(batch(records(50), clock=clock))
    ingest.flush({})
    assert len(times(archive)) == 50


def test_one_event_of_a_far_future_does_not_make_all_others_old(
    archive: Archive, ingest: Ingest
) -> None:
    now_ms = time.time_ns() // 1_000_000
    years_ahead_ms = now_ms + 1000 * DAY_MS
    values = [event("view", "u", now_ms), event("view", "u", years_ahead_ms)]
    ingest.take(batch(values, record_ms=years_ahead_ms, clock=kafka.TIMESTAMP_CREATE_TIME))
    ingest.flush({})
    ingest.tidy()
    assert times(archive) == [now_ms, years_ahead_ms]


def test_what_is_no_event_is_counted_and_told_once_for_each_reason(
    archive: Archive, ingest: Ingest, caplog: pytest.LogCaptureFixture
) -> None:
    def counted(reason: str) -> float:
        return metrics.ARCHIVE_REJECTED.labels(reason)._value.get()

    before = {reason: counted(reason) for reason in ("json", "future_ts")}
    late = event("view", "u", T0_MS + 2 * DAY_MS)
    with caplog.at_level(logging.WARNING):
        for n in range(3):
            ingest.take(batch([b"not json", late, *records(5)], 10 * n))
    ingest.flush({})
    assert len(times(archive)) == 15
    assert {reason: counted(reason) - n for reason, n in before.items()} == {
        "json": 3, "future_ts": 3,
    }  # fmt: skip
    assert [r.getMessage().partition(":")[0] for r in caplog.records] == [
        "events[0] at 0 is not archived (json)",
        "events[0] at 1 is not archived (future_ts)",
    ]


def test_a_damaged_segment_stops_nothing(
    archive: Archive, ingest: Ingest, caplog: pytest.LogCaptureFixture
) -> None:
    for n in range(3):
        ingest.take(batch([event("view", "u", T0_MS)] * 10, 10 * n))
        ingest.flush({})
    segment = list(archive.segments())[1]
    archive.store.write({segment.name: b"PAR1 torn"})
    ingest.tidy()
    assert f"{segment.name} in the archive is damaged" in caplog.text
    assert metrics.ARCHIVE_DAMAGED._value.get() == 1
    ingest.take(batch([event("view", "u", T0_MS)] * 10, 30))
    ingest.flush({})
    assert len(times(archive)) == 30


def test_who_was_forgotten_is_left_out_of_what_a_partition_that_lags_brings(
    archive: Archive, ingest: Ingest
) -> None:
    """Also after a restart, and of the same flush."""
    before, after = T0_MS + 1000, T0_MS + 2 * AHEAD_MS
    command = [event("forget", "u", T0_MS)]

    def brings(*times_ms: int, partition: int, first: int = 0) -> MicroBatch:
        values = [event("view", user, t) for t in times_ms for user in ("u", "other")]
        return batch(values, first, partition=partition, record_ms=T0_MS + DAY_MS)

    ingest.take(brings(before, partition=1))
    ingest.take(batch(command, partition=0, record_ms=T0_MS + 1000))
    ingest.flush({})
    assert times(archive) == [before]
    ingest = Ingest(Archive(archive.store), ArchiveSettings(), AHEAD_MS)
    ingest.take(brings(before, after, partition=2))
    ingest.flush({})
    assert times(archive) == [before, before, after, after]


def test_whom_it_remembers_is_bounded_and_reading_knows_the_rest(
    archive: Archive, ingest: Ingest, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("stream.archive._MOST_FORGOTTEN", 2)
    users = ["u0", "u1", "u2"]
    for i, user in enumerate(users):
        ingest.take(batch([event("forget", user, T0_MS + i)], i, record_ms=T0_MS + i))
        ingest.flush({})
    ingest.take(batch([event("view", user, T0_MS) for user in users], partition=1))
    ingest.flush({})
    assert archive.stats().rows == 1
    assert times(archive) == []


def test_a_copy_of_a_segment_brings_nobody_back(archive: Archive, ingest: Ingest) -> None:
    ingest.take(batch([event("view", user, T0_MS) for user in ("u", "other")]))
    ingest.flush({})
    (segment,) = archive.segments()
    with archive.store.read(segment.name) as file:
        copy = file.read()
    ingest.take(batch([event("forget", "u", T0_MS)], 2))
    ingest.flush({})
    archive.store.write({segment.name: copy})
    assert [u for table in archive.read() for u in table["user"].to_pylist()] == ["other"]


def test_a_quiet_partition_is_as_far_as_the_others_were_when_it_was_last_at_its_end(
    archive: Archive, ingest: Ingest
) -> None:
    day = itertools.count()

    def flush_a_day(at_end: dict[int, float]) -> None:
        n = next(day)
        values = [event("view", "u", T0_MS + n * DAY_MS)]
        ingest.take(batch(values, n, record_ms=T0_MS + n * DAY_MS, today=(7, 8, 9)))
        ingest.flush(at_end)

    flush_a_day({})
    assert archive.reached() == {7: 0, 8: 0, 9: 0}
    at_end = time.monotonic()
    flush_a_day({9: at_end})
    assert archive.reached() == {7: 0, 8: 0, 9: T0_MS}
    flush_a_day({8: at_end, 9: time.monotonic()})
    assert archive.reached() == {7: 0, 8: T0_MS, 9: T0_MS + DAY_MS}
    ingest = Ingest(archive, ArchiveSettings(), AHEAD_MS)  # a restart
    flush_a_day({9: time.monotonic()})
    assert archive.reached() == {7: 0, 8: T0_MS, 9: T0_MS + DAY_MS}
    flush_a_day({9: time.monotonic()})
    assert archive.reached() == {7: 0, 8: T0_MS, 9: T0_MS + 3 * DAY_MS}


def test_an_event_of_a_wrong_clock_tells_no_time(archive: Archive, ingest: Ingest) -> None:
    now_ms = time.time_ns() // 1_000_000
    wrong_ms = now_ms + 1000 * DAY_MS
    for at_end in ({}, {8: time.monotonic() + 1}):
        values = [event("view", "u", now_ms), event("view", "u", wrong_ms)]
        ingest.take(batch(values, record_ms=wrong_ms, today=(7, 8)))
        ingest.flush(at_end)
    assert archive.reached() == {7: 0, 8: now_ms}
