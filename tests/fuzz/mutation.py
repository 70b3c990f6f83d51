"""Good bytes made bad, or nearly so: bit by bit, and as JSON with its grammar in mind.

Each function takes its case's generator. Knows JSON, and no format of ours.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Sequence
from random import Random
from typing import Any

_BYTES = b'\x00\x01\x1f\x20"\\{}[],:0123456789-+.eEnutrfalse\x7e\x7f\x80\xbf\xc0\xe2\xed\xf4\xff'
_NUMBERS = [
    struct.pack(layout, value)
    for layout, values in (
        ("<B", (0, 1, 2, 127, 128, 255)),
        ("<H", (0, 1, 2, 3, 255, 256, 32767, 65535)),
        ("<I", (0, 1, 1 << 31, (1 << 32) - 1)),
        ("<q", (0, 1, -1, 1_760_000_000_000, (1 << 63) - 1, -(1 << 63))),
        ("<f", (0.0, -0.0, 1.0, -1.0, 1e-45, 3e38, float("inf"), -float("inf"), float("nan"))),
        ("<d", (1e308, float("inf"), float("nan"))),
    )
    for value in values
]
_MOST_BYTES = 1 << 16  # of a case, however often it is doubled


def mutated(rng: Random, raw: bytes, others: Sequence[bytes]) -> bytes:
    """A few changes, at places that need not mean anything."""
    out = bytearray(raw)
    for _ in range(_few(rng)):
        _change(rng, out, others)
    return bytes(out[:_MOST_BYTES])


def _few(rng: Random) -> int:
    return 1 + int(rng.expovariate(1.0))


def _change(rng: Random, out: bytearray, others: Sequence[bytes]) -> None:
    way = rng.randrange(9)
    at = rng.randrange(len(out) + 1)
    if at == len(out) and way < 4:
        way = 4
    if way == 0:
        out[at] ^= 1 << rng.randrange(8)
    elif way == 1:
        out[at] = rng.choice(_BYTES)
    elif way == 2:
        out[at] = rng.randrange(256)
    elif way == 3:
        number = rng.choice(_NUMBERS)
        if rng.random() < 0.7:  # where numbers of binary layouts begin
            at -= at % min(len(number), 4)
        out[at : at + len(number)] = number
    elif way == 4:
        out[at:at] = bytes(rng.choice(_BYTES) for _ in range(_few(rng)))
    elif way == 5:
        del out[at : at + _few(rng) * rng.choice((1, 1, 1, 8, 12, 16, 24))]
    elif way == 6:
        end = at + rng.choice((1, 4, 8, 12, 16, 24, 64))
        out[at:at] = out[at:end]
    elif way == 7:
        del out[at:]
    else:
        other = rng.choice(others)
        begin = rng.randrange(len(other) + 1)
        out[at : at + rng.randrange(40)] = other[begin : begin + rng.randrange(40)]


# --- JSON ----------------------------------------------------------------------------------

_SCALARS = [
    "null", "true", "false", "0", "-0", "1", "-1", "1.0", "01", "1.", ".5", "+1", "1e3", "1E-3",
    "1e400", "-1e400", "0.1", "4.35", "4.999999999999999", "999999999999.99", "1000000000000",
    "1000000000000.0000001", "123456789012345", "1234567890123456", "12345678901234.5", "2.5e0",
    "0.30000000000000004", "9007199254740993", "9223372036854775808", "18446744073709551616",
    "1" + "0" * 400, "1" + "0" * 5000, "NaN", "Infinity", "-Infinity", "631151999999",
    "631152000000", "4102444799999", "4102444800000", "1760000000", "1760000000000000",
    "1760000000000000000", '""', '" "', '"a"', '"a "', '"\\u0041"', '"\\ud800"', '"\\ud83d\\ude00"',
    '"\u00e9"', '"\u2028"', '"\x7f"', '"a\tb"', '"\\u0000"', '"\\/"', '"EUR"', '"eur"', '"USD"',
    '"view"', '"purchase"', '"review"', '"impression"', '"search"', '"forget"', '"VIEW"',
    '"2026-03-01T12:00:00Z"', '"2026-03-01"', '"0001-01-01T00:00:00+23:59"', '"20260301T120000Z"',
    '"9999-12-31T23:59:59.999999-23:59"', '"2026-W10-7T12:00:00+00:00:00.000001"',
    '"2026-03-01T24:00:00Z"', '"A > B"', '">"', "[]", "{}", '["A"]', '["A",null]', '[["A"]]',
    '{"type":"view"}', "[" * 300 + "]" * 300, "[" * 100_000, '{"a":' * 1000,
    '"' + "x" * 127 + '"', '"' + "x" * 128 + '"', '"' + "x" * 129 + '"', '"' + "x" * 256 + '"',
    '"' + "x" * 257 + '"', '"' + "x" * 2001 + '"', '"' + "x" * 20_001 + '"', "",
]  # fmt: skip
_HUGE = 500  # characters; of these a few cases will do
_SMALL_SCALARS = [s for s in _SCALARS if len(s) <= _HUGE]
_SPACES = (" ", "  ", "\n", "\t", "\r\n", "\x0b", "\x0c", "\xa0", "\ufeff", "/**/")


def json_mutated(rng: Random, raw: bytes, names: Sequence[str], others: Sequence[bytes]) -> bytes:
    """An object of JSON whose members were changed, added, left out, doubled or moved."""
    fields: dict[str, Any] = json.loads(raw)
    ascii_only = rng.random() < 0.5
    members = [
        (json.dumps(name, ensure_ascii=ascii_only), json.dumps(value, ensure_ascii=ascii_only))
        for name, value in fields.items()
    ]
    if rng.random() < 0.3:
        rng.shuffle(members)
    for _ in range(rng.choice((0, 1, 1, 1, 2, 3))):
        way = rng.randrange(6)
        at = rng.randrange(len(members)) if members else 0
        if way == 0 and members:
            del members[at]
        elif way == 1:
            members.insert(at, (f'"{rng.choice(names)}"', _scalar(rng)))
        elif way == 2 and members:
            members.insert(rng.randrange(len(members)), members[at])
        elif way == 3:
            other: dict[str, Any] = json.loads(rng.choice(others))
            name = rng.choice(list(other))
            members.append((f'"{name}"', json.dumps(other[name], ensure_ascii=ascii_only)))
        elif members:
            members[at] = (members[at][0], _scalar(rng))
    if rng.random() < 0.2:  # white space of one sort, where there may be some and elsewhere
        space, chance = rng.choice(_SPACES), rng.random()
        parts = [part for name, value in members for part in (name, ":", value, ",")][:-1]
        text = "".join(part + (space if rng.random() < chance else "") for part in parts)
    else:
        comma, colon = rng.choice(((",", ":"), (", ", ": ")))
        text = comma.join(f"{name}{colon}{value}" for name, value in members)
    return f"{{{text}}}".encode("utf-8", "surrogatepass")


def _scalar(rng: Random) -> str:
    if rng.random() < 0.3:  # numbers of any length
        whole = str(rng.randrange(10 ** rng.randint(1, 17)))
        return whole + (f".{rng.randrange(10 ** rng.randint(1, 17))}" if rng.random() < 0.6 else "")
    return rng.choice(_SCALARS if rng.random() < 0.01 else _SMALL_SCALARS)
