"""Servers for the tests: real ones, started here, stopped here.

A session's servers are shared, so a test keeps to its own `namespace` and its own Redis
database. A test that kills or restarts takes a server of its own from a `start_…` factory.
A server that cannot start fails the test with the line to type; nothing is skipped.
"""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
import uuid
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any, TypeVar

# Before numpy and torch are loaded: on small arrays their threads only wait for each other (one
# file of tests took 319 s with them on a busy machine, and 8 s without).
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import redis

from stream.errors import UserError
from stream.local_stack import REDIS_DATABASES, ApacheKafka, RedisServer, Tansu

Server = TypeVar("Server", RedisServer, Tansu, ApacheKafka)

_databases = itertools.cycle(range(1, REDIS_DATABASES))


def _start(stack: ExitStack, make: Callable[[], Server]) -> Server:
    """Starts a server and leaves stopping it to the stack."""
    try:
        return stack.enter_context(make())
    except UserError as error:
        pytest.fail(str(error), pytrace=False)


def _factory(
    kind: Callable[..., Server], folders: pytest.TempPathFactory
) -> Iterator[Callable[..., Server]]:
    with ExitStack() as stack:

        def start(**options: Any) -> Server:
            return _start(stack, lambda: kind(folders.mktemp("server"), **options))

        yield start


@pytest.fixture
def namespace() -> str:
    """A prefix of topics, groups and keys that no other test has."""
    return f"test-{uuid.uuid4().hex[:12]}"


@pytest.fixture(scope="session")
def redis_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisServer]:
    with ExitStack() as stack:
        yield _start(stack, lambda: RedisServer(tmp_path_factory.mktemp("redis")))


@pytest.fixture
def redis_url(redis_server: RedisServer) -> Iterator[str]:
    """An empty database of the session's Redis, for this test alone."""
    url = redis_server.url.removesuffix("/0") + f"/{next(_databases)}"
    yield url
    with redis.Redis.from_url(url) as client:
        client.flushdb()


@pytest.fixture
def redis_client(redis_url: str) -> Iterator[redis.Redis]:
    """A client of `redis_url` that answers in bytes."""
    with redis.Redis.from_url(redis_url) as client:
        yield client


@pytest.fixture(scope="session")
def compiled() -> None:
    """The worker's inner loops, so that no worker of a test spends its patience on compiling."""
    subprocess.run([sys.executable, "-m", "stream.compile_ahead"], check=True)


@pytest.fixture(scope="session")
def tansu(tmp_path_factory: pytest.TempPathFactory, compiled: None) -> Iterator[Tansu]:
    with ExitStack() as stack:
        yield _start(stack, lambda: Tansu(tmp_path_factory.mktemp("tansu")))


@pytest.fixture(scope="session")
def apache_kafka(tmp_path_factory: pytest.TempPathFactory, compiled: None) -> Iterator[ApacheKafka]:
    """One node. Mark the test `kafka`."""
    with ExitStack() as stack:
        yield _start(stack, lambda: ApacheKafka(tmp_path_factory.mktemp("kafka")))


@pytest.fixture
def start_redis(
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Callable[..., RedisServer]]:
    """`start_redis(appendonly=True)`: a Redis of the test's own; the options of RedisServer."""
    yield from _factory(RedisServer, tmp_path_factory)


@pytest.fixture
def start_tansu(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., Tansu]]:
    """`start_tansu()`: a Tansu of the test's own."""
    yield from _factory(Tansu, tmp_path_factory)


@pytest.fixture
def start_apache_kafka(
    tmp_path_factory: pytest.TempPathFactory,
    compiled: None,
) -> Iterator[Callable[..., ApacheKafka]]:
    """`start_apache_kafka(nodes=3)`: a cluster of the test's own. Mark the test `kafka`."""
    yield from _factory(ApacheKafka, tmp_path_factory)
