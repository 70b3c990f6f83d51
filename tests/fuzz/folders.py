"""Release folders that were cut short, overwritten, or written by somebody else."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from random import Random
from shutil import rmtree
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch

from model import ranker, releases
from model.catalogue_vectors import CatalogueVectors
from model.errors import ModelError
from model.foreteller import Foreteller
from model.projection import Projection
from model.releases import Release, load_current, publish
from tests.foretelling import build_foretelling_release
from tests.fuzz.harness import Check
from tests.fuzz.mutation import json_mutated, mutated
from tests.integration.worker_process import build_tiny_release, build_turned_release

_CPU = torch.device("cpu")
_ENCODER_CHANCE = 0.03  # loading a tower takes long


def release_loader() -> Check:
    """A releases folder: CURRENT, manifest, and every part, with right and with wrong checksums."""
    torch.set_num_threads(1)
    scratch = TemporaryDirectory(prefix="penchant-fuzz-")
    good = _release(Path(scratch.name) / "good")
    files = {f.relative_to(good.path).as_posix(): f.read_bytes() for f in good.path.rglob("*.*")}
    shelf = Path(scratch.name) / "shelf"
    _write(shelf / good.id, files)
    others = [raw[:4096] for raw in files.values()]

    def check(cases: Sequence[Random]) -> int:
        keep = scratch  # as long as cases are tried
        return sum(_tried(rng, Path(keep.name) / "shelf", good.id, files, others) for rng in cases)

    return check


def _release(folder: Path) -> Release:
    """One that has all parts there are."""
    base = build_turned_release(build_tiny_release(folder), 1)
    rich = build_foretelling_release(base, 0)
    names = [f"item-{i}" for i in range(20)]
    vectors = np.eye(rich.dimensions, dtype=np.float32)[np.arange(20) % rich.dimensions]
    ranker.save_weights(ranker.first_weights(), folder / "weights")
    parts = {name: rich.path / name for name in rich.parts if name not in releases._OWN_PARTS}
    return publish(
        build_tiny_release(folder),
        Projection.load(base.path / releases.PROJECTION),
        parts=parts | {ranker.RANKER: folder / "weights"},
        item_vectors=CatalogueVectors(names, ["0123456789abcdef"] * 20, vectors),
        learned_items=True,
        transition=base.load_transition(),
        metrics={"ndcg": 0.5},
        now=datetime.now(UTC),
    )


def _write(folder: Path, files: Mapping[str, bytes]) -> None:
    for name, raw in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(raw)


def _tried(
    rng: Random, shelf: Path, name: str, files: Mapping[str, bytes], others: Sequence[bytes]
) -> int:
    folder = shelf / name
    current = name.encode()
    if rng.random() < 0.03:
        current = mutated(rng, current, others)
    (shelf / releases.CURRENT).write_bytes(current)
    touched = set(rng.choices([releases.MANIFEST, *files], k=rng.choice((1, 1, 2))))
    try:
        for each in touched:
            _damage(rng, folder / each, files[each], others)
        if rng.random() < 0.8:
            _sign(folder)
        release = load_current(shelf)
        for load in _loaders(release, rng):
            load()
    except ModelError:
        return 0
    finally:
        for each in touched:
            if (folder / each).is_dir():
                rmtree(folder / each)
        _write(folder, {each: files[each] for each in touched | {releases.MANIFEST}})
    return 1


def _loaders(release: Release, rng: Random) -> list[Callable[[], object]]:
    found: list[Callable[[], object]] = [
        release.load_item_vectors,
        release.load_transition,
        release.metrics,
        lambda: Foreteller.load(release, _CPU),
        lambda: ranker.load_weights(release.part(ranker.RANKER)),
        lambda: releases.tower_id(release),
        lambda: releases.list_releases(release.path.parent),
    ]
    if rng.random() < _ENCODER_CHANCE:
        found.append(lambda: release.load_encoder(device="cpu").encode(["red mug"]))
    return found


def _damage(rng: Random, file: Path, raw: bytes, others: Sequence[bytes]) -> None:
    way = rng.random()
    if way < 0.03:
        file.unlink()
    elif way < 0.04:
        file.unlink()
        file.mkdir()
    elif way < 0.07:
        file.write_bytes(rng.choice(others))
    elif way < 0.5 and file.suffix == ".json":
        names = list(json.loads(raw))
        file.write_bytes(json_mutated(rng, raw, names, [raw]))
    elif way < 0.7 and file.suffix == ".safetensors":
        file.write_bytes(_header_mutated(rng, raw))
    else:
        head = raw[: 1 << 16]
        file.write_bytes(mutated(rng, head, others) + (raw[len(head) :] if way < 0.95 else b""))


def _header_mutated(rng: Random, raw: bytes) -> bytes:
    """The table of tensors, or what is said of one of them; sizes as they then are."""
    size = int.from_bytes(raw[:8], "little")
    table: dict[str, Any] = json.loads(raw[8 : 8 + size])
    name = rng.choice(list(table))
    if rng.random() < 0.3:
        text = json_mutated(rng, raw[8 : 8 + size], list(table), [raw[8 : 8 + size]])
    else:
        about = json.dumps(table[name]).encode()
        changed = _nested_mutated(rng, about)
        whole = {**table, name: None}
        hole = json.dumps({name: None})[1:-1].encode()
        filled = json.dumps({name: 0})[1:-2].encode() + changed
        text = json.dumps(whole).encode().replace(hole, filled)
    return len(text).to_bytes(8, "little") + text + raw[8 + size :]


def _nested_mutated(rng: Random, about: bytes) -> bytes:
    """Metadata holds JSON of its own as text, and tensors their type, shape and place."""
    fields: dict[str, Any] = json.loads(about)
    inner = [k for k, v in fields.items() if isinstance(v, str) and v[:1] == "{"]
    if inner and rng.random() < 0.7:
        raw = fields[inner[0]].encode()
        told = json_mutated(rng, raw, list(json.loads(raw)), [raw])
        return json.dumps({**fields, inner[0]: told.decode("utf-8", "replace")}).encode()
    if "dtype" in fields and rng.random() < 0.7:
        kinds = ("F64", "F32", "F16", "BF16", "I64", "U8", "BOOL", "F8_E4M3", "C64", "U32")
        way = rng.randrange(3)
        if way == 0:
            fields["dtype"] = rng.choice(kinds)
        elif way == 1:
            fields["shape"] = fields["shape"][::-1]
        else:  # as many numbers in another shape
            count = int(np.prod(fields["shape"]))
            fields["shape"] = rng.choice(([count], [1, count], [count, 1], [], [1, 1, count]))
        return json.dumps(fields).encode()
    return json_mutated(rng, about, ["dtype", "shape", "data_offsets"], [about])


def _sign(folder: Path) -> None:
    """Checksums and space as they follow from the files, so that what is behind them is reached."""
    file = folder / releases.MANIFEST
    with suppress(
        ModelError, ValueError, OSError, RecursionError, AttributeError, TypeError, KeyError
    ):
        manifest: dict[str, Any] = json.loads(file.read_bytes())
        sums = {k: v for k, v in releases._checksums(folder).items() if k != releases.MANIFEST}
        manifest["files"] = {
            name: sums.get(name, digest) for name, digest in manifest["files"].items()
        }
        file.write_text(json.dumps(manifest))
        release = releases._release_from(folder, manifest)
        manifest["space"] = releases._space_id(
            manifest["format"], manifest["files"], release, release.learned_items
        )
        file.write_text(json.dumps(manifest))
