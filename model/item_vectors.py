"""Items as vectors: projected text, plus what was learned of each item by name.

    vector = unit(projection(text feature) + residual)

The residual of an item that training hardly met says little, and what it says is mostly
that the item was a negative; so it is zero at serving until the item has been met often
enough, and a new item stands where its text puts it. Knows nothing of windows.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch
from torch import nn
from torch.nn.functional import linear

from .cheap_dropout import cheap_dropout as dropout
from .projection import PRIOR_TEXTS, Floats, Projection
from .window_encoder import unit

Counts = npt.NDArray[np.int64]
Tensor = torch.Tensor

# Small vectors turn fast under Adam, whose steps are of one size: at the usual scale the
# same training reached .056 Recall@10 on Amazon Beauty, at this one .080.
TEXT_SCALE = 0.05
RESIDUAL_SCALE = 0.02
TEXT_DROPOUT = 0.1


class ItemVectors(nn.Module):
    """Trainable item vectors of one catalogue, started at a base's projection.

    `features` (n, W) are the frozen tower's unit rows. They are kept whitened on this
    catalogue, which is what makes the projection quick to train; `projection` gives the
    same map for raw features, as a release keeps it.
    """

    centre: Tensor
    whiten: Tensor
    features: Tensor

    def __init__(
        self,
        features: Floats,
        base: Projection,
        residual: Floats | None = None,
        seed: int = 0,
    ) -> None:
        """`residual` (n, D) continues an earlier training, in units of unit vectors."""
        super().__init__()
        centre, whiten, colour = _whitening(features, base.width)
        self.register_buffer("centre", torch.from_numpy(centre))  # (W,)
        self.register_buffer("whiten", torch.from_numpy(whiten))  # (W, W)
        self.register_buffer("features", torch.from_numpy((features - centre) @ whiten))  # (n, W)
        start = colour @ base.matrix  # (W, D)
        bias = (centre - base.centre) @ base.matrix  # (D,)
        text = np.asarray((features - centre) @ whiten @ start + bias)
        # One scale for both parts: text of RMS TEXT_SCALE in each dimension.
        size = TEXT_SCALE / max(
            float(np.sqrt(np.mean(np.square(text)))) if len(text) else 1.0, 1e-9
        )
        self.text = nn.Linear(base.width, base.dimensions)
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            self.text.weight.copy_(torch.from_numpy((start * size).T.astype(np.float32)))
            self.text.bias.copy_(torch.from_numpy((bias * size).astype(np.float32)))
        noise = torch.randn((len(features), base.dimensions), generator=generator) * RESIDUAL_SCALE
        if residual is not None:
            lengths = np.linalg.norm(text * size, axis=1, keepdims=True)
            noise = torch.from_numpy((residual * lengths).astype(np.float32))
        self.residual = nn.Parameter(noise)  # (n, D)

    def forward(self, rows: Tensor) -> Tensor:
        """Unit rows (m, D) of catalogue rows (m,)."""
        return self.from_whitened(rows, self.features[rows])

    def from_whitened(self, rows: Tensor, features: Tensor) -> Tensor:
        """As `forward`, of other features (m, W) than those kept, whitened already."""
        text = dropout(features, TEXT_DROPOUT, self.training)
        return unit(self.text(text) + self.residual[rows])

    def whitened(self, features: Tensor) -> Tensor:
        return (features - self.centre) @ self.whiten

    def projection(self) -> Projection:
        """The text part as a release keeps it: `unit((x - centre) @ matrix)`."""
        matrix = (self.whiten.double() @ self.text.weight.double().T).cpu().detach().numpy()
        bias = self.text.bias.double().cpu().detach().numpy()
        centre = self.centre.double().cpu().numpy()
        # A bias is a centre seen from behind: find c with -c @ matrix = bias, of least length.
        shift = np.linalg.lstsq(matrix.T, bias, rcond=None)[0]
        return Projection((centre - shift).astype(np.float32), matrix.astype(np.float32))

    @torch.inference_mode()
    def serving(self, counts: Counts, least: int) -> tuple[Floats, Floats]:
        """Unit item vectors (n, D), and the residuals (n, D) in them, in units of the text part.

        Items with `least` or fewer of the training events in `counts` (n,) have no residual.
        """
        text = linear(self.features, self.text.weight, self.text.bias)  # (n, D)
        known = torch.from_numpy(counts > least).to(text.device)
        residual = self.residual * known[:, None]
        vectors = unit(text + residual)
        relative = residual / text.norm(dim=1, keepdim=True).clamp(min=1e-12)
        return vectors.cpu().numpy(), relative.cpu().numpy()


def _whitening(features: Floats, width: int) -> tuple[Floats, Floats, Floats]:
    """Centre (W,), the map to unit variances (W, W), and the way back (W, W).

    Leans towards an unknown catalogue's variances (1/W) as `fit_projection` does, so that
    few items, one or none are no reason to fail.
    """
    n = len(features)
    mean = features.mean(axis=0, dtype=np.float64) if n else np.zeros(width)
    centred = features - mean
    scatter = centred.T @ centred + np.eye(width) * (PRIOR_TEXTS / width)
    variances, directions = np.linalg.eigh(scatter / (n + PRIOR_TEXTS))
    whiten = directions * variances**-0.5
    colour = directions.T * variances[:, None] ** 0.5
    centre = mean * n / (n + PRIOR_TEXTS)
    return centre.astype(np.float32), whiten.astype(np.float32), colour.astype(np.float32)
