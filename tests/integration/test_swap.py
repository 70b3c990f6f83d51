"""Releases that change while events flow, on a real broker: every event counts once, in the space
that is live in the end, whatever happened on the way."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import redis

from model.releases import Release, make_current, rollback
from profiles import Profile, ProfileReader
from profiles.items import ItemStore
from profiles.schema import Keys
from stream import metrics
from stream.local_stack import ApacheKafka
from stream.settings import (
    KafkaSettings,
    ModelSettings,
    ProfileSettings,
    RedisSettings,
    Settings,
    StreamSettings,
)
from stream.sweeper import Progress, progress
from stream.topics import create_topics
from tests import oracle
from tests.integration.shop_traffic import (
    Expectation,
    Traffic,
    differences,
    films,
    stored_profiles,
)
from tests.integration.worker_process import (
    LocalWorker,
    WorkerProcess,
    build_tiny_release,
    build_turned_release,
    eventually,
    wait_until_folded,
    workers,
)

pytestmark = [pytest.mark.kafka, pytest.mark.redis, pytest.mark.timeout(600)]

SEED = 20261123
HEAVY, LIGHT = 6, 120  # shoppers, with about 1,700 events
# Most of what the heavy ones did lies beyond the window, and moves by the map alone.
RULES = oracle.Rules(window=20, categories=1_000)

Start = Callable[[Settings, str], WorkerProcess]


@pytest.fixture
def base(tmp_path: Path) -> Release:
    return build_tiny_release(tmp_path)


@pytest.fixture
def settings(namespace: str, apache_kafka: ApacheKafka, redis_url: str, base: Release) -> Settings:
    made = Settings(
        namespace=namespace,
        kafka=KafkaSettings(bootstrap=apache_kafka.bootstrap, partitions=4, session_timeout_s=6.0),
        redis=RedisSettings(url=redis_url),
        stream=StreamSettings(batch_records=64),
        model=ModelSettings(releases=base.path.parent, watch_s=0.1),
        profile=ProfileSettings(window=RULES.window, categories=RULES.categories),
    )
    create_topics(made)
    return made


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    with workers(tmp_path) as starter:
        yield starter


def sweep_into(settings: Settings, space: str) -> Progress:
    with redis.Redis.from_url(settings.redis.url) as client:
        found = progress(client, Keys(settings.namespace), space)
    return found or Progress(0, 0, done=False)


def swept(settings: Settings, space: str) -> bool:
    return sweep_into(settings, space).done


def assert_all_right_in(settings: Settings, release: Release) -> dict[str, int]:
    """Every profile is what folding its events in this release's space gives."""
    eventually("all profiles are swept", lambda: swept(settings, release.space))
    expected = Expectation(settings, release).profiles(RULES)
    stored = stored_now(settings)
    with redis.Redis.from_url(settings.redis.url) as client:
        current = client.get(Keys(settings.namespace).current_space())
    wrong = differences(stored, expected)
    assert not wrong, f"{len(wrong)} of {len(expected)} profiles are wrong: {wrong}"
    assert {p.space for p in stored.values()} <= {release.space, ""}
    assert current == release.space.encode()
    assert_items_complete(settings, release, stored)
    return {user: profile.events for user, profile in stored.items()}


def assert_items_complete(settings: Settings, release: Release, stored: dict[str, Profile]) -> None:
    """All items that have a vector anywhere have one in this space, and readers find them."""
    with redis.Redis.from_url(settings.redis.url) as client:
        items = ItemStore(client, Keys(settings.namespace))
        keys = [key for page in items.item_pages() for key in page]
        vectors = items.vectors_by_key(release.space, keys)
        texts = items.records(keys)
        encoder = release.load_encoder(device="cpu")
        assert set(vectors) == set(texts)
        assert all(abs(float(np.linalg.norm(v)) - 1) < 1e-3 for v in vectors.values())
        assert encoder.dimensions == len(next(iter(vectors.values())))
    with ProfileReader(settings.redis.url, settings.namespace) as reader:
        user = next(u for u, p in stored.items() if p.space)
        assert reader.nearest_items(user, 5)


def serves(worker: LocalWorker, release: Release) -> Callable[[], bool]:
    def holds() -> bool:
        assert worker.error is None, worker.error
        return worker.updater.catalogue.engine.release.id == release.id

    return holds


def applied() -> float:
    return float(metrics.EVENTS_APPLIED._value.get())


def test_events_flow_through_a_swap_a_broken_release_and_a_rollback(
    settings: Settings, base: Release
) -> None:
    folder = base.path.parent
    second = build_turned_release(base, 2)
    third = build_turned_release(second, 3)
    projection = third.path / "projection.safetensors"
    whole = projection.read_bytes()
    records = films(SEED, HEAVY, LIGHT)
    with LocalWorker(settings) as worker:
        traffic = Traffic(settings, records, per_s=60).start()
        eventually("events flow", lambda: applied() > 0)
        first = weakref.ref(worker.updater.catalogue.engine)
        make_current(second)
        eventually("the second serves", serves(worker, second))
        eventually("the first engine is let go", lambda: first() is None)

        projection.write_bytes(whole[:-7])
        refused = metrics.RELEASES_REFUSED._value.get()
        make_current(third)
        eventually("it is refused", lambda: metrics.RELEASES_REFUSED._value.get() > refused)
        before = applied()
        eventually("events flow on", lambda: applied() > before)
        assert serves(worker, second)()

        assert rollback(folder).id == second.id
        assert rollback(folder).id == base.id
        eventually("the first serves again", serves(worker, base))
        projection.write_bytes(whole)
        make_current(third)
        eventually("the third serves", serves(worker, third))
        traffic.finish()
        wait_until_folded(settings)
        assert_all_right_in(settings, third)
        assert worker.error is None
    flips, took_s = metrics.RELEASES_SWAPPED._value.get(), metrics.FLIP_S._sum.get()
    print(f"\n{flips:.0f} flips in {1000 * took_s:.3f} ms")


def swap_to(release: Release, worker: WorkerProcess) -> None:
    before = worker.metric("penchant_releases_swapped")
    make_current(release)
    eventually(
        f"the swap to {release.id}\n{worker.log}",
        lambda: worker.metric("penchant_releases_swapped") > before,
    )


def test_ten_swaps_in_a_row_with_a_crash_in_the_middle_of_one(
    settings: Settings, base: Release, start: Start
) -> None:
    # So slow that a kill finds the sweep at work: its one page takes seconds.
    slow = settings.stream.model_copy(update={"sweep_per_s": 50.0})
    settings = settings.model_copy(update={"stream": slow})
    chain = [base]
    for seed in range(10):
        chain.append(build_turned_release(chain[-1], seed))
    worker = start(settings, "ann").wait_ready()
    traffic = Traffic(settings, films(SEED, HEAVY, LIGHT), per_s=40).start()
    eventually("events flow", lambda: worker.metric("penchant_events_applied") > 0)
    for release in chain[1:5]:
        swap_to(release, worker)
    eventually("the sweeps are over", lambda: swept(settings, chain[4].space))
    moved = worker.metric("penchant_profiles_migrated")
    make_current(chain[5])
    eventually("the sweep moves some", lambda: sweep_into(settings, chain[5].space).moved > 0)
    assert worker.metric("penchant_profiles_migrated") > moved
    worker.kill()
    assert not swept(settings, chain[5].space)
    successor = start(settings, "bob").wait_ready()
    for release in chain[6:]:
        swap_to(release, successor)
    traffic.finish()
    wait_until_folded(settings)
    assert_all_right_in(settings, chain[-1])
    assert successor.running
    assert successor.metric("penchant_release_flip_seconds_count") == len(chain[6:])


def test_a_worker_that_is_behind_folds_into_the_space_of_those_ahead(
    settings: Settings, base: Release
) -> None:
    second = build_turned_release(base, 2)
    blind = settings.model_copy(
        update={
            "model": settings.model.model_copy(update={"watch_s": 0}),
            "stream": settings.stream.model_copy(update={"sweep_per_s": 0}),
        }
    )
    records = films(SEED, HEAVY, LIGHT)
    half = len(records) // 2
    with LocalWorker(settings) as ahead:
        Traffic(settings, records[:half], per_s=10_000).start().finish()
        wait_until_folded(settings)
    assert ahead.error is None
    before = stored_now(settings)
    with LocalWorker(blind) as behind:  # it loads the first release, and stays there
        make_current(second)
        sweep_all(LocalWorker(settings), second)
        Traffic(settings, records[half:], per_s=10_000).start().finish()
        wait_until_folded(settings)
        assert behind.error is None
        assert behind.updater.catalogue.engine.release.id == base.id
    stored = stored_now(settings)
    for release in (base, second):  # newcomers are in the space of the worker that met them
        there = {u: p for u, p in stored.items() if p.space in (release.space, "")}
        expected = Expectation(settings, release).profiles(RULES)
        wrong = differences(there, {u: expected[u] for u in there})
        assert not wrong, f"{release.id}: {wrong}"
    grown = {u for u, p in before.items() if stored[u].events > p.events}
    assert grown
    assert {stored[u].space for u in grown} <= {second.space, ""}
    assert base.space in {p.space for p in stored.values()}


def stored_now(settings: Settings) -> dict[str, Profile]:
    with redis.Redis.from_url(settings.redis.url) as client:
        return stored_profiles(client, settings.namespace)


def sweep_all(worker: LocalWorker, release: Release) -> None:
    """By a worker that takes no events."""
    assert worker.updater.catalogue.engine.release.id == release.id
    worker.swapper.start()
    eventually("all profiles are swept", lambda: swept(worker.settings, release.space))
    worker.swapper.stop()
