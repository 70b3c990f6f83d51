"""Prints `docs/schema.md`: what `schema.py` says, for people who read profiles without Python.

    python -m profiles.schema_doc > docs/schema.md

It reads layouts from the module and their meaning from the comments in its source, so that
there is one place to change.
"""

from __future__ import annotations

import inspect
import re
from typing import Any, Final

import numpy as np

from . import schema

_FIELD: Final = re.compile(r'^\s*\("(\w+)", [^#\n]*\),  # (.+)$', re.MULTILINE)
_EXAMPLE: Final = schema.Keys("penchant")
_TYPES: Final = {
    "u1": "uint8",
    "u2": "uint16",
    "u4": "uint32",
    "u8": "uint64",
    "i8": "int64",
    "f4": "float32",
    "f8": "float64",
}


def markdown() -> str:
    """The whole page."""
    return "\n".join(
        [
            "# The Redis schema",
            "",
            "Generated from `profiles/schema.py` by `python -m profiles.schema_doc`; change it "
            "there.",
            "",
            f"Schema version {schema.SCHEMA_VERSION}. `docs/golden/profiles.json` has examples: "
            "the bytes in hex, and what they mean. Readers and workers know every version up to "
            "their own and refuse a later one: upgrade readers first, then workers. Version 1 had "
            "no own items (`own_n` is 0); those of its window are taken for all, and a worker of "
            "version 2 writes them when the shopper acts.",
            "",
            *_keys(),
            *_profile_hash(),
            *_state(),
            *_fence(),
            *_outlook(),
            *_neighbours(),
            *_numbers(),
            *_access(),
            *_scripts(),
        ]
    )


def _keys() -> list[str]:
    """One row per method of Keys, described by its docstring."""
    keys = [
        ("profile", _EXAMPLE.profile("USER")),
        ("item", "penchant:item:ITEM"),
        ("waiting", "penchant:waiting:ITEM"),
        ("neighbours", "penchant:neighbours:ITEM"),
        ("ranker", _EXAMPLE.ranker("SPACE")),
        ("vectors", "penchant:vectors:SPACE:BUCKET"),
        ("index", _EXAMPLE.index("SPACE")),
        ("categories", _EXAMPLE.categories()),
        ("item_changes", _EXAMPLE.item_changes()),
        ("current_space", _EXAMPLE.current_space()),
        ("spaces", _EXAMPLE.spaces()),
        ("marks", _EXAMPLE.marks()),
        ("trail", _EXAMPLE.trail("WRITER")),
        ("sweep", _EXAMPLE.sweep("SPACE")),
        ("sweep_turn", _EXAMPLE.sweep_turn()),
        ("live", _EXAMPLE.live()),
        ("generations", _EXAMPLE.generations()),
        ("build", "penchant:gN:build"),
        ("build_turn", _EXAMPLE.build_turn()),
    ]
    rows = [f"| `{key}` | {_words(getattr(schema.Keys, name))} |" for name, key in keys]
    return [
        "## Keys",
        "",
        "`penchant` is the NAMESPACE. ITEM is the item's key (see Numbers) in 16 hex digits, SPACE "
        "the id of an embedding space in 16 hex digits, BUCKET two hex digits. The user id stands "
        "as it is, in braces, which puts everything about one user into one slot; Redis Cluster is "
        "not supported yet all the same, because scripts take many users at once.",
        "",
        "| key | what it holds |",
        "|---|---|",
        *rows,
        "",
    ]


def _profile_hash() -> list[str]:
    return [
        "## The profile hash",
        "",
        "| field | what it holds |",
        "|---|---|",
        f"| `{schema.STATE}` | binary: everything a profile says, laid out below |",
        f"| `{schema.GLANCE}` | JSON for people and other languages: `v` (schema version), "
        "`updated_ms`, `events`, `counts` by type, `spend`, `categories` (the five best liked, "
        "with their decayed mass) |",
        f"| `{schema.FENCE}` | binary: which save this is, and which events are in, laid out "
        "below |",
        f"| `{schema.NEXT}` | binary: what the shopper may want next, as a vector, laid out below; "
        "absent until it was computed |",
        f"| `{schema.HEADS}` | JSON: what is likely, and from which release; absent with `next` |",
        "",
        "A profile with 0 `events` is that of an erased user: only the watermark is left, so that "
        "a replay does not bring the user back. Treat it as no profile.",
        "",
    ]


def _state() -> list[str]:
    return [
        "## The state field",
        "",
        "Little-endian, packed without padding. The header, for K time scales of D dimensions "
        "(offsets for K = 3, D = 128); its first three fields say how long it is:",
        "",
        *_table(schema.header_dtype(3, 128), "def header_dtype"),
        "",
        "Then, one after the other:",
        "",
        "1. `window_n` window entries, the latest events with a weight, ordered by `t_ms`, then "
        "`item`, `weight`, `type`, `flags`;",
        "2. `seen_n` event keys of 8 bytes, the events counted last, in order of arrival;",
        "3. `categories_n` category entries, ordered by `category`;",
        "4. `own_n` own items, ordered by `item`: the heaviest of those that the shopper had, be "
        "it long before the window; a negative mass is dislike;",
        "5. `pending_n` window entries: events whose item has no text yet. They are counted, in "
        "the window and among the own items, but not in `sums`, `masses` or the categories.",
        "",
        "A window entry:",
        "",
        *_table(schema.WINDOW_ENTRY, "WINDOW_ENTRY"),
        "",
        "A category entry, where `mass` is the decayed sum of weights on the longest time scale:",
        "",
        *_table(schema.CATEGORY_ENTRY, "CATEGORY_ENTRY"),
        "",
        f"An own item, where OWN_SCALES is {schema.OWN_SCALES:g}:",
        "",
        *_table(schema.OWN_ENTRY, "OWN_ENTRY"),
        "",
        "A sum decayed to `updated_ms` is decayed further to a later time T by "
        "2^(-(T - updated_ms) / (1000 * half_life_s)); its direction, which is the shopper's "
        "interest, stays. Compare vectors of one `space` only.",
        "",
    ]


def _fence() -> list[str]:
    return [
        "## The fence field",
        "",
        *_table(schema.FENCE_HEADER, "FENCE_HEADER"),
        "",
        "Then the watermark, one entry per source partition, ordered by `source`:",
        "",
        *_table(schema.WATERMARK_ENTRY, "WATERMARK_ENTRY"),
        "",
        "An event below its source's `next_offset` is in; it changes nothing when it comes again.",
        "",
    ]


def _outlook() -> list[str]:
    return [
        "## The outlook",
        "",
        "Computed after a save from the window of events as it was then, by a release that has "
        f"learned to. The `{schema.NEXT}` field is a header, then `dimensions` float32: a unit "
        "vector.",
        "",
        *_table(schema.NEXT_HEADER, "NEXT_HEADER"),
        "",
        "Compare it with vectors of its `space` only; where the profile's `space` is another, the "
        "profile was moved since, and the vector says nothing beside it.",
        "",
        f"The `{schema.HEADS}` field is JSON: `v` (schema version), `release`, `revision` (of the "
        "fence that was there; the fence's `revision` less this is the number of saves since), "
        "`updated_ms` (the latest event time then), `computed_ms` (wall clock), and `heads`: "
        "`purchase` (within LEARN_PURCHASE_DAYS after `updated_ms`), `churn` (nothing within "
        "LEARN_RETURN_DAYS), as probabilities. A head that has learned nothing is absent. What the "
        "heads say does not depend on a space.",
        "",
    ]


def _neighbours() -> list[str]:
    return [
        "## The neighbours hash of an item",
        "",
        f"The `{schema.TALLY}` field:",
        "",
        *_table(schema.TALLY_HEADER, "TALLY_HEADER"),
        "",
        f"The `{schema.NEAR}` field holds the neighbours, ordered by `item`:",
        "",
        *_table(schema.NEAR_ENTRY, "NEAR_ENTRY"),
        "",
        f"The `{schema.FENCE}` field is laid out as a profile's; the sources of its watermark are "
        "origins: the key of the partition that an event was read from, with the lane of its "
        "shopper (CRC-32 of the user id, modulo 2) in the lowest bit. `profiles/neighbours.py` "
        "says what the weights are.",
        "",
        "A record of the topic `penchant.pairs` is a header, then entries:",
        "",
        *_table(schema.PAIRS_HEADER, "PAIRS_HEADER"),
        "",
        *_table(schema.PAIR_ENTRY, "PAIR_ENTRY"),
        "",
    ]


def _numbers() -> list[str]:
    codes = ", ".join(f"{code} {name}" for name, code in schema.TYPE_CODE.items())
    return [
        "## Numbers",
        "",
        f"- Event types: {codes}.",
        "- The key of an item, a category or an event id: the first 8 bytes, little-endian, of "
        f"SHA-256 of its UTF-8 text. `A-1` is {schema.key64('A-1'):016x}.",
        "- The key of a source: that of `TOPIC_ID/PARTITION`, TOPIC_ID being the broker's id of "
        "the topic, so that a topic that was deleted and made again is another source.",
        f"- At most {schema.MAX_PENDING} events of a user wait for their item's text; beyond "
        "that the earliest are given up and counted in `pending_lost`.",
        "",
    ]


_READER_COMMANDS: Final = (
    "+get +hget +hmget +hgetall +scan +command|info +vsim +ping +client|setinfo"
)
_WRITER_COMMANDS: Final = (
    "+get +hget +hmget +hgetall +hset +hsetnx +hincrby +hdel +expire +expireat +set +sadd +srem "
    "+srandmember +scan +unlink "
    "+xadd +xread +xrevrange +evalsha +script|load +info +command|info +vadd +vrem "
    "+ping +client|setinfo"
)


def reader_acl(user: str, password: str, namespace: str) -> str:
    """The ACL SETUSER line of a program that uses ProfileReader, and nothing beyond that.

    VSIM only reads, but Redis 8.2 asks for all rights to its key.
    """
    keys = f"%R~{namespace}:* ~{namespace}:index:*"
    return f"ACL SETUSER {user} on >{password} {keys} {_READER_COMMANDS}"


def writer_acl(user: str, password: str, namespace: str) -> str:
    """The ACL SETUSER line of an updater."""
    return f"ACL SETUSER {user} on >{password} ~{namespace}:* {_WRITER_COMMANDS}"


def _access() -> list[str]:
    return [
        "## Access",
        "",
        "A program that reads profiles (leave `+vsim` out where Redis is older than 8):",
        "",
        "```",
        reader_acl("reader", "PASSWORD", "penchant"),
        "```",
        "",
        "An updater (likewise `+vadd` and `+vrem`):",
        "",
        "```",
        writer_acl("updater", "PASSWORD", "penchant"),
        "```",
        "",
    ]


def _scripts() -> list[str]:
    source = inspect.getsource(schema)
    blocks = []
    for name in (
        "LOAD_SCRIPT",
        "SAVE_SCRIPT",
        "ERASE_SCRIPT",
        "MOVE_SCRIPT",
        "PUT_OUTLOOK_SCRIPT",
        "LOAD_NEIGHBOURS_SCRIPT",
        "SAVE_NEIGHBOURS_SCRIPT",
        "PUT_ITEM_SCRIPT",
        "PUT_VECTORS_SCRIPT",
        "AWAITED_SCRIPT",
        "SERVED_SCRIPT",
        "STEP_SCRIPT",
        "NAME_SPACE_SCRIPT",
        "FIRST_SCRIPT",
        "CLAIM_SCRIPT",
        "ADVANCE_SCRIPT",
        "FLIP_SCRIPT",
        "STATE_SCRIPT",
    ):
        comment = re.search(rf"((?:^# .*\n)+){name}: Final", source, re.MULTILINE)
        words = " ".join(line[2:] for line in comment[1].splitlines()) if comment else ""
        blocks += [f"{name}: {words}", "", "```lua", getattr(schema, name).strip(), "```", ""]
    return ["## Scripts", "", *blocks[:-1]]


def _table(dtype: np.dtype[Any], defined_at: str) -> list[str]:
    _, _, source = inspect.getsource(schema).partition(f"\n{defined_at}")
    meaning = dict(_FIELD.findall(source.partition("]\n")[0]))  # its list of fields ends there
    rows = []
    for name, (kind, offset, *_) in (dtype.fields or {}).items():
        shape = "".join(f"[{n}]" for n in kind.shape)
        shape = {"[3]": "[K]", "[3][128]": "[K][D]"}.get(shape, shape)
        rows.append(
            f"| {offset} | `{name}` | {_TYPES[kind.base.str[1:]]}{shape} "
            f"| {meaning[name].replace('|', chr(92) + '|')} |"
        )
    return [
        f"| offset | field | type | meaning ({dtype.itemsize} bytes in all) |",
        "|---|---|---|---|",
        *rows,
    ]


def _words(method: Any) -> str:
    return " ".join((inspect.getdoc(method) or "").split())


if __name__ == "__main__":
    print(markdown())
