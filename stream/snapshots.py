"""All profiles as they were at some offsets of the topic, in a folder or object store.

A snapshot is taken while workers go on. Its marks are read first: whatever lies below them is in
every profile that is read after. So the profiles are of slightly different moments, each says in
its watermark of which, and reading the topic on from the marks makes them whole: nothing is left
out, and what is in already is found applied.

Files appear complete or not at all, the manifest last; it has the checksums of the others.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, Final, cast

import pyarrow as pa
import pyarrow.parquet as pq

from profiles.connection import redis_errors
from profiles.errors import WritesLost
from profiles.marks import Marks
from profiles.schema import FENCE, OLDER, STATE, Keys

from .archive import Store, open_store
from .errors import UserError
from .profile_diff import pages

if TYPE_CHECKING:
    import redis

_SCHEMA: Final = pa.schema(
    [("user", pa.string()), ("state", pa.binary()), ("fence", pa.binary())],
    metadata={"penchant.snapshot": "1"},
)
_PART_USERS: Final = 20_000
_PAGE: Final = 256
_MANIFEST: Final = "manifest.json"
_VERSION: Final = 1

Page = tuple[list[str], list[bytes], list[bytes]]


@dataclass(frozen=True)
class Part:
    """One file of profiles."""

    name: str
    sha256: str
    users: int


@dataclass(frozen=True)
class Snapshot:
    """What a manifest says, and where it lies."""

    url: str
    namespace: str
    created: str  # ISO 8601
    generation: int
    space: str  # that workers wrote then
    users: int
    marks: dict[str, int]  # source (16 hex digits) -> next offset of which all below is in
    parts: tuple[Part, ...]

    def sources(self) -> dict[int, int]:
        """The marks by source key."""
        return {int(source, 16): at for source, at in self.marks.items()}

    def pages(self, user: str = "") -> Iterator[Page]:
        """Users, states and fences, some at a time; `user`: of that one alone. Raises UserError
        for a file that is not as it was written."""
        store = open_store(self.url)
        for part in self.parts:
            table = _checked(store, self.url, part)
            for first in range(0, len(table), _PAGE):
                columns = table.slice(first, _PAGE).to_pydict()
                rows = zip(columns["user"], columns["state"], columns["fence"], strict=True)
                chosen = [row for row in rows if user in ("", row[0])]
                if chosen:
                    users, states, fences = (list(column) for column in zip(*chosen, strict=True))
                    yield users, states, fences


def create_snapshot(
    client: redis.Redis,
    namespace: str,
    url: str,
    now: datetime,
    report: Callable[[int, int | None], None],
) -> Snapshot:
    """Write all live profiles below `url`. Raises UserError, RedisUnavailable."""
    marks = Marks(client, Keys(namespace), follows=True)
    keys = marks.keys
    try:
        marks.claim([])  # from here on it is noticed if Redis goes back
        with redis_errors("REDIS_URL"):
            stored = cast(dict[bytes, bytes], client.hgetall(keys.marks()))
            space = cast(bytes | None, client.get(keys.current_space())) or b""
        created = now.astimezone(UTC)
        place = f"{url.rstrip('/')}/{namespace}-{created:%Y%m%dT%H%M%SZ}"
        store, parts = open_store(place), list[Part]()
        for rows in _parts(client, keys):
            parts.append(_write(store, len(parts), rows))
            report(sum(part.users for part in parts), None)
        marks.advance({})
    except WritesLost as lost:
        raise UserError(f"{lost}, or flipped: a snapshot of before and after is none") from lost
    snapshot = Snapshot(
        place,
        namespace,
        created.isoformat("T", "seconds"),
        keys.generation,
        space.decode(),
        sum(part.users for part in parts),
        {s.decode(): int(at) for s, at in stored.items() if s != OLDER.encode()},
        tuple(parts),
    )
    manifest = {**asdict(snapshot), "version": _VERSION}
    del manifest["url"]
    _put(store, place, _MANIFEST, json.dumps(manifest, indent=1).encode())
    return snapshot


def load_snapshot(url: str) -> Snapshot:
    """The one at this address. Raises UserError."""
    try:
        with open_store(url).read(_MANIFEST) as file:
            told = json.loads(file.read())
    except (OSError, ValueError) as error:
        raise UserError(
            f"there is no complete snapshot at {url}: `penchant snapshot list` has what there is"
        ) from error
    if told.pop("version") > _VERSION:
        raise UserError(f"the snapshot at {url} is of a later Penchant: upgrade this one")
    parts = tuple(Part(**part) for part in told.pop("parts"))
    return Snapshot(url=url, parts=parts, **told)


def list_snapshots(url: str) -> list[Snapshot]:
    """All complete ones below `url`, the oldest first. Raises UserError."""
    base = url.rstrip("/")
    names = sorted(name for name in open_store(base).sizes() if name.endswith(f"/{_MANIFEST}"))
    found = [load_snapshot(f"{base}/{name.removesuffix(f'/{_MANIFEST}')}") for name in names]
    return sorted(found, key=lambda snapshot: snapshot.created)


def _parts(client: redis.Redis, keys: Keys) -> Iterator[dict[str, tuple[bytes, bytes]]]:
    rows: dict[str, tuple[bytes, bytes]] = {}
    for users in pages(client, keys):
        with redis_errors("REDIS_URL"):
            pipe = client.pipeline(transaction=False)
            for user_id in users:
                pipe.hmget(keys.profile(user_id), STATE, FENCE)
            replies: list[Any] = pipe.execute()
        for user_id, (state, fence) in zip(users, replies, strict=True):
            if state is not None:
                rows[user_id] = state, fence or b""
        if len(rows) >= _PART_USERS:
            yield rows
            rows = {}
    if rows:
        yield rows


def _write(store: Store, number: int, rows: dict[str, tuple[bytes, bytes]]) -> Part:
    states, fences = zip(*rows.values(), strict=True)
    table = pa.Table.from_arrays(
        [pa.array(list(rows)), pa.array(states, pa.binary()), pa.array(fences, pa.binary())],
        schema=_SCHEMA,
    )
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, compression="zstd")
    data = sink.getvalue().to_pybytes()
    name = f"profiles-{number:05d}.parquet"
    _put(store, name, name, data)
    return Part(name, hashlib.sha256(data).hexdigest(), len(rows))


def _put(store: Store, where: str, name: str, data: bytes) -> None:
    try:
        store.write({name: data})
    except OSError as error:
        raise UserError(
            f"the snapshot cannot be written to {where}: {error.strerror or error}"
        ) from error


def _checked(store: Store, url: str, part: Part) -> pa.Table:
    try:
        with store.read(part.name) as file:
            data = file.read()
    except OSError as error:
        raise UserError(f"{part.name} of the snapshot at {url} cannot be read: {error}") from error
    if hashlib.sha256(data).hexdigest() != part.sha256:
        raise UserError(f"{part.name} of the snapshot at {url} is not as it was written")
    return pq.read_table(pa.BufferReader(data))
