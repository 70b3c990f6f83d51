"""Release folders: what an engine loads, written whole or not at all.

    RELEASES/
      CURRENT                     the name of the live release, replaced atomically
      base-0123456789abcdef/
        manifest.json             format, ids, encoder settings, SHA-256 of every file
        encoder/                  the tower: config, tokenizer, safetensors
        projection.safetensors    the linear map from the tower's width to D
        item_vectors.safetensors  ids, text versions, vectors, of the items it was fitted on
      trained-0123456789abcdef/   those, and what training adds:
        item_vectors.safetensors  those of the whole catalogue
        transition.safetensors    the maps from the parent's space to this one and back
        metrics.json              the figures it was accepted on
        window_encoder.safetensors, …: parts that this module does not look into
    HOLD                          where it is, the trainer moves CURRENT no more; see `rollback`
    HISTORY                       a line of JSON per move of CURRENT
    DECISIONS                     a line of JSON per verdict of the gate, rejections too
    PRUNED/trained-…/             what is kept of old releases: manifest and transition

A release is built beside its name, synced, and renamed to it; a crash leaves a
`.building-…` folder that the next build removes. Nothing in a release ever changes.

A *space* is the id of what a vector means: weights, tokenizer, pooling, prefixes, the
cut at `max_tokens` and the projection; and the item vectors, where they say more than
their texts do. Vectors of two spaces are never compared.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import re
import shutil
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError

from .catalogue_vectors import ITEM_VECTORS, CatalogueVectors
from .encoder import TOWER_FILES, DType, Pooling, TextEncoder, tower_folder
from .errors import (
    EncoderSettingsInvalid,
    ReleaseCorrupt,
    ReleaseMissing,
    ReleaseOvertaken,
    ReleaseTooNew,
    ReleaseUnwritable,
)
from .projection import FIT_TEXTS, FIT_VERSION, Projection, fit_projection
from .text import text_version
from .transition import Transition

BASE_FORMAT: Final = 1
FORMAT_VERSION: Final = 2  # 1 knows no parts beside encoder and projection

CURRENT = "CURRENT"
HOLD = "HOLD"
HISTORY = "HISTORY"
DECISIONS = "DECISIONS"
PRUNED = "PRUNED"
MANIFEST = "manifest.json"
ENCODER = "encoder"
PROJECTION = "projection.safetensors"
TRANSITION = "transition.safetensors"
METRICS = "metrics.json"
_OWN_PARTS: Final = (MANIFEST, PROJECTION, ITEM_VECTORS, TRANSITION, METRICS)

# No dots and no slashes: a name in CURRENT or in a manifest cannot leave the folder.
_RELEASE_NAME = re.compile(r"[a-z0-9][a-z0-9-]{0,80}")
_FILE_NAME = re.compile(r"(encoder/)?[A-Za-z0-9_][A-Za-z0-9_.-]{0,100}")

# What reading a file of tensors or of JSON raises where it is none of ours. AttributeError: numbers
# of a type that numpy does not have.
_UNREADABLE: Final = (
    SafetensorError, ValueError, TypeError, AttributeError, OSError, RecursionError,
)  # fmt: skip

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
    parent: str = ""
    """The release that this one was trained from; "" for a base release."""
    learned_items: bool = False
    """The item vectors hold more than their texts say, and are part of what the space means."""
    parts: tuple[str, ...] = ()
    """File names beside encoder and projection."""

    def part(self, name: str) -> Path:
        """The file of a part. Raises ReleaseMissing where this release has no such part."""
        if name not in self.parts:
            raise ReleaseMissing(f"{self.path} has no {name}: train a release that has one")
        return self.path / name

    def load_item_vectors(self) -> CatalogueVectors | None:
        """The vectors of the catalogue, where the trainer shipped them."""
        if ITEM_VECTORS not in self.parts:
            return None
        return CatalogueVectors.load(self.path / ITEM_VECTORS)

    def load_transition(self) -> Transition | None:
        """The maps between the parent's space and this one; None where they are one space."""
        if TRANSITION not in self.parts:
            return None
        try:
            return Transition.load(self.path / TRANSITION)
        except FileNotFoundError:  # pruned since its manifest was read
            return Transition.load(self.path.parent / PRUNED / self.id / TRANSITION)

    def metrics(self) -> dict[str, Any]:
        """The figures it was accepted on; {} for a base release."""
        if METRICS not in self.parts:
            return {}
        found: dict[str, Any] = json.loads((self.path / METRICS).read_text(encoding="utf-8"))
        return found

    def load_encoder(
        self, *, device: str = "auto", dtype: DType = "auto", projected: bool = True
    ) -> TextEncoder:
        """The encoder of this release; not `projected`, its rows are as wide as the tower.

        Raises as `TextEncoder.from_pretrained` does.
        """
        return TextEncoder.from_pretrained(
            self.path / ENCODER,
            device=device,
            dtype=dtype,
            max_tokens=self.max_tokens,
            pooling=self.pooling,
            query_prefix=self.query_prefix,
            passage_prefix=self.passage_prefix,
            projection=Projection.load(self.path / PROJECTION) if projected else None,
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
    item_ids: Sequence[str] = (),
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

    `item_ids`, where given, name the item of each text (of one named twice the last text counts):
    the release then ships the vectors of the items it was fitted on, so that no worker encodes
    them again.

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
    items = _items_of(texts, dict(zip(item_ids, catalogue_texts, strict=True) if item_ids else ()))
    target = releases_dir / _base_id(recipe, texts, items)
    if not target.exists():
        with _writable(releases_dir), _sole_builder(releases_dir):
            if not target.exists():  # else it was built while this process waited
                _build(target, recipe, texts, items, device, now, progress)
    return load(target)


def publish(
    parent: Release,
    projection: Projection,
    *,
    encoder: Path | None = None,
    parts: Mapping[str, Path] | None = None,
    item_vectors: CatalogueVectors | None = None,
    learned_items: bool = False,
    transition: Transition | None = None,
    metrics: Mapping[str, Any] | None = None,
    now: datetime,
) -> Release:
    """Put a trained release beside its parent; CURRENT is left alone, see `make_current`.

    `encoder` is the folder of a tower that was trained too; without it the parent's serves.
    `parts` are files that go in as they are: name -> file. `learned_items` says that the item
    vectors hold more than their texts say. `transition` leads from the parent's space to the
    new one, whose id it need not know yet.

    Either the whole release is there afterwards or nothing of it. The same content gives the
    same release. Raises ReleaseUnwritable (a full disk, too), ValueError for parts that do not
    fit each other, and what `load` raises.
    """
    parts = parts or {}
    for name in parts:
        if name in _OWN_PARTS or not _FILE_NAME.fullmatch(name) or "/" in name:
            raise ValueError(f"{name!r} cannot be the name of a part")
    if learned_items and item_vectors is None:
        raise ValueError("learned_items without item_vectors")
    if item_vectors is not None and item_vectors.vectors.shape[1] != projection.dimensions:
        raise ValueError(
            f"item vectors have {item_vectors.vectors.shape[1]} dimensions, "
            f"the projection gives {projection.dimensions}"
        )
    folder = parent.path.parent
    with _writable(folder), _sole_builder(folder), _building(folder / "trained") as draft:
        if encoder is None:
            _link_tower(parent.path / ENCODER, draft.folder / ENCODER)
        else:
            _copy_tower(encoder, draft.folder / ENCODER)
        projection.save(draft.folder / PROJECTION)
        for name, file in parts.items():
            shutil.copyfile(file, draft.folder / name)
        if item_vectors is not None:
            item_vectors.save(draft.folder / ITEM_VECTORS)
        files = _checksums(draft.folder)
        space = _space_id(FORMAT_VERSION, files, parent, learned_items)
        if transition is not None and space != parent.space:
            replace(transition, from_space=parent.space, to_space=space).save(
                draft.folder / TRANSITION
            )
        if metrics is not None:
            text = json.dumps(metrics, indent=2, sort_keys=True, ensure_ascii=False) + "\n"
            (draft.folder / METRICS).write_text(text, encoding="utf-8")
        files = _checksums(draft.folder)
        name = f"trained-{_digest({'parent': parent.id, 'files': files})}"
        release = replace(
            parent,
            path=folder / name,
            id=name,
            space=space,
            width=projection.width,
            dimensions=projection.dimensions,
            created_at=now.isoformat(),
            parent=parent.id,
            learned_items=learned_items,
        )
        _write_manifest(draft.folder, release, FORMAT_VERSION)
        draft.target = release.path
    return load(release.path)


@dataclass(frozen=True)
class Move:
    """One move of CURRENT."""

    at: str
    before: str  # release id; "" where none was live
    release: str
    why: str


def make_current(
    release: Release,
    *,
    expected: str | None = None,
    why: str = "promoted",
    now: datetime | None = None,
) -> None:
    """Make `release` the live one of its releases folder, atomically, and note it in HISTORY.

    `expected` is the id of the release that must still be live: of two trainers that made
    their candidates from one release, the second is told so. Raises ReleaseOvertaken then,
    ReleaseMissing where it is there no more, and ReleaseUnwritable.
    """
    folder = release.path.parent
    at = (now or datetime.now(UTC)).isoformat()
    with _writable(folder), _sole_builder(folder, ".lock-current"):
        peek(release.path)  # it may have been pruned since it was loaded
        before = _named(folder)
        if expected is not None and before != expected:
            raise ReleaseOvertaken(
                f"{before or 'no release'} is live in {folder}, not {expected}, which "
                f"{release.id} was measured against: train from the live release"
            )
        _replace_file(folder / CURRENT, release.path.name + "\n")
        if before != release.path.name:
            _append_line(folder / HISTORY, asdict(Move(at, before, release.path.name, why)))


def history(releases_dir: Path) -> list[Move]:
    """The moves of CURRENT, oldest first. A line that a crash cut short is passed over."""
    return [
        Move(**{f.name: str(line.get(f.name, "")) for f in fields(Move)})
        for line in _read_lines(releases_dir / HISTORY)
    ]


def rollback(releases_dir: Path, *, now: datetime | None = None) -> Release:
    """Make the release live that was before the current one, and again the one before that; and put
    a hold on it, for the trainer would learn from the same events what was just taken back.

    Raises ReleaseMissing where there is none, and what `load` raises; then nothing moved.
    """
    live: list[str] = []  # those that rolling back would return to, the current one last
    for move in history(releases_dir):
        if move.why == ROLLED_BACK and move.release in live:
            del live[live.index(move.release) + 1 :]
        else:
            live = live or ([move.before] if move.before else [])
            live.append(move.release)
    current = _named(releases_dir)
    while live and live[-1] == current:
        live.pop()
    if not live:
        raise ReleaseMissing(
            f"{releases_dir} has no release to go back to: {HISTORY} names none before "
            f"{current or 'the first'}"
        )
    release = load(releases_dir / live[-1])
    _put_hold(
        releases_dir, Hold((now or datetime.now(UTC)).isoformat(), f"{current} {ROLLED_BACK}")
    )
    make_current(release, expected=current, why=ROLLED_BACK, now=now)
    return release


ROLLED_BACK: Final = "rolled back"


@dataclass(frozen=True)
class Hold:
    """What keeps the trainer from making its candidates live."""

    at: str
    why: str


def _put_hold(releases_dir: Path, hold: Hold) -> None:
    with _writable(releases_dir):
        _replace_file(releases_dir / HOLD, json.dumps(asdict(hold), ensure_ascii=False) + "\n")


def held(releases_dir: Path) -> Hold | None:
    """The hold on these releases, if there is one: any file of that name is."""
    file = releases_dir / HOLD
    try:
        text, since_s = file.read_text(encoding="utf-8", errors="replace"), file.stat().st_mtime
    except (FileNotFoundError, NotADirectoryError):
        return None
    try:
        return Hold(**json.loads(text))
    except (ValueError, TypeError, RecursionError):
        at = datetime.fromtimestamp(since_s, UTC).isoformat(timespec="seconds")
        return Hold(at, f"there is a file {HOLD}")


def resume(releases_dir: Path) -> Hold | None:
    """Take the hold away; what it was. Raises ReleaseUnwritable."""
    hold = held(releases_dir)
    if hold is not None:
        with _writable(releases_dir):
            (releases_dir / HOLD).unlink(missing_ok=True)
            _sync(releases_dir)
    return hold


def prune(releases_dir: Path, keep: int) -> list[str]:
    """Delete all but the `keep` releases that were made or live last, and the live one; the ids of
    those that went, of which the maps stay, for profiles may still live in their spaces.

    Each goes at once, by a rename; what cannot be read is left alone. Raises ReleaseUnwritable.
    """
    with (
        _writable(releases_dir),
        _sole_builder(releases_dir),
        _sole_builder(releases_dir, ".lock-current"),
    ):
        for leftover in releases_dir.glob(".pruned-*"):  # of a process that was killed
            shutil.rmtree(leftover)
        at = {r.id: r.created_at for x in list_releases(releases_dir) if (r := x.release)}
        for move in history(releases_dir):
            at |= {i: max(at[i], move.at) for i in (move.before, move.release) if i in at}
        current = _named(releases_dir)
        newest_first = sorted(at, key=lambda i: (i == current, at[i]), reverse=True)
        gone = newest_first[keep:] if current in at else []
        for name in gone:
            _keep_map(releases_dir / name)
            aside = releases_dir / f".pruned-{name}"
            (releases_dir / name).rename(aside)
            _sync(releases_dir)
            shutil.rmtree(aside)
    return gone


def _keep_map(path: Path) -> None:
    kept = path.parent / PRUNED / path.name
    if kept.exists():
        return
    kept.parent.mkdir(exist_ok=True)
    with _building(kept) as draft:
        for name in (MANIFEST, TRANSITION):
            if (path / name).exists():
                shutil.copyfile(path / name, draft.folder / name)


def releases_by_id(releases_dir: Path) -> dict[str, Release]:
    """Every release whose manifest can be read, those included of which only the map is left."""
    # In this order: what is pruned meanwhile is in the second when it is no longer in the first.
    found = [*list_releases(releases_dir), *list_releases(releases_dir / PRUNED)]
    return {x.id: x.release for x in reversed(found) if x.release}


def record_decision(releases_dir: Path, decision: Mapping[str, Any]) -> str:
    """Note a verdict of the gate, with all its figures; its id. Raises ReleaseUnwritable."""
    with _writable(releases_dir), _sole_builder(releases_dir, ".lock-current"):
        _append_line(releases_dir / DECISIONS, decision)
    return _verdict_id(decision)


def decisions(releases_dir: Path) -> list[dict[str, Any]]:
    """The verdicts of the gate, oldest first, each with an `id` that follows from what it says."""
    return [{"id": _verdict_id(d), **d} for d in _read_lines(releases_dir / DECISIONS)]


def _verdict_id(decision: Mapping[str, Any]) -> str:
    return f"verdict-{_digest(decision)}"


@dataclass(frozen=True)
class Listed:
    """What a releases folder holds under one name, with its manifest taken at its word."""

    id: str
    release: Release | None
    problem: str = ""  # why it cannot be read; "" where it can
    current: bool = False


def list_releases(releases_dir: Path) -> list[Listed]:
    """Everything that looks like a release, oldest first; checksums are left for `load`."""
    current, found = _named(releases_dir), list[Listed]()
    for path in sorted(releases_dir.iterdir()) if releases_dir.is_dir() else ():
        if not path.is_dir() or not _RELEASE_NAME.fullmatch(path.name):
            continue
        try:
            release, problem = peek(path), ""
        except (ReleaseCorrupt, ReleaseTooNew) as error:
            release, problem = None, str(error)
        except ReleaseMissing:  # pruned just now
            continue
        found.append(Listed(path.name, release, problem, path.name == current))
    if current and all(listed.id != current for listed in found):
        found.append(Listed(current, None, f"{CURRENT} names it, and it is not there", True))
    return sorted(found, key=lambda x: (x.release.created_at if x.release else "", x.id))


def current_name(releases_dir: Path) -> str:
    """The name in CURRENT. Raises ReleaseMissing and ReleaseCorrupt."""

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
    return name


def load_current(releases_dir: Path) -> Release:
    """The live release, verified. Raises ReleaseMissing where there is none, and as `load`."""
    return load(releases_dir / current_name(releases_dir))


def _named(releases_dir: Path) -> str:
    """The name in CURRENT, "" where there is none that could be a release."""
    try:
        return current_name(releases_dir)
    except (ReleaseMissing, ReleaseCorrupt):
        return ""


def load(path: Path) -> Release:
    """Read the release at `path` and check its format, files, checksums and shapes.

    Raises ReleaseMissing, ReleaseTooNew and ReleaseCorrupt.
    """
    manifest, release = _peeked(path)
    files = _verified_files(path, manifest)
    _check_shapes(release)
    if release.space != _space_id(manifest["format"], files, release, release.learned_items):
        raise _corrupt(path, "its space id does not follow from its files")
    return release


def tower_id(release: Release) -> str:
    """Of what the tower makes of a text, before any projection: the same for releases whose
    towers, and ways of reading, are the same. Raises ReleaseCorrupt."""
    files = _read_manifest(release.path)["files"]
    tower = {name: digest for name, digest in files.items() if name.startswith(f"{ENCODER}/")}
    return _digest({"tower": tower, "reading": _reading(release)})


def peek(path: Path) -> Release:
    """What the manifest at `path` says, without a look at the files. Raises as `load`."""
    return _peeked(path)[1]


def _peeked(path: Path) -> tuple[dict[str, Any], Release]:
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
    if version not in range(BASE_FORMAT, FORMAT_VERSION + 1):
        raise _corrupt(path, f"{MANIFEST} has no known format")
    return manifest, _release_from(path, manifest)


def _build(
    target: Path,
    recipe: _Recipe,
    texts: Sequence[str],
    items: Mapping[str, int],
    device: str,
    now: datetime,
    progress: Progress,
) -> None:
    encoder = recipe.encoder(device)
    vectors = _encoded(encoder, recipe.dimensions, texts, progress)
    projection = fit_projection(vectors, recipe.dimensions)
    version = FORMAT_VERSION if items else BASE_FORMAT
    with _building(target) as draft:
        _link_tower(recipe.source, draft.folder / ENCODER)
        projection.save(draft.folder / PROJECTION)
        if items:
            rows = list(items.values())
            CatalogueVectors(
                list(items), [text_version(texts[row]) for row in rows],
                projection.apply(vectors[rows]),
            ).save(draft.folder / ITEM_VECTORS)  # fmt: skip
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
        files = _checksums(draft.folder)
        release = replace(release, space=_space_id(version, files, release, False))
        _write_manifest(draft.folder, release, version)


def _encoded(
    encoder: TextEncoder, dimensions: int, texts: Sequence[str], progress: Progress
) -> npt.NDArray[np.float32]:
    """Unit rows (n, W), of which `dimensions` can be fitted."""
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
    return vectors


def _texts_to_fit_on(catalogue_texts: Sequence[str]) -> list[str]:
    """At most FIT_TEXTS different texts, a fair draw that any process repeats.

    Sorted by their hashes, the head of a catalogue of any order is a random sample of it.
    """
    by_version = {text_version(text): text for text in catalogue_texts if text.strip()}
    return [by_version[version] for version in sorted(by_version)[:FIT_TEXTS]]


def _items_of(texts: Sequence[str], text_of: Mapping[str, str]) -> dict[str, int]:
    """item id -> row of its text among `texts`, of those that have one there, in the order of
    the ids."""
    row_of = {text: row for row, text in enumerate(texts)}
    return {item: row_of[text] for item, text in sorted(text_of.items()) if text in row_of}


def _base_id(recipe: _Recipe, texts: Sequence[str], items: Mapping[str, int]) -> str:
    inputs: dict[str, Any] = {
        "format": BASE_FORMAT,
        "fit": FIT_VERSION,
        "tower": {file.name: _sha256(file) for file in _tower_files(recipe.source)},
        "dimensions": recipe.dimensions,
        "reading": _reading(recipe),
        "texts": _digest(list(map(text_version, texts))),
    }
    if items:
        inputs["items"] = _digest(items)
    return f"base-{_digest(inputs)}"


def _space_id(version: int, files: dict[str, str], release: Release, learned_items: bool) -> str:
    if version > BASE_FORMAT:  # the first format has no other files
        means = {f: digest for f, digest in files.items() if _gives_meaning(f, learned_items)}
    else:
        means = files
    return _digest({"files": means, "reading": _reading(release)})


def _gives_meaning(file: str, learned_items: bool) -> bool:
    """Whether a vector would mean something else if this file were another. So a release that
    only has another window encoder keeps its parent's space, and no profile has to move."""
    if file == ITEM_VECTORS:
        return learned_items
    return file == PROJECTION or file.startswith(f"{ENCODER}/")


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


def _copy_tower(source: Path, folder: Path) -> None:
    """Copies: a trainer may write into its own files again."""
    folder.mkdir()
    for file in _tower_files(source):
        shutil.copyfile(file, folder / file.name)


def _read_manifest(path: Path) -> dict[str, Any]:
    try:
        manifest = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise _corrupt(path, f"{MANIFEST} cannot be read") from error
    if not isinstance(manifest, dict):
        raise _corrupt(path, f"{MANIFEST} is no JSON object")
    return manifest


def _checksums(folder: Path) -> dict[str, str]:
    return {
        file.relative_to(folder).as_posix(): _sha256(file)
        for file in sorted(folder.rglob("*"))
        if file.is_file()
    }


# Of these a format 1 manifest knows nothing: they have their defaults there.
_TRAINED: Final = ("parent", "learned_items")


def _write_manifest(folder: Path, release: Release, version: int) -> None:
    left_out = {"path", "parts", *(_TRAINED if version == BASE_FORMAT else ())}
    about = {k: v for k, v in asdict(release).items() if k not in left_out}  # it may be moved
    manifest = about | {"format": version, "files": _checksums(folder)}
    text = json.dumps(manifest, indent=2, ensure_ascii=False) + "\n"
    (folder / MANIFEST).write_text(text, encoding="utf-8")


def _release_from(path: Path, manifest: dict[str, Any]) -> Release:
    types: dict[str, type] = {field.name: str for field in fields(Release)}
    types |= dict.fromkeys(("width", "dimensions", "max_tokens", "fitted_on"), int)
    types["learned_items"] = bool
    for name in ("path", "parts", *(_TRAINED if manifest["format"] == BASE_FORMAT else ())):
        del types[name]
    for name, kind in types.items():
        if not isinstance(manifest.get(name), kind):
            raise _corrupt(path, f"{MANIFEST} lacks {name}")
    files = manifest.get("files")
    if not isinstance(files, dict) or not files:
        raise _corrupt(path, f"{MANIFEST} lists no files")
    parts = tuple(sorted(f for f in files if "/" not in f and f != PROJECTION))
    return Release(path=path, parts=parts, **{name: manifest[name] for name in types})


def _verified_files(path: Path, manifest: dict[str, Any]) -> dict[str, str]:
    files: dict[str, str] = manifest["files"]
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
    except _UNREADABLE as error:
        raise _corrupt(release.path, f"{PROJECTION} cannot be read ({error})") from error
    if (projection.width, projection.dimensions) != (release.width, release.dimensions):
        raise _corrupt(
            release.path,
            f"it maps {projection.width} to {projection.dimensions}, "
            f"{MANIFEST} says {release.width} to {release.dimensions}",
        )
    try:
        what = ITEM_VECTORS
        items = release.load_item_vectors()
        what = TRANSITION
        transition = release.load_transition()
        what = METRICS
        release.metrics()
    except _UNREADABLE as error:
        raise _corrupt(release.path, f"{what} cannot be read ({error})") from error
    if items is not None and items.vectors.shape[1] != release.dimensions:
        raise _corrupt(release.path, f"{ITEM_VECTORS} has {items.vectors.shape[1]} dimensions")
    if release.learned_items and items is None:
        raise _corrupt(release.path, f"it lacks {ITEM_VECTORS}, which its space depends on")
    if transition is not None and (
        transition.to_space != release.space or transition.forward.shape[1] != release.dimensions
    ):
        raise _corrupt(release.path, f"{TRANSITION} leads to another space")


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
def _sole_builder(releases_dir: Path, name: str = ".lock") -> Iterator[None]:
    """Wait for any other builder; the kernel lets go of the lock of one that dies."""
    with (releases_dir / name).open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


@dataclass
class _Draft:
    folder: Path
    target: Path  # where it goes, which may be settled last


@contextmanager
def _building(target: Path) -> Iterator[_Draft]:
    """A folder that becomes `target` when the body is done, and leaves nothing if it fails."""
    for leftover in target.parent.glob(".building-*"):  # of a builder that was killed
        shutil.rmtree(leftover)
    draft = _Draft(target.parent / f".building-{target.name}", target)
    draft.folder.mkdir()
    try:
        yield draft
        for path in (*draft.folder.rglob("*"), draft.folder):
            _sync(path)
        if draft.target.exists():  # the same content, published before
            shutil.rmtree(draft.folder)
        else:
            draft.folder.rename(draft.target)
        _sync(draft.target.parent)
    except BaseException:
        shutil.rmtree(draft.folder, ignore_errors=True)
        raise


def _replace_file(file: Path, text: str) -> None:
    draft = file.parent / f".{file.name}-{uuid.uuid4().hex[:8]}"
    try:
        draft.write_text(text, encoding="utf-8")
        _sync(draft)
        draft.replace(file)
    finally:
        draft.unlink(missing_ok=True)
    _sync(file.parent)


def _append_line(file: Path, value: Mapping[str, Any]) -> None:
    with file.open("a+b") as stream:
        # After a crash the last line may lack its end; the next must not run into it.
        end = stream.seek(0, os.SEEK_END)
        torn = b""
        if end:
            stream.seek(end - 1)
            torn = b"" if stream.read(1) == b"\n" else b"\n"
        stream.write(torn + json.dumps(value, ensure_ascii=False).encode() + b"\n")
        stream.flush()
        os.fsync(stream.fileno())


def _read_lines(file: Path) -> list[dict[str, Any]]:
    try:
        lines = file.read_text(encoding="utf-8", errors="replace").splitlines()
    except FileNotFoundError:
        return []
    found = []
    for line in lines:
        try:
            value = json.loads(line)
        except ValueError:
            continue
        if isinstance(value, dict):
            found.append(value)
    return found


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
