"""Profiles on a real Redis that move from one embedding space to another."""

from __future__ import annotations

import gc
import time
import weakref
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import pytest
import redis
import torch

from model.catalogue_vectors import CatalogueVectors
from model.engine import Engine
from model.projection import Projection
from model.releases import Release, build_base, make_current, prune, publish
from model.text import item_text, text_version
from profiles import ProfileReader, SpaceMismatch, arithmetic
from profiles.arithmetic import EventColumns, Layout
from profiles.items import ItemStore, Origin
from profiles.schema import SCHEMA_VERSION, ItemRecord, Keys, key64
from profiles.store import ProfileStore
from stream import metrics
from stream.catalogue import Catalogue
from stream.events import Click
from stream.intake import MicroBatch, Slice
from stream.migration import Migrator
from stream.refold import NoRejects
from stream.settings import ModelSettings, RedisSettings, Settings
from stream.swapping import open_space
from stream.sweeper import Sweeper, progress
from stream.updater_app import build_marks, build_swapper, updater_on
from tests.integration.worker_process import (
    DIMENSIONS,
    build_tiny_release,
    build_turned_release,
    eventually,
)

pytestmark = pytest.mark.redis
torch.set_num_threads(1)  # on a busy machine, threads spend their time waiting for each other

LAYOUT = Layout(DIMENSIONS)
NOW_MS = 1_772_366_400_000
ITEMS = [ItemRecord(f"A-{i}", f"thing {i}", ("Home", f"Shelf {i % 3}")) for i in range(40)]
USERS = [f"u{i}" for i in range(700)]

Open = Callable[[Release], Catalogue]


@pytest.fixture
def base(tmp_path: Path) -> Release:
    return build_tiny_release(tmp_path)


@pytest.fixture
def items(redis_client: redis.Redis, namespace: str) -> ItemStore:
    return ItemStore(redis_client, Keys(namespace))


@pytest.fixture
def open_release(items: ItemStore) -> Open:
    """`open_release(release)`: a catalogue whose space is complete and current."""

    def make(release: Release) -> Catalogue:
        catalogue = Catalogue(Engine(release, device="cpu"), items, release.load_item_vectors())
        open_space(items, catalogue)
        return catalogue

    return make


@pytest.fixture
def store(redis_client: redis.Redis, namespace: str) -> ProfileStore:
    return ProfileStore(redis_client, Keys(namespace), LAYOUT, ttl_s=86_400, writer=7)


def fill(catalogue: Catalogue, store: ProfileStore, ago_s: float = 0.0) -> None:
    """Every user saw one item."""
    catalogue.upsert(ITEMS, Origin(1, 0))
    keys = [key64(ITEMS[i % len(ITEMS)].item_id) for i in range(len(USERS))]
    m = len(USERS)
    events = EventColumns(
        row=np.arange(m),
        source=np.ones(m, dtype=np.uint64),
        offset=np.arange(m),
        event=np.zeros(m, dtype=np.uint64),
        t_ms=np.full(m, NOW_MS),
        type=np.full(m, 1, dtype=np.uint8),
        weight=np.ones(m, dtype=np.float32),
        item=np.array(keys, dtype=np.uint64),
        category=np.zeros(m, dtype=np.uint64),
        vector=catalogue.resolve(keys, {}).vectors,
        resolved=np.ones(m, dtype=bool),
        text=np.zeros(m, dtype=bool),
        spend=np.zeros(m),
        foreign=np.zeros(m, dtype=bool),
    )
    profiles = store.load(USERS)
    arithmetic.fold(profiles, events, LAYOUT, catalogue.space)
    assert store.save(USERS, profiles, range(m), {}, time.time() - ago_s) == []


def sweeper(
    redis_client: redis.Redis,
    namespace: str,
    base: Release,
    store: ProfileStore,
    items: ItemStore,
    catalogue: Catalogue,
    per_s: float = 1e6,
) -> Sweeper:
    migrator = Migrator(base.path.parent, items, LAYOUT)
    keys = Keys(namespace)
    return Sweeper(
        redis_client,
        keys,
        store,
        items,
        migrator,
        lambda: catalogue,
        lambda: "",
        lambda users, catalogue: None,
        _raise,
        per_s=per_s,
    )


def _raise(error: BaseException) -> None:
    raise error


def spaces(store: ProfileStore) -> set[int]:
    return set(store.load(USERS).header["space"].tolist())


def test_a_sweep_moves_everybody_once_and_leaves_the_expiry(
    base: Release,
    items: ItemStore,
    store: ProfileStore,
    open_release: Open,
    redis_client: redis.Redis,
    namespace: str,
) -> None:
    old = open_release(base)
    fill(old, store, ago_s=40_000)
    left_s = redis_client.ttl(Keys(namespace).profile("u0"))
    new = open_release(build_turned_release(base, 2))
    swept = sweeper(redis_client, namespace, base, store, items, new)
    assert not swept.sweep()  # it moved some: another pass looks for what came meanwhile
    assert spaces(store) == {new.space}
    assert swept.sweep()
    told = progress(redis_client, Keys(namespace), new.engine.space)
    assert told is not None
    assert (told.moved, told.done) == (len(USERS), True)
    assert metrics.REGISTRY.get_sample_value("penchant_sweep_moved") == len(USERS)
    assert metrics.REGISTRY.get_sample_value("penchant_sweep_seen") == told.seen >= 2 * len(USERS)
    assert redis_client.ttl(Keys(namespace).profile("u0")) <= left_s
    wanted = new.resolve([key64("A-3")], {}).vectors[0]
    np.testing.assert_allclose(store.load(["u3"]).header["sums"][0, 0], wanted, atol=1e-5)


def test_a_profile_that_cannot_be_read_keeps_no_other_from_moving(
    base: Release,
    items: ItemStore,
    store: ProfileStore,
    open_release: Open,
    redis_client: redis.Redis,
    namespace: str,
) -> None:
    fill(open_release(base), store)
    broken, later = (Keys(namespace).profile(user) for user in ("u5", "u9"))
    redis_client.hset(broken, "state", b"broken")
    state = redis_client.hget(later, "state")
    redis_client.hset(later, "state", (SCHEMA_VERSION + 1).to_bytes(2, "little") + state[2:])
    new = open_release(build_turned_release(base, 2))
    swept = sweeper(redis_client, namespace, base, store, items, new)
    before = metrics.SWEEP_SKIPPED._value.get()
    assert not swept.sweep()
    assert swept.sweep()
    assert metrics.SWEEP_SKIPPED._value.get() == before + 4  # two of them, in two passes
    readable = [user for user in USERS if user not in ("u5", "u9")]
    assert set(store.load(readable).header["space"].tolist()) == {new.space}
    assert redis_client.hget(broken, "state") == b"broken"


def test_spaces_that_were_left_go_whoever_sweeps(
    base: Release,
    items: ItemStore,
    store: ProfileStore,
    open_release: Open,
    redis_client: redis.Redis,
    namespace: str,
) -> None:
    chain = [base]
    fill(open_release(base), store)
    for seed in range(1, 4):
        chain.append(build_turned_release(chain[-1], seed))
        live = open_release(chain[-1])
        passing_by = sweeper(redis_client, namespace, base, store, items, live)
        while not passing_by.sweep():
            pass
    kept = [release.space for release in chain[-2:]]  # one for the way back
    assert items.spaces() == kept
    prefix = f"{namespace}:vectors:"
    found = {key.decode().removeprefix(prefix)[:16] for key in redis_client.keys(f"{prefix}*")}
    assert found == set(kept)


def test_a_worker_forgets_the_vectors_of_a_space_that_another_swept(
    base: Release,
    items: ItemStore,
    store: ProfileStore,
    open_release: Open,
    redis_client: redis.Redis,
    namespace: str,
) -> None:
    old = open_release(base)
    fill(old, store)
    new = open_release(build_turned_release(base, 2))
    idle, busy = (sweeper(redis_client, namespace, base, store, items, new) for _ in range(2))
    idle._migrator.make_ready(old.engine.space, new)
    assert idle._migrator._changed
    assert idle._migrator._old
    while not busy.sweep():
        assert not idle.sweep()
    assert idle.sweep()
    assert not idle._migrator._changed
    assert not idle._migrator._old


def test_ways_from_many_spaces_take_no_more_memory_than_a_few(
    base: Release, items: ItemStore, open_release: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("stream.migration._OLD_VECTORS", len(ITEMS))
    monkeypatch.setattr("stream.migration._MAPS", 3)
    migrator = Migrator(base.path.parent, items, LAYOUT)
    live = open_release(base)
    live.upsert(ITEMS, Origin(1, 0))
    for seed in range(6):  # nobody sweeps
        before, live = live, open_release(build_turned_release(live.engine.release, seed))
        migrator.make_ready(before.engine.space, live)
        kept = sum(len(keys) for keys, _ in migrator._changed.values())
        assert (before.space, live.space) in migrator._changed
        assert 0 < kept <= 2 * len(ITEMS)
        assert len(migrator._maps) <= 3


def test_no_release_stays_in_memory_once_another_serves(
    base: Release, redis_client: redis.Redis, redis_url: str, namespace: str
) -> None:
    settings = Settings(
        namespace=namespace,
        redis=RedisSettings(url=redis_url),
        model=ModelSettings(releases=base.path.parent, watch_s=0.05, device="cpu"),
    )
    marks = build_marks(settings)
    updater = updater_on(settings, Engine(base, device="cpu"), marks, marks.keys, NoRejects())
    updater.catalogue.upsert(ITEMS, Origin(1, 0))
    swapper = build_swapper(settings, updater, _raise)
    chain = [base]
    for seed in range(3):
        chain.append(build_turned_release(chain[-1], seed))

    def fold(offset: int) -> None:
        clicks = [
            Click(user_id=u, item_id="A-1", ts=NOW_MS, event_id=f"{u}{offset}") for u in USERS
        ]
        places = range(offset, offset + len(USERS))
        piece = Slice(settings.topic("events"), 0, 1, 1)
        for click, place in zip(clicks, places, strict=True):
            piece.offsets.append(place)
            piece.keys.append(click.user_id.encode())
            piece.values.append(click.to_json())
            piece.timestamps_ms.append(NOW_MS)
            piece.headers.append(None)
        updater.apply(updater.prepare(updater.take_apart(MicroBatch((piece,), frozenset({1})))))

    fold(0)
    gc.collect()
    gc.disable()  # a worker collects in full once in hours: no release may wait for that
    swapper.start()
    try:
        for n, release in enumerate(chain[1:], 1):
            # As a restart of Redis: the error that comes of it keeps what its callers held.
            redis_client.script_flush()
            fold(n * len(USERS))
            left = [weakref.ref(updater.catalogue), weakref.ref(updater.catalogue.engine)]
            make_current(release)
            space = release.space
            eventually("it serves", lambda s=space: updater.catalogue.engine.space == s)  # type: ignore[misc]
            eventually("the one before is gone", lambda refs=left: not any(r() for r in refs))  # type: ignore[misc]
            eventually("all are moved", lambda r=release: _swept(redis_client, namespace, r))  # type: ignore[misc]
    finally:
        gc.enable()
        swapper.stop()


def _swept(client: redis.Redis, namespace: str, release: Release) -> bool:
    told = progress(client, Keys(namespace), release.space)
    return told is not None and told.done


def test_another_sweeper_goes_on_where_one_died(
    base: Release,
    items: ItemStore,
    store: ProfileStore,
    open_release: Open,
    redis_client: redis.Redis,
    namespace: str,
) -> None:
    fill(open_release(base), store)
    new = open_release(build_turned_release(base, 2))
    first = sweeper(redis_client, namespace, base, store, items, new)
    move, pages = first._move, 0

    def dies(users: list[str], catalogue: Catalogue) -> int:
        nonlocal pages
        pages += 1
        if pages > 1:
            raise KeyboardInterrupt
        return move(users, catalogue)

    first._move = dies  # type: ignore[method-assign]
    with pytest.raises(KeyboardInterrupt):
        first.sweep()
    half = progress(redis_client, Keys(namespace), new.engine.space)
    assert half is not None
    assert 0 < half.moved < len(USERS)
    second = sweeper(redis_client, namespace, base, store, items, new)
    assert not second.sweep()  # it is the first one's turn still
    redis_client.delete(Keys(namespace).sweep_turn())  # which expires by itself
    for _ in range(3):
        second.sweep()
    assert spaces(store) == {new.space}
    told = progress(redis_client, Keys(namespace), new.engine.space)
    assert told is not None
    assert (told.moved, told.done) == (len(USERS), True)


def test_a_reader_finds_profile_and_items_of_one_space_at_every_moment(
    base: Release,
    items: ItemStore,
    store: ProfileStore,
    open_release: Open,
    redis_client: redis.Redis,
    redis_url: str,
    namespace: str,
) -> None:
    fill(open_release(base), store)
    with ProfileReader(redis_url, namespace) as reader:
        before = [reader.nearest_items(user, 3) for user in USERS[:40]]
        new = open_release(build_turned_release(base, 2))
        assert [reader.nearest_items(user, 3) for user in USERS[:40]] == before
        swept = sweeper(redis_client, namespace, base, store, items, new)
        move, halves = swept._move, set()

        def read_between(users: list[str], catalogue: Catalogue) -> int:
            moved = move(users, catalogue)
            halves.update(spaces(store))
            for user, found in zip(USERS, before, strict=False):
                nearest = reader.nearest_items(user, 3)
                assert [i.item_id for i in nearest] == [i.item_id for i in found]
                assert nearest[0].cosine == pytest.approx(1, abs=1e-4)
            return moved

        swept._move = read_between  # type: ignore[method-assign]
        moments = 0
        while not swept.sweep():
            moments += 1
        assert moments
        assert len(halves) == 2  # it was read while some had moved and others had not
        items.drop_space(new.engine.space)
        reader._matrices.clear()
        with pytest.raises(SpaceMismatch):
            reader.nearest_items("u1", 3)


def test_shipped_vectors_are_taken_before_any_text_is_encoded(
    base: Release, items: ItemStore, open_release: Open
) -> None:
    open_release(base).upsert(ITEMS, Origin(1, 0))
    texts = [item_text(i.title, i.category, i.brand, i.description) for i in ITEMS]
    rows = np.eye(DIMENSIONS, dtype=np.float32)[np.arange(len(ITEMS)) % DIMENSIONS]
    versions = [text_version(text) for text in texts]
    versions[5] = "00" * 8  # it was trained on another text
    release = publish(
        base,
        Projection.load(base.path / "projection.safetensors"),
        item_vectors=CatalogueVectors([i.item_id for i in ITEMS], versions, rows),
        learned_items=True,
        now=datetime.now(UTC),
    )
    open_release(release)
    stored = items.vectors_by_key(release.space, [key64(i.item_id) for i in ITEMS])
    assert len(stored) == len(ITEMS)
    own = release.load_encoder(device="cpu").encode([texts[5]])[0]
    np.testing.assert_allclose(stored[key64("A-5")], own, atol=1e-5)
    for i in (0, 1, 39):
        np.testing.assert_array_equal(stored[key64(f"A-{i}")], rows[i])


def test_where_no_release_leads_a_map_is_fitted_on_the_items(
    base: Release, items: ItemStore, store: ProfileStore, open_release: Open, tmp_path: Path
) -> None:
    fill(open_release(base), store)
    tower = tmp_path / "tiny-bert"
    other = build_base(
        tmp_path / "releases", tower, ["a b"], DIMENSIONS, device="cpu", now=datetime.now(UTC)
    )
    make_current(other)
    new = open_release(other)
    migrator = Migrator(base.path.parent, items, LAYOUT)
    profiles = store.load(USERS)
    ((_, _, space, moved),) = migrator.bring(profiles, new)
    assert (space, len(moved)) == (new.space, len(USERS))
    wanted = new.resolve([key64("A-3")], {}).vectors[0]
    np.testing.assert_allclose(profiles.header["sums"][3, 0], wanted, atol=1e-4)


def test_a_space_that_nothing_leads_from_stops_the_worker_and_harms_no_profile(
    base: Release, items: ItemStore, store: ProfileStore, open_release: Open
) -> None:
    old = open_release(base)
    fill(old, store)
    new = open_release(build_turned_release(base, 2))
    items.drop_space(old.engine.space)
    nowhere = Migrator(base.path / "encoder", items, LAYOUT)
    profiles = store.load(USERS)
    with pytest.raises(SpaceMismatch, match="back into MODEL_RELEASES"):
        nowhere.bring(profiles, new)


@pytest.mark.parametrize("is_pruned", [False, True])
def test_a_chain_of_releases_is_followed_there_and_back(
    base: Release, items: ItemStore, is_pruned: bool
) -> None:
    second = build_turned_release(base, 2)
    third = build_turned_release(second, 3)
    fourth = build_turned_release(base, 4)
    if is_pruned:
        for release in (third, fourth):
            make_current(release)
        assert set(prune(base.path.parent, 2)) == {base.id, second.id}
    migrator = Migrator(base.path.parent, items, LAYOUT)
    there = migrator.map(int(third.space, 16), int(fourth.space, 16))
    texts = ["thing 1", "thing 2"]
    start, end = (r.load_encoder(device="cpu").encode(texts) for r in (third, fourth))
    np.testing.assert_allclose(start @ there, end, atol=1e-4)
