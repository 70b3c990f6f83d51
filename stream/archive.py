"""The archive: every event, as Parquet segments by event-time hour, in a folder or object store.

A segment holds the events of one hour (or day) from one range of offsets of one partition of one
incarnation of a topic, and its name says so; there is no other record of what is there. It is
visible when it is complete: in a folder by temp + fsync + rename, in an object store because an
object appears when its upload ends. Writing a range again overwrites it with the same events. A
range with other borders, after a crash, leaves copies: reading counts each (source, offset) once,
and compaction merges them away.

It knows columns and names; it does not know Kafka (`ingest.py`) or labels (`labelling.py`).
One process at a time may change an archive (`lock`); any number may read.
"""

from __future__ import annotations

import fcntl
import hashlib
import io
import json
import logging
import math
import os
import re
import secrets
import sys
from collections import Counter, defaultdict
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime, timedelta
from itertools import pairwise
from pathlib import Path
from typing import Any, Final, Protocol, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from model.windows import Bools
from profiles.arithmetic import FORGET
from profiles.schema import TYPE_CODE, key64, key_bytes

from . import events as ev
from .errors import UserError
from .labelling import Archived
from .lease import LEASE_S, Lease
from .times import DAY_MS, HOUR_MS

T = TypeVar("T")

log = logging.getLogger(__name__)

SCHEMA: Final = pa.schema(
    [
        ("source", pa.uint64()),  # schema.source_key: topic incarnation and partition
        ("offset", pa.int64()),
        ("t_ms", pa.int64()),  # event time
        ("user", pa.string()),
        ("type", pa.uint8()),  # index into schema.EVENT_TYPES
        ("item", pa.string()),  # "" = none
        ("event", pa.uint64()),  # key of the event id, 0 = none
        ("rating", pa.float32()),  # NaN = none
        ("price", pa.float64()),  # of one piece, NaN = unknown
        ("quantity", pa.int32()),
        ("text", pa.string()),  # of a search, a review, a message
        ("label", pa.string()),  # of a review, a message; "" = none
        # What a profile or the catalogue needs beside that, and training does not; null in
        # segments that are older than these columns.
        ("currency", pa.string()),  # of the price; "" = the shop's own
        ("title", pa.string()),  # of the item, as the event told it; "" = none
        ("category", pa.list_(pa.string())),  # path, root first
        ("brand", pa.string()),
    ],
    metadata={"penchant.archive": "1"},
)

LEARNED: Final = ("source", "offset", "t_ms", "user", "type", "item", "event", "rating", "label")
"""The columns that training reads."""

_ALL_DAY: Final = -1
# A replay of years in minutes would leave thousands of files per flush, one for each hour.
_MOST_HOURS: Final = 48
# Segments below this many bytes are merged; a day of one partition that is smaller becomes one.
_SMALL_BYTES: Final = 4 * 1024 * 1024
_WRITERS: Final = 16
# A day of fewer bytes is read at once: a table for each hour costs more than it saves.
_DAY_AT_ONCE_BYTES: Final = 32 * 1024 * 1024
_CHUNK_ROWS: Final = 100_000
_TEMP: Final = ".tmp-"
# Whom to leave out of what partitions that are behind still bring; a hundred bytes or two each.
_MOST_FORGOTTEN: Final = 100_000
_REACHED: Final = "reached.json"
_DAMAGED: Final = "damaged/"  # before the name of a segment that was set aside
_NAME: Final = re.compile(
    r"day=(\d{4}-\d\d-\d\d)/h(\d\d|xx)-([0-9a-f]{16})-p(\d{4,})-(\d{20})-(\d{20})\.parquet"
)
# What pyarrow raises for bytes that are no segment.
_UNREADABLE: Final = (
    pa.ArrowInvalid,
    pa.ArrowNotImplementedError,
    OSError,
    LookupError,
    ValueError,
)
_EPOCH: Final = datetime(1970, 1, 1, tzinfo=UTC)
_LEARNED: Final = pa.schema([SCHEMA.field(name) for name in LEARNED])


@dataclass(frozen=True)
class Segment:
    """What a segment's name says."""

    day: int  # since 1970-01-01
    hour: int  # of the day; -1 = all of them
    source: int
    partition: int
    first: int  # offset
    next: int  # offset after the last

    @property
    def name(self) -> str:
        """`day=2026-03-01/h13-SOURCE-p0003-FIRST-NEXT.parquet`."""
        date = (_EPOCH + timedelta(days=self.day)).date().isoformat()
        hour = "xx" if self.hour == _ALL_DAY else f"{self.hour:02d}"
        return (
            f"day={date}/h{hour}-{self.source:016x}-p{self.partition:04d}"
            f"-{self.first:020d}-{self.next:020d}.parquet"
        )

    @property
    def start_ms(self) -> int:
        """First event time that may be in it."""
        return self.day * DAY_MS + max(self.hour, 0) * HOUR_MS

    @property
    def end_ms(self) -> int:
        """First event time that is too late for it."""
        return self.start_ms + (DAY_MS if self.hour == _ALL_DAY else HOUR_MS)


def parse_name(name: str) -> Segment | None:
    """The segment of this name; None for any other file."""
    match = _NAME.fullmatch(name)
    if match is None:
        return None
    date, hour, source, partition, first, next_ = match.groups()
    return Segment(
        (datetime.fromisoformat(date).replace(tzinfo=UTC) - _EPOCH).days,
        _ALL_DAY if hour == "xx" else int(hour),
        int(source, 16),
        int(partition),
        int(first),
        int(next_),
    )


# --- where files are kept


class Store(Protocol):
    """Files by name; each appears complete or not at all."""

    def sizes(self) -> dict[str, int]:
        """Name -> bytes of all complete files."""

    def read(self, name: str) -> Any:
        """A seekable binary file. FileNotFoundError if it is gone."""

    def write(self, files: Mapping[str, Any]) -> None:
        """Make or replace files (name -> bytes). All are durable when this returns."""

    def remove(self, name: str) -> None:
        """Remove a file, if it is there."""

    def move(self, name: str, to: str) -> None:
        """Give a file another name, if it is there."""

    def lock(self) -> Callable[[], None]:
        """Be the only writer; the way to give that up. UserError if there is another."""


class Folder:
    """A local folder."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def sizes(self) -> dict[str, int]:
        found = {}
        for file in self._path.rglob("*"):
            if not file.name.startswith("."):
                with suppress(FileNotFoundError):
                    if file.is_file():
                        found[file.relative_to(self._path).as_posix()] = file.stat().st_size
        return found

    def read(self, name: str) -> Any:
        return (self._path / name).open("rb")

    def write(self, files: Mapping[str, Any]) -> None:
        folders = {(self._path / name).parent for name in files}
        new = [folder for folder in folders if not folder.is_dir()]
        for folder in new:
            folder.mkdir(parents=True, exist_ok=True)
        # Threads wait for the disk together, and it takes many files almost as fast as one.
        with ThreadPoolExecutor(_WRITERS, "archive-write") as pool:
            list(pool.map(self._write, files.keys(), files.values()))
            list(pool.map(_sync, folders | {folder.parent for folder in new}))

    def _write(self, name: str, data: Any) -> None:
        target = self._path / name
        temp = target.parent / f"{_TEMP}{secrets.token_hex(8)}"
        try:
            with temp.open("wb", buffering=0) as file:
                left = memoryview(data)
                while left:
                    left = left[file.write(left) :]
                os.fsync(file.fileno())
            temp.rename(target)
        except BaseException:
            temp.unlink(missing_ok=True)
            raise

    def remove(self, name: str) -> None:
        (self._path / name).unlink(missing_ok=True)

    def move(self, name: str, to: str) -> None:
        (self._path / to).parent.mkdir(parents=True, exist_ok=True)
        with suppress(FileNotFoundError):
            (self._path / name).rename(self._path / to)

    def lock(self) -> Callable[[], None]:
        self._path.mkdir(parents=True, exist_ok=True)
        handle = os.open(self._path / ".lock", os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(handle)
            raise UserError(
                f"another trainer writes to {self._path}: stop it, or set ARCHIVE_URL to another "
                "folder"
            ) from None
        for temp in self._path.rglob(f"{_TEMP}*"):  # of a writer that died
            temp.unlink(missing_ok=True)
        return lambda: os.close(handle)


class ObjectStore:
    """Any fsspec file system. An object appears when its upload is complete."""

    def __init__(self, url: str, lease_s: float = LEASE_S) -> None:
        import fsspec

        self._lease: Lease | None = None
        self._lease_s = lease_s

        try:
            self._fs, self._root = fsspec.core.url_to_fs(url)
        except (ImportError, ValueError) as error:
            raise UserError(f"ARCHIVE_URL {url!r} cannot be opened: {error}") from error

    def sizes(self) -> dict[str, int]:
        self._fs.invalidate_cache()
        try:
            found = self._fs.find(self._root, detail=True)
        except FileNotFoundError:
            return {}
        root = self._root.strip("/")
        return {
            path.strip("/").removeprefix(root).lstrip("/"): info["size"]
            for path, info in found.items()
        }

    def read(self, name: str) -> Any:
        return self._fs.open(f"{self._root}/{name}", "rb")

    def write(self, files: Mapping[str, Any]) -> None:
        self._check()
        with ThreadPoolExecutor(_WRITERS, "archive-write") as pool:
            paths = [f"{self._root}/{name}" for name in files]
            list(pool.map(self._fs.pipe_file, paths, map(bytes, files.values())))

    def remove(self, name: str) -> None:
        self._check()
        with suppress(FileNotFoundError):
            self._fs.rm_file(f"{self._root}/{name}")

    def move(self, name: str, to: str) -> None:
        self._check()
        with suppress(FileNotFoundError):
            self._fs.mv(f"{self._root}/{name}", f"{self._root}/{to}")

    def lock(self) -> Callable[[], None]:
        lease = Lease(self._fs, f"{self._root}/.lock", self._lease_s)
        give_up = lease.take()
        self._lease = lease
        return give_up

    def _check(self) -> None:
        if self._lease is not None:
            self._lease.check()


def _sync(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def open_store(url: str) -> Store:
    """The store of a path or an fsspec URL (`s3://bucket/folder`)."""
    if "://" not in url:
        return Folder(Path(url))
    return Folder(Path(url[7:])) if url.startswith("file://") else ObjectStore(url)


# --- who is to be forgotten


@dataclass(frozen=True)
class Command:
    """To forget a user, where it stood in the topic. It erases what came before it there, and in
    partitions without such a command, which may be far behind, what is not of a later time."""

    source: int
    offset: int
    event: int  # key of its event id; 0: none, or not kept
    until_ms: int  # the latest event time that it erases in other partitions; 0: not kept

    def receipt(self, user: str) -> str:
        """The name of the file that says that it was carried out."""
        at = f"{self.source:016x}-{self.offset:020d}"
        return f"receipts/{hashed(user)}-{at}-{self.event:016x}-{self.until_ms:015d}.json"


_RECEIPT: Final = re.compile(r"receipts/([0-9a-f]{16})-([0-9a-f]{16})-(\d{20})(.*)\.json")
_RECEIPT_MORE: Final = re.compile(r"-([0-9a-f]{16})-(\d{15})")  # younger receipts have it


def hashed(user: str) -> str:
    """What receipts call somebody who was forgotten."""
    return hashlib.sha256(user.encode()).hexdigest()[:16]


def _erased(table: pa.Table, commands: Mapping[str, Sequence[Command]]) -> Bools:
    """(m,) the rows that commands (hash of a user -> commands) erase."""
    gone = np.zeros(len(table), np.bool_)
    if not commands or not len(table):
        return gone
    user = table["user"].combine_chunks().dictionary_encode()
    code = user.indices.to_numpy()
    source, offset, t_ms = (table[name].to_numpy() for name in ("source", "offset", "t_ms"))
    for i, name in enumerate(user.dictionary.to_pylist()):
        of_user = commands.get(hashed(name), ())
        if not of_user:
            continue
        rows = np.flatnonzero(code == i)
        gone[rows] = t_ms[rows] <= max(command.until_ms for command in of_user)
        # In order, so that of several commands in a partition the last has the say.
        for command in sorted(of_user, key=lambda c: c.offset):
            here = rows[source[rows] == np.uint64(command.source)]
            gone[here] = offset[here] < command.offset
    return gone


# --- events -> columns


@dataclass
class Pending:
    """Events of one partition on their way into segments."""

    source: int
    partition: int
    first: int
    next: int
    tables: list[pa.Table] = field(default_factory=list)
    commands: dict[str, Command] = field(default_factory=dict)  # user -> the newest to forget them

    def add(
        self,
        offsets: Sequence[int],
        batch: Sequence[ev.Event],
        next_offset: int,
        until_ms: Sequence[int] | None = None,
    ) -> None:
        """Take m validated events with their offsets, and note commands to forget. until_ms: the
        latest time of an event that was sent when each of these was; without: its own."""
        latest_ms = [event.ts for event in batch] if until_ms is None else until_ms
        for offset, event, at_ms in zip(offsets, batch, latest_ms, strict=True):
            if event.type == "forget":
                key = key64(event.event_id) if event.event_id is not None else 0
                before = self.commands.get(event.user_id)
                at_ms = max(at_ms, before.until_ms if before else at_ms)
                self.commands[event.user_id] = Command(self.source, offset, key, at_ms)
        self.tables.append(columns(self.source, offsets, batch))
        self.next = next_offset

    def table(self, commands: Mapping[str, Sequence[Command]]) -> pa.Table:
        """What is to be written: all but commands to forget, and what they erase."""
        table = pa.concat_tables(self.tables)
        return table.filter(~(_erased(table, commands) | (table["type"].to_numpy() == FORGET)))


def columns(source: int, offsets: Sequence[int], batch: Sequence[ev.Event]) -> pa.Table:
    """m events as a table of SCHEMA; a `forget` has the type FORGET."""
    none = float("nan")
    # Asking a model for a field that it lacks costs more than all the rest.
    fields = [event.__dict__ for event in batch]
    ids = [f["event_id"] for f in fields]
    keys = b"".join([b"\0" * 8 if i is None else key_bytes(i) for i in ids])
    prices = [none if (price := f.get("price")) is None else price for f in fields]
    arrays = [
        pa.array(np.full(len(batch), source, np.uint64)),
        pa.array(np.array(offsets, np.int64)),
        pa.array(np.array([f["ts"] for f in fields], np.int64)),
        pa.array([f["user_id"] for f in fields], pa.string()),
        pa.array(np.array([_CODES[f["type"]] for f in fields], np.uint8)),
        pa.array([f.get("item_id", "") for f in fields], pa.string()),
        pa.array(np.frombuffer(keys, "<u8")),
        pa.array(np.array([f.get("rating", none) for f in fields], np.float32)),
        pa.array(np.array(prices, np.float64)),
        pa.array(np.array([f.get("quantity", 0) for f in fields], np.int32)),
        pa.array([f.get("text") or f.get("query", "") for f in fields], pa.string()),
        pa.array([f.get("label") or "" for f in fields], pa.string()),
        pa.array([f.get("currency") or "" for f in fields], pa.string()),
        pa.array([f.get("title") or "" for f in fields], pa.string()),
        pa.array([f.get("category") or () for f in fields], pa.list_(pa.string())),
        pa.array([f.get("brand") or "" for f in fields], pa.string()),
    ]
    return pa.Table.from_arrays(arrays, schema=SCHEMA)


def events(table: pa.Table) -> list[ev.Event]:
    """The events behind m rows of SCHEMA, as far as a profile needs them: without their ids, of
    which rows have but the keys."""
    return [_event(row) for row in table.to_pylist()]


def _event(row: Mapping[str, Any]) -> ev.Event:
    kind = _EVENT_OF[row["type"]]
    told: dict[str, Any] = {"user_id": row["user"], "ts": row["t_ms"]}
    if issubclass(kind, ev.ItemEvent):
        told |= {name: row[name] or None for name in ("title", "brand", "currency")}
        told |= {"item_id": row["item"], "category": tuple(row["category"] or ())}
        told["price"] = None if math.isnan(row["price"]) else row["price"]
    if kind is ev.Purchase:
        told["quantity"] = row["quantity"]
    elif kind is ev.Review:
        told["rating"] = row["rating"]
    elif kind is ev.Search:
        told["query"] = row["text"]
    elif kind is ev.Message:
        told["text"] = row["text"]
    return kind.model_construct(**told)


_CODES: Final = {**TYPE_CODE, "forget": FORGET}
_EVENT_OF: Final = {_CODES[kind.model_fields["type"].default]: kind for kind in ev.EVENT_MODELS}


def archived(tables: Iterable[pa.Table]) -> Archived:
    """Columns for labelling, users and items as codes."""
    table = pa.concat_tables([_coded(_LEARNED.empty_table()), *map(_coded, tables)])
    user, item = (table[name].combine_chunks() for name in ("user", "item"))
    item_ids = item.dictionary.to_pylist()
    item_code = item.indices.to_numpy().astype(np.int32)
    if "" in item_ids:
        item_code[item_code == item_ids.index("")] = -1
    return Archived(
        users=user.dictionary.to_pylist(),
        item_ids=item_ids,
        user=user.indices.to_numpy().astype(np.int32),
        item=item_code,
        type=table["type"].to_numpy(),
        t_ms=table["t_ms"].to_numpy(),
        event=table["event"].to_numpy(),
        rating=table["rating"].to_numpy(),
        label=table["label"].to_numpy(),
        source=table["source"].to_numpy(),
        offset=table["offset"].to_numpy(),
    )


def _coded(table: pa.Table) -> pa.Table:
    """What is learned from, names as codes: most of it would be the same names again and again."""
    columns = [
        table[name].dictionary_encode() if name in ("user", "item", "label") else table[name]
        for name in LEARNED
    ]
    return pa.Table.from_arrays(columns, names=list(LEARNED))


# --- the archive


class SegmentDamaged(UserError):
    """What it holds is not what was written: set it aside, and go on with the others."""

    def __init__(self, segment: Segment, why: str) -> None:
        super().__init__(
            f"{segment.name} in the archive is damaged ({why}): restore it from a copy, or its "
            "events will be missing"
        )


@dataclass(frozen=True)
class Stats:
    """What is in an archive."""

    segments: int
    size_bytes: int
    rows: int
    """As stored: copies of a range that a crash left are counted until they are merged."""
    first_ms: int | None
    """Of the earliest segment's hour; None for an empty archive."""
    end_ms: int | None
    days: int
    sources: int
    small_segments: int
    receipts: int
    damaged: tuple[str, ...]
    """Names of segments that cannot be read, and of those that the trainer set aside as such."""


class Archive:
    """Segments in a store. Writers hold `lock()`."""

    def __init__(self, store: Store, on_progress: Callable[[], None] = lambda: None) -> None:
        """`on_progress` is called with each segment that is read or written: long work that still
        moves can be told from work that hangs."""
        self.store = store
        self.passed_over: set[str] = set()
        """Names of damaged segments that `read` left out."""
        self._on_progress = on_progress
        self._commands: dict[str, list[Command]] | None = None  # see `_remember`

    def lock(self) -> Callable[[], None]:
        """Be the only writer; returns the way to give that up. Raises UserError."""
        return self.store.lock()

    def segments(self) -> dict[Segment, int]:
        """Segment -> bytes, in event-time order."""
        found = {
            segment: size
            for name, size in self.store.sizes().items()
            if (segment := parse_name(name)) is not None
        }
        return dict(sorted(found.items(), key=lambda x: (x[0].start_ms, x[0].name)))

    # --- writing

    def write(self, *pendings: Pending) -> int:
        """Put events into segments, and erase what their commands to forget name, in whichever
        partition. All is durable when this returns; the rows written. It may be repeated, with
        these or other borders."""
        commands: dict[str, list[Command]] = defaultdict(list)
        for pending in pendings:
            for user, command in pending.commands.items():
                commands[user].append(command)
        remembered = self._remember(commands)
        rows = sum(self._put(pending, pending.table(remembered)) for pending in pendings)
        if commands:
            self.forget(commands)
        return rows

    def _put(self, pending: Pending, table: pa.Table) -> int:
        hours = pc.divide(table["t_ms"], HOUR_MS).to_numpy()
        found = np.unique(hours)
        unit = 1 if len(found) <= _MOST_HOURS else 24
        buckets = hours // unit
        order = np.argsort(buckets, kind="stable")
        bounds = [*np.flatnonzero(np.diff(buckets[order], prepend=-1)).tolist(), len(order)]
        table = table.take(order)
        files = {}
        for begin, end in pairwise(bounds):
            bucket = int(buckets[order[begin]]) * unit
            segment = Segment(
                day=bucket // 24,
                hour=bucket % 24 if unit == 1 else _ALL_DAY,
                source=pending.source,
                partition=pending.partition,
                first=pending.first,
                next=pending.next,
            )
            files[segment.name] = _parquet(table.slice(begin, end - begin))
        self._write(files)
        return len(table)

    def _remember(self, commands: Mapping[str, Sequence[Command]]) -> dict[str, list[Command]]:
        """The newest commands, these and those carried out before: hash of a user -> commands. A
        partition that is behind brings what they erase later."""
        if self._commands is None:
            found = self.forgotten().items()
            self._commands = dict(sorted(found, key=lambda x: max(c.until_ms for c in x[1])))
        for user, of_user in commands.items():
            known = self._commands.pop(hashed(user), [])
            self._commands[hashed(user)] = list(dict.fromkeys([*known, *of_user]))
        while len(self._commands) > _MOST_FORGOTTEN:
            del self._commands[next(iter(self._commands))]
        return self._commands

    def forget(self, commands: Mapping[str, Sequence[Command]]) -> int:
        """Erase what was written of users before commands to forget them (user -> commands), and
        leave a receipt of each that names the user by a hash. Rows erased."""
        removed: dict[str, int] = dict.fromkeys(commands, 0)
        users = pa.array(list(commands), pa.string())
        remembered = self._remember(commands)
        of_hash = {hashed(u): remembered.get(hashed(u), of_user) for u, of_user in commands.items()}
        for segment in self.segments():
            try:
                known = self._load(segment, ["user"])
                if not pc.any(pc.is_in(known["user"], users)).as_py():
                    continue
                table = self._load(segment)
            except SegmentDamaged as error:
                self._set_aside(segment, error)
                continue
            gone = _erased(table, of_hash)
            if not gone.any():
                continue
            for user, count in Counter(table["user"].filter(gone).to_pylist()).items():
                removed[user] += count
            if gone.all():
                self.store.remove(segment.name)
            else:
                self._write({segment.name: _parquet(table.filter(~gone))})
        present = self.store.sizes()
        for user, of_user in commands.items():
            for command in of_user:
                # A repeat after a crash finds fewer rows, perhaps none: the first receipt stands.
                if removed[user] or command.receipt(user) not in present:
                    receipt = {"user": hashed(user), **asdict(command), "rows": removed[user]}
                    self._write({command.receipt(user): json.dumps(receipt).encode()})
        return sum(removed.values())

    def note_reached(self, reached_ms: Mapping[int, int]) -> None:
        """Put down up to which event time each of today's partitions (by source) is all here."""
        told = {f"{source:016x}": t_ms for source, t_ms in sorted(reached_ms.items())}
        self._write({_REACHED: json.dumps(told).encode()})

    def compact(self, most: int = sys.maxsize) -> int:
        """Merge small segments: those of one hour and partition, and all of a day and partition if
        they are few bytes together; damaged ones are set aside. What is left per partition is then
        a segment for a past day with few events, 24 small ones for another, and large ones. At
        most about `most` segments are read in one call, for callers that have other work. Segments
        saved; 0: nothing to do."""
        by_day: dict[tuple[int, int, int], dict[Segment, int]] = defaultdict(dict)
        present = self.segments()
        for segment, size in present.items():
            by_day[segment.day, segment.source, segment.partition][segment] = size
        newest = max((day for day, _, _ in by_day), default=0)
        saved = 0
        for (day, _, _), sizes in by_day.items():
            if saved >= most:
                break
            if day < newest and sum(sizes.values()) <= _SMALL_BYTES:
                saved += self._merge(list(sizes), _ALL_DAY, present)
                continue
            by_hour: dict[int, list[Segment]] = defaultdict(list)
            for segment, size in sizes.items():
                if size <= _SMALL_BYTES:
                    by_hour[segment.hour].append(segment)
            saved += sum(self._merge(parts, hour, present) for hour, parts in by_hour.items())
        return saved

    def expire(self, retention_ms: int, max_bytes: int, latest_ms: int = ev.MAX_TS_MS) -> int:
        """Remove segments that ended so long before the newest event time, and then the oldest
        until the rest fits. Segments removed. Age is event time: a replay of 1998 is not old. An
        event later than `latest_ms` is of a wrong clock, and makes no other one old."""
        sizes = self.segments()
        if not sizes:
            return 0
        newest_ms = min(max(segment.end_ms for segment in sizes), latest_ms)
        total, removed = sum(sizes.values()), 0
        for segment, size in sizes.items():
            if segment.end_ms > newest_ms - retention_ms and total <= max_bytes:
                continue
            self.store.remove(segment.name)
            total -= size
            removed += 1
        for name, segment in self.set_aside().items():
            if segment.end_ms <= newest_ms - retention_ms:
                self.store.remove(name)
        return removed

    def _merge(self, segments: list[Segment], hour: int, present: Container[Segment]) -> int:
        if len(segments) < 2:
            return 0
        first, next_ = min(s.first for s in segments), max(s.next for s in segments)
        merged = replace(segments[0], hour=hour, first=first, next=next_)
        # A large segment may have the name already, and hold what lies between the small ones.
        parts = list(dict.fromkeys([*segments, *([merged] if merged in present else [])]))
        tables = {}
        for segment in parts:
            try:
                tables[segment] = self._load(segment)
            except SegmentDamaged as error:
                self._set_aside(segment, error)
        if len(tables) < 2:
            return len(parts) - len(tables)
        self._write({merged.name: _parquet(_once(pa.concat_tables(tables.values())))})
        # A crash before the next line leaves copies, which reading and the next merge see through.
        for segment in tables:
            if segment != merged:
                self.store.remove(segment.name)
        return len(parts) - 1

    def _set_aside(self, segment: Segment, why: SegmentDamaged) -> None:
        log.error("%s. It is kept as %s%s", why, _DAMAGED, segment.name)
        self.store.move(segment.name, _DAMAGED + segment.name)

    def _write(self, files: Mapping[str, Any]) -> None:
        self._on_progress()
        try:
            self.store.write(files)
        except OSError as error:
            raise UserError(
                f"the archive cannot be written to: {error.strerror or error}; make room or mend "
                "ARCHIVE_URL, and start again: nothing is lost, as nothing of it is committed"
            ) from error

    # --- reading

    def set_aside(self) -> dict[str, Segment]:
        """Damaged files that the trainer gave other names: name -> the segment it was."""
        return {
            name: segment
            for name in self.store.sizes()
            if name.startswith(_DAMAGED)
            and (segment := parse_name(name.removeprefix(_DAMAGED))) is not None
        }

    def reached(self) -> dict[int, int]:
        """What `note_reached` put down last; nothing where it never did."""
        try:
            with self.store.read(_REACHED) as file:
                told = json.loads(file.read())
            return {int(source, 16): int(t_ms) for source, t_ms in told.items()}
        except FileNotFoundError:
            return {}
        except (AttributeError, TypeError, ValueError):
            log.warning("%s in the archive is damaged: labels wait a little longer", _REACHED)
            return {}

    def forgotten(self) -> dict[str, list[Command]]:
        """Hash of a user (see `hashed`) -> commands to forget them that were carried out."""
        found: dict[str, list[Command]] = defaultdict(list)
        for name in self.store.sizes():
            if (receipt := _RECEIPT.fullmatch(name)) is None:
                continue
            user, source, offset, more = receipt.groups()
            event, until_ms = 0, 0
            if (told := _RECEIPT_MORE.fullmatch(more)) is not None:
                event, until_ms = int(told[1], 16), int(told[2])
            else:
                with suppress(FileNotFoundError, ValueError), self.store.read(name) as file:
                    event = int(json.loads(file.read()).get("event", "0"), 16)
            found[user].append(Command(int(source, 16), int(offset), event, until_ms))
        return dict(found)

    def read(
        self,
        start_ms: int = 0,
        end_ms: int = ev.MAX_TS_MS + 1,
        chunk_rows: int = _CHUNK_ROWS,
        columns: Sequence[str] = tuple(SCHEMA.names),
    ) -> Iterator[pa.Table]:
        """Events of a time range in event-time order, each once, in tables of these columns of
        SCHEMA (source, offset, t_ms and user among them) of `chunk_rows` or more (the last may hold
        fewer). Never a table without rows. A damaged segment is named in the log and passed over;
        what receipts say is erased, though it came back with a copy of a segment, is left out."""
        commands = self.forgotten()
        waiting: list[pa.Table] = []
        rows = 0
        by_day: dict[int, dict[Segment, int]] = defaultdict(dict)
        for segment, size in self.segments().items():
            if segment.start_ms < end_ms and segment.end_ms > start_ms:
                by_day[segment.day][segment] = size
        for day, sizes in sorted(by_day.items()):
            for table in self._hours(day, sizes, columns):
                t = table["t_ms"].to_numpy()
                gone = _erased(table, commands)
                wanted = table.filter((t >= start_ms) & (t < end_ms) & ~gone)
                if len(wanted):
                    waiting.append(wanted)
                    rows += len(wanted)
                if rows >= chunk_rows:
                    yield pa.concat_tables(waiting)
                    waiting, rows = [], 0
        if waiting:
            yield pa.concat_tables(waiting)

    def rows(self) -> dict[Segment, int | None]:
        """How many rows each segment holds, by its foot; None if it is damaged."""
        found: dict[Segment, int | None] = {}
        for segment in self.segments():
            with suppress(FileNotFoundError):
                try:
                    found[segment] = self._read(segment, lambda f: pq.read_metadata(f).num_rows)
                except SegmentDamaged:
                    found[segment] = None
        return found

    def stats(self) -> Stats:
        """What is there. Reads the foot of each segment."""
        sizes, rows = self.segments(), self.rows()
        damaged = [*self.set_aside(), *(s.name for s, count in rows.items() if count is None)]
        names = self.store.sizes()
        return Stats(
            segments=len(sizes),
            size_bytes=sum(sizes.values()),
            rows=sum(count or 0 for count in rows.values()),
            first_ms=min((s.start_ms for s in sizes), default=None),
            end_ms=max((s.end_ms for s in sizes), default=None),
            days=len({s.day for s in sizes}),
            sources=len({s.source for s in sizes}),
            small_segments=sum(size <= _SMALL_BYTES for size in sizes.values()),
            receipts=sum(name.startswith("receipts/") for name in names),
            damaged=tuple(damaged),
        )

    def _hours(
        self, day: int, sizes: dict[Segment, int], columns: Sequence[str]
    ) -> Iterator[pa.Table]:
        """The day's events, at once or hour by hour. What changes meanwhile is looked up anew."""
        next_hour = 0
        while True:
            try:
                for hour, table in self._hours_of(day, sizes, next_hour, columns):
                    yield table
                    next_hour = hour + 1
                return
            except FileNotFoundError as error:
                known, sizes = sizes, {s: n for s, n in self.segments().items() if s.day == day}
                # A change ends by itself; a segment that is listed and cannot be opened does not.
                if sizes == known:
                    raise UserError(
                        f"a segment of the archive is listed and cannot be opened: {error}; "
                        "mend ARCHIVE_URL's storage or remove the segment"
                    ) from error

    def _hours_of(
        self, day: int, sizes: dict[Segment, int], first_hour: int, columns: Sequence[str]
    ) -> Iterator[tuple[int, pa.Table]]:
        if first_hour == 0 and sum(sizes.values()) <= _DAY_AT_ONCE_BYTES:
            yield 23, _once(self._all(sizes, columns))
            return
        by_hour: dict[int, list[Segment]] = defaultdict(list)
        for segment in sizes:
            by_hour[segment.hour].append(segment)
        whole = self._all(by_hour.pop(_ALL_DAY, []), columns)
        at = pc.divide(pc.subtract(whole["t_ms"], day * DAY_MS), HOUR_MS)
        for hour in sorted(by_hour.keys() | set(pc.unique(at).to_pylist())):
            if hour >= first_hour:
                others = self._all(by_hour.get(hour, []), columns)
                parts = [whole.filter(pc.equal(at, hour)), others]
                yield hour, _once(pa.concat_tables(parts))

    def _all(self, segments: Iterable[Segment], columns: Sequence[str]) -> pa.Table:
        """All but damaged ones. FileNotFoundError if one is gone."""
        tables = [SCHEMA.empty_table().select(columns)]
        for segment in segments:
            try:
                tables.append(self._load(segment, columns))
            except SegmentDamaged as error:
                self.passed_over.add(segment.name)
                log.warning("%s", error)
        return pa.concat_tables(tables)

    def _load(self, segment: Segment, columns: Sequence[str] = tuple(SCHEMA.names)) -> pa.Table:
        def table(file: Any) -> pa.Table:
            parquet = pq.ParquetFile(file, page_checksum_verification=True)
            there = [name for name in columns if name in parquet.schema_arrow.names]
            return _complete(parquet.read(there), columns)

        self._on_progress()
        return self._read(segment, table)

    def _read(self, segment: Segment, parse: Callable[[Any], T]) -> T:
        """What a segment holds. SegmentDamaged; UserError where the storage fails;
        FileNotFoundError if it is gone."""
        try:
            with self.store.read(segment.name) as file:
                return parse(file)
        except FileNotFoundError:
            raise
        except _UNREADABLE:
            # Arrow says OSError of both: the storage, and what is stored. So each by itself.
            data = self._bytes(segment)
        try:
            return parse(io.BytesIO(data))
        except _UNREADABLE as error:
            raise SegmentDamaged(segment, str(error)) from error

    def _bytes(self, segment: Segment) -> bytes:
        try:
            with self.store.read(segment.name) as file:
                found: bytes = file.read()
        except FileNotFoundError:
            raise
        except OSError as error:
            raise UserError(
                f"{segment.name} in the archive cannot be read ({error.strerror or error}): mend "
                "ARCHIVE_URL's storage"
            ) from error
        return found


def _complete(table: pa.Table, columns: Sequence[str]) -> pa.Table:
    """A segment in today's columns: no label was given where it is too old to have any, and what
    else it lacks is null."""
    schema = pa.schema([SCHEMA.field(name) for name in columns], SCHEMA.metadata)
    for column in schema:
        if column.name not in table.column_names:
            none = [""] * len(table) if column.name == "label" else [None] * len(table)
            table = table.append_column(column, pa.array(none, column.type))
    return table.select(columns).cast(schema)


def _parquet(table: pa.Table) -> Any:
    sink = pa.BufferOutputStream()
    dictionaries = ["user", "item", "source", "type", "label", "currency", "title", "brand"]
    # Without checksums most changed bits would come out as other events.
    pq.write_table(
        table, sink, compression="zstd", use_dictionary=dictionaries, write_page_checksum=True
    )
    return sink.getvalue()


def _once(table: pa.Table) -> pa.Table:
    """Each (source, offset) once, in the order of event time, source and offset."""
    t, source, offset = (table[name].to_numpy() for name in ("t_ms", "source", "offset"))
    order = np.lexsort((offset, source, t))
    s, o = source[order], offset[order]
    new = np.ones(len(order), np.bool_)
    new[1:] = (s[1:] != s[:-1]) | (o[1:] != o[:-1])
    return table.take(order[new])
