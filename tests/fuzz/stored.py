"""What lies in Redis, and on the pairs topic: any bytes are refused by a name, or read."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from functools import cache
from random import Random
from typing import Any

import numpy as np

from profiles import arithmetic, neighbours, outlook, schema
from profiles.arithmetic import Layout
from profiles.errors import LayoutMismatch, SchemaTooNew, StateCorrupt
from profiles.neighbours import TallyLayout
from tests.fuzz.harness import Check
from tests.fuzz.mutation import json_mutated, mutated
from tests.oracle import Event
from tests.profile_events import (
    DIMENSIONS,
    ITEM_KEYS,
    ITEMS,
    LAYOUT,
    NOW_MS,
    SOURCES,
    Shelf,
    event_key,
    in_topic,
    item_event,
)
from tests.properties.test_kernel import assert_same, fold

Row = tuple[bytes, bytes]  # state, fence
_SHOPPERS = 40
_NOW_S = NOW_MS / 1000


@cache
def rows() -> list[Row]:
    """Of shoppers who did little or much; with events that wait for a text, and of version 1."""
    rng = Random("shoppers")
    found: list[Row] = [(b"", b"")]
    for shopper in range(_SHOPPERS):
        shelf = Shelf()
        shelf.fold(
            in_topic([_event(rng, shopper % 4 == 0) for _ in range(shopper)] or [_event(rng)])
        )
        state, fence = shelf.states["u"], shelf.fences["u"]
        found.append((_of_version_1(state), fence) if shopper % 5 == 1 else (state, fence))
    return found


def _event(rng: Random, unknown_items: bool = False) -> Event:
    event = item_event(
        rng.randrange(len(ITEMS)),
        NOW_MS - rng.randrange(90 * 86_400_000),
        rng.choice((-0.4, 0.0, 0.25, 1.0)),
        type=rng.choice(("view", "click", "purchase", "impression")),
    )
    if rng.random() < 0.5:
        event = replace(event, event_key=event_key(str(rng.randrange(50))))
    if event.type == "purchase":
        event = replace(event, spend=rng.randrange(10_000) / 100)
    return replace(event, vector=None) if unknown_items and rng.random() < 0.3 else event


def _of_version_1(state: bytes) -> bytes:
    header = np.frombuffer(bytearray(state[: LAYOUT.header.itemsize]), LAYOUT.header)
    after = state[LAYOUT.header.itemsize :]
    own = 12 * int(header["own_n"][0])
    pending = 24 * int(header["pending_n"][0])
    header["version"], header["own_n"] = 1, 0
    end = len(after) - pending
    return header.tobytes() + after[: end - own] + after[end:]


def _damaged(rng: Random, row: Row) -> Row:
    others = [side for sides in rows() for side in sides if side]
    side = rng.randrange(4)
    state = mutated(rng, row[0], others) if side else row[0]
    return state, mutated(rng, row[1], others) if side in (0, 1) else row[1]


def profile_codec() -> Check:
    """`decode` and the writer's `unpack`, which must agree; what is read is written as it was."""
    corpus = rows()

    def check(cases: Sequence[Random]) -> int:
        taken = 0
        for rng in cases:
            row = rng.choice(corpus)
            state, fence = _damaged(rng, row) if rng.random() < 0.95 else row
            with np.errstate(all="ignore"):  # of times and weights that nobody has
                taken += _profile(state, fence)
        return taken

    return check


def _profile(state: bytes, fence: bytes) -> int:
    try:
        profile = arithmetic.decode("u", state, fence)
    except (SchemaTooNew, StateCorrupt):
        with suppress(SchemaTooNew, StateCorrupt, LayoutMismatch):
            arithmetic.unpack([state], [fence or None], LAYOUT)
        return 0
    layout = Layout(profile.dimensions, profile.half_lives_s)
    profiles = arithmetic.unpack([state], [fence or None], layout)
    (again,) = arithmetic.pack(profiles)
    if state[:2] == b"\x02\x00":
        assert again == state
    for scale in range(len(profile.half_lives_s)):
        assert profile.interest(scale).shape == (profile.dimensions,)
    return 1


def compiled_fold() -> Check:
    """The kernel folds into damaged profiles what the reference folds, or leaves them."""
    corpus = rows()

    def check(cases: Sequence[Random]) -> int:
        taken = 0
        stored = {f"u{i}": _damaged(rng, rng.choice(corpus)) for i, rng in enumerate(cases)}
        events = [
            replace(event, user_id=f"u{i}", offset=event.offset + 100)
            for i, rng in enumerate(cases)
            for event in in_topic([_event(rng) for _ in range(rng.randint(1, 2))], SOURCES)
        ]
        users, folded = fold(stored, events)
        left = {users[i] for i in folded.left.tolist()}
        for user in set(users) - left:  # the reference must not refuse what was taken here
            with np.errstate(all="ignore"):  # both are given NaN and infinity
                assert_same({user: stored[user]}, [e for e in events if e.user_id == user])
            taken += 1
        return taken

    return check


def fence_codec() -> Check:
    """Fences, and the ones that are written over them."""
    corpus = [fence for _, fence in rows() if fence]

    def check(cases: Sequence[Random]) -> int:
        taken = 0
        for rng in cases:
            fence = rng.choice(corpus)
            fence = mutated(rng, fence, corpus) if rng.random() < 0.95 else fence
            try:
                revision, writer, expires_s, watermark = arithmetic.read_fence(fence)
            except StateCorrupt:
                continue
            written = arithmetic.write_fence(revision, writer, expires_s, watermark)
            assert arithmetic.read_fence(written) == (revision, writer, expires_s, watermark)
            (later,), (expiry_s,) = arithmetic.next_fences([fence], [watermark], 7, _NOW_S, 86_400)
            read = arithmetic.read_fence(later)
            assert read[:2] == ((revision + 1) % (1 << 64), 7)
            assert read[3] == watermark
            assert expiry_s in (0, read[2])
            taken += 1
        return taken

    return check


def outlook_codec() -> Check:
    """Both fields of an outlook."""
    vectors = np.eye(DIMENSIONS, dtype=np.float32)
    heads = {"purchase": np.array([0.1, 0.2, 0.3, np.nan], np.float32)}
    told = outlook.encode(vectors, heads, "r-1", 5, [1, 2, 3, 4], [NOW_MS] * 4, NOW_MS)
    nexts, texts = [next_ for next_, _ in told], [text.encode() for _, text in told]
    names = ["v", "release", "revision", "updated_ms", "computed_ms", "heads", "other"]

    def check(cases: Sequence[Random]) -> int:
        taken = 0
        for rng in cases:
            at, way = rng.randrange(4), rng.random()
            next_, text = nexts[at], texts[at]
            if way < 0.5:
                next_ = mutated(rng, next_, nexts)
            if 0.4 < way < 0.7:
                text = mutated(rng, text, texts)
            if 0.6 < way < 0.97 and text[:1] == b"{":
                text = json_mutated(rng, texts[at], names, texts)
            space = rng.choice(("0000000000000005", "5eed", ""))
            try:
                found = outlook.decode(next_, text, space, at, _NOW_S)
            except StateCorrupt:
                continue
            if found is not None:
                _assert_outlook(found)
                taken += 1
        return taken

    return check


def _assert_outlook(found: outlook.Outlook) -> None:
    assert all(type(value) is float for value in found.heads.values())
    assert isinstance(found.release, str)
    assert all(type(n) is int for n in (found.updated_ms, found.computed_ms, found.saves_since))
    assert found.age_s >= 0
    if found.next_interest is not None:
        vector = found.next_interest[None]
        heads = {name: np.array([value], np.float64) for name, value in found.heads.items()}
        ((next_, text),) = outlook.encode(
            vector, heads, found.release, 5, [0], [found.updated_ms], found.computed_ms
        )
        again = outlook.decode(next_, text.encode(), f"{5:016x}", 0, _NOW_S)
        assert again is not None
        assert again.next_interest is not None
        assert again.next_interest.tobytes() == found.next_interest.tobytes()
        assert (again.release, again.updated_ms) == (found.release, found.updated_ms)


def neighbours_codec() -> Check:
    """Tallies of items, for a reader and for a writer."""
    corpus, layout = _tallies(), TallyLayout()
    sides = [side for tally in corpus for side in tally if side]

    def check(cases: Sequence[Random]) -> int:
        taken = 0
        for rng in cases:
            tally, near = rng.choice(corpus)
            way = rng.random()
            tally = mutated(rng, tally, sides) if way < 0.6 else tally
            near = mutated(rng, near, sides) if 0.5 < way < 0.95 else near
            try:
                read = neighbours.decode(tally, near)
            except (SchemaTooNew, StateCorrupt):
                read = None
            try:
                held = neighbours.unpack([tally], [near], [None], layout)
            except (SchemaTooNew, StateCorrupt):
                assert read is None
                continue
            (again,) = neighbours.pack(held)
            assert (again[:16], again[20:]) == (tally[:16], tally[20:])  # but for the half-life
            if read is not None:
                assert 0 <= read.share(NOW_MS) <= 1
                read.recent_at(NOW_MS)
                assert neighbours.decode(tally).updated_ms == read.updated_ms
                taken += 1
        return taken

    return check


def _tallies() -> list[Row]:
    found, layout = [], TallyLayout(most=6)
    for n in range(12):
        entries = _pairs(Random(n), n + 1)
        entries["item"] = ITEM_KEYS[0]
        order = np.argsort(entries["offset"])
        pairs, bad = neighbours.read_records(
            [value for _, value in neighbours.records(entries[order], _origins(n + 1), 1)]
        )
        assert not bad
        held = neighbours.unpack([None], [None], [None], layout)
        neighbours.fold(held, np.zeros(len(pairs.entries), np.int64), pairs, layout)
        found.append((neighbours.pack(held)[0], held.near[0]))
    return found


def _pairs(rng: Random, n: int) -> np.ndarray[Any, Any]:
    entries = np.zeros(n, schema.PAIR_ENTRY)
    entries["item"] = [rng.choice(ITEM_KEYS) for _ in range(n)]
    entries["neighbour"] = [rng.choice([0, *ITEM_KEYS]) for _ in range(n)]
    entries["offset"] = sorted(rng.randrange(100) for _ in range(n))
    entries["t_ms"], entries["weight"] = NOW_MS, 0.5
    return entries


def _origins(n: int) -> np.ndarray[Any, Any]:
    return np.full(n, SOURCES[0], np.uint64)


def pairs_codec() -> Check:
    """Records of the pairs topic."""
    corpus = [
        value
        for n in range(20)
        for _, value in neighbours.records(_pairs(Random(n), 1 + n % 7), _origins(1 + n % 7), 2)
    ]

    def check(cases: Sequence[Random]) -> int:
        values = [
            mutated(rng, rng.choice(corpus), corpus) if rng.random() < 0.9 else rng.choice(corpus)
            for rng in cases
        ]
        pairs, bad = neighbours.read_records(values)
        assert len(pairs.entries) == len(pairs.origin) == len(pairs.record)
        again, none = neighbours.read_records(
            [value for _, value in neighbours.records(pairs.entries, pairs.origin, 3)]
        )
        assert none == 0
        assert sorted(map(bytes, again.entries)) == sorted(map(bytes, pairs.entries))
        assert sorted(again.origin.tolist()) == sorted(pairs.origin.tolist())
        return len(values) - bad

    return check
