"""A report as tables for a terminal, as plain text for a pipe, as JSON for programs. PURE.

Knows nothing of how figures came about.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from typing import Any, Final

from rich import box
from rich.console import Group, RenderableType
from rich.table import Column, Table
from rich.text import Text

from model.evaluate import METRICS, Interval

from .evaluation import Report, Section, published

_ABSENT: Final = "–"


def as_json(report: Report) -> dict[str, Any]:
    """Numbers as they are; what could not be computed is null."""
    found = _without_nan(asdict(report))
    found["published"] = [
        {"model": model, "seen": seen, "recall@10": recall, "ndcg@10": ndcg}
        for model, seen, recall, ndcg in published(report.dataset)
    ]
    return dict(found)


def render(report: Report) -> RenderableType:
    """For a terminal."""
    parts: list[RenderableType] = [Text(f"{report.dataset}\n{report.protocol}\n")]
    for title, header, rows in _tables(report):
        table = Table(
            Column(header[0], overflow="fold"),
            *(Column(name, justify="right") for name in header[1:]),
            title=title,
            title_justify="left",
            title_style="bold",
            box=box.SIMPLE_HEAD,
        )
        for row in rows:
            table.add_row(*row)
        parts.append(table)
    return Group(*parts)


def plain(report: Report) -> str:
    """For a pipe or a file: the same tables in columns of spaces."""
    blocks = [f"{report.dataset}\n{report.protocol}"]
    for title, header, rows in _tables(report):
        lines = [header, *rows]
        width = [max(len(line[i]) for line in lines) for i in range(len(header))]
        aligned = [
            "  ".join(
                [
                    line[0].ljust(width[0]),
                    *(c.rjust(w) for c, w in zip(line[1:], width[1:], strict=True)),
                ]
            ).rstrip()
            for line in lines
        ]
        blocks.append("\n".join([title, *aligned]))
    return "\n\n".join(blocks)


def _tables(report: Report) -> Iterator[tuple[str, list[str], list[list[str]]]]:
    for section in report.sections:
        yield _table(report, section)
    if report.slices:
        yield _by_slice(report)
    if report.heads:
        yield _of_heads(report)
    elsewhere = published(report.dataset)
    if elsewhere:
        rows = [[m, seen, f"{recall:.4f}", f"{ndcg:.4f}"] for m, seen, recall, ndcg in elsewhere]
        yield "published", ["model", "user's own items", "R@10", "N@10"], rows


def _table(report: Report, section: Section) -> tuple[str, list[str], list[list[str]]]:
    title = f"{section.title}: {section.targets:,} targets of {section.users:,} users"
    with_coverage = any(row.coverage is not None for row in section.rows)
    header = ["", *(_short(name) for name in METRICS)]
    header += ["shown"] if with_coverage else []
    header.append(f"{_short(report.lift_of)} against the best")
    rows = []
    for row in section.rows:
        cells = [row.name, *(_cell(row.metrics[name]) for name in METRICS)]
        if with_coverage:
            cells.append(_ABSENT if row.coverage is None else f"{row.coverage:.0%}")
        cells.append(_lift(row.lift))
        rows.append(cells)
    return title, header, rows


def _by_slice(report: Report) -> tuple[str, list[str], list[list[str]]]:
    """A column per slice; the intervals are in the JSON."""
    header = ["", *(part.title for part in report.slices)]
    rows = [["targets", *(f"{part.targets:,}" for part in report.slices)]]
    for number, row in enumerate(report.sections[0].rows):
        found = [part.rows[number].metrics[report.lift_of] for part in report.slices]
        rows.append([row.name, *(_point(interval.value) for interval in found)])
    return f"{_short(report.lift_of)} by slice of all targets", header, rows


def _of_heads(report: Report) -> tuple[str, list[str], list[list[str]]]:
    header = ["", "events", "positive", "AUC", "calibration error"]
    rows = [
        [head.name, f"{head.events:,}", f"{head.positive:.1%}", _cell(head.auc),
         _point(head.calibration_error)]
        for head in report.heads
    ]  # fmt: skip
    return "heads of the whole profile, after events", header, rows


def _short(name: str) -> str:
    return name.upper().replace("RECALL", "R").replace("NDCG", "N")


def _cell(found: Interval) -> str:
    """`.1234±.0021`, half the width of the interval."""
    if math.isnan(found.value):
        return _ABSENT
    return f"{_point(found.value)}±{_point((found.high - found.low) / 2)}"


def _point(value: float) -> str:
    return f"{value:.4f}".removeprefix("0")


def _lift(lift: Interval | None) -> str:
    if lift is None or math.isnan(lift.value):
        return _ABSENT
    return f"{lift.value:+.1%} ±{(lift.high - lift.low) / 2:.1%}"


def _without_nan(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _without_nan(inner) for key, inner in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [_without_nan(inner) for inner in value]
    return value
