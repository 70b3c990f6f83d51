"""PURE. Lengths of waiting texts -> the batches to run them in, under a token budget.

A batch that is padded costs rows x longest, plus a fixed cost per call; one that is packed,
the sum of its lengths. Knows nothing of texts, devices or what is in a batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

Indexes = npt.NDArray[np.int64]


def plan_batches(
    lengths: Sequence[int] | npt.NDArray[Any], budget_tokens: int, call_tokens: int = 0
) -> list[Indexes]:
    """Split texts of these lengths (in tokens, each >= 1) into batches, longest first.

    Each batch is an array of positions in `lengths`; every position is in exactly one,
    so `out[batch] = vectors` restores the order. Rows x longest stays within
    `budget_tokens`, except that a text longer than the budget is a batch by itself.

    `call_tokens` is what one call costs whatever is in it, in tokens of work: 0 pads
    nothing, a large value fills each batch. Among the splits that keep texts of one
    length together (until the budget parts them), the cheapest is taken.

    Longest first, because the batch that might not fit in memory should fail first and
    the allocator can reuse its blocks for all that follow.
    """
    sizes = np.asarray(lengths, dtype=np.int64)
    if sizes.size == 0:
        return []
    if sizes.min() < 1 or budget_tokens < 1 or call_tokens < 0:
        raise ValueError("lengths and budget_tokens must be at least 1, call_tokens at least 0")
    order = np.argsort(-sizes, kind="stable")
    batches = []
    for start, stop in _cheapest_runs(sizes[order], budget_tokens, call_tokens):
        rows = max(1, budget_tokens // int(sizes[order[start]]))
        batches += [order[at : min(at + rows, stop)] for at in range(start, stop, rows)]
    return batches


def pack_batches(lengths: Sequence[int] | npt.NDArray[Any], budget_tokens: int) -> list[Indexes]:
    """As `plan_batches` for a tower that pads nothing: a batch costs the sum of its lengths.

    Longest first, because texts of one length that are neighbours share one call of attention.
    """
    sizes = np.asarray(lengths, dtype=np.int64)
    if (sizes.size and sizes.min() < 1) or budget_tokens < 1:
        raise ValueError("lengths and budget_tokens must be at least 1")
    order = np.argsort(-sizes, kind="stable")
    ends = np.cumsum(sizes[order])
    batches, start, taken = [], 0, 0
    while start < len(order):
        fitting = int(np.searchsorted(ends, taken + budget_tokens, side="right"))
        stop = max(start + 1, fitting)
        batches.append(order[start:stop])
        start, taken = stop, int(ends[stop - 1])
    return batches


def padded_tokens(lengths: Sequence[int] | npt.NDArray[Any], batches: Sequence[Indexes]) -> int:
    """The tokens that a device works through for these batches, padding included."""
    sizes = np.asarray(lengths, dtype=np.int64)
    return sum(len(batch) * int(sizes[batch].max()) for batch in batches)


def _cheapest_runs(
    descending: Indexes, budget_tokens: int, call_tokens: int
) -> list[tuple[int, int]]:
    """Cut sorted lengths into runs [start, stop) that share one padded length.

    The shortest path over the places where the length changes: at most one place per
    distinct length, so 128 steps of 128 for texts of up to 128 tokens.
    """
    changes = np.flatnonzero(np.diff(descending)) + 1
    cuts = np.concatenate([[0], changes, [len(descending)]])  # (g + 1,)
    longest = descending[cuts[:-1]]  # (g,) padded length of a run that begins at each cut
    rows_per_call = np.maximum(1, budget_tokens // longest)  # (g,)
    best = np.zeros(len(cuts))  # best[j]: the least cost of everything before cut j
    came_from = np.zeros(len(cuts), dtype=np.int64)
    for j in range(1, len(cuts)):
        rows = cuts[j] - cuts[:j]  # (j,)
        calls = -(-rows // rows_per_call[:j])
        costs = best[:j] + rows * longest[:j] + calls * call_tokens
        came_from[j] = int(costs.argmin())
        best[j] = costs[came_from[j]]
    runs, j = [], len(cuts) - 1
    while j > 0:
        runs.append((int(cuts[came_from[j]]), int(cuts[j])))
        j = int(came_from[j])
    return runs[::-1]
