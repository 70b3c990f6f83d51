"""What events count as, when saves are refused and folds are repeated."""

from __future__ import annotations

import numpy as np

from profiles.fates import APPLIED, FORGOTTEN, REPEATED, REPLAYED, Fates

ALL = np.arange(4)
FIRST = np.array([APPLIED, REPEATED, FORGOTTEN, REPLAYED], np.uint8)
AGAIN = np.full(4, REPLAYED, np.uint8)


def counts(fates: Fates) -> list[int]:
    return [int(fates.are(f).sum()) for f in (APPLIED, REPEATED, FORGOTTEN, REPLAYED)]


def test_what_a_repeat_finds_applied_was_saved_the_time_before() -> None:
    fates = Fates(4)
    fates.folded(ALL, FIRST, ["split"])
    fates.folded(ALL, AGAIN, [])
    assert counts(fates) == [1, 1, 1, 1]
    assert fates.split() == 1


def test_what_was_refused_counts_as_it_is_found_afterwards() -> None:
    fates = Fates(4)
    fates.folded(ALL, FIRST, ["split", "other"])
    fates.refused(ALL[:2], FIRST[:2], ["split"])
    assert counts(fates) == [0, 0, 1, 1]
    assert fates.split() == 1
    fates.folded(ALL[:2], AGAIN[:2], [])  # the writer that was there first had them
    assert counts(fates) == [0, 0, 1, 3]


def test_a_refusal_does_not_take_back_what_a_lost_reply_had_saved() -> None:
    fates = Fates(2)
    fates.folded(ALL[:1], FIRST[:1], [])  # saved, and the reply lost
    mixed = np.array([REPLAYED, APPLIED], np.uint8)
    fates.folded(ALL[:2], mixed, [])
    fates.refused(ALL[:2], mixed, [])
    fates.folded(ALL[:2], mixed, [])
    assert counts(fates) == [2, 0, 0, 0]
