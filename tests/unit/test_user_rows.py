from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from stream.user_rows import UserRows


@given(parts=st.lists(st.lists(st.text("ab\x00ü", max_size=3), max_size=20), max_size=4))
def test_users_get_rows_in_the_order_in_which_they_come_first(parts: list[list[str]]) -> None:
    users, model = UserRows(sum(map(len, parts))), dict[str, int]()
    for part in parts:
        want = [model.setdefault(user, len(model)) for user in part]
        assert users.rows_of_ids(part).tolist() == want
    assert list(users.ids()) == list(model)


def test_ids_that_are_longer_than_expected_find_room() -> None:
    users, ids = UserRows(3), ["x" * 256, "y" * 256, "x" * 255]
    assert users.rows_of_ids(ids[:1]).tolist() == [0]
    assert users.rows_of_ids(ids).tolist() == [0, 1, 2]
    assert list(users.ids()) == ids
