"""What the neighbours of every item must be, computed the plain way: event by event, in double
precision, from nothing but the events that count and the definition of a pair."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from profiles.neighbours import Neighbours
from profiles.schema import FLAG_TEXT, TYPE_CODE
from tests.oracle import FORGET, Event

DISTANCE = 7
BACKWARD = 0.7
HALF_LIFE_S = 30 * 86_400.0


@dataclass
class Tally:
    """One item's: (weight, time) of every event, and of every pair by neighbour."""

    own: list[tuple[float, int]] = field(default_factory=list)
    near: dict[int, list[tuple[float, int]]] = field(default_factory=lambda: defaultdict(list))


def fold(events: Iterable[Event], window: int = 50, remembered: int = 64) -> dict[int, Tally]:
    """Item key -> tally. Events in arrival order; given again, they count once."""
    next_offset: dict[tuple[str, int], int] = {}
    seen: dict[str, list[bytes]] = defaultdict(list)
    windows: dict[str, list[tuple[int, int, float, int, int]]] = defaultdict(list)
    tallies: dict[int, Tally] = defaultdict(Tally)
    for event in events:
        user = event.user_id
        if event.offset < next_offset.get((user, event.source), 0):
            continue
        next_offset[user, event.source] = event.offset + 1
        if event.event_key is not None:
            if event.event_key in seen[user]:
                continue
            if event.type == FORGET:
                seen[user] = []
            seen[user] = [*seen[user], event.event_key][-remembered:]
        elif event.type == FORGET:
            seen[user] = []
        if event.type == FORGET:
            windows[user] = []
            continue
        if event.weight == 0:
            continue
        if event.item_key and event.weight > 0:
            _pair(tallies, event, windows[user])
        entry = (
            event.t_ms,
            event.item_key,
            event.weight,
            TYPE_CODE[event.type],
            FLAG_TEXT if event.text else 0,
        )
        windows[user] = sorted([*windows[user], entry])[-window:]
    return dict(tallies)


def _pair(
    tallies: Mapping[int, Tally], event: Event, window: list[tuple[int, int, float, int, int]]
) -> None:
    now, t_ms = event.item_key, event.t_ms
    tallies[now].own.append((1.0, t_ms))
    for distance, (_, item, weight, *_rest) in enumerate(reversed(window[-DISTANCE:]), 1):
        if item and weight > 0:
            tallies[item].near[now].append((1 / distance, t_ms))
            tallies[now].near[item].append((BACKWARD / distance, t_ms))


def compare(
    stored: Mapping[int, Neighbours], expected: Mapping[int, Tally], rtol: float = 1e-4
) -> list[str]:
    """Every item whose stored tally differs, in words; for tallies below their bound."""
    differences = [f"{item:016x} should not exist" for item in stored.keys() - expected.keys()]
    differences += [f"{item:016x} is missing" for item in expected.keys() - stored.keys()]
    for item in sorted(stored.keys() & expected.keys()):
        got, want = stored[item], expected[item]
        times = [t for _, t in want.own] + [t for ws in want.near.values() for _, t in ws]
        now_ms = max(times)
        if got.updated_ms != now_ms:
            differences.append(f"{item:016x} updated_ms: {got.updated_ms} instead of {now_ms}")
        pairs = {
            "count": (got.count, _sum(want.own, now_ms)),
            "recent": (got.recent, _sum(want.own, now_ms, HALF_LIFE_S / 10)),
        }
        for other in got.near.keys() | want.near.keys():
            mass = _sum(want.near.get(other, []), now_ms)
            pairs[f"near {other:016x}"] = (got.near.get(other, 0.0), mass)
        differences += [
            f"{item:016x} {name}: {a} instead of {b}"
            for name, (a, b) in pairs.items()
            if abs(a - b) > rtol * b + 1e-30
        ]
    return differences


def _sum(
    weights: Iterable[tuple[float, int]], now_ms: int, half_life_s: float = HALF_LIFE_S
) -> float:
    return sum(w * 2.0 ** ((t - now_ms) / (1000.0 * half_life_s)) for w, t in weights)
