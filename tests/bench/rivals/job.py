"""The job that every rival does, as most people would write it: a decayed sum per shopper.

A batch of events is parsed, its items' texts are encoded as sentence-transformers would (batches of
32, longest first, mean pooling) or taken from a dict, and one sum of D floats per shopper is kept
in Redis through a redis-py pipeline. It is much less than Penchant does: one time scale instead of
three, no counters, window or categories, no watermark (a replayed event counts twice), no dead
letters. What a rival brings itself is how batches get here.

Settings: NAMESPACE, REDIS_URL; BENCH_CATALOGUE, a JSON file of item id -> text; BENCH_VECTORS, a
file of its vectors; BENCH_CACHE, 1 to keep item vectors in a dict, filled before the first event.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import redis
from pydantic import BaseModel

Floats = npt.NDArray[np.float32]

DIMENSIONS: Final = 128
HALF_LIFE_MS: Final = 86_400_000
ENCODE_BATCH: Final = 32
WEIGHTS: Final = {"view": 0.2, "click": 0.3, "add_to_cart": 0.6, "purchase": 1.0, "review": -1.0}

_NOTHING: Final = np.zeros(DIMENSIONS, dtype=np.float32)  # of an item without a text


class Event(BaseModel):
    """The fields that this job reads."""

    type: str
    user_id: str
    ts: int
    item_id: str


class Encoder:
    """What `SentenceTransformer.encode` does."""

    def __init__(self) -> None:
        from transformers import AutoModel, AutoTokenizer

        from model.encoder import tower_folder

        folder = tower_folder("bundled")
        self._tokenizer: Any = AutoTokenizer.from_pretrained(folder)
        self._model = AutoModel.from_pretrained(folder).eval()

    def encode(self, texts: list[str]) -> Floats:
        """Texts to unit rows (n, D)."""
        import torch

        vectors = np.zeros((len(texts), DIMENSIONS), dtype=np.float32)
        order = sorted(range(len(texts)), key=lambda i: -len(texts[i]))
        for begin in range(0, len(order), ENCODE_BATCH):
            at = order[begin : begin + ENCODE_BATCH]
            tokens = self._tokenizer(
                [texts[i] for i in at],
                padding=True,
                truncation=True,
                max_length=128,
                return_tensors="pt",
            )
            with torch.inference_mode():
                hidden = self._model(**tokens).last_hidden_state  # (b, L, W)
                mask = tokens["attention_mask"].unsqueeze(-1)  # (b, L, 1)
                pooled = (hidden * mask).sum(1) / mask.sum(1)  # (b, W)
                cut = torch.nn.functional.normalize(pooled[:, :DIMENSIONS], dim=1)
            vectors[at] = cut.numpy()
        return vectors


class Job:
    """Takes batches of events into Redis."""

    def __init__(self) -> None:
        self.namespace = os.environ["NAMESPACE"]
        self._catalogue: dict[str, str] = json.loads(
            Path(os.environ["BENCH_CATALOGUE"]).read_bytes()
        )
        self._cache: dict[str, Floats] = {}
        self._encoder = None if os.environ["BENCH_CACHE"] == "1" else Encoder()
        if self._encoder is None:
            vectors = np.load(os.environ["BENCH_VECTORS"])
            self._cache = dict(zip(self._catalogue, vectors, strict=True))
        self._redis = redis.Redis.from_url(os.environ["REDIS_URL"])

    def take(self, values: Sequence[bytes]) -> None:
        """Fold a batch of serialised events into their shoppers' sums."""
        events = [Event.model_validate_json(value) for value in values]
        vectors = self._vectors([event.item_id for event in events])
        sums = self._load(list(dict.fromkeys(event.user_id for event in events)))
        for event, vector in zip(events, vectors, strict=True):
            total, ts, count = sums[event.user_id]
            decay = 0.5 ** (max(0, event.ts - ts) / HALF_LIFE_MS)
            total = total * np.float32(decay) + np.float32(WEIGHTS[event.type]) * vector
            sums[event.user_id] = total, max(ts, event.ts), count + 1
        self._save(sums)

    def _vectors(self, item_ids: list[str]) -> list[Floats]:
        if self._encoder is None:
            return [self._cache.get(item_id, _NOTHING) for item_id in item_ids]
        return list(self._encoder.encode([self._catalogue.get(each, "") for each in item_ids]))

    def _load(self, users: list[str]) -> dict[str, tuple[Floats, int, int]]:
        loading = self._redis.pipeline(transaction=False)
        for user in users:
            loading.hmget(f"{self.namespace}:plain:{user}", "sum", "ts", "events")
        sums: dict[str, tuple[Floats, int, int]] = {}
        for user, (raw, ts, count) in zip(users, loading.execute(), strict=True):
            if raw is None:
                sums[user] = np.zeros(DIMENSIONS, dtype=np.float32), 0, 0
            else:
                sums[user] = np.frombuffer(raw, dtype=np.float32), int(ts), int(count)
        return sums

    def _save(self, sums: dict[str, tuple[Floats, int, int]]) -> None:
        saving = self._redis.pipeline(transaction=False)
        for user, (total, ts, count) in sums.items():
            saving.hset(
                f"{self.namespace}:plain:{user}",
                mapping={"sum": total.tobytes(), "ts": ts, "events": count},
            )
        saving.execute()
