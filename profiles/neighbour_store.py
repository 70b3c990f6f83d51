"""The writer's side of neighbours: batched loads and fenced saves of items' tallies.

As `store.py`, for items: whoever is refused loads again and folds the rest. It does not know
the topic that pairs come from.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from itertools import chain, count
from typing import TYPE_CHECKING, Any, Final

from . import arithmetic, neighbours, schema
from .connection import address
from .marks import Marks, steps_of
from .neighbours import Tallies, TallyLayout
from .scripts import run_script

if TYPE_CHECKING:
    import redis

_CHUNK: Final = 256  # items per script call, which keeps readers waiting


class NeighbourStore:
    """Tallies of one namespace in one Redis. One thread at a time."""

    def __init__(
        self,
        client: redis.Redis,
        keys: schema.Keys,
        layout: TallyLayout,
        *,
        ttl_s: float,
        writer: int,
        where: str = "",
        marks: Marks | None = None,
    ) -> None:
        """`writer`: a random 64-bit number of this process; `marks`: see ProfileStore."""
        self._client = client
        self._keys = keys
        self._layout = layout
        self._ttl_s = math.ceil(ttl_s)
        self._writers = count(writer)
        self._where = address(where) if where else "REDIS_URL"
        self._marks = marks

    @property
    def layout(self) -> TallyLayout:
        """What its tallies keep."""
        return self._layout

    def load(self, items: Sequence[int]) -> Tallies:
        """The tallies of n items by key, none twice; what is not there is empty.

        Raises RedisUnavailable, SchemaTooNew, StateCorrupt.
        """
        keys = [self._keys.neighbours(item) for item in items]
        calls: list[tuple[list[str], list[Any]]] = [
            (keys[i : i + _CHUNK], []) for i in range(0, len(keys), _CHUNK)
        ]
        replies = run_script(self._client, schema.LOAD_NEIGHBOURS_SCRIPT, calls, self._where)
        flat = list(chain.from_iterable(replies))
        return neighbours.unpack(flat[::3], flat[1::3], flat[2::3], self._layout)

    def save(
        self, items: Sequence[int], tallies: Tallies, rows: Iterable[int], now_s: float
    ) -> list[int]:
        """Save the given rows; the rows that Redis refused because another writer was there.

        now_s: wall clock, for the expiry. Raises RedisUnavailable; then any part may be saved,
        and loading again tells which. Raises WritesLost.
        """
        rows = list(rows)
        before = [tallies.fences[row] for row in rows]
        fences, expires_s = arithmetic.next_fences(
            before,
            [tallies.watermarks[row] for row in rows],
            next(self._writers) % (1 << 64),
            now_s,
            self._ttl_s,
        )
        packed = neighbours.pack(tallies)
        heads, near = [packed[row] for row in rows], [tallies.near[row] for row in rows]
        keys = [self._keys.neighbours(items[row]) for row in rows]
        five = list(zip(before, fences, heads, near, expires_s, strict=True))
        calls: list[tuple[list[str], list[Any]]] = [
            (keys[i : i + _CHUNK], list(chain.from_iterable(five[i : i + _CHUNK])))
            for i in range(0, len(keys), _CHUNK)
        ]
        with steps_of(self._marks, self._keys, len(calls)) as steps:
            replies = run_script(
                self._client, schema.SAVE_NEIGHBOURS_SCRIPT, steps.guard(calls), self._where
            )
        return [
            rows[chunk * _CHUNK + position - 1]
            for chunk, reply in enumerate(replies)
            for position in reply
        ]
