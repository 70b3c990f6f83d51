"""What becomes of it as a shop grows: shoppers, catalogue, event rate, partitions, workers.

    python -m tests.bench.growth [--only shoppers --only rate …] [--quick] [--write]

Shoppers and items are made up; the events of the last three parts are MovieLens-100K's, each given
to another shopper in turn (`spread`). Everything runs on one machine, so a curve shows what grows
with what, and not what a cluster would do. Prints and never asserts; `--write` puts the tables of
the parts that ran into docs/growth.md.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any, Final

import numpy as np
from confluent_kafka.admin import AdminClient
from redis import Redis

from model.item_table import ItemTable
from model.text import text_version
from profiles import NearestItem, ProfileReader
from profiles.arithmetic import EventColumns
from profiles.fates import Fates
from profiles.items import ItemStore
from profiles.marks import Marks
from profiles.neighbours import LANES
from profiles.schema import TYPE_CODE, ItemRecord, Keys, key64
from profiles.store import ProfileStore
from stream.local_servers import RedisServer
from stream.settings import Settings
from stream.updater_app import profile_layout

from . import ceilings, pipeline, report, watching, workloads

_SPACE: Final = 1
_DIMENSIONS: Final = 128
_SHOPPERS: Final = (1_000, 10_000, 100_000, 1_000_000)
_EVENTS_EACH: Final = 50  # a full window, and own items
_AT_ONCE: Final = 4096
_DRAWN: Final = 60_000
_ITEMS: Final = (1_000, 10_000, 100_000)  # a million takes half an hour to index
_ASKED: Final = 300
_RATES: Final = (1_000, 5_000, 10_000, 20_000, 30_000, 40_000)
_RATE_S: Final = 12.0
_PARTITIONS: Final = (1, 4, 12, 64, 256)
_WORKERS: Final = (1, 2, 3, 4)
_BACKLOG: Final = 200_000
_LONG_BACKLOG: Final = 800_000  # the first of several is at work before the last has joined

Part = Callable[[float], str]
"""Share of the full size -> a table."""


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--only", choices=list(PARTS), action="append", help="these parts")
    parser.add_argument("--quick", action="store_true", help="a hundredth of the size")
    parser.add_argument("--write", action="store_true", help="renew docs/growth.md")
    given = parser.parse_args()
    for name in given.only or PARTS:
        text = PARTS[name](0.01 if given.quick else 1.0)
        text = f"{report.where(f'python -m tests.bench.growth --only {name}')}\n\n{text}"
        print(f"\n{name}\n\n{text}", flush=True)
        if given.write and not given.quick:
            report.write(report.ROOT / "docs/growth.md", text, name)


# --- shoppers ------------------------------------------------------------------------------


def shoppers(share: float) -> str:
    """Bytes of a profile, loads and saves per second, as profiles become more."""
    head = [
        "shoppers", "bytes each", "Redis", "of these state", "filled/s", "loads/s",
        "fenced saves/s", "`get` p50", "p99",
    ]  # fmt: skip
    return report.table(head, [_of_shoppers(max(100, int(n * share))) for n in _SHOPPERS])


def _of_shoppers(n: int) -> list[str]:
    with _a_redis() as (client, settings):
        before = _used(client)
        seconds = _fill(client, settings, n)
        each = (_used(client) - before) / n
        rng = np.random.default_rng(0)
        drawn = rng.choice(n, min(n, _DRAWN), replace=False).tolist()
        users = [f"shopper-{i}" for i in drawn]
        loads, saves, state = ceilings.profiles(settings, users, _SPACE, 5.0)
        get_ms = _gets(settings, users)
    return [
        f"{n:,}", f"{each:,.0f}", f"{each * n / 2**30:.2f} GiB", f"{state:,.0f}",
        f"{n / seconds:,.0f}", f"{loads:,.0f}", f"{saves:,.0f}", *_p50_p99(get_ms),
    ]  # fmt: skip


def _fill(client: Redis, settings: Settings, n: int) -> float:
    """Give each of n shoppers a full window of events; seconds."""
    keys, layout = Keys(settings.namespace), profile_layout(settings, _DIMENSIONS)
    store = ProfileStore(
        client, keys, layout, ttl_s=90 * 86_400, writer=1, marks=Marks(client, keys)
    )
    store.warm_up()
    rng = np.random.default_rng(1)
    begin_s = time.perf_counter()
    with ThreadPoolExecutor(LANES) as lanes:
        for start in range(0, n, _AT_ONCE):
            stop = min(n, start + _AT_ONCE)
            ends = np.linspace(start, stop, LANES + 1).astype(int).tolist()
            parts = [(a, b) for a, b in pairwise(ends) if b > a]
            drawn = [_window(rng, b - a) for a, b in parts]
            list(lanes.map(lambda part, events: _fold(store, part, events), parts, drawn))
    return time.perf_counter() - begin_s


def _fold(store: ProfileStore, part: tuple[int, int], events: EventColumns) -> None:
    users = [f"shopper-{i}" for i in range(*part)]
    fates = Fates(len(events.row))
    here = store.fold(users, events, 0, _SPACE, lambda keys: {}, time.time(), fates, {1})
    if here.again:
        raise SystemExit(f"{len(here.again)} profiles could not be filled")


def _window(rng: np.random.Generator, n: int) -> EventColumns:
    """`_EVENTS_EACH` events for each of n users, an hour apart, of items like a shop's."""
    m = n * _EVENTS_EACH
    step = np.tile(np.arange(_EVENTS_EACH), n)
    items = rng.zipf(1.3, m).astype(np.uint64) % np.uint64(100_000)
    vectors = rng.standard_normal((256, _DIMENSIONS)).astype(np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    now_ms = int(time.time() * 1000)
    return replace(
        ceilings.clicks(1, 0, profile_layout(Settings(), _DIMENSIONS)),
        row=np.repeat(np.arange(n), _EVENTS_EACH),
        source=np.ones(m, dtype=np.uint64),
        offset=step,
        event=rng.integers(1, 2**63, m).astype(np.uint64),
        t_ms=now_ms - (_EVENTS_EACH - step) * 3_600_000,
        type=np.full(m, TYPE_CODE["click"], dtype=np.uint8),
        weight=np.ones(m, dtype=np.float32),
        item=items,
        category=np.zeros(m, dtype=np.uint64),
        vector=vectors[(items % np.uint64(256)).astype(np.int64)],
        resolved=np.ones(m, dtype=bool),
        text=np.zeros(m, dtype=bool),
        spend=np.zeros(m),
        foreign=np.zeros(m, dtype=bool),
    )


def _gets(settings: Settings, users: Sequence[str]) -> list[float]:
    with ProfileReader(settings.redis.url, settings.namespace) as reader:
        return _timed(lambda i: reader.get(users[i % len(users)]), 10 * _ASKED)


# --- catalogue -----------------------------------------------------------------------------


def catalogue(share: float) -> str:
    """Bytes of an item, items put per second, nearest items, and the worker's table."""
    head = [
        "items", "bytes each in Redis", "put and indexed/s", "10 nearest, p50", "p99",
        "of the true 10", "a worker looks 4,096 up in", "its table",
    ]  # fmt: skip
    return report.table(head, [_of_items(max(100, int(n * share))) for n in _ITEMS])


def _of_items(n: int) -> list[str]:
    vectors, space = _clustered(n), f"{_SPACE:016x}"
    with _a_redis() as (client, settings):
        before = _used(client)
        begin_s = time.perf_counter()
        ids = _put(client, settings, space, vectors)
        seconds = time.perf_counter() - begin_s
        each = (_used(client) - before) / n
        with ProfileReader(settings.redis.url, settings.namespace) as reader:

            def near(row: int) -> list[NearestItem]:
                return reader.items_near(vectors[row % n], space)

            near_ms = _timed(near, _ASKED)
            rows = range(0, n, max(1, n // 50))
            found = np.mean([_overlap(near(row), ids, vectors, row) for row in rows])
    look_ms, table_mb = _table(n, vectors)
    return [
        f"{n:,}", f"{each:,.0f}", f"{n / seconds:,.0f}", *_p50_p99(near_ms), f"{found:.3f}",
        f"{np.median(look_ms):.2f} ms", f"{table_mb:,.0f} MB",
    ]  # fmt: skip


def _clustered(n: int) -> Any:
    """(n, D) unit vectors in a thousand clusters, as a shop's items lie in kinds."""
    rng = np.random.default_rng(2)
    kinds = rng.standard_normal((1000, _DIMENSIONS)).astype(np.float32)
    vectors = kinds[rng.integers(0, 1000, n)]
    vectors += 0.7 * rng.standard_normal((n, _DIMENSIONS)).astype(np.float32)
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def _put(client: Redis, settings: Settings, space: str, vectors: Any) -> list[str]:
    store = ItemStore(client, Keys(settings.namespace))
    ids = [f"item-{i}" for i in range(len(vectors))]
    for start in range(0, len(ids), _AT_ONCE):
        part = slice(start, start + _AT_ONCE)
        records = [ItemRecord(i, f"Article {i} of a shop", ("Kind", "Sort")) for i in ids[part]]
        versions = [text_version(record.title) for record in records]
        store.put(records, versions, [None] * len(records))
        store.put_vectors(space, ids[part], versions, vectors[part])
    return ids


def _overlap(near: Sequence[Any], ids: Sequence[str], vectors: Any, row: int) -> float:
    """The share of the true ten nearest that an index found."""
    best = np.argpartition(-(vectors @ vectors[row]), 9)[:10]
    return len({ids[i] for i in best} & {each.item_id for each in near}) / 10


def _table(n: int, vectors: Any) -> tuple[list[float], float]:
    """Look-ups of a micro-batch's items in ms, and the table's megabytes."""
    table = ItemTable(max(n, 1), _DIMENSIONS)
    keys = [key64(f"item-{i}") for i in range(n)]
    before = watching.resident_mb(os.getpid())
    for start in range(0, n, _AT_ONCE):
        table.put(keys[start : start + _AT_ONCE], vectors[start : start + _AT_ONCE])
    grown = watching.resident_mb(os.getpid()) - before
    rng = np.random.default_rng(3)
    batches = [[keys[i] for i in rng.integers(0, n, _AT_ONCE).tolist()] for _ in range(8)]
    return _timed(lambda i: table.lookup(batches[i % 8]), 80), grown


# --- the rate of events, partitions, workers ------------------------------------------------


def rate(share: float) -> str:
    """Cores in use and freshness, as events become more."""
    rows = []
    with (
        pipeline.open_bench(fresh_s=0.0) as bench,
        _draining(bench, 1, {}, _BACKLOG * share) as run,
    ):
        run.drained()
        first = run.events
        for per_s in _RATES:
            load = watching.Load("spread", first, per_s * max(share, 0.1), _RATE_S)
            first += int(load.rate * load.seconds)
            rows.append(_of_rate(run, load))
    head = [
        "events/s", "fresh in, p50", "p99", "cores: worker", "Redis", "broker", "all, an event",
    ]  # fmt: skip
    return report.table(head, rows)


def _of_rate(run: _Run, load: watching.Load) -> list[str]:
    began: dict[str, float] = {}
    probes = watching.freshness(
        run.client, run.workers[0], run.settings.kafka.client_config(),
        run.settings.namespace, load, pipeline.probe_of(run.penchant, run.settings),
        shoppers=f"probe-{load.first}", began=lambda: began.update(run.spent()),
    )  # fmt: skip
    seconds = load.seconds * (1 - watching.SETTLING)  # what came later belongs to these events, too
    used = {name: (now_s - began[name]) / seconds for name, now_s in run.spent().items()}
    return [
        f"{load.rate:,.0f}",
        *(f"{np.percentile([p.fresh_ms for p in probes], q):,.0f} ms" for q in (50, 99)),
        *(f"{used[name]:.2f}" for name in ("worker 1", "redis", "broker")),
        f"{1e6 * sum(used.values()) / load.rate:.1f} us",
    ]


def partitions(share: float) -> str:
    """A backlog worked off, from one partition to many."""
    rows = []
    with pipeline.open_bench(fresh_s=0.0) as bench:
        for count in _PARTITIONS:
            with _draining(bench, 1, {"KAFKA_PARTITIONS": str(count)}, _BACKLOG * share) as run:
                rows.append([f"{count}", *_drained_row(run)])
    return report.table(["partitions", *_DRAINED], rows)


def workers(share: float) -> str:
    """A backlog worked off by one worker and by several, on the same cores."""
    rows = []
    with pipeline.open_bench(fresh_s=0.0) as bench:
        for count in _WORKERS:
            with _draining(bench, count, {}, _LONG_BACKLOG * share) as run:
                rows.append([f"{count}", *_drained_row(run)])
    return report.table(["workers", *_DRAINED], rows)


_DRAINED: Final = ["events/s", "CPU of an event: workers", "Redis", "broker", "memory of a worker"]


def _drained_row(run: _Run) -> list[str]:
    drained = run.drained()
    each = {name: 1e6 * spent / drained.events for name, spent in drained.cpu_s.items()}
    of_workers = sum(us for name, us in each.items() if name.startswith("worker"))
    memory = max(watching.peak_mb(worker.pid) for worker in run.workers)
    return [
        f"{drained.rate:,.0f}", f"{of_workers:.1f} us", f"{each['redis']:.1f} us",
        f"{each['broker']:.1f} us", f"{memory:,.0f} MB",
    ]  # fmt: skip


class _Run:
    """Workers on a topic that is full already."""

    penchant = next(p for p in pipeline.PIPELINES if p.name == "Penchant")

    def __init__(
        self,
        client: Redis,
        settings: Settings,
        work: workloads.Workload,
        workers: list[watching.PipelineProcess],
        servers: dict[str, int],
    ) -> None:
        self.client, self.settings, self.workers = client, settings, workers
        self.events = len(work.records)
        self._servers = servers

    @property
    def pids(self) -> dict[str, int]:
        own = {f"worker {i + 1}": worker.pid for i, worker in enumerate(self.workers)}
        return own | self._servers

    def spent(self) -> dict[str, float]:
        """CPU seconds so far, by process."""
        return {name: watching.cpu_s(pid) for name, pid in self.pids.items()}

    def drained(self) -> watching.Drained:
        """From the first events that are done, or from now if there are some, to the last: by the
        marks of partitions in Redis, below which all is saved."""
        marks = Keys(self.settings.namespace).marks()

        def done() -> int:
            return sum(map(int, self.client.hvals(marks)))

        self._wait(lambda: done() > 0)
        first, before, begin_s = done(), self.spent(), time.perf_counter()
        self._wait(lambda: done() >= self.events)
        seconds = time.perf_counter() - begin_s
        spent = {name: now_s - before[name] for name, now_s in self.spent().items()}
        if (
            counted := pipeline.counted_by(self.client, self.penchant, self.settings.namespace)
        ) != self.events:
            raise SystemExit(f"{counted:,} of {self.events:,} events are counted")
        return watching.Drained(self.events - first, seconds, spent)

    def _wait(self, reached: Callable[[], bool]) -> None:
        while not reached():
            for worker in self.workers:
                worker.check()
            time.sleep(0.005)


@contextlib.contextmanager
def _draining(
    bench: pipeline.Bench, count: int, more: dict[str, str], events: float
) -> Iterator[_Run]:
    """A topic that was full before its workers started, all of which have partitions."""
    with (
        bench.shop(more) as (settings, environment),
        Redis.from_url(bench.redis.url) as client,
        contextlib.ExitStack() as started,
    ):
        work = workloads.make("spread", bench.data, int(events), settings.kafka.partitions)
        watching.produce(settings.kafka.client_config(), settings.namespace, work.records)
        workers = [
            started.enter_context(
                watching.PipelineProcess(
                    (sys.executable, *_Run.penchant.command),
                    {**environment, "STREAM_DATA_DIR": str(bench.folder / f"worker-{i}")},
                    bench.folder / f"{settings.namespace}-{i}.log",
                )
            )
            for i in range(count)
        ]
        if count > 1:
            _wait_for_members(settings, workers)
        servers = {"broker": pipeline.pid(bench.kafka), "redis": pipeline.pid(bench.redis)}
        yield _Run(client, settings, work, workers, servers)


def _wait_for_members(settings: Settings, workers: Sequence[watching.PipelineProcess]) -> None:
    """Until each worker has partitions."""
    admin, group = AdminClient(settings.kafka.client_config()), settings.topic("updater")
    deadline_s = time.monotonic() + 120
    while time.monotonic() < deadline_s:
        for worker in workers:
            worker.check()
        members = admin.describe_consumer_groups([group])[group].result().members
        if sum(bool(m.assignment.topic_partitions) for m in members) == len(workers):
            return
        time.sleep(0.5)
    raise SystemExit(f"{len(workers)} workers did not share the partitions of {group}")


# --- shared ---------------------------------------------------------------------------------


@contextlib.contextmanager
def _a_redis() -> Iterator[tuple[Redis, Settings]]:
    with (
        tempfile.TemporaryDirectory() as folder,
        RedisServer(Path(folder), options={"save": '""'}) as server,
        Redis.from_url(server.url) as client,
        pipeline.in_environment(
            {"REDIS_URL": server.url, "NAMESPACE": f"bench-{uuid.uuid4().hex[:8]}"}
        ),
    ):
        yield client, Settings()


def _used(client: Redis) -> int:
    return int(client.info("memory")["used_memory"])


def _p50_p99(ms: Sequence[float]) -> list[str]:
    return [f"{np.percentile(ms, q):.2f} ms" for q in (50, 99)]


def _timed(call: Callable[[int], object], times: int) -> list[float]:
    """Of each call but the first, ms."""
    call(0)
    found = []
    for i in range(1, times + 1):
        begin_s = time.perf_counter()
        call(i)
        found.append((time.perf_counter() - begin_s) * 1000)
    return found


PARTS: Final[dict[str, Part]] = {
    "shoppers": shoppers,
    "catalogue": catalogue,
    "rate": rate,
    "partitions": partitions,
    "workers": workers,
}


if __name__ == "__main__":
    main()
