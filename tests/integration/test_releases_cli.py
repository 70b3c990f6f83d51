"""`penchant releases …` on a folder of real, tiny releases."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import redis
from typer.testing import CliRunner, Result

from model.errors import ReleaseCorrupt, ReleaseMissing
from model.gate import Comparison, Figure, decide, record
from model.releases import Release, load_current, make_current, record_decision
from profiles.schema import Keys
from stream import releases_cli
from stream.errors import UserError
from stream.releases_cli import releases_app
from stream.releases_view import NEWEST, listing, newest
from tests.integration.worker_process import build_tiny_release, build_turned_release

Run = Callable[..., Result]


@pytest.fixture
def base(tmp_path: Path) -> Release:
    return build_tiny_release(tmp_path)


@pytest.fixture
def run(base: Release, monkeypatch: pytest.MonkeyPatch) -> Run:
    monkeypatch.setenv("MODEL_RELEASES", str(base.path.parent))
    monkeypatch.setattr(releases_cli.console, "width", 200)

    def call(*arguments: str) -> Result:
        return CliRunner().invoke(releases_app, list(arguments), catch_exceptions=False)

    return call


def answer(ran: Result) -> Any:
    assert ran.exit_code == 0
    return json.loads(ran.stdout)


def test_releases_moves_and_verdicts_are_listed(base: Release, run: Run) -> None:
    second = build_turned_release(base, 2)
    _, rejected = (
        record_decision(
            base.path.parent,
            {"candidate": candidate, "decision": verdict, "reasons": ["churn AUC fell"]},
        )
        for candidate, verdict in ((second.id, "accept"), ("", "reject"))
    )
    shown = answer(run("list", "--json"))
    assert [r["id"] for r in shown["releases"]] == [base.id, second.id]
    assert [r["current"] for r in shown["releases"]] == [True, False]
    assert [r["decision"] for r in shown["releases"]] == ["", "accept"]
    assert [m["release"] for m in shown["moves"]] == [base.id]
    table = run("list").stdout
    for word in (base.id, second.id, "live", "accept", rejected, "churn AUC fell"):
        assert word in table


def test_an_empty_folder_says_what_to_type(
    run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("MODEL_RELEASES", str(tmp_path / "none"))
    assert "penchant releases build" in run("list").stdout
    assert answer(run("list", "--json"))["releases"] == []


def test_a_release_is_shown_with_its_figures_and_transition(base: Release, run: Run) -> None:
    second = build_turned_release(base, 2)
    shown = answer(run("show", second.id[:11], "--json"))
    assert (shown["id"], shown["parent"]) == (second.id, base.id)
    assert shown["metrics"] == {"turn": 2}
    assert shown["transition"]["errors"]["orthogonal"]["overlap"] == 1.0
    assert "metrics.turn" in run("show", second.id).stdout


def _reject(base: Release, candidate: float) -> str:
    newest = Figure("recall@20", 0.049, candidate, -0.01, 0.02, 1_234)
    rare = Figure("recall@20 of rare items", 0.083, 0.0, -0.09, -0.05, 700)
    decision = decide(Comparison(newest, slices=(rare,), norms={"the projection": (1.0, 2.0)}))
    return record_decision(base.path.parent, record(decision, "", base.id, "2026-03-01T12:00"))


def test_a_rejection_is_listed_with_its_figures_and_opened_by_its_id(
    base: Release, run: Run
) -> None:
    first, second = _reject(base, 0.134), _reject(base, 0.05)
    assert first != second
    table = " ".join(run("list").stdout.split())
    assert f"{first} 2026-03-01 12:00" in table
    assert "recall@20 0.049 -> 0.134" in table
    shown = answer(run("show", first, "--json"))
    assert shown["figures"]["comparison"]["newest"]["candidate"] == 0.134
    assert answer(run("show", second[:16], "--json"))["id"] == second
    text = run("show", first).stdout
    for word in (first, base.id, "rare items", "0.083", "-0.09 to -0.05", "700", "slice_tolerance"):
        assert word in text
    assert "reason 2" in text
    with pytest.raises(UserError, match="no verdict 'verdict-nowhere'"):
        run("show", "verdict-nowhere")


def test_of_many_verdicts_the_newest_are_listed_and_the_rest_counted(
    base: Release, run: Run
) -> None:
    second = build_turned_release(base, 2)
    record_decision(base.path.parent, {"candidate": second.id, "decision": "accept", "reasons": []})
    rejected = [_reject(base, 0.01 * n) for n in range(NEWEST + 5)]
    few, whole = run("list").stdout, run("list", "--all").stdout
    assert [name in few for name in rejected] == [False] * 5 + [True] * NEWEST
    assert "5 older ones are not shown: `penchant releases list --all`" in few
    assert all(name in whole for name in rejected)
    assert "not shown" not in whole
    assert len(answer(run("list", "--json"))["decisions"]) == len(rejected) + 1
    for text in (few, whole):
        assert (base.id in text, second.id in text) == (True, True)


def test_the_live_release_is_listed_however_old(base: Release) -> None:
    chain = [base, *(build_turned_release(base, seed) for seed in range(4))]
    shown = listing(base.path.parent)
    few, more = newest(shown, most=2)
    ids = [row["id"] for row in shown["releases"]]
    assert len(ids) == len(chain)
    assert ids[0] == base.id
    assert [row["id"] for row in few["releases"]] == [ids[0], *ids[-2:]]
    assert more == 2


@pytest.mark.parametrize("width", [80, 120, 200])
def test_ids_are_whole_on_a_screen_of_80_columns_and_more(
    base: Release, run: Run, monkeypatch: pytest.MonkeyPatch, width: int
) -> None:
    monkeypatch.setattr(releases_cli.console, "width", width)
    second, third = build_turned_release(base, 2), build_turned_release(base, 5)
    rejected = _reject(base, 0.05)
    listed = run("list").stdout
    for name in (base.id, second.id, third.id, rejected):
        assert name in listed
    assert (second.space in listed) == (width >= 120)
    shown = run("show", second.id).stdout
    assert second.id in shown
    assert base.id in shown
    compared = run("diff", base.id, second.id).stdout
    assert base.id in compared
    assert second.id in compared
    assert base.id in run("show", rejected).stdout


def test_two_releases_are_compared_figure_by_figure(base: Release, run: Run) -> None:
    second, third = build_turned_release(base, 2), build_turned_release(base, 5)
    found = answer(run("diff", second.id, third.id, "--json"))["differences"]
    by_name = {row["name"]: row for row in found}
    assert by_name["metrics.turn"]["difference"] == 3
    assert by_name["space"]["other"] == third.space
    assert "pooling" not in by_name
    assert "+3" in run("diff", second.id, third.id).stdout


def test_promoting_and_rolling_back_move_the_pointer(base: Release, run: Run) -> None:
    folder, second = base.path.parent, build_turned_release(base, 2)
    assert second.id in run("promote", second.id).stdout
    assert load_current(folder).id == second.id
    assert answer(run("rollback", "--json"))["live"] == base.id
    assert load_current(folder).id == base.id
    with pytest.raises(ReleaseMissing):
        run("rollback")


@pytest.mark.parametrize("ends", [("promote", "base"), ("resume",)])
def test_a_rollback_holds_until_somebody_says_otherwise(
    base: Release, run: Run, ends: tuple[str, ...]
) -> None:
    second = build_turned_release(base, 2)
    run("promote", second.id)
    assert answer(run("list", "--json"))["hold"] is None
    assert "`resume`" in run("rollback").stdout
    hold = answer(run("list", "--json"))["hold"]
    assert hold["why"] == f"{second.id} rolled back"
    assert f"on hold since {hold['at']}" in run("list").stdout
    run(*ends)
    assert answer(run("list", "--json"))["hold"] is None
    assert "on hold" not in run("list").stdout
    assert run("resume").stdout == "nothing was on hold\n"


def test_a_damaged_release_is_not_promoted(base: Release, run: Run) -> None:
    second = build_turned_release(base, 2)
    (second.path / "metrics.json").write_text("{}")
    with pytest.raises(ReleaseCorrupt, match=r"metrics\.json"):
        run("promote", second.id)
    assert load_current(base.path.parent).id == base.id


@pytest.mark.parametrize("name", ["", "base-0000", "trained-"])
def test_a_name_that_means_no_one_release_is_refused(base: Release, run: Run, name: str) -> None:
    for seed in (2, 3):
        build_turned_release(base, seed)
    with pytest.raises(UserError, match="releases list"):
        run("promote", name)


def test_a_live_release_that_is_gone_can_be_replaced(base: Release, run: Run) -> None:
    second = build_turned_release(base, 2)
    make_current(second)
    second.path.rename(base.path.parent / ".gone")
    assert "not there" in run("list").stdout
    run("promote", base.id)
    assert load_current(base.path.parent).id == base.id


@pytest.mark.redis
def test_the_sweep_into_the_live_space_is_told_where_redis_answers(
    base: Release, run: Run, redis_url: str, namespace: str, redis_client: redis.Redis,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setenv("NAMESPACE", namespace)
    monkeypatch.setenv("REDIS_URL", "redis://127.0.0.1:1/0")
    assert answer(run("list", "--json"))["sweep"] is None
    monkeypatch.setenv("REDIS_URL", redis_url)
    assert answer(run("list", "--json"))["sweep"] is None
    fields = {"cursor": 7, "seen": 12_000, "moved": 1_100, "done": 0}
    redis_client.hset(Keys(namespace).sweep(base.space), mapping=fields)
    told = {"space": base.space, "seen": 12_000, "moved": 1_100, "done": False}
    assert answer(run("list", "--json"))["sweep"] == told
    assert f"sweep into {base.space}: going on, 12,000 profiles seen, 1,100 moved" in (
        run("list").stdout
    )
