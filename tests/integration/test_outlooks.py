"""Outlooks beside a whole worker, on a real broker: computed from the profile that is there, by the
release that is live, and gone with it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import redis
import torch

from model.foreteller import Foreteller
from model.releases import Release, make_current
from profiles import Outlook, Profile, ProfileNotFound, ProfileReader
from profiles.arithmetic import Floats
from profiles.items import ItemStore
from profiles.schema import Keys
from stream import metrics
from stream.events import AddToCart, Event, Forget, Item, Purchase, Search, View
from stream.local_stack import ApacheKafka
from stream.producer import EventProducer
from stream.settings import KafkaSettings, ModelSettings, RedisSettings, Settings, StreamSettings
from stream.topics import create_topics
from stream.window_rows import window_rows
from tests import oracle
from tests.foretelling import build_foretelling_release
from tests.integration.shop_traffic import (
    Expectation,
    Traffic,
    differences,
    films,
    stored_profiles,
)
from tests.integration.worker_process import (
    LocalWorker,
    build_tiny_release,
    build_turned_release,
    eventually,
    wait_until_folded,
)

pytestmark = [pytest.mark.kafka, pytest.mark.redis, pytest.mark.timeout(600)]

T_MS = 1_760_000_000_000
EVENTS = 8  # of the encoder's window, fewer than a profile keeps


@pytest.fixture
def base(tmp_path: Path) -> Release:
    return build_tiny_release(tmp_path)


@pytest.fixture
def settings(namespace: str, apache_kafka: ApacheKafka, redis_url: str, base: Release) -> Settings:
    made = Settings(
        namespace=namespace,
        kafka=KafkaSettings(bootstrap=apache_kafka.bootstrap, partitions=2, session_timeout_s=6.0),
        redis=RedisSettings(url=redis_url),
        stream=StreamSettings(batch_records=64, outlook_share=0.5),
        model=ModelSettings(releases=base.path.parent, watch_s=0.1),
    )
    create_topics(made)
    return made


@pytest.fixture
def reader(settings: Settings) -> Iterator[ProfileReader]:
    with ProfileReader(settings.redis.url, settings.namespace) as opened:
        yield opened


def send(settings: Settings, *records: Event | Item) -> None:
    with EventProducer(settings.kafka.client_config(), settings.namespace) as producer:
        for record in records:
            (producer.send_item if isinstance(record, Item) else producer.send)(record)  # type: ignore[operator]
    wait_until_folded(settings)


def assert_foretold_by(settings: Settings, release: Release, profile: Profile) -> None:
    """The outlook is what the release says of the very profile that it lies beside."""
    told = profile.outlook
    assert told is not None
    assert (told.release, told.saves_since) == (release.id, 0)
    assert told.updated_ms == profile.updated_ms
    assert told.next_interest is not None
    with redis.Redis.from_url(settings.redis.url) as client:
        items = ItemStore(client, Keys(settings.namespace))

        def vectors_of(keys: list[int]) -> Floats:
            known = items.vectors_by_key(release.space, keys)
            zeros = np.zeros(release.dimensions, np.float32)
            return np.array([known.get(key, zeros) for key in keys], np.float32).reshape(
                len(keys), -1
            )

        foreteller = Foreteller.load(release, torch.device("cpu"))
        assert foreteller is not None
        want = foreteller(*window_rows([profile.window], EVENTS, vectors_of))
    np.testing.assert_allclose(told.next_interest, want.next_interest[0], atol=1e-4)
    assert told.heads.keys() == {"purchase", "churn"}
    for name, chance in told.heads.items():
        assert chance == pytest.approx(want.heads[name][0], abs=1e-4)


def up_to_date(reader: ProfileReader, user: str, release: Release) -> Callable[[], bool]:
    def is_so() -> bool:
        told = reader.outlook(user)
        return told is not None and told.release == release.id and told.saves_since == 0

    return is_so


def test_an_outlook_comes_after_events_changes_with_them_follows_a_swap_and_is_forgotten(
    settings: Settings, base: Release, reader: ProfileReader
) -> None:
    first = build_foretelling_release(base, 1)
    second = build_foretelling_release(build_turned_release(first, 2), 3)
    assert first.space == base.space != second.space
    names = ("Wool scarf, red", "Ceramic mug", "Desk lamp", "Linen shirt")
    catalogue = [Item(item_id=f"i{k}", title=name) for k, name in enumerate(names)]
    bob = [View(user_id="bob", item_id=f"i{k % 4}", ts=T_MS + k) for k in range(12)]
    with LocalWorker(settings) as worker:
        send(settings, *catalogue, *bob, View(user_id="ann", item_id="i0", ts=T_MS))
        assert reader.outlook("ann") is None
        assert len(worker.updater.outlooks) == 0  # nobody waits for what no release can tell

        make_current(first)
        eventually("it serves", lambda: worker.updater.catalogue.engine.release.id == first.id)
        send(settings, Search(user_id="ann", query="a lamp", ts=T_MS + 1000))
        eventually("ann has an outlook", up_to_date(reader, "ann", first))
        assert_foretold_by(settings, first, reader.get("ann"))
        before: Outlook | None = reader.outlook("ann")
        send(settings, Purchase(user_id="ann", item_id="i2", ts=T_MS + 90_000))
        eventually("it is another", up_to_date(reader, "ann", first))
        profile = reader.get("ann")
        assert_foretold_by(settings, first, profile)
        assert before is not None
        assert before.next_interest is not None
        assert profile.outlook is not None
        assert profile.outlook.next_interest is not None
        assert float(before.next_interest @ profile.outlook.next_interest) < 0.999
        assert reader.outlook("bob") is None

        make_current(second)  # nobody acts: the sweeper moves them, and they are foretold
        for user in ("ann", "bob"):
            eventually(f"{user} is foretold anew", up_to_date(reader, user, second))
            assert_foretold_by(settings, second, reader.get(user))
        assert {r.signals["next_interest"] for r in reader.recommend("bob")} != {0.0}

        send(settings, Forget(user_id="ann", ts=T_MS + 100_000))
        with pytest.raises(ProfileNotFound):
            reader.outlook("ann")
        key = Keys(settings.namespace).profile("ann")
        with redis.Redis.from_url(settings.redis.url) as client:
            assert set(client.hkeys(key)) == {b"state", b"fence", b"glance"}
        send(settings, AddToCart(user_id="ann", item_id="i1", ts=T_MS + 200_000))
        eventually("ann begins anew", up_to_date(reader, "ann", second))
        assert_foretold_by(settings, second, reader.get("ann"))
        assert worker.error is None


def test_in_the_end_everybody_has_the_outlook_of_the_profile_that_they_have(
    settings: Settings, base: Release, reader: ProfileReader
) -> None:
    release = build_foretelling_release(base, 1)
    make_current(release)
    computed = metrics.OUTLOOKS_COMPUTED._value.get()
    with LocalWorker(settings) as worker:
        Traffic(settings, films(20261125, 4, 60), per_s=400).start().finish()
        wait_until_folded(settings)
        eventually("nobody waits", lambda: not len(worker.updater.outlooks))

        def stored() -> dict[str, Profile]:
            with redis.Redis.from_url(settings.redis.url) as client:
                return stored_profiles(client, settings.namespace)

        users = [u for u, p in stored().items() if p.space and len(p.window)]
        for user in users:
            eventually(f"{user} is up to date", up_to_date(reader, user, release))
        for user, profile in reader.get_many(users).items():
            assert user == profile.user_id
            assert_foretold_by(settings, release, profile)
        expected = Expectation(settings, release).profiles(oracle.Rules())
        assert not differences(stored(), expected)
        assert worker.error is None
    assert metrics.OUTLOOKS_COMPUTED._value.get() - computed >= len(users) > 50
