"""The demo's screen and lines: what is shown of a state, and that it fits."""

from __future__ import annotations

import io
import math
from dataclasses import replace
from pathlib import Path

import pytest
from rich.cells import cell_len
from rich.console import Console

from model.gate import Comparison, Figure, decide, record
from model.releases import record_decision
from stream import demo_learning, live_view
from stream.demo_watch import Sample
from stream.live_view import Act, Figures, Learning, Near, Shopper, Verdict, View

AT_MS = 876_664_980_000  # 1997-10-12T14:03:00Z

SHOPPER = Shopper(
    user_id="405",
    events=131,
    updated_ms=AT_MS,
    acts=(
        Act("purchase", "Star Wars (1977)", 1.0),
        Act("review", "Ishtar (1987)", -0.5),
        Act("click", "[bold]The [Game] (1997)", 0.3),
    ),
    categories=(("Action > Adventure", 3.42), ("Drama", 1.71), ("Comedy", 0.01)),
    nearest=(Near("Return of the Jedi (1983)", 0.8312), Near("Aliens (1986)", 0.42, is_new=True)),
)
VIEW = View(
    dataset="MovieLens-100K: the ratings of 943 people",
    speed=86_400.0,
    elapsed_s=12.3,
    at_ms=AT_MS,
    share_sent=0.078,
    figures=Figures(
        events=7_794,
        events_per_s=577.4,
        lag_records=3,
        freshness_p50_s=0.05,
        freshness_p99_s=2.5,
        cache_hits=0.9996,
        saves_per_s=26.0,
    ),
    shoppers=(SHOPPER,),
    commands=("penchant profile show 405", "echo '{\"a\":1}' | penchant produce"),
)


def drawn(view: View, width: int = 100, height: int = 40, *, styles: bool = False) -> list[str]:
    """The rows of the screen."""
    out = io.StringIO()
    colors = "standard" if styles else None
    console = Console(
        file=out, width=width, height=height, force_terminal=styles, color_system=colors
    )
    console.print(live_view.render(view, width, height))
    return out.getvalue().splitlines()


def test_the_screen_shows_every_figure_under_its_label() -> None:
    rows = drawn(VIEW)
    labels, values, end = rows[2], rows[3], 0
    for label, value in live_view.figure_cells(VIEW.figures).items():
        end = labels.index(label, end) + len(label)
        assert values[:end].endswith(value), f"{label} is not above {value}"
    assert "12 Oct 1997" in rows[1]
    assert "7.8 % of the set" in rows[1]
    assert "1 day per second (86,400×)" in rows[0]


def test_the_screen_shows_a_shopper_in_words() -> None:
    text = "\n".join(drawn(VIEW, width=120))
    assert "shopper 405  131 events, last 12 Oct 1997 14:03" in text
    assert "purchase Star Wars (1977)" in text
    assert "0.83  Return of the Jedi (1983)" in text
    assert "Action > Adventure" in text
    assert "  3.4" in text


def test_what_is_not_known_shows_as_a_dash() -> None:
    rows = drawn(View(dataset="a set", speed=1.0))
    assert rows[3].split() == ["–"] * 7
    assert "no shopper has acted yet" in "\n".join(rows)
    assert live_view.plain_status(View(dataset="a set", speed=1.0)) == (
        "  0.0 s  –  – events  – events/s  lag –  freshness p50 –, p99 –  cache hits –"
    )


@pytest.mark.parametrize(("width", "height"), [(80, 24), (100, 40), (200, 60), (60, 12)])
def test_the_screen_never_overflows(width: int, height: int) -> None:
    crowded = replace(
        SHOPPER,
        user_id="4" * 200,
        acts=tuple(Act("remove_from_cart", "很长的标题" * 30, -1.0) for _ in range(8)),
        categories=tuple(("A category > " * 9, 1e9 / (1 + i)) for i in range(8)),
        nearest=tuple(Near("A title " * 30, 0.5) for _ in range(8)),
    )
    view = replace(VIEW, dataset="A set " * 60, shoppers=(crowded,) * 4)
    rows = drawn(view, width, height)
    assert len(rows) <= height
    assert max(map(cell_len, rows)) <= width


def test_a_small_screen_shows_fewer_shoppers_and_a_large_one_no_gaps() -> None:
    assert live_view.fitting(24) == (3, 3)
    assert live_view.fitting(40) == (4, 5)
    assert live_view.fitting(200) == (4, 8)
    assert live_view.fitting(1) == (1, 1)
    rows = drawn(replace(VIEW, shoppers=(SHOPPER,) * 4), height=24)
    assert sum("shopper 405" in row for row in rows) == 3


def test_titles_are_not_read_as_markup() -> None:
    assert "[bold]The [Game] (1997)" in "\n".join(drawn(VIEW, width=160))


def test_a_shopper_who_just_acted_stands_out() -> None:
    idle = "\n".join(drawn(VIEW, styles=True))
    acting = "\n".join(
        drawn(replace(VIEW, shoppers=(replace(SHOPPER, just_acted=True),)), styles=True)
    )
    new = "\x1b[1;32mAliens (1986)"
    assert "○ " in idle
    assert "● " in acting
    assert new in acting
    assert new not in idle
    assert "\x1b[1;32mReturn of the Jedi" not in acting


def test_a_command_too_long_for_the_screen_is_broken_where_a_shell_reads_on() -> None:
    event = "x" * 70
    view = replace(VIEW, commands=("penchant profile show 405", f"echo {event} | penchant produce"))
    assert f"echo {event} | penchant produce" in drawn(view, width=100)
    rows = drawn(view, width=80)
    at = rows.index(f"echo {event} |")
    assert rows[at + 1] == "penchant produce"


@pytest.mark.parametrize(
    ("share", "expected"),
    [(0.0, ""), (1.0, "████"), (0.5, "██"), (0.53, "██▏"), (1e-9, "▏"), (7.0, "████")],
)
def test_bars_are_drawn_to_an_eighth_of_a_cell(share: float, expected: str) -> None:
    assert live_view.bar(share, 4) == expected


def test_shares_are_never_rounded_up_to_all() -> None:
    assert live_view.figure_cells(VIEW.figures)["cache hits"] == "99.9 %"
    assert live_view.figure_cells(Figures(cache_hits=1.0))["cache hits"] == "100.0 %"


def test_quantiles_are_given_as_bounds() -> None:
    cells = live_view.figure_cells(VIEW.figures)
    assert (cells["fresh p50"], cells["fresh p99"]) == ("≤ 50 ms", "≤ 2.5 s")
    assert live_view.figure_cells(Figures(freshness_p99_s=float("inf")))["fresh p99"] == "longer"


@pytest.mark.parametrize(
    ("speed", "words"),
    [
        (86_400.0, "1 day per second"),
        (21_600.0, "6 hours per second"),
        (90.0, "1.5 minutes per second"),
        (1.0, "1 times as fast"),
        (0.0, "as fast as it goes"),
    ],
)
def test_a_speed_is_told_in_event_time_per_second(speed: float, words: str) -> None:
    assert live_view.speed_words(speed) == words


def test_plain_lines_say_what_the_screen_says() -> None:
    assert live_view.plain_status(VIEW) == (
        " 12.3 s  12 Oct 1997  7,794 events  577 events/s  lag 3  "
        "freshness p50 ≤ 50 ms, p99 ≤ 2.5 s  cache hits 99.9 %"
    )
    assert live_view.plain_shopper(SHOPPER).strip() == (
        "shopper 405: 131 events; last purchase Star Wars (1977); "
        "likes Action > Adventure 3.42, Drama 1.71, Comedy 0.01; "
        "near Return of the Jedi (1983) 0.83, Aliens (1986) 0.42"
    )


def test_the_summary_tells_sent_from_counted() -> None:
    words = live_view.summary(VIEW.figures, sent=7_800, wall_s=13.4, profiles=87)
    assert "7,800 events sent, 7,794 counted in 87 profiles, 13 s (577 events/s)" in words


ACCEPTED = Verdict(
    accepted=True, name="trained-1f", figure="recall@20", before=0.0291, after=0.1034,
    low=0.041, high=0.098, why="",
)  # fmt: skip
REJECTED = replace(ACCEPTED, accepted=False, after=0.03, low=-0.01, high=0.012, why="no better")
LEARNED = Learning((REJECTED, ACCEPTED), swaps=1, flip_s=0.0004, migrated=1_205)


def test_a_verdict_is_told_once_and_so_is_a_swap() -> None:
    news = live_view.plain_learning(Learning((REJECTED,)), LEARNED)
    assert [line.strip() for line in news] == [
        "learned: recall@20 on the newest events 0.029 -> 0.103 (+0.041 to +0.098): accepted; "
        "trained-1f goes live",
        "swapped: the worker swapped once (flip 0.4 ms), 1,205 profiles moved to the new space",
    ]
    assert live_view.plain_learning(LEARNED, LEARNED) == []


def test_a_rejection_says_why() -> None:
    (line,) = live_view.plain_learning(Learning(), Learning((REJECTED,)))
    assert line.endswith("rejected; no better")


def test_a_candidate_of_broken_numbers_is_told_of_to_the_last_line(tmp_path: Path) -> None:
    nan = Figure("recall@20", 0.03, math.nan, math.nan, math.nan, 1_234)
    decision = decide(Comparison(nan, non_finite=7))
    record_decision(tmp_path, record(decision, "", "base-1", "2026-03-01T12:00"))
    sample = Sample(0.0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0.0, 0, ())
    told = demo_learning.learning(tmp_path, sample, sample)
    (line,) = live_view.plain_learning(Learning(), told)
    assert "cannot be told of the candidate: rejected; 7 numbers are NaN or infinite" in line
    assert "nan" not in line.partition(";")[0]
    last = live_view.no_swap_words(told)
    assert last.startswith("no swap came: the gate rejected the only candidate: 7 numbers are NaN")


@pytest.mark.parametrize(
    ("verdicts", "why"),
    [
        ((), "no fine-tune had ended by then"),
        ((REJECTED,), "the gate rejected the only candidate: no better"),
        ((REJECTED, REJECTED), "the gate rejected the last of 2 candidates: no better"),
        ((REJECTED, ACCEPTED), "trained-1f is live, and the worker was still making it ready"),
    ],
)
def test_where_no_swap_came_it_says_why(verdicts: tuple[Verdict, ...], why: str) -> None:
    assert live_view.no_swap_words(Learning(verdicts)).startswith(f"no swap came: {why}")


def test_the_screen_has_a_line_for_the_learning_loop_and_still_fits() -> None:
    rows = drawn(replace(VIEW, learning=LEARNED), height=24)
    assert len(rows) <= 24
    assert any("0.029 -> 0.103" in row for row in rows)
    rows = drawn(replace(VIEW, learning=Learning()))
    assert any("the first fine-tune is still to come" in row for row in rows)
