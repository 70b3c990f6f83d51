from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from profiles.cache import ProfileCache, Row, Rows

ROW_BYTES = 40


def _row(name: str) -> Row:
    return (name.encode(), name.upper().encode() * 2)


def _put(cache: ProfileCache, users: Sequence[str], rows: Sequence[Row] | None = None) -> None:
    rows = [_row(user) for user in users] if rows is None else rows
    cache.put(users, np.arange(len(users)), Rows.of(rows))


def _take(cache: ProfileCache, users: Sequence[str]) -> list[Row | None]:
    rows, missing = cache.take(users)
    absent = set(missing.tolist())
    return [None if i in absent else rows.row(i) for i in range(len(users))]


def test_what_was_put_in_is_taken_out_once() -> None:
    cache = ProfileCache(10, ROW_BYTES)
    _put(cache, ["ann", "bob"])
    assert _take(cache, ["bob", "eve"]) == [_row("bob"), None]
    assert _take(cache, ["bob", "ann"]) == [None, _row("ann")]
    assert len(cache) == 0


def test_who_was_saved_longest_ago_makes_room() -> None:
    cache = ProfileCache(2, ROW_BYTES)
    _put(cache, ["ann", "bob"])
    assert _take(cache, ["ann"]) == [_row("ann")]
    _put(cache, ["ann"])
    _put(cache, ["cem"])
    assert _take(cache, ["ann", "bob", "cem"]) == [_row("ann"), None, _row("cem")]


def test_more_rows_than_fit_at_once_leave_the_last_ones() -> None:
    cache = ProfileCache(2, ROW_BYTES)
    _put(cache, "abcde")
    assert len(cache) == 2
    assert _take(cache, "abcde") == [None, None, None, _row("d"), _row("e")]


def test_a_cache_of_none_keeps_none() -> None:
    cache = ProfileCache(0, ROW_BYTES)
    _put(cache, ["ann"])
    assert _take(cache, ["ann"]) == [None]


def test_a_row_that_is_too_large_is_not_kept_nor_the_one_before_it() -> None:
    cache = ProfileCache(2, ROW_BYTES)
    _put(cache, ["ann"])
    _put(cache, ["ann"], [(b"x" * ROW_BYTES, b"")])
    assert _take(cache, ["ann"]) == [None]
    _put(cache, ["ann"], [(b"x" * (ROW_BYTES - 3), b"")])
    assert _take(cache, ["ann"]) == [(b"x" * (ROW_BYTES - 3), b"")]


def test_cleared_it_holds_nothing() -> None:
    cache = ProfileCache(3, ROW_BYTES)
    _put(cache, ["ann"])
    cache.clear()
    assert (len(cache), _take(cache, ["ann"])) == (0, [None])


names = st.text("abü", max_size=3)


@given(
    capacity=st.integers(0, 5),
    steps=st.lists(st.tuples(st.booleans(), st.lists(names, max_size=6, unique=True)), max_size=30),
)
def test_it_does_what_a_dictionary_in_order_would(
    capacity: int, steps: list[tuple[bool, list[str]]]
) -> None:
    cache, model = ProfileCache(capacity, ROW_BYTES), dict[str, Row]()
    for turn, (puts, users) in enumerate(steps):
        if puts:
            rows = [(f"{turn}".encode(), user.encode()) for user in users]
            _put(cache, users, rows)
            for user, row in zip(users, rows, strict=True):
                model.pop(user, None)
                model[user] = row
                if len(model) > capacity:
                    del model[next(iter(model))]
        else:
            assert _take(cache, users) == [model.pop(user, None) for user in users]
        assert len(cache) == len(model)
