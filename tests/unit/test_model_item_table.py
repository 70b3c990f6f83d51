from __future__ import annotations

import threading
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from model import item_table
from model.item_table import Floats, ItemTable

BIGGEST_KEY = 2**64 - 1


def vectors_for(keys: list[int], version: int = 0) -> Floats:
    """Vectors (n, 3) from which the key and its version can be read back."""
    rows = [[key % 65_521, key % 251, version] for key in keys]
    return np.array(rows, dtype=np.float32).reshape(-1, 3)


def test_what_was_put_is_found_and_the_rest_is_zeros() -> None:
    table = ItemTable(10, 3)
    table.put([1, BIGGEST_KEY], vectors_for([1, BIGGEST_KEY]))
    vectors, found = table.lookup([BIGGEST_KEY, 7, 1, 1])
    assert found.tolist() == [True, False, True, True]
    assert vectors.tolist() == [*vectors_for([BIGGEST_KEY]).tolist(), [0, 0, 0]] + 2 * [
        vectors_for([1])[0].tolist()
    ]
    assert (table.hits, table.misses, len(table)) == (3, 1, 2)


def test_the_last_vector_of_a_key_counts() -> None:
    table = ItemTable(10, 3)
    table.put([5], vectors_for([5], version=1))
    table.put([5, 5], vectors_for([5, 5], version=2) * [[1], [2]])
    assert table.lookup([5])[0][0, 2] == 4
    assert len(table) == 1


def test_a_discarded_key_is_gone_and_its_row_used_again() -> None:
    table = ItemTable(2, 3)
    table.put([1, 2], vectors_for([1, 2]))
    table.discard([1, 99])
    table.put([3], vectors_for([3]))
    assert table.lookup([1, 2, 3])[1].tolist() == [False, True, True]


def test_a_lookup_gives_a_copy() -> None:
    table = ItemTable(2, 3)
    table.put([1], vectors_for([1]))
    table.lookup([1])[0][:] = 9
    assert table.lookup([1])[0].tolist() == vectors_for([1]).tolist()


def test_what_is_asked_for_outlives_what_is_not() -> None:
    table = ItemTable(100, 3)
    popular = list(range(20))
    table.put(popular, vectors_for(popular))
    for start in range(1_000, 3_000, 40):
        keys = list(range(start, start + 40))
        table.put(keys, vectors_for(keys))
        table.lookup(popular)
    assert table.lookup(popular)[1].all()
    assert len(table) == 100


def test_of_more_keys_than_fit_the_last_stay() -> None:
    table = ItemTable(4, 3)
    table.put([1, 2, 3, 4], vectors_for([1, 2, 3, 4]))
    table.put(list(range(10, 20)), vectors_for(list(range(10, 20))))
    assert table.lookup([1, 15, 16, 17, 18, 19])[1].tolist() == [False, False, *4 * [True]]


@settings(deadline=None)
@given(
    st.integers(1, 12),
    st.integers(1, 5),
    st.lists(
        st.tuples(
            st.sampled_from(["put", "discard", "lookup"]),
            st.lists(st.integers(0, 20), max_size=15),
        ),
        max_size=40,
    ),
)
def test_a_found_vector_is_always_the_last_one_put(
    capacity: int, sweep_rows: int, steps: list[tuple[str, list[int]]]
) -> None:
    table = ItemTable(capacity, 3)
    item_table.SWEEP_ROWS, before = sweep_rows, item_table.SWEEP_ROWS
    latest: dict[int, Any] = {}
    try:
        for version, (what, keys) in enumerate(steps):
            if what == "put":
                table.put(keys, vectors_for(keys, version))
                latest |= dict(zip(keys, vectors_for(keys, version).tolist(), strict=True))
                just_put = list(dict.fromkeys(keys))[-capacity:]
                assert table.lookup(just_put)[1].all()
            elif what == "discard":
                table.discard(keys)
                assert not table.lookup(keys)[1].any()
            vectors, found = table.lookup(list(latest))
            for key, vector, known in zip(latest, vectors.tolist(), found, strict=True):
                assert vector == (latest[key] if known else [0, 0, 0])
            assert len(table) <= capacity
    finally:
        item_table.SWEEP_ROWS = before


def test_growing_keeps_every_vector() -> None:
    table = ItemTable(50_000, 3)
    keys = list(range(3, 90_000, 3))
    for start in range(0, len(keys), 7_000):
        part = keys[start : start + 7_000]
        table.put(part, vectors_for(part))
    vectors, found = table.lookup(keys)
    assert found.all()
    np.testing.assert_array_equal(vectors, vectors_for(keys))


@pytest.mark.parametrize("key", [-1, BIGGEST_KEY + 1])
def test_a_key_beyond_64_bits_is_refused_and_nothing_stored(key: int) -> None:
    table = ItemTable(4, 3)
    with pytest.raises(OverflowError):
        table.put([1, key], np.ones((2, 3), dtype=np.float32))
    assert len(table) == 0


def test_vectors_of_another_shape_are_refused() -> None:
    with pytest.raises(ValueError, match=r"shape \(2, 3\), got \(2, 4\)"):
        ItemTable(4, 3).put([1, 2], np.ones((2, 4), dtype=np.float32))


def test_a_lookup_never_sees_half_a_change() -> None:
    """Writers replace and evict while readers check that key and vector belong together."""
    table = ItemTable(300, 3)
    wrong: list[Any] = []
    done = threading.Event()

    def read(seed: int) -> None:
        rng = np.random.default_rng(seed)
        while not done.is_set():
            keys = rng.integers(0, 1_000, 200).tolist()
            vectors, found = table.lookup(keys)
            expected = vectors_for(keys)[:, :2] * found[:, None]
            if not np.array_equal(vectors[:, :2], expected):
                wrong.append(keys)

    readers = [threading.Thread(target=read, args=(seed,)) for seed in range(2)]
    for reader in readers:
        reader.start()
    rng = np.random.default_rng(9)
    for version in range(400):
        keys = rng.integers(0, 1_000, 150).tolist()
        table.put(keys, vectors_for(keys, version))
        table.discard(keys[:20])
    done.set()
    for reader in readers:
        reader.join()
    assert not wrong
    assert table.hits > 0
