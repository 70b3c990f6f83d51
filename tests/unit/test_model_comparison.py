from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from model import gate
from model.comparison import Contender, compare
from model.gate import Comparison
from model.trainer import Candidate
from tests.learnable_shop import base, catalogue, circle, trained


@pytest.fixture(scope="module")
def candidate(tmp_path_factory: pytest.TempPathFactory) -> Candidate:
    return trained(tmp_path_factory.mktemp("candidate"))


def _compare(current: Contender, other: Contender, of: Candidate, **options: float) -> Comparison:
    return compare(
        circle(),
        current,
        other,
        cut_ms=of.metrics["cut_ms"],
        item_events=of.counts,
        events=8,
        **options,  # type: ignore[arg-type]
    )


def test_who_knows_what_comes_next_is_accepted_and_who_does_not_is_rejected(
    candidate: Candidate,
) -> None:
    shop = catalogue(60)  # Recall@20 among a dozen items would tell nobody apart
    vectors = np.concatenate([candidate.vectors, base(shop).vectors(shop)[12:]])
    learned = replace(Contender.of(candidate), vectors=vectors)
    text = Contender(base(shop).vectors(shop))
    better = compare(
        circle(), text, learned, cut_ms=candidate.metrics["cut_ms"],
        item_events=np.full(60, 100), events=8,
    )  # fmt: skip
    assert better.newest.candidate > better.newest.current + 0.1
    assert better.newest.low > 0
    assert gate.decide(better, gate.Bounds(least_count=10)).accepted
    worse = compare(
        circle(), learned, text, cut_ms=candidate.metrics["cut_ms"],
        item_events=np.full(60, 100), events=8,
    )  # fmt: skip
    refused = gate.decide(worse, gate.Bounds(least_count=10))
    assert not refused.accepted
    assert any("is not better" in reason for reason in refused.reasons)


def test_nobody_is_better_than_themselves(candidate: Candidate) -> None:
    same = Contender.of(candidate)
    found = _compare(same, same, candidate)
    assert found.newest.difference == found.newest.low == found.newest.high == 0.0
    assert [figure.difference for figure in found.heads] == [0.0] * len(found.heads)
    assert found.heads  # `purchase` has both classes
    assert not gate.decide(found).accepted


def test_slices_hold_all_targets_once_and_rare_items_apart(candidate: Candidate) -> None:
    same = Contender.of(candidate)
    count = {f.name: f.count for f in _compare(same, same, candidate).slices}
    newest = _compare(same, same, candidate).newest.count
    assert count["recall@20 of new users"] + count["recall@20 of returning users"] == newest
    assert count["recall@20 of rare items"] == 0


def test_numbers_that_are_none_are_counted(candidate: Candidate) -> None:
    broken = candidate.vectors.copy()
    broken[0, 0] = np.nan
    found = _compare(
        Contender.of(candidate), replace(Contender.of(candidate), vectors=broken), candidate
    )
    assert found.non_finite == 1
    assert not gate.decide(found).accepted


def test_the_same_seed_draws_the_same_windows(candidate: Candidate) -> None:
    same = Contender.of(candidate)
    one, other = (_compare(same, same, candidate, most=20, seed=3) for _ in range(2))
    assert one == other
    assert one.newest.count <= 20
