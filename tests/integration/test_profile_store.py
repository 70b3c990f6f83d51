"""Saves on a real Redis: each event counts once, whoever else writes and whatever breaks."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing
from dataclasses import replace

import numpy as np
import pytest
import redis

from profiles import (
    Connection,
    LayoutMismatch,
    Profile,
    ProfileReader,
    RedisUnavailable,
    SchemaTooNew,
    StateCorrupt,
    arithmetic,
    outlook,
)
from profiles.arithmetic import Layout, Profiles
from profiles.fates import Fates
from profiles.schema import SCHEMA_VERSION, Keys
from profiles.schema_doc import writer_acl
from profiles.store import ProfileStore
from stream.local_stack import RedisServer
from tests import oracle
from tests.between import Between
from tests.oracle import Event
from tests.profile_events import (
    ITEM_KEYS,
    LAYOUT,
    NOW_MS,
    RULES,
    SOURCES,
    SPACE,
    columns,
    event_key,
    in_topic,
    item_event,
)

pytestmark = pytest.mark.redis

TTL_S = 100_000
LATER = (SCHEMA_VERSION + 1).to_bytes(2, "little")
NOW_S = time.time()  # expiries are checked by Redis, against the real clock
CATEGORY_NAMES = {1: "Garden"}


OpenStore = Callable[..., ProfileStore]


@pytest.fixture(params=[0, 200], ids=["uncached", "cached"])
def open_store(namespace: str, request: pytest.FixtureRequest) -> Iterator[OpenStore]:
    """`open_store(url, ttl_s=…)`: a store of this test's namespace, closed at its end. Whatever a
    store promises, it promises with a cache and without."""
    cached_by_default: int = request.param
    with ExitStack() as stack:

        def open_(
            connection: Connection | str,
            *,
            writer: int = 7,
            layout: Layout = LAYOUT,
            ttl_s: float = TTL_S,
            cached: int = cached_by_default,
        ) -> ProfileStore:
            connection = Connection(connection) if isinstance(connection, str) else connection
            client = stack.enter_context(closing(connection.open()))
            return ProfileStore(
                client,
                Keys(namespace),
                layout,
                ttl_s=ttl_s,
                writer=writer,
                where=connection.url,
                cached=cached,
            )

        yield open_


@pytest.fixture
def store(open_store: OpenStore, redis_url: str) -> ProfileStore:
    return open_store(redis_url)


def fold_generally(store: ProfileStore, events: Sequence[Event], now_s: float = NOW_S) -> None:
    """What an updater does with the users whom `ProfileStore.fold` leaves: load, fold, save; the
    refused again."""
    left = sorted({event.user_id for event in events})
    while left:
        profiles = store.load(left)
        theirs = [event for event in events if event.user_id in left]
        folded = arithmetic.fold(profiles, columns(theirs, left), LAYOUT, SPACE)
        refused = store.save(left, profiles, folded.touched, CATEGORY_NAMES, now_s)
        left = [left[row] for row in refused]


def fold_here(store: ProfileStore, events: Sequence[Event], now_s: float = NOW_S) -> None:
    """What an updater does with a micro-batch: all at once; the general way for who is left."""
    users = sorted({event.user_id for event in events})
    done = store.fold(
        users, columns(events, users), 0, SPACE, lambda keys: CATEGORY_NAMES, now_s,
        Fates(len(events)), (),
    )  # fmt: skip
    left = {users[i] for i in done.again}
    fold_generally(store, [event for event in events if event.user_id in left], now_s)


fold = fold_here


@pytest.fixture(params=[fold_here, fold_generally], ids=["compiled", "general"], autouse=True)
def fold_way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever a store promises, it promises of both ways."""
    monkeypatch.setitem(globals(), "fold", request.param)


def loaded(store: ProfileStore, events: Sequence[Event]) -> tuple[list[str], Profiles]:
    """Loaded and folded, not saved."""
    users = sorted({event.user_id for event in events})
    profiles = store.load(users)
    arithmetic.fold(profiles, columns(events, users), LAYOUT, SPACE)
    return users, profiles


def save(store: ProfileStore, users: list[str], profiles: Profiles) -> list[int]:
    return store.save(users, profiles, range(len(users)), CATEGORY_NAMES, NOW_S)


def history(count: int, users: int, seed: int = 1) -> list[Event]:
    rng = random.Random(seed)
    return in_topic(
        replace(
            item_event(rng.randrange(len(ITEM_KEYS)), NOW_MS + i * 1_000 + rng.randrange(9_000)),
            user_id=f"user {rng.randrange(users)}",
            weight=rng.choice([-0.4, 0.2, 1.0]),
            type=rng.choice(["view", "purchase", "review"]),
            event_key=event_key(str(rng.randrange(count))),
        )
        for i in range(count)
    )


def assert_as_computed(url: str, namespace: str, events: Sequence[Event]) -> None:
    want = oracle.fold(events, RULES)
    with ProfileReader(url, namespace) as reader:
        got = reader.get_many(list(want))
    assert {user_id: oracle.compare(got[user_id], want[user_id]) for user_id in want} == {
        user_id: [] for user_id in want
    }


# --- round trip ----------------------------------------------------------------------------


def test_what_is_saved_is_loaded_and_who_is_unknown_is_empty(
    store: ProfileStore, redis_url: str, namespace: str
) -> None:
    events = history(600, users=300)  # more users than one script call takes
    fold(store, events)
    assert_as_computed(redis_url, namespace, events)
    profiles = store.load(["user 0", "nobody", "user 1"])
    assert profiles.header["events"].tolist()[1] == 0
    assert profiles.fences[1] == b""
    assert store.load([]).header.shape == (0,)


def test_only_the_named_rows_are_saved(store: ProfileStore, redis_url: str, namespace: str) -> None:
    users, profiles = loaded(store, in_topic([item_event(0, user_id=u) for u in "abc"]))
    assert store.save(users, profiles, [2, 0], {}, NOW_S) == []
    assert store.save(users, profiles, [], {}, NOW_S) == []
    with ProfileReader(redis_url, namespace) as reader:
        assert set(reader.get_many(users)) == {"a", "c"}


def test_the_hash_has_three_fields_and_a_glance_for_people(
    store: ProfileStore, redis_client: redis.Redis, namespace: str
) -> None:
    fold(store, in_topic([replace(item_event(0), category_key=1)]))
    stored = redis_client.hgetall(f"{namespace}:profile:{{u}}")
    assert set(stored) == {b"state", b"fence", b"glance"}
    assert b'"categories":{"Garden":1.000}' in stored[b"glance"]


@pytest.mark.parametrize("user_id", ["a b", "ü-☃-🛒", "{x}", "a{b}c", "*?[a]\\", "a:b\nc"])
def test_any_user_id_is_kept_apart(store: ProfileStore, user_id: str) -> None:
    fold(store, in_topic([item_event(0, user_id=user_id), item_event(0, user_id="other")]))
    assert store.load([user_id]).header["events"].tolist() == [1]


# --- the fence -----------------------------------------------------------------------------


def test_a_save_of_a_profile_that_moved_on_is_refused(store: ProfileStore) -> None:
    events = in_topic([item_event(0, user_id="a"), item_event(1, user_id="b")])
    users, stale = loaded(store, events)
    fold(store, in_topic([item_event(2, user_id="b")], SOURCES[1:]))
    before = store.load(["b"])
    assert save(store, users, stale) == [1]
    assert store.load(["b"]).fences == before.fences
    assert store.load(["a"]).header["events"].tolist() == [1]


def test_of_many_saves_the_refused_are_told_by_their_row(store: ProfileStore) -> None:
    names = [f"user {i:03}" for i in range(600)]  # three script calls
    users, stale = loaded(store, in_topic(item_event(0, user_id=name) for name in names))
    overtaken = [3, 255, 256, 400, 599]
    fold(store, in_topic((item_event(1, user_id=names[i]) for i in overtaken), SOURCES[1:]))
    assert store.save(users, stale, range(599, -1, -1), {}, NOW_S) == overtaken[::-1]


def test_a_save_of_a_profile_that_was_deleted_is_refused(
    store: ProfileStore, redis_client: redis.Redis, namespace: str
) -> None:
    fold(store, in_topic([item_event(0)]))
    users, stale = loaded(store, in_topic([item_event(0), item_event(1)]))
    redis_client.delete(Keys(namespace).profile("u"))
    assert save(store, users, stale) == [0]
    assert not redis_client.exists(Keys(namespace).profile("u"))


def test_two_writers_of_the_same_fence_refuse_each_other(
    store: ProfileStore, redis_url: str, open_store: OpenStore
) -> None:
    """Two changes from one state that move no watermark, as when two items arrive: whoever is
    second must learn that its change is not in."""
    fold(store, in_topic([item_event(0)]))
    one, other = store.load(["u"]), store.load(["u"])
    assert save(store, ["u"], one) == []
    assert save(store, ["u"], other) == [0]
    assert save(open_store(redis_url), ["u"], other) == [0]


def test_writers_that_interleave_lose_nothing(
    open_store: OpenStore, redis_url: str, namespace: str
) -> None:
    """Both get the whole topic, as two workers do that each believe the partition is theirs."""
    events = history(400, users=12)
    rng = random.Random(5)
    failures: list[BaseException] = []

    def work(writer: int, cuts: list[int]) -> None:
        try:
            mine = open_store(redis_url, writer=writer)
            for begin, end in zip([0, *cuts], [*cuts, len(events)], strict=True):
                fold(mine, events[begin:end])
        except BaseException as error:
            failures.append(error)

    threads = [
        threading.Thread(target=work, args=(writer, sorted(rng.sample(range(400), 40))))
        for writer in (1, 2)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    assert_as_computed(redis_url, namespace, events)


# --- the cache -----------------------------------------------------------------------------


def loads(client: redis.Redis) -> int:
    stats = client.info("commandstats").get("cmdstat_hmget", {})
    return int(stats.get("calls", 0))


def test_who_was_saved_lately_is_not_loaded_again(
    open_store: OpenStore, redis_client: redis.Redis, redis_url: str, namespace: str
) -> None:
    store = open_store(redis_url, cached=10)
    events = in_topic(item_event(i % 6, user_id=f"u{i % 3}") for i in range(9))
    fold(store, events[:3])
    before = loads(redis_client)
    fold(store, events[3:6])
    fold(store, events[6:])
    assert loads(redis_client) == before
    assert_as_computed(redis_url, namespace, events)


def test_a_remembered_profile_that_another_writer_changed_is_loaded_again(
    open_store: OpenStore, redis_url: str, namespace: str
) -> None:
    here, there = (open_store(redis_url, writer=w, cached=10) for w in (1, 2))
    events = in_topic(item_event(i % 6) for i in range(4))
    for i, store in enumerate((here, there, there, here)):
        fold(store, events[: i + 1])
    assert_as_computed(redis_url, namespace, events)


def test_a_remembered_profile_is_read_from_redis_where_that_is_asked(
    open_store: OpenStore, redis_url: str
) -> None:
    """Who holds an old copy must not conclude from it that nothing is waiting."""
    here, there = (open_store(redis_url, writer=w, cached=10) for w in (1, 2))
    events = in_topic(item_event(i % 6) for i in range(2))
    fold(here, events[:1])
    fold(there, events)
    assert here.load(["u"], anew=True).header["events"].tolist() == [2]


def test_what_was_folded_but_not_saved_is_not_remembered(
    open_store: OpenStore, redis_url: str, namespace: str
) -> None:
    store = open_store(redis_url, cached=10)
    events = in_topic(item_event(i % 6) for i in range(3))
    fold(store, events[:1])
    loaded(store, events[:2])  # and then Redis went away
    assert store.load(["u"]).header["events"].tolist() == [1]
    fold(store, events)
    assert_as_computed(redis_url, namespace, events)


# --- expiry --------------------------------------------------------------------------------


def expiry_s(client: redis.Redis, namespace: str) -> int:
    return int(client.execute_command("EXPIRETIME", Keys(namespace).profile("u")))


def test_expiry_is_set_and_renewed_only_when_a_tenth_is_over(
    store: ProfileStore, redis_client: redis.Redis, namespace: str
) -> None:
    for offset, (later_s, want_s) in enumerate(
        [(0, 0), (9_900, 0), (10_100, 10_100), (15_000, 10_100)]
    ):
        event = replace(item_event(0), source=SOURCES[0], offset=offset)
        fold(store, [event], now_s=NOW_S + later_s)
        assert expiry_s(redis_client, namespace) == int(NOW_S + want_s) + TTL_S


def test_a_ttl_made_shorter_takes_hold_at_the_next_save(
    open_store: OpenStore,
    store: ProfileStore,
    redis_client: redis.Redis,
    redis_url: str,
    namespace: str,
) -> None:
    fold(store, in_topic([item_event(0)]))
    fold(open_store(redis_url, ttl_s=50_000.2), in_topic([item_event(0)] * 2))
    assert expiry_s(redis_client, namespace) == int(NOW_S) + 50_001


# --- things that break ---------------------------------------------------------------------


def test_a_save_whose_reply_was_lost_counts_once(
    open_store: OpenStore, redis_server: RedisServer, redis_url: str, namespace: str
) -> None:
    with closing(Between(redis_server.port)) as wire:
        store = open_store(redis_url.replace(str(redis_server.port), str(wire.port)))
        events = in_topic([item_event(i % 6) for i in range(3)])
        fold(store, events[:1])
        users, profiles = loaded(store, events[:2])
        wire.lose_reply = True
        assert save(store, users, profiles) == []
        assert wire.replies_lost == 1
        fold(store, events)
    assert_as_computed(redis_url, namespace, events)
    assert arithmetic.read_fence(store.load(["u"]).fences[0])[0] == 3  # each save is in once


def test_scripts_that_redis_forgot_are_loaded_again(
    store: ProfileStore, redis_client: redis.Redis, redis_url: str, namespace: str
) -> None:
    events = history(300, users=270)
    fold(store, events[:100])
    redis_client.script_flush()
    users, profiles = loaded(store, events[100:])
    redis_client.script_flush()
    assert save(store, users, profiles) == []
    assert_as_computed(redis_url, namespace, events)


def test_a_restarted_redis_goes_on_where_it_was(
    open_store: OpenStore, start_redis: Callable[..., RedisServer], namespace: str
) -> None:
    server = start_redis(appendonly=True, appendfsync="always")
    store = open_store(server.url)
    events = history(60, users=5)
    fold(store, events[:20])
    server.restart()
    users, profiles = loaded(store, events[10:40])
    server.kill()
    server.restart()
    assert save(store, users, profiles) == []
    fold(store, events)
    assert_as_computed(server.url, namespace, events)


def test_a_redis_that_is_down_is_named_within_seconds(
    start_redis: Callable[..., RedisServer], open_store: OpenStore
) -> None:
    server = start_redis(password="sesame")
    store = open_store(server.url)
    fold(store, in_topic([item_event(0)]))
    users, profiles = loaded(store, in_topic([item_event(0)] * 2))
    server.stop()
    begin = time.monotonic()
    with pytest.raises(RedisUnavailable, match=f"127.0.0.1:{server.port}.*REDIS_URL") as down:
        save(store, users, profiles)
    with pytest.raises(RedisUnavailable):
        store.load(users)
    assert time.monotonic() - begin < 10
    assert "sesame" not in str(down.value)


def test_a_full_redis_is_unavailable_and_loses_nothing(
    open_store: OpenStore, start_redis: Callable[..., RedisServer], namespace: str
) -> None:
    server = start_redis()
    store = open_store(server.url)
    events = history(300, users=280)
    fold(store, events[:100])
    with redis.Redis.from_url(server.url) as admin:
        admin.config_set("maxmemory", 1)
        with pytest.raises(RedisUnavailable, match=r"cannot serve now.*maxmemory"):
            fold(store, events[100:])
        assert_as_computed(server.url, namespace, events[:100])
        admin.config_set("maxmemory", 0)
    fold(store, events[50:])
    assert_as_computed(server.url, namespace, events)


def test_a_redis_without_its_replicas_is_unavailable(
    start_redis: Callable[..., RedisServer], open_store: OpenStore
) -> None:
    server = start_redis()
    store = open_store(server.url)
    with redis.Redis.from_url(server.url) as admin:
        admin.config_set("min-replicas-to-write", 1)
        with pytest.raises(RedisUnavailable, match=r"cannot serve now.*NOREPLICAS"):
            fold(store, in_topic([item_event(0)]))


def test_a_wrong_password_says_what_to_check(
    start_redis: Callable[..., RedisServer], open_store: OpenStore
) -> None:
    server = start_redis(password="sesame")
    address = f"redis://127.0.0.1:{server.port}/0"
    for connection in (Connection(address), Connection(address, password="open")):
        with pytest.raises(RedisUnavailable, match=f"{server.port}.*REDIS_PASSWORD"):
            open_store(connection).load(["u"])
    assert len(open_store(Connection(address, password="sesame")).load(["u"])) == 1


def test_the_acl_of_the_schema_page_is_enough_to_write_and_less_is_named(
    start_redis: Callable[..., RedisServer], open_store: OpenStore, namespace: str
) -> None:
    server = start_redis()
    with redis.Redis.from_url(server.url) as admin:
        admin.execute_command(*writer_acl("updater", "secret", namespace).split())
        store = open_store(Connection(server.url, username="updater", password="secret"))
        events = history(10, users=3)
        fold(store, events)
        assert_as_computed(server.url, namespace, events)
        admin.execute_command("ACL", "SETUSER", "updater", "-hset")
        with pytest.raises(RedisUnavailable, match=r"docs/schema\.md"):
            fold(store, history(20, users=3))
        admin.execute_command("ACL", "SETUSER", "updater", "-evalsha")
        with pytest.raises(RedisUnavailable, match=r"docs/schema\.md"):
            store.load(["u"])


# --- what may not be read ------------------------------------------------------------------


def test_an_unreadable_profile_is_named(
    open_store: OpenStore,
    store: ProfileStore,
    redis_client: redis.Redis,
    redis_url: str,
    namespace: str,
) -> None:
    fold(store, in_topic([item_event(0, user_id="good"), item_event(0, user_id="bad")]))
    key = Keys(namespace).profile("bad")
    state = redis_client.hget(key, "state")
    assert isinstance(state, bytes)
    other = open_store(redis_url, layout=replace(LAYOUT, half_lives_s=(1.0, 2.0, 3.0)))
    for bad, error in [(state[:-1], StateCorrupt), (LATER + state[2:], SchemaTooNew)]:
        redis_client.hset(key, "state", bad)
        with pytest.raises(error, match=r"\{bad\}"):
            open_store(redis_url).load(["good", "bad"])
    with pytest.raises(LayoutMismatch, match=r"\{good\}"):
        other.load(["good"])


def test_an_erased_profile_keeps_the_replay_out(
    store: ProfileStore, redis_url: str, namespace: str
) -> None:
    events = in_topic([item_event(0), item_event(1), Event("u", 0, 0, None, NOW_MS, oracle.FORGET)])
    fold(store, events)
    fold(store, events)
    profile: Profile
    assert store.load(["u"]).header["events"].tolist() == [0]
    assert store.load(["u"]).watermarks == [{SOURCES[0]: 3}]
    fold(store, in_topic([*events, item_event(2)]))
    with ProfileReader(redis_url, namespace) as reader:
        profile = reader.get("u")
    assert profile.counts["view"] == profile.events == 1


# --- the outlook ---------------------------------------------------------------------------


def foretell(store: ProfileStore, users: list[str], profiles: Profiles) -> list[int]:
    """Write an outlook of profiles as they were loaded."""
    vectors = np.tile(np.float32([0.5, 0.5, 0.5, 0.5]), (len(users), 1))
    revisions = [arithmetic.read_fence_header(fence)[0] for fence in profiles.fences]
    latest = profiles.header["updated_ms"].tolist()
    chances = {"churn": np.full(len(users), 0.25, np.float32)}
    fields = outlook.encode(vectors, chances, "trained-1", SPACE, revisions, latest, 1_000)
    return store.put_outlooks(users, profiles.fences, fields)


def test_an_outlook_is_read_with_its_profile_and_grows_old_with_every_save(
    store: ProfileStore, redis_url: str, namespace: str
) -> None:
    users = [f"user {i}" for i in range(300)]  # more than one script call takes
    fold(store, in_topic([item_event(0, user_id=user) for user in users]))
    with ProfileReader(redis_url, namespace) as reader:
        assert reader.outlook("user 0") is None
        assert foretell(store, users, store.load(users, anew=True)) == []
        assert all(profile.outlook for profile in reader.get_many(users).values())
        fold(store, in_topic([item_event(0), item_event(1, user_id="user 299")], SOURCES[1:]))
        found = [reader.outlook(user) for user in ("user 0", "user 299")]
    assert [o.saves_since for o in found if o] == [0, 1]
    assert {(o.release, o.updated_ms, o.heads["churn"]) for o in found if o} == {
        ("trained-1", NOW_MS, 0.25)
    }


def test_an_outlook_of_what_has_changed_is_refused(
    store: ProfileStore, redis_client: redis.Redis, redis_url: str, namespace: str
) -> None:
    users = ["acted", "expired", "forgotten", "same"]
    fold(store, in_topic([item_event(0, user_id=user) for user in users]))
    before = store.load(users, anew=True)
    forget = Event("forgotten", 0, 0, None, NOW_MS, oracle.FORGET)
    fold(store, in_topic([item_event(1, user_id="acted"), forget], SOURCES[1:]))
    redis_client.delete(Keys(namespace).profile("expired"))
    assert foretell(store, users, before) == [0, 1, 2]
    assert not redis_client.exists(Keys(namespace).profile("expired"))
    with ProfileReader(redis_url, namespace) as reader:
        assert reader.outlook("acted") is None
        assert reader.outlook("same") is not None


def test_a_forget_erases_the_outlook_and_what_comes_after_has_none(
    store: ProfileStore, redis_client: redis.Redis, redis_url: str, namespace: str
) -> None:
    key = Keys(namespace).profile("u")
    history = in_topic(
        [item_event(0), Event("u", 0, 0, None, NOW_MS, oracle.FORGET), item_event(1)]
    )
    for cut in (2, 3):  # alone, and with what they do next in the same breath
        redis_client.delete(key)
        store.forget_cached()
        fold(store, history[:1])
        assert foretell(store, ["u"], store.load(["u"], anew=True)) == []
        expires_ms = redis_client.pexpiretime(key)
        assert redis_client.hexists(key, "next")
        fold(store, history[:cut])
        assert set(redis_client.hkeys(key)) == {b"state", b"fence", b"glance"}
        assert redis_client.pexpiretime(key) == expires_ms
    with ProfileReader(redis_url, namespace) as reader:
        assert reader.outlook("u") is None


def test_an_erasure_that_came_too_late_is_refused_and_done_again(store: ProfileStore) -> None:
    fold(store, in_topic([item_event(0), item_event(0, user_id="other")]))
    events = in_topic([item_event(0), Event("u", 0, 1, None, NOW_MS, oracle.FORGET)])
    users, stale = loaded(store, [*events, item_event(1, user_id="other")])
    fold(store, in_topic([item_event(2)], SOURCES[1:]))
    assert [users[row] for row in save(store, users, stale)] == ["u"]
    fold(store, events)
    assert store.load(["u"], anew=True).header["events"].tolist() == [0]
