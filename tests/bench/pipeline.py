"""Penchant beside other pipelines of Python: one run, one broker, one Redis, the same events.

    python -m tests.bench                three repeats; writes the tables into docs/performance.md
    python -m tests.bench --quick        one short repeat, to see that it works; writes nothing

Prints and never asserts. In each repeat every pipeline starts as a process of its own on a topic
that is full already; it is measured from the first event that can be read in Redis to the last.
Then, in the first repeat, events are produced live at shares of the rate it just reached, and
probes measure freshness.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import shutil
import sys
import tempfile
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final

import numpy as np
from redis import Redis

from model.engine import Engine
from model.releases import build_base, make_current
from model.text import text_version
from profiles.items import ItemStore
from profiles.schema import ItemRecord, Keys, key64
from stream import datasets
from stream.apache_kafka import ApacheKafka
from stream.events import Click
from stream.local_servers import RedisServer
from stream.settings import Settings
from stream.topics import create_topics
from tests.foretelling import build_foretelling_release

from . import ceilings, report, rivals, watching, workloads

ROOT: Final = Path(__file__).resolve().parents[2]
RELEASES: Final = ROOT / ".penchant/bench/releases"
WORKLOADS: Final = ("bursty", "spread")
LOADS: Final = (0.2, 0.5, 0.8)
"""Of the rate at which a pipeline worked off its backlog, while nothing was produced beside it."""


@dataclass(frozen=True)
class Pipeline:
    """One way to get from events to profiles."""

    name: str
    command: tuple[str, ...]
    """Arguments of Python."""
    events: Mapping[str, int]
    """How many it is given, by workload: enough for about ten seconds."""
    profile_key: str
    """Of one shopper; `%s` twice: the namespace and the shopper."""
    settings: Mapping[str, str]
    packages: str = ""
    """Of `rivals`, which it needs and Penchant does not."""


_BATCHED: Final = {"bursty": 60_000, "spread": 60_000}
_ENCODED: Final = {"bursty": 4_000, "spread": 4_000}
_PLAIN_KEY: Final = "%s:plain:%s"
_FAUST: Final = ("-m", "tests.bench.rivals.plain_faust", "worker", "--without-web")
PIPELINES: Final = (
    Pipeline("plain Faust", _FAUST, _ENCODED, _PLAIN_KEY, {"BENCH_CACHE": "0"}),
    Pipeline("plain Faust, items cached", _FAUST, _BATCHED, _PLAIN_KEY, {"BENCH_CACHE": "1"}),
    Pipeline(
        "Quix Streams, items cached",
        ("-m", "tests.bench.rivals.quix"),
        _BATCHED,
        _PLAIN_KEY,
        {"BENCH_CACHE": "1"},
        packages="quix",
    ),
    Pipeline(
        "Bytewax, items cached",
        ("-m", "bytewax.run", "tests.bench.rivals.bytewax_flow"),
        _BATCHED,
        _PLAIN_KEY,
        {"BENCH_CACHE": "1"},
        packages="bytewax",
    ),
    Pipeline(
        "Penchant",
        ("-m", "stream.cli", "updater"),
        {"bursty": 600_000, "spread": 400_000},
        "%s:profile:{%s}",
        {},
    ),
)


@dataclass(frozen=True)
class Reading:
    """One pipeline on one workload, once."""

    pipeline: str
    workload: str
    events: int
    counted: int  # events that the profiles say they hold
    rate: float  # events/s
    fresh_ms: Mapping[float, list[float]]
    """Share of that rate -> one per probe; empty but in the first repeat."""
    cpu_s: dict[str, float]  # per million events, of worker, broker, Redis
    peak_mb: float  # of the worker


Items = Mapping[str, tuple[ItemRecord, np.ndarray[Any, Any]]]
"""Id -> record and vector."""


@dataclass(frozen=True)
class Bench:
    """What all readings share."""

    data: datasets.Dataset
    kafka: ApacheKafka
    redis: RedisServer
    folder: Path
    texts: Mapping[str, str]
    items: Items
    space: str
    fresh_s: float

    @contextlib.contextmanager
    def shop(
        self, more: Mapping[str, str] | None = None
    ) -> Iterator[tuple[Settings, dict[str, str]]]:
        """Topics and an empty Redis of one reading; its settings, also as an environment.
        `more` of them."""
        environment = {
            "NAMESPACE": f"bench-{uuid.uuid4().hex[:8]}",
            "KAFKA_BOOTSTRAP": self.kafka.bootstrap,
            "REDIS_URL": self.redis.url,
            "MODEL_RELEASES": str(RELEASES),
            "STREAM_DATA_DIR": str(self.folder / "penchant"),
            "BENCH_CATALOGUE": str(self.folder / "catalogue.json"),
            "BENCH_VECTORS": str(self.folder / "vectors.npy"),
            "BENCH_DATA_DIR": str(self.folder / "faust"),
            **(more or {}),
        }
        with in_environment(environment):
            settings = Settings()
        create_topics(settings)
        with Redis.from_url(self.redis.url) as client:
            client.flushall()
            self._store_items(client, settings.namespace)
        yield settings, environment

    def _store_items(self, client: Redis, namespace: str) -> None:
        """The catalogue with its vectors, so that no pipeline encodes an item for the first time
        while it is measured."""
        store = ItemStore(client, Keys(namespace))
        records = [record for record, _ in self.items.values()]
        versions = [text_version(self.texts[record.item_id]) for record in records]
        store.put(records, versions, [None] * len(records))
        vectors = np.stack([vector for _, vector in self.items.values()])
        store.put_vectors(self.space, list(self.items), versions, vectors)
        names = {key64(r.category_name): r.category_name for r in records if r.category_name}
        store.name_categories(names)


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    arguments.add_argument("--quick", action="store_true", help="one short repeat, nothing written")
    arguments.add_argument("--repeats", type=int, default=3)
    arguments.add_argument("--only", default="", help="pipelines whose name holds this")
    arguments.add_argument("--workload", choices=WORKLOADS, help="this one only")
    options = arguments.parse_args()
    chosen = [p for p in PIPELINES if options.only in p.name]
    names = [options.workload] if options.workload else list(WORKLOADS)
    share, repeats = (0.05, 1) if options.quick else (1.0, options.repeats)
    with open_bench(fresh_s=6.0 if options.quick else 15.0) as bench:
        readings, tops = measure_all(bench, chosen, names, repeats, share)
    text = report.render(readings, tops, repeats, _command())
    print(text)
    if not (options.quick or options.only or options.workload):
        report.write(ROOT / "docs/performance.md", text)


def measure_all(
    bench: Bench, pipelines: Sequence[Pipeline], names: Sequence[str], repeats: int, share: float
) -> tuple[list[Reading], list[ceilings.Ceilings]]:
    """Every pipeline on every workload, in turn, so that a noisy minute spares none."""
    readings: list[Reading] = []
    tops: list[ceilings.Ceilings] = []
    for repeat in range(repeats):
        for name in names:
            for pipeline in pipelines:
                events = int(pipeline.events[name] * share)
                reading, top = measure(bench, pipeline, name, events, LOADS if not repeat else ())
                readings.append(reading)
                tops += top
                _say(f"{repeat + 1}/{repeats} {report.one_line(reading)}")
    return readings, tops


def measure(
    bench: Bench, pipeline: Pipeline, name: str, events: int, loads: Sequence[float]
) -> tuple[Reading, list[ceilings.Ceilings]]:
    """One reading; for Penchant on `spread` also the ceilings, of the same records and profiles."""
    with bench.shop() as (settings, environment), Redis.from_url(bench.redis.url) as client:
        work = workloads.make(name, bench.data, events, settings.kafka.partitions)
        kafka = settings.kafka.client_config()
        watching.produce(kafka, settings.namespace, work.records)
        keys = [pipeline.profile_key % (settings.namespace, u) for u in (*work.starts, *work.ends)]
        process = watching.PipelineProcess(
            (sys.executable, *pipeline.command),
            {**environment, **pipeline.settings, **rivals.environment(pipeline.packages)},
            bench.folder / f"{settings.namespace}.log",
        )
        with process:
            pids = {
                "worker": process.pid,
                "broker": pid(bench.kafka),
                "redis": pid(bench.redis),
            }
            at, total = len(work.starts), len(work.records)

            def counted() -> int:
                return counted_by(client, pipeline, settings.namespace)

            drained = watching.drain(client, process, pids, total, keys[:at], keys[at:], counted)
            in_all = watching.settled(counted, total)
            top = watching.Load(name, events, drained.rate, bench.fresh_s)
            fresh_ms = _fresh(pipeline, settings, client, process, top, loads)
            peak = watching.peak_mb(process.pid)
        million = drained.events / 1e6
        reading = Reading(
            pipeline=pipeline.name,
            workload=name,
            events=total,
            counted=in_all,
            rate=drained.rate,
            fresh_ms=fresh_ms,
            cpu_s={process: seconds / million for process, seconds in drained.cpu_s.items()},
            peak_mb=peak,
        )
        tops = []
        if name == "spread" and pipeline.name == "Penchant":
            users = list(dict.fromkeys(key.decode() for key, _ in work.records))
            tops = [ceilings.measure(settings, users, total, bench.space)]
    return reading, tops


def _fresh(
    pipeline: Pipeline,
    settings: Settings,
    client: Redis,
    process: watching.PipelineProcess,
    top: watching.Load,
    loads: Sequence[float],
) -> dict[float, list[float]]:
    """Share of `top`'s rate -> how fresh each probe was."""
    fresh_ms: dict[float, list[float]] = {}
    load = replace(top, rate=0.0)
    for share in loads:
        first = load.first + int(load.rate * load.seconds)
        load = replace(top, first=first, rate=top.rate * share)
        probes = watching.freshness(
            client, process, settings.kafka.client_config(), settings.namespace, load,
            probe_of(pipeline, settings), shoppers=f"probe-{100 * share:.0f}",
        )  # fmt: skip
        fresh_ms[share] = [probe.fresh_ms for probe in probes]
    return fresh_ms


def counted_by(client: Redis, pipeline: Pipeline, namespace: str) -> int:
    """The events that all profiles say they hold, to see that none was lost or counted twice."""
    field = "glance" if pipeline.name == "Penchant" else "events"
    keys = list(client.scan_iter(pipeline.profile_key % (namespace, "*"), count=10_000))
    total = 0
    for begin in range(0, len(keys), 10_000):
        asking = client.pipeline(transaction=False)
        for key in keys[begin : begin + 10_000]:
            asking.hget(key, field)
        for raw in asking.execute():
            total += json.loads(raw)["events"] if field == "glance" else int(raw)
    return total


def probe_of(pipeline: Pipeline, settings: Settings) -> tuple[str, bytes]:
    """What `watching.freshness` asks with."""
    event = Click(user_id="%s", item_id="1", ts=int(time.time() * 1000), event_id="%s")
    value = event.to_json().replace(b',"event_id":"%s"', b"")
    return pipeline.profile_key % (settings.namespace, "%s"), value


def pid(server: ApacheKafka | RedisServer) -> int:
    identity = server.processes[0].identity
    assert identity is not None
    return identity.pid


@contextlib.contextmanager
def open_bench(fresh_s: float) -> Iterator[Bench]:
    """Broker, Redis and the catalogue, encoded once."""
    data = datasets.load("movielens")
    texts = workloads.texts(data)
    _say("building the release and encoding the catalogue")
    release = build_base(RELEASES, "bundled", list(texts.values()), 128, now=datetime.now(UTC))
    # As a shop's is that has learned: outlooks are computed beside the fold.
    release = build_foretelling_release(release, 0, events=50, layers=2)
    make_current(release)
    vectors = Engine(release).encode(list(texts.values()))
    items = {
        item.item_id: (ItemRecord(item.item_id, item.title, tuple(item.category)), vector)
        for item, vector in zip(data.items, vectors, strict=True)
    }
    folder = Path(tempfile.mkdtemp(prefix="penchant-bench-"))
    try:
        (folder / "catalogue.json").write_text(json.dumps(texts), encoding="utf-8")
        np.save(folder / "vectors.npy", vectors)
        # A broker as a shop would run it: compiled in all tiers, not for a quick start.
        with (
            ApacheKafka(folder / "kafka", fast_start=False) as kafka,
            RedisServer(folder / "redis") as server,
        ):
            yield Bench(data, kafka, server, folder, texts, items, release.space, fresh_s)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@contextlib.contextmanager
def in_environment(values: Mapping[str, str]) -> Iterator[None]:
    import os

    before = dict(os.environ)
    os.environ.update(values)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


def _command() -> str:
    return " ".join(["python -m tests.bench", *sys.argv[1:]])


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
