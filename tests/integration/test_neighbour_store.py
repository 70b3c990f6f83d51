"""Items' tallies on a real Redis: saved once, refused where another writer was first."""

from __future__ import annotations

import numpy as np
import pytest
import redis

from profiles import RedisUnavailable, neighbours, schema
from profiles.neighbour_store import NeighbourStore
from profiles.neighbours import Pairs, TallyLayout
from profiles.schema import Keys

pytestmark = pytest.mark.redis

NOW_S, NOW_MS = 4_000_000_000.0, 1_760_000_000_000  # Redis expires by its own clock
DAY_S = 86_400
LAYOUT = TallyLayout()


def store_of(client: redis.Redis, namespace: str, writer: int) -> NeighbourStore:
    return NeighbourStore(client, Keys(namespace), LAYOUT, ttl_s=DAY_S, writer=writer)


def pairs(*triples: tuple[int, int, int]) -> Pairs:
    """(item, neighbour, offset) of one origin, in one record."""
    entries = np.zeros(len(triples), schema.PAIR_ENTRY)
    entries["item"], entries["neighbour"], entries["offset"] = zip(*triples, strict=True)
    entries["t_ms"], entries["weight"] = NOW_MS, 1.0
    return Pairs(entries, np.full(len(triples), 7, np.uint64), np.zeros(len(triples), np.int64))


def folded(store: NeighbourStore, items: list[int], more: Pairs) -> neighbours.Tallies:
    tallies = store.load(items)
    rows = np.asarray([items.index(item) for item in more.entries["item"].tolist()])
    neighbours.fold(tallies, rows, more, LAYOUT)
    return tallies


def test_what_was_saved_is_loaded(redis_client: redis.Redis, namespace: str) -> None:
    store = store_of(redis_client, namespace, 1)
    items = list(range(1, 601))  # more than a script call takes
    more = pairs(*((item, item + 1, 5) for item in items), *((item, 0, 5) for item in items))
    assert store.save(items, folded(store, items, more), range(len(items)), NOW_S) == []
    got = store.load([3, 999])
    assert np.frombuffer(got.near[0], schema.NEAR_ENTRY).tolist() == [(4, 1.0)]
    assert (got.header["count"].tolist(), got.watermarks) == ([1.0, 0.0], [{7: 6}, {}])
    assert redis_client.expiretime(Keys(namespace).neighbours(3)) == int(NOW_S) + DAY_S


def test_a_save_onto_another_fence_is_refused(redis_client: redis.Redis, namespace: str) -> None:
    first, second = (store_of(redis_client, namespace, writer) for writer in (1, 1 << 63))
    mine, theirs = (folded(s, [1, 2], pairs((1, 2, 5), (2, 1, 5))) for s in (first, second))
    assert first.save([1, 2], mine, [0], NOW_S) == []
    assert second.save([1, 2], theirs, [0, 1], NOW_S) == [0]
    again = second.load([1])
    assert neighbours.fold(again, np.array([0]), pairs((1, 2, 5)), LAYOUT).replayed == 1


def test_a_redis_that_is_away_is_told(namespace: str) -> None:
    with redis.Redis(port=1) as client, pytest.raises(RedisUnavailable):
        store_of(client, namespace, 1).load([1])
