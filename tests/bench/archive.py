"""How fast events become segments, and segments windows: `python -m tests.bench.archive`.

Prints and never asserts. One process, no broker: JSON records of one partition, as the intake hands
them over, are parsed and written to a folder; then read back and labelled. `--write` puts the
tables into docs/performance.md.
"""

from __future__ import annotations

import argparse
import resource
import tempfile
import time
from pathlib import Path
from typing import Final

from profiles.schema import EVENT_TYPES
from stream.archive import Archive, Folder, archived
from stream.contributions import DEFAULT_WEIGHTS
from stream.ingest import Ingest
from stream.intake import MicroBatch, Slice
from stream.labelling import Rules, label
from stream.settings import ArchiveSettings
from stream.times import HOUR_MS
from tests.archived_events import T0_MS, records

from . import report

_BATCH: Final = 16_384


def main() -> None:
    """Measure once per span of event time."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--events", type=int, default=500_000)
    parser.add_argument("--write", action="store_true", help="into docs/performance.md")
    given = parser.parse_args()
    parts = [report.where("python -m tests.bench.archive")]
    for what, span_ms in (("one hour", HOUR_MS), ("two years", 730 * 24 * HOUR_MS)):
        parts.append(_measure(given.events, what, span_ms))
    peak_mb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    parts.append(f"Peak memory of the process {peak_mb:,.0f} MiB.")
    text = "\n\n".join(parts)
    print(text)
    if given.write:
        report.write(report.ROOT / "docs/performance.md", text, "archive")


def _measure(n: int, what: str, span_ms: int) -> str:
    values = records(n, span_ms=span_ms, users=n // 20)
    if span_ms > HOUR_MS:
        values.sort(key=lambda value: value[value.index(b'"ts"') :][:20])  # as a replay sends them
    with tempfile.TemporaryDirectory() as folder:
        archive = Archive(Folder(Path(folder)))
        ingest = Ingest(archive, ArchiveSettings(), 1 << 50)
        started = _now()
        for first in range(0, n, _BATCH):
            part = values[first : first + _BATCH]
            m = len(part)
            offsets = list(range(first, first + m))
            piece = Slice("events", 0, 1, 7, offsets, [None] * m, list(part), [T0_MS] * m)
            ingest.take(MicroBatch((piece,)))
            if ingest.due():
                ingest.flush({})
        ingest.flush({})
        rows = [_row("archived", n, started)]
        started = _now()
        archive.compact()
        rows.append(_row("merged", n, started))
        stats = archive.stats()
        started = _now()
        events = archived(archive.read())
        rows.append(_row("read back", n, started))
        started = _now()
        item_rows = {item: row for row, item in enumerate(events.item_ids)}
        label(events, item_rows, EVENT_TYPES, Rules(DEFAULT_WEIGHTS), {7: int(events.t_ms.max())})
        rows.append(_row("labelled", n, started))
    return (
        f"{n:,} events of {what}: {stats.segments:,} segments, {stats.size_bytes / n:.1f} bytes an "
        "event.\n\n" + report.table(["", "events/s", "per second of CPU time"], rows)
    )


def _now() -> tuple[float, float]:
    return time.perf_counter(), time.process_time()


def _row(what: str, n: int, started: tuple[float, float]) -> list[str]:
    wall_s, cpu_s = (now - then for now, then in zip(_now(), started, strict=True))
    return [what, f"{n / wall_s:,.0f}", f"{n / cpu_s:,.0f}"]


if __name__ == "__main__":
    main()
