"""The archive on a local S3-compatible server."""

from __future__ import annotations

import json
import os
import time
import uuid
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import Any

import pytest

pytest.importorskip("moto.server", reason="the dev extra brings moto")
pytest.importorskip("s3fs", reason="the dev extra brings s3fs")

from moto.server import ThreadedMotoServer
from s3fs import S3FileSystem

from stream.archive import Archive, ObjectStore
from stream.errors import UserError
from tests.archived_events import parsed, records, write

pytestmark = pytest.mark.filterwarnings("default")  # of the S3 libraries


@pytest.fixture
def url(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0)
    server.start()
    host, port = server.get_host_and_port()
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "test")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "test")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
    S3FileSystem.clear_instance_cache()
    bucket = f"shop-{uuid.uuid4().hex[:12]}"  # the server's memory outlives it
    S3FileSystem().mkdir(bucket)
    yield f"s3://{bucket}/archive"
    S3FileSystem.clear_instance_cache()
    server.stop()


def test_an_archive_in_an_object_store_reads_merges_expires_and_forgets(url: str) -> None:
    archive = Archive(ObjectStore(url))
    assert list(archive.read()) == []
    erase = json.dumps({"type": "forget", "user_id": "user-3"}).encode()
    shop = parsed([*records(300), erase])
    write(archive, shop, 0, 100)
    write(archive, shop, 60, 250)
    assert archive.compact() > 0
    write(archive, shop, 250, 301)
    offsets = sorted(o for t in archive.read() for o in t["offset"].to_pylist())
    assert offsets == [i for i in range(300) if shop[i].user_id != "user-3"]
    stats = Archive(ObjectStore(url)).stats()
    assert stats.receipts == 1
    assert archive.expire(1 << 60, 1) == stats.segments
    assert list(archive.read()) == []


def test_a_damaged_object_is_set_aside(url: str) -> None:
    archive = Archive(ObjectStore(url))
    shop = parsed(records(100, span_ms=1000))
    for first in (0, 30, 60):
        write(archive, shop, first, first + 30)
    segment = list(archive.segments())[1]
    with archive.store.read(segment.name) as file:
        torn = file.read()[:500]
    archive.store.write({segment.name: torn})
    assert archive.stats().damaged == (segment.name,)
    archive.compact()
    assert archive.stats().damaged == (f"damaged/{segment.name}",)
    with archive.store.read(f"damaged/{segment.name}") as file:
        assert file.read() == torn
    offsets = sorted(o for t in archive.read() for o in t["offset"].to_pylist())
    assert offsets == [*range(30), *range(60, 90)]


def test_of_two_trainers_on_an_object_store_the_second_is_told_who_writes(url: str) -> None:
    first, second = (ObjectStore(url, lease_s=1.0) for _ in range(2))
    give_up = first.lock()
    with pytest.raises(UserError, match=rf"process {os.getpid()}\), writes to"):
        second.lock()
    first.write({"a": b"1"})
    give_up()
    second.lock()()
    assert ".lock" not in first.sizes()


def test_of_many_who_start_at_once_one_wins(url: str) -> None:
    def start(_: int) -> Any:
        with suppress(UserError):
            return ObjectStore(url, lease_s=2.0).lock()

    with ThreadPoolExecutor(8) as pool:
        won = [give_up for give_up in pool.map(start, range(8)) if give_up is not None]
    assert len(won) == 1
    won[0]()


def test_who_died_is_succeeded_and_may_not_write_if_it_comes_back(url: str) -> None:
    stalled = ObjectStore(url, lease_s=1.0)
    stalled.lock()
    assert stalled._lease is not None
    stalled._lease._ended.set()  # as a process that was stopped renews nothing
    successor = ObjectStore(url, lease_s=1.0)
    give_up = successor.lock()
    successor.write({"a": b"1"})
    with pytest.raises(UserError, match="may no longer write"):
        stalled.write({"a": b"2"})
    assert successor.read("a").read() == b"1"
    give_up()


def test_a_holder_that_was_taken_over_notices_when_it_renews(url: str) -> None:
    store = ObjectStore(url, lease_s=0.6)
    give_up = store.lock()
    store._fs.pipe_file(f"{store._root}/.lock", b'{"holder": "somebody else"}')
    until_s = time.monotonic() + 10
    while store._lease is not None and not store._lease._lost and time.monotonic() < until_s:
        time.sleep(0.05)
    with pytest.raises(UserError, match="somebody else took it over"):
        store.write({"a": b"1"})
    give_up()
    assert ".lock" in store.sizes()  # it is another's


def test_a_store_without_conditional_writes_says_so_and_is_still_held(
    caplog: pytest.LogCaptureFixture,
) -> None:
    first, second = (ObjectStore("memory://leased/archive", lease_s=0.6) for _ in range(2))
    give_up = first.lock()
    assert "only one trainer" in caplog.text
    with pytest.raises(UserError, match="writes to"):
        second.lock()
    give_up()
    second.lock()()
