"""A small shop: what is produced, when, and what the profiles must be after it.

Four partitions, twenty shoppers, a dozen items of eight dimensions. An item's text may come late;
events repeat, are late themselves, ask to be forgotten, are none at all. Every other shopper's
events bear no event id, so that nothing but the watermark keeps them from counting twice.

What must come of it is worked out by `tests/oracle.py` from the log alone.
"""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from types import SimpleNamespace
from typing import Any, Final

import numpy as np

from model.item_table import ItemTable
from model.text import item_text
from profiles.schema import key64, source_key
from tests import oracle

from .broker_double import Cluster, Headers, Record

DIMENSIONS: Final = 8
PARTITIONS: Final = 4
SPACE: Final = "00000000000000a1"
EVENTS_TOPIC: Final = "sim.events"
ITEMS_TOPIC: Final = "sim.items"
BAD: Final = "test.bad"  # header of records that must be rejected
RULES: Final = oracle.Rules(window=12, seen=8, categories=1_000)
_USERS: Final = tuple(f"u{n}" for n in range(20))
_ITEMS: Final = tuple(f"i{n}" for n in range(12))
# Written down here once more: the expectation must not follow a mistake in the code under test.
_WEIGHTS: Final = {
    "impression": 0.0, "view": 0.2, "add_to_cart": 0.6, "remove_from_cart": -0.4, "purchase": 1.0,
    "search": 0.5, "message": 0.1,
}  # fmt: skip


def vector_of(text: str, kind: str) -> list[float]:
    """A unit vector that nothing but its text decides."""
    digest = hashlib.sha256(f"{kind}:{text}".encode()).digest()
    raw = np.frombuffer(digest, "<i4")[:DIMENSIONS].astype(np.float64)
    return [float(x) for x in (raw / np.linalg.norm(raw)).astype(np.float32)]


class Engine:
    """An encoder that takes no time: what the updater asks of `model.engine.Engine`."""

    space = SPACE
    dimensions = DIMENSIONS
    foreteller = None

    def __init__(self) -> None:
        self.table = ItemTable(64, DIMENSIONS)
        self.release = SimpleNamespace(
            id="simulated", space=SPACE, parts=(), load_item_vectors=lambda: None
        )

    def encode(self, texts: Sequence[str], kind: str = "passage") -> Any:
        return np.array([vector_of(text, kind) for text in texts], np.float32)


@dataclass(frozen=True)
class Produced:
    """A record on its way to a topic."""

    at_s: float  # since the beginning
    topic: str
    key: bytes
    value: bytes | None
    headers: Headers = None


@dataclass
class Shop:
    """What happens in one world."""

    traffic: list[Produced] = field(default_factory=list)

    @classmethod
    def draw(cls, chance: random.Random, events: int, seconds: float, now_ms: int) -> Shop:
        """`events` records of shoppers, and those of items, over some seconds."""
        shop = cls()
        users = _USERS[: chance.randint(3, len(_USERS))]
        items = _ITEMS[: chance.randint(2, len(_ITEMS))]
        bursts = chance.random() < 0.5
        at_s = 0.0
        for n in range(events):
            if bursts:
                at_s = chance.choice((0.3, 0.5, 0.8)) * seconds
            else:
                at_s = chance.uniform(0, seconds)
            user = chance.choice(users)
            told = _event(chance, user, items, n, now_ms + int(1000 * at_s))
            value = json.dumps(told).encode()
            shop._add(at_s, EVENTS_TOPIC, user, value)
            if "event_id" in told and chance.random() < 0.1:
                shop._add(at_s + chance.uniform(0, 2), EVENTS_TOPIC, user, value)
            if chance.random() < 0.02:
                bad = Produced(at_s, EVENTS_TOPIC, user.encode(), b'{"type":"nod"}', [(BAD, b"")])
                shop.traffic.append(bad)
        for item in items:
            shop._add_item(chance, item, seconds)
        shop.traffic.sort(key=lambda record: record.at_s)
        return shop

    def _add_item(self, chance: random.Random, item: str, seconds: float) -> None:
        """Its text comes first, or at any time, or at the very moment of an event about it."""
        draw, at_s = chance.random(), 0.0
        if draw < 0.2:
            at_s = chance.uniform(0, seconds)
        elif draw < 0.5:
            name = f'"{item}"'.encode()
            about = [r.at_s for r in self.traffic if r.value and name in r.value] or [0.0]
            at_s = chance.choice((max(about), chance.choice(about)))
            at_s = max(0.0, at_s + chance.choice((0.02, 0.5)) * chance.uniform(-1, 1))
        self._add(at_s, ITEMS_TOPIC, item, _item(item))
        if draw < 0.05:  # the catalogue says it once more
            self._add(chance.uniform(0, seconds), ITEMS_TOPIC, item, _item(item))

    def _add(self, at_s: float, topic: str, key: str, value: bytes) -> None:
        self.traffic.append(Produced(at_s, topic, key.encode(), value))


def _item(item: str) -> bytes:
    number = int(item[1:])
    told = {"item_id": item, "title": f"Thing {number}", "category": ["All", f"Shelf {number % 4}"]}
    return json.dumps(told).encode()


def _event(
    chance: random.Random, user: str, items: Sequence[str], n: int, now_ms: int
) -> dict[str, Any]:
    late_ms = chance.choice((0, 0, 0, 5, 90_000, 86_400_000))
    told: dict[str, Any] = {"user_id": user, "ts": now_ms - late_ms}
    if int(user[1:]) % 2:
        told["event_id"] = f"e{n}"
    draw = chance.random()
    if draw < 0.02:
        return told | {"type": "forget"}
    if draw < 0.12:
        return told | {"type": "search", "query": chance.choice(("red", "green", "blue"))}
    if draw < 0.16:
        return told | {"type": "message", "text": f"Where is it? {n % 3}"}
    told |= {"item_id": chance.choice(items)}
    if draw < 0.4:
        bought = {"quantity": chance.randint(1, 3), "price": chance.randint(1, 900) / 100}
        return told | bought | {"type": "purchase", "currency": chance.choice(("USD", "EUR"))}
    kinds = ("view", "view", "view", "impression", "add_to_cart", "remove_from_cart")
    return told | {"type": chance.choice(kinds)}


class Expectation:
    """What the log says the profiles must be."""

    def __init__(self, cluster: Cluster) -> None:
        self._cluster = cluster
        self._texts: dict[str, tuple[str, list[str]]] = {}
        for log in cluster.logs[ITEMS_TOPIC]:
            for record in log:
                told = json.loads(record.value() or b"{}")
                self._texts[told["item_id"]] = (
                    item_text(told["title"], told["category"], "", ""),
                    told["category"],
                )

    def profiles(self) -> dict[str, oracle.Expected]:
        """User -> profile."""
        logs = self._cluster.logs[EVENTS_TOPIC]
        return oracle.fold([self._event(r) for log in logs for r in log if not is_bad(r)], RULES)

    def _event(self, record: Record) -> oracle.Event:
        told = json.loads(record.value() or b"{}")
        event_id, kind = told.get("event_id"), told["type"]
        event = oracle.Event(
            told["user_id"],
            source_key(self._cluster.ids[record.topic()], record.partition()),
            record.offset(),
            key64(event_id).to_bytes(8, "little") if event_id else None,
            told["ts"],
            kind,
        )
        if kind == "forget":
            return event
        event = replace(event, weight=_WEIGHTS[kind])
        if kind in ("search", "message"):
            words = told["query"] if kind == "search" else told["text"]
            return replace(event, text=True, vector=vector_of(words, "query"))
        words, path = self._texts.get(told["item_id"], ("", []))
        bought = kind == "purchase"
        ours = told.get("currency") == "USD"
        return replace(
            event,
            item_key=key64(told["item_id"]),
            category_key=key64(" > ".join(path[:2])) if path else 0,
            vector=vector_of(words, "passage") if words else None,
            spend=told["price"] * told["quantity"] if bought and ours else 0.0,
            foreign=bought and not ours,
        )


def is_bad(record: Record) -> bool:
    """Whether it must end among the dead letters."""
    return any(name == BAD for name, _ in record.headers() or ())


def user_of(record: Record) -> str:
    """Whose event it is."""
    return (record.key() or b"").decode()
