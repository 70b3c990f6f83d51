"""Items in Redis: their records, their vectors per embedding space, and who waits for them.

It does not know how a text becomes a vector, nor which topic an item came from.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Final, cast

import numpy as np

from . import ranking, schema
from .arithmetic import Floats
from .connection import address, knows_command, redis_errors, scan_pages
from .marks import Marks, steps_of, write
from .schema import ItemRecord, read_record
from .scripts import run_script, script_sha

if TYPE_CHECKING:
    import redis
    from redis.client import Pipeline

BUCKETS: Final = 256
_CHANGES_KEPT: Final = 100_000
_WAITERS_PER_READ: Final = 1_000
_KEYS_PER_SCAN: Final = 1_000
# Redis does nothing else while a script runs, and a vector takes up to a millisecond to index.
_VECTORS_PER_CALL: Final = 4


@dataclass(frozen=True)
class Origin:
    """Where a catalogue record came from: the later offset of one source wins."""

    source: int  # schema.source_key
    offset: int


class ItemStore:
    """Items of one namespace in one Redis."""

    def __init__(
        self,
        client: redis.Redis,
        keys: schema.Keys,
        where: str = "",
        marks: Marks | None = None,
    ) -> None:
        """`marks`: with them whoever writes what is read from a topic finds out (WritesLost) when
        earlier writes were lost. All of these may be made again."""
        self._client = client
        self._keys = keys
        self._where = address(where) if where else "REDIS_URL"
        self._marks = marks
        self._awaited = client.register_script(schema.AWAITED_SCRIPT)
        self._has_vector_sets: bool | None = None

    def _write(self, fill: Callable[[Pipeline], Any]) -> None:
        with redis_errors(self._where):
            write(self._client, self._marks, self._keys, fill)

    @property
    def keys(self) -> schema.Keys:
        """Where they are."""
        return self._keys

    @property
    def beginnings(self) -> int:
        """How often writes were lost, as far as was noticed, and all was begun anew."""
        return self._marks.beginnings if self._marks is not None else 0

    # records

    def put(
        self,
        records: Sequence[ItemRecord],
        versions: Sequence[str],
        origins: Sequence[Origin | None],
    ) -> None:
        """Keep n records with the version of their text; origin None is an event's inline text.
        Items whose text changed are announced to all workers."""
        if not records:
            return
        keys: list[str] = []
        args: list[str | int] = []
        for record, version, origin in zip(records, versions, origins, strict=True):
            item = schema.key64(record.item_id)
            keys.append(self._keys.item(item))
            source, offset = (
                (f"{origin.source:016x}", f"{origin.offset:020d}") if origin else ("", "")
            )
            deleted = "1" if record.deleted else ""
            args += [source, offset, json.dumps(asdict(record)), version, deleted, f"{item:016x}"]
        keys.append(self._keys.item_changes())
        call = (script_sha(schema.PUT_ITEM_SCRIPT), len(keys), *keys, *args, _CHANGES_KEPT)
        self._write(partial(_evalsha, call))

    def records(self, items: Sequence[int]) -> dict[int, tuple[ItemRecord, str]]:
        """item key -> (record, text version) of those that are known."""
        with redis_errors(self._where):
            pipe = self._client.pipeline(transaction=False)
            for item in items:
                pipe.hmget(self._keys.item(item), "record", "text_version")
            replies = pipe.execute()
        return {
            item: (read_record(reply[0]), reply[1].decode())
            for item, reply in zip(items, replies, strict=True)
            if reply[0] is not None
        }

    def all_records(self) -> Iterator[ItemRecord]:
        """Every item that is known, deleted ones too, in no order; one that comes or goes meanwhile
        may be among them or not."""
        pages = scan_pages(self._client, self._keys.every_item(), _KEYS_PER_SCAN, self._where)
        for keys in pages:
            with redis_errors(self._where):
                pipe = self._client.pipeline(transaction=False)
                for key in keys:
                    pipe.hget(key, "record")
                found = pipe.execute()
            yield from (read_record(raw) for raw in found if raw is not None)

    # vectors

    def put_vectors(
        self, space: str, item_ids: Sequence[str], versions: Sequence[str], vectors: Floats
    ) -> None:
        """Keep (n, D) unit vectors of n items in one space, and index them where Redis can. An
        item that is deleted by now, or has another text than the version says, is left out."""
        put, indexed = script_sha(schema.PUT_VECTORS_SCRIPT), "1" if self.has_vector_sets() else ""
        for start in range(0, len(item_ids), _VECTORS_PER_CALL):
            part = slice(start, start + _VECTORS_PER_CALL)
            keys: list[str] = []
            args: list[str | bytes] = []
            for item_id, version, vector in zip(
                item_ids[part], versions[part], vectors[part], strict=True
            ):
                item = schema.key64(item_id)
                raw = np.ascontiguousarray(vector, dtype="<f4").tobytes()
                keys += [self._keys.item(item), self._keys.vectors(space, item)]
                args += [item_id, version, bytes.fromhex(version) + raw]
            keys.append(self._keys.index(space))
            call = (put, len(keys), *keys, *args, indexed)
            self._write(partial(_evalsha, call))

    def vectors(self, space: str, versions: Mapping[str, str]) -> dict[str, Floats]:
        """item id -> (D,) vector, for items whose stored vector is of the given text version."""
        with redis_errors(self._where):
            pipe = self._client.pipeline(transaction=False)
            for item_id in versions:
                pipe.hget(self._keys.vectors(space, schema.key64(item_id)), item_id)
            replies = pipe.execute()
        return {
            item_id: np.frombuffer(raw, dtype="<f4", offset=8)
            for (item_id, version), raw in zip(versions.items(), replies, strict=True)
            if raw is not None and raw[:8] == bytes.fromhex(version)
        }

    def vectors_by_key(self, space: str, items: Sequence[int]) -> dict[int, Floats]:
        """item key -> (D,) vector of whatever text was encoded last, of those that have one."""
        ids = {key: record.item_id for key, (record, _) in self.records(items).items()}
        with redis_errors(self._where):
            pipe = self._client.pipeline(transaction=False)
            for key, item_id in ids.items():
                pipe.hget(self._keys.vectors(space, key), item_id)
            replies = pipe.execute()
        return {
            key: np.frombuffer(raw, dtype="<f4", offset=8)
            for key, raw in zip(ids, replies, strict=True)
            if raw is not None
        }

    def some_vectors(self, space: str, most: int) -> dict[str, Floats]:
        """item id -> (D,) vector of about `most` items of a space, from the same buckets for every
        space."""
        found: dict[str, Floats] = {}
        for bucket in range(BUCKETS):
            with redis_errors(self._where):
                stored = cast(
                    dict[bytes, bytes],
                    self._client.hgetall(self._keys.vectors_bucket(space, bucket)),
                )
            for item_id, raw in stored.items():
                found[item_id.decode()] = np.frombuffer(raw, dtype="<f4", offset=8)
            if len(found) >= most:
                break
        return found

    def item_pages(self) -> Iterator[list[int]]:
        """The keys of all items, in no order and some perhaps twice."""
        return self._pages(self._keys.item(0))

    def rely(self) -> None:
        """On what was read so far, whoever wrote it: a Redis that loses that loses this as well,
        and later writes find out. Raises RedisUnavailable, WritesLost."""
        self._write(lambda pipe: None)

    def drop_space(self, space: str) -> None:
        """Give up all vectors of a space that no profile lives in any more."""
        with redis_errors(self._where):
            pipe = self._client.pipeline(transaction=False)
            for bucket in range(BUCKETS):
                pipe.unlink(self._keys.vectors_bucket(space, bucket))
            pipe.unlink(self._keys.index(space), self._keys.ranker(space))
            pipe.hdel(self._keys.spaces(), space)
            pipe.execute()

    def drop_vectors(self, space: str, item_ids: Iterable[str]) -> None:
        """Take items out of search: no nearest-items answer names them any more."""
        indexed = self.has_vector_sets()

        def drop(pipe: Pipeline) -> None:
            for item_id in item_ids:
                pipe.hdel(self._keys.vectors(space, schema.key64(item_id)), item_id)
                if indexed:
                    _raw(pipe, "VREM", self._keys.index(space), item_id)

        self._write(drop)

    def has_vector_sets(self) -> bool:
        """Whether this Redis (8.0 and up) has VADD and VSIM."""
        if self._has_vector_sets is None:
            with redis_errors(self._where):
                self._has_vector_sets = knows_command(_raw(self._client, "COMMAND INFO", "VADD"))
        return self._has_vector_sets

    def set_space(self, space: str) -> None:
        """Tell readers and other workers which space workers write now. Raises RedisUnavailable,
        WritesLost."""
        if self.current_space() != space:
            keys = [self._keys.current_space(), self._keys.sweep(space), self._keys.spaces()]
            with steps_of(self._marks, self._keys, 1) as steps:
                named = steps.guard([(keys, [space, int(time.time() * 1000)])])
                run_script(self._client, schema.NAME_SPACE_SCRIPT, named, self._where)

    def keep_space(self, space: str) -> None:
        """Note that items have vectors in it, for `spaces`."""
        with redis_errors(self._where):
            self._client.hsetnx(self._keys.spaces(), space, "0")

    def spaces(self) -> list[str]:
        """All that items have vectors in; who was named as current last comes last."""
        with redis_errors(self._where):
            found = cast(dict[bytes, bytes], self._client.hgetall(self._keys.spaces()))
        return [space.decode() for space in sorted(found, key=lambda space: int(found[space]))]

    def current_space(self) -> str:
        """The space that workers write now; "" before the first."""
        with redis_errors(self._where):
            raw = cast(bytes | None, self._client.get(self._keys.current_space()))
        return raw.decode() if raw else ""

    def put_ranker(self, space: str, weights: ranking.Weights | None) -> None:
        """Give readers of a space the ranker to use; None: the weights by hand."""
        key = self._keys.ranker(space)
        with redis_errors(self._where):
            if weights is None:
                self._client.unlink(key)
            else:
                fields: dict[Any, Any] = dict(ranking.to_fields(weights))
                self._client.hset(key, mapping=fields)

    # categories

    def name_categories(self, names: Mapping[int, str]) -> None:
        """Keep the names behind category keys."""
        if names:
            named: dict[Any, Any] = {f"{k:016x}": name for k, name in names.items()}
            self._write(lambda pipe: pipe.hset(self._keys.categories(), mapping=named))

    def category_names(self, categories: Sequence[int]) -> dict[int, str]:
        """category key -> name of those that are known."""
        if not categories:
            return {}
        with redis_errors(self._where):
            fields = [f"{k:016x}" for k in categories]
            replies = cast(list[bytes | None], self._client.hmget(self._keys.categories(), fields))
        return {k: r.decode() for k, r in zip(categories, replies, strict=True) if r is not None}

    # waiting users

    def wait_for(self, waiters: Mapping[str, Iterable[int]]) -> None:
        """user id -> item keys: resolve this user when one of these items gets a text."""

        def register(pipe: Pipeline) -> None:
            for user_id, items in waiters.items():
                for item in items:
                    pipe.sadd(self._keys.waiting(item), user_id)
                    pipe.expire(self._keys.waiting(item), schema.WAITING_TTL_S)

        self._write(register)

    def awaited(self, items: Sequence[int]) -> set[int]:
        """Those of the items that users wait for."""
        if not items:
            return set()
        with redis_errors(self._where):
            positions = self._awaited(keys=[self._keys.waiting(item) for item in items])
        return {items[position - 1] for position in positions}

    def awaited_pages(self) -> Iterator[list[int]]:
        """The keys of all items that users wait for, in no order and some perhaps twice."""
        return self._pages(self._keys.waiting(0))

    def _pages(self, of_zero: str) -> Iterator[list[int]]:
        """The item keys that redis keys end in, which are named as that of item 0."""
        pattern = f"{of_zero[:-16]}*"
        for found in scan_pages(self._client, pattern, _KEYS_PER_SCAN, self._where):
            if found:
                yield [int(key[-16:], 16) for key in found]

    def resolve_waiting(self, item: int, resolve: Callable[[list[str]], None]) -> None:
        """Call `resolve` with the users that wait for an item, some at a time; those it returned
        from are no longer waiting. If it raises, the rest keep waiting."""
        key = self._keys.waiting(item)
        while True:
            with redis_errors(self._where):
                members = cast(list[bytes], self._client.srandmember(key, _WAITERS_PER_READ))
            if not members:
                return
            resolve([member.decode() for member in members])
            with steps_of(self._marks, self._keys, 1) as steps:
                served = steps.guard([([key], members)])
                run_script(self._client, schema.SERVED_SCRIPT, served, self._where)

    # changes

    def changes_end(self) -> str:
        """The position after the newest announced change."""
        with redis_errors(self._where):
            newest = cast(list[Any], self._client.xrevrange(self._keys.item_changes(), count=1))
        return newest[0][0].decode() if newest else "0-0"

    def changes_since(self, position: str) -> tuple[str, dict[int, str]]:
        """(new position, item key -> latest text version of the items announced since)."""
        with redis_errors(self._where):
            reply = cast(
                list[Any], self._client.xread({self._keys.item_changes(): position}, count=10_000)
            )
        if not reply:
            return position, {}
        entries = reply[0][1]
        changed = {int(f[b"item"], 16): f.get(b"version", b"").decode() for _, f in entries}
        return entries[-1][0].decode(), changed


def _evalsha(call: tuple[Any, ...], pipe: Pipeline) -> None:
    pipe.evalsha(*call)


def _raw(client: Any, *command: Any) -> Any:
    """Send a command redis-py has no method for (on a client or a pipeline)."""
    return client.execute_command(*command)
