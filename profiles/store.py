"""The writer's side: batched loads and fenced saves of profiles.

A save names the fence the profile was loaded with; Redis refuses it where the stored fence
has moved on. So two workers that hold one user (a stalled one that wakes up after its
partitions were given away, a user who arrives on two partitions) cannot overwrite each other:
the refused one loads again, finds in the watermark what is in already, and folds the rest.

It does not know events, topics or encoders.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, count
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from . import arithmetic, schema
from .arithmetic import EventColumns, Layout, Profiles
from .cache import ProfileCache, Row, Rows
from .connection import address, redis_errors
from .errors import LayoutMismatch, SchemaTooNew, StateCorrupt
from .fates import Fates
from .ids import Ids
from .marks import Marks, looks_of, steps_of
from .outlook import Fields
from .scripts import run_script, script_sha

if TYPE_CHECKING:
    import redis
    from redis.connection import AbstractConnection

    from .kernel import Kernel, NamesOf

# Profiles per script call. Redis runs a script alone, and readers wait: beside a worker at 24,000
# events/s their p99 was 9.8 ms with 256, 5.8 with 64, and 7.2 with 32, and throughput the same.
_CHUNK: Final = 64

Carry = Callable[[Sequence[bytes], "Kernel"], Mapping[int, bytes]]
"""States of n users (b"" for none) -> position -> what it is in another space."""


@dataclass(frozen=True)
class FoldedHere:
    """What became of n users and their events in `ProfileStore.fold`."""

    again: list[int]  # users to be folded the general way, from a load on
    refused: int  # how many of these are there because another writer overtook this one
    saved: int  # users
    moved: int  # of these, users whose profile came from another space


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
        marks: Marks | None = None,
    ) -> None:
        """`writer` is a random 64-bit number of this process. Every save counts it on and puts
        it into its fences, so that no two saves can be taken for each other. `cached`: how many
        profiles are remembered after a save, to be loaded from memory the next time. `marks`
        guards its loads and saves; without them a save may follow ones that Redis lost."""
        self._client = client
        self._keys = keys
        self._layout = layout
        self._ttl_s = math.ceil(ttl_s)
        self._writers = count(writer)  # next() is one step for all threads
        self._where = address(where) if where else "REDIS_URL"
        self._cache = ProfileCache(cached, _row_bytes(layout), writer % (1 << 64))
        self._marks = marks
        self._held_kernel: tuple[int, Kernel] | None = None

    def load(self, user_ids: Sequence[str], *, anew: bool = False) -> Profiles:
        """The profiles of n users, no user twice; who has none gets an empty one. `anew`: as Redis
        has them, whatever is remembered; for who might find nothing to do, and so save nothing
        that could be refused.

        Raises RedisUnavailable, WritesLost, SchemaTooNew, LayoutMismatch, StateCorrupt.
        """
        if anew:
            self._cache.take(user_ids)
        found = self._rows(user_ids)
        rows = [found.row(i) for i in range(len(user_ids))]
        states = [state or None for state, _ in rows]
        fences = [fence or None for _, fence in rows]
        try:
            return arithmetic.unpack(states, fences, self._layout)
        except (SchemaTooNew, LayoutMismatch, StateCorrupt):
            for user_id, state, fence in zip(user_ids, states, fences, strict=True):
                self._refuse_by_name(self._keys.profile(user_id), state, fence)
            raise

    def _rows(self, user_ids: Sequence[str]) -> Rows:
        """State and fence of n users, from memory, or else from Redis; empty for none. They stand
        until this thread asks again."""
        rows, missing = self._cache.take(user_ids)
        if len(missing):
            names = list(user_ids)
            rows = rows.with_rows(missing, self._fetch([names[i] for i in missing.tolist()]))
        return rows

    def move(
        self, user_ids: Sequence[str], space: int, carry: Carry
    ) -> tuple[list[int], list[int]]:
        """Save what `carry` brings into `space` of n users' profiles, and nothing else of them; the
        positions of who was moved, and of who is in another space yet and was left out. Whoever was
        saved by others meanwhile is among neither. Raises as `carry`, and RedisUnavailable."""
        found = self._rows(user_ids)
        rows = [found.row(i) for i in range(len(user_ids))]
        states = [state for state, _ in rows]
        carried = carry(states, self._kernel)
        users = list(carried)
        before = [rows[i][1] for i in users]
        watermarks = [arithmetic.read_fence(fence)[3] for fence in before]
        writer = next(self._writers) % (1 << 64)
        fences, _ = arithmetic.next_fences(
            before, watermarks, writer, 0.0, self._ttl_s, may_renew=False
        )
        keys = [self._keys.profile(user_ids[i]) for i in users]
        three = list(zip(before, fences, carried.values(), strict=True))
        refused = self._run_for(schema.MOVE_SCRIPT, keys, three, range(len(users)))
        left = [i for i in arithmetic.elsewhere(states, space) if i not in carried]
        gone = {users[i] for i in refused}
        return [i for i in users if i not in gone], left

    def forget_cached(self, user_ids: Sequence[str] | None = None) -> None:
        """Load these profiles, or all, from Redis the next time: others may have written
        meanwhile."""
        if user_ids is None:
            self._cache.clear()
        else:
            self._cache.take(user_ids)

    def _fetch(self, user_ids: Sequence[str]) -> list[Row]:
        keys = [self._keys.profile(user_id) for user_id in user_ids]
        calls: list[tuple[list[str], list[Any]]] = [
            (keys[i : i + _CHUNK], []) for i in range(0, len(keys), _CHUNK)
        ]
        with looks_of(self._marks, self._keys, len(calls)) as looks:
            replies = self._run(schema.LOAD_SCRIPT, looks.guard(calls))
        flat = [value or b"" for reply in replies for value in reply]
        return list(zip(flat[::2], flat[1::2], strict=True))

    # --- the fast way

    def warm_up(self) -> None:
        """Make `fold` ready: compile its kernel, or load what was compiled before."""
        self._cache.warm_up()
        self._kernel.warm_up()

    def fold(
        self,
        user_ids: Sequence[str],
        events: EventColumns,
        first: int,
        space: int,
        names_of: NamesOf,
        now_s: float,
        fates: Fates,
        sources: Collection[int],
        carry: Carry = lambda states, kernel: {},
    ) -> FoldedHere:
        """Load, fold and save n users, no user twice, who are rows `first`, … of the events: in
        one go for those about whom nothing is out of the ordinary.

        names_of: category keys -> the names that are known. fates: of the events. sources: of all
        partitions that there are today. carry: brings states into the space. Raises what that
        does, and RedisUnavailable; then any part may be saved, and folding again tells which.
        Raises WritesLost.
        """
        ids = Ids.of(user_ids)
        rows, carried = self._rows(ids), dict[int, bytes]()
        here = rows
        if _elsewhere(rows, space):
            carried = dict(carry([rows.row(i)[0] for i in range(len(ids))], self._kernel))
            moved = [(state, rows.row(i)[1]) for i, state in carried.items()]
            here = rows.with_rows(np.fromiter(carried, np.int64, len(carried)), moved)
        writer = next(self._writers) % (1 << 64)
        with steps_of(self._marks, self._keys, -(-len(user_ids) // _CHUNK)) as steps:
            folded = self._kernel.fold(
                ids, here, events, first, space, writer, now_s, names_of, sources, steps
            )
            at = np.flatnonzero(folded.fate)
            fates.folded(at, folded.fate[at], [ids[i] for i in folded.split.tolist()])
            replies = self._send(folded.payload, folded.calls)
            steps.made = folded.calls
        refused = folded.written[_refused(replies)]
        if len(refused):
            at = folded.events_of(refused)
            fates.refused(at, folded.fate[at], [ids[i] for i in refused.tolist()])
        saved = np.setdiff1d(folded.written, refused)
        self._cache.put(ids, saved, folded.rows)
        self._cache.put(ids, folded.left, rows)
        again = [*folded.left.tolist(), *refused.tolist()]
        return FoldedHere(
            again, len(refused), len(saved), len(carried.keys() & set(saved.tolist()))
        )

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
        RedisUnavailable; then any part may be saved, and loading again tells which. Raises
        WritesLost.
        """
        rows = list(rows)
        writer = next(self._writers) % (1 << 64)
        every = rows == list(range(len(profiles)))
        picked = profiles if every else arithmetic.take(profiles, rows)
        before = picked.fences
        picked.fences, expires_s = arithmetic.next_fences(
            before, picked.watermarks, writer, now_s, self._ttl_s, may_renew=renew
        )
        states = arithmetic.pack(picked)
        glances = arithmetic.glances(picked, category_names)
        ids = [user_ids[row] for row in rows]
        keys = [self._keys.profile(user_id) for user_id in ids]
        five = list(zip(before, picked.fences, states, glances, expires_s, strict=True))
        kept = [i for i in range(len(ids)) if i not in picked.erased]
        refused = self._run_for(schema.SAVE_SCRIPT, keys, five, kept, guarded=True)
        refused += self._run_for(
            schema.ERASE_SCRIPT, keys, five, sorted(picked.erased), guarded=True
        )
        saved = np.setdiff1d(np.arange(len(ids)), refused)
        self._cache.put(ids, saved, Rows.of(list(zip(states, picked.fences, strict=True))))
        return [rows[i] for i in refused]

    def put_outlooks(
        self, user_ids: Sequence[str], fences: Sequence[bytes], outlooks: Sequence[Fields]
    ) -> list[int]:
        """Keep the outlooks of n users beside the profiles that they were computed from; the
        positions of those whose profile is another by now, or gone. Raises RedisUnavailable."""
        keys = [self._keys.profile(user_id) for user_id in user_ids]
        three = [(fence, *fields) for fence, fields in zip(fences, outlooks, strict=True)]
        return self._run_for(schema.PUT_OUTLOOK_SCRIPT, keys, three, range(len(keys)))

    def _run_for(
        self,
        script: str,
        keys: Sequence[str],
        arguments: Sequence[tuple[Any, ...]],
        users: Sequence[int],
        *,
        guarded: bool = False,
    ) -> list[int]:
        """Run a script for some of the users, some at a time; those that it refused."""
        parts = [users[i : i + _CHUNK] for i in range(0, len(users), _CHUNK)]
        calls: list[tuple[list[str], list[Any]]] = [
            ([keys[u] for u in part], list(chain.from_iterable(arguments[u] for u in part)))
            for part in parts
        ]
        if not guarded:
            return [users[i] for i in _refused(self._run(script, calls))]
        with steps_of(self._marks, self._keys, len(calls)) as steps:
            return [users[i] for i in _refused(self._run(script, steps.guard(calls)))]

    def _run(self, script: str, calls: Sequence[tuple[list[str], list[Any]]]) -> list[list[Any]]:
        """One EVALSHA per call, in one round trip."""
        return run_script(self._client, script, calls, self._where)

    @property
    def _kernel(self) -> Kernel:
        """Of the generation that the keys are of now."""
        held, generation = self._held_kernel, self._keys.generation
        if held is None or held[0] != generation:
            from .kernel import Kernel  # numba takes a second to load, and only this needs it

            sha = script_sha(schema.SAVE_SCRIPT)
            kernel = Kernel(self._layout, self._keys, sha, self._ttl_s, _CHUNK)
            held = self._held_kernel = generation, kernel
        return held[1]

    def _send(self, payload: memoryview, replies: int) -> list[list[int]]:
        """Commands as they are to go over the wire, and what each answers; it is `_run` for saves
        that are packed already, with the same patience."""
        if not replies:
            return []
        from redis.exceptions import NoScriptError

        pool = self._client.connection_pool
        with redis_errors(self._where):
            connection = pool.get_connection()
            try:
                for attempt in range(2):
                    try:
                        got: list[list[int]] = connection.retry.call_with_retry(
                            lambda: _exchange(connection, payload, replies),
                            lambda error: connection.disconnect(),  # type: ignore[no-untyped-call]
                        )
                        return got
                    except NoScriptError:
                        if attempt:
                            raise
                        self._client.script_load(schema.SAVE_SCRIPT)
            finally:
                pool.release(connection)
        raise AssertionError("unreachable")


# Beside what a profile holds at most: an id, and a fence of as many partitions as a shopper's
# events come from. Whoever has more is loaded each time.
_ID_BYTES: Final = 64
_PARTITIONS: Final = 16


def _row_bytes(layout: Layout) -> int:
    """Of a profile in which nothing waits for an item's text, with its fence and id."""
    state = (
        layout.header.itemsize
        + layout.window * schema.WINDOW_ENTRY.itemsize
        + layout.seen * np.dtype(np.uint64).itemsize
        + layout.categories * schema.CATEGORY_ENTRY.itemsize
        + layout.own_items * schema.OWN_ENTRY.itemsize
    )
    fence = schema.FENCE_HEADER.itemsize + _PARTITIONS * schema.WATERMARK_ENTRY.itemsize
    return _ID_BYTES + state + fence


def _elsewhere(rows: Rows, space: int) -> bool:
    """Whether one of the states lives in another space."""
    begin, end = arithmetic.SPACE_AT.start, arithmetic.SPACE_AT.stop
    at = rows.state_at[rows.state_at[:, 1] - rows.state_at[:, 0] >= end, 0]
    spaces = rows.bytes[at[:, None] + np.arange(begin, end)].view("<u8")
    return bool(((spaces != 0) & (spaces != space)).any())


def _exchange(connection: AbstractConnection, payload: memoryview, replies: int) -> list[list[int]]:
    """All replies are read before one of them is raised."""
    from redis.exceptions import ResponseError

    connection.send_packed_command([payload])  # type: ignore[no-untyped-call]
    got: list[Any] = []
    for _ in range(replies):
        try:
            got.append(connection.read_response())
        except ResponseError as error:
            got.append(error)
    for reply in got:
        if isinstance(reply, ResponseError):
            raise reply
    return got


def _refused(replies: Sequence[Sequence[int]]) -> list[int]:
    """Positions among all users that the calls were about."""
    return [
        call * _CHUNK + position - 1 for call, reply in enumerate(replies) for position in reply
    ]
