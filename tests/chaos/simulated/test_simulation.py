"""A few hundred simulated worlds; `make chaos SEEDS=10000` plays more."""

from __future__ import annotations

from collections import Counter

import pytest

from tests.chaos.simulated.__main__ import told
from tests.chaos.simulated.world import FAULTS, Outcome, play

SEEDS = 200


@pytest.fixture(scope="module")
def outcomes() -> list[Outcome]:
    return [play(seed) for seed in range(SEEDS)]


def test_nothing_is_lost_and_nothing_counts_twice_whatever_happens(
    outcomes: list[Outcome],
) -> None:
    failed = [outcome for outcome in outcomes if outcome.failure]
    assert not failed, f"{told(failed[0], 80)}\nall of it: make chaos SEED={failed[0].seed}"


def test_every_kind_of_fault_happens(outcomes: list[Outcome]) -> None:
    happened = sum((outcome.faults for outcome in outcomes), Counter())
    wires = {"connection reset", "reply lost", "pipeline cut", "slow"}
    brokers = {"commit refused", "commit unanswered", "fetch from an older offset"}
    assert happened.keys() == FAULTS.keys() | wires | brokers
    assert min(happened.values()) >= 10


def test_a_seed_is_the_same_world_each_time(outcomes: list[Outcome]) -> None:
    for before in outcomes[:10]:
        assert play(before.seed) == before
