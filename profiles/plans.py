"""What readers ask Redis, and what the answers mean. No I/O.

Each question is written once, as a plan: a generator that yields the commands of one round
trip, is sent their replies, and returns the answer. The two readers of `reader.py` differ in how
they wait.
"""

from __future__ import annotations

import time
from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final, TypeAlias, TypeVar

import numpy as np
from numpy.typing import NDArray

from . import arithmetic, outlook, schema
from .arithmetic import Floats, Profile
from .connection import Connection, address, knows_command
from .errors import ProfileNotFound, SpaceMismatch
from .items import BUCKETS
from .outlook import Outlook
from .schema import ItemRecord, read_record

_MATRIX_AGE_S: Final = 60.0  # how long an item matrix loaded for brute force is used
# How often it is asked which generation of profiles is live, beside a question that comes anyway.
# Those of the one before stay as they were at the flip.
_GENERATION_AGE_S: Final = 1.0
_SCAN_PAGE: Final = 1_000
_FIELDS: Final = (schema.STATE, schema.FENCE, schema.NEXT, schema.HEADS)

T = TypeVar("T")
Command: TypeAlias = tuple[Any, ...]
Plan: TypeAlias = Generator[list[Command], list[Any], T]


@dataclass(frozen=True)
class NearestItem:
    """An item and its cosine to what was asked for."""

    item_id: str
    cosine: float
    title: str = ""
    category: tuple[str, ...] = ()


@dataclass(frozen=True)
class Interest:
    """One of a shopper's several interests."""

    vector: Floats  # (D,) unit
    mass: float  # decayed weight of the events behind it


@dataclass
class _ItemMatrix:
    """All item vectors of one space, for a Redis without vector sets."""

    loaded_s: float
    item_ids: list[str]
    vectors: Floats  # (n, D)

    def nearest(self, query: Floats, k: int) -> list[tuple[str, float]]:
        if not self.item_ids:
            return []
        cosines = self.vectors @ query  # (n,)
        top = np.argsort(-cosines, kind="stable")[:k]
        return [(self.item_ids[i], float(cosines[i])) for i in top]


def _matrix(buckets: Sequence[Mapping[bytes, bytes]]) -> _ItemMatrix:
    pairs = [(i.decode(), raw) for bucket in buckets for i, raw in bucket.items()]
    rows = [np.frombuffer(raw, dtype="<f4", offset=8) for _, raw in pairs]
    vectors = np.stack(rows) if rows else np.zeros((0, 0), dtype=np.float32)
    return _ItemMatrix(time.monotonic(), [item_id for item_id, _ in pairs], vectors)


def _found(user_id: str, reply: Sequence[bytes | None]) -> Profile:
    found = _known([user_id], [reply])
    if not found:
        gone = "never seen, expired or erased" if reply[0] is None else "erased on request"
        raise ProfileNotFound(f"no profile of user {user_id!r}: {gone}")
    return found[user_id]


def _query(profile: Profile, scale: int | None) -> Floats:
    """The vector to search with: one scale, or the sum of all scales' unit interests."""
    if scale is not None:
        return profile.interest(scale)
    return arithmetic.unit(arithmetic.unit(profile.sums).sum(axis=0))


def _no_items(space: str) -> SpaceMismatch:
    return SpaceMismatch(
        f"no item vectors are stored in space {space}: the profile is of an older release whose "
        "items were dropped, or no item with a text has arrived yet"
    )


def _window_weights(profile: Profile, window: NDArray[Any], scale: int) -> Floats:
    age_s = (profile.updated_ms - window["t_ms"]) / 1000.0
    decayed: Floats = window["weight"] * np.exp2(-age_s / profile.half_lives_s[scale])
    return decayed.astype(np.float32)


def _interests_of(
    profile: Profile, vectors: Mapping[int, Floats], count: int, scale: int
) -> list[Interest]:
    known = [i for i, item in enumerate(profile.window["item"].tolist()) if item in vectors]
    if not known:
        return []
    window = profile.window[known]
    centroids, masses = arithmetic.interests(
        np.stack([vectors[item] for item in window["item"].tolist()]),
        _window_weights(profile, window, scale),
        count,
    )
    return [Interest(v, float(m)) for v, m in zip(centroids, masses, strict=True)]


def _vsim(keys: schema.Keys, space: str, query: Floats, k: int) -> Command:
    raw = np.ascontiguousarray(query, dtype="<f4").tobytes()
    return ("VSIM", keys.index(space), "FP32", raw, "WITHSCORES", "COUNT", k)


def _vsim_pairs(reply: Any) -> list[tuple[str, float]]:
    """VSIM scores are (1 + cosine) / 2."""
    flat = [x for pair in reply.items() for x in pair] if isinstance(reply, dict) else list(reply)
    return [
        (item.decode() if isinstance(item, bytes) else str(item), 2 * float(score) - 1)
        for item, score in zip(flat[::2], flat[1::2], strict=True)
    ]


def _described(
    pairs: Sequence[tuple[str, float]], records: Sequence[bytes | None]
) -> list[NearestItem]:
    items = []
    for (item_id, cosine), raw in zip(pairs, records, strict=True):
        record = read_record(raw) if raw is not None else ItemRecord(item_id)
        items.append(NearestItem(item_id, cosine, record.title, record.category))
    return items


def _ranked(
    profile: Profile, others: Sequence[Profile], k: int, scale: int
) -> list[tuple[str, float]]:
    same = [p for p in others if p.space == profile.space and p.user_id != profile.user_id]
    if not same:
        return []
    matrix = arithmetic.unit(np.stack([p.sums[scale] for p in same]))  # (n, D)
    cosines = matrix @ profile.interest(scale)  # (n,)
    return [(same[i].user_id, float(cosines[i])) for i in np.argsort(-cosines, kind="stable")[:k]]


def _known(user_ids: Sequence[str], replies: Sequence[Any]) -> dict[str, Profile]:
    """Those who have a profile; what `forget` leaves is none: a watermark and nothing else."""
    there = [(u, reply) for u, reply in zip(user_ids, replies, strict=True) if reply[0] is not None]
    profiles = arithmetic.decode_many(
        [user_id for user_id, _ in there],
        [reply[0] for _, reply in there],
        [reply[1] or b"" for _, reply in there],
    )
    found, now_s = {}, time.time()
    for (user_id, (_, fence, next_, heads)), profile in zip(there, profiles, strict=True):
        if profile.events:
            revision = arithmetic.read_fence_header(fence)[0] if fence else 0
            told = outlook.decode(next_, heads, profile.space, revision, now_s)
            found[user_id] = replace(profile, outlook=told) if told else profile
    return found


def _vectors(
    items: Sequence[tuple[int, str]], replies: Sequence[bytes | None]
) -> dict[int, Floats]:
    """Stored values are 8 bytes of text version, then the vector."""
    return {
        item: np.frombuffer(raw, dtype="<f4", offset=8)
        for (item, _), raw in zip(items, replies, strict=True)
        if raw is not None
    }


def _glob(text: str) -> str:
    """Escape what SCAN's MATCH would take for a pattern."""
    return "".join("\\" + c if c in "*?[]\\" else c for c in text)


class Plans:
    """What can be asked of one namespace."""

    def __init__(
        self,
        connection: Connection | str = "redis://localhost:6379/0",
        namespace: str = "penchant",
    ) -> None:
        """`connection`: a URL, or a Connection for ACL users, TLS and time-outs. Connects at
        the first call."""
        self._connection = Connection(connection) if isinstance(connection, str) else connection
        self._where = address(self._connection.url)
        self._keys = schema.Keys(namespace)
        self._matrices: dict[str, _ItemMatrix] = {}
        self._has_vector_sets: bool | None = None
        self._follow_next_s = 0.0

    def _get(self, user_id: str) -> Plan[Profile]:
        (reply,) = yield from self._stored([user_id])
        return _found(user_id, reply)

    def _stored(self, user_ids: Sequence[str]) -> Plan[list[Any]]:
        """The fields of n users, in one round trip; one more where another generation is live."""
        if time.monotonic() < self._follow_next_s:
            return (yield self._lookups(user_ids))
        live, *replies = yield [("GET", self._keys.live()), *self._lookups(user_ids)]
        if self._went_on(live):
            replies = yield self._lookups(user_ids)
        return replies

    def _lookups(self, user_ids: Sequence[str]) -> list[Command]:
        return [("HMGET", self._keys.profile(user_id), *_FIELDS) for user_id in user_ids]

    def _went_on(self, live: bytes | None) -> bool:
        """Whether that is another generation than before; it is the one to read from now on."""
        before, self._keys.generation = self._keys.generation, int(live or 0)
        self._follow_next_s = time.monotonic() + _GENERATION_AGE_S
        return before != self._keys.generation

    def _outlook(self, user_id: str) -> Plan[Outlook | None]:
        profile = yield from self._get(user_id)
        return profile.outlook

    def _get_many(self, user_ids: Sequence[str]) -> Plan[dict[str, Profile]]:
        replies = yield from self._stored(user_ids)
        return _known(user_ids, replies)

    def _exists(self, user_id: str) -> Plan[bool]:
        try:
            yield from self._get(user_id)
        except ProfileNotFound:
            return False
        return True

    def _interests(self, user_id: str, scale: int) -> Plan[Floats]:
        profile = yield from self._get(user_id)
        return profile.interest(scale)

    def _multi_interests(self, user_id: str, count: int, scale: int) -> Plan[list[Interest]]:
        profile = yield from self._get(user_id)
        records = yield from self._items(profile)
        items = [(item, record.item_id) for item, record in records.items()]
        replies = yield [
            ("HGET", self._keys.vectors(profile.space, item), item_id) for item, item_id in items
        ]
        return _interests_of(profile, _vectors(items, replies), count, scale)

    def _nearest_items(self, user_id: str, k: int, scale: int | None) -> Plan[list[NearestItem]]:
        profile = yield from self._get(user_id)
        query = _query(profile, scale)
        if not query.any():
            return []
        return (yield from self._items_near(query, profile.space, k))

    def _items_near(self, vector: Floats, space: str, k: int) -> Plan[list[NearestItem]]:
        pairs = yield from self._nearest_pairs(vector, space, k)
        records = yield [
            ("HGET", self._keys.item(schema.key64(item_id)), "record") for item_id, _ in pairs
        ]
        return _described(pairs, records)

    def _nearest_pairs(self, vector: Floats, space: str, k: int) -> Plan[list[tuple[str, float]]]:
        """(item id, cosine), nearest first. Raises SpaceMismatch where the space is empty."""
        (pairs,) = yield from self._nearest_of_each([vector], space, k)
        return pairs

    def _nearest_of_each(
        self, queries: Sequence[Floats], space: str, k: int
    ) -> Plan[list[list[tuple[str, float]]]]:
        """`_nearest_pairs` of several unit vectors of one space, in one round trip."""
        if not queries:
            return []
        if (yield from self._vector_sets()):
            replies = yield [_vsim(self._keys, space, vector, k) for vector in queries]
            found = [_vsim_pairs(reply) for reply in replies]
        else:
            matrix = yield from self._item_matrix(space)
            found = [matrix.nearest(vector, k) for vector in queries]
        if not all(found):
            raise _no_items(space)
        return found

    def _items(self, profile: Profile) -> Plan[dict[int, ItemRecord]]:
        wanted = list(dict.fromkeys(item for item in profile.window["item"].tolist() if item))
        replies = yield [("HGET", self._keys.item(item), "record") for item in wanted]
        return {i: read_record(raw) for i, raw in zip(wanted, replies, strict=True) if raw}

    def _top_categories(self, profile: Profile, count: int) -> Plan[list[tuple[str, float]]]:
        top = sorted(profile.categories.items(), key=lambda kv: (-kv[1], kv[0]))[:count]
        fields = [f"{key:016x}" for key, _ in top]
        names = yield [("HGET", self._keys.categories(), field) for field in fields]
        return [
            (name.decode() if name else field, mass)
            for (_, mass), field, name in zip(top, fields, names, strict=True)
        ]

    def _user_page(self, cursor: int) -> Plan[tuple[int, list[str]]]:
        """The next cursor (0 = the end) and some users."""
        if cursor == 0:
            self._went_on((yield [("GET", self._keys.live())])[0])
        prefix, suffix = self._keys.profile("\0").split("\0")
        pattern = _glob(prefix) + "*"
        (page,) = yield [("SCAN", cursor, "MATCH", pattern, "COUNT", _SCAN_PAGE)]
        return int(page[0]), [key.decode()[len(prefix) : -len(suffix)] for key in page[1]]

    def _similar_users(self, user_id: str, k: int, scale: int) -> Plan[list[tuple[str, float]]]:
        profile = yield from self._get(user_id)
        best: dict[str, float] = {}
        cursor = -1
        while cursor != 0:
            cursor, page = yield from self._user_page(max(cursor, 0))
            others = yield from self._get_many(page)
            best |= _ranked(profile, list(others.values()), k, scale)
            best = dict(sorted(best.items(), key=lambda pair: (-pair[1], pair[0]))[:k])
        return list(best.items())

    def _item_matrix(self, space: str) -> Plan[_ItemMatrix]:
        oldest_s = time.monotonic() - _MATRIX_AGE_S
        self._matrices = {s: m for s, m in self._matrices.items() if m.loaded_s >= oldest_s}
        matrix = self._matrices.get(space)
        if matrix is None:
            buckets = yield [
                ("HGETALL", self._keys.vectors_bucket(space, bucket)) for bucket in range(BUCKETS)
            ]
            matrix = self._matrices[space] = _matrix(buckets)
        return matrix

    def _vector_sets(self) -> Plan[bool]:
        if self._has_vector_sets is None:
            # Written as one word: redis-py has a parser for COMMAND that trips over [nil].
            (reply,) = yield [("COMMAND INFO", "VSIM")]
            self._has_vector_sets = knows_command(reply)
        return self._has_vector_sets


# --- the readers ---------------------------------------------------------------------------
