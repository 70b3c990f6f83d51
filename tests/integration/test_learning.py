"""One turn of the learning loop, from an archive on disk to a live release that a worker serves."""

from __future__ import annotations

import itertools
import multiprocessing
import os
import random
import resource
import signal
import threading
from collections.abc import Iterator
from contextlib import closing
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import pytest

from model.candidate import Candidate
from model.engine import Engine
from model.errors import NothingToLearn, ReleaseOvertaken, ReleaseUnwritable
from model.ranker import RANKER, load_weights
from model.releases import (
    Release,
    decisions,
    history,
    list_releases,
    load_current,
    make_current,
    releases_by_id,
    resume,
    rollback,
    tower_id,
)
from model.text import item_text, text_version
from profiles import ranking
from profiles.items import ItemStore
from profiles.schema import ItemRecord, Keys
from stream import learning, ranker_learning
from stream.archive import Archive, Command, Folder, Pending
from stream.errors import UserError
from stream.events import Event, Purchase
from stream.features import features_of
from stream.learning import Outcome, Progress, learn
from stream.settings import (
    ArchiveSettings,
    LearnSettings,
    ModelSettings,
    RedisSettings,
    Settings,
    StreamSettings,
)
from stream.swapping import publish_ranker
from tests.integration.worker_process import (
    DIMENSIONS,
    build_tiny_release,
    build_turned_release,
)
from tests.process_group import run_by_two

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


class Turn(Protocol):
    def __call__(
        self, now: datetime | None = None, progress: Progress = ..., settings: Settings | None = ...
    ) -> Outcome: ...


@pytest.fixture
def turn(shop: Settings, items: ItemStore) -> Turn:
    def take(
        now: datetime | None = None,
        progress: Progress = lambda stage, done, of: None,
        settings: Settings | None = None,
    ) -> Outcome:
        outcome = learn(settings or shop, items, now or datetime.now(UTC), progress)
        assert outcome is not None
        return outcome

    return take


def _fill(shop: Settings, events: list[Event], offset: int = 0) -> None:
    pending = Pending(7, 0, offset, offset)
    pending.add(list(range(offset, offset + len(events))), events, offset + len(events))
    Archive(Folder(Path(shop.archive.url))).write(pending)


def _store(items: ItemStore, records: list[ItemRecord]) -> None:
    items.put(records, [text_version(_text(r)) for r in records], [None] * len(records))


def _text(record: ItemRecord) -> str:
    return item_text(record.title, record.category, record.brand, record.description)


def _begun(shop: Settings) -> list[str]:
    return [f.name for f in (shop.stream.data_dir / "training").iterdir() if f.is_dir()]


def _learning(shop: Settings, **changes: Any) -> Settings:
    return shop.model_copy(update={"learn": shop.learn.model_copy(update=changes)})


def _releases(shop: Settings) -> list[str]:
    return [move.release for move in history(shop.model.releases)]


def test_what_is_learned_goes_live_with_the_vectors_of_the_whole_catalogue(
    shop: Settings, items: ItemStore, turn: Turn
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
    np.testing.assert_array_equal(Candidate.load(live.path).vectors, shipped.vectors)
    assert "vectors.safetensors" not in live.parts  # else they would be there twice
    assert Engine(live, device="cpu").space == live.space
    transition = live.load_transition()
    assert transition is not None
    assert (transition.from_space, transition.to_space) == (parent.space, live.space)
    (about,) = decisions(shop.model.releases)
    assert (about["decision"], about["candidate"]) == ("accept", live.id)
    assert _begun(shop) == []


def test_a_ranker_goes_with_the_release_and_readers_get_it(
    shop: Settings, items: ItemStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nobody buys a thing twice: the weights by hand trust own items too much."""
    monkeypatch.setattr(ranker_learning, "LEAST_CASES", 150)
    monkeypatch.setattr(ranker_learning, "_METRIC", "ndcg@10")  # 20 of 60 items are too easy
    shop = _learning(shop, neighbours=True)
    _store(items, _records())
    _fill(shop, _circle())
    outcome = learn(shop, items, datetime.now(UTC), lambda stage, done, of: None)
    assert outcome is not None
    assert outcome.release is not None, outcome.decision.reasons
    about = outcome.release.metrics()["ranker"]
    assert about["kept"]
    assert about["low"] > 0
    served = [f["name"] for f in outcome.decision.figures["comparison"]["served"]]
    assert served == ["recall@20 by decayed interests", "recall@20 of recommend"]
    assert RANKER in outcome.release.parts
    publish_ranker(items, outcome.release)
    with closing(shop.redis.connection().open()) as client:
        fields = client.hgetall(Keys(shop.namespace).ranker(outcome.release.space))
    weights = ranking.from_fields(fields)
    trained = load_weights(outcome.release.path / RANKER)
    assert all((weights[name] == trained[name]).all() for name in trained)


def test_a_candidate_that_knows_no_better_is_turned_down_and_nothing_moves(
    shop: Settings, items: ItemStore, turn: Turn
) -> None:
    _store(items, _records())
    chance = random.Random(3)
    noise: list[Event] = [
        Purchase(user_id=f"u{j}", item_id=f"i{chance.randrange(ITEMS):02}", ts=T0_MS + k * DAY_MS)
        for k in range(12)
        for j in range(300)
    ]
    _fill(shop, noise)
    before = load_current(shop.model.releases)
    outcome = turn()
    assert outcome.release is None
    assert any("is not better" in reason for reason in outcome.decision.reasons)
    assert load_current(shop.model.releases) == before
    assert [about["decision"] for about in decisions(shop.model.releases)] == ["reject"]


def test_a_second_turn_starts_from_what_the_first_one_learned(
    shop: Settings, items: ItemStore, turn: Turn
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


def test_what_was_rolled_back_does_not_come_back_until_releases_resume(
    shop: Settings, items: ItemStore, turn: Turn
) -> None:
    _store(items, _records())
    _fill(shop, _circle())
    folder = shop.model.releases
    taken_back = turn().release
    assert taken_back is not None
    base = rollback(folder)
    outcome = turn()  # from the same release on the same events
    assert outcome.decision.accepted
    assert outcome.release is None
    assert outcome.hold is not None
    assert outcome.hold.why == f"{taken_back.id} rolled back"
    assert load_current(folder) == base
    assert [about["decision"] for about in decisions(folder)] == ["accept", "held"]
    assert len(list_releases(folder)) == 2
    assert resume(folder) == outcome.hold
    assert turn().release == load_current(folder) != base


def test_a_turn_that_goes_live_prunes_what_is_old(
    shop: Settings, items: ItemStore, turn: Turn
) -> None:
    _store(items, _records())
    _fill(shop, _circle())
    folder = shop.model.releases
    base = load_current(folder)
    older = [build_turned_release(base, seed) for seed in (2, 3)]
    for release in older:
        make_current(release)
    live = turn(settings=_learning(shop, keep_releases=2)).release
    assert live is not None
    assert {x.id for x in list_releases(folder)} == {older[1].id, live.id}
    assert load_current(folder) == live
    assert set(releases_by_id(folder)) == {base.id, older[0].id, older[1].id, live.id}


def test_without_events_or_items_it_says_what_to_do(
    shop: Settings, items: ItemStore, turn: Turn
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


def test_a_text_is_encoded_once_for_all_turns(shop: Settings, tmp_path: Path) -> None:
    release, told = load_current(shop.model.releases), list[tuple[int, int]]()

    def features(*texts: str) -> Any:
        told.clear()
        folder = tmp_path / "features"
        return features_of(release, texts, shop.model, folder, lambda *done: told.append(done))

    first = features("wool hat", "silk hat")
    assert told == [(2, 2)]
    np.testing.assert_array_equal(features("silk hat", "wool hat"), first[::-1])
    assert told == []
    features("silk hat", "felt hat")
    assert told == [(1, 1)]
    (file,) = (tmp_path / "features").iterdir()
    file.write_bytes(file.read_bytes()[:200])  # by a crash of the machine
    np.testing.assert_allclose(features("wool hat", "silk hat"), first, atol=1e-6)
    assert told == [(2, 2)]


# --- turns that are cut off, overtaken, or short of room


class Cut(Exception):
    """A turn was cut off."""


def _cut_in_the_second_epoch(shop: Settings) -> Progress:
    def progress(stage: str, done: int, of: int) -> None:
        if stage == "train" and done > 1.5 * of / shop.learn.epochs:
            raise Cut

    return progress


def _cut_off(shop: Settings, turn: Turn, now: datetime | None = None) -> None:
    with pytest.raises(Cut):
        turn(now, _cut_in_the_second_epoch(shop))


class Steps:
    """Which steps of training a turn took."""

    def __init__(self) -> None:
        self.taken: list[int] = []

    def __call__(self, stage: str, done: int, of: int) -> None:
        if stage == "train":
            self.taken.append(done)


def _learn_and_die(shop: Settings) -> None:
    def progress(stage: str, done: int, of: int) -> None:
        try:
            _cut_in_the_second_epoch(shop)(stage, done, of)
        except Cut:
            os.kill(os.getpid(), signal.SIGKILL)

    with closing(shop.redis.connection().open()) as client:
        learn(shop, ItemStore(client, Keys(shop.namespace)), datetime.now(UTC), progress)


def _killed(target: Any, *args: Any) -> None:
    process = multiprocessing.get_context("spawn").Process(target=target, args=args)
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL


def test_a_killed_turn_goes_on_where_it_was_though_events_and_items_kept_coming(
    shop: Settings, items: ItemStore, turn: Turn
) -> None:
    _store(items, _records())
    _fill(shop, _circle())
    _killed(_learn_and_die, shop)
    later = _circle(users=30, seed=9)
    _fill(shop, later, offset=1_000_000)
    _store(items, [ItemRecord("new", "wool blanket")])
    steps = Steps()
    outcome = turn(progress=steps)
    assert steps.taken[0] > 1
    assert outcome.windows == len(_circle())
    assert outcome.release is not None, outcome.decision.reasons
    assert _begun(shop) == []
    second = turn()
    assert second.windows == len(_circle()) + len(later)


def test_no_shopper_is_named_in_what_a_turn_keeps(
    shop: Settings, items: ItemStore, turn: Turn
) -> None:
    _store(items, _records())
    events = _circle(users=20)
    events = [e.model_copy(update={"user_id": f"somebody-{e.user_id}"}) for e in events]
    _fill(shop, events)
    _cut_off(shop, turn)
    (folder,) = (shop.stream.data_dir / "training" / name for name in _begun(shop))
    kept = [file.read_bytes() for file in folder.rglob("*") if file.is_file()]
    assert kept
    assert not any("somebody".encode(code) in data for data in kept for code in ("utf8", "utf-32"))


@pytest.mark.parametrize("days", [-1.5, 1.5])
def test_what_was_kept_too_long_ago_or_in_the_future_is_gathered_anew(
    days: float, shop: Settings, items: ItemStore, turn: Turn
) -> None:
    """A clock that went backwards leaves material of the future."""
    _store(items, _records())
    _fill(shop, _circle())
    _cut_off(shop, turn)
    _fill(shop, _circle(users=1, seed=9), offset=1_000_000)
    steps = Steps()
    outcome = turn(datetime.now(UTC) + timedelta(days=days), steps)
    assert steps.taken[0] == 1
    assert outcome.windows == len(_circle()) + 24
    assert outcome.release is not None, outcome.decision.reasons
    assert load_current(shop.model.releases) == outcome.release


@pytest.mark.parametrize("file", ["windows.npz", "features.npy", "catalogue.json", "material.json"])
def test_material_that_a_crash_of_the_machine_cut_short_is_gathered_anew(
    file: str, shop: Settings, items: ItemStore, turn: Turn
) -> None:
    _store(items, _records())
    _fill(shop, _circle())
    _cut_off(shop, turn)
    (folder,) = (shop.stream.data_dir / "training" / name for name in _begun(shop))
    whole = (folder / file).read_bytes()
    (folder / file).write_bytes(whole[: len(whole) // 2])
    assert turn().release is not None


def test_who_asked_to_be_forgotten_meanwhile_is_not_learned_from(
    shop: Settings, items: ItemStore, turn: Turn
) -> None:
    _store(items, _records())
    _fill(shop, _circle())
    _cut_off(shop, turn)
    Archive(Folder(Path(shop.archive.url))).forget({"u3": [Command(7, 1_000_000, 0, 0)]})
    steps = Steps()
    assert turn(progress=steps).windows == len(_circle()) - 24
    assert steps.taken[0] == 1


def test_of_two_turns_at_once_the_second_is_told_and_the_first_wins(
    shop: Settings, items: ItemStore, turn: Turn
) -> None:
    _store(items, _records())
    _fill(shop, _circle())
    training, go_on = threading.Event(), threading.Event()

    def wait(stage: str, done: int, of: int) -> None:
        if stage == "train":
            training.set()
            assert go_on.wait(60)

    outcomes: list[Outcome] = []
    first = threading.Thread(target=lambda: outcomes.append(turn(progress=wait)))
    first.start()
    assert training.wait(60)
    with pytest.raises(UserError, match="wait until it is done"):
        turn()
    go_on.set()
    first.join()
    assert outcomes[0].release == load_current(shop.model.releases)
    assert turn().parent == outcomes[0].release


def test_a_turn_that_was_overtaken_says_so_in_the_decisions_and_leaves_nothing(
    shop: Settings, items: ItemStore, turn: Turn
) -> None:
    _store(items, _records())
    _fill(shop, _circle())
    base = load_current(shop.model.releases)
    other = build_turned_release(base, 2)
    make_current(base)

    def overtake(stage: str, done: int, of: int) -> None:
        make_current(other)

    with pytest.raises(ReleaseOvertaken, match="train from the live release"):
        turn(progress=overtake)
    (about,) = decisions(shop.model.releases)
    assert about["decision"] == "overtaken"
    assert "train from the live release" in about["reasons"][0]
    assert load_current(shop.model.releases) == other
    assert _begun(shop) == []
    assert turn().parent == other


def _learn_and_die_after(shop: Settings, step: str) -> None:
    real = getattr(learning, step)

    def last(*args: Any, **options: Any) -> Any:
        real(*args, **options)
        os.kill(os.getpid(), signal.SIGKILL)

    setattr(learning, step, last)
    with closing(shop.redis.connection().open()) as client:
        items = ItemStore(client, Keys(shop.namespace))
        learn(shop, items, datetime.now(UTC), lambda stage, done, of: None)


@pytest.mark.parametrize("step", ["_train", "publish", "make_current", "record_decision"])
def test_a_turn_killed_after_any_step_leaves_one_live_release_with_its_verdict(
    step: str, shop: Settings, items: ItemStore, turn: Turn
) -> None:
    _store(items, _records())
    _fill(shop, _circle())
    base = load_current(shop.model.releases)
    _killed(_learn_and_die_after, shop, step)
    moved = load_current(shop.model.releases) != base
    assert moved == (step in ("make_current", "record_decision"))
    steps = Steps()
    outcome = turn(progress=steps)
    if not moved:  # what was trained is not trained again, nor published twice
        assert steps.taken == []
        assert outcome.parent == base
        assert len(list_releases(shop.model.releases)) == 2
    verdicts = {about["candidate"]: about["decision"] for about in decisions(shop.model.releases)}
    learned = [move.release for move in history(shop.model.releases) if move.why == "learned"]
    assert learned
    assert [name for name, said in verdicts.items() if said == "accept"] == learned
    assert len(verdicts) == len(decisions(shop.model.releases))
    assert _begun(shop) == []


def test_a_disk_that_fills_up_while_publishing_moves_nothing_and_loses_no_training(
    shop: Settings, items: ItemStore, turn: Turn, monkeypatch: pytest.MonkeyPatch
) -> None:
    _store(items, _records())
    _fill(shop, _circle())
    base, real = load_current(shop.model.releases), learning.publish

    def short_of_room(*args: Any, **options: Any) -> Release:
        limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))  # EFBIG, as ENOSPC would be
        try:
            return real(*args, **options)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)

    with monkeypatch.context() as patch:
        patch.setattr(learning, "publish", short_of_room)
        with pytest.raises(ReleaseUnwritable, match="with room"):
            turn()
    assert load_current(shop.model.releases) == base
    assert [listed.id for listed in list_releases(shop.model.releases)] == [base.id]
    assert not list(shop.model.releases.glob(".building-*"))
    steps = Steps()
    assert turn(progress=steps).release is not None
    assert steps.taken == []


def test_a_disk_that_fills_up_while_training_says_what_to_do(
    shop: Settings, items: ItemStore, turn: Turn
) -> None:
    _store(items, _records())
    _fill(shop, _circle())
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)

    def fill_up(stage: str, done: int, of: int) -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))

    try:
        with pytest.raises(UserError, match="make room and learn again"):
            turn(progress=fill_up)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert turn().release is not None


# --- odd shops


def test_a_shop_of_one_item_is_turned_down_without_a_fuss(
    shop: Settings, items: ItemStore, turn: Turn
) -> None:
    _store(items, _records()[:1])
    events: list[Event] = [
        Purchase(user_id=f"u{j}", item_id="i00", ts=T0_MS + k * DAY_MS)
        for k in range(12)
        for j in range(300)
    ]
    _fill(shop, events)
    outcome = turn()
    assert outcome.release is None
    assert any("is not better" in reason for reason in outcome.decision.reasons)
    assert outcome.decision.figures["comparison"]["heads"] == []  # all bought again: one class


def test_items_without_a_text_are_left_out_and_their_events_are_not(
    shop: Settings, items: ItemStore, turn: Turn
) -> None:
    _store(items, [*_records(), ItemRecord("blank", "")])
    extra: list[Event] = [
        Purchase(user_id=f"u{j}", item_id="blank", ts=T0_MS + 40 * DAY_MS) for j in range(9)
    ]
    _fill(shop, [*_circle(), *extra])
    outcome = turn()
    assert outcome.windows == len(_circle()) + 9
    assert outcome.release is not None, outcome.decision.reasons
    shipped = outcome.release.load_item_vectors()
    assert shipped is not None
    assert "blank" not in shipped.item_ids


@pytest.mark.parametrize("tower", ["last", "full", "lora"])
def test_a_tuned_tower_goes_live_with_its_space_and_reads_new_items(
    tower: str, shop: Settings, items: ItemStore, turn: Turn
) -> None:
    if tower == "lora":
        pytest.importorskip("peft")
    _store(items, [*_records(), ItemRecord("unseen", "wool blanket")])
    _fill(shop, _circle())
    base = load_current(shop.model.releases)
    # Two training steps of a tower that was never trained change little: let them be large.
    tuned = _learning(shop, tower=tower, rate=5e-3, served_tolerance=1.0, slice_tolerance=1.0)
    live = turn(settings=tuned).release
    assert live is not None
    assert tower_id(live) != tower_id(base)
    assert live.space != base.space
    shipped = live.load_item_vectors()
    assert shipped is not None
    (row,) = (i for i, item in enumerate(shipped.item_ids) if item == "unseen")
    (said,) = live.load_encoder(device="cpu").encode(["wool blanket"])
    np.testing.assert_allclose(said, shipped.vectors[row], atol=1e-3)
    assert Engine(live, device="cpu").space == live.space
    again = turn(settings=tuned)  # goes on from that tower
    assert again.parent == live
    assert np.isfinite(again.decision.figures["comparison"]["newest"]["candidate"])


def _learn_as_one_of_two(rank: int, shop: Settings, folder: Path) -> None:
    with closing(shop.redis.connection().open()) as client:
        items = ItemStore(client, Keys(shop.namespace))
        outcome = learn(shop, items, datetime.now(UTC), lambda stage, done, of: None)
    said = folder / f"said-{rank}"
    said.write_text("helped" if outcome is None else str(outcome.release))


def test_a_turn_that_two_processes_share_publishes_once(
    shop: Settings, items: ItemStore, tmp_path: Path
) -> None:
    pytest.importorskip("accelerate")
    _store(items, _records())
    _fill(shop, _circle())
    shared = _learning(shop, distributed=True, rate=4e-3)
    run_by_two(_learn_as_one_of_two, shared, tmp_path)
    live = load_current(shop.model.releases)
    assert live.id in (tmp_path / "said-0").read_text()
    assert (tmp_path / "said-1").read_text() == "helped"
    (about,) = decisions(shop.model.releases)
    assert (about["candidate"], about["decision"]) == (live.id, "accept")
    assert live.metrics()["training"]["settings"]["distributed"]
    assert _begun(shop) == []
