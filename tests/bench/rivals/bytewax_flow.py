"""Bytewax: a dataflow from Kafka to a sink that takes the source's batches into Redis.

    python -m bytewax.run tests.bench.rivals.bytewax_flow

Settings: KAFKA_BOOTSTRAP, and those of `job`.
"""

from __future__ import annotations

import os
from typing import TypeAlias

import bytewax.operators as op
from bytewax.connectors.kafka import KafkaSource, KafkaSourceMessage
from bytewax.dataflow import Dataflow
from bytewax.outputs import DynamicSink, StatelessSinkPartition

from .job import Job

Message: TypeAlias = "KafkaSourceMessage[bytes, bytes]"


class Sums(StatelessSinkPartition[Message]):
    """One worker's."""

    def __init__(self, job: Job) -> None:
        self._job = job

    def write_batch(self, items: list[Message]) -> None:
        self._job.take([item.value for item in items])


class RedisSums(DynamicSink[Message]):
    """Every worker writes its own shoppers'."""

    def __init__(self, job: Job) -> None:
        self._job = job

    def build(self, step_id: str, worker_index: int, worker_count: int) -> Sums:
        return Sums(self._job)


job = Job()
source = KafkaSource([os.environ["KAFKA_BOOTSTRAP"]], [f"{job.namespace}.events"], batch_size=1000)
flow = Dataflow("penchant")
op.output("redis", op.input("kafka", flow, source), RedisSums(job))
