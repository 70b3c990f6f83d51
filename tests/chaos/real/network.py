"""A network namespace per party, so that each has a network of its own, and wires between named
parties that can be cut.

A party's loopback is empty but for its wires: each listens there on the very port that the other
party has on its own loopback, so nobody's addresses change. A cut is silence: connections stay
open, nothing gets through, and what was under way arrives when it ends. Needs CAP_SYS_ADMIN.
"""

from __future__ import annotations

import ctypes
import fcntl
import os
import socket
import struct
import threading
from contextlib import AbstractContextManager, ExitStack, nullcontext
from typing import Final

from stream.errors import UserError
from tests.between import Between

_CLONE_NEWNET: Final = 0x40000000
_SIOCSIFFLAGS: Final = 0x8914
_UP_AND_RUNNING: Final = 0x1 | 0x40
_OWN_NETWORK: Final = "/proc/thread-self/ns/net"

_libc = ctypes.CDLL(None, use_errno=True)


class Party(AbstractContextManager["Party"]):
    """A network of its own. Within the `with` block the calling thread is in it, and so is what
    that thread starts; sockets stay in the network in which they were made."""

    def __init__(self) -> None:
        """Raises UserError without the permission."""
        self._here = threading.local()
        found: list[int | OSError] = []
        thread = threading.Thread(target=lambda: found.append(_new_network()))
        thread.start()
        thread.join()
        (network,) = found
        if isinstance(network, OSError):
            raise UserError(f"No network of its own for a worker ({network}): run this as root")
        self._network = network

    def __enter__(self) -> Party:
        self._here.before = os.open(_OWN_NETWORK, os.O_RDONLY)
        _enter(self._network)
        return self

    def __exit__(self, *failure: object) -> None:
        _enter(self._here.before)
        os.close(self._here.before)

    def close(self) -> None:
        """It ends with its last process and socket."""
        os.close(self._network)


class Wire(Between):
    """Leads from one party's loopback to the same port of another's."""

    def __init__(self, port: int, *, of: Party | None = None, to: Party | None = None) -> None:
        """None: where this process itself is."""
        self._to = to or nullcontext()
        with of or nullcontext():
            listener = socket.create_server(("127.0.0.1", port))
        super().__init__(port, listener=listener)

    def _reach(self) -> socket.socket:
        with self._to:
            return super()._reach()


class Networks(ExitStack):
    """A network for each name that is asked for, and the wires of all."""

    def __init__(self) -> None:
        super().__init__()
        self._parties: dict[str, Party] = {}
        self.wires: dict[tuple[str, str], Wire] = {}
        """By the name of the party and of what it reaches."""

    def party(self, name: str, reaches: dict[str, int]) -> Party:
        """The network of that name, with wires to these ports of this process' own."""
        if name not in self._parties:
            self._parties[name] = party = Party()
            self.callback(party.close)
            for other, port in reaches.items():
                self.wires[(name, other)] = self.enter_context(Wire(port, of=party))
        return self._parties[name]

    def show(self, name: str, port: int) -> None:
        """Make a party's port reachable from here, for as long as all of it lasts."""
        self.enter_context(Wire(port, to=self._parties[name]))


def _new_network() -> int | OSError:
    """Its file descriptor. The calling thread is in it from now on."""
    if _libc.unshare(_CLONE_NEWNET) != 0:
        return OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as any_socket:
        up = struct.pack("16sH14x", b"lo", _UP_AND_RUNNING)
        fcntl.ioctl(any_socket, _SIOCSIFFLAGS, up)
    return os.open(_OWN_NETWORK, os.O_RDONLY)


def _enter(network: int) -> None:
    if _libc.setns(network, _CLONE_NEWNET) != 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
