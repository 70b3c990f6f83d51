"""Watches CURRENT and makes the next release ready beside the live one.

A thread of its own looks at the pointer. When it names another release, that release is
verified, loaded and warmed up while the live one serves, and only then handed over. What
cannot be used is refused, in words, and the live release serves on. Knows nothing of
events: what "ready" means is the caller's `build`, what becomes of it the caller's `flip`.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Generic, TypeVar

from .errors import ModelError
from .releases import Release, current_name, load

log = logging.getLogger(__name__)

T = TypeVar("T")

# A release that is still being copied to this machine is whole a little later.
RETRY_S = 15.0
# The live release must not feel it: of two threads that want a core, this one waits.
_NICENESS = 10


class HotSwap(Generic[T]):
    """One watcher of one releases folder."""

    def __init__(
        self,
        releases_dir: Path,
        live: str,
        build: Callable[[Release], T],
        flip: Callable[[Release, T], None],
        *,
        poll_s: float = 1.0,
        refused: Callable[[str], None] = lambda words: None,
        flipped: Callable[[], None] = lambda: None,
    ) -> None:
        """`live` is the id of the release that serves. `build` loads and warms up on the
        watcher's thread; `flip` puts the result in place, at once. What either raises refuses the
        release for a while, and `refused` is told why. `flipped` may take its time, on the same
        thread, once nothing here refers to the release before."""
        self.live = live
        self._dir = releases_dir
        self._build = build
        self._flip = flip
        self._poll_s = poll_s
        self._refused = refused
        self._flipped = flipped
        self._refusal = ("", 0.0)  # name, and when to try it again
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, name="hot-swap", daemon=True)

    def start(self) -> None:
        """Begin to watch."""
        self._thread.start()

    def stop(self, wait_s: float = 1.0) -> None:
        """Watch no longer. A release in the making is given up when its step is done."""
        self._ended.set()
        if self._thread.is_alive():
            self._thread.join(wait_s)

    @property
    def ended(self) -> bool:
        """Whether `stop` was called: a long `build` may look at it."""
        return self._ended.is_set()

    def wait(self, seconds: float) -> bool:
        """Let some time pass; whether `stop` was called meanwhile."""
        return self._ended.wait(seconds)

    def look(self) -> bool:
        """Look at CURRENT once; whether another release is live now."""
        name = ""
        try:
            name = current_name(self._dir)
            if name == self.live or (name == self._refusal[0] and not self._due()):
                return False
            self._swap(name)
        except ModelError as error:
            self._refuse(name, str(error))
        except Exception as error:  # out of memory, a Redis that went away: the live one serves on
            log.debug("the swap to %s failed", name, exc_info=True)
            self._refuse(name, f"{type(error).__name__}: {error}")
        else:
            self._refusal = ("", 0.0)
            return True
        return False

    def _swap(self, name: str) -> None:
        began_s = time.monotonic()
        release = load(self._dir / name)
        ready = self._build(release)
        if self._ended.is_set():
            return
        if current_name(self._dir) != name:  # moved on meanwhile, or back
            raise _Overtaken(f"{name} is live no longer; it was never served")
        self._flip(release, ready)
        self.live = name
        log.info("%s serves now, made ready in %.1f s", name, time.monotonic() - began_s)

    def _due(self) -> bool:
        return time.monotonic() >= self._refusal[1]

    def _refuse(self, name: str, words: str) -> None:
        if name != self._refusal[0] or self._due():
            log.warning("%s serves on, because its successor was refused: %s", self.live, words)
            self._refused(words)
        self._refusal = (name, time.monotonic() + RETRY_S)

    def _run(self) -> None:
        with suppress(OSError, AttributeError):  # a courtesy, where the system has it
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _NICENESS)
        while not self._ended.wait(self._poll_s):
            if self.look():
                self._flipped()


class _Overtaken(ModelError):
    """CURRENT moved while this release was made ready."""
