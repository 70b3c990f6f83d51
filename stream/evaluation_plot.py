"""A report as a picture: Recall@20 over event time, a line for each scorer, swaps marked."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any, Final

import numpy as np

from .errors import UserError
from .evaluation import ENCODER_FROZEN, FROZEN, LEARNING, Report

# Of the baselines only those that are strongest, or stand for a kind.
_LINES: Final = (
    LEARNING, ENCODER_FROZEN, FROZEN, "own + last basket", "item-kNN", "own frequency", "popular",
    "text: profile, three time scales", "SASRec (sampled softmax)", "GRU4Rec",
)  # fmt: skip


def make_sure(file: Path) -> None:
    """Raises UserError where `draw` would: an evaluation takes hours, and the plot comes last."""
    if find_spec("matplotlib") is None:
        raise UserError("plots need matplotlib: install the extra `learn`")
    there = file.exists()
    try:
        file.open("ab").close()
    except OSError as error:
        raise UserError(f"cannot write {file}: {error.strerror}") from error
    if not there:
        file.unlink()


def draw(report: Report, file: Path) -> None:
    """Write a PNG. Raises UserError without matplotlib, or where `file` cannot be written."""
    make_sure(file)
    from matplotlib import dates
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    timeline = report.timeline
    if timeline is None:
        raise UserError(f"{report.dataset} was not ranked in event time: there is nothing to draw")
    figure = Figure(figsize=(10, 5), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    at = np.array(timeline.starts_ms, dtype="datetime64[ms]")
    for name in _LINES:
        if name in timeline.recall:
            wide = 2.5 if name == _LINES[0] else 1.2
            axes.plot(at, timeline.recall[name], label=name, linewidth=wide)
    for label, times, colour in (
        ("swap", timeline.swaps_ms, "0.6"),
        ("rejected", timeline.rejections_ms, "tab:red"),
    ):
        for number, t_ms in enumerate(t for t in times if t >= timeline.starts_ms[0]):
            when: Any = np.datetime64(t_ms, "ms")
            named = None if number else label
            axes.axvline(when, color=colour, linewidth=0.8, linestyle=":", label=named)
    axes.set_title(f"{report.dataset}: Recall@20 of what shoppers did next")
    axes.set_ylim(bottom=0)
    locator = axes.xaxis.get_major_locator()
    axes.xaxis.set_major_formatter(dates.ConciseDateFormatter(locator))  # type: ignore[no-untyped-call]
    axes.grid(alpha=0.25)
    figure.legend(loc="outside right upper", fontsize=8)  # on the lines it would hide some
    try:
        figure.savefig(file, format="png", metadata={"Software": "penchant eval"})
    except OSError as error:
        raise UserError(f"cannot write {file}: {error.strerror}") from error
