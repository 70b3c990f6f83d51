"""Who asked to be forgotten is, however partitions lag, flushes fall and trainers die."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

import pyarrow.parquet as pq
from hypothesis import given, settings
from hypothesis import strategies as st

from stream.archive import Archive, Folder
from stream.ingest import Ingest
from stream.intake import MicroBatch, Slice
from stream.settings import ArchiveSettings
from tests.archived_events import T0_MS

AHEAD_MS = 3

# user, partition, event time, how much later its record is, whether it is a command to forget
Told = tuple[int, int, int, int, bool]
told = st.lists(
    st.tuples(
        st.integers(0, 1),
        st.integers(0, 1),
        st.integers(0, 30),
        st.integers(-AHEAD_MS, 20),
        st.sampled_from([True, False, False, False]),
    ),
    max_size=25,
)
# partition, how many of its records, whether they are flushed then, whether the trainer dies then
steps = st.lists(
    st.tuples(st.integers(0, 1), st.integers(1, 5), st.booleans(), st.booleans()), max_size=12
)


def value(user: int, ts: int, forget: bool) -> bytes:
    event = {"type": "forget" if forget else "view", "user_id": f"u{user}", "ts": T0_MS + ts}
    return json.dumps(event if forget else event | {"item_id": "i"}).encode()


def left(events: list[Told]) -> set[tuple[int, int]]:
    """(partition, offset) of what stays, read plainly."""
    partitions = [[e for e in events if e[1] == p] for p in (0, 1)]
    commands = [
        (e[0], p, at, e[2] + e[3] + AHEAD_MS)
        for p, mine in enumerate(partitions)
        for at, e in enumerate(mine)
        if e[4]
    ]
    stays = set()
    for p, mine in enumerate(partitions):
        for at, (user, _, ts, _, forget) in enumerate(mine):
            of_user = [c for c in commands if c[0] == user]
            here = [c for c in of_user if c[1] == p]
            erased = any(at < c[2] for c in here) if here else any(ts <= c[3] for c in of_user)
            if not (forget or erased):
                stays.add((p, at))
    return stays


def stored(archive: Archive) -> set[tuple[int, int]]:
    """What segments hold, whatever reading would leave out."""
    found: set[tuple[int, int]] = set()
    for segment in archive.segments():
        with archive.store.read(segment.name) as file:
            table = pq.read_table(file)
        found |= {
            (source, offset)
            for source, offset in zip(
                table["source"].to_pylist(), table["offset"].to_pylist(), strict=True
            )
        }
    return found


@settings(max_examples=60, deadline=None)
@given(told, steps)
def test_what_stays_depends_on_no_lag_no_flush_and_no_death(
    events: list[Told], schedule: list[tuple[int, int, bool, bool]]
) -> None:
    partitions = [[e for e in events if e[1] == p] for p in (0, 1)]
    with tempfile.TemporaryDirectory() as folder:
        archive = Archive(Folder(Path(folder)))
        ingest = Ingest(archive, ArchiveSettings(), AHEAD_MS)
        committed, taken = [0, 0], [0, 0]
        rest = [(p, len(mine) + 1, True, False) for p, mine in enumerate(partitions)]
        for p, count, flushes, dies in [*schedule, *rest]:
            part = partitions[p][taken[p] : taken[p] + count]
            if part:
                offsets = list(range(taken[p], taken[p] + len(part)))
                values = [value(e[0], e[2], e[4]) for e in part]
                times_ms = [T0_MS + e[2] + e[3] for e in part]
                piece = Slice("events", p, 1, p, offsets, [None] * len(part), values, times_ms)
                ingest.take(MicroBatch((piece,)))
                taken[p] += len(part)
            if flushes:
                ingest.flush({})
            if flushes and not dies:
                committed = list(taken)
            if dies:  # between a flush and its commit, or before a flush
                archive = Archive(Folder(Path(folder)))
                ingest = Ingest(archive, ArchiveSettings(), AHEAD_MS)
                taken = list(committed)
        # Who died last has left something.
        for p, mine in enumerate(partitions):
            assert taken[p] == len(mine)
        assert stored(archive) == left(events)
        read = {
            place
            for table in archive.read()
            for place in zip(table["source"].to_pylist(), table["offset"].to_pylist(), strict=True)
        }
        assert read == left(events)
