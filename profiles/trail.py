"""The numbers by which a writer's writes are known, so that it is noticed when some are lost.

Each thread counts its guarded writes. A write raises its thread's number in Redis, and is made only
where every thread's number has reached what was acknowledged before. A Redis loses writes from the
end only, so whoever finds the numbers finds the writes behind them.

Numbers of writes whose answer never came are not used again: such a write may or may not be there,
and a later one must not be taken for it.

What is read for more than a save of the same row goes by the numbers as well, and raises none. A
trail that missed a write once is refused for good: two servers may answer by turns.

PURE. It does not know what is written, nor the script that compares (`schema.py`).
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Final

from .errors import WritesLost

Tail = tuple[str, str, str]  # the last three ARGV of a guarded script
UNGUARDED: Final[Tail] = ("", "", "")


@dataclass
class Steps:
    """Guarded writes of one thread, in order."""

    key: str  # the last of their KEYS
    tails: Sequence[Tail]
    made: int  # how many of them were acknowledged, once they are

    def guard(
        self, calls: Sequence[tuple[list[str], list[Any]]]
    ) -> list[tuple[list[str], list[Any]]]:
        """Keys and arguments of script calls, one a step, with what the guard needs."""
        return [
            ([*keys, self.key], [*arguments, *tail])
            for (keys, arguments), tail in zip(calls, self.tails, strict=True)
        ]


class Trail:
    """Of one writer, from one beginning to the next. Any thread."""

    def __init__(self, key: str) -> None:
        """`key`: in Redis, of this trail alone."""
        self._key = key
        self._lock = threading.Lock()
        self._place_of: dict[int, int] = {}  # thread -> its place in what follows
        self._issued: list[int] = []
        self._acknowledged: list[int] = []
        self._lost: WritesLost | None = None

    @contextmanager
    def steps(self, count: int) -> Iterator[Steps]:
        """Numbers for `count` writes of this thread, in one pipeline. All count as acknowledged at
        the end, unless an error is raised or `made` was lowered. Raises WritesLost."""
        with self._lock:
            self._check()
            place = self._place_of.setdefault(threading.get_ident(), len(self._place_of))
            if place == len(self._issued):
                self._issued.append(0)
                self._acknowledged.append(0)
            before = self._issued[place]
            self._issued[place] += count
            known = list(self._acknowledged)
        tails = []
        for number in range(before + 1, before + count + 1):
            tails.append((str(place), str(number), ",".join(map(str, known))))
            known[place] = number
        steps = Steps(self._key, tails, count)
        with self._remembering_loss():
            yield steps
        if steps.made:
            with self._lock:
                self._acknowledged[place] = before + steps.made

    @contextmanager
    def looks(self, count: int) -> Iterator[Steps]:
        """For `count` reads, of what all acknowledged writes led to. Raises WritesLost."""
        with self._lock:
            self._check()
            tail = ("0", "0", ",".join(map(str, self._acknowledged)))
        with self._remembering_loss():
            yield Steps(self._key, [tail] * count, 0)

    def _check(self) -> None:
        if self._lost is not None:
            raise type(self._lost)(*self._lost.args)

    @contextmanager
    def _remembering_loss(self) -> Iterator[None]:
        try:
            yield
        except WritesLost as lost:
            with self._lock:
                self._lost = lost
            raise
