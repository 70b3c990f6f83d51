"""Ten swaps in a row between real fine-tunes, and what becomes of profiles that live through them.

    python -m tests.bench.migration                                MovieLens
    python -m tests.bench.migration --dataset online-retail --path FILE [--path FILE]

A recorded stream goes by. Its first 40 % train a first release; then slices of equal length each
fine-tune the release before. Profiles are folded in the space that is live and moved at each swap,
as workers and sweeper move them; beside them stand the same profiles folded from their whole
history in the new space. Prints and never asserts; `--write` puts the tables into docs/swaps.md.

A consumer is a team that fitted a model on interests once: here a logistic regression from the
month's interest, in the first trained space, to which of some topics the shopper's next item has.
It is frozen, and reads profiles after every swap in two ways: as they are, which is what a reader
gets that ignores `profile.space`; and carried back by the maps that releases ship, which is what a
reader can do who looks. Its loss is set against that of the same consumer on profiles of the same
events that never left its space, so that what changes is the swap and not the shopper.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Final

import numpy as np
import redis
import torch
from threadpoolctl import threadpool_limits

from model.engine import Engine
from model.evaluate import Ints
from model.prequential import NO_ITEM, Events
from model.projection import unit_rows
from model.releases import load as load_release
from model.trainer import TrainSettings
from model.transition import overlap
from profiles import arithmetic
from profiles.arithmetic import EventColumns, Floats, Keys64, Layout, Profiles
from profiles.items import ItemStore, Origin
from profiles.schema import ItemRecord, Keys, key64
from profiles.store import ProfileStore
from stream.catalogue import Catalogue
from stream.datasets import load
from stream.local_stack import RedisServer
from stream.migration import Migrator
from stream.swapping import open_space

from . import report
from .finetunes import DIMENSIONS, Shop, Tuned, borders, fine_tune, open_shop

LAYOUT: Final = Layout(DIMENSIONS)
MONTH: Final = 2  # the longest time scale: most of it lies beyond the window
TOPICS: Final = 8
KINDS: Final = ("ridge", "orthogonal")
THROUGH_REDIS: Final = 20_000  # profiles; each shopper stands for several
_PAGE: Final = 256
_EARLY: Final = 0.1  # of the stream
_FIT_POINTS: Final = 5  # moments of the first training's time at which the consumer was fitted


@dataclass(frozen=True)
class Swap:
    """What one swap did."""

    tuned: Tuned
    moved: float  # mean cosine of item vectors to those before
    overlap: float
    month: float  # by the longest time scale alone
    by_age: dict[str, tuple[int, float]]  # profiles, overlap
    asked: int  # profiles that the consumer was judged on
    guessing: float  # loss of who knows the topics' shares alone; these three as ratios to the
    as_is: float  # consumer's loss without swaps
    carried_back: float
    returned: float  # overlap with what they were, of profiles that were moved there and back


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--dataset", default="movielens")
    parser.add_argument("--path", type=Path, action="append")
    parser.add_argument("--swaps", type=int, default=10)
    parser.add_argument("--epochs", type=int, default=TrainSettings.epochs)
    parser.add_argument("--compared-swaps", type=int, default=3, help="for other weights; 0: none")
    parser.add_argument("--write", action="store_true", help="into docs/swaps.md")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        shop = open_shop(load(given.dataset, given.path), Path(folder))
        events = shop.recorded.events
        # What moves no sum needs no profile.
        events = events.take((events.item != NO_ITEM) & (events.weight != 0))
        shop = replace(shop, recorded=replace(shop.recorded, events=events))
        settings = TrainSettings(epochs=given.epochs, device="cpu")
        ends = borders(shop, given.swaps)
        first = next(fine_tune(shop, Path(folder) / "first", ends[:1], settings))
        _say(f"first training: {first.seconds:.0f} s")
        consumer = fit_consumer(shop, first)

        def live(weight: float, count: int) -> list[Swap]:
            how = replace(settings, compatibility=weight)
            chain = fine_tune(shop, Path(folder) / f"{weight:g}", ends[1 : count + 1], how, first)
            return live_through(shop, first, chain, consumer)

        swaps = live(settings.compatibility, given.swaps)
        parts = [_about(shop, first, swaps, given.epochs), _table(swaps), _ages(swaps)]
        parts.append(through_redis(shop, swaps[0].tuned))
        if count := given.compared_swaps:
            others = {weight: live(weight, count) for weight in (0.0, 5.0)}
            same = {settings.compatibility: swaps[:count]}
            parts.append(_weights(dict(sorted((others | same).items()))))
    named = " ".join(a for a in sys.argv[1:] if a != "--write")
    for path in given.path or ():
        named = named.replace(str(path), path.name)
    text = "\n\n".join([report.where(f"python -m tests.bench.migration {named}".strip()), *parts])
    print(text)
    if given.write:
        report.write(report.ROOT / "docs/swaps.md", text, "migration")


def live_through(
    shop: Shop, first: Tuned, chain: Iterable[Tuned], consumer: _Consumer
) -> list[Swap]:
    """What each swap of a chain does to profiles, and to a consumer of the first's space."""
    keys = _keys(shop)
    home, done = first.candidate.vectors, first.events
    live, at_home = (_folded(shop, keys, home, 0, done, None, 1) for _ in range(2))
    back = np.eye(DIMENSIONS, dtype=np.float32)
    swaps: list[Swap] = []
    for space, tuned in enumerate(chain, 2):
        live = _folded(shop, keys, tuned.before, done, tuned.events, live, space - 1)
        at_home = _folded(shop, keys, home, done, tuned.events, at_home, 1)
        done, vectors = tuned.events, tuned.candidate.vectors
        true = _folded(shop, keys, vectors, 0, done, None, space)
        known = np.flatnonzero(live.header["space"])
        old, new = (dict(zip(keys.tolist(), each, strict=True)) for each in (tuned.before, vectors))
        before = _taste(live)[known]
        arithmetic.migrate(live, known.tolist(), tuned.transition.forward, old, new, LAYOUT, space)
        returned = arithmetic.take(live, known.tolist())
        arithmetic.migrate(
            returned, range(len(known)), tuned.transition.backward, new, old, LAYOUT, space - 1
        )
        back = tuned.transition.backward @ back
        rows, target = _next_topics(shop.recorded.events, done, consumer.topics)
        there = np.isin(rows, known)
        rows, target = rows[there], target[there]
        steady = consumer.loss(_month(at_home)[rows], target)
        got, want = _taste(live), _taste(true)
        swaps.append(
            Swap(
                tuned,
                moved=float(np.einsum("nd,nd->n", tuned.before, vectors).mean()),
                overlap=overlap(got[known], want[known], vectors),
                month=overlap(_month(live)[known], _month(true)[known], vectors),
                by_age={
                    name: (len(at), overlap(got[at], want[at], vectors))
                    for name, at in _by_age(shop.recorded.events, live, known, done).items()
                },
                asked=len(rows),
                guessing=consumer.guessing(target) / steady,
                as_is=consumer.loss(_month(live)[rows], target) / steady,
                carried_back=consumer.loss(unit_rows(_month(live)[rows] @ back), target) / steady,
                returned=overlap(_taste(returned), before, tuned.before),
            )
        )
        _say(f"swap {space - 1}: {tuned.seconds:.0f} s, overlap {swaps[-1].overlap:.3f}")
    return swaps


# --- profiles


def _keys(shop: Shop) -> Keys64:
    return np.array([key64(item) for item in shop.recorded.item_ids], dtype=np.uint64)


def _folded(
    shop: Shop,
    keys: Keys64,
    vectors: Floats,
    begin: int,
    end: int,
    profiles: Profiles | None,
    space: int,
) -> Profiles:
    """Profiles of all shoppers after events `begin` to `end` of the stream."""
    users = len(shop.recorded.user_ids)
    if profiles is None:
        profiles = arithmetic.unpack([None] * users, [None] * users, LAYOUT)
    events = shop.recorded.events
    for first in range(begin, end, 50_000):
        part = slice(first, min(first + 50_000, end))
        arithmetic.fold(profiles, _columns(events.take(part), first, keys, vectors), LAYOUT, space)
    return profiles


def _columns(events: Events, first: int, keys: Keys64, vectors: Floats) -> EventColumns:
    m = len(events)
    return EventColumns(
        row=events.user,
        source=np.ones(m, dtype=np.uint64),
        offset=first + np.arange(m),
        event=np.zeros(m, dtype=np.uint64),
        t_ms=events.t_ms,
        type=events.type,
        weight=events.weight,
        item=keys[events.item],
        category=np.zeros(m, dtype=np.uint64),
        vector=vectors[events.item],
        resolved=np.ones(m, dtype=bool),
        text=np.zeros(m, dtype=bool),
        spend=np.zeros(m),
        foreign=np.zeros(m, dtype=bool),
    )


def _taste(profiles: Profiles) -> Floats:
    """(n, D) what `nearest_items` asks with, where no time scale is named."""
    return unit_rows(arithmetic.unit(profiles.header["sums"]).sum(axis=1))


def _month(profiles: Profiles) -> Floats:
    return unit_rows(profiles.header["sums"][:, MONTH])


def _by_age(events: Events, profiles: Profiles, known: Ints, done: int) -> dict[str, Ints]:
    """Profiles by their events and by when the first of them was."""
    count = profiles.header["events"][known]
    users, begins = np.unique(events.user[:done], return_index=True)
    began = np.zeros(len(profiles), dtype=np.int64)
    began[users] = begins
    old = began[known] < _EARLY * done
    return {
        "up to 50 events (all in the window)": known[count <= LAYOUT.window],
        "51 to 200 events": known[(count > LAYOUT.window) & (count <= 200)],
        "more than 200 events": known[count > 200],
        "begun in the first tenth of the stream": known[old],
        "begun later": known[~old],
    }


# --- a consumer


def _topics(features: Floats) -> Ints:
    """(n,) a topic for each item, from its text alone: spherical k-means."""
    rng = np.random.default_rng(0)
    centred = unit_rows(features - features.mean(axis=0))
    centres = centred[rng.choice(len(centred), TOPICS, replace=False)]
    for _ in range(30):
        nearest = (centred @ centres.T).argmax(axis=1)
        sums = np.zeros_like(centres)
        np.add.at(sums, nearest, centred)
        centres = unit_rows(sums)
    return np.asarray((centred @ centres.T).argmax(axis=1))


def _next_topics(events: Events, at: int, topics: Ints) -> tuple[Ints, Ints]:
    """Shoppers who come back after event `at`, and the topic of the item they come back for."""
    rows, first = np.unique(events.user[at:], return_index=True)
    return rows, topics[events.item[at + first]]


class _Consumer:
    """Multinomial logistic regression, fitted once."""

    def __init__(self, topics: Ints, interests: Floats, targets: Ints) -> None:
        """`topics`: of each item."""
        self.topics = topics
        self._shares = (np.bincount(targets, minlength=TOPICS) + 1) / (len(targets) + TOPICS)
        x, y = torch.from_numpy(interests), torch.from_numpy(targets)
        self._model = torch.nn.Linear(interests.shape[1], TOPICS)
        torch.nn.init.zeros_(self._model.weight)
        torch.nn.init.zeros_(self._model.bias)
        search = torch.optim.LBFGS(self._model.parameters(), max_iter=200)

        def closure() -> torch.Tensor:
            search.zero_grad()
            loss = torch.nn.functional.cross_entropy(self._model(x), y)
            loss = loss + 1e-3 * self._model.weight.square().sum()
            loss.backward()  # type: ignore[no-untyped-call]
            return loss

        search.step(closure)  # type: ignore[no-untyped-call]

    def loss(self, interests: Floats, targets: Ints) -> float:
        """Mean negative log likelihood."""
        with torch.no_grad():
            logits = self._model(torch.from_numpy(interests))
            return float(torch.nn.functional.cross_entropy(logits, torch.from_numpy(targets)))

    def guessing(self, targets: Ints) -> float:
        """The same of the topics' shares among what it was fitted on."""
        return float(-np.log(self._shares[targets]).mean())


def fit_consumer(shop: Shop, first: Tuned) -> _Consumer:
    """On profiles in the first's space, at moments of the time that it was trained on."""
    events, keys = shop.recorded.events.take(slice(0, first.events)), _keys(shop)
    topics = _topics(shop.features)
    interests, targets, done = [], [], 0
    profiles: Profiles | None = None
    for moment in range(1, _FIT_POINTS + 1):
        at = first.events * moment // (_FIT_POINTS + 1)
        profiles = _folded(shop, keys, first.candidate.vectors, done, at, profiles, 1)
        done = at
        rows, target = _next_topics(events, at, topics)
        there = profiles.header["space"][rows] != 0
        interests.append(_month(profiles)[rows[there]])
        targets.append(target[there])
    return _Consumer(topics, np.concatenate(interests), np.concatenate(targets))


# --- through Redis


def through_redis(shop: Shop, tuned: Tuned) -> str:
    """How fast a worker's sweep moves profiles into this release's space."""
    recorded = shop.recorded
    releases = tuned.release.path.parent
    before = load_release(releases / tuned.release.parent)
    with tempfile.TemporaryDirectory() as folder, RedisServer(Path(folder)) as server:
        client = redis.Redis.from_url(server.url)
        items = ItemStore(client, Keys("bench"))
        store = ProfileStore(client, Keys("bench"), LAYOUT, ttl_s=1e6, writer=1)
        records = [
            ItemRecord(item, text or item)
            for item, text in zip(recorded.item_ids, recorded.texts, strict=True)
        ]
        catalogue = Catalogue(Engine(before, device="cpu"), items, before.load_item_vectors())
        catalogue.upsert(records, Origin(1, 0))
        open_space(items, catalogue)
        keys = _keys(shop)
        vectors = catalogue.resolve(keys.tolist(), {}).vectors
        profiles = _folded(shop, keys, vectors, 0, tuned.events, None, catalogue.space)
        known = np.flatnonzero(profiles.header["space"]).tolist()
        everybody: list[str] = []
        while len(everybody) < THROUGH_REDIS:
            names = [f"{recorded.user_ids[row]}-{len(everybody)}" for row in known]
            part = arithmetic.take(profiles, known)  # anew: a save leaves its fence in it
            store.save(names, part, range(len(known)), {}, time.time())
            everybody += names
        new = Catalogue(
            Engine(tuned.release, device="cpu"), items, tuned.release.load_item_vectors()
        )
        began_s = time.perf_counter()
        new.fill()
        fill_s = time.perf_counter() - began_s
        items.set_space(tuned.release.space)
        migrator = Migrator(releases, items, LAYOUT)
        store.warm_up()
        threadpool_limits(1, user_api="blas")  # as a worker has it
        began_s = time.perf_counter()
        migrator.make_ready(before.space, new)
        ready_s = time.perf_counter() - began_s
        carry = partial(migrator.carry, catalogue=new)
        count = 0
        began_s, began_cpu_s = time.perf_counter(), time.process_time()
        for start in range(0, len(everybody), _PAGE):
            moved, _ = store.move(everybody[start : start + _PAGE], new.space, carry)
            count += len(moved)
        took_s, cpu_s = time.perf_counter() - began_s, time.process_time() - began_cpu_s
        client.close()
    if count != len(everybody):
        raise SystemExit(f"{count:,} of {len(everybody):,} profiles were moved")
    return (
        f"Through Redis, loaded, moved and saved by one thread in pages of {_PAGE}: "
        f"**{len(everybody) / took_s:,.0f} profiles/s** ({len(everybody):,} of them), at "
        f"{1e6 * cpu_s / len(everybody):.0f} us of this process' CPU each. A space of "
        f"{len(keys):,} items was ready in {fill_s:.1f} s, the way to it in {ready_s:.2f} s."
    )


# --- as Markdown


def _about(shop: Shop, first: Tuned, swaps: Sequence[Swap], epochs: int) -> str:
    events = shop.recorded.events
    seconds = [swap.tuned.seconds for swap in swaps]
    return (
        f"{shop.recorded.name}: {len(events):,} events of {len(shop.recorded.user_ids):,} shoppers "
        f"and {len(shop.recorded.item_ids):,} items. A first training on {first.events:,} events, "
        f"{first.seconds:.0f} s, and {len(swaps)} fine-tunes on slices of "
        f"{swaps[0].tuned.events - first.events:,}, {min(seconds):.0f} to {max(seconds):.0f} s "
        f"each, {epochs} epochs at most."
    )


def _table(swaps: Sequence[Swap]) -> str:
    head = [
        "swap", "items' cosine to before", "held out: ridge (overlap@10)",
        "held out: orthogonal (overlap@10)", "profiles: overlap@10", "by the month alone",
        "consumer's loss: guessing",
        "profiles as they are", "carried back", "asked", "there and back: overlap@10",
    ]  # fmt: skip
    rows = []
    for number, swap in enumerate(swaps, 1):
        errors = swap.tuned.transition.errors
        rows.append(
            [
                str(number),
                f"{swap.moved:.3f}",
                *(f"{errors[k].cosine:.3f} ({errors[k].overlap:.2f})" for k in KINDS),
                f"{swap.overlap:.3f}",
                f"{swap.month:.3f}",
                f"{swap.guessing - 1:+.1%}",
                f"{swap.as_is - 1:+.1%}",
                f"{swap.carried_back - 1:+.1%}",
                f"{swap.asked:,}",
                f"{swap.returned:.3f}",
            ]
        )
    rows.append(["median", *_medians(swaps)])
    return report.table(head, rows)


def _medians(swaps: Sequence[Swap]) -> list[str]:
    def median(of: Callable[[Swap], float]) -> float:
        return statistics.median(map(of, swaps))

    def held_out(kind: str) -> str:
        errors = [swap.tuned.transition.errors[kind] for swap in swaps]
        cosine = statistics.median(error.cosine for error in errors)
        return f"{cosine:.3f} ({statistics.median(error.overlap for error in errors):.2f})"

    return [
        f"{median(lambda s: s.moved):.3f}",
        *map(held_out, KINDS),
        f"{median(lambda s: s.overlap):.3f}",
        f"{median(lambda s: s.month):.3f}",
        f"{median(lambda s: s.guessing) - 1:+.1%}",
        f"{median(lambda s: s.as_is) - 1:+.1%}",
        f"{median(lambda s: s.carried_back) - 1:+.1%}",
        f"{median(lambda s: s.asked):,.0f}",
        f"{median(lambda s: s.returned):.3f}",
    ]


def _ages(swaps: Sequence[Swap]) -> str:
    head = ["profiles"]
    rows = [[name] for name in swaps[0].by_age]
    for number, swap in ((1, swaps[0]), (len(swaps), swaps[-1])):
        head += [f"at swap {number}", "overlap@10"]
        for row, (count, shared) in zip(rows, swap.by_age.values(), strict=True):
            row += [f"{count:,}", f"{shared:.3f}"]
    return report.table(head, rows)


def _weights(found: dict[float, list[Swap]]) -> str:
    head = [
        "compatibility", "items' cosine to before", "held out: ridge (overlap@10)",
        "held out: orthogonal (overlap@10)", "profiles: overlap@10", "by the month alone",
        "consumer's loss: guessing",
        "profiles as they are", "carried back", "NDCG@20 on the newest",
    ]  # fmt: skip
    rows = [
        [
            f"{weight:g}",
            *_medians(swaps)[:8],
            f"{statistics.median(_newest_ndcg(swap) for swap in swaps):.4f}",
        ]
        for weight, swaps in found.items()
    ]
    count = len(next(iter(found.values())))
    return f"Medians over {count} swaps, by LEARN_COMPATIBILITY:\n\n" + report.table(head, rows)


def _newest_ndcg(swap: Swap) -> float:
    return float(swap.tuned.candidate.metrics["newest"]["ndcg@20"])


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
