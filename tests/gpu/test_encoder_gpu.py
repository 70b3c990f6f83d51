from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import BertConfig

from model.encoder import TextEncoder
from model.engine import Engine
from model.item_table import ItemTable
from model.packing import attend, pack
from model.releases import build_base

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]

TEXTS = [
    "",
    "Handmade ceramic mug, 350 ml",
    "USB-C charging cable, 2 m, braided",
    "纯棉连衣裙 🧣",
    "scarf " * 200_000,
    *(f"{'very ' * (i % 40)}long title number {i}" for i in range(200)),
]


@pytest.fixture(scope="module")
def on_cpu() -> TextEncoder:
    return TextEncoder.from_pretrained("bundled", device="cpu")


def test_float32_gives_the_vectors_of_the_cpu(on_cpu: TextEncoder) -> None:
    on_gpu = TextEncoder.from_pretrained("bundled", device="cuda", dtype="float32")
    np.testing.assert_allclose(on_gpu.encode(TEXTS), on_cpu.encode(TEXTS), atol=1e-4)


def test_float32_gives_one_vector_whatever_the_batch() -> None:
    on_gpu = TextEncoder.from_pretrained("bundled", device="cuda", dtype="float32")
    alone = np.concatenate([on_gpu.encode([text]) for text in TEXTS[:40]])
    np.testing.assert_allclose(on_gpu.encode(TEXTS)[:40], alone, atol=1e-5)


@pytest.mark.parametrize("dtype", ["auto", "bfloat16", "float16"])
def test_half_precision_stays_close_to_the_cpu(on_cpu: TextEncoder, dtype: str) -> None:
    on_gpu = TextEncoder.from_pretrained("bundled", dtype=dtype)  # type: ignore[arg-type]
    assert on_gpu.device.type == "cuda"
    cosine = (on_gpu.encode(TEXTS) * on_cpu.encode(TEXTS)).sum(axis=1)
    assert cosine.min() > 0.998


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_one_kernel_for_all_lengths_attends_as_a_call_per_length_does(dtype: torch.dtype) -> None:
    texts = [[1] * tokens for tokens in (120, 40, 40, 7, 7, 7, 1)]
    config, generator = BertConfig(), torch.Generator("cuda").manual_seed(0)
    on_gpu = pack(texts, config, torch.device("cuda"))["packing"]
    on_cpu = pack(texts, config, torch.device("cpu"))["packing"]
    rows = torch.randn(3, 1, 12, 222, 32, dtype=dtype, device="cuda", generator=generator)
    module = torch.nn.Module()
    mixed, _ = attend(module, *rows, None, packing=on_gpu, scaling=0.2)
    expected, _ = attend(module, *rows.float().cpu(), None, packing=on_cpu, scaling=0.2)
    torch.testing.assert_close(mixed.float().cpu(), expected, atol=2e-2, rtol=0)


def test_a_table_on_the_device_answers_like_one_on_the_cpu() -> None:
    rng = np.random.default_rng(0)
    keys = [int(key) for key in rng.integers(0, 2**64, 5_000, dtype=np.uint64)]
    vectors = rng.normal(size=(5_000, 64)).astype(np.float32)
    tables = [ItemTable(3_000, 64, device) for device in ("cpu", "cuda")]
    for table in tables:
        for start in range(0, 5_000, 500):
            table.put(keys[start : start + 500], vectors[start : start + 500])
        table.discard(keys[::7])
    cpu, gpu = (table.lookup(keys) for table in tables)
    np.testing.assert_array_equal(gpu[0], cpu[0])
    np.testing.assert_array_equal(gpu[1], cpu[1])


def test_a_release_runs_on_the_device(tmp_path: Path, on_cpu: TextEncoder) -> None:
    now = datetime(2026, 3, 1, tzinfo=UTC)
    release = build_base(tmp_path, "bundled", TEXTS, 64, now=now)
    engine = Engine(release)
    assert engine.device.type == "cuda"
    expected = release.load_encoder(device="cpu").encode(TEXTS)
    assert (engine.encode(TEXTS) * expected).sum(axis=1).min() > 0.99
