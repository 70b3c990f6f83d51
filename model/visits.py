"""Windows of events -> when a shopper came: what the heads read, in training and in serving.

PURE. Recency and frequency say who comes back (Fader, Hardie and Lee 2005, "Counting your customers
the easy way"); of one event type alone nothing else does. Knows event times and types, no clock:
all is as of the last event of a window. Does not know what is foretold from it.
"""

from __future__ import annotations

from typing import Any, Final

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float32]
Doubles = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]

_DAY_MS: Final = 86_400_000.0
_APART: Final = 0.25  # days without an event after which another visit begins

FEATURES: Final = (
    "last gap", "has a gap", "gap before", "has a gap before", "median gap", "spread of gaps",
    "last gap to median", "visits", "span", "mean gap", "events", "window is full",
    "events of a day", "events of a week", "events of a month", "length of visit",
    "events of visit",
)  # fmt: skip
"""Days and counts as log(1 + x); after them stands the share of each event type."""


def visit_features(
    types: npt.NDArray[Any], t_ms: Ints, lengths: Ints, most: int, kinds: int
) -> Floats:
    """(n, len(FEATURES) + kinds) of n windows: `types` and `t_ms` (n, L), oldest first, of which
    `lengths` (n,) are real, each at least 1. `most`: events of a window that is full; `kinds`:
    number of event types."""
    at = np.arange(t_ms.shape[1])
    real = at < lengths[:, None]  # (n, L)
    last = lengths[:, None] - 1
    now = np.take_along_axis(t_ms, last, axis=1)
    age = np.where(real, (now - t_ms) / _DAY_MS, np.inf)  # (n, L) days before the last event
    gap = np.zeros(t_ms.shape)
    gap[:, 1:] = np.diff(t_ms, axis=1) / _DAY_MS
    comes = real & (gap > _APART)  # the first event of a visit after another
    gaps = comes.sum(axis=1)
    begin = np.where(comes, at, 0).max(axis=1)  # of the latest visit
    one, two = gaps > 0, gaps > 1
    latest = _at(gap, begin) * one
    earlier = comes & (at < begin[:, None])
    before = _at(gap, np.where(earlier, at, 0).max(axis=1)) * two
    middle = _median(np.where(comes, gap, np.inf), gaps)
    span = _at(age, np.zeros_like(begin))
    columns = (
        np.log1p(latest), one, np.log1p(before), two, np.log1p(middle), _spread(gap, comes),
        np.log1p(latest) - np.log1p(middle), np.log1p(gaps), np.log1p(span),
        np.log1p(span / np.maximum(gaps, 1)) * one, np.log1p(lengths), lengths >= most,
        *(np.log1p((age <= days).sum(axis=1)) for days in (1, 7, 30)),
        np.log1p(_at(age, begin)), np.log1p(lengths - begin),
    )  # fmt: skip
    share = [((types == kind) & real).sum(axis=1) / lengths for kind in range(kinds)]
    return np.stack([*columns, *share], axis=1).astype(np.float32)


def _at(values: Doubles, place: Ints) -> Doubles:
    return np.take_along_axis(values, place[:, None], axis=1)[:, 0]


def _median(gaps: Doubles, count: Ints) -> Doubles:
    """(n,) of the `count` (n,) finite values of each row, 0 without any."""
    ordered = np.sort(gaps, axis=1)
    low, high = np.maximum(count - 1, 0) // 2, count // 2
    both = np.where(
        count > 0, _at(ordered, low) + _at(ordered, np.minimum(high, gaps.shape[1] - 1)), 0
    )
    return np.asarray(both / 2)


def _spread(gap: Doubles, comes: npt.NDArray[np.bool_]) -> Doubles:
    """(n,) standard deviation of log(1 + gap), 0 for fewer than two."""
    logs = np.log1p(gap * comes)
    count = np.maximum(comes.sum(axis=1), 1)
    mean = logs.sum(axis=1) / count
    square = (np.square(logs - mean[:, None]) * comes).sum(axis=1)
    return np.asarray(np.sqrt(square / count))
