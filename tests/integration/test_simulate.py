"""A simulated shop through the whole system: profiles know what their shoppers want."""

from __future__ import annotations

import os
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from model.encoder import TextEncoder
from profiles import ProfileReader
from stream.base_release import build_live, texts_of
from stream.local_stack import ApacheKafka
from stream.settings import KafkaSettings, ModelSettings, RedisSettings, Settings, StreamSettings
from stream.simulated_shop import K, Shop, Spec
from stream.simulation import items
from stream.topics import create_topics
from tests.integration.worker_process import (
    REPOSITORY,
    LocalWorker,
    wait_until_folded,
)

pytestmark = [pytest.mark.kafka, pytest.mark.redis]

SHOPPERS, ITEMS = 100, 96


def simulate(settings: Settings, truth: Path) -> str:
    options = f"--shoppers {SHOPPERS} --items {ITEMS} --days 20 --visits 0.5 --drift-days 150"
    ran = subprocess.run(
        [sys.executable, "-m", "stream.cli", "simulate", *options.split(), "--kafka",
         "--churn", "0", "--duplicates", "0.02", "--late", "0.02", "--truth", str(truth)],
        cwd=REPOSITORY,
        env={"PATH": os.environ["PATH"], **settings.environment()},
        capture_output=True,
        text=True,
    )  # fmt: skip
    assert ran.returncode == 0, ran.stderr
    return ran.stdout


def centres(encoder: TextEncoder) -> np.ndarray:
    """(K, D) the mean vector of each topic's items."""
    shop = Shop(Spec(items=ITEMS))
    vectors = encoder.encode(texts_of(items(shop)), "passage")
    means = np.stack([vectors[shop.topic == topic].mean(axis=0) for topic in range(K)])
    return means - means.mean(axis=0)


def test_the_interest_in_a_profile_is_that_of_the_shopper(
    apache_kafka: ApacheKafka, redis_url: str, namespace: str, tmp_path: Path
) -> None:
    model = ModelSettings(
        releases=tmp_path / "releases", dimensions=384, max_tokens=16, device="cpu"
    )
    settings = Settings(
        namespace=namespace,
        kafka=KafkaSettings(bootstrap=apache_kafka.bootstrap, partitions=2),
        redis=RedisSettings(url=redis_url),
        stream=StreamSettings(data_dir=tmp_path / "data"),
        model=model,
    )
    release = build_live(model, [], lambda done, of: None)
    create_topics(settings)
    truth = tmp_path / "truth.parquet"
    assert simulate(settings, truth).startswith("simulated: 96 items, ")
    with LocalWorker(settings) as worker:
        wait_until_folded(settings)
        assert worker.error is None
    interests = defaultdict(list)
    for row in pq.read_table(truth).to_pylist():
        if row["kind"] == "visit":
            interests[row["user_id"]].append(row["interest"])
    # Who wants two things alike has no true topic, and of one visit little can be known.
    wanted = {
        user: int(np.argmax(share))
        for user, shares in interests.items()
        if len(shares) >= 4 and (share := np.mean(shares, axis=0)).max() > 0.5
    }
    middle = centres(release.load_encoder(device="cpu"))
    with ProfileReader(settings.redis.connection(), namespace) as reader:
        vectors = {user: reader.interests(user, scale=2) for user in reader.get_many(list(wanted))}
    assert len(vectors) > 20
    found = {user: int(np.argmax(middle @ vector)) for user, vector in vectors.items()}
    right = np.mean([found[user] == wanted[user] for user in found])
    assert right > 0.8, f"simulated: {right:.0%} of {len(found)} shoppers; chance is 1 in {K}"
