"""Migration, measured: `python -m tests.bench.migration`.

MovieLens shoppers are folded in one space, moved to another (their window exactly, the rest
through the fitted map), and compared with the same shoppers folded in the other space from
their whole history: the share of the ten nearest items that is the same. And how many
profiles a second are moved, in memory and through Redis.
"""

from __future__ import annotations

import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import redis

from model.engine import Engine
from model.projection import Projection, unit_rows
from model.releases import build_base, publish
from model.text import item_text
from model.transition import fit_transition, overlap
from profiles import arithmetic
from profiles.arithmetic import EventColumns, Floats, Layout, Profiles
from profiles.items import ItemStore, Origin
from profiles.schema import ItemRecord, Keys, key64
from profiles.store import ProfileStore
from stream.catalogue import Catalogue
from stream.datasets import load
from stream.local_stack import RedisServer
from stream.migration import Migrator
from stream.swapping import open_space

DIMENSIONS = 128
LAYOUT = Layout(DIMENSIONS)
ROUNDS = 20  # MovieLens has 943 shoppers; each stands for so many in the Redis run


def main() -> None:
    """Print the figures."""
    data = load("movielens")
    texts = [item_text(i.title, i.category, i.brand or "", i.description or "") for i in data.items]
    row_of = {item.item_id: row for row, item in enumerate(data.items)}
    events = [e for e in data.events if getattr(e, "item_id", None) in row_of]
    users = sorted({e.user_id for e in events})
    with tempfile.TemporaryDirectory() as folder:
        base = build_base(
            Path(folder), "bundled", texts, DIMENSIONS, device="cpu", now=datetime.now(UTC)
        )
        projection = Projection.load(base.path / "projection.safetensors")
        old = base.load_encoder(device="cpu").encode(texts)
        print(f"{len(users)} shoppers, {len(events)} events, {len(texts)} items, D = {DIMENSIONS}")
        keys = np.array([key64(i.item_id) for i in data.items], dtype=np.uint64)
        for name, new_projection in (
            ("fine-tuned a little (noise of 20%)", _disturbed(projection, 0.2)),
            ("fine-tuned a lot (noise of 60%)", _disturbed(projection, 0.6)),
            ("other directions of the tower", _other(projection)),
        ):
            release = publish(base, new_projection, now=datetime.now(UTC))
            new = release.load_encoder(device="cpu").encode(texts)
            found = fit_transition(base.space, release.space, old, new)
            print(f"\n{name}")
            for kind, error in found.errors.items():
                chosen = "  <- chosen" if kind == found.kind else ""
                print(
                    f"  {kind:10} held out: cosine {error.cosine:.3f} (5% below "
                    f"{error.cosine_p05:.3f}), overlap@10 {error.overlap:.3f}{chosen}"
                )
            _compare(users, events, row_of, keys, old, new, found.forward)
        _through_redis(base, _disturbed(projection, 0.2), data.items, events)


def _disturbed(projection: Projection, share: float) -> Projection:
    noise = np.random.default_rng(3).standard_normal(projection.matrix.shape)
    noise *= share * projection.matrix.std() / noise.std()
    matrix = np.asarray(projection.matrix + noise, dtype=np.float32)
    return Projection(projection.centre, matrix)


def _other(projection: Projection) -> Projection:
    matrix = np.random.default_rng(4).standard_normal(projection.matrix.shape)
    return Projection(projection.centre, matrix.astype(np.float32))


def _columns(users: list[str], events: list, row_of: dict[str, int], vectors: Floats):  # type: ignore[no-untyped-def,type-arg]
    m = len(events)
    user_row = {user: row for row, user in enumerate(users)}
    at = np.array([row_of[e.item_id] for e in events])
    return EventColumns(
        row=np.array([user_row[e.user_id] for e in events]),
        source=np.ones(m, dtype=np.uint64),
        offset=np.arange(m),
        event=np.zeros(m, dtype=np.uint64),
        t_ms=np.array([e.ts for e in events]),
        type=np.full(m, 1, dtype=np.uint8),
        weight=np.ones(m, dtype=np.float32),
        item=np.array([key64(e.item_id) for e in events], dtype=np.uint64),
        category=np.zeros(m, dtype=np.uint64),
        vector=vectors[at],
        resolved=np.ones(m, dtype=bool),
        text=np.zeros(m, dtype=bool),
        spend=np.zeros(m),
        foreign=np.zeros(m, dtype=bool),
    )


def _folded(users: list[str], events: list, row_of: dict[str, int], vectors: Floats, space: int):  # type: ignore[no-untyped-def,type-arg]
    profiles = arithmetic.unpack([None] * len(users), [None] * len(users), LAYOUT)
    arithmetic.fold(profiles, _columns(users, events, row_of, vectors), LAYOUT, space)
    return profiles


def _taste(profiles: Profiles) -> Floats:
    return unit_rows(arithmetic.unit(profiles.header["sums"]).sum(axis=1))


def _compare(users, events, row_of, keys, old, new, forward) -> None:  # type: ignore[no-untyped-def]
    moved, true = (_folded(users, events, row_of, v, s) for v, s in ((old, 1), (new, 2)))
    before = dict(zip(keys.tolist(), old, strict=True))
    after = dict(zip(keys.tolist(), new, strict=True))
    unmoved = arithmetic.take(moved, range(len(users)))
    arithmetic.migrate(unmoved, range(len(users)), forward, {}, {}, LAYOUT, 2)
    began_s = time.perf_counter()
    arithmetic.migrate(moved, range(len(users)), forward, before, after, LAYOUT, 2)
    took_s = time.perf_counter() - began_s
    got, want = _taste(moved), _taste(true)
    print(f"  overlap@10 migrated against recomputed: {overlap(got, want, new):.3f}")
    print(f"    by the map alone, without the window: {overlap(_taste(unmoved), want, new):.3f}")
    count = moved.header["events"]
    for low, high in ((1, 50), (51, 200), (201, 10_000)):
        at = (count >= low) & (count <= high)
        if at.any():
            shared = overlap(got[at], want[at], new)
            print(f"    shoppers of {low} to {high} events ({at.sum()}): {shared:.3f}")
    print(f"  in memory: {len(users) / took_s:,.0f} profiles/s")


def _through_redis(base, projection, data_items, events) -> None:  # type: ignore[no-untyped-def]
    release = publish(base, projection, now=datetime.now(UTC))
    with tempfile.TemporaryDirectory() as folder, RedisServer(Path(folder)) as server:
        client = redis.Redis.from_url(server.url)
        items = ItemStore(client, Keys("bench"))
        store = ProfileStore(client, Keys("bench"), LAYOUT, ttl_s=1e6, writer=1)
        records = [ItemRecord(i.item_id, i.title, tuple(i.category)) for i in data_items]
        catalogue = Catalogue(Engine(base, device="cpu"), items)
        catalogue.upsert(records, Origin(1, 0))
        open_space(items, catalogue)
        keys = [key64(i.item_id) for i in data_items]
        row_of = {i.item_id: row for row, i in enumerate(data_items)}
        vectors = catalogue.resolve(keys, {}).vectors
        users = sorted({e.user_id for e in events})
        for r in range(ROUNDS):
            names = [f"{user}-{r}" for user in users]
            profiles = _folded(users, events, row_of, vectors, catalogue.space)
            store.save(names, profiles, range(len(users)), {}, time.time())
        began_s = time.perf_counter()
        new = Catalogue(Engine(release, device="cpu"), items)
        new.fill()
        print(f"\na space of {len(keys)} items made ready in {time.perf_counter() - began_s:.1f} s")
        items.set_space(release.space)
        migrator = Migrator(base.path.parent, items, LAYOUT)
        everybody = [f"{user}-{r}" for r in range(ROUNDS) for user in users]
        began_s = time.perf_counter()
        for start in range(0, len(everybody), 256):
            page = everybody[start : start + 256]
            profiles = store.load(page)
            ((part, _, _, moved),) = migrator.bring(profiles, new)
            store.save(page, part, sorted(moved), {}, 0.0, renew=False)
        took_s = time.perf_counter() - began_s
        print(
            f"through Redis: {len(everybody) / took_s:,.0f} profiles/s ({len(everybody)} of them)"
        )


if __name__ == "__main__":
    main()
