"""A text tower that learns along: with LoRA, in its last layers, or whole.

Reads a few of a step's items anew, with gradients; the trainer keeps what the others were
last time. Knows nothing of windows or losses. LoRA needs `peft`, imported only here.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final, Literal, get_args

import numpy as np
import numpy.typing as npt
import torch
from torch import nn
from torch.nn.functional import normalize

from .encoder import DType, Pooling, load_tower, pad, pick_device, pick_dtype, pool, tower_folder
from .errors import EncoderSettingsInvalid, PackageMissing

Floats = npt.NDArray[np.float32]
Tensor = torch.Tensor
Method = Literal["lora", "last", "full"]

# 2e-4 for LoRA's new weights and 2e-5 for old ones, at the usual rate of 2e-3.
_RATE_SHARES: Final[Mapping[Method, float]] = {"lora": 0.1, "last": 0.01, "full": 0.01}
_READ_TEXTS = 64  # texts of a batch when the whole catalogue is read


class TunableTower:
    """A base's tower over the texts of one catalogue, with some of its weights free."""

    def __init__(
        self,
        base: str | Path,
        texts: Sequence[str],
        method: Method,
        *,
        rank: int = 8,
        last_layers: int = 1,
        max_tokens: int = 64,
        pooling: Pooling = "mean",
        passage_prefix: str = "",
        device: str = "auto",
        dtype: DType = "float32",
    ) -> None:
        """`rank` is LoRA's, `last_layers` are those that `last` sets free.

        Raises EncoderSettingsInvalid, WeightsUnavailable, and PackageMissing for `peft`.
        """
        if method not in get_args(Method):
            raise EncoderSettingsInvalid(
                f"{method!r} is no way to tune; set LEARN_TOWER to frozen, lora, last or full"
            )
        self.rate_share = _RATE_SHARES[method]
        self._folder = tower_folder(base)
        target = pick_device(device)
        tower, tokenizer = load_tower(self._folder, pick_dtype(dtype, target), max_tokens)
        self._tower: Any = _freed(tower, method, rank, last_layers).to(target).train()
        self._device, self._pooling, self._pad_id = target, pooling, tokenizer.pad_id
        self._tokens = tokenizer([passage_prefix + text for text in texts])

    def parameters(self) -> list[nn.Parameter]:
        return [each for each in self._tower.parameters() if each.requires_grad]

    def features(self, rows: Tensor) -> Tensor:
        """Unit rows (k, W) of catalogue rows (k,), with gradients."""
        ids, mask = pad([self._tokens[i] for i in rows.tolist()], self._pad_id)  # (k, L)
        ids, mask = ids.to(self._device), mask.to(self._device)
        hidden = self._tower(input_ids=ids, attention_mask=mask).last_hidden_state  # (k, L, W)
        return normalize(pool(hidden, mask, self._pooling), dim=1)

    @torch.no_grad()
    def all_features(self) -> Floats:
        """Unit rows (n, W) of the whole catalogue, as a release's encoder would give them."""
        self._tower.eval()
        # Texts of like length together, as there is no work on padding then.
        order = np.argsort([len(each) for each in self._tokens], kind="stable")
        out = np.empty((len(order), int(self._tower.config.hidden_size)), dtype=np.float32)
        for start in range(0, len(order), _READ_TEXTS):
            rows = order[start : start + _READ_TEXTS]
            out[rows] = self.features(torch.from_numpy(rows)).float().cpu().numpy()
        self._tower.train()
        return out

    def state_dict(self) -> dict[str, Tensor]:
        """The free weights alone: the others are the base's."""
        return {n: p.detach() for n, p in self._tower.named_parameters() if p.requires_grad}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        with torch.no_grad():
            for name, parameter in self._tower.named_parameters():
                if parameter.requires_grad:
                    parameter.copy_(state[name])

    def save(self, folder: Path) -> None:
        """A tower's folder as any encoder loads it: LoRA merged, the base's tokenizer beside."""
        import shutil

        merge = getattr(self._tower, "merge_and_unload", None)
        tower = self._tower if merge is None else merge()
        tower.save_pretrained(folder, safe_serialization=True)
        for file in self._folder.glob("*"):
            if file.is_file() and not (folder / file.name).exists():
                shutil.copyfile(file, folder / file.name)


def _freed(tower: nn.Module, method: Method, rank: int, last_layers: int) -> nn.Module:
    tower.requires_grad_(method == "full")
    if method == "last":
        layers = _layers(tower)
        if not 1 <= last_layers <= len(layers):
            raise EncoderSettingsInvalid(
                f"{last_layers} layers were to be set free, this base has {len(layers)}"
            )
        for layer in layers[-last_layers:]:
            layer.requires_grad_(True)
    if method == "lora":
        try:
            peft = importlib.import_module("peft")
        except ImportError as error:
            raise PackageMissing(
                "LoRA needs `peft`, which is not installed; install it, "
                "or set LEARN_TOWER to frozen, last or full"
            ) from error
        config = peft.LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear")
        adapted: nn.Module = peft.get_peft_model(tower, config)
        return adapted
    # A pooler has no part in mean or cls pooling, so it would get no gradient.
    for name, parameter in tower.named_parameters():
        if name.startswith("pooler."):
            parameter.requires_grad_(False)
    return tower


def _layers(tower: nn.Module) -> list[nn.Module]:
    """The blocks of a transformer: the longest list of modules in it."""
    lists: Iterable[nn.ModuleList] = (m for m in tower.modules() if isinstance(m, nn.ModuleList))
    return max((list(each) for each in lists), key=len, default=[])
