"""The catalogue on a real Redis, with a real encoder: what a failure or another worker leaves."""

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import pytest
import redis
import torch

from model.encoder import TextEncoder
from model.engine import Engine
from model.releases import Release, build_base
from model.text import text_version
from profiles import RedisUnavailable
from profiles.errors import WritesLost
from profiles.items import ItemStore, Origin
from profiles.marks import Marks
from profiles.schema import ItemRecord, Keys, key64
from stream.base_release import build_live, texts_of
from stream.catalogue import Catalogue, text_of
from stream.events import Item
from stream.settings import ModelSettings

pytestmark = pytest.mark.redis
torch.set_num_threads(1)  # on a busy machine, threads spend their time waiting for each other

TEXTS = [f"{colour} {thing}" for colour in ("red", "blue") for thing in ("scarf", "mug", "lamp")]
CATALOGUE = list(enumerate(TEXTS))
TOPIC = 1


@pytest.fixture(scope="module")
def release(tmp_path_factory: pytest.TempPathFactory) -> Release:
    folder = tmp_path_factory.mktemp("releases")
    now = datetime(2026, 3, 1, tzinfo=UTC)
    return build_base(folder, "bundled", TEXTS, 32, now=now, device="cpu")


@pytest.fixture
def items(redis_client: redis.Redis, namespace: str) -> ItemStore:
    return ItemStore(redis_client, Keys(namespace))


@pytest.fixture
def worker(release: Release, items: ItemStore) -> Callable[..., Catalogue]:
    """`worker(item_rows=8)`: the catalogue of another worker."""

    def make(item_rows: int = 1_000) -> Catalogue:
        return Catalogue(Engine(release, device="cpu", item_rows=item_rows), items)

    return make


@pytest.fixture
def encoded(monkeypatch: pytest.MonkeyPatch, worker: Callable[..., Catalogue]) -> list[str]:
    """The texts that reach an encoder, in order; without those of engines that warm up."""
    seen: list[str] = []
    encode = TextEncoder.encode

    def watched(self: TextEncoder, texts: list[str], *args: object, **kwargs: object) -> object:
        seen.extend(text for text in texts if text != "warm up")
        return encode(self, texts, *args, **kwargs)  # type: ignore[arg-type]

    monkeypatch.setattr(TextEncoder, "encode", watched)
    return seen


def item(number: int, title: str = "red mug") -> ItemRecord:
    return ItemRecord(f"A-{number}", title, ("Home", f"Shelf {number % 3}"))


def key(number: int) -> int:
    return key64(f"A-{number}")


@pytest.mark.parametrize("same_worker", [True, False])
def test_who_waits_is_served_although_the_first_attempt_failed_half_way(
    worker: Callable[..., Catalogue],
    items: ItemStore,
    monkeypatch: pytest.MonkeyPatch,
    same_worker: bool,
) -> None:
    items.wait_for({"u": [key(1)]})
    catalogue = worker()
    with monkeypatch.context() as broken:

        def fail(*_: object) -> None:
            raise RedisUnavailable

        broken.setattr(items, "put_vectors", fail)
        with pytest.raises(RedisUnavailable):
            catalogue.resolve([key(1)], {key(1): item(1)})
    assert key(1) in items.records([key(1)])
    catalogue = catalogue if same_worker else worker()
    for _ in range(2):  # and again, should saving the profiles fail
        got = catalogue.resolve([key(1)], {key(1): item(1)})
        assert got.found.all()
        assert got.told == [key(1)]
    items.resolve_waiting(key(1), lambda users: None)
    assert catalogue.resolve([key(1)], {key(1): item(1)}).told == []


def test_what_was_filled_and_then_lost_is_filled_again(
    release: Release, redis_client: redis.Redis, namespace: str
) -> None:
    """A release is made ready for minutes, and it may be another thread that notices a loss."""
    marks = Marks(redis_client, Keys(namespace))
    items = ItemStore(redis_client, Keys(namespace), marks=marks)
    items.put([item(1)], [text_version(text_of(item(1)))], [None])
    catalogue = Catalogue(Engine(release, device="cpu"), items)
    catalogue.fill()
    catalogue.refill()
    items.drop_space(release.space)  # as if it were lost
    marks.begin_anew()
    catalogue.refill()
    assert items.vectors_by_key(release.space, [key(1)]).keys() == {key(1)}


def test_a_space_that_others_filled_is_not_named_where_that_was_lost(
    release: Release, redis_client: redis.Redis, namespace: str
) -> None:
    keys = Keys(namespace)
    ann, ben = (ItemStore(redis_client, keys, marks=Marks(redis_client, keys)) for _ in range(2))
    ann.put([item(1)], [text_version(text_of(item(1)))], [None])
    held = {name: redis_client.dump(name) for name in redis_client.scan_iter(f"{namespace}:*")}
    for mine in (ann, ben):
        Catalogue(Engine(release, device="cpu"), mine).fill()
    redis_client.flushdb()
    for name, value in held.items():
        redis_client.restore(name, 0, value)
    with pytest.raises(WritesLost):
        ben.set_space(release.space)


def test_an_item_that_another_worker_stored_serves_who_waits(
    worker: Callable[..., Catalogue], items: ItemStore
) -> None:
    catalogue = worker()
    items.put([item(1)], ["00" * 8], [None])
    items.wait_for({"u": [key(1), key(2)]})
    got = catalogue.resolve([key(1), key(2)], {})
    assert got.found.tolist() == [True, False]
    assert got.told == [key(1)]


def test_nobody_is_served_an_item_that_has_no_text(
    worker: Callable[..., Catalogue], items: ItemStore
) -> None:
    catalogue = worker()
    assert catalogue.upsert([ItemRecord("A-1", deleted=True)], Origin(TOPIC, 0)) == []
    items.wait_for({"u": [key(1)]})
    got = catalogue.resolve([key(1)], {key(1): item(1)})
    assert (got.found.tolist(), got.told) == ([False], [])
    assert catalogue.upsert([item(1)], Origin(TOPIC, 1)) == [key(1)]
    assert catalogue.resolve([key(1)], {}).found.all()


def test_what_an_event_without_weight_tells_is_kept_and_encoded_once(
    worker: Callable[..., Catalogue], items: ItemStore, encoded: list[str]
) -> None:
    catalogue = worker()
    for _ in range(2):
        catalogue.resolve([], {key(1): item(1)})
    assert items.records([key(1)])[key(1)][0] == item(1)
    assert len(encoded) == 1


def test_a_worker_keeps_its_own_vectors_and_drops_those_another_changed(
    worker: Callable[..., Catalogue],
    encoded: list[str],
    items: ItemStore,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    one, other = worker(), worker()
    one.upsert([item(1), item(2)], Origin(TOPIC, 0))
    one.refresh()
    other.resolve([key(1), key(2)], {})
    assert len(encoded) == 2
    with monkeypatch.context() as unasked:
        unasked.delattr(items, "_client")  # they are in the table still
        assert one.resolve([key(1), key(2)], {}).found.all()
    old = other.resolve([key(1)], {}).vectors
    one.upsert([item(1, "blue lamp")], Origin(TOPIC, 1))
    one.refresh()
    other.refresh()
    new = other.resolve([key(1)], {}).vectors
    np.testing.assert_array_equal(new, one.resolve([key(1)], {}).vectors)
    assert float((new @ old.T).item()) < 0.99
    assert len(encoded) == 3


def test_a_slow_slice_resumes_where_it_failed(
    worker: Callable[..., Catalogue],
    items: ItemStore,
    encoded: list[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    catalogue = worker()
    records = [item(i, f"red mug {i}") for i in range(600)]
    put, calls = items.put, 0

    def fail_third(*args: object) -> None:
        nonlocal calls
        calls += 1
        if calls == 3:
            raise RedisUnavailable
        put(*args)  # type: ignore[arg-type]

    with monkeypatch.context() as broken:
        broken.setattr(items, "put", fail_third)
        with pytest.raises(RedisUnavailable):
            catalogue.upsert(records, Origin(TOPIC, 599))
    done = len(encoded)
    assert 0 < done < 600
    assert len(catalogue.upsert(records, Origin(TOPIC, 599))) == 600
    assert len(encoded) == 600


def test_an_item_that_was_forgotten_comes_back_with_its_category(
    worker: Callable[..., Catalogue],
) -> None:
    catalogue = worker(item_rows=8)
    for start in range(0, 40, 4):
        catalogue.upsert([item(i) for i in range(start, start + 4)], Origin(TOPIC, start))
        got = catalogue.resolve([key(0), key(start)], {})  # the first stays in the table
        assert got.found.all()
        expected = [key64(item(number).category_name) for number in (0, start)]
        assert got.categories.tolist() == expected
        assert len(catalogue._held) <= 16


def test_categories_have_names_however_many_there_were(
    worker: Callable[..., Catalogue], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("stream.catalogue._CATEGORIES_KEPT", 2)
    catalogue = worker()
    for number in range(3):
        catalogue.upsert([item(number)], Origin(TOPIC, number))
    expected = {key64(f"Home > Shelf {i}"): f"Home > Shelf {i}" for i in range(3)}
    for asked in (catalogue, worker()):
        assert asked.names_of([*expected, 5]) == expected
    assert len(catalogue._category_names) <= 4


def test_a_worker_encodes_no_item_that_the_base_release_was_fitted_on(
    items: ItemStore, encoded: list[str], tmp_path: Path
) -> None:
    catalogue = [Item(item_id=f"A-{n}", title=text, category=("Home",)) for n, text in CATALOGUE]
    model = ModelSettings(releases=tmp_path, dimensions=8, device="cpu")
    ids = [item.item_id for item in catalogue]
    release = build_live(model, texts_of(catalogue), lambda done, of: None, ids)
    encoded.clear()
    worker = Catalogue(Engine(release, device="cpu"), items, release.load_item_vectors())
    records = [ItemRecord(f"A-{n}", text, ("Home",)) for n, text in CATALOGUE]
    worker.upsert([*records, ItemRecord("A-new", "green mug", ("Home",))], Origin(TOPIC, 0))
    assert encoded == ["green mug. Home"]
    assert worker.resolve([key(n) for n, _ in CATALOGUE], {}).found.all()
