"""Everything that a set is judged beside, in one run: see `measured`."""

from __future__ import annotations

import sys
import tempfile
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Final

import torch

from model.baselines import DAY_MS
from stream.evaluation import Make, Progress, Report, evaluate
from stream.evaluation_data import Recorded, encoded, loaded
from stream.settings import Settings

from .neural import GRU4Rec, Loss, Neural, SASRec, Schedule

_EVERY_MS: Final = 28 * DAY_MS
_FIRST_EPOCHS: Final = 10
_EPOCHS: Final = 2


def measured(dataset: str, path: Sequence[Path] | None) -> Report:
    """`penchant eval DATASET --learn`, and SASRec and GRU4Rec on the same events."""
    data = loaded(dataset, path)
    settings = Settings()
    texts = encoded(data.texts, settings.model, settings.stream.data_dir)
    torch.set_num_threads(settings.model.threads or 1)
    with tempfile.TemporaryDirectory() as learned:
        return evaluate(data, texts, _networks(data), Path(learned), progress=_told)


def _networks(data: Recorded) -> dict[str, Make]:
    """The neural yardsticks, retrained every four weeks of event time."""
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


def _told(what: str) -> Progress:
    began = time.monotonic()
    last = [began]

    def report(done: int, total: int) -> None:
        if time.monotonic() - last[0] > 30 or done == total:
            last[0] = time.monotonic()
            spent_s = last[0] - began
            print(f"{what}: {done:,} of {total:,} after {spent_s:,.0f} s", file=sys.stderr)

    return report
