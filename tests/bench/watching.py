"""Watching a pipeline from outside: what it costs, how far it is, how fresh its profiles are.

Whether an event is in is asked of Redis, never of the pipeline: its shopper's key is there or
not. So every pipeline is measured in the same way, and none can count in its own favour.
"""

from __future__ import annotations

import multiprocessing
import os
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any, Final, Self

import redis

from stream import datasets
from stream.producer import EventProducer

from .workloads import Record, stream

# Producers of a shop keep the default, zstd, which the Kafka client of plain Faust reads only
# with one more package; uncompressed, no pipeline gains or loses by it.
PRODUCER: Final = {"compression.type": "none"}

# The load stands for many machines; its requests must not cost the cores that are measured.
# Probes are sent at once.
_PATIENT: Final = {"linger.ms": 50}

SETTLING: Final = 0.2
"""The share of a load that passes before it is probed."""

_POLL_S: Final = 0.005
_PROBE_POLL_S: Final = 0.002
_PROBES_PER_S: Final = 50.0
_LOAD_STEP_S: Final = 0.005
_PATIENCE_S: Final = 300.0
_SETTLED_S: Final = 5.0
_PROBE_PATIENCE_S: Final = 30.0
_TICKS_PER_S: Final = os.sysconf("SC_CLK_TCK")


def resident_mb(pid: int) -> float:
    """The resident memory of a process."""
    return _status_mb(pid, "VmRSS")


def cpu_s(pid: int) -> float:
    """CPU time of a process and its threads since it started."""
    fields = Path(f"/proc/{pid}/stat").read_text(encoding="ascii").rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / _TICKS_PER_S  # utime, stime


def peak_mb(pid: int) -> float:
    """The most resident memory a process has had, since it began or `forget_peak`."""
    return _status_mb(pid, "VmHWM")


def forget_peak(pid: int) -> None:
    """Let the peak be what is resident now; of a process of the same user."""
    Path(f"/proc/{pid}/clear_refs").write_text("5", encoding="ascii")


def _status_mb(pid: int, name: str) -> float:
    for line in Path(f"/proc/{pid}/status").read_text(encoding="utf-8").splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) / 1024
    raise RuntimeError(f"process {pid} shows no {name}")


class PipelineProcess:
    """A pipeline as a process of its own, as it would run anywhere."""

    def __init__(
        self,
        command: Sequence[str],
        settings: Mapping[str, str],
        log: Path,
        folder: Path | None = None,
    ) -> None:
        """`folder`: where it runs, else here."""
        self._command, self._log, self._folder = list(command), log, folder
        self._settings = {**os.environ, **settings}

    @property
    def pid(self) -> int:
        return self._child.pid

    def __enter__(self) -> Self:
        with self._log.open("wb") as log:
            self._child = subprocess.Popen(
                self._command,
                env=self._settings,
                cwd=self._folder,
                stdout=log,
                stderr=subprocess.STDOUT,
            )
        return self

    def __exit__(self, *failure: object) -> None:
        self._child.terminate()
        try:
            self._child.wait(20)
        except subprocess.TimeoutExpired:
            self._child.kill()
            self._child.wait()

    def kill(self) -> None:
        """No goodbye."""
        self._child.kill()
        self._child.wait()

    def check(self) -> None:
        """SystemExit with the end of its log if it is gone."""
        if self._child.poll() is not None:
            tail = self._log.read_text(encoding="utf-8", errors="replace").splitlines()[-30:]
            raise SystemExit("\n".join([f"{self._command} ended:", *tail]))


@dataclass(frozen=True)
class Drained:
    """A backlog worked off."""

    events: int  # between the two readings of the clock
    seconds: float
    cpu_s: dict[str, float]  # by process

    @property
    def rate(self) -> float:
        """Events per second."""
        return self.events / self.seconds


def drain(
    client: redis.Redis,
    process: PipelineProcess,
    pids: Mapping[str, int],
    events: int,
    starts: Sequence[str],
    ends: Sequence[str],
    counted: Callable[[], int],
) -> Drained:
    """Wait until all of a backlog is in. `starts` and `ends`: keys of the shoppers of its first
    events (any of them begins the measuring) and of its last (all of them end it); `counted`:
    how many events are in, so that those of the first save do not count as measured."""
    _wait(process, lambda: bool(client.exists(*starts)))
    already = counted()
    begin_s, begin_cpu = time.perf_counter(), {name: cpu_s(pid) for name, pid in pids.items()}
    _wait(process, lambda: client.exists(*ends) == len(ends))
    seconds = time.perf_counter() - begin_s
    spent = {name: cpu_s(pid) - begin_cpu[name] for name, pid in pids.items()}
    return Drained(events - already, seconds, spent)


def settled(counted: Callable[[], int], total: int) -> int:
    """What is counted once it is all, or after some seconds: a stream's last events may be read
    a micro-batch before all the others."""
    deadline_s = time.monotonic() + _SETTLED_S
    while (now := counted()) != total and time.monotonic() < deadline_s:
        time.sleep(0.2)
    return now


def _wait(process: PipelineProcess, reached: Callable[[], bool]) -> None:
    deadline_s = time.monotonic() + _PATIENCE_S
    while not reached():
        process.check()
        if time.monotonic() > deadline_s:
            raise SystemExit(f"nothing more came of {process.pid} in {_PATIENCE_S:.0f} s")
        time.sleep(_POLL_S)


def produce(settings: Mapping[str, Any], namespace: str, records: Sequence[Record]) -> None:
    """Send records as fast as it goes."""
    with EventProducer({**settings, **PRODUCER}, namespace) as producer:
        for key, value in records:
            producer.send_bytes("events", key, value)


@dataclass(frozen=True)
class Load:
    """Events at a fixed rate, whether the pipeline keeps up or not."""

    workload: str
    first: int  # position in the workload's stream
    rate: float  # events per second
    seconds: float


@dataclass(frozen=True)
class Probe:
    """An event whose shopper was looked for until found."""

    sent_s: float  # perf_counter
    fresh_ms: float  # from `send` until it could be read; infinite if that never came


def freshness(
    client: redis.Redis,
    process: PipelineProcess,
    kafka: Mapping[str, Any],
    namespace: str,
    load: Load,
    probe: tuple[str, bytes],
    shoppers: str = "probe",
    began: Callable[[], None] = lambda: None,
) -> list[Probe]:
    """How long an event takes from `send` until its shopper can be read, under a load.

    `probe`: the key of a profile and the value of an event, both with `%s` for the shopper; each
    probe is the first event of a shopper of its own, whose names begin with `shoppers`. The load
    comes from another process; probes are part of its rate. `began` is called when they begin.
    """
    probes_per_s = min(_PROBES_PER_S, load.rate / 10)
    others = replace(load, rate=load.rate - probes_per_s)
    context = multiprocessing.get_context("spawn")
    ready = context.Event()
    producing = context.Process(
        target=_produce_load, args=(dict(kafka), namespace, others, ready), daemon=True
    )
    producing.start()
    while not ready.wait(1):
        if not producing.is_alive():
            raise SystemExit("the producer of the load ended")
    settling_s = load.seconds * SETTLING
    time.sleep(settling_s)
    try:
        measured_s = load.seconds - settling_s
        began()
        return _probe(client, process, kafka, namespace, probe, probes_per_s, measured_s, shoppers)
    finally:
        producing.join()


def _probe(
    client: redis.Redis,
    process: PipelineProcess,
    kafka: Mapping[str, Any],
    namespace: str,
    probe: tuple[str, bytes],
    probes_per_s: float,
    seconds: float,
    shoppers: str,
) -> list[Probe]:
    key_of, value_of = probe
    waiting: dict[str, float] = {}  # key -> when its event was sent
    found: list[Probe] = []
    with EventProducer({**kafka, **PRODUCER}, namespace) as producer:

        def send(number: int) -> None:
            user = f"{shoppers}-{number}"
            waiting[key_of % user] = time.perf_counter()
            producer.send_bytes("events", user.encode(), value_of % user.encode())

        send(-1)  # a producer's first event waits for connections, which its shop has long made
        _wait(process, lambda: bool(client.exists(*waiting)))
        waiting.clear()
        sent, begin_s = 0, time.perf_counter()
        end_s = begin_s + seconds
        while (now_s := time.perf_counter()) < end_s or waiting:
            if now_s < end_s and now_s >= begin_s + sent / probes_per_s:
                send(sent)
                sent += 1
            keys = list(waiting)
            asking = client.pipeline(transaction=False)
            for key in keys:
                asking.exists(key)
            there = asking.execute()
            now_s = time.perf_counter()
            for key, is_there in zip(keys, there, strict=True):
                if is_there:
                    sent_s = waiting.pop(key)
                    found.append(Probe(sent_s, (now_s - sent_s) * 1000))
            if now_s > end_s + _PROBE_PATIENCE_S:
                found += [Probe(sent_s, float("inf")) for sent_s in waiting.values()]
                break
            process.check()
            time.sleep(_PROBE_POLL_S)
    return found


def _produce_load(kafka: dict[str, Any], namespace: str, load: Load, ready: Any) -> None:
    """Send the load in steps, each at its time."""
    needed = int(load.rate * load.seconds)
    records = list(islice(stream(load.workload, datasets.load("movielens"), load.first), needed))
    ready.set()
    sent, begin_s = 0, time.perf_counter()
    with EventProducer({**kafka, **PRODUCER, **_PATIENT}, namespace) as producer:
        while sent < needed:
            due = min(needed, int((time.perf_counter() - begin_s) * load.rate))
            for record in records[sent:due]:
                producer.send_bytes("events", *record)
            sent = due
            time.sleep(_LOAD_STEP_S)
