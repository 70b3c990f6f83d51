from __future__ import annotations

import errno
import io
import json
import os
import resource
import shutil
import subprocess
import sys
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from typer.testing import CliRunner

from profiles.schema import EVENT_TYPES, key64
from stream import events as ev
from stream.archive import (
    Archive,
    Command,
    Folder,
    Pending,
    Segment,
    archived,
    hashed,
    open_store,
    parse_name,
)
from stream.archive import events as events_of
from stream.cli import app
from stream.contributions import DEFAULT_WEIGHTS
from stream.contributions import columns as contributions
from stream.errors import UserError
from stream.labelling import Rules, label
from stream.times import DAY_MS, HOUR_MS
from tests.archived_events import T0_MS, parsed, records, write

N = 300


@pytest.fixture
def archive(tmp_path: Path) -> Archive:
    return Archive(Folder(tmp_path / "archive"))


@pytest.fixture(params=["day at once", "hour by hour"])
def way_of_reading(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param == "hour by hour":
        monkeypatch.setattr("stream.archive._DAY_AT_ONCE_BYTES", -1)


@pytest.fixture(scope="module")
def shop() -> list[ev.Event]:
    return parsed(records(N))


def offsets(archive: Archive, start_ms: int = 0, end_ms: int = 1 << 60) -> list[int]:
    return [o for t in archive.read(start_ms, end_ms) for o in t["offset"].to_pylist()]


def test_an_empty_archive_reads_as_nothing(archive: Archive) -> None:
    assert list(archive.read()) == []
    stats = archive.stats()
    assert (stats.segments, stats.rows, stats.first_ms) == (0, 0, None)
    assert archive.compact() == 0
    assert archive.expire(1, 1) == 0
    columns = archived(archive.read())
    assert len(label(columns, {}, EVENT_TYPES, Rules(DEFAULT_WEIGHTS), {})) == 0


def test_events_come_back_whole_in_event_time(archive: Archive, shop: list[ev.Event]) -> None:
    assert write(archive, shop, 0, N) == N
    table = pa.concat_tables(archive.read(chunk_rows=50))
    assert table["t_ms"].to_pylist() == sorted(e.ts for e in shop)
    for row in table.to_pylist():
        event = shop[row["offset"]]
        assert row["user"] == event.user_id
        assert EVENT_TYPES[row["type"]] == event.type
        assert row["item"] == getattr(event, "item_id", "")
        assert row["text"] == (getattr(event, "text", "") or getattr(event, "query", ""))
        assert (row["rating"] == 4.5) == (event.type == "review")


def test_labels_reach_the_windows(archive: Archive) -> None:
    shopper = {"user_id": "u", "ts": T0_MS}
    events: list[ev.Event] = [
        ev.Message(**shopper, event_id="m", text="It broke."),
        ev.Review(**shopper, item_id="i", rating=1, label="negative"),
        ev.Message(**shopper, event_id="m", text="It broke.", label="refund"),
    ]
    write(archive, events, 0, 3)
    windows = label(archived(archive.read()), {}, EVENT_TYPES, Rules(DEFAULT_WEIGHTS), {7: T0_MS})
    assert windows.label == ["refund", "negative"]


def test_segments_of_before_labels_are_read_merged_and_erased_from(archive: Archive) -> None:
    events = parsed(records(60, span_ms=DAY_MS // 2))
    write(archive, events, 0, 60)
    for segment in archive.segments():
        with archive.store.read(segment.name) as file:
            old = pq.read_table(file).drop_columns("label")
        sink = pa.BufferOutputStream()
        pq.write_table(old, sink)
        archive.store.write({segment.name: sink.getvalue()})
    late = ev.View(user_id="u", item_id="i", ts=T0_MS + 2 * DAY_MS)
    write(archive, [*events, late], 60, 61)
    assert sorted(offsets(archive)) == list(range(61))
    assert archive.forget({events[0].user_id: [Command(7, 60, 0, 0)]}) > 0
    assert archive.compact() > 0
    table = pa.concat_tables(archive.read())
    assert set(table["label"].to_pylist()) == {""}
    assert events[0].user_id not in table["user"].to_pylist()


@pytest.mark.usefixtures("way_of_reading")
def test_a_range_is_read_to_the_millisecond(archive: Archive, shop: list[ev.Event]) -> None:
    write(archive, shop, 0, N)
    start, end = T0_MS + HOUR_MS // 2, T0_MS + 2 * HOUR_MS + 1
    expected = {i for i, e in enumerate(shop) if start <= e.ts < end}
    assert set(offsets(archive, start, end)) == expected


def test_a_retry_overwrites_and_other_borders_count_once(
    archive: Archive, shop: list[ev.Event]
) -> None:
    write(archive, shop, 0, 100)
    before = archive.segments()
    write(archive, shop, 0, 100)
    assert archive.segments() == before
    write(archive, shop, 60, 250)
    write(archive, shop, 40, N)
    assert sorted(offsets(archive)) == list(range(N))
    assert archive.stats().rows > N
    assert archive.compact() > 0
    assert sorted(offsets(archive)) == list(range(N))
    assert archive.stats().rows == N


def test_one_offset_of_two_sources_is_two_events(archive: Archive, shop: list[ev.Event]) -> None:
    write(archive, shop, 0, 10, source=1)
    write(archive, shop, 0, 10, source=2)
    assert len(offsets(archive)) == 20


def test_small_segments_of_past_days_become_one(archive: Archive) -> None:
    shop = parsed(records(N, span_ms=2 * DAY_MS))
    for first in range(0, N, 50):
        write(archive, shop, first, first + 50)
    archive.compact()
    days = [s.day for s in archive.segments() if s.hour == -1]
    assert days == [T0_MS // DAY_MS]
    assert sorted(offsets(archive)) == list(range(N))
    late = offsets(archive, T0_MS + 5 * HOUR_MS, T0_MS + 6 * HOUR_MS)
    expected = {i for i, e in enumerate(shop) if 5 <= (e.ts - T0_MS) / HOUR_MS < 6}
    assert set(late) == expected


def test_long_work_shows_that_it_moves(tmp_path: Path, shop: list[ev.Event]) -> None:
    steps = 0

    def step() -> None:
        nonlocal steps
        steps += 1

    archive = Archive(Folder(tmp_path), step)
    write(archive, shop, 0, N)
    segments, before = len(archive.segments()), steps
    assert archive.forget({"nobody": [Command(7, N, 0, 0)]}) == 0
    assert steps - before >= segments > 1


class Dies(Exception):
    """The process ends here."""


class Mortal(Folder):
    """A folder whose process dies before its n-th change."""

    def __init__(self, path: Path, changes: int) -> None:
        super().__init__(path)
        self.left = changes

    def _change(self) -> None:
        if self.left == 0:
            raise Dies
        self.left -= 1

    def write(self, files: Mapping[str, Any]) -> None:
        self._change()
        super().write(files)

    def remove(self, name: str) -> None:
        self._change()
        super().remove(name)


def sparse(folder: Path) -> tuple[Archive, list[ev.Event]]:
    """100 events of 10 days from two partitions, in many small segments."""
    events = parsed(records(100, span_ms=10 * DAY_MS, users=5))
    archive = Archive(Folder(folder))
    for source, half in ((1, events[::2]), (2, events[1::2])):
        for first in range(0, 50, 25):
            write(archive, half, first, first + 25, source)
    return archive, events


def places(archive: Archive) -> list[tuple[int, int]]:
    return [
        place
        for t in archive.read()
        for place in zip(t["source"].to_pylist(), t["offset"].to_pylist(), strict=True)
    ]


def test_a_sparse_archive_has_a_segment_per_day_and_partition(tmp_path: Path) -> None:
    archive, events = sparse(tmp_path)
    before = len(archive.segments())
    steps = 0
    while archive.compact(5):
        steps += 1
    assert steps > 2
    days = [{e.ts // DAY_MS for e in half} for half in (events[::2], events[1::2])]
    newest = max(days[0] | days[1])
    older = [s for s in archive.segments() if s.day < newest]
    assert len(older) == sum(len(found - {newest}) for found in days) < before / 1.5
    assert len(archive.segments()) - len(older) <= 24 * 2
    assert len(places(archive)) == len(set(places(archive))) == 100


def test_a_death_at_any_moment_of_merging_loses_doubles_and_revives_nothing(
    tmp_path: Path,
) -> None:
    user = "user-3"
    _, events = sparse(tmp_path / "whole")
    for changes in range(0, 60, 5):
        folder = tmp_path / str(changes)
        shutil.copytree(tmp_path / "whole", folder)
        with suppress(Dies):
            Archive(Mortal(folder, changes)).compact()
        archive = Archive(Folder(folder))
        assert len(places(archive)) == len(set(places(archive))) == 100
        if changes % 2:  # erased between two halves of a merge
            archive.forget({user: [Command(source, 50, 0, 0) for source in (1, 2)]})
        archive.compact()
        assert archive.compact() == 0
        left = [e for e in events if e.user_id != user] if changes % 2 else events
        assert len(places(archive)) == len(set(places(archive))) == len(left)
        assert archive.stats().rows == len(left)


def test_a_death_while_old_segments_are_removed_keeps_the_newer_ones(tmp_path: Path) -> None:
    archive, events = sparse(tmp_path)
    archive.compact()
    with suppress(Dies):
        Archive(Mortal(tmp_path, 5)).expire(4 * DAY_MS, 1 << 40)
    archive.expire(4 * DAY_MS, 1 << 40)
    newest_ms = max(s.end_ms for s in archive.segments())
    kept = {e.event_id for e in events if e.ts >= newest_ms - 4 * DAY_MS}
    assert len(places(archive)) >= len(kept) > 20
    assert min(s.end_ms for s in archive.segments()) > newest_ms - 4 * DAY_MS


def test_a_merge_keeps_a_large_segment_that_has_the_name_it_takes(
    archive: Archive, shop: list[ev.Event], monkeypatch: pytest.MonkeyPatch
) -> None:
    shop = [e.model_copy(update={"ts": T0_MS}) for e in shop]
    write(archive, shop, 0, N)
    write(archive, shop, 0, 10)
    write(archive, shop, N - 10, N)
    sizes = sorted(archive.segments().values())
    monkeypatch.setattr("stream.archive._SMALL_BYTES", sizes[1])
    assert archive.compact() == 2
    assert sorted(offsets(archive)) == list(range(N))


def test_years_in_one_flush_are_kept_by_day(archive: Archive) -> None:
    shop = parsed(records(N, span_ms=100 * DAY_MS))
    write(archive, shop, 0, N)
    assert len(archive.segments()) <= 100
    assert sorted(offsets(archive)) == list(range(N))
    times = [t for table in archive.read() for t in table["t_ms"].to_pylist()]
    assert times == sorted(times)


@pytest.mark.usefixtures("way_of_reading")
def test_a_reader_survives_a_merge_in_its_middle(archive: Archive) -> None:
    shop = parsed(records(N, span_ms=2 * DAY_MS))
    for first in range(0, N, 50):
        write(archive, shop, first, first + 50)
    reader = archive.read(chunk_rows=1)
    seen = next(reader)["offset"].to_pylist()
    assert archive.compact() > 0
    seen += [o for t in reader for o in t["offset"].to_pylist()]
    assert sorted(seen) == list(range(N))


def test_a_reader_survives_segments_that_go_one_by_one(
    tmp_path: Path, shop: list[ev.Event]
) -> None:
    class Vanishing(Folder):
        """Removes each segment in the moment it is opened, but the first."""

        def read(self, name: str) -> Any:
            if name != first:
                self.remove(name)
            return super().read(name)

    store = Vanishing(tmp_path / "archive")
    archive = Archive(store)
    for start in range(0, N, 50):
        write(archive, shop, start, start + 50)
    first = next(iter(archive.segments())).name
    assert len(archive.segments()) > 3
    assert len(offsets(archive)) == pq.read_metadata(tmp_path / "archive" / first).num_rows


def test_a_segment_that_is_listed_and_cannot_be_opened_is_an_error(
    tmp_path: Path, shop: list[ev.Event]
) -> None:
    class Unreadable(Folder):
        def read(self, name: str) -> Any:
            raise FileNotFoundError(name)

    archive = Archive(Unreadable(tmp_path / "archive"))
    write(archive, shop, 0, 50)
    with pytest.raises(UserError, match=r"listed and cannot be opened: .*\.parquet"):
        offsets(archive)


def test_age_is_counted_from_the_newest_event(archive: Archive) -> None:
    shop = parsed(records(N, span_ms=10 * HOUR_MS))
    write(archive, shop, 0, N)
    assert archive.expire(10 * HOUR_MS, 1 << 40) == 0
    assert archive.expire(3 * HOUR_MS, 1 << 40) == 7
    assert min(t["t_ms"][0].as_py() for t in archive.read()) >= T0_MS + 7 * HOUR_MS


def test_the_oldest_go_when_there_is_too_much(archive: Archive, shop: list[ev.Event]) -> None:
    write(archive, shop, 0, N)
    *_, newest = archive.segments()
    assert archive.expire(1 << 60, archive.segments()[newest]) == 3
    assert list(archive.segments()) == [newest]


def forget(user: str) -> ev.Event:
    return parsed([json.dumps({"type": "forget", "user_id": user, "ts": T0_MS}).encode()])[0]


def test_forget_erases_what_came_before_and_leaves_a_receipt(
    archive: Archive, shop: list[ev.Event]
) -> None:
    shop = [*shop, forget("user-3"), *shop[:20]]
    write(archive, shop, 0, 200)
    write(archive, shop, 200, len(shop))
    left = offsets(archive)
    erased = {i for i, e in enumerate(shop[:N]) if e.user_id == "user-3"}
    assert erased
    assert set(left) == set(range(len(shop))) - erased - {N}
    (path,) = (n for n in archive.store.sizes() if n.startswith("receipts/"))
    with archive.store.read(path) as file:
        receipt = json.load(file)
    assert "user-3" not in json.dumps(receipt)
    assert receipt["rows"] == sum(i < 200 for i in erased)
    # Read again with other borders after a crash, it erases the same.
    write(archive, shop, 150, len(shop))
    assert sorted(offsets(archive)) == sorted(left)
    with archive.store.read(path) as file:
        assert json.load(file)["offset"] == N


def test_forgetting_all_there_is_leaves_no_segment(archive: Archive) -> None:
    only = parsed(records(5, users=1))
    write(archive, [*only, forget("user-0")], 0, 5)
    write(archive, [*only, forget("user-0")], 5, 6)
    assert archive.segments() == {}
    assert list(archive.read()) == []


def test_names_say_all_and_other_files_are_not_segments(archive: Archive) -> None:
    for segment in (Segment(19_000, 7, 2**64 - 1, 3, 0, 9), Segment(0, -1, 0, 12_345, 4, 5)):
        assert parse_name(segment.name) == segment
    archive.store.write({"day=2020-01-01/notes.txt": b"hello"})
    assert archive.segments() == {}


def cut_short(data: bytes) -> bytes:
    return data[: len(data) // 2]


def empty(data: bytes) -> bytes:
    return b""


def changed(data: bytes) -> bytes:
    """A bit of a page, which compression does not notice."""
    return data[:200] + bytes([data[200] ^ 1]) + data[201:]


def changed_and_older(data: bytes) -> bytes:
    """The same before segments had checksums."""
    sink = io.BytesIO()
    pq.write_table(pq.read_table(io.BytesIO(data)), sink, compression="zstd")
    old = bytearray(sink.getvalue())
    old[100:400] = bytes(300)
    return bytes(old)


@pytest.fixture(params=[cut_short, empty, changed, changed_and_older])
def damaged(request: pytest.FixtureRequest, archive: Archive, shop: list[ev.Event]) -> Segment:
    """One of 12 segments."""
    for first in range(0, N, 100):
        write(archive, shop, first, first + 100)
    segment = list(archive.segments())[1]
    archive.store.write({segment.name: request.param(content(archive, segment.name))})
    return segment


def content(archive: Archive, name: str) -> bytes:
    with archive.store.read(name) as file:
        return bytes(file.read())


def undamaged(shop: list[ev.Event], segment: Segment) -> list[int]:
    def lost(i: int) -> bool:
        in_time = segment.start_ms <= shop[i].ts < segment.end_ms
        return in_time and segment.first <= i < segment.next

    return [i for i in range(N) if not lost(i)]


@pytest.mark.usefixtures("way_of_reading")
def test_a_damaged_segment_is_named_and_the_rest_is_read(
    archive: Archive, shop: list[ev.Event], damaged: Segment, caplog: pytest.LogCaptureFixture
) -> None:
    assert sorted(offsets(archive)) == undamaged(shop, damaged)
    assert f"{damaged.name} in the archive is damaged" in caplog.text


def test_a_merge_sets_a_damaged_segment_aside(
    archive: Archive, shop: list[ev.Event], damaged: Segment, caplog: pytest.LogCaptureFixture
) -> None:
    before = content(archive, damaged.name)
    archive.compact()
    assert damaged.name in caplog.text
    assert content(archive, f"damaged/{damaged.name}") == before
    assert archive.compact() == 0
    assert sorted(offsets(archive)) == undamaged(shop, damaged)
    assert archive.stats().damaged == (f"damaged/{damaged.name}",)
    archive.expire(1, 1 << 40)
    assert archive.stats().damaged == ()


def test_erasing_sets_a_damaged_segment_aside(
    archive: Archive, shop: list[ev.Event], damaged: Segment
) -> None:
    archive.forget({"user-3": [Command(7, N, 0, 0)]})
    left = [i for i in undamaged(shop, damaged) if shop[i].user_id != "user-3"]
    assert sorted(offsets(archive)) == left


def test_stats_name_what_cannot_be_read(
    archive: Archive, shop: list[ev.Event], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("ARCHIVE_URL", str(tmp_path / "archive"))
    write(archive, shop, 0, N)
    for segment, data in zip(archive.segments(), (b"", b"PAR1 torn"), strict=False):
        archive.store.write({segment.name: data})
        said = CliRunner().invoke(app, ["archive", "stats"])
        assert said.exit_code == 0
        assert f"damaged: {segment.name}" in said.output


def test_storage_that_fails_is_no_damage(tmp_path: Path, shop: list[ev.Event]) -> None:
    class Failing(Folder):
        def read(self, name: str) -> Any:
            raise OSError(errno.EIO, "Input/output error")

    archive = Archive(Failing(tmp_path))
    write(archive, shop, 0, 50)
    write(archive, shop, 50, 100)
    before = archive.segments()
    with pytest.raises(UserError, match=r"parquet.*Input/output error.*mend"):
        archive.compact()
    assert archive.segments() == before


def test_two_writers_at_once_one_wins(tmp_path: Path) -> None:
    one, other = Archive(Folder(tmp_path)), Archive(Folder(tmp_path))
    unlock = one.lock()
    with pytest.raises(UserError, match="another trainer writes"):
        other.lock()
    unlock()
    other.lock()()


def test_what_a_dead_writer_left_is_removed_and_never_read(
    archive: Archive, tmp_path: Path
) -> None:
    left = tmp_path / "archive" / "day=2020-01-01" / ".tmp-0123"
    left.parent.mkdir(parents=True)
    left.write_bytes(b"half")
    assert archive.store.sizes() == {}
    archive.lock()()
    assert not left.exists()


_FULL = """
import resource, signal, sys
from pathlib import Path
from stream.archive import Archive, Folder
from stream.errors import UserError
from tests.archived_events import parsed, records, write
shop = parsed(records(20_000, users=20_000, span_ms=1000))
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
archive = Archive(Folder(Path(sys.argv[1])))
write(archive, shop, 0, 100)
try:
    write(archive, shop, 100, 20_000)
except UserError as error:
    print(error)
"""


def test_a_full_disk_leaves_nothing_half_visible(tmp_path: Path) -> None:
    assert resource.getrlimit(resource.RLIMIT_FSIZE)[0] != 100_000
    run = subprocess.run(
        [sys.executable, "-c", _FULL, str(tmp_path)],
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
        capture_output=True,
        text=True,
        check=True,
    )
    assert "make room" in run.stdout
    assert sorted(offsets(Archive(Folder(tmp_path)))) == list(range(100))
    assert not list(tmp_path.rglob(".tmp-*"))


def test_any_fsspec_url_is_a_store(shop: list[ev.Event]) -> None:
    archive = Archive(open_store("memory://shop/archive"))
    write(archive, [*shop[:100], forget("user-1")], 0, 50)
    write(archive, [*shop[:100], forget("user-1")], 50, 101)
    archive.compact()
    expected = {i for i in range(100) if shop[i].user_id != "user-1"}
    assert set(offsets(archive)) == expected
    assert archive.stats().receipts == 1


def test_a_url_that_cannot_be_opened_is_named() -> None:
    with pytest.raises(UserError, match="ARCHIVE_URL 'nowhere://a'"):
        open_store("nowhere://a")


def test_archive_stats_answers_people_and_programs(
    tmp_path: Path, shop: list[ev.Event], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ARCHIVE_URL", str(tmp_path / "archive"))
    ask = CliRunner().invoke
    assert "holds no events" in ask(app, ["archive", "stats"]).output
    write(Archive(Folder(tmp_path / "archive")), shop, 0, N)
    assert "300 events, 2023-11-14 00:00 to 2023-11-14 04:00" in " ".join(
        ask(app, ["archive", "stats"]).output.split()
    )
    answer = json.loads(ask(app, ["archive", "stats", "--json"]).output)
    assert (answer["rows"], answer["segments"]) == (N, 4)


def test_rows_are_events_again_but_for_their_ids(archive: Archive) -> None:
    shopper = {"user_id": "ann", "ts": T0_MS}
    item = {"item_id": "i", "title": "Lamp", "category": ("Home", "Lamps"), "brand": "Lux"}
    told: list[ev.Event] = [
        ev.Purchase(**shopper, **item, price=0.1, quantity=3, currency="EUR"),
        ev.Purchase(**shopper, item_id="j", quantity=2),
        ev.Review(**shopper, item_id="i", rating=2.5),
        ev.Impression(**shopper, item_id="i"),
        ev.AddToCart(**shopper, item_id="i", price=1e-3),
        ev.Search(**shopper, query="red lamp"),
        ev.Message(**shopper, text="It broke."),
    ]
    write(archive, told, 0, len(told))
    (table,) = archive.read()
    assert events_of(table) == told
    columns = ("row", "t_ms", "type", "weight", "item_id", "text", "spend", "foreign", "inline")
    one, other = (
        contributions(batch, DEFAULT_WEIGHTS, "USD") for batch in (told, events_of(table))
    )
    assert [getattr(one, name) for name in columns] == [getattr(other, name) for name in columns]


def test_what_older_segments_do_not_tell_is_not_taken_for_none(archive: Archive) -> None:
    bought = ev.Purchase(user_id="ann", ts=T0_MS, item_id="i", price=2.0)
    write(archive, [bought] * 2, 0, 1)
    for segment in archive.segments():
        with archive.store.read(segment.name) as file:
            old = pq.read_table(file).drop_columns(["currency", "title", "category", "brand"])
        price = old["price"].cast(pa.float32())
        old = old.set_column(old.column_names.index("price"), "price", price)
        sink = pa.BufferOutputStream()
        pq.write_table(old, sink)
        archive.store.write({segment.name: sink.getvalue()})
    write(archive, [bought] * 2, 1, 2)
    (table,) = archive.read()
    assert table["currency"].to_pylist() == [None, ""]
    assert table["price"].to_pylist() == [2.0, 2.0]


def test_receipts_tell_which_command_was_carried_out(archive: Archive) -> None:
    pending = Pending(7, 0, 0, 0)
    told: list[ev.Event] = [
        ev.View(user_id="ann", ts=T0_MS, item_id="i"),
        ev.Forget(user_id="ann", ts=T0_MS, event_id="f"),
        ev.Forget(user_id="ben", ts=T0_MS),
    ]
    pending.add([0, 1, 2], told, 3)
    archive.write(pending)
    assert archive.forgotten() == {
        hashed("ann"): [Command(7, 1, key64("f"), T0_MS)],
        hashed("ben"): [Command(7, 2, 0, T0_MS)],
    }
