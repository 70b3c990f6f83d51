"""Being the only writer of an object store: a small object that its holder keeps changing.

It is made where there is none, changed, and taken over from a holder that died, by conditional
writes, so that of two who try at once one succeeds. No clocks are compared: who wants it watches
it, and one that stays the same for `LEASE_S` has no holder any more.

A store without conditional writes (S3 and most that speak its language have them) is read before
it is written; two who start within the same moment may both believe that it is theirs, and the log
says so at the start.

Knows fsspec; knows nothing of archives.
"""

from __future__ import annotations

import json
import logging
import os
import secrets
import socket
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any, Final

from .errors import UserError

log = logging.getLogger(__name__)

LEASE_S: Final = 60.0
_LOOKS: Final = 30  # while watching: often enough to see each of three changes


class Lease:
    """One process' claim to `path` of an fsspec file system."""

    def __init__(self, fs: Any, path: str, lease_s: float = LEASE_S) -> None:
        self._fs = fs
        self._path = path
        self._folder = path.rpartition("/")[0]
        self._lease_s = lease_s
        protocol = [fs.protocol] if isinstance(fs.protocol, str) else fs.protocol
        self._conditional = "s3" in protocol
        self._holder = f"{socket.gethostname()} (process {os.getpid()})"
        self._token = secrets.token_hex(8)
        self._turn = 0
        self._mark = ""  # of the object as this process last wrote it
        self._sure_s = 0.0  # when that was, by this machine's monotonic clock
        self._lost = ""
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._renew, name="lease", daemon=True)

    def take(self) -> Callable[[], None]:
        """Be the holder, and renew it in a thread; the way to give it up. Waits for `lease_s` at
        most, where the object of a holder that may have died is in the way. Raises UserError while
        another one is alive, OSError."""
        if not self._conditional:
            log.warning(
                "%s has no conditional writes: see to it that only one trainer is started",
                self._path,
            )
        while not self._create():
            found = self._look()
            if found and self._is_dead(found):
                log.warning("taking over %s: its holder died", self._path)
                if self._replace(found):
                    break
        self._thread.start()
        return self._give_up

    def check(self) -> None:
        """Raises UserError where it is, or may be, another's by now."""
        if not self._lost and time.monotonic() - self._sure_s > self._lease_s:
            self._lost = "it could not be renewed in time"
        if self._lost:
            raise UserError(
                f"this trainer may no longer write to {self._folder}: {self._lost}; start it "
                "again: nothing is lost, as nothing of it is committed"
            )

    def _is_dead(self, found: str) -> bool:
        """Whether the object stays the same for as long as a lease lasts."""
        said = False
        for _ in range(_LOOKS + 1):
            now = self._look()
            if now != found:
                if not now:
                    return False  # given up meanwhile
                raise UserError(
                    f"another trainer, {self._named()}, writes to {self._folder}: stop it, or "
                    "set ARCHIVE_URL to another folder"
                )
            if not said:
                log.info("%s is held by %s: watching it", self._path, self._named())
                said = True
            self._ended.wait(self._lease_s / _LOOKS)
        return True

    def _named(self) -> str:
        with suppress(OSError, ValueError, KeyError):
            return str(json.loads(self._read())["holder"])
        return "unnamed"

    def _renew(self) -> None:
        while not self._ended.wait(self._lease_s / 3):
            try:
                if not self._replace(self._mark):
                    self._lost = f"{self._named()} took it over"
                    return
            except OSError as error:
                log.warning("%s could not be renewed: %s", self._path, error)

    def _give_up(self) -> None:
        self._ended.set()
        self._thread.join()
        with suppress(OSError):
            if not self._lost and self._look() == self._mark:
                self._fs.rm_file(self._path)

    # --- the object

    def _create(self) -> bool:
        try:
            self._put(mode="create")
        except OSError:
            if not self._look():
                raise  # it is not there, and could not be made either
            return False
        return True

    def _replace(self, found: str) -> bool:
        """Whether it was still as found."""
        try:
            if self._conditional:
                self._put(IfMatch=found)
            elif self._look() == found:
                self._put()
            else:
                return False
        except OSError:
            if self._look() == found:
                raise
            return False
        return True

    def _put(self, **condition: Any) -> None:
        self._turn += 1
        body = {"holder": self._holder, "token": self._token, "turn": self._turn}
        began_s = time.monotonic()
        said = self._fs.pipe_file(self._path, json.dumps(body).encode(), **condition)
        self._mark = said["ETag"] if self._conditional else self._look()
        self._sure_s = began_s

    def _look(self) -> str:
        """What tells one state of the object from the next; "" where there is none."""
        try:
            if not self._conditional:
                return self._read().decode()
            return str(self._fs.info(self._path, refresh=True)["ETag"])
        except FileNotFoundError:
            return ""

    def _read(self) -> bytes:
        found: bytes = self._fs.cat_file(self._path)
        return found
