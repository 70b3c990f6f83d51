"""The network between simulated workers and Redis: what redis-py takes for the module `socket`.

What is sent arrives a moment later and is carried out by the server, whatever has become of the
client meanwhile; the answer comes back, or the connection breaks before that. A server that stalls
carries out later what lies in its buffers, also of connections that were given up, in any order
between them. Which of these happens is drawn from `Chances`, per request.
"""

from __future__ import annotations

import socket
from collections import deque
from dataclasses import dataclass
from typing import Any

from profiles import schema
from profiles.scripts import script_sha

from .redis_double import Keyspace, Session
from .scheduling import Killed, Scheduler

# How long a request may lie in buffers whose client is gone.
_LINGERS_S = 3.0


@dataclass
class Chances:
    """Of one request."""

    refused: float = 0.0  # the connection breaks before the server has read it
    unanswered: float = 0.0  # the server does it, and the connection breaks before the answer
    cut: float = 0.0  # the server does a part of it, and the connection breaks
    slow: float = 0.0  # it takes up to seconds


class Network:
    """Between every worker and one Redis."""

    def __init__(self, scheduler: Scheduler, keyspace: Keyspace) -> None:
        self.scheduler = scheduler
        self.keyspace = keyspace
        self.chances = Chances()
        self.latency_s = 0.002  # of a request, at most
        self.counted: dict[str, int] = {}
        self._open: list[Wire] = []
        self._up = True
        self._stalled = False

    def count(self, what: str) -> None:
        """A fault that was injected."""
        self.counted[what] = self.counted.get(what, 0) + 1

    def drawn(self, chance: float, what: str) -> bool:
        """Whether it happens, with this chance."""
        happens = chance > 0 and self.scheduler.chance.random() < chance
        if happens:
            self.count(what)
            self.scheduler.trace.append((self.scheduler.now_s, "network", what))
        return happens

    @property
    def reachable(self) -> bool:
        """Whether somebody answers a new connection."""
        return self._up

    @property
    def stalled(self) -> bool:
        """Whether the server reads nothing for now."""
        return self._stalled

    def open(self) -> Wire:
        """A new connection."""
        wire = Wire(self)
        self._open.append(wire)
        return wire

    def closed(self, wire: Wire) -> None:
        """Nobody listens to this one any more."""
        if wire in self._open:
            self._open.remove(wire)

    def go_down(self) -> None:
        """The server dies, and with it what it had not read."""
        self._up = False
        for wire in self._open:
            wire.break_off()
        self._open = []

    def come_up(self) -> None:
        """It serves again."""
        self._up = True

    def stall(self) -> None:
        """It reads nothing until `resume`."""
        self._stalled = True

    def resume(self) -> None:
        """It reads all that has come meanwhile."""
        self._stalled = False


class Wire:
    """One connection."""

    def __init__(self, network: Network) -> None:
        self._network = network
        self._scheduler = network.scheduler
        self._session = Session(network.keyspace)
        self._inbox: deque[list[bytes]] = deque()
        self._answers = bytearray()
        self._due = False
        self.broken = False
        self.reader: Any = None  # the thread that waits for an answer

    def commands(self, data: bytes) -> list[list[bytes]]:
        """What bytes ask for."""
        return self._session.commands(data)

    def send(self, commands: list[list[bytes]]) -> None:
        """From the client; arrives later."""
        self._inbox.extend(commands)
        self._arrive()

    def _arrive(self, least_s: float = 0.0) -> None:
        if not self._due and self._inbox:
            self._due = True
            network = self._network
            if network.drawn(network.chances.slow, "slow"):
                least_s += self._scheduler.chance.random() * _LINGERS_S
            latency_s = self._scheduler.chance.uniform(0.05, 1) * network.latency_s
            self._scheduler.after(least_s + latency_s, self._serve)

    def _serve(self) -> None:
        """The server takes up what has come; other connections may come in between."""
        self._due = False
        network = self._network
        if not network.reachable or not self._inbox:
            return
        if network.stalled:
            self._arrive(0.05)
            return
        command = self._inbox.popleft()
        self._answers += self._session.answer(command)
        if self._inbox:
            if network.drawn(network.chances.cut, "pipeline cut"):
                self.break_off()
            elif self._scheduler.chance.random() < 0.2:
                self._arrive()
            else:
                self._serve()
        elif network.drawn(network.chances.unanswered, "reply lost"):
            self.break_off()
        elif self.reader is not None:
            self._scheduler.wake(self.reader)

    def take(self, most: int) -> bytes:
        """To the client; b"" where nothing has come."""
        data = bytes(self._answers[:most])
        del self._answers[:most]
        return data

    @property
    def waiting(self) -> bool:
        """Whether an answer, or the end, is there to be read."""
        return bool(self._answers) or self.broken

    @property
    def complete(self) -> bool:
        """Whether all that was asked is answered."""
        return not self._inbox

    def break_off(self) -> None:
        """The connection is reset: what was not read is lost, and so is what was not delivered."""
        self.broken = True
        self._inbox.clear()
        self._answers.clear()
        if self.reader is not None:
            self._scheduler.wake(self.reader)


class Socket:
    """What redis-py uses of a socket."""

    def __init__(self, network: Network) -> None:
        self._network = network
        self._scheduler = network.scheduler
        self._wire: Wire | None = None
        self._timeout_s: float | None = None

    def setsockopt(self, *_: object) -> None:
        pass

    def settimeout(self, timeout_s: float | None) -> None:
        self._timeout_s = timeout_s

    def gettimeout(self) -> float | None:
        return self._timeout_s

    def getpeername(self) -> tuple[str, int]:
        return ("simulated", 6379)

    def connect(self, _: object) -> None:
        self._scheduler.point("connect to redis")
        if not self._network.reachable:
            raise ConnectionRefusedError(111, "Connection refused")
        self._wire = self._network.open()

    def sendall(self, data: bytes) -> None:
        wire, network = self._connected(), self._network
        commands = wire.commands(bytes(data))
        self._scheduler.point("ask redis: " + ", ".join(map(_named, commands)))
        if network.drawn(network.chances.refused, "connection reset"):
            wire.break_off()
        if wire.broken:
            raise ConnectionResetError(104, "Connection reset by peer")
        wire.send(commands)

    def recv_into(self, buffer: bytearray) -> int:
        data = self.recv(len(buffer))
        buffer[: len(data)] = data
        return len(data)

    def recv(self, most: int, flags: int = 0) -> bytes:
        wire, scheduler = self._connected(), self._scheduler
        end_s = None if self._timeout_s is None else scheduler.now_s + self._timeout_s
        wire.reader = scheduler.current
        while not (wire.broken or (wire.complete and wire.waiting)):
            left_s = None if end_s is None else end_s - scheduler.now_s
            if left_s is not None and left_s <= 0:
                raise TimeoutError("timed out")
            scheduler.block(left_s)
        wire.reader = None
        if wire.broken:
            raise ConnectionResetError(104, "Connection reset by peer")
        scheduler.point("redis answered")
        return wire.take(most)

    def readable(self) -> bool:
        """Whether `recv` would not wait."""
        return self._connected().waiting

    def closed(self) -> bool:
        """Whether the server has closed it."""
        return self._connected().broken

    def shutdown(self, _: int) -> None:
        pass

    def close(self) -> None:
        """What was sent is still on its way."""
        if self._wire is not None:
            self._network.closed(self._wire)

    def _connected(self) -> Wire:
        if self._scheduler.dead():
            raise Killed
        assert self._wire is not None
        return self._wire


_SCRIPTS = {
    script_sha(script).encode(): name.removesuffix("_SCRIPT").lower()
    for name, script in vars(schema).items()
    if name.endswith("_SCRIPT")
}


def _named(command: list[bytes]) -> str:
    """A command, short, for a trace."""
    name = command[0].decode()
    if name == "EVALSHA":
        return f"{_SCRIPTS.get(command[1], '?')}({int(command[2]) - 1})"
    return name


class Sockets:
    """The module."""

    def __init__(self, network: Network) -> None:
        self._network = network

    def __getattr__(self, name: str) -> Any:
        return getattr(socket, name)

    def socket(self, *_: object) -> Socket:
        return Socket(self._network)

    def getaddrinfo(self, *_: object) -> list[Any]:
        return [(socket.AF_INET, socket.SOCK_STREAM, 0, "", ("simulated", 6379))]
