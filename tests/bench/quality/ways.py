"""`python -m tests.bench.quality.ways --path EVENTS [WAY …]`: what ways of training are worth.

On an Amazon set the item before the last of each user is foreseen by the next interest alone, after
a training on what comes before it: with the text tower frozen, with LoRA, with its last layer or
the whole of it free, and with hard negatives. Prints a line for each way when it is done.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

import torch

from model.evaluate import Floats, Ints, UserBootstrap, metric
from model.leave_one_out import Split, rank_targets, split
from model.profile_signals import ProfileSignals
from model.ranker import SIGNALS
from model.tower_tuning import Method, TunableTower
from model.trainer import Base, Catalogue, Progress, TrainSettings, train
from stream.evaluation_data import Encoded, Recorded, encoded, loaded, windows_of
from stream.settings import Settings

_NEXT: Final = SIGNALS.index("next_interest")


@dataclass(frozen=True)
class Way:
    """How a training differs from the default."""

    tower: Method | None = None
    hard_negatives: int = 0


WAYS: Final = {
    "tower frozen": Way(),
    "4 hard negatives": Way(hard_negatives=4),
    "16 hard negatives": Way(hard_negatives=16),
    "tower: LoRA": Way("lora"),
    "tower: last layer": Way("last"),
    "tower: full": Way("full"),
}


class _NextInterest:
    """The first of a profile's signals, as a `Scorer` that is told nothing more."""

    def __init__(self, signals: ProfileSignals) -> None:
        self._signals = signals

    def scores(self, users: Ints, t_ms: Ints) -> Floats:
        signals, _, _ = self._signals.read(users, t_ms)
        return signals[..., _NEXT]

    def update(self, events: object) -> None:
        """Nothing: it was told before."""


def main() -> None:
    """Train in all ways, or in those named, and say what each foresees."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("ways", nargs="*", metavar="WAY", help=", ".join(WAYS))
    parser.add_argument("--path", type=Path, required=True)
    parser.add_argument("--epochs", type=int, default=14)
    given = parser.parse_args()
    settings = Settings()
    data = loaded("amazon", [given.path])
    texts = encoded(data.texts, settings.model, settings.stream.data_dir)
    torch.set_num_threads(settings.model.threads or 1)
    part = split(data.events, "validation")
    print("| | R@10 masked | N@10 masked | R@10 kept | N@10 kept | minutes |")
    print("|---|---|---|---|---|---|")
    for name in given.ways or WAYS:
        print(_line(name, data, texts, part, settings, given.epochs), flush=True)


def _line(
    name: str, data: Recorded, texts: Encoded, part: Split, settings: Settings, epochs: int
) -> str:
    way, began = WAYS[name], time.monotonic()
    shop, how = Catalogue(data.item_ids, texts.features), TrainSettings(epochs=epochs)
    tower = None
    if way.tower:
        model = settings.model
        tower = TunableTower(
            model.base,
            data.texts,
            way.tower,
            max_tokens=model.max_tokens,
            pooling=model.pooling,
            passage_prefix=model.passage_prefix,
        )
    with tempfile.TemporaryDirectory() as folder:
        candidate = train(
            windows_of(data, part.history),
            shop,
            Base(texts.projection),
            data.type_names,
            Path(folder),
            replace(how, newest_share=0.0, hard_negatives=way.hard_negatives),
            tower=tower,
            progress=_told(name),
        )
        took_s = time.monotonic() - began
        signals = ProfileSignals(
            len(data.user_ids), data.item_ids, texts.vectors, how.events, fading=False
        )
        signals.update(part.history)
        signals.swap(candidate, part.history)
    left = rank_targets(_NextInterest(signals), len(data.item_ids), part)
    bootstrap = UserBootstrap(left.user)
    figures = [
        bootstrap.mean(metric(which, places))
        for places in (left.masked, left.kept)
        for which in ("recall@10", "ndcg@10")
    ]
    shown = " | ".join(f"{f.value:.4f} ± {(f.high - f.low) / 2:.4f}" for f in figures)
    return f"| {name} | {shown} | {took_s / 60:.1f} |"


def _told(name: str) -> Progress:
    """Progress of the training, every half minute."""
    last = [time.monotonic()]

    def report(stage: str, done: int, total: int) -> None:
        if time.monotonic() - last[0] > 30:
            last[0] = time.monotonic()
            print(f"{name}: {stage} {done:,} of {total:,}", file=sys.stderr)

    return report


if __name__ == "__main__":
    main()
