"""The writer's side: batched loads and fenced saves of profiles.

A save names the fence the profile was loaded with; Redis refuses it where the stored fence
has moved on. So two workers that hold one user (a stalled one that wakes up after its
partitions were given away, a user who arrives on two partitions) cannot overwrite each other:
the refused one loads again, finds in the watermark what is in already, and folds the rest.

It does not know events, topics or encoders.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from itertools import chain, count
from typing import TYPE_CHECKING, Any, Final

from . import arithmetic, schema
from .arithmetic import Layout, Profiles
from .cache import ProfileCache
from .connection import address
from .errors import LayoutMismatch, SchemaTooNew, StateCorrupt
from .scripts import run_script

if TYPE_CHECKING:
    import redis

# Profiles per script call. Redis runs a script alone: 256 profiles of 3 KB keep readers
# waiting for about 4 ms, and cost 3% of the throughput of 1,000.
_CHUNK: Final = 256


class ProfileStore:
    """Profiles of one namespace in one Redis. Several threads may use it, each for other users."""

    def __init__(
        self,
        client: redis.Redis,
        keys: schema.Keys,
        layout: Layout,
        *,
        ttl_s: float,
        writer: int,
        where: str = "",
        cached: int = 0,
    ) -> None:
        """`writer` is a random 64-bit number of this process. Every save counts it on and puts
        it into its fences, so that no two saves can be taken for each other. `cached`: how many
        profiles are remembered after a save, to be loaded from memory the next time."""
        self._client = client
        self._keys = keys
        self._layout = layout
        self._ttl_s = math.ceil(ttl_s)
        self._writers = count(writer)  # next() is one step for all threads
        self._where = address(where) if where else "REDIS_URL"
        self._cache = ProfileCache(cached)

    def load(self, user_ids: Sequence[str], *, fresh: bool = False) -> Profiles:
        """The profiles of n users, no user twice; who has none gets an empty one. `fresh`: as Redis
        has them, whatever is remembered; for users of whom there may be nothing to save, so that no
        refusal would tell that others wrote meanwhile.

        Raises RedisUnavailable, SchemaTooNew, LayoutMismatch, StateCorrupt.
        """
        rows = self._cache.take(user_ids)
        if fresh:
            rows = [None] * len(rows)
        missing = [i for i, row in enumerate(rows) if row is None]
        fetched = self._fetch([user_ids[i] for i in missing])
        if len(missing) == len(rows):
            return fetched
        for i, row in zip(missing, arithmetic.pack(fetched), strict=True):
            rows[i] = row
        return arithmetic.join([row for row in rows if row is not None], self._layout)

    def forget_cached(self) -> None:
        """Load every profile from Redis the next time: others may have written meanwhile."""
        self._cache.clear()

    def _fetch(self, user_ids: Sequence[str]) -> Profiles:
        keys = [self._keys.profile(user_id) for user_id in user_ids]
        calls: list[tuple[list[str], list[Any]]] = [
            (keys[i : i + _CHUNK], []) for i in range(0, len(keys), _CHUNK)
        ]
        flat = [value for reply in self._run(schema.LOAD_SCRIPT, calls) for value in reply]
        try:
            return arithmetic.unpack(flat[::2], flat[1::2], self._layout)
        except (SchemaTooNew, LayoutMismatch, StateCorrupt):
            for key, state, fence in zip(keys, flat[::2], flat[1::2], strict=True):
                self._refuse_by_name(key, state, fence)
            raise

    def _refuse_by_name(self, key: str, state: bytes | None, fence: bytes | None) -> None:
        try:
            arithmetic.unpack([state], [fence], self._layout)
        except (SchemaTooNew, LayoutMismatch, StateCorrupt) as error:
            raise type(error)(f"the profile at {key}: {error}") from None

    def save(
        self,
        user_ids: Sequence[str],
        profiles: Profiles,
        rows: Iterable[int],
        category_names: Mapping[int, str],
        now_s: float,
        *,
        renew: bool = True,
    ) -> list[int]:
        """Save the given rows; the rows that Redis refused because another writer was there.

        now_s: wall clock, for the expiry, which a save without `renew` leaves as it is. Raises
        RedisUnavailable; then any part may be saved, and loading again tells which.
        """
        rows = list(rows)
        writer = next(self._writers) % (1 << 64)
        every = rows == list(range(len(profiles)))
        picked = profiles if every else arithmetic.take(profiles, rows)
        before = picked.fences
        picked.fences, expires_s = arithmetic.next_fences(
            before, picked.watermarks, writer, now_s, self._ttl_s, may_renew=renew
        )
        packed = arithmetic.pack(picked)
        glances = arithmetic.glances(picked, category_names)
        ids = [user_ids[row] for row in rows]
        keys = [self._keys.profile(user_id) for user_id in ids]
        states = arithmetic.states(packed)
        five = list(zip(before, picked.fences, states, glances, expires_s, strict=True))
        replies = self._run(
            schema.SAVE_SCRIPT,
            [
                (keys[i : i + _CHUNK], list(chain.from_iterable(five[i : i + _CHUNK])))
                for i in range(0, len(keys), _CHUNK)
            ],
        )
        refused = [
            chunk * _CHUNK + position - 1
            for chunk, reply in enumerate(replies)
            for position in reply
        ]
        overtaken = set(refused)
        self._cache.put((ids[i], row) for i, row in enumerate(packed) if i not in overtaken)
        return [rows[i] for i in refused]

    def _run(self, script: str, calls: Sequence[tuple[list[str], list[Any]]]) -> list[list[Any]]:
        """One EVALSHA per call, in one round trip."""
        return run_script(self._client, script, calls, self._where)
