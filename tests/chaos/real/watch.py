"""Watches from outside while a schedule runs: how far the group is behind the brokers' own end
offsets, and what the workers count and how much memory they have.

A fault's recovery is read from the samples afterwards. Knows nothing of faults' kinds.
"""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from types import TracebackType
from typing import Final, Self

from confluent_kafka import Consumer, KafkaException, TopicPartition

from stream.settings import Settings
from tests.integration.worker_process import WorkerProcess

_EVERY_S: Final = 0.25
_STAYS_S: Final = 4.0  # that the lag must stay down: it rises only by and by
_REPLAYED, _AGAIN = "penchant_events_replayed_total", "penchant_records_read_again_total"
_REFUSED, _LAG = "penchant_profile_saves_refused_total", "penchant_lag_records"


@dataclass(frozen=True)
class Sample:
    """Of all partitions of events and items together."""

    at_s: float  # monotonic
    ends: int
    committed: int

    @property
    def lag(self) -> int:
        return self.ends - self.committed


@dataclass(frozen=True)
class Told:
    """What the workers said of themselves, all together, when all of them answered."""

    at_s: float
    lag: float
    most_resident_mb: float  # of the largest


class Watch:
    """Samples on two threads until it is left: a worker that is stopped answers late."""

    def __init__(self, settings: Settings, workers: Callable[[], Sequence[WorkerProcess]]) -> None:
        self.samples: list[Sample] = []
        self.told: list[Told] = []
        self.counted: dict[str, Counter[str]] = {}
        """Worker -> its counters when it was last asked: one that was killed had perhaps more."""
        self._settings = settings
        self._workers = workers
        self._over = threading.Event()
        self._threads = [threading.Thread(target=run) for run in (self._sample, self._ask)]

    @property
    def replayed(self) -> int:
        return self._sum(_REPLAYED)

    @property
    def read_again(self) -> int:
        return self._sum(_AGAIN)

    @property
    def refused(self) -> int:
        return self._sum(_REFUSED)

    def first_save_s(self, fault_s: float) -> float | None:
        """From a fault to the first commit after it, which follows its save by 0.2 s at most."""
        after = [s for s in self.samples if s.at_s >= fault_s]
        for one, next_one in pairwise(after):
            if next_one.committed > one.committed:
                return next_one.at_s - fault_s
        return None

    def back_after_s(self, fault_s: float, usual_lag: float) -> float | None:
        """From a fault until the lag is, and stays, no more than usual: if another fault follows
        before that, until both are over."""
        after = [s for s in self.samples if s.at_s >= fault_s]
        well_since_s = None
        for sample in after:
            if sample.lag > usual_lag:
                well_since_s = None
            elif well_since_s is None:
                well_since_s = sample.at_s
            elif sample.at_s - well_since_s >= _STAYS_S:
                break
        return None if well_since_s is None else well_since_s - fault_s

    def sees_all_done(self) -> bool:
        """Whether the latest sample has no lag."""
        return bool(self.samples) and self.samples[-1].lag == 0

    def between(self, begin_s: float, end_s: float) -> list[Sample]:
        return [s for s in self.samples if begin_s <= s.at_s <= end_s]

    def lag_told_wrongly(self, within_s: float = 2.0) -> list[float]:
        """Per answer of the workers, how many records their lag lies outside of what the brokers
        said within so many seconds of it; the metric is of about a second ago."""
        off = []
        for told in self.told:
            lags = [s.lag for s in self.between(told.at_s - within_s, told.at_s + 0.5)]
            if lags:
                off.append(max(0.0, told.lag - max(lags), min(lags) - told.lag))
        return off

    def __enter__(self) -> Self:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._over.set()
        for thread in self._threads:
            thread.join()

    def _sum(self, name: str) -> int:
        return round(sum(counters[name] for counters in self.counted.values()))

    def _sample(self) -> None:
        config = self._settings.kafka.client_config()
        group = {"group.id": self._settings.topic("updater"), "log_level": 0}
        places = [
            TopicPartition(self._settings.topic(topic), partition)
            for topic in ("events", "items")
            for partition in range(self._settings.kafka.partitions)
        ]
        reader = Consumer(config | group)
        while not self._over.wait(_EVERY_S):
            try:
                # The positions first: the lag is never told as less than it was.
                committed = sum(max(0, p.offset) for p in reader.committed(places, 2))
                ends = [reader.get_watermark_offsets(place, timeout=2)[1] for place in places]
            except KafkaException:  # brokers are away: nobody can say
                reader.close()
                reader = Consumer(config | group)  # with nothing left of what it knew
            else:
                self.samples.append(Sample(time.monotonic(), sum(ends), committed))
        reader.close()

    def _ask(self) -> None:
        while not self._over.wait(_EVERY_S):
            lags, workers = [], self._workers()
            for worker in workers:
                if counters := worker.metrics():
                    self.counted[worker.name] = counters
                    lags.append(counters[_LAG])
            if workers and len(lags) == len(workers):
                resident = max(resident_mb(worker.process.pid) for worker in workers)
                self.told.append(Told(time.monotonic(), sum(lags), resident))


def resident_mb(pid: int) -> float:
    """0 for a process that is gone."""
    try:
        lines: Iterable[str] = Path(f"/proc/{pid}/status").read_text("ascii").splitlines()
    except OSError:
        return 0.0
    return sum(int(line.split()[1]) / 1024 for line in lines if line.startswith("VmRSS"))
