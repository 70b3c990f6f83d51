"""Labelled windows as a training step reads them, split in time, and what they are judged by.

Knows tensors and windows; knows no weights and no loop.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from . import training_rows as tr
from .errors import NothingToLearn
from .evaluate import metric, ranks
from .projection import unit_rows
from .window_encoder import WindowEncoder
from .windows import Labelled

Floats = npt.NDArray[np.float32]
Ints = npt.NDArray[np.int64]
Tensor = torch.Tensor

_JUDGED = 2000  # windows that the newest slice is judged on after each epoch
_STALE_DECAY = 0.8  # per event, in the profile of a release that has no window encoder


@dataclass(frozen=True)
class Batch:
    """r rows of L positions on the device; q positions are asked."""

    item: Tensor  # (r * L,) catalogue rows, 0 where there is none
    has_item: Tensor  # (r, L)
    types: Tensor  # (r, L)
    t_ms: Tensor  # (r, L)
    real: Tensor  # (r, L) bool
    asked: Tensor  # (r, L) bool
    target: Tensor  # (q,)
    weight: Tensor  # (q,) of the target's event


def window_inputs(
    windows: Labelled, ends: Ints, vectors: Floats, events: int
) -> tuple[Floats, npt.NDArray[np.uint8], Ints, Ints]:
    """What a window encoder reads of the windows that end with events `ends` (k,).

    Item vectors (k, L, D), types and times (k, L), lengths (k,); L is at most `events`.
    """
    first, length = tr.windows_ending_at(windows, ends, events)
    at = np.arange(int(length.max()) if len(length) else 0)
    event = np.minimum(first[:, None] + at, ends[:, None])  # (k, L)
    item = windows.item[event]
    inputs = vectors[np.maximum(item, 0)] * (item >= 0)[..., None]
    return inputs.astype(np.float32), windows.type[event], windows.t_ms[event], length


def next_interests(
    windows: Labelled, ends: Ints, vectors: Floats, window: WindowEncoder | None, events: int
) -> Floats:
    """Unit rows (k, D) after events `ends` (k,); without a window encoder (or with one for shorter
    windows) the decayed sum of what the window holds."""
    inputs, types, t_ms, length = window_inputs(windows, ends, vectors, events)
    if window is not None and window.shape.events >= inputs.shape[1]:
        return window.encode(inputs, types, t_ms, length)
    age = length[:, None] - 1 - np.arange(inputs.shape[1])  # (k, L)
    weight = np.where(age >= 0, _STALE_DECAY ** np.maximum(age, 0), 0.0)
    return unit_rows(np.einsum("kl,kld->kd", weight, inputs))


def decayed_interests(
    windows: Labelled, end: int, vectors: Floats, half_lives_s: Sequence[float]
) -> Floats:
    """Unit rows (K, D): a profile's interests after event `end`, one for each of K half-lives, of
    all the events that its user has in `windows` up to it."""
    first = int(windows.start[np.searchsorted(windows.start, end, side="right") - 1])
    at = np.arange(first, end + 1)
    at = at[(windows.weight[at] != 0) & (windows.item[at] >= 0)]
    age_s = (windows.t_ms[end] - windows.t_ms[at]) / 1000.0  # (m,)
    share = np.exp2(-age_s / np.asarray(half_lives_s)[:, None]) * windows.weight[at]  # (K, m)
    return unit_rows(share @ vectors[windows.item[at]])


class Data:
    """Windows with their targets, split in time."""

    def __init__(self, windows: Labelled, n_items: int, events: int, newest: float) -> None:
        """`events`: of a window; `newest`: the share of events that is kept apart."""
        if not len(windows.t_ms):
            raise NothingToLearn(
                "there are no windows to learn from: let the archive fill, "
                "or shorten the horizons that hold them back"
            )
        if int(windows.item.max()) >= n_items:
            raise ValueError(
                f"item: row {int(windows.item.max())} lies beyond the catalogue's {n_items} items"
            )
        self.windows = windows
        self.events = events
        self.targets = tr.find_targets(windows)
        latest = int(windows.t_ms.max()) + 1
        self.cut_ms = (
            min(int(np.quantile(windows.t_ms, 1 - newest)) + 1, latest) if newest else latest
        )
        self.useful = self.targets.before(self.cut_ms)
        if not self.useful.any():
            raise NothingToLearn(
                "no window has a next item yet, so there is nothing to learn: "
                "wait for shoppers to come back, or take a longer span of the archive"
            )
        known = (windows.item >= 0) & (windows.weight > 0) & (windows.t_ms < self.cut_ms)
        self.counts: Ints = np.bincount(windows.item[known], minlength=n_items).astype(np.int64)
        stops = tr.stopping(windows)[tr.owners(windows)]
        self._judgeable = np.flatnonzero(
            self.targets.since(self.cut_ms) & tr.asked_at(windows) & stops
        )

    @property
    def judged(self) -> int:
        """Windows of the newest slice that decide when to stop."""
        return len(self._judgeable)

    def batch(
        self, first: Ints, length: Ints, rng: np.random.Generator, device: torch.device
    ) -> Batch:
        at = np.arange(int(length.max()))  # (L,)
        real = at < length[:, None]  # (r, L)
        event = np.where(real, first[:, None] + at, first[:, None])  # (r, L)
        windows, targets = self.windows, self.targets
        item = windows.item[event]
        asked = real & self.useful[event]
        where = event[asked]  # (q,)
        spread = targets.stop[where] - targets.first[where]
        chosen = targets.first[where] + rng.integers(0, spread)  # (q,)

        def on(array: npt.NDArray[Any]) -> Tensor:
            return torch.from_numpy(array).to(device)

        return Batch(
            item=on(np.maximum(item, 0).astype(np.int64).ravel()),
            has_item=on((item >= 0) & real),
            types=on(windows.type[event].astype(np.int64)),
            t_ms=on(windows.t_ms[event]),
            real=on(real),
            asked=on(asked),
            target=on(targets.item[chosen].astype(np.int64)),
            weight=on(targets.weight[chosen].astype(np.float32)),
        )

    def judge(self, vectors: Floats, window: WindowEncoder | None, seed: int) -> dict[str, float]:
        """Ranking figures on the newest slice, over the full catalogue; zeros without one."""
        ends = sample(self._judgeable, _JUDGED, seed)
        names = ("recall@10", "recall@20", "ndcg@20", "mrr")
        if not len(ends):
            return dict.fromkeys(names, 0.0) | {"windows": 0.0}
        places = []
        for part in np.array_split(ends, max(len(ends) // 256, 1)):
            found = next_interests(self.windows, part, vectors, window, self.events)
            scores = found @ vectors.T  # (k, n)
            first, stop = self.targets.first[part], self.targets.stop[part]
            row = np.repeat(np.arange(len(part)), stop - first)
            item = np.concatenate(
                [self.targets.item[a:b] for a, b in zip(first, stop, strict=True)]
            )
            places.append(ranks(scores, row, item))
        place = np.concatenate(places)
        return {name: float(metric(name, place).mean()) for name in names} | {
            "windows": float(len(ends))
        }


def sample(ends: Ints, most: int, seed: int) -> Ints:
    """At most so many of `ends`, in order."""
    if len(ends) <= most:
        return ends
    return np.sort(np.random.default_rng(seed).choice(ends, most, replace=False))
