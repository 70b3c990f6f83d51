"""`make chaos`: many seeds on all cores, or one seed with its trace. Leaves 1 where any failed."""

from __future__ import annotations

import argparse
import multiprocessing
import os
import re
import sys
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path

from .world import Outcome, play

_TOLD_EVERY_S = 5.0
_TAIL = 80  # of a trace, where many seeds run
_TABLE = re.compile(r"(<!-- begin: make chaos -->\n).*?(<!-- end -->)", re.DOTALL)


def _quietly(seed: int) -> Outcome:
    outcome = play(seed)
    return outcome if outcome.failure else replace(outcome, trace=[])


def _on_one_core(number: multiprocessing.Value) -> None:  # type: ignore[valid-type]
    """Threads that take turns are fastest where they need not wake another core."""
    cores = sorted(os.sched_getaffinity(0))
    with number.get_lock():
        os.sched_setaffinity(0, {cores[number.value % len(cores)]})
        number.value += 1


def _outcomes(seeds: Iterable[int]) -> Iterator[Outcome]:
    context = multiprocessing.get_context("fork")
    cores = len(os.sched_getaffinity(0))
    number = context.Value("i", 0)
    with context.Pool(cores, _on_one_core, (number,)) as pool:
        yield from pool.imap_unordered(_quietly, seeds, chunksize=4)


def told(outcome: Outcome, most: int = 0) -> str:
    """What happened, as lines; `most`: of the trace, from its end."""
    began_s = outcome.trace[0][0] if outcome.trace else 0.0
    steps = outcome.trace[-most:] if most else outcome.trace
    lines = [f"{at_s - began_s:9.4f} s  {who:20} {what}" for at_s, who, what in steps]
    if len(steps) < len(outcome.trace):
        lines.insert(0, f"({len(outcome.trace) - len(steps)} steps before these)")
    return "\n".join([*lines, f"seed {outcome.seed}: {outcome.failure or 'all right'}"])


def _table(outcomes: Counter[str], faults: Counter[str], seeds: int, failed: int) -> str:
    rows = [("seeds", seeds), *outcomes.items()]
    rows += [(f"fault: {kind}", count) for kind, count in sorted(faults.items())]
    rows += [("seeds with an event lost, counted twice, or anything else wrong", failed)]
    return "| | |\n|---|---:|\n" + "".join(f"| {name} | {count:,} |\n" for name, count in rows)


def main() -> int:
    parser = argparse.ArgumentParser(prog="make chaos", description=__doc__)
    parser.add_argument("--seeds", type=int, default=400)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--seed", type=int)
    parser.add_argument("--write", type=Path, help="a page whose table is replaced")
    options = parser.parse_args()
    if options.seed is not None:
        outcome = play(options.seed)
        print(told(outcome))
        return bool(outcome.failure)
    sums, faults, failed, done = Counter[str](), Counter[str](), 0, 0
    began_s = told_s = time.monotonic()
    for outcome in _outcomes(range(options.first, options.first + options.seeds)):
        done += 1
        faults += outcome.faults
        sums["events"] += outcome.events
        sums["profiles saved"] += outcome.saves
        sums["offsets committed"] += outcome.commits
        sums["turns of the scheduler"] += outcome.turns
        sums["simulated seconds"] += round(outcome.simulated_s)
        if outcome.failure:
            failed += 1
            print(f"{told(outcome, _TAIL)}\nall of it: make chaos SEED={outcome.seed}", flush=True)
        if time.monotonic() - told_s > _TOLD_EVERY_S or done == options.seeds:
            told_s = time.monotonic()
            rate = done / (told_s - began_s)
            print(f"{done:,} of {options.seeds:,} seeds, {failed} failed, {rate:.1f}/s", flush=True)
    table = _table(sums, faults, done, failed)
    print(table)
    if options.write:
        page = options.write.read_text()
        options.write.write_text(_TABLE.sub(rf"\1{table}\2", page))
    return bool(failed)


if __name__ == "__main__":
    sys.exit(main())
