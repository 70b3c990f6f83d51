from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from model.projection import unit_rows
from model.transition import (
    Floats,
    Transition,
    fit_orthogonal,
    fit_transition,
    overlap,
)

DIMENSIONS = 12


def rows(count: int, dimensions: int = DIMENSIONS, seed: int = 3) -> Floats:
    return unit_rows(np.random.default_rng(seed).standard_normal((count, dimensions)))


def rotation(seed: int = 5) -> Floats:
    q, _ = np.linalg.qr(np.random.default_rng(seed).standard_normal((DIMENSIONS,) * 2))
    return np.asarray(q, dtype=np.float32)


def fit(old: Floats, new: Floats) -> Transition:
    return fit_transition("a" * 16, "b" * 16, old, new)


def test_a_rotated_space_is_found_whichever_the_kind() -> None:
    old = rows(800)
    found = fit(old, old @ rotation())
    for error in found.errors.values():
        assert error.held_out
        assert error.items == 80
        assert error.cosine > 0.999
        assert error.overlap > 0.95
    np.testing.assert_allclose(found.forward, rotation(), atol=1e-2)
    np.testing.assert_allclose(found.backward, rotation().T, atol=1e-2)


def test_a_sheared_space_is_better_mapped_by_ridge() -> None:
    old = rows(800)
    shear = rotation() @ np.diag(np.linspace(0.2, 3, DIMENSIONS)).astype(np.float32) @ rotation(9)
    found = fit(old, unit_rows(old @ shear))
    assert found.kind == "ridge"
    assert found.error.cosine > found.errors["orthogonal"].cosine + 0.05
    back = unit_rows(unit_rows(old @ shear) @ found.backward)
    assert float(np.einsum("nd,nd->n", back, old).mean()) > 0.9


def test_noise_is_seen_in_the_error_and_averages_out_in_a_sum() -> None:
    old = rows(2_000)
    noise = np.random.default_rng(8).standard_normal(old.shape).astype(np.float32)
    new = unit_rows(old @ rotation() + 0.1 * noise)
    found = fit(old, new)
    assert found.error.cosine < 0.97
    assert found.error.cosine_p05 < found.error.cosine
    taste = np.flatnonzero(old @ old[0] > 0.3)
    mapped, true = old[taste].sum(axis=0) @ found.forward, new[taste].sum(axis=0)
    alike = float(mapped @ true / np.linalg.norm(mapped) / np.linalg.norm(true))
    assert alike > found.error.cosine


@pytest.mark.parametrize("count", [0, 1, 3, DIMENSIONS])
def test_few_items_give_a_map_near_the_identity_and_no_held_out_error(count: int) -> None:
    old = rows(count)
    found = fit(old, old)
    assert not found.error.held_out
    assert found.error.items == count
    np.testing.assert_allclose(found.forward, np.eye(DIMENSIONS), atol=1e-3)


def test_spaces_of_other_dimensions_can_be_mapped() -> None:
    old = rows(500)
    found = fit(old, unit_rows(old[:, :5]))
    assert (found.forward.shape, found.backward.shape) == ((DIMENSIONS, 5), (5, DIMENSIONS))
    assert fit_orthogonal(old, old[:, :5]).shape == (DIMENSIONS, 5)


def test_a_constant_catalogue_does_not_break_the_fit() -> None:
    old = np.repeat(rows(1), 50, axis=0)
    assert np.isfinite(fit(old, old @ rotation()).forward).all()


def test_vectors_that_are_not_of_the_same_items_are_refused() -> None:
    with pytest.raises(ValueError, match="same items"):
        fit(rows(3), rows(4))
    with pytest.raises(ValueError, match="NaN"):
        fit(rows(3), np.full((3, DIMENSIONS), np.nan, dtype=np.float32))


def test_what_was_saved_is_loaded(tmp_path: Path) -> None:
    old = rows(300)
    saved = fit(old, old @ rotation())
    saved.save(tmp_path / "t")
    loaded = Transition.load(tmp_path / "t")
    np.testing.assert_array_equal(loaded.forward, saved.forward)
    np.testing.assert_array_equal(loaded.backward, saved.backward)
    assert loaded.errors == saved.errors
    assert (loaded.kind, loaded.from_space) == (saved.kind, saved.from_space)


@pytest.mark.parametrize("broken", ["shape", "nan", "about"])
def test_a_file_that_is_no_transition_is_refused(tmp_path: Path, broken: str) -> None:
    from safetensors.numpy import save_file

    forward = np.eye(3, dtype=np.float32)
    backward = np.eye(2 if broken == "shape" else 3, dtype=np.float32)
    if broken == "nan":
        backward[0, 0] = np.nan
    save_file({"forward": forward, "backward": backward}, tmp_path / "t")
    with pytest.raises(ValueError, match=r"fit|NaN|lacks"):
        Transition.load(tmp_path / "t")


def test_overlap_counts_shared_neighbours() -> None:
    catalogue = np.eye(DIMENSIONS, dtype=np.float32)
    one = np.arange(DIMENSIONS, 0, -1, dtype=np.float32)[None]
    assert overlap(one, one, catalogue, k=4) == 1.0
    assert overlap(one, one[:, ::-1], catalogue, k=4) == 0.0
    assert overlap(one, one[:, ::-1], catalogue, k=8) == 0.5
    assert overlap(one[:0], one[:0], catalogue) == 1.0
