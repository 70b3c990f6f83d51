"""What the trainer counts a turn of fine-tuning as."""

from __future__ import annotations

from pathlib import Path

import pytest

from model.releases import record_decision
from stream.trainer_app import outcome_of


@pytest.mark.parametrize(
    ("verdict", "outcome"), [("accept", "accepted"), ("reject", "rejected"), ("held", "held")]
)
def test_a_turn_counts_as_its_own_verdict_said(tmp_path: Path, verdict: str, outcome: str) -> None:
    for decision in ("accept", "reject", verdict):
        record_decision(tmp_path, {"decision": decision})
    assert outcome_of(0, tmp_path) == outcome


def test_a_turn_that_ended_with_an_error_or_without_a_verdict_has_failed(tmp_path: Path) -> None:
    assert outcome_of(0, tmp_path) == "failed"
    record_decision(tmp_path, {"decision": "accept"})
    assert outcome_of(1, tmp_path) == outcome_of(-15, tmp_path) == "failed"
