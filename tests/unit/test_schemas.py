"""The documents in docs/schemas say what the code does."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from jsonschema import Draft202012Validator

from stream import schemas
from stream.events import EVENT_MODELS, Item, Purchase, Review, View, parse

CHECKED_IN = Path(__file__).parents[2] / "docs" / "schemas"
RECORD_MS = 1_772_366_400_000
VIEW: dict[str, Any] = {"type": "view", "user_id": "u1", "item_id": "i1"}

GOOD: list[dict[str, Any]] = [
    VIEW,
    VIEW | {"ts": RECORD_MS, "event_id": "e", "session_id": "s", "schema_version": 1},
    VIEW | {"ts": "2026-03-01T12:00:00+01:00", "unknown": {"a": 1}},
    VIEW | {"title": None, "category": None, "ts": None, "price": None},
    VIEW | {"category": ["Home", "Candles"], "price": 0, "currency": "EUR"},
    VIEW | {"category": "Home > Candles"},
    VIEW | {"user_id": "käufer eins"},
    {"type": "purchase", "user_id": "u", "item_id": "i", "quantity": 3, "price": 2.5},
    {"type": "review", "user_id": "u", "item_id": "i", "rating": 1},
    {"type": "search", "user_id": "u", "query": "lamp"},
    {"type": "message", "user_id": "u", "text": "help", "channel": "chat"},
    {"type": "message", "user_id": "u", "text": "help", "label": "negative"},
    {"type": "review", "user_id": "u", "item_id": "i", "rating": 1, "label": "too small"},
    {"type": "impression", "user_id": "u", "item_id": "i", "placement": "home"},
    {"type": "forget", "user_id": "u"},
]
BAD: list[Any] = [
    [],
    None,
    {},
    {"user_id": "u", "item_id": "i"},
    {"type": "view", "item_id": "i"},
    {"type": "view", "user_id": "u"},
    {"type": "wishlist", "user_id": "u", "item_id": "i"},
    VIEW | {"user_id": ""},
    VIEW | {"user_id": " u"},
    VIEW | {"user_id": "u\x00"},
    VIEW | {"user_id": "x" * 257},
    VIEW | {"user_id": 5},
    VIEW | {"ts": 1_700_000_000},
    VIEW | {"ts": 1.5},
    VIEW | {"price": -1},
    VIEW | {"price": "1"},
    VIEW | {"currency": "eur"},
    VIEW | {"category": ["x"] * 17},
    VIEW | {"title": "x" * 2001},
    VIEW | {"schema_version": 2},
    {"type": "purchase", "user_id": "u", "item_id": "i", "quantity": 0},
    {"type": "review", "user_id": "u", "item_id": "i", "rating": 6},
    {"type": "search", "user_id": "u", "query": " "},
    {"type": "message", "user_id": "u", "text": "help", "label": ""},
    {"type": "message", "user_id": "u", "text": "help", "label": "x" * 129},
    {"type": "message", "user_id": "u", "text": "help", "label": 1},
]


def shown(value: Any) -> str:
    return json.dumps(value)[:50]


def test_the_checked_in_documents_are_what_the_code_generates() -> None:
    drifting = schemas.check(CHECKED_IN)
    assert drifting == [], "run `penchant schema export` and commit docs/schemas"


def test_a_changed_or_missing_document_is_found(tmp_path: Path) -> None:
    written = schemas.write(tmp_path / "new")
    assert schemas.check(tmp_path / "new") == []
    written[0].write_text(written[0].read_text() + " ")
    written[1].unlink()
    assert schemas.check(tmp_path / "new") == written[:2]


def test_the_schemas_are_valid_schemas() -> None:
    Draft202012Validator.check_schema(schemas.events_schema())
    Draft202012Validator.check_schema(schemas.items_schema())


@pytest.mark.parametrize("event", GOOD, ids=shown)
def test_schema_and_parser_both_take(event: dict[str, Any]) -> None:
    Draft202012Validator(schemas.events_schema()).validate(event)
    assert parse([json.dumps(event).encode()], [RECORD_MS], 0).rejects == []


@pytest.mark.parametrize("event", BAD, ids=shown)
def test_schema_and_parser_both_refuse(event: Any) -> None:
    assert not Draft202012Validator(schemas.events_schema()).is_valid(event)
    assert parse([json.dumps(event).encode()], [RECORD_MS], 0).events == []


def test_what_the_producer_sends_conforms() -> None:
    inline = {"title": "Lamp", "category": ["Home"], "brand": "Acme", "price": 9.5}
    validator = Draft202012Validator(schemas.events_schema())
    for event in (
        View(user_id="u", item_id="i", ts=RECORD_MS, **inline),
        Purchase(user_id="u", item_id="i", quantity=2, currency="EUR", **inline),
        Review(user_id="u", item_id="i", rating=2.5, text="dim"),
    ):
        validator.validate(json.loads(event.to_json()))
    item = Item(item_id="i", **inline, description="A lamp.")
    Draft202012Validator(schemas.items_schema()).validate(json.loads(item.to_json()))


def test_asyncapi_names_every_event_type_and_topic() -> None:
    document = schemas.asyncapi()
    types = [model.model_fields["type"].default for model in EVENT_MODELS]
    assert list(document["channels"]["events"]["messages"]) == types
    assert {channel["address"] for channel in document["channels"].values()} == {
        "{namespace}.events",
        "{namespace}.items",
        "{namespace}.dead-letter",
    }


def references(node: Any) -> list[str]:
    if isinstance(node, dict):
        own = [node["$ref"]] if "$ref" in node else []
        return own + [ref for child in node.values() for ref in references(child)]
    return [ref for child in node for ref in references(child)] if isinstance(node, list) else []


@pytest.mark.parametrize("make", [schemas.asyncapi, schemas.events_schema, schemas.items_schema])
def test_every_reference_leads_somewhere(make: Any) -> None:
    document = make()
    for reference in references(document):
        node = document
        for step in reference.removeprefix("#/").split("/"):
            node = node[step]
        assert node
