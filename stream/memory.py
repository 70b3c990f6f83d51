"""Gives memory back to the system once something large was let go."""

from __future__ import annotations

import ctypes
import gc
import sys


def give_back() -> None:
    """Collect what only refers to itself, then return what is free. For a thread that nobody waits
    for: the collection walks what came after the start, 14,000 objects of half a million, and the
    rest needs no lock of the interpreter."""
    # An error that a reply from Redis became, and its traceback, refer to each other, and keep what
    # all callers held: a whole release, until a full collection, which may be hours away.
    gc.collect()
    if sys.platform == "linux" and (trim := getattr(ctypes.CDLL(None), "malloc_trim", None)):
        trim(0)  # glibc keeps free pages between pieces in use; musl has no such call
