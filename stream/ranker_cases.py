"""Labelled windows -> cases for the ranker, with the signals that a reader would have had.

No I/O. Shoppers' histories are told in event time, in blocks: tallies of neighbours grow as the
stream grows them, and a case knows what happened before its block. It uses the definitions that
readers use (`profiles/ranking.py`), and the next interest is made of the window that a profile
would have had, as a worker makes it, so that what is trained is what is served.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from model import training_rows as tr
from model.foreteller import Foreteller
from model.ranker import ITEM, Cases
from model.training_data import decayed_interests
from model.windows import Labelled
from profiles import neighbours, ranking
from profiles.arithmetic import Floats, Ints, own_of
from profiles.neighbours import Neighbours, Pairs, Tallies, TallyLayout
from profiles.schema import NEAR_ENTRY, PAIR_ENTRY, WINDOW_ENTRY

from .window_rows import window_rows

_BLOCKS: Final = 40
_PAIRS_AT_ONCE: Final = 100_000  # events
_FORETOLD_AT_ONCE: Final = 256  # windows
# Scores of a case take 16 bytes an item: at most 400 MB.
_NUMBERS: Final = 25_000_000


@dataclass(frozen=True)
class Timed:
    """Cases in event time."""

    cases: Cases
    user: Ints  # (n,) of each case
    t_ms: Ints  # (n,)
    end: Ints  # (n,) the event that each comes after

    def take(self, rows: Ints) -> Timed:
        """The cases of these rows."""
        c = self.cases
        parts = (c.signals, c.items, c.shopper, c.target, c.log_chance)
        cases = Cases(*(part[rows] for part in parts))
        return Timed(cases, self.user[rows], self.t_ms[rows], self.end[rows])


def make_cases(
    windows: Labelled,
    vectors: Floats,
    half_lives_s: tuple[float, ...],
    *,
    cut_ms: int,
    window: int = 50,
    own_items: int = 64,
    foreteller: Foreteller | None = None,
    most: int = 3_000,
    seed: int = 0,
) -> Timed:
    """Rankings of the whole catalogue after windows whose target came at `cut_ms` or later.

    vectors: (C, D) unit rows of the catalogue; half_lives_s: of a profile's time scales, the
    longest also of neighbours; window, own_items: how many entries a profile keeps; foreteller:
    what makes the signal `next_interest`, which stays 0 without, and must not have learned from
    what came since `cut_ms`; most: cases, drawn with `seed`; fewer where C is large.
    """
    targets = tr.find_targets(windows)
    ends = np.flatnonzero(tr.asked_at(windows) & targets.since(cut_ms))
    count = min(most, _NUMBERS // max(4 * len(vectors), 1))
    if len(ends) > count:
        ends = np.random.default_rng(seed).choice(ends, count, replace=False)
    ends = ends[np.argsort(windows.t_ms[ends], kind="stable")]
    counted = _Counted(windows, len(vectors), TallyLayout(half_life_s=half_lives_s[-1]))
    owner = tr.owners(windows)
    n, size = len(ends), len(vectors)
    signals = np.zeros((n, size, len(ranking.SIGNALS)), dtype=np.float32)
    known = np.zeros((n, size, len(ITEM)), dtype=np.float32)
    target = np.zeros((n, size), dtype=np.float32)
    shopper = np.zeros((n, 3), dtype=np.float32)
    for block in np.array_split(np.arange(n), min(_BLOCKS, max(n, 1))):
        if not len(block):
            continue
        counted.tell(int(windows.t_ms[ends[block[0]]]))
        counts, recent = counted.counts()  # (C,), (C,)
        for row in block.tolist():
            end = int(ends[row])
            first = int(windows.start[owner[end]])
            entries = _entries(windows, first, end)
            seen = entries[-window:]
            now_ms = int(windows.t_ms[end])
            tally = own_of(entries, now_ms, half_lives_s, own_items)
            own = ranking.own_items(tally, seen, now_ms, half_lives_s)
            near = ranking.nearby(seen, counted.near(seen))
            pulled = np.array(list(near), dtype=np.int64) - 1
            for item, weight in zip(pulled.tolist(), near.values(), strict=True):
                signals[row, item, 2] = ranking.covisitation(weight, float(counts[item]))
            for key, mass in own.items():
                signals[row, key - 1, 3] = mass
            days = np.zeros(size)
            asked_ms = int(targets.t_ms[targets.first[end]])  # when the shopper is back
            for key, age in ranking.own_days(seen, asked_ms).items():
                days[key - 1] = age
            known[row] = np.log1p(np.stack([counts, recent, days], axis=-1))
            target[row, targets.item[targets.first[end] : targets.stop[end]]] = 1.0
            shopper[row] = ranking.shopper_features(seen, end - first + 1)
    _set_cosines(signals, windows, ends, vectors, half_lives_s, window, foreteller)
    cases = Cases(signals, known, shopper, target, np.zeros((n, size), dtype=np.float32))
    return Timed(cases, owner[ends], windows.t_ms[ends], ends)


def of_release(
    timed: Timed,
    windows: Labelled,
    vectors: Floats,
    half_lives_s: tuple[float, ...],
    *,
    window: int = 50,
    foreteller: Foreteller | None = None,
) -> Timed:
    """The same cases with the cosines of another release; arguments as of `make_cases`."""
    signals = timed.cases.signals.copy()
    _set_cosines(signals, windows, timed.end, vectors, half_lives_s, window, foreteller)
    return replace(timed, cases=replace(timed.cases, signals=signals))


def _set_cosines(
    signals: Floats,
    windows: Labelled,
    ends: Ints,
    vectors: Floats,
    half_lives_s: tuple[float, ...],
    window: int,
    foreteller: Foreteller | None,
) -> None:
    """The signals (n, C, 4) that depend on a release, after events `ends` (n,)."""
    for row, end in enumerate(ends.tolist()):
        interest = decayed_interests(windows, end, vectors, half_lives_s).mean(axis=0)
        signals[row, :, 1] = vectors @ interest  # the mean cosine to all time scales
    signals[:, :, 0] = 0.0
    if foreteller is not None:
        first = windows.start[tr.owners(windows)[ends]].tolist()
        seen = [_entries(windows, *at)[-window:] for at in zip(first, ends.tolist(), strict=True)]
        signals[:, :, 0] = _next_interests(foreteller, seen, vectors) @ vectors.T


def _entries(windows: Labelled, first: int, end: int) -> NDArray[Any]:
    """Events to `end` with a weight as a profile's window has them; the key of item i is i + 1."""
    at = np.arange(first, end + 1)
    at = at[windows.weight[at] != 0]
    out = np.zeros(len(at), WINDOW_ENTRY)
    out["t_ms"], out["item"] = windows.t_ms[at], windows.item[at] + 1
    out["weight"], out["type"] = windows.weight[at], windows.type[at]
    return out


def _next_interests(foreteller: Foreteller, windows: list[NDArray[Any]], vectors: Floats) -> Floats:
    """(n, D); zeros where a window holds nothing."""
    out = np.zeros((len(windows), vectors.shape[1]), np.float32)
    at = [i for i, window in enumerate(windows) if len(window)]
    for begin in range(0, len(at), _FORETOLD_AT_ONCE):
        part = at[begin : begin + _FORETOLD_AT_ONCE]
        rows = window_rows([windows[i] for i in part], foreteller.events, partial(_known, vectors))
        out[part] = foreteller(*rows).next_interest
    return out


def _known(vectors: Floats, keys: list[int]) -> Floats:
    """(u, D) by key."""
    return vectors[np.array(keys, np.int64) - 1]


class _Counted:
    """The tallies of a catalogue, as far as history was told."""

    def __init__(self, windows: Labelled, items: int, layout: TallyLayout) -> None:
        self._layout = layout
        self._windows = windows
        self._order = np.argsort(windows.t_ms, kind="stable")
        self._times = windows.t_ms[self._order]
        self._told = 0
        nothing: list[bytes | None] = [None] * items
        self._tallies: Tallies = neighbours.unpack(nothing, nothing, nothing, layout)
        weighty = np.flatnonzero(windows.weight != 0)
        self._place = np.full(len(windows), -1)  # among the weighty events
        self._place[weighty] = np.arange(len(weighty))
        self._weighty = weighty
        self._owner = tr.owners(windows)

    def tell(self, t_ms: int) -> None:
        """Everything that happened before `t_ms`."""
        until = int(np.searchsorted(self._times, t_ms))
        for begin in range(self._told, until, _PAIRS_AT_ONCE):
            for entries in self._pairs(self._order[begin : min(begin + _PAIRS_AT_ONCE, until)]):
                # One origin, every call a later offset: nothing here comes twice.
                entries["offset"] = begin
                origin = np.zeros(len(entries), np.uint64)
                pairs = Pairs(entries, origin, np.zeros(len(entries), np.int64))
                rows = entries["item"].astype(np.int64) - 1
                neighbours.fold(self._tallies, rows, pairs, self._layout)
        self._told = max(self._told, until)

    def counts(self) -> tuple[Floats, Floats]:
        """(C,) decayed events of each item, and those of late."""
        header = self._tallies.header
        age_ms = header["updated_ms"].max() - header["updated_ms"]
        left = np.exp2(-age_ms / (1000.0 * self._layout.half_life_s))
        counts, recent = header["count"] * left, header["recent"] * left**neighbours.RECENT
        return counts.astype(np.float32), recent.astype(np.float32)

    def near(self, seen: NDArray[Any]) -> dict[int, Neighbours]:
        """Neighbours of a window's latest items, by item key."""
        header = self._tallies.header
        latest = np.unique(ranking.liked(seen)["item"][-ranking.DEPTH :]).tolist()
        found = {}
        for key in latest:
            entries = np.frombuffer(self._tallies.near[key - 1], NEAR_ENTRY)
            found[key] = Neighbours(
                int(header["updated_ms"][key - 1]),
                self._layout.half_life_s,
                float(header["count"][key - 1]),
                dict(zip(entries["item"].tolist(), entries["weight"].tolist(), strict=True)),
            )
        return found

    def _pairs(self, told: Ints) -> Iterator[NDArray[Any]]:
        """PAIR_ENTRY of these events with the entries before them, see `neighbours.arisen`."""
        w = self._windows
        later = told[(w.item[told] >= 0) & (w.weight[told] > 0)]
        parts = [_pair(w, later, None, 1.0)]
        for d in range(1, neighbours.DISTANCE + 1):
            back = self._place[later] - d
            reached = back >= 0
            earlier = self._weighty[back[reached]]
            mine = later[reached]
            good = self._owner[earlier] == self._owner[mine]
            good &= (w.item[earlier] >= 0) & (w.weight[earlier] > 0)
            mine, earlier = mine[good], earlier[good]
            parts.append(_pair(w, mine, earlier, 1 / d, forward=True))
            parts.append(_pair(w, mine, earlier, neighbours.BACKWARD / d))
        entries = np.concatenate(parts)
        if len(entries):
            yield entries


def _pair(
    w: Labelled, event: Ints, earlier: Ints | None, weight: float, *, forward: bool = False
) -> NDArray[Any]:
    out = np.zeros(len(event), PAIR_ENTRY)
    out["t_ms"], out["weight"] = w.t_ms[event], weight
    mine = w.item[event] + 1
    other = np.zeros(len(event), np.int64) if earlier is None else w.item[earlier] + 1
    out["item"], out["neighbour"] = (other, mine) if forward else (mine, other)
    return out
