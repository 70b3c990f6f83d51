"""A simulated shop: shoppers with latent interests that drift, and what they do, in event time.

PURE. A spec in; rows of events in the order in which they would arrive, and the truth behind
them, out. It does not know files, Kafka or the clock. Nothing that is measured on it says
anything about people: whoever shows a figure of it says "simulated".

Time advances in ticks, whose length depends on the spec alone. Each tick draws from a random
generator of its own (seed, tick), so the stream is the same however it is read or cut. State is
kept per shopper and per item, never per event.

A shopper's interest is a softmax of one logit per topic, each an Ornstein-Uhlenbeck walk: it
drifts for ever and stays as decided as it was. Visits are a Poisson process whose rate follows
the time of day. In a visit items are shown, mostly of the topic wanted; what fits is viewed, put
in the cart, bought; what was bought fits or disappoints, which makes ratings, messages and, in
the end, churn. A shopper who left is followed by a new one.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import count
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from profiles.arithmetic import FORGET
from profiles.schema import TYPE_CODE

from .simulated_words import NOUNS, PICKS, TOPICS, ItemWords, describe
from .times import DAY_MS, HOUR_MS

Floats = NDArray[np.float64]
Interests = NDArray[np.float32]
Ints = NDArray[np.int64]
Bools = NDArray[np.bool_]
Rows = NDArray[np.void]

K: Final = len(TOPICS)
_MINUTE_MS: Final = 60_000
_NEVER_MS: Final = np.iinfo(np.int64).max
GUEST: Final = 1 << 40
"""User numbers from here on are guests: they come once, and nobody knows them again."""

# About so many events a tick: enough for numpy to be fast, little enough to hold.
_TICK_EVENTS: Final = 20_000
_EVENTS_PER_VISIT: Final = 25
# Relative traffic by hour (UTC): nights are quiet, evenings are not.
_BY_HOUR: Final = (3, 2, 1, 1, 1, 2, 4, 6, 8, 9, 9, 9, 10, 9, 9, 9, 10, 11, 13, 15, 16, 14, 9, 5)

_SPREAD: Final = 2.0  # standard deviation of the logits: a topic or three dominate
_OF_WANTED: Final = 0.75  # share of shown items that are of the topic wanted
_SEARCHES: Final = 0.4  # visits that begin with a search
_CLICKS: Final = 0.5  # views that a click led to
_REMOVES: Final = 0.15
_CHECKS_OUT: Final = 0.5
_REVIEWS: Final = 0.3  # of purchases
_COMPLAINS: Final = 0.5  # of bad purchases, to the support
_WRITES: Final = 0.04  # of the others
_RESTOCKS: Final = 0.7  # purchases of consumables that are repeated
_LOOKS: Final = 5.0
_MOST_LOOKS: Final = 25
_BOT_LOOKS: Final = 60
_BOT_VISITS: Final = 10.0  # times as many as a shopper's

ROW: Final = np.dtype(
    [
        ("sent_ms", "i8"),  # when it arrives: later than ts for late events and repeats
        ("ts", "i8"),  # event time, ms
        ("n", "i8"),  # number of the event; a repeat has that of its first
        ("user", "i8"),
        ("session", "i8"),  # -1: outside of any
        ("item", "i4"),  # -1: none
        ("seed", "i4"),  # of the words
        ("type", "u1"),  # index into schema.EVENT_TYPES, or FORGET
        ("topic", "i1"),  # of a search
        ("quantity", "u1"),
        ("rating", "u1"),
        ("label", "i1"),  # index into simulated_words.LABELS, -1: none
        ("told", "?"),  # the event carries its label
        ("searched", "?"),  # the visit began with a search
    ]
)


@dataclass(frozen=True)
class Spec:
    """What to simulate."""

    shoppers: int = 1_000
    """At a time; who leaves is followed by somebody new."""
    items: int = 2_000
    days: float = 30.0
    """0: without end."""
    visits_per_day: float = 0.3
    """Of a shopper, on average."""
    shown: int = 3
    """Items shown before each view: impressions."""
    drift_days: float = 45.0
    """After so long an interest has kept 1/e of its correlation with what it was."""
    churn: float = 0.02
    """Chance to leave after a visit, for a shopper who is neither pleased nor annoyed."""
    forgets: float = 0.0
    """Share of those who leave that want to be erased; what they wrote before may come later."""
    guests: float = 0.1
    """Visits of nobody known, for each visit of a shopper."""
    bots: float = 0.0
    """Share of the shoppers that are programs."""
    duplicates: float = 0.0
    """Share of events that the producer sends twice."""
    late: float = 0.0
    """Share of events that arrive late, by 20 minutes on average."""
    labelled: float = 0.5
    """Share of messages that carry their label."""
    start_ms: int = 1_767_225_600_000  # 2026-01-01T00:00:00Z
    seed: int = 0

    def __post_init__(self) -> None:
        """Raises ValueError for what cannot be."""
        lowest = {"shoppers": 1, "items": K, "shown": 1, "seed": 0, "days": 0}
        for name, least in lowest.items():
            if not getattr(self, name) >= least:
                raise ValueError(f"{name} must be at least {least}")
        for name in ("visits_per_day", "drift_days"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be above 0")
        for name in ("churn", "forgets", "guests", "bots", "duplicates", "late", "labelled"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} must be a share from 0 to 1")

    @property
    def end_ms(self) -> int:
        """Nothing arrives from here on."""
        return self.start_ms + int(self.days * DAY_MS) if self.days else _NEVER_MS

    @property
    def tick_ms(self) -> int:
        """Length of a tick."""
        visits = self.shoppers * self.visits_per_day * (1 + self.guests + _BOT_VISITS * self.bots)
        ticks_per_day = visits * _EVENTS_PER_VISIT / _TICK_EVENTS
        return max(_MINUTE_MS, int(DAY_MS / max(1.0, ticks_per_day)))


@dataclass(frozen=True)
class Visits:
    """The truth of m visits."""

    user: Ints  # (m,)
    t_ms: Ints  # (m,) when it began
    topic: Ints  # (m,) what was wanted, -1 for a bot
    interest: Interests  # (m, K) shares, at that time


@dataclass(frozen=True)
class Block:
    """What one tick brings."""

    rows: Rows  # (n,) of ROW, in the order of arrival
    visits: Visits  # that began in it
    churned: Ints  # (c,) users who do not visit again
    churned_ms: Ints  # (c,) the end of their last visit
    labels: Rows  # (l,) reviews and messages, of ROW, that the visits will lead to


class Shop:
    """A catalogue and a spec; `blocks` may be read again and again, and is the same each time."""

    def __init__(self, spec: Spec) -> None:
        self.spec = spec
        rng = _generator(spec.seed, 0)
        n = spec.items
        self.topic: Ints = rng.permutation(np.arange(n) % K)  # (n,)
        self.noun: Ints = rng.integers(0, NOUNS, n)  # (n,)
        self.quality: Floats = rng.normal(0.0, 1.0, n)  # (n,)
        median = np.array([topic.price for topic in TOPICS])
        price = median[self.topic] * np.exp(rng.normal(0.0, 0.4, n))
        self.price: Floats = np.maximum(np.round(price, 2), 0.5)  # (n,)
        self._picks = rng.integers(0, 1 << 30, (n, PICKS)).astype(np.int32)
        # Zipf within a topic; items of a topic stand together, so that one search finds any.
        self._by_topic: Ints = np.argsort(self.topic, kind="stable")
        sizes = np.bincount(self.topic, minlength=K)
        start = np.cumsum(sizes) - sizes
        self._place = np.empty(n, np.int64)
        self._place[self._by_topic] = np.arange(n) - np.repeat(start, sizes)
        weight = 1.0 / (1.0 + self._place[self._by_topic]) ** 0.8
        self._up_to: Floats = np.cumsum(weight)
        ends = self._up_to[start + sizes - 1]
        self._base: Floats = np.append(0.0, ends[:-1])
        self._mass: Floats = ends - self._base
        self.consumable: Bools = np.array([topic.consumable for topic in TOPICS])[self.topic]

    def words(self, item: int) -> ItemWords:
        """The text of an item."""
        return describe(
            int(self.topic[item]),
            int(self.noun[item]),
            int(self._place[item]),
            self._picks[item].tolist(),
        )

    def draw(self, topic: Ints, rng: np.random.Generator) -> Ints:
        """A random item of each topic, the popular ones more often; the shape of `topic`."""
        at = self._base[topic] + rng.random(topic.shape) * self._mass[topic]
        place = np.minimum(np.searchsorted(self._up_to, at), len(self.topic) - 1)
        found: Ints = self._by_topic[place]
        return found

    def blocks(self) -> Iterator[Block]:
        """Tick by tick, until the end. Holds what is still to arrive, and no more."""
        spec = self.spec
        people = _People(self)
        waiting = _Waiting()
        for tick in count():
            begin_ms = spec.start_ms + tick * spec.tick_ms
            if begin_ms >= spec.end_ms:
                return
            # A tick is whole even where the end cuts it: a longer run begins with the same events.
            until_ms = begin_ms + spec.tick_ms
            rng = _generator(spec.seed, tick + 2)
            acted = people.act(begin_ms, until_ms, rng)
            waiting.add(_transported(acted.rows, spec, rng), until_ms)
            yield _before(spec.end_ms, replace(acted, rows=waiting.take(until_ms)))


def _before(end_ms: int, block: Block) -> Block:
    """The part of a block that lies before the end."""
    visits, early = block.visits, block.visits.t_ms < end_ms
    left = block.churned_ms < end_ms
    return Block(
        rows=block.rows[block.rows["sent_ms"] < end_ms],
        visits=Visits(
            visits.user[early], visits.t_ms[early], visits.topic[early], visits.interest[early]
        ),
        churned=block.churned[left],
        churned_ms=block.churned_ms[left],
        labels=block.labels[block.labels["ts"] < end_ms],
    )


def _generator(seed: int, stream: int) -> np.random.Generator:
    return np.random.Generator(np.random.Philox(key=np.array([seed, stream], np.uint64)))


def _transported(rows: Rows, spec: Spec, rng: np.random.Generator) -> Rows:
    """The rows with late ones late, and with repeats."""
    late = np.flatnonzero(rng.random(len(rows)) < spec.late)
    rows["sent_ms"][late] += _delay(rng, 20 * _MINUTE_MS, len(late))
    repeats = rows[rng.random(len(rows)) < spec.duplicates]
    repeats["sent_ms"] += _delay(rng, 30_000, len(repeats))
    return np.concatenate([rows, repeats])


def _delay(rng: np.random.Generator, mean_ms: float, n: int) -> Ints:
    return 1 + rng.exponential(mean_ms, n).astype(np.int64)


class _Waiting:
    """Rows that arrive later: those of the day in hand together, those of later days by day."""

    def __init__(self) -> None:
        self._near: list[Rows] = []
        self._far: dict[int, list[Rows]] = defaultdict(list)

    def add(self, rows: Rows, until_ms: int) -> None:
        day = rows["sent_ms"] // DAY_MS
        near = day <= (until_ms - 1) // DAY_MS
        self._near.append(rows[near])
        for later in np.unique(day[~near]).tolist():
            self._far[later].append(rows[day == later])

    def take(self, until_ms: int) -> Rows:
        """What arrives before, in order."""
        for day in [day for day in self._far if day <= (until_ms - 1) // DAY_MS]:
            self._near += self._far.pop(day)
        rows = np.concatenate(self._near)
        due = rows["sent_ms"] < until_ms
        self._near = [rows[~due]]
        rows = rows[due]
        order: Ints = np.lexsort((rows["n"], rows["sent_ms"]))
        return rows[order]


# --- time of day: a clock that runs as fast as the shop is busy, in days

_HOURS_MS: Final = np.arange(25) * float(HOUR_MS)
_BUSY: Final = np.append(0.0, np.cumsum(_BY_HOUR) / sum(_BY_HOUR))


def _busy_days(t_ms: Ints) -> Floats:
    day, rest = np.divmod(t_ms, DAY_MS)
    busy: Floats = day + np.interp(rest, _HOURS_MS, _BUSY)
    return busy


def _at_busy_day(busy: Floats) -> Ints:
    day = np.floor(busy)
    rest = np.interp(busy - day, _BUSY, _HOURS_MS)
    found: Ints = (day * DAY_MS + rest).astype(np.int64)
    return found


# --- shoppers


@dataclass
class _Visitors:
    """m visits about to happen."""

    user: Ints  # (m,)
    t_ms: Ints  # (m,)
    interest: Interests  # (m, K)
    bot: Bools  # (m,)
    restock: Ints  # (m,) item to buy again, -1 = none

    def __len__(self) -> int:
        return len(self.user)


@dataclass
class _Outcome:
    """What came of m visits."""

    rows: Rows
    topic: Ints  # (m,)
    end_ms: Ints  # (m,)
    pleasure: Floats  # (m,) of what was bought, mean, about -2 to 2; nan = nothing was
    used_up: Ints  # (m,) item to be bought again one day, -1 = none


class _People:
    """The shoppers of one run."""

    def __init__(self, shop: Shop) -> None:
        self._shop, spec = shop, shop.spec
        n = spec.shoppers
        rng = _generator(spec.seed, 1)
        self._users = n  # numbers given so far
        self._guests = 0
        self._sessions = 0
        self._events = 0
        self.user: Ints = np.arange(n)
        self.bot: Bools = rng.random(n) < spec.bots
        self.logits: Interests = np.empty((n, K), np.float32)
        self.per_day: Floats = np.empty(n)
        self.pleasure: Floats = np.empty(n)
        self.restock: Ints = np.empty(n, np.int64)
        self.restock_ms: Ints = np.empty(n, np.int64)
        self.last_ms: Ints = np.full(n, spec.start_ms - _MINUTE_MS)
        self.next_ms: Ints = np.empty(n, np.int64)
        self._begin(np.arange(n), rng)

    def _begin(self, at: Ints, rng: np.random.Generator) -> None:
        """Somebody new in each of these places, from `last_ms` on."""
        spec = self._shop.spec
        self.logits[at] = rng.standard_normal((len(at), K), np.float32) * np.float32(_SPREAD)
        each = rng.gamma(2.0, 0.5, len(at)) + 0.05  # some come often
        self.per_day[at] = each * spec.visits_per_day * np.where(self.bot[at], _BOT_VISITS, 1.0)
        self.pleasure[at] = 0.0
        self.restock[at], self.restock_ms[at] = -1, _NEVER_MS
        self._plan(at, rng)

    def _plan(self, at: Ints, rng: np.random.Generator) -> None:
        """The next visit, after `last_ms`; who is out of something comes for that."""
        gap = rng.exponential(1.0, len(at)) / self.per_day[at]
        # From a minute later: what rounding takes cannot make a visit begin in the one before.
        free = _busy_days(self.last_ms[at] + _MINUTE_MS)
        self.next_ms[at] = _at_busy_day(free + gap) + 1
        out = at[self.restock[at] >= 0]
        due_ms = self.restock_ms[out] + _delay(rng, 12 * HOUR_MS, len(out))
        sooner = np.maximum(due_ms, self.last_ms[out] + HOUR_MS)
        self.next_ms[out] = np.minimum(self.next_ms[out], sooner)

    def act(self, begin_ms: int, until_ms: int, rng: np.random.Generator) -> Block:
        """All visits that begin in a tick, with all that they lead to."""
        rows, seen, gone, gone_ms = [np.empty(0, ROW)], [], [], []
        while len(at := np.flatnonzero(self.next_ms < until_ms)):
            visitors = self._visitors(at, begin_ms, until_ms, rng)
            outcome = _visit(self._shop, visitors, self._sessions, rng)
            self._sessions += len(visitors)
            rows.append(outcome.rows)
            seen.append((visitors.user, visitors.t_ms, outcome.topic, visitors.interest))
            left = self._settle(at, outcome, rng)
            gone.append(self.user[left])
            gone_ms.append(self.last_ms[left])
            erased = left[rng.random(len(left)) < self._shop.spec.forgets]
            rows.append(_forgets(self.user[erased], self.last_ms[erased] + HOUR_MS))
            self._replace(left, rng)
        all_rows = np.concatenate(rows)
        all_rows = all_rows[np.argsort(all_rows["ts"], kind="stable")]
        all_rows["n"] = self._events + np.arange(len(all_rows))
        all_rows["sent_ms"] = all_rows["ts"]
        self._events += len(all_rows)
        labels = all_rows[all_rows["label"] >= 0]
        return Block(all_rows, _joined(seen), _flat(gone), _flat(gone_ms), labels)

    def _visitors(
        self, at: Ints, begin_ms: int, until_ms: int, rng: np.random.Generator
    ) -> _Visitors:
        """The shoppers in these places, and guests."""
        spec = self._shop.spec
        t_ms = self.next_ms[at]
        days = (t_ms - self.last_ms[at]) / DAY_MS
        kept = np.exp(-days / spec.drift_days).astype(np.float32)[:, None]
        news = rng.standard_normal((len(at), K), np.float32) * np.float32(_SPREAD)
        self.logits[at] = kept * self.logits[at] + np.sqrt(1 - kept**2) * news
        guests = int(rng.poisson(spec.guests * len(at)))
        low, high = _busy_days(np.array([begin_ms, until_ms]))
        unknown = rng.standard_normal((guests, K), np.float32) * np.float32(_SPREAD)
        restock = np.where(self.restock_ms[at] <= t_ms, self.restock[at], -1)
        self._guests += guests
        return _Visitors(
            user=np.append(self.user[at], GUEST + self._guests - guests + np.arange(guests)),
            t_ms=np.append(t_ms, _at_busy_day(rng.uniform(low, high, guests))),
            interest=_softmax(np.concatenate([self.logits[at], unknown])),
            bot=np.append(self.bot[at], np.zeros(guests, np.bool_)),
            restock=np.append(restock, np.full(guests, -1)),
        )

    def _settle(self, at: Ints, outcome: _Outcome, rng: np.random.Generator) -> Ints:
        """What the visits leave in their shoppers; the places of those who do not come again."""
        m = len(at)  # guests, which come after, leave nothing
        felt, used_up = outcome.pleasure[:m], outcome.used_up[:m]
        bought = ~np.isnan(felt)
        self.pleasure[at[bought]] += 0.4 * (felt[bought] - self.pleasure[at[bought]])
        self.last_ms[at] = outcome.end_ms[:m]
        served = self.restock_ms[at] <= self.next_ms[at]
        self.restock[at[served]], self.restock_ms[at[served]] = -1, _NEVER_MS
        again = (used_up >= 0) & (rng.random(m) < _RESTOCKS)
        self.restock[at[again]] = used_up[again]
        lasts = 28 * DAY_MS * np.exp(rng.normal(0.0, 0.3, int(again.sum())))
        self.restock_ms[at[again]] = self.last_ms[at[again]] + lasts.astype(np.int64)
        self._plan(at, rng)
        hazard = self._shop.spec.churn * np.exp(-1.5 * self.pleasure[at])
        left: Ints = at[(rng.random(m) < hazard) & ~self.bot[at]]
        return left

    def _replace(self, left: Ints, rng: np.random.Generator) -> None:
        self.user[left] = self._users + np.arange(len(left))
        self._users += len(left)
        self._begin(left, rng)


def _forgets(user: Ints, ts: Ints) -> Rows:
    rows = np.zeros(len(user), ROW)
    rows["type"], rows["user"], rows["ts"] = FORGET, user, ts
    rows["session"], rows["item"], rows["label"] = -1, -1, -1
    return rows


def _joined(seen: list[tuple[Ints, Ints, Ints, Interests]]) -> Visits:
    user, t_ms, topic, interest = zip(*seen, strict=True) if seen else ((), (), (), ())
    shares = np.concatenate([np.empty((0, K), np.float32), *interest])
    return Visits(_flat(user), _flat(t_ms), _flat(topic), shares)


def _flat(parts: Any) -> Ints:
    return np.concatenate([np.empty(0, np.int64), *parts])


def _softmax(logits: Interests) -> Interests:
    shares = np.exp(logits - logits.max(axis=1, keepdims=True))
    out: Interests = shares / shares.sum(axis=1, keepdims=True)
    return out


# --- one visit, of many at a time


def _visit(shop: Shop, who: _Visitors, first_session: int, rng: np.random.Generator) -> _Outcome:
    """m visits from the first look to what comes of the purchases, days later."""
    m = len(who)
    want = _choose(who.interest, rng)
    searched = (rng.random(m) < _SEARCHES) & ~who.bot
    looks = np.minimum(rng.geometric(1 / _LOOKS, m), _MOST_LOOKS)
    looks = np.where(who.bot, _BOT_LOOKS, looks)
    s: Ints = np.repeat(np.arange(m), looks)  # (l,) visit of each look
    first: Ints = np.cumsum(looks) - looks  # (m,) first look of each visit
    gap = np.minimum(25_000 * np.exp(rng.normal(0.0, 0.9, len(s))), 10 * _MINUTE_MS)
    gap = np.where(who.bot[s], 500 + gap / 50, gap + 4_000).astype(np.int64)
    at_ms = who.t_ms[s] + _running(gap, first, looks)  # (l,) when its items are shown
    end_ms = at_ms[first + looks - 1] + _MINUTE_MS

    shown, best, fit = _shown(shop, who, want, s, first, rng)
    item = shown[np.arange(len(s)), best]  # (l,)
    forced = np.zeros(len(s), np.bool_)
    forced[first] = who.restock >= 0
    viewed = forced | who.bot[s] | (rng.random(len(s)) < _sigmoid(2.5 * fit - 1.0))
    clicked = viewed & (rng.random(len(s)) < _CLICKS)
    appeal = 3.0 * fit + 0.5 * shop.quality[item] - 4.0
    carted = viewed & ~who.bot[s] & (forced | (rng.random(len(s)) < _sigmoid(appeal)))
    removed = carted & ~forced & (rng.random(len(s)) < _REMOVES)
    buys = (who.restock >= 0) | (rng.random(m) < _CHECKS_OUT)
    bought = np.flatnonzero(carted & ~removed & buys[s])

    make = _Maker(who.user, first_session, searched)
    c = shown.shape[1]
    parts = [
        make("search", np.flatnonzero(searched), who.t_ms[searched], topic=want[searched],
             seed=_seeds(rng, int(searched.sum()))),
        make("impression", np.repeat(s, c), (at_ms[:, None] + np.arange(c)).ravel(),
             item=shown.ravel()),
        make("click", s[clicked], at_ms[clicked] + 1_000, item=item[clicked]),
        make("view", s[viewed], at_ms[viewed] + 1_400, item=item[viewed]),
        make("add_to_cart", s[carted], at_ms[carted] + 2_400, item=item[carted]),
        make("remove_from_cart", s[removed], at_ms[removed] + 3_900, item=item[removed]),
    ]  # fmt: skip
    paid_ms = end_ms[s[bought]] + _running(np.ones(len(bought), np.int64), *_groups(s[bought]))
    several = shop.consumable[item[bought]] * rng.poisson(0.6, len(bought))
    parts.append(make("purchase", s[bought], paid_ms, item=item[bought], quantity=1 + several))
    felt = 1.2 * fit[bought] - 1.3 + 1.1 * shop.quality[item[bought]]
    felt = felt + rng.normal(0.0, 0.5, len(bought))
    parts += _said_later(make, s[bought], item[bought], felt, paid_ms, shop.spec.labelled, rng)

    times = np.bincount(s[bought], minlength=m)
    total = np.bincount(s[bought], felt, minlength=m)
    used_up = np.full(m, -1)
    eaten = bought[shop.consumable[item[bought]]]
    used_up[s[eaten]] = item[eaten]
    return _Outcome(
        rows=np.concatenate(parts),
        topic=np.where(who.bot, -1, want),
        end_ms=end_ms + times + _MINUTE_MS,
        pleasure=np.where(times > 0, total / np.maximum(times, 1), np.nan),
        used_up=used_up,
    )


def _shown(
    shop: Shop, who: _Visitors, want: Ints, s: Ints, first: Ints, rng: np.random.Generator
) -> tuple[Ints, Ints, Floats]:
    """(l, c) items shown at each look, (l,) which of them is looked at, (l,) how well that one
    fits, from 0 to 1. What is to be bought again is shown first."""
    c = shop.spec.shown
    of_wanted = (rng.random((len(s), c)) < _OF_WANTED) & ~who.bot[s][:, None]
    topic = np.where(of_wanted, want[s][:, None], rng.integers(0, K, (len(s), c)))
    shown = shop.draw(topic, rng)
    most = who.interest.max(axis=1)
    fit = who.interest[s[:, None], topic] / most[s][:, None]
    drawn_to = 3.0 * fit + 0.5 * shop.quality[shown] + rng.gumbel(0.0, 1.0, shown.shape)
    best: Ints = drawn_to.argmax(axis=1)
    again = np.flatnonzero(who.restock >= 0)
    shown[first[again], 0], best[first[again]] = who.restock[again], 0
    known = shop.topic[who.restock[again]]
    fit[first[again], 0] = who.interest[again, known] / most[again]
    return shown, best, fit[np.arange(len(s)), best].astype(np.float64)


def _said_later(
    make: _Maker, s: Ints, item: Ints, felt: Floats, paid_ms: Ints, labelled: float,
    rng: np.random.Generator,
) -> list[Rows]:  # fmt: skip
    """Reviews and messages of purchases; whoever is disappointed complains."""
    rating = np.clip(np.round(3.4 + 1.1 * felt), 1, 5).astype(np.int64)
    label = np.where(rating <= 2, 0, np.where(rating == 3, 1, 2))
    days = np.exp(rng.normal(1.1, 0.6, (2, len(s))))  # three, at the median
    reviewed = rng.random(len(s)) < _REVIEWS
    wrote = rng.random(len(s)) < np.where(rating <= 2, _COMPLAINS, _WRITES)
    told = rng.random(len(s)) < labelled
    said_ms = paid_ms + (days * DAY_MS).astype(np.int64)
    review = make(
        "review", s[reviewed], said_ms[0][reviewed], item=item[reviewed],
        rating=rating[reviewed], label=label[reviewed], seed=_seeds(rng, int(reviewed.sum())),
    )  # fmt: skip
    message = make(
        "message", s[wrote], said_ms[1][wrote], item=item[wrote], told=told[wrote],
        label=label[wrote], seed=_seeds(rng, int(wrote.sum())),
    )  # fmt: skip
    for rows in (review, message):
        rows["session"] = -1
    return [review, message]


class _Maker:
    """Makes rows of events of given visits."""

    def __init__(self, user: Ints, first_session: int, searched: Bools) -> None:
        self._user, self._first, self._searched = user, first_session, searched

    def __call__(self, type_: str, visit: Ints, ts: Ints, **columns: Any) -> Rows:
        """Rows of one type; visit, ts and columns: (n,)."""
        rows = np.zeros(len(visit), ROW)
        rows["item"], rows["label"] = -1, -1
        rows["type"] = TYPE_CODE[type_]
        rows["ts"], rows["user"] = ts, self._user[visit]
        rows["session"], rows["searched"] = self._first + visit, self._searched[visit]
        for name, column in columns.items():
            rows[name] = column
        return rows


def _choose(shares: Interests, rng: np.random.Generator) -> Ints:
    """(m,) a topic for each row of (m, K) shares."""
    up_to = np.cumsum(shares, axis=1)
    at = rng.random((len(shares), 1)) * up_to[:, -1:]
    chosen: Ints = (up_to < at).sum(axis=1)
    return np.minimum(chosen, K - 1)


def _running(steps: Ints, first: Ints, sizes: Ints) -> Ints:
    """(n,) the sum of the steps so far, within each of the consecutive groups."""
    total = np.cumsum(steps)
    before = total[first] - steps[first] if len(first) else total[:0]
    out: Ints = total - np.repeat(before, sizes)
    return out


def _groups(sorted_: Ints) -> tuple[Ints, Ints]:
    """Where each run of equal values starts, and its size."""
    first: Ints = np.flatnonzero(np.diff(sorted_, prepend=-1))
    return first, np.diff(np.append(first, len(sorted_)))


def _seeds(rng: np.random.Generator, n: int) -> Ints:
    return rng.integers(0, 1 << 30, n)


def _sigmoid(x: Floats) -> Floats:
    out: Floats = 1.0 / (1.0 + np.exp(-x))
    return out
