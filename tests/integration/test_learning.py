"""One turn of the learning loop, from an archive on disk to a live release that a worker serves."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Iterator
from contextlib import closing
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import pytest

from model.engine import Engine
from model.errors import NothingToLearn
from model.ranker import RANKER, load_weights
from model.releases import Release, decisions, history, load_current
from model.text import item_text, text_version
from profiles import ranking
from profiles.items import ItemStore
from profiles.schema import ItemRecord, Keys
from stream import ranker_learning
from stream.archive import Archive, Folder, Pending
from stream.events import Event, Purchase
from stream.learning import Outcome, learn
from stream.settings import (
    ArchiveSettings,
    LearnSettings,
    ModelSettings,
    RedisSettings,
    Settings,
    StreamSettings,
)
from stream.swapping import publish_ranker
from tests.integration.worker_process import DIMENSIONS, build_tiny_release

pytestmark = pytest.mark.redis

DAY_MS = 86_400_000
T0_MS = 1_700_000_000_000
ITEMS = 60
_WORDS = ("wool", "silk", "cotton", "linen", "felt", "velvet", "satin", "denim", "hemp", "tweed")
_THINGS = ("scarf", "shawl", "hat", "glove", "sock", "coat")


def _records() -> list[ItemRecord]:
    pairs = itertools.islice(itertools.product(_WORDS, _THINGS), ITEMS)
    return [ItemRecord(f"i{i:02}", f"{word} {thing}") for i, (word, thing) in enumerate(pairs)]


def _circle(users: int = 120, events: int = 24, seed: int = 1) -> list[Event]:
    """After item i comes item i + 1: what no text can tell."""
    chance = random.Random(seed)
    found: list[Event] = []
    for j in range(users):
        at, first_ms = chance.randrange(ITEMS), T0_MS + chance.randrange(DAY_MS)
        found += [
            Purchase(user_id=f"u{j}", item_id=f"i{(at + k) % ITEMS:02}", ts=first_ms + k * DAY_MS)
            for k in range(events)
        ]
    return sorted(found, key=lambda event: event.ts)


@pytest.fixture
def shop(redis_url: str, namespace: str, tmp_path: Path) -> Settings:
    build_tiny_release(tmp_path)
    return Settings(
        namespace=namespace,
        redis=RedisSettings(url=redis_url),
        stream=StreamSettings(data_dir=tmp_path / "data"),
        model=ModelSettings(releases=tmp_path / "releases", dimensions=DIMENSIONS, device="cpu"),
        archive=ArchiveSettings(url=str(tmp_path / "archive")),
        learn=LearnSettings(epochs=12, window=10, compatibility=0.0),
    )


@pytest.fixture
def items(shop: Settings) -> Iterator[ItemStore]:
    with closing(shop.redis.connection().open()) as client:
        yield ItemStore(client, Keys(shop.namespace))


@pytest.fixture
def turn(shop: Settings, items: ItemStore) -> Callable[[], Outcome]:
    return lambda: learn(shop, items, datetime.now(UTC), lambda stage, done, of: None)


def _fill(shop: Settings, events: list[Event], offset: int = 0) -> None:
    pending = Pending(7, 0, offset, offset)
    pending.add(list(range(offset, offset + len(events))), events, offset + len(events))
    Archive(Folder(Path(shop.archive.url))).write(pending)


def _store(items: ItemStore, records: list[ItemRecord]) -> None:
    items.put(records, [text_version(_text(r)) for r in records], [None] * len(records))


def _text(record: ItemRecord) -> str:
    return item_text(record.title, record.category, record.brand, record.description)


def _releases(shop: Settings) -> list[str]:
    return [move.release for move in history(shop.model.releases)]


def test_what_is_learned_goes_live_with_the_vectors_of_the_whole_catalogue(
    shop: Settings, items: ItemStore, turn: Callable[[], Outcome]
) -> None:
    _store(items, _records())
    _fill(shop, _circle())
    parent = load_current(shop.model.releases)
    outcome = turn()
    assert outcome.decision.reasons == ()
    live = load_current(shop.model.releases)
    assert outcome.release == live
    assert (live.parent, live.learned_items) == (parent.id, True)
    assert live.space != parent.space
    shipped = live.load_item_vectors()
    assert shipped is not None
    assert shipped.item_ids == [record.item_id for record in _records()]
    assert Engine(live, device="cpu").space == live.space
    transition = live.load_transition()
    assert transition is not None
    assert (transition.from_space, transition.to_space) == (parent.space, live.space)
    (about,) = decisions(shop.model.releases)
    assert (about["decision"], about["candidate"]) == ("accept", live.id)
    assert not list((shop.stream.data_dir / "training").iterdir())


def test_a_ranker_goes_with_the_release_and_readers_get_it(
    shop: Settings, items: ItemStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nobody buys a thing twice: the weights by hand trust own items too much."""
    monkeypatch.setattr(ranker_learning, "LEAST_CASES", 150)
    monkeypatch.setattr(ranker_learning, "_METRIC", "ndcg@10")  # 20 of 60 items are too easy
    shop = shop.model_copy(update={"learn": shop.learn.model_copy(update={"neighbours": True})})
    _store(items, _records())
    _fill(shop, _circle())
    outcome = learn(shop, items, datetime.now(UTC), lambda stage, done, of: None)
    assert outcome.release is not None, outcome.decision.reasons
    about = outcome.release.metrics()["ranker"]
    assert about["kept"]
    assert about["low"] > 0
    assert RANKER in outcome.release.parts
    publish_ranker(items, outcome.release)
    with closing(shop.redis.connection().open()) as client:
        fields = client.hgetall(Keys(shop.namespace).ranker(outcome.release.space))
    weights = ranking.from_fields(fields)
    trained = load_weights(outcome.release.path / RANKER)
    assert all((weights[name] == trained[name]).all() for name in trained)


def test_a_candidate_that_knows_no_better_is_turned_down_and_nothing_moves(
    shop: Settings, items: ItemStore, turn: Callable[[], Outcome]
) -> None:
    _store(items, _records())
    chance = random.Random(3)
    noise: list[Event] = [
        Purchase(user_id=f"u{j}", item_id=f"i{chance.randrange(ITEMS):02}", ts=T0_MS + k * DAY_MS)
        for k in range(12)
        for j in range(200)
    ]
    _fill(shop, noise)
    before = load_current(shop.model.releases)
    outcome = turn()
    assert outcome.release is None
    assert any("is not better" in reason for reason in outcome.decision.reasons)
    assert load_current(shop.model.releases) == before
    assert [about["decision"] for about in decisions(shop.model.releases)] == ["reject"]


def test_a_second_turn_starts_from_what_the_first_one_learned(
    shop: Settings, items: ItemStore, turn: Callable[[], Outcome]
) -> None:
    _store(items, _records())
    _fill(shop, _circle())
    first = turn().release
    assert isinstance(first, Release)
    _store(items, [ItemRecord("new", "wool blanket")])
    second = turn()
    assert second.parent == first
    newest = second.decision.figures["comparison"]["newest"]
    assert newest["current"] > 0.8  # it knows the circle
    assert np.isfinite(newest["candidate"])


def test_without_events_or_items_it_says_what_to_do(
    shop: Settings, items: ItemStore, turn: Callable[[], Outcome]
) -> None:
    with pytest.raises(NothingToLearn, match="send the catalogue"):
        turn()
    _store(items, [*_records(), ItemRecord("gone", "old hat", deleted=True)])
    with pytest.raises(NothingToLearn, match="penchant trainer"):
        turn()
    _fill(shop, _circle(users=3, events=1))
    with pytest.raises(NothingToLearn, match="next item"):
        turn()
    assert _releases(shop) == [load_current(shop.model.releases).id]
