"""Whether the brokers speak KIP-848, the group protocol in which they assign partitions.

librdkafka does not say: against a broker without it, a consumer set to `consumer` waits for
ever. So the brokers are asked what requests they know, which every broker answers before any
login (https://kafka.apache.org/protocol, ApiVersions v0).
"""

from __future__ import annotations

import socket
import ssl
import struct
from typing import Final
from urllib.parse import urlsplit

from .settings import KafkaSettings

_API_VERSIONS: Final = 18
_CONSUMER_GROUP_HEARTBEAT: Final = 68
_TIMEOUT_S: Final = 5.0
_DEFAULT_PORT: Final = 9092
# Real answers have under 1 kB; what is no broker may announce anything.
_REPLY_LIMIT: Final = 1 << 20


def choose_protocol(kafka: KafkaSettings) -> str:
    """`consumer` where all brokers named in the settings that answer know it, else `classic`,
    which every broker knows. One that is down has no say: workers of one group, started before
    and after a broker went down, should choose alike."""
    if kafka.group_protocol != "auto":
        return kafka.group_protocol
    answers = []
    for address in kafka.bootstrap.split(","):
        try:
            answers.append(_requests_known(kafka, address))
        except (OSError, ValueError, struct.error):
            continue
    knows = bool(answers) and all(_CONSUMER_GROUP_HEARTBEAT in keys for keys in answers)
    return "consumer" if knows else "classic"


def _requests_known(kafka: KafkaSettings, address: str) -> set[int]:
    # librdkafka takes PLAINTEXT://host:port too, and host alone.
    place = urlsplit("//" + address.strip().rpartition("://")[2])
    host, port = place.hostname or "", place.port or _DEFAULT_PORT
    with socket.create_connection((host, port), _TIMEOUT_S) as plain:
        if not kafka.security_protocol.endswith("SSL"):
            return _ask(plain)
        context = ssl.create_default_context(cafile=kafka.ssl_ca_location or None)
        with context.wrap_socket(plain, server_hostname=host) as secure:
            return _ask(secure)


def _ask(connection: socket.socket) -> set[int]:
    request = struct.pack(">hhih", _API_VERSIONS, 0, 1, -1)  # correlation id 1, no client id
    connection.sendall(struct.pack(">i", len(request)) + request)
    (size,) = struct.unpack(">i", _read(connection, 4))
    if size > _REPLY_LIMIT:
        raise OSError(f"a reply of {size} bytes is none of a Kafka broker")
    reply = _read(connection, size)
    _, _, count = struct.unpack_from(">ihi", reply)  # correlation id, error code
    return {struct.unpack_from(">h", reply, 10 + 6 * i)[0] for i in range(count)}


def _read(connection: socket.socket, size: int) -> bytes:
    data = b""
    while len(data) < size:
        part = connection.recv(size - len(data))
        if not part:
            raise OSError("the connection was closed")
        data += part
    return data
