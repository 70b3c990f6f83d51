"""`penchant eval`: a report of a small set, as tables, as plain text and as JSON."""

from __future__ import annotations

import io
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
from rich.console import Console
from typer.testing import CliRunner

from model import baselines
from model.prequential import NO_ITEM, Events
from model.projection import Projection
from model.whole_profile import Foretold, WholeProfile
from profiles.schema import EVENT_TYPES
from stream import evaluation
from stream.cli import app
from stream.datasets import load
from stream.errors import UserError
from stream.evaluation import (
    Report,
    by_last_item,
    counters,
    counters_of_order,
    evaluate,
    in_event_time,
    steps_of_text,
    untrained_text,
    with_text,
)
from stream.evaluation_data import Encoded, Recorded, recorded
from stream.evaluation_view import as_json, plain, render

ITEMS, USERS, DAYS, DAY_MS = 30, 25, 16, 86_400_000
NETWORKS = {"GRU4Rec", "SASRec (BCE, as published)", "SASRec (sampled softmax)"}
RANKED = USERS * DAYS * 60 // 100  # the first 40 % are only learned from


def shop(name: str = "shop", kinds: int = 1) -> Recorded:
    """Everybody goes through the catalogue from an item of their own, and comes back to that."""
    rng = np.random.default_rng(0)
    day, user = np.divmod(np.arange(DAYS * USERS), USERS)
    start = rng.integers(0, ITEMS, USERS)
    item = np.where(day % 4 == 3, start[user], (start[user] + day) % ITEMS)
    return Recorded(
        name,
        Events(
            user,
            item.astype(np.int32),
            (5 - day % kinds * 4).astype(np.uint8),
            day * DAY_MS,
            np.ones(len(user), dtype=np.float32),
        ),
        [f"user {n}" for n in range(USERS)],
        [f"item {n}" for n in range(ITEMS)],
        ["text"] * ITEMS,
    )


def vectors() -> np.ndarray[tuple[int, int], np.dtype[np.float32]]:
    return np.random.default_rng(1).normal(size=(ITEMS, 6)).astype(np.float32)


@pytest.fixture(scope="module")
def report() -> Report:
    data = shop(kinds=2)
    return in_event_time(data, counters(data) | untrained_text(data, vectors()))


def test_every_slice_has_every_scorer_on_the_same_targets(report: Report) -> None:
    every = [*report.sections, *report.slices]
    for section in every:
        assert [row.name for row in section.rows] == [row.name for row in every[0].rows]
        counts = {i.count for row in section.rows for i in row.metrics.values()}
        assert counts == {section.targets}
    assert {"type purchase", "type view"} <= {section.title for section in every}
    targets = {section.title: section.targets for section in every}
    assert targets["repeats"] + targets["discovery"] == targets["all"] == RANKED
    assert targets["discovery, ranked among the items new to the user"] == targets["discovery"]


def test_own_frequency_knows_repeats_and_little_of_discovery(report: Report) -> None:
    of = {section.title: section for section in report.slices}

    def recall(title: str, name: str) -> float:
        (row,) = (row for row in of[title].rows if row.name == name)
        return row.metrics["recall@10"].value

    assert recall("repeats", "own frequency") > 0.9
    assert recall("discovery", "own frequency") < 0.5
    assert recall("discovery", "last basket") > 0.6


def test_all_are_compared_with_the_strongest(report: Report) -> None:
    rows = report.sections[0].rows
    assert report.reference == max(rows, key=lambda r: r.metrics["recall@20"].value).name
    assert [row.name for row in rows if row.lift is None] == [report.reference]
    assert all(row.lift.value <= 0 for row in rows if row.lift is not None)


def test_what_is_shown_is_measured_once_for_all(report: Report) -> None:
    first, *rest = report.sections
    assert all(row.coverage is not None and 0 <= row.coverage <= 1 for row in first.rows)
    assert all(row.coverage is None for section in rest for row in section.rows)


def test_plain_text_is_aligned_and_complete(report: Report) -> None:
    text = plain(report)
    for section in report.sections:
        assert f"{section.title}: {section.targets:,} targets" in text
    assert all(section.title in text for section in report.slices)
    table = text.split("\n\n")[1].splitlines()[1:]
    assert len(table) == 1 + len(report.sections[0].rows)
    assert len({len(line) for line in table}) == 1
    assert not any(line != line.rstrip() for line in text.splitlines())


def test_a_terminal_gets_the_same_figures(report: Report) -> None:
    console = Console(width=200, record=True, force_terminal=True, file=io.StringIO())
    console.print(render(report))
    shown = console.export_text()
    cell = plain(report).split("\n\n")[1].splitlines()[2].split()[1]
    assert cell in shown
    assert report.sections[-1].title in shown
    assert "slice" in shown


def test_json_is_json_for_every_reader(report: Report) -> None:
    text = json.dumps(as_json(report), allow_nan=False)
    found = json.loads(text)
    assert found["sections"][0]["rows"][0]["metrics"]["recall@20"]["count"] == RANKED
    assert found["published"] == []


def test_by_the_last_item_seen_items_are_masked_and_kept_and_published_figures_stand_beside() -> (
    None
):
    data = shop("amazon_scientific")
    makers = (
        counters_of_order(data)
        | steps_of_text(data, vectors())
        | dict([with_text(data, vectors())])
    )
    report = by_last_item(data, makers)
    assert [section.targets for section in report.sections] == [USERS, USERS]
    # Everybody comes back at last to the item they began with: masked, it cannot be found.
    masked, kept = report.sections
    assert all(row.metrics["recall@20"].value == 0 for row in masked.rows)
    assert any(row.metrics["recall@20"].value > 0.9 for row in kept.rows)
    assert "VQ-Rec" in plain(report)
    assert as_json(report)["published"][0]["recall@10"] == 0.1238


def test_a_set_without_anything_to_foresee_is_refused_in_words() -> None:
    data = shop()
    nothing = data.events.take(slice(0, 40))
    searches = Events(
        nothing.user,
        np.full(40, NO_ITEM, dtype=np.int32),
        nothing.type,
        nothing.t_ms,
        nothing.weight,
    )
    empty = Recorded("searches", searches, data.user_ids, data.item_ids, data.texts)
    with pytest.raises(UserError, match="nothing to foresee"):
        in_event_time(empty, counters(empty))
    once = Recorded(
        "once", data.events.take(slice(0, USERS)), data.user_ids, data.item_ids, data.texts
    )
    with pytest.raises(UserError, match="nothing to leave out"):
        by_last_item(once, counters_of_order(once))


def test_a_catalogue_too_large_for_pair_counts_is_refused_in_words() -> None:
    data = shop()
    large = Recorded("large", data.events, data.user_ids, ["x"] * 30_001, [""] * 30_001)
    with pytest.raises(UserError, match="30,001 items"):
        counters(large)
    with pytest.raises(UserError, match="30,001 items"):
        counters_of_order(large)


def test_a_recorded_set_becomes_columns_with_the_weights_of_profiles() -> None:
    data = recorded(load("movielens"))
    assert len(data.events) == 100_000
    assert len(data.item_ids) == len(data.texts) == 1_682
    assert data.texts[data.item_ids.index("267")] == ""  # the film without a name
    assert set(np.unique(data.events.weight).tolist()) == {
        np.float32(w) for w in (1.0, 0.3, -0.5, -1.0)
    }
    assert (np.diff(data.events.t_ms) >= 0).all()


def test_the_command_prints_a_table_of_the_set_it_was_given(tmp_path: Path) -> None:
    user = np.repeat(np.arange(12), 6)
    pos = np.tile(np.arange(6), 12)
    write = pyarrow.parquet.write_table
    events = {"user_id": user, "pos": pos, "item_id": (user + pos) % 9}
    write(pa.table(events), tmp_path / "tiny_events.parquet")
    titles = {"item_id": np.arange(9), "title": [f"title {n}" for n in range(9)]}
    write(pa.table(titles), tmp_path / "tiny_items.parquet")
    arguments = ["eval", "amazon", "--path", str(tmp_path / "tiny_events.parquet"), "--no-text"]
    shown = CliRunner().invoke(app, arguments)
    assert shown.exit_code == 0, shown.output
    assert "12 targets of 12 users" in shown.output
    assert "item-kNN" in shown.output
    found = json.loads(CliRunner().invoke(app, [*arguments, "--json"]).output)
    assert found["dataset"] == "tiny"
    assert len(found["sections"]) == 2
    assert not {row["name"] for row in found["sections"][0]["rows"]} & NETWORKS
    found = json.loads(CliRunner().invoke(app, [*arguments, "--networks", "--json"]).output)
    for section in found["sections"]:
        rows = {row["name"]: row["metrics"] for row in section["rows"]}
        assert all(rows[name]["recall@10"]["value"] > 0 for name in NETWORKS)


def test_the_command_reads_a_file_of_anybodys(tmp_path: Path) -> None:
    rows = ["cust,sku,when"]
    rows += [f"u{u},i{(u + n) % 9},2024-03-{n + 1:02}" for u in range(12) for n in range(20)]
    file = tmp_path / "mine.csv"
    file.write_text("\n".join(rows), encoding="utf-8")
    arguments = ["eval", "csv", "--path", str(file), "--no-text"]
    refused = CliRunner().invoke(app, arguments)
    assert "--columns" in str(refused.exception)
    arguments += ["--columns", "user_id=cust,item_id=sku,ts=when", "--type", "purchase"]
    shown = CliRunner().invoke(app, [*arguments, "--utc-offset", "+00:00"])
    assert shown.exit_code == 0, shown.output
    assert "own frequency" in shown.output


def test_a_plot_that_cannot_be_written_is_told_before_the_evaluation(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def begins(*_: object, **__: object) -> None:
        raise AssertionError("the data set was read")

    monkeypatch.setattr("stream.evaluation_data.load", begins)
    arguments = ["eval", "movielens", "--no-text", "--plot"]
    for file in (tmp_path, tmp_path / "nowhere" / "plot.png"):
        refused = CliRunner().invoke(app, [*arguments, str(file)])
        assert isinstance(refused.exception, UserError)
        assert f"cannot write {file}" in str(refused.exception)
    with pytest.raises(AssertionError, match="was read"):
        CliRunner().invoke(app, [*arguments, str(tmp_path / "plot.png")], catch_exceptions=False)
    assert not (tmp_path / "plot.png").exists()


def test_what_heads_said_is_held_against_what_came_of_it() -> None:
    """Of a user with more events than are learned from, too."""
    hours, bought_at, week = 3_000, 2_000, 7 * 24
    kind = np.full(hours, EVENT_TYPES.index("view"), dtype=np.uint8)
    kind[bought_at] = EVENT_TYPES.index("purchase")
    hour = np.arange(hours)
    data = Recorded(
        "shop",
        Events(
            np.zeros(hours, dtype=np.int64),
            np.zeros(hours, dtype=np.int32),
            kind,
            hour * 3_600_000,
            np.ones(hours, dtype=np.float32),
        ),
        ["user"],
        ["item"],
        ["text"],
    )
    soon = (hour < bought_at) & (hour >= bought_at - week)
    whole = WholeProfile.__new__(WholeProfile)  # only what it said is looked at
    whole.foretold = Foretold(hours, [hour], {"purchase": [soon.astype(np.float32)]})
    (head,) = evaluation._heads(data, whole)
    assert (head.name, head.auc.value, head.calibration_error) == ("purchase", 1.0, 0.0)
    assert head.events == pytest.approx(hours - week, abs=1)
    assert head.positive == pytest.approx(week / (hours - week), rel=0.01)


def test_of_many_baskets_some_are_drawn_and_all_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    data = shop()
    monkeypatch.setattr(evaluation, "_MOST_RANKINGS", 60)
    told = []

    class Told(baselines.Popular):
        def update(self, events: Events) -> None:
            told.append(len(events))
            super().update(events)

    report = in_event_time(data, {"popular": lambda: Told(ITEMS)})
    assert report.sections[0].targets == 60
    assert f"before 60 of {RANKED} baskets" in report.protocol
    assert sum(told) == len(data.events)


def texts_of(data: Recorded) -> Encoded:
    rng = np.random.default_rng(2)
    features = rng.normal(size=(len(data.item_ids), 8)).astype(np.float32)
    features /= np.linalg.norm(features, axis=1, keepdims=True)
    projection = Projection(np.zeros(8, np.float32), np.eye(8, dtype=np.float32))
    return Encoded(features, features, projection)


def test_the_whole_profile_and_its_twins_stand_beside_all_baselines(tmp_path: Path) -> None:
    data = shop()
    weekly = replace(data, events=replace(data.events, t_ms=data.events.t_ms * 7))
    report = evaluate(weekly, texts_of(data), {"more": lambda: baselines.Popular(ITEMS)}, tmp_path)
    names = [row.name for row in report.sections[0].rows]
    assert names[-6:] == [
        "more",
        "whole profile, frozen",
        "whole profile, encoder frozen",
        "whole profile, learning",
        "its next interest alone, frozen",
        "its next interest alone, learning",
    ]
    assert set(counters(data)) < set(names)
    # Three trainings in 16 weeks, and 25 users are too few for the gate.
    assert report.timeline is not None
    assert (len(report.timeline.swaps_ms), len(report.timeline.rejections_ms)) == (0, 3)


def test_where_only_the_order_is_real_the_whole_profile_is_fitted_once(tmp_path: Path) -> None:
    data = shop()
    new_at_last = data.events.t_ms < (DAYS - 1) * DAY_MS
    data = replace(data, events=data.events.take(new_at_last), only_order=True)
    report = evaluate(data, texts_of(data), {}, tmp_path)
    masked = {row.name: row for row in report.sections[0].rows}
    once = masked["whole profile, fitted once"].metrics["mrr"].value
    assert once > 0.5 > masked["popular"].metrics["mrr"].value
