"""Texts through a release's tower, each once: what it said is kept in a file.

Knows releases and files; knows no catalogue, no event and no training.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Final
from zipfile import BadZipFile

import numpy as np

from model.releases import Release, tower_id
from model.text import text_version
from profiles.arithmetic import Floats

from .settings import ModelSettings

_TEXTS_AT_ONCE: Final = 256


def features_of(
    release: Release,
    texts: Sequence[str],
    model: ModelSettings,
    folder: Path,
    progress: Callable[[int, int], None],
) -> Floats:
    """(n, W) unit rows. `folder` keeps those of this tower and these texts, and no others: texts
    seldom change, and a tower only when it is tuned. `progress` is told (encoded, to encode)."""
    versions = [text_version(text) for text in texts]
    file = folder / f"{tower_id(release)}.npz"
    known = _read(file, release.width)
    missing = {v: t for v, t in zip(versions, texts, strict=True) if v not in known}
    if missing:
        encoder = release.load_encoder(device=model.device, dtype=model.dtype, projected=False)
        wanted = list(missing.items())
        for begin in range(0, len(wanted), _TEXTS_AT_ONCE):
            part = wanted[begin : begin + _TEXTS_AT_ONCE]
            rows = encoder.encode([text for _, text in part])
            known |= dict(zip((version for version, _ in part), rows, strict=True))
            progress(begin + len(part), len(wanted))
        _write(file, {version: known[version] for version in dict.fromkeys(versions)})
    return np.stack([known[version] for version in versions])


def _read(file: Path, width: int) -> dict[str, Floats]:
    try:
        with file.open("rb") as stream, np.load(stream) as kept:
            rows, versions = kept["rows"], kept["versions"].tolist()
    except (OSError, ValueError, KeyError, EOFError, BadZipFile):
        return {}  # none yet, or cut short by a crash
    return dict(zip(versions, rows, strict=True)) if rows.shape[1] == width else {}


def _write(file: Path, rows: dict[str, Floats]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    draft = file.with_suffix(".draft")
    with draft.open("wb") as out:
        np.savez(out, versions=np.array(list(rows)), rows=np.stack(list(rows.values())))
    draft.replace(file)
    for other in file.parent.glob("*.npz"):
        if other != file:
            other.unlink(missing_ok=True)
