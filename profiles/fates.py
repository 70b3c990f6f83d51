"""What became of a micro-batch's events, through refused saves and repeated folds.

PURE. An event may be folded several times before its save is accepted: Redis refuses a save that
another writer overtook, and a whole micro-batch is folded again where Redis did not answer. What
an event counts as is settled by the last time, with one exception: found applied by a repeat, it
was saved the time before, and the reply was lost.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final

import numpy as np
from numpy.typing import NDArray

# Of an event. 0: not folded yet, or its save was refused.
APPLIED: Final = 1
REPLAYED: Final = 2  # at or below the watermark: it counted before
REPEATED: Final = 3  # same event id as an earlier one: a producer's repeat
FORGOTTEN: Final = 4  # a `forget` that was carried out
ERASED: Final = 5  # before such a `forget`, in the same fold


class Fates:
    """Of m events. Several threads may use it, each for other events."""

    def __init__(self, m: int) -> None:
        self._of = np.zeros(m, np.uint8)
        self._split: set[str] = set()

    def folded(self, at: NDArray[np.int64], fate: NDArray[np.uint8], split: Iterable[str]) -> None:
        """Events at these positions were folded, and are to be saved. `split`: users who have
        events on a further partition by that."""
        before = self._of[at]
        self._of[at] = np.where((fate == REPLAYED) & (before != 0), before, fate)
        self._split.update(split)

    def refused(self, at: NDArray[np.int64], fate: NDArray[np.uint8], users: Iterable[str]) -> None:
        """What was folded like that was not saved: events at these positions, of these users."""
        self._of[at[fate != REPLAYED]] = 0
        self._split.difference_update(users)

    def are(self, fate: int) -> NDArray[np.bool_]:
        """(m,) which events have this fate now."""
        which: NDArray[np.bool_] = self._of == fate
        return which

    def split(self) -> int:
        """Users who have events on a further partition than before."""
        return len(self._split)
