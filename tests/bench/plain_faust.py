"""The pipeline that Penchant is measured against: plain Faust, as most people would write it.

One agent takes batches of 1,000 events, encodes their items' texts as sentence-transformers
would (batches of 32, longest first, mean pooling), and keeps one decayed sum of D floats per
shopper in Redis through a redis-py pipeline. It does much less than Penchant does: one time
scale instead of three, no counters, window or categories, no watermark (a replayed event counts
twice), no dead letters.

    python -m tests.bench.plain_faust worker --without-web

Settings: NAMESPACE, KAFKA_BOOTSTRAP, REDIS_URL; BENCH_CATALOGUE, a JSON file of item id -> text;
BENCH_CACHE, 1 to keep item vectors in a dict, filled before the first event.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any, Final

import faust
import numpy as np
import numpy.typing as npt
import redis
import torch
from pydantic import BaseModel
from transformers import AutoModel, AutoTokenizer

from model.encoder import tower_folder

Floats = npt.NDArray[np.float32]

DIMENSIONS: Final = 128
HALF_LIFE_MS: Final = 86_400_000
ENCODE_BATCH: Final = 32
WEIGHTS: Final = {"view": 0.2, "click": 0.3, "add_to_cart": 0.6, "purchase": 1.0, "review": -1.0}

NAMESPACE: Final = os.environ["NAMESPACE"]


class Event(BaseModel):
    """The fields that this pipeline reads."""

    type: str
    user_id: str
    ts: int
    item_id: str


class Encoder:
    """What `SentenceTransformer.encode` does."""

    def __init__(self) -> None:
        folder = tower_folder("bundled")
        self._tokenizer: Any = AutoTokenizer.from_pretrained(folder)
        self._model = AutoModel.from_pretrained(folder).eval()

    @torch.inference_mode()
    def encode(self, texts: list[str]) -> Floats:
        """Texts to unit rows (n, D)."""
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
            hidden = self._model(**tokens).last_hidden_state  # (b, L, W)
            mask = tokens["attention_mask"].unsqueeze(-1)  # (b, L, 1)
            pooled = (hidden * mask).sum(1) / mask.sum(1)  # (b, W)
            cut = torch.nn.functional.normalize(pooled[:, :DIMENSIONS], dim=1)
            vectors[at] = cut.numpy()
        return vectors


catalogue: dict[str, str] = json.loads(Path(os.environ["BENCH_CATALOGUE"]).read_bytes())
encoder = Encoder()
cache: dict[str, Floats] | None = None
if os.environ["BENCH_CACHE"] == "1":
    cache = dict(zip(catalogue, encoder.encode(list(catalogue.values())), strict=True))
client = redis.Redis.from_url(os.environ["REDIS_URL"])

app = faust.App(
    f"{NAMESPACE}.plain",
    broker=f"kafka://{os.environ['KAFKA_BOOTSTRAP']}",
    store="memory://",
    topic_disable_leader=True,
    datadir=os.environ["BENCH_DATA_DIR"],
)
topic = app.topic(f"{NAMESPACE}.events", key_type=bytes, value_type=bytes, value_serializer="raw")


def vectors_of(item_ids: list[str]) -> list[Floats]:
    """The vectors of a batch's items."""
    if cache is None:
        return list(encoder.encode([catalogue.get(item_id, "") for item_id in item_ids]))
    new = list({item_id for item_id in item_ids if item_id not in cache})
    if new:
        texts = [catalogue.get(item_id, "") for item_id in new]
        cache.update(zip(new, encoder.encode(texts), strict=True))
    return [cache[item_id] for item_id in item_ids]


@app.agent(topic)
async def update(stream: Any) -> None:
    async for batch in stream.take(1000, within=0.05):
        events = [Event.model_validate_json(value) for value in batch]
        vectors = vectors_of([event.item_id for event in events])

        users = list(dict.fromkeys(event.user_id for event in events))
        loading = client.pipeline(transaction=False)
        for user in users:
            loading.hmget(f"{NAMESPACE}:plain:{user}", "sum", "ts", "events")
        sums: dict[str, tuple[Floats, int, int]] = {}
        for user, (raw, ts, count) in zip(users, loading.execute(), strict=True):
            if raw is None:
                sums[user] = np.zeros(DIMENSIONS, dtype=np.float32), 0, 0
            else:
                sums[user] = np.frombuffer(raw, dtype=np.float32), int(ts), int(count)

        for event, vector in zip(events, vectors, strict=True):
            total, ts, count = sums[event.user_id]
            decay = 0.5 ** (max(0, event.ts - ts) / HALF_LIFE_MS)
            total = total * np.float32(decay) + np.float32(WEIGHTS[event.type]) * vector
            sums[event.user_id] = total, max(ts, event.ts), count + 1

        saving = client.pipeline(transaction=False)
        for user, (total, ts, count) in sums.items():
            saving.hset(
                f"{NAMESPACE}:plain:{user}",
                mapping={"sum": total.tobytes(), "ts": ts, "events": count},
            )
        saving.execute()


if __name__ == "__main__":
    app.main()
