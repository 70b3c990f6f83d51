"""Events -> columns of what each contributes to its shopper's profile.

PURE. It knows event types and their weights; it does not know vectors, Kafka or Redis.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from profiles.arithmetic import FORGET
from profiles.schema import EVENT_TYPES, TYPE_CODE, ItemRecord, key64

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
NEUTRAL_RATING: Final = 3.0
RATING_SPAN: Final = 2.0


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
    event: list[int] = field(default_factory=list)  # key of the event id, 0 without one
    t_ms: list[int] = field(default_factory=list)
    type: list[int] = field(default_factory=list)
    weight: list[float] = field(default_factory=list)
    item_id: list[str] = field(default_factory=list)  # "" without an item
    text: list[str] = field(default_factory=list)  # to encode where there is no item
    spend: list[float] = field(default_factory=list)
    foreign: list[bool] = field(default_factory=list)
    inline: dict[str, ItemRecord] = field(default_factory=dict)  # item id -> what events say of it

    def arrange(self, first: int, order: Sequence[int]) -> None:
        """Put the events from `first` on into this order: positions, counted from there."""
        for name in _PER_EVENT:
            column: list[Any] = getattr(self, name)
            column[first:] = [column[first + i] for i in order]


_PER_EVENT: Final = (
    "row", "event", "t_ms", "type", "weight", "item_id", "text", "spend", "foreign",
)  # fmt: skip


def add_columns(
    out: Columns, batch: Sequence[ev.Event], weights: Mapping[str, float], currency: str
) -> None:
    """Take m validated events apart, in order, behind those that are there."""
    kinds = [event.type for event in batch]
    weight_of = {kind: weights.get(kind, 0.0) for kind in _CODE}
    users, first = out.users, len(out.row)
    out.row += [users.setdefault(event.user_id, len(users)) for event in batch]
    out.event += [key64(e.event_id) if e.event_id is not None else 0 for e in batch]
    out.t_ms += [event.ts for event in batch]
    out.type += [_CODE[kind] for kind in kinds]
    out.weight += [weight_of[kind] for kind in kinds]
    out.item_id += [getattr(event, "item_id", "") for event in batch]
    out.text += [""] * len(batch)
    out.spend += [0.0] * len(batch)
    out.foreign += [False] * len(batch)
    for i, event in enumerate(batch, first):
        if isinstance(event, ev.Purchase):
            out.foreign[i] = event.currency not in (None, currency)
            out.spend[i] = 0.0 if out.foreign[i] else (event.price or 0.0) * event.quantity
        elif isinstance(event, ev.Review):
            out.weight[i] *= (event.rating - NEUTRAL_RATING) / RATING_SPAN
        elif isinstance(event, ev.Search):
            out.text[i] = event.query if out.weight[i] else ""
        elif isinstance(event, ev.Message):
            out.text[i] = event.text if out.weight[i] else ""
        if isinstance(event, ev.ItemEvent) and (event.title or event.category or event.brand):
            out.inline[event.item_id] = _inline(event)


def columns(batch: Sequence[ev.Event], weights: Mapping[str, float], currency: str) -> Columns:
    """m validated events, in order."""
    out = Columns()
    add_columns(out, batch, weights, currency)
    return out


_CODE: Final = {**TYPE_CODE, "forget": FORGET}


def _inline(event: ev.ItemEvent) -> ItemRecord:
    return ItemRecord(
        item_id=event.item_id,
        title=event.title or "",
        category=tuple(event.category),
        brand=event.brand or "",
        price=event.price,
        currency=event.currency,
    )
