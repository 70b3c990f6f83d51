"""The last item of every user, ranked from all the items before it.

PURE: numpy only. The split of the published tables (Kang and McAuley, ICDM 2018): the last item
of a user is the test, the one before it the validation, the rest is for training; when the test
is ranked, the validation item belongs to the history. It ignores time across users, so a scorer
may have learned from what others did later; `prequential.py` is the stricter judge.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np

from .evaluate import Bools, Int32s, Ints, ranks
from .prequential import Events, Scorer

_USERS_AT_ONCE = 256

Part = Literal["validation", "test"]


@dataclass(frozen=True)
class Split:
    """Histories and the item that followed each."""

    history: Events
    """Everything before the targets, by user, and each user's in order."""
    user: Ints  # (u,) users with a target
    item: Int32s  # (u,) the item that followed
    t_ms: Ints  # (u,) when


def split(events: Events, part: Part = "test") -> Split:
    """Cut the last item (test) or the one before it (validation) off every user's events.

    Users with fewer than three events have no target, and their events are history.
    """
    order = np.lexsort((np.arange(len(events)), events.user))
    events = events.take(order)
    _, start, count = np.unique(events.user, return_index=True, return_counts=True)
    from_end = np.repeat(start + count, count) - np.arange(len(events))  # 1 = the last
    cut = 1 if part == "test" else 2
    enough = np.repeat(count >= 3, count)
    target = events.take(enough & (from_end == cut))
    history = events.take(~enough | (from_end > cut))
    return Split(history, target.user, target.item, target.t_ms)


@dataclass(frozen=True)
class LeftOut:
    """Places of the targets (u,), as the published tables count them in either way."""

    user: Ints  # (u,)
    kept: Int32s  # (u,) among all items
    masked: Int32s  # (u,) among the items that the user has no event with; a repeat ranks last
    repeat: Bools  # (u,) the target is an item of the user's history


def rank_targets(
    scorer: Scorer,
    n_items: int,
    of: Split,
    *,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> LeftOut:
    """Where `scorer`, which has been told `of.history`, puts the items that followed."""
    by_user = np.argsort(of.history.user, kind="stable")
    bounds = np.searchsorted(
        of.history.user[by_user], np.stack([of.user, of.user + 1], axis=1)
    )  # (u, 2)
    kept, masked, repeat = [], [], []
    for first in range(0, len(of.user), _USERS_AT_ONCE):
        part = slice(first, first + _USERS_AT_ONCE)
        item = of.item[part]
        row = np.arange(len(item))
        scores = scorer.scores(of.user[part], of.t_ms[part])
        kept.append(ranks(scores, row, item))
        owner = np.repeat(row, bounds[part, 1] - bounds[part, 0])
        past = np.concatenate([of.history.item[by_user[a:b]] for a, b in bounds[part].tolist()])
        seen = np.zeros(scores.shape, dtype=bool)
        seen[owner[past >= 0], past[past >= 0]] = True
        again = seen[row, item]
        place = ranks(np.where(seen, -np.inf, scores), row, item)
        masked.append(np.where(again, n_items, place).astype(np.int32))
        repeat.append(again)
        progress(min(first + _USERS_AT_ONCE, len(of.user)), len(of.user))
    return LeftOut(of.user, _joined(kept), _joined(masked), np.concatenate([*repeat, []]) > 0)


def _joined(parts: list[Int32s]) -> Int32s:
    return np.concatenate(parts) if parts else np.zeros(0, dtype=np.int32)
