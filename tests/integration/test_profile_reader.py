"""What other teams get: the same answers from both readers, with vector sets and without."""

from __future__ import annotations

import asyncio
import shutil
import ssl
import subprocess
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import redis

from profiles import (
    AsyncProfileReader,
    Connection,
    ProfileNotFound,
    ProfileReader,
    RedisUnavailable,
    SchemaTooNew,
    SpaceMismatch,
    StateCorrupt,
    arithmetic,
)
from profiles.arithmetic import Layout
from profiles.items import ItemRecord, ItemStore
from profiles.schema import SCHEMA_VERSION, Keys, key64
from profiles.schema_doc import reader_acl
from profiles.store import ProfileStore
from stream.local_stack import RedisServer
from tests import oracle
from tests.between import Between
from tests.oracle import FORGET, Event
from tests.profile_events import NOW_MS, columns, in_topic

pytestmark = pytest.mark.redis

D = 16
LAYOUT = Layout(D)
LATER = (SCHEMA_VERSION + 1).to_bytes(2, "little")
SPACE = 0xFEED
SPACE_ID = f"{SPACE:016x}"
VERSION = "00112233aabbccdd"
WEIRD_IDS = ["a b", "ü-☃-🛒", "{x}", "a{b}c", "*?[a]\\", "a:b", "}"]

_drawn = np.random.default_rng(8).standard_normal((300, D))
VECTORS = (_drawn / np.linalg.norm(_drawn, axis=1, keepdims=True)).astype(np.float32)
CATEGORIES = ["Garden > Tools", "Books > Poetry", "Käse"]


def item_id(item: int) -> str:
    return f"item {item}"


def event(
    user_id: str, item: int, t_ms: int = NOW_MS, weight: float = 1.0, type: str = "view"
) -> Event:
    category = key64(CATEGORIES[item % 3])
    vector = VECTORS[item].tolist()
    return Event(user_id, 0, 0, None, t_ms, type, weight, key64(item_id(item)), category, vector)


HOUR_MS = 3_600_000
EVENTS = in_topic(
    [
        event("ann", 0, NOW_MS - 40 * HOUR_MS),
        event("ann", 1, NOW_MS - 30 * HOUR_MS, weight=2.0, type="purchase"),
        event("ann", 0, NOW_MS - HOUR_MS),
        event("ann", 2, NOW_MS, weight=0.5),
        event("ann's twin", 0, NOW_MS - 40 * HOUR_MS, weight=3.0),
        event("ann's twin", 1, NOW_MS - 30 * HOUR_MS, weight=4.0),
        event("bob", 7),
        event("gone", 3),
        Event("gone", 0, 0, None, NOW_MS, FORGET),
        Event("looker", 0, 0, None, NOW_MS, "impression"),
        *[event(user_id, 5) for user_id in WEIRD_IDS],
    ]
)


def fill(url: str, namespace: str) -> None:
    """A small shop: items with words and vectors, categories with names, shoppers."""
    client, keys = Connection(url).open(), Keys(namespace)
    with closing(client):
        items = ItemStore(client, keys, url)
        ids = [item_id(i) for i in range(len(VECTORS))]
        records = [ItemRecord(ids[i], f"Title {i}", (CATEGORIES[i % 3],)) for i in range(len(ids))]
        items.put(records, [VERSION] * len(ids), [None] * len(ids))
        items.put_vectors(SPACE_ID, ids, [VERSION] * len(ids), VECTORS)
        items.name_categories({key64(name): name for name in CATEGORIES[:2]})
        save(url, namespace, EVENTS)


def save(url: str, namespace: str, events: Sequence[Event], space: int = SPACE) -> None:
    with closing(Connection(url).open()) as client:
        store = ProfileStore(client, Keys(namespace), LAYOUT, ttl_s=1_000, writer=1, where=url)
        users = sorted({e.user_id for e in events})
        profiles = store.load(users)
        taken = replace(
            columns([replace(e, vector=None) for e in events], users),
            vector=np.array([e.vector or [0.0] * D for e in events], dtype=np.float32),
            category=np.array([e.category_key for e in events], dtype=np.uint64),
            resolved=np.array([e.vector is not None for e in events]),
        )
        arithmetic.fold(profiles, taken, LAYOUT, space)
        now_s = client.time()[0]
        assert store.save(users, profiles, range(len(users)), {}, now_s) == []


# --- both readers, both kinds of server ----------------------------------------------------


class Blocking:
    def __init__(self, connection: Connection | str, namespace: str) -> None:
        self._reader = ProfileReader(connection, namespace)

    def ask(self, method: str, *args: Any, **options: Any) -> Any:
        answer = getattr(self._reader, method)(*args, **options)
        return list(answer) if isinstance(answer, Iterator) else answer

    def close(self) -> None:
        self._reader.close()


class Asyncio:
    def __init__(self, connection: Connection | str, namespace: str) -> None:
        self._runner = asyncio.Runner()
        self._reader = AsyncProfileReader(connection, namespace)

    def ask(self, method: str, *args: Any, **options: Any) -> Any:
        return self._runner.run(self._ask(method, *args, **options))

    async def _ask(self, method: str, *args: Any, **options: Any) -> Any:
        answer = getattr(self._reader, method)(*args, **options)
        if hasattr(answer, "__aiter__"):
            return [each async for each in answer]
        return await answer

    def close(self) -> None:
        self._runner.run(self._reader.close())
        self._runner.close()


Asked = Blocking | Asyncio
READERS = {"blocking": Blocking, "asyncio": Asyncio}


@pytest.fixture(scope="module")
def plain_redis_url(redis_server: RedisServer) -> Iterator[str]:
    """The same Redis without vector sets, as those before 8.0 are."""

    def unknown(request: bytes) -> bytes:
        return request.replace(b"VADD", b"NADD").replace(b"VSIM", b"NSIM").replace(b"VREM", b"NREM")

    with closing(Between(redis_server.port, on_request=unknown)) as between:
        yield f"redis://127.0.0.1:{between.port}/0"


@pytest.fixture(scope="module", params=["vector sets", "no vector sets"])
def shop(
    request: pytest.FixtureRequest, redis_server: RedisServer, tmp_path_factory: Any
) -> tuple[str, str]:
    """URL and namespace of a filled shop."""
    plain = request.param == "no vector sets"
    url = request.getfixturevalue("plain_redis_url") if plain else redis_server.url
    namespace = f"test-{tmp_path_factory.mktemp('shop').name}"
    fill(url, namespace)
    return url, namespace


@pytest.fixture(params=sorted(READERS))
def reader(request: pytest.FixtureRequest, shop: tuple[str, str]) -> Iterator[Asked]:
    with closing(READERS[request.param](*shop)) as asked:
        yield asked


def test_get_tells_every_field(reader: Asked) -> None:
    want = oracle.fold(EVENTS)["ann"]
    profile = reader.ask("get", "ann")
    assert profile.user_id == "ann"
    assert profile.space == SPACE_ID
    assert oracle.compare(profile, want) == []


def test_unknown_and_erased_shoppers_are_not_found(reader: Asked) -> None:
    for user_id, reason in [("nobody", "never seen"), ("gone", "erased"), ("*", "never seen")]:
        with pytest.raises(
            ProfileNotFound, match=f"{user_id!r}".replace("*", r"\*") + f".*{reason}"
        ):
            reader.ask("get", user_id)
        assert reader.ask("exists", user_id) is False
    assert reader.ask("exists", "ann") is True


def test_get_many_leaves_out_who_has_no_profile(reader: Asked) -> None:
    found = reader.ask("get_many", ["bob", "nobody", "gone", "ann", "looker"])
    assert list(found) == ["bob", "ann", "looker"]
    assert found["ann"].events == 4
    assert reader.ask("get_many", []) == {}


@pytest.mark.parametrize("user_id", WEIRD_IDS)
def test_any_user_id_can_be_asked_for(reader: Asked, user_id: str) -> None:
    profile = reader.ask("get", user_id)
    assert (profile.user_id, profile.events) == (user_id, 1)
    assert user_id in reader.ask("user_ids")


def test_user_ids_are_those_of_this_namespace(reader: Asked) -> None:
    assert sorted(reader.ask("user_ids")) == sorted({e.user_id for e in EVENTS})


def test_an_interest_is_the_direction_of_one_scale(reader: Asked) -> None:
    want = oracle.fold(EVENTS)["ann"]
    for scale in range(3):
        got = reader.ask("interests", "ann", scale)
        length = np.linalg.norm(want.sums[scale])
        np.testing.assert_allclose(got, np.array(want.sums[scale]) / length, atol=1e-5)
    assert not reader.ask("interests", "looker", 0).any()
    with pytest.raises(ProfileNotFound):
        reader.ask("interests", "nobody", 0)


def test_several_interests_are_centroids_of_the_window(reader: Asked) -> None:
    one = reader.ask("multi_interests", "bob")
    assert len(one) == 1
    np.testing.assert_allclose(one[0].vector, VECTORS[7], atol=1e-6)
    assert one[0].mass == pytest.approx(1)
    several = reader.ask("multi_interests", "ann", count=3)
    assert [i.mass for i in several] == sorted((i.mass for i in several), reverse=True)
    assert sum(i.mass for i in several) == pytest.approx(
        oracle.fold(EVENTS)["ann"].masses[-1], 1e-4
    )
    np.testing.assert_allclose([np.linalg.norm(i.vector) for i in several], 1, rtol=1e-5)
    assert reader.ask("multi_interests", "looker") == []


@pytest.mark.parametrize("scale", [0, 2, None])
def test_nearest_items_are_the_nearest_of_all(reader: Asked, scale: int | None) -> None:
    sums = np.array(oracle.fold(EVENTS)["ann"].sums)
    units = sums / np.linalg.norm(sums, axis=1, keepdims=True)
    query = units.sum(axis=0) if scale is None else units[scale]
    cosines = VECTORS @ (query / np.linalg.norm(query))
    want = np.argsort(-cosines)[:12]
    got = reader.ask("nearest_items", "ann", 12, scale)
    assert [near.item_id for near in got] == [item_id(i) for i in want]
    np.testing.assert_allclose([near.cosine for near in got], cosines[want], atol=1e-5)
    assert got[0].title == f"Title {want[0]}"
    assert got[0].category == (CATEGORIES[want[0] % 3],)


def test_who_has_shown_no_interest_has_no_nearest_items(reader: Asked) -> None:
    assert reader.ask("nearest_items", "looker") == []


def test_items_near_takes_a_vector_of_the_callers(reader: Asked) -> None:
    nearest = reader.ask("items_near", VECTORS[41], SPACE_ID, k=1)
    assert [(n.item_id, n.title) for n in nearest] == [("item 41", "Title 41")]
    assert nearest[0].cosine == pytest.approx(1, abs=1e-5)


def test_a_profile_is_never_compared_with_items_of_another_space(
    shop: tuple[str, str], reader: Asked
) -> None:
    save(*shop, in_topic([event("from another space", 3)]), space=0xBEEF)
    with pytest.raises(SpaceMismatch, match=f"{0xBEEF:016x}"):
        reader.ask("nearest_items", "from another space")
    with pytest.raises(SpaceMismatch):
        reader.ask("items_near", VECTORS[0], "0123456789abcdef")
    assert reader.ask("multi_interests", "from another space") == []
    similar = reader.ask("similar_users", "ann", k=100)
    assert "from another space" not in dict(similar)
    with closing(Connection(shop[0]).open()) as client:
        client.delete(Keys(shop[1]).profile("from another space"))


def test_items_of_the_window_come_in_words(reader: Asked) -> None:
    items = reader.ask("items", reader.ask("get", "ann"))
    assert [record.title for record in items.values()] == ["Title 0", "Title 1", "Title 2"]
    assert list(items) == [key64(item_id(i)) for i in (0, 1, 2)]


def test_top_categories_come_by_name_where_they_have_one(reader: Asked) -> None:
    want = oracle.fold(EVENTS)["ann"].categories
    named = {key64(name): name for name in CATEGORIES[:2]}
    top = reader.ask("top_categories", reader.ask("get", "ann"))
    heaviest = sorted(want, key=lambda key: -want[key])
    assert [name for name, _ in top] == [named.get(key, f"{key:016x}") for key in heaviest]
    assert [mass for _, mass in top] == pytest.approx([want[key] for key in heaviest], rel=1e-4)
    assert reader.ask("top_categories", reader.ask("get", "ann"), count=1) == top[:1]
    assert reader.ask("top_categories", reader.ask("get", "looker")) == []


def test_similar_users_are_ranked_without_oneself_and_the_erased(reader: Asked) -> None:
    similar = reader.ask("similar_users", "ann", k=3)
    assert similar[0][0] == "ann's twin"
    cosines = [cosine for _, cosine in similar]
    assert cosines == sorted(cosines, reverse=True)
    everyone = dict(reader.ask("similar_users", "ann", k=100))
    assert everyone.keys() == {e.user_id for e in EVENTS} - {"ann", "gone", "looker"}
    profiles = reader.ask("get_many", ["ann", "bob"])
    assert everyone["bob"] == pytest.approx(profiles["ann"].similarity(profiles["bob"], -1), 1e-5)


# --- one server is enough ------------------------------------------------------------------


@pytest.fixture(params=sorted(READERS))
def make_reader(request: pytest.FixtureRequest) -> Iterator[Callable[..., Asked]]:
    made: list[Asked] = []

    def make(connection: Connection | str, namespace: str) -> Asked:
        made.append(READERS[request.param](connection, namespace))
        return made[-1]

    yield make
    for each in made:
        each.close()


def test_namespaces_that_look_alike_are_kept_apart(
    make_reader: Callable[..., Asked], redis_url: str
) -> None:
    for namespace in ("shop", "shop-2", "s*", "s[h]op", "shop:profile"):
        save(redis_url, namespace, in_topic([event(f"of {namespace}", 1)]))
    for namespace in ("shop", "s*", "s[h]op"):
        assert make_reader(redis_url, namespace).ask("user_ids") == [f"of {namespace}"]


def test_items_taken_out_of_search_are_named_no_more(
    make_reader: Callable[..., Asked], plain_redis_url: str, redis_url: str, namespace: str
) -> None:
    for url in (redis_url, plain_redis_url):
        fill(url, namespace)
        with closing(Connection(url).open()) as client:
            ItemStore(client, Keys(namespace), url).drop_vectors(SPACE_ID, [item_id(41)])
        nearest = make_reader(url, namespace).ask("items_near", VECTORS[41], SPACE_ID, k=300)
        assert len(nearest) == 299
        assert "item 41" not in {near.item_id for near in nearest}


def test_what_cannot_be_read_is_named(
    make_reader: Callable[..., Asked], redis_client: redis.Redis, redis_url: str, namespace: str
) -> None:
    save(redis_url, namespace, in_topic([event("ann", 1)]))
    key = Keys(namespace).profile("ann")
    state = redis_client.hget(key, "state")
    assert isinstance(state, bytes)
    reader = make_reader(redis_url, namespace)
    for bad, error in [(state[:-1], StateCorrupt), (LATER + state[2:], SchemaTooNew)]:
        redis_client.hset(key, "state", bad)
        for method, argument in [("get", "ann"), ("get_many", ["ann"]), ("exists", "ann")]:
            with pytest.raises(error, match="'ann'"):
                reader.ask(method, argument)


def test_a_redis_that_goes_and_comes_back_needs_no_new_reader(
    make_reader: Callable[..., Asked], start_redis: Callable[..., RedisServer], namespace: str
) -> None:
    server = start_redis(appendonly=True, appendfsync="always", password="sesame")
    save(server.url, namespace, in_topic([event("ann", 1)]))
    reader = make_reader(server.url, namespace)
    assert reader.ask("get", "ann").events == 1
    server.stop()
    with pytest.raises(RedisUnavailable, match=rf"127\.0\.0\.1:{server.port}") as down:
        reader.ask("get", "ann")
    assert "sesame" not in str(down.value)
    server.start()
    assert reader.ask("get", "ann").events == 1


def test_a_wrong_password_says_what_to_check(
    make_reader: Callable[..., Asked], start_redis: Callable[..., RedisServer], namespace: str
) -> None:
    address = f"redis://127.0.0.1:{start_redis(password='sesame').port}/0"
    for connection in (address, Connection(address, password="open")):
        with pytest.raises(RedisUnavailable, match="REDIS_PASSWORD"):
            make_reader(connection, namespace).ask("get", "ann")
    right = Connection(address, password="sesame")
    with pytest.raises(ProfileNotFound):
        make_reader(right, namespace).ask("get", "ann")


def test_the_acl_of_the_schema_page_is_enough_to_read_and_too_little_to_write(
    make_reader: Callable[..., Asked], start_redis: Callable[..., RedisServer]
) -> None:
    server = start_redis()
    fill(server.url, "shop")
    fill(server.url, "shop2")
    with redis.Redis.from_url(server.url) as admin:
        admin.execute_command(*reader_acl("reader", "secret", "shop").split())
    login = Connection(server.url, username="reader", password="secret")
    reader = make_reader(login, "shop")
    ann = reader.ask("get", "ann")
    for method, *arguments in (
        ("get_many", ["ann"]), ("exists", "ann"), ("interests", "ann", 0), ("items", ann),
        ("multi_interests", "ann"), ("nearest_items", "ann"), ("top_categories", ann),
        ("user_ids",), ("similar_users", "ann"),
    ):  # fmt: skip
        assert len(np.atleast_1d(reader.ask(method, *arguments))) > 0
    with login.open() as client:
        for command in (("SET", "shop:space", "x"), ("DEL", "shop:space"), ("FLUSHALL",)):
            with pytest.raises(redis.exceptions.NoPermissionError):
                client.execute_command(*command)
    with pytest.raises(RedisUnavailable, match=r"docs/schema\.md"):
        make_reader(login, "shop2").ask("get", "ann")


def test_readers_are_context_managers(redis_url: str, namespace: str) -> None:
    save(redis_url, namespace, in_topic([event("ann", 1)]))
    with ProfileReader(redis_url, namespace) as reader:
        assert reader.exists("ann")

    async def read() -> bool:
        async with AsyncProfileReader(redis_url, namespace) as reader:
            return await reader.exists("ann")

    assert asyncio.run(read())


def test_one_reader_serves_many_threads(redis_url: str, namespace: str) -> None:
    fill(redis_url, namespace)
    answers: list[Any] = []
    with ProfileReader(redis_url, namespace) as reader:
        threads = [
            threading.Thread(target=lambda: answers.append(reader.nearest_items("ann", 5)))
            for _ in range(8)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert len(answers) == 8
    assert all(answer == answers[0] for answer in answers)


# --- TLS -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A self-signed certificate of 127.0.0.1, and its key."""
    folder = tmp_path_factory.mktemp("tls")
    if shutil.which("openssl") is None:
        pytest.fail("no openssl: apt-get install openssl", pytrace=False)
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256",
         "-nodes", "-days", "2", "-subj", "/CN=penchant test",
         "-addext", "subjectAltName=IP:127.0.0.1", "-keyout", "key.pem", "-out", "ca.pem"],
        cwd=folder, check=True, capture_output=True,
    )  # fmt: skip
    return folder / "ca.pem", folder / "key.pem"


def test_tls_is_spoken_and_the_certificate_checked(
    make_reader: Callable[..., Asked],
    certificate: tuple[Path, Path],
    redis_server: RedisServer,
    namespace: str,
) -> None:
    save(redis_server.url, namespace, in_topic([event("ann", 1)]))
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)  # the bundled Redis has none built in
    context.load_cert_chain(*certificate)
    with closing(Between(redis_server.port, tls=context)) as encrypted:
        url = f"rediss://127.0.0.1:{encrypted.port}/0"
        trusting = make_reader(Connection(url, tls_ca=str(certificate[0])), namespace)
        assert trusting.ask("get", "ann").events == 1
        with pytest.raises(RedisUnavailable, match="certificate"):
            make_reader(url, namespace).ask("get", "ann")
