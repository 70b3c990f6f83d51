"""Labelled windows -> fitted heads, and the windows that they are judged on.

A label comes as late as its horizon, so the newest windows have none: of each head the newest of
those that have one are kept from half of the shoppers, who judge it (`training_rows.stopping`).
Knows neither vectors nor encoders.
"""

from __future__ import annotations

from typing import Final

import numpy as np
import numpy.typing as npt
import torch

from . import training_rows as tr
from .heads import HEADS, Heads
from .objective import UNKNOWN
from .training_data import sample
from .visits import visit_features
from .windows import Labelled

Floats = npt.NDArray[np.float32]
Ints = npt.NDArray[np.int64]

_DAY_MS: Final = 86_400_000.0
_HALF_LIFE_MS: Final = 60 * _DAY_MS  # of a label's weight: shops have seasons
_MOST: Final = 50_000  # windows that heads learn from
_CHUNK: Final = 4_096


def fit_heads(windows: Labelled, kinds: int, events: int, newest: float, seed: int) -> Heads:
    """`kinds`: number of event types; `events`: of a window; `newest`: the share of labels that is
    kept from those who judge."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        heads = Heads(kinds)
    known = {name: _known(windows, name) for name in HEADS}
    stops = tr.stopping(windows)[tr.owners(windows)]
    learned = {}
    for k, name in enumerate(HEADS):
        since_ms = _since_ms(windows.t_ms[known[name]], newest)
        heads.since_ms[k] = since_ms
        learned[name] = known[name] & (stops | (windows.t_ms < since_ms))
    ends = sample(np.flatnonzero(np.any(list(learned.values()), axis=0)), _MOST, seed)
    if not len(ends):
        return heads
    labels = {
        name: np.where(learned[name][ends], getattr(windows, name)[ends], UNKNOWN) for name in HEADS
    }
    t_ms = windows.t_ms[ends]
    weight = np.exp2((t_ms - t_ms.max()) / _HALF_LIFE_MS).astype(np.float32)
    features = [
        visit_features(*window_times(windows, part, events), events, kinds)
        for part in np.array_split(ends, len(ends) // _CHUNK + 1)
    ]
    heads.fit(np.concatenate(features), labels, weight)
    return heads.eval()


def judged(windows: Labelled, heads: Heads, name: str, most: int, seed: int) -> Ints:
    """Ends (k,) of at most so many labelled windows that head `name` has not learned from."""
    since_ms = int(heads.since_ms[heads.names.index(name)])
    judging = ~tr.stopping(windows)[tr.owners(windows)]
    held = _known(windows, name) & judging & (windows.t_ms >= since_ms)
    return sample(np.flatnonzero(held), most, seed)


def chances(windows: Labelled, heads: Heads, ends: Ints, events: int) -> dict[str, Floats]:
    """(k,) what each head says after the windows that end with events `ends` (k,)."""
    return heads.read(*window_times(windows, ends, events), events)


def window_times(
    windows: Labelled, ends: Ints, events: int
) -> tuple[npt.NDArray[np.uint8], Ints, Ints]:
    """Types and times (k, L) and lengths (k,) of the windows that end with events `ends` (k,)."""
    first, length = tr.windows_ending_at(windows, ends, events)
    at = np.arange(int(length.max(initial=1)))
    event = np.minimum(first[:, None] + at, ends[:, None])  # (k, L)
    return windows.type[event], windows.t_ms[event], length


def _known(windows: Labelled, name: str) -> tr.Bools:
    """Events (m,) after which a shopper would be asked, and whose label is known."""
    return np.asarray(tr.asked_at(windows) & (getattr(windows, name) >= 0))


def _since_ms(t_ms: Ints, newest: float) -> int:
    if not len(t_ms):
        return 0
    return int(np.quantile(t_ms, 1 - newest)) if newest else int(t_ms.max()) + 1
