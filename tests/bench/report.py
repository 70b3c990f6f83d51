"""Readings as Markdown tables: medians over the repeats, and ratios within each repeat."""

from __future__ import annotations

import os
import platform
import statistics
import subprocess
from collections.abc import Sequence
from datetime import UTC, datetime
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Final

import numpy as np

from stream.apache_kafka import apache_kafka_version

if TYPE_CHECKING:
    from .ceilings import Ceilings
    from .pipeline import Reading

ROOT: Final = Path(__file__).resolve().parents[2]
_PACKAGES: Final = (
    "faust-streaming", "aiokafka", "confluent-kafka", "redis", "hiredis", "pydantic", "numpy",
    "torch", "transformers",
)  # fmt: skip


def one_line(reading: Reading) -> str:
    """A reading for the terminal."""
    fresh = ", ".join(
        f"{np.percentile(ms, 50):.0f} and {np.percentile(ms, 99):.0f} ms at {share:.0%}"
        for share, ms in reading.fresh_ms.items()
    )
    lost = "" if reading.counted == reading.events else f" COUNTED {reading.counted:,}"
    return (
        f"{reading.workload} {reading.pipeline}: {reading.events:,} events{lost}, "
        f"{reading.rate:,.0f}/s; fresh in (p50, p99): {fresh or '-'}; "
        f"CPU {reading.cpu_s['worker']:.0f} s/million; {reading.peak_mb:,.0f} MB"
    )


def render(
    readings: Sequence[Reading], tops: Sequence[Ceilings], repeats: int, command: str
) -> str:
    """All tables."""
    parts = [_where(repeats, command)]
    parts += [
        _table(workload, [r for r in readings if r.workload == workload])
        for workload in dict.fromkeys(r.workload for r in readings)
    ]
    if tops:
        parts.append(_ceilings(tops))
    return "\n\n".join(parts)


def write(page: Path, text: str, part: str = "") -> None:
    """Replace what was measured before, of this part of a page; the words around it stay."""
    begin, end = (f"<!-- {f'measured {part}'.strip()}: {side} -->" for side in ("begin", "end"))
    before = page.read_text(encoding="utf-8")
    head, rest = before.split(begin)
    tail = rest.split(end)[1]
    page.write_text(f"{head}{begin}\n{text}\n{end}{tail}", encoding="utf-8")


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """As Markdown."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def where(command: str, how: str = "") -> str:
    """When, at which commit and on which machine a figure was read."""
    return (
        f"Measured on {datetime.now(UTC):%Y-%m-%d} at commit {commit()} with `{command}`{how}.\n\n"
        f"Machine: {cpu_model()}, {os.cpu_count()} cores, {memory_gb():.0f} GB, Linux "
        f"{platform.release()}."
    )


def _table(workload: str, readings: Sequence[Reading]) -> str:
    names = list(dict.fromkeys(r.pipeline for r in readings))
    rows = [
        f"### {workload}",
        "",
        "| | events/s (lowest to highest) | CPU s per million events: worker, broker, Redis "
        "| peak memory | events |",
        "|---|---|---|---|---|",
    ]
    for name in names:
        own = [r for r in readings if r.pipeline == name]
        rates = [r.rate for r in own]
        cpu = ", ".join(
            f"{statistics.median(r.cpu_s[process] for r in own):,.0f}"
            for process in ("worker", "broker", "redis")
        )
        wrong = [r.counted for r in own if r.counted != r.events]
        counted = f"{own[0].events:,}" + (f" (counted {wrong})" if wrong else "")
        rows.append(
            f"| {name} | {statistics.median(rates):,.0f} ({min(rates):,.0f} to {max(rates):,.0f}) "
            f"| {cpu} | {statistics.median(r.peak_mb for r in own):,.0f} MB | {counted} |"
        )
    ours = [r for r in readings if r.pipeline == "Penchant"]
    for name in names:
        theirs = [r for r in readings if r.pipeline == name]
        if name == "Penchant" or len(ours) != len(theirs):
            continue
        ratios = sorted(a.rate / b.rate for a, b in zip(ours, theirs, strict=True))
        rows += [
            "",
            f"Penchant takes **{statistics.median(ratios):.1f} times** the events of {name} "
            f"({ratios[0]:.1f} to {ratios[-1]:.1f} over the repeats).",
        ]
    return "\n".join([*rows, "", _freshness(readings)])


def _freshness(readings: Sequence[Reading]) -> str:
    """p50, p99 and p99.9 of the probes at each load."""
    probed = [r for r in readings if r.fresh_ms]
    rows = [
        [
            reading.pipeline,
            *(
                ", ".join(_ms(float(np.percentile(ms, q))) for q in (50, 99, 99.9))
                for ms in reading.fresh_ms.values()
            ),
        ]
        for reading in probed
    ]
    head = [f"at {share:.0%} of its rate" for share in probed[0].fresh_ms]
    return table(["fresh in: p50, p99, p99.9", *head], rows)


def _ms(value: float) -> str:
    return f"{value:,.0f} ms" if np.isfinite(value) else "never"


def _ceilings(tops: Sequence[Ceilings]) -> str:
    rows = [
        ("librdkafka, consume alone", [t.consumed for t in tops], "records/s"),
        (
            "consume and parse, as the worker does",
            [t.consumed_and_parsed for t in tops],
            "events/s",
        ),
        ("load profiles alone", [t.loads for t in tops], "profiles/s"),
        ("fenced saves alone", [t.saves for t in tops], "profiles/s"),
    ]
    state = statistics.median(t.state_bytes for t in tops)
    lines = [
        "### Ceilings",
        "",
        "Each part alone, in one process and as the worker does it, on the records and profiles "
        f"of `spread` (a profile's state has {state:,.0f} bytes).",
        "",
        "| | |",
        "|---|---|",
    ]
    lines += [f"| {what} | {statistics.median(each):,.0f} {unit} |" for what, each, unit in rows]
    return "\n".join(lines)


def _where(repeats: int, command: str) -> str:
    packages = ", ".join(f"{name} {version(name)}" for name in _PACKAGES)
    return (
        f"{where(command, f'; medians of {repeats} repeats')} Broker, Redis, worker and the "
        "producer of the load share them.\n\n"
        f"Python {platform.python_version()}, Apache Kafka {apache_kafka_version()}, {packages}."
    )


@cache
def commit() -> str:
    """As of the first question: what a run writes does not make it dirty."""
    answer = subprocess.run(
        ["git", "describe", "--always", "--dirty"], capture_output=True, text=True, check=False
    )
    return answer.stdout.strip() or "(none yet)"


def cpu_model() -> str:
    for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()


def memory_gb() -> float:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
