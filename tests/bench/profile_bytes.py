"""What a profile takes in Redis, field by field, and what shorter numbers would save and cost.

    python -m tests.bench.profile_bytes [--write]

Recorded shoppers (MovieLens-100K) are folded and saved as a worker does it, with default settings
and an outlook each. Then their sums are kept as shorter numbers, rounded at every event, as a
store that kept them so would; items nearest to these interests are compared with those of float32,
and with what the shopper turned to next. Prints and never asserts; `--write` puts the tables into
docs/performance.md.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from itertools import pairwise
from pathlib import Path
from typing import Any, Final

import numpy as np
import redis

from model.engine import Engine
from model.releases import build_base
from profiles import arithmetic, outlook, schema
from profiles.arithmetic import EventColumns, Floats, Ints, Layout, Profiles, unit
from profiles.schema import Keys, key64
from profiles.store import ProfileStore
from stream import datasets
from stream.contributions import columns, event_weights
from stream.local_servers import RedisServer
from stream.settings import Settings
from stream.updater_app import profile_layout

from . import report, workloads
from .pipeline import RELEASES

_DIMENSIONS: Final = 128
_SPACE: Final = 1
_BATCH: Final = 4096
_TOP: Final = 10
_SOURCE: Final = schema.source_key("topic", 0)

Rounding = Callable[[Floats], Floats]


@dataclass(frozen=True)
class Way:
    """How the sums of a profile could be kept."""

    name: str
    number_bytes: float
    scale_bytes: int  # per vector
    rounded: Rounding  # (…, D) sums to what is read back


def _half(sums: Floats) -> Floats:
    with np.errstate(over="ignore"):
        return sums.astype(np.float16).astype(np.float32)


def _eighth(shares: Floats) -> Floats:
    kept: Floats = np.rint(shares * 127).astype(np.int8).astype(np.float32) / np.float32(127)
    return kept


def _scaled(sums: Floats, kept: Rounding) -> Floats:
    most = np.abs(sums).max(axis=-1, keepdims=True)
    most[most == 0] = 1
    back: Floats = kept(sums / most) * most
    return back


WAYS: Final = (
    Way("float32, as it is", 4, 0, lambda sums: sums),
    Way("float16", 2, 0, _half),
    Way("float16 and a scale", 2, 4, lambda sums: _scaled(sums, _half)),
    Way("int8 and a scale", 1, 4, lambda sums: _scaled(sums, _eighth)),
)


@dataclass(frozen=True)
class Recorded:
    """The events of a recorded set, in order."""

    events: EventColumns
    users: list[str]
    items: Ints  # (m,) row of each event's item
    vectors: Floats  # (N, D)


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    arguments.add_argument("--write", action="store_true", help="renew docs/performance.md")
    options = arguments.parse_args()
    recorded, layout = _recorded()
    with (
        tempfile.TemporaryDirectory() as folder,
        RedisServer(Path(folder)) as server,
        redis.Redis.from_url(server.url) as client,
    ):
        text = _sizes(client, recorded, layout)
        memory = _memory_of_states(client, recorded, layout)
    text += "\n\n" + _qualities(recorded, layout, memory)
    text = f"{report.where('python -m tests.bench.profile_bytes')}\n\n{text}"
    print(text)
    if options.write:
        report.write(report.ROOT / "docs/performance.md", text, "profile bytes")


def _recorded() -> tuple[Recorded, Layout]:
    data = datasets.load("movielens")
    texts = list(workloads.texts(data).values())
    release = build_base(RELEASES, "bundled", texts, _DIMENSIONS, now=datetime.now(UTC))
    vectors = Engine(release).encode(texts)
    settings = Settings()
    row_of = {item.item_id: row for row, item in enumerate(data.items)}
    told = [event for event in data.events if getattr(event, "item_id", None) in row_of]
    found = columns(told, event_weights(settings.profile.weights), "USD")
    items = np.array([row_of[item_id] for item_id in found.item_id])
    category = {i.item_id: key64(" > ".join(i.category[:2])) for i in data.items if i.category}
    m = len(items)
    events = EventColumns(
        row=np.array(found.row),
        source=np.full(m, _SOURCE, np.uint64),
        offset=np.arange(m),
        event=np.array(found.event, np.uint64),
        t_ms=np.array(found.t_ms),
        type=np.array(found.type, np.uint8),
        weight=np.array(found.weight, np.float32),
        item=np.array([key64(item_id) for item_id in found.item_id], np.uint64),
        category=np.array([category.get(item_id, 0) for item_id in found.item_id], np.uint64),
        vector=vectors[items],
        resolved=np.ones(m, bool),
        text=np.zeros(m, bool),
        spend=np.zeros(m),
        foreign=np.zeros(m, bool),
    )
    return Recorded(events, list(found.users), items, vectors), profile_layout(
        settings, _DIMENSIONS
    )


def _folded(recorded: Recorded, layout: Layout) -> Profiles:
    n = len(recorded.users)
    profiles = arithmetic.unpack([None] * n, [None] * n, layout)
    every = recorded.events
    for begin in range(0, len(every.row), _BATCH):
        part = slice(begin, begin + _BATCH)
        names = EventColumns.__dataclass_fields__
        batch = EventColumns(**{name: getattr(every, name)[part] for name in names})
        arithmetic.fold(profiles, batch, layout, _SPACE)
    return profiles


# --- bytes ---------------------------------------------------------------------------------


def _sizes(client: redis.Redis, recorded: Recorded, layout: Layout) -> str:
    profiles, keys, users = _folded(recorded, layout), Keys("bytes"), recorded.users
    sums = len(layout.half_lives_s) * layout.dimensions * 4
    parts: dict[str, Any] = {
        "header: counters, masses, times": layout.header.itemsize - sums,
        "sums": sums,
        "window": _mean(profiles.window),
        "seen event ids": _mean(profiles.seen),
        "categories": _mean(profiles.categories),
        "own items": _mean(profiles.own),
        "pending": _mean(profiles.pending),
    }
    store = ProfileStore(client, keys, layout, ttl_s=86_400, writer=1)
    store.save(users, profiles, range(len(users)), {}, datetime.now(UTC).timestamp())
    _put_outlooks(client, store, keys, users, layout)
    asking = client.pipeline(transaction=False)
    for user in users:
        asking.hgetall(keys.profile(user))
        asking.memory_usage(keys.profile(user), samples=0)
    replies = asking.execute()
    fields, used = replies[::2], replies[1::2]
    named = {
        "fence": schema.FENCE, "glance": schema.GLANCE, "outlook: next interest": schema.NEXT,
        "outlook: heads": schema.HEADS,
    }  # fmt: skip
    parts |= {what: _mean([f[name.encode()] for f in fields]) for what, name in named.items()}
    parts["hash, names of fields, key, allocator"] = float(np.mean(used)) - sum(parts.values())
    total = float(np.mean(used))
    rows = [[what, f"{n:,.0f}", f"{n / total:.1%}"] for what, n in parts.items()]
    rows.append(["**MEMORY USAGE of the key**", f"**{total:,.0f}**", ""])
    events = len(recorded.events.row) / len(users)
    spread = np.percentile(used, [5, 50, 95])
    return (
        f"{len(users):,} shoppers with {events:.0f} events on average, D = {layout.dimensions}; "
        f"mean bytes. Per key 5 % use at most {spread[0]:,.0f}, half {spread[1]:,.0f}, 95 % "
        f"{spread[2]:,.0f}.\n\n" + report.table(["part", "bytes", "share"], rows)
    )


def _mean(parts: list[bytes]) -> float:
    return float(np.mean([len(part) for part in parts]))


def _put_outlooks(
    client: redis.Redis, store: ProfileStore, keys: Keys, users: list[str], layout: Layout
) -> None:
    asking = client.pipeline(transaction=False)
    for user in users:
        asking.hget(keys.profile(user), schema.FENCE)
    n = len(users)
    heads = {name: np.full(n, 0.123456, np.float32) for name in ("purchase", "churn")}
    rows = np.full((n, layout.dimensions), layout.dimensions**-0.5, np.float32)
    told = outlook.encode(
        rows, heads, "trained-0123456789abcdef", _SPACE, [1] * n, [1_760_000_000_000] * n,
        1_760_000_000_000,
    )  # fmt: skip
    store.put_outlooks(users, asking.execute(), told)


def _memory_of_states(
    client: redis.Redis, recorded: Recorded, layout: Layout
) -> Mapping[str, float]:
    """By way: mean MEMORY USAGE where the state is as much shorter."""
    keys, found = Keys("bytes"), {}
    for way in WAYS:
        less = int(
            len(layout.half_lives_s)
            * (layout.dimensions * (4 - way.number_bytes) - way.scale_bytes)
        )
        asking = client.pipeline(transaction=False)
        for user in recorded.users:
            state = client.hget(keys.profile(user), schema.STATE)
            assert state is not None
            asking.copy(keys.profile(user), "shorter", replace=True)
            asking.hset("shorter", schema.STATE, state[less:])
            asking.memory_usage("shorter", samples=0)
        found[way.name] = float(np.mean(asking.execute()[2::3]))
    return found


# --- quality -------------------------------------------------------------------------------


def _qualities(recorded: Recorded, layout: Layout, memory: Mapping[str, float]) -> str:
    order = np.argsort(recorded.events.row, kind="stable")
    borders = np.searchsorted(recorded.events.row[order], np.arange(len(recorded.users) + 1))
    histories = [order[i:j] for i, j in pairwise(borders.tolist()) if j - i > 1]
    next_items = np.array([recorded.items[h[-1]] for h in histories])
    exact: Floats | None = None
    rows = []
    for way in WAYS:
        sums = np.stack([_summed(recorded, h[:-1], layout, way.rounded) for h in histories])
        exact = sums if exact is None else exact
        overlaps = [
            _overlap(recorded.vectors, sums[:, k], exact[:, k]) for k in range(sums.shape[1])
        ]
        together = unit(unit(sums).sum(axis=1))
        reference = unit(unit(exact).sum(axis=1))
        saved = 1 - memory[way.name] / memory[WAYS[0].name]
        rows.append(
            [
                way.name, f"{memory[way.name]:,.0f}", f"{saved:.0%}",
                *(f"{each:.3f}" for each in overlaps),
                f"{_overlap(recorded.vectors, together, reference):.3f}",
                f"{_recall(recorded.vectors, together, next_items):.4f}",
            ]
        )  # fmt: skip
    head = [
        "sums as", "bytes of a key", "saved", "overlap@10, half an hour", "a day", "a month",
        "all together", "Recall@10 of the next item",
    ]  # fmt: skip
    return (
        f"Interests of {len(histories):,} shoppers before their last event, rounded at every "
        "event: how many of the 10 nearest items of float32 stay, and how often the next item is "
        "among them.\n\n" + report.table(head, rows)
    )


def _summed(recorded: Recorded, history: Ints, layout: Layout, rounded: Rounding) -> Floats:
    """(K, D) sums of one shopper, kept as `rounded` has them after every event. Times that go back
    do not occur here."""
    sums = np.zeros((len(layout.half_lives_s), layout.dimensions), np.float32)
    t_ms, weight = recorded.events.t_ms, recorded.events.weight
    last_ms = int(t_ms[history[0]])
    for at in history.tolist():
        gone = np.exp2(-(int(t_ms[at]) - last_ms) / layout.half_lives_ms).astype(np.float32)
        sums = rounded(sums * gone[:, None] + weight[at] * recorded.vectors[recorded.items[at]])
        last_ms = int(t_ms[at])
    return sums


def _nearest(vectors: Floats, queries: Floats) -> Ints:
    found: Ints = np.argpartition(-(queries @ vectors.T), _TOP, axis=1)[:, :_TOP]
    return found


def _overlap(vectors: Floats, some: Floats, exact: Floats) -> float:
    pairs = zip(_nearest(vectors, unit(some)), _nearest(vectors, unit(exact)), strict=True)
    return float(np.mean([len(np.intersect1d(a, b)) / _TOP for a, b in pairs]))


def _recall(vectors: Floats, queries: Floats, items: Ints) -> float:
    return float((_nearest(vectors, queries) == items[:, None]).any(axis=1).mean())


if __name__ == "__main__":
    main()
