"""The compiled scanner against pydantic: what it takes is what `parse` makes of it, and no more."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from profiles.schema import key64
from stream.contributions import Contributions, columns, event_weights, joined
from stream.events import MAX_TS_MS, MIN_TS_MS, Event, parse
from stream.scanning import Scanner
from stream.user_rows import UserRows
from tests.properties.test_event_parsing import damaged_bytes, damaged_json, json_values

AHEAD_MS, NOW_MS = 300_000, 1_760_000_000_000
WEIGHTS = event_weights({"view": 0.25, "impression": 0.1})
SCANNER = Scanner(WEIGHTS, "EUR")
Taken = tuple[Contributions, UserRows]

printable = st.characters(min_codepoint=0x20, max_codepoint=0x7F)
words = st.text(printable, max_size=12) | st.sampled_from(["", " a", "a ", "a\x00", "ü", "a" * 129])
numbers = (
    st.integers(-1, 10**7)
    | st.floats(-1, 1e13)
    | st.decimals(0, 10**6, places=2).map(float)
    | st.sampled_from([0, 5, 1e12, 1e-7, 4.999999999999999, 0.1, 1_000_001])
)
times = st.integers(MIN_TS_MS - 1, MAX_TS_MS + 1) | st.integers(NOW_MS, NOW_MS + 2 * AHEAD_MS)
types = st.sampled_from(
    ["impression", "view", "click", "add_to_cart", "remove_from_cart", "purchase", "review"]
)
spacing = st.sampled_from([(",", ":"), (", ", ": ")])


@st.composite
def nearly_plain(draw: st.DrawFn) -> bytes:
    """An event of the plain sort, or one that just is not."""
    fields: dict[str, Any] = {"type": draw(types), "user_id": "u-1", "item_id": "85123A"}
    if fields["type"] == "review":
        fields["rating"] = draw(numbers | st.floats(1, 5))
    fields |= draw(
        st.fixed_dictionaries(
            {},
            optional={
                "schema_version": st.sampled_from([1, 1, 1, 2, 0, "1", None]),
                "event_id": words | st.none(),
                "user_id": words,
                "item_id": words,
                "session_id": words | st.none(),
                "ts": times | st.none(),
                "price": numbers | st.none(),
                "currency": st.sampled_from(["EUR", "USD", "eur", "EURO", "", None]),
                "quantity": numbers,
                "text": words,
                "placement": words | st.none(),
                "title": st.none() | words,
                "category": st.none() | words,
                "brand": st.none(),
                "colour": json_values,
            },
        )
    )
    named = [json.dumps(name) for name in draw(st.permutations(list(fields)))]
    comma, colon = draw(spacing)
    members = [f"{n}{colon}{json.dumps(fields[json.loads(n)], ensure_ascii=False)}" for n in named]
    if draw(st.integers(0, 9)) == 0:
        members.append(draw(st.sampled_from(members)))
    return f"{{{comma.join(members)}}}".encode()


def both(
    values: Sequence[bytes | None], record_ms: Sequence[int], latest_ms: int = MAX_TS_MS
) -> tuple[Taken, Taken, int]:
    """By the scanner with `parse` for the others, and by `parse` alone; how many it took."""
    scanned = SCANNER.scan(values, record_ms, AHEAD_MS, latest_ms)
    users = UserRows(len(values))
    out = scanned.contributions(users)
    left = scanned.others.tolist()
    others = parse([values[i] for i in left], [record_ms[i] for i in left], AHEAD_MS, latest_ms)
    out = joined([out, columns(others.events, WEIGHTS, "EUR").arrays(users)])
    index = np.concatenate([scanned.index, np.array([left[i] for i in others.index], np.int64)])
    out = out.at(np.argsort(index))
    parsed = parse(values, record_ms, AHEAD_MS, latest_ms)
    assert sorted(index.tolist()) == parsed.index
    return (out, users), parsed_alone(parsed.events), len(scanned.index)


def parsed_alone(events: Sequence[Event]) -> Taken:
    users = UserRows(len(events))
    return columns(events, WEIGHTS, "EUR").arrays(users), users


def assert_same(out: Taken, want: Taken) -> None:
    names = [[list(users.ids())[row] for row in side.row] for side, users in (out, want)]
    assert names[0] == names[1]
    for name in ("event", "t_ms", "type", "weight", "item", "spend", "foreign"):
        one, other = getattr(out[0], name), getattr(want[0], name)
        assert one.dtype == other.dtype
        assert one.tolist() == other.tolist(), name
    assert (out[0].text, out[0].inline) == (want[0].text, want[0].inline)


@given(
    records=st.lists(
        st.tuples(
            st.none() | nearly_plain() | nearly_plain() | damaged_json() | damaged_bytes(),
            st.sampled_from([NOW_MS, NOW_MS, 0, -1, MAX_TS_MS + 1]),
        ),
        max_size=8,
    ),
    latest_ms=st.sampled_from([MAX_TS_MS, NOW_MS - 1, NOW_MS + AHEAD_MS // 2]),
)
@example([(b'{"type":"view","user_id":"u","item_id":"i","user_id":"v"}', NOW_MS)], MAX_TS_MS)
@example([(b'{"type":"view","user_id":"u","item_id":"i"},{}', NOW_MS)], MAX_TS_MS)
@example([(b'{"type":"view","user_id":"u","item_id":"i","price":01}', NOW_MS)], MAX_TS_MS)
@example([(b'{"type":"view","user_id":"u","item_id":"i","price":1.}', NOW_MS)], MAX_TS_MS)
@example([(b'{"type":"view","user_id":"u","item_id":"i",}', NOW_MS)], MAX_TS_MS)
def test_the_scanner_and_parse_make_the_same_of_all_records(
    records: list[tuple[bytes | None, int]], latest_ms: int
) -> None:
    out, want, _ = both([value for value, _ in records], [at for _, at in records], latest_ms)
    assert_same(out, want)


@pytest.mark.parametrize("size", [1, 8, 54, 55, 56, 63, 64, 119, 120, 128])
def test_ids_of_any_length_have_the_key_of_their_sha256(size: int) -> None:
    event_id = "".join(chr(33 + (7 * i) % 90) for i in range(size)).replace("\\", "x")
    event_id = event_id.replace('"', "y")
    value = {"type": "click", "user_id": "u", "item_id": "i", "event_id": event_id}
    scanned = SCANNER.scan([json.dumps(value).encode()], [NOW_MS], AHEAD_MS)
    assert scanned.event.tolist() == [key64(event_id)]


def test_plain_events_do_not_need_parse() -> None:
    values = [
        b'{"schema_version":1,"event_id":"e","user_id":"u","ts":1750000000000,"session_id":"s",'
        b'"item_id":"i","type":"purchase","price":2.55,"currency":"EUR","quantity":6}',
        b'{"type": "review", "rating": 4.5, "text": "Nice!", "user_id": "u", "item_id": "i"}',
        b'{"type":"impression","placement":"top","campaign":null,"user_id":"u","item_id":"i"}',
        b'{"type":"view","user_id":"u","item_id":"i","title":null,"category":null,"ts":null}',
    ]
    out, want, taken = both(values, [NOW_MS] * len(values))
    assert taken == len(values)
    assert_same(out, want)
    assert out[0].spend[0] == 2.55 * 6
