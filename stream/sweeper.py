"""Moves the profiles that nobody touches to the space of the live release.

A profile moves when its shopper does something. The others are moved here, some at a time,
at a limited rate, by one worker at a time. Where it stands is kept in Redis, so that another
worker goes on where one died. Saves are fenced like all others: whoever acted in between
was moved by that. A sweep is no visit: it does not put off the expiry of a profile.
"""

from __future__ import annotations

import logging
import secrets
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Final, cast

from profiles.arithmetic import Profiles
from profiles.connection import redis_errors
from profiles.errors import LayoutMismatch, ProfilesError, SchemaTooNew, StateCorrupt
from profiles.items import ItemStore
from profiles.schema import SWEEP_TTL_S, SWEEP_TURN_S, Keys
from profiles.store import ProfileStore

from . import metrics
from .catalogue import Catalogue, categories_of
from .memory import give_back
from .migration import Migrator

if TYPE_CHECKING:
    import redis

log = logging.getLogger(__name__)

_PAGE: Final = 256  # profiles in memory at a time
_RETRY_S: Final = 2.0
_UNREADABLE: Final = (StateCorrupt, SchemaTooNew, LayoutMismatch)
_LOOK_S: Final = 5.0  # for another generation of profiles, which may have some to move


@dataclass(frozen=True)
class Progress:
    """How far the sweep into one space has come."""

    seen: int
    moved: int
    done: bool


def progress(client: redis.Redis, keys: Keys, space: str) -> Progress | None:
    """None where no sweep into this space has begun."""
    with redis_errors("REDIS_URL"):
        stored = cast(
            list[bytes | None], client.hmget(keys.sweep(space), ["seen", "moved", "done"])
        )
    if stored[0] is None:
        return None
    return Progress(int(stored[0]), int(stored[1] or 0), stored[2] == b"1")


class Sweeper:
    """One worker's, on a thread of its own."""

    def __init__(
        self,
        client: redis.Redis,
        keys: Keys,
        store: ProfileStore,
        items: ItemStore,
        migrator: Migrator,
        catalogue: Callable[[], Catalogue],
        wanted_space: Callable[[], str],
        moved: Callable[[list[str], Catalogue], None],
        failed: Callable[[BaseException], None],
        *,
        per_s: float,
    ) -> None:
        """`store` is not shared: a writer of its own, that remembers nothing. `catalogue` gives
        the one that serves, `wanted_space` the space that CURRENT leads to; `moved` is told who
        was moved, `failed` what ends the thread."""
        self._client = client
        self._keys = keys
        self._store = store
        self._items = items
        self._migrator = migrator
        self._catalogue = catalogue
        self._wanted_space = wanted_space
        self._moved = moved
        self._failed = failed
        self._per_s = per_s
        self._token = secrets.token_hex(8).encode()
        self._ended = threading.Event()
        self._wanted = threading.Event()
        self._thread = threading.Thread(target=self._run, name="sweeper", daemon=True)

    def start(self) -> None:
        """Begin, with what an earlier process may have left half done."""
        self._wanted.set()
        self._thread.start()

    def wake(self) -> None:
        """Another space is live."""
        self._wanted.set()

    def stop(self, wait_s: float = 1.0) -> None:
        """Stop after the page in hand."""
        self._ended.set()
        self._wanted.set()
        if self._thread.is_alive():
            self._thread.join(wait_s)

    def _run(self) -> None:
        try:
            self._sweep_on()
        except Exception as error:
            self._failed(error)

    def _sweep_on(self) -> None:
        generation = self._keys.generation
        while not self._ended.is_set():
            if not self._wanted.wait(_LOOK_S) and generation == self._keys.generation:
                continue
            self._wanted.clear()
            generation = self._keys.generation
            try:
                while not self._ended.is_set() and not self.sweep():
                    self._ended.wait(_RETRY_S)
            except ProfilesError as error:
                log.warning("the sweep pauses: %s", error)
                self._ended.wait(_RETRY_S)
                self._wanted.set()

    def sweep(self) -> bool:
        """Go through all profiles; whether none is left to move. False also while it is another
        worker's turn, and when the live space changed meanwhile. Raises RedisUnavailable."""
        catalogue = self._catalogue()
        space = catalogue.engine.space
        stored = self._state(space)
        if stored.get(b"done") == b"1":
            self._let_go()  # another worker's sweep, perhaps: this one was ready to move them, too
            return True
        if self._items.current_space() != space or not self._my_turn():
            return False
        cursor, seen, moved = (int(stored.get(name, 0)) for name in (b"cursor", b"seen", b"moved"))
        pass_moved, from_start, generation = 0, cursor == 0, self._keys.generation
        while not self._ended.is_set():
            if self._catalogue() is not catalogue or not self._my_turn():
                return False
            if self._keys.generation != generation:
                return False
            cursor, users = self._page(cursor)
            began_s = time.monotonic()
            for start in range(0, len(users), _PAGE):
                pass_moved += self._move(users[start : start + _PAGE], catalogue)
            seen += len(users)
            self._note(space, cursor, seen, moved + pass_moved, done=False)
            if pass_moved:
                pause_s = len(users) / self._per_s - (time.monotonic() - began_s)
                self._ended.wait(max(0.0, pause_s))
            if cursor == 0:
                break
        if self._ended.is_set():
            return False
        moved += pass_moved
        whole = from_start and not pass_moved
        # A pass that moved some, or did not begin at the beginning, may have missed others.
        self._note(space, 0, seen, moved, done=whole)
        if whole:
            self._finish(space)
        return whole

    def _finish(self, space: str) -> None:
        """What is live and what was before stay; rolling back must be quick."""
        others = [old for old in self._items.spaces() if old != space]
        # Asked after that: who is filling another space by then does so because it is wanted.
        for old in set(others[:-1]) - {self._wanted_space()}:
            self._items.drop_space(old)
        self._let_go()
        log.info("all profiles are in space %s", space)

    def _let_go(self) -> None:
        self._migrator.forget_vectors()
        give_back()

    def _move(self, users: list[str], catalogue: Catalogue) -> int:
        """How many were moved. Who was saved by others meanwhile is theirs, or the next pass'."""
        carry = partial(self._migrator.carry, catalogue=catalogue)
        plain, left = self._store.move(users, catalogue.space, carry)
        moved = [users[row] for row in plain]
        moved += self._move_others([users[row] for row in left], catalogue)
        self._moved(moved, catalogue)
        metrics.PROFILES_MIGRATED.labels("sweep").inc(len(moved))
        return len(moved)

    def _move_others(self, users: list[str], catalogue: Catalogue) -> list[str]:
        """Who was moved of those about whom something is out of the ordinary."""
        if not users:
            return []
        done = list[str]()
        users, profiles = self._load(users)
        for part, rows, _, moved in self._migrator.bring(profiles, catalogue):
            here = sorted(moved)
            names = catalogue.names_of(categories_of(part, here))
            ids = [users[row] for row in rows]
            refused = self._store.save(ids, part, here, names, 0.0, renew=False)
            done += [ids[row] for row in here if row not in refused]
        return done

    def _load(self, users: list[str]) -> tuple[list[str], Profiles]:
        """The profiles of those whose state can be read. One that cannot must not keep the others
        from moving: nothing can read it in its own space either."""
        try:
            return users, self._store.load(users)
        except _UNREADABLE:
            pass
        readable = [user for user in users if self._can_be_read(user)]
        return readable, self._store.load(readable)

    def _can_be_read(self, user: str) -> bool:
        try:
            self._store.load([user])
        except _UNREADABLE as error:
            metrics.SWEEP_SKIPPED.inc()
            log.warning("the sweep leaves one profile out: %s", error)
            return False
        return True

    def _page(self, cursor: int) -> tuple[int, list[str]]:
        prefix, suffix = (part.encode() for part in self._keys.profile("\0").split("\0"))
        with redis_errors("REDIS_URL"):
            cursor, found = cast(
                tuple[int, list[bytes]],
                self._client.scan(cursor, match=prefix + b"*", count=_PAGE),
            )
        return cursor, [key.removeprefix(prefix).removesuffix(suffix).decode() for key in found]

    def _state(self, space: str) -> dict[bytes, bytes]:
        with redis_errors("REDIS_URL"):
            return cast(dict[bytes, bytes], self._client.hgetall(self._keys.sweep(space)))

    def _note(self, space: str, cursor: int, seen: int, moved: int, *, done: bool) -> None:
        metrics.SWEEP_SEEN.set(seen)
        metrics.SWEEP_MOVED.set(moved)
        key = self._keys.sweep(space)
        fields: dict[Any, Any] = {
            "cursor": cursor, "seen": seen, "moved": moved, "done": int(done),
        }  # fmt: skip
        with redis_errors("REDIS_URL"):
            self._client.hset(key, mapping=fields)
            self._client.expire(key, SWEEP_TTL_S)

    def _my_turn(self) -> bool:
        """Take the turn, or keep it. Two at once, after a pause of more than SWEEP_TURN_S, do
        each other's work again and no harm."""
        turn = self._keys.sweep_turn()
        with redis_errors("REDIS_URL"):
            if self._client.set(turn, self._token, nx=True, ex=SWEEP_TURN_S):
                return True
            if self._client.get(turn) != self._token:
                return False
            self._client.expire(turn, SWEEP_TURN_S)
            return True
