"""The events a shop sends and the items it sells, as they cross the wire: models and parsing.

PURE. Bytes and broker timestamps in; events, and rejects with a reason, out. It does not
know Kafka, Redis, the clock, or what an event is worth to a profile.

Every record is validated by itself. Joining a slice into one JSON array first saves little
(the closing brackets are cheap; the fields are not), and an array can be fooled: the record
`{...},{...}` would become two events, and every later one would move by one place.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Annotated, Any, Final, Literal, cast

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    GetCoreSchemaHandler,
    GetJsonSchemaHandler,
    StringConstraints,
    TypeAdapter,
    ValidationError,
)
from pydantic_core import CoreSchema, ErrorDetails, PydanticCustomError, core_schema

SCHEMA_VERSION: Final = 1
"""The newest schema this code reads. Fields may be added without a new one."""

MIN_TS_MS: Final = 631_152_000_000  # 1990-01-01T00:00:00Z
MAX_TS_MS: Final = 4_102_444_799_999  # 2099-12-31T23:59:59.999Z
"""Epoch seconds of any year from 1970 to 2099 read as milliseconds lie before 1990 (they end
at 1970-02-17), and microseconds lie after 2099, so a wrong unit is always caught."""

NO_TS: Final = 0
"""`ts` of an event whose producer gave none; `parse` puts the record's timestamp there."""

# Limits are in characters. They are set by what real catalogues and shoppers hold (the longest
# title at hand has 879 characters), with room; they bound what one event may cost.
ID_LIMIT: Final = 256
SHORT_ID_LIMIT: Final = 128
NAME_LIMIT: Final = 256
TITLE_LIMIT: Final = 2_000
QUERY_LIMIT: Final = 2_000
TEXT_LIMIT: Final = 20_000
DESCRIPTION_LIMIT: Final = 50_000
CATEGORY_DEPTH: Final = 16
CATEGORY_STRING_LIMIT: Final = 2_000
PRICE_LIMIT: Final = 1e12
QUANTITY_LIMIT: Final = 1_000_000

_DETAIL_LIMIT: Final = 300
_SHOWN_LIMIT: Final = 60

# No control character anywhere and no white space at either end: such ids come from bad joins
# and unstripped files, look like another id to a person, and are another key to Redis.
_ID_PATTERN: Final = r"^[^\s\x00-\x1f\x7f-\x9f]([^\x00-\x1f\x7f-\x9f]*[^\s\x00-\x1f\x7f-\x9f])?$"
_EPOCH: Final = datetime(1970, 1, 1, tzinfo=UTC)
_MILLISECOND: Final = timedelta(milliseconds=1)
_TS_RULE: Final = (
    "ts must be epoch milliseconds, or ISO 8601 with an offset (2026-03-01T12:00:00Z), "
    "from 1990 to 2099"
)


class _EventTime:
    """Annotation of `ts`: epoch milliseconds in, or ISO 8601, or an aware datetime; an int out.

    The integer branch, which a busy shop uses, never leaves pydantic-core.
    """

    @classmethod
    def __get_pydantic_core_schema__(cls, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        return core_schema.union_schema(
            [
                core_schema.int_schema(strict=True, ge=MIN_TS_MS, le=MAX_TS_MS),
                core_schema.no_info_plain_validator_function(_event_time_ms),
            ],
            mode="left_to_right",
            custom_error_type="event_time",
            custom_error_message=_TS_RULE,
            serialization=core_schema.simple_ser_schema("int"),
        )

    @classmethod
    def __get_pydantic_json_schema__(
        cls, schema: CoreSchema, handler: GetJsonSchemaHandler
    ) -> dict[str, Any]:
        return {
            "anyOf": [
                {"type": "integer", "minimum": MIN_TS_MS, "maximum": MAX_TS_MS},
                {"type": "string", "format": "date-time"},
                {"type": "null"},
            ],
        }


class _CategoryPath:
    """Annotation of `category`: a list from the root down, or one string "A > B"; a tuple out."""

    @classmethod
    def __get_pydantic_core_schema__(cls, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        name = core_schema.str_schema(strict=True, min_length=1, max_length=NAME_LIMIT)
        return core_schema.union_schema(
            [
                core_schema.tuple_variable_schema(name, strict=False, max_length=CATEGORY_DEPTH),
                core_schema.no_info_plain_validator_function(_split_category),
            ],
            mode="left_to_right",
            custom_error_type="category_path",
            custom_error_message=(
                f"category must be a list of at most {CATEGORY_DEPTH} names, root first, or one "
                f'string such as "Home > Candles"; a name has 1 to {NAME_LIMIT} characters'
            ),
        )

    @classmethod
    def __get_pydantic_json_schema__(
        cls, schema: CoreSchema, handler: GetJsonSchemaHandler
    ) -> dict[str, Any]:
        name = {"type": "string", "minLength": 1, "maxLength": NAME_LIMIT}
        return {
            "anyOf": [
                {"type": "array", "items": name, "maxItems": CATEGORY_DEPTH},
                {"type": "string", "maxLength": CATEGORY_STRING_LIMIT},
                {"type": "null"},
            ],
        }


def _event_time_ms(value: Any) -> int:
    """Epoch milliseconds of what the integer branch left over; raises PydanticCustomError."""
    if value is None:
        return NO_TS
    if isinstance(value, str):
        try:
            value = datetime.fromisoformat(value)
        except ValueError:
            raise PydanticCustomError("ts_format", "ts is not ISO 8601") from None
    if isinstance(value, datetime):
        if value.tzinfo is None:
            raise PydanticCustomError("ts_naive", "ts has no offset; add Z or one like +02:00")
        value = (value - _EPOCH) // _MILLISECOND
        if MIN_TS_MS <= value <= MAX_TS_MS:
            return cast(int, value)
        raise PydanticCustomError("ts_range", "ts is not from 1990 to 2099")
    if type(value) is int:
        raise _wrong_unit(value)
    raise PydanticCustomError("type:ts", "ts is neither a whole number nor a string")


def _wrong_unit(value: int) -> PydanticCustomError:
    if MIN_TS_MS <= value * 1000 <= MAX_TS_MS:
        return PydanticCustomError("ts_seconds", "ts looks like seconds; send milliseconds")
    for unit, factor in (("microseconds", 1_000), ("nanoseconds", 1_000_000)):
        if MIN_TS_MS <= value // factor <= MAX_TS_MS:
            return PydanticCustomError("ts_range", f"ts looks like {unit}; send milliseconds")
    return PydanticCustomError("ts_range", "ts is not from 1990 to 2099")


def _split_category(value: Any) -> tuple[str, ...]:
    """ "Home > Candles" -> ("Home", "Candles"); empty steps are left out."""
    if value is None:
        return ()
    if not isinstance(value, str) or len(value) > CATEGORY_STRING_LIMIT:
        raise ValueError
    value.encode()  # a lone surrogate, which only Python code can send, is refused here
    path = tuple(name for step in value.split(">") if (name := step.strip()))
    if len(path) > CATEGORY_DEPTH or any(len(name) > NAME_LIMIT for name in path):
        raise ValueError
    return path


def _is_absent(value: Any) -> bool:
    return value is None or value == NO_TS or value == ()


Id = Annotated[str, StringConstraints(min_length=1, max_length=ID_LIMIT, pattern=_ID_PATTERN)]
ShortId = Annotated[
    str, StringConstraints(min_length=1, max_length=SHORT_ID_LIMIT, pattern=_ID_PATTERN)
]
Name = Annotated[str, StringConstraints(max_length=NAME_LIMIT)]
Title = Annotated[str, StringConstraints(max_length=TITLE_LIMIT)]
Label = Annotated[
    ShortId | None,
    Field(
        description="What people found it to be, such as `negative` or `refund`; absent: unknown. "
        "To give a label later, send the event again with its event_id and ts."
    ),
]
Price = Annotated[float, Field(ge=0, le=PRICE_LIMIT)]
# The shape only: a list of codes in here would grow old and throw purchases away.
Currency = Annotated[str, StringConstraints(pattern="^[A-Z]{3}$")]
Category = Annotated[tuple[str, ...], _CategoryPath]


class _Wire(BaseModel):
    """What every payload shares: strict, frozen, unknown fields ignored, nothing absent sent."""

    # Most ids are met once in a slice, so only object keys are worth pydantic's string cache.
    model_config = ConfigDict(
        frozen=True, strict=True, extra="ignore", allow_inf_nan=False, cache_strings="keys"
    )

    schema_version: Annotated[
        int, Field(ge=1, le=SCHEMA_VERSION, description="Major version of this schema.")
    ] = SCHEMA_VERSION

    def to_json(self) -> bytes:
        """The payload as it goes on the topic: UTF-8 JSON without absent fields."""
        return self.__pydantic_serializer__.to_json(self, exclude_none=True)


class EventBase(_Wire):
    """What every event carries. `ts` is event time in epoch milliseconds, whatever was sent."""

    event_id: Annotated[
        ShortId | None,
        Field(description="A UUID, or any id that a producer repeats when it sends again."),
    ] = None
    user_id: Annotated[Id, Field(description="The shopper; the record's key.")]
    ts: Annotated[
        int,
        _EventTime,
        Field(
            exclude_if=_is_absent,
            description=f"Event time; absent: the record's timestamp. {_TS_RULE}.",
        ),
    ] = NO_TS
    session_id: ShortId | None = None


class ItemEvent(EventBase):
    """An event about one item, which may bring the item's text for a catalogue that lacks it."""

    item_id: Id
    title: Title | None = None
    category: Annotated[
        Category, Field(exclude_if=_is_absent, description="Path, root first.")
    ] = ()
    brand: Name | None = None
    price: Annotated[Price | None, Field(description="Of one piece.")] = None
    currency: Annotated[Currency | None, Field(description="ISO 4217; absent: the shop's own.")] = (
        None
    )


class View(ItemEvent):
    """A shopper opened an item's page."""

    type: Literal["view"] = "view"


class Click(ItemEvent):
    """A shopper followed a link, a search hit or a recommendation to an item."""

    type: Literal["click"] = "click"


class AddToCart(ItemEvent):
    """A shopper put an item in the cart."""

    type: Literal["add_to_cart"] = "add_to_cart"


class RemoveFromCart(ItemEvent):
    """A shopper took an item out of the cart."""

    type: Literal["remove_from_cart"] = "remove_from_cart"


class Purchase(ItemEvent):
    """A shopper bought `quantity` pieces at `price` each. No price: unknown, not free."""

    type: Literal["purchase"] = "purchase"
    quantity: Annotated[int, Field(ge=1, le=QUANTITY_LIMIT)] = 1


class Review(ItemEvent):
    """A shopper rated an item, with or without words."""

    type: Literal["review"] = "review"
    rating: Annotated[float, Field(ge=1, le=5, description="1 (worst) to 5.")]
    text: Annotated[str, StringConstraints(max_length=TEXT_LIMIT)] = ""
    label: Label = None


class Impression(ItemEvent):
    """An item was shown to a shopper."""

    type: Literal["impression"] = "impression"
    placement: Name | None = None
    campaign: Name | None = None


class Search(EventBase):
    """A shopper searched the shop."""

    type: Literal["search"] = "search"
    query: Annotated[str, StringConstraints(max_length=QUERY_LIMIT, pattern=r"\S")]


class Message(EventBase):
    """A shopper wrote to the shop's support."""

    type: Literal["message"] = "message"
    text: Annotated[str, StringConstraints(max_length=TEXT_LIMIT, pattern=r"\S")]
    channel: Name | None = None
    label: Label = None


class Forget(EventBase):
    """Erase everything kept about this shopper. A command, not counted as behaviour."""

    type: Literal["forget"] = "forget"


Event = (
    View
    | Click
    | AddToCart
    | RemoveFromCart
    | Purchase
    | Review
    | Impression
    | Search
    | Message
    | Forget
)
EVENT_MODELS: Final[tuple[type[Event], ...]] = (
    Impression,
    View,
    Click,
    AddToCart,
    RemoveFromCart,
    Purchase,
    Search,
    Review,
    Message,
    Forget,
)
EVENT_ADAPTER: Final[TypeAdapter[Event]] = TypeAdapter(
    Annotated[Event, Field(discriminator="type", title="Event")]
)


class Item(_Wire):
    """An item of the catalogue: the value on the compacted topic `….items`, keyed by `item_id`."""

    item_id: Id
    title: Annotated[str, StringConstraints(max_length=TITLE_LIMIT, pattern=r"\S")]
    category: Annotated[
        Category, Field(exclude_if=_is_absent, description="Path, root first.")
    ] = ()
    brand: Name | None = None
    price: Price | None = None
    currency: Annotated[Currency | None, Field(description="ISO 4217; absent: the shop's own.")] = (
        None
    )
    description: Annotated[str, StringConstraints(max_length=DESCRIPTION_LIMIT)] | None = None


_ITEM_ADAPTER: Final[TypeAdapter[Item]] = TypeAdapter(Item)
_ID_ADAPTER: Final[TypeAdapter[str]] = TypeAdapter(Id)


@dataclass(frozen=True, slots=True)
class Rejected:
    """One record that is not an event (or item)."""

    index: int
    """Position in the values given to `parse` or `parse_items`."""
    reason: str
    """Short and stable, of a small fixed set: a metric label. `missing:user_id`, `json`, …"""
    detail: str
    """One line for a person: the field, what is wrong with it, what to send instead."""


@dataclass(slots=True)
class Parsed:
    """A slice of event records, taken apart: len(events) + len(rejects) == len(values)."""

    events: list[Event] = field(default_factory=list)  # (n,) in the order of the records
    index: list[int] = field(default_factory=list)  # (n,) position of each event in the values
    rejects: list[Rejected] = field(default_factory=list)

    def reasons(self) -> Counter[str]:
        """How many records were rejected for each reason."""
        return Counter(reject.reason for reject in self.rejects)


@dataclass(slots=True)
class ParsedItems:
    """A slice of item records. An item is in one list only: its latest record wins."""

    upserts: list[Item] = field(default_factory=list)
    deletions: list[str] = field(default_factory=list)  # item ids
    rejects: list[Rejected] = field(default_factory=list)


def parse(
    values: Sequence[bytes | None],
    broker_ms: Sequence[int],
    max_ahead_ms: int,
    latest_ms: int = MAX_TS_MS,
) -> Parsed:
    """Take a slice of records apart into events, with `ts` filled, and rejects.

    `broker_ms` holds the records' own timestamps (epoch ms), one per value; an event more than
    `max_ahead_ms` ahead of its record is rejected, and one later than `latest_ms` whatever its
    record says. No content makes it raise; sequences of different lengths do (ValueError).
    """
    parsed = Parsed()
    validate = EVENT_ADAPTER.validator.validate_json
    add_event, add_index, reject = parsed.events.append, parsed.index.append, parsed.rejects.append
    for i, (value, record_ms) in enumerate(zip(values, broker_ms, strict=True)):
        if value is None:
            reject(_null_event(i))
            continue
        try:
            event: Event = validate(value)
        except ValidationError as error:
            reject(_rejected(i, error))
            continue
        ts = event.ts
        if ts > record_ms + max_ahead_ms:
            reject(_future(i, ts, record_ms, max_ahead_ms))
            continue
        if ts > latest_ms or (ts == NO_TS and latest_ms < record_ms <= MAX_TS_MS):
            reject(_beyond(i, max(ts, record_ms), latest_ms))
            continue
        if ts == NO_TS:
            if not MIN_TS_MS <= record_ms <= MAX_TS_MS:
                reject(_no_time(i, record_ms))
                continue
            object.__setattr__(event, "ts", record_ms)  # ours alone so far: frozen for others
        add_event(event)
        add_index(i)
    return parsed


def parse_items(keys: Sequence[bytes | None], values: Sequence[bytes | None]) -> ParsedItems:
    """Take a slice of the compacted item topic apart; None as value deletes the key's item.

    Of several records about one item only the latest counts, as compaction would have it. No
    content makes it raise; sequences of different lengths do (ValueError).
    """
    latest: dict[str, Item | None] = {}
    rejects: list[Rejected] = []
    for i, (key, value) in enumerate(zip(keys, values, strict=True)):
        item_id = _item_id(key)
        if item_id is None:
            rejects.append(Rejected(i, "key", "the record's key must be the item_id, in UTF-8"))
            continue
        item = None
        if value is not None:
            try:
                item = _ITEM_ADAPTER.validator.validate_json(value)
            except ValidationError as error:
                rejects.append(_rejected(i, error))
                continue
            if item.item_id != item_id:
                detail = f"key {_shown(item_id)} is not the item_id {_shown(item.item_id)}"
                rejects.append(Rejected(i, "key", _one_line(detail)))
                continue
        latest.pop(item_id, None)  # so that the order is that of the records that count
        latest[item_id] = item
    return ParsedItems(
        upserts=[item for item in latest.values() if item is not None],
        deletions=[item_id for item_id, item in latest.items() if item is None],
        rejects=rejects,
    )


def item_key(item_id: str) -> bytes:
    """The record key of an item; raises pydantic's ValidationError (a ValueError) for no id."""
    return _ID_ADAPTER.validate_python(item_id, strict=True).encode()


def _item_id(key: bytes | None) -> str | None:
    if key is None:
        return None
    try:
        return _ID_ADAPTER.validate_python(key.decode(), strict=True)
    except (UnicodeDecodeError, ValidationError):
        return None


# Reasons, by pydantic's error types. What is not here is `invalid:FIELD`.
_REASON_OF_TYPE: Final = {
    "missing": "missing",
    "string_type": "type",
    "int_type": "type",
    "float_type": "type",
    "string_too_short": "length",
    "string_too_long": "length",
    "string_pattern_mismatch": "format",
    "greater_than_equal": "range",
    "less_than_equal": "range",
    "finite_number": "range",
    "category_path": "format",
}


def _rejected(index: int, error: ValidationError) -> Rejected:
    errors = error.errors(include_url=False)
    first = errors[0]
    for candidate in errors:
        # A newer schema may break any other rule of this one, so it explains the rest.
        if candidate["loc"][-1:] == ("schema_version",):
            first = candidate
    reason, detail = _explain(first)
    return Rejected(index, reason, _one_line(detail))


def _explain(error: ErrorDetails) -> tuple[str, str]:
    kind, value = error["type"], error["input"]
    if not error["loc"]:
        return _explain_record(kind, value, error)
    # The first step is the type's tag, where there is one; `category` may have deeper ones.
    name = next((str(step) for step in error["loc"] if str(step) in _FIELDS), "record")
    if kind == "event_time":
        return _explain_ts(value)
    if name == "schema_version" and type(value) is int and value > SCHEMA_VERSION:
        return (
            "schema_version",
            f"schema_version {_shown(value)} is newer than {SCHEMA_VERSION}, the newest that this "
            "worker reads; upgrade the worker, or let the producer send the older schema",
        )
    reason = f"{_REASON_OF_TYPE.get(kind, 'invalid')}:{name}"
    if kind == "missing":
        return reason, f"{name} is missing; it is required"
    message = error["msg"]
    if kind == "string_pattern_mismatch":
        message = _PATTERN_RULE.get(name, message)
    return reason, f"{name} is {_shown(value)}: {message}"


def _explain_record(kind: str, value: Any, error: ErrorDetails) -> tuple[str, str]:
    if kind == "json_invalid":
        return "json", f"{error['msg']}; send one JSON object in UTF-8"
    if kind == "union_tag_not_found":
        return "missing:type", f"type is missing; send one of {_TYPES}"
    if kind == "union_tag_invalid":
        return "unknown_type", f"type {_shown(value['type'])} is unknown; send one of {_TYPES}"
    return "not_object", f"the value is {_shown(value)}; send one JSON object"


def _explain_ts(value: Any) -> tuple[str, str]:
    try:
        _event_time_ms(value)
    except PydanticCustomError as error:
        return error.type, f"ts is {_shown(value)}: {error.message()}. {_TS_RULE}"
    except OverflowError:
        pass
    return "ts_range", f"ts is {_shown(value)}. {_TS_RULE}"


def _null_event(index: int) -> Rejected:
    return Rejected(
        index, "null_value", "the value is null; to erase a shopper send an event of type forget"
    )


def _future(index: int, ts: int, record_ms: int, max_ahead_ms: int) -> Rejected:
    return Rejected(
        index,
        "future_ts",
        f"ts {ts} is {(ts - record_ms) / 1000:.1f} s ahead of the record's timestamp {record_ms}; "
        f"at most {max_ahead_ms / 1000:.1f} s are allowed: check the producer's clock",
    )


def _beyond(index: int, ts: int, latest_ms: int) -> Rejected:
    return Rejected(
        index,
        "future_ts",
        f"ts {ts} is later than {latest_ms}, the latest that the reader's clock allows: check the "
        "producer's clock",
    )


def _no_time(index: int, record_ms: int) -> Rejected:
    return Rejected(
        index,
        "record_ts",
        f"ts is missing and the record's own timestamp {record_ms} is not from 1990 to 2099; "
        "send ts, or let the client set the record's timestamp",
    )


def _shown(value: Any) -> str:
    """A value as a person may meet it in one line: quoted, escaped, cut."""
    if isinstance(value, str):
        cut = value[:_SHOWN_LIMIT]
        return repr(cut) + (f"… ({len(value):,} characters)" if len(value) > len(cut) else "")
    if isinstance(value, dict):
        return "an object"
    if isinstance(value, list):
        return "a list"
    if value is None or isinstance(value, bool):
        return str(value).lower().replace("none", "null")
    return str(value)[:_SHOWN_LIMIT]


def _one_line(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= _DETAIL_LIMIT else line[: _DETAIL_LIMIT - 1] + "…"


_FIELDS: Final = frozenset(name for model in (*EVENT_MODELS, Item) for name in model.model_fields)
_TYPES: Final = ", ".join(model.model_fields["type"].default for model in EVENT_MODELS)
_ID_RULE: Final = "an id has no control characters, and no white space at its ends"
_PATTERN_RULE: Final = {
    "user_id": _ID_RULE,
    "item_id": _ID_RULE,
    "event_id": _ID_RULE,
    "session_id": _ID_RULE,
    "label": "a label has no control characters, and no white space at its ends",
    "currency": "send an ISO 4217 code such as EUR",
    "query": "send at least one character that is not white space",
    "text": "send at least one character that is not white space",
    "title": "send at least one character that is not white space",
}
