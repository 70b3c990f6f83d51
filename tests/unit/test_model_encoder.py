from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoTokenizer, BertConfig, BertModel

from model.encoder import BUNDLED_PACKAGE, DType, Floats, TextEncoder, tower_folder
from model.errors import (
    EncoderSettingsInvalid,
    ModelError,
    NonFiniteVectors,
    WeightsUnavailable,
)
from model.projection import fit_projection
from model.text import Tokenizer

torch.set_num_threads(1)  # on a busy machine, threads spend their time waiting for each other

TITLES = [
    "Handmade ceramic mug, 350 ml",
    "Stoneware coffee cup with saucer",
    "USB-C charging cable, 2 m, braided",
    "Men's trail running shoes, waterproof, with a grippy outsole and a cushioned midsole",
    "Toy Story. Animation > Children's > Comedy",
]
HOSTILE = {
    "empty": "",
    "white space": " \t\r\n\u2003",
    "a megabyte of words": "scarf " * 175_000,
    "a megabyte without a space": "x" * 10**6,
    "emoji": "🧣🔥👩‍👩‍👧‍👦" * 20,
    "Chinese": "纯棉连衣裙 夏季新款",
    "NUL bytes": "\0silk\0\0scarf\0",
    "controls": "\x01\x1b[31m\x7f\u200b\u202e\ufeff",
    "half a surrogate pair": "silk \ud83d scarf",
    "special tokens": "[CLS] [PAD] [MASK] [SEP]" * 10,
    "combining marks": "e" + "\u0301" * 5_000,
}
# Every character of the Chinese test texts, so that none of them is unknown.
TINY_VOCABULARY = [
    "[PAD]",
    "[UNK]",
    "[CLS]",
    "[SEP]",
    "[MASK]",
    *"纯棉连衣裙真皮钱包手机壳查询商品:",
]


@pytest.fixture(scope="module")
def encoder() -> TextEncoder:
    return TextEncoder.from_pretrained("bundled", device="cpu")


@pytest.fixture
def tiny_tower(tmp_path: Path) -> Path:
    """A Hugging Face folder of a random two-layer BERT that reads single Chinese characters."""
    folder = tmp_path / "tiny"
    config = BertConfig(
        vocab_size=len(TINY_VOCABULARY),
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=64,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        BertModel(config, add_pooling_layer=False).save_pretrained(folder)
    (folder / "vocab.txt").write_text("\n".join(TINY_VOCABULARY), encoding="utf-8")
    settings = {"tokenizer_class": "BertTokenizer", "model_max_length": 64}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


def rewrite_weights(folder: Path, change: Any) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def sentence_vector(folder: Path, text: str) -> Floats:
    """Mean of the token vectors as transformers computes them, without any of our code."""
    tokenizer, tower = AutoTokenizer.from_pretrained(folder), AutoModel.from_pretrained(folder)
    with torch.no_grad():
        hidden = tower(**tokenizer(text, return_tensors="pt")).last_hidden_state[0]
    mean = hidden.mean(dim=0).numpy()
    vector: Floats = mean / np.linalg.norm(mean)
    return vector


def test_a_vector_is_the_normalised_mean_of_its_token_vectors(encoder: TextEncoder) -> None:
    expected = sentence_vector(tower_folder("bundled"), TITLES[0])
    np.testing.assert_allclose(encoder.encode(TITLES[:1])[0], expected, atol=1e-5)


def test_like_things_are_nearer_than_unlike_ones(encoder: TextEncoder) -> None:
    mug, cup, cable, shoes, _ = encoder.encode(TITLES)
    assert mug @ cup > max(mug @ cable, mug @ shoes) + 0.2


def test_a_text_has_one_vector_whatever_batch_it_was_in(encoder: TextEncoder) -> None:
    texts = TITLES + list(HOSTILE.values())
    alone = np.concatenate([encoder.encode([text]) for text in texts])
    for batch_tokens in (1, 300, 16_384):
        together = encoder.encode(texts, batch_tokens=batch_tokens)
        np.testing.assert_allclose(together, alone, atol=1e-5)
    np.testing.assert_allclose(encoder.encode(texts[::-1])[::-1], alone, atol=1e-5)


def test_bfloat16_on_a_cpu_stays_close(encoder: TextEncoder) -> None:
    half = TextEncoder.from_pretrained("bundled", device="cpu", dtype="bfloat16")
    cosine = (half.encode(TITLES) * encoder.encode(TITLES)).sum(axis=1)
    assert 0.9995 < cosine.min() < 0.9999999


@pytest.mark.parametrize("text", HOSTILE.values(), ids=HOSTILE.keys())
def test_any_string_has_a_finite_unit_vector(encoder: TextEncoder, text: str) -> None:
    vector = encoder.encode([text])
    assert vector.dtype == np.float32
    assert vector.shape == (1, encoder.dimensions)
    np.testing.assert_allclose(np.linalg.norm(vector, axis=1), 1.0, atol=1e-5)


def test_no_texts_give_no_rows(encoder: TextEncoder) -> None:
    assert encoder.encode([]).shape == (0, 384)


def test_a_text_beyond_max_tokens_is_read_up_to_there() -> None:
    short = TextEncoder.from_pretrained("bundled", device="cpu", max_tokens=12)
    same_start = "red silk scarf with hand rolled edges made in italy since "
    vectors = short.encode([same_start + "1921", same_start + "last week, honestly", "red scarf"])
    np.testing.assert_allclose(vectors[0], vectors[1], atol=1e-5)
    assert vectors[0] @ vectors[2] < 0.99


def test_a_projected_vector_is_the_projection_of_the_plain_one(encoder: TextEncoder) -> None:
    plain = encoder.encode(TITLES)
    projection = fit_projection(plain, 32)
    projected = TextEncoder.from_pretrained("bundled", device="cpu", projection=projection)
    assert projected.dimensions == 32
    np.testing.assert_allclose(projected.encode(TITLES), projection.apply(plain), atol=1e-5)


def test_loading_says_nothing(capfd: pytest.CaptureFixture[str]) -> None:
    TextEncoder.from_pretrained("bundled", device="cpu")
    assert capfd.readouterr() == ("", "")


def test_the_bundled_weights_are_found_without_running_their_package() -> None:
    assert (tower_folder("bundled") / "model.safetensors").is_file()
    assert BUNDLED_PACKAGE not in sys.modules


def test_bundled_weights_that_are_not_installed_name_the_extra(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(WeightsUnavailable, match="make env"):
        TextEncoder.from_pretrained("bundled")


def test_any_folder_will_do_and_prefixes_are_one_setting_away(tiny_tower: Path) -> None:
    texts = ["纯棉连衣裙", "真皮钱包", "手机壳"]
    plain = TextEncoder.from_pretrained(tiny_tower, device="cpu", max_tokens=32)
    prefixed = TextEncoder.from_pretrained(
        tiny_tower, device="cpu", max_tokens=32, query_prefix="查询:", passage_prefix="商品:"
    )
    assert plain.dimensions == 16
    np.testing.assert_array_equal(plain.encode(texts, "query"), plain.encode(texts, "passage"))
    np.testing.assert_allclose(
        prefixed.encode(texts, "query"), plain.encode(["查询:" + t for t in texts]), atol=1e-5
    )
    np.testing.assert_allclose(
        prefixed.encode(texts), plain.encode(["商品:" + t for t in texts]), atol=1e-5
    )
    apart = plain.encode(texts) @ plain.encode(texts).T
    assert apart[~np.eye(3, dtype=bool)].max() < 0.999


def test_cls_pooling_takes_the_first_token(tiny_tower: Path) -> None:
    encoder = TextEncoder.from_pretrained(tiny_tower, device="cpu", max_tokens=32, pooling="cls")
    tower = AutoModel.from_pretrained(tiny_tower)
    ids = [2, *(TINY_VOCABULARY.index(character) for character in "钱包"), 3]
    with torch.no_grad():
        first = tower(input_ids=torch.tensor([ids])).last_hidden_state[0, 0].numpy()
    np.testing.assert_allclose(
        encoder.encode(["钱包"])[0], first / np.linalg.norm(first), atol=1e-5
    )


def test_a_tower_that_overflows_returns_nothing(tiny_tower: Path) -> None:
    def spoil(tensors: dict[str, torch.Tensor]) -> None:
        tensors["embeddings.word_embeddings.weight"][5] = torch.inf

    rewrite_weights(tiny_tower, spoil)
    encoder = TextEncoder.from_pretrained(tiny_tower, device="cpu", max_tokens=32)
    assert np.isfinite(encoder.encode(["钱包"])).all()
    with pytest.raises(NonFiniteVectors, match="MODEL_DTYPE=float32"):
        encoder.encode(["钱包", TINY_VOCABULARY[5]])


def test_a_missing_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(WeightsUnavailable, match=f"no folder {tmp_path}/absent; set MODEL_BASE"):
        TextEncoder.from_pretrained(tmp_path / "absent")


def test_a_folder_that_is_no_encoder_is_named(tmp_path: Path) -> None:
    with pytest.raises(WeightsUnavailable, match=rf"{tmp_path} holds no config\.json"):
        TextEncoder.from_pretrained(tmp_path)


@pytest.mark.parametrize("cut", ["model.safetensors", "vocab.txt"])
def test_a_folder_that_lacks_a_file_is_named(tiny_tower: Path, cut: str) -> None:
    (tiny_tower / cut).unlink()
    with pytest.raises(WeightsUnavailable, match=str(tiny_tower)):
        TextEncoder.from_pretrained(tiny_tower, device="cpu", max_tokens=32)


def test_a_tokenizer_of_another_model_is_noticed(tiny_tower: Path) -> None:
    words = "\n".join([*TINY_VOCABULARY, "another", "word"])
    (tiny_tower / "vocab.txt").write_text(words, encoding="utf-8")
    with pytest.raises(WeightsUnavailable, match="more words than the tower"):
        TextEncoder.from_pretrained(tiny_tower, device="cpu", max_tokens=32)


def test_a_pickle_is_not_opened(tiny_tower: Path) -> None:
    tensors = load_file(tiny_tower / "model.safetensors")
    (tiny_tower / "model.safetensors").unlink()
    torch.save(tensors, tiny_tower / "pytorch_model.bin")
    with pytest.raises(WeightsUnavailable, match="safetensors"):
        TextEncoder.from_pretrained(tiny_tower, device="cpu", max_tokens=32)


def test_cut_off_weights_are_named(tiny_tower: Path) -> None:
    weights = tiny_tower / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1_000])
    with pytest.raises(WeightsUnavailable, match=str(tiny_tower)):
        TextEncoder.from_pretrained(tiny_tower, device="cpu", max_tokens=32)


def test_weights_that_lack_a_layer_are_not_filled_in_at_random(tiny_tower: Path) -> None:
    name = "encoder.layer.1.output.dense.weight"
    rewrite_weights(tiny_tower, lambda tensors: tensors.pop(name))
    with pytest.raises(WeightsUnavailable, match=name):
        TextEncoder.from_pretrained(tiny_tower, device="cpu", max_tokens=32)


def test_an_unreachable_hub_is_one_clear_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(WeightsUnavailable, match="nobody/nothing is neither a folder nor"):
        TextEncoder.from_pretrained("nobody/nothing")


def test_a_name_that_cannot_be_a_hub_id_is_one_clear_error() -> None:
    with pytest.raises(WeightsUnavailable, match="MODEL_BASE"):
        TextEncoder.from_pretrained("no such--model!")


@pytest.mark.parametrize(
    ("setting", "said"),
    [
        ({"device": "abacus"}, "MODEL_DEVICE"),
        ({"device": "cpu", "dtype": "float8"}, "MODEL_DTYPE"),
        ({"device": "cpu", "pooling": "max"}, "none of mean, cls"),
        ({"device": "cpu", "max_tokens": 513}, "reads 3 to 512; set MODEL_MAX_TOKENS"),
        ({"device": "cpu", "max_tokens": 2}, "reads 3 to 512"),
    ],
)
def test_a_setting_that_cannot_be_followed_says_which(setting: dict[str, Any], said: str) -> None:
    with pytest.raises(EncoderSettingsInvalid, match=said):
        TextEncoder.from_pretrained("bundled", **setting)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device here")
def test_a_device_that_is_not_there_says_so() -> None:
    with pytest.raises(EncoderSettingsInvalid, match="no CUDA device is visible"):
        TextEncoder.from_pretrained("bundled", device="cuda")


def test_a_projection_for_another_width_is_refused(tiny_tower: Path) -> None:
    projection = fit_projection(np.zeros((0, 384), dtype=np.float32), 8)
    with pytest.raises(EncoderSettingsInvalid, match="vectors of 384, the tower gives 16"):
        TextEncoder.from_pretrained(tiny_tower, max_tokens=32, projection=projection)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_stays_close(encoder: TextEncoder, dtype: DType) -> None:
    half = TextEncoder.from_pretrained("bundled", device="cpu", dtype=dtype)
    cosine = (half.encode(TITLES) * encoder.encode(TITLES)).sum(axis=1)
    assert half.encode(TITLES).dtype == np.float32
    assert cosine.min() > 0.999


def test_every_failure_is_a_model_error() -> None:
    assert issubclass(WeightsUnavailable, ModelError)
    assert issubclass(EncoderSettingsInvalid, ModelError)
    assert issubclass(NonFiniteVectors, ModelError)


def test_a_text_without_tokens_is_one_padding_token() -> None:
    from tokenizers import Tokenizer as Backend
    from tokenizers.models import WordLevel

    tokenizer = Tokenizer(Backend(WordLevel({"[UNK]": 0}, unk_token="[UNK]")), 8, pad_id=3)
    assert tokenizer(["", "word"]) == [[3], [0]]
