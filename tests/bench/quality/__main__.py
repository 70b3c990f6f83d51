"""`python -m tests.bench.quality DATASET [--path FILE]`: `penchant eval` with SASRec and GRU4Rec.

Prints and never asserts. Event-time sets retrain the networks every four weeks of event time.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch

from model.baselines import DAY_MS
from stream.datasets import load
from stream.evaluation import (
    Make,
    by_last_item,
    counters,
    counters_of_order,
    in_event_time,
    steps_of_text,
    untrained_text,
    with_text,
)
from stream.evaluation_data import encoded, recorded
from stream.evaluation_view import as_json, plain
from stream.settings import Settings

from .neural import GRU4Rec, Loss, Neural, SASRec, Schedule

_EVERY_MS = 28 * DAY_MS


def networks(n_items: int, schedule: Schedule, dropout: float) -> dict[str, Make]:
    """The neural yardsticks."""

    def sasrec(loss: Loss) -> Neural:
        return Neural(partial(SASRec, dropout=dropout), n_items, schedule, loss=loss)

    return {
        "GRU4Rec": lambda: Neural(partial(GRU4Rec, dropout=dropout), n_items, schedule),
        "SASRec (BCE, as published)": lambda: sasrec("bce"),
        "SASRec (sampled softmax)": lambda: sasrec("softmax"),
    }


def main() -> None:
    """Run one data set and print its tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("dataset")
    parser.add_argument("--path", type=Path, action="append")
    parser.add_argument("--epochs", type=int, default=10, help="of the first training")
    parser.add_argument("--later-epochs", type=int, default=2, help="of every later training")
    parser.add_argument("--only", nargs="*", help="names of scorers; all by default")
    parser.add_argument("--json", action="store_true")
    given = parser.parse_args()

    order_only = given.dataset == "amazon"
    name = given.path[0].stem.removesuffix("_events") if order_only else given.dataset
    data = recorded(load(given.dataset, given.path), name)
    settings = Settings()
    torch.set_num_threads(settings.model.threads or 1)
    vectors = encoded(data.texts, settings.model, settings.stream.data_dir).vectors
    # By the last item everything is told at once, and that is when they are trained.
    schedule = Schedule(0.0 if order_only else _EVERY_MS, given.epochs, given.later_epochs)
    if order_only:
        makers = counters_of_order(data) | steps_of_text(data, vectors)
    else:
        makers = counters(data) | untrained_text(data, vectors)
    if order_only and not given.only:  # its name tells the weight that was chosen
        makers |= dict([with_text(data, vectors)])
    makers |= networks(len(data.item_ids), schedule, dropout=0.5 if order_only else 0.2)
    if given.only:
        makers = {name: make for name, make in makers.items() if name in given.only}
    began = time.monotonic()
    run = by_last_item if order_only else in_event_time
    report = run(data, makers, progress=_told(began))
    print(json.dumps(as_json(report)) if given.json else plain(report))


def _told(began: float) -> Callable[[int, int], None]:
    last = [began]

    def report(done: int, total: int) -> None:
        if time.monotonic() - last[0] > 30 or done == total:
            last[0] = time.monotonic()
            print(f"{done:,} of {total:,} after {last[0] - began:,.0f} s", file=sys.stderr)

    return report


if __name__ == "__main__":
    main()
