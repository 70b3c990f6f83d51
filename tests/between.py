"""A wire that can be tampered with, between a client and a server on this machine."""

from __future__ import annotations

import select
import socket
import ssl
import threading
from collections.abc import Callable
from contextlib import suppress
from typing import Self


class Between:
    """Forwards connections to a local port, byte for byte but for what it is told to change."""

    def __init__(
        self,
        upstream: int,
        *,
        on_request: Callable[[bytes], bytes] = bytes,
        tls: ssl.SSLContext | None = None,
        listener: socket.socket | None = None,
    ) -> None:
        """`on_request` gets what a client sent, in pieces; `tls` is spoken to clients only; the
        `listener` is one on a free port where none is given."""
        self.lose_reply = False
        """Set it, and the next answer gets lost: the server has done what it was asked, and the
        connection breaks before it says so."""
        self.replies_lost = 0
        self._upstream = upstream
        self._on_request = on_request
        self._tls = tls
        self._whole = threading.Event()
        self._whole.set()
        self._listener = listener or socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]
        threading.Thread(target=self._accept, daemon=True).start()

    def lead_to(self, upstream: int) -> None:
        """New connections go to another port."""
        self._upstream = upstream

    def cut(self) -> None:
        """Connections stay open, and nothing gets through."""
        self._whole.clear()

    def mend(self) -> None:
        """What was under way arrives."""
        self._whole.set()

    def close(self) -> None:
        """No new connections; those that are open end with their client."""
        self._listener.close()
        self.mend()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *failure: object) -> None:
        self.close()

    def _reach(self) -> socket.socket:
        return socket.create_connection(("127.0.0.1", self._upstream))

    def _accept(self) -> None:
        with suppress(OSError):
            while True:
                client, _ = self._listener.accept()
                if self._tls is not None:
                    client = self._tls.wrap_socket(
                        client, server_side=True, do_handshake_on_connect=False
                    )
                threading.Thread(target=self._serve, args=(client,), daemon=True).start()

    def _serve(self, client: socket.socket) -> None:
        # A client that trusts no certificate hangs up; a server may be down.
        with (
            suppress(OSError),
            client,
            self._reach() as server,
        ):
            while True:
                ready, _, _ = select.select([client, server], [], [])
                self._whole.wait()
                if client in ready:
                    request = _received(client)
                    if not request:
                        return
                    server.sendall(self._on_request(request))
                if server in ready:
                    reply = _received(server)
                    if self.lose_reply and reply:
                        self.lose_reply = False
                        self.replies_lost += 1
                        return
                    if not reply:
                        return
                    client.sendall(reply)


def _received(side: socket.socket) -> bytes:
    data = side.recv(65_536)
    while isinstance(side, ssl.SSLSocket) and side.pending():  # which select does not see
        data += side.recv(side.pending())
    return data
