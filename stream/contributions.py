"""Events -> columns of what each contributes to its shopper's profile.

PURE. It knows event types and their weights; it does not know vectors, Kafka or Redis.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final

from profiles.arithmetic import FORGET
from profiles.schema import EVENT_TYPES, TYPE_CODE, ItemRecord, key_bytes

from . import events as ev

# What one event of a type adds to an interest. A purchase is the unit; seeing is weak evidence,
# taking out of the cart counts against. An impression is the shop's act, not the shopper's.
DEFAULT_WEIGHTS: Final[Mapping[str, float]] = {
    "impression": 0.0,
    "view": 0.2,
    "click": 0.3,
    "add_to_cart": 0.6,
    "remove_from_cart": -0.4,
    "purchase": 1.0,
    "search": 0.5,
    "review": 1.0,  # times (rating - 3) / 2: five stars count 1, three nothing, one star -1
    "message": 0.1,
}
_WEIGHT_LIMIT: Final = 100.0
# A review's weight runs from -1 (one star) over 0 to 1 (five).
_NEUTRAL_RATING: Final = 3.0
_RATING_SPAN: Final = 2.0


def event_weights(overrides: Mapping[str, float]) -> dict[str, float]:
    """The weights of all types; ValueError for an unknown type or a wild number."""
    for name, weight in overrides.items():
        if name not in DEFAULT_WEIGHTS:
            raise ValueError(f"PROFILE_WEIGHTS names {name!r}: use one of {', '.join(EVENT_TYPES)}")
        if not -_WEIGHT_LIMIT <= weight <= _WEIGHT_LIMIT:
            raise ValueError(f"PROFILE_WEIGHTS: {name} must lie within ±{_WEIGHT_LIMIT:g}")
    return {**DEFAULT_WEIGHTS, **overrides}


@dataclass
class Columns:
    """m events of n users, as lists; vectors are still missing."""

    users: dict[str, int] = field(default_factory=dict)  # user id -> row
    row: list[int] = field(default_factory=list)
    event: list[bytes] = field(default_factory=list)  # 8 bytes, b"" without an id
    t_ms: list[int] = field(default_factory=list)
    type: list[int] = field(default_factory=list)
    weight: list[float] = field(default_factory=list)
    item_id: list[str] = field(default_factory=list)  # "" without an item
    text: list[str] = field(default_factory=list)  # to encode where there is no item
    spend: list[float] = field(default_factory=list)
    foreign: list[bool] = field(default_factory=list)
    inline: dict[str, ItemRecord] = field(default_factory=dict)  # item id -> what events say of it


def columns(batch: Sequence[ev.Event], weights: Mapping[str, float], currency: str) -> Columns:
    """Take m validated events apart, in order."""
    out = Columns()
    users = out.users
    for event in batch:
        kind = event.type
        code = FORGET if kind == "forget" else TYPE_CODE[kind]
        out.row.append(users.setdefault(event.user_id, len(users)))
        out.event.append(key_bytes(event.event_id) if event.event_id is not None else b"")
        out.t_ms.append(event.ts)
        out.type.append(code)
        weight, item_id, text, spend, foreign = weights.get(kind, 0.0), "", "", 0.0, False
        if isinstance(event, ev.ItemEvent):
            item_id = event.item_id
            if event.title or event.category or event.brand:
                out.inline[item_id] = _inline(event)
            if isinstance(event, ev.Review):
                weight *= (event.rating - _NEUTRAL_RATING) / _RATING_SPAN
            elif isinstance(event, ev.Purchase):
                foreign = event.currency not in (None, currency)
                spend = 0.0 if foreign else (event.price or 0.0) * event.quantity
        elif isinstance(event, ev.Search):
            text = event.query
        elif isinstance(event, ev.Message):
            text = event.text
        out.weight.append(weight)
        out.item_id.append(item_id)
        out.text.append(text if weight else "")
        out.spend.append(spend)
        out.foreign.append(foreign)
    return out


def _inline(event: ev.ItemEvent) -> ItemRecord:
    return ItemRecord(
        item_id=event.item_id,
        title=event.title or "",
        category=tuple(event.category),
        brand=event.brand or "",
        price=event.price,
        currency=event.currency,
    )
