"""What becomes of Penchant on a Redis Cluster of two nodes: one line that says what to do."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
import redis

from model.engine import Engine
from profiles import Connection, ProfileReader, RedisIsCluster
from profiles.arithmetic import Layout
from profiles.schema import Keys
from profiles.store import ProfileStore
from stream.local_stack import RedisServer
from stream.processes import free_ports
from stream.settings import ModelSettings, RedisSettings, Settings
from stream.updater_app import build_updater
from tests.integration.worker_process import build_tiny_release

pytestmark = pytest.mark.redis

SLOTS = 16_384
FIX = "set REDIS_URL to a Redis with `cluster-enabled no`"


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The URL of one of two nodes, each with half of the slots."""
    with ExitStack() as stack:
        servers, buses = [], free_ports(2)
        for bus in buses:
            options = {"cluster-enabled": "yes", "cluster-port": str(bus)}
            server = RedisServer(tmp_path_factory.mktemp("node"), options=options)
            servers.append(stack.enter_context(server))
        clients = [stack.enter_context(redis.Redis.from_url(server.url)) for server in servers]
        for half, client in enumerate(clients):
            first = half * SLOTS // 2
            client.execute_command("CLUSTER", "ADDSLOTSRANGE", first, first + SLOTS // 2 - 1)
        clients[0].execute_command("CLUSTER", "MEET", "127.0.0.1", servers[1].port, buses[1])
        deadline = time.monotonic() + 30
        while any(client.cluster("INFO")["cluster_state"] != "ok" for client in clients):
            assert time.monotonic() < deadline, "the two nodes did not become a cluster"
            time.sleep(0.05)
        yield servers[0].url


def test_a_worker_refuses_a_cluster_before_it_does_anything(cluster: str, tmp_path: Path) -> None:
    settings = Settings(
        redis=RedisSettings(url=cluster),
        model=ModelSettings(releases=tmp_path / "releases", device="cpu"),
    )
    engine = Engine(build_tiny_release(tmp_path), device="cpu", threads=1)
    with pytest.raises(RedisIsCluster, match=FIX):
        build_updater(settings, engine, partitions=1)
    with redis.Redis.from_url(cluster) as client:
        assert client.dbsize() == 0


def test_a_script_over_users_of_two_slots_says_the_same(cluster: str) -> None:
    with Connection(cluster).open() as client:
        store = ProfileStore(client, Keys("shop"), Layout(8, (60.0,)), ttl_s=60, writer=1)
        with pytest.raises(RedisIsCluster, match=FIX):
            store.load(["ann", "bob"])


def test_a_reader_that_is_sent_to_another_node_says_the_same(cluster: str) -> None:
    with ProfileReader(cluster) as reader, pytest.raises(RedisIsCluster, match=FIX):
        reader.get_many([f"u{number}" for number in range(50)])
