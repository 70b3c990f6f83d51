"""The last N events of a shopper -> the next-interest vector.

A small pre-LN causal Transformer over item vectors, event types and the time between
events, after SASRec (Kang and McAuley 2018). Position k sees events up to k and no later
one, so one pass in training gives the vectors after every event. Knows nothing of texts,
catalogues or of what the vector is compared with.
"""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import nn
from torch.nn.functional import gelu, normalize, scaled_dot_product_attention

from .cheap_dropout import cheap_dropout as dropout
from .errors import EncoderSettingsInvalid, WeightsUnavailable

Floats = npt.NDArray[np.float32]
Ints = npt.NDArray[np.int64]
Bytes = npt.NDArray[np.uint8]
Tensor = torch.Tensor

WINDOW = "window.safetensors"  # the part of a release that holds it

# Gaps from under a second to 2^30 s (34 years), by powers of two.
GAP_BUCKETS = 32

# What reading a file raises that is none. RuntimeError: RecursionError as well.
_UNREADABLE = (
    OSError, KeyError, TypeError, ValueError, AttributeError, ArithmeticError, RuntimeError,
    SafetensorError,
)  # fmt: skip

# Windows per call. On one core 100 windows of 50 events take 43 ms of its time at 64 and at
# 128, 49 at 16 and 57 at 256, where the activations leave the cache.
_CHUNK_WINDOWS = 64


@dataclass(frozen=True)
class WindowShape:
    """What a window encoder was built for."""

    dimensions: int
    events: int
    """N: events of a window at most."""
    types: tuple[str, ...]
    """Names of the event types; an event's type is an index into them."""
    layers: int = 2
    heads: int = 2
    dropout: float = 0.3

    def __post_init__(self) -> None:
        if self.dimensions < 1 or self.heads < 1 or self.dimensions % self.heads:
            raise EncoderSettingsInvalid(
                f"dimensions is {self.dimensions}: it must be a multiple of the {self.heads} heads"
            )
        if self.events < 1 or self.layers < 1 or not self.types:
            raise EncoderSettingsInvalid(
                "a window encoder needs at least one event, one layer and one event type; "
                f"it was given {self.events}, {self.layers} and {len(self.types)}"
            )


class WindowEncoder(nn.Module):
    """`forward` for training, `encode` for serving; both give the same numbers."""

    def __init__(self, shape: WindowShape) -> None:
        super().__init__()
        self.shape = shape
        width = shape.dimensions
        self.at_place = nn.Embedding(shape.events, width)
        self.of_type = nn.Embedding(len(shape.types), width)
        self.after_gap = nn.Embedding(GAP_BUCKETS, width)
        self.layers = nn.ModuleList(
            _Layer(width, shape.heads, shape.dropout) for _ in range(shape.layers)
        )
        self.last_norm = nn.LayerNorm(width)
        # Small, so that at first a window says what its items say.
        for table in (self.at_place, self.of_type, self.after_gap):
            nn.init.normal_(table.weight, std=0.02)

    def forward(self, vectors: Tensor, types: Tensor, t_ms: Tensor) -> Tensor:
        """Hidden states (n, L, D) after each of L events, oldest first, padding after them.

        `vectors` (n, L, D) are unit rows (zeros for an event without an item), `types` and
        `t_ms` (n, L) int64. What stands in the padding changes nothing before it.
        """
        x = self._embed(vectors, types, t_ms)
        for layer in self.layers:
            x = layer(x)
        hidden: Tensor = self.last_norm(x)
        return hidden

    @torch.inference_mode()
    def encode(self, vectors: Floats, types: Bytes, t_ms: Ints, lengths: Ints) -> Floats:
        """Next-interest vectors, unit rows (n, D), float32: states after windows' last events.

        `vectors` (n, N, D), `types` and `t_ms` (n, N), oldest first; `lengths` (n,) is the
        number of events, 1 to N, and what lies beyond it is not read. Raises ValueError.
        """
        self._check(vectors, types, t_ms, lengths)
        self.eval()
        device = self.at_place.weight.device
        out = np.empty((len(vectors), self.shape.dimensions), dtype=np.float32)
        # Windows of like length together: no work on padding.
        order = np.argsort(lengths, kind="stable")
        for start in range(0, len(order), _CHUNK_WINDOWS):
            rows = order[start : start + _CHUNK_WINDOWS]
            longest = int(lengths[rows].max())
            x = self._embed(
                torch.from_numpy(vectors[rows, :longest]).to(device),
                torch.from_numpy(types[rows, :longest].astype(np.int64)).to(device),
                torch.from_numpy(t_ms[rows, :longest]).to(device),
            )
            *early, final = (layer for layer in self.layers if isinstance(layer, _Layer))
            for layer in early:
                x = layer(x)
            last = torch.from_numpy(lengths[rows] - 1).to(device)
            # Of the last layer only one position is asked for: a sixth of its work.
            x = self.last_norm(final.at(x, last))
            out[rows] = normalize(x.float(), eps=1e-12).cpu().numpy()
        return out

    def save(self, path: Path) -> None:
        """One safetensors file, its shape in the header."""
        tensors = {name: value.contiguous().cpu() for name, value in self.state_dict().items()}
        path.write_bytes(save(tensors, metadata={"shape": json.dumps(asdict(self.shape))}))

    @classmethod
    def load(cls, path: Path, device: str | torch.device = "cpu") -> WindowEncoder:
        """Read what `save` wrote. Raises WeightsUnavailable for anything else."""
        try:
            with safe_open(path, framework="pt") as file:
                told: dict[str, Any] = json.loads((file.metadata() or {})["shape"])
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            shape = WindowShape(**told | {"types": tuple(told["types"])})
            # Made-up sizes must not take the memory of what they say.
            place = tensors["at_place.weight"].shape
            if place != (shape.events, shape.dimensions) or shape.layers > len(tensors):
                raise ValueError("its weights are of another shape than its header says")
            encoder = cls(shape)
            encoder.load_state_dict(tensors)
        except _UNREADABLE as error:
            raise WeightsUnavailable(
                f"{path} is not a window encoder's file ({str(error).splitlines()[0][:120]}); "
                "delete its release and train again, or point CURRENT at another"
            ) from error
        return encoder.to(device).eval()

    def _embed(self, vectors: Tensor, types: Tensor, t_ms: Tensor) -> Tensor:
        scaled = vectors * (0.5 * math.sqrt(self.shape.dimensions))
        positions = self.at_place.weight[: vectors.shape[1]]  # (L, D)
        x = scaled + positions + self.of_type(types) + self.after_gap(gap_buckets(t_ms))
        return dropout(x, self.shape.dropout, self.training)

    def _check(self, vectors: Floats, types: Bytes, t_ms: Ints, lengths: Ints) -> None:
        n, most, width = len(lengths), self.shape.events, self.shape.dimensions
        if vectors.ndim != 3 or vectors.shape[0] != n or vectors.shape[2] != width:
            raise ValueError(f"vectors: expected ({n}, N, {width}), got {vectors.shape}")
        if vectors.shape[1] > most:
            raise ValueError(f"this encoder reads {most} events, got windows of {vectors.shape[1]}")
        if types.shape != vectors.shape[:2] or t_ms.shape != vectors.shape[:2]:
            raise ValueError(
                f"types and t_ms: expected {vectors.shape[:2]}, got {types.shape} and {t_ms.shape}"
            )
        if n and not (lengths.min() >= 1 and lengths.max() <= vectors.shape[1]):
            raise ValueError(
                f"lengths: expected 1 to {vectors.shape[1]}, got {lengths.min()} to {lengths.max()}"
            )


def gap_buckets(t_ms: Tensor) -> Tensor:
    """Times (n, L) -> power-of-two classes of the seconds since the event before, 0 first."""
    seconds = (t_ms[:, 1:] - t_ms[:, :-1]).clamp(min=0).double() / 1000.0
    # float64: every power of two is met exactly, so all devices agree on the class.
    classes = torch.log2(1.0 + seconds).floor().long().clamp(max=GAP_BUCKETS - 1)
    return torch.cat([torch.zeros_like(t_ms[:, :1]), classes], dim=1)


class _Layer(nn.Module):
    def __init__(self, width: int, heads: int, rate: float) -> None:
        super().__init__()
        self.heads = heads
        self.rate = rate
        self.norm = nn.LayerNorm(width)
        self.query = nn.Linear(width, width)
        self.key_value = nn.Linear(width, 2 * width)
        self.mix = nn.Linear(width, width)
        self.wide_norm = nn.LayerNorm(width)
        self.widen = nn.Linear(width, 4 * width)
        self.narrow = nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:  # (n, L, D) -> (n, L, D)
        seen = self.norm(x)
        key, value = self._split(self.key_value(seen)).chunk(2, dim=1)
        mixed = scaled_dot_product_attention(
            self._split(self.query(seen)), key, value, is_causal=True
        )  # (n, heads, L, D / heads)
        return self._rest(x, mixed.transpose(1, 2).flatten(2))

    def at(self, x: Tensor, last: Tensor) -> Tensor:
        """The output (n, D) at position `last` (n,) of each row of x (n, L, D)."""
        rows = torch.arange(len(x), device=x.device)
        seen = self.norm(x)
        key, value = self._split(self.key_value(seen)).chunk(2, dim=1)
        query = self._split(self.query(seen[rows, last]).unsqueeze(1))  # (n, heads, 1, D / heads)
        visible = torch.arange(x.shape[1], device=x.device) <= last[:, None]  # (n, L)
        mixed = scaled_dot_product_attention(query, key, value, attn_mask=visible[:, None, None])
        return self._rest(x[rows, last], mixed.transpose(1, 2).flatten(1))

    def _split(self, x: Tensor) -> Tensor:  # (n, L, k * D) -> (n, k * heads, L, D / heads)
        width = self.query.out_features // self.heads
        return x.reshape(*x.shape[:2], -1, width).transpose(1, 2)

    def _rest(self, x: Tensor, mixed: Tensor) -> Tensor:
        x = x + dropout(self.mix(mixed), self.rate, self.training)
        wide = dropout(gelu(self.widen(self.wide_norm(x))), self.rate, self.training)
        return x + dropout(self.narrow(wide), self.rate, self.training)


def unit(x: Tensor) -> Tensor:
    """Rows scaled to length 1; a row of zeros stays as it is."""
    return normalize(x, dim=-1)
