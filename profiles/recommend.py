"""What to show a shopper next: candidates from four sources, ranked by four signals.

Candidates are the neighbours of the latest items, the shopper's own items, and the items
nearest to their interests and to their next interest; the ranker of the live release, or the
weights by hand, score them. A plan as those of `plans.py`, which has the methods: five round
trips, whatever the shopper.

 1. the profile, with its outlook;
 2. neighbours of its latest items, the ranker of its space;
 3. the nearest items of its space;
 4. what the candidates are called, and their counts;
 5. their vectors in the profile's space.

The window encoder needs torch, which no reader has: its vector is the outlook's, which a worker
computes. Where there is none, or one of another space, the signal `next_interest` is 0.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from . import arithmetic, neighbours, ranking, schema
from .arithmetic import Floats, Profile
from .neighbours import Neighbours
from .schema import ItemRecord

if TYPE_CHECKING:
    from .plans import Plan, Plans

_NEIGHBOURS: Final = 150  # candidates from co-visitation
_NEAREST: Final = 50  # and from the text


@dataclass(frozen=True)
class Recommendation:
    """An item to show, and why. Scores order one shopper's items and mean nothing beyond that."""

    item_id: str
    score: float
    signals: dict[str, float]  # by the names in `ranking.SIGNALS`
    title: str = ""
    category: tuple[str, ...] = ()


def plan(reader: Plans, user_id: str, k: int, exclude_seen: bool) -> Plan[list[Recommendation]]:
    """See ProfileReader.recommend."""
    profile = yield from reader._get(user_id)
    keys = reader._keys
    latest = list(dict.fromkeys(ranking.liked(profile.window)["item"][-ranking.DEPTH :].tolist()))
    replies = yield [
        ("HGETALL", keys.ranker(profile.space)),
        *(("HMGET", keys.neighbours(item), schema.TALLY, schema.NEAR) for item in latest),
    ]
    weights = ranking.from_fields(_pairs(replies[0]))
    of = {item: neighbours.decode(*reply) for item, reply in zip(latest, replies[1:], strict=True)}
    near = ranking.nearby(profile.window, of)
    own = ranking.own_items(profile.own, profile.window, profile.updated_ms, profile.half_lives_s)
    wanted = _wanted(profile)
    items = list(dict.fromkeys([*own, *ranking.top(near, _NEIGHBOURS)]))
    queries = [arithmetic.unit(vector) for vector in wanted if vector.any()]
    for nearest in (yield from reader._nearest_of_each(queries, profile.space, _NEAREST)):
        items += [schema.key64(item_id) for item_id, _ in nearest]
    items = list(dict.fromkeys(items))
    if exclude_seen:
        seen = {*own, *ranking.liked(profile.window)["item"].tolist()}
        items = [item for item in items if item not in seen]
    known, counts = yield from _described(reader, items)
    cosines = yield from _cosines(reader, profile, known, wanted)
    return _ranked(profile, weights, known, counts, near, own, cosines)[:k]


def _wanted(profile: Profile) -> Floats:
    """(2, D) in the order of the signals: next interest, and interests, whose products with an
    item's vector are its (mean) cosines; zeros where nothing is known."""
    interest = arithmetic.unit(profile.sums).mean(axis=0)
    outlook = profile.outlook
    if outlook is None or outlook.next_interest is None:
        return np.stack([np.zeros_like(interest), interest])
    return np.stack([outlook.next_interest, interest])


def _described(
    reader: Plans, items: Sequence[int]
) -> Plan[tuple[dict[int, ItemRecord], dict[int, Neighbours]]]:
    """Records and counts of those of the items that have a name and are not deleted."""
    keys = reader._keys
    replies = yield [("HGET", keys.item(item), "record") for item in items] + [
        ("HGET", keys.neighbours(item), schema.TALLY) for item in items
    ]
    records = {
        item: schema.read_record(raw) for item, raw in zip(items, replies, strict=False) if raw
    }
    tallies = replies[len(items) :]
    counts = {item: neighbours.decode(tally) for item, tally in zip(items, tallies, strict=True)}
    return {item: record for item, record in records.items() if not record.deleted}, counts


def _cosines(
    reader: Plans, profile: Profile, known: dict[int, ItemRecord], wanted: Floats
) -> Plan[dict[int, Floats]]:
    """Item key -> (2,) cosines to what is wanted, of items with a vector in the profile's space."""
    if not wanted.any():
        return {}
    replies = yield [
        ("HGET", reader._keys.vectors(profile.space, item), record.item_id)
        for item, record in known.items()
    ]
    return {
        item: wanted @ np.frombuffer(raw, dtype="<f4", offset=8)
        for item, raw in zip(known, replies, strict=True)
        if raw is not None
    }


def _ranked(
    profile: Profile,
    weights: ranking.Weights,
    known: dict[int, ItemRecord],
    counts: dict[int, Neighbours],
    near: dict[int, float],
    own: dict[int, float],
    cosines: dict[int, Floats],
) -> list[Recommendation]:
    if not known:
        return []
    now_ms = max(count.updated_ms for count in counts.values())
    events = np.array([counts[item].count * counts[item].share(now_ms) for item in known])
    days = ranking.own_days(profile.window, now_ms)
    signals = np.zeros((len(known), len(ranking.SIGNALS)), dtype=np.float32)
    features = np.zeros((len(known), 3), dtype=np.float32)
    for row, item in enumerate(known):
        recent = counts[item].recent_at(now_ms)
        features[row] = ranking.item_features(events[row], recent, days.get(item, 0.0))
        signals[row, :2] = cosines.get(item, 0.0)
        signals[row, 2] = ranking.covisitation(near.get(item, 0.0), float(events[row]))
        signals[row, 3] = own.get(item, 0.0)
    shopper = ranking.shopper_features(profile.window, profile.events)
    scores = ranking.score(weights, signals, features, shopper)
    names = list(known.values())
    order = sorted(range(len(names)), key=lambda i: (-scores[i], names[i].item_id))
    return [
        Recommendation(
            names[i].item_id,
            float(scores[i]),
            dict(zip(ranking.SIGNALS, signals[i].tolist(), strict=True)),
            names[i].title,
            names[i].category,
        )
        for i in order
    ]


def _pairs(reply: Any) -> dict[bytes, bytes]:
    """HGETALL as a client with or without RESP 3 gives it."""
    if isinstance(reply, dict):
        return reply
    return dict(zip(reply[::2], reply[1::2], strict=True))
