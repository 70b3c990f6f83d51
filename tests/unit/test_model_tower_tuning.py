from __future__ import annotations

import importlib.util
import json
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import BertConfig, BertModel

from model.encoder import TextEncoder
from model.errors import EncoderSettingsInvalid, PackageMissing
from model.projection import fit_projection
from model.tower_tuning import Method, TunableTower
from model.trainer import Base, Catalogue, train
from tests.learnable_shop import SMALL, TYPES, circle

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *(f"word{i}" for i in range(12))]
TEXTS = [f"word{i} word{i // 2}" for i in range(12)]

NEEDS_PEFT = pytest.mark.skipif(
    importlib.util.find_spec("peft") is None, reason="peft is not installed"
)
METHODS = ["last", "full", pytest.param("lora", marks=NEEDS_PEFT)]


@pytest.fixture
def small_base(tmp_path: Path) -> Path:
    folder = tmp_path / "base"
    config = BertConfig(
        vocab_size=len(WORDS),
        hidden_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=16,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        BertModel(config, add_pooling_layer=False).save_pretrained(folder)
    (folder / "vocab.txt").write_text("\n".join(WORDS), encoding="utf-8")
    settings = {"tokenizer_class": "BertTokenizer", "model_max_length": 16}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


def tunable(base: Path, method: Method) -> TunableTower:
    return TunableTower(base, TEXTS, method, rank=2, max_tokens=8, device="cpu")


@pytest.mark.parametrize("method", METHODS)
def test_a_tuned_tower_starts_at_its_base(small_base: Path, method: Method) -> None:
    plain = TextEncoder.from_pretrained(small_base, device="cpu", max_tokens=8).encode(TEXTS)
    tower = tunable(small_base, method)
    np.testing.assert_allclose(tower.all_features(), plain, atol=1e-5)
    rows = torch.tensor([7, 2])
    np.testing.assert_allclose(tower.features(rows).detach().numpy(), plain[[7, 2]], atol=1e-5)


@pytest.mark.parametrize("method", METHODS)
def test_training_moves_the_free_weights_and_leaves_a_folder_that_encodes_the_same(
    small_base: Path, method: Method, tmp_path: Path
) -> None:
    tower = tunable(small_base, method)
    tower.rate_share = 1.0  # two epochs are few
    frozen = TextEncoder.from_pretrained(small_base, device="cpu", max_tokens=8)
    before = frozen.encode(TEXTS)
    shop = Catalogue([f"i{i}" for i in range(12)], before)
    base = Base(fit_projection(before, 16))
    settings = replace(SMALL, epochs=2)
    train(circle(), shop, base, TYPES, tmp_path / "candidate", settings, tower=tower)
    saved = TextEncoder.from_pretrained(
        tmp_path / "candidate" / "encoder", device="cpu", max_tokens=8
    ).encode(TEXTS)
    assert np.abs(saved - before).max() > 0.01
    np.testing.assert_allclose(saved, tower.all_features(), atol=1e-4)


def test_only_the_last_layers_are_free(small_base: Path) -> None:
    names = TunableTower(small_base, TEXTS, "last", max_tokens=8, device="cpu").state_dict()
    assert names
    assert all(name.startswith("encoder.layer.1.") for name in names)
    with pytest.raises(EncoderSettingsInvalid, match="this base has 2"):
        TunableTower(small_base, TEXTS, "last", last_layers=3, max_tokens=8, device="cpu")


def test_an_unknown_way_and_a_missing_package_say_what_to_do(
    small_base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(EncoderSettingsInvalid, match="LEARN_TOWER"):
        TunableTower(small_base, TEXTS, "some", device="cpu")  # type: ignore[arg-type]
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(PackageMissing, match="install it"):
        tunable(small_base, "lora")
