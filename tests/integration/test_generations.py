"""Generations of profiles on a real Redis: what a flip lets nobody do any more."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import closing

import pytest
import redis

from profiles.connection import Connection
from profiles.errors import GenerationRetired
from profiles.generations import BEFORE, BUILDING, GOING, LIVE, READY, Generations, follow
from profiles.items import ItemStore
from profiles.marks import Marks
from profiles.schema import Keys
from profiles.schema_doc import writer_acl
from profiles.store import ProfileStore
from stream.local_stack import RedisServer
from tests.profile_events import LAYOUT

pytestmark = pytest.mark.redis


@pytest.fixture
def generations(redis_client: redis.Redis, namespace: str) -> Generations:
    return Generations(redis_client, namespace)


def _store(client: redis.Redis, marks: Marks) -> ProfileStore:
    return ProfileStore(client, marks.keys, LAYOUT, ttl_s=1_000, writer=1, marks=marks)


def _save(store: ProfileStore, user: str) -> list[int]:
    return store.save([user], store.load([user]), [0], {}, time.time())


def test_a_worker_writes_nothing_more_into_what_was_live(
    redis_client: redis.Redis, namespace: str, generations: Generations
) -> None:
    marks = Marks(redis_client, Keys(namespace), follows=True)
    store, items = _store(redis_client, marks), ItemStore(redis_client, marks.keys, marks=marks)
    assert _save(store, "ann") == []
    number = generations.begin()
    assert _save(store, "ann") == []
    generations.ready(number)
    assert generations.flip(number, 0)
    for write in (
        lambda: _save(store, "ann"),
        lambda: marks.advance({}),
        lambda: marks.claim([1]),
        lambda: items.name_categories({1: "Lamps"}),
    ):
        with pytest.raises(GenerationRetired):
            write()
    marks.begin_anew()
    assert marks.keys.generation == number
    store.forget_cached()
    assert _save(store, "ann") == []
    assert redis_client.exists(Keys(namespace, number).profile("ann")) == 1


def test_a_worker_that_looked_before_a_flip_writes_nothing_after_it(
    redis_client: redis.Redis, namespace: str, generations: Generations
) -> None:
    """Its trail has nothing to miss yet."""
    number = generations.begin()
    generations.ready(number)
    marks = Marks(redis_client, Keys(namespace), follows=True)
    assert generations.flip(number, 0)
    with pytest.raises(GenerationRetired):
        marks.claim([])


def test_who_makes_a_generation_writes_before_and_after_the_flip(
    redis_client: redis.Redis, namespace: str, generations: Generations
) -> None:
    """Its fences keep it from doing harm, and its last saves must not be cut off."""
    number = generations.begin()
    marks = Marks(redis_client, Keys(namespace, number))
    store = _store(redis_client, marks)
    assert _save(store, "ann") == []
    generations.ready(number)
    assert generations.flip(number, 0)
    assert _save(store, "ben") == []


def test_only_what_is_ready_or_was_live_becomes_live_and_only_once(
    generations: Generations, redis_client: redis.Redis, namespace: str
) -> None:
    assert (generations.live(), generations.states()) == (0, {0: LIVE})
    one, two = generations.begin(), generations.begin()
    assert (one, two) == (1, 2)
    assert not generations.flip(one, 0)
    generations.ready(one)
    generations.ready(two)
    assert generations.flip(one, 0)
    assert not generations.flip(two, 0)  # somebody else was faster
    assert generations.states() == {0: BEFORE, 1: LIVE, 2: READY}
    keys = Keys(namespace)
    follow(redis_client, keys)
    assert keys.generation == 1
    assert generations.flip(0, 1)
    assert generations.states() == {0: LIVE, 1: BEFORE, 2: READY}
    assert generations.begin() == 3
    assert generations.states()[3] == BUILDING


def test_a_removal_takes_the_generations_own_keys_and_goes_on_where_it_ended(
    generations: Generations, redis_client: redis.Redis, namespace: str
) -> None:
    number = generations.begin()
    old, new = Keys(namespace), Keys(namespace, number)
    for keys in (old, new):
        for user in range(1_200):
            redis_client.hset(keys.profile(str(user)), "state", "x")
        redis_client.sadd(keys.waiting(1), "ann")
        redis_client.hset(keys.marks(), "older", "0")
    redis_client.set(old.current_space(), "s")
    assert not generations.give_up(0)
    generations.ready(number)
    assert generations.flip(number, 0)
    assert generations.give_up(0)
    next(generations.remove(0, per_s=0))
    assert generations.states() == {0: GOING, 1: LIVE}
    assert max(generations.remove(0, per_s=0)) > 0
    assert generations.states() == {1: LIVE}
    left = {key.decode() for key in redis_client.scan_iter(f"{namespace}:*")}
    assert not any(":profile:" in key and ":g1:" not in key for key in left)
    assert {old.marks(), old.current_space(), new.waiting(1)} <= left
    assert redis_client.exists(*(new.profile(str(user)) for user in range(1_200))) == 1_200


def test_a_worker_and_a_rebuild_need_no_more_rights_than_the_page_says(
    start_redis: Callable[..., RedisServer], namespace: str
) -> None:
    server = start_redis()
    with redis.Redis.from_url(server.url) as admin:
        admin.execute_command(*writer_acl("updater", "secret", namespace).split())
    with closing(Connection(server.url, "updater", "secret").open()) as client:
        generations = Generations(client, namespace)
        number = generations.begin()
        generations.ready(number)
        assert generations.flip(number, 0)
        marks = Marks(client, Keys(namespace), follows=True)
        assert _save(_store(client, marks), "ann") == []
        assert generations.give_up(0)
        assert list(generations.remove(0, per_s=0))
