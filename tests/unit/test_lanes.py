from __future__ import annotations

from itertools import pairwise

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from profiles.ids import Ids
from stream.lanes import in_lanes, lanes_of

USERS = st.lists(st.text("ab\x00ü", max_size=5), max_size=40, unique=True)


@given(users=USERS, count=st.sampled_from([1, 2, 4]))
def test_users_of_a_lane_stand_together_in_their_order(users: list[str], count: int) -> None:
    ids = Ids.of(users)
    lane = lanes_of(ids, count)
    arranged = in_lanes(ids, lane, count)
    now = list(arranged.users)
    assert [now[row] for row in arranged.row] == users
    found = [now[begin:end] for begin, end in pairwise(arranged.begin)]
    assert found == [
        [user for user, its in zip(users, lane, strict=True) if its == number]
        for number in range(count)
    ]


@given(users=USERS, others=USERS)
def test_the_lane_of_a_user_does_not_depend_on_who_else_is_there(
    users: list[str], others: list[str]
) -> None:
    both = users + [other for other in others if other not in users]
    alone = lanes_of(Ids.of(users), 4)
    assert lanes_of(Ids.of(both), 4)[: len(users)].tolist() == alone.tolist()
    behind = Ids.of(["x", *users])[1:]  # which begins in the middle of its bytes
    assert lanes_of(behind, 4).tolist() == alone.tolist()
    assert list(in_lanes(behind, alone, 4).users) == list(in_lanes(Ids.of(users), alone, 4).users)


def test_every_lane_gets_its_share() -> None:
    lanes = lanes_of(Ids.of(f"shopper-{i}" for i in range(4_000)), 4)
    assert np.bincount(lanes).min() > 900
