from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import (
    AutoModel,
    AutoTokenizer,
    BertConfig,
    BertModel,
    DistilBertConfig,
    DistilBertModel,
    XLMRobertaConfig,
    XLMRobertaModel,
)

from model.encoder import TextEncoder
from model.packing import PACKABLE, attend, pack, pool

torch.set_num_threads(1)  # on a busy machine, threads spend their time waiting for each other

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"abcdefghij"]
TEXTS = ["a b c", "d", "e f g h i j a b", "", "c c c", "j i h", "b", "[PAD] a [PAD]"]
SIZES = {"vocab_size": len(WORDS), "max_position_embeddings": 64, "pad_token_id": 0}
WIDTHS = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 32,
}


def bert() -> Any:
    return BertModel(BertConfig(**SIZES, **WIDTHS))


def xlm_roberta() -> Any:
    return XLMRobertaModel(XLMRobertaConfig(**{**SIZES, "type_vocab_size": 1}, **WIDTHS))


def distilbert() -> Any:
    return DistilBertModel(DistilBertConfig(**SIZES, dim=16, n_layers=2, n_heads=2, hidden_dim=32))


def saved(make: Callable[[], Any], folder: Path) -> Path:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        tower = make()
        for parameter in tower.parameters():
            if parameter.ndim == 2:  # so that positions and neighbours weigh something
                torch.nn.init.normal_(parameter, std=0.5)
        tower.save_pretrained(folder)
    (folder / "vocab.txt").write_text("\n".join(WORDS), encoding="utf-8")
    settings = {"tokenizer_class": "BertTokenizer", "model_max_length": 60}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


@pytest.mark.parametrize("make", [bert, xlm_roberta, distilbert])
@pytest.mark.parametrize("pooling", ["mean", "cls"])
def test_texts_side_by_side_get_the_vectors_that_transformers_gives_each_alone(
    make: Callable[[], Any], pooling: Any, tmp_path: Path
) -> None:
    folder = saved(make, tmp_path)
    encoder = TextEncoder.from_pretrained(folder, device="cpu", max_tokens=32, pooling=pooling)
    tokenizer, tower = AutoTokenizer.from_pretrained(folder), AutoModel.from_pretrained(folder)
    alone = []
    for text in TEXTS:
        with torch.no_grad():
            ids = tokenizer(text, return_tensors="pt")["input_ids"]
            mask = torch.ones_like(ids)  # a padding token that is the text's own is read
            hidden = tower(input_ids=ids, attention_mask=mask).last_hidden_state[0]
        vector = (hidden[0] if pooling == "cls" else hidden.mean(dim=0)).numpy()
        alone.append(vector / np.linalg.norm(vector))
    together = encoder.encode(TEXTS)
    np.testing.assert_allclose(together, alone, atol=1e-5)
    assert np.abs(together @ together.T - 1).max() > 0.05  # not all the same


def test_attention_stays_within_a_text() -> None:
    config = BertConfig(**SIZES)
    texts = [[1] * 5, [1] * 5, [1] * 3, [1], [1], [1]]
    packing = pack(texts, config, torch.device("cpu"))["packing"]
    assert packing.runs == [(2, 5), (1, 3), (3, 1)]
    query, key, value = torch.randn(3, 1, 2, 16, 8, generator=torch.Generator().manual_seed(0))
    mixed, _ = attend(torch.nn.Module(), query, key, value, None, packing=packing, scaling=0.3)
    text_of = torch.repeat_interleave(torch.arange(6), torch.tensor([5, 5, 3, 1, 1, 1]))
    apart = text_of[:, None] != text_of
    scores = (query @ key.transpose(2, 3) * 0.3).masked_fill(apart, -torch.inf)
    torch.testing.assert_close(mixed, (scores.softmax(dim=3) @ value).transpose(1, 2))


def test_pooling_keeps_to_a_text() -> None:
    packing = pack([[1, 1], [1, 1], [1]], BertConfig(**SIZES), torch.device("cpu"))["packing"]
    hidden = torch.tensor([[1.0], [3.0], [5.0], [7.0], [9.0]])
    assert pool(hidden, packing, "mean").tolist() == [[2.0], [6.0], [9.0]]
    assert pool(hidden, packing, "cls").tolist() == [[1.0], [5.0], [9.0]]


def test_what_mixes_tokens_elsewhere_is_not_packed() -> None:
    assert not {"mpnet", "modernbert", "distilbert", "t5"} & PACKABLE
