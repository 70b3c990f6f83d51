"""Ids of many users as bytes, one after the other: a string each would cost more than all else that
is done with them.

PURE.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import pairwise
from typing import overload

import numpy as np
from numpy.typing import NDArray


class Ids(Sequence[str]):
    """n ids; never changed."""

    def __init__(self, text: NDArray[np.uint8], end: NDArray[np.int64]) -> None:
        """`text`: UTF-8; id i is text[end[i] : end[i + 1]], and end has n + 1 entries."""
        self.text = text
        self.end = end

    @classmethod
    def of(cls, ids: Iterable[str]) -> Ids:
        """These, as bytes."""
        if isinstance(ids, Ids):
            return ids
        parts = [user_id.encode() for user_id in ids]
        end = np.zeros(len(parts) + 1, np.int64)
        np.cumsum(np.fromiter(map(len, parts), np.int64, len(parts)), out=end[1:])
        return cls(np.frombuffer(bytearray().join(parts), np.uint8), end)

    def __len__(self) -> int:
        return len(self.end) - 1

    @overload
    def __getitem__(self, at: int) -> str: ...
    @overload
    def __getitem__(self, at: slice) -> Ids: ...
    def __getitem__(self, at: int | slice) -> str | Ids:
        if isinstance(at, int):
            at = range(len(self))[at]
            return self.text[self.end[at] : self.end[at + 1]].tobytes().decode()
        begin, stop, step = at.indices(len(self))
        if step != 1:
            return Ids.of([self[i] for i in range(begin, stop, step)])
        return Ids(self.text, self.end[begin : max(begin, stop) + 1])

    def __iter__(self) -> Iterator[str]:
        end = self.end.tolist()
        first = end[0]
        raw = self.text[first : end[-1]].tobytes()
        if raw.isascii():
            text = raw.decode()
            return iter([text[a - first : b - first] for a, b in pairwise(end)])
        return (raw[a - first : b - first].decode() for a, b in pairwise(end))
