"""`penchant eval`: how well shoppers' next items are foreseen on a recorded set."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Annotated

import typer

from .errors import UserError
from .settings import Settings
from .terminal import console, progress


def evaluate(
    dataset: Annotated[str, typer.Argument(help="movielens, online-retail, rees46 or amazon.")],
    path: Annotated[
        list[Path] | None, typer.Option(help="File of the data set; movielens needs none.")
    ] = None,
    text: Annotated[bool, typer.Option(help="With the baselines that need the encoder.")] = True,
    learn: Annotated[
        bool, typer.Option("--learn", help="With the whole profile, retrained every four weeks.")
    ] = False,
    plot: Annotated[
        Path | None, typer.Option(help="Draw Recall@20 over event time into this PNG.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="For programs.")] = False,
) -> None:
    """How well shoppers' next items are foreseen on a recorded set, with intervals."""
    from . import evaluation
    from .datasets import load
    from .evaluation_data import encoded, recorded
    from .evaluation_view import as_json as for_programs
    from .evaluation_view import plain, render

    settings = Settings()
    has_order_only = dataset == "amazon"  # its times are made up
    if has_order_only and (learn or plot):
        raise UserError(
            "--learn and --plot need a set with real times, and amazon has only an order"
        )
    if learn and not text:
        raise UserError("--learn needs the encoder: leave --no-text out")
    name = path[0].stem.removesuffix("_events") if path and has_order_only else dataset
    data = recorded(load(dataset, path), name)
    makers = (evaluation.counters_of_order if has_order_only else evaluation.counters)(data)
    if text:
        with progress("encoding the catalogue") as report:
            texts = encoded(data.texts, settings.model, settings.stream.data_dir, report)
        vectors = texts.vectors
        if has_order_only:
            makers |= evaluation.steps_of_text(data, vectors)
            with progress("choosing weights") as report:
                makers |= dict([evaluation.with_text(data, vectors, report)])
        else:
            makers |= evaluation.untrained_text(data, vectors)
    folder = settings.stream.data_dir / "evaluation" / "learned"
    shutil.rmtree(folder, ignore_errors=True)
    whole = evaluation.whole_profile(data, texts, folder) if learn else None
    if whole is not None:
        makers["whole profile, learning"] = lambda: whole
    with progress("ranking") as report:
        run = evaluation.by_last_item if has_order_only else evaluation.in_event_time
        found = run(data, makers, progress=report)
    if whole is not None:
        found = evaluation.with_learning(data, found, whole)
    if plot is not None:
        from .evaluation_plot import draw

        draw(found, plot)
    if as_json:
        print(json.dumps(for_programs(found), ensure_ascii=False))
    elif console.is_terminal:
        console.print(render(found))
    else:
        print(plain(found))
