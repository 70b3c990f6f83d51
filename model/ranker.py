"""Four signals -> one score: which of them to trust, for this shopper and this item.

    score = sum over signals k of  gate_k(shopper, item) * shape_k(signal_k)  + prior(shopper)
            + a layer of 16 units over all of it

Two signals are cosines (next interest, decayed text), two are counts (co-visitation, the
shopper's own purchases), which are shaped by a logarithm whose knee is learned. Gates are
positive and depend on how much is known: of the shopper (events, repeats) and of the item
(events, decayed). So a new item leans on its text and a regular customer on her habits. The
layer is for what no gate can say: that two signals agree, or that a count is of the wrong size.

An item's decayed counts are also signals of their own, of a month and of days: what sells now
and did not a month ago is new, or back, or in season.

Items that a shopper had before and items that are new to her have weights of their own, and the
prior is between the two: some shops sell the same again and some never do, and what says which
new item is not what says which old one. With one set for both, it was a choice between them.

The weights are a handful of plain arrays; torch is only imported to train them.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError
from safetensors.numpy import load_file, save

from .errors import NothingToLearn, WeightsUnavailable

if TYPE_CHECKING:
    import torch

Floats = npt.NDArray[np.float32]
Weights = dict[str, Floats]

RANKER: Final = "ranker.safetensors"  # the part of a release that holds the weights
SIGNALS: Final = ("next_interest", "text", "covisitation", "own")
_COUNTS: Final = (2, 3)  # of SIGNALS: counts, not cosines
SHOPPER: Final = ("log_events", "log_own", "repeat_share")
# What is known of an item: decayed counts of all shoppers' events with it, on the scale of
# co-visitation and on a tenth of that, and the days since this shopper last had it (0: never).
ITEM: Final = ("log_events", "log_recent", "log_own_days")

_UNITS: Final = 16
KINDS: Final = ("new", "had")  # of items, for this shopper
_SHAPES: Final[Mapping[str, tuple[int, ...]]] = {
    "gate": (len(KINDS), len(SIGNALS)),  # before softplus
    "gate_shopper": (len(KINDS), len(SIGNALS), len(SHOPPER)),
    "gate_item": (len(KINDS), len(SIGNALS)),
    # Log of 1 / the count at which the logarithm bends.
    "knee": (len(KINDS), len(_COUNTS)),
    "item": (len(KINDS), len(ITEM)),  # what is known of an item adds
    "had": (1,),  # what it adds that the shopper had the item at all
    "had_shopper": (len(SHOPPER),),
    # The layer: of shaped signals and the item, of the shopper, and out.
    "mix": (len(KINDS), _UNITS, len(SIGNALS) + len(ITEM)),
    "mix_shopper": (len(KINDS), _UNITS, len(SHOPPER)),
    "mix_bias": (len(KINDS), _UNITS),
    "mix_out": (len(KINDS), _UNITS),
}
_FIRST_KNEE: Final = float(np.log(1 / 0.02))
# All shaped signals, and all that gates depend on, of about the same size: else a learning
# rate that suits the counts leaves the cosines where they were.
_COSINE_SCALE: Final = 10.0
_USUAL_LOG: Final = 3.0
_USUAL: Final = (_USUAL_LOG, 1.0, 0.0)  # of ITEM
# Shaped signals reach 5, and a unit should begin near its bend.
_MIX_SCALE: Final = 0.2


@dataclass(frozen=True)
class Cases:
    """n rankings of C candidate items each, with what really came next.

    Candidates that stand high in a signal are not typical: a ranker trained among them alone
    learns to distrust that signal (it then ranked worse than either count by itself). So
    take the whole catalogue, or give each candidate's chance of having been drawn.
    """

    signals: Floats  # (n, C, 4), in the order of SIGNALS
    items: Floats  # (n, C, 3), in the order of ITEM
    shopper: Floats  # (n, 3): log(1 + events), log(1 + items had), share of repeats among events
    target: Floats  # (n, C) 1 for what came next, 0 for the rest
    log_chance: Floats  # (n, C) log of the chance to be a candidate, 0 for what always is

    def __post_init__(self) -> None:
        n, count = self.target.shape
        shapes = {
            "signals": (n, count, len(SIGNALS)),
            "items": (n, count, len(ITEM)),
            "shopper": (n, len(SHOPPER)),
            "log_chance": (n, count),
        }
        for name, shape in shapes.items():
            if getattr(self, name).shape != shape:
                raise ValueError(f"{name}: expected {shape}, got {getattr(self, name).shape}")


def first_weights() -> Weights:
    """The blend before any training: the sum that was best by hand on three data sets."""
    zeros = {name: np.zeros(shape, dtype=np.float32) for name, shape in _SHAPES.items()}
    softplus_inverse = np.log(np.expm1(np.array([1.0, 0.3, 1.0, 1.0])))
    return zeros | {
        "gate": np.tile(softplus_inverse, (len(KINDS), 1)).astype(np.float32),
        "knee": np.full((len(KINDS), len(_COUNTS)), _FIRST_KNEE, dtype=np.float32),
    }


def score(weights: Weights, signals: Floats, items: Floats, shopper: Floats) -> Floats:
    """Scores (..., C) of C items from signals (..., C, 4), items (..., C, 3), shopper (..., 3).

    Any leading axes. Counts of nothing are 0, cosines of nothing are 0. Readers, who have no
    torch, compute the same in `profiles/ranking.py`.
    """
    import torch

    tensors = {name: torch.from_numpy(value) for name, value in weights.items()}
    with torch.inference_mode():
        given = (torch.from_numpy(each) for each in (signals, items, shopper))
        return score_torch(tensors, *given).numpy()


def score_torch(
    weights: Mapping[str, torch.Tensor],
    signals: torch.Tensor,
    items: torch.Tensor,
    shopper: torch.Tensor,
) -> torch.Tensor:
    """The same as `score`, with gradients."""
    import torch
    from torch.nn.functional import softplus

    known = items - torch.tensor(_USUAL)  # (..., C, 3)
    of_kind = []
    for kind in range(len(KINDS)):
        gate = (shopper @ weights["gate_shopper"][kind].T + weights["gate"][kind]).unsqueeze(-2)
        gate = softplus(gate + known[..., :1] * weights["gate_item"][kind])  # (..., C, 4)
        counts = torch.log1p(signals[..., _COUNTS[0] :] * weights["knee"][kind].exp())
        shaped = torch.cat([signals[..., : _COUNTS[0]] * _COSINE_SCALE, counts], dim=-1)
        read = torch.cat([shaped, known], dim=-1)  # (..., C, 7)
        about = shopper @ weights["mix_shopper"][kind].T + weights["mix_bias"][kind]
        units = torch.relu(read @ weights["mix"][kind].T + about.unsqueeze(-2))  # (..., C, 16)
        mixed = units @ weights["mix_out"][kind]
        of_kind.append((gate * shaped).sum(-1) + known @ weights["item"][kind] + mixed)
    new, again = of_kind
    prior = weights["had"] + (shopper @ weights["had_shopper"]).unsqueeze(-1)  # (..., 1)
    return torch.where(signals[..., _COUNTS[1]] > 0, again + prior, new)


def fit(
    cases: Cases,
    weights: Weights | None = None,
    *,
    epochs: int = 30,
    batch: int = 64,
    learning_rate: float = 0.05,
    decay: float = 1e-3,
    seed: int = 0,
) -> Weights:
    """Train a ranker on cases, from `weights` or the blend by hand.

    The loss is the cross-entropy between softmax(score) and what came next, each case by
    the number of its targets. `decay` pulls the gates' dependences towards none. Raises
    NothingToLearn where no case has a target.
    """
    import torch

    useful = np.flatnonzero(cases.target.sum(axis=1) > 0)
    if not len(useful):
        raise NothingToLearn(
            "no case for the ranker has a target among its candidates: "
            "wait for shoppers to come back, or take more candidates"
        )
    start = first_weights() if weights is None else weights
    if not start["mix"].any():  # units that read alike would stay alike
        drawn = np.random.default_rng(seed).normal(size=_SHAPES["mix"]) * _MIX_SCALE
        start = start | {"mix": drawn.astype(np.float32)}
    learned = {
        name: torch.tensor(start[name], dtype=torch.float32, requires_grad=True) for name in _SHAPES
    }
    tensors = {
        name: torch.from_numpy(np.ascontiguousarray(getattr(cases, name)))
        for name in ("signals", "items", "shopper", "target", "log_chance")
    }
    optimizer = torch.optim.Adam(list(learned.values()), lr=learning_rate)
    total = epochs * -(-len(useful) // batch)
    for step, rows in enumerate(_batches(useful, batch, epochs, seed)):
        optimizer.param_groups[0]["lr"] = learning_rate * (1 - step / total)
        here = {name: tensor[rows] for name, tensor in tensors.items()}
        target, log_chance = here.pop("target"), here.pop("log_chance")  # (b, C)
        logits = torch.log_softmax(score_torch(learned, **here) - log_chance, dim=1)
        loss = -(target * logits).sum() / target.sum()
        bend = learned["gate_shopper"].square().sum() + learned["gate_item"].square().sum()
        optimizer.zero_grad()
        (loss + decay * bend).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    return {name: value.detach().numpy().copy() for name, value in learned.items()}


def thinned(cases: Cases, seed: int, *, top: int = 40, others: int = 120) -> Cases:
    """The same rankings of fewer items: the targets, the `top` highest of every signal and of both
    counts, and `others` of the rest, with the chance that each of these had."""
    n, count = cases.target.shape
    size = min(count, (len(SIGNALS) + 2) * top + others)
    if size == count:
        return cases
    rng = np.random.default_rng(seed)
    chosen = np.empty((n, size), dtype=np.int64)
    log_chance = np.zeros((n, size), dtype=np.float32)
    for row in range(n):
        ways = [*cases.signals[row].T, *cases.items[row, :, :2].T]
        best = [np.argpartition(way, -top)[-top:] for way in ways]
        high = np.unique(
            np.concatenate([part[way[part] > 0] for part, way in zip(best, ways, strict=True)])
        )
        rest = np.setdiff1d(np.arange(count), high)
        drawn = rng.permutation(rest)[: size - len(high)]
        # What came next always takes part; its chance is that of what it is among.
        missed = np.setdiff1d(np.flatnonzero(cases.target[row]), [*high, *drawn])[: len(drawn)]
        drawn[len(drawn) - len(missed) :] = missed
        chosen[row] = np.concatenate([high, drawn])
        log_chance[row, len(high) :] = np.log((size - len(high)) / len(rest))
    rows = np.arange(n)[:, None]
    return Cases(
        cases.signals[rows, chosen],
        cases.items[rows, chosen],
        cases.shopper,
        cases.target[rows, chosen],
        cases.log_chance[rows, chosen] + log_chance,
    )


def joined(parts: Iterable[Cases]) -> Cases:
    """One after the other."""
    parts = list(parts)
    return Cases(
        *(
            np.concatenate([getattr(part, name) for part in parts])
            for name in ("signals", "items", "shopper", "target", "log_chance")
        )
    )


def save_weights(weights: Weights, path: Path) -> None:
    """One safetensors file of small arrays."""
    path.write_bytes(save({name: np.ascontiguousarray(weights[name]) for name in _SHAPES}))


def load_weights(path: Path) -> Weights:
    """Read what `save_weights` wrote. Raises WeightsUnavailable for anything else."""
    try:
        weights: Weights = load_file(path)
    except (OSError, SafetensorError, AttributeError) as error:  # numbers that numpy has not
        raise _no_ranker(path, str(error)) from error
    if {name: array.shape for name, array in weights.items()} != dict(_SHAPES):
        raise _no_ranker(path, "its arrays have other names or shapes")
    return weights


def _no_ranker(path: Path, why: str) -> WeightsUnavailable:
    return WeightsUnavailable(
        f"{path} is not a ranker's file ({why}); "
        "delete its release and train again, or point CURRENT at another"
    )


def _batches(
    rows: npt.NDArray[np.int64], size: int, epochs: int, seed: int
) -> Iterator[npt.NDArray[np.int64]]:
    rng = np.random.default_rng(seed)
    for _ in range(epochs):
        order = rng.permutation(rows)
        for start in range(0, len(order), size):
            yield order[start : start + size]
