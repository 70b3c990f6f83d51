"""Two checkouts by turns on the same machine: `python -m tests.bench.turns TREE TREE`.

Each turn drains the same events of one workload, as `tests.bench` does, and tells events/s, the CPU
that an event took of each process, and how many cores these and all others kept busy: a turn beside
others' work is none. Prints and never asserts.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

from redis import Redis

from profiles.schema import Keys

from . import pipeline as bench
from . import watching, workloads


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    arguments.add_argument("trees", nargs="+", type=Path)
    arguments.add_argument("--turns", type=int, default=3)
    arguments.add_argument("--events", type=int, default=400_000)
    arguments.add_argument("--workload", choices=bench.WORKLOADS, default="spread")
    options = arguments.parse_args()
    told: dict[Path, list[dict[str, float]]] = {tree: [] for tree in options.trees}
    with bench.open_bench(0.0) as opened:
        work = workloads.make(options.workload, opened.data, options.events, _PARTITIONS)
        for turn in range(options.turns):
            # Who is first in one turn is last in the next.
            for tree in options.trees[:: 1 if turn % 2 else -1]:
                told[tree].append(_drain(opened, tree, work))
                print(tree.name, _line(told[tree][-1]), flush=True)
    for tree, readings in told.items():
        print("median", tree.name, _line({k: median(r[k] for r in readings) for k in readings[0]}))


_PARTITIONS = 12


def _drain(opened: bench.Bench, tree: Path, work: workloads.Workload) -> dict[str, float]:
    penchant = next(p for p in bench.PIPELINES if p.name == "Penchant")
    with opened.shop() as (settings, environment), Redis.from_url(opened.redis.url) as client:
        assert settings.kafka.partitions == _PARTITIONS
        watching.produce(settings.kafka.client_config(), settings.namespace, work.records)
        time.sleep(1)
        process = watching.PipelineProcess(
            (sys.executable, *penchant.command),
            {**environment, "PYTHONPATH": str(tree)},
            opened.folder / f"{settings.namespace}.log",
            tree,
        )
        with process:
            pids = {
                "worker": process.pid,
                "redis": bench.pid(opened.redis),
                "broker": bench.pid(opened.kafka),
            }

            marks, total = Keys(settings.namespace).marks(), len(work.records)
            _wait(process, lambda: _marked(client, marks) > 0)
            first, begin_s = _marked(client, marks), time.perf_counter()
            begin_cpu = {name: watching.cpu_s(pid) for name, pid in pids.items()}
            begin_busy_s = _busy_s()
            _wait(process, lambda: _marked(client, marks) >= total)
            seconds = time.perf_counter() - begin_s
            cpu_s = {name: watching.cpu_s(pid) - begin_cpu[name] for name, pid in pids.items()}
            others_s = _busy_s() - begin_busy_s - sum(cpu_s.values())
            if (events := bench.counted_by(client, penchant, settings.namespace)) != total:
                raise SystemExit(f"{tree}: {events} of {total} events")
            peak = watching.peak_mb(process.pid)
    drained = total - first
    return {
        "events/s": drained / seconds,
        **{f"{name} us": s / drained * 1e6 for name, s in cpu_s.items()},
        "cores": sum(cpu_s.values()) / seconds,
        "others' cores": others_s / seconds,
        "MB": peak,
    }


def _busy_s() -> float:
    """CPU time of all that runs on this machine."""
    first = Path("/proc/stat").read_text(encoding="ascii").partition("\n")[0].split()
    idle = int(first[4]) + int(first[5])
    return (sum(map(int, first[1:9])) - idle) / os.sysconf("SC_CLK_TCK")


def _marked(client: Redis, marks: str) -> int:
    """Events below all marks, all of which are saved."""
    return sum(map(int, client.hvals(marks)))


def _wait(process: watching.PipelineProcess, reached: Callable[[], bool]) -> None:
    while not reached():
        process.check()
        time.sleep(0.01)


def _line(reading: dict[str, float]) -> str:
    return "  ".join(f"{name} {value:,.2f}" for name, value in reading.items())


if __name__ == "__main__":
    main()
