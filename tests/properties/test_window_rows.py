"""What a window encoder is given when it serves is what it learned from."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from model.training_data import window_inputs
from profiles import arithmetic
from profiles.arithmetic import EventColumns, Floats, Layout
from profiles.schema import EVENT_TYPES, WINDOW_ENTRY, key64
from stream import archive
from stream.archive import archived
from stream.contributions import DEFAULT_WEIGHTS, columns
from stream.events import Event
from stream.labelling import Rules, label
from stream.window_rows import window_rows
from tests.archived_events import T0_MS, parsed

D, EVENTS, SOURCE = 3, 6, 7
ITEMS = ["a", "b", "c", "d"]
VECTORS = np.random.default_rng(3).standard_normal((len(ITEMS), D)).astype(np.float32)
VECTOR_OF = {key64(item): vector for item, vector in zip(ITEMS, VECTORS, strict=True)}

# type, item (the last is in no catalogue), second, rating: many of one instant, many late
drawn = st.lists(
    st.tuples(
        st.sampled_from(EVENT_TYPES),
        st.sampled_from([*ITEMS, "unknown"]),
        st.integers(0, 8),
        st.sampled_from([1, 2, 3, 4.5, 5]),
    ),
    min_size=1,
    max_size=25,
)


def events(told: list[tuple[str, str, int, float]]) -> list[Event]:
    values = []
    for type_, item, second, rating in told:
        event: dict[str, Any] = {"type": type_, "user_id": "u", "ts": T0_MS + 1000 * second}
        if type_ in ("search", "message"):
            event["query" if type_ == "search" else "text"] = item
        else:
            event["item_id"] = item
        if type_ == "review":
            event["rating"] = rating
        values.append(json.dumps(event).encode())
    return parsed(values)


def vectors_of(keys: list[int]) -> Floats:
    found = [VECTOR_OF.get(key, np.zeros(D, np.float32)) for key in keys]
    return np.array(found, np.float32).reshape(len(keys), D)


def profile_window(batch: list[Event], kept: int) -> np.ndarray:
    """Of the profile that these events make."""
    layout, m = Layout(D, window=kept), len(batch)
    taken = columns(batch, DEFAULT_WEIGHTS, "USD")
    keys = np.array([key64(item) if item else 0 for item in taken.item_id], np.uint64)
    profiles = arithmetic.unpack([None], [None], layout)
    folding = EventColumns(
        row=np.zeros(m, np.int64),
        source=np.full(m, SOURCE, np.uint64),
        offset=np.arange(m),
        event=np.zeros(m, np.uint64),
        t_ms=np.array(taken.t_ms, np.int64),
        type=np.array(taken.type, np.uint8),
        weight=np.array(taken.weight, np.float32),
        item=keys,
        category=np.zeros(m, np.uint64),
        vector=vectors_of(keys.tolist()),
        resolved=np.array([not item or key64(item) in VECTOR_OF for item in taken.item_id]),
        text=np.array([bool(text) for text in taken.text]),
        spend=np.zeros(m),
        foreign=np.zeros(m, bool),
    )
    arithmetic.fold(profiles, folding, layout, 1)
    return np.frombuffer(profiles.window[0], WINDOW_ENTRY)


@given(drawn, st.sampled_from([EVENTS, 50]))
def test_a_profiles_window_gives_the_row_that_training_reads(
    told: list[tuple[str, str, int, float]], kept: int
) -> None:
    batch = events(told)
    table = archive.columns(SOURCE, range(len(batch)), batch)
    rows = {item: row for row, item in enumerate(ITEMS)}
    told_until = {SOURCE: T0_MS}
    windows = label(archived([table]), rows, EVENT_TYPES, Rules(DEFAULT_WEIGHTS), told_until)
    windows = windows.as_kept()
    window = profile_window(batch, kept)
    assert len(window) == min(len(windows), kept)
    if not len(window):
        return
    trained = window_inputs(windows, np.array([len(windows) - 1]), VECTORS, EVENTS)
    served = window_rows([window], EVENTS, vectors_of)
    for mine, theirs in zip(served, trained, strict=True):
        np.testing.assert_array_equal(mine, theirs)


def test_windows_of_several_lengths_are_padded_behind() -> None:
    windows = [np.zeros(n, WINDOW_ENTRY) for n in (1, 3)]
    windows[0]["item"], windows[1]["item"] = key64("a"), [key64("b"), 0, key64("unknown")]
    vectors, types, t_ms, lengths = window_rows(windows, 50, vectors_of)
    assert (vectors.shape, types.shape, t_ms.shape) == ((2, 3, D), (2, 3), (2, 3))
    assert lengths.tolist() == [1, 3]
    np.testing.assert_array_equal(vectors[0], [VECTORS[0], np.zeros(D), np.zeros(D)])
    np.testing.assert_array_equal(vectors[1], [VECTORS[1], np.zeros(D), np.zeros(D)])
