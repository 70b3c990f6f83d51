"""Generations of profiles: one is live, others are being made, kept for a way back, or removed.

A key names the live one. It is compared inside every guarded script of a worker, so a flip holds
from one write to the next, and costs no round trip. It does not know how a generation is made.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Final, cast

from . import schema
from .connection import address, redis_errors, scan_pages
from .scripts import run_script

if TYPE_CHECKING:
    import redis

BUILDING: Final = "building"
READY: Final = "ready"
LIVE: Final = "live"
BEFORE: Final = "before"
GOING: Final = "going"

_PAGE: Final = 500
_LAST: Final = "last"


def follow(client: redis.Redis, keys: schema.Keys) -> None:
    """Let the keys be of the live generation. Raises what redis raises."""
    keys.generation = int(cast(bytes | None, client.get(keys.live())) or 0)


class Generations:
    """Of one namespace."""

    def __init__(self, client: redis.Redis, namespace: str, where: str = "") -> None:
        self._client = client
        self._keys = schema.Keys(namespace)
        self._where = address(where) if where else "REDIS_URL"

    def live(self) -> int:
        """The number of the live one. Raises RedisUnavailable, as all of these."""
        with redis_errors(self._where):
            keys = schema.Keys(self._keys.namespace)
            follow(self._client, keys)
        return keys.generation

    def states(self) -> dict[int, str]:
        """Number -> state of all that there are."""
        with redis_errors(self._where):
            stored = cast(dict[bytes, bytes], self._client.hgetall(self._keys.generations()))
        states = {int(n): s.decode() for n, s in stored.items() if n != _LAST.encode()}
        return dict(sorted((states or {0: LIVE}).items()))

    def begin(self) -> int:
        """The number of a new one, to be made; numbers are not used again."""
        with redis_errors(self._where):
            name = self._keys.generations()
            self._client.hsetnx(name, str(self.live()), LIVE)
            number = self._client.hincrby(name, _LAST, 1)
        self._put(number, BUILDING)
        return number

    def ready(self, number: int) -> None:
        """It may become live."""
        self._put(number, READY)

    def flip(self, number: int, live: int) -> bool:
        """Let it be live from the next write on, if `live` still is, and it is ready or was live
        before; whether it is."""
        return bool(self._run(schema.FLIP_SCRIPT, str(live), str(number)))

    def give_up(self, number: int) -> bool:
        """Nothing leads there any more, and it is to be removed; False where it is live."""
        return self._put(number, GOING)

    def remove(self, number: int, per_s: float) -> Iterator[int]:
        """Remove what was given up, some keys at a time; how many so far. What is left of a removal
        that ended in the middle is for the next. The marks of generation 0 stay: those of items'
        neighbours, which belong to no generation, are among them."""
        removed = 0
        keys = schema.Keys(self._keys.namespace, number)
        for pattern in _patterns(keys):
            for found in scan_pages(self._client, pattern, _PAGE, self._where):
                began_s = time.monotonic()
                if found:
                    with redis_errors(self._where):
                        self._client.unlink(*found)
                removed += len(found)
                yield removed
                if found and per_s:
                    pause_s = len(found) / per_s - (time.monotonic() - began_s)
                    time.sleep(max(0.0, pause_s))
        with redis_errors(self._where):
            self._client.hdel(self._keys.generations(), str(number))

    def _put(self, number: int, state: str) -> bool:
        return bool(self._run(schema.STATE_SCRIPT, str(number), state))

    def _run(self, script: str, *arguments: str) -> int:
        call = ([self._keys.live(), self._keys.generations()], list(arguments))
        return cast(int, run_script(self._client, script, [call], self._where)[0])


def _patterns(keys: schema.Keys) -> list[str]:
    """Of the keys that are a generation's own."""
    if keys.generation:
        return [f"{keys.namespace}:g{keys.generation}:*"]
    return [f"{keys.namespace}:{name}:*" for name in ("profile", "waiting", "sweep")]
