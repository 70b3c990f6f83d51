"""Faust, as most people would write it: an agent takes batches of 1,000 events into Redis.

    python -m tests.bench.rivals.plain_faust worker --without-web

Settings: KAFKA_BOOTSTRAP, BENCH_DATA_DIR, and those of `job`.
"""

from __future__ import annotations

import os
from typing import Any

import faust

from .job import Job

job = Job()
app = faust.App(
    f"{job.namespace}.plain",
    broker=f"kafka://{os.environ['KAFKA_BOOTSTRAP']}",
    store="memory://",
    topic_disable_leader=True,
    datadir=os.environ["BENCH_DATA_DIR"],
)
topic = app.topic(
    f"{job.namespace}.events", key_type=bytes, value_type=bytes, value_serializer="raw"
)


@app.agent(topic)
async def update(stream: Any) -> None:
    async for batch in stream.take(1000, within=0.05):
        job.take(batch)


if __name__ == "__main__":
    app.main()
