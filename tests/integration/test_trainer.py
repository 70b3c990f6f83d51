"""The trainer's ingest as a process, on Apache Kafka: each event is in the archive once, whatever
becomes of the process."""

from __future__ import annotations

import json
import random
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import pytest
from confluent_kafka import Consumer, Producer, TopicPartition
from prometheus_client.parser import text_string_to_metric_families

from stream.archive import Archive, Folder
from stream.local_stack import ApacheKafka
from stream.processes import free_port
from stream.settings import (
    ArchiveSettings,
    KafkaSettings,
    LearnSettings,
    ModelSettings,
    RedisSettings,
    Settings,
    StreamSettings,
)
from stream.times import HOUR_MS
from stream.topics import create_topics
from tests.archived_events import T0_MS, records
from tests.integration.worker_process import (
    REPOSITORY,
    build_tiny_release,
    ends,
    eventually,
)

pytestmark = [pytest.mark.kafka, pytest.mark.timeout(300)]

PARTITIONS = 3


@pytest.fixture
def settings(apache_kafka: ApacheKafka, namespace: str, tmp_path: Path) -> Settings:
    settings = Settings(
        namespace=namespace,
        kafka=KafkaSettings(
            bootstrap=apache_kafka.bootstrap, partitions=PARTITIONS, session_timeout_s=6.0
        ),
        stream=StreamSettings(data_dir=tmp_path / "data"),
        archive=ArchiveSettings(url=str(tmp_path / "archive"), flush_s=0.3, flush_rows=500),
    )
    create_topics(settings)
    return settings


class TrainerProcess:
    def __init__(self, settings: Settings, folder: Path) -> None:
        self._log = folder / "trainer.log"
        with self._log.open("ab") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "stream.cli", "trainer"],
                cwd=REPOSITORY,
                env={"PATH": "/usr/bin:/bin", "LANG": "C.UTF-8", **settings.environment()},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    @property
    def log(self) -> str:
        return self._log.read_text(encoding="utf-8", errors="replace")

    def __enter__(self) -> TrainerProcess:
        return self

    def __exit__(self, *failure: object) -> None:
        self.process.kill()
        self.process.wait()


def produce(settings: Settings, values: list[bytes]) -> None:
    producer = Producer(settings.kafka.client_config())
    for i, value in enumerate(values):
        producer.produce(settings.topic("events"), value, partition=i % PARTITIONS)
        producer.poll(0)
    assert producer.flush(60) == 0


def archived_ids(settings: Settings) -> list[tuple[int, int]]:
    archive = Archive(Folder(Path(settings.archive.url)))
    return [
        place
        for t in archive.read()
        for place in zip(t["source"].to_pylist(), t["offset"].to_pylist(), strict=True)
    ]


def all_committed(settings: Settings) -> bool:
    end = ends(settings, [settings.topic("events")])
    config = settings.kafka.client_config() | {"group.id": settings.topic("trainer")}
    reader = Consumer(config | {"log_level": 0})
    try:
        done = reader.committed([TopicPartition(*place) for place in end], timeout=20)
    finally:
        reader.close()
    return all(end[p.topic, p.partition] == p.offset for p in done)


def test_kills_at_random_moments_lose_and_double_no_event(
    settings: Settings, tmp_path: Path
) -> None:
    chance = random.Random(7)
    archive = Archive(Folder(Path(settings.archive.url)))
    rounds, each, span_ms = 4, 6_000, 40 * HOUR_MS  # a flush makes 120 segments
    sent: list[dict[str, Any]] = []
    uncommitted = 0
    for n in range(rounds):
        values = records(each, seed=n, users=500, span_ms=span_ms)
        sent += map(json.loads, values)
        produce(settings, values)
        before = set(archive.segments())
        with TrainerProcess(settings, tmp_path) as trainer:
            # Merges and retries of the rounds before may come first; they are as good to kill.
            eventually("segments appear", lambda: set(archive.segments()) - before)  # noqa: B023
            time.sleep(chance.random() * 0.2)
            trainer.process.send_signal(signal.SIGKILL)
            trainer.process.wait()
        uncommitted += not all_committed(settings)
    assert uncommitted, "no kill came before its commit: nothing was proved"
    (tmp_path / "last").mkdir()
    with TrainerProcess(settings, tmp_path / "last") as trainer:
        eventually("it reads", lambda: "assigned" in trainer.log)
        eventually("all is committed", lambda: all_committed(settings))
        trainer.process.send_signal(signal.SIGTERM)
        assert trainer.process.wait(60) == 0, trainer.log
    places = archived_ids(settings)
    assert len(places) == rounds * each
    assert len(set(places)) == rounds * each
    events = {
        (t, u)
        for table in Archive(Folder(Path(settings.archive.url))).read()
        for t, u in zip(table["t_ms"].to_pylist(), table["user"].to_pylist(), strict=True)
    }
    assert events == {(e["ts"], e["user_id"]) for e in sent}


def test_a_stop_writes_and_commits_what_waits(settings: Settings, tmp_path: Path) -> None:
    patient = ArchiveSettings(url=settings.archive.url, flush_s=3_600)
    settings = settings.model_copy(update={"archive": patient})
    produce(settings, records(50))
    with TrainerProcess(settings, tmp_path) as trainer:
        eventually("it reads", lambda: "assigned" in trainer.log)
        time.sleep(2)  # for records to arrive; without them there is less to prove
        trainer.process.send_signal(signal.SIGTERM)
        assert trainer.process.wait(60) == 0, trainer.log
    assert all_committed(settings)
    assert len(archived_ids(settings)) == 50


def test_what_is_no_event_is_passed_by_and_forget_erases(
    settings: Settings, tmp_path: Path
) -> None:
    events = [b"not json", *records(30, users=1)]
    produce(settings, [v for v in events for _ in range(PARTITIONS)])  # a copy per partition
    erase = json.dumps({"type": "forget", "user_id": "user-0"}).encode()
    with TrainerProcess(settings, tmp_path):
        eventually("all is archived", lambda: len(archived_ids(settings)) == 30 * PARTITIONS)
        produce(settings, [erase] * PARTITIONS)
        eventually("the shopper is gone", lambda: not archived_ids(settings))
        eventually("all is committed", lambda: all_committed(settings))
    assert Archive(Folder(Path(settings.archive.url))).stats().receipts == PARTITIONS


def test_quiet_partitions_are_known_to_be_as_far_as_the_busy_one(
    settings: Settings, tmp_path: Path
) -> None:
    archive = Archive(Folder(Path(settings.archive.url)))
    producer = Producer(settings.kafka.client_config())
    latest_ms = T0_MS

    def happens(partition: int) -> None:
        nonlocal latest_ms
        latest_ms += HOUR_MS
        event = {"type": "view", "user_id": f"u{partition}", "item_id": "i", "ts": latest_ms}
        producer.produce(settings.topic("events"), json.dumps(event), partition=partition)
        assert producer.flush(60) == 0

    happens(1)  # and then it is quiet; nothing ever happens in 2
    with TrainerProcess(settings, tmp_path):
        eventually("it is archived", lambda: len(archived_ids(settings)) == 1)
        wanted_ms = latest_ms + 2 * HOUR_MS
        deadline_s = time.monotonic() + 60
        while sorted(archive.reached().values())[1:] < [wanted_ms] * 2:
            assert time.monotonic() < deadline_s, archive.reached()
            happens(0)
            time.sleep(0.5)
    assert len(archive.reached()) == PARTITIONS
    assert max(archive.reached().values()) <= latest_ms


def test_an_idle_trainer_merges_small_segments_whenever_it_was_killed(
    settings: Settings, tmp_path: Path
) -> None:
    archive = Archive(Folder(Path(settings.archive.url)))
    days, each = 60, 1_000
    for n in range(2):  # two flushes, so that a day lies in two segments
        produce(settings, records(each, seed=n, users=500, span_ms=days * 24 * HOUR_MS))
        with TrainerProcess(settings, tmp_path):
            eventually("it is archived", lambda: len(archived_ids(settings)) == (n + 1) * each)  # noqa: B023
    before = len(archive.segments())
    assert before > 1.5 * days * PARTITIONS
    with TrainerProcess(settings, tmp_path) as trainer:
        eventually("merging begins", lambda: len(archive.segments()) < before)
        trainer.process.send_signal(signal.SIGKILL)
        trainer.process.wait()
    assert len(archive.segments()) > days * PARTITIONS, "it was done already: nothing was proved"
    with TrainerProcess(settings, tmp_path):
        most = (days - 1 + 24) * PARTITIONS
        eventually("it is merged", lambda: len(archive.segments()) <= most)
    places = archived_ids(settings)
    assert len(places) == len(set(places)) == 2 * each


def answer(settings: Settings, path: str) -> tuple[int, str]:
    try:
        url = f"http://127.0.0.1:{settings.stream.metrics_port}{path}"
        with urllib.request.urlopen(url, timeout=5) as reply:
            return reply.status, reply.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()
    except OSError:
        return 0, ""


def metric(settings: Settings, name: str, **labels: str) -> float | None:
    text = answer(settings, "/metrics")[1]
    samples = [s for family in text_string_to_metric_families(text) for s in family.samples]
    found = [s.value for s in samples if s.name == name and labels.items() <= s.labels.items()]
    return sum(found) if found else None


def test_metrics_and_probes_say_how_the_trainer_is(settings: Settings, tmp_path: Path) -> None:
    release = build_tiny_release(tmp_path)
    settings = settings.model_copy(
        update={
            "stream": settings.stream.model_copy(update={"metrics_port": free_port()}),
            "model": ModelSettings(releases=tmp_path / "releases", device="cpu"),
            "learn": LearnSettings(every_s=1.0),
            # Nobody listens there: the turn fails, and the trainer goes on.
            "redis": RedisSettings(url=f"redis://127.0.0.1:{free_port()}/0", patience_s=0),
        }
    )
    produce(settings, records(300))
    with TrainerProcess(settings, tmp_path) as trainer:
        eventually("it is ready", lambda: answer(settings, "/healthz/ready")[0] == 200)
        assert answer(settings, "/healthz/live") == (200, "ok\n")
        eventually(
            "all is archived", lambda: metric(settings, "penchant_events_archived_total") == 300
        )
        eventually("no lag", lambda: metric(settings, "penchant_lag_records") == 0)
        segments = len(Archive(Folder(Path(settings.archive.url))).segments())
        eventually(
            "it knows its segments",
            lambda: metric(settings, "penchant_archive_segments") == segments,
        )
        assert (metric(settings, "penchant_archive_bytes") or 0) > 1_000
        eventually(
            "it knows what is live",
            lambda: metric(settings, "penchant_release", release=release.id) == 1,
        )
        eventually(
            "a turn was tried",
            lambda: metric(settings, "penchant_learn_turns_total", outcome="failed"),
        )
        assert (metric(settings, "penchant_learn_last_seconds") or 0) > 0.1
        ended_s = metric(settings, "penchant_learn_last_end_timestamp_seconds")
        assert ended_s == pytest.approx(time.time(), abs=60)
        assert "learn: penchant: " in trainer.log
        trainer.process.send_signal(signal.SIGTERM)
        assert trainer.process.wait(60) == 0, trainer.log


def test_a_taken_metrics_port_is_named(settings: Settings, tmp_path: Path) -> None:
    with socket.create_server(("", 0)) as taken:
        port = taken.getsockname()[1]
        stream = settings.stream.model_copy(update={"metrics_port": port})
        with TrainerProcess(settings.model_copy(update={"stream": stream}), tmp_path) as trainer:
            assert trainer.process.wait(60) == 1
            assert f"port {port} is taken" in trainer.log


def test_of_two_trainers_on_one_archive_the_second_says_so_and_ends(
    settings: Settings, tmp_path: Path
) -> None:
    with TrainerProcess(settings, tmp_path) as first:
        eventually("it reads", lambda: "assigned" in first.log)
        (tmp_path / "other").mkdir()
        with TrainerProcess(settings, tmp_path / "other") as second:
            assert second.process.wait(60) == 1
            assert "another trainer writes" in second.log
        assert first.process.poll() is None
