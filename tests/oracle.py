"""What every profile must hold, computed the plain way: no batches, no arrays, no increments.

Per shopper, the events that count are collected in a list, and each field is then worked out
from that list by its definition, in double precision. It shares the names in
`profiles/schema.py` with the code under test, and nothing else.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from profiles import Profile
from profiles.schema import EVENT_TYPES, FLAG_TEXT, MAX_PENDING, TYPE_CODE

FORGET = "forget"


@dataclass(frozen=True)
class Event:
    """One record of the topic, with what the encoder and the weights made of it."""

    user_id: str
    source: int  # schema.source_key
    offset: int
    event_key: bytes | None  # first 8 bytes of SHA-256 of the event id; None without an id
    t_ms: int
    type: str  # one of EVENT_TYPES, or FORGET
    weight: float = 0.0
    item_key: int = 0  # schema.key64(item_id); 0 without an item
    category_key: int = 0
    vector: Sequence[float] | None = None  # None: no text is known for the item
    spend: float = 0.0
    foreign: bool = False  # a purchase in another currency
    text: bool = False  # the vector is of the event's own text


@dataclass(frozen=True)
class Rules:
    """The settings that a profile depends on."""

    half_lives_s: tuple[float, ...] = (1_800.0, 86_400.0, 2_592_000.0)
    window: int = 50
    seen: int = 64
    categories: int = 32
    own_items: int = 64


@dataclass
class Expected:
    """The fields of one profile. Sums and masses per time scale, decayed to `updated_ms`."""

    rules: Rules
    watermark: dict[int, int] = field(default_factory=dict)
    seen: list[bytes] = field(default_factory=list)
    events: int = 0
    counts: dict[str, int] = field(default_factory=dict)
    spend: float = 0.0
    foreign_purchases: int = 0
    first_ms: int = 0
    updated_ms: int = 0
    sums: list[list[float]] = field(default_factory=list)  # [] = all zero
    masses: list[float] = field(default_factory=list)
    window: list[tuple[int, int, float, int, int]] = field(default_factory=list)
    categories: dict[int, float] = field(default_factory=dict)  # all, without the bound
    own: dict[int, float] = field(default_factory=dict)  # all, without the bound
    own_mass: float = 0.0  # of all weights, decayed as own items are
    pending: int = 0
    pending_lost: int = 0


def fold(events: Iterable[Event], rules: Rules | None = None) -> dict[str, Expected]:
    """What the profile of each user must be after these events, which come in arrival order.
    Events given again, as after a crash, count once."""
    rules = rules or Rules()
    shoppers: dict[str, _Shopper] = {}
    for event in events:
        shoppers.setdefault(event.user_id, _Shopper(rules)).take(event)
    return {user_id: shopper.expected() for user_id, shopper in shoppers.items()}


class _Shopper:
    def __init__(self, rules: Rules) -> None:
        self.rules = rules
        self.next_offset: dict[int, int] = {}
        self.seen: list[bytes] = []
        self.counted: list[Event] = []

    def take(self, event: Event) -> None:
        if event.offset < self.next_offset.get(event.source, 0):
            return
        self.next_offset[event.source] = event.offset + 1
        if event.event_key is not None and event.event_key in self.seen:
            return
        if event.type == FORGET:
            self.seen, self.counted = [], []
        else:
            self.counted.append(event)
        if event.event_key is not None and self.rules.seen:
            self.seen = [*self.seen, event.event_key][-self.rules.seen :]

    def expected(self) -> Expected:
        out = Expected(self.rules, self.next_offset, self.seen)
        if not self.counted:
            return out
        weighty = [e for e in self.counted if e.weight != 0]
        known = [e for e in weighty if e.vector is not None]
        now_ms = max(e.t_ms for e in self.counted)
        out.events = len(self.counted)
        out.counts = {name: sum(e.type == name for e in self.counted) for name in EVENT_TYPES}
        out.spend = sum(e.spend for e in self.counted)
        out.foreign_purchases = sum(e.foreign for e in self.counted)
        out.first_ms, out.updated_ms = min(e.t_ms for e in self.counted), now_ms
        for half_life_s in self.rules.half_lives_s:
            share = [e.weight * _decay(now_ms - e.t_ms, half_life_s) for e in known]
            out.masses.append(sum(abs(s) for s in share))
            out.sums.append(_weighted_sum(share, [e.vector or () for e in known]))
        for e in known:
            if e.category_key:
                mass = e.weight * _decay(now_ms - e.t_ms, self.rules.half_lives_s[-1])
                out.categories[e.category_key] = out.categories.get(e.category_key, 0.0) + mass
        for e in weighty:
            mass = e.weight * _decay(now_ms - e.t_ms, 3 * self.rules.half_lives_s[-1])
            out.own_mass += abs(mass)
            if e.item_key:
                out.own[e.item_key] = out.own.get(e.item_key, 0.0) + mass
        entries = [
            (e.t_ms, e.item_key, e.weight, TYPE_CODE[e.type], FLAG_TEXT if e.text else 0)
            for e in weighty
        ]
        out.window = sorted(entries)[-self.rules.window :]
        waiting = len(weighty) - len(known)
        out.pending = min(waiting, MAX_PENDING)
        out.pending_lost = waiting - out.pending
        return out


def _decay(age_ms: int, half_life_s: float) -> float:
    return float(2.0 ** (-age_ms / (1000.0 * half_life_s)))


def _weighted_sum(shares: Sequence[float], vectors: Sequence[Sequence[float]]) -> list[float]:
    if not vectors:
        return []
    total = [0.0] * len(vectors[0])
    for share, vector in zip(shares, vectors, strict=True):
        for d, x in enumerate(vector):
            total[d] += share * float(x)
    return total


# What float32 leaves of a sum that has decayed away.
_NOTHING = 1e-30


def compare(profile: Profile, expected: Expected, rtol: float = 1e-4) -> list[str]:
    """Every field in which a stored profile differs from what it must be, in words.

    `rtol` is for sums, masses and categories, and relative to the mass behind them: events that
    cancel out leave the rounding of both.
    """
    differences: list[str] = []

    def exact(name: str, got: object, want: object) -> None:
        if got != want:
            differences.append(f"{name}: {got} instead of {want}")

    def near(name: str, got: float, want: float, scale: float) -> None:
        if not abs(got - want) <= rtol * scale + _NOTHING:
            differences.append(f"{name}: {got} instead of {want}")

    exact("events", profile.events, expected.events)
    exact("counts", _nonzero(profile.counts), _nonzero(expected.counts))
    exact("foreign_purchases", profile.foreign_purchases, expected.foreign_purchases)
    exact("first_ms", profile.first_ms, expected.first_ms)
    exact("updated_ms", profile.updated_ms, expected.updated_ms)
    exact("watermark", profile.watermark, expected.watermark)
    exact("seen", profile.seen.tobytes(), b"".join(expected.seen))
    exact("pending", profile.pending, expected.pending)
    exact("pending_lost", profile.pending_lost, expected.pending_lost)
    exact("half_lives_s", _rounded(profile.half_lives_s), _rounded(expected.rules.half_lives_s))
    near("spend", profile.spend, expected.spend, abs(expected.spend))
    masses = expected.masses or [0.0] * len(expected.rules.half_lives_s)
    sums = expected.sums or [[]]
    if (profile.space != "") != any(sums):
        differences.append(f"space: {profile.space!r} with {len(sums[0])} dimensions expected")
    for k, mass in enumerate(masses):
        near(f"masses[{k}]", float(profile.masses[k]), mass, mass)
        want = (sums[k] if any(sums) else None) or [0.0] * profile.dimensions
        exact(f"dimensions[{k}]", profile.dimensions, len(want))
        for d, (got, value) in enumerate(zip(profile.sums[k].tolist(), want, strict=False)):
            near(f"sums[{k}][{d}]", got, value, mass)
    differences += _compare_windows(profile, expected)
    differences += _compare_categories(profile, expected, rtol * masses[-1] + _NOTHING)
    differences += _compare_own(profile, expected, rtol * expected.own_mass + _NOTHING)
    return differences


def _compare_windows(profile: Profile, expected: Expected) -> list[str]:
    window = profile.window
    got = list(
        zip(
            window["t_ms"].tolist(),
            window["item"].tolist(),
            window["weight"].tolist(),
            window["type"].tolist(),
            window["flags"].tolist(),
            strict=True,
        )
    )
    if len(got) != len(expected.window):
        return [f"window: {len(got)} entries instead of {len(expected.window)}"]
    return [
        f"window[{i}]: {a} instead of {b}"
        for i, (a, b) in enumerate(zip(got, expected.window, strict=True))
        if (*a[:2], *a[3:]) != (*b[:2], *b[3:]) or abs(a[2] - b[2]) > 1e-6 * abs(b[2])
    ]


def _compare_categories(profile: Profile, expected: Expected, tolerance: float) -> list[str]:
    """Within the bound every category is there. Beyond it, which ones stay depends on how the
    events were cut into batches, and only the sum of all is certain."""
    got, want, limit = profile.categories, expected.categories, expected.rules.categories
    differences = []
    total = sum(got.values()) + profile.other_categories
    if abs(total - sum(want.values())) > tolerance:
        differences.append(f"categories: {total} in all instead of {sum(want.values())}")
    if len(got) > limit:
        differences.append(f"categories: {len(got)} kept, {limit} allowed")
    if len(want) <= limit:
        differences += [
            f"categories[{key:016x}]: {got.get(key, 0.0)} instead of {want.get(key, 0.0)}"
            for key in sorted(got.keys() | want.keys())
            if abs(got.get(key, 0.0) - want.get(key, 0.0)) > tolerance
        ]
    return differences


def _compare_own(profile: Profile, expected: Expected, tolerance: float) -> list[str]:
    """Within the bound every item is there. Beyond it, those that stay depend on how the events
    were cut into batches."""
    got, want, limit = profile.own, expected.own, expected.rules.own_items
    if len(got) != min(len(want), limit):
        return [f"own: {len(got)} items kept instead of {min(len(want), limit)}"]
    if len(want) > limit:
        return [f"own[{key:016x}]: never had" for key in sorted(got.keys() - want.keys())]
    return [
        f"own[{key:016x}]: {got.get(key, 0.0)} instead of {want.get(key, 0.0)}"
        for key in sorted(got.keys() | want.keys())
        if abs(got.get(key, 0.0) - want.get(key, 0.0)) > tolerance
    ]


def _nonzero(counts: Mapping[str, int]) -> dict[str, int]:
    return {name: n for name, n in counts.items() if n}


def _rounded(values: Iterable[float]) -> list[float]:
    """Half-lives are stored as float32."""
    return [float(f"{value:.6g}") for value in values]
