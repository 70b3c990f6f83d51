"""Fold and pack in one compiled pass: what `arithmetic.py` and `store.py` do to a plain profile,
from stored bytes to the bytes that go to Redis, without the interpreter's lock.

`arithmetic.py` says what is right; this says the same faster, and tests compare the two. Whatever
is rare it leaves to the other: a `forget`, events that wait for their item's text, a profile of
another space or layout, one that was written with larger bounds, numbers beyond all reason. Such
a user comes back as LEFT, with nothing done.

PURE: bytes and columns in, bytes out. Only writers import it: numba takes a second to load, and
the kernel some more to compile where its cache (`NUMBA_CACHE_DIR`) has it not.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from . import arithmetic, compiled, schema
from .arithmetic import RENEW_SHARE, EventColumns, Layout, blank_header
from .cache import Rows
from .compiled import (
    LEFT,
    SPLIT,
    TOP,
    UNKNOWN,
    WRITTEN,
    Events,
    Out,
    Save,
    Shape,
    Texts,
    Users,
)
from .ids import Ids
from .trail import Steps

Bytes = NDArray[np.uint8]
Ints = NDArray[np.int64]
Keys64 = NDArray[np.uint64]
Floats = NDArray[np.float32]


ChangesOf = Callable[[Keys64], tuple[Keys64, Floats]]
"""Keys of items (u,) -> those of which it is known, and perhaps more, ascending (v,), and what the
items' vectors are in the new space beyond the map: new - old @ transition (v, D)."""
NamesOf = Callable[[Sequence[int]], Mapping[int, str]]
_NAMES_KEPT = 100_000
_NO_ITEM = np.zeros(1, np.uint64)


class _Labels:
    """The names of categories as glances show them; never changed, because several threads read
    them."""

    def __init__(self, names: Mapping[int, str]) -> None:
        self._names = dict(sorted(names.items()))
        texts = [json.dumps(name).encode() for name in self._names.values()]
        self.longest = max(map(len, texts), default=0)
        self.texts = _texts(texts, np.fromiter(self._names, np.uint64, len(texts)))

    def with_names(self, names: Mapping[int, str]) -> _Labels:
        """These and more; a producer that makes categories up must not fill memory."""
        kept = self._names if len(self._names) < _NAMES_KEPT else {}
        return _Labels({**kept, **names})


class Folded:
    """What the kernel made of n users and of their events among m."""

    def __init__(self, payload: memoryview, out: Out, row: Ints, chunk: int) -> None:
        self.payload = payload
        """Commands for Redis; valid until this thread folds again."""
        self._row = row
        self.rows = Rows(out.payload, out.state_at, out.fence_at)
        """States and fences of users who are written, as they are then, in the same buffer."""
        self.written: Ints = np.flatnonzero(out.status >= WRITTEN)
        """Users who are saved by the payload, in its order."""
        self.left: Ints = np.flatnonzero(out.status == LEFT)
        """Users about whom nothing was done."""
        self.split: Ints = np.flatnonzero(out.status == SPLIT)
        """Users who have events on a further partition by this."""
        self.fate = out.fate
        """(m,) of events, see `fates`; 0 for those of users who are left or not among the n."""
        self.calls = -(-len(self.written) // chunk)
        """Commands in the payload, and replies to them."""

    def events_of(self, users: Ints) -> Ints:
        """The positions of their events."""
        return np.flatnonzero(np.isin(self._row, users))


class Kernel:
    """Of one layout and namespace. Several threads may use it."""

    def __init__(
        self, layout: Layout, keys: schema.Keys, script_sha: str, ttl_s: int, chunk: int
    ) -> None:
        """`chunk`: users per call of the script."""
        self._layout = layout
        self._shape = Shape(
            len(layout.half_lives_s),
            layout.dimensions,
            layout.window,
            layout.seen,
            layout.categories,
            layout.own_items,
            layout.own_half_life_ms,
            np.ascontiguousarray(layout.half_lives_ms),
            np.asarray(layout.half_lives_s, dtype=np.float32),
            np.frombuffer(blank_header(layout).tobytes(), np.uint8),
        )
        prefix, suffix = keys.profile("\0").encode().split(b"\0")
        call = f"$7\r\nEVALSHA\r\n${len(script_sha)}\r\n{script_sha}\r\n".encode()
        self._pieces = _texts([*_glance_pieces(), call, prefix, suffix])
        self._ttl_s = ttl_s
        self._chunk = chunk
        self._labels = _Labels({})
        self._mine = threading.local()

    def fold(
        self,
        ids: Sequence[str],
        rows: Rows,
        events: EventColumns,
        first: int,
        space: int,
        writer: int,
        now_s: float,
        names_of: NamesOf,
        sources: Collection[int],
        steps: Steps,
    ) -> Folded:
        """Fold what happened to n users, who are rows `first`, … of the events, into their stored
        (state, fence), b"" where there is none, and write the saves. names_of: category keys ->
        the names that are known. sources: of all partitions that there are today. steps: of the
        calls, as many as there may be."""
        given = Ids.of(ids)
        users = Users(*rows, given.text, given.end)
        columns = _columns(events)
        begin, order = np.empty(len(ids) + 1, np.int64), np.empty(len(columns.row), np.int64)
        most = compiled.arrange(columns.row, first, begin, order)
        marks = int(np.diff(users.fence_at).max(initial=0)) // schema.WATERMARK_ENTRY.itemsize
        scratch = compiled.scratch(self._shape, most, marks, self._chunk)
        today = np.fromiter(sources, np.uint64, len(sources))
        tails = _texts([_bulks(steps.key), *(_bulks(*tail) for tail in steps.tails)])
        while True:
            labels = self._labels  # read once: another thread may find further names
            save = Save(
                first, np.uint64(space), np.uint64(writer), float(now_s), self._ttl_s,
                RENEW_SHARE, self._chunk, self._pieces, labels.texts, today, tails,
            )  # fmt: skip
            out = self._out(users, len(columns.row), labels.longest, tails)
            length = compiled.fold(self._shape, users, columns, begin, order, save, scratch, out)
            unknown = out.unknown[out.unknown != 0].tolist()
            known = names_of(unknown) if unknown else {}
            names = {key: known[key] for key in unknown if key in known}
            if not names:
                break
            self._labels = labels.with_names(names)
        payload = memoryview(out.payload)[:length]  # type: ignore[arg-type]
        return Folded(payload, out, columns.row - first, self._chunk)

    def carry(
        self, states: Sequence[bytes], transition: Floats, changes_of: ChangesOf, space: int
    ) -> list[bytes]:
        """What `arithmetic.migrate` does, for the states of n users in one other space, which
        `arithmetic.plain_spaces` names."""
        layout, shape = self._layout, self._shape
        header = arithmetic.heads(states, layout)
        window, window_end, own, own_end = arithmetic.entries_of(states, header, layout)
        sums = np.ascontiguousarray(header["sums"]).reshape(-1, shape.dimensions) @ transition
        items = np.where(arithmetic.is_of_item(window), window["item"], np.uint64(0))
        every = np.concatenate([items, own["key"]])
        keys, change = changes_of(np.setdiff1d(every, _NO_ITEM))
        if len(keys):
            at = np.minimum(np.searchsorted(keys, every), len(keys) - 1)
            at[keys[at] != every] = -1
            users = np.repeat(np.arange(len(states)), np.diff(window_end))
            age_ms = (header["updated_ms"][users] - window["t_ms"]).astype(np.float64)
            columns = map(np.array, (window["weight"], own["mass"]))  # writable, and in one piece
            compiled.carry(
                shape, sums, np.array(header["masses"]), window_end, own_end, every, at, age_ms,
                *columns, change, np.zeros((2, shape.scales)),
            )  # fmt: skip
        header["sums"] = sums.reshape(header["sums"].shape)
        header["space"] = space
        raw, size = header.tobytes(), layout.header.itemsize
        return [raw[i * size : (i + 1) * size] + s[size:] for i, s in enumerate(states)]

    def warm_up(self) -> None:
        """Compile the kernel, or load what was compiled before."""
        nobody: dict[str, Any] = {name: np.zeros(0, dtype) for name, dtype in _COLUMNS.items()}
        nobody["vector"] = np.zeros((0, self._shape.dimensions), np.float32)
        self.fold(
            [],
            Rows.of([]),
            EventColumns(**nobody),
            0,
            0,
            0,
            0.0,
            lambda keys: {},
            (),
            Steps("", [], 0),
        )
        width = self._shape.dimensions
        state = np.zeros(1, self._layout.header)
        state["window_n"] = 1
        entry = np.ones(1, schema.WINDOW_ENTRY)
        entry["flags"] = 0
        self.carry(
            [state.tobytes() + entry.tobytes()],
            np.zeros((width, width), np.float32),
            lambda keys: (keys, np.zeros((len(keys), width), np.float32)),
            0,
        )

    def _out(self, users: Users, m: int, longest: int, tails: Texts) -> Out:
        """Room for what may come of these users."""
        n = len(users.state_at)
        glance = _GLANCE_BYTES + TOP * (longest + _NUMBER_BYTES)
        each = self._shape.blank.size + glance + _CALL_BYTES + self._pieces.bytes.size
        stored = int(np.diff(users.state_at).sum() + 2 * np.diff(users.fence_at).sum())
        stored += int(users.id_end[-1] - users.id_end[0])
        stored += tails.bytes.size * len(tails.end)  # the key with each of the calls
        payload, arguments = self._buffers(n * each + stored + m * _EVENT_BYTES)
        return Out(
            payload,
            arguments,
            np.empty(glance, np.uint8),
            np.empty(n, np.uint8),
            np.zeros((n, 2), np.int64),
            np.zeros((n, 2), np.int64),
            np.zeros(m, np.uint8),
            np.zeros(UNKNOWN, np.uint64),
        )

    def _buffers(self, size: int) -> tuple[Bytes, Bytes]:
        """Two of at least `size` bytes, kept for this thread: fresh memory costs more than the
        fold."""
        held: tuple[Bytes, Bytes] | None = getattr(self._mine, "held", None)
        if held is None or held[0].size < size:
            held = self._mine.held = (np.empty(size, np.uint8), np.empty(size, np.uint8))
        return held


# Bounds of what is written: a glance without its categories, a number, what a call has around
# the five arguments of a user, and what an event adds to state and fence.
_GLANCE_BYTES = 700
_NUMBER_BYTES = 40
_CALL_BYTES = 200
_EVENT_BYTES = 80


def _columns(events: EventColumns) -> Events:
    """As the kernel was compiled for: of other types it would be compiled once more, and that
    takes half a minute."""
    return Events(
        *(np.require(getattr(events, name), dtype, ["C", "W"]) for name, dtype in _COLUMNS.items())
    )


_COLUMNS = {
    "row": np.int64,
    "source": np.uint64,
    "offset": np.int64,
    "event": np.uint64,
    "t_ms": np.int64,
    "type": np.uint8,
    "weight": np.float32,
    "item": np.uint64,
    "category": np.uint64,
    "vector": np.float32,
    "resolved": np.bool_,
    "text": np.bool_,
    "spend": np.float64,
    "foreign": np.bool_,
}


def _glance_pieces() -> list[bytes]:
    """What stands between the numbers of a glance: see `arithmetic.glances`."""
    counts = [f'"{name}":'.encode() for name in schema.EVENT_TYPES]
    return [
        f'{{"v":{schema.SCHEMA_VERSION},"updated_ms":'.encode(),
        b',"events":',
        b',"counts":{' + counts[0],
        *(b"," + count for count in counts[1:]),
        b'},"spend":',
        b',"categories":{',
        b"}}",
    ]


def _bulks(*parts: str) -> bytes:
    """As Redis' protocol has them."""
    return b"".join(b"$%d\r\n%s\r\n" % (len(p.encode()), p.encode()) for p in parts)


def _texts(texts: Sequence[bytes], keys: Keys64 | None = None) -> Texts:
    joined, end = _joined(texts)
    return Texts(np.empty(0, np.uint64) if keys is None else keys, end, joined)


def _joined(parts: Sequence[bytes]) -> tuple[Bytes, Ints]:
    end = np.zeros(len(parts) + 1, np.int64)
    np.cumsum(np.fromiter(map(len, parts), np.int64, len(parts)), out=end[1:])
    return np.frombuffer(b"".join(parts), np.uint8), end
