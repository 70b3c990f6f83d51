"""Ctrl-C for a program that starts other programs: heeded where it can do no harm."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any, Final, Self

# Leave the second screen, show the cursor.
_RESTORE_TERMINAL: Final = b"\x1b[?1049l\x1b[?25h"


class Stopped(BaseException):
    """Ctrl-C, SIGTERM or SIGHUP. No Exception: nothing on the way may take it for a failure."""


class Signals:
    """A signal raises in `heeded` and `pause`, and is remembered elsewhere.

    Elsewhere it could fall between the start of a server and the note that it runs. A second
    signal ends the process on the spot; `process_guard.py` then kills the servers. After the
    block, a program that a signal has ended heeds no other one.
    """

    def __init__(self, *, on_terminal: bool) -> None:
        self._on_terminal = on_terminal
        self._came = False
        self._may_raise = False
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Self:
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            self._before[number] = signal.signal(number, self._on_signal)
        return self

    def __exit__(self, *failure: object) -> None:
        # One more Ctrl-C, while the interpreter ends, must not make a failure of a good end.
        for number, handler in self._before.items():
            signal.signal(number, signal.SIG_IGN if self._came else handler)

    @contextmanager
    def heeded(self) -> Iterator[None]:
        """A signal that has come, or comes in the body, raises Stopped."""
        self._may_raise = True
        try:
            if self._came:
                raise Stopped
            yield
        finally:
            self._may_raise = False

    def pause(self, seconds: float) -> None:
        """Sleep. Raises Stopped as soon as a signal comes."""
        with self.heeded():
            time.sleep(seconds)

    def _on_signal(self, number: int, _frame: FrameType | None) -> None:
        if self._came:
            if self._on_terminal:
                os.write(1, _RESTORE_TERMINAL)
            os._exit(128 + number)
        self._came = True
        if self._may_raise:
            self._may_raise = False  # once: unwinding is not to be interrupted
            raise Stopped
