"""Workers as the processes that they are, and what a test needs to push them around: a release
that encodes in no time, a wait for conditions, the group's position in its topics."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from confluent_kafka import Consumer, KafkaException, TopicPartition
from prometheus_client.parser import text_string_to_metric_families
from transformers import BertConfig, BertModel

from model.engine import Engine
from model.projection import Projection
from model.releases import Release, build_base, load_current, make_current, publish
from model.transition import Error, Transition
from stream.intake import Intake, MicroBatch
from stream.processes import free_port
from stream.settings import Settings
from stream.updater_app import (
    Patience,
    Pipeline,
    build_marks,
    build_outlooks,
    build_swapper,
    build_updater,
    find_topics,
)

REPOSITORY = Path(__file__).parents[2]
PATIENCE_S = 90.0  # a worker starts in 6 s on two idle cores, and cores are seldom idle

DIMENSIONS = 24
_LETTERS = "abcdefghijklmnopqrstuvwxyz0123456789"
_VOCABULARY = [
    "[PAD]",
    "[UNK]",
    "[CLS]",
    "[SEP]",
    "[MASK]",
    *_LETTERS,
    *("##" + letter for letter in _LETTERS),
    *"()>,.'-:&!",
]


def eventually(what: str, holds: Callable[[], Any], timeout_s: float = PATIENCE_S) -> Any:
    """The first true answer; a failure that says what was waited for."""
    deadline = time.monotonic() + timeout_s
    while not (answer := holds()):
        if time.monotonic() > deadline:
            raise AssertionError(f"not within {timeout_s:g} s: {what}")
        time.sleep(0.05)
    return answer


def build_tiny_release(folder: Path) -> Release:
    """A live release of a random BERT of 48 numbers a token, in `folder`/releases."""
    tower = folder / "tiny-bert"
    config = BertConfig(
        vocab_size=len(_VOCABULARY),
        hidden_size=48,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=48,
        max_position_embeddings=128,
    )
    with torch.random.fork_rng():
        torch.manual_seed(5)
        BertModel(config, add_pooling_layer=False).save_pretrained(tower)
    (tower / "vocab.txt").write_text("\n".join(_VOCABULARY), encoding="utf-8")
    settings = {"tokenizer_class": "BertTokenizer", "model_max_length": 128}
    (tower / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")
    release = build_base(
        folder / "releases", tower, [], DIMENSIONS, device="cpu", now=datetime.now(UTC)
    )
    make_current(release)
    return release


def build_turned_release(parent: Release, seed: int) -> Release:
    """A release whose space is its parent's, turned: its transition is exact, so a profile that
    went through it can be compared with one that was folded in the new space."""
    turn, _ = np.linalg.qr(np.random.default_rng(seed).standard_normal((DIMENSIONS,) * 2))
    turn = turn.astype(np.float32)
    old = Projection.load(parent.path / "projection.safetensors")
    exact = Error(items=1, held_out=True, cosine=1.0, cosine_p05=1.0, overlap=1.0)
    return publish(
        parent,
        replace(old, matrix=np.ascontiguousarray(old.matrix @ turn)),
        transition=Transition(
            "", "", "orthogonal", turn, np.ascontiguousarray(turn.T), {"orthogonal": exact}
        ),
        metrics={"turn": seed},
        now=datetime.now(UTC),
    )


class LocalWorker:
    """A worker without Faust, on a thread of this process: intake, pipeline and updater as they
    are, with an engine of its own. It starts at once, and its failure can be looked at."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        topics, partitions = find_topics(settings)
        engine = Engine(load_current(settings.model.releases), device="cpu", threads=1)
        self.error: BaseException | None = None
        patience = Patience(settings.redis.patience_s)
        marks = patience(lambda: build_marks(settings))
        self.updater = patience(lambda: build_updater(settings, engine, partitions, marks))
        self.swapper = build_swapper(settings, self.updater, self._fail)
        self.outlooks = build_outlooks(settings, self.updater, self._fail)
        self.pipeline = Pipeline(settings, self.updater, patience, self._fail, marks)
        self._batches: asyncio.Queue[MicroBatch] = asyncio.Queue()
        self.intake = Intake(settings, topics, self._batches.put, self._fail, marks=marks)
        self._stop = asyncio.Event()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread = threading.Thread(target=lambda: asyncio.run(self._run()), daemon=True)

    def wait_failed(self) -> BaseException:
        eventually("the worker fails", lambda: self.error)
        assert self.error is not None
        return self.error

    def stop(self) -> None:
        """As a signal would."""
        self.outlooks.stop()
        self.swapper.stop()
        if self._loop is not None and self._thread.is_alive():
            self._loop.call_soon_threadsafe(self._stop.set)
            self._thread.join(60)
            assert not self._thread.is_alive(), "the worker did not stop"

    def __enter__(self) -> Self:
        self._thread.start()
        self.swapper.start()
        self.outlooks.start()
        eventually("it holds partitions", lambda: self.intake.assigned() or self.error)
        return self

    def __exit__(self, *failure: object) -> None:
        self.stop()

    async def _run(self) -> None:
        self._loop = asyncio.get_running_loop()
        await self.intake.start()
        agent = asyncio.create_task(self._agent())
        await self._stop.wait()
        await self.intake.stop()
        agent.cancel()
        self.pipeline.close(0)

    async def _agent(self) -> None:
        try:
            while True:
                await self.pipeline.feed(await self._batches.get(), self.intake)
        except Exception as error:
            self._fail(error)

    def _fail(self, error: BaseException) -> None:
        if self.error is None:
            self.error = error
            self.intake.abort()


class WorkerProcess:
    """`penchant updater` in a process of its own."""

    def __init__(self, settings: Settings, folder: Path, name: str) -> None:
        """`folder` gets its log; it keeps nothing else."""
        self.name = name
        self.log_file = folder / f"{name}.log"
        self.port = free_port()
        self._environment = settings.environment() | {
            "STREAM_METRICS_PORT": str(self.port),
            "STREAM_DATA_DIR": str(folder / f"{name}-data"),
            "MODEL_THREADS": "1",
            "OMP_NUM_THREADS": "1",
            "PATH": os.environ["PATH"],
            "HOME": os.environ["HOME"],
            "LANG": "C.UTF-8",
        }
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> WorkerProcess:
        with self.log_file.open("ab") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "stream.cli", "updater"],
                cwd=REPOSITORY,
                env=self._environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        return self

    @property
    def process(self) -> subprocess.Popen[bytes]:
        assert self._process is not None
        return self._process

    @property
    def log(self) -> str:
        return self.log_file.read_text(encoding="utf-8", errors="replace")

    @property
    def running(self) -> bool:
        return self.process.poll() is None

    def ready(self) -> bool:
        """Whether it holds partitions. Fails the test if it ended."""
        assert self.running, f"{self.name} ended with {self.process.returncode}:\n{self.log}"
        try:
            url = f"http://127.0.0.1:{self.port}/healthz/ready"
            return bool(urllib.request.urlopen(url, timeout=5).status == 200)
        except (urllib.error.URLError, OSError):
            return False

    def wait_ready(self) -> WorkerProcess:
        eventually(f"{self.name} holds partitions:\n{self.log}", self.ready)
        return self

    def metric(self, name: str) -> float:
        """A metric's value, all labels together; 0 if it does not answer."""
        found = self.metrics()
        return found[name] + found[f"{name}_total"]

    def metrics(self) -> Counter[str]:
        """Every sample by its name, all labels together; none if it does not answer."""
        try:
            url = f"http://127.0.0.1:{self.port}/metrics"
            text = urllib.request.urlopen(url, timeout=5).read().decode()
        except (urllib.error.URLError, OSError):
            return Counter()
        found = Counter[str]()
        for family in text_string_to_metric_families(text):
            for sample in family.samples:
                found[sample.name] += sample.value
        return found

    def send(self, signal_number: signal.Signals) -> None:
        self.process.send_signal(signal_number)

    def kill(self) -> None:
        """No goodbye."""
        self.process.kill()
        self.process.wait()

    def wait(self, timeout_s: float = PATIENCE_S) -> int:
        """Its exit status, once it ends by itself."""
        return self.process.wait(timeout_s)


@contextmanager
def workers(folder: Path) -> Iterator[Callable[..., WorkerProcess]]:
    """`start(settings, name)`: workers that end with the block, however it ends."""
    started: list[WorkerProcess] = []

    def start(settings: Settings, name: str) -> WorkerProcess:
        started.append(WorkerProcess(settings, folder, name).start())
        return started[-1]

    try:
        yield start
    finally:
        for worker in started:
            with suppress(ProcessLookupError):
                worker.process.kill()
            worker.process.wait()


def ends(settings: Settings, topics: list[str]) -> dict[tuple[str, int], int]:
    """The next offset of each partition that holds records."""
    with _position_reader(settings) as reader:
        found = {}
        for topic in topics:
            for partition in reader.list_topics(topic, timeout=10).topics[topic].partitions:
                _, high = reader.get_watermark_offsets(TopicPartition(topic, partition), timeout=10)
                found[(topic, partition)] = high
    return {place: high for place, high in found.items() if high > 0}


def committed(
    settings: Settings, places: list[tuple[str, int]], group: str = "updater"
) -> dict[tuple[str, int], int]:
    """What the group has committed; -1001 for nothing."""
    with _position_reader(settings, group) as reader:
        answer = reader.committed([TopicPartition(*place) for place in places], timeout=20)
    return {(p.topic, p.partition): p.offset for p in answer}


def wait_until_folded(settings: Settings, timeout_s: float = PATIENCE_S) -> None:
    """Return once the group has committed everything that the topics hold."""
    topics = [settings.topic("events"), settings.topic("items")]
    if settings.stream.repartition:
        topics.append(settings.topic("events-by-user"))
    _wait_until_done(settings, topics, "updater", timeout_s)
    if settings.learn.neighbours:  # only now are all pairs sent
        _wait_until_done(settings, [settings.topic("pairs")], "neighbours", timeout_s)


def _wait_until_done(settings: Settings, topics: list[str], group: str, timeout_s: float) -> None:
    behind: dict[tuple[str, int], tuple[int, int]] = {}

    def is_folded() -> bool:
        nonlocal behind
        try:
            end = ends(settings, topics)
            done = committed(settings, list(end), group)
        except KafkaException:  # a broker that is just coming back
            return False
        behind = {p: (done[p], high) for p, high in end.items() if done[p] != high}
        return not behind

    try:
        eventually("everything folded", is_folded, timeout_s)
    except AssertionError as error:
        raise AssertionError(f"{error}; (committed, end) where they differ: {behind}") from None


@contextmanager
def _position_reader(settings: Settings, group: str = "updater") -> Iterator[Any]:
    config = {"group.id": settings.topic(group), "log_level": 0}
    reader = Consumer(settings.kafka.client_config() | config)
    try:
        yield reader
    finally:
        reader.close()
