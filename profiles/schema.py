"""THE Redis schema: every key, field, binary layout, TTL, version and script on one screen.

`docs/schema.md` is generated from this module. It knows bytes and names; what the numbers
mean is in `arithmetic.py`, when they are written in `store.py`.

All integers and floats are little-endian and packed without padding. Keys hash-tag the user
id, so that everything about one user lies in one slot; but scripts take many users at once, so
Redis Cluster is not supported.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Final

import numpy as np

# Since 2: own items. A reader of a later version reads what an earlier one wrote.
SCHEMA_VERSION: Final = 2

# The order is part of the layout: `counts[i]` and a window entry's `type` refer to it.
EVENT_TYPES: Final = (
    "impression",
    "view",
    "click",
    "add_to_cart",
    "remove_from_cart",
    "purchase",
    "search",
    "review",
    "message",
)
TYPE_CODE: Final = {name: code for code, name in enumerate(EVENT_TYPES)}
COUNT_SLOTS: Final = 16  # room for seven more types before the layout must change

# Fields of the profile hash.
STATE: Final = "state"  # binary: header, window, seen, categories, own, pending
GLANCE: Final = "glance"  # JSON for people and other languages
FENCE: Final = "fence"  # binary: revision, writer, expiry, watermark per source partition
# And of its outlook, which is computed from the profile some time after a save.
NEXT: Final = "next"  # binary: the header below, then the next-interest vector
HEADS: Final = "heads"  # JSON: what the heads say, and the release that both are of

# What stands before the vector of the next field: 16 bytes.
NEXT_HEADER: Final = np.dtype(
    [
        ("version", "<u2"),  # schema version
        ("dimensions", "<u2"),  # D: floats that follow
        ("reserved", "<u4"),  # 0
        ("space", "<u8"),  # the embedding space of the vector
    ]
)

# One entry of the recent window, and of the pending list: 24 bytes.
WINDOW_ENTRY: Final = np.dtype(
    [
        ("t_ms", "<i8"),  # event time, ms since 1970-01-01 UTC
        ("item", "<u8"),  # key of the item; 0 where the event has none
        ("weight", "<f4"),  # signed weight it was folded with
        ("type", "u1"),  # event type
        ("flags", "u1"),  # bit 0: folded from the event's own text, not from an item
        ("reserved", "<u2"),  # 0
    ]
)
FLAG_TEXT: Final = 1

# One category of the decayed tally: 12 bytes.
CATEGORY_ENTRY: Final = np.dtype(
    [
        ("category", "<u8"),  # key of the category's name
        ("mass", "<f4"),  # sum of weight, decayed on the longest time scale
    ]
)

# One of the items that the shopper has had: 12 bytes.
OWN_ENTRY: Final = np.dtype(
    [
        ("item", "<u8"),  # key of the item
        ("mass", "<f4"),  # sum of weight, decayed with OWN_SCALES times the longest half-life
    ]
)
# People come back for what they had long after their interests have moved on: docs/decisions.md.
OWN_SCALES: Final = 3.0

# Fields of an item's neighbours; their fence is laid out as a profile's.
TALLY: Final = "tally"  # binary: the header below
NEAR: Final = "near"  # binary: neighbour entries, ordered by item

# What is known of an item beside its neighbours: 32 bytes.
TALLY_HEADER: Final = np.dtype(
    [
        ("version", "<u2"),  # schema version
        ("near_n", "<u2"),  # neighbour entries
        ("reserved", "<u4"),  # 0
        ("updated_ms", "<i8"),  # latest event time; all weights are decayed to it
        ("half_life_s", "<f4"),  # of all weights
        ("count", "<f4"),  # events with the item, decayed
        ("other", "<f4"),  # weight of the neighbours that left the tally
        ("recent", "<f4"),  # events with the item, decayed with a tenth of that half-life
    ]
)

# One neighbour of an item: 12 bytes.
NEAR_ENTRY: Final = np.dtype(
    [
        ("item", "<u8"),  # key of the neighbour
        ("weight", "<f4"),  # sum of pair weights, decayed
    ]
)

# A record of the pairs topic: this header, then entries of one origin in offset order, all of
# items of the record's partition (item key modulo partitions).
PAIRS_VERSION: Final = 1
PAIRS_HEADER: Final = np.dtype(
    [
        ("version", "<u8"),  # PAIRS_VERSION
        ("origin", "<u8"),  # key of the partition that the events were read from, and a lane
    ]
)
PAIR_ENTRY: Final = np.dtype(
    [
        ("item", "<u8"),  # key of the item whose neighbours are meant
        ("neighbour", "<u8"),  # key of its neighbour; 0: an event with the item itself
        ("offset", "<i8"),  # of the event behind it, in its origin
        ("t_ms", "<i8"),  # time of that event
        ("weight", "<f4"),  # what it adds
    ]
)

# The fence: 24 bytes, then 16 per source partition.
FENCE_HEADER: Final = np.dtype(
    [
        ("revision", "<u8"),  # saves of this profile since it was created
        ("writer", "<u8"),  # a number no other save has
        ("expires_s", "<i8"),  # when the key expires, unix seconds
    ]
)
WATERMARK_ENTRY: Final = np.dtype(
    [
        ("source", "<u8"),  # key of the source partition
        ("next_offset", "<i8"),  # events of a lower offset are in
    ]
)

MAX_PENDING: Final = 256
# A forgotten user's id must not stay for ever in the set of an item that never comes. Whoever
# is still waiting by then is served at their next event.
WAITING_TTL_S: Final = 30 * 86_400
# A trail is renewed with every micro-batch, and every few seconds without one. A worker that was
# stopped for longer reads again what it wrote last, and finds it there.
TRAIL_TTL_S: Final = 86_400
# Field of the marks: 1 where offsets were committed before there were marks, else 0.
OLDER: Final = "older"
SWEEP_TURN_S: Final = 30
SWEEP_TTL_S: Final = 30 * 86_400
BUILD_TURN_S: Final = 15


def key64(text: str) -> int:
    """First 8 bytes, little-endian, of SHA-256 of the UTF-8 text: the id of items, categories
    and events inside binary fields. Any language can compute it."""
    return int.from_bytes(key_bytes(text), "little")


def key_bytes(text: str) -> bytes:
    """`key64` as the 8 bytes that binary fields hold."""
    return hashlib.sha256(text.encode()).digest()[:8]


def source_key(topic_id: str, partition: int) -> int:
    """The id of one partition of one incarnation of a topic.

    `topic_id` is the broker's UUID of the topic: a topic that is deleted and made again
    restarts its offsets, and must not be mistaken for what was already applied.
    """
    return key64(f"{topic_id}/{partition}")


@lru_cache(maxsize=8)
def header_dtype(scales: int, dimensions: int) -> np.dtype[Any]:
    """The fixed part of the state field for `scales` time scales of `dimensions` floats."""
    return np.dtype(
        [
            ("version", "<u2"),  # schema version
            ("dimensions", "<u2"),  # D
            ("scales", "<u2"),  # K
            ("window_n", "<u2"),  # entries of the window
            ("seen_n", "<u2"),  # event keys remembered
            ("categories_n", "<u2"),  # entries of the category tally
            ("pending_n", "<u2"),  # entries of the pending list
            ("own_n", "<u2"),  # entries of the tally of own items; 0 in version 1
            ("space", "<u8"),  # the embedding space of the sums; 0 before the first vector
            ("updated_ms", "<i8"),  # latest event time; sums and masses are decayed to it
            ("first_ms", "<i8"),  # earliest event time
            ("events", "<u4"),  # events counted
            ("pending_lost", "<u4"),  # events whose item never got a text in time
            ("counts", "<u4", (COUNT_SLOTS,)),  # events by type
            ("spend", "<f8"),  # in the shop's currency
            ("foreign_purchases", "<u4"),  # purchases in another currency, not in spend
            ("other_categories", "<f4"),  # mass of categories that left the tally
            ("half_lives_s", "<f4", (scales,)),  # of the time scales, shortest first
            ("masses", "<f4", (scales,)),  # sum of |weight|, decayed
            ("sums", "<f4", (scales, dimensions)),  # sum of weight * vector, decayed
        ]
    )


# version, dimensions and scales come first so that a reader can size the rest.
PREFIX: Final = np.dtype([("version", "<u2"), ("dimensions", "<u2"), ("scales", "<u2")])


@dataclass(frozen=True)
class ItemRecord:
    """What is known of an item in words."""

    item_id: str
    title: str = ""
    category: tuple[str, ...] = ()  # path, root first
    brand: str = ""
    price: float | None = None
    currency: str | None = None
    description: str = ""
    deleted: bool = False

    @property
    def category_name(self) -> str:
        """The first two levels of the path: what a profile tallies. "" without a category."""
        return " > ".join(self.category[:2])


def read_record(raw: bytes) -> ItemRecord:
    """The record field of an item hash; what a later version put beside it is left out."""
    known = {k: v for k, v in json.loads(raw).items() if k in ItemRecord.__dataclass_fields__}
    return ItemRecord(**{**known, "category": tuple(known["category"])})


@dataclass
class Keys:
    """Every Redis key of one namespace, and of one generation of its profiles. The generation may
    become another: whoever shares these keys goes along."""

    namespace: str
    generation: int = 0

    @property
    def _own(self) -> str:
        """What the keys of this generation begin with; the first one's bear no number."""
        return f"{self.namespace}:g{self.generation}" if self.generation else self.namespace

    def profile(self, user_id: str) -> str:
        """Hash of one user: fields state, glance, fence, and those of the outlook: next, heads.
        Expires after PROFILE_TTL_DAYS."""
        return f"{self._own}:profile:{{{user_id}}}"

    def item(self, item: int) -> str:
        """Hash of one item: record (JSON), text_version (16 hex digits), deleted (1, or empty),
        and where the record came from: source (16 hex digits; empty: from an event) and offset
        (20 digits)."""
        return f"{self.namespace}:item:{item:016x}"

    def every_item(self) -> str:
        """What `SCAN` matches to list all items."""
        return f"{self.namespace}:item:*"

    def waiting(self, item: int) -> str:
        """Set of user ids with events on an item whose text has not arrived; expires after
        WAITING_TTL_S."""
        return f"{self._own}:waiting:{item:016x}"

    def neighbours(self, item: int) -> str:
        """Hash of what shoppers did next to an item: fields tally, near, fence. Expires after
        PROFILE_TTL_DAYS without an event."""
        return f"{self.namespace}:neighbours:{item:016x}"

    def ranker(self, space: str) -> str:
        """Hash of the ranker of the release that serves a space, one field per array of weights
        (float32); without it readers use the weights set by hand."""
        return f"{self.namespace}:ranker:{space}"

    def vectors(self, space: str, item: int) -> str:
        """One of 256 hashes item id -> text version (8 bytes), then the float32 vector, of one
        space (bucket = item key & 255)."""
        return self.vectors_bucket(space, item & 0xFF)

    def vectors_bucket(self, space: str, bucket: int) -> str:
        """The hash of one bucket, see `vectors`."""
        return f"{self.namespace}:vectors:{space}:{bucket:02x}"

    def index(self, space: str) -> str:
        """Vector set over the items of one space, where Redis has vector sets (8.0 and up)."""
        return f"{self.namespace}:index:{space}"

    def categories(self) -> str:
        """Hash category key (16 hex digits) -> category name."""
        return f"{self.namespace}:categories"

    def item_changes(self) -> str:
        """Stream of items whose text changed, trimmed: item (its key) and version (of the text);
        workers drop vectors they hold of another version."""
        return f"{self.namespace}:item-changes"

    def current_space(self) -> str:
        """String: the space id that workers write now. Its items are all there before it is
        named; a worker of another space moves no profile out of it."""
        return f"{self.namespace}:space"

    def spaces(self) -> str:
        """Hash of the spaces that items have vectors in: space -> when it was last named as current
        (unix ms); 0: never yet."""
        return f"{self.namespace}:spaces"

    def marks(self) -> str:
        """Hash of how far this Redis is: source (16 hex digits) -> next offset of which all
        below is saved; and older: 1 where offsets were committed before there were marks."""
        return f"{self._own}:marks"

    def trail(self, writer: str, *, live: bool = False) -> str:
        """Hash of one writing process: thread -> number of its latest guarded write; expires
        after TRAIL_TTL_S without one. Where a generation stands behind the writer (hex digits) in
        its name, nothing is written once another is live."""
        name = f"{self.namespace}:trail:{writer}"
        return f"{name}:{self.generation}" if live else name

    def live(self) -> str:
        """String: the number of the generation of profiles that is live; absent: 0. Of a later
        generation N, the keys of profiles, waiting shoppers, marks and sweeps begin with
        `NAMESPACE:gN:` in place of `NAMESPACE:`."""
        return f"{self.namespace}:generation"

    def generations(self) -> str:
        """Hash of all generations there are: number -> building, ready, live, before (it was live)
        or going (it is being removed); and last: the latest number that was given out."""
        return f"{self.namespace}:generations"

    def build(self) -> str:
        """Hash of what a generation is made from: source, user (empty: all), rules (key of the
        profile settings) and space; and refused (1) where it lacks what live profiles have. How far
        it is stands in its marks."""
        return f"{self._own}:build"

    def build_turn(self) -> str:
        """String: the process that makes a generation; expires after BUILD_TURN_S without a sign of
        it."""
        return f"{self.namespace}:build-turn"

    def sweep(self, space: str) -> str:
        """Hash of the migration of untouched profiles into one space: cursor (of SCAN, where to go
        on), seen and moved (profiles, so far), done (1 when none is left); expires after
        SWEEP_TTL_S."""
        return f"{self._own}:sweep:{space}"

    def sweep_turn(self) -> str:
        """String: the worker whose turn it is to migrate untouched profiles; expires after
        SWEEP_TURN_S without a sign of it."""
        return f"{self.namespace}:sweep-turn"


# What a guarded script begins with. A write that comes twice finds its number there and is made
# again. The trail's name says which generation must be live, and where that is written.
_GUARD: Final = """
local trail, thread = KEYS[#KEYS], ARGV[#ARGV - 2]
if thread ~= '' then
  local namespace, generation = string.match(trail, '^(.+):trail:%x+:(%d+)$')
  if generation and (redis.call('GET', namespace .. ':generation') or '0') ~= generation then
    return redis.error_reply('RETIRED generation ' .. generation)
  end
  local each = 0
  for least in string.gmatch(ARGV[#ARGV], '%d+') do
    if tonumber(redis.call('HGET', trail, each) or 0) < tonumber(least) then
      return redis.error_reply('LOST writes that this Redis had acknowledged')
    end
    each = each + 1
  end
  if tonumber(redis.call('HGET', trail, thread) or 0) < tonumber(ARGV[#ARGV - 1]) then
    redis.call('HSET', trail, thread, ARGV[#ARGV - 1])
  end
end
"""

# KEYS: profile keys, then the writer's trail. ARGV: the guard's three, see SAVE_SCRIPT, with 0 for
# the number. Reply: state, fence, state, fence, …; or the error LOST, because pairs are sent before
# a save is refused, and a profile without its last events would give wrong ones.
LOAD_SCRIPT: Final = (
    _GUARD
    + """local out = {}
for i = 1, #KEYS - 1 do
  local got = redis.call('HMGET', KEYS[i], 'state', 'fence')
  out[2 * i - 1] = got[1]
  out[2 * i] = got[2]
end
return out
"""
)

_FENCED_SAVE: Final = """
local refused = {}
for i = 1, #KEYS - 1 do
  local key, at = KEYS[i], 5 * i - 4
  local stored = redis.call('HGET', key, 'fence') or ''
  if stored == ARGV[at] then
    redis.call('HSET', key, 'fence', ARGV[at + 1], 'FIRST', ARGV[at + 2], 'SECOND', ARGV[at + 3])
    if ARGV[at + 4] ~= '0' then redis.call('EXPIREAT', key, ARGV[at + 4]) end
  elseif stored ~= ARGV[at + 1] then
    refused[#refused + 1] = i
  end
end
return refused
"""


def _fenced_save(first: str, second: str) -> str:
    return _GUARD + _FENCED_SAVE.lstrip().replace("FIRST", first).replace("SECOND", second)


# KEYS: profile keys, then the writer's trail. ARGV, five per profile: fence it was loaded with
# ('' = no profile), new fence, state, glance, expiry (unix seconds, '0' = leave); then the guard's
# three: thread ('' = not guarded), number of this write, and of every thread, with commas between,
# the number that must be there. Reply: positions (from 1) that were refused; or the error LOST, and
# nothing is saved. A save whose reply was lost finds its own fence and counts as done.
SAVE_SCRIPT: Final = _fenced_save(STATE, GLANCE)

# As SAVE_SCRIPT, for users who asked to be forgotten: what was foretold from what they did goes in
# the same breath.
ERASE_SCRIPT: Final = SAVE_SCRIPT.replace(
    "    if ARGV[at + 4]", "    redis.call('HDEL', key, 'next', 'heads')\n    if ARGV[at + 4]"
)

# KEYS: profile keys. ARGV, three per key: fence of the profile it was computed from, next, heads.
# Reply: positions (from 1) that were refused. Whoever acted, moved, expired or was forgotten
# meanwhile has another fence or none: an outlook never outlives what it was computed from.
PUT_OUTLOOK_SCRIPT: Final = """
local refused = {}
for i = 1, #KEYS do
  local at = 3 * i - 2
  if redis.call('HGET', KEYS[i], 'fence') == ARGV[at] then
    redis.call('HSET', KEYS[i], 'next', ARGV[at + 1], 'heads', ARGV[at + 2])
  else
    refused[#refused + 1] = i
  end
end
return refused
"""

# KEYS: profile keys. ARGV, three per key: fence of the profile that was moved to another space, new
# fence, state; nothing else of it is of a space. Reply: positions (from 1) that were refused.
MOVE_SCRIPT: Final = """
local refused = {}
for i = 1, #KEYS do
  local at = 3 * i - 2
  local stored = redis.call('HGET', KEYS[i], 'fence')
  if stored == ARGV[at] then
    redis.call('HSET', KEYS[i], 'fence', ARGV[at + 1], 'state', ARGV[at + 2])
  elseif stored ~= ARGV[at + 1] then
    refused[#refused + 1] = i
  end
end
return refused
"""

# KEYS: neighbours keys. No ARGV. Reply: tally, near, fence, tally, near, fence, …
LOAD_NEIGHBOURS_SCRIPT: Final = """
local out = {}
for i = 1, #KEYS do
  local got = redis.call('HMGET', KEYS[i], 'tally', 'near', 'fence')
  for j = 1, 3 do out[3 * i - 3 + j] = got[j] end
end
return out
"""

# As SAVE_SCRIPT, for neighbours keys: fence before, new fence, tally, near, expiry.
SAVE_NEIGHBOURS_SCRIPT: Final = _fenced_save(TALLY, NEAR)

# KEYS: marks, the current space, then the trail. ARGV: 1 where a namespace that has a space and
# does not say is older than marks, then the guard's three: who finds it said loses that only with
# this write. Else a space could be named in a Redis that lost what says that it is not older.
FIRST_SCRIPT: Final = (
    _GUARD
    + """redis.call('EXPIRE', trail, TTL)
if not redis.call('HGET', KEYS[1], 'OLDER') then
  local older = ARGV[1] == '1' and redis.call('GET', KEYS[2])
  redis.call('HSET', KEYS[1], 'OLDER', older and '1' or '0')
end
return {}
""".replace("TTL", str(TRAIL_TTL_S)).replace("OLDER", OLDER)
)

# KEYS: marks, then the trail. ARGV: sources (16 hex digits), then the guard's three. Reply: the
# field older, then the mark of each source.
CLAIM_SCRIPT: Final = (
    _GUARD
    + """redis.call('EXPIRE', trail, TTL)
local out = { redis.call('HGET', KEYS[1], 'OLDER') }
for i = 1, #ARGV - 3 do out[i + 1] = redis.call('HGET', KEYS[1], ARGV[i]) end
return out
""".replace("TTL", str(TRAIL_TTL_S)).replace("OLDER", OLDER)
)

# KEYS: marks, then the trail. ARGV: source and next offset by turns, then the guard's three. A mark
# never goes down: a worker that was stalled has less to say, and it is as true.
ADVANCE_SCRIPT: Final = (
    _GUARD
    + """redis.call('EXPIRE', trail, TTL)
for i = 1, #ARGV - 3, 2 do
  if tonumber(redis.call('HGET', KEYS[1], ARGV[i]) or -1) < tonumber(ARGV[i + 1]) then
    redis.call('HSET', KEYS[1], ARGV[i], ARGV[i + 1])
  end
end
return {}
""".replace("TTL", str(TRAIL_TTL_S))
)

# KEYS: the trail. ARGV: the guard's three. Sent behind writes that do no harm where earlier ones
# were lost.
STEP_SCRIPT: Final = _GUARD + "return {}\n"

# KEYS: the current space, the sweep into the one that is named, all spaces, then the trail. ARGV:
# the space, the time (unix ms), then the guard's three: a space is named only where its items are.
# With it current, an earlier sweep into it must not look done.
NAME_SPACE_SCRIPT: Final = (
    _GUARD
    + """redis.call('UNLINK', KEYS[2])
redis.call('SET', KEYS[1], ARGV[1])
redis.call('HSET', KEYS[3], ARGV[1], ARGV[2])
return {}
"""
)

# KEYS: a waiting set, then the trail. ARGV: user ids who were served, then the guard's three.
# Nobody leaves the set whose save was lost.
SERVED_SCRIPT: Final = (
    _GUARD + "for i = 1, #ARGV - 3 do redis.call('SREM', KEYS[1], ARGV[i]) end\nreturn {}\n"
)

# KEYS: item keys, then the stream of changes. ARGV, six per item: origin source ('' = inline,
# from an event), offset (20 digits), record, text version, '1' if deleted (else ''), item key in
# hex; then how many changes to keep. An inline record only stands in where there is none, not
# even a deletion, and an upsert never replaces one of a later offset. A changed text is announced
# in the same breath: a worker that died between the two would leave every other with the old
# vector.
PUT_ITEM_SCRIPT: Final = """
local changes = KEYS[#KEYS]
for i = 1, #KEYS - 1 do
  local at = 6 * i - 5
  local got = redis.call('HMGET', KEYS[i], 'source', 'offset', 'text_version')
  local source, offset = ARGV[at], ARGV[at + 1]
  local stale
  if source == '' then stale = got[1] else stale = got[1] == source and got[2] >= offset end
  if not stale then
    redis.call('HSET', KEYS[i], 'source', source, 'offset', offset, 'record', ARGV[at + 2],
               'text_version', ARGV[at + 3], 'deleted', ARGV[at + 4])
    if got[3] ~= ARGV[at + 3] then
      redis.call('XADD', changes, 'MAXLEN', '~', ARGV[#ARGV], '*',
                 'item', ARGV[at + 5], 'version', ARGV[at + 3])
    end
  end
end
"""

# KEYS: per item its key and its bucket of vectors, then the vector set. ARGV, three per item:
# id, version of the text that was encoded, vector with the version before it; then '1' where
# Redis has vector sets. A vector is kept only while its text stands: encoding takes time, and a
# slow worker must neither overwrite the vector of a newer text nor bring a deleted item back.
PUT_VECTORS_SCRIPT: Final = """
local indexed = ARGV[#ARGV] == '1'
for i = 1, (#KEYS - 1) / 2 do
  local id, version, vector = ARGV[3 * i - 2], ARGV[3 * i - 1], ARGV[3 * i]
  local got = redis.call('HMGET', KEYS[2 * i - 1], 'text_version', 'deleted')
  if got[1] == version and got[2] ~= '1' then
    redis.call('HSET', KEYS[2 * i], id, vector)
    if indexed then
      redis.call('VADD', KEYS[#KEYS], 'FP32', string.sub(vector, 9), id, 'NOQUANT')
    end
  end
end
"""

# KEYS: waiting sets. No ARGV. Reply: positions (from 1) of those that are not empty.
AWAITED_SCRIPT: Final = """
local awaited = {}
for i = 1, #KEYS do
  if redis.call('SRANDMEMBER', KEYS[i]) then awaited[#awaited + 1] = i end
end
return awaited
"""

# KEYS: the live generation, all generations. ARGV: the generation that is live (else nothing is
# done), and the one to be. Reply: 1 if it is now.
FLIP_SCRIPT: Final = """
local live, wanted = ARGV[1], ARGV[2]
local state = redis.call('HGET', KEYS[2], wanted)
if (redis.call('GET', KEYS[1]) or '0') ~= live or (state ~= 'ready' and state ~= 'before') then
  return 0
end
redis.call('SET', KEYS[1], wanted)
redis.call('HSET', KEYS[2], live, 'before', wanted, 'live')
return 1
"""

# KEYS: the live generation, all generations. ARGV: a generation, and the state it is to be in.
# Reply: 0 where it is live, and stays so.
STATE_SCRIPT: Final = """
if (redis.call('GET', KEYS[1]) or '0') == ARGV[1] then return 0 end
redis.call('HSET', KEYS[2], ARGV[1], ARGV[2])
return 1
"""
