"""Texts side by side in one row, without padding: each token is worked on once and no other.

Linear layers and norms see tokens alone; attention is the one part that must know where a text
ends. transformers calls `attend` for it, under the name `PACKED`. Knows nothing of what is done
with hidden states.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from inspect import signature
from itertools import chain
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import torch
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface

try:  # torch 2.15 and up
    from torch.nn.attention.varlen import varlen_attn
except ImportError:
    varlen_attn = None  # type: ignore[assignment]

Tensor = torch.Tensor
Ints = npt.NDArray[np.int64]

PACKED: Final = "penchant_packed"

_VARLEN_TAKES_SCALE: Final = (
    varlen_attn is not None and "scale" in signature(varlen_attn).parameters
)
_AFTER_PADDING: Final = {
    "roberta",
    "xlm-roberta",
    "camembert",
}  # positions count from the pad id
PACKABLE: Final = {"bert", *_AFTER_PADDING}
"""Types of towers that take tokens' positions as an argument and mix tokens in attention alone."""


@dataclass(frozen=True)
class Packing:
    """Where the texts of one row of tokens begin and end."""

    runs: list[tuple[int, int]]
    """(texts, tokens of each) of neighbours that are equally long, in the order of the row."""
    starts: Tensor  # (n + 1,) int32, on the tower's device


def pack(texts: Sequence[list[int]], config: Any, device: torch.device) -> dict[str, Any]:
    """What a tower of `config` is called with, for texts (n) of token ids, none of them empty."""
    lengths = np.fromiter(map(len, texts), dtype=np.int64, count=len(texts))  # (n,)
    starts = np.concatenate([[0], np.cumsum(lengths)])  # (n + 1,)
    ids = np.fromiter(chain.from_iterable(texts), dtype=np.int64, count=starts[-1])  # (T,)
    positions = np.arange(starts[-1]) - np.repeat(starts[:-1], lengths)  # (T,)
    if config.model_type in _AFTER_PADDING:
        positions = _after_padding(ids, starts, lengths, config.pad_token_id)
    cuts = np.concatenate([[0], np.flatnonzero(np.diff(lengths)) + 1, [len(lengths)]])
    runs = list(zip(np.diff(cuts).tolist(), lengths[cuts[:-1]].tolist(), strict=True))
    return {
        "input_ids": to_device(ids, device)[None],  # (1, T)
        "position_ids": to_device(positions, device)[None],  # (1, T)
        "packing": Packing(runs, to_device(starts.astype(np.int32), device)),
    }


def _after_padding(ids: Ints, starts: Ints, lengths: Ints, pad_id: int) -> Ints:
    """Positions (T,) that begin after the padding's, which a text's own padding tokens have."""
    read = np.concatenate([[0], np.cumsum(ids != pad_id)])  # (T + 1,)
    positions = pad_id + read[1:] - np.repeat(read[starts[:-1]], lengths)
    return np.where(ids != pad_id, positions, pad_id)


def to_device(array: np.ndarray[Any, Any], device: torch.device) -> Tensor:
    """`array` on `device`; a GPU copies it while the caller goes on."""
    tensor = torch.from_numpy(array)
    if device.type == "cuda":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor


def pool(hidden: Tensor, packing: Packing, pooling: str) -> Tensor:
    """(T, W) -> (n, W) in float32, where sums over tokens keep their digits."""
    if pooling == "cls":
        return hidden[packing.starts[:-1]].float()
    means = [
        part.view(texts, tokens, -1).float().mean(dim=1)
        for part, (texts, tokens) in zip(_split(hidden, packing.runs), packing.runs, strict=True)
    ]
    return torch.cat(means)


def attend(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    packing: Packing,
    scaling: float | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """Attention of each text's tokens (1, H, T, d) to those of the same text: (1, T, H, d)."""
    q, k, v = (each[0].transpose(0, 1) for each in (query, key, value))  # (T, H, d)
    if _has_varlen(query):
        longest = max(tokens for _, tokens in packing.runs)
        starts = packing.starts
        mixed = varlen_attn(q, k, v, starts, starts, longest, longest, scale=scaling)
        assert isinstance(mixed, Tensor)
    else:
        mixed = _attend_by_length(q, k, v, packing.runs, scaling)
    return mixed[None], None


def _has_varlen(query: Tensor) -> bool:
    """Whether one kernel takes texts of any length: FlashAttention's conditions."""
    return (
        _VARLEN_TAKES_SCALE
        and query.device.type == "cuda"
        and query.dtype in (torch.float16, torch.bfloat16)
        and query.shape[-1] % 8 == 0
        and torch.cuda.get_device_capability(query.device) >= (8, 0)
    )


def _attend_by_length(
    query: Tensor, key: Tensor, value: Tensor, runs: list[tuple[int, int]], scaling: float | None
) -> Tensor:
    """(T, H, d): one call for all texts of one length. Neither mask nor padding, on any device."""
    out = torch.empty_like(query)
    parts = [_split(each, runs) for each in (query, key, value, out)]
    for (texts, tokens), *part in zip(runs, *parts, strict=True):
        # (texts, H, tokens, d)
        q, k, v, target = (
            each.view(texts, tokens, *each.shape[1:]).transpose(1, 2) for each in part
        )
        target.copy_(scaled_dot_product_attention(q, k, v, scale=scaling))
    return out


def _split(rows: Tensor, runs: list[tuple[int, int]]) -> Sequence[Tensor]:
    return torch.split(rows, [texts * tokens for texts, tokens in runs])


AttentionInterface.register(PACKED, attend)
