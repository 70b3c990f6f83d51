"""Trained releases: published whole or not at all, moved to and back, refused when damaged."""

from __future__ import annotations

import json
import os
import resource
import shutil
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from model import releases
from model.catalogue_vectors import CatalogueVectors
from model.errors import (
    ReleaseCorrupt,
    ReleaseMissing,
    ReleaseOvertaken,
    ReleaseTooNew,
    ReleaseUnwritable,
)
from model.projection import Projection, unit_rows
from model.releases import (
    Hold,
    Release,
    build_base,
    decisions,
    held,
    history,
    list_releases,
    load,
    load_current,
    make_current,
    prune,
    publish,
    record_decision,
    releases_by_id,
    resume,
    rollback,
)
from model.text import text_version
from model.transition import fit_transition

torch.set_num_threads(1)  # on a busy machine, threads spend their time waiting for each other

NOW = datetime(2026, 3, 1, 12, 0, tzinfo=UTC)
TEXTS = [f"{colour} {thing}" for colour in ("red", "blue") for thing in ("scarf", "mug", "lamp")]
DIMENSIONS = 8


@pytest.fixture(scope="module")
def origin(tmp_path_factory: pytest.TempPathFactory) -> Release:
    folder = tmp_path_factory.mktemp("releases")
    return build_base(folder, "bundled", TEXTS, DIMENSIONS, device="cpu", now=NOW)


@pytest.fixture
def base(origin: Release, tmp_path: Path) -> Release:
    """A base release in a releases folder of the test's own; its large files are links."""
    copy = shutil.copytree(origin.path, tmp_path / "releases" / origin.id, copy_function=os.link)
    return load(copy)


def projection(base: Release, seed: int = 1) -> Projection:
    old = Projection.load(base.path / "projection.safetensors")
    turn, _ = np.linalg.qr(np.random.default_rng(seed).standard_normal((DIMENSIONS,) * 2))
    return replace(old, matrix=np.asarray(old.matrix @ turn, dtype=np.float32))


def vectors(seed: int = 1, count: int = 6, dimensions: int = DIMENSIONS) -> CatalogueVectors:
    rows = unit_rows(np.random.default_rng(seed).standard_normal((count, dimensions)))
    ids = [f"Ä-{i}" for i in range(count)]
    return CatalogueVectors(ids, [text_version(i) for i in ids], rows)


def train(base: Release, seed: int = 1, **changes: Any) -> Release:
    old, new = vectors(0), vectors(seed)
    options: dict[str, Any] = {
        "item_vectors": new,
        "transition": fit_transition("", "", old.vectors, new.vectors),
        "metrics": {"recall@20": 0.25 + seed},
        "now": NOW,
    }
    return publish(base, projection(base, seed), **options | changes)


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir() if not path.name.startswith(".lock")}


def damage(file: Path, content: bytes) -> None:
    """Never in place, for it may be a hard link."""
    file.unlink()
    file.write_bytes(content)


def test_a_trained_release_carries_its_parts(base: Release, tmp_path: Path) -> None:
    window_encoder = tmp_path / "w"
    window_encoder.write_bytes(b"opaque")
    release = train(base, parts={"window_encoder.safetensors": window_encoder})
    assert release.parent == base.id
    assert release.part("window_encoder.safetensors").read_bytes() == b"opaque"
    shipped = release.load_item_vectors()
    assert shipped is not None
    assert shipped.item_ids == vectors().item_ids
    np.testing.assert_array_equal(shipped.vectors, vectors().vectors)
    transition = release.load_transition()
    assert transition is not None
    assert (transition.from_space, transition.to_space) == (base.space, release.space)
    assert release.metrics() == {"recall@20": 1.25}
    assert load(release.path) == release
    assert release.load_encoder(device="cpu").encode(["red mug"]).shape == (1, DIMENSIONS)


def test_a_base_release_has_none_of_them(base: Release) -> None:
    assert (base.load_item_vectors(), base.load_transition(), base.metrics()) == (None, None, {})
    with pytest.raises(ReleaseMissing, match=r"has no heads\.safetensors"):
        base.part("heads.safetensors")


def test_another_projection_is_another_space_and_another_window_encoder_is_not(
    base: Release, tmp_path: Path
) -> None:
    same = Projection.load(base.path / "projection.safetensors")
    window_encoder = tmp_path / "w"
    window_encoder.write_bytes(b"opaque")
    kept = publish(base, same, parts={"window_encoder.safetensors": window_encoder}, now=NOW)
    shipped = publish(base, same, item_vectors=vectors(), now=NOW)
    assert train(base).space != base.space
    assert kept.space == shipped.space
    assert kept.id != shipped.id


def test_learned_item_vectors_are_part_of_what_the_space_means(base: Release) -> None:
    same = Projection.load(base.path / "projection.safetensors")
    one, other = (
        publish(base, same, item_vectors=vectors(seed), learned_items=True, now=NOW)
        for seed in (1, 2)
    )
    assert len({one.space, other.space, base.space}) == 3
    assert load(one.path).learned_items


def test_the_same_content_is_one_release(base: Release) -> None:
    assert train(base) == train(base)
    assert len([name for name in names(base.path.parent) if name.startswith("trained-")]) == 1


@pytest.mark.parametrize("name", ["manifest.json", "a/b", "../b", ".hidden", "metrics.json"])
def test_a_part_cannot_take_the_place_of_another_file(base: Release, name: str) -> None:
    with pytest.raises(ValueError, match="cannot be the name"):
        train(base, parts={name: base.path / "manifest.json"})


def test_parts_that_do_not_fit_are_refused_before_anything_is_written(base: Release) -> None:
    before = names(base.path.parent)
    with pytest.raises(ValueError, match="item vectors have 5 dimensions"):
        train(base, item_vectors=vectors(dimensions=5))
    with pytest.raises(ValueError, match="without item_vectors"):
        train(base, item_vectors=None, learned_items=True)
    assert names(base.path.parent) == before


@pytest.mark.parametrize(
    "file",
    [
        "item_vectors.safetensors",
        "transition.safetensors",
        "metrics.json",
        "projection.safetensors",
    ],
)
@pytest.mark.parametrize("how", ["truncated", "other bytes", "missing"])
def test_a_damaged_part_is_refused_by_name(base: Release, file: str, how: str) -> None:
    release = train(base)
    content = (release.path / file).read_bytes()
    if how == "missing":
        (release.path / file).unlink()
    else:
        damage(release.path / file, content[:-5] if how == "truncated" else content[::-1])
    with pytest.raises(ReleaseCorrupt, match=file):
        load(release.path)


def _edit_manifest(release: Release, **changes: Any) -> None:
    manifest = json.loads((release.path / "manifest.json").read_text())
    damage(release.path / "manifest.json", json.dumps(manifest | changes).encode())


@pytest.mark.parametrize(
    ("changes", "error"),
    [
        ({"format": 3}, ReleaseTooNew),
        ({"format": 0}, ReleaseCorrupt),
        ({"space": "0" * 16}, ReleaseCorrupt),
        ({"dimensions": DIMENSIONS + 1}, ReleaseCorrupt),
        ({"learned_items": True}, ReleaseCorrupt),
        ({"parent": 3}, ReleaseCorrupt),
        ({"files": []}, ReleaseCorrupt),
    ],
)
def test_a_manifest_that_disagrees_with_its_files_is_refused(
    base: Release, changes: dict[str, Any], error: type[Exception]
) -> None:
    release = train(base)
    _edit_manifest(release, **changes)
    with pytest.raises(error):
        load(release.path)


def test_a_part_of_another_shape_is_refused_although_its_checksum_is_right(base: Release) -> None:
    release = train(base)
    vectors(dimensions=5).save(release.path / "item_vectors.safetensors")
    manifest = json.loads((release.path / "manifest.json").read_text())
    files = manifest["files"]
    digest = releases._sha256(release.path / "item_vectors.safetensors")
    files["item_vectors.safetensors"] = digest
    _edit_manifest(release, files=files)
    with pytest.raises(ReleaseCorrupt, match="has 5 dimensions"):
        load(release.path)


@contextmanager
def little_room() -> Iterator[None]:
    """Files cannot grow beyond a kilobyte, as on a disk that is full. Not a fixture: pytest writes
    its own output while those are in force."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1_024, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_full_disk_leaves_nothing_half_visible(base: Release) -> None:
    make_current(base, now=NOW)
    before = names(base.path.parent)
    words = "set MODEL_RELEASES to a folder with room"
    with pytest.raises(ReleaseUnwritable, match=words), little_room():
        train(base)
    assert names(base.path.parent) == before
    assert load_current(base.path.parent).id == base.id


def test_what_a_killed_publisher_left_is_cleared_away(base: Release) -> None:
    leftover = base.path.parent / ".building-trained"
    leftover.mkdir()
    (leftover / "half").write_bytes(b"x")
    train(base)
    assert not leftover.exists()


def test_two_publishers_at_once_both_publish_and_one_of_them_goes_live(base: Release) -> None:
    make_current(base, now=NOW)
    outcomes: dict[int, object] = {}
    ready = threading.Barrier(2)

    def run(seed: int) -> None:
        candidate = train(base, seed)
        ready.wait()
        try:
            make_current(candidate, expected=base.id, now=NOW)
            outcomes[seed] = candidate.id
        except ReleaseOvertaken as error:
            outcomes[seed] = error

    threads = [threading.Thread(target=run, args=(seed,)) for seed in (1, 2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    won = [outcome for outcome in outcomes.values() if isinstance(outcome, str)]
    lost = [outcome for outcome in outcomes.values() if not isinstance(outcome, str)]
    assert len(won) == len(lost) == 1
    assert "train from the live release" in str(lost[0])
    assert load_current(base.path.parent).id == won[0]
    assert [move.release for move in history(base.path.parent)] == [base.id, won[0]]


def test_current_may_name_a_missing_folder_and_is_said_to(base: Release) -> None:
    (base.path.parent / "CURRENT").write_text("trained-gone\n")
    with pytest.raises(ReleaseMissing, match="trained-gone"):
        load_current(base.path.parent)
    listed = {x.id: x for x in list_releases(base.path.parent)}
    assert listed["trained-gone"].current
    assert "not there" in listed["trained-gone"].problem


def test_moves_are_remembered_and_undone_one_by_one(base: Release) -> None:
    folder = base.path.parent
    one, two = train(base, 1), train(base, 2)
    for release in (base, one, two, two):
        make_current(release, now=NOW)
    assert [(m.before, m.release) for m in history(folder)] == [
        ("", base.id), (base.id, one.id), (one.id, two.id),
    ]  # fmt: skip
    assert rollback(folder, now=NOW).id == one.id
    assert rollback(folder, now=NOW).id == base.id
    with pytest.raises(ReleaseMissing, match="no release to go back to"):
        rollback(folder, now=NOW)
    assert load_current(folder).id == base.id
    make_current(two, now=NOW)
    assert rollback(folder, now=NOW).id == base.id
    assert [m.why for m in history(folder)][-2:] == ["promoted", "rolled back"]


def test_a_rollback_leaves_a_hold_with_time_and_reason(base: Release) -> None:
    folder, one = base.path.parent, train(base)
    for release in (base, one):
        make_current(release, now=NOW)
    assert (held(folder), resume(folder)) == (None, None)
    rollback(folder, now=NOW)
    assert held(folder) == Hold(NOW.isoformat(), f"{one.id} rolled back")
    with pytest.raises(ReleaseMissing):
        rollback(folder)
    assert resume(folder) == Hold(NOW.isoformat(), f"{one.id} rolled back")
    assert held(folder) is None


@pytest.mark.parametrize("content", [b"", b"\xff{", b"[1]", b'{"why": 3}'])
def test_any_file_named_hold_holds(base: Release, content: bytes) -> None:
    (base.path.parent / "HOLD").write_bytes(content)
    assert held(base.path.parent) is not None


def test_a_rollback_to_a_damaged_release_moves_nothing(base: Release) -> None:
    one, two = train(base, 1), train(base, 2)
    for release in (one, two):
        make_current(release, now=NOW)
    damage(one.path / "metrics.json", b"{}")
    with pytest.raises(ReleaseCorrupt):
        rollback(base.path.parent, now=NOW)
    assert load_current(base.path.parent).id == two.id
    assert held(base.path.parent) is None


# --- pruning


def chain(base: Release, count: int) -> list[Release]:
    """The base and so many after it, each trained from the one before and live for an hour."""
    found = [base]
    make_current(base, now=NOW)
    for k in range(1, count + 1):
        at = NOW + timedelta(hours=k)
        found.append(train(found[-1], k, now=at))
        make_current(found[-1], now=at)
    return found


def test_the_newest_releases_stay_whole_and_of_the_others_only_the_map(base: Release) -> None:
    folder, made = base.path.parent, chain(base, 4)
    assert prune(folder, 5) == []
    assert set(prune(folder, 2)) == {release.id for release in made[:3]}
    assert [x.id for x in list_releases(folder)] == [release.id for release in made[3:]]
    assert [load(release.path) for release in made[3:]] == made[3:]
    for release in made[1:3]:
        kept = folder / "PRUNED" / release.id
        assert names(kept) == {"manifest.json", "transition.safetensors"}
    assert names(folder / "PRUNED" / base.id) == {"manifest.json"}
    assert not [name for name in names(folder) if name.startswith(".")]
    assert prune(folder, 2) == []
    assert set(releases_by_id(folder)) == {release.id for release in made}
    for release in made[1:]:
        transition = releases_by_id(folder)[release.id].load_transition()
        assert transition is not None
        assert transition.to_space == release.space


def test_what_is_live_or_was_a_moment_ago_is_not_pruned_however_old(base: Release) -> None:
    folder, made = base.path.parent, chain(base, 4)
    make_current(made[1], now=NOW + timedelta(hours=9))
    gone = prune(folder, 2)
    assert set(gone) == {made[0].id, made[2].id, made[3].id}
    assert rollback(folder).id == made[4].id


def test_without_a_live_release_nothing_is_pruned(base: Release) -> None:
    folder, _ = base.path.parent, chain(base, 3)
    (folder / "CURRENT").write_text("trained-gone\n")
    assert prune(folder, 2) == []


def test_what_cannot_be_read_is_left_to_a_person(base: Release) -> None:
    folder, made = base.path.parent, chain(base, 3)
    (made[1].path / "manifest.json").write_text("{")
    assert prune(folder, 2) == [base.id]
    assert made[1].path.is_dir()


@pytest.mark.parametrize("step", ["rename", "rmtree"])
def test_a_pruning_that_was_killed_leaves_releases_whole_and_is_done_the_next_time(
    base: Release, step: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, made = base.path.parent, chain(base, 3)

    def killed(*args: Any, **options: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        if step == "rename":
            patch.setattr(releases, "_keep_map", killed)
        else:
            patch.setattr(shutil, "rmtree", killed)
        with pytest.raises(KeyboardInterrupt):
            prune(folder, 2)
    for listed in list_releases(folder):
        assert listed.release is not None
        assert load(listed.release.path) == listed.release
    prune(folder, 2)
    assert [x.id for x in list_releases(folder)] == [release.id for release in made[2:]]
    assert not [name for name in names(folder) if name.startswith(".")]
    assert set(releases_by_id(folder)) == {release.id for release in made}


def test_who_has_looked_at_a_release_finds_its_map_though_it_was_pruned_meanwhile(
    base: Release,
) -> None:
    folder, made = base.path.parent, chain(base, 3)
    before = made[1].load_transition()
    prune(folder, 2)
    after = made[1].load_transition()
    assert before is not None
    assert after is not None
    np.testing.assert_array_equal(before.forward, after.forward)


def test_what_was_pruned_meanwhile_does_not_go_live(base: Release) -> None:
    folder, made = base.path.parent, chain(base, 3)
    old = load(made[1].path)
    prune(folder, 2)
    with pytest.raises(ReleaseMissing, match=old.id):
        make_current(old)
    assert load_current(folder).id == made[3].id


def test_a_line_of_history_that_a_crash_cut_short_does_no_harm(base: Release) -> None:
    make_current(base, now=NOW)
    with (base.path.parent / "HISTORY").open("ab") as file:
        file.write(b'{"at": "2026-0')
    one = train(base)
    make_current(one, now=NOW)
    assert [move.release for move in history(base.path.parent)] == [base.id, one.id]


def test_the_list_is_by_age_and_says_what_is_wrong(base: Release) -> None:
    later = train(base, 1, now=NOW.replace(hour=13))
    broken = train(base, 2, now=NOW.replace(hour=14))
    (broken.path / "manifest.json").write_text("{")
    make_current(later, now=NOW)
    listed = list_releases(base.path.parent)
    assert [x.id for x in listed if x.release] == [base.id, later.id]
    assert [x.id for x in listed if x.current] == [later.id]
    assert [x.id for x in listed if "manifest.json cannot be read" in x.problem] == [broken.id]
    assert list_releases(base.path.parent / "nowhere") == []


def test_decisions_are_kept(base: Release) -> None:
    folder = base.path.parent
    assert decisions(folder) == []
    for verdict in ("reject", "accept"):
        record_decision(folder, {"decision": verdict})
    assert [d["decision"] for d in decisions(folder)] == ["reject", "accept"]
