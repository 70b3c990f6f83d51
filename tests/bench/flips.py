"""The updater as it is, with a clock beside it: `python -m tests.bench.flips FILE`.

When each micro-batch was prepared and applied, and in which space, is written to FILE as JSON
lines: a flip is what lies between the last batch of one space and the first of the next.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Any, TextIO

from stream import cli
from stream.updater import Updater


def _timed(stage: str, work: Callable[..., Any], out: TextIO) -> Callable[..., Any]:
    @wraps(work)
    def timed(updater: Updater, batch: Any) -> Any:
        began_s = time.perf_counter()
        done = work(updater, batch)
        prepared = batch.prepared if done is None else done
        line = [stage, prepared.catalogue.engine.space, began_s, time.perf_counter()]
        out.write(json.dumps(line) + "\n")
        return done

    return timed


def main() -> None:
    """Run `penchant updater`."""
    out = Path(sys.argv[1]).open("a", buffering=1, encoding="utf-8")  # noqa: SIM115
    for stage, name in (("prepare", "prepare"), ("apply", "finish")):
        setattr(Updater, name, _timed(stage, getattr(Updater, name), out))
    sys.argv = ["penchant", "updater"]
    cli.main()


if __name__ == "__main__":
    main()
