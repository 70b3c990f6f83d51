"""A broker and a Redis that stay on this machine: `up`, `status`, `down`.

What runs is on record in `.penchant/stack.json`: pids with their start times, so that a pid
used again is never signalled; addresses; versions; no password. For one machine and one
person: loopback only, no TLS. Servers that end with the program that uses them are
`RedisServer`, `Tansu` and `ApacheKafka`, as context managers.
"""

from __future__ import annotations

import contextlib
import fcntl
import urllib.parse
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal

import redis
from pydantic import BaseModel, ConfigDict, SecretStr

from .apache_kafka import KAFKA_STOP_S, ApacheKafka
from .errors import UserError
from .local_servers import (
    LOOPBACK,
    REDIS_DATABASES,
    LocalServer,
    RedisServer,
    Tansu,
    redis_answers,
)
from .processes import ProcessIdentity, end
from .settings import Settings
from .topics import connect

__all__ = [
    "REDIS_DATABASES",
    "ApacheKafka",
    "RedisServer",
    "ServerRecord",
    "Stack",
    "Tansu",
    "down",
    "set_aside",
    "status",
    "up",
]

Kind = Literal["tansu", "apache", "bundled", "external"]


class ServerRecord(BaseModel):
    """One half of the stack, as `stack.json` keeps it. Holds no password."""

    model_config = ConfigDict(frozen=True)

    kind: Kind
    address: str
    """Bootstrap servers, or a Redis URL without its user and password."""
    version: str = ""
    logs: tuple[Path, ...] = ()
    processes: tuple[ProcessIdentity, ...] = ()
    """None for an external server, which `down` leaves alone."""

    @property
    def running(self) -> bool:
        """Of an external server it is not known."""
        return bool(self.processes) and all(process.alive for process in self.processes)


class Stack(BaseModel):
    """The broker and the Redis that belong to this checkout."""

    model_config = ConfigDict(frozen=True)

    kafka: ServerRecord | None = None
    redis: ServerRecord | None = None

    def records(self) -> dict[str, ServerRecord]:
        found = {"kafka": self.kafka, "redis": self.redis}
        return {role: record for role, record in found.items() if record is not None}


def up(
    settings: Settings, kafka: str = "tansu", redis: str = "bundled", *, fresh: bool = False
) -> Stack:
    """A broker and a Redis that stay; what runs already is kept.

    `kafka` is `tansu`, `apache`, or the bootstrap servers of brokers that run elsewhere;
    `redis` is `bundled` or a URL. Embedded servers listen where KAFKA_BOOTSTRAP and REDIS_URL
    say, so that every other command finds them. `fresh` sets aside what earlier runs kept. Raises
    UserError, and then leaves nothing behind that was not there before.
    """
    with _locked(settings), contextlib.ExitStack() as undo:
        before = _load(settings)
        if fresh:
            _set_all_aside(settings, before)
        undo.callback(_save, settings, before)
        # On record as soon as it runs, so that `down` finds it whatever happens next.
        stack = before.model_copy(update={"kafka": _kafka_up(settings, kafka, before.kafka, undo)})
        _save(settings, stack)
        stack = stack.model_copy(update={"redis": _redis_up(settings, redis, before.redis, undo)})
        _save(settings, stack)
        undo.pop_all()
        return stack


def set_aside(folder: Path) -> None:
    """Keep a server's data under a name with the time in it, and out of the way."""
    if folder.exists():
        folder.rename(folder.with_name(f"{folder.name}-until-{datetime.now(UTC):%Y%m%dT%H%M%S}"))


def _set_all_aside(settings: Settings, stack: Stack) -> None:
    if any(record.running for record in stack.records().values()):
        raise UserError("The local stack is running: `penchant down` first, then start it fresh")
    for name in ("redis", "apache-kafka"):
        set_aside(_stack_folder(settings) / name)


def status(settings: Settings) -> Stack:
    """What is on record; each record knows whether its processes run."""
    return _load(settings)


def down(settings: Settings) -> list[ServerRecord]:
    """Stops what `up` started, and nothing else. Returns what was running."""
    with _locked(settings):
        stack = _load(settings)
        stopped = [record for record in stack.records().values() if record.running]
        everything = [each for record in stack.records().values() for each in record.processes]
        end(everything, KAFKA_STOP_S)
        _save(settings, Stack())
    return stopped


def _kafka_up(
    settings: Settings, wanted: str, there: ServerRecord | None, undo: contextlib.ExitStack
) -> ServerRecord:
    if wanted not in ("tansu", "apache"):
        _refuse_change("broker", there, "external", wanted)
        connect(settings.kafka.model_copy(update={"bootstrap": wanted}))
        return ServerRecord(kind="external", address=wanted)
    host, port = _host_and_port(settings.kafka.bootstrap, 9092)
    _require_loopback(host, "KAFKA_BOOTSTRAP", f"penchant up --kafka {settings.kafka.bootstrap}")
    if settings.kafka.security_protocol != "PLAINTEXT":
        raise UserError("The embedded brokers speak no TLS or SASL: unset KAFKA_SECURITY_PROTOCOL")
    _refuse_change("broker", there, wanted, f"{LOOPBACK}:{port}")
    if there is not None and there.running:
        return there
    folder = _stack_folder(settings)
    server: Tansu | ApacheKafka
    if wanted == "tansu":
        server = Tansu(folder / "tansu", port=port)
    else:
        server = ApacheKafka(folder / "apache-kafka", port=port)
    return _start_to_stay(
        server, "tansu" if wanted == "tansu" else "apache", server.bootstrap, undo
    )


def _redis_up(
    settings: Settings, wanted: str, there: ServerRecord | None, undo: contextlib.ExitStack
) -> ServerRecord:
    if wanted != "bundled":
        _refuse_change("Redis", there, "external", _without_secrets(wanted))
        _require_redis(wanted, settings.redis.password)
        return ServerRecord(kind="external", address=_without_secrets(wanted))
    url = urllib.parse.urlsplit(settings.redis.url)
    _require_loopback(url.hostname or "", "REDIS_URL", "penchant up --redis URL")
    if url.scheme != "redis":
        raise UserError("The bundled Redis speaks no TLS: use `redis://` in REDIS_URL")
    port = url.port or 6379
    _refuse_change("Redis", there, "bundled", f"redis://{LOOPBACK}:{port}/0")
    if there is not None and there.running:
        return there
    server = RedisServer(
        _stack_folder(settings) / "redis",
        port=port,
        password=settings.redis.password.get_secret_value() or (url.password or ""),
        appendonly=True,
    )
    return _start_to_stay(server, "bundled", f"redis://{LOOPBACK}:{port}/0", undo)


def _start_to_stay(
    server: LocalServer,
    kind: Kind,
    address: str,
    undo: contextlib.ExitStack,
) -> ServerRecord:
    server.start()
    undo.callback(server.stop)
    record = ServerRecord(
        kind=kind,
        address=address,
        version=server.version,
        logs=tuple(process.log for process in server.processes),
        processes=tuple(process.identity for process in server.processes if process.identity),
    )
    for process in server.processes:
        process.detach()
    return record


def _refuse_change(what: str, there: ServerRecord | None, kind: str, address: str) -> None:
    if there is not None and there.running and (there.kind, there.address) != (kind, address):
        raise UserError(
            f"Another {what} is up already ({there.kind} at {there.address}); "
            "type `penchant down` first"
        )


def _require_loopback(host: str, variable: str, instead: str) -> None:
    if host not in ("localhost", LOOPBACK, "::1"):
        raise UserError(
            f"{variable} names {host}, which is not this machine: unset it to start an embedded "
            f"server, or type `{instead}` to use the one that it names"
        )


def _require_redis(url: str, password: SecretStr) -> None:
    secret = password.get_secret_value()
    parts = urllib.parse.urlsplit(url)
    if secret and not parts.password:
        location = parts.netloc.rpartition("@")[2]
        user = urllib.parse.quote(parts.username or "", safe="")
        netloc = f"{user}:{urllib.parse.quote(secret, safe='')}@{location}"
        url = urllib.parse.urlunsplit(parts._replace(netloc=netloc))
    try:
        answered = redis_answers(url, timeout_s=5.0)
    except redis.AuthenticationError as error:
        raise UserError(
            f"Redis at {_without_secrets(url)} refused the password; check REDIS_PASSWORD"
        ) from error
    except ValueError as error:
        raise UserError(f"{_without_secrets(url)} is no Redis URL: {error}") from error
    if not answered:
        raise UserError(
            f"No Redis answered at {_without_secrets(url)}; start one with "
            "`penchant up`, or name yours with `--redis URL`"
        )


def _without_secrets(url: str) -> str:
    parts = urllib.parse.urlsplit(url)
    return urllib.parse.urlunsplit(parts._replace(netloc=parts.netloc.rpartition("@")[2]))


def _host_and_port(bootstrap: str, default_port: int) -> tuple[str, int]:
    parts = urllib.parse.urlsplit(f"//{bootstrap.split(',')[0].strip()}")
    try:
        return parts.hostname or "", parts.port or default_port
    except ValueError as error:
        raise UserError(f"KAFKA_BOOTSTRAP={bootstrap} is not HOST:PORT") from error


def _stack_folder(settings: Settings) -> Path:
    return settings.stream.data_dir / "stack"


@contextlib.contextmanager
def _locked(settings: Settings) -> Iterator[None]:
    """One `up` or `down` at a time."""
    folder = _stack_folder(settings)
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _load(settings: Settings) -> Stack:
    path = settings.stream.data_dir / "stack.json"
    try:
        return Stack.model_validate_json(path.read_bytes())
    except FileNotFoundError:
        return Stack()
    except ValueError as error:
        raise UserError(f"{path} cannot be read; delete it if no server of it runs") from error


def _save(settings: Settings, stack: Stack) -> None:
    path = settings.stream.data_dir / "stack.json"
    if not stack.records():
        path.unlink(missing_ok=True)
        return
    temporary = path.with_suffix(".tmp")
    temporary.write_text(stack.model_dump_json(indent=2) + "\n", encoding="utf-8")
    temporary.replace(path)
