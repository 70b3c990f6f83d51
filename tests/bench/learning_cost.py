"""What learning costs: a whole turn, and an updater that has a trainer beside it.

    python -m tests.bench.learning_cost                 a turn on 200,000 windows, and the updater
    python -m tests.bench.learning_cost --windows 5000 --events 20000 --repeats 1      small
    python -m tests.bench.learning_cost --dataset online-retail --path FILE [--path FILE]

The turn is `penchant learn` with its default settings, in a process of its own, on an archive of
the simulated shop (or of a recorded set): read, label, encode, train, judge, publish. Then the
updater works off a full topic by turns alone, beside a trainer in the middle of its training, and
beside one that is as nice as `penchant trainer` makes it. Prints and never asserts; `--write` puts
the tables into docs/swaps.md.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import wraps
from itertools import islice
from pathlib import Path
from typing import Any, Final

import redis

from model.releases import build_base, make_current
from model.text import text_version
from profiles.items import ItemStore
from profiles.schema import ItemRecord, Keys
from stream import learning, learning_material
from stream.archive import Archive, Folder, Pending
from stream.base_release import texts_of
from stream.datasets import load
from stream.events import Event, Item
from stream.local_servers import RedisServer
from stream.settings import Settings
from stream.simulated_shop import Shop, Spec
from stream.simulation import Simulated

from . import pipeline, report, watching, workloads

SHOPPERS: Final = 500  # 200,000 of their events are some two months: labels need time to pass
NICE: Final = 10  # as `penchant trainer` runs its turns
_BATCH: Final = 16_384
_PHASES: Final = (
    (learning_material, "labelled", "read and label"),
    (learning_material, "features_of", "encode the catalogue"),
    (learning, "_train", "train"),
    (learning, "_compare", "compare the networks"),
    (learning, "_fit_ranker", "fit and compare the rankers"),
    (learning, "_publish", "publish"),
)


@dataclass(frozen=True)
class Turn:
    """What a turn took."""

    windows: int
    accepted: bool
    seconds: dict[str, float]  # by phase
    cpu_s: float
    epochs: float  # done; fewer than asked for where it stopped early
    peak_mb: float

    @property
    def total_s(self) -> float:
        """All phases."""
        return sum(self.seconds.values())


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--windows", type=int, default=200_000)
    parser.add_argument("--dataset", help="a recorded set in place of the simulated shop")
    parser.add_argument("--path", type=Path, action="append")
    parser.add_argument("--events", type=int, default=200_000, help="for the updater; 0: no part")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--turn", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--write", action="store_true", help="into docs/swaps.md")
    given = parser.parse_args()
    if given.turn:
        print(json.dumps(_take_turn()), flush=True)
        return
    with tempfile.TemporaryDirectory() as name, RedisServer(Path(name) / "redis") as server:
        folder = Path(name)
        if given.dataset:
            data = load(given.dataset, given.path)
            source = f"{data.name}, the newest events"
            skipped = max(len(data.events) - given.windows, 0)
            events: Iterator[Event] = islice(data.events, skipped, None)
            items = list(data.items)
        else:
            shop = Simulated(Shop(Spec(shoppers=SHOPPERS, days=0)))
            source, events, items = "simulated shop", iter(shop.events), list(shop.items)
        environment = prepare(folder, server.url, events, items, given.windows)
        turn = _measured_turn(folder, environment)
        parts = [_turn_table(turn, source, len(items))]
        _say(parts[0])
        if given.events:
            rates = beside(folder, environment, given.events, given.repeats)
            parts.append(_beside_table(rates, given.events))
    command = " ".join(["python -m tests.bench.learning_cost", *_words(given)])
    text = "\n\n".join([report.where(command), *parts])
    print(text)
    if given.write:
        report.write(report.ROOT / "docs/swaps.md", text, "learning")


def _words(given: argparse.Namespace) -> list[str]:
    words = [a for a in sys.argv[1:] if a != "--write"]
    short = {str(path): path.name for path in given.path or ()}
    return [short.get(word, word) for word in words]


# --- a turn


def prepare(
    folder: Path, redis_url: str, events: Iterator[Event], items: Sequence[Item], count: int
) -> dict[str, str]:
    """A shop that has run until `count` of its events had a weight, and so are windows; the
    settings of its trainer, as an environment."""
    pending, windows = Pending(source=1, partition=0, first=0, next=0), 0
    while windows < count and (batch := list(islice(events, min(_BATCH, count - windows)))):
        offsets = range(pending.next, pending.next + len(batch))
        pending.add(offsets, batch, offsets.stop)
        # Some reviews have no weight, so a few windows more than asked for.
        windows += sum(event.type not in ("impression", "review") for event in batch)
    _say(f"{pending.next:,} events archived")
    Archive(Folder(folder / "archive")).write(pending)
    environment = {
        "NAMESPACE": "learning-cost",
        "REDIS_URL": redis_url,
        "MODEL_RELEASES": str(folder / "releases"),
        "STREAM_DATA_DIR": str(folder / "data"),
        "ARCHIVE_URL": str(folder / "archive"),
    }
    texts = texts_of(items)
    with redis.Redis.from_url(redis_url) as client:
        records = [
            ItemRecord(
                i.item_id,
                i.title,
                tuple(i.category),
                i.brand or "",
                description=i.description or "",
            )
            for i in items
        ]
        ItemStore(client, Keys(environment["NAMESPACE"])).put(
            records, [text_version(text) for text in texts], [None] * len(records)
        )
    _say("encoding the catalogue for a base release")  # minutes on a busy machine
    now = datetime.now(UTC)
    make_current(build_base(folder / "releases", "bundled", texts, 128, device="cpu", now=now))
    return environment


def _take_turn() -> dict[str, Any]:
    """In the child: learn, and what it took."""
    seconds: dict[str, float] = {}
    for module, name, phase in _PHASES:
        setattr(module, name, _timed(getattr(module, name), phase, seconds))
    share, training = 0.0, False

    def progress(stage: str, done: int, of: int) -> None:
        nonlocal share, training
        if stage == "train" and not training:
            print(stage, flush=True)  # for who waits until it trains
            training = True
        share = done / of

    settings = Settings()
    items = ItemStore(settings.redis.connection().open(), Keys(settings.namespace))
    began_s = time.perf_counter()
    outcome = learning.learn(settings, items, datetime.now(UTC), progress)
    seconds["the rest"] = time.perf_counter() - began_s - sum(seconds.values())
    assert outcome is not None  # None is for one of several processes
    return {
        "windows": outcome.windows,
        "accepted": outcome.release is not None,
        "seconds": seconds,
        "cpu_s": time.process_time(),
        "epochs": share * settings.learn.epochs,
        "peak_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
    }


def _timed(work: Callable[..., Any], phase: str, seconds: dict[str, float]) -> Callable[..., Any]:
    @wraps(work)
    def timed(*given: Any, **named: Any) -> Any:
        began_s = time.perf_counter()
        try:
            return work(*given, **named)
        finally:
            seconds[phase] = time.perf_counter() - began_s
            print(f"{phase}: {seconds[phase]:.1f} s", file=sys.stderr, flush=True)

    return timed


def _measured_turn(folder: Path, environment: dict[str, str]) -> Turn:
    with _trainer(folder / "turn.log", environment, 0) as child:
        assert child.stdout is not None
        said = [line.strip() for line in child.stdout]
    if child.returncode:
        raise SystemExit((folder / "turn.log").read_text(encoding="utf-8"))
    return Turn(**json.loads(said[-1]))


@contextmanager
def _trainer(
    log: Path, environment: dict[str, str], niceness: int
) -> Iterator[subprocess.Popen[str]]:
    command = ["nice", "-n", str(niceness), sys.executable, "-m", "tests.bench.learning_cost"]
    with log.open("w") as errors:
        child = subprocess.Popen(
            [*command, "--turn"],
            env={**os.environ, **environment},
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
        )
    try:
        yield child
    finally:
        if child.poll() is None and child.stdout is not None and not child.stdout.closed:
            try:
                child.wait(5)
            except subprocess.TimeoutExpired:
                child.kill()
        child.wait()


# --- the updater beside it


def beside(
    folder: Path, environment: dict[str, str], events: int, repeats: int
) -> dict[str, list[float]]:
    """Events per second of the updater, by what runs beside it; one after the other, in turns."""
    found: dict[str, list[float]] = {}
    with (
        pipeline.open_bench(fresh_s=0.0) as bench,
        _training(folder, environment, 0) as trainer,
        _training(folder, environment, NICE) as nice_trainer,
    ):
        neighbours = {
            "alone": None,
            "a trainer beside it": trainer,
            f"a trainer at nice {NICE}": nice_trainer,
        }
        for _ in range(repeats):
            for name, neighbour in neighbours.items():
                with _running(neighbour):
                    rate = _updater_rate(bench, events)
                found.setdefault(name, []).append(rate)
                _say(f"{name}: {rate:,.0f} events/s")
    return found


@contextmanager
def _training(
    folder: Path, environment: dict[str, str], niceness: int
) -> Iterator[subprocess.Popen[str]]:
    """A trainer in the middle of its training, stopped until it is wanted."""
    own = {
        **environment,
        "STREAM_DATA_DIR": str(folder / f"data-{niceness}"),
        "LEARN_EPOCHS": "1000",  # it does not end before the readings do
        "LEARN_SEED": str(niceness + 1),
    }
    with _trainer(folder / f"trainer-{niceness}.log", own, niceness) as child:
        assert child.stdout is not None
        for line in child.stdout:
            if line.strip() == "train":
                break
        else:
            log = folder / f"trainer-{niceness}.log"
            raise SystemExit(f"the trainer ended: {log.read_text(encoding='utf-8')}")
        child.send_signal(signal.SIGSTOP)
        try:
            yield child
        finally:
            child.kill()


@contextmanager
def _running(trainer: subprocess.Popen[str] | None) -> Iterator[None]:
    if trainer is None:
        yield
        return
    trainer.send_signal(signal.SIGCONT)
    try:
        yield
        if trainer.poll() is not None:
            raise SystemExit("the trainer ended while the updater was measured")
    finally:
        trainer.send_signal(signal.SIGSTOP)


def _updater_rate(bench: pipeline.Bench, events: int) -> float:
    """Events per second of Penchant on `spread`."""
    (ours,) = (p for p in pipeline.PIPELINES if p.name == "Penchant")
    with bench.shop() as (settings, environment), redis.Redis.from_url(bench.redis.url) as client:
        work = workloads.make("spread", bench.data, events, settings.kafka.partitions)
        watching.produce(settings.kafka.client_config(), settings.namespace, work.records)
        keys = [ours.profile_key % (settings.namespace, u) for u in (*work.starts, *work.ends)]
        log = bench.folder / f"{settings.namespace}.log"
        at, total = len(work.starts), len(work.records)
        with watching.PipelineProcess((sys.executable, *ours.command), environment, log) as process:
            return watching.drain(
                client,
                process,
                {"worker": process.pid},
                total,
                keys[:at],
                keys[at:],
                lambda: pipeline.counted_by(client, ours, settings.namespace),
            ).rate


# --- as Markdown


def _turn_table(turn: Turn, source: str, items: int) -> str:
    rows = [[phase, f"{seconds:,.1f} s"] for phase, seconds in turn.seconds.items()]
    rows.append(["all of it", f"{turn.total_s:,.0f} s (CPU {turn.cpu_s:,.0f} s)"])
    train_s = turn.seconds["train"]
    rows.append(["peak memory", f"{turn.peak_mb / 1024:.2f} GiB"])
    rows.append(
        [
            "windows/s in training",
            f"{turn.windows * turn.epochs / train_s:,.0f} ({turn.epochs:.1f} epochs)",
        ]
    )
    verdict = "accepted" if turn.accepted else "refused"
    return (
        f"A turn on {turn.windows:,} windows ({source}) and {items:,} items; the gate {verdict} "
        "what came of it.\n\n" + report.table(["phase", ""], rows)
    )


def _beside_table(rates: dict[str, list[float]], events: int) -> str:
    alone = rates["alone"]
    rows = [
        [
            name,
            f"{statistics.median(each):,.0f} ({min(each):,.0f} to {max(each):,.0f})",
            f"{statistics.median(a / b for a, b in zip(each, alone, strict=True)):.0%}",
        ]
        for name, each in rates.items()
    ]
    return (
        f"The updater on `spread`, {events:,} events, medians of {len(alone)} readings taken in "
        "turns:\n\n" + report.table(["", "events/s (lowest to highest)", "of alone"], rows)
    )


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
