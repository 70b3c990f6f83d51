"""The compiled fold against the one in `arithmetic.py`: the same bytes, or no answer."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from profiles import arithmetic, schema
from profiles.arithmetic import Layout
from profiles.cache import Rows
from profiles.fates import APPLIED
from profiles.kernel import Folded, Kernel
from profiles.trail import Steps
from tests.oracle import Event
from tests.profile_events import (
    CATEGORY_OF,
    DIMENSIONS,
    LAYOUT,
    NOW_MS,
    SOURCES,
    SPACE,
    columns,
    histories,
    in_topic,
    item_event,
)

KEYS = schema.Keys("shop")
SHA, TTL_S, CHUNK, WRITER, NOW_S = "ab" * 20, 86_400, 3, 77, 1_760_000_000.5
NAMES = {key: f"Gärten > {i}" for i, key in enumerate(sorted(set(CATEGORY_OF.values())))}
STEPS = Steps("shop:trail:é", [("1", str(7 + i), f"3,{6 + i},12") for i in range(1_000)], 1_000)
Row = tuple[bytes, bytes]


def kernel(layout: Layout = LAYOUT) -> Kernel:
    return Kernel(layout, KEYS, SHA, TTL_S, CHUNK)


def fold(
    rows: dict[str, Row],
    events: Sequence[Event],
    layout: Layout = LAYOUT,
    sources: Sequence[int] = SOURCES,
) -> tuple[list[str], Folded]:
    users = sorted({event.user_id for event in events})
    stored = [rows.get(user, (b"", b"")) for user in users]
    folded = kernel(layout).fold(
        users,
        Rows.of(stored),
        columns(events, users),
        0,
        SPACE,
        WRITER,
        NOW_S,
        _known,
        sources,
        STEPS,
    )
    return users, folded


def _known(keys: Sequence[int]) -> dict[int, str]:
    return {key: NAMES[key] for key in keys if key in NAMES}


def reference(
    rows: dict[str, Row], users: Sequence[str], events: Sequence[Event], layout: Layout = LAYOUT
) -> tuple[arithmetic.Folded, list[list[bytes]]]:
    """What was folded, and per user the five arguments of a save."""
    stored = [rows.get(user, (b"", b"")) for user in users]
    profiles = arithmetic.unpack(
        [s or None for s, _ in stored], [f or None for _, f in stored], layout
    )
    folded = arithmetic.fold(profiles, columns(events, users), layout, SPACE)
    fences, expires_s = arithmetic.next_fences(
        profiles.fences, profiles.watermarks, WRITER, NOW_S, TTL_S
    )
    states = arithmetic.pack(profiles)
    glances = [glance.encode() for glance in arithmetic.glances(profiles, NAMES)]
    expiry = [str(at).encode() for at in expires_s]
    return folded, [
        list(five) for five in zip(profiles.fences, fences, states, glances, expiry, strict=True)
    ]


def commands(payload: bytes) -> list[list[bytes]]:
    """RESP, taken apart."""
    found, at = [], 0
    while at < len(payload):
        line, at = _line(payload, at)
        assert line[:1] == b"*"
        parts = []
        for _ in range(int(line[1:])):
            line, at = _line(payload, at)
            assert line[:1] == b"$"
            end = at + int(line[1:])
            parts.append(payload[at:end])
            assert payload[end : end + 2] == b"\r\n"
            at = end + 2
        found.append(parts)
    return found


def _line(payload: bytes, at: int) -> tuple[bytes, int]:
    end = payload.index(b"\r\n", at)
    return payload[at:end], end + 2


def assert_same(rows: dict[str, Row], events: Sequence[Event], layout: Layout = LAYOUT) -> Folded:
    """Fold both ways, compare, and go on from what was written."""
    users, folded = fold(rows, events, layout)
    left = {users[i] for i in folded.left.tolist()}
    here = [event for event in events if event.user_id not in left]
    want, five = reference(rows, users, here, layout)
    written = [users[i] for i in folded.written.tolist()]
    assert [users[i] for i in want.touched] == written
    fate = [f for f, event in zip(folded.fate, events, strict=True) if event.user_id not in left]
    assert fate == want.fate.tolist()
    got = commands(bytes(folded.payload))
    assert len(got) == folded.calls
    keys, arguments = [], []
    for command, tail in zip(got, STEPS.tails, strict=False):
        n = int(command[2]) - 1
        assert command[:2] == [b"EVALSHA", SHA.encode()]
        assert n <= CHUNK
        keys += command[3 : 3 + n]
        assert command[3 + n] == STEPS.key.encode()
        arguments += [command[i : i + 5] for i in range(4 + n, len(command) - 3, 5)]
        assert command[-3:] == [part.encode() for part in tail]
    assert keys == [KEYS.profile(user).encode() for user in written]
    for user, mine in zip(written, arguments, strict=True):
        assert mine == five[users.index(user)], user
        json.loads(mine[3])
    for user, mine in zip(written, arguments, strict=True):
        rows[user] = folded.rows.row(users.index(user))
        assert rows[user] == (mine[2], mine[1])
    for user in left:  # as the worker does
        theirs = [event for event in events if event.user_id == user]
        _, [args] = reference(rows, [user], theirs, layout)
        rows[user] = (args[2], args[1])
    return folded


# numpy sums more of them in another order, and then the last bits differ.
BATCH = 8


def in_batches(rows: dict[str, Row], events: Sequence[Event], layout: Layout = LAYOUT) -> None:
    for begin in range(0, len(events), BATCH):
        assert_same(rows, events[begin : begin + BATCH], layout)


@given(histories(), st.integers(0, BATCH))
def test_it_writes_what_the_reference_writes(events: list[Event], first: int) -> None:
    rows: dict[str, Row] = {}
    in_batches(rows, events[:first])
    in_batches(rows, events[first:])
    in_batches(rows, events)  # all again, as after a crash


@given(histories(), st.data())
def test_damaged_bytes_are_left_or_read_as_the_reference_reads_them(
    events: list[Event], data: st.DataObject
) -> None:
    rows: dict[str, Row] = {}
    in_batches(rows, events)
    for user, sides in list(rows.items()):
        raw = [bytearray(side) for side in sides]
        for _ in range(data.draw(st.integers(1, 3))):
            side = raw[data.draw(st.integers(0, 1))]
            if side:
                at = data.draw(st.integers(0, min(len(side) - 1, 150)))
                side[at] = data.draw(st.integers(0, 255))
        cut = data.draw(st.sampled_from([0, 0, 0, 1, 24]))
        rows[user] = (bytes(raw[0][: len(raw[0]) - cut]), bytes(raw[1]))
    later = [replace(event, offset=event.offset + 100) for event in events]
    later = later[:BATCH]
    users, folded = fold(rows, later)
    left = {users[i] for i in folded.left.tolist()}
    for user in set(users) - left:  # the reference must not refuse what was taken here
        assert_same({user: rows[user]}, [event for event in later if event.user_id == user])


@given(st.lists(st.floats(0, 1e14) | st.integers(0, 10**6).map(lambda i: i / 1000), max_size=4))
def test_glances_round_as_percent_does(spends: list[float]) -> None:
    events = in_topic(
        [replace(item_event(0, weight=0.0, type="purchase"), spend=spend) for spend in spends]
    )
    assert_same({}, events)


@given(histories(min_size=10), st.integers(1, 3), st.integers(0, 2), st.integers(0, 3))
def test_small_bounds_keep_what_the_reference_keeps(
    events: list[Event], categories: int, seen: int, own: int
) -> None:
    layout = Layout(DIMENSIONS, window=2, seen=seen, categories=categories, own_items=own)
    in_batches({}, events, layout)


def test_many_events_of_one_shopper_agree_to_rounding() -> None:
    events = in_topic(
        [item_event(i % 6, NOW_MS + 1000 * (i ^ 5), 0.1 * (i % 9 - 3)) for i in range(800)]
    )
    users, folded = fold({}, events)
    state, fence = folded.rows.row(0)
    _, [args] = reference({}, users, events)
    got, want = arithmetic.decode("u", state, fence), arithmetic.decode("u", args[2], args[1])
    assert (got.events, got.counts, got.watermark) == (want.events, want.counts, want.watermark)
    assert got.window.tobytes() == want.window.tobytes()
    np.testing.assert_allclose(got.sums, want.sums, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(got.masses, want.masses, rtol=1e-5)
    assert got.categories == pytest.approx(want.categories, rel=1e-4, abs=1e-4)
    assert got.own == pytest.approx(want.own, rel=1e-4, abs=1e-4)


def test_what_is_rare_is_left_with_nothing_done() -> None:
    forget = Event("a", SOURCES[0], 0, None, NOW_MS, "forget")
    unknown = replace(in_topic([item_event(0, user_id="b")])[0], vector=None)
    plain = in_topic([item_event(0, user_id="c")])[0]
    users, folded = fold({}, [forget, unknown, plain])
    assert [users[i] for i in folded.left.tolist()] == ["a", "b"]
    assert [users[i] for i in folded.written.tolist()] == ["c"]
    assert folded.fate.tolist() == [0, 0, APPLIED]


def test_a_user_is_split_once_and_over_partitions_of_today_only() -> None:
    def on(partition: int, offset: int) -> Event:
        return replace(in_topic([item_event(0)])[0], source=SOURCES[partition], offset=offset)

    def split(event: Event, today: Sequence[int]) -> list[int]:
        _, folded = fold(rows, [event], sources=today)
        rows[event.user_id] = folded.rows.row(0)
        return folded.split.tolist()

    rows: dict[str, Row] = {}
    assert split(on(0, 0), SOURCES[:2]) == []
    assert split(on(1, 0), SOURCES[:2]) == [0]
    assert split(on(0, 1), SOURCES[:2]) == []
    rows.clear()
    assert split(on(0, 0), SOURCES[:1]) == []
    assert split(on(1, 0), SOURCES[1:]) == []  # the topic was made again
    assert split(on(2, 0), SOURCES[1:]) == [0]


def test_a_category_without_a_name_is_shown_by_its_key() -> None:
    event = replace(in_topic([item_event(0)])[0], category_key=0xABC)
    _, folded = fold({}, [event])
    assert b'"0000000000000abc":1.000' in bytes(folded.payload)
