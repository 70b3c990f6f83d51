"""Which windows a turn of learning makes of an archive on disk."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path

import pytest

from stream.archive import Archive, Folder, Pending
from stream.events import Event, View
from stream.learning_material import labelled
from stream.refold import spill
from stream.settings import ArchiveSettings, Settings
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
