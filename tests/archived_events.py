"""Shop events for archive tests, seeded, as the records of one partition."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence

from stream import events as ev
from stream.archive import Archive, Pending
from stream.times import HOUR_MS

T0_MS = 1_700_000_000_000 // (24 * HOUR_MS) * 24 * HOUR_MS  # a midnight


def records(n: int, seed: int = 1, span_ms: int = 4 * HOUR_MS, users: int = 20) -> list[bytes]:
    """n valid events of random types at random times, in no order of time."""
    chance = random.Random(seed)
    out = []
    for i in range(n):
        type_ = chance.choice(["view", "click", "purchase", "review", "search", "message"])
        event = {
            "type": type_,
            "user_id": f"user-{chance.randrange(users)}",
            "ts": T0_MS + chance.randrange(span_ms),
            "event_id": f"event-{seed}-{i}",
        }
        if type_ in ("search", "message"):
            event["query" if type_ == "search" else "text"] = f"blue lamp {i}"
        else:
            event["item_id"] = f"item-{chance.randrange(50)}"
        if type_ == "review":
            event["rating"] = 4.5
        out.append(json.dumps(event).encode())
    return out


def parsed(values: Sequence[bytes]) -> list[ev.Event]:
    found = ev.parse(values, [T0_MS * 2] * len(values), 0)
    assert not found.rejects
    return found.events


def write(archive: Archive, events: list[ev.Event], first: int, end: int, source: int = 7) -> int:
    """Archive events[first:end] as the offsets of one partition."""
    pending = Pending(source, 0, first, first)
    pending.add(range(first, end), events[first:end], end)
    return archive.write(pending)
