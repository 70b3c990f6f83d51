"""Offsets of many partitions, asked of the brokers without waiting for the answer.

Knows one question at a time, and what was answered last. One thread at a time.
"""

from __future__ import annotations

import time
from collections.abc import Collection, Mapping
from concurrent.futures import Future
from typing import Any

from confluent_kafka import IsolationLevel
from confluent_kafka import TopicPartition as Place
from confluent_kafka.admin import AdminClient, OffsetSpec

from .offsets import TopicPartition


class AskedOffsets:
    """Of one kind: where partitions begin, or where they end."""

    def __init__(self, admin: AdminClient, kind: OffsetSpec) -> None:
        self._admin = admin
        self._kind = kind
        self._asked: dict[Any, Future[Any]] = {}
        self._asked_s = 0.0
        self._known: dict[TopicPartition, int] = {}
        self.known_s: dict[TopicPartition, float] = {}
        """When (monotonic) what is known of a partition was asked."""

    def look(self, partitions: Collection[TopicPartition]) -> Mapping[TopicPartition, int]:
        """What was answered by now; what is asked now is answered the next time. A partition that
        the brokers have not answered for yet is missing."""
        if all(answer.done() for answer in self._asked.values()):
            for place, answer in self._asked.items():
                if answer.exception() is None:
                    self._known[(place.topic, place.partition)] = answer.result().offset
                    self.known_s[(place.topic, place.partition)] = self._asked_s
            self._known = {p: at for p, at in self._known.items() if p in partitions}
            self._asked_s = time.monotonic()
            self._asked = self._ask(partitions)
        return self._known

    def _ask(self, partitions: Collection[TopicPartition]) -> dict[Any, Future[Any]]:
        if not partitions:
            return {}
        asked: dict[Any, Future[Any]] = self._admin.list_offsets(
            {Place(*partition): self._kind for partition in partitions},
            isolation_level=IsolationLevel.READ_COMMITTED,
        )
        return asked
