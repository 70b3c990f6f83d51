"""What shops produce: events by the compiled scanner and by pydantic, which must agree; items."""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import cache
from itertools import islice
from random import Random

from stream.events import EVENT_MODELS, MAX_TS_MS, Item, Rejected, parse, parse_items
from stream.simulated_shop import Shop, Spec
from stream.simulation import Events, items
from stream.user_rows import UserRows
from tests.fuzz.harness import Check
from tests.fuzz.mutation import json_mutated, mutated
from tests.properties.test_event_parsing import accounts_for_all, is_sound
from tests.properties.test_scanning import AHEAD_MS, NOW_MS, SCANNER, assert_same, parsed_alone

_EACH = 60  # records of a type
_FIELDS = sorted({n for m in (*EVENT_MODELS, Item) for n in m.model_fields} | {"colour", ""})
_TIMES = (NOW_MS, NOW_MS, NOW_MS, 0, -1, MAX_TS_MS, MAX_TS_MS + 1)
_LATEST = (MAX_TS_MS, NOW_MS - 1, NOW_MS + AHEAD_MS // 2)


@cache
def events() -> list[bytes]:
    """Of all types, as a shop sends them."""
    shop = Shop(Spec(seed=1, start_ms=NOW_MS - 30 * 86_400_000, items=100, forgets=0.5))
    found: dict[str, list[bytes]] = {}
    for lines in Events(shop).lines():
        for line in lines:
            kind = json.loads(line)["type"]
            if len(found.setdefault(kind, [])) < _EACH:
                found[kind].append(line.encode())
        if len(found) == len(EVENT_MODELS) and min(map(len, found.values())) == _EACH:
            break
    return [record for kind in sorted(found) for record in found[kind]]


@cache
def catalogue() -> list[bytes]:
    """Of the same shop."""
    shop = Shop(Spec(seed=1, items=200))
    return [item.to_json() for item in islice(items(shop), 200)]


def _record(rng: Random, corpus: Sequence[bytes]) -> bytes:
    """One of a corpus as it is, otherwise than it should be, or nothing of the kind."""
    record = rng.choice(corpus)
    way = rng.random()
    if way < 0.5:
        record = json_mutated(rng, record, _FIELDS, corpus)
    if 0.4 < way < 0.9:
        record = mutated(rng, record, corpus)
    return record


def event_parser() -> Check:
    """The compiled scanner and `parse`: what one takes both take, with equal values."""
    corpus = events()

    def check(cases: Sequence[Random]) -> int:
        values = [_record(rng, corpus) if rng.random() < 0.998 else None for rng in cases]
        record_ms = [rng.choice(_TIMES) for rng in cases]
        latest_ms = cases[0].choice(_LATEST)
        parsed = parse(values, record_ms, AHEAD_MS, latest_ms)
        event_at = dict(zip(parsed.index, parsed.events, strict=True))
        scanned = SCANNER.scan(values, record_ms, AHEAD_MS, latest_ms)
        index = scanned.index.tolist()
        assert sorted(index + scanned.others.tolist()) == list(range(len(values)))
        refused = [values[i] for i in index if i not in event_at]
        assert not refused, f"taken by the scanner alone: {refused[0]!r}"
        users = UserRows(len(values))
        out = scanned.contributions(users), users
        assert_same(out, parsed_alone([event_at[i] for i in index]))
        assert accounts_for_all(parsed, len(values))
        assert all(is_sound(event, record_ms[i]) for i, event in event_at.items())
        _assert_told(parsed.rejects)
        again = parse([e.to_json() for e in parsed.events], [MAX_TS_MS] * len(parsed.events), 0)
        assert again.events == parsed.events
        return len(parsed.events)

    return check


def item_parser() -> Check:
    """`parse_items` of a slice of the items topic."""
    corpus = catalogue()
    keys = [json.loads(record)["item_id"].encode() for record in corpus]

    def check(cases: Sequence[Random]) -> int:
        records = [_keyed(rng, corpus, keys) for rng in cases]
        parsed = parse_items([key for key, _ in records], [value for _, value in records])
        taken = len(parsed.upserts) + len(parsed.deletions)
        assert taken + len(parsed.rejects) <= len(records)
        _assert_told(parsed.rejects)
        again = parse_items(
            [item.item_id.encode() for item in parsed.upserts],
            [item.to_json() for item in parsed.upserts],
        )
        assert again.upserts == parsed.upserts
        return taken

    return check


def _keyed(
    rng: Random, corpus: Sequence[bytes], keys: Sequence[bytes]
) -> tuple[bytes | None, bytes | None]:
    at = rng.randrange(len(corpus))
    key: bytes | None = keys[at]
    value: bytes | None = _record(rng, corpus[at : at + 1])
    way = rng.random()
    if way < 0.05:
        key = mutated(rng, keys[at], keys)
    elif way < 0.06:
        key = None
    elif way < 0.1:
        value = None
    return key, value


def _assert_told(rejects: Sequence[Rejected]) -> None:
    for reject in rejects:
        assert 0 < len(reject.detail) <= 300
        assert reject.detail.isprintable()
        assert reject.reason.isascii()
