"""The local servers, started for real: they start, stop, come back, and never stay behind."""

from __future__ import annotations

import logging
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import redis
from confluent_kafka import Producer
from confluent_kafka.admin import NewTopic
from pydantic import SecretStr

from stream import local_servers
from stream.errors import UserError
from stream.local_servers import bundled_binary, kafka_answers, redis_answers
from stream.local_stack import ApacheKafka, RedisServer, Stack, Tansu, down, status, up
from stream.processes import ProcessIdentity, free_port, port_is_free
from stream.settings import KafkaSettings, RedisSettings, Settings, StreamSettings
from stream.topics import admin_client

# Brokers are killed here on purpose; librdkafka need not tell the terminal.
CLIENT_LOG = logging.getLogger(__name__)
CLIENT_LOG.addHandler(logging.NullHandler())
CLIENT_LOG.propagate = False

OUTGOING_PORTS = Path("/proc/sys/net/ipv4/ip_local_port_range")


@contextmanager
def _listener() -> Iterator[int]:
    """A port that this test process holds."""
    with socket.create_server(("127.0.0.1", free_port())) as taken:
        yield taken.getsockname()[1]


@contextmanager
def _script(body: str, *arguments: object) -> Iterator[subprocess.Popen[str]]:
    """Another Python process that runs `body` and is gone afterwards."""
    command = [sys.executable, "-c", body, *map(str, arguments)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as it:
        try:
            yield it
        finally:
            it.kill()


def _create(bootstrap: str, topic: NewTopic) -> None:
    admin = admin_client({"bootstrap.servers": bootstrap})
    admin.create_topics([topic])[topic.topic].result()


def _topics(bootstrap: str) -> set[str]:
    admin = admin_client({"bootstrap.servers": bootstrap})
    return set(admin.list_topics(timeout=5).topics)


def _produce(bootstrap: str, topic: str) -> None:
    """One record to every copy that is in sync, or the error."""
    outcomes: list[object] = []
    producer = Producer({"bootstrap.servers": bootstrap, "acks": "all"}, logger=CLIENT_LOG)
    producer.produce(topic, b"x", on_delivery=lambda error, _: outcomes.append(error))
    assert producer.flush(30) == 0
    assert outcomes == [None]


def _identity(pid: int) -> ProcessIdentity:
    identity = ProcessIdentity.of(pid)
    assert identity is not None
    return identity


# Redis


def test_redis_answers_when_started_and_is_gone_when_stopped(tmp_path: Path) -> None:
    with RedisServer(tmp_path) as server:
        identity = server.process.identity
        assert redis_answers(server.url)
        with redis.Redis.from_url(server.url) as client:
            # Vector sets are there without the module that the package also carries.
            assert client.execute_command("VADD", "set", "VALUES", "2", "1", "0", "item") == 1
    assert identity is not None
    assert not identity.alive
    assert port_is_free(server.port)


@pytest.mark.parametrize("ending", [RedisServer.stop, RedisServer.kill])
def test_redis_keeps_every_answered_write_over_a_restart(
    start_redis: Callable[..., RedisServer], ending: Callable[[RedisServer], None]
) -> None:
    server = start_redis(appendonly=True, appendfsync="always")
    with redis.Redis.from_url(server.url) as client:
        client.set("kept", "yes")
    port = server.port
    ending(server)
    server.restart()
    assert server.port == port
    with redis.Redis.from_url(server.url) as client:
        assert client.get("kept") == b"yes"


def test_redis_asks_for_the_password_whatever_characters_it_has(
    start_redis: Callable[..., RedisServer],
) -> None:
    server = start_redis(password='p@ss "wörd" \\/#')
    with redis.Redis.from_url(server.url) as client:
        assert client.ping()
    with pytest.raises(redis.AuthenticationError):
        redis_answers(f"redis://127.0.0.1:{server.port}/0")
    config = server.process.log.with_name("redis.conf")
    assert config.stat().st_mode & 0o077 == 0


def test_a_server_that_cannot_start_says_so_with_the_end_of_its_log(tmp_path: Path) -> None:
    (tmp_path / "appendonlydir").write_text("in the way")
    server = RedisServer(tmp_path, appendonly=True)
    with pytest.raises(UserError, match=r"(?s)Redis ended.*redis\.log:\n.*append") as failure:
        server.start()
    assert not server.process.alive
    assert len(str(failure.value).splitlines()) > 1


def test_a_taken_port_is_named_with_the_process_that_holds_it(tmp_path: Path) -> None:
    with _listener() as port:
        server = RedisServer(tmp_path, port=port)
        with pytest.raises(UserError, match=f"Port {port} .* by process {os.getpid()} "):
            server.start()


def test_a_port_lost_to_a_faster_program_is_replaced_by_another(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with _listener() as taken:
        ports = iter([taken, free_port()])
        monkeypatch.setattr(local_servers, "free_port", lambda: next(ports))
        with RedisServer(tmp_path) as server:
            assert server.port != taken
            assert redis_answers(server.url)


def test_free_ports_lie_below_those_of_outgoing_connections() -> None:
    assert free_port() < int(OUTGOING_PORTS.read_text().split()[0])


def test_a_package_that_is_missing_is_named_with_the_line_to_type(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"make env"):
        bundled_binary("no_such_package", "redis-server", tmp_path)


def test_a_binary_that_lost_its_mode_is_copied_not_changed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    carried = tmp_path / "site" / "carrier" / "bin" / "tool"
    carried.parent.mkdir(parents=True)
    (carried.parents[1] / "__init__.py").touch()
    carried.write_text("#!/bin/sh\necho ran\n")
    carried.chmod(0o644)
    monkeypatch.syspath_prepend(tmp_path / "site")
    found = bundled_binary("carrier", "tool", tmp_path / "data")
    assert found.is_relative_to(tmp_path / "data")
    assert subprocess.run([found], capture_output=True, text=True, check=True).stdout == "ran\n"
    assert carried.stat().st_mode & 0o111 == 0


# No server stays behind

START_AND_WAIT = """
import sys, threading
from pathlib import Path
from stream.local_stack import RedisServer
server = RedisServer(Path(sys.argv[1]))
thread = threading.Thread(target=server.start)
thread.start(); thread.join()
print(server.process.identity.pid, server.port, flush=True)
sys.stdin.read()
"""


def test_a_server_dies_with_its_parent_even_by_sigkill_but_not_with_a_thread(
    tmp_path: Path,
) -> None:
    with _script(START_AND_WAIT, tmp_path) as parent:
        assert parent.stdout is not None
        pid, port = map(int, parent.stdout.readline().split())
        server = _identity(pid)
        # The thread that started it has ended by now.
        assert redis_answers(f"redis://127.0.0.1:{port}/0")
        parent.send_signal(signal.SIGKILL)
        assert server.wait_gone(10.0)


def test_a_server_that_nobody_stopped_ends_with_the_interpreter(tmp_path: Path) -> None:
    with _script(START_AND_WAIT, tmp_path) as parent:
        assert parent.stdout is not None
        server = _identity(int(parent.stdout.readline().split()[0]))
        parent.communicate("")
        assert parent.returncode == 0
        assert server.wait_gone(10.0)


# Tansu


def test_tansu_answers_and_comes_back_empty_on_the_same_port(
    start_tansu: Callable[..., Tansu], namespace: str
) -> None:
    server = start_tansu()
    bootstrap = server.bootstrap
    _create(bootstrap, NewTopic(namespace, 1, 1))
    server.kill()
    assert not kafka_answers([bootstrap])
    server.restart()
    assert server.bootstrap == bootstrap
    assert namespace not in _topics(bootstrap)


def test_tansu_says_which_port_is_taken(tmp_path: Path) -> None:
    with _listener() as port, pytest.raises(UserError, match=f"Port {port} "):
        Tansu(tmp_path, port=port).start()


# Apache Kafka


@pytest.mark.kafka
@pytest.mark.parametrize("ending", [ApacheKafka.stop, ApacheKafka.kill])
def test_apache_kafka_keeps_its_topics_over_a_restart(
    start_apache_kafka: Callable[..., ApacheKafka],
    namespace: str,
    ending: Callable[[ApacheKafka], None],
) -> None:
    server = start_apache_kafka()
    bootstrap = server.bootstrap
    _create(bootstrap, NewTopic(namespace, 2, 1))
    _produce(bootstrap, namespace)
    ending(server)
    server.restart()
    assert server.bootstrap == bootstrap
    _produce(bootstrap, namespace)


@pytest.mark.kafka
def test_three_nodes_acknowledge_while_one_is_dead_and_take_it_back(
    start_apache_kafka: Callable[..., ApacheKafka], namespace: str
) -> None:
    cluster = start_apache_kafka(nodes=3, heap_mb=384)
    copies = {"min.insync.replicas": "2"}
    _create(cluster.bootstrap, NewTopic(namespace, 3, 3, config=copies))
    _produce(cluster.bootstrap, namespace)
    cluster.kill(node=2)
    _produce(cluster.bootstrap, namespace)
    cluster.start()
    assert kafka_answers(cluster.bootstrap.split(","))
    _produce(cluster.bootstrap, namespace)


def test_without_java_apache_kafka_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UserError, match=r"Java 17.*apt-get install openjdk-17-jre-headless maven"):
        ApacheKafka(tmp_path)


@pytest.mark.kafka
def test_without_maven_apache_kafka_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    java = shutil.which("java")
    assert java is not None
    (tmp_path / "java").symlink_to(java)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    with pytest.raises(UserError, match=r"Maven, .*apt-get install openjdk-17-jre-headless maven"):
        ApacheKafka(tmp_path)


# up, status, down


@pytest.fixture
def settings(tmp_path: Path) -> Iterator[Settings]:
    """Ports and a folder of the test's own; what it left up is taken down."""
    settings = Settings(
        kafka=KafkaSettings(bootstrap=f"localhost:{free_port()}"),
        redis=RedisSettings(url=f"redis://localhost:{free_port()}/0"),
        stream=StreamSettings(data_dir=tmp_path / ".penchant"),
    )
    yield settings
    down(settings)


def _redis_at(settings: Settings, url: str, password: str = "") -> Settings:
    redis_settings = RedisSettings(url=url, password=SecretStr(password))
    return settings.model_copy(update={"redis": redis_settings})


def _pids(stack: Stack) -> list[int]:
    return [each.pid for record in stack.records().values() for each in record.processes]


def test_up_listens_where_the_settings_say_and_down_stops_it(settings: Settings) -> None:
    stack = up(settings)
    assert kafka_answers([settings.kafka.bootstrap])
    assert redis_answers(settings.redis.url)
    assert status(settings) == stack
    versions = [record.version for record in stack.records().values()]
    assert all(re.fullmatch(r"\d+\.\d+\.\d+", version) for version in versions)
    assert {record.kind for record in down(settings)} == {"tansu", "bundled"}
    assert not kafka_answers([settings.kafka.bootstrap])
    assert not redis_answers(settings.redis.url)
    assert status(settings) == Stack()


def test_up_twice_keeps_the_first_and_down_twice_stops_nothing_more(settings: Settings) -> None:
    assert _pids(up(settings)) == _pids(up(settings))
    assert len(down(settings)) == 2
    assert down(settings) == []


def test_up_replaces_only_the_server_that_died(settings: Settings) -> None:
    before = up(settings)
    assert before.redis is not None
    before.redis.processes[0].send(signal.SIGKILL)
    assert before.redis.processes[0].wait_gone(5.0)
    assert not before.redis.running
    after = up(settings)
    assert after.kafka == before.kafka
    assert after.redis is not None
    assert after.redis.running


def test_what_up_started_outlives_it_and_keeps_redis_data_over_down(settings: Settings) -> None:
    body = (
        "import sys; from stream.local_stack import up; from stream.settings import Settings; "
        "up(Settings.model_validate_json(sys.argv[1]))"
    )
    with _script(body, settings.model_dump_json()) as starter:
        assert starter.wait(30) == 0
    assert len([record for record in status(settings).records().values() if record.running]) == 2
    with redis.Redis.from_url(settings.redis.url) as client:
        client.set("kept", "yes")
    down(settings)
    up(settings)
    with redis.Redis.from_url(settings.redis.url) as client:
        assert client.get("kept") == b"yes"


def test_down_leaves_a_process_alone_that_got_the_pid_of_a_dead_server(settings: Settings) -> None:
    stack = up(settings)
    with _script("import sys; print(flush=True); sys.stdin.read()") as innocent:
        assert innocent.stdout is not None
        innocent.stdout.readline()
        assert stack.redis is not None
        recorded = stack.redis.processes[0]
        reused = replace(_identity(innocent.pid), started_ticks=recorded.started_ticks)
        record = stack.redis.model_copy(update={"processes": (reused,)})
        forged = stack.model_copy(update={"redis": record})
        (settings.stream.data_dir / "stack.json").write_text(forged.model_dump_json())
        assert [record.kind for record in down(settings)] == ["tansu"]
        assert innocent.poll() is None
    recorded.send(signal.SIGTERM)
    assert recorded.wait_gone(5.0)


def test_servers_from_elsewhere_are_used_and_left_alone(
    settings: Settings, redis_url: str, tansu: Tansu
) -> None:
    stack = up(settings, kafka=tansu.bootstrap, redis=redis_url)
    assert _pids(stack) == []
    assert down(settings) == []
    assert redis_answers(redis_url)
    assert kafka_answers([tansu.bootstrap])


def test_up_does_not_change_one_server_for_another_under_a_running_stack(
    settings: Settings, tansu: Tansu
) -> None:
    up(settings)
    with pytest.raises(UserError, match=r"Another broker is up already .*penchant down"):
        up(settings, kafka=tansu.bootstrap)
    assert len(down(settings)) == 2


def test_an_up_that_fails_leaves_nothing_behind(settings: Settings) -> None:
    with _listener() as port, pytest.raises(UserError, match=f"Port {port} "):
        up(_redis_at(settings, f"redis://localhost:{port}/0"))
    assert status(settings) == Stack()
    assert not kafka_answers([settings.kafka.bootstrap])


def test_the_password_guards_redis_and_is_not_on_record(settings: Settings) -> None:
    up(_redis_at(settings, settings.redis.url, "s3cret"))
    with pytest.raises(redis.AuthenticationError):
        redis_answers(settings.redis.url)
    assert "s3cret" not in (settings.stream.data_dir / "stack.json").read_text()


def test_a_wrong_password_of_a_redis_from_elsewhere_is_said_plainly(
    settings: Settings, start_redis: Callable[..., RedisServer]
) -> None:
    server = start_redis(password="right")
    with pytest.raises(UserError, match=r"redis://127\.0\.0\.1:\d+/0 refused the password"):
        up(settings, redis=server.url.replace("right", "wrong"))
    up(settings, redis=server.url)


def test_a_redis_that_does_not_answer_is_said_plainly(settings: Settings) -> None:
    with pytest.raises(UserError, match=r"No Redis answered at redis://127\.0\.0\.1:1/0"):
        up(settings, redis="redis://:secret@127.0.0.1:1/0")


@pytest.mark.parametrize("bootstrap", ["broker.example:9092", "10.0.0.1:9092"])
def test_an_embedded_broker_is_not_started_for_another_machines_address(
    settings: Settings, bootstrap: str
) -> None:
    away = settings.model_copy(update={"kafka": KafkaSettings(bootstrap=bootstrap)})
    with pytest.raises(UserError, match=f"penchant up --kafka {bootstrap}"):
        up(away)


@pytest.mark.kafka
def test_up_with_apache_kafka_keeps_its_topics_over_down(
    settings: Settings, namespace: str
) -> None:
    up(settings, kafka="apache")
    _create(settings.kafka.bootstrap, NewTopic(namespace, 1, 1))
    down(settings)
    assert not kafka_answers([settings.kafka.bootstrap])
    up(settings, kafka="apache")
    assert namespace in _topics(settings.kafka.bootstrap)
