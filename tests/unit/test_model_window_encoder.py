from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save

from model.errors import EncoderSettingsInvalid, WeightsUnavailable
from model.window_encoder import GAP_BUCKETS, WindowEncoder, WindowShape, gap_buckets

SHAPE = WindowShape(dimensions=16, events=12, types=("view", "purchase"), dropout=0.5)


def encoder(seed: int = 0) -> WindowEncoder:
    torch.manual_seed(seed)
    return WindowEncoder(SHAPE)


def windows(n: int, length: int = 12, seed: int = 0) -> tuple[np.ndarray, ...]:
    rng = np.random.default_rng(seed)
    vectors = rng.normal(size=(n, length, 16)).astype(np.float32)
    vectors /= np.linalg.norm(vectors, axis=2, keepdims=True)
    types = rng.integers(0, 2, (n, length)).astype(np.uint8)
    t_ms = 1_600_000_000_000 + np.cumsum(rng.integers(0, 10**8, (n, length)), axis=1)
    return vectors, types, t_ms.astype(np.int64), rng.integers(1, length + 1, n)


@settings(max_examples=30)
@given(seed=st.integers(0, 10_000), at=st.integers(0, 10))
def test_no_state_knows_of_an_event_after_it(seed: int, at: int) -> None:
    model = encoder().eval()
    vectors, types, t_ms, _ = windows(1, seed=seed)
    other = windows(1, seed=seed + 1)
    changed = [a.copy() for a in (vectors, types, t_ms)]
    for mine, theirs in zip(changed, other, strict=False):
        mine[:, at + 1 :] = theirs[:, at + 1 :]

    def states(v: np.ndarray, k: np.ndarray, t: np.ndarray) -> np.ndarray:
        with torch.no_grad():
            args = torch.from_numpy(v), torch.from_numpy(k.astype(np.int64)), torch.from_numpy(t)
            return model(*args)[0].numpy()

    before, after = states(vectors, types, t_ms), states(*changed)
    np.testing.assert_allclose(before[: at + 1], after[: at + 1], atol=1e-5)
    assert np.abs(before[at + 1 :] - after[at + 1 :]).max() > 1e-3


def test_serving_gives_the_states_of_training_whatever_the_batch_and_the_padding() -> None:
    model = encoder().eval()
    vectors, types, t_ms, lengths = windows(300)
    for i, length in enumerate(lengths):
        vectors[i, length:] = 7.0  # what lies in the padding is not read
    served = model.encode(vectors, types, t_ms, lengths)
    for i in (0, 17, 299):
        with torch.no_grad():
            whole = model(
                torch.from_numpy(vectors[i : i + 1]),
                torch.from_numpy(types[i : i + 1].astype(np.int64)),
                torch.from_numpy(t_ms[i : i + 1]),
            )
        state = whole[0, lengths[i] - 1].numpy()
        np.testing.assert_allclose(served[i], state / np.linalg.norm(state), atol=1e-5)


def test_next_interests_are_unit_rows_in_the_order_given() -> None:
    model = encoder()
    inputs = windows(40)
    rows = model.encode(*inputs)
    np.testing.assert_allclose(np.linalg.norm(rows, axis=1), 1.0, atol=1e-5)
    turned = model.encode(*(a[::-1].copy() for a in inputs))
    np.testing.assert_allclose(turned[::-1], rows, atol=1e-5)


def test_no_windows_are_no_vectors() -> None:
    assert encoder().encode(*windows(0)).shape == (0, 16)


def test_what_was_saved_gives_the_same_vectors(tmp_path: Path) -> None:
    model = encoder(3)
    model.save(tmp_path / "w.safetensors")
    loaded = WindowEncoder.load(tmp_path / "w.safetensors")
    assert loaded.shape == SHAPE
    np.testing.assert_array_equal(model.encode(*windows(9)), loaded.encode(*windows(9)))


def test_a_file_that_is_no_window_encoder_is_refused_with_what_to_do(tmp_path: Path) -> None:
    (tmp_path / "w.safetensors").write_bytes(b"\x08\0\0\0\0\0\0\0{}      ")
    with pytest.raises(WeightsUnavailable, match="train again"):
        WindowEncoder.load(tmp_path / "w.safetensors")
    with pytest.raises(WeightsUnavailable, match="train again"):
        WindowEncoder.load(tmp_path / "missing.safetensors")


@pytest.mark.parametrize(
    "change",
    [{"layers": 10**9}, {"events": 10**9}, {"dimensions": 10**6}, {"heads": 0}, {"types": 1},
     {"dimensions": 10**30}, {"events": None}],
    ids=str,
)  # fmt: skip
def test_a_header_of_made_up_sizes_takes_neither_time_nor_memory(
    tmp_path: Path, change: dict[str, object]
) -> None:
    path, made_up = tmp_path / "w.safetensors", json.dumps(asdict(SHAPE) | change)
    tensors = {name: value.contiguous() for name, value in encoder().state_dict().items()}
    path.write_bytes(save(tensors, metadata={"shape": made_up}))
    with pytest.raises(WeightsUnavailable, match="train again"):
        WindowEncoder.load(path)


def test_windows_of_the_wrong_shape_are_refused_by_name() -> None:
    vectors, types, t_ms, lengths = windows(3)
    model = encoder()
    with pytest.raises(ValueError, match="vectors: expected"):
        model.encode(vectors[:, :, :8], types, t_ms, lengths)
    with pytest.raises(ValueError, match="reads 12 events, got windows of 13"):
        model.encode(*windows(3, length=13))
    with pytest.raises(ValueError, match="types and t_ms"):
        model.encode(vectors, types[:, :5], t_ms, lengths)
    with pytest.raises(ValueError, match="lengths: expected 1 to 12, got 0"):
        model.encode(vectors, types, t_ms, lengths * 0)


def test_dimensions_that_heads_cannot_share_are_refused() -> None:
    with pytest.raises(EncoderSettingsInvalid, match="multiple of the 2 heads"):
        WindowShape(dimensions=17, events=5, types=("view",))


def test_gaps_are_classed_by_powers_of_two_of_seconds() -> None:
    t_ms = torch.tensor([[0, 0, 999, 1_999, 4_999, 1 << 62, 0]])
    assert gap_buckets(t_ms).tolist() == [[0, 0, 0, 1, 2, GAP_BUCKETS - 1, 0]]
