"""`make chaos-real`: every schedule on real servers, or one; leaves 1 where anything was wrong.

python -m tests.chaos.real                                    all of them, 16 minutes
python -m tests.chaos.real --schedule "lost brokers" --seed 7
python -m tests.chaos.real --write                            into docs/reliability.md
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Final

# Before numpy and torch are loaded: on small arrays their threads only wait for each other.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np

from stream.local_stack import ApacheKafka
from tests.bench import report
from tests.integration.worker_process import build_tiny_release

from .schedules import SCHEDULES, cluster_options
from .world import Outcome, play

_PAGE: Final = report.ROOT / "docs" / "reliability.md"
_SEED: Final = 20261125


def main() -> int:
    parser = argparse.ArgumentParser(prog="make chaos-real", description=__doc__)
    parser.add_argument("--schedule", choices=SCHEDULES, action="append", help="this one only")
    parser.add_argument("--seed", type=int, default=_SEED)
    parser.add_argument("--write", action="store_true", help="into docs/reliability.md")
    options = parser.parse_args()
    names = options.schedule or list(SCHEDULES)
    outcomes = []
    with tempfile.TemporaryDirectory(prefix="penchant-chaos-") as folder:
        release = build_tiny_release(Path(folder))
        with ApacheKafka(Path(folder) / "kafka", **cluster_options()) as kafka:
            for name in names:
                outcomes.append(play(SCHEDULES[name], options.seed, kafka, release))
                print(told(outcomes[-1]), flush=True)
            command = " ".join(["python -m tests.chaos.real", *sys.argv[1:]])
            text = f"{report.where(command)}\n\n{render(outcomes)}"
    print(text)
    if options.write:
        report.write(_PAGE, text, "on real servers")
    return any(outcome.wrong for outcome in outcomes)


def told(outcome: Outcome) -> str:
    """For the terminal."""
    faults = ", ".join(f"{count} x {kind}" for kind, count in outcome.faults.items())
    head = (
        f"{outcome.name} (seed {outcome.seed}, {outcome.seconds:.0f} s): "
        f"{outcome.events:,} records, {outcome.bad} bad, "
        f"{outcome.profiles} profiles; {faults}; first save after "
        f"{_quantiles(outcome.first_save_s)}, back after {_quantiles(outcome.back_s)}; "
        f"{outcome.replayed:,} found applied, {outcome.read_again:,} read again, "
        f"{outcome.refused:,} saves refused; lost {outcome.lost}, double {outcome.double}"
    )
    return "\n".join([head, *outcome.notes, *outcome.wrong[:10], *_more(outcome.wrong[10:])])


def render(outcomes: Sequence[Outcome]) -> str:
    """As Markdown."""
    head = [
        "schedule", "records, profiles", "faults", "first save p50, p99", "lag back p50, p99",
        "found applied before", "read again after a loss of Redis", "lost", "double", "else wrong",
    ]  # fmt: skip
    rows = [_row(outcome) for outcome in outcomes]
    if len(outcomes) > 1:
        rows.append(_row(_all_of(outcomes)))
    notes = [f"- *{o.name}*: {'; '.join(o.notes)}" for o in outcomes if o.notes]
    return "\n\n".join([report.table(head, rows), *(["\n".join(notes)] if notes else [])])


def _row(outcome: Outcome) -> list[str]:
    faults = ", ".join(f"{kind}: {count}" for kind, count in sorted(outcome.faults.items()))
    return [
        outcome.name,
        f"{outcome.events:,}, {outcome.profiles:,}",
        faults,
        _quantiles(outcome.first_save_s),
        _quantiles(outcome.back_s),
        f"{outcome.replayed:,}",
        f"{outcome.read_again:,}",
        f"{outcome.lost:,}",
        f"{outcome.double:,}",
        f"{len(outcome.wrong):,}",
    ]


def _all_of(outcomes: Sequence[Outcome]) -> Outcome:
    total = Outcome("all", outcomes[0].seed)
    for each in outcomes:
        total.faults["in all"] += each.faults.total()
        total.first_save_s += each.first_save_s
        total.back_s += each.back_s
        total.wrong += each.wrong
        for name in ("events", "profiles", "replayed", "read_again", "lost", "double"):
            setattr(total, name, getattr(total, name) + getattr(each, name))
    return total


def _quantiles(seconds: Sequence[float]) -> str:
    """The p99 of less than a hundred is the worst."""
    if not seconds:
        return "–"
    p50, p99 = np.percentile(seconds, [50, 99], method="higher")
    return f"{p50:.1f} s, {p99:.1f} s"


def _more(left: Sequence[str]) -> list[str]:
    return [f"and {len(left)} more"] if left else []


if __name__ == "__main__":
    sys.exit(main())
