"""The simulated shop: the same from the same seed, lawful, and true to its truth."""

from __future__ import annotations

import io
import json
import signal
import subprocess
import sys
import tracemalloc
from bisect import bisect
from collections import Counter, defaultdict
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from typer.testing import CliRunner

from profiles.schema import EVENT_TYPES
from stream import events as ev
from stream.cli import app
from stream.simulated_shop import GUEST, K, Shop, Spec
from stream.simulated_words import LABELS, NOUNS, TOPICS
from stream.simulation import Events, Simulated, TruthFile, items, user_id, write_lines
from stream.times import DAY_MS

SPEC = Spec(
    shoppers=150,
    items=300,
    days=40,
    visits_per_day=0.5,
    duplicates=0.03,
    late=0.05,
    churn=0.05,
    forgets=0.3,
)


def lines(spec: Spec, **options: Any) -> list[str]:
    out = io.StringIO()
    write_lines(Simulated(Shop(spec)), out, only="events", **options)
    return out.getvalue().splitlines()


@pytest.fixture(scope="module")
def told() -> list[str]:
    return lines(SPEC)


@pytest.fixture(scope="module")
def events(told: list[str]) -> list[dict[str, Any]]:
    """Each event once, in event time."""
    once = {event["event_id"]: event for event in map(json.loads, told)}
    return sorted(once.values(), key=lambda event: (event["ts"], event["event_id"]))


@pytest.fixture(scope="module")
def truth(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[dict[str, Any]]]:
    path = tmp_path_factory.mktemp("truth") / "truth.parquet"
    shop = Shop(SPEC)
    with TruthFile(path, shop) as file:
        for _ in Events(shop, file.add).lines():
            pass
    found = defaultdict(list)
    for row in pq.read_table(path).to_pylist():
        found[row["kind"]].append(row)
    return found


def test_the_same_seed_is_the_same_shop_and_another_is_not(told: list[str]) -> None:
    assert lines(SPEC) == told
    assert lines(replace(SPEC, seed=1))[:100] != told[:100]
    assert list(items(Shop(SPEC))) == list(items(Shop(SPEC)))


def test_however_it_is_cut_the_stream_is_the_same(told: list[str]) -> None:
    assert lines(SPEC, limit=777) == told[:777]
    shorter = lines(replace(SPEC, days=17.3))
    assert 1_000 < len(shorter) < len(told)
    assert shorter == told[: len(shorter)]
    shop = Shop(SPEC)
    assert [line for part in Events(shop).lines() for line in part] == told
    assert [event.event_id for event in Events(shop)] == [json.loads(x)["event_id"] for x in told]


def test_every_event_and_item_is_valid_and_says_that_it_is_simulated(told: list[str]) -> None:
    values = [line.encode() for line in told]
    parsed = ev.parse(values, [SPEC.end_ms] * len(values), 0)
    assert parsed.rejects == []
    assert {event.type for event in parsed.events} == {*EVENT_TYPES, "forget"}
    assert [json.loads(e.to_json()) for e in parsed.events] == [
        json.loads(line) | {"schema_version": 1} for line in told
    ]
    ids = {getattr(e, name, None) for e in parsed.events for name in ("user_id", "item_id")}
    assert all(found.startswith("sim-") for found in ids if found)
    assert ids - {None} > {item.item_id for item in items(Shop(SPEC))} & ids
    catalogue = [json.loads(item.to_json()) for item in items(Shop(SPEC))]
    keys = [item["item_id"].encode() for item in catalogue]
    assert not ev.parse_items(keys, [json.dumps(item).encode() for item in catalogue]).rejects


def test_the_words_of_a_topic_are_its_own() -> None:
    nouns = [noun for topic in TOPICS for noun in topic.nouns]
    assert len(nouns) == len(set(nouns)) == K * NOUNS
    titles = [item.title for item in items(Shop(SPEC))]
    assert len(set(titles)) > 0.99 * len(titles)


def test_nothing_is_bought_that_was_not_seen_in_the_visit(events: list[dict[str, Any]]) -> None:
    visits = defaultdict(list)
    for event in events:
        # What is late at the end does not arrive any more.
        if "session_id" in event and event["ts"] < SPEC.end_ms - DAY_MS:
            visits[event["session_id"]].append(event)
    bought = 0
    for visit in visits.values():
        assert len({event["user_id"] for event in visit}) == 1
        seen: dict[str, set[str]] = defaultdict(set)
        for event in visit:
            item, kind = event.get("item_id", ""), event["type"]
            needs = {
                "click": "impression", "view": "impression", "add_to_cart": "view",
                "remove_from_cart": "add_to_cart", "purchase": "add_to_cart",
            }.get(kind)  # fmt: skip
            assert needs is None or item in seen[needs], (kind, item)
            seen[kind].add(item)
            bought += kind == "purchase"
    assert bought > 200


def test_reviews_and_messages_follow_purchases(
    events: list[dict[str, Any]], truth: dict[str, list[dict[str, Any]]]
) -> None:
    item_of_message = {row["event_id"]: row["item_id"] for row in truth["label"]}
    bought = set()
    for event in events:
        if event["type"] == "purchase":
            bought.add((event["user_id"], event["item_id"]))
        elif event["type"] in ("review", "message"):
            assert (event["user_id"], item_of_message[event["event_id"]]) in bought


def test_labels_are_the_truth_and_some_messages_tell_them(
    events: list[dict[str, Any]], truth: dict[str, list[dict[str, Any]]]
) -> None:
    said = {e["event_id"]: e for e in events if e["type"] in ("review", "message")}
    known = {row["event_id"]: row for row in truth["label"]}
    # Copies and late ones may still be on their way at the end; none is unknown.
    assert said.keys() <= known.keys()
    assert len(said) > 0.9 * len(known)
    messages = [e for e in said.values() if e["type"] == "message"]
    assert 0.2 < np.mean(["label" in e for e in messages]) < 0.8
    for event_id, event in said.items():
        row = known[event_id]
        assert (event["ts"], event["user_id"]) == (row["t_ms"], row["user_id"])
        assert event.get("label", row["label"]) == row["label"] in LABELS
        if event["type"] == "review":
            assert event["rating"] == row["rating"]
            assert row["label"] == LABELS[0 if event["rating"] <= 2 else 1 + (event["rating"] > 3)]
    complaints = Counter(known[e["event_id"]]["label"] for e in messages)
    assert complaints["negative"] > complaints["positive"]


def test_shoppers_do_what_they_are_interested_in(
    events: list[dict[str, Any]], truth: dict[str, list[dict[str, Any]]]
) -> None:
    topic = {row["item_id"]: row["topic"] for row in truth["item"]}
    visits = {(row["user_id"], row["t_ms"]): np.array(row["interest"]) for row in truth["visit"]}
    assert np.allclose([shares.sum() for shares in visits.values()], 1, atol=1e-4)
    first = np.array([visits[row["user_id"], row["t_ms"]][row["topic"]] for row in truth["visit"]])
    assert first.mean() > 5 / K
    began = defaultdict(list)
    for user, t_ms in sorted(visits):
        began[user].append(t_ms)
    shares = defaultdict(list)
    for event in events:
        if event["type"] in ("impression", "view", "purchase") and "session_id" in event:
            of_user = began[event["user_id"]]
            interest = visits[event["user_id"], of_user[bisect(of_user, event["ts"]) - 1]]
            shares[event["type"]].append(interest[topic[event["item_id"]]])
    means = [np.mean(shares[kind]) for kind in ("impression", "view", "purchase")]
    assert 2 / K < means[0] < means[1] < means[2]


def test_interests_drift(truth: dict[str, list[dict[str, Any]]]) -> None:
    near, far = [], []
    by_user = defaultdict(list)
    for row in truth["visit"]:
        by_user[row["user_id"]].append((row["t_ms"], np.log(np.array(row["interest"]) + 1e-9)))
    for visits in by_user.values():
        (first_ms, first) = visits[0]
        for t_ms, then in visits[1:]:
            alike = np.corrcoef(first, then)[0, 1]
            (near if t_ms - first_ms < 5 * DAY_MS else far).append(alike)
    assert np.mean(near) > 0.85
    assert np.mean(far) < np.mean(near) - 0.1


def test_who_left_does_not_visit_again_and_was_less_pleased(
    events: list[dict[str, Any]], truth: dict[str, list[dict[str, Any]]]
) -> None:
    left_ms = {row["user_id"]: row["t_ms"] for row in truth["churn"]}
    assert len(left_ms) > 20
    for event in events:
        if "session_id" in event:
            assert event["ts"] <= left_ms.get(event["user_id"], SPEC.end_ms)
    ratings = defaultdict(list)
    for row in truth["label"]:
        if row["rating"]:
            ratings[row["user_id"] in left_ms].append(row["rating"])
    assert np.mean(ratings[True]) < np.mean(ratings[False])
    new = {row["user_id"] for row in truth["visit"]} - {user_id(n) for n in range(SPEC.shoppers)}
    assert {user for user in new if "guest" not in user}, "nobody followed those who left"


def test_some_who_left_want_to_be_erased(
    events: list[dict[str, Any]], truth: dict[str, list[dict[str, Any]]]
) -> None:
    left_ms = {row["user_id"]: row["t_ms"] for row in truth["churn"]}
    erased = {event["user_id"]: event["ts"] for event in events if event["type"] == "forget"}
    assert 0.1 < len(erased) / len(left_ms) < 0.5
    for user, t_ms in erased.items():
        assert t_ms > left_ms[user]


def test_guests_come_once(truth: dict[str, list[dict[str, Any]]]) -> None:
    guests = [row["user_id"] for row in truth["visit"] if "guest" in row["user_id"]]
    assert len(set(guests)) == len(guests)
    assert 0.05 < len(guests) / len(truth["visit"]) < 0.15
    assert user_id(GUEST) == "sim-guest-0"


def test_repeats_have_the_id_of_their_first_and_late_events_keep_their_time(
    told: list[str],
) -> None:
    sent = [json.loads(line) for line in told]
    first: dict[str, str] = {}
    for line, event in zip(told, sent, strict=True):
        assert first.setdefault(event["event_id"], line) == line
    assert len(sent) / len(first) == pytest.approx(1.03, abs=0.01)
    behind = [b["ts"] < a["ts"] for a, b in pairwise(sent)]
    assert 0.02 < np.mean(behind) < 0.12
    orderly = [json.loads(x)["ts"] for x in lines(replace(SPEC, duplicates=0, late=0, days=5))]
    assert orderly == sorted(orderly)


def test_what_is_used_up_is_bought_again() -> None:
    shop = Shop(Spec(shoppers=200, items=2_000, days=80, visits_per_day=0.2, churn=0.0, seed=3))
    times: Counter[tuple[int, int]] = Counter()
    for block in shop.blocks():
        rows = block.rows[block.rows["type"] == EVENT_TYPES.index("purchase")]
        rows = rows[rows["user"] < GUEST]
        pairs = set(
            zip(rows["user"].tolist(), rows["item"].tolist(), rows["session"].tolist(), strict=True)
        )
        times.update((user, item) for user, item, _ in pairs)
    again = {
        kind: np.mean([n > 1 for (_, item), n in times.items() if shop.consumable[item] == kind])
        for kind in (True, False)
    }
    assert again[True] > 0.12
    assert again[False] < again[True] / 2


def test_traffic_follows_the_time_of_day_and_the_asked_rate() -> None:
    spec = Spec(shoppers=2_000, items=50, days=6, visits_per_day=0.4, guests=0.0, churn=0.0)
    t_ms = np.concatenate([block.visits.t_ms for block in Shop(spec).blocks()])
    assert len(t_ms) == pytest.approx(2_000 * 6 * 0.42, rel=0.12)
    assert np.bincount(t_ms - spec.start_ms)[: 3 * 60_000].max() <= 3  # no rush as it opens
    hours = np.bincount(t_ms % DAY_MS // 3_600_000, minlength=24)
    assert hours[20] > 5 * hours[3]


def test_as_many_items_are_shown_as_asked() -> None:
    for shown in (1, 4):
        shop = Shop(Spec(shoppers=50, items=40, days=4, shown=shown))
        rows = np.concatenate([block.rows for block in shop.blocks()])
        of_type = np.bincount(rows["type"], minlength=len(EVENT_TYPES))
        impressions, views = (of_type[EVENT_TYPES.index(name)] for name in ("impression", "view"))
        assert impressions > shown * views > 0


def test_bots_look_at_everything_and_buy_nothing() -> None:
    shop = Shop(Spec(shoppers=100, items=400, days=3, bots=0.2, guests=0.0))
    rows = np.concatenate([block.rows for block in shop.blocks()])
    truth = [(b.visits.user, b.visits.topic) for b in Shop(shop.spec).blocks()]
    bots = np.unique(np.concatenate([user[topic < 0] for user, topic in truth]))
    theirs = rows[np.isin(rows["user"], bots)]
    assert {EVENT_TYPES[t] for t in np.unique(theirs["type"])} == {"impression", "view", "click"}
    of_topic = np.bincount(shop.topic[theirs["item"]], minlength=K)
    assert of_topic.min() > 0.7 * of_topic.mean()


def test_the_memory_does_not_grow_with_the_events() -> None:
    def peak(days: float) -> tuple[int, int]:
        shop = Shop(replace(SPEC, days=days))
        tracemalloc.start()
        rows = sum(len(block.rows) for block in shop.blocks())
        high = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return rows, high

    (few, low), (many, high) = peak(15), peak(90)
    assert many > 5 * few
    assert high < 1.3 * low


@pytest.mark.parametrize(
    ("wrong", "field"),
    [
        ({"shoppers": 0}, "shoppers"),
        ({"items": K - 1}, "items"),
        ({"days": -1}, "days"),
        ({"late": 1.5}, "late"),
        ({"drift_days": 0}, "drift_days"),
        ({"visits_per_day": float("nan")}, "visits_per_day"),
    ],
)
def test_a_shop_that_cannot_be_is_refused_by_name(wrong: dict[str, Any], field: str) -> None:
    with pytest.raises(ValueError, match=field):
        Spec(**wrong)


# -- the command line


def test_lines_go_to_a_file_items_first(tmp_path: Path) -> None:
    out, truth = tmp_path / "shop.jsonl", tmp_path / "truth.parquet"
    ran = CliRunner().invoke(
        app,
        ["simulate", "--shoppers", "50", "--items", "20", "--limit", "100", "--out", str(out),
         "--truth", str(truth)],
    )  # fmt: skip
    assert ran.exit_code == 0, ran.output
    assert "simulated: 20 items, 100 events" in ran.stderr
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert ["type" in row for row in rows] == [False] * 20 + [True] * 100
    assert pq.read_schema(truth).metadata[b"simulated"] == b"true"


def simulate(*options: str) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [sys.executable, "-m", "stream.cli", "simulate", *options],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )


def test_a_reader_that_has_seen_enough_ends_it_without_a_word() -> None:
    with simulate("--only", "events", "--days", "0") as process:
        assert process.stdout is not None
        assert process.stderr is not None
        assert json.loads(process.stdout.readline())["user_id"].startswith("sim-")
        process.stdout.close()
        assert process.stderr.read() == b""
        assert process.wait(30) == 0


def test_ctrl_c_ends_it_and_the_truth_so_far_can_be_read(tmp_path: Path) -> None:
    truth = tmp_path / "truth.parquet"
    with simulate("--days", "0", "--out", str(tmp_path / "out"), "--truth", str(truth)) as process:
        while not (tmp_path / "out").exists() or (tmp_path / "out").stat().st_size < 1_000_000:
            assert process.poll() is None
        process.send_signal(signal.SIGINT)
        assert process.wait(30) == 130
    assert pq.read_metadata(truth).num_rows > 0


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--live"], "--kafka"),
        (["--rate", "5"], "--kafka"),
        (["--kafka", "--live", "--start", "2026-03-01"], "--start or --live"),
        (["--kafka", "--days", "0"], "--days"),
        (["--items", "3"], "items must be at least 16"),
        (["--limit", "-3"], "a limit of -3"),
        (["--out", "/nowhere/x"], "/nowhere/x"),
        (["--truth", "/nowhere/x"], "--truth"),
    ],
)
def test_what_cannot_be_is_named_with_the_way_out(options: list[str], words: str) -> None:
    with simulate(*options) as process:
        assert process.stderr is not None
        assert process.stdout is not None
        process.stdout.close()
        said = process.stderr.read().decode()
    assert process.returncode == 1
    assert words in " ".join(said.split())
    assert "Traceback" not in said
