"""Items on a real Redis: which record stands, whose vectors are old, who waits for what."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import closing
from dataclasses import replace
from typing import Any, cast

import numpy as np
import pytest
import redis

from profiles import Connection, RedisUnavailable
from profiles.items import ItemStore, Origin
from profiles.schema import WAITING_TTL_S, ItemRecord, Keys, key64, read_record
from profiles.schema_doc import writer_acl
from stream.local_stack import RedisServer
from tests.between import Between

pytestmark = pytest.mark.redis

SPACE = "000000000000feed"
OLD, NEW = "00" * 8, "11" * 8  # versions of a text
TOPIC, TOPIC_ANEW = 1, 2
LAMP = ItemRecord("A-1", "Lamp", ("Home", "Light", "Desk"), "Ikea", 19.5, "EUR", "Bright.")
KEY = key64("A-1")


@pytest.fixture
def items(redis_client: redis.Redis, namespace: str) -> ItemStore:
    return ItemStore(redis_client, Keys(namespace))


def named(title: str) -> ItemRecord:
    return ItemRecord("A-1", title)


def test_a_record_is_kept_as_it_was(items: ItemStore) -> None:
    items.put([LAMP], [OLD], [Origin(TOPIC, 0)])
    assert items.records([KEY, key64("unknown")]) == {KEY: (LAMP, OLD)}
    assert items.records([]) == {}
    assert LAMP.category_name == "Home > Light"


def test_a_record_of_a_later_version_is_read_as_far_as_it_is_known() -> None:
    raw = json.dumps({"item_id": "A-1", "title": "Lamp", "category": ["Home"], "colour": "red"})
    assert read_record(raw.encode()) == ItemRecord("A-1", "Lamp", ("Home",))


@pytest.mark.parametrize(
    ("first", "second", "stands"),
    [
        (Origin(TOPIC, 7), Origin(TOPIC, 8), "second"),
        (Origin(TOPIC, 8), Origin(TOPIC, 7), "first"),
        (Origin(TOPIC, 9), Origin(TOPIC, 10), "second"),  # numbers, not words
        (Origin(TOPIC, 8), Origin(TOPIC, 8), "first"),
        (Origin(TOPIC, 8), Origin(TOPIC_ANEW, 0), "second"),
        (Origin(TOPIC, 8), None, "first"),
        (None, Origin(TOPIC, 0), "second"),
        (None, None, "first"),
    ],
)
def test_the_catalogue_beats_events_and_its_later_offset_the_earlier(
    items: ItemStore, first: Origin | None, second: Origin | None, stands: str
) -> None:
    items.put([named("first")], [OLD], [first])
    items.put([named("second")], [NEW], [second])
    assert items.records([KEY])[KEY] == (named(stands), OLD if stands == "first" else NEW)


def test_a_changed_text_is_announced_once(items: ItemStore) -> None:
    start = items.changes_end()
    items.put([LAMP, ItemRecord("A-2", "Table")], [OLD, OLD], [Origin(TOPIC, 0), None])
    position, changed = items.changes_since(start)
    assert changed == {KEY: OLD, key64("A-2"): OLD}
    assert items.changes_since(position) == (position, {})
    items.put([LAMP], [OLD], [Origin(TOPIC, 1)])  # the price, say
    items.put([named("stale")], [NEW], [Origin(TOPIC, 0)])
    assert items.changes_since(position) == (position, {})
    items.put([named("Bright lamp")], [NEW], [Origin(TOPIC, 2)])
    end, changed = items.changes_since(position)
    assert changed == {KEY: NEW}
    assert end == items.changes_end()


def test_a_vector_of_an_older_text_is_not_given(items: ItemStore) -> None:
    vector = np.eye(4, dtype=np.float32)[1]
    items.put([LAMP], [OLD], [None])
    items.put_vectors(SPACE, ["A-1"], [OLD], vector[None])
    got = items.vectors(SPACE, {"A-1": OLD, "A-2": OLD})
    assert list(got) == ["A-1"]
    np.testing.assert_array_equal(got["A-1"], vector)
    assert items.vectors(SPACE, {"A-1": NEW}) == {}
    assert items.vectors("000000000000beef", {"A-1": OLD}) == {}
    items.drop_vectors(SPACE, ["A-1", "A-2"])
    assert items.vectors(SPACE, {"A-1": OLD}) == {}


def test_categories_have_names(items: ItemStore) -> None:
    items.name_categories({})
    items.name_categories({key64("Käse"): "Käse", 1: "One"})
    assert items.category_names([key64("Käse"), 1, 2]) == {key64("Käse"): "Käse", 1: "One"}
    assert items.category_names([]) == {}


def test_who_waits_is_called_once_and_waits_on_if_that_fails(
    items: ItemStore, redis_client: redis.Redis, namespace: str
) -> None:
    users = {f"user {i} ☃" for i in range(2_500)}
    items.wait_for({user_id: [KEY] for user_id in users})
    items.wait_for({"user 0 ☃": [KEY, 5]})
    assert 0 < redis_client.ttl(Keys(namespace).waiting(KEY)) <= WAITING_TTL_S

    def fail(_: list[str]) -> None:
        raise RedisUnavailable

    with pytest.raises(RedisUnavailable):
        items.resolve_waiting(KEY, fail)
    called: list[str] = []
    items.resolve_waiting(KEY, called.extend)
    assert sorted(called) == sorted(users)
    items.resolve_waiting(KEY, called.extend)
    assert len(called) == len(users)
    items.resolve_waiting(5, called.extend)
    assert called[-1] == "user 0 ☃"


def test_vector_sets_are_used_where_redis_has_them(
    redis_server: RedisServer, redis_url: str, namespace: str
) -> None:
    def before_8(request: bytes) -> bytes:
        return request.replace(b"VADD", b"NADD")

    with closing(Between(redis_server.port, on_request=before_8)) as wire:
        url = redis_url.replace(str(redis_server.port), str(wire.port))
        for at, has in [(redis_url, True), (url, False)]:
            with closing(Connection(at).open()) as client:
                items = ItemStore(client, Keys(namespace))
                assert items.has_vector_sets() is has
                check_that_the_latest_text_has_its_vector(items, client, Keys(namespace))
                client.flushdb()


def check_that_the_latest_text_has_its_vector(
    items: ItemStore, client: redis.Redis, keys: Keys
) -> None:
    """What a slow encoder brings late is left out: of an old text, or of a deleted item."""
    old, new = np.eye(4, dtype=np.float32)[:2]
    indexed = items.has_vector_sets()

    def index(command: str, *args: str) -> Any:
        return cast(Any, client).execute_command(command, keys.index(SPACE), *args)

    ids = [f"A-{i}" for i in range(1, 41)]
    records = [ItemRecord(item_id, "Lamp") for item_id in ids]
    items.put(records, [OLD] * 40, [Origin(TOPIC, 0)] * 40)
    items.put_vectors(SPACE, ids, [OLD] * 40, np.tile(old, (40, 1)))
    assert len(items.vectors(SPACE, dict.fromkeys(ids, OLD))) == 40
    assert not indexed or index("VCARD") == 40
    items.put([LAMP], [NEW], [Origin(TOPIC, 1)])
    items.put_vectors(SPACE, ["A-1"], [NEW], new[None])
    items.put_vectors(SPACE, ["A-1"], [OLD], old[None])
    np.testing.assert_array_equal(items.vectors(SPACE, {"A-1": NEW})["A-1"], new)
    if indexed:
        kept = np.array(index("VEMB", "A-1"), dtype=np.float32)
        np.testing.assert_allclose(kept, new, atol=1e-6)
    items.put([replace(LAMP, deleted=True)], [NEW], [Origin(TOPIC, 2)])
    items.drop_vectors(SPACE, ["A-1"])
    items.put_vectors(SPACE, ["A-1", "unknown"], [NEW, NEW], np.stack([new, new]))
    assert items.vectors(SPACE, {"A-1": NEW, "unknown": NEW}) == {}
    assert not indexed or index("VCARD") == 39


def test_a_deletion_keeps_out_what_events_say_and_gives_way_to_the_catalogue(
    items: ItemStore,
) -> None:
    items.put([ItemRecord("A-1", deleted=True)], [OLD], [Origin(TOPIC, 3)])
    items.put([LAMP], [NEW], [None])
    items.put([named("earlier")], [NEW], [Origin(TOPIC, 2)])
    assert items.records([KEY])[KEY][0].deleted
    items.put([LAMP], [NEW], [Origin(TOPIC, 4)])
    assert items.records([KEY]) == {KEY: (LAMP, NEW)}


def test_items_that_users_wait_for_are_named(items: ItemStore) -> None:
    assert items.awaited([]) == set()
    items.wait_for({"u": [KEY, 5]})
    assert items.awaited([7, KEY, 5, 6]) == {KEY, 5}
    items.resolve_waiting(5, lambda users: None)
    assert items.awaited([5, KEY]) == {KEY}


def test_the_acl_of_the_schema_page_is_enough_for_items(
    start_redis: Callable[..., RedisServer], namespace: str
) -> None:
    server = start_redis()
    with redis.Redis.from_url(server.url) as admin:
        admin.execute_command(*writer_acl("updater", "secret", namespace).split())
    with closing(Connection(server.url, "updater", "secret").open()) as client:
        items = ItemStore(client, Keys(namespace))
        items.put([LAMP], [OLD], [Origin(TOPIC, 0)])
        items.put_vectors(SPACE, ["A-1"], [OLD], np.eye(4, dtype=np.float32)[:1])
        assert list(items.vectors(SPACE, {"A-1": OLD})) == ["A-1"]
        items.drop_vectors(SPACE, ["A-1"])
        items.set_space(SPACE)
        items.name_categories({1: "One"})
        assert items.category_names([1]) == {1: "One"}
        assert items.records([KEY])[KEY] == (LAMP, OLD)
        items.wait_for({"u": [KEY]})
        assert items.awaited([KEY]) == {KEY}
        items.resolve_waiting(KEY, lambda users: None)
        assert items.changes_since("0-0") == (items.changes_end(), {KEY: OLD})
    with closing(Connection(server.url, "updater", "secret").open()) as client:
        elsewhere = ItemStore(client, Keys("another"))
        with pytest.raises(RedisUnavailable, match=r"docs/schema\.md"):
            elsewhere.put([LAMP], [OLD], [Origin(TOPIC, 0)])
