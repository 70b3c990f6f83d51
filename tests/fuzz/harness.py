"""Runs cases against what takes bytes from outside, in processes of their own that are watched.

A case is a number: its generator is seeded with the seed and that number, so it is the same case
wherever it is tried. Targets try a block of cases at once where that is how the code under test
works; a block that fails is tried again case by case.

Knows nothing of what is tested, nor how a case is made.
"""

from __future__ import annotations

import multiprocessing
import os
import resource
import time
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from multiprocessing.connection import Connection, wait
from pathlib import Path
from random import Random

Check = Callable[[Sequence[Random]], int]
"""Tries a case per generator, and tells how many were taken for good; raises for a finding."""

_SILENCE_S = 60.0  # of a process: then it hangs. Wall time, for machines in heavy use
_MEMORY = 512 << 20  # bytes that the cases of one process may take beside what it begins with
_MOST = 20  # findings of one process, which then has better things to do


@dataclass(frozen=True)
class Target:
    """Something that must not fall over whatever it is given."""

    name: str
    cases: int  # of a full run
    make: Callable[[], Check]  # in the process that tries them
    block: int = 1  # cases that are tried together
    limit_s: float = 2.0  # of CPU time, of a block


@dataclass(frozen=True)
class Finding:
    """What went wrong, and with which cases."""

    target: str
    seed: int
    first: int
    count: int
    what: str

    def __str__(self) -> str:
        again = f"--target {self.target} --seed {self.seed} --first {self.first}"
        return f"{self.what}\nagain: python -m tests.fuzz {again} --cases {self.count}"


@dataclass(frozen=True)
class Report:
    """What came of a target."""

    target: str
    cases: int = 0
    taken: int = 0
    seconds: float = 0.0
    findings: list[Finding] = field(default_factory=list)


def generator(seed: int, index: int) -> Random:
    """Of one case."""
    return Random((seed << 64) | index)


def run(target: Target, cases: int, seed: int, first: int = 0, processes: int = 0) -> Report:
    """Try cases `first`, … in as many processes as there are cores."""
    began_s = time.monotonic()
    processes = processes or len(os.sched_getaffinity(0))
    blocks = -(-cases // target.block)
    parts = [
        range(first + blocks * i // processes * target.block,
              min(first + blocks * (i + 1) // processes * target.block, first + cases))
        for i in range(processes)
    ]  # fmt: skip
    watched = [_Watched(target, seed, part) for part in parts if part]
    report = Report(target.name, cases)
    while any(not each.ended for each in watched):
        wait([each.answers for each in watched if not each.ended], timeout=1.0)
        for each in watched:
            each.look()
    return replace(
        report,
        taken=sum(each.taken for each in watched),
        seconds=time.monotonic() - began_s,
        findings=[finding for each in watched for finding in each.findings],
    )


class _Watched:
    """A process that tries cases; one that dies or hangs is a finding, and another goes on."""

    def __init__(self, target: Target, seed: int, part: range) -> None:
        self._target, self._seed, self._part = target, seed, part
        self.findings: list[Finding] = []
        self.taken = 0
        self.ended = False
        self._begin(part)

    def _begin(self, part: range) -> None:
        self._at = part[:0]  # the block in hand
        context = multiprocessing.get_context("fork")
        self.answers, theirs = context.Pipe(duplex=False)
        self._process = context.Process(
            target=_try_all, args=(self._target, self._seed, part, theirs), daemon=True
        )
        self._process.start()
        theirs.close()
        self._heard_s = time.monotonic()

    def look(self) -> None:
        """Hear what the process has to say."""
        try:
            while not self.ended and self.answers.poll():
                self._heard_s = time.monotonic()
                kind, *told = self.answers.recv()
                if kind == "block":
                    self._at = range(told[0], min(told[0] + self._target.block, self._part.stop))
                elif kind == "finding":
                    self.findings.append(Finding(self._target.name, self._seed, *told))
                else:
                    self.taken += told[0]
                    self.ended = True
        except EOFError:
            self._process.join()
            self._lost(f"the process died ({self._process.exitcode})")
        if not self.ended and time.monotonic() - self._heard_s > _SILENCE_S:
            self._process.kill()
            self._process.join()
            self._lost(f"no end within {_SILENCE_S:.0f} s")

    def _lost(self, what: str) -> None:
        at = self._at or self._part[:1]
        self.findings.append(Finding(self._target.name, self._seed, at.start, len(at), what))
        rest = range(at.stop, self._part.stop)
        if rest and len(self.findings) < _MOST:
            self._begin(rest)
        else:
            self.ended = True


def _try_all(target: Target, seed: int, part: range, answers: Connection) -> None:
    warnings.simplefilter("error")
    check = target.make()
    _bound_memory()
    taken = found = 0
    for first, outcome in try_blocks(
        target, check, seed, part, lambda at: answers.send(("block", at))
    ):
        if isinstance(outcome, int):
            taken += outcome
            continue
        answers.send(("finding", first, outcome.count, outcome.what))
        found += 1
        if found == _MOST:
            break
    answers.send(("end", taken))


def try_blocks(
    target: Target,
    check: Check,
    seed: int,
    part: range,
    began: Callable[[int], None] = lambda first: None,
) -> Iterator[tuple[int, int | Finding]]:
    """Per block its first case, and how many were taken, or what was found."""
    for first in range(part.start, part.stop, target.block):
        began(first)
        indices = range(first, min(first + target.block, part.stop))
        what = _tried(target, check, seed, indices)
        if isinstance(what, int):
            yield first, what
            continue
        for index in indices if len(indices) > 1 else ():
            alone = _tried(target, check, seed, range(index, index + 1))
            if isinstance(alone, str):
                yield index, Finding(target.name, seed, index, 1, alone)
                break
        else:
            yield first, Finding(target.name, seed, first, len(indices), what)


def _tried(target: Target, check: Check, seed: int, indices: range) -> int | str:
    began_s = time.process_time()
    try:
        taken = check([generator(seed, index) for index in indices])
    except Exception:
        return traceback.format_exc()
    took_s = time.process_time() - began_s
    return taken if took_s <= target.limit_s else f"{took_s:.1f} s of CPU time"


def _bound_memory() -> None:
    """More than that is a MemoryError, and so a finding."""
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    (kb,) = (int(line.split()[1]) for line in status.splitlines() if line.startswith("VmData"))
    limit = (kb << 10) + _MEMORY
    resource.setrlimit(resource.RLIMIT_DATA, (limit, resource.getrlimit(resource.RLIMIT_DATA)[1]))
