"""`python -m tests.bench.quality.document DATA [NAME …]`: the figures of docs/evaluation.md.

Runs the sets of `SETS`, all or those named, on files in the folder DATA, and writes each into its
place on the page as soon as it is through; what the page says of others stays.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import resource
import subprocess
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final

from tests.bench.report import commit, cpu_model, memory_gb, write

DOCS: Final = Path(__file__).parents[3] / "docs"
PAGE: Final = DOCS / "evaluation.md"
WITH: Final = ("--learn", "--networks")


@dataclass(frozen=True)
class Set:
    """A recorded set of the page."""

    title: str
    dataset: str
    files: tuple[str, ...] = ()
    plot: str = ""


SETS: Final[Mapping[str, Set]] = {
    "online-retail": Set(
        "Online Retail, a year",
        "online-retail",
        ("online_retail_2010_2011_cc0.parquet",),
        "online-retail.png",
    ),
    "online-retail-two-years": Set(
        "Online Retail, two years as one stream",
        "online-retail",
        ("online_retail_2009_2010.parquet", "online_retail_2010_2011_cc0.parquet"),
    ),
    "movielens": Set("MovieLens 100K", "movielens", plot="movielens.png"),
    "beauty": Set("Amazon Beauty", "amazon", ("amazon_beauty_events.parquet",)),
    "scientific": Set("Amazon Scientific", "amazon", ("amazon_scientific_events.parquet",)),
}
_METRICS: Final = {"recall@10": "R@10", "recall@20": "R@20", "ndcg@10": "N@10", "mrr": "MRR"}


def main() -> None:
    """Run what is asked for, each into its place on the page."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("data", type=Path)
    parser.add_argument("names", nargs="*", metavar="NAME", help=", ".join(SETS))
    given = parser.parse_args()
    at_commit = commit()
    for name in given.names or SETS:
        of, before_s = SETS[name], _children_s()
        found = _evaluated(of, given.data)
        about = (
            f"{datetime.now(UTC):%Y-%m-%d}, commit {at_commit}, {cpu_model()}, {os.cpu_count()} "
            f"cores, {memory_gb():.0f} GB, Python {platform.python_version()}, "
            f"{(_children_s() - before_s) / 60:.0f} minutes of CPU: `{_command(of)}`"
        )
        page = _sections(PAGE.read_text(encoding="utf-8"))
        page[of.title] = "\n\n".join([about, *_parts(of, found)])
        known = [of.title for of in SETS.values() if of.title in page]
        write(PAGE, "\n\n".join(f"### {title}\n\n{page[title]}" for title in known))


def _sections(page: str) -> dict[str, str]:
    """Title -> what the page says of each set."""
    measured = page.partition("<!-- measured: begin -->")[2].partition("<!-- measured: end -->")[0]
    parts = re.split(r"^### (.*)$", measured, flags=re.MULTILINE)
    return {title: text.strip() for title, text in zip(parts[1::2], parts[2::2], strict=True)}


def _evaluated(of: Set, data: Path) -> dict[str, Any]:
    """What the command says that the page names."""
    files = [word for file in of.files for word in ("--path", str(data / file))]
    plot = ["--plot", str(DOCS / of.plot)] if of.plot else []
    command = [sys.executable, "-m", "stream.cli", "eval", of.dataset, *files, *WITH, *plot]
    answer = subprocess.run([*command, "--json"], stdout=subprocess.PIPE, check=True)
    found: dict[str, Any] = json.loads(answer.stdout)
    return found


def _children_s() -> float:
    """CPU time: that of the clock would be that of whatever else ran."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def _command(of: Set) -> str:
    return " ".join(["penchant eval", of.dataset, *(f"--path {f}" for f in of.files), *WITH])


def _parts(of: Set, found: Mapping[str, Any]) -> Iterator[str]:
    if of.plot:
        yield f"![Recall@20 over event time]({of.plot})"
    if found["timeline"]:
        swaps, rejections = (len(found["timeline"][kind]) for kind in ("swaps_ms", "rejections_ms"))
        yield f"{found['protocol']} Trainings: {swaps} swapped in, {rejections} rejected."
    for section in found["sections"]:
        yield _section(section, found["lift_of"])
    if found["slices"]:
        yield _slices(found["slices"], found["lift_of"])
    if found["heads"]:
        yield _heads(found["heads"])
    if found["published"]:
        yield _published(found["published"])


def _section(section: Mapping[str, Any], lift_of: str) -> str:
    head = [*_METRICS.values(), f"{_METRICS[lift_of]} against the best"]
    rows = [
        [row["name"], *(_interval(row["metrics"][name]) for name in _METRICS), _lift(row["lift"])]
        for row in section["rows"]
    ]
    title = f"**{section['title']}**: {section['targets']:,} targets of {section['users']:,} users"
    return f"{title}\n\n{_table(['', *head], rows)}"


def _slices(slices: list[Mapping[str, Any]], metric: str) -> str:
    head = [f"{part['title']} ({part['targets']:,})" for part in slices]
    rows = [
        [row["name"], *(_slice(part["rows"][number], metric) for part in slices)]
        for number, row in enumerate(slices[0]["rows"])
    ]
    title = f"{_METRICS[metric]} by slice (targets), and beside it against the best of all targets"
    return f"{title}:\n\n{_table(['', *head], rows)}"


def _slice(row: Mapping[str, Any], metric: str) -> str:
    lift = _lift(row["lift"])
    return _point(row["metrics"][metric]["value"]) + (f" ({lift})" if lift else "")


def _heads(heads: list[Mapping[str, Any]]) -> str:
    rows = [
        [head["name"], f"{head['events']:,}", f"{head['positive']:.1%}", _interval(head["auc"]),
         _point(head["calibration_error"])]
        for head in heads
    ]  # fmt: skip
    return "Heads, after events:\n\n" + _table(
        ["", "events", "positive", "AUC", "calibration error"], rows
    )


def _published(published: list[Mapping[str, Any]]) -> str:
    rows = [
        [row["model"], row["seen"], _point(row["recall@10"]), _point(row["ndcg@10"])]
        for row in published
    ]
    return "Published:\n\n" + _table(["", "the user's own items", "R@10", "N@10"], rows)


def _table(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _interval(found: Mapping[str, Any]) -> str:
    if found["value"] is None:
        return ""
    return f"{_point(found['value'])} ± {_point((found['high'] - found['low']) / 2)}"


def _lift(lift: Mapping[str, Any] | None) -> str:
    if lift is None or lift["value"] is None:
        return ""
    return f"{lift['value']:+.1%} ± {(lift['high'] - lift['low']) / 2:.1%}"


def _point(value: float | None) -> str:
    return "" if value is None else f"{value:.4f}".removeprefix("0")


if __name__ == "__main__":
    main()
