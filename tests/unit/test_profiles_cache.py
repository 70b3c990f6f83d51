from __future__ import annotations

from profiles.cache import ProfileCache, Row


def _row(name: str) -> Row:
    return (name.encode(), b"")


def test_what_was_put_in_is_taken_out_once() -> None:
    cache = ProfileCache(10)
    cache.put([("ann", _row("ann")), ("bob", _row("bob"))])
    assert cache.take(["bob", "eve"]) == [_row("bob"), None]
    assert cache.take(["bob", "ann"]) == [None, _row("ann")]
    assert len(cache) == 0


def test_who_was_saved_longest_ago_makes_room() -> None:
    cache = ProfileCache(2)
    cache.put([("ann", _row("1")), ("bob", _row("1"))])
    cache.put([("ann", row) for row in cache.take(["ann"]) if row is not None])
    cache.put([("cem", _row("1"))])
    assert cache.take(["ann", "bob", "cem"]) == [_row("1"), None, _row("1")]


def test_more_rows_than_fit_at_once_leave_the_last_ones() -> None:
    cache = ProfileCache(2)
    cache.put((user, _row(user)) for user in "abcde")
    assert len(cache) == 2
    assert cache.take(list("abcde")) == [None, None, None, _row("d"), _row("e")]


def test_a_cache_of_none_keeps_none() -> None:
    cache = ProfileCache(0)
    cache.put([("ann", _row("ann"))])
    assert cache.take(["ann"]) == [None]
