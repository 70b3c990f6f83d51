"""`python -m tests.bench.quality DATASET [--path FILE] [--plot PNG] [--json JSON]`: everything.

`penchant eval --learn` with SASRec and GRU4Rec beside it, on the same events. Prints and never
asserts. Event-time sets retrain the networks every four weeks of event time.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

import torch

from model.baselines import DAY_MS
from stream.evaluation import Make, Progress, evaluate
from stream.evaluation_data import Recorded, encoded, loaded
from stream.evaluation_plot import draw
from stream.evaluation_view import as_json, plain
from stream.settings import Settings

from .neural import GRU4Rec, Loss, Neural, SASRec, Schedule

_EVERY_MS = 28 * DAY_MS
_FIRST_EPOCHS, _EPOCHS = 10, 2


def networks(data: Recorded) -> dict[str, Make]:
    """The neural yardsticks."""
    n_items = len(data.item_ids)
    # By the last item everything is told at once, and that is when they are trained.
    schedule = Schedule(0.0 if data.only_order else _EVERY_MS, _FIRST_EPOCHS, _EPOCHS)
    dropout = 0.5 if data.only_order else 0.2

    def sasrec(loss: Loss) -> Neural:
        return Neural(partial(SASRec, dropout=dropout), n_items, schedule, loss=loss)

    return {
        "GRU4Rec": lambda: Neural(partial(GRU4Rec, dropout=dropout), n_items, schedule),
        "SASRec (BCE, as published)": lambda: sasrec("bce"),
        "SASRec (sampled softmax)": lambda: sasrec("softmax"),
    }


def main() -> None:
    """Run one data set, print its tables, and keep them where asked to."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("dataset")
    parser.add_argument("--path", type=Path, action="append")
    parser.add_argument("--plot", type=Path)
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()

    data = loaded(given.dataset, given.path)
    settings = Settings()
    texts = encoded(data.texts, settings.model, settings.stream.data_dir)
    torch.set_num_threads(settings.model.threads or 1)
    with tempfile.TemporaryDirectory() as learned:
        report = evaluate(data, texts, networks(data), Path(learned), progress=_told)
    print(plain(report))
    if given.json:
        given.json.write_text(json.dumps(as_json(report)), encoding="utf-8")
    if given.plot:
        draw(report, given.plot)


def _told(what: str) -> Progress:
    began = time.monotonic()
    last = [began]

    def report(done: int, total: int) -> None:
        if time.monotonic() - last[0] > 30 or done == total:
            last[0] = time.monotonic()
            spent_s = last[0] - began
            print(f"{what}: {done:,} of {total:,} after {spent_s:,.0f} s", file=sys.stderr)

    return report


if __name__ == "__main__":
    main()
