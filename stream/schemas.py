"""What a shop in any language can read about the wire: JSON Schema and AsyncAPI documents.

Generated from events.py and checked in under docs/schemas, where a test compares them. PURE but
for `write` and `check`. JSON Schema cannot say all that `parse` checks: an event's time against
its record's is left to the worker.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Final

from pydantic import BaseModel
from pydantic.json_schema import GenerateJsonSchema, JsonSchemaValue, models_json_schema
from pydantic_core import core_schema

from .events import EVENT_ADAPTER, EVENT_MODELS, NO_TS, SCHEMA_VERSION, Item

_BASE: Final = "urn:penchant:schema:v1:"
_DIALECT: Final = "https://json-schema.org/draft/2020-12/schema"
_KAFKA_BINDING: Final = "0.5.0"


class _Generate(GenerateJsonSchema):
    """Without the titles and absent defaults that say nothing."""

    def field_title_should_be_set(self, schema: Any) -> bool:
        return False

    def default_schema(self, schema: core_schema.WithDefaultSchema) -> JsonSchemaValue:
        if schema.get("default") in (None, NO_TS, ()):
            return self.generate_inner(schema["schema"])
        return super().default_schema(schema)


def events_schema() -> dict[str, Any]:
    """JSON Schema (2020-12) of the value of a record on `{namespace}.events`."""
    schema = EVENT_ADAPTER.json_schema(schema_generator=_Generate)
    for model in EVENT_MODELS:
        _require_type(schema["$defs"][model.__name__])
    return {"$schema": _DIALECT, "$id": _BASE + "events", **schema}


def items_schema() -> dict[str, Any]:
    """JSON Schema (2020-12) of the value of a record on `{namespace}.items`; null deletes."""
    schema = Item.model_json_schema(schema_generator=_Generate)
    return {"$schema": _DIALECT, "$id": _BASE + "items", **schema}


def asyncapi() -> dict[str, Any]:
    """The AsyncAPI 3 document of the topics that a shop writes to, and of the dead letters."""
    names = [model.model_fields["type"].default for model in EVENT_MODELS]
    messages = {
        name: _message(model, "user_id") for name, model in zip(names, EVENT_MODELS, strict=True)
    }
    messages |= {"item": _message(Item, "item_id"), "item_deletion": _DELETION}
    messages |= {"dead_letter": _DEAD_LETTER}
    return {
        "asyncapi": "3.0.0",
        "info": {
            "title": "Penchant",
            "version": f"{SCHEMA_VERSION}.0.0",
            "description": "Events of shoppers and items of the catalogue, as Penchant takes "
            "them from Kafka, and the records it could not take.",
        },
        "defaultContentType": "application/json",
        "channels": {
            "events": _channel("events", names, "Keyed by user_id, partitioned by murmur2."),
            "items": _channel(
                "items", ["item", "item_deletion"], "Compacted; keyed by item_id.", compact=True
            ),
            "deadLetter": _channel(
                "dead-letter", ["dead_letter"], "Records that were rejected, and why."
            ),
        },
        "operations": {
            "takeEvents": _operation("receive", "events"),
            "takeItems": _operation("receive", "items"),
            "reject": _operation("send", "deadLetter"),
        },
        "components": {"messages": messages, "schemas": _component_schemas()},
    }


def write(folder: Path) -> list[Path]:
    """Write every document into `folder` (made if need be); returns the files."""
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    for name, text in _documents().items():
        (folder / name).write_text(text, encoding="utf-8")
        written.append(folder / name)
    return written


def check(folder: Path) -> list[Path]:
    """The files in `folder` that are missing or not what `write` would write."""
    return [
        folder / name
        for name, text in _documents().items()
        if not (folder / name).is_file() or (folder / name).read_text(encoding="utf-8") != text
    ]


def _documents() -> dict[str, str]:
    made = {
        "events.schema.json": events_schema(),
        "items.schema.json": items_schema(),
        "asyncapi.json": asyncapi(),
    }
    return {
        name: json.dumps(document, indent=2, ensure_ascii=False) + "\n"
        for name, document in made.items()
    }


def _require_type(schema: dict[str, Any]) -> None:
    # Python code may leave `type` to the class; on the wire it is what tells the classes apart.
    schema["required"] = ["type", *schema["required"]]
    del schema["properties"]["type"]["default"]


def _component_schemas() -> dict[str, Any]:
    models: list[type[BaseModel]] = [*EVENT_MODELS, Item]
    _, generated = models_json_schema(
        [(model, "validation") for model in models],
        ref_template="#/components/schemas/{model}",
        schema_generator=_Generate,
    )
    schemas: dict[str, Any] = generated["$defs"]
    for model in EVENT_MODELS:
        _require_type(schemas[model.__name__])
    return schemas


def _message(model: type[BaseModel], key: str) -> dict[str, Any]:
    schema = f"#/components/schemas/{model.__name__}"
    return {
        "title": model.__name__,
        "summary": (model.__doc__ or "").strip(),
        "payload": {"$ref": schema},
        "bindings": _key_binding(
            {"type": "string", "description": f"The {key} of the payload, in UTF-8."}
        ),
    }


def _key_binding(key: dict[str, Any]) -> dict[str, Any]:
    return {"kafka": {"key": key, "bindingVersion": _KAFKA_BINDING}}


_DELETION: Final[dict[str, Any]] = {
    "title": "ItemDeletion",
    "summary": "A null value: the item of this key leaves the catalogue.",
    "payload": {"type": "null"},
    "bindings": _key_binding({"type": "string", "description": "The item_id, in UTF-8."}),
}

_DEAD_LETTER: Final[dict[str, Any]] = {
    "title": "DeadLetter",
    "summary": "A rejected record: key and value are the original's bytes.",
    "contentType": "application/octet-stream",
    "headers": {
        "type": "object",
        "description": "After the original's own headers.",
        "required": [
            "penchant.reason",
            "penchant.detail",
            "penchant.topic",
            "penchant.partition",
            "penchant.offset",
            "penchant.timestamp",
        ],
        "properties": {
            "penchant.reason": {
                "type": "string",
                "description": "A short code, such as missing:user_id.",
            },
            "penchant.detail": {"type": "string", "description": "One line for a person."},
            "penchant.topic": {"type": "string", "description": "Where the record was."},
            "penchant.partition": {"type": "string", "pattern": "^[0-9]+$"},
            "penchant.offset": {"type": "string", "pattern": "^[0-9]+$"},
            "penchant.timestamp": {
                "type": "string",
                "description": "The record's own, in epoch milliseconds.",
            },
            "penchant.truncated": {
                "type": "string",
                "description": "Size of the original in bytes, where it was too large to keep.",
            },
        },
    },
    "payload": {"description": "Whatever was sent."},
}


def _channel(
    topic: str, messages: list[str], description: str, *, compact: bool = False
) -> dict[str, Any]:
    kafka: dict[str, Any] = {"bindingVersion": _KAFKA_BINDING}
    if compact:
        kafka["topicConfiguration"] = {"cleanup.policy": ["compact"]}
    return {
        "address": "{namespace}." + topic,
        "description": description,
        "parameters": {
            "namespace": {
                "default": "penchant",
                "description": "The setting NAMESPACE, which keeps several shops apart.",
            }
        },
        "messages": {name: {"$ref": f"#/components/messages/{name}"} for name in messages},
        "bindings": {"kafka": kafka},
    }


def _operation(action: str, channel: str) -> dict[str, Any]:
    return {"action": action, "channel": {"$ref": f"#/channels/{channel}"}}
