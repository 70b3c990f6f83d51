"""Many cases against all targets, or some against one:

python -m tests.fuzz --cases 10000000 --write     a full run, and the table in docs/reliability.md
python -m tests.fuzz --target events --first 77 --cases 1     exactly this case

Leaves 1 where anything was found.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from tests.bench import report
from tests.fuzz.harness import Report, run
from tests.fuzz.targets import TARGETS


def shares(cases: int) -> dict[str, int]:
    """How many each target gets, as of a full run."""
    total = sum(target.cases for target in TARGETS)
    return {target.name: -(-target.cases * cases // total) for target in TARGETS}


def table(reports: Sequence[Report]) -> str:
    """As Markdown."""
    said = {target.name: (target.make.__doc__ or "").strip().rstrip(".") for target in TARGETS}
    rows = [
        [
            f"`{r.target}`: {said[r.target]}", f"{r.cases:,}", f"{r.taken / max(r.cases, 1):.0%}",
            f"{r.seconds:,.0f}", str(len(r.findings)),
        ]
        for r in reports
    ]  # fmt: skip
    cases, seconds = sum(r.cases for r in reports), sum(r.seconds for r in reports)
    found = sum(len(r.findings) for r in reports)
    rows.append(["all", f"{cases:,}", "", f"{seconds:,.0f}", str(found)])
    head = ("target", "cases", "taken for good", "seconds", "findings")
    return report.table(head, rows)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("--cases", type=int, default=200_000, help="over all targets, or of one")
    parser.add_argument("--target", choices=[target.name for target in TARGETS])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--write", action="store_true", help="renew the table in the docs")
    options = parser.parse_args()
    # Now: what is committed while cases are tried is not what is tried.
    begun = report.where(f"python -m tests.fuzz --cases {options.cases}", f", seed {options.seed}")
    reports = []
    for target in TARGETS:
        if options.target in (None, target.name):
            cases = options.cases if options.target else shares(options.cases)[target.name]
            done = run(target, cases, options.seed, options.first)
            reports.append(done)
            print(
                f"{target.name}: {cases:,} cases, {done.taken:,} taken, {done.seconds:,.1f} s, "
                f"{len(done.findings)} findings",
                flush=True,
            )
            for finding in done.findings:
                print(finding, flush=True)
    if options.write:
        page = report.ROOT / "docs/reliability.md"
        report.write(page, f"{begun}\n\n{table(reports)}", "fuzz")
    return any(done.findings for done in reports)


if __name__ == "__main__":
    sys.exit(main())
