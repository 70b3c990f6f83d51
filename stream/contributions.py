"""Events -> columns of what each contributes to its shopper's profile.

PURE. It knows event types and their weights; it does not know vectors, Kafka or Redis.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Final

import numpy as np
from numpy.typing import NDArray

from profiles.arithmetic import FORGET
from profiles.schema import EVENT_TYPES, TYPE_CODE, ItemRecord, key64

from . import events as ev

if TYPE_CHECKING:
    from .user_rows import UserRows

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

    def arrays(self, users: UserRows) -> Contributions:
        """The same, with rows among `users`."""
        return Contributions(
            users.rows_of_ids(list(self.users))[np.asarray(self.row, np.int64)],
            np.asarray(self.event, np.uint64),
            np.asarray(self.t_ms, np.int64),
            np.asarray(self.type, np.uint8),
            np.asarray(self.weight, np.float64),
            np.array([_item_key(i) if i else 0 for i in self.item_id], np.uint64),
            np.asarray(self.spend, np.float64),
            np.asarray(self.foreign, np.bool_),
            {i: text for i, text in enumerate(self.text) if text},
            self.inline,
        )


@dataclass(frozen=True)
class Contributions:
    """m events, as arrays (m,)."""

    row: NDArray[np.int64]  # of the user
    event: NDArray[np.uint64]
    t_ms: NDArray[np.int64]
    type: NDArray[np.uint8]
    weight: NDArray[np.float64]
    item: NDArray[np.uint64]  # key, 0 without an item
    spend: NDArray[np.float64]
    foreign: NDArray[np.bool_]
    text: dict[int, str]  # position -> what to encode; there is no item there
    inline: dict[str, ItemRecord]

    def at(self, positions: NDArray[np.int64]) -> Contributions:
        """Only these, in this order; what was said of items stays."""
        text = self.text
        if text:
            found = enumerate(positions.tolist())
            text = {new: self.text[old] for new, old in found if old in self.text}
        arrays = {name: getattr(self, name)[positions] for name in _PER_EVENT}
        return Contributions(**arrays, text=text, inline=self.inline)


_PER_EVENT: Final = {
    "row": np.int64,
    "event": np.uint64,
    "t_ms": np.int64,
    "type": np.uint8,
    "weight": np.float64,
    "item": np.uint64,
    "spend": np.float64,
    "foreign": np.bool_,
}


def joined(parts: Sequence[Contributions]) -> Contributions:
    """One after the other."""
    if len(parts) == 1:
        return parts[0]
    text: dict[int, str] = {}
    inline: dict[str, ItemRecord] = {}
    first = 0
    for part in parts:
        text |= {first + i: words for i, words in part.text.items()}
        inline |= part.inline
        first += len(part.row)
    arrays: dict[str, Any] = {
        name: np.concatenate([np.zeros(0, dtype), *(getattr(part, name) for part in parts)])
        for name, dtype in _PER_EVENT.items()
    }
    return Contributions(**arrays, text=text, inline=inline)


# Item ids whose key is remembered. A SHA-256 costs 0.7 us, a look-up 0.1.
_item_key = lru_cache(maxsize=200_000)(key64)


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
