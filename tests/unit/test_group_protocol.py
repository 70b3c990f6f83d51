"""Which group protocol a worker chooses, asked of sockets that answer as brokers do."""

from __future__ import annotations

import socket
import struct
import threading
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress

import pytest

from stream.group_protocol import choose_protocol
from stream.processes import free_port
from stream.settings import KafkaSettings

CONSUMER_GROUP_HEARTBEAT = 68
OLD = [0, 1, 2, 3, 18]
NEW = [*OLD, CONSUMER_GROUP_HEARTBEAT]


def _api_versions(keys: Sequence[int]) -> bytes:
    """An ApiVersions v0 response with correlation id 1."""
    body = struct.pack(">ihi", 1, 0, len(keys))
    body += b"".join(struct.pack(">hhh", key, 0, 3) for key in keys)
    return struct.pack(">i", len(body)) + body


@contextmanager
def _broker(reply: bytes, piece: int = 1 << 20) -> Iterator[int]:
    """Answers every connection's first request with these bytes, so many at a time."""
    listener = socket.create_server(("127.0.0.1", 0))

    def serve() -> None:
        with suppress(OSError):
            while True:
                connection, _ = listener.accept()
                with connection, suppress(OSError):
                    request = connection.recv(1024)
                    assert struct.unpack_from(">hhi", request, 4) == (18, 0, 1)
                    for at in range(0, len(reply), piece):
                        connection.sendall(reply[at : at + piece])

    threading.Thread(target=serve, daemon=True).start()
    try:
        yield listener.getsockname()[1]
    finally:
        listener.shutdown(socket.SHUT_RDWR)
        listener.close()


def _chosen(*replies: bytes, also: Sequence[str] = (), protocol: str = "auto") -> str:
    with ExitStack() as stack:
        addresses = [f"127.0.0.1:{stack.enter_context(_broker(reply))}" for reply in replies]
        bootstrap = ",".join([*addresses, *also])
        return choose_protocol(KafkaSettings(bootstrap=bootstrap, group_protocol=protocol))


def test_the_consumer_protocol_is_chosen_where_the_broker_knows_it() -> None:
    assert _chosen(_api_versions(NEW)) == "consumer"


def test_the_classic_protocol_is_chosen_where_one_broker_does_not_know_the_other() -> None:
    assert _chosen(_api_versions(NEW), _api_versions(OLD)) == "classic"


def test_a_broker_that_is_down_has_no_say() -> None:
    down = f"127.0.0.1:{free_port()}"
    assert _chosen(_api_versions(NEW), also=[down]) == "consumer"
    assert _chosen(also=[down]) == "classic"


def test_what_is_set_is_not_asked_for() -> None:
    assert _chosen(_api_versions(NEW), protocol="classic") == "classic"
    assert _chosen(_api_versions(OLD), protocol="consumer") == "consumer"


@pytest.mark.parametrize(
    "reply",
    [
        b"HTTP/1.1 400 Bad Request\r\n\r\n",
        b"",
        _api_versions(NEW)[:-7],
        struct.pack(">i", -1),
        struct.pack(">iihi", 10, 1, 0, 1_000_000),
    ],
    ids=["another server", "hangs up", "cut short", "negative size", "announces too much"],
)
def test_what_is_no_broker_leaves_the_protocol_that_all_know(reply: bytes) -> None:
    assert _chosen(reply) == "classic"


def test_an_answer_may_come_in_pieces() -> None:
    with _broker(_api_versions(NEW), piece=3) as port:
        assert choose_protocol(KafkaSettings(bootstrap=f"127.0.0.1:{port}")) == "consumer"


@pytest.mark.parametrize("form", ["PLAINTEXT://127.0.0.1:{}", " 127.0.0.1:{} ", "localhost:{}"])
def test_addresses_may_be_written_in_any_way_that_the_client_takes(form: str) -> None:
    with _broker(_api_versions(NEW)) as port:
        assert choose_protocol(KafkaSettings(bootstrap=form.format(port))) == "consumer"


def test_an_address_that_cannot_be_read_is_left_to_the_client_to_complain_about() -> None:
    assert choose_protocol(KafkaSettings(bootstrap="127.0.0.1:kafka")) == "classic"
