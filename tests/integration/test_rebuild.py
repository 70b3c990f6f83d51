"""Profiles rebuilt beside the live ones, from the topic, the archive or a snapshot, while workers
fold what comes: after the flip every profile is what the oracle makes of the topic."""

from __future__ import annotations

import json
import os
import random
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
import redis
from confluent_kafka import Producer, TopicPartition
from confluent_kafka.admin import AdminClient

from model.releases import Release
from profiles import ProfileReader
from profiles.errors import ProfileNotFound
from profiles.generations import BEFORE, BUILDING, GOING, LIVE, READY, Generations
from profiles.schema import Keys
from stream import dead_letter
from stream.errors import UserError
from stream.events import Forget, Item, Search
from stream.local_stack import ApacheKafka
from stream.profile_diff import compare
from stream.rebuild import ARCHIVE, SNAPSHOT, TOPIC, Outcome, Rebuild, require_readable
from stream.settings import (
    ArchiveSettings,
    KafkaSettings,
    ModelSettings,
    ProfileSettings,
    RedisSettings,
    Settings,
    StreamSettings,
)
from stream.snapshots import create_snapshot, list_snapshots
from stream.topics import create_topics
from tests import oracle
from tests.integration.shop_traffic import (
    Bad,
    Expectation,
    Sendable,
    Traffic,
    differences,
    films,
    stored_profiles,
)
from tests.integration.test_trainer import TrainerProcess, all_committed
from tests.integration.worker_process import (
    REPOSITORY,
    LocalWorker,
    build_tiny_release,
    ends,
    eventually,
    wait_until_folded,
    workers,
)

pytestmark = [pytest.mark.kafka, pytest.mark.redis, pytest.mark.timeout(300)]

SEED = 20261125
_NOW = datetime(2026, 11, 25, 12, tzinfo=UTC)
RULES = oracle.Rules(categories=1_000)  # no bound is reached, so that every category is compared


@pytest.fixture(scope="module")
def release(tmp_path_factory: pytest.TempPathFactory) -> Release:
    return build_tiny_release(tmp_path_factory.mktemp("release"))


def _silent(what: str) -> Callable[[int, int | None], None]:
    return lambda done, total: None


class Shop:
    """Traffic in three parts, and what must come of it."""

    def __init__(self, settings: Settings, release: Release, client: redis.Redis) -> None:
        self.settings = settings
        self.client = client
        self.release = release
        self.records = films(SEED, heavy=5, light=80)

    @property
    def generations(self) -> Generations:
        return Generations(self.client, self.settings.namespace)

    def part(self, number: int) -> list[Sendable]:
        third = len(self.records) // 3
        return self.records[number * third : (number + 1) * third if number < 2 else None]

    def send(self, number: int, per_s: float = 10_000) -> Traffic:
        return Traffic(self.settings, self.part(number), per_s).start()

    def fold(self, number: int) -> None:
        """Send, and wait until all of it is saved and committed."""
        self.send(number).finish()
        wait_until_folded(self.settings)

    def rebuild(
        self, source: str = TOPIC, *, flip: bool = True, per_s: float = 0, incomplete: bool = False
    ) -> Outcome:
        with Rebuild(self.settings, source, _silent, per_s=per_s, incomplete=incomplete) as rebuild:
            return rebuild.everybody(flip=flip)

    def rebuild_one(self, user: str, source: str = TOPIC) -> None:
        with Rebuild(self.settings, source, _silent) as rebuild:
            rebuild.one(user)

    def expected(self) -> dict[str, oracle.Expected]:
        return Expectation(self.settings, self.release).profiles(RULES)

    def stored(self, generation: int | None = None) -> dict[str, Any]:
        return stored_profiles(self.client, self.settings.namespace, generation)

    def events(self, generation: int | None = None) -> int:
        """That all profiles together hold."""
        return sum(profile.events for profile in self.stored(generation).values())

    def assert_all_right(self, expected: dict[str, oracle.Expected] | None = None) -> None:
        """Every live profile as the oracle has it, within a minute."""
        must_be = expected or self.expected()

        def wrong() -> dict[str, list[str]]:
            return differences(self.stored(), must_be)

        try:
            eventually("profiles as expected", lambda: not wrong(), 60)
        except AssertionError:
            raise AssertionError(f"{len(wrong())} of {len(must_be)}: {wrong()}") from None

    def lose_beginning(self) -> None:
        """Retention deletes what the topic holds by now."""
        admin = AdminClient(self.settings.kafka.client_config())
        topic = self.settings.topic("events")
        places = [
            TopicPartition(topic, p, at) for (_, p), at in ends(self.settings, [topic]).items()
        ]
        for future in admin.delete_records(places).values():
            future.result()


@pytest.fixture
def shop(
    namespace: str, apache_kafka: ApacheKafka, redis_url: str, release: Release, tmp_path: Path
) -> Iterator[Shop]:
    settings = Settings(
        namespace=namespace,
        kafka=KafkaSettings(bootstrap=apache_kafka.bootstrap, partitions=4, session_timeout_s=6.0),
        redis=RedisSettings(url=redis_url),
        stream=StreamSettings(batch_records=64, data_dir=tmp_path),
        model=ModelSettings(releases=release.path.parent),
        profile=ProfileSettings(categories=RULES.categories),
        archive=ArchiveSettings(url=str(tmp_path / "archive"), flush_s=0.3, flush_rows=500),
    )
    create_topics(settings)
    with redis.Redis.from_url(redis_url) as client:
        yield Shop(settings, release, client)


def test_what_is_rebuilt_while_events_flow_is_what_was_folded(shop: Shop) -> None:
    with LocalWorker(shop.settings) as first, LocalWorker(shop.settings) as second:
        shop.fold(0)
        flowing = shop.send(1, per_s=150)
        outcome = shop.rebuild()
        assert outcome.flipped
        assert outcome.difference.compared > 0
        assert outcome.difference.differ == 0
        flowing.finish()
        shop.send(2).finish()
        shop.assert_all_right()
        assert (first.error, second.error) == (None, None)
        assert shop.generations.live() == outcome.generation == 1
        wait_until_folded(shop.settings)
    shop.assert_all_right()


def test_a_rebuild_of_an_idle_shop_equals_the_live_profiles(shop: Shop) -> None:
    with LocalWorker(shop.settings):
        shop.fold(0)
        shop.fold(1)
        shop.fold(2)
    letters = dead_letter.read(shop.settings, 10_000)
    outcome = shop.rebuild(flip=False)
    assert letters
    assert dead_letter.read(shop.settings, 10_000) == letters  # none is rejected twice
    found = outcome.difference
    assert found.equal, found
    assert found.same == found.compared > 50
    assert shop.generations.states() == {0: LIVE, 1: READY}
    live, made = (Keys(shop.settings.namespace, number) for number in (0, 1))
    user = next(u for u, p in shop.stored(1).items() if p.spend)
    state = shop.client.hget(made.profile(_other(shop, user)), "state")
    shop.client.hset(made.profile(user), "state", state)
    found = compare(shop.client, live, made, shop.settings.profile.own_items)
    assert (found.differ, found.examples["sums"]) == (1, [user])
    profile = shop.settings.profile.model_copy(update={"weights": {"purchase": 2.0}})
    shop.settings = shop.settings.model_copy(update={"profile": profile})
    other = shop.rebuild(flip=False)  # not the one of other weights taken further
    assert (other.generation, shop.generations.states()[1]) == (2, GOING)
    assert other.difference.fields["sums"] > 20


def _other(shop: Shop, user: str) -> str:
    return next(u for u, p in shop.stored(1).items() if u != user and p.events)


def test_kills_of_rebuild_and_worker_lose_and_double_nothing(shop: Shop, tmp_path: Path) -> None:
    with workers(tmp_path) as start:
        ann, bob = (start(shop.settings, name).wait_ready() for name in ("ann", "bob"))
        shop.fold(0)
        flowing = shop.send(1, per_s=60)
        for kills in range(2):
            shadow = len(shop.stored(1))
            process = _penchant(shop.settings, tmp_path, "rebuild", "--per-s", "400")
            try:
                eventually("it rebuilds", lambda: len(shop.stored(1)) > shadow + 5)  # noqa: B023
            finally:
                process.send_signal(signal.SIGKILL)
                process.wait()
            if kills:
                ann.kill()
        assert shop.generations.live() == 0
        last = _penchant(shop.settings, tmp_path, "rebuild")
        assert last.wait(120) == 0, (tmp_path / "penchant.log").read_text()
        assert shop.generations.live() == 1  # taken up again, not begun anew
        bob.kill()  # right after the flip
        cem = start(shop.settings, "cem").wait_ready()
        flowing.finish()
        shop.send(2).finish()
        wait_until_folded(shop.settings)
        shop.assert_all_right()
        assert cem.metric("penchant_redis_went_back") <= 1


def _penchant(settings: Settings, folder: Path, *command: str) -> subprocess.Popen[bytes]:
    environment = settings.environment() | {
        "PATH": os.environ["PATH"],
        "HOME": os.environ["HOME"],
        "OMP_NUM_THREADS": "1",
        "LANG": "C.UTF-8",
    }
    with (folder / "penchant.log").open("ab") as log:
        return subprocess.Popen(
            [sys.executable, "-m", "stream.cli", *command],
            cwd=REPOSITORY, env=environment, stdin=subprocess.DEVNULL, stdout=log,
            stderr=subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip


def test_who_is_forgotten_during_a_rebuild_stays_forgotten(shop: Shop) -> None:
    with LocalWorker(shop.settings):
        shop.fold(0)
        outcome = shop.rebuild(flip=False)
        user = next(u for u, p in shop.stored(outcome.generation).items() if p.events > 5)
        forget = Forget(event_id="now", user_id=user, ts=1_700_000_000_000)
        Traffic(shop.settings, [forget], per_s=1_000).start().finish()
        wait_until_folded(shop.settings)
        assert shop.stored()[user].events == 0
        assert shop.stored(1)[user].events > 0
        assert shop.generations.flip(1, 0)
        shop.assert_all_right()
        reader = ProfileReader(shop.settings.redis.url, shop.settings.namespace)
        with reader, pytest.raises(ProfileNotFound):
            reader.get(user)


def test_a_forgetting_that_a_worker_was_not_there_for_comes_from_the_topic(shop: Shop) -> None:
    """From the archive nobody comes back, whose rows were erased before or after it was read."""
    with (
        LocalWorker(shop.settings),
        TrainerProcess(shop.settings, Path(shop.settings.stream.data_dir)),
    ):
        shop.fold(0)
        user = next(u for u, p in shop.stored().items() if p.events > 5)
        forget = Forget(event_id="now", user_id=user, ts=1_700_000_000_000)
        again = Search(event_id="s", user_id=user, ts=1_700_000_000_001, query="heist")
        Traffic(shop.settings, [forget, again], per_s=1_000).start().finish()
        wait_until_folded(shop.settings)
        eventually("it is archived", lambda: all_committed(shop.settings))
    shop.lose_beginning()
    outcome = shop.rebuild(ARCHIVE)
    assert outcome.flipped, outcome
    assert outcome.difference.equal, outcome.difference
    found = shop.stored()[user]
    assert (found.events, len(found.seen)) == (1, 2)


def test_items_that_come_after_the_shadow_folded_their_events_are_served(shop: Shop) -> None:
    with LocalWorker(shop.settings):
        shop.fold(0)
        shop.fold(1)
        outcome = shop.rebuild(flip=False)
        assert any(p.pending for p in shop.stored(outcome.generation).values())
        shop.fold(2)  # brings the late items; the worker serves the live profiles
        assert not any(p.pending for p in shop.stored(0).values())
        assert shop.generations.flip(outcome.generation, 0)
        shop.assert_all_right()


def test_readers_go_along_with_a_flip_and_back(shop: Shop) -> None:
    with (
        LocalWorker(shop.settings) as worker,
        ProfileReader(shop.settings.redis.url, shop.settings.namespace) as reader,
    ):
        shop.fold(0)
        user = next(u for u, p in shop.stored().items() if p.events)
        assert reader.get(user).events
        shop.rebuild()
        shop.client.unlink(Keys(shop.settings.namespace).profile(user))
        eventually("it reads the rebuilt one", lambda: _has(reader, user), 10)
        shop.fold(1)
        assert shop.generations.states() == {0: BEFORE, 1: LIVE}
        require_readable(shop.settings, 0)
        assert shop.generations.flip(0, 1)
        eventually("it reads the old ones again", lambda: not _has(reader, user), 10)
        expected = shop.expected()
        shop.send(2).finish()
        assert shop.generations.flip(1, 0)
        shop.assert_all_right()
        assert expected
        assert worker.error is None


def _has(reader: ProfileReader, user: str) -> bool:
    return reader.exists(user)


def test_a_sweep_leaves_nothing_of_what_was_and_no_way_back(shop: Shop) -> None:
    with LocalWorker(shop.settings):
        shop.fold(0)
        shop.rebuild()
        shop.assert_all_right()
        assert shop.generations.give_up(0)
        assert not shop.generations.give_up(1)  # it is live
        assert not shop.generations.flip(0, 1)
        assert shop.generations.states()[0] == GOING
        assert max(shop.generations.remove(0, per_s=0)) > 50
        assert not shop.stored(0)
        assert shop.generations.states() == {1: LIVE}
        shop.send(1).finish()
        shop.assert_all_right()


def test_one_shoppers_profile_is_mended_while_they_act(shop: Shop) -> None:
    with LocalWorker(shop.settings) as worker:
        shop.fold(0)
        heavy = max(shop.stored().items(), key=lambda pair: pair[1].events)[0]
        others = {u: p.watermark for u, p in shop.stored().items() if u != heavy}
        flowing = shop.send(1, per_s=150)
        shop.client.unlink(Keys(shop.settings.namespace).profile(heavy))
        threading.Event().wait(0.3)
        shop.rebuild_one(heavy)
        flowing.finish()
        shop.send(2).finish()
        shop.assert_all_right()
        assert worker.error is None
    assert shop.generations.states() == {0: LIVE}
    assert others
    assert not list(shop.client.scan_iter(f"{shop.settings.namespace}:g*:*"))
    with pytest.raises(UserError, match="nothing of user 'nobody'"):
        shop.rebuild_one("nobody")


def test_a_topic_without_its_beginning_is_refused_and_the_archive_has_it(shop: Shop) -> None:
    folder = Path(shop.settings.stream.data_dir)
    with LocalWorker(shop.settings):
        with TrainerProcess(shop.settings, folder) as trainer:
            shop.fold(0)
            shop.fold(1)
            eventually(f"it is archived\n{trainer.log}", lambda: all_committed(shop.settings))
        expected_before = shop.stored()
        everything = Expectation(shop.settings, shop.release)
        shop.lose_beginning()
        shop.fold(2)
        with pytest.raises(UserError, match="--from archive"):
            shop.rebuild()
        user = max(expected_before.items(), key=lambda pair: pair[1].events)[0]
        with pytest.raises(UserError, match="--from archive"):
            shop.rebuild_one(user)
        shop.client.unlink(Keys(shop.settings.namespace).profile(user))
        shop.rebuild_one(user, ARCHIVE)
        outcome = shop.rebuild(ARCHIVE)
        assert outcome.flipped, outcome
        assert outcome.lacking.rows == 0
        rest = Expectation(shop.settings, shop.release)
        known = {(r.partition, r.offset) for r in everything.records}
        rest.records = [
            *everything.records,
            *(r for r in rest.records if (r.partition, r.offset) not in known),
        ]
        shop.assert_all_right(rest.profiles(RULES))


def test_an_archive_that_lost_its_beginning_takes_no_profiles_place(shop: Shop) -> None:
    folder = Path(shop.settings.stream.data_dir)
    with LocalWorker(shop.settings), TrainerProcess(shop.settings, folder):
        shop.fold(0)
        eventually("it is archived", lambda: all_committed(shop.settings))
    shop.lose_beginning()
    first = min((folder / "archive").glob("day=*/*.parquet"))
    held = first.read_bytes()
    first.unlink()
    outcome = shop.rebuild(ARCHIVE)
    assert not outcome.flipped
    assert outcome.difference.lost
    assert shop.generations.states() == {0: LIVE, 1: READY}
    first.write_bytes(held)
    assert shop.rebuild(ARCHIVE).flipped  # made from the beginning
    assert shop.generations.states() == {0: BEFORE, 1: GOING, 2: LIVE}


@pytest.mark.parametrize("aside", [False, True], ids=["damaged", "set aside"])
def test_an_archive_with_a_damaged_segment_is_refused_unless_asked_for(
    shop: Shop, aside: bool
) -> None:
    """Though nothing is left to compare with: Redis lost all profiles as well."""
    folder = Path(shop.settings.stream.data_dir)
    with LocalWorker(shop.settings), TrainerProcess(shop.settings, folder):
        shop.fold(0)
        eventually("it is archived", lambda: all_committed(shop.settings))
    shop.lose_beginning()
    events = shop.events()
    shop.client.unlink(*map(Keys(shop.settings.namespace).profile, shop.stored()))
    segment = min((folder / "archive").glob("day=*/*.parquet"))
    held = segment.read_bytes()
    segment.write_bytes(held[: len(held) // 2])
    if aside:
        damaged = folder / "archive" / "damaged" / segment.parent.name
        damaged.mkdir(parents=True)
        segment.rename(damaged / segment.name)
    with pytest.raises(UserError, match=f"{re.escape(segment.name)}.*--incomplete"):
        shop.rebuild(ARCHIVE)
    assert list(shop.generations.states().values()) == [LIVE, BUILDING]
    outcome = shop.rebuild(ARCHIVE, flip=False, incomplete=True)
    assert 0 < shop.events(outcome.generation) < events
    segment.write_bytes(held)  # restored
    assert shop.rebuild(ARCHIVE).flipped  # made from the beginning
    assert shop.events() == events


def test_a_snapshot_taken_amid_the_flow_is_made_whole_from_the_topic(
    shop: Shop, tmp_path: Path
) -> None:
    url = str(tmp_path / "snapshots")
    with LocalWorker(shop.settings) as worker:
        shop.fold(0)
        flowing = shop.send(1, per_s=300)
        made = create_snapshot(
            shop.client, shop.settings.namespace, url, _NOW, lambda done, total: None
        )
        assert made.users > 20
        assert [s.url for s in list_snapshots(url)] == [made.url]
        flowing.finish()
        wait_until_folded(shop.settings)
        # One that has more may have lost some; one that waits for a text may be a moment behind.
        stored = shop.stored().items()
        by_events = sorted((p.events, u) for u, p in stored if p.events and not p.pending)
        other, spoiled = by_events[0][1], by_events[-1][1]
        keys = Keys(shop.settings.namespace)
        state = shop.client.hget(keys.profile(other), "state")
        shop.client.hset(keys.profile(spoiled), "state", state)  # a fold gone mad
        outcome = shop.rebuild(f"{SNAPSHOT}{made.url}")
        assert outcome.flipped, outcome
        assert outcome.difference.differ == 1
        shop.send(2).finish()
        shop.assert_all_right()
        assert worker.error is None


def test_a_snapshot_that_is_not_as_it_was_written_is_refused(shop: Shop, tmp_path: Path) -> None:
    url = str(tmp_path / "snapshots")
    with LocalWorker(shop.settings):
        shop.fold(0)
    made = create_snapshot(
        shop.client, shop.settings.namespace, url, _NOW, lambda done, total: None
    )
    part = Path(made.url) / made.parts[0].name
    part.write_bytes(part.read_bytes()[:-1] + b"?")
    with pytest.raises(UserError, match="not as it was written"):
        shop.rebuild(f"{SNAPSHOT}{made.url}")
    manifest = Path(made.url) / "manifest.json"
    assert json.loads(manifest.read_text())["users"] == made.users
    manifest.unlink()
    assert list_snapshots(url) == []
    with pytest.raises(UserError, match="no complete snapshot"):
        shop.rebuild(f"{SNAPSHOT}{made.url}")


def test_strays_that_are_sent_on_count_once_across_a_flip(shop: Shop) -> None:
    """Every event on a partition of chance, so that three of four are forwarded; without commands
    and event ids, for which the order between partitions would count."""
    settings = shop.settings = shop.settings.model_copy(
        update={
            "stream": shop.settings.stream.model_copy(update={"repartition": True}),
            "profile": ProfileSettings(categories=RULES.categories, dedupe=0),
        }
    )
    create_topics(settings)
    shop.records = [r for r in shop.records if not isinstance(r, Bad | Forget)]
    rules = replace(RULES, seen=0)
    with LocalWorker(settings) as worker:
        _scatter(shop, 0)
        wait_until_folded(settings)
        outcome = shop.rebuild(flip=False)
        assert outcome.difference.equal, outcome.difference
        _scatter(shop, 1)
        threading.Event().wait(0.5)  # amid the flow
        assert shop.generations.flip(outcome.generation, 0)
        _scatter(shop, 2)
        shop.assert_all_right(Expectation(settings, shop.release).profiles(rules))
        assert worker.error is None


def _scatter(shop: Shop, number: int) -> None:
    chance = random.Random(number)
    producer = Producer(shop.settings.kafka.client_config())
    events = [r for r in shop.part(number) if not isinstance(r, Item | Bad)]
    for event in events:
        producer.produce(
            shop.settings.topic("events"),
            event.to_json(),
            event.user_id.encode(),
            partition=chance.randrange(4),
        )
        producer.poll(0)
    assert producer.flush(60) == 0
    items = [r for r in shop.part(number) if isinstance(r, Item)]
    Traffic(shop.settings, items, per_s=10_000).start().finish()


def test_the_commands_say_what_they_did(shop: Shop, tmp_path: Path) -> None:
    url = str(tmp_path / "snapshots")
    with LocalWorker(shop.settings):
        shop.fold(0)
    said = ""

    def run(*command: str, code: int = 0) -> str:
        nonlocal said
        ended = _penchant(shop.settings, tmp_path, *command).wait(120)
        log = (tmp_path / "penchant.log").read_text()
        said, new = log, log.removeprefix(said)
        assert ended == code, new
        return " ".join(new.split())

    assert "nothing is being made" in run("diff", code=1)
    assert "profiles" in run("snapshot", "create", url)
    (made,) = list_snapshots(url)
    assert "generation 1 is ready" in run("rebuild", "--no-flip")
    assert "0 differ" in run("diff")
    user = next(u for u, p in shop.stored().items() if p.events)
    assert f"the profile of {user} is rebuilt" in run("rebuild", "--user", user)
    shop.client.unlink(Keys(shop.settings.namespace, 1).profile(user))
    assert "1 only in live" in run("diff", code=1)
    assert "generation 1 is live now, in place of 0" in run("generations", "flip", "1")
    assert "generation 9 is not ready" in run("generations", "flip", "9", code=1)
    assert "generation 3 is live now" in run("snapshot", "restore", made.url)
    assert "removed generation 0" in run("generations", "sweep", "--per-s", "0")
    assert shop.generations.states() == {3: LIVE}
    shop.assert_all_right()
