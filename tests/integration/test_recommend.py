"""What is recommended: every signal by its definition, one space, both readers."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from typing import Any

import numpy as np
import pytest

from profiles import (
    Connection,
    ProfileNotFound,
    ProfileReader,
    SpaceMismatch,
    arithmetic,
    outlook,
    ranking,
)
from profiles.items import ItemStore, Origin
from profiles.neighbour_store import NeighbourStore
from profiles.neighbours import Pairs, TallyLayout, fold
from profiles.schema import PAIR_ENTRY, ItemRecord, Keys, key64
from profiles.schema_doc import reader_acl
from profiles.store import ProfileStore
from stream import cli
from stream.local_stack import RedisServer
from tests import oracle
from tests.integration.test_profile_reader import (
    EVENTS,
    LAYOUT,
    READERS,
    SPACE,
    VECTORS,
    VERSION,
    Asked,
    event,
    fill,
    item_id,
    save,
)
from tests.profile_events import NOW_MS, in_topic

pytestmark = pytest.mark.redis

DAY_MS = 86_400_000
# (item, neighbour, weight); neighbour -1: events with the item itself.
TALLIES = [(2, 9, 3.0), (2, 11, 1.0), (2, -1, 8.0), (1, 9, 2.0), (1, -1, 3.0), (9, -1, 15.0)]


def put_neighbours(url: str, namespace: str) -> None:
    layout = TallyLayout()
    entries = np.zeros(len(TALLIES), PAIR_ENTRY)
    for row, (item, near, weight) in enumerate(TALLIES):
        neighbour = key64(item_id(near)) if near >= 0 else 0
        entries[row] = (key64(item_id(item)), neighbour, 1, NOW_MS, weight)
    items, rows = np.unique(entries["item"], return_inverse=True)
    pairs = Pairs(entries, np.ones(len(rows), np.uint64), np.zeros(len(rows), np.int64))
    with closing(Connection(url).open()) as client:
        store = NeighbourStore(client, Keys(namespace), layout, ttl_s=1_000, writer=1, where=url)
        tallies = store.load(items.tolist())
        fold(tallies, rows, pairs, layout)
        now_s = client.time()[0]
        assert store.save(items.tolist(), tallies, range(len(items)), now_s) == []


@pytest.fixture(scope="module")
def shop(redis_server: RedisServer, tmp_path_factory: Any) -> tuple[str, str]:
    url, namespace = redis_server.url, f"test-{tmp_path_factory.mktemp('shop').name}"
    fill(url, namespace)
    put_neighbours(url, namespace)
    return url, namespace


@pytest.fixture(params=sorted(READERS))
def reader(request: pytest.FixtureRequest, shop: tuple[str, str]) -> Iterator[Asked]:
    with closing(READERS[request.param](*shop)) as asked:
        yield asked


def test_every_signal_is_what_it_is_defined_to_be(reader: Asked) -> None:
    profile = reader.ask("get", "ann")  # items 0, 1, 0, 2, each at another instant
    found = {r.item_id: r for r in reader.ask("recommend", "ann", 500)}
    near = found[item_id(9)]
    # Item 9 after item 2 (age 0) and item 1 (age 2), by their counts and its own.
    share = 3.0 / (8 + 1) ** 0.5 + 0.8**2 * 2.0 / (3 + 1) ** 0.5
    assert near.signals["covisitation"] == pytest.approx(share / (15 + 1) ** 0.3, rel=1e-5)
    own = oracle.fold(EVENTS)["ann"].own
    assert profile.own == pytest.approx(own, rel=1e-6)
    for item in (0, 1, 2, 9):
        got = found[item_id(item)]
        assert got.signals["own"] == pytest.approx(own.get(key64(item_id(item)), 0.0), rel=1e-6)
        cosine = (arithmetic.unit(profile.sums) @ VECTORS[item]).mean()
        assert got.signals["text"] == pytest.approx(cosine, abs=1e-5)
        assert (got.title, got.signals["next_interest"]) == (f"Title {item}", 0.0)


def test_the_order_is_that_of_the_ranker(shop: tuple[str, str], reader: Asked) -> None:
    rng = np.random.default_rng(5)
    drawn = {
        name: rng.normal(0.0, 0.3, shape).astype(np.float32)
        for name, shape in ranking.SHAPES.items()
    }
    assert reader.ask("get", "ann").events == 4
    assert_ranked_by(ranking.BY_HAND, reader)
    with closing(Connection(shop[0]).open()) as client:
        items = ItemStore(client, Keys(shop[1]), shop[0])
        items.put_ranker(f"{SPACE:016x}", drawn)
        try:
            assert_ranked_by(drawn, reader)
        finally:
            items.put_ranker(f"{SPACE:016x}", None)


def assert_ranked_by(weights: ranking.Weights, reader: Asked) -> None:
    found = reader.ask("recommend", "ann", 500)
    signals = np.array([list(r.signals.values()) for r in found], np.float32)
    counts = {item_id(2): 8.0, item_id(1): 3.0, item_id(9): 15.0}  # all of now
    days = {item_id(0): 1 / 24, item_id(1): 30 / 24, item_id(2): 0.0}
    known = [[counts.get(r.item_id, 0.0)] * 2 + [days.get(r.item_id, 0.0)] for r in found]
    shopper = np.log1p(np.array([4.0, 3.0, np.expm1(0.25)])).astype(np.float32)
    want = ranking.score(weights, signals, np.log1p(known).astype(np.float32), shopper)
    np.testing.assert_allclose([r.score for r in found], want, rtol=1e-4)
    assert (np.diff(want) <= 1e-5).all()
    assert [r.item_id for r in reader.ask("recommend", "ann", 3)] == [r.item_id for r in found[:3]]


def foretell(url: str, namespace: str, user_id: str, interest: Any, space: int = SPACE) -> None:
    with closing(Connection(url).open()) as client:
        store = ProfileStore(client, Keys(namespace), LAYOUT, ttl_s=1_000, writer=2, where=url)
        (fence,) = store.load([user_id]).fences
        fields = outlook.encode(interest[None], {}, "trained-1", space, [1], [NOW_MS], 1)
        assert store.put_outlooks([user_id], [fence], fields) == []


def test_the_next_interest_is_the_outlooks_where_it_is_of_the_profiles_space(
    shop: tuple[str, str], reader: Asked
) -> None:
    eve = f"eve of {type(reader).__name__}"
    save(*shop, in_topic([event(eve, 3)]))
    before = {r.item_id for r in reader.ask("recommend", eve, 500)}
    far = next(i for i in range(len(VECTORS)) if item_id(i) not in before)
    foretell(*shop, eve, VECTORS[far], space=SPACE + 1)
    assert {r.signals["next_interest"] for r in reader.ask("recommend", eve, 500)} == {0.0}
    foretell(*shop, eve, VECTORS[far])
    found = {r.item_id: r.signals for r in reader.ask("recommend", eve, 500)}
    assert found.keys() > before
    for item in (far, 3):
        signals = found[item_id(item)]
        assert signals["next_interest"] == pytest.approx(VECTORS[item] @ VECTORS[far], abs=1e-5)
        assert signals["text"] == pytest.approx(VECTORS[item] @ VECTORS[3], abs=1e-5)
    assert reader.ask("recommend", eve, 1)[0].item_id in {item_id(far), item_id(3)}


def test_what_was_seen_can_be_left_out(reader: Asked) -> None:
    seen = {item_id(i) for i in (0, 1, 2)}
    assert seen <= {r.item_id for r in reader.ask("recommend", "ann", 500)}
    unseen = reader.ask("recommend", "ann", 500, exclude_seen=True)
    assert not seen & {r.item_id for r in unseen}
    assert item_id(9) in {r.item_id for r in unseen}


def test_what_a_shopper_had_before_the_window_is_recommended_again(
    shop: tuple[str, str], reader: Asked
) -> None:
    old, *latest = (event("regular", i, NOW_MS + i) for i in (0, 1, 2))
    save(*shop, in_topic([old, *latest * LAYOUT.window]))
    regular = reader.ask("get", "regular")
    assert old.item_key in regular.own
    assert old.item_key not in regular.window["item"]
    found = {r.item_id: r.signals["own"] for r in reader.ask("recommend", "regular", 500)}
    assert found[item_id(0)] == pytest.approx(1.0, rel=1e-6)
    unseen = reader.ask("recommend", "regular", 500, exclude_seen=True)
    assert item_id(0) not in {r.item_id for r in unseen}


def test_an_item_of_the_window_is_an_own_item_though_heavier_ones_fill_the_tally(
    shop: tuple[str, str], reader: Asked
) -> None:
    heavy = [event("collector", 10 + i, NOW_MS + i, 2.0) for i in range(LAYOUT.own_items)]
    light = event("collector", 0, NOW_MS + LAYOUT.own_items, 0.5)
    save(*shop, in_topic([*heavy, light]))
    assert light.item_key not in reader.ask("get", "collector").own
    found = {r.item_id: r.signals["own"] for r in reader.ask("recommend", "collector", 500)}
    assert found[item_id(0)] == pytest.approx(0.5, rel=1e-6)
    assert found[item_id(10)] == pytest.approx(2.0, rel=1e-6)  # gone from the window


def test_a_published_ranker_serves_its_space_alone(shop: tuple[str, str], reader: Asked) -> None:
    url, namespace = shop
    by_hand = reader.ask("recommend", "ann", 5)
    silent = {**ranking.BY_HAND, "gate": np.array([[-9, 3, -9, -9]] * 2, np.float32)}  # text alone
    with closing(Connection(url).open()) as client:
        items = ItemStore(client, Keys(namespace), url)
        items.put_ranker("another space", silent)
        assert reader.ask("recommend", "ann", 5) == by_hand
        items.put_ranker(f"{SPACE:016x}", silent)
        try:
            text = [r.signals["text"] for r in reader.ask("recommend", "ann", 5)]
            assert text == sorted(text, reverse=True)
            assert [r.item_id for r in reader.ask("recommend", "ann", 5)] != [
                r.item_id for r in by_hand
            ]
        finally:
            items.put_ranker(f"{SPACE:016x}", None)
    assert reader.ask("recommend", "ann", 5) == by_hand


def test_a_shopper_of_whom_nothing_is_liked_gets_nothing(reader: Asked) -> None:
    assert reader.ask("recommend", "looker") == []
    with pytest.raises(ProfileNotFound):
        reader.ask("recommend", "nobody")


def test_deleted_items_are_not_shown(shop: tuple[str, str], reader: Asked) -> None:
    url, namespace = shop
    with closing(Connection(url).open()) as client:
        items = ItemStore(client, Keys(namespace), url)
        items.put([ItemRecord(item_id(11), deleted=True)], [VERSION], [Origin(1, 1)])
        names = {r.item_id for r in reader.ask("recommend", "ann", 500)}
    assert item_id(9) in names
    assert item_id(11) not in names  # a neighbour as well


def test_a_profile_of_a_space_without_items_is_not_mixed(
    shop: tuple[str, str], reader: Asked
) -> None:
    url, namespace = shop
    save(url, namespace, in_topic([event("stray", 3)]), space=0xDEAD)
    with pytest.raises(SpaceMismatch, match="dead"):
        reader.ask("recommend", "stray")


def test_the_rights_of_a_reader_suffice(shop: tuple[str, str], redis_server: RedisServer) -> None:
    url, namespace = shop
    with closing(Connection(url).open()) as client:
        words = reader_acl("recommender", "secret", namespace).split()
        assert client.execute_command(*words) == b"OK"
    limited = Connection(url, username="recommender", password="secret")
    with ProfileReader(limited, namespace) as reader:
        assert reader.recommend("ann")


def test_the_command_line_shows_it_in_words(
    shop: tuple[str, str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    url, namespace = shop
    monkeypatch.setenv("REDIS_URL", url)
    monkeypatch.setenv("NAMESPACE", namespace)
    monkeypatch.setattr(cli.console, "width", 120)
    cli.profile_recommend("ann", 4, new=False)
    said = capsys.readouterr().out
    assert all(word in said for word in ("neighbours", "own", "text", "Title 2"))
    cli.profile_recommend("ann", 4, new=True)
    assert "Title 2 " not in capsys.readouterr().out
    cli.profile_recommend("looker", 4, new=False)
    assert "nothing to recommend" in capsys.readouterr().out
