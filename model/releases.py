"""Release folders: what an engine loads, written whole or not at all.

    RELEASES/
      CURRENT                     the name of the live release, replaced atomically
      base-0123456789abcdef/
        manifest.json             format, ids, encoder settings, SHA-256 of every file
        encoder/                  the tower: config, tokenizer, safetensors
        projection.safetensors    the linear map from the tower's width to D

A release is built beside its name, synced, and renamed to it; a crash leaves a
`.building-…` folder that the next build removes. Nothing in a release ever changes.

A *space* is the id of what a vector means: weights, tokenizer, pooling, prefixes, the
cut at `max_tokens` and the projection. Vectors of two spaces are never compared.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import re
import shutil
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError

from .encoder import TOWER_FILES, DType, Pooling, TextEncoder, tower_folder
from .errors import (
    EncoderSettingsInvalid,
    ReleaseCorrupt,
    ReleaseMissing,
    ReleaseTooNew,
    ReleaseUnwritable,
)
from .projection import FIT_TEXTS, FIT_VERSION, Projection, fit_projection
from .text import text_version

FORMAT_VERSION = 1

CURRENT = "CURRENT"
MANIFEST = "manifest.json"
ENCODER = "encoder"
PROJECTION = "projection.safetensors"

# No dots and no slashes: a name in CURRENT or in a manifest cannot leave the folder.
_RELEASE_NAME = re.compile(r"[a-z0-9][a-z0-9-]{0,80}")
_FILE_NAME = re.compile(r"(encoder/)?[A-Za-z0-9_][A-Za-z0-9_.-]{0,100}")

_PROGRESS_TEXTS = 512  # texts between two reports of progress: a second or two on a CPU

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Release:
    """A verified release folder: where it is, and what its manifest says."""

    path: Path
    id: str
    space: str
    base: str
    width: int
    dimensions: int
    pooling: Pooling
    query_prefix: str
    passage_prefix: str
    max_tokens: int
    fitted_on: int
    """Different texts that the projection was fitted on; with 0 it is a random one."""
    created_at: str

    def load_encoder(self, *, device: str = "auto", dtype: DType = "auto") -> TextEncoder:
        """The encoder of this release. Raises as `TextEncoder.from_pretrained` does."""
        return TextEncoder.from_pretrained(
            self.path / ENCODER,
            device=device,
            dtype=dtype,
            max_tokens=self.max_tokens,
            pooling=self.pooling,
            query_prefix=self.query_prefix,
            passage_prefix=self.passage_prefix,
            projection=Projection.load(self.path / PROJECTION),
        )


@dataclass(frozen=True)
class _Recipe:
    """What a base release is made from, besides the texts."""

    source: Path
    base: str
    dimensions: int
    pooling: Pooling
    query_prefix: str
    passage_prefix: str
    max_tokens: int

    def encoder(self, device: str) -> TextEncoder:
        # float32 whatever the device: the projection is fitted once and lives long.
        return TextEncoder.from_pretrained(
            self.source,
            device=device,
            dtype="float32",
            max_tokens=self.max_tokens,
            pooling=self.pooling,
            query_prefix=self.query_prefix,
            passage_prefix=self.passage_prefix,
        )


def build_base(
    releases_dir: Path,
    base: str | Path,
    catalogue_texts: Sequence[str],
    dimensions: int,
    *,
    pooling: Pooling = "mean",
    query_prefix: str = "",
    passage_prefix: str = "",
    max_tokens: int = 128,
    device: str = "auto",
    now: datetime,
    progress: Progress = lambda done, total: None,
) -> Release:
    """Build the release of an untrained base, its projection fitted on the catalogue.

    The same inputs give the same release id, and a release that is there already is
    loaded, not built; of two processes that build at once, one waits for the other. The
    order of the texts and repeats among them make no difference. CURRENT is left alone:
    see `make_current`.

    Few or no texts will do (see `fit_projection`); a thousand make a good fit, and more
    than 4,096 are sampled.

    Another catalogue gives another projection, and so another space: a worker builds
    once, and from then on takes `load_current`.

    `progress` is told (texts encoded, texts to encode). Raises WeightsUnavailable,
    EncoderSettingsInvalid, ReleaseUnwritable, and what `load` raises.
    """
    recipe = _Recipe(
        source=tower_folder(base),
        base=str(base),
        dimensions=dimensions,
        pooling=pooling,
        query_prefix=query_prefix,
        passage_prefix=passage_prefix,
        max_tokens=max_tokens,
    )
    texts = _texts_to_fit_on(catalogue_texts)
    target = releases_dir / _base_id(recipe, texts)
    if not target.exists():
        with _writable(releases_dir), _sole_builder(releases_dir):
            if not target.exists():  # else it was built while this process waited
                _build(target, recipe, texts, device, now, progress)
    return load(target)


def make_current(release: Release) -> None:
    """Make `release` the live one of its releases folder, atomically. Raises ReleaseUnwritable."""
    folder = release.path.parent
    with _writable(folder):
        draft = folder / f".{CURRENT}-{uuid.uuid4().hex[:8]}"
        draft.write_text(release.path.name + "\n", encoding="utf-8")
        _sync(draft)
        draft.replace(folder / CURRENT)
        _sync(folder)


def load_current(releases_dir: Path) -> Release:
    """The live release, verified. Raises ReleaseMissing where there is none, and as `load`."""
    pointer = releases_dir / CURRENT
    try:
        name = pointer.read_text(encoding="utf-8", errors="replace").strip()
    except (FileNotFoundError, NotADirectoryError) as error:
        raise ReleaseMissing(
            f"no release is live in {releases_dir}: there is no {pointer.name} file; "
            "build a base release, or set MODEL_RELEASES to the folder that has one"
        ) from error
    if not _RELEASE_NAME.fullmatch(name):
        raise ReleaseCorrupt(
            f"{pointer} does not name a release ({name[:40]!r}); "
            f"write the name of a folder of {releases_dir} into it"
        )
    return load(releases_dir / name)


def load(path: Path) -> Release:
    """Read the release at `path` and check its format, files, checksums and shapes.

    Raises ReleaseMissing, ReleaseTooNew and ReleaseCorrupt.
    """
    if not path.is_dir():
        raise ReleaseMissing(
            f"there is no release {path}; build it, or point {CURRENT} beside it at one that exists"
        )
    manifest = _read_manifest(path)
    version = manifest.get("format")
    if isinstance(version, int) and version > FORMAT_VERSION:
        raise ReleaseTooNew(
            f"{path} is of release format {version}, this process reads up to {FORMAT_VERSION}; "
            "upgrade Penchant, or point CURRENT at an older release"
        )
    if version != FORMAT_VERSION:
        raise _corrupt(path, f"{MANIFEST} has no known format")
    release = _release_from(path, manifest)
    files = _verified_files(path, manifest)
    _check_shapes(release)
    if release.space != _space_id(files, release):
        raise _corrupt(path, "its space id does not follow from its files")
    return release


def _build(
    target: Path,
    recipe: _Recipe,
    texts: Sequence[str],
    device: str,
    now: datetime,
    progress: Progress,
) -> None:
    encoder = recipe.encoder(device)
    projection = _fit(encoder, recipe.dimensions, texts, progress)
    with _building(target) as folder:
        _link_tower(recipe.source, folder / ENCODER)
        projection.save(folder / PROJECTION)
        release = Release(
            path=target,
            id=target.name,
            space="",  # follows from the files, below
            base=recipe.base,
            width=encoder.width,
            dimensions=recipe.dimensions,
            pooling=recipe.pooling,
            query_prefix=recipe.query_prefix,
            passage_prefix=recipe.passage_prefix,
            max_tokens=recipe.max_tokens,
            fitted_on=len(texts),
            created_at=now.isoformat(),
        )
        _write_manifest(folder, release)


def _fit(
    encoder: TextEncoder, dimensions: int, texts: Sequence[str], progress: Progress
) -> Projection:
    if not 1 <= dimensions <= encoder.width:
        raise EncoderSettingsInvalid(
            f"{dimensions} dimensions were asked for, this base has {encoder.width}; "
            f"set MODEL_DIMENSIONS to at most {encoder.width}"
        )
    vectors = np.empty((len(texts), encoder.width), dtype=np.float32)  # (n, W)
    for start in range(0, len(texts), _PROGRESS_TEXTS):
        stop = min(start + _PROGRESS_TEXTS, len(texts))
        vectors[start:stop] = encoder.encode(texts[start:stop])
        progress(stop, len(texts))
    return fit_projection(vectors, dimensions)


def _texts_to_fit_on(catalogue_texts: Sequence[str]) -> list[str]:
    """At most FIT_TEXTS different texts, a fair draw that any process repeats.

    Sorted by their hashes, the head of a catalogue of any order is a random sample of it.
    """
    by_version = {text_version(text): text for text in catalogue_texts if text.strip()}
    return [by_version[version] for version in sorted(by_version)[:FIT_TEXTS]]


def _base_id(recipe: _Recipe, texts: Sequence[str]) -> str:
    inputs = {
        "format": FORMAT_VERSION,
        "fit": FIT_VERSION,
        "tower": {file.name: _sha256(file) for file in _tower_files(recipe.source)},
        "dimensions": recipe.dimensions,
        "reading": _reading(recipe),
        "texts": _digest(list(map(text_version, texts))),
    }
    return f"base-{_digest(inputs)}"


def _space_id(files: dict[str, str], release: Release) -> str:
    return _digest({"files": files, "reading": _reading(release)})


def _reading(of: Release | _Recipe) -> dict[str, str | int]:
    """The settings that change a text's vector."""
    return {
        "pooling": of.pooling,
        "query_prefix": of.query_prefix,
        "passage_prefix": of.passage_prefix,
        "max_tokens": of.max_tokens,
    }


def _digest(value: Any) -> str:
    """16 hexadecimal digits of the SHA-256 of a value's canonical JSON."""
    canonical = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return hashlib.sha256(canonical.encode()).hexdigest()[:16]


def _sha256(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _tower_files(folder: Path) -> list[Path]:
    return sorted({file for pattern in TOWER_FILES for file in folder.glob(pattern)})


def _link_tower(source: Path, folder: Path) -> None:
    """Hard links where the file system allows it: the weights then take no room twice.

    The manifest's checksums notice if somebody writes into the source later; package
    managers and the hub's cache replace files instead.
    """
    folder.mkdir()
    for file in _tower_files(source):
        try:
            os.link(file.resolve(), folder / file.name)
        except OSError:
            shutil.copyfile(file, folder / file.name)


def _read_manifest(path: Path) -> dict[str, Any]:
    try:
        manifest = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise _corrupt(path, f"{MANIFEST} cannot be read") from error
    if not isinstance(manifest, dict):
        raise _corrupt(path, f"{MANIFEST} is no JSON object")
    return manifest


def _write_manifest(folder: Path, release: Release) -> None:
    files = {
        file.relative_to(folder).as_posix(): _sha256(file)
        for file in sorted(folder.rglob("*"))
        if file.is_file()
    }
    manifest = asdict(release) | {
        "format": FORMAT_VERSION,
        "space": _space_id(files, release),
        "files": files,
    }
    del manifest["path"]  # a release may be moved
    text = json.dumps(manifest, indent=2, ensure_ascii=False) + "\n"
    (folder / MANIFEST).write_text(text, encoding="utf-8")


def _release_from(path: Path, manifest: dict[str, Any]) -> Release:
    types = {
        field.name: int if field.name in ("width", "dimensions", "max_tokens", "fitted_on") else str
        for field in fields(Release)
        if field.name != "path"
    }
    for name, kind in types.items():
        if not isinstance(manifest.get(name), kind):
            raise _corrupt(path, f"{MANIFEST} lacks {name}")
    return Release(path=path, **{name: manifest[name] for name in types})


def _verified_files(path: Path, manifest: dict[str, Any]) -> dict[str, str]:
    files = manifest.get("files")
    if not isinstance(files, dict) or not files:
        raise _corrupt(path, f"{MANIFEST} lists no files")
    for name, expected in files.items():
        if not _FILE_NAME.fullmatch(name):
            raise _corrupt(path, f"{MANIFEST} lists the odd name {name[:40]!r}")
        if not (path / name).is_file():
            raise _corrupt(path, f"{name} is missing")
        if _sha256(path / name) != expected:
            raise _corrupt(path, f"{name} is not the file that {MANIFEST} describes")
    for name in (f"{ENCODER}/config.json", PROJECTION):
        if name not in files:
            raise _corrupt(path, f"{MANIFEST} lists no {name}")
    return files


def _check_shapes(release: Release) -> None:
    try:
        projection = Projection.load(release.path / PROJECTION)
    except (SafetensorError, ValueError) as error:
        raise _corrupt(release.path, f"{PROJECTION} cannot be read ({error})") from error
    if (projection.width, projection.dimensions) != (release.width, release.dimensions):
        raise _corrupt(
            release.path,
            f"it maps {projection.width} to {projection.dimensions}, "
            f"{MANIFEST} says {release.width} to {release.dimensions}",
        )


def _corrupt(path: Path, what: str) -> ReleaseCorrupt:
    return ReleaseCorrupt(
        f"{path} is damaged: {what}; delete the folder and build the release again, "
        f"or point {CURRENT} at another"
    )


@contextmanager
def _writable(releases_dir: Path) -> Iterator[None]:
    """Make the folder, and say plainly what stops a write below it."""
    try:
        releases_dir.mkdir(parents=True, exist_ok=True)
        yield
    except OSError as error:
        raise ReleaseUnwritable(
            f"cannot write under {releases_dir} ({error.strerror or error}); "
            "set MODEL_RELEASES to a folder with room that this process may write to"
        ) from error


@contextmanager
def _sole_builder(releases_dir: Path) -> Iterator[None]:
    """Wait for any other builder; the kernel lets go of the lock of one that dies."""
    with (releases_dir / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


@contextmanager
def _building(target: Path) -> Iterator[Path]:
    """A folder that becomes `target` when the body is done, and leaves nothing if it fails."""
    for leftover in target.parent.glob(".building-*"):  # of a builder that was killed
        shutil.rmtree(leftover)
    folder = target.parent / f".building-{target.name}"
    folder.mkdir()
    try:
        yield folder
        for path in (*folder.rglob("*"), folder):
            _sync(path)
        folder.rename(target)
        _sync(target.parent)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
