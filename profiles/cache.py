"""Profiles as this writer last saved them, so that a shopper who is active costs no load.

Right whoever else writes: a save names the fence it started from, and Redis refuses one that
starts from an old copy. A row is taken out while its profile is folded and put back once it is
saved, so a failure in between leaves nothing behind that Redis does not have.

It knows neither Redis nor what is in a row.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Sequence
from itertools import islice

Row = tuple[bytes, bytes]  # state and fence, as Redis has them; b"" for what is not there


class ProfileCache:
    """At most `capacity` rows; whoever was saved longest ago goes first. Several threads may use
    it, each for other users."""

    def __init__(self, capacity: int) -> None:
        self._lock = threading.Lock()
        self._capacity = capacity
        self._rows: dict[str, Row] = {}  # oldest first

    def __len__(self) -> int:
        return len(self._rows)

    def take(self, user_ids: Sequence[str]) -> list[Row | None]:
        """The rows of these users, who are not held from here on; None where none was."""
        with self._lock:
            pop = self._rows.pop
            return [pop(user_id, None) for user_id in user_ids]

    def clear(self) -> None:
        """Hold nothing."""
        with self._lock:
            self._rows.clear()

    def put(self, rows: Iterable[tuple[str, Row]]) -> None:
        """Hold what was saved of users that were taken out before."""
        with self._lock:
            self._rows.update(rows)
            excess = max(0, len(self._rows) - self._capacity)
            for user_id in list(islice(self._rows, excess)):
                del self._rows[user_id]
