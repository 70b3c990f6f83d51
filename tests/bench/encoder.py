"""The text encoder beside sentence-transformers and infinity-emb: one run, weights, texts.

    python -m tests.bench.encoder [--path TEXTS] [--repeats N] [--write]

Texts are those of the demo's catalogue (MovieLens-100K: titles and genres), or the lines of a
file. Each encoder has a process of its own that keeps it loaded; they take turns at encoding all
texts, so that a noisy minute spares none. Prints and never asserts; `--write` puts the table into
docs/performance.md.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Final

import numpy as np
import torch

from model.encoder import load_tower, tower_folder
from stream import datasets

from . import report, rivals, workloads

Floats = np.ndarray[Any, np.dtype[np.float32]]

_PACKAGES: Final = {"sentence": "sentence_transformers", "infinity": "infinity"}
_REFERENCE: Final = "sentence-transformers"
_OURS: Final = "Penchant"
_TOP: Final = 10
_MAX_TOKENS: Final = 128
_PRODUCT: Final = 2048  # rows and columns of the matrices whose product tells what the device can


@dataclass(frozen=True)
class Encoder:
    """One encoder's process, waiting for its turn."""

    name: str
    process: subprocess.Popen[str]
    vectors: Path

    def answer(self) -> str:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(f"{self.name} ended with {self.process.wait()}; see above")
        return line.strip()

    def seconds(self) -> float:
        """Of encoding all texts once."""
        asking: IO[str] | None = self.process.stdin
        assert asking is not None
        print("again", file=asking, flush=True)
        return float(self.answer())


@dataclass(frozen=True)
class Reading:
    name: str
    seconds: list[float]  # one per repeat
    vectors: Floats  # (n, W)


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    arguments.add_argument("--path", type=Path, help="a file with a text per line")
    arguments.add_argument("--repeats", type=int, default=5)
    arguments.add_argument("--only", default="", help="encoders whose name holds this")
    arguments.add_argument("--write", action="store_true", help="into docs/performance.md")
    options = arguments.parse_args()
    texts = _texts(options.path)
    # Imported here: the module loads transformers, which each process has in its own version.
    from .rivals.encoders import ENCODERS

    names = [name for name in ENCODERS if options.only in name]
    readings = _read(names, texts, options.repeats)
    command = "python -m tests.bench.encoder" + (" --path TEXTS" if options.path else "")
    how = f"; medians of {options.repeats} repeats"
    text = f"{report.where(command, how)}\n\n{_rendered(readings, texts)}"
    print(text)
    if options.write:
        report.write(report.ROOT / "docs/performance.md", text, "encoder")


def _texts(path: Path | None) -> list[str]:
    """Without repeats, which only Penchant's engine would notice."""
    if path is None:
        texts = list(workloads.texts(datasets.load("movielens")).values())
    else:
        texts = path.read_text(encoding="utf-8").splitlines()
    return list(dict.fromkeys(text for text in texts if text.strip()))


def _read(names: Sequence[str], texts: list[str], repeats: int) -> list[Reading]:
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        (folder / "texts.json").write_text(json.dumps(texts), encoding="utf-8")
        encoders = []
        for name in names:
            encoders.append(_started(name, folder, stack))
            # One after the other: loading would slow down who encodes the first time.
            encoders[-1].answer()
        seconds: dict[str, list[float]] = {name: [] for name in names}
        for repeat in range(repeats):
            for encoder in encoders:
                seconds[encoder.name].append(encoder.seconds())
                say = f"{len(texts) / seconds[encoder.name][-1]:,.0f} texts/s"
                print(f"{repeat + 1}/{repeats} {encoder.name}: {say}", file=sys.stderr, flush=True)
        return [Reading(e.name, seconds[e.name], np.load(e.vectors)) for e in encoders]


def _started(name: str, folder: Path, stack: contextlib.ExitStack) -> Encoder:
    packages = next((p for start, p in _PACKAGES.items() if name.startswith(start)), "")
    vectors = folder / f"{name}.npy"
    process = subprocess.Popen(
        [sys.executable, "-W", "ignore", "-m", "tests.bench.rivals.encoders", name,
         str(folder / "texts.json"), str(vectors)],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=report.ROOT,
        env={**os.environ, **rivals.environment(packages), "HF_HUB_OFFLINE": "1",
             "DO_NOT_TRACK": "1"},
    )  # fmt: skip
    stack.callback(process.wait)
    stack.callback(process.kill)
    return Encoder(name, process, vectors)


# --- what is told --------------------------------------------------------------------------


def _rendered(readings: Sequence[Reading], texts: list[str]) -> str:
    tower, tokenizer = load_tower(tower_folder("bundled"), torch.float32, _MAX_TOKENS)
    lengths = np.array([len(ids) for ids in tokenizer(texts)])
    linear = (m for m in _encoding_layers(tower) if isinstance(m, torch.nn.Linear))
    operations = 2 * sum(m.weight.numel() for m in linear) * int(lengths.sum())  # in one pass
    by_name = {reading.name: reading for reading in readings}
    products = _products()
    rows = []
    for reading in readings:
        half = "bfloat16" in reading.name
        rates = sorted(len(texts) / s for s in reading.seconds)
        median = statistics.median(rates)
        share = operations * median / len(texts) / products["bfloat16" if half else "float32"]
        rows.append(
            [reading.name, f"{median:,.0f} ({rates[0]:,.0f} to {rates[-1]:,.0f})",
             f"{median * lengths.mean():,.0f}", f"{share:.0%}", *_agreement(reading, by_name)]
        )  # fmt: skip
    head = ["", "texts/s (lowest to highest)", "tokens/s", "of the product's rate",
            "cosine, least and mean", f"overlap@{_TOP}"]  # fmt: skip
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "the CPU"
    how = ", ".join(f"{kind} {rate / 1e9:,.0f}" for kind, rate in products.items())
    return "\n\n".join(
        [
            f"{len(texts):,} texts of {lengths.min()} to {lengths.max()} tokens, "
            f"{lengths.mean():.1f} on average, on {device} with {torch.get_num_threads()} threads; "
            f"a product of two matrices of {_PRODUCT} x {_PRODUCT} reaches, in GFLOP/s: {how}. "
            f"Cosines and the {_TOP} nearest texts against {_REFERENCE}.",
            report.table(head, rows),
            *_ratios(by_name),
        ]
    )


def _encoding_layers(tower: torch.nn.Module) -> list[torch.nn.Module]:
    """Without the pooler, which nobody reads."""
    return [module for name, module in tower.named_modules() if not name.startswith("pooler")]


def _agreement(reading: Reading, by_name: Mapping[str, Reading]) -> list[str]:
    reference = by_name.get(_REFERENCE)
    if reference is None:
        return ["", ""]
    cosine = (reading.vectors * reference.vectors).sum(axis=1)
    near, exact = (_nearest(each.vectors) for each in (reading, reference))
    common = [len(np.intersect1d(a, b)) / _TOP for a, b in zip(near, exact, strict=True)]
    return [f"{cosine.min():.6f}, {cosine.mean():.6f}", f"{np.mean(common):.3f}"]


def _nearest(vectors: Floats) -> np.ndarray[Any, np.dtype[np.int64]]:
    """(n, 10): of each text the others that are nearest."""
    cosines = vectors @ vectors.T
    np.fill_diagonal(cosines, -1)
    return np.argpartition(-cosines, _TOP, axis=1)[:, :_TOP]


def _ratios(by_name: Mapping[str, Reading]) -> list[str]:
    lines = []
    for name, ours in by_name.items():
        if not name.startswith(_OURS):
            continue
        dtype = name.removeprefix(_OURS)
        for rival in ("sentence-transformers", "infinity-emb"):
            theirs = by_name.get(rival + dtype)
            if theirs is None:
                continue
            pairs = zip(theirs.seconds, ours.seconds, strict=True)
            ratios = sorted(theirs_s / ours_s for theirs_s, ours_s in pairs)
            lines.append(
                f"{name} encodes **{statistics.median(ratios):.2f} times** the texts of "
                f"{theirs.name} ({ratios[0]:.2f} to {ratios[-1]:.2f} over the repeats)."
            )
    return lines


def _products() -> dict[str, float]:
    """By dtype: operations a second of one large product of matrices, the best of some."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    rates = {}
    for dtype in (torch.float32, torch.bfloat16):
        a = torch.ones((_PRODUCT, _PRODUCT), dtype=dtype, device=device)
        rates[str(dtype).removeprefix("torch.")] = max(_product_rate(a) for _ in range(10))
    return rates


def _product_rate(a: torch.Tensor) -> float:
    _synchronise()
    begin = time.perf_counter()
    a @ a
    _synchronise()
    return 2 * len(a) ** 3 / (time.perf_counter() - begin)


def _synchronise() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


if __name__ == "__main__":
    main()
