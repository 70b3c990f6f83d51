"""A Redis with an append-only file and a replica, that workers reach over a wire: it dies, loses
power, fails over, answers late, has no room left on its disk.

Knows nothing of profiles.
"""

from __future__ import annotations

import subprocess
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from threading import Event
from typing import Final, Self

import redis

from stream.errors import UserError
from stream.local_stack import RedisServer
from tests.between import Between
from tests.integration.worker_process import eventually

_DISK_MB: Final = 48  # of a small disk: Redis writes a second base file before it drops the first
_BLOCK: Final = b"\0" * 65_536


class Store(ExitStack):
    """The primary, its replica and the wire."""

    def __init__(self, folder: Path, *, small_disk: bool = False) -> None:
        """`small_disk`: the first primary's; it needs the permission to mount."""
        super().__init__()
        self._folder = folder
        self._servers = 0
        self.delay_s = 0.0
        """Before each request is passed on."""
        self._disk = self._serving_folder = self._next_folder()
        if small_disk:
            self.enter_context(_small_disk(self._disk))
        self._serving = self._server(self._disk, {})
        self._wire = self.enter_context(Between(self._serving.port, on_request=self._late))
        self.port = self._wire.port
        self.url = self._serving.url.replace(f":{self._serving.port}/", f":{self.port}/")
        self._replica = self._follow()

    @property
    def client(self) -> redis.Redis:
        """Of the primary, not over the wire."""
        return redis.Redis.from_url(self._serving.url)

    def die(self) -> None:
        """SIGKILL, and a start from the append-only file."""
        self._serving.kill()
        self._serving.restart()

    def restart(self) -> None:
        """In order."""
        self._serving.restart()

    def lose_power(self, most_bytes: int) -> None:
        """Die, with up to so much of the end of the append-only file not on the disk yet."""
        self._serving.kill()
        files = sorted(self._serving_folder.glob("appendonlydir/*.incr.aof"))
        with files[-1].open("r+b") as file:
            file.truncate(max(0, files[-1].stat().st_size - most_bytes))
        self._serving.restart()

    def fail_over(self, behind_s: float) -> None:
        """The primary dies, and the replica serves, without what was written in the last
        `behind_s`. A new replica follows it."""
        with redis.Redis.from_url(self._replica.url) as replica:
            replica.replicaof("NO", "ONE")
        time.sleep(behind_s)
        self._wire.lead_to(self._replica.port)
        self._serving.kill()
        self._serving, self._serving_folder = self._replica, self._replica_folder
        self._replica = self._follow()

    def fill_disk(self) -> None:
        """Leave no byte of it."""
        with (self._disk / "ballast").open("wb", buffering=0) as ballast:
            try:
                while ballast.write(_BLOCK):
                    pass
            except OSError:
                return

    def free_disk(self) -> None:
        (self._disk / "ballast").unlink()

    def _follow(self) -> RedisServer:
        self._replica_folder = self._next_folder()
        replica = self._server(
            self._replica_folder, {"replicaof": f"127.0.0.1 {self._serving.port}"}
        )
        with redis.Redis.from_url(replica.url) as asked:
            eventually(
                "the replica follows",
                lambda: asked.info("replication")["master_link_status"] == "up",
            )
        return replica

    def _server(self, folder: Path, options: dict[str, str]) -> RedisServer:
        # At once, not after 5 s: a replica that is made while events flow is soon there.
        options = {"repl-diskless-sync-delay": "0", **options}
        return self.enter_context(RedisServer(folder, appendonly=True, options=options))

    def _next_folder(self) -> Path:
        self._servers += 1
        return self._folder / f"redis-{self._servers}"

    def _late(self, request: bytes) -> bytes:
        if self.delay_s:
            Event().wait(self.delay_s)
        return request

    def __enter__(self) -> Self:
        return self


@contextmanager
def _small_disk(folder: Path) -> Iterator[None]:
    folder.mkdir(parents=True)
    kind = ["-t", "tmpfs", "-o", f"size={_DISK_MB}m", "none"]
    mounted = subprocess.run(["mount", *kind, folder], capture_output=True, text=True, check=False)
    if mounted.returncode != 0:
        raise UserError(f"No small disk for Redis ({mounted.stderr.strip()}): run this as root")
    try:
        yield
    finally:
        subprocess.run(["umount", folder], check=True)
