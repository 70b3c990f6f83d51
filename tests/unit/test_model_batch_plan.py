from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from model.batch_plan import Indexes, pack_batches, padded_tokens, plan_batches

lengths_of_texts = st.lists(st.integers(1, 600), max_size=300)
budgets = st.integers(1, 5_000)
call_costs = st.sampled_from([0, 1, 64, 4096])


def each_text_is_in_one_batch(lengths: list[int], batches: list[Indexes]) -> bool:
    return sorted(int(i) for batch in batches for i in batch) == list(range(len(lengths)))


def batches_keep_to_the_budget(lengths: list[int], batches: list[Indexes], budget: int) -> bool:
    return all(
        len(batch) == 1 or len(batch) * max(lengths[i] for i in batch) <= budget
        for batch in batches
    )


def lengths_never_rise(lengths: list[int], batches: list[Indexes]) -> bool:
    flat = [lengths[i] for batch in batches for i in batch]
    return all(a >= b for a, b in pairwise(flat))


@given(lengths_of_texts, budgets, call_costs)
def test_a_plan_is_a_partition_in_order_within_the_budget(
    lengths: list[int], budget: int, call_tokens: int
) -> None:
    batches = plan_batches(lengths, budget, call_tokens)
    assert each_text_is_in_one_batch(lengths, batches)
    assert batches_keep_to_the_budget(lengths, batches, budget)
    assert lengths_never_rise(lengths, batches)


@given(lengths_of_texts, budgets, call_costs)
def test_order_is_restored_by_assigning_each_batch(
    lengths: list[int], budget: int, call_tokens: int
) -> None:
    out = np.full(len(lengths), -1)
    for batch in plan_batches(lengths, budget, call_tokens):
        out[batch] = [lengths[i] for i in batch]
    assert out.tolist() == lengths


@given(lengths_of_texts, budgets)
def test_free_calls_mean_no_padding(lengths: list[int], budget: int) -> None:
    batches = plan_batches(lengths, budget, call_tokens=0)
    assert padded_tokens(lengths, batches) == sum(lengths)


@given(lengths_of_texts.filter(len), budgets, st.sampled_from([1, 64, 4096]))
def test_no_dearer_than_filling_each_batch_or_padding_nothing(
    lengths: list[int], budget: int, call_tokens: int
) -> None:
    def cost(batches: list[Indexes]) -> int:
        return padded_tokens(lengths, batches) + call_tokens * len(batches)

    descending = np.argsort(-np.array(lengths), kind="stable")
    rows = max(1, budget // max(lengths))
    same_shape = [descending[i : i + rows] for i in range(0, len(lengths), rows)]
    planned = cost(plan_batches(lengths, budget, call_tokens))
    assert planned <= cost(same_shape)
    assert planned <= cost(plan_batches(lengths, budget, call_tokens=0))


def test_dear_calls_are_filled_and_cheap_ones_split() -> None:
    lengths = [100, 3, 3, 3, 3, 3, 3, 3]
    assert len(plan_batches(lengths, 10_000, call_tokens=4096)) == 1
    assert len(plan_batches(lengths, 10_000, call_tokens=64)) == 2


def test_a_text_beyond_the_budget_runs_alone() -> None:
    batches = plan_batches([10, 900, 10], budget_tokens=100)
    assert [batch.tolist() for batch in batches] == [[1], [0, 2]]


def test_nothing_to_plan_gives_no_batches() -> None:
    assert plan_batches([], 100) == []


@pytest.mark.parametrize(("lengths", "budget", "call"), [([0], 9, 0), ([1], 0, 0), ([1], 9, -1)])
def test_impossible_numbers_are_refused(lengths: list[int], budget: int, call: int) -> None:
    with pytest.raises(ValueError, match="at least"):
        plan_batches(lengths, budget, call)


@given(lengths_of_texts, budgets)
def test_packed_batches_are_filled_in_order_within_the_budget(
    lengths: list[int], budget: int
) -> None:
    batches = pack_batches(lengths, budget)
    assert each_text_is_in_one_batch(lengths, batches)
    assert lengths_never_rise(lengths, batches)
    sums = [sum(lengths[i] for i in batch) for batch in batches]
    for batch, total in zip(batches, sums, strict=True):
        assert total <= budget or len(batch) == 1
    for batch, total in zip(batches[1:], sums, strict=False):
        assert total + lengths[batch[0]] > budget  # the next text did not fit


def test_what_no_batch_can_hold_is_refused() -> None:
    for lengths, budget in (([0], 5), ([1], 0)):
        with pytest.raises(ValueError, match="at least 1"):
            pack_batches(lengths, budget)
