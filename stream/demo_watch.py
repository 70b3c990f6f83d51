"""What the demo knows of the running parts: the worker's own metrics, the profiles in Redis,
and which shoppers are worth looking at now.

It reads and never draws. Quantiles, rates and the choice of shoppers are PURE: samples and
readings of the clock in, values out.
"""

from __future__ import annotations

import bisect
import math
import threading
import urllib.error
import urllib.request
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Final

from prometheus_client.parser import text_string_to_metric_families

from profiles import Profile, ProfileReader
from profiles.errors import SpaceMismatch
from profiles.schema import EVENT_TYPES

from .events import Event
from .live_view import UNKNOWN, Act, Figures, Near, Shopper

_HTTP_TIMEOUT_S: Final = 2.0
_ROWS: Final = 8  # as many as a panel ever shows
_RATE_WINDOW_S: Final = 10.0
# A shopper stays on the screen this long at least, and until so long idle.
_HOLD_S: Final = 6.0
_IDLE_S: Final = 6.0
# Who may take the place of an idle shopper: somebody who acts now.
_ACTIVE_S: Final = 2.0
_JUST_S: Final = 1.5
# A shopper who comes back after half an hour of event time pays another visit.
_VISIT_GAP_MS: Final = 30 * 60 * 1000


# --- the worker's metrics ------------------------------------------------------------------


@dataclass(frozen=True)
class Sample:
    """The worker's metrics at one moment; counts since the worker started."""

    at_s: float
    applied: int
    """Events that changed a profile."""
    settled: int
    """Events that were applied, or found to be repeats, or rejected."""
    lag_records: int
    saves: int
    hits: int
    misses: int
    items: int
    batches_begun: int
    swaps: int
    """Releases that the worker went over to."""
    flip_s: float
    """Time that it took for that, in all, between two micro-batches."""
    migrated: int
    """Profiles moved to another embedding space."""
    freshness: tuple[tuple[float, int], ...]
    """(upper bound in seconds, observations up to it), the last bound infinite."""

    @property
    def batches_done(self) -> int:
        return self.freshness[-1][1] if self.freshness else 0


def answer(url: str) -> tuple[int, str]:
    """HTTP status and body; (0, "") where nothing answers."""
    try:
        with urllib.request.urlopen(url, timeout=_HTTP_TIMEOUT_S) as response:
            return response.status, response.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()
    except OSError:
        return 0, ""


def parse_sample(text: str, at_s: float) -> Sample:
    """Prometheus' text format -> a Sample."""
    values: dict[str, float] = {}
    buckets: list[tuple[float, int]] = []
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            if sample.name == "penchant_freshness_seconds_bucket":
                buckets.append((float(sample.labels["le"]), int(sample.value)))
            else:
                values[sample.name] = values.get(sample.name, 0.0) + sample.value

    def count(name: str) -> int:
        return int(values.get(f"penchant_{name}", 0))

    applied = count("events_applied_total")
    return Sample(
        at_s=at_s,
        applied=applied,
        settled=applied + count("events_repeated_total") + count("events_rejected_total"),
        lag_records=count("lag_records"),
        saves=count("profile_saves_total"),
        hits=count("item_cache_hits_total"),
        misses=count("item_cache_misses_total"),
        items=count("items_stored_total"),
        batches_begun=count("batch_records_count"),
        swaps=count("releases_swapped_total"),
        flip_s=values.get("penchant_release_flip_seconds_sum", 0.0),
        migrated=count("profiles_migrated_total"),
        freshness=tuple(sorted(buckets)),
    )


class Meter:
    """The worker's figures since a first sample; rates and freshness over the last seconds."""

    def __init__(self, first: Sample) -> None:
        self.first = first
        self._recent: deque[Sample] = deque([first])

    @property
    def latest(self) -> Sample:
        return self._recent[-1]

    def add(self, sample: Sample) -> None:
        """Samples come in order of time."""
        self._recent.append(sample)
        while len(self._recent) > 2 and sample.at_s - self._recent[0].at_s > _RATE_WINDOW_S:
            self._recent.popleft()

    def now(self) -> Figures:
        """Over the last ten seconds, or fewer while there are no more."""
        return figures(self.first, self._recent[0], self.latest)

    def whole(self) -> Figures:
        """Over all the time since the first sample."""
        return figures(self.first, self.first, self.latest)


def figures(first: Sample, since: Sample, now: Sample) -> Figures:
    """Counts since `first`; rates and quantiles between `since` and `now`."""
    passed_s = now.at_s - since.at_s
    looked_up = now.hits + now.misses - first.hits - first.misses
    observed = [
        (bound, count - before)
        for (bound, count), (_, before) in zip(now.freshness, since.freshness, strict=True)
    ]
    return Figures(
        events=now.applied - first.applied,
        events_per_s=(now.applied - since.applied) / passed_s if passed_s > 0 else None,
        lag_records=now.lag_records,
        freshness_p50_s=quantile_bound(observed, 0.5),
        freshness_p99_s=quantile_bound(observed, 0.99),
        cache_hits=(now.hits - first.hits) / looked_up if looked_up else None,
        saves_per_s=(now.saves - since.saves) / passed_s if passed_s > 0 else None,
    )


def quantile_bound(buckets: Sequence[tuple[float, int]], q: float) -> float | None:
    """The smallest bound that at least the share `q` of the observations lie within.

    buckets: (bound, observations up to it), bounds ascending. None without observations.
    """
    if not buckets or not buckets[-1][1]:
        return None
    wanted = math.ceil(q * buckets[-1][1])
    return buckets[bisect.bisect_left(buckets, wanted, key=lambda bucket: bucket[1])][0]


# --- who is worth looking at ---------------------------------------------------------------


@dataclass(frozen=True)
class Activity:
    """What a shopper did so far, as the replay sent it."""

    last_s: float
    """By the clock, not in event time."""
    last_ms: int
    """Event time."""
    visits: int = 1


class Crowd:
    """Everybody who has acted; noted by the replay's thread, read by the demo's."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._activity: dict[str, Activity] = {}
        self._sent = 0
        self._at_ms: int | None = None

    def note(self, event: Event, now_s: float) -> None:
        """One event was sent."""
        with self._lock:
            before = self._activity.get(event.user_id)
            self._activity[event.user_id] = noted(before, event.ts, now_s)
            self._sent += 1
            self._at_ms = event.ts

    def look(self) -> tuple[dict[str, Activity], int, int | None]:
        """Activity by shopper, events sent, event time of the latest."""
        with self._lock:
            return dict(self._activity), self._sent, self._at_ms


def noted(before: Activity | None, ts_ms: int, now_s: float) -> Activity:
    """A shopper's activity with one more event."""
    if before is None:
        return Activity(now_s, ts_ms)
    came_back = ts_ms - before.last_ms > _VISIT_GAP_MS
    return Activity(now_s, ts_ms, before.visits + came_back)


@dataclass(frozen=True)
class Slot:
    """A place on the screen."""

    user_id: str
    since_s: float


def next_slots(
    slots: Sequence[Slot], activity: Mapping[str, Activity], now_s: float, count: int
) -> list[Slot]:
    """Who is shown now, given who was. Free places are filled; of the others at most one
    changes at a time, and only where its shopper was readable long enough and went idle.

    Who has come back most often goes first: those profiles change before the viewer's eyes.
    """
    kept = list(slots[:count])
    shown = {slot.user_id for slot in kept}
    waiting = sorted(
        (
            (who.visits, who.last_s, user_id)
            for user_id, who in activity.items()
            if user_id not in shown and now_s - who.last_s <= _ACTIVE_S
        ),
        reverse=True,
    )
    free = count - len(kept)
    kept += [Slot(user_id, now_s) for _, _, user_id in waiting[:free]]
    if len(waiting) > free:
        place = _idlest(kept, activity, now_s)
        if place is not None:
            kept[place] = Slot(waiting[free][2], now_s)
    return kept


def _idlest(slots: Sequence[Slot], activity: Mapping[str, Activity], now_s: float) -> int | None:
    idle = [
        (activity[slot.user_id].last_s, place)
        for place, slot in enumerate(slots)
        if now_s - slot.since_s >= _HOLD_S and now_s - activity[slot.user_id].last_s >= _IDLE_S
    ]
    return min(idle)[1] if idle else None


# --- their profiles ------------------------------------------------------------------------


@dataclass
class Gallery:
    """Shoppers as Redis has them; what did not change is not read again."""

    reader: ProfileReader
    _known: dict[str, tuple[Shopper, float]] = field(default_factory=dict)
    """With the reading of the clock when a change was seen."""

    def read(self, user_ids: Sequence[str], now_s: float) -> tuple[Shopper, ...]:
        """Those of them that have a profile. Raises RedisUnavailable."""
        profiles = self.reader.get_many(user_ids)
        self._known = {u: known for u, known in self._known.items() if u in profiles}
        for user_id, profile in profiles.items():
            known = self._known.get(user_id)
            if known is None or known[0].events != profile.events:
                shopper = shown(self.reader, profile, known[0] if known else None)
                self._known[user_id] = shopper, now_s
        return tuple(
            replace(shopper, just_acted=now_s - changed_s < _JUST_S)
            for shopper, changed_s in (self._known[u] for u in user_ids if u in profiles)
        )


def shown(reader: ProfileReader, profile: Profile, before: Shopper | None) -> Shopper:
    """A profile in words. Raises RedisUnavailable."""
    records = reader.items(profile)
    acts = []
    for entry in profile.window[::-1][:_ROWS]:
        record = records.get(int(entry["item"]))
        title = (record.title or record.item_id) if record else UNKNOWN
        acts.append(Act(EVENT_TYPES[entry["type"]], title, float(entry["weight"])))
    top = reader.top_categories(profile, _ROWS)
    return Shopper(
        user_id=profile.user_id,
        events=profile.events,
        updated_ms=profile.updated_ms,
        acts=tuple(acts),
        categories=tuple((name, weight) for name, weight in top if weight > 0),
        nearest=_nearest(reader, profile, {r.item_id for r in records.values()}, before),
    )


def _nearest(
    reader: ProfileReader, profile: Profile, seen: set[str], before: Shopper | None
) -> tuple[Near, ...]:
    """What the shopper has just had lies nearest of all; what comes after it is worth showing."""
    try:
        items = reader.nearest_items(profile.user_id, k=len(seen) + _ROWS)
    except SpaceMismatch:  # no item has a vector yet
        return ()
    unseen = [item for item in items if item.item_id not in seen][:_ROWS]
    titles_before = {near.title for near in before.nearest} if before else None
    return tuple(
        Near(
            item.title or item.item_id,
            item.cosine,
            titles_before is not None and item.title not in titles_before,
        )
        for item in unseen
    )
