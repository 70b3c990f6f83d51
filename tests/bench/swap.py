"""Swaps under load: a worker that serves half of what it can, and changes its release ten times.

    python -m tests.bench.swap                        ten swaps, a crash in an eleventh
    python -m tests.bench.swap --swaps 2 --seconds 12 --events 40000       to see that it works

One worker process, Apache Kafka, Redis, and real releases: a first training and fine-tunes of the
bundled encoder on MovieLens, each in a space of its own. At half of the rate that the worker just
reached, events of `--workload` come in and probes ask how long an event takes to be readable.
Each swap has a load of its own: some seconds steady, then CURRENT moves, the worker makes the
release ready, flips, and its sweeper moves everybody who did not come by. A probe counts to the
swap if it was sent, or not yet readable, between the pointer's move and the end of the sweep, and
to the steady time before it otherwise. Then a worker is killed in the middle of a swap, and
another one takes over. Prints and never asserts; `--write` puts it into docs/swaps.md.

The worker remembers as many profiles as there are shoppers in `spread`, and has met all of them
before the first swap: what memory grows by from there on is not theirs.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
import urllib.request
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import islice, pairwise
from pathlib import Path
from threading import Event
from typing import Final

import numpy as np
import redis
from prometheus_client.parser import text_string_to_metric_families

from model.releases import Release, make_current
from model.trainer import TrainSettings
from profiles.schema import Keys
from stream.processes import free_port
from stream.settings import Settings
from stream.sweeper import progress

from . import pipeline, report, watching, workloads
from .finetunes import borders, fine_tune, open_shop
from .watching import Probe

(_OURS,) = (p for p in pipeline.PIPELINES if p.name == "Penchant")
STEADY_SHARE: Final = 0.4  # of the measured time of a load, before the pointer moves
_PATIENCE_S: Final = 240.0


@dataclass(frozen=True)
class Memory:
    """Of the worker at one swap, in MB; the first two under load."""

    before: float
    peak: float
    after: float


@dataclass(frozen=True)
class Swap:
    """One swap, as it was seen from outside; times by perf_counter."""

    moved_s: float  # CURRENT
    flipped_s: float  # the worker says so
    swept_s: float
    memory: Memory
    probes: Sequence[Probe]

    def steady(self) -> list[float]:
        """Of the probes that were read before it began."""
        return [p.fresh_ms for p in self.probes if p.sent_s + p.fresh_ms / 1000 < self.moved_s]

    def during(self) -> list[float]:
        """Of those that met it."""
        met = [p for p in self.probes if p.sent_s + p.fresh_ms / 1000 >= self.moved_s]
        return [p.fresh_ms for p in met if p.sent_s <= self.swept_s]


@dataclass(frozen=True)
class Flip:
    """What the worker's own clock says of a flip, in ms."""

    prepare_gap: float  # from the last batch prepared in the old space to the first in the new
    apply_gap: float


@dataclass(frozen=True)
class Crash:
    """A worker killed in the middle of a swap."""

    moved: int  # profiles that the sweep had moved
    back_s: float  # from the kill until the next worker has applied everything that waited
    swept: bool  # in the end


@dataclass(frozen=True)
class Run:
    """All of it."""

    workload: str
    rate: float  # events/s of the load
    profiles: int
    swaps: list[Swap]
    flips: list[Flip]
    gaps_ms: list[float]  # between batches of one space, applied one after the other
    crash: Crash
    sent: int
    counted: int


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--swaps", type=int, default=10)
    parser.add_argument("--workload", choices=pipeline.WORKLOADS, default="spread")
    parser.add_argument("--events", type=int, default=200_000, help="that the limit is taken from")
    parser.add_argument("--seconds", type=float, default=25.0, help="of the load of a swap")
    parser.add_argument("--write", action="store_true", help="into docs/swaps.md")
    given = parser.parse_args()
    with pipeline.open_bench(fresh_s=given.seconds) as bench:
        releases = _releases(bench, given.swaps + 1)
        run = measure(bench, releases, given.workload, given.events, given.seconds)
    command = " ".join(["python -m tests.bench.swap", *(a for a in sys.argv[1:] if a != "--write")])
    text = f"{report.where(command)}\n\n{render(run)}"
    print(text)
    if given.write:
        report.write(report.ROOT / "docs/swaps.md", text, "swap")


def _releases(bench: pipeline.Bench, count: int) -> list[Release]:
    """A first training, and fine-tunes of it, one epoch each: what moves matters, not how good."""
    _say(f"training {count + 1} releases")
    shop = open_shop(bench.data, bench.folder)
    settings = TrainSettings(epochs=1, device="cpu")
    ends = borders(shop, count)
    chain = [t.release for t in fine_tune(shop, bench.folder / "training", ends, settings)]
    make_current(chain[0])
    return chain


def measure(
    bench: pipeline.Bench, chain: Sequence[Release], workload: str, events: int, seconds: float
) -> Run:
    """The limit, a swap under half of it for each release but the last, and the crash."""
    bench = replace(bench, space=chain[0].space, items=_items_of(bench, chain[0]))
    with bench.shop() as (settings, environment), redis.Redis.from_url(bench.redis.url) as client:
        port = free_port()
        environment = {
            **environment,
            "MODEL_RELEASES": str(chain[0].path.parent),
            "STREAM_METRICS_PORT": str(port),
            "STREAM_CACHED_PROFILES": str(workloads.SPREAD_SHOPPERS),
        }
        clock = bench.folder / "clock.jsonl"
        command = (sys.executable, "-m", "tests.bench.flips", str(clock))
        work = workloads.make(workload, bench.data, events, settings.kafka.partitions)
        watching.produce(settings.kafka.client_config(), settings.namespace, work.records)
        keys = [_OURS.profile_key % (settings.namespace, u) for u in (*work.starts, *work.ends)]
        at, sent = len(work.starts), len(work.records)

        def counted() -> int:
            return pipeline.counted_by(client, _OURS, settings.namespace)

        seen = _Watch(client, settings, port)
        swaps: list[Swap] = []
        worker = watching.PipelineProcess(command, environment, bench.folder / "worker.log")
        with worker:
            pids = {"worker": worker.pid}
            drained = watching.drain(client, worker, pids, sent, keys[:at], keys[at:], counted)
            load = watching.Load(workload, events, drained.rate / 2, seconds)
            _say(f"{drained.rate:,.0f} events/s; the load is {load.rate:,.0f}")
            loads = [
                replace(load, first=load.first + n * int(load.rate * seconds))
                for n in range(len(chain))
            ]
            probe = pipeline.probe_of(_OURS, settings)
            for number, release in enumerate(chain[1:-1]):
                swap = _swap(seen, worker, settings, loads[number], probe, release, number)
                swaps.append(swap)
                _say(_line(swap, number + 1))
            sent += sum(_sent(swap, load) for swap in swaps)
            last = loads[-1]
            backlog = list(
                islice(workloads.stream(workload, bench.data, last.first), int(last.rate * 10))
            )
            ends = workloads.add_ends(backlog, "heir", settings.kafka.partitions)
            crash_s, moved = _kill(seen, worker, settings, backlog, chain[-1])
            sent += len(backlog)
        gaps, flips = _gaps(clock)
        heir = watching.PipelineProcess(command, environment, bench.folder / "heir.log")
        with heir:
            waited_for = [_OURS.profile_key % (settings.namespace, user) for user in ends]
            _until(heir, lambda: client.exists(*waited_for) == len(ends))
            back_s = time.perf_counter() - crash_s
            _until(heir, lambda: seen.swept(chain[-1]))
            time.sleep(2)
            total, swept = counted(), seen.swept(chain[-1])
        profiles = seen.profiles()
    return Run(
        workload, load.rate, profiles, swaps, flips, gaps,
        Crash(moved, back_s, swept), sent, total,
    )  # fmt: skip


def _items_of(bench: pipeline.Bench, release: Release) -> pipeline.Items:
    """The catalogue's records with this release's vectors."""
    shipped = release.load_item_vectors()
    assert shipped is not None
    vectors = dict(zip(shipped.item_ids, shipped.vectors, strict=True))
    return {item: (record, vectors[item]) for item, (record, _) in bench.items.items()}


class _Watch:
    """What a worker shows."""

    def __init__(self, client: redis.Redis, settings: Settings, port: int) -> None:
        self.client, self._settings, self._port = client, settings, port
        self.keys = Keys(settings.namespace)

    def metric(self, name: str) -> float:
        """All labels together; 0 where it does not answer."""
        try:
            url = f"http://127.0.0.1:{self._port}/metrics"
            text = urllib.request.urlopen(url, timeout=5).read().decode()
        except OSError:
            return 0.0
        return sum(
            sample.value
            for family in text_string_to_metric_families(text)
            for sample in family.samples
            if sample.name in (name, f"{name}_total")
        )

    def swept(self, release: Release) -> bool:
        """Whether nobody is left in another space."""
        found = progress(self.client, self.keys, release.space)
        return found is not None and found.done

    def moved(self, release: Release) -> int:
        """Profiles that the sweep has moved so far."""
        found = progress(self.client, self.keys, release.space)
        return 0 if found is None else found.moved

    def profiles(self) -> int:
        """How many there are."""
        pattern = _OURS.profile_key % (self._settings.namespace, "*")
        return sum(1 for _ in self.client.scan_iter(pattern, count=10_000))


def _swap(
    seen: _Watch,
    worker: watching.PipelineProcess,
    settings: Settings,
    load: watching.Load,
    probe: tuple[str, bytes],
    release: Release,
    number: int,
) -> Swap:
    began = Event()

    def swap() -> tuple[float, float, float, float]:
        began.wait()
        time.sleep(load.seconds * 0.8 * STEADY_SHARE)
        before_mb = watching.resident_mb(worker.pid)
        watching.forget_peak(worker.pid)
        flips = seen.metric("penchant_releases_swapped")
        moved_s = time.perf_counter()
        make_current(release)
        _until(worker, lambda: seen.metric("penchant_releases_swapped") > flips)
        flipped_s = time.perf_counter()
        _until(worker, lambda: seen.swept(release))
        return before_mb, moved_s, flipped_s, time.perf_counter()

    with ThreadPoolExecutor(1) as aside:
        swapping = aside.submit(swap)
        probes = watching.freshness(
            seen.client,
            worker,
            settings.kafka.client_config(),
            settings.namespace,
            load,
            probe,
            f"probe-{number}",
            began.set,
        )
        before_mb, moved_s, flipped_s, swept_s = swapping.result()
    time.sleep(2)  # what moved the last profiles is let go
    memory = Memory(before_mb, watching.peak_mb(worker.pid), watching.resident_mb(worker.pid))
    return Swap(moved_s, flipped_s, swept_s, memory, probes)


def _sent(swap: Swap, load: watching.Load) -> int:
    """Events of the load of a swap: what its producer sends, its probes, and the one before."""
    probes_per_s = min(50.0, load.rate / 10)
    return int((load.rate - probes_per_s) * load.seconds) + len(swap.probes) + 1


def _kill(
    seen: _Watch,
    worker: watching.PipelineProcess,
    settings: Settings,
    backlog: Sequence[workloads.Record],
    release: Release,
) -> tuple[float, int]:
    """Kill it while its sweep is at work and records come in; when, and how many profiles had been
    moved by then."""
    flips = seen.metric("penchant_releases_swapped")
    with ThreadPoolExecutor(1) as aside:
        make_current(release)
        kafka = settings.kafka.client_config()
        sending = aside.submit(watching.produce, kafka, settings.namespace, backlog)
        _until(worker, lambda: seen.metric("penchant_releases_swapped") > flips)
        _until(worker, lambda: seen.moved(release) > 0 or seen.swept(release))
        worker.kill()
        at_s = time.perf_counter()
        sending.result()
    if seen.swept(release):
        _say("the sweep was over before the kill: this crash was none in the middle of a swap")
    return at_s, seen.moved(release)


def _until(worker: watching.PipelineProcess, holds: Callable[[], bool]) -> None:
    deadline_s = time.monotonic() + _PATIENCE_S
    while not holds():
        worker.check()
        if time.monotonic() > deadline_s:
            raise SystemExit(f"not within {_PATIENCE_S:.0f} s")
        time.sleep(0.05)


def _gaps(clock: Path) -> tuple[list[float], list[Flip]]:
    """Between batches applied one after the other in one space, and at each flip; ms."""
    lines = [json.loads(line) for line in clock.read_text(encoding="utf-8").splitlines()]
    steady: list[float] = []
    flips: dict[str, list[float]] = {"prepare": [], "apply": []}
    for stage, found in flips.items():
        batches = [line for line in lines if line[0] == stage]
        for (_, space, _, ended_s), (_, next_space, began_s, _) in pairwise(batches):
            gap_ms = (began_s - ended_s) * 1000
            if space != next_space:
                found.append(gap_ms)
            elif stage == "apply":
                steady.append(gap_ms)
    return steady, [Flip(*both) for both in zip(flips["prepare"], flips["apply"], strict=False)]


# --- as Markdown


def render(run: Run) -> str:
    """The tables."""
    head = [
        "swap", "steady p50, p99", "during p50, p99", "p99 of steady", "ready and flipped after",
        "swept after", "flip: prepare, apply", "memory before, at most, after",
    ]  # fmt: skip
    steady = [ms for swap in run.swaps for ms in swap.steady()]
    steady_p99 = float(np.percentile(steady, 99))
    rows = []
    for number, (swap, flip) in enumerate(zip(run.swaps, run.flips, strict=False), 1):
        rows.append(
            [
                str(number),
                _both(swap.steady()),
                _both(swap.during()),
                f"{np.percentile(swap.during(), 99) / steady_p99:.2f}",
                f"{swap.flipped_s - swap.moved_s:.1f} s",
                f"{swap.swept_s - swap.moved_s:.1f} s",
                f"{flip.prepare_gap:.1f}, {flip.apply_gap:.1f} ms",
                _told(swap.memory),
            ]
        )
    ratios = [np.percentile(swap.during(), 99) / steady_p99 for swap in run.swaps]
    during = [ms for swap in run.swaps for ms in swap.during()]
    memory = [swap.memory for swap in run.swaps]
    prepare, apply = ([getattr(f, n) for f in run.flips] for n in ("prepare_gap", "apply_gap"))
    rows.append(
        [
            "all",
            _both(steady),
            _both(during),
            f"median {statistics.median(ratios):.2f}",
            f"{statistics.median(s.flipped_s - s.moved_s for s in run.swaps):.1f} s",
            f"{statistics.median(s.swept_s - s.moved_s for s in run.swaps):.1f} s",
            f"{statistics.median(prepare):.1f}, {statistics.median(apply):.1f} ms",
            _told(
                Memory(*(statistics.median(getattr(m, n) for m in memory) for n in vars(memory[0])))
            ),
        ]
    )
    gap_p50, gap_p99 = np.percentile(run.gaps_ms, [50, 99])
    crash = run.crash
    return "\n\n".join(
        [
            f"`{run.workload}` at {run.rate:,.0f} events/s, {run.profiles:,} profiles.",
            report.table(head, rows),
            "A flip is the time between the last batch of the old release and the first of the "
            "new, by the worker's clock; between batches of one release it is "
            f"{gap_p50:.1f} ms at the median and {gap_p99:.1f} ms at p99 (apply).",
            _trend(memory),
            f"A worker killed with SIGKILL when its sweep had moved {crash.moved:,} profiles: "
            f"{crash.back_s:.0f} s later the next one had applied what waited; the sweep was "
            f"{'finished' if crash.swept else 'not finished'}. Events sent {run.sent:,}, counted "
            f"in profiles {run.counted:,}.",
        ]
    )


def _both(fresh_ms: Sequence[float]) -> str:
    p50, p99 = np.percentile(fresh_ms, [50, 99])
    return f"{p50:,.0f}, {p99:,.0f} ms"


def _told(memory: Memory) -> str:
    return f"{memory.before:,.0f}, {memory.peak:,.0f}, {memory.after:,.0f} MB"


def _trend(memory: Sequence[Memory]) -> str:
    """Whether swaps leave something behind, each like the one before."""
    text = (
        f"Memory before and at most is the worker's under load, with {workloads.SPREAD_SHOPPERS:,} "
        "profiles remembered before the first swap; after is once everybody is moved and the load "
        f"is over. Before the first swap it had {memory[0].before:,.0f} MB, before the last "
        f"{memory[-1].before:,.0f}, after the last {memory[-1].after:,.0f}."
    )
    half = memory[len(memory) // 2 :]
    if len(half) > 2:
        slope = np.polyfit(range(len(half)), [m.after for m in half], 1)[0]
        text += (
            f" Over the last {len(half)} swaps it changed by {slope:+.1f} MB from one to the next."
        )
    return text


def _line(swap: Swap, number: int) -> str:
    return (
        f"swap {number}: steady {_both(swap.steady())}, during {_both(swap.during())}, flipped "
        f"after {swap.flipped_s - swap.moved_s:.1f} s, swept after "
        f"{swap.swept_s - swap.moved_s:.1f} s, {_told(swap.memory)}"
    )


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
