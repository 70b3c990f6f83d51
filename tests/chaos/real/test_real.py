"""A short mix of faults on real servers, and that the verdict on it can be "wrong".

`make chaos-real` plays each kind for longer; see docs/reliability.md.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from stream.local_stack import ApacheKafka
from tests import oracle
from tests.chaos.real.schedules import MIX, cluster_options
from tests.chaos.real.world import RULES, World, judge
from tests.integration.worker_process import build_tiny_release

pytestmark = [pytest.mark.kafka, pytest.mark.redis, pytest.mark.timeout(600)]

SEED = 20261125


def test_nothing_is_lost_or_double_and_a_ledger_that_is_off_by_one_would_tell(
    start_apache_kafka: Callable[..., ApacheKafka], tmp_path: Path
) -> None:
    kafka = start_apache_kafka(**cluster_options())
    world = World(MIX, SEED, kafka, build_tiny_release(tmp_path), tmp_path)
    outcome = world.run()
    assert (outcome.lost, outcome.double, outcome.wrong) == (0, 0, [])
    assert outcome.faults.total() == len(outcome.back_s) > 0

    ledger = world.counting
    at = _one_that_counts(ledger)
    without = oracle.fold(ledger[:at] + ledger[at + 1 :], RULES)
    lost, double, wrong = judge(world.stored, without)
    assert (lost, double, len(wrong)) == (0, 1, 1)
    once_more = replace(ledger[at], offset=max(event.offset for event in ledger) + 1)
    lost, double, wrong = judge(world.stored, oracle.fold([*ledger, once_more], RULES))
    assert (lost, double, len(wrong)) == (1, 0, 1)


def _one_that_counts(ledger: list[oracle.Event]) -> int:
    """Without an event id, which may repeat another's, of a shopper who did not want to be
    forgotten, and not their latest, which the watermark would tell."""
    forgotten = {event.user_id for event in ledger if event.type == oracle.FORGET}
    latest = {event.user_id: at for at, event in enumerate(ledger)}
    return next(
        at
        for at, event in enumerate(ledger)
        if event.event_key is None
        and event.user_id not in forgotten
        and at != latest[event.user_id]
    )
