"""Quix Streams: a sink takes batches of up to 1,000 events into Redis, at every checkpoint.

    python -m tests.bench.rivals.quix

Settings: KAFKA_BOOTSTRAP, and those of `job`.
"""

from __future__ import annotations

import os

from quixstreams import Application
from quixstreams.sinks.base import BatchingSink, SinkBatch

from .job import Job

_BATCH = 1000


class RedisSums(BatchingSink):
    """Writes what came since the last checkpoint."""

    def __init__(self, job: Job) -> None:
        super().__init__()
        self._job = job

    def write(self, batch: SinkBatch) -> None:
        for part in batch.iter_chunks(_BATCH):
            self._job.take([item.value for item in part])


def main() -> None:
    job = Job()
    app = Application(
        broker_address=os.environ["KAFKA_BOOTSTRAP"],
        consumer_group=f"{job.namespace}.quix",
        auto_offset_reset="earliest",
        commit_every=_BATCH,
        commit_interval=0.05,
    )
    events = app.topic(
        f"{job.namespace}.events", key_deserializer="bytes", value_deserializer="bytes"
    )
    app.dataframe(events).sink(RedisSums(job))
    app.run()


if __name__ == "__main__":
    main()
