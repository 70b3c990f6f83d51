"""Many calls of one script in one round trip. It does not know what a script does."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from .connection import redis_errors

if TYPE_CHECKING:
    import redis


def run_script(
    client: redis.Redis, script: str, calls: Sequence[tuple[list[str], list[Any]]], where: str
) -> list[list[Any]]:
    """The replies of one EVALSHA per (keys, arguments). Where the server does not know the script
    it is loaded, and all calls are made again: it must be safe to repeat. Raises
    RedisUnavailable, naming `where`."""
    if not calls:
        return []
    from redis.exceptions import NoScriptError

    sha = script_sha(script)
    with redis_errors(where):
        for attempt in range(2):
            pipe = client.pipeline(transaction=False)
            for keys, args in calls:
                pipe.evalsha(sha, len(keys), *keys, *args)
            try:
                return list(pipe.execute())
            except NoScriptError:  # a new or restarted server
                if attempt:
                    raise
                client.script_load(script)
    raise AssertionError("unreachable")


def script_sha(script: str) -> str:
    """The name EVALSHA asks for."""
    return hashlib.sha1(script.encode()).hexdigest()
