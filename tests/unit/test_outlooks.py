"""Who waits for an outlook, how much of a core they get, and how an outlook is kept."""

from __future__ import annotations

import json
import random

import numpy as np
import pytest

from profiles import StateCorrupt, outlook
from profiles.schema import SCHEMA_VERSION
from stream import metrics
from stream.outlooks import Pace, Waiting
from stream.profile_view import _foretold, _outlook_json

SPACE = 0x5EED
VECTORS = np.array([[0.6, 0.8], [0.0, -1.0]], np.float32)
HEADS = {"purchase": np.array([0.25, 0.5]), "churn": np.array([0.125, np.nan])}


def left_out() -> float:
    return float(metrics.OUTLOOKS_LEFT_OUT._value.get())


def test_who_acts_often_waits_once_and_keeps_their_place() -> None:
    waiting = Waiting(10)
    waiting.add(["ann", "bob"])
    waiting.add(["max", "ann"])
    assert waiting.take(2, 0) == ["ann", "bob"]
    assert waiting.take(2, 0) == ["max"]
    assert waiting.take(2, 0) == []


def test_who_does_not_fit_is_counted_and_finds_room_later() -> None:
    waiting, before = Waiting(2), left_out()
    waiting.add(["ann", "bob", "max"])
    waiting.add(["bob"])
    assert left_out() - before == 1
    assert waiting.take(1, 0) == ["ann"]
    waiting.add(["max"])
    assert waiting.take(5, 0) == ["bob", "max"]


def test_those_who_were_moved_leave_room_for_those_who_act() -> None:
    waiting = Waiting(4)
    waiting.add(["a", "b", "c"], places=0.5)
    waiting.add(["x", "y"])
    waiting.add(["d"], places=0.5)
    assert waiting.take(9, 0) == ["a", "b", "x", "y"]


def spent(share: float, busy: float, seconds: float = 60.0) -> float:
    """Of a core, by batches of some ms, while the fold is at work for `busy` of the time."""
    chance, pace = random.Random(1), Pace(share)
    now_s = used_s = 0.0
    while now_s < seconds:
        cost_s = chance.uniform(0.005, 0.1)
        began_s = now_s
        now_s += cost_s * chance.uniform(1, 3)  # it waits for a core, too
        used_s += cost_s
        while rest_s := pace.rest_s(cost_s, now_s - began_s, now_s, busy * now_s):
            now_s += max(0.0001, min(rest_s, 1.0))
    return used_s / now_s


@pytest.mark.parametrize("share", [0.02, 0.1, 0.5])
def test_beside_a_busy_fold_it_takes_its_share_and_no_more(share: float) -> None:
    assert 0.8 * share < spent(share, busy=1.0) <= share * 1.02


def test_while_the_fold_rests_the_time_is_free() -> None:
    assert spent(0.1, busy=0.0) > 0.4
    assert 0.25 < spent(0.02, busy=0.7) < 0.33


def test_an_outlook_is_read_as_it_was_written() -> None:
    fields = outlook.encode(VECTORS, HEADS, "trained-1", SPACE, [4, 5], [70, 80], 9_000)
    told = outlook.decode(fields[0][0], fields[0][1].encode(), f"{SPACE:016x}", 6, 10.5)
    assert told is not None
    assert told.next_interest is not None
    np.testing.assert_array_equal(told.next_interest, VECTORS[0])
    assert told.heads == {"purchase": 0.25, "churn": 0.125}
    assert (told.release, told.updated_ms, told.computed_ms) == ("trained-1", 70, 9_000)
    assert (told.saves_since, told.age_s) == (2, 1.5)
    assert json.loads(fields[1][1])["heads"] == {"purchase": 0.5}  # what learned nothing is silent


def test_a_vector_of_another_space_is_not_told_and_the_heads_are() -> None:
    ((next_, heads),) = outlook.encode(
        VECTORS[:1], {"churn": HEADS["churn"][:1]}, "r", SPACE, [1], [1], 1
    )
    told = outlook.decode(next_, heads.encode(), f"{SPACE + 1:016x}", 2, 1.0)
    assert told is not None
    assert (told.next_interest, told.heads) == (None, {"churn": 0.125})


def test_an_outlook_that_cannot_be_read_is_none_or_says_so() -> None:
    ((next_, heads),) = outlook.encode(VECTORS[:1], {}, "r", SPACE, [1], [1], 1)
    space, raw = f"{SPACE:016x}", heads.encode()
    assert outlook.decode(None, None, space, 1, 0.0) is None
    newer = (SCHEMA_VERSION + 1).to_bytes(2, "little") + next_[2:]
    assert outlook.decode(newer, raw, space, 1, 0.0) is None
    for cut in (next_[:3], next_[:-1]):
        with pytest.raises(StateCorrupt):
            outlook.decode(cut, raw, space, 1, 0.0)


@pytest.mark.parametrize(
    "change",
    [{"revision": None}, {"revision": "1"}, {"updated_ms": 1.5}, {"computed_ms": 10**400},
     {"heads": []}, {"heads": {"churn": None}}, {"heads": {"churn": []}}, {"release": 1}],
)  # fmt: skip
def test_heads_that_say_no_outlook_are_corrupt(change: dict[str, object]) -> None:
    ((next_, heads),) = outlook.encode(VECTORS[:1], {}, "r", SPACE, [1], [1], 1)
    texts = [heads[:-1], "[]", "1", "[" * 100_000, json.dumps(json.loads(heads) | change)]
    for raw in (b"", b"\xff", *(text.encode() for text in texts)):
        with pytest.raises(StateCorrupt, match="heads field"):
            outlook.decode(next_, raw, f"{SPACE:016x}", 1, 0.0)


def test_a_person_reads_who_foretold_what() -> None:
    ((next_, heads),) = outlook.encode(
        VECTORS[:1], {k: v[:1] for k, v in HEADS.items()}, "trained-1", SPACE, [1], [1], 60_000
    )
    told = outlook.decode(next_, heads.encode(), f"{SPACE:016x}", 4, 61.0)
    assert told is not None
    assert _foretold(told).plain == (
        "purchase intent 25 %, churn 12 %, foretold by trained-1 at 1970-01-01 00:01, 3 saves ago\n"
    )
    assert _outlook_json(told, vectors=False)["heads"] == {"purchase": 0.25, "churn": 0.125}
    assert _outlook_json(told, vectors=True)["next_interest"] == [0.6, 0.8]
