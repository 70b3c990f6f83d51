"""Marks, and writes that they guard, on a Redis that is thrown back."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import closing

import numpy as np
import pytest
import redis

from profiles.connection import Connection
from profiles.errors import WritesLost
from profiles.items import ItemStore, Origin
from profiles.marks import Marks
from profiles.schema import ItemRecord, Keys
from profiles.schema_doc import writer_acl
from profiles.store import ProfileStore
from stream.local_stack import RedisServer
from tests.profile_events import LAYOUT

pytestmark = pytest.mark.redis

P0, P1 = 11, 2**64 - 1  # sources


@pytest.fixture
def keys(namespace: str) -> Keys:
    return Keys(namespace)


@pytest.fixture
def marks(redis_client: redis.Redis, keys: Keys) -> Marks:
    return Marks(redis_client, keys)


def throw_back(client: redis.Redis, keys: Keys) -> Callable[[], None]:
    """Remember all that there is; calling the result brings it back."""
    held = {key: client.dump(key) for key in client.scan_iter(f"{keys.namespace}:*")}

    def back() -> None:
        client.flushdb()
        for key, value in held.items():
            client.restore(key, 0, value)

    return back


def test_marks_are_claimed_as_they_were_raised_and_never_go_down(marks: Marks) -> None:
    assert marks.claim([P0, P1]) == ({}, False)
    marks.advance({P0: 7, P1: 2**40})
    marks.advance({P0: 5})
    marks.advance({})
    assert marks.claim([P0, 3, P1]) == ({P0: 7, P1: 2**40}, False)


@pytest.mark.parametrize("older", [True, False])
def test_whether_the_namespace_is_older_is_said_once(marks: Marks, older: bool) -> None:
    marks.first(older=older)
    marks.first(older=not older)
    assert marks.claim([]) == ({}, older)


def test_nothing_is_saved_on_top_of_what_was_lost(
    redis_client: redis.Redis, keys: Keys, marks: Marks
) -> None:
    store = ProfileStore(redis_client, keys, LAYOUT, ttl_s=1_000, writer=1, marks=marks)
    marks.claim([P0])
    _save(store, "ann")
    back = throw_back(redis_client, keys)
    _save(store, "ben")
    back()
    with pytest.raises(WritesLost):
        _save(store, "ann")
    with pytest.raises(WritesLost):
        _save(store, "cem")
    with pytest.raises(WritesLost):
        marks.advance({P0: 9})
    with pytest.raises(WritesLost):
        marks.claim([P0])
    assert redis_client.exists(keys.profile("ann")) == 1
    assert redis_client.exists(keys.profile("ben"), keys.profile("cem")) == 0
    marks.begin_anew()
    assert marks.claim([P0]) == ({}, False)
    _save(store, "cem")
    assert redis_client.exists(keys.profile("cem")) == 1


def test_a_profile_that_lost_its_last_events_is_not_loaded(
    redis_client: redis.Redis, keys: Keys, marks: Marks
) -> None:
    store = ProfileStore(redis_client, keys, LAYOUT, ttl_s=1_000, writer=1, marks=marks)
    _save(store, "ann")
    back = throw_back(redis_client, keys)
    _save(store, "ann")
    back()
    with pytest.raises(WritesLost):
        store.load(["ann"])
    marks.begin_anew()
    assert len(store.load(["ann"])) == 1


def test_a_space_whose_items_were_lost_is_not_named(
    redis_client: redis.Redis, keys: Keys, marks: Marks
) -> None:
    items = ItemStore(redis_client, keys, marks=marks)
    items.put([ItemRecord("A-1", "Lamp")], ["0" * 16], [Origin(P0, 3)])
    back = throw_back(redis_client, keys)
    items.put_vectors("space", ["A-1"], ["0" * 16], np.ones((1, 4), np.float32))
    back()
    with pytest.raises(WritesLost):
        items.set_space("space")
    assert items.current_space() == ""


def test_who_was_told_of_a_loss_is_told_again(
    redis_client: redis.Redis, keys: Keys, marks: Marks
) -> None:
    """The next answer may come from the other of two primaries, which has it all."""
    back = throw_back(redis_client, keys)
    marks.claim([P0])
    onward = throw_back(redis_client, keys)
    back()
    with pytest.raises(WritesLost):
        marks.advance({})
    onward()
    with pytest.raises(WritesLost):
        marks.advance({})


def test_a_claim_that_was_lost_is_missed(
    redis_client: redis.Redis, keys: Keys, marks: Marks
) -> None:
    """Who was told a mark of a primary that died must not go on from it."""
    store = ProfileStore(redis_client, keys, LAYOUT, ttl_s=1_000, writer=1, marks=marks)
    back = throw_back(redis_client, keys)
    marks.claim([P0])
    back()
    with pytest.raises(WritesLost):
        _save(store, "ann")


def test_an_item_that_was_lost_is_missed(
    redis_client: redis.Redis, keys: Keys, marks: Marks
) -> None:
    items = ItemStore(redis_client, keys, marks=marks)
    back = throw_back(redis_client, keys)
    items.put([ItemRecord("A-1", "Lamp")], ["0" * 16], [Origin(P0, 3)])
    items.name_categories({1: "One"})
    back()
    with pytest.raises(WritesLost):
        marks.advance({P0: 4})


def test_nobody_leaves_the_waiting_set_whose_save_was_lost(
    redis_client: redis.Redis, keys: Keys, marks: Marks
) -> None:
    items = ItemStore(redis_client, keys, marks=marks)
    items.wait_for({"ann": [5]})
    back = throw_back(redis_client, keys)

    def serve(users: list[str]) -> None:
        marks.advance({})  # as a save would
        back()

    with pytest.raises(WritesLost):
        items.resolve_waiting(5, serve)
    assert redis_client.smembers(keys.waiting(5)) == {b"ann"}


def test_a_server_that_forgot_its_scripts_is_given_them_again(
    redis_client: redis.Redis, keys: Keys, marks: Marks
) -> None:
    items = ItemStore(redis_client, keys, marks=marks)
    marks.claim([P0])
    redis_client.script_flush()
    items.put([ItemRecord("A-1", "Lamp")], ["0" * 16], [Origin(P0, 3)])
    redis_client.script_flush()
    marks.advance({P0: 4})
    assert marks.claim([P0])[0] == {P0: 4}


def test_the_rights_that_the_schema_lists_are_enough(
    start_redis: Callable[..., RedisServer], keys: Keys
) -> None:
    server = start_redis()
    with redis.Redis.from_url(server.url) as admin:
        admin.execute_command(*writer_acl("updater", "secret", keys.namespace).split())
    with closing(Connection(server.url, "updater", "secret").open()) as client:
        marks = Marks(client, keys, server.url)
        marks.first(older=False)
        marks.claim([P0])
        marks.advance({P0: 1})
        _save(ProfileStore(client, keys, LAYOUT, ttl_s=60, writer=1, marks=marks), "ann")
        _save(ProfileStore(client, keys, LAYOUT, ttl_s=60, writer=2), "ben")
        items = ItemStore(client, keys, server.url, marks)
        items.put([ItemRecord("A-1", "Lamp")], ["0" * 16], [Origin(P0, 3)])
        items.wait_for({"ann": [5]})
        items.resolve_waiting(5, lambda users: None)


def _save(store: ProfileStore, user: str) -> None:
    """Of somebody who did nothing."""
    profiles = store.load([user])
    assert store.save([user], profiles, [0], {}, 1_800_000_000.0) == []
