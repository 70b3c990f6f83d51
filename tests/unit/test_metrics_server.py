"""The port of metrics and probes, over real sockets."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator

import pytest

from stream import metrics
from stream.metrics import MetricsServer


@pytest.fixture
def server() -> Iterator[MetricsServer]:
    server = MetricsServer(0, lambda: (True, "alive"), lambda: (False, "not yet"))
    yield server
    server.stop()


def connected(server: MetricsServer) -> socket.socket:
    return socket.create_connection(("127.0.0.1", server.port), timeout=20)


def asked(server: MetricsServer, path: str) -> bytes:
    with connected(server) as connection:
        connection.sendall(f"GET {path} HTTP/1.0\r\n\r\n".encode())
        answer = b""
        while part := connection.recv(1 << 16):
            answer += part
        return answer


def test_probes_and_metrics_are_answered(server: MetricsServer) -> None:
    assert asked(server, "/healthz/live").startswith(b"HTTP/1.0 200 ")
    assert asked(server, "/healthz/ready").startswith(b"HTTP/1.0 503 ")
    assert b"penchant_events_applied" in asked(server, "/metrics")
    assert asked(server, "/other").startswith(b"HTTP/1.0 404 ")


def test_who_says_little_or_nothing_is_let_go(
    server: MetricsServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(metrics, "_PATIENCE_S", 0.5)
    with connected(server) as silent, connected(server) as slow:
        assert _sends(slow) < 100
        assert silent.recv(1) == b""
    assert asked(server, "/healthz/live").startswith(b"HTTP/1.0 200 ")


def _sends(connection: socket.socket) -> int:
    """How many bytes, one by one, before the other side will have no more."""
    for sent in range(100):
        try:
            connection.sendall(b"G")
        except ConnectionError:
            return sent
        time.sleep(0.1)
    return 100


def test_connections_are_bounded_and_find_room_again(
    server: MetricsServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(metrics, "_MOST_CONNECTIONS", 3)
    before = threading.active_count()
    held = [connected(server) for _ in range(10)]
    refused = [each for each in held if _is_closed(each)]
    assert len(refused) == 7
    assert threading.active_count() <= before + 3
    for each in held:
        each.close()
    until_s = time.monotonic() + 10
    while not _answers(server) and time.monotonic() < until_s:
        time.sleep(0.05)
    assert _answers(server)


def _is_closed(connection: socket.socket) -> bool:
    connection.settimeout(1)
    try:
        return connection.recv(1) == b""
    except TimeoutError:
        return False


def _answers(server: MetricsServer) -> bool:
    try:
        return asked(server, "/healthz/live").startswith(b"HTTP/1.0 200 ")
    except ConnectionError:
        return False


def test_a_client_that_leaves_is_worth_no_traceback(
    server: MetricsServer, capsys: pytest.CaptureFixture[str]
) -> None:
    for _ in range(20):
        connection = connected(server)
        connection.sendall(b"GET /metrics HTTP/1.0\r\n")
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\x01\0\0\0\0\0\0\0")
        connection.close()
    assert asked(server, "/healthz/live").startswith(b"HTTP/1.0 200 ")
    assert capsys.readouterr().err == ""
