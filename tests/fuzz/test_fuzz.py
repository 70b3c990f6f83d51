"""A few thousand cases a target, the same ones every time; `make fuzz` tries more."""

from __future__ import annotations

import time

import pytest

from profiles import arithmetic
from stream import scanning
from tests.fuzz.harness import Target, generator, run, try_blocks
from tests.fuzz.targets import TARGETS

# So many take a second or two each, on a busy core.
CASES = {"fold": 400, "profile": 2_000, "releases": 300, "http": 600}


@pytest.mark.parametrize("target", TARGETS, ids=lambda target: target.name)
def test_nothing_falls_over_whatever_it_is_given(target: Target) -> None:
    report = run(target, CASES.get(target.name, 4_000), seed=1, processes=1)
    assert not report.findings, str(report.findings[0])
    assert 0 < report.taken < report.cases  # good ones and bad ones


def test_a_case_is_the_same_wherever_it_is_tried() -> None:
    assert generator(3, 7).random() == generator(3, 7).random()
    assert len({generator(seed, index).random() for seed in (0, 1) for index in (0, 1, 2)}) == 6


def test_a_planted_mistake_of_a_codec_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    def careless(fence: bytes) -> dict[int, int]:
        return dict(arithmetic._WATERMARK.iter_unpack(fence[arithmetic._FENCE :]))

    monkeypatch.setattr(arithmetic, "_watermark", careless)
    (target,) = (target for target in TARGETS if target.name == "fence")
    report = run(target, 2_000, seed=1, processes=1)
    assert report.findings
    finding = report.findings[0]
    assert "struct.error" in finding.what
    assert finding.count == 1
    again = run(target, 1, finding.seed, finding.first)
    assert again.findings[0].what == finding.what


def test_a_planted_mistake_of_the_scanner_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    scan = scanning.Scanner.scan

    def trusting(scanner: scanning.Scanner, values: list[bytes | None], *rest: object) -> object:
        """White space that JSON does not know."""
        return scan(scanner, [value and value.replace(b"\x0b", b" ") for value in values], *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(scanning.Scanner, "scan", trusting)
    (target,) = (target for target in TARGETS if target.name == "events")
    report = run(target, 8_000, seed=1, processes=1)
    assert report.findings
    assert "taken by the scanner alone" in report.findings[0].what


def _target(check: object, **options: object) -> Target:
    return Target("planted", 10, lambda: check, **options)  # type: ignore[arg-type]


def test_a_process_that_dies_is_a_finding_and_another_goes_on() -> None:
    def check(cases: list[object]) -> int:
        import os

        if cases[0].random() == generator(0, 3).random():  # type: ignore[attr-defined]
            os._exit(7)
        return 1

    report = run(_target(check), 10, seed=0, processes=1)
    assert [(f.first, f.what) for f in report.findings] == [(3, "the process died (7)")]
    assert report.taken == 6  # those after it


def test_hangs_slow_cases_and_greed_are_findings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tests.fuzz.harness._SILENCE_S", 1.0)

    def hang(cases: list[object]) -> int:
        time.sleep(60)
        return 1

    def slow(cases: list[object]) -> int:
        return sum(range(3_000_000)) and 1

    def greedy(cases: list[object]) -> int:
        return len(bytearray(1 << 30)) and 1

    assert "no end" in run(_target(hang), 1, seed=0, processes=1).findings[0].what
    limited = _target(slow, limit_s=0.001)
    assert "CPU time" in run(limited, 1, seed=0, processes=1).findings[0].what
    assert "MemoryError" in run(_target(greedy), 1, seed=0, processes=1).findings[0].what


def test_what_fails_only_together_is_told_as_a_block() -> None:
    def check(cases: list[object]) -> int:
        assert len(cases) == 1
        return 1

    target = _target(check, block=4)
    ((first, outcome),) = try_blocks(target, target.make(), 0, range(4))
    assert not isinstance(outcome, int)
    assert (first, outcome.first, outcome.count) == (0, 0, 4)
