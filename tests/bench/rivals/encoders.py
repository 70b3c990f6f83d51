"""Text encoders on the same weights, each in a process of its own that waits for its turn.

    python -m tests.bench.rivals.encoders NAME TEXTS.json VECTORS.npy

For each line on its standard input it encodes all texts and answers with the seconds it took.
"""

from __future__ import annotations

import asyncio
import json
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch

from model.encoder import DType, TextEncoder, tower_folder

Encode = Callable[[list[str]], Any]
"""Texts to unit rows (n, W)."""

_DEVICE: Final = "cuda" if torch.cuda.is_available() else "cpu"


def penchant(dtype: DType) -> Encode:
    encoder = TextEncoder.from_pretrained("bundled", device=_DEVICE, dtype=dtype)
    return encoder.encode


def sentence_transformers(dtype: str) -> Encode:
    from sentence_transformers import SentenceTransformer

    settings = {"dtype": getattr(torch, dtype)}
    model = SentenceTransformer(str(tower_folder("bundled")), device=_DEVICE, model_kwargs=settings)
    model.max_seq_length = 128
    return lambda texts: model.encode(texts, normalize_embeddings=True)


def infinity(dtype: str) -> Encode:
    from infinity_emb import AsyncEmbeddingEngine, EngineArgs

    # BetterTransformer is of a transformers that is no longer made; without a warm-up, because
    # every reading here has one.
    settings = EngineArgs(
        model_name_or_path=str(tower_folder("bundled")), engine="torch", device=_DEVICE,
        dtype=dtype, bettertransformer=False, model_warmup=False,
    )  # fmt: skip
    engine = AsyncEmbeddingEngine.from_args(settings)
    loop = asyncio.new_event_loop()
    loop.run_until_complete(engine.astart())
    return lambda texts: np.stack(loop.run_until_complete(engine.embed(texts))[0])


ENCODERS: Final[Mapping[str, Callable[[], Encode]]] = {
    "sentence-transformers": lambda: sentence_transformers("float32"),
    "infinity-emb": lambda: infinity("float32"),
    "Penchant": lambda: penchant("float32"),
    "sentence-transformers, bfloat16": lambda: sentence_transformers("bfloat16"),
    "infinity-emb, bfloat16": lambda: infinity("bfloat16"),
    "Penchant, bfloat16": lambda: penchant("bfloat16"),
}


def main() -> None:
    name, texts_file, vectors_file = sys.argv[1:]
    texts = json.loads(Path(texts_file).read_bytes())
    encode = ENCODERS[name]()
    np.save(vectors_file, np.asarray(encode(texts), dtype=np.float32))
    print("ready", flush=True)
    for _ in sys.stdin:
        begin = time.perf_counter()
        encode(texts)
        print(time.perf_counter() - begin, flush=True)


if __name__ == "__main__":
    main()
