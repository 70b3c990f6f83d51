"""Dropout whose masks are slices of one large mask.

Drawing random numbers is a fifth of a training step on a CPU. A slice at a random place of
a pool of four million is random enough, and costs one number. On a GPU this is plain
dropout.
"""

from __future__ import annotations

from functools import cache

import torch
from torch.nn.functional import dropout

_POOL = 1 << 22


def cheap_dropout(x: torch.Tensor, rate: float, training: bool) -> torch.Tensor:
    """`torch.nn.functional.dropout`, with the place in the pool from torch's generator."""
    size = x.numel()
    if not training or rate <= 0 or x.device.type != "cpu" or size > _POOL // 4:
        return dropout(x, rate, training)
    start = int(torch.randint(_POOL - size, ()))
    return x * _pool(rate)[start : start + size].view_as(x)


@cache
def _pool(rate: float) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    kept = torch.rand(_POOL, generator=generator) >= rate
    return kept.float() / (1.0 - rate)
