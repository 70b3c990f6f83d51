"""Profiles of other embedding spaces: brought into the worker's own, or served in theirs.

Two rules keep workers of different releases from undoing each other's work:

    A profile of another space is moved into the worker's own, when the worker meets it.
    Unless it lives in the space that Redis names as current: then it is the worker that is
    behind, and it folds its events into the profile's space.

The second costs nothing in exactness: a space is named as current only once all items have
their vectors in it, so a worker that is behind reads those. Only searches and messages,
which it can but encode its own way, go through the map.

It does not know events, Kafka, or when a release changes.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Final

import numpy as np
from numpy.typing import NDArray

from model.releases import Release, releases_by_id
from model.transition import Transition, fit_transition
from profiles import arithmetic
from profiles.arithmetic import Floats, Keys64, Layout, Profiles
from profiles.errors import SpaceMismatch
from profiles.items import ItemStore
from profiles.schema import FLAG_TEXT, WINDOW_ENTRY

from .catalogue import Catalogue

if TYPE_CHECKING:
    from profiles.kernel import Kernel

log = logging.getLogger(__name__)

# Vectors of a space that is being left; popular items are in most windows. 32 MiB at D = 128.
_OLD_VECTORS: Final = 65_536
# So often that in all: for the way in use, and one that is made ready meanwhile.
_WAYS: Final = 2
_MAPS: Final = 64  # 4 MiB at D = 128; one is made again in milliseconds
# Items that a missing map is fitted on.
_FIT_ITEMS: Final = 4_096
_READY_AT_ONCE: Final = 1_024

_NO_KEYS: Final = np.zeros(0, np.uint64)

# Some users' profiles; their rows among all that were loaded; the space to fold into; and which
# of them were moved there just now, counted within the part.
Part = tuple[Profiles, Sequence[int], int, set[int]]


class Migrator:
    """Shared by the threads of one worker."""

    def __init__(self, releases_dir: Path, items: ItemStore, layout: Layout) -> None:
        self._dir = releases_dir
        self._items = items
        self._layout = layout
        self._maps: dict[tuple[int, int], Floats] = {}
        self._old: dict[tuple[int, int], Floats] = {}  # (space, item key)
        self._changed: dict[tuple[int, int], tuple[Keys64, Floats]] = {}

    def bring(self, profiles: Profiles, catalogue: Catalogue) -> list[Part]:
        """Move profiles into the catalogue's space, but for those that are ahead of it; parts
        that can be folded into, each of one space. Raises RedisUnavailable, and SpaceMismatch
        where no map is to be had."""
        stored, own = profiles.header["space"], catalogue.space
        everybody = range(len(profiles))
        foreign = (stored != own) & (stored != 0)
        if not foreign.any():
            return [(profiles, everybody, own, set())]
        current = self._items.current_space()
        ahead: list[Part] = []
        moved: set[int] = set()
        for space in np.unique(stored[foreign]).tolist():
            rows = np.flatnonzero(stored == space).tolist()
            if _name(space) == current:
                ahead.append((arithmetic.take(profiles, rows), rows, space, set()))
            else:
                self._move(profiles, rows, space, catalogue)
                moved.update(rows)
        if not ahead:
            return [(profiles, everybody, own, moved)]
        gone = {row for _, rows, _, _ in ahead for row in rows}
        rest = [row for row in everybody if row not in gone]
        here = {i for i, row in enumerate(rest) if row in moved}
        return [(arithmetic.take(profiles, rest), rest, own, here), *ahead]

    def carry(
        self, states: Sequence[bytes], kernel: Kernel, catalogue: Catalogue
    ) -> dict[int, bytes]:
        """What `bring` does to profiles about which nothing else is out of the ordinary, from bytes
        to bytes: position -> state in the catalogue's space. The others are left out. Raises as
        `bring`."""
        foreign = arithmetic.elsewhere(states, catalogue.space)
        if not foreign:
            return {}
        current = self._items.current_space()
        spaces = arithmetic.plain_spaces([states[i] for i in foreign], self._layout)
        carried: dict[int, bytes] = {}
        for space in np.unique(spaces[spaces != 0]).tolist():
            if _name(space) == current:
                continue
            users = [foreign[i] for i in np.flatnonzero(spaces == space).tolist()]
            old, way = [states[i] for i in users], self.map(space, catalogue.space)
            changes_of = partial(self._changes, space, catalogue)
            new = kernel.carry(old, way, changes_of, catalogue.space)
            carried |= zip(users, new, strict=True)
        return carried

    def make_ready(self, space: str, catalogue: Catalogue) -> None:
        """Do beforehand what the first profile of `space` would wait for. Raises RedisUnavailable,
        and SpaceMismatch where no map leads from what is there into the catalogue's space."""
        old, items = int(space, 16), catalogue.held(_OLD_VECTORS)
        if old == catalogue.space or not items:
            return
        self.map(old, catalogue.space)
        for start in range(0, len(items), _READY_AT_ONCE):
            keys = np.array(sorted(items[start : start + _READY_AT_ONCE]), np.uint64)
            self._changes(old, catalogue, keys)

    def express(self, items: Keys64, vectors: Floats, space: int, other: int) -> Floats:
        """Vectors (m, D) of `space` as those of `other`: an item's own where it has one there, else
        through the map; items (m,) with 0 for none. Zero rows stay zero."""
        out = arithmetic.unit(vectors @ self.map(space, other))
        keys = [key for key in np.unique(items).tolist() if key]
        exact = self._items.vectors_by_key(_name(other), keys)  # not remembered: it is written to
        for i, key in enumerate(items.tolist()):
            if key in exact and vectors[i].any():
                out[i] = exact[key]
        return out

    def map(self, space: int, other: int) -> Floats:
        """(D, D): the product of the maps on the shortest way over the releases at hand; else one
        fitted on the items that Redis holds in both spaces. Raises SpaceMismatch for neither."""
        known = self._maps.get((space, other))
        if known is None:
            known = self._way(_name(space), _name(other))
            if known is None:
                known = self._fitted(_name(space), _name(other))
            if len(self._maps) >= _MAPS:
                self._maps = {}
            self._maps[(space, other)] = known
        return known

    def forget_vectors(self) -> None:
        """Let go of the vectors of spaces that were left."""
        self._old, self._changed = {}, {}

    def _move(
        self, profiles: Profiles, rows: Sequence[int], space: int, catalogue: Catalogue
    ) -> None:
        way = self._way_for(space, _window_items(profiles, rows), catalogue)
        arithmetic.migrate(profiles, rows, *way, self._layout, catalogue.space)

    def _way_for(
        self, space: int, keys: Sequence[int], catalogue: Catalogue
    ) -> tuple[Floats, Mapping[int, Floats], Mapping[int, Floats]]:
        """The map into the catalogue's space, and these items' vectors in either."""
        old = self._vectors(space, keys)
        asked = list(old)
        got = catalogue.resolve(asked, {})
        new = {k: v for k, v, ok in zip(asked, got.vectors, got.found, strict=True) if ok}
        return self.map(space, catalogue.space), old, new

    def _changes(self, space: int, catalogue: Catalogue, keys: Keys64) -> tuple[Keys64, Floats]:
        """See `ChangesOf`. What was found is remembered, as it was when it was first asked for."""
        way = (space, catalogue.space)
        known, change = self._changed.get(way, (_NO_KEYS, np.zeros((0, 0), np.float32)))
        missing = np.setdiff1d(keys, known, assume_unique=True)
        if not len(missing):
            return known, change
        transition, old, new = self._way_for(space, missing.tolist(), catalogue)
        if new:
            found = np.sort(np.fromiter(new, np.uint64, len(new)))
            before, after = (np.stack([v[k] for k in found.tolist()]) for v in (old, new))
            more = (after - before.astype(np.float64) @ transition).astype(np.float32)
            if not len(known) or len(known) + len(found) > _OLD_VECTORS:
                known, change = found[:0], more[:0]
            both, rows = np.concatenate([known, found]), np.concatenate([change, more])
            order = np.argsort(both)
            held = sum(len(keys) for w, (keys, _) in list(self._changed.items()) if w != way)
            if held + len(both) > _WAYS * _OLD_VECTORS:
                self._changed = {}
            # Never changed in place: another thread may be reading it.
            known, change = self._changed[way] = both[order], rows[order]
        return known, change

    def _vectors(self, space: int, keys: Sequence[int]) -> dict[int, Floats]:
        held = self._old  # never changed in place: another thread may be reading it
        known = {key: held[(space, key)] for key in keys if (space, key) in held}
        missing = [key for key in keys if key not in known]
        if missing:
            fetched = self._items.vectors_by_key(_name(space), missing)
            known |= fetched
            kept = held if len(held) + len(fetched) <= _OLD_VECTORS else {}
            self._old = kept | {(space, key): vector for key, vector in fetched.items()}
        return known

    def _way(self, space: str, other: str) -> Floats | None:
        """Breadth first over the releases, each of which knows the way from its parent's space."""
        found = releases_by_id(self._dir)
        steps: dict[str, list[tuple[str, Release]]] = {}
        for release in found.values():
            parent = found.get(release.parent)
            if parent is not None and parent.space != release.space:
                steps.setdefault(parent.space, []).append((release.space, release))
                steps.setdefault(release.space, []).append((parent.space, release))
        ways: dict[str, Floats] = {space: np.eye(self._layout.dimensions, dtype=np.float32)}
        queue = deque([space])
        while queue and other not in ways:
            here = queue.popleft()
            for there, release in steps.get(here, ()):
                transition = None if there in ways else _transition(release)
                if transition is not None:
                    forward = transition.to_space == there
                    step = transition.forward if forward else transition.backward
                    ways[there] = ways[here] @ step
                    queue.append(there)
        return ways.get(other)

    def _fitted(self, space: str, other: str) -> Floats:
        old, new = (self._items.some_vectors(s, _FIT_ITEMS) for s in (space, other))
        both = sorted(old.keys() & new.keys())
        if not both:
            raise SpaceMismatch(
                f"a profile lives in space {space}, this worker in {other}, and nothing leads "
                "from one to the other: put the release that it was written with back into "
                "MODEL_RELEASES"
            )
        fitted = fit_transition(
            space, other, np.stack([old[i] for i in both]), np.stack([new[i] for i in both])
        )
        log.warning(
            "no release leads from space %s to %s: using a map fitted on %d items, cosine %.3f",
            space, other, len(both), fitted.error.cosine,
        )  # fmt: skip
        return fitted.forward


def _transition(release: Release) -> Transition | None:
    try:
        return release.load_transition()
    except (OSError, ValueError) as error:
        log.warning("the transition of %s cannot be used: %s", release.id, error)
        return None


def _name(space: int) -> str:
    return f"{space:016x}"


def _window_items(profiles: Profiles, rows: Sequence[int]) -> list[int]:
    """The items that the windows of some users name, each once."""
    entries: NDArray[np.void] = np.frombuffer(
        b"".join([profiles.window[row] for row in rows]), dtype=WINDOW_ENTRY
    )
    items = entries["item"][entries["flags"] & FLAG_TEXT == 0]
    found: list[int] = np.unique(items[items != 0]).tolist()
    return found
