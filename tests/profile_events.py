"""The oracle's events as the columns that the fold takes, a Redis made of two dictionaries, and
strategies that make up shoppers' histories."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from itertools import pairwise

import numpy as np
from hypothesis import strategies as st

from profiles import Profile, arithmetic
from profiles.arithmetic import EventColumns, Folded, Layout, Profiles
from profiles.schema import EVENT_TYPES, TYPE_CODE, key64, source_key
from tests.oracle import FORGET, Event, Rules

DIMENSIONS = 4
SPACE = 0x5EED
LAYOUT = Layout(DIMENSIONS, window=5, seen=4, categories=8, own_items=8, currency="EUR")
RULES = Rules(LAYOUT.half_lives_s, LAYOUT.window, LAYOUT.seen, LAYOUT.categories, LAYOUT.own_items)

YEAR_1990_MS = 631_152_000_000
YEAR_2100_MS = 4_102_444_800_000
NOW_MS = 1_760_000_000_000

ITEMS = [f"item-{i}" for i in range(6)]
ITEM_KEYS = [key64(item) for item in ITEMS]
CATEGORY_OF = {key: key64(f"category-{i % 4}") for i, key in enumerate(ITEM_KEYS)}
_drawn = np.random.default_rng(20).standard_normal((len(ITEMS), DIMENSIONS))
_unit = (_drawn / np.linalg.norm(_drawn, axis=1, keepdims=True)).astype(np.float32)
VECTOR_OF = dict(zip(ITEM_KEYS, _unit, strict=True))
SOURCES = [source_key("topic", partition) for partition in range(3)]


def event_key(event_id: str) -> bytes:
    return key64(event_id).to_bytes(8, "little")


def item_event(
    item: int, t_ms: int = NOW_MS, weight: float = 1.0, *, type: str = "view", user_id: str = "u"
) -> Event:
    """An event on one of ITEMS, without a place in a topic yet."""
    key = ITEM_KEYS[item]
    vector = tuple(VECTOR_OF[key].tolist())
    return Event(user_id, 0, 0, None, t_ms, type, weight, key, CATEGORY_OF[key], vector)


def in_topic(events: Iterable[Event], sources: Sequence[int] = SOURCES[:1]) -> list[Event]:
    """The events as they lie in a topic: each user's sources in turn, offsets ascending."""
    return [
        replace(event, source=sources[i % len(sources)], offset=i) for i, event in enumerate(events)
    ]


def columns(events: Sequence[Event], users: Sequence[str]) -> EventColumns:
    row_of = {user_id: row for row, user_id in enumerate(users)}
    m = len(events)
    vector = np.zeros((m, DIMENSIONS), dtype=np.float32)
    for i, event in enumerate(events):
        if event.vector is not None:
            vector[i] = event.vector
    return EventColumns(
        row=np.array([row_of[e.user_id] for e in events], dtype=np.int64),
        source=np.array([e.source for e in events], dtype=np.uint64),
        offset=np.array([e.offset for e in events], dtype=np.int64),
        event=np.array([int.from_bytes(e.event_key or b"", "little") for e in events], np.uint64),
        t_ms=np.array([e.t_ms for e in events], dtype=np.int64),
        type=np.array(
            [arithmetic.FORGET if e.type == FORGET else TYPE_CODE[e.type] for e in events],
            dtype=np.uint8,
        ),
        weight=np.array([e.weight for e in events], dtype=np.float32),
        item=np.array([e.item_key for e in events], dtype=np.uint64),
        category=np.array(
            [e.category_key if e.vector is not None else 0 for e in events], dtype=np.uint64
        ),
        vector=vector,
        resolved=np.array([e.vector is not None for e in events], dtype=bool),
        text=np.array([e.text for e in events], dtype=bool),
        spend=np.array([e.spend for e in events], dtype=np.float64),
        foreign=np.array([e.foreign for e in events], dtype=bool),
    )


class Shelf:
    """Profiles as bytes between batches, as Redis keeps them."""

    def __init__(self, layout: Layout = LAYOUT) -> None:
        self.layout = layout
        self.states: dict[str, bytes] = {}
        self.fences: dict[str, bytes] = {}

    def load(self, users: Sequence[str]) -> Profiles:
        return arithmetic.unpack(
            [self.states.get(u) for u in users], [self.fences.get(u) for u in users], self.layout
        )

    def save(self, users: Sequence[str], profiles: Profiles) -> None:
        self.states |= zip(users, arithmetic.pack(profiles), strict=True)
        self.fences |= {
            user_id: arithmetic.write_fence(1, 2, 3, watermark)
            for user_id, watermark in zip(users, profiles.watermarks, strict=True)
        }

    def fold(self, events: Sequence[Event]) -> Folded:
        users = sorted({event.user_id for event in events})
        profiles = self.load(users)
        folded = arithmetic.fold(profiles, columns(events, users), self.layout, SPACE)
        self.save(users, profiles)
        return folded

    def resolve(self, item_keys: Iterable[int]) -> int:
        """An item's text arrives: fold what everybody's pending events contribute."""
        users = sorted(self.states)
        profiles = self.load(users)
        vectors = {key: VECTOR_OF[key] for key in item_keys}
        resolved = arithmetic.resolve_pending(profiles, vectors, CATEGORY_OF, self.layout, SPACE)
        self.save(users, profiles)
        return resolved

    def profile(self, user_id: str) -> Profile:
        return arithmetic.decode(user_id, self.states[user_id], self.fences[user_id])

    def profiles(self) -> dict[str, Profile]:
        return {user_id: self.profile(user_id) for user_id in self.states}


def after(
    events: Sequence[Event], layout: Layout = LAYOUT, cuts: Iterable[int] = ()
) -> dict[str, Profile]:
    """All profiles after the events, folded in batches that end at `cuts`."""
    shelf = Shelf(layout)
    for begin, end in pairwise([0, *sorted(cuts), len(events)]):
        shelf.fold(events[begin:end])
    return shelf.profiles()


# --- strategies ----------------------------------------------------------------------------

# One shopping day, in which events also share a millisecond; and any time an event may carry,
# among which the latest leaves nothing of the others.
one_day = st.one_of(
    st.integers(NOW_MS - 86_400_000, NOW_MS),
    st.integers(NOW_MS - 3_600_000 - 3, NOW_MS - 3_600_000),
)
any_time = st.integers(YEAR_1990_MS, YEAR_2100_MS)
weights = st.sampled_from([-1.0, -0.4, 0.0, 0.2, 1.0, 100.0])


@st.composite
def single_events(
    draw: st.DrawFn, times: st.SearchStrategy[int], forgets: bool, ids: bool, unknown_items: bool
) -> Event:
    user_id = draw(st.sampled_from(["ann", "bob"]))
    if forgets and draw(st.integers(0, 11)) == 0:
        return Event(user_id, 0, 0, None, draw(times), FORGET)
    event = replace(
        item_event(draw(st.integers(0, len(ITEMS) - 1)), draw(times), draw(weights)),
        user_id=user_id,
        type=draw(st.sampled_from(EVENT_TYPES)),
        text=draw(st.booleans()),
    )
    if ids and draw(st.booleans()):
        event = replace(event, event_key=event_key(draw(st.sampled_from("abcdefgh"))))
    if unknown_items and draw(st.integers(0, 5)) == 0:
        event = replace(event, vector=None)
    if event.type == "purchase":
        foreign = draw(st.booleans())
        spend = 0.0 if foreign else draw(st.integers(0, 10_000)) / 100
        event = replace(event, spend=spend, foreign=foreign)
    return event


@st.composite
def histories(
    draw: st.DrawFn,
    forgets: bool = True,
    ids: bool = True,
    unknown_items: bool = True,
    min_size: int = 0,
) -> list[Event]:
    """Events of two shoppers in arrival order, over up to three partitions."""
    times = draw(st.sampled_from([one_day, one_day, any_time]))
    kinds = single_events(times, forgets, ids, unknown_items)
    events = draw(st.lists(kinds, min_size=min_size, max_size=25))
    return in_topic(events, SOURCES[: draw(st.integers(1, len(SOURCES)))])
