"""Whatever arrives is an event or a reject, and what is an event stays that event."""

from __future__ import annotations

import json
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from stream.events import (
    EVENT_MODELS,
    MAX_TS_MS,
    MIN_TS_MS,
    AddToCart,
    Click,
    Event,
    Forget,
    Impression,
    Item,
    Message,
    Parsed,
    Purchase,
    RemoveFromCart,
    Review,
    Search,
    View,
    parse,
    parse_items,
)

AHEAD_MS = 300_000

text = st.text(st.characters(exclude_categories=["Cs"]), max_size=30)
spoken = text.filter(lambda words: bool(words.strip()))
ids = st.text(
    st.characters(exclude_categories=["Cs", "Cc", "Zs", "Zl", "Zp"]), min_size=1, max_size=20
)
times = st.integers(MIN_TS_MS, MAX_TS_MS)
paths = st.lists(text.filter(bool), max_size=4).map(tuple)
common = {"event_id": st.none() | ids, "user_id": ids, "ts": times, "session_id": st.none() | ids}
of_item = common | {
    "item_id": ids,
    "title": st.none() | text,
    "category": paths,
    "brand": st.none() | text,
    "price": st.none() | st.floats(0, 1e12),
    "currency": st.none() | st.sampled_from(["EUR", "USD", "JPY"]),
}
events: st.SearchStrategy[Event] = st.one_of(
    *(st.builds(model, **of_item) for model in (View, Click, AddToCart, RemoveFromCart)),
    st.builds(Purchase, **of_item, quantity=st.integers(1, 1000)),
    st.builds(Review, **of_item, rating=st.floats(1, 5), text=text),
    st.builds(Impression, **of_item, placement=st.none() | text, campaign=st.none() | text),
    st.builds(Search, **common, query=spoken),
    st.builds(Message, **common, text=spoken, channel=st.none() | text),
    st.builds(Forget, **common),
)
json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | text,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(text, inner, max_size=3),
    max_leaves=5,
)
field_names = st.sampled_from(
    sorted({name for model in EVENT_MODELS for name in model.model_fields} | {"colour"})
)


@st.composite
def damaged_json(draw: st.DrawFn) -> bytes:
    """A valid event with some fields replaced, added or taken out."""
    fields: dict[str, Any] = json.loads(draw(events).to_json())
    fields |= draw(st.dictionaries(field_names, json_values, max_size=3))
    for name in draw(st.lists(field_names, max_size=2)):
        fields.pop(name, None)
    return json.dumps(fields).encode()


@st.composite
def damaged_bytes(draw: st.DrawFn) -> bytes:
    """A valid event with bytes cut out and others put in."""
    whole = draw(events).to_json()
    start = draw(st.integers(0, len(whole)))
    end = draw(st.integers(start, min(len(whole), start + 8)))
    return whole[:start] + draw(st.binary(max_size=8)) + whole[end:]


values = st.lists(st.none() | st.binary(max_size=40) | damaged_json() | damaged_bytes(), max_size=6)


def accounts_for_all(parsed: Parsed, n: int) -> bool:
    rejected = [reject.index for reject in parsed.rejects]
    return (
        len(parsed.events) == len(parsed.index)
        and parsed.index == sorted(parsed.index)
        and rejected == sorted(rejected)
        and sorted(parsed.index + rejected) == list(range(n))
    )


def is_sound(event: Event, record_ms: int) -> bool:
    return (
        MIN_TS_MS <= event.ts <= min(MAX_TS_MS, record_ms + AHEAD_MS)
        and 1 <= len(event.user_id) <= 256
        and event.user_id == event.user_id.strip()
        and "\x00" not in event.user_id
    )


@given(values, times)
def test_every_record_becomes_one_sound_event_or_one_reject(
    records: list[bytes | None], record_ms: int
) -> None:
    parsed = parse(records, [record_ms] * len(records), AHEAD_MS)
    assert accounts_for_all(parsed, len(records))
    assert all(is_sound(event, record_ms) for event in parsed.events)
    for reject in parsed.rejects:
        assert 0 < len(reject.detail) <= 300
        assert reject.detail.isprintable()
        assert reject.reason.isascii()


@given(values, values, times)
def test_a_record_is_judged_by_itself(
    first: list[bytes | None], second: list[bytes | None], record_ms: int
) -> None:
    together = parse(first + second, [record_ms] * (len(first) + len(second)), AHEAD_MS)
    one = parse(first, [record_ms] * len(first), AHEAD_MS)
    other = parse(second, [record_ms] * len(second), AHEAD_MS)
    assert together.events == one.events + other.events
    assert together.index == one.index + [len(first) + i for i in other.index]
    assert [r.reason for r in together.rejects] == [r.reason for r in one.rejects + other.rejects]


@given(events)
def test_an_event_survives_the_wire(event: Event) -> None:
    parsed = parse([event.to_json()], [event.ts], AHEAD_MS)
    assert parsed.rejects == []
    assert parsed.events == [event]
    assert type(parsed.events[0]) is type(event)


@given(damaged_json(), times)
def test_what_was_taken_once_is_taken_again_as_it_was(value: bytes, record_ms: int) -> None:
    once = parse([value], [record_ms], AHEAD_MS).events
    again = parse([event.to_json() for event in once], [record_ms] * len(once), AHEAD_MS)
    assert again.events == once


items = st.builds(
    Item,
    item_id=st.sampled_from(["a", "b", "c"]),
    title=spoken,
    category=paths,
    brand=st.none() | text,
    price=st.none() | st.floats(0, 1e12),
    description=st.none() | text,
)
changes = st.one_of(
    items.map(lambda item: (item.item_id.encode(), item)),
    st.tuples(st.sampled_from([b"a", b"b", b"c"]), st.none()),
)


@given(st.lists(changes, max_size=8), st.lists(st.tuples(st.binary(), st.binary()), max_size=4))
def test_items_end_as_their_last_record_left_them(
    records: list[tuple[bytes, Item | None]], noise: list[tuple[bytes, bytes]]
) -> None:
    expected = dict(records)
    keys = [key for key, _ in records] + [key for key, _ in noise]
    payloads = [item and item.to_json() for _, item in records] + [value for _, value in noise]
    parsed = parse_items(keys, payloads)
    assert {item.item_id: item for item in parsed.upserts} == {
        key.decode(): item for key, item in expected.items() if item is not None
    }
    assert set(parsed.deletions) == {key.decode() for key, item in expected.items() if item is None}
    assert len(parsed.rejects) == len(noise)
