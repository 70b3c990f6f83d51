from __future__ import annotations

import json
import os
import shutil
import threading
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import save

from model import releases
from model.catalogue_vectors import CatalogueVectors
from model.errors import (
    EncoderSettingsInvalid,
    ReleaseCorrupt,
    ReleaseMissing,
    ReleaseTooNew,
    ReleaseUnwritable,
    WeightsUnavailable,
)
from model.projection import Projection
from model.releases import Release, build_base, load, load_current, make_current
from model.text import text_version

torch.set_num_threads(1)  # on a busy machine, threads spend their time waiting for each other

NOW = datetime(2026, 3, 1, 12, 0, tzinfo=UTC)
TEXTS = [f"{colour} {thing}" for colour in ("red", "blue") for thing in ("scarf", "mug", "lamp")]


def build(folder: Path, texts: list[str] = TEXTS, dimensions: int = 8, **settings: Any) -> Release:
    return build_base(
        folder, "bundled", texts, dimensions, device="cpu", now=settings.pop("now", NOW), **settings
    )


def rewrite(file: Path, change: Callable[[bytes], bytes]) -> None:
    """Replace a file's bytes; never in place, for it may be a hard link to the package's."""
    content = change(file.read_bytes())
    file.unlink()
    file.write_bytes(content)


def edit_manifest(release: Release, **changes: Any) -> None:
    manifest = json.loads((release.path / "manifest.json").read_text())
    text = json.dumps(manifest | changes)
    rewrite(release.path / "manifest.json", lambda _: text.encode())


@pytest.fixture(scope="module")
def shelf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A releases folder for tests that change nothing in it."""
    folder = tmp_path_factory.mktemp("releases")
    build(folder)
    return folder


@pytest.fixture
def release(shelf: Path, tmp_path: Path) -> Release:
    """A release for a test to damage: the large files are links, so see `rewrite`."""
    built = build(shelf)
    copy = shutil.copytree(built.path, tmp_path / built.id, copy_function=os.link)
    rewrite(copy / "manifest.json", lambda content: content)
    return load(copy)


def test_a_release_says_what_it_was_made_from(shelf: Path) -> None:
    release = build(shelf)
    assert (release.base, release.width, release.dimensions) == ("bundled", 384, 8)
    assert (release.pooling, release.max_tokens, release.fitted_on) == ("mean", 128, len(TEXTS))
    assert release.created_at == "2026-03-01T12:00:00+00:00"
    assert release.path == shelf / release.id
    assert len(release.space) == 16


def test_a_release_encodes_by_its_own_projection(shelf: Path) -> None:
    release = build(shelf)
    vectors = release.load_encoder(device="cpu").encode(TEXTS)
    assert vectors.shape == (len(TEXTS), 8)
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1.0, atol=1e-5)


def test_the_same_inputs_are_built_once(shelf: Path) -> None:
    def never(done: int, total: int) -> None:
        raise AssertionError("nothing should be encoded")

    again = build(shelf, [*TEXTS[::-1], *TEXTS, ""], now=datetime.now(UTC), progress=never)
    assert again == build(shelf)


def test_the_same_inputs_elsewhere_give_the_same_ids(shelf: Path, tmp_path: Path) -> None:
    elsewhere = build(tmp_path)
    assert (elsewhere.id, elsewhere.space) == (build(shelf).id, build(shelf).space)


@pytest.mark.parametrize(
    "change",
    [
        {"dimensions": 9},
        {"texts": TEXTS[1:]},
        {"pooling": "cls"},
        {"query_prefix": "query: "},
        {"passage_prefix": "passage: "},
        {"max_tokens": 64},
    ],
    ids=lambda change: next(iter(change)),
)
def test_what_changes_a_vector_changes_both_ids(shelf: Path, change: dict[str, Any]) -> None:
    base, other = build(shelf), build(shelf, **change)
    assert other.id != base.id
    assert other.space != base.space


def test_a_release_ships_the_vectors_of_the_items_it_was_fitted_on(tmp_path: Path) -> None:
    texts = [*TEXTS, TEXTS[0], ""]  # two items of one text, and one without
    ids = [f"i{n}" for n in range(len(texts))]
    release = build(tmp_path, texts, item_ids=ids)
    shipped = release.load_item_vectors()
    assert shipped is not None
    assert shipped.item_ids == ids[:-1]
    assert shipped.versions == [text_version(text) for text in texts[:-1]]
    own = release.load_encoder(device="cpu").encode(texts[:-1])
    np.testing.assert_allclose(shipped.vectors, own, atol=1e-5)
    assert load(release.path) == release
    assert build(tmp_path, texts[::-1], item_ids=ids[::-1]) == release

    plain = build(tmp_path, texts)
    assert (plain.space, plain.load_item_vectors()) == (release.space, None)
    assert len({plain.id, release.id, build(tmp_path, texts, item_ids=ids[::-1]).id}) == 3


def test_only_items_of_the_sample_are_shipped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(releases, "FIT_TEXTS", 4)
    release = build(tmp_path, item_ids=TEXTS)
    shipped = release.load_item_vectors()
    assert shipped is not None
    assert (release.fitted_on, len(shipped)) == (4, 4)


def test_a_release_needs_no_catalogue(tmp_path: Path) -> None:
    release = build(tmp_path, texts=[], dimensions=384)
    plain = np.array([[1.0] + [0.0] * 383], dtype=np.float32)
    assert release.fitted_on == 0
    assert Projection.load(release.path / "projection.safetensors").apply(plain).shape == (1, 384)


def test_progress_reaches_the_end(tmp_path: Path) -> None:
    told: list[tuple[int, int]] = []
    build(tmp_path, progress=lambda done, total: told.append((done, total)))
    assert told[-1] == (len(TEXTS), len(TEXTS))


def test_of_many_builders_at_once_one_builds(tmp_path: Path) -> None:
    fits: list[int] = []
    built: list[Release] = []

    def one() -> None:
        built.append(build(tmp_path, progress=lambda done, total: fits.append(done)))

    builders = [threading.Thread(target=one) for _ in range(3)]
    for builder in builders:
        builder.start()
    for builder in builders:
        builder.join()
    assert len(built) == 3
    assert len(set(built)) == 1
    assert fits == [len(TEXTS)]


def test_what_a_killed_builder_left_is_removed(tmp_path: Path) -> None:
    leftover = tmp_path / ".building-base-0000000000000000"
    (leftover / "encoder").mkdir(parents=True)
    build(tmp_path)
    assert not leftover.exists()


def test_a_build_that_fails_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_room(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Projection, "save", no_room)
    with pytest.raises(ReleaseUnwritable, match="No space left on device"):
        build(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [".lock"]


def test_weights_take_no_room_twice_and_are_copied_where_they_cannot_be_linked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    linked = build(tmp_path / "linked")

    def cannot(*_: Any) -> None:
        raise OSError(18, "Invalid cross-device link")

    monkeypatch.setattr(releases.os, "link", cannot)
    copied = build(tmp_path / "copied")
    assert (copied.path / "encoder/model.safetensors").stat().st_nlink == 1
    assert (copied.id, copied.space) == (linked.id, linked.space)


def test_a_folder_that_cannot_be_written_says_so(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ReleaseUnwritable, match=r"file .*set MODEL_RELEASES"):
        build(tmp_path / "file")


def test_more_dimensions_than_the_base_has_are_refused(tmp_path: Path) -> None:
    with pytest.raises(EncoderSettingsInvalid, match=r"385 dimensions .* this base has 384"):
        build(tmp_path, dimensions=385)


def test_a_base_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(WeightsUnavailable, match="absent"):
        build_base(tmp_path, tmp_path / "absent", TEXTS, 8, now=NOW)


def test_only_the_pointer_makes_a_release_live(tmp_path: Path) -> None:
    first, second = build(tmp_path), build(tmp_path, dimensions=9)
    with pytest.raises(ReleaseMissing, match="no release is live"):
        load_current(tmp_path)
    make_current(first)
    assert load_current(tmp_path) == first
    make_current(second)
    assert load_current(tmp_path) == second
    make_current(first)
    assert load_current(tmp_path) == first
    assert [path.name for path in tmp_path.glob(".CURRENT*")] == []


def test_no_releases_folder_is_no_release(tmp_path: Path) -> None:
    with pytest.raises(ReleaseMissing, match="build a base release"):
        load_current(tmp_path / "absent")


@pytest.mark.parametrize("name", ["", "../elsewhere", "/etc", "a b", "\udcff"])
def test_a_pointer_that_names_no_release_is_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / "CURRENT").write_bytes(name.encode("utf-8", "surrogateescape"))
    with pytest.raises(ReleaseCorrupt, match="does not name a release"):
        load_current(tmp_path)


def test_a_pointer_to_a_release_that_went_says_so(tmp_path: Path) -> None:
    (tmp_path / "CURRENT").write_text("base-0123456789abcdef\n")
    with pytest.raises(ReleaseMissing, match="base-0123456789abcdef"):
        load_current(tmp_path)


@pytest.mark.parametrize(
    "file", ["encoder/model.safetensors", "encoder/tokenizer.json", "projection.safetensors"]
)
@pytest.mark.parametrize("damage", ["flipped", "cut", "gone"])
def test_a_file_that_is_not_what_it_was_is_noticed(
    release: Release, file: str, damage: str
) -> None:
    if damage == "gone":
        (release.path / file).unlink()
    elif damage == "cut":
        rewrite(release.path / file, lambda content: content[:-1])
    else:
        rewrite(release.path / file, lambda content: content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(ReleaseCorrupt, match=rf"{file} .*delete the folder and build"):
        load(release.path)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"format": "one"}, "no known format"),
        ({"format": 0}, "no known format"),
        ({"dimensions": "8"}, "lacks dimensions"),
        ({"space": None}, "lacks space"),
        ({"dimensions": 16}, "maps 384 to 8"),
        ({"query_prefix": "query: "}, "space id does not follow"),
        ({"files": {}}, "lists no files"),
        ({"files": {"../../secret": "0"}}, "odd name"),
    ],
)
def test_a_manifest_that_does_not_hold_is_noticed(
    release: Release, changes: dict[str, Any], said: str
) -> None:
    edit_manifest(release, **changes)
    with pytest.raises(ReleaseCorrupt, match=said):
        load(release.path)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\xff", b"[" * 100_000])
def test_a_manifest_that_cannot_be_read_is_noticed(release: Release, content: bytes) -> None:
    rewrite(release.path / "manifest.json", lambda _: content)
    with pytest.raises(ReleaseCorrupt, match=r"manifest\.json"):
        load(release.path)


@pytest.mark.parametrize("file", ["projection.safetensors", "item_vectors.safetensors"])
def test_numbers_of_a_type_that_numpy_has_not_are_noticed(tmp_path: Path, file: str) -> None:
    release = build(tmp_path, item_ids=TEXTS)
    rewrite(release.path / file, as_float8)
    sign(release)
    with pytest.raises(ReleaseCorrupt, match=rf"{file} cannot be read"):
        load(release.path)


def as_float8(raw: bytes) -> bytes:
    """The first tensor of a file as four times as many numbers of a byte each."""
    size = int.from_bytes(raw[:8], "little")
    table = json.loads(raw[8 : 8 + size])
    about = next(about for about in table.values() if about["dtype"] == "F32")
    about |= {"dtype": "F8_E4M3", "shape": [4 * about["shape"][0], *about["shape"][1:]]}
    text = json.dumps(table).encode()
    return len(text).to_bytes(8, "little") + text + raw[8 + size :]


def sign(release: Release) -> None:
    """Checksums as they follow from the files."""
    sums = releases._checksums(release.path)
    edit_manifest(release, files={k: v for k, v in sums.items() if k != "manifest.json"})


def test_ends_of_ids_that_are_no_whole_numbers_are_refused(tmp_path: Path) -> None:
    tensors = {
        "ids": np.frombuffer(b"ab", np.uint8),
        "id_ends": np.array([1.0, 2.0]),
        "versions": np.zeros((2, 8), np.uint8),
        "vectors": np.eye(2, dtype=np.float32),
    }
    for ends in (tensors["id_ends"], np.array(2, np.int64)):
        (tmp_path / "v").write_bytes(save(tensors | {"id_ends": ends}))
        with pytest.raises(ValueError, match="ids or versions"):
            CatalogueVectors.load(tmp_path / "v")


def test_a_file_left_out_of_the_manifest_is_not_trusted(release: Release) -> None:
    manifest = json.loads((release.path / "manifest.json").read_text())
    del manifest["files"]["projection.safetensors"]
    edit_manifest(release, files=manifest["files"])
    with pytest.raises(ReleaseCorrupt, match=r"lists no projection\.safetensors"):
        load(release.path)


def test_a_later_format_asks_for_an_upgrade(release: Release) -> None:
    edit_manifest(release, format=3, something_new=True)
    with pytest.raises(ReleaseTooNew, match="format 3, this process reads up to 2; upgrade"):
        load(release.path)


def test_a_release_may_be_moved(release: Release, tmp_path: Path) -> None:
    moved = release.path.rename(tmp_path / "elsewhere")
    assert load(moved).space == release.space
