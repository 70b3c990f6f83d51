"""The archive on a local S3-compatible server."""

from __future__ import annotations

import json
from collections.abc import Iterator

import pytest

pytest.importorskip("moto.server", reason="the dev extra brings moto")
pytest.importorskip("s3fs", reason="the dev extra brings s3fs")

from moto.server import ThreadedMotoServer
from s3fs import S3FileSystem

from stream.archive import Archive, ObjectStore
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
    S3FileSystem().mkdir("shop")
    yield "s3://shop/archive"
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
