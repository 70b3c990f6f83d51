"""Other pipelines, each on its own library, and the packages that they need.

Their packages may not fit Penchant's, so each rival has a folder of its own for them, which is put
before the environment that the benchmark runs in.
"""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Final

_HERE: Final = Path(__file__).parent
_INSTALLED: Final = _HERE.parents[2] / ".penchant/bench/rivals"


def environment(packages: str) -> Mapping[str, str]:
    """What a process needs in its environment to find them; none for "". Installs them once."""
    if not packages:
        return {}
    pinned = _HERE / f"{packages}.txt"
    folder = _INSTALLED / f"{packages}-{hashlib.sha256(pinned.read_bytes()).hexdigest()[:12]}"
    if not folder.exists():
        draft = folder.with_suffix(".draft")
        uv = Path(sys.executable).parent / "uv"
        subprocess.run(
            [uv, "pip", "install", "--quiet", "--no-deps", "--python", sys.executable,
             "--target", draft, "--requirement", pinned],
            check=True,
        )  # fmt: skip
        draft.rename(folder)
    known = os.environ.get("PYTHONPATH")
    return {"PYTHONPATH": os.pathsep.join([str(folder), *([known] if known else [])])}
