"""The compiled fold against the one in `arithmetic.py`: the same bytes, or no answer."""

from __future__ import annotations

import json
from collections.abc import Sequence
from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from profiles import arithmetic, schema
from profiles.arithmetic import Layout
from profiles.kernel import Folded, Kernel
from tests.oracle import Event
from tests.profile_events import (
    CATEGORY_OF,
    LAYOUT,
    SPACE,
    columns,
    histories,
)

KEYS = schema.Keys("shop")
SHA, TTL_S, CHUNK, WRITER, NOW_S = "ab" * 20, 86_400, 3, 77, 1_760_000_000.5
NAMES = {key: f"Gärten > {i}" for i, key in enumerate(sorted(set(CATEGORY_OF.values())))}
Row = tuple[bytes, bytes]


def kernel(layout: Layout = LAYOUT) -> Kernel:
    return Kernel(layout, KEYS, SHA, TTL_S, CHUNK)


def fold(
    rows: dict[str, Row], events: Sequence[Event], layout: Layout = LAYOUT
) -> tuple[list[str], Folded]:
    users = sorted({event.user_id for event in events})
    stored = [rows.get(user, (b"", b"")) for user in users]
    folded = kernel(layout).fold(
        users, stored, columns(events, users), 0, SPACE, WRITER, NOW_S, _known
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
    assert folded.count()[1:] == (len(want.applied), want.replayed, want.repeated)
    got = commands(bytes(folded.payload))
    assert len(got) == folded.calls
    keys, arguments = [], []
    for command in got:
        n = int(command[2])
        assert command[:2] == [b"EVALSHA", SHA.encode()]
        assert n <= CHUNK
        keys += command[3 : 3 + n]
        arguments += [command[i : i + 5] for i in range(3 + n, len(command), 5)]
    assert keys == [KEYS.profile(user).encode() for user in written]
    for user, mine in zip(written, arguments, strict=True):
        assert mine == five[users.index(user)], user
        json.loads(mine[3])
    for user, mine in zip(written, arguments, strict=True):
        rows[user] = folded.row(users.index(user))
        assert rows[user] == (mine[2], mine[1])
    for user in left:  # as the worker does
        theirs = [event for event in events if event.user_id == user]
        _, [args] = reference(rows, [user], theirs, layout)
        rows[user] = (args[2], args[1])
    return folded


@given(histories(), st.lists(st.integers(0, 25), max_size=3))
def test_it_writes_what_the_reference_writes(events: list[Event], cuts: list[int]) -> None:
    rows: dict[str, Row] = {}
    for begin, end in pairwise([0, *sorted(min(cut, len(events)) for cut in cuts), len(events)]):
        assert_same(rows, events[begin:end])
    assert_same(rows, events)  # all again, as after a crash
