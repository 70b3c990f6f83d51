"""What a writer may rely on to be in Redis, and how it finds out that it is not.

A Redis that fails over to a replica, or starts from an older file, may lose the last writes that it
acknowledged. Whoever then folds on leaves the events behind those writes out for good. So a writer
keeps two things in Redis:

    trail   per thread the number of its latest guarded write, see `trail.py`. A Redis that does not
            have those that it acknowledged before refuses a write (WritesLost).
    marks   per source partition the next offset whose saves are all there. They are raised by a
            guarded write, after the saves: a mark that is there proves its saves.

After WritesLost: forget what is remembered, begin a trail anew, and read again from the marks.

It knows neither what the writes are nor where sources are read from.
"""

from __future__ import annotations

import secrets
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import TYPE_CHECKING, Any, Final

from . import schema
from .connection import address, redis_errors
from .generations import follow
from .scripts import run_script, script_sha
from .trail import UNGUARDED, Steps, Trail

if TYPE_CHECKING:
    import redis


class Marks:
    """Of one writing process, or of a part of it that reads topics of its own. Any thread."""

    def __init__(
        self, client: redis.Redis, keys: schema.Keys, where: str = "", *, follows: bool = False
    ) -> None:
        """`follows`: the keys become those of the live generation at each beginning, and nothing is
        written once another is live (GenerationRetired). Raises RedisUnavailable."""
        self._client = client
        self._keys = keys
        self._follows = follows
        self._where = address(where) if where else "REDIS_URL"
        self._lock = threading.Lock()
        self.beginnings = 0
        """Times that `begin_anew` was called."""
        self.begin_anew()

    def begin_anew(self) -> None:
        """Rely on nothing that was written before. No save that goes back to an earlier load may
        be on its way. Raises RedisUnavailable."""
        if self._follows:
            with redis_errors(self._where):
                follow(self._client, self._keys)
        with self._lock:
            self.beginnings += 1
            self._trail = Trail(self._keys.trail(secrets.token_hex(8), live=self._follows))

    @property
    def keys(self) -> schema.Keys:
        """Of what is marked."""
        return self._keys

    def steps(self, count: int) -> AbstractContextManager[Steps]:
        """See `Trail.steps`."""
        with self._lock:
            return self._trail.steps(count)

    def looks(self, count: int) -> AbstractContextManager[Steps]:
        """See `Trail.looks`."""
        with self._lock:
            return self._trail.looks(count)

    def claim(self, sources: Sequence[int]) -> tuple[dict[int, int], bool]:
        """The marks of those sources that have one, to begin at; from then on nothing is written
        where they are lost. And whether offsets may be trusted that were committed before there
        were marks. Raises RedisUnavailable, WritesLost."""
        reply = self._guarded(schema.CLAIM_SCRIPT, [f"{source:016x}" for source in sources])
        found = zip(sources, reply[1:], strict=True)
        return {source: int(at) for source, at in found if at is not None}, reply[0] == b"1"

    def advance(self, marks: Mapping[int, int]) -> None:
        """Source -> next offset: all below is saved and acknowledged. Without any: make sure that
        nothing was lost. Raises RedisUnavailable, WritesLost."""
        self._guarded(
            schema.ADVANCE_SCRIPT,
            [part for source, at in marks.items() for part in (f"{source:016x}", str(at))],
        )

    def first(self, *, may_be_older: bool) -> None:
        """Say, where nobody has yet, whether this namespace was written before there were marks: if
        it may be, and has a space. Before one is named. Raises RedisUnavailable, WritesLost."""
        keys = [self._keys.marks(), self._keys.current_space()]
        self._guarded(schema.FIRST_SCRIPT, ["1" if may_be_older else ""], keys)

    def _guarded(
        self, script: str, arguments: Sequence[str], keys: Sequence[str] = ()
    ) -> list[Any]:
        with self.steps(1) as steps:
            calls = steps.guard([(list(keys) or [self._keys.marks()], list(arguments))])
            return run_script(self._client, script, calls, self._where)[0]


@contextmanager
def steps_of(marks: Marks | None, keys: schema.Keys, count: int) -> Iterator[Steps]:
    """As `Marks.steps`; without marks the writes are not guarded."""
    if marks is None:
        yield Steps(keys.trail("none"), [UNGUARDED] * count, 0)
    else:
        with marks.steps(count) as steps:
            yield steps


@contextmanager
def looks_of(marks: Marks | None, keys: schema.Keys, count: int) -> Iterator[Steps]:
    """As `Marks.looks`; without marks nothing is missed."""
    if marks is None:
        yield Steps(keys.trail("none"), [UNGUARDED] * count, 0)
    else:
        with marks.looks(count) as looks:
            yield looks


def write(
    client: redis.Redis,
    marks: Marks | None,
    keys: schema.Keys,
    fill: Callable[[redis.client.Pipeline], None],
) -> None:
    """A pipeline of writes that may be made twice, and do no harm where earlier ones were lost.
    Raises what redis raises, for `redis_errors` to tell."""
    from redis.exceptions import NoScriptError

    for attempt in range(2):
        with steps_of(marks, keys, 1) as steps:
            pipe = client.pipeline(transaction=False)
            fill(pipe)
            # Last: on one connection, a step that is there proves what went before it.
            pipe.evalsha(script_sha(schema.STEP_SCRIPT), 1, steps.key, *steps.tails[0])
            try:
                pipe.execute()
                return
            except NoScriptError:
                if attempt:
                    raise
                steps.made = 0
        for script in _PIPELINED:
            client.script_load(script)


_PIPELINED: Final = (schema.STEP_SCRIPT, schema.PUT_ITEM_SCRIPT, schema.PUT_VECTORS_SCRIPT)
