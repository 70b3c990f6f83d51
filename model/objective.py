"""Losses, and the corrections that make their samples honest.

PURE. Tensors in, scalars out. It knows neither the network nor where a batch came from.
"""

from __future__ import annotations

import torch
from torch.nn.functional import cosine_similarity, cross_entropy

Tensor = torch.Tensor

UNKNOWN = -1  # the label of an example whose horizon has not passed

# Below this a rare item's correction would outweigh any cosine that can be learned.
_LEAST_CHANCE = 1e-6


def log_chances(shares: Tensor, draws: int, uniform: int) -> Tensor:
    """Log of the chance that each item is among the candidates of one step.

    `shares` (n,) are the items' shares of all targets, of which `draws` came into the batch;
    `uniform` further items were drawn evenly among the n. An item is a candidate once however
    often it was drawn, so its chance is 1 - (1 - p)^draws * (1 - 1/n)^uniform.
    """
    n = len(shares)
    missed = draws * torch.log1p(-shares.double().clamp(max=1 - 1e-9))
    if uniform:
        missed = missed + uniform * torch.log1p(torch.tensor(-1.0 / max(n, 2), dtype=torch.double))
    return (-torch.expm1(missed)).clamp(min=_LEAST_CHANCE).log().to(shares.dtype)


def sampled_softmax(
    queries: Tensor,
    candidates: Tensor,
    target: Tensor,
    scale: Tensor,
    log_chance: Tensor | None = None,
    hard: Tensor | None = None,
    weight: Tensor | None = None,
) -> Tensor:
    """Mean cross-entropy of picking each query's item among the step's candidates.

    `queries` (m, D) and `candidates` (c, D) are unit rows, `target` (m,) is a column of
    `candidates`, `scale` the inverse temperature. `log_chance` (c,) corrects for popular
    items being candidates more often (logQ: Bengio and Senecal 2008; Yi et al. 2019);
    without it the candidates are taken for the whole catalogue. `hard` (m, h, D) are further
    negatives of one query each, not corrected. `weight` (m,) is what each query counts, of which
    one is positive. Candidates are different items, so that no
    query is punished for its own target under another column.
    """
    logits = scale * (queries @ candidates.T)  # (m, c)
    if log_chance is not None:
        logits = logits - log_chance
    if hard is not None:
        own = scale * torch.einsum("md,mhd->mh", queries, hard)  # (m, h)
        logits = torch.cat([logits, own], dim=1)
    if weight is None:
        return cross_entropy(logits.float(), target)
    each = cross_entropy(logits.float(), target, reduction="none")  # (m,)
    return (each * weight).sum() / weight.sum()


def drift(new: Tensor, old: Tensor) -> Tensor:
    """How far vectors (m, D) moved from their old selves: mean of 1 - cosine, 0 to 2.

    Added to the loss it keeps a new space near the old one, so that stored vectors carry
    over (backward-compatible training: Shen et al. 2020).
    """
    return 1.0 - cosine_similarity(new.float(), old.float(), dim=1).mean()
