"""Labelled windows: what the trainer and the evaluation learn from, as columns.

PURE. Every event is the end of one window: the last N events of its user up to and with itself.
A window is therefore an index, not a copy, and the labels stand beside the event that ends it.
It does not know events, archives or how labels are made (`stream/labelling.py` does).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]
Int32s = NDArray[np.int32]
Int8s = NDArray[np.int8]
Types = NDArray[np.uint8]
Floats = NDArray[np.float32]
Bools = NDArray[np.bool_]

HELD_BACK: Final = -1
"""A label that is not known yet: its horizon has not passed."""
NO_ITEM: Final = -1


@dataclass(frozen=True)
class Labelled:
    """m events of u users, each the end of one window (its user's last N events up to it).

    Users stand in the order of their ids, events of a user in event time, those of one instant as a
    profile's window has them.
    """

    start: Ints  # (u + 1,) events of user j are start[j]:start[j+1]
    user: list[str]  # u
    item: Int32s  # (m,) row in the catalogue, -1 = the event has no item, or an unknown one
    type: Types  # (m,) index into the event types
    t_ms: Ints  # (m,) event time
    weight: Floats  # (m,) signed event weight
    purchase: Int8s  # (m,) 1/0: a purchase within the horizon after t_ms; -1: held back
    returns: Int8s  # (m,) 1/0: any event within the horizon (0 = churn); -1: held back
    rating: Floats | None = None  # (m,) the rating that the event gives, NaN = none
    label: list[str] | None = None  # m: the label that the event gives (of a message), "" = none

    def __post_init__(self) -> None:
        """Raises ValueError if the columns do not fit together."""
        if len(self.start) != len(self.user) + 1 or self.start[0] != 0:
            raise ValueError("start must hold 0 and then the end of each user's events")
        m = int(self.start[-1])
        for name in (
            "item", "type", "t_ms", "weight", "purchase", "returns",
            "rating", "label",
        ):  # fmt: skip
            column = getattr(self, name)
            if column is not None and len(column) != m:
                raise ValueError(f"{name} has {len(column)} rows, start says {m}")

    def __len__(self) -> int:
        return int(self.start[-1])

    def take_users(self, rows: Ints) -> Labelled:
        """The given users, in the given order, with all their events and unchanged labels."""
        sizes = (self.start[1:] - self.start[:-1])[rows]
        start = np.concatenate([np.zeros(1, np.int64), np.cumsum(sizes)])
        at = np.repeat(self.start[rows] - start[:-1], sizes) + np.arange(start[-1])
        return self._take(at, start, [self.user[j] for j in rows.tolist()])

    def take_events(self, chosen: Bools) -> Labelled:
        """The chosen events (m,) of all users, with unchanged labels; a user may have none."""
        kept = np.concatenate([np.zeros(1, np.int64), np.cumsum(chosen, dtype=np.int64)])
        return self._take(np.flatnonzero(chosen), kept[self.start], self.user)

    def as_kept(self) -> Labelled:
        """Without the events of no weight, which no profile keeps in its window: what a window
        encoder learns from must be what it is given when it serves."""
        return self.take_events(self.weight != 0)

    def _take(self, at: Ints, start: Ints, user: list[str]) -> Labelled:
        return Labelled(
            start=start,
            user=user,
            item=self.item[at],
            type=self.type[at],
            t_ms=self.t_ms[at],
            weight=self.weight[at],
            purchase=self.purchase[at],
            returns=self.returns[at],
            rating=None if self.rating is None else self.rating[at],
            label=None if self.label is None else [self.label[i] for i in at.tolist()],
        )


def joined(older: Labelled, newer: Labelled) -> Labelled:
    """The events of both, of a user the older first, without ratings and labels of messages."""
    names = sorted({*older.user, *newer.user})
    place = {name: j for j, name in enumerate(names)}
    user = np.concatenate(
        [
            np.repeat(np.array([place[name] for name in part.user], np.int64), np.diff(part.start))
            for part in (older, newer)
        ]
    )
    order = np.argsort(user, kind="stable")
    counts = np.bincount(user, minlength=len(names))
    columns: dict[str, Any] = {
        name: np.concatenate([getattr(older, name), getattr(newer, name)])[order]
        for name in ("item", "type", "t_ms", "weight", "purchase", "returns")
    }
    start = np.concatenate([np.zeros(1, np.int64), np.cumsum(counts, dtype=np.int64)])
    return Labelled(start=start, user=names, **columns)
