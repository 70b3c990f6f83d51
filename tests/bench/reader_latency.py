"""How long `ProfileReader` takes, while nothing happens and while a worker is busy.

    python -m tests.bench.reader_latency [--write]

A reader in a process of its own asks for one profile at a time, and for 100, at a steady pace:
first beside a worker without events, then while events of `spread` arrive at 80 % of what it can
take beside their producer. Broker, Redis, worker, producer and reader share the machine. Prints and
never asserts; `--write` puts the table into docs/performance.md.
"""

from __future__ import annotations

import argparse
import multiprocessing
import re
import sys
import time
import urllib.request
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import cycle, islice
from typing import Any, Final

import numpy as np
from redis import Redis

from profiles import ProfileReader
from stream import datasets
from stream.processes import free_port
from stream.producer import EventProducer
from stream.settings import Settings

from . import report, watching, workloads
from .pipeline import PIPELINES, Bench, counted_by, open_bench, pid

_EVENTS: Final = 300_000  # of the backlog: every profile has a few
_SHARE: Final = 0.8
_MANY: Final = 100
_GETS_PER_S, _MANY_PER_S = 400.0, 40.0
_PHASE_S: Final = 30.0
_SETTLING_S: Final = 8.0
_LOADED: Final = 240_000  # different events, over and over; they bear no ids, so each counts
_STEP_S: Final = 0.005
_TARGET_MS: Final = 2.0


@dataclass(frozen=True)
class Asked:
    """Durations of one sort of call, in ms."""

    name: str
    idle: list[float]
    busy: list[float]


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    arguments.add_argument("--write", action="store_true", help="renew docs/performance.md")
    options = arguments.parse_args()
    with open_bench(fresh_s=0.0) as bench:
        text = _measured(bench)
    text = f"{report.where('python -m tests.bench.reader_latency')}\n\n{text}"
    print(text)
    if options.write:
        report.write(report.ROOT / "docs/performance.md", text, "reader latency")


def _measured(bench: Bench) -> str:
    penchant = next(p for p in PIPELINES if p.name == "Penchant")
    with bench.shop() as (settings, environment), Redis.from_url(bench.redis.url) as client:
        work = workloads.make("spread", bench.data, _EVENTS, settings.kafka.partitions)
        watching.produce(settings.kafka.client_config(), settings.namespace, work.records)
        keys = [penchant.profile_key % (settings.namespace, u) for u in (*work.starts, *work.ends)]
        at, port = len(work.starts), free_port()
        process = watching.PipelineProcess(
            (sys.executable, *penchant.command),
            {**environment, "STREAM_METRICS_PORT": str(port)},
            bench.folder / "worker.log",
        )
        with process:
            pids = {"worker": process.pid, "redis": pid(bench.redis)}
            drained = watching.drain(
                client, process, pids, len(work.records), keys[:at], keys[at:],
                lambda: counted_by(client, penchant, settings.namespace),
            )  # fmt: skip
            users = [f"shopper-{i}" for i in range(workloads.SPREAD_SHOPPERS)]
            time.sleep(_SETTLING_S)  # outlooks of the backlog
            idle = _both(settings, users)
            busy = _under_load(settings, users, drained.rate, port, pids)
    table = _table([Asked(name, idle[name], busy.asked[name]) for name in idle])
    used = ", ".join(f"{name} {cores:.2f}" for name, cores in busy.cores.items())
    return (
        f"The worker drains {drained.rate:,.0f} events/s, and folds {busy.most:,.0f}/s while as "
        f"many are produced beside it. While the reader was timed it folded {busy.folded:,.0f}/s, "
        f"and {busy.waiting:,.0f} records were waiting in the end; cores in use: {used}. "
        f"{len(users):,} shoppers; {_GETS_PER_S:.0f} gets, then {_MANY_PER_S:.0f} times "
        f"{_MANY}, a second. Aim: get within {_TARGET_MS:.0f} ms at p99.\n\n{table}"
    )


def _table(asked: Sequence[Asked]) -> str:
    rows = [
        [name, how, f"{len(ms):,}", *(f"{np.percentile(ms, q):.2f} ms" for q in (50, 99, 99.9))]
        for name, idle, busy in ((a.name, a.idle, a.busy) for a in asked)
        for how, ms in (("idle", idle), (f"at {_SHARE:.0%} of its rate", busy))
    ]
    return report.table(["", "worker", "calls", "p50", "p99", "p99.9"], rows)


@dataclass(frozen=True)
class Busy:
    """A worker at a share of what it can take while events are produced."""

    asked: dict[str, list[float]]  # sort of call -> durations in ms
    most: float  # events/s
    folded: float  # events/s, while the reader was timed
    waiting: float  # records, in the end
    cores: dict[str, float]  # in use


def _under_load(
    settings: Settings, users: list[str], drained: float, port: int, pids: dict[str, int]
) -> Busy:
    context = multiprocessing.get_context("spawn")
    rate = context.Value("d", drained)
    kafka, ready = settings.kafka.client_config(), context.Event()
    producing = context.Process(
        target=_produce, args=(kafka, settings.namespace, rate, ready), daemon=True
    )
    producing.start()
    while not ready.wait(1):
        if not producing.is_alive():
            raise SystemExit("the producer of the load ended")
    time.sleep(_SETTLING_S / 2)
    most = _rate_of(port, lambda: time.sleep(_SETTLING_S))
    rate.value = 0.0
    while _metric(port, "penchant_lag_records") > 0:
        time.sleep(0.5)
    rate.value = most * _SHARE
    time.sleep(_SETTLING_S)
    asked: dict[str, list[float]] = {}
    begin_s = time.perf_counter()
    spent = {name: watching.cpu_s(pid) for name, pid in pids.items()}
    folded = _rate_of(port, lambda: asked.update(_both(settings, users)))
    seconds = time.perf_counter() - begin_s
    waiting = _metric(port, "penchant_lag_records")
    cores = {name: (watching.cpu_s(pid) - spent[name]) / seconds for name, pid in pids.items()}
    rate.value = -1.0
    producing.join()
    return Busy(asked, most, folded, waiting, cores)


def _rate_of(port: int, meanwhile: Callable[[], object]) -> float:
    """Events folded per second."""
    begin_s, before = time.perf_counter(), _metric(port, "penchant_events_applied_total")
    meanwhile()
    after = _metric(port, "penchant_events_applied_total")
    return (after - before) / (time.perf_counter() - begin_s)


def _metric(port: int, name: str) -> float:
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as answer:
        text = answer.read().decode()
    return sum(float(x) for x in re.findall(rf"^{name}(?:{{.*}})? (\S+)$", text, re.MULTILINE))


def _produce(kafka: dict[str, Any], namespace: str, rate: Any, ready: Any) -> None:
    """Events at a rate that may change; below 0 it ends."""
    source = workloads.stream("spread", datasets.load("movielens"), _EVENTS)
    no_id = re.compile(rb',"event_id":"[^"]*"')
    records = [(key, no_id.sub(b"", value)) for key, value in islice(source, _LOADED)]
    ready.set()
    due, then_s, more = 0.0, time.perf_counter(), cycle(records)
    with EventProducer({**kafka, **watching.PRODUCER, "linger.ms": 50}, namespace) as producer:
        while rate.value >= 0:
            now_s = time.perf_counter()
            due, then_s = due + rate.value * (now_s - then_s), now_s
            for record in islice(more, int(due)):
                producer.send_bytes("events", *record)
            due -= int(due)
            time.sleep(_STEP_S)


def _both(settings: Settings, users: list[str]) -> dict[str, list[float]]:
    """By sort of call, its durations, in a process of its own as a reader is."""
    context = multiprocessing.get_context("spawn")
    with context.Pool(1) as pool:
        return pool.apply(_read, (settings.redis.url, settings.namespace, users))


def _read(url: str, namespace: str, users: list[str]) -> dict[str, list[float]]:
    rng = np.random.default_rng(0)
    with ProfileReader(url, namespace) as reader:

        def one() -> None:
            reader.get(users[int(rng.integers(len(users)))])

        def many() -> None:
            reader.get_many([users[i] for i in rng.integers(len(users), size=_MANY).tolist()])

        return {
            "`get`": _timed(one, _GETS_PER_S),
            f"`get_many({_MANY})`": _timed(many, _MANY_PER_S),
        }


def _timed(call: Any, per_s: float) -> list[float]:
    call()  # connected
    found: list[float] = []
    begin_s = time.perf_counter()
    while (now_s := time.perf_counter()) < begin_s + _PHASE_S:
        due_s = begin_s + len(found) / per_s
        if now_s < due_s:
            time.sleep(due_s - now_s)
        start_s = time.perf_counter()
        call()
        found.append((time.perf_counter() - start_s) * 1000)
    return found


if __name__ == "__main__":
    main()
