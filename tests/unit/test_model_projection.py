from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save

from model.projection import Floats, Projection, fit_projection, unit_rows

WIDTH = 48


def catalogue(count: int, seed: int = 0) -> Floats:
    """Unit rows around a common mean, with variances that fall off as a real catalogue's do."""
    rng = np.random.default_rng(seed)
    spread = np.linspace(1.0, 0.05, WIDTH)
    return unit_rows(rng.normal(size=(count, WIDTH)) * spread + 0.5)


def cosines(vectors: Floats) -> Floats:
    return vectors @ vectors.T


def test_projected_rows_are_unit_rows_of_the_dimensions_asked_for() -> None:
    projection = fit_projection(catalogue(300), 16)
    rows = projection.apply(catalogue(40, seed=1))
    assert rows.shape == (40, 16)
    assert rows.dtype == np.float32
    np.testing.assert_allclose(np.linalg.norm(rows, axis=1), 1.0, atol=1e-6)


def test_the_common_part_of_a_catalogue_is_taken_out() -> None:
    items = catalogue(2_000)
    before = cosines(items).mean()
    after = cosines(fit_projection(items, 16).apply(items)).mean()
    assert before > 0.3
    assert abs(after) < 0.02


def test_strong_directions_are_toned_down_and_keep_their_order() -> None:
    items = catalogue(3_000)
    projection = fit_projection(items, 16)
    plain = (items - projection.centre) @ (
        projection.matrix / np.linalg.norm(projection.matrix, axis=0)
    )
    whitened = (items - projection.centre) @ projection.matrix
    assert np.all(np.diff(plain.var(axis=0)) < 1e-4)
    assert np.ptp(np.log(whitened.var(axis=0))) < np.ptp(np.log(plain.var(axis=0)))
    assert whitened.var(axis=0)[0] > whitened.var(axis=0)[-1]


def test_without_texts_the_full_width_keeps_every_cosine() -> None:
    projection = fit_projection(np.zeros((0, WIDTH), dtype=np.float32), WIDTH)
    items = catalogue(50)
    np.testing.assert_allclose(cosines(projection.apply(items)), cosines(items), atol=1e-5)


@pytest.mark.parametrize("count", [0, 1, 5, 15, 16, 17, 60])
def test_any_number_of_texts_makes_a_projection_that_tells_items_apart(count: int) -> None:
    projection = fit_projection(catalogue(count), 16)
    items = projection.apply(catalogue(30, seed=3))
    assert np.isfinite(items).all()
    apart = cosines(items)[~np.eye(30, dtype=bool)]
    assert apart.max() < 0.999
    assert np.linalg.matrix_rank(projection.matrix) == 16


def test_repeats_of_one_text_are_no_reason_to_fail() -> None:
    projection = fit_projection(np.repeat(catalogue(1), 500, axis=0), 16)
    items = projection.apply(catalogue(30, seed=3))
    assert np.isfinite(items).all()
    assert np.linalg.matrix_rank(projection.matrix) == 16


def test_the_same_vectors_give_the_same_projection() -> None:
    one, other = fit_projection(catalogue(100), 24), fit_projection(catalogue(100), 24)
    np.testing.assert_array_equal(one.matrix, other.matrix)


@pytest.mark.parametrize("dimensions", [0, WIDTH + 1])
def test_dimensions_beyond_the_width_are_refused(dimensions: int) -> None:
    with pytest.raises(ValueError, match=f"1 to {WIDTH}, got {dimensions}"):
        fit_projection(catalogue(10), dimensions)


def test_what_was_saved_is_loaded_and_readable_by_others(tmp_path: Path) -> None:
    projection = fit_projection(catalogue(100), 8)
    (tmp_path / "reference").touch()
    projection.save(tmp_path / "p.safetensors")
    loaded = Projection.load(tmp_path / "p.safetensors")
    np.testing.assert_array_equal(loaded.matrix, projection.matrix)
    np.testing.assert_array_equal(loaded.centre, projection.centre)
    assert (tmp_path / "p.safetensors").stat().st_mode == (tmp_path / "reference").stat().st_mode


@pytest.mark.parametrize(
    "tensors",
    [
        {"matrix": np.ones((4, 2), dtype=np.float32)},
        {"centre": np.ones(3, dtype=np.float32), "matrix": np.ones((4, 2), dtype=np.float32)},
        {"centre": np.ones(4, dtype=np.float64), "matrix": np.ones((4, 2), dtype=np.float64)},
        {"centre": np.ones(4, dtype=np.float32), "matrix": np.ones(4, dtype=np.float32)},
    ],
    ids=["no centre", "other shapes", "other types", "no matrix"],
)
def test_tensors_that_are_no_projection_are_refused(
    tmp_path: Path, tensors: dict[str, Floats]
) -> None:
    (tmp_path / "p.safetensors").write_bytes(save(tensors))
    with pytest.raises(ValueError, match=r"expected|fit"):
        Projection.load(tmp_path / "p.safetensors")
