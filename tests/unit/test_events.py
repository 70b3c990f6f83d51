"""What `parse` takes and refuses, and what it says about what it refuses."""

from __future__ import annotations

import json
from datetime import UTC, datetime, timedelta, timezone
from typing import Any

import pytest
from pydantic import ValidationError

from stream.events import (
    CATEGORY_DEPTH,
    EVENT_MODELS,
    MAX_TS_MS,
    MIN_TS_MS,
    NO_TS,
    SCHEMA_VERSION,
    Event,
    Forget,
    Item,
    Message,
    Purchase,
    Rejected,
    Review,
    Search,
    View,
    parse,
    parse_items,
)

RECORD_MS = 1_772_366_400_000  # 2026-03-01T12:00:00Z
AHEAD_MS = 300_000
VIEW: dict[str, Any] = {"type": "view", "user_id": "u1", "item_id": "i1"}
MINIMAL: dict[str, dict[str, Any]] = {
    "impression": {"item_id": "i1"},
    "view": {"item_id": "i1"},
    "click": {"item_id": "i1"},
    "add_to_cart": {"item_id": "i1"},
    "remove_from_cart": {"item_id": "i1"},
    "purchase": {"item_id": "i1"},
    "search": {"query": "red lamp"},
    "review": {"item_id": "i1", "rating": 4},
    "message": {"text": "Where is my order?"},
    "forget": {},
}


def encoded(**fields: Any) -> bytes:
    return json.dumps(VIEW | fields).encode()


def taken(value: bytes | None, record_ms: int = RECORD_MS) -> Event:
    parsed = parse([value], [record_ms], AHEAD_MS)
    assert parsed.rejects == []
    assert parsed.index == [0]
    return parsed.events[0]


def refused(value: bytes | None, record_ms: int = RECORD_MS) -> Rejected:
    parsed = parse([value], [record_ms], AHEAD_MS)
    assert parsed.events == []
    assert parsed.index == []
    (reject,) = parsed.rejects
    assert reject.index == 0
    assert reject.detail
    assert "\n" not in reject.detail
    assert len(reject.detail) <= 300
    return reject


@pytest.mark.parametrize("model", EVENT_MODELS, ids=lambda model: model.__name__)
def test_each_type_needs_only_its_own_fields(model: type[Event]) -> None:
    name = model.model_fields["type"].default
    event = taken(json.dumps({"type": name, "user_id": "u1", **MINIMAL[name]}).encode())
    assert type(event) is model
    assert event.user_id == "u1"
    assert event.ts == RECORD_MS


@pytest.mark.parametrize("name", [name for name in MINIMAL if MINIMAL[name]])
def test_a_required_field_that_is_missing_is_named(name: str) -> None:
    field = next(iter(MINIMAL[name]))
    reject = refused(json.dumps({"type": name, "user_id": "u1"}).encode())
    assert reject.reason == f"missing:{field}"
    assert field in reject.detail


def test_every_field_reaches_the_event() -> None:
    event = taken(
        json.dumps(
            {
                "type": "purchase",
                "schema_version": SCHEMA_VERSION,
                "event_id": "e-1",
                "user_id": "käufer 1",
                "ts": RECORD_MS - 1,
                "session_id": "s-1",
                "item_id": "85123A",
                "title": "White hanging heart t-light holder",
                "category": ["Home", "Candles"],
                "brand": "Acme",
                "price": 2.55,
                "currency": "GBP",
                "quantity": 6,
            }
        ).encode()
    )
    assert event == Purchase(
        event_id="e-1",
        user_id="käufer 1",
        ts=RECORD_MS - 1,
        session_id="s-1",
        item_id="85123A",
        title="White hanging heart t-light holder",
        category=("Home", "Candles"),
        brand="Acme",
        price=2.55,
        currency="GBP",
        quantity=6,
    )


def test_unknown_fields_are_left_out() -> None:
    event = taken(encoded(colour="red", nested={"a": [1, {"b": None}]}))
    assert event == View(user_id="u1", item_id="i1", ts=RECORD_MS)
    assert not hasattr(event, "colour")


def test_null_is_the_same_as_absent_for_optional_fields() -> None:
    nulls = dict.fromkeys(
        ["event_id", "ts", "session_id", "title", "category", "brand", "price", "currency"]
    )
    assert taken(encoded(**nulls)) == taken(encoded())


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"user_id": 5}, "type:user_id"),
        ({"user_id": None}, "type:user_id"),
        ({"user_id": {"id": "u"}}, "type:user_id"),
        ({"user_id": ""}, "length:user_id"),
        ({"user_id": "x" * 257}, "length:user_id"),
        ({"user_id": "x" * 1_000_000}, "length:user_id"),
        ({"user_id": " u1"}, "format:user_id"),
        ({"user_id": "u1\n"}, "format:user_id"),
        ({"user_id": "u1\u00a0"}, "format:user_id"),
        ({"user_id": "u\x00"}, "format:user_id"),
        ({"user_id": "\x00"}, "format:user_id"),
        ({"user_id": "a\x85b"}, "format:user_id"),
        ({"item_id": "a\tb"}, "format:item_id"),
        ({"item_id": ""}, "length:item_id"),
        ({"event_id": "x" * 129}, "length:event_id"),
        ({"event_id": ""}, "length:event_id"),
        ({"session_id": 7}, "type:session_id"),
        ({"title": "x" * 1_000_000}, "length:title"),
        ({"brand": ["Acme"]}, "type:brand"),
        ({"price": -0.01}, "range:price"),
        ({"price": float("nan")}, "range:price"),
        ({"price": float("inf")}, "range:price"),
        ({"price": 1e13}, "range:price"),
        ({"price": "2.55"}, "type:price"),
        ({"price": True}, "type:price"),
        ({"currency": "eur"}, "format:currency"),
        ({"currency": "EURO"}, "format:currency"),
        ({"category": 5}, "format:category"),
        ({"category": ["Home", 5]}, "format:category"),
        ({"category": ["Home", ""]}, "format:category"),
        ({"category": ["x"] * (CATEGORY_DEPTH + 1)}, "format:category"),
        ({"category": "x" * 1_000_000}, "format:category"),
        ({"category": ["x"] * 100_000}, "format:category"),
        ({"schema_version": SCHEMA_VERSION + 1}, "schema_version"),
        ({"schema_version": 0}, "range:schema_version"),
        ({"schema_version": "1"}, "type:schema_version"),
        ({"type": "purchase", "quantity": 0}, "range:quantity"),
        ({"type": "purchase", "quantity": 1.5}, "type:quantity"),
        ({"type": "review", "rating": 0.5}, "range:rating"),
        ({"type": "review", "rating": 6}, "range:rating"),
        ({"type": "review", "rating": "5"}, "type:rating"),
        ({"type": "review", "rating": 5, "text": "x" * 1_000_000}, "length:text"),
        ({"type": "search", "query": ""}, "format:query"),
        ({"type": "search", "query": " \t"}, "format:query"),
        ({"type": "search", "query": "x" * 1_000_000}, "length:query"),
        ({"type": "message", "text": ""}, "format:text"),
        ({"type": "wishlist"}, "unknown_type"),
        ({"type": "x" * 1_000_000}, "unknown_type"),
        ({"type": 5}, "unknown_type"),
        ({"type": None}, "unknown_type"),
        ({"type": ["view"]}, "unknown_type"),
    ],
    ids=lambda value: repr(value)[:40],
)
def test_bad_fields_are_refused_by_name(fields: dict[str, Any], reason: str) -> None:
    assert refused(encoded(**fields)).reason == reason


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        (None, "null_value"),
        (b"", "json"),
        (b" ", "json"),
        (b"{", "json"),
        (b"view u1 i1", "json"),
        (encoded() + b"," + encoded(), "json"),
        (encoded() + b"\x00", "json"),
        (b"\xef\xbb\xbf" + encoded(), "json"),
        (encoded().decode().encode("utf-16"), "json"),
        (b'{"type":"view","user_id":"\xff","item_id":"i"}', "json"),
        (b'{"type":"view","user_id":"u","item_id":"i","note":"\xed\xa0\x80"}', "json"),
        (b'{"type":"view","user_id":"\\ud800","item_id":"i"}', "json"),
        (b"[" * 1_000_000, "json"),
        (b'{"a":' * 100_000, "json"),
        (b"9" * 1_000_000, "json"),
        (b"[]", "not_object"),
        (b"null", "not_object"),
        (b"5", "not_object"),
        (b'"view"', "not_object"),
        (b"[" + encoded() + b"]", "not_object"),
        (b"{}", "missing:type"),
        (b'{"user_id":"u1","item_id":"i1"}', "missing:type"),
    ],
    ids=lambda value: repr(value)[:30],
)
def test_what_is_no_event_at_all_is_refused(value: bytes | None, reason: str) -> None:
    assert refused(value).reason == reason


def test_a_newer_schema_is_named_before_the_fields_it_changed() -> None:
    reject = refused(encoded(schema_version=2, user_id={"new": "shape"}, ts={"s": 1}))
    assert reject.reason == "schema_version"
    assert "upgrade the worker" in reject.detail


def test_a_reject_says_what_to_send_instead() -> None:
    assert "one of impression, view, click" in refused(encoded(type="wishlist")).detail
    assert "EUR" in refused(encoded(currency="€")).detail
    assert "forget" in refused(None).detail
    assert "1,000,000 characters" in refused(encoded(user_id="x" * 1_000_000)).detail


@pytest.mark.parametrize(
    "ts",
    [
        1_772_366_399_123,
        "2026-03-01T11:59:59.123Z",
        "2026-03-01T12:59:59.123+01:00",
        "2026-03-01 11:59:59.1239+00:00",
        "20260301T115959.123Z",
    ],
)
def test_event_time_is_epoch_milliseconds_however_it_was_sent(ts: int | str) -> None:
    assert taken(encoded(ts=ts)).ts == 1_772_366_399_123


@pytest.mark.parametrize(
    ("ts", "reason", "says"),
    [
        (1_700_000_000, "ts_seconds", "seconds"),
        (631_152_000, "ts_seconds", "seconds"),
        (1_700_000_000_000_000, "ts_range", "microseconds"),
        (1_700_000_000_000_000_000, "ts_range", "nanoseconds"),
        (5, "ts_range", "1990 to 2099"),
        (0, "ts_range", "1990 to 2099"),
        (-1, "ts_range", "1990 to 2099"),
        (MIN_TS_MS - 1, "ts_range", "1990 to 2099"),
        (MAX_TS_MS + 1, "ts_range", "1990 to 2099"),
        (10**4000, "ts_range", "1990 to 2099"),
        ("1970-01-01T00:00:00Z", "ts_range", "1990 to 2099"),
        ("2100-01-01T00:00:00Z", "ts_range", "1990 to 2099"),
        ("0001-01-01T00:00:00+23:59", "ts_range", "1990 to 2099"),
        ("9999-12-31T23:59:59-23:59", "ts_range", "1990 to 2099"),
        ("2026-03-01T12:00:00", "ts_naive", "offset"),
        ("2026-03-01", "ts_naive", "offset"),
        ("yesterday", "ts_format", "ISO 8601"),
        ("1772366400000", "ts_format", "ISO 8601"),
        ("", "ts_format", "ISO 8601"),
        ("2026-03-01T12:00:60Z", "ts_format", "ISO 8601"),
        ("x" * 1_000_000, "ts_format", "ISO 8601"),
        (1_772_366_400_000.5, "type:ts", "whole number"),
        (float("nan"), "type:ts", "whole number"),
        (True, "type:ts", "whole number"),
        ([1], "type:ts", "whole number"),
    ],
    ids=lambda value: repr(value)[:30],
)
def test_event_time_that_is_none_is_refused(ts: Any, reason: str, says: str) -> None:
    reject = refused(encoded(ts=ts))
    assert reject.reason == reason
    assert says in reject.detail


def test_an_event_may_be_ahead_of_its_record_by_the_limit_and_no_more() -> None:
    assert taken(encoded(ts=RECORD_MS + AHEAD_MS)).ts == RECORD_MS + AHEAD_MS
    reject = refused(encoded(ts=RECORD_MS + AHEAD_MS + 1))
    assert reject.reason == "future_ts"
    assert "clock" in reject.detail


def test_an_event_later_than_the_reader_allows_is_rejected_whatever_its_record_says() -> None:
    later = RECORD_MS + 1
    values = [encoded(ts=later), encoded(ts=RECORD_MS), encoded(), encoded()]
    parsed = parse(values, [later, later, later, RECORD_MS], AHEAD_MS, RECORD_MS)
    assert parsed.index == [1, 3]
    assert [reject.reason for reject in parsed.rejects] == ["future_ts"] * 2


def test_an_old_event_is_taken() -> None:
    assert taken(encoded(ts="1998-09-20T03:05:10+00:00")).ts == 906_260_710_000


@pytest.mark.parametrize("record_ms", [-1, 0, 1_700_000_000, MAX_TS_MS + 1])
def test_a_record_without_a_believable_time_lends_none(record_ms: int) -> None:
    assert refused(encoded(), record_ms).reason == "record_ts"


def test_category_is_a_path_however_it_was_sent() -> None:
    assert taken(encoded(category="Home > Candles")) == taken(encoded(category=["Home", "Candles"]))
    assert taken(encoded(category=">Home>> Candles >")) == taken(
        encoded(category=["Home", "Candles"])
    )
    assert taken(encoded(category="")) == taken(encoded(category=[])) == taken(encoded())


def test_one_bad_record_costs_no_other_one() -> None:
    values = [encoded(user_id="a"), b"{", None, encoded(user_id="b"), encoded(user_id=1)]
    parsed = parse(values, [RECORD_MS + i for i in range(5)], AHEAD_MS)
    assert [event.user_id for event in parsed.events] == ["a", "b"]
    assert parsed.index == [0, 3]
    assert [event.ts for event in parsed.events] == [RECORD_MS, RECORD_MS + 3]
    assert [(r.index, r.reason) for r in parsed.rejects] == [
        (1, "json"),
        (2, "null_value"),
        (4, "type:user_id"),
    ]
    assert parsed.reasons() == {"json": 1, "null_value": 1, "type:user_id": 1}


def test_a_slice_with_every_record_bad_is_all_rejects() -> None:
    parsed = parse([b"{"] * 4096, [RECORD_MS] * 4096, AHEAD_MS)
    assert parsed.events == []
    assert [reject.index for reject in parsed.rejects] == list(range(4096))


def test_an_empty_slice_is_no_error() -> None:
    parsed = parse([], [], AHEAD_MS)
    assert (parsed.events, parsed.index, parsed.rejects) == ([], [], [])


def test_values_without_timestamps_are_a_programming_error() -> None:
    with pytest.raises(ValueError, match="shorter"):
        parse([encoded()], [], AHEAD_MS)


def test_events_are_made_and_checked_in_python_too() -> None:
    view = View(user_id="u1", item_id="i1", category="Home > Candles")
    assert view.category == ("Home", "Candles")
    assert view.ts == NO_TS
    with pytest.raises(ValidationError, match="user_id"):
        View(user_id="", item_id="i1")
    with pytest.raises(ValidationError, match="unicode"):
        Search(user_id="u1", query="\ud800")
    with pytest.raises(ValidationError, match="category"):
        View(user_id="u1", item_id="i1", category="\ud800")
    with pytest.raises(ValidationError, match="frozen"):
        view.user_id = "u2"


def test_python_times_need_a_time_zone() -> None:
    moment = datetime(2026, 3, 1, 12, tzinfo=UTC)
    assert View(user_id="u", item_id="i", ts=moment).ts == RECORD_MS
    elsewhere = moment.astimezone(timezone(timedelta(hours=-8)))
    assert View(user_id="u", item_id="i", ts=elsewhere).ts == RECORD_MS
    with pytest.raises(ValidationError, match="offset"):
        View(user_id="u", item_id="i", ts=datetime(2026, 3, 1, 12))
    with pytest.raises(ValidationError, match="milliseconds"):
        View(user_id="u", item_id="i", ts=1_772_366_400)


def test_the_payload_carries_type_and_version_and_nothing_absent() -> None:
    assert json.loads(Forget(user_id="u1").to_json()) == {
        "schema_version": SCHEMA_VERSION,
        "type": "forget",
        "user_id": "u1",
    }
    review = Review(user_id="u1", item_id="i1", rating=1, text="broken", category=["Home"])
    assert json.loads(review.to_json()) == {
        "schema_version": SCHEMA_VERSION,
        "type": "review",
        "user_id": "u1",
        "item_id": "i1",
        "category": ["Home"],
        "rating": 1.0,
        "text": "broken",
    }


def test_a_message_survives_the_wire_in_any_script() -> None:
    message = Message(
        user_id="用户1", text="我的订单在哪里? 🙂\nDanke", channel="chat", ts=RECORD_MS
    )
    assert taken(message.to_json()) == message


LAMP = Item(item_id="i1", title="Lamp", category=["Home"], price=9.5, currency="EUR")


def test_items_are_upserts_and_null_values_are_deletions() -> None:
    parsed = parse_items([b"i1", b"i2"], [LAMP.to_json(), None])
    assert parsed.upserts == [LAMP]
    assert parsed.deletions == ["i2"]
    assert parsed.rejects == []


def test_the_latest_record_of_an_item_wins() -> None:
    newer = LAMP.model_copy(update={"title": "Desk lamp"})
    twice = parse_items([b"i1", b"i1"], [LAMP.to_json(), newer.to_json()])
    assert twice.upserts == [newer]
    gone = parse_items([b"i1", b"i1"], [LAMP.to_json(), None])
    assert (gone.upserts, gone.deletions) == ([], ["i1"])
    back = parse_items([b"i1", b"i1"], [None, LAMP.to_json()])
    assert (back.upserts, back.deletions) == ([LAMP], [])


def test_a_bad_item_record_leaves_the_item_as_it_was() -> None:
    parsed = parse_items([b"i1", b"i1"], [LAMP.to_json(), b"{"])
    assert parsed.upserts == [LAMP]
    assert [(r.index, r.reason) for r in parsed.rejects] == [(1, "json")]


@pytest.mark.parametrize(
    ("key", "value", "reason"),
    [
        (None, LAMP.to_json(), "key"),
        (None, None, "key"),
        (b"", None, "key"),
        (b"\xff", None, "key"),
        (b"i1\x00", None, "key"),
        (b"other", LAMP.to_json(), "key"),
        (b"i1", b'{"item_id":"i1"}', "missing:title"),
        (b"i1", b'{"item_id":"i1","title":" "}', "format:title"),
        (b"i1", b'{"item_id":"i1","title":"Lamp","price":-1}', "range:price"),
        (b"i1", b'{"item_id":"i1","title":"Lamp","schema_version":2}', "schema_version"),
        (b"i1", b"[]", "not_object"),
        (b"i1", b"", "json"),
    ],
)
def test_bad_item_records_are_refused(key: bytes | None, value: bytes | None, reason: str) -> None:
    parsed = parse_items([key], [value])
    assert (parsed.upserts, parsed.deletions) == ([], [])
    assert [(r.index, r.reason) for r in parsed.rejects] == [(0, reason)]
