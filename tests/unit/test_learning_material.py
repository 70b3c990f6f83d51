"""Which windows a turn of learning makes of an archive on disk."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from model.windows import HELD_BACK, Labelled
from stream.archive import Archive, Folder, Pending
from stream.events import Event, Purchase, View
from stream.learning_material import labelled
from stream.refold import spill
from stream.settings import ArchiveSettings, LearnSettings, Settings
from stream.times import DAY_MS
from tests.archived_events import T0_MS

NOW = datetime.fromtimestamp(T0_MS / 1000, UTC)


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    return Settings(archive=ArchiveSettings(url=str(tmp_path / "archive")))


@pytest.fixture
def archive(settings: Settings) -> Archive:
    return Archive(Folder(Path(settings.archive.url)))


def fill(archive: Archive, events: list[Event], first: int = 0, source: int = 7) -> None:
    pending = Pending(source, 0, first, first)
    pending.add(range(first, first + len(events)), events, first + len(events))
    archive.write(pending)


def view(user: str, t_ms: int) -> View:
    return View(user_id=user, item_id="i", ts=t_ms)


def test_an_event_of_a_clock_that_was_ahead_is_kept_and_waits_until_its_time_has_come(
    settings: Settings, archive: Archive, tmp_path: Path
) -> None:
    fill(archive, [view("u", T0_MS), view("u", T0_MS + 10 * DAY_MS)])
    windows = labelled(settings, ["i"], archive, NOW)
    assert windows.t_ms.tolist() == [T0_MS]
    parts = spill(archive, tmp_path / "parts", {}, "", lambda done, of: None, T0_MS)
    assert [t for taken in parts.read(0, {}, "USD", frozenset()) for t in taken.columns.t_ms] == [
        T0_MS
    ]
    later = datetime.fromtimestamp((T0_MS + 10 * DAY_MS) / 1000, UTC)
    assert len(labelled(settings, ["i"], archive, later)) == 2


def test_a_shopper_of_a_partition_that_lags_is_held_back_and_no_negative(
    settings: Settings, archive: Archive
) -> None:
    """After a trainer was down, it has one partition up to now and another up to day 2."""
    busy = [view("busy", T0_MS + n * DAY_MS) for n in range(50)]
    slow = [view("slow", T0_MS + n * DAY_MS) for n in range(3)]
    fill(archive, busy, source=1)
    fill(archive, slow, source=2)
    now = NOW + timedelta(days=50)
    windows = labelled(settings, ["i"], archive, now)
    assert windows.user == ["busy", "slow"]
    mine, theirs = windows.purchase[:50].tolist(), windows.purchase[50:].tolist()
    assert mine == [0] * 42 + [HELD_BACK] * 8
    assert theirs == [HELD_BACK] * 3
    assert windows.returns[50:].tolist() == [HELD_BACK] * 3
    # It comes, and they bought.
    bought = [Purchase(user_id="slow", item_id="i", ts=T0_MS + 3 * DAY_MS)]
    fill(archive, [*bought, *(view("other", T0_MS + n * DAY_MS) for n in (3, 49))], 3, source=2)
    windows = labelled(settings, ["i"], archive, now)
    assert windows.purchase[windows.start[2] :].tolist() == [1, 1, 1, 0]


def test_a_quiet_partition_and_one_of_before_are_as_far_as_the_trainer_said(
    settings: Settings, archive: Archive
) -> None:
    for source, user in ((1, "busy"), (2, "quiet"), (3, "of a topic of before")):
        fill(archive, [view(user, T0_MS)], source=source)
    fill(archive, [view("other", T0_MS + 40 * DAY_MS)], 1, source=1)
    now = NOW + timedelta(days=50)

    def held_back() -> list[str]:
        windows = labelled(settings, ["i"], archive, now)
        return [u for u, at in zip(windows.user, windows.start, strict=False)
                if windows.returns[at] == HELD_BACK and u != "other"]  # fmt: skip

    assert held_back() == ["of a topic of before", "quiet"]
    archive.note_reached({1: 0, 2: T0_MS + DAY_MS})
    assert held_back() == ["of a topic of before", "quiet"]
    archive.note_reached({1: 0, 2: T0_MS + 31 * DAY_MS})
    assert held_back() == []
    archive.store.write({"reached.json": b"torn"})
    assert held_back() == ["of a topic of before", "quiet"]


def test_of_a_large_archive_a_part_of_the_shoppers_is_read_with_labels_unchanged(
    settings: Settings, archive: Archive, caplog: pytest.LogCaptureFixture
) -> None:
    users = [f"u{n}" for n in range(60)]
    days = [d for d in range(200) if d % 10 < 7]  # some come back within the horizon, some do not
    for at, d in enumerate(days):
        day = [view(user, T0_MS + d * DAY_MS) for user in users]
        fill(archive, day, first=at * len(users))
    now = NOW + timedelta(days=200)

    def read(most: int, at: datetime = now) -> Labelled:
        learn = LearnSettings(most_events=most, newest_days=50, return_days=2)
        return labelled(settings.model_copy(update={"learn": learn}), ["i"], archive, at)

    def by_user(windows: Labelled) -> dict[str, dict[int, int]]:
        return {
            user: dict(
                zip(*(x[a:b].tolist() for x in (windows.t_ms, windows.returns)), strict=True)
            )
            for user, a, b in zip(windows.user, windows.start, windows.start[1:], strict=False)
        }

    everything = read(len(users) * len(days))
    assert len(everything) == len(users) * len(days)
    assert caplog.text == ""
    for most in (1_500, 2_500, 4_000):
        some = read(most)
        assert 0.6 * most < len(some) < 1.4 * most  # chance, of 60 shoppers
        assert "LEARN_MOST_EVENTS" in caplog.text
        newest_ms = T0_MS + 150 * DAY_MS
        whole = by_user(everything)
        found = by_user(some)
        for user, labels in found.items():
            newest = {t: x for t, x in whole[user].items() if t >= newest_ms}
            assert {t: x for t, x in labels.items() if t >= newest_ms} == newest
            assert labels in (newest, whole[user])
        older = sum(len(labels) > 40 for labels in found.values())
        assert 0 < older <= len(found)
    assert read(1_500).user == read(1_500).user != read(1_500, now + timedelta(hours=1)).user
