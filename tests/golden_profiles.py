"""Profiles in hex, with what they mean: for whoever reads them in another language.

    python -m tests.golden_profiles > docs/golden/profiles.json

Ages are whole multiples of the half-lives and vectors are dyadic, so that every number in here
is exact on any machine.
"""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import numpy as np

from profiles import arithmetic, outlook
from profiles.arithmetic import Layout
from profiles.schema import key64, source_key
from tests.oracle import FORGET, Event
from tests.profile_events import NOW_MS, SPACE, Shelf, event_key

LAYOUT = Layout(4, (1_800.0, 86_400.0, 2_592_000.0), window=3, seen=2, categories=2, own_items=2)
_LONG_MS = 3 * 2_592_000_000  # of own items; three half-lives of the longest interest
_VECTORS = {"A-1": (0.5, 0.5, 0.5, 0.5), "A-2": (1.0, 0.0, 0.0, 0.0), "Ü-3": (0.0, 0.0, -1.0, 0.0)}
_CATEGORIES = {"A-1": "Books > Poetry", "A-2": "Garden", "Ü-3": "Käse"}
_SOURCE = source_key("5a6yJlRzQ7uW0Yx2Jm8n0g", 7)


def _on(item_id: str, type: str, t_ms: int, weight: float, event_id: str = "") -> Event:
    return Event(
        "u1",
        _SOURCE,
        0,
        event_key(event_id) if event_id else None,
        t_ms,
        type,
        weight,
        key64(item_id),
        key64(_CATEGORIES[item_id]),
        _VECTORS[item_id],
    )


def _histories() -> dict[str, list[Event]]:
    view = _on("A-1", "view", NOW_MS - _LONG_MS, 0.25, "e-1")
    buy = replace(_on("A-2", "purchase", NOW_MS, 1.0, "e-2"), spend=19.5)
    return {
        "one view": [view],
        "a view, and a purchase three months later": [view, buy],
        "more than the window, the ids and the categories hold; a dislike; another currency": [
            view,
            buy,
            replace(_on("A-2", "purchase", NOW_MS, 1.0, "e-3"), foreign=True),
            _on("Ü-3", "remove_from_cart", NOW_MS, -0.5, "e-4"),
            _on("A-1", "impression", NOW_MS, 0.0),
        ],
        "an item without a text, which waits; a search": [
            replace(_on("A-1", "click", NOW_MS, 0.5), vector=None),
            Event("u1", _SOURCE, 0, None, NOW_MS, "search", 0.5, vector=(0, 1, 0, 0), text=True),
        ],
        "erased": [view, buy, Event("u1", _SOURCE, 0, None, NOW_MS, FORGET)],
    }


def golden() -> list[dict[str, Any]]:
    """One object per profile: name, glance, state and fence in hex, and their contents."""
    out = []
    for name, history in _histories().items():
        events = [replace(event, offset=1_000 + i) for i, event in enumerate(history)]
        shelf = Shelf(LAYOUT)
        shelf.fold(events)
        profiles = shelf.load(["u1"])
        names = {key64(category): category for category in _CATEGORIES.values()}
        state = shelf.states["u1"]
        fence = arithmetic.write_fence(3, 0x0123456789ABCDEF, 1_790_000_000, profiles.watermarks[0])
        out.append(
            {
                "name": name,
                "state": state.hex(),
                "fence": fence.hex(),
                "glance": json.loads(arithmetic.glances(profiles, names)[0]),
                "holds": contents(state, fence),
            }
        )
    next_, heads = outlook.encode(
        np.array([[0.5, 0.5, -0.5, 0.5]], np.float32),
        {"purchase": np.array([0.25], np.float32), "churn": np.array([0.5], np.float32)},
        "trained-0123456789abcdef",
        SPACE,
        [2],
        [NOW_MS - _LONG_MS],
        NOW_MS,
    )[0]
    out[0] |= {"next": next_.hex(), "heads": json.loads(heads)}
    out[0]["outlook_holds"] = outlook_contents(next_, heads, out[0]["holds"]["space"])
    return out


def outlook_contents(next_: bytes, heads: str, space: str) -> dict[str, Any]:
    """What the outlook's two fields say beside a profile of revision 3."""
    told = outlook.decode(next_, heads.encode(), space, 3, NOW_MS / 1000)
    assert told is not None
    assert told.next_interest is not None
    return {**vars(told), "next_interest": told.next_interest.tolist()}


def contents(state: bytes, fence: bytes) -> dict[str, Any]:
    """What the two fields say, in JSON; 64-bit keys in 16 hex digits."""
    profile = arithmetic.decode("u1", state, fence)
    revision, writer, expires_s, _ = arithmetic.read_fence(fence)
    return {
        "space": profile.space,
        "updated_ms": profile.updated_ms,
        "first_ms": profile.first_ms,
        "events": profile.events,
        "pending": profile.pending,
        "pending_lost": profile.pending_lost,
        "counts": profile.counts,
        "spend": profile.spend,
        "foreign_purchases": profile.foreign_purchases,
        "other_categories": profile.other_categories,
        "half_lives_s": list(profile.half_lives_s),
        "masses": profile.masses.tolist(),
        "sums": profile.sums.tolist(),
        "window": [
            {
                "t_ms": int(entry["t_ms"]),
                "item": f"{entry['item']:016x}",
                "weight": float(entry["weight"]),
                "type": int(entry["type"]),
                "flags": int(entry["flags"]),
            }
            for entry in profile.window
        ],
        "seen": [f"{key:016x}" for key in profile.seen.tolist()],
        "categories": {f"{key:016x}": mass for key, mass in profile.categories.items()},
        "own": {f"{key:016x}": mass for key, mass in profile.own.items()},
        "fence": {"revision": revision, "writer": f"{writer:016x}", "expires_s": expires_s},
        "watermark": {f"{key:016x}": offset for key, offset in profile.watermark.items()},
    }


if __name__ == "__main__":
    print(json.dumps(golden(), indent=1, ensure_ascii=False))
