"""Windows and a base -> a candidate: a folder of weights and the figures it came to.

Trains item vectors, window encoder and heads together, on everything but the newest slice,
which decides when to stop. The text tower stays frozen unless a `Tower` is given. Knows
nothing of schedules, of releases or of whether the candidate will be accepted.

A run that was killed goes on where its last checkpoint was, and ends with the same weights
as one that was not.
"""

from __future__ import annotations

import hashlib
import importlib
import json
import math
import resource
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch
from safetensors.numpy import load_file
from safetensors.numpy import save as save_arrays
from torch import nn

from . import training_rows as tr
from .encoder import pick_device
from .errors import NonFiniteVectors, NothingToLearn, PackageMissing, WeightsUnavailable
from .evaluate import auc, calibration_error, metric, ranks
from .heads import HEADS, HEADS_FILE, Heads
from .item_vectors import ItemVectors
from .objective import balanced_bce, drift, log_chances, sampled_softmax
from .projection import Projection, unit_rows
from .window_encoder import WINDOW, WindowEncoder, WindowShape, unit
from .windows import Labelled

Floats = npt.NDArray[np.float32]
Ints = npt.NDArray[np.int64]
Tensor = torch.Tensor

PROJECTION = "projection.safetensors"
ITEMS = "items.safetensors"
ITEM_IDS = "item_ids.json"
METRICS = "metrics.json"
CHECKPOINT = "checkpoint.pt"

_JUDGED = 2000  # windows that the newest slice is judged on after each epoch
_FIRST_SCALE = 14.0  # 1 / 0.07, the first inverse temperature of CLIP (Radford et al. 2021)
_LAST_SCALE = 100.0
_STALE_DECAY = 0.8  # per event, in the profile of a base that has no window encoder

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class TrainSettings:
    """How a candidate is trained. The defaults are for a shop's fine-tune on two CPU cores."""

    seed: int = 0
    epochs: int = 8
    events: int = 50
    """N: events of a window."""
    layers: int = 2
    dropout: float = 0.3
    batch_events: int = 1024
    """Positions of a step; many small steps learn more than few large ones."""
    accumulate: int = 1
    """Batches whose gradients are added up before a step."""
    learning_rate: float = 2e-3
    last_rate_share: float = 0.1
    warmup_steps: int = 100
    clip: float = 5.0
    negatives: int = 1024
    """Items drawn evenly in each step, beside the other positions' targets."""
    full_below: int = 2048
    """Catalogues with at most so many learned items are ranked whole in each step."""
    hard_negatives: int = 0
    """Nearest items to each target that count as its negatives, too."""
    compatibility: float = 1.0
    """Weight of the term that keeps item vectors near the base's. On Online Retail 1 cost no
    NDCG and raised the mean cosine to the base from .71 to .93 (from .35 to .87 in a first
    training); 5 cost 6 % of Recall@20."""
    head_weight: float = 0.1
    residual_least: int = 3
    """Items with so few training events are served without a residual."""
    newest_share: float = 0.1
    """Of the events, kept apart to decide when to stop."""
    replay_share: float = 0.25
    """Rows of older windows, as a share of the rows of new ones."""
    patience: int = 3
    """Epochs without a better NDCG on the newest slice before stopping."""
    checkpoint_steps: int = 500
    device: str = "auto"
    distributed: bool = False
    """Share each step's batches out among processes, through `accelerate`."""


@dataclass(frozen=True)
class Catalogue:
    """Row i is item i."""

    item_ids: list[str]
    features: Floats  # (n, W) unit rows of the text tower, before any projection


@dataclass(frozen=True)
class Candidate:
    """What a training leaves behind, as a folder and in memory."""

    path: Path
    projection: Projection
    window: WindowEncoder
    heads: Heads
    item_ids: list[str]
    vectors: Floats  # (n, D) unit rows, as served
    residual: Floats  # (n, D) their learned parts, in units of the text part
    counts: Ints  # (n,) training events
    metrics: dict[str, Any]

    @classmethod
    def load(cls, path: Path) -> Candidate:
        """Read a candidate's folder. Raises WeightsUnavailable."""
        try:
            items = load_file(path / ITEMS)
            return cls(
                path=path,
                projection=Projection.load(path / PROJECTION),
                window=WindowEncoder.load(path / WINDOW),
                heads=Heads.load(path / HEADS_FILE),
                item_ids=json.loads((path / ITEM_IDS).read_text(encoding="utf-8")),
                vectors=items["vectors"],
                residual=items["residual"],
                counts=items["counts"],
                metrics=json.loads((path / METRICS).read_text(encoding="utf-8")),
            )
        except (OSError, KeyError, ValueError) as error:
            raise WeightsUnavailable(
                f"{path} is no trained candidate ({error}); train again, or name another folder"
            ) from error


@dataclass(frozen=True)
class Base:
    """What training starts from: a projection, and an earlier candidate where there is one."""

    projection: Projection
    earlier: Candidate | None = None

    def vectors(self, catalogue: Catalogue) -> Floats:
        """The base's item vectors (n, D): its own where it has them, else from text alone."""
        text = self.projection.apply(catalogue.features)
        return unit_rows(text + self.residual(catalogue))

    def residual(self, catalogue: Catalogue) -> Floats:
        """Its learned parts (n, D), zero for items it did not know."""
        out = np.zeros((len(catalogue.item_ids), self.projection.dimensions), dtype=np.float32)
        if self.earlier is not None:
            row = {item: i for i, item in enumerate(self.earlier.item_ids)}
            old = np.array([row.get(item, -1) for item in catalogue.item_ids], dtype=np.int64)
            out[old >= 0] = self.earlier.residual[old[old >= 0]]
        return out


class Tower(Protocol):
    """A text tower that learns along (see `tower_tuning`)."""

    def parameters(self) -> list[nn.Parameter]: ...

    def features(self, rows: Tensor) -> Tensor:
        """Unit rows (k, W) of catalogue rows (k,), with gradients."""
        ...

    def all_features(self) -> Floats:
        """Unit rows (n, W) of the whole catalogue, as it is now."""
        ...

    def state_dict(self) -> dict[str, Tensor]: ...

    def load_state_dict(self, state: dict[str, Tensor]) -> None: ...

    def save(self, folder: Path) -> None: ...


class Learner(nn.Module):
    """Everything that is trained, as one module."""

    def __init__(self, items: ItemVectors, window: WindowEncoder, heads: Heads) -> None:
        super().__init__()
        self.items = items
        self.window = window
        self.heads = heads
        self.log_scale = nn.Parameter(torch.tensor(math.log(_FIRST_SCALE)))

    def scale(self) -> Tensor:
        return self.log_scale.exp().clamp(max=_LAST_SCALE)


def train(
    windows: Labelled,
    catalogue: Catalogue,
    base: Base,
    types: tuple[str, ...],
    folder: Path,
    settings: TrainSettings,
    *,
    replay: Labelled | None = None,
    tower: Tower | None = None,
    tensorboard: Path | None = None,
    progress: Progress = lambda stage, done, total: None,
) -> Candidate:
    """Train a candidate into `folder`, or finish one that was killed there.

    `windows` are the newest; `replay`, if given, older ones, of which each epoch takes a few
    so that they are not forgotten. `progress` is told (stage, done, total).

    Raises NothingToLearn where the windows hold no target, NonFiniteVectors where training
    diverged, EncoderSettingsInvalid for a device that is not there.
    """
    with torch.random.fork_rng():
        torch.manual_seed(settings.seed)
        run = _Run(windows, catalogue, base, types, folder, settings, replay, tower)
        return run.finish(tensorboard, progress)


@dataclass
class _State:
    """Where a run is, beside weights and random numbers."""

    epoch: int = 0
    batch: int = 0
    """Batches done in this epoch."""
    step: int = 0
    best: float = -1.0
    best_epoch: int = 0
    stale: int = 0
    seconds: float = 0.0
    losses: list[float] = field(default_factory=list)


class _Run:
    def __init__(
        self,
        windows: Labelled,
        catalogue: Catalogue,
        base: Base,
        types: tuple[str, ...],
        folder: Path,
        settings: TrainSettings,
        replay: Labelled | None,
        tower: Tower | None,
    ) -> None:
        if not len(catalogue.item_ids):
            raise NothingToLearn("the catalogue is empty: produce items first (`penchant items`)")
        if len(catalogue.features) != len(catalogue.item_ids):
            raise ValueError("features and item_ids of the catalogue differ in length")
        self.settings, self.catalogue, self.base, self.folder = settings, catalogue, base, folder
        self.peers = _peers(settings.distributed)
        self.device = self.peers.device(settings.device)
        self.data = _Data(windows, len(catalogue.item_ids), settings, newest=settings.newest_share)
        self.older = (
            None if replay is None else _Data(replay, len(catalogue.item_ids), settings, newest=0.0)
        )
        self.counts = self.data.counts + (0 if self.older is None else self.older.counts)
        self.tower = tower
        self.old = torch.from_numpy(base.vectors(catalogue)).to(self.device)  # (n, D)
        self.learner = self._learner(types).to(self.device)
        self.weights = self.learner.heads.set_balance(self.data.labels(self.data.trained))
        self._candidates()
        parameters = list(self.learner.parameters())
        self.parameters = parameters + (tower.parameters() if tower else [])
        self.optimizer = torch.optim.AdamW(
            self.parameters, lr=settings.learning_rate, betas=(0.9, 0.98), weight_decay=0.0
        )
        self.state = _State()
        self.best = self._weights()

    def _learner(self, types: tuple[str, ...]) -> Learner:
        settings, base = self.settings, self.base
        shape = WindowShape(
            dimensions=base.projection.dimensions,
            events=settings.events,
            types=types,
            layers=settings.layers,
            dropout=settings.dropout,
        )
        items = ItemVectors(
            self.catalogue.features,
            base.projection,
            base.residual(self.catalogue) if base.earlier is not None else None,
            seed=settings.seed,
        )
        learner = Learner(items, WindowEncoder(shape), Heads(shape.dimensions))
        earlier = base.earlier
        if earlier is not None and replace(earlier.window.shape, dropout=0) == replace(
            shape, dropout=0
        ):
            learner.window.load_state_dict(earlier.window.state_dict())
            learner.heads.load_state_dict(earlier.heads.state_dict())
        return learner

    def _candidates(self) -> None:
        # Only items that were met are negatives: an item that is always one learns to hide.
        known = np.flatnonzero(self.counts)
        self.known = torch.from_numpy(known).to(self.device)
        self.whole = len(known) <= self.settings.full_below
        self.column = torch.full((len(self.counts),), -1, dtype=torch.long, device=self.device)
        self.column[self.known] = torch.arange(len(known), device=self.device)
        shares = self.counts[known] / max(self.counts.sum(), 1)
        self.shares = torch.from_numpy(shares.astype(np.float32)).to(self.device)

    # --- the loop ---------------------------------------------------------------------------

    def finish(self, tensorboard: Path | None, progress: Progress) -> Candidate:
        self.folder.mkdir(parents=True, exist_ok=True)
        self._resume()
        log = _log(tensorboard if self.peers.first else None)
        settings, state = self.settings, self.state
        total = settings.epochs * len(self._plan(0))
        while state.epoch < settings.epochs and state.stale < settings.patience:
            self._epoch(total, log, progress)
            score = self._judge(self.learner)["ndcg@20"]
            log("newest/ndcg@20", score, state.step)
            state.epoch, state.batch = state.epoch + 1, 0
            if score >= state.best or not self.data.judged:
                state.best, state.best_epoch, state.stale = score, state.epoch, 0
                self.best = self._weights()
            else:
                state.stale += 1
            self._checkpoint()
        self._restore(self.best)
        return self._leave()

    def _plan(self, epoch: int) -> list[tuple[_Data, Ints, Ints]]:
        """Batches of an epoch: whose rows, first events (r,), lengths (r,). Same every time."""
        rng = np.random.default_rng([self.settings.seed, epoch])
        rows = tr.cut_rows(self.data.windows, self.data.useful, self.settings.events, rng)
        plan = [
            (self.data, rows.first[batch], rows.length[batch])
            for batch in tr.plan_rows(rows, self.settings.batch_events, rng)
        ]
        if self.older is not None:
            old = tr.cut_rows(self.older.windows, self.older.useful, self.settings.events, rng)
            few = min(int(len(rows.first) * self.settings.replay_share), len(old.first))
            chosen = rng.permutation(len(old.first))[:few]
            old = tr.Rows(old.first[chosen], old.length[chosen])
            plan += [
                (self.older, old.first[batch], old.length[batch])
                for batch in tr.plan_rows(old, self.settings.batch_events, rng)
            ]
            plan = [plan[i] for i in rng.permutation(len(plan))]
        return plan

    def _epoch(self, total: int, log: Log, progress: Progress) -> None:
        state, every = self.state, self.settings.accumulate * self.peers.count
        plan = self._plan(state.epoch)
        while state.batch < len(plan):
            began = time.monotonic()
            rng = np.random.default_rng([self.settings.seed, state.epoch, state.batch])
            self.learner.train()
            group = plan[state.batch : state.batch + every]
            loss = 0.0
            for data, first, length in self.peers.share(group):
                loss += self._backward(data, first, length, rng, len(group))
            self._step(total)
            state.batch += len(group)
            state.step += 1
            state.seconds += time.monotonic() - began
            state.losses.append(loss)
            if not math.isfinite(state.losses[-1]):
                raise NonFiniteVectors(
                    f"the loss was {state.losses[-1]} in step {state.step}; "
                    "lower TRAIN_LEARNING_RATE, and look for wild weights among the events"
                )
            log("train/loss", state.losses[-1], state.step)
            progress("train", state.epoch * len(plan) + state.batch, total)
            if state.step % self.settings.checkpoint_steps == 0:
                self._checkpoint()

    def _backward(
        self, data: _Data, first: Ints, length: Ints, rng: np.random.Generator, parts: int
    ) -> float:
        with self._precision():
            loss = self._loss(data, first, length, rng) / parts
        loss.backward()  # type: ignore[no-untyped-call]
        return float(loss.detach())

    def _step(self, total: int) -> None:
        self.peers.add_up(self.parameters)
        nn.utils.clip_grad_norm_(self.parameters, self.settings.clip)
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(
                self.state.step,
                total // (self.settings.accumulate * self.peers.count),
                self.settings,
            )
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def _precision(self) -> AbstractContextManager[Any]:
        if self.device.type == "cpu":
            return nullcontext()
        return torch.autocast(self.device.type, dtype=torch.bfloat16)

    def _loss(self, data: _Data, first: Ints, length: Ints, rng: np.random.Generator) -> Tensor:
        settings, learner = self.settings, self.learner
        batch = data.batch(first, length, rng, self.device)
        wanted = torch.unique(batch.target)  # (t,)
        if self.whole:
            candidates, chance = self.known, None
        else:
            numbers = rng.integers(0, len(self.known), settings.negatives)
            drawn = self.known[torch.from_numpy(numbers).to(self.device)]
            candidates = torch.unique(torch.cat([wanted, drawn]))  # (c,)
            chance = log_chances(self.shares, len(batch.target), settings.negatives)
            chance = chance[self.column[candidates]]
        rows, back = torch.unique(torch.cat([candidates, batch.item]), return_inverse=True)
        vectors = self._vectors(rows, wanted)  # (u, D)
        events = vectors[back[len(candidates) :]].view(*batch.types.shape, -1)  # (r, L, D)
        events = events * batch.has_item[..., None]
        hidden = learner.window(events, batch.types, batch.t_ms)  # (r, L, D)
        choices = vectors[back[: len(candidates)]]  # (c, D)
        queries = unit(hidden[batch.asked])  # (q, D)
        target = torch.searchsorted(candidates, batch.target)
        loss = sampled_softmax(
            queries, choices, target, learner.scale(), chance, self._hard(batch.target)
        )
        if settings.head_weight:
            loss = loss + settings.head_weight * self._head_loss(hidden, batch)
        if settings.compatibility:
            moved = drift(vectors, self.old[rows])
            loss = loss + settings.compatibility * moved
        return loss

    def _vectors(self, rows: Tensor, wanted: Tensor) -> Tensor:
        items = self.learner.items
        if self.tower is None:
            plain: Tensor = items(rows)
            return plain
        # Fresh features for some of the targets only: a tower costs a thousand times a window.
        fresh = wanted[torch.randperm(len(wanted), device=wanted.device)[:_FRESH_ITEMS]]
        features = self.tower.features(fresh)  # (k, W)
        whitened = items.whitened(features.float()).float()
        items.features[fresh] = whitened.detach()
        known = items.features[rows].index_copy(0, torch.searchsorted(rows, fresh), whitened)
        return items.from_whitened(rows, known)

    def _hard(self, target: Tensor) -> Tensor | None:
        """Vectors (q, h, D) of the items nearest to each target in the base's space."""
        count = min(self.settings.hard_negatives, len(self.known) - 1)
        if count < 1:
            return None
        near = self.old[target] @ self.old[self.known].T  # (q, known)
        near.scatter_(1, self.column[target][:, None], -2.0)
        rows = self.known[near.topk(count, dim=1).indices]  # (q, h)
        hard: Tensor = self.learner.items(rows.flatten())
        return hard.view(*rows.shape, -1)

    def _head_loss(self, hidden: Tensor, batch: _Batch) -> Tensor:
        logits = self.learner.heads(hidden[batch.real])  # (e, k)
        return sum(
            (
                balanced_bce(logits[:, k], batch.labels[name], self.weights[name])
                for k, name in enumerate(HEADS)
            ),
            start=logits.sum() * 0.0,
        )

    # --- judging ----------------------------------------------------------------------------

    def _judge(self, learner: Learner) -> dict[str, float]:
        vectors, _ = learner.items.serving(self.counts, self.settings.residual_least)
        return self.data.judge(vectors, learner.window, self.settings.seed)

    def _judge_heads(self) -> dict[str, float]:
        vectors, _ = self.learner.items.serving(self.counts, self.settings.residual_least)
        hidden, labels = self.data.newest_states(vectors, self.learner.window, self.settings.seed)
        out: dict[str, float] = {}
        for name, chance in self.learner.heads.predict(hidden).items():
            known = (labels[name] >= 0) & np.isfinite(chance)
            truth = labels[name][known]
            if len(np.unique(truth)) == 2:  # else there is nothing to tell apart
                out[f"{name}/auc"] = auc(chance[known], truth)
                out[f"{name}/calibration_error"] = calibration_error(chance[known], truth)
        return out

    # --- what lasts -------------------------------------------------------------------------

    def _weights(self) -> dict[str, Tensor]:
        weights = {
            name: value.detach().clone()
            for name, value in self.learner.state_dict().items()
            if name not in _CONSTANT or (self.tower is not None and name == "items.features")
        }
        if self.tower is not None:
            for name, value in self.tower.state_dict().items():
                weights[f"tower.{name}"] = value.detach().clone()
        return weights

    def _restore(self, weights: dict[str, Tensor]) -> None:
        own = {k: v for k, v in weights.items() if not k.startswith("tower.")}
        self.learner.load_state_dict(own, strict=False)
        if self.tower is not None:
            self.tower.load_state_dict(
                {k.removeprefix("tower."): v for k, v in weights.items() if k.startswith("tower.")}
            )

    @cached_property
    def _fingerprint(self) -> str:
        """Of settings and data: a checkpoint of another run is not gone on with."""
        digest = hashlib.sha256(json.dumps(asdict(self.settings), sort_keys=True).encode())
        for data in (self.data, self.older):
            if data is not None:
                for column in (data.windows.start, data.windows.item, data.windows.t_ms):
                    digest.update(np.ascontiguousarray(column).tobytes())
        digest.update(self.catalogue.features.tobytes())
        digest.update(self.base.vectors(self.catalogue).tobytes())
        return digest.hexdigest()

    def _checkpoint(self) -> None:
        if not self.peers.first:
            return
        draft = self.folder / f".{CHECKPOINT}"
        torch.save(
            {
                "fingerprint": self._fingerprint,
                "state": asdict(self.state),
                "weights": self._weights(),
                "best": self.best,
                "optimizer": self.optimizer.state_dict(),
                "random": torch.get_rng_state(),
                "device_random": torch.cuda.get_rng_state_all(),
            },
            draft,
        )
        draft.replace(self.folder / CHECKPOINT)

    def _resume(self) -> None:
        path = self.folder / CHECKPOINT
        if not path.exists():
            return
        try:
            saved = torch.load(path, map_location=self.device, weights_only=True)
        except (OSError, RuntimeError, ValueError, EOFError):
            return  # cut off by a crash of the machine: begin again
        if saved["fingerprint"] != self._fingerprint:
            return
        self.state = _State(**saved["state"])
        self.best = saved["best"]
        self._restore(saved["weights"])
        self.optimizer.load_state_dict(saved["optimizer"])
        torch.set_rng_state(saved["random"].cpu())
        if saved["device_random"]:
            torch.cuda.set_rng_state_all([each.cpu() for each in saved["device_random"]])

    def _leave(self) -> Candidate:
        if self.tower is not None:
            fresh = torch.from_numpy(self.tower.all_features()).to(self.device)
            self.learner.items.features.copy_(self.learner.items.whitened(fresh))
        learner = self.learner.cpu().eval()
        vectors, residual = learner.items.serving(self.counts, self.settings.residual_least)
        if not np.isfinite(vectors).all():
            raise NonFiniteVectors("training diverged; lower TRAIN_LEARNING_RATE and train again")
        candidate = Candidate(
            path=self.folder,
            projection=learner.items.projection(),
            window=learner.window,
            heads=learner.heads,
            item_ids=self.catalogue.item_ids,
            vectors=vectors,
            residual=residual,
            counts=self.counts,
            metrics=self._figures(vectors),
        )
        if self.peers.first:
            self._write(candidate)
        return candidate

    def _figures(self, vectors: Floats) -> dict[str, Any]:
        state, old = self.state, self.old.cpu().numpy()
        earlier = self.base.earlier
        before = self.data.judge(
            old, None if earlier is None else earlier.window, self.settings.seed
        )
        trained = int(self.data.useful.sum()) * state.epoch
        return {
            "newest": self._judge(self.learner) | self._judge_heads(),
            "newest_base": before,
            "cut_ms": self.data.cut_ms,
            "epochs": state.epoch,
            "best_epoch": state.best_epoch,
            "steps": state.step,
            "train_s": round(state.seconds, 2),
            "windows_per_s": round(trained / max(state.seconds, 1e-9), 1),
            "peak_memory_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024,
            "first_loss": _mean(state.losses[:20]),
            "last_loss": _mean(state.losses[-20:]),
            "cosine_to_base": float(np.mean(np.sum(vectors * old, axis=1))),
            "settings": asdict(self.settings),
        }

    def _write(self, candidate: Candidate) -> None:
        folder = self.folder
        candidate.projection.save(folder / PROJECTION)
        candidate.window.save(folder / WINDOW)
        candidate.heads.save(folder / HEADS_FILE)
        arrays = {
            "vectors": candidate.vectors,
            "residual": candidate.residual,
            "counts": candidate.counts,
        }
        (folder / ITEMS).write_bytes(
            save_arrays({name: np.ascontiguousarray(array) for name, array in arrays.items()})
        )
        ids = json.dumps(candidate.item_ids, ensure_ascii=False)
        (folder / ITEM_IDS).write_text(ids, encoding="utf-8")
        if self.tower is not None:
            self.tower.save(folder / "encoder")
        text = json.dumps(candidate.metrics, indent=2) + "\n"
        (folder / METRICS).write_text(text, encoding="utf-8")
        (folder / CHECKPOINT).unlink(missing_ok=True)


# Features and whitening follow from the catalogue: no need to keep them with the weights.
_CONSTANT = ("items.centre", "items.whiten", "items.features")
_FRESH_ITEMS = 64  # items of a step that the tower reads anew


@dataclass(frozen=True)
class _Batch:
    """r rows of L positions on the device; q positions are asked, e are real events."""

    item: Tensor  # (r * L,) catalogue rows, 0 where there is none
    has_item: Tensor  # (r, L)
    types: Tensor  # (r, L)
    t_ms: Tensor  # (r, L)
    real: Tensor  # (r, L) bool
    asked: Tensor  # (r, L) bool
    target: Tensor  # (q,)
    labels: dict[str, Tensor]  # name -> (e,)


def window_inputs(
    windows: Labelled, ends: Ints, vectors: Floats, events: int
) -> tuple[Floats, npt.NDArray[np.uint8], Ints, Ints]:
    """What a window encoder reads of the windows that end with events `ends` (k,).

    Item vectors (k, L, D), types and times (k, L), lengths (k,); L is at most `events`.
    """
    first, length = tr.windows_ending_at(windows, ends, events)
    at = np.arange(int(length.max()) if len(length) else 0)
    event = np.minimum(first[:, None] + at, ends[:, None])  # (k, L)
    item = windows.item[event]
    inputs = vectors[np.maximum(item, 0)] * (item >= 0)[..., None]
    return inputs.astype(np.float32), windows.type[event], windows.t_ms[event], length


class _Data:
    """Windows with their targets, split in time."""

    def __init__(
        self, windows: Labelled, n_items: int, settings: TrainSettings, newest: float
    ) -> None:
        if not len(windows.t_ms):
            raise NothingToLearn(
                "there are no windows to learn from: let the archive fill, "
                "or shorten the horizons that hold them back"
            )
        if int(windows.item.max()) >= n_items:
            raise ValueError(
                f"item: row {int(windows.item.max())} lies beyond the catalogue's {n_items} items"
            )
        self.windows = windows
        self.events = settings.events
        self.targets = tr.find_targets(windows)
        latest = int(windows.t_ms.max()) + 1
        self.cut_ms = (
            min(int(np.quantile(windows.t_ms, 1 - newest)) + 1, latest) if newest else latest
        )
        self.useful = self.targets.before(self.cut_ms)
        if not self.useful.any():
            raise NothingToLearn(
                "no window has a next item yet, so there is nothing to learn: "
                "wait for shoppers to come back, or take a longer span of the archive"
            )
        self.trained = windows.t_ms < self.cut_ms
        known = (windows.item >= 0) & (windows.weight > 0) & self.trained
        self.counts: Ints = np.bincount(windows.item[known], minlength=n_items).astype(np.int64)
        self._judgeable = np.flatnonzero(self.targets.since(self.cut_ms) & tr.asked_at(windows))

    @property
    def judged(self) -> int:
        """Windows of the newest slice that have a target."""
        return len(self._judgeable)

    def labels(self, where: tr.Bools) -> dict[str, Tensor]:
        return {
            name: torch.from_numpy(getattr(self.windows, name)[where].astype(np.int64))
            for name in HEADS
        }

    def batch(
        self, first: Ints, length: Ints, rng: np.random.Generator, device: torch.device
    ) -> _Batch:
        at = np.arange(int(length.max()))  # (L,)
        real = at < length[:, None]  # (r, L)
        event = np.where(real, first[:, None] + at, first[:, None])  # (r, L)
        windows, targets = self.windows, self.targets
        item = windows.item[event]
        asked = real & self.useful[event]
        where = event[asked]  # (q,)
        spread = targets.stop[where] - targets.first[where]
        target = targets.item[targets.first[where] + rng.integers(0, spread)]
        labels = self.labels(event[real])
        # Labels of the newest slice are for judging.
        known = torch.from_numpy(self.trained[event[real]])

        def on(array: npt.NDArray[Any]) -> Tensor:
            return torch.from_numpy(array).to(device)

        return _Batch(
            item=on(np.maximum(item, 0).astype(np.int64).ravel()),
            has_item=on((item >= 0) & real),
            types=on(windows.type[event].astype(np.int64)),
            t_ms=on(windows.t_ms[event]),
            real=on(real),
            asked=on(asked),
            target=on(target.astype(np.int64)),
            labels={
                name: torch.where(known, label, -1).to(device) for name, label in labels.items()
            },
        )

    def judge(self, vectors: Floats, window: WindowEncoder | None, seed: int) -> dict[str, float]:
        """Ranking figures on the newest slice, over the full catalogue; zeros without one."""
        ends = _sample(self._judgeable, _JUDGED, seed)
        names = ("recall@10", "recall@20", "ndcg@20", "mrr")
        if not len(ends):
            return dict.fromkeys(names, 0.0) | {"windows": 0.0}
        places = []
        for part in np.array_split(ends, max(len(ends) // 256, 1)):
            scores = self._interests(part, vectors, window) @ vectors.T  # (k, n)
            first, stop = self.targets.first[part], self.targets.stop[part]
            row = np.repeat(np.arange(len(part)), stop - first)
            item = np.concatenate(
                [self.targets.item[a:b] for a, b in zip(first, stop, strict=True)]
            )
            places.append(ranks(scores, row, item))
        place = np.concatenate(places)
        return {name: float(metric(name, place).mean()) for name in names} | {
            "windows": float(len(ends))
        }

    def newest_states(
        self, vectors: Floats, window: WindowEncoder, seed: int
    ) -> tuple[Floats, dict[str, Any]]:
        """States and labels of windows in the newest slice."""
        ends = _sample(np.flatnonzero(~self.trained), _JUDGED, seed)
        states = [
            window.hidden(*window_inputs(self.windows, part, vectors, self.events))
            for part in np.array_split(ends, max(len(ends) // 256, 1))
        ]
        return np.concatenate(states), {name: getattr(self.windows, name)[ends] for name in HEADS}

    def _interests(self, ends: Ints, vectors: Floats, window: WindowEncoder | None) -> Floats:
        inputs, types, t_ms, length = window_inputs(self.windows, ends, vectors, self.events)
        if window is not None and window.shape.events >= inputs.shape[1]:
            return window.encode(inputs, types, t_ms, length)
        age = length[:, None] - 1 - np.arange(inputs.shape[1])  # (k, L)
        weight = np.where(age >= 0, _STALE_DECAY ** np.maximum(age, 0), 0.0)
        return unit_rows(np.einsum("kl,kld->kd", weight, inputs))


def learning_rate(step: int, total: int, settings: TrainSettings) -> float:
    """Linear warm-up, then half a cosine down to a share of the peak."""
    peak, last = settings.learning_rate, settings.last_rate_share
    warm = min(settings.warmup_steps, max(total // 5, 1))
    if step < warm:
        return peak * (step + 1) / warm
    done = min((step - warm) / max(total - warm, 1), 1.0)
    return peak * (last + (1 - last) * (1 + math.cos(math.pi * done)) / 2)


def _sample(ends: Ints, most: int, seed: int) -> Ints:
    if len(ends) <= most:
        return ends
    return np.sort(np.random.default_rng(seed).choice(ends, most, replace=False))


def _mean(values: Sequence[float]) -> float:
    return float(np.mean(values)) if len(values) else 0.0


# --- optional company -----------------------------------------------------------------------

Log = Callable[[str, float, int], None]


def _log(folder: Path | None) -> Log:
    if folder is None:
        return lambda name, value, step: None
    try:
        boards = importlib.import_module("torch.utils.tensorboard")
    except ImportError as error:
        raise PackageMissing(
            "TensorBoard logs were asked for and `tensorboard` is not installed; "
            "install it, or unset TRAIN_TENSORBOARD"
        ) from error
    writer = boards.SummaryWriter(str(folder))
    return lambda name, value, step: writer.add_scalar(name, value, step)


class _Alone:
    first = True
    count = 1

    def device(self, name: str) -> torch.device:
        return pick_device(name)

    def share(self, group: list[Any]) -> list[Any]:
        return group

    def add_up(self, parameters: list[nn.Parameter]) -> None:
        pass


class _Together:
    """Processes that each take part of a step's batches and add up their gradients."""

    def __init__(self, accelerator: Any) -> None:
        self._accelerator = accelerator
        self.first = bool(accelerator.is_main_process)
        self.count = int(accelerator.num_processes)

    def device(self, name: str) -> torch.device:
        return torch.device(self._accelerator.device)

    def share(self, group: list[Any]) -> list[Any]:
        return group[self._accelerator.process_index :: self._accelerator.num_processes]

    def add_up(self, parameters: list[nn.Parameter]) -> None:
        for parameter in parameters:
            # Every process must take part, also with a parameter that its batches did not touch.
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            parameter.grad = self._accelerator.reduce(parameter.grad, "sum")


def _peers(distributed: bool) -> _Alone | _Together:
    if not distributed:
        return _Alone()
    try:
        accelerate = importlib.import_module("accelerate")
    except ImportError:
        return _Alone()
    return _Together(accelerate.Accelerator())
