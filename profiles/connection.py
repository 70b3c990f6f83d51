"""Connections to Redis, and Redis' failures in the words of `errors.py`.

It imports redis only when a connection is made, so that `import profiles` stays cheap.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, cast

from .errors import GenerationRetired, RedisIsCluster, RedisUnavailable, WritesLost

if TYPE_CHECKING:
    import redis
    import redis.asyncio


# A dropped connection is tried again after about 0.05, 0.1 and 0.2 s; every command that is sent
# may be sent twice without harm. redis-py's own pauses add up to seconds, which no reader has.
_RETRY_S: Final = 0.05
_RETRIES: Final = 3


@dataclass(frozen=True)
class Connection:
    """Where Redis is and how to log in. `rediss://` in the URL turns TLS on.

    Opening raises ValueError for what is no Redis URL, and for a CA without TLS.
    """

    url: str = "redis://localhost:6379/0"
    username: str = ""  # ACL user, where the URL names none
    password: str = ""  # where the URL has none
    tls_ca: str = ""  # CA certificate file, for servers outside the system's trust store
    timeout_s: float = 5.0

    def open(self) -> redis.Redis:
        """A blocking client; connects at its first command."""
        import redis

        return redis.Redis.from_url(self.url, **self._options())

    def open_async(self) -> redis.asyncio.Redis:
        """An asyncio client; connects at its first command."""
        import redis.asyncio

        return redis.asyncio.Redis.from_url(self.url, **self._options())

    def _options(self) -> dict[str, Any]:
        from redis.backoff import ExponentialWithJitterBackoff
        from redis.retry import Retry

        options: dict[str, Any] = {
            "retry": Retry(ExponentialWithJitterBackoff(base=_RETRY_S, cap=1.0), _RETRIES),
            "socket_timeout": self.timeout_s,
            "socket_connect_timeout": self.timeout_s,
            "health_check_interval": 30,
        }
        if self.username:
            options["username"] = self.username
        if self.password:
            options["password"] = self.password
        if self.tls_ca:
            if not self.url.startswith("rediss://"):
                raise ValueError(
                    f"REDIS_TLS_CA is set, but {address(self.url)} is not encrypted: "
                    "let REDIS_URL begin with rediss://"
                )
            options["ssl_ca_certs"] = self.tls_ca
        return options


@contextmanager
def redis_errors(where: str) -> Iterator[None]:
    """Turn what redis-py raises for an unreachable or unwilling server into RedisUnavailable, what
    a server in cluster mode answers into RedisIsCluster, and what a guarded script answers that
    misses earlier writes into WritesLost."""
    import redis.exceptions as e

    try:
        yield
    except e.AuthenticationError as error:
        raise RedisUnavailable(
            f"Redis at {where} refused the login ({_reason(error)}): "
            "check REDIS_USERNAME and REDIS_PASSWORD"
        ) from error
    except (e.ConnectionError, e.TimeoutError, OSError) as error:
        raise RedisUnavailable(
            f"Redis at {where} does not answer ({_reason(error)}): start it, or set REDIS_URL"
        ) from error
    except (e.AskError, e.ClusterCrossSlotError) as error:  # MOVED is a kind of ASK
        raise _is_cluster(where) from error
    except e.ResponseError as error:
        if _reason(error).startswith(_LOST):
            raise WritesLost(
                f"Redis at {where} has lost writes that it had acknowledged"
            ) from error
        if _reason(error).startswith(_RETIRED):
            raise GenerationRetired("another generation of profiles is live now") from error
        # redis-py has a class for some of these, and takes the code off their message.
        if isinstance(error, e.NoPermissionError) or _NO_PERMISSION in str(error):
            raise RedisUnavailable(
                f"Redis at {where} refused a command ({_reason(error)}): give this ACL user what "
                "docs/schema.md lists"
            ) from error
        unwilling = (e.OutOfMemoryError, e.ReadOnlyError, e.ClusterDownError, e.TryAgainError)
        # NOSCRIPT, though the script was just loaded: a server took over that does not know it.
        if isinstance(error, (*unwilling, e.MasterDownError, e.NoScriptError)) or _UNWILLING.search(
            str(error)
        ):
            raise RedisUnavailable(
                f"Redis at {where} cannot serve now: {_reason(error)}"
            ) from error
        raise


def refuse_cluster(client: redis.Redis, where: str) -> None:
    """For a writer to call before anything else: it would come to a halt at the first script over
    two profiles. Raises RedisIsCluster, RedisUnavailable."""
    with redis_errors(where):
        if client.info("cluster").get("cluster_enabled"):
            raise _is_cluster(where)


def scan_pages(client: redis.Redis, pattern: str, count: int, where: str) -> Iterator[list[bytes]]:
    """The keys that match, about `count` at a time, in no order and some perhaps twice; a page may
    be empty. Raises RedisUnavailable."""
    cursor = -1
    while cursor != 0:
        with redis_errors(where):
            cursor, found = cast(
                tuple[int, list[bytes]], client.scan(max(cursor, 0), match=pattern, count=count)
            )
        yield found


def _is_cluster(where: str) -> RedisIsCluster:
    return RedisIsCluster(
        f"Redis at {where} runs in cluster mode, which Penchant does not support: set REDIS_URL to "
        "a Redis with `cluster-enabled no` (a primary with replicas will do)"
    )


# What a script reports of a command that its user may not run.
_NO_PERMISSION: Final = "ACL failure in script"
_LOST: Final = "LOST "  # see schema
_RETIRED: Final = "RETIRED "
_UNWILLING: Final = re.compile(r"\b(MISCONF|NOREPLICAS|BUSY|UNKILLABLE)\b")


def _reason(error: Exception) -> str:
    """What Redis said; for a pipeline redis-py puts the command before it, vectors and all."""
    return (
        str(error)
        .rpartition("of pipeline caused error: ")[2]
        .removeprefix("('")
        .removesuffix("',)")
    )


def address(url: str) -> str:
    """The URL without a login in it, for messages."""
    scheme, _, rest = url.partition("?")[0].partition("://")
    return f"{scheme}://{rest.rpartition('@')[2]}"


def knows_command(reply: Any) -> bool:
    """Whether the answer to `COMMAND INFO name` describes that command; Redis 6 to 8 answer
    [nil] for one they lack."""
    return any(reply)
