"""A worker's way from one release to the next: made ready, flipped to, swept after.

Before the flip every item has its vector in the new space (blue and green stand side by
side in Redis), so a reader of the first profile that moves finds all items beside it. The
old space's items stay, for profiles that have not moved and for a way back.
"""

from __future__ import annotations

import logging
import time
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Final

from model.engine import Engine
from model.errors import EncoderSettingsInvalid, ModelError
from model.hot_swap import HotSwap
from model.ranker import RANKER, load_weights
from model.releases import Release, current_name, peek
from profiles.items import ItemStore
from profiles.schema import Keys
from profiles.store import ProfileStore

from . import metrics
from .catalogue import Catalogue
from .memory import give_back
from .settings import Settings
from .sweeper import Sweeper
from .updater import Updater

if TYPE_CHECKING:
    import redis

log = logging.getLogger(__name__)

# How long what was begun with the release before may take to end; looked after in between.
_LET_GO_AFTER_S: Final = (0.5, 1.0, 2.0, 4.0, 8.0)


def publish_ranker(items: ItemStore, release: Release) -> None:
    """Let readers of a release's space score with its ranker, or by hand where it has none.
    Raises RedisUnavailable, WeightsUnavailable."""
    trained = RANKER in release.parts
    items.put_ranker(release.space, load_weights(release.path / RANKER) if trained else None)


def open_space(items: ItemStore, catalogue: Catalogue) -> None:
    """Name the catalogue's space as current, once all items are in it. Raises RedisUnavailable."""
    if items.current_space() == catalogue.engine.space:
        items.keep_space(catalogue.engine.space)
    else:
        catalogue.fill()
        items.set_space(catalogue.engine.space)
    publish_ranker(items, catalogue.engine.release)


def reopen_space(folder: Path, items: ItemStore, catalogue: Catalogue) -> None:
    """As `open_space`, where Redis may have lost that it was named; not for a catalogue that is no
    longer, or not yet, the one to serve. Raises RedisUnavailable."""
    if catalogue.engine.space == wanted_space(folder):
        open_space(items, catalogue)


def wanted_space(folder: Path) -> str:
    """The space that CURRENT in this folder of releases leads to; "" where it leads nowhere."""
    try:
        return peek(folder / current_name(folder)).space
    except ModelError:
        return ""


class Swapper:
    """One worker's."""

    def __init__(
        self,
        settings: Settings,
        updater: Updater,
        client: redis.Redis,
        keys: Keys,
        store: ProfileStore,
        items: ItemStore,
        failed: Callable[[BaseException], None],
    ) -> None:
        """`store` is for the sweeper alone; `failed` is told what ends its thread."""
        self._settings = settings
        self._updater = updater
        self._items = items
        self._sweeper = Sweeper(
            client,
            keys,
            store,
            items,
            updater.migrator,
            lambda: updater.catalogue,
            lambda: wanted_space(settings.model.releases),
            updater.moved_elsewhere,
            failed,
            per_s=settings.stream.sweep_per_s,
        )
        self.hot_swap = HotSwap(
            settings.model.releases,
            updater.catalogue.engine.release.id,
            self._build,
            self._flip,
            poll_s=settings.model.watch_s,
            refused=lambda words: metrics.RELEASES_REFUSED.inc(),
            flipped=self._let_go,
        )
        self._left: weakref.ref[Engine] | None = None

    def start(self) -> None:
        """Watch and sweep, as far as the settings ask for it."""
        if self._settings.model.watch_s:
            self.hot_swap.start()
        if self._settings.stream.sweep_per_s:
            self._sweeper.start()

    def stop(self) -> None:
        """Both, soon."""
        self.hot_swap.stop()
        self._sweeper.stop()

    def _build(self, release: Release) -> Catalogue:
        model, live = self._settings.model, self._updater.catalogue.engine
        if release.dimensions != live.dimensions:
            raise EncoderSettingsInvalid(
                f"{release.id} has {release.dimensions} dimensions, the profiles of this NAMESPACE "
                f"have {live.dimensions}: train with MODEL_DIMENSIONS={live.dimensions}, or use "
                "another NAMESPACE"
            )
        engine = Engine(
            release,
            device=model.device,
            dtype=model.dtype,
            batch_tokens=model.batch_tokens,
            item_rows=model.item_rows,
        )
        catalogue = Catalogue(engine, self._items, release.load_item_vectors())
        count = catalogue.fill(lambda: self.hot_swap.ended, beside=True)
        log.info("%d items are in space %s", count, release.space)
        self._updater.migrator.make_ready(live.space, catalogue)
        return catalogue

    def _flip(self, release: Release, catalogue: Catalogue) -> None:
        before = self._updater.catalogue.engine.space
        self._left = weakref.ref(self._updater.catalogue.engine)
        publish_ranker(self._items, release)
        # Named first: a profile must not be seen in a space that is not current yet.
        self._items.set_space(release.space)
        # By this thread's clock: micro-batches go on meanwhile, so waiting for a turn delays none.
        began_s = time.thread_time()
        self._updater.swap(catalogue)
        metrics.FLIP_S.observe(time.thread_time() - began_s)
        metrics.RELEASES_SWAPPED.inc()
        catalogue.refill()
        if before != release.space:
            self._sweeper.wake()

    def _let_go(self) -> None:
        """Give the memory of the release before back, once its last batch is through."""
        for pause_s in _LET_GO_AFTER_S:
            if self._left is None or self.hot_swap.wait(pause_s):
                return
            give_back()
            if self._left() is None:
                return
        log.warning("the memory of the release before is not free: something still uses it")
