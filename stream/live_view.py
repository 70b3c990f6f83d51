"""What the demo shows: a state in, something rich can draw or a plain line out. PURE.

It knows how big the screen is because it is told. It does not know where figures and profiles
come from, what time it is, or how often it is drawn. What is not known yet shows as a dash.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Final

from rich.console import Group, RenderableType
from rich.padding import Padding
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

UNKNOWN: Final = "–"

_HEADER_ROWS: Final = 5  # two of words, two of figures, the headings of the columns
_FOOTER_ROWS: Final = 4
_FRAME_ROWS: Final = 2
_FEWEST_ROWS: Final = 2
_MOST_ROWS: Final = 8
MOST_SHOPPERS: Final = 4
# A fourth shopper only where each of the four still has this many rows.
_ROWS_FOR_ANOTHER: Final = 4
_NARROW: Final = 90  # columns
_BAR_CELLS: Final = 6
_WEIGHT_CELLS: Final = 5
_COSINE_CELLS: Final = 5
_EIGHTHS: Final = " ▏▎▍▌▋▊▉"
_TYPE_CELLS: Final = 8
_PLAIN_ITEMS: Final = 3

_SPEED_UNITS: Final = ((86_400.0, "day"), (3_600.0, "hour"), (60.0, "minute"))


@dataclass(frozen=True)
class Figures:
    """What the worker says of itself; None where nothing is known yet."""

    events: int | None = None
    """Counted in profiles since the replay began."""
    events_per_s: float | None = None
    lag_records: int | None = None
    freshness_p50_s: float | None = None
    """The upper bound of the histogram's bucket that holds the quantile."""
    freshness_p99_s: float | None = None
    cache_hits: float | None = None
    """Share of item vectors that were in memory when an event needed them, 0 to 1."""
    saves_per_s: float | None = None


@dataclass(frozen=True)
class Act:
    """One event of a shopper's window."""

    type: str
    title: str
    weight: float


@dataclass(frozen=True)
class Near:
    """An item near to a shopper's interest."""

    title: str
    cosine: float
    is_new: bool = False
    """It was not among the nearest when the profile was read before."""


@dataclass(frozen=True)
class Shopper:
    """A profile as it is shown."""

    user_id: str
    events: int
    updated_ms: int
    acts: tuple[Act, ...]
    """Latest first."""
    categories: tuple[tuple[str, float], ...]
    """Name and decayed weight, heaviest first, all above 0."""
    nearest: tuple[Near, ...]
    just_acted: bool = False


@dataclass(frozen=True)
class Verdict:
    """What the gate said of a candidate."""

    accepted: bool
    name: str
    """Of the release; of the verdict where there is none."""
    figure: str
    before: float
    after: float
    """The figure of the live release and of the candidate, on the newest events; NaN for one that
    cannot rank at all."""
    low: float
    high: float
    """The interval of their difference."""
    why: str
    """The reasons of a rejection."""


@dataclass(frozen=True)
class Learning:
    """The learning loop so far."""

    verdicts: tuple[Verdict, ...] = ()
    """Oldest first."""
    swaps: int = 0
    flip_s: float = 0.0
    """What all the swaps took, between two micro-batches."""
    migrated: int = 0
    """Profiles moved to a new embedding space."""


@dataclass(frozen=True)
class View:
    """All that is on the screen at one moment."""

    dataset: str
    speed: float
    """Event seconds per second; 0: as fast as it goes."""
    elapsed_s: float = 0.0
    at_ms: int | None = None
    """Event time of the latest event."""
    share_sent: float = 0.0
    """Of the data set's events, 0 to 1."""
    figures: Figures = Figures()
    shoppers: tuple[Shopper, ...] = ()
    commands: tuple[str, ...] = ()
    """To type in another terminal."""
    learning: Learning | None = None
    """None where nothing is learned."""


# --- the screen ----------------------------------------------------------------------------


def render(view: View, width: int, height: int) -> RenderableType:
    """The whole screen of `width` columns and `height` rows."""
    count, rows = fitting(height - (view.learning is not None))
    panels = [_shopper(shopper, rows, width) for shopper in view.shoppers[:count]]
    return Group(
        _header(view),
        _figures(view.figures),
        *([_learned(view.learning)] if view.learning else []),
        _headings(width) if panels else Text("no shopper has acted yet", style="dim"),
        *panels,
        _footer(view.commands, width),
    )


def fitting(height: int) -> tuple[int, int]:
    """How many shoppers a screen of `height` rows has room for, and rows in each."""
    room = height - _HEADER_ROWS - _FOOTER_ROWS
    for count in range(MOST_SHOPPERS, 1, -1):
        rows = room // count - _FRAME_ROWS
        if rows >= (_ROWS_FOR_ANOTHER if count == MOST_SHOPPERS else _FEWEST_ROWS):
            return count, min(rows, _MOST_ROWS)
    return 1, max(1, room - _FRAME_ROWS)


def _header(view: View) -> Table:
    top = Table.grid(expand=True)
    top.add_column(no_wrap=True, overflow="ellipsis", ratio=1)
    top.add_column(justify="right", no_wrap=True)
    times = f" ({view.speed:,.0f}×)" if view.speed else ""
    top.add_row(
        Text.assemble(("Penchant", "bold magenta"), ("  profiles of real people, live", "dim")),
        Text(speed_words(view.speed) + times),
    )
    top.add_row(
        Text(view.dataset, style="dim"),
        Text.assemble(
            (day(view.at_ms), "bold"), (f"  {100 * view.share_sent:.1f} % of the set", "dim")
        ),
    )
    return top


def _figures(figures: Figures) -> Table:
    table = Table.grid(expand=True)
    cells = figure_cells(figures)
    for _ in cells:
        table.add_column(justify="right", no_wrap=True, ratio=1)
    table.add_row(*(Text(label, style="dim") for label in cells))
    table.add_row(*(Text(value, style="bold cyan") for value in cells.values()))
    return table


def _learned(learning: Learning) -> Text:
    words = learning_words(learning)
    style = "bold green" if learning.swaps else "dim"
    return Text(words, style=style, no_wrap=True, overflow="ellipsis")


def figure_cells(figures: Figures) -> dict[str, str]:
    """Label -> value, as shown."""
    return {
        "events/s": _number(figures.events_per_s),
        "events": _number(figures.events),
        "lag": _number(figures.lag_records),
        "fresh p50": _at_most(figures.freshness_p50_s),
        "fresh p99": _at_most(figures.freshness_p99_s),
        "cache hits": _percent(figures.cache_hits),
        "saves/s": _number(figures.saves_per_s),
    }


def _headings(width: int) -> Padding:
    """Above the columns of all panels, so that none needs a row for them."""
    columns = _columns(width)
    words = ("last events", "top categories", "nearest, not seen lately")
    columns.add_row(*(Text(word, style="dim", no_wrap=True) for word in words))
    return Padding(columns, (0, 2))


def _shopper(shopper: Shopper, rows: int, width: int) -> Panel:
    columns = _columns(width)
    columns.add_row(
        _acts(shopper.acts[:rows]),
        _categories(shopper.categories[:rows], with_weights=width >= _NARROW),
        _nearest(shopper.nearest[:rows], with_news=shopper.just_acted),
    )
    mark, style = ("● ", "bold green") if shopper.just_acted else ("○ ", "dim")
    title = Text.assemble(
        (mark, style),
        (f"shopper {shopper.user_id}", "bold"),
        f"  {shopper.events:,} events, last {moment(shopper.updated_ms)}",
    )
    return Panel(
        columns,
        title=title,
        title_align="left",
        border_style="green" if shopper.just_acted else "bright_black",
        height=rows + _FRAME_ROWS,
    )


def _columns(width: int) -> Table:
    """For what a shopper did, likes and is near to; numbers beside the bars need some room."""
    columns = Table.grid(expand=True, padding=(0, 2, 0, 0))
    for ratio in (1, 1, 1) if width < _NARROW else (10, 11, 10):
        columns.add_column(ratio=ratio, no_wrap=True)
    return columns


def _acts(acts: Sequence[Act]) -> Table:
    table = _lines(("type", _TYPE_CELLS), ("title", None))
    for act in acts:
        table.add_row(Text(act.type, style=_style_of(act)), Text(act.title))
    return table


def _categories(categories: Sequence[tuple[str, float]], *, with_weights: bool) -> Table:
    columns: list[tuple[str, int | None]] = [("name", None), ("bar", _BAR_CELLS)]
    table = _lines(*columns, *([("weight", _WEIGHT_CELLS)] if with_weights else []))
    heaviest = max((weight for _, weight in categories), default=0.0)
    for name, weight in categories:
        drawn = Text(bar(weight / heaviest, _BAR_CELLS), style="cyan")
        number = Text(f"{weight:{_WEIGHT_CELLS}.1f}", style="dim")
        table.add_row(Text(name), drawn, *([number] if with_weights else []))
    return table


def _nearest(nearest: Sequence[Near], *, with_news: bool) -> Table:
    table = _lines(("cosine", _COSINE_CELLS), ("title", None))
    for near in nearest:
        style = "bold green" if near.is_new and with_news else ""
        table.add_row(Text(f"{near.cosine:.2f}", style="dim"), Text(near.title, style=style))
    return table


def _lines(*columns: tuple[str, int | None]) -> Table:
    table = Table.grid(expand=True, padding=(0, 1, 0, 0))
    for name, cells in columns:
        table.add_column(
            name,
            width=cells,
            ratio=None if cells else 1,
            no_wrap=True,
            overflow="crop" if cells else "ellipsis",
        )
    return table


def _footer(commands: Sequence[str], width: int) -> RenderableType:
    """At most two commands; the second is broken at its pipe where it does not fit, which a
    shell reads as one command all the same."""
    if not commands:
        return Text()
    lines = [Text("in another terminal", style="dim").append("   (Ctrl-C ends the demo)")]
    for command in commands:
        head, pipe, tail = command.partition(" | ")
        parts = [f"{head} |", tail] if pipe and len(command) > width else [command]
        lines += [Text(part, no_wrap=True, overflow="ignore") for part in parts]
    return Group(*lines)


def _style_of(act: Act) -> str:
    if act.weight < 0:
        return "red"
    return "green" if act.type == "purchase" else "yellow"


def bar(share: float, cells: int) -> str:
    """A bar of `share` (0 to 1) of `cells`, to an eighth of a cell; never empty above 0."""
    eighths = round(min(max(share, 0.0), 1.0) * cells * 8)
    if share > 0:
        eighths = max(eighths, 1)
    return "█" * (eighths // 8) + (_EIGHTHS[eighths % 8] if eighths % 8 else "")


# --- plain lines ---------------------------------------------------------------------------


def plain_status(view: View) -> str:
    """One line: when, how many, how fast, how fresh."""
    f = view.figures
    return (
        f"{view.elapsed_s:5.1f} s  {day(view.at_ms)}  {_number(f.events)} events  "
        f"{_number(f.events_per_s)} events/s  lag {_number(f.lag_records)}  "
        f"freshness p50 {_at_most(f.freshness_p50_s)}, p99 {_at_most(f.freshness_p99_s)}  "
        f"cache hits {_percent(f.cache_hits)}"
    )


def learning_words(learning: Learning) -> str:
    """One line: the last verdict, and whether the worker has taken the new release."""
    if not learning.verdicts:
        return "learning: the first fine-tune is still to come"
    words = f"learning: {verdict_words(learning.verdicts[-1])}"
    return f"{words}; {swap_words(learning)}" if learning.swaps else words


def verdict_words(verdict: Verdict) -> str:
    """Before and after, and what the gate made of it."""
    said = "accepted" if verdict.accepted else "rejected"
    if not (math.isfinite(verdict.before) and math.isfinite(verdict.after)):
        return f"{verdict.figure} on the newest events cannot be told of the candidate: {said}"
    return (
        f"{verdict.figure} on the newest events {verdict.before:.3f} -> {verdict.after:.3f} "
        f"({verdict.low:+.3f} to {verdict.high:+.3f}): {said}"
    )


def swap_words(learning: Learning) -> str:
    """How often the worker went over to another release, and how long events waited."""
    times = "once" if learning.swaps == 1 else f"{learning.swaps} times"
    return (
        f"the worker swapped {times} (flip {1000 * learning.flip_s / learning.swaps:.1f} ms), "
        f"{learning.migrated:,} profiles moved to the new space"
    )


def no_swap_words(learning: Learning) -> str:
    """One line: why the worker serves what it began with."""
    if not learning.verdicts:
        return "no swap came: no fine-tune had ended by then; the trainer's log says how far it was"
    last, count = learning.verdicts[-1], len(learning.verdicts)
    if last.accepted:
        return f"no swap came: {last.name} is live, and the worker was still making it ready"
    turned_down = "the only candidate" if count == 1 else f"the last of {count} candidates"
    return f"no swap came: the gate rejected {turned_down}: {last.why}"


def plain_learning(before: Learning, now: Learning) -> list[str]:
    """A line for each verdict and swap since `before`."""
    lines = []
    for verdict in now.verdicts[len(before.verdicts) :]:
        about = f"{verdict.name} goes live" if verdict.accepted else verdict.why
        lines.append(f"         learned: {verdict_words(verdict)}; {about}")
    if now.swaps > before.swaps:
        lines.append(f"         swapped: {swap_words(now)}")
    return lines


def plain_shopper(shopper: Shopper) -> str:
    """One line: what this shopper did, likes, and is near to."""
    likes = ", ".join(f"{name} {weight:.2f}" for name, weight in shopper.categories[:_PLAIN_ITEMS])
    near = ", ".join(f"{n.title} {n.cosine:.2f}" for n in shopper.nearest[:_PLAIN_ITEMS])
    last = f"{shopper.acts[0].type} {shopper.acts[0].title}" if shopper.acts else UNKNOWN
    return (
        f"         shopper {shopper.user_id}: {shopper.events:,} events; last {last}; "
        f"likes {likes or UNKNOWN}; near {near or UNKNOWN}"
    )


def summary(figures: Figures, *, sent: int, wall_s: float, profiles: int | None) -> str:
    """What the whole run came to; `figures` are of the whole run."""
    return (
        f"{sent:,} events sent, {_number(figures.events)} counted in {_number(profiles)} profiles, "
        f"{wall_s:.0f} s ({_number(figures.events_per_s)} events/s); "
        f"freshness p50 {_at_most(figures.freshness_p50_s)}, "
        f"p99 {_at_most(figures.freshness_p99_s)}; "
        f"item vectors found in memory {_percent(figures.cache_hits)}"
    )


# --- words ---------------------------------------------------------------------------------


def speed_words(speed: float) -> str:
    """86,400 -> `1 day per second`."""
    if not speed:
        return "as fast as it goes"
    for unit_s, name in _SPEED_UNITS:
        if speed >= unit_s:
            count = speed / unit_s
            return f"{count:.3g} {name}{'' if count == 1 else 's'} per second"
    return f"{speed:g} times as fast"


def day(ms: int | None) -> str:
    """`22 Sep 1997`, in UTC."""
    return UNKNOWN if ms is None else datetime.fromtimestamp(ms / 1000, UTC).strftime("%d %b %Y")


def moment(ms: int) -> str:
    """`22 Sep 1997 14:03`, in UTC."""
    return datetime.fromtimestamp(ms / 1000, UTC).strftime("%d %b %Y %H:%M")


def _number(value: float | None) -> str:
    return UNKNOWN if value is None else f"{value:,.0f}"


def _percent(share: float | None) -> str:
    # Cut, not rounded: 100 % is said only of all.
    return UNKNOWN if share is None else f"{math.floor(1000 * share) / 10:.1f} %"


def _at_most(seconds: float | None) -> str:
    """Histograms know only between which bounds a quantile lies."""
    if seconds is None:
        return UNKNOWN
    if math.isinf(seconds):
        return "longer"
    return f"≤ {seconds:g} s" if seconds >= 1 else f"≤ {1000 * seconds:g} ms"
