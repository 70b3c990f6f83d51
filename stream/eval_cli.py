"""`penchant eval`: how well shoppers' next items are foreseen on a recorded set."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from .errors import UserError
from .feeding_cli import Columns, EventType, UtcOffset
from .settings import Settings
from .terminal import console, progresses

if TYPE_CHECKING:
    from .evaluation import Make
    from .evaluation_data import Recorded


def evaluate(
    dataset: Annotated[
        str, typer.Argument(help="movielens, online-retail, rees46, amazon, csv or parquet.")
    ],
    path: Annotated[
        list[Path] | None, typer.Option(help="File of the data set; movielens needs none.")
    ] = None,
    columns: Columns = "",
    event_type: EventType = "",
    utc_offset: UtcOffset = "",
    text: Annotated[bool, typer.Option(help="With the baselines that need the encoder.")] = True,
    learn: Annotated[
        bool, typer.Option("--learn", help="With the whole profile, as it learns.")
    ] = False,
    networks: Annotated[
        bool, typer.Option("--networks", help="With SASRec and GRU4Rec, trained as time goes by.")
    ] = False,
    plot: Annotated[
        Path | None, typer.Option(help="Draw Recall@20 over event time into this PNG.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="For programs.")] = False,
) -> None:
    """How well shoppers' next items are foreseen on a recorded set, with intervals."""
    from .datasets import parse_mapping
    from .evaluation import evaluate as evaluated
    from .evaluation_data import encoded, loaded
    from .evaluation_view import as_json as for_programs
    from .evaluation_view import plain, render

    if learn and not text:
        raise UserError("--learn needs the encoder: leave --no-text out")
    settings = Settings()
    if plot is not None:
        from .evaluation_plot import make_sure

        make_sure(plot)
    mapping = parse_mapping(columns) if columns else None
    data = loaded(dataset, path, mapping, event_type=event_type, utc_offset=utc_offset)
    if plot is not None and data.only_order:
        raise UserError(f"--plot needs a set with real times, and {dataset} has only an order")
    folder = settings.stream.data_dir / "evaluation" / "learned"
    shutil.rmtree(folder, ignore_errors=True)
    with progresses() as report:
        texts = None
        if text:
            told = report("encoding the catalogue")
            texts = encoded(data.texts, settings.model, settings.stream.data_dir, told)
        more = _networks(data, settings) if networks else {}
        found = evaluated(data, texts, more, folder if learn else None, progress=report)
    if as_json:
        print(json.dumps(for_programs(found), ensure_ascii=False))
    elif console.is_terminal:
        console.print(render(found))
    else:
        print(plain(found))
    if plot is not None:
        from .evaluation_plot import draw

        draw(found, plot)


def _networks(data: Recorded, settings: Settings) -> dict[str, Make]:
    import torch

    from model import sequence_baselines

    # Their batches are small: more threads would wait for each other.
    torch.set_num_threads(settings.model.threads or 1)
    return sequence_baselines.networks(len(data.item_ids), only_order=data.only_order)
