"""Whatever arrives on the port of metrics and probes."""

from __future__ import annotations

import io
import socket
import sys
from collections.abc import Sequence
from contextlib import suppress
from random import Random

from stream.metrics import MetricsServer
from tests.fuzz.harness import Check
from tests.fuzz.mutation import mutated

_REQUESTS = [
    b"GET /metrics HTTP/1.1\r\nHost: worker:9100\r\nAccept: */*\r\n\r\n",
    b"GET /healthz/live HTTP/1.0\r\n\r\n",
    b"GET /healthz/ready HTTP/1.1\r\nHost: a\r\nConnection: keep-alive\r\n\r\n",
    b"POST /metrics HTTP/1.1\r\nHost: a\r\nContent-Length: 5\r\n\r\nhello",
    b"HEAD / HTTP/1.1\r\nExpect: 100-continue\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
    b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + b"\x00" * 32,  # a TLS client's hello
    b"*1\r\n$4\r\nPING\r\n",
    b"GET /" + b"x" * 70_000 + b" HTTP/1.1\r\n\r\n",
    b"GET / HTTP/1.1\r\n" + b"A: b\r\n" * 200 + b"\r\n",
    b"GET /%00%ff/../healthz/live?x=\xc3\xa9#y HTTP/1.1\r\nHost:\r\n continued\r\n\r\n",
    b"",
]
_ANSWER_LIMIT = 1 << 20
_PATIENCE_S = 20.0


def metrics_server() -> Check:
    """Raw bytes in pieces, half closed, closed and reset; probes are answered afterwards."""
    server = MetricsServer(0, lambda: (True, "alive"), lambda: (False, "not yet"))
    told = sys.stderr = io.StringIO()  # in a process of our own

    def check(cases: Sequence[Random]) -> int:
        taken = sum(_tried(rng, server.port) for rng in cases)
        live = _exchange(server.port, [b"GET /healthz/live HTTP/1.0\r\n\r\n"])
        assert live.startswith(b"HTTP/1.0 200 ")
        assert live.endswith(b"alive\n")
        assert not told.getvalue(), told.getvalue()
        return taken

    return check


def _tried(rng: Random, port: int) -> int:
    raw = rng.choice(_REQUESTS)
    if rng.random() < 0.9:
        raw = mutated(rng, raw, _REQUESTS)
    cut = sorted(rng.randrange(len(raw) + 1) for _ in range(rng.choice((0, 0, 1, 2))))
    pieces = [raw[i:j] for i, j in zip([0, *cut], [*cut, len(raw)], strict=True)]
    if rng.random() < 0.2:
        _leave(port, pieces)
        return 0
    answer = _exchange(port, pieces)
    assert len(answer) <= _ANSWER_LIMIT
    return answer.startswith((b"HTTP/1.0 200 ", b"HTTP/1.0 503 "))


def _exchange(port: int, pieces: Sequence[bytes]) -> bytes:
    """All that is answered until the server closes; TimeoutError where it does not."""
    answer = b""
    with socket.create_connection(("127.0.0.1", port), _PATIENCE_S) as connection:
        try:
            for piece in pieces:
                connection.sendall(piece)
            connection.shutdown(socket.SHUT_WR)
            while part := connection.recv(1 << 16):
                answer += part
        except (ConnectionResetError, BrokenPipeError, OSError) as error:
            if isinstance(error, TimeoutError):
                raise
    return answer


def _leave(port: int, pieces: Sequence[bytes]) -> None:
    """Without waiting for an answer, and with a reset."""
    with suppress(ConnectionError), socket.create_connection(("127.0.0.1", port), _PATIENCE_S) as c:
        for piece in pieces:
            c.sendall(piece)
        c.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\x01\0\0\0\0\0\0\0")
