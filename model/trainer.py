"""Windows and a base -> a candidate: a folder of weights and the figures it came to.

Trains item vectors and window encoder together, on everything but the newest slice. Half of its
shoppers decide when to stop; the others are left for the gate. The heads are fitted at the end,
by themselves. The text tower stays frozen unless a `Tower` is given. Knows nothing of schedules,
of releases or of whether the candidate will be accepted.

A run that was killed goes on where its last checkpoint was, and ends with the same weights
as one that was not.
"""

from __future__ import annotations

import hashlib
import importlib
import io
import json
import math
import resource
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from . import training_rows as tr
from .candidate import ENCODER, Base, Candidate, Catalogue
from .errors import NonFiniteVectors, NothingToLearn, PackageMissing
from .evaluate import auc, calibration_error
from .head_training import chances, fit_heads, judged
from .heads import HEADS, Heads
from .item_vectors import ItemVectors
from .peers import peers
from .train_settings import TrainSettings
from .training_data import Data
from .training_loss import Learner, StepLoss, Tower
from .window_encoder import WindowEncoder, WindowShape
from .windows import Labelled, joined

__all__ = ["Base", "Candidate", "Catalogue", "Tower", "TrainSettings", "learning_rate", "train"]

Floats = npt.NDArray[np.float32]
Ints = npt.NDArray[np.int64]
Tensor = torch.Tensor

CHECKPOINT = "checkpoint.pt"
_JUDGED = 2_000  # windows that the heads are judged on

Progress = Callable[[str, int, int], None]


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
        self.peers = peers(settings.distributed)
        self.device = self.peers.device(settings.device)
        self.data = Data(
            windows, len(catalogue.item_ids), settings.events, newest=settings.newest_share
        )
        self.older = (
            None
            if replay is None
            else Data(replay, len(catalogue.item_ids), settings.events, newest=0.0)
        )
        self.counts = self.data.counts + (0 if self.older is None else self.older.counts)
        self.tower = tower
        self.old = torch.from_numpy(base.vectors(catalogue)).to(self.device)  # (n, D)
        self.learner = self._learner(types).to(self.device)
        self.loss = StepLoss(self.learner, tower, self.old, self.counts, settings)
        groups: list[dict[str, Any]] = [{"params": list(self.learner.parameters()), "share": 1.0}]
        if tower is not None:
            groups.append({"params": tower.parameters(), "share": tower.rate_share})
        self.parameters = [each for group in groups for each in group["params"]]
        self.optimizer = torch.optim.AdamW(
            groups, lr=settings.learning_rate, betas=(0.9, 0.98), weight_decay=0.0
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
        learner = Learner(items, WindowEncoder(shape))
        earlier = base.earlier
        if earlier is not None and replace(earlier.window.shape, dropout=0) == replace(
            shape, dropout=0
        ):
            learner.window.load_state_dict(earlier.window.state_dict())
        return learner

    def finish(self, tensorboard: Path | None, progress: Progress) -> Candidate:
        self.folder.mkdir(parents=True, exist_ok=True)
        self._resume()
        with _log(tensorboard if self.peers.first else None) as log:
            self._loop(log, progress)
        self._restore(self.best)
        return self._leave()

    def _loop(self, log: Log, progress: Progress) -> None:
        settings, state = self.settings, self.state
        total = settings.epochs * len(self._plan(0))
        while state.epoch < settings.epochs and state.stale < settings.patience:
            self._epoch(total, log, progress)
            self._read_anew()
            score = self._judge(self.learner)["ndcg@20"]
            log("newest/ndcg@20", score, state.step)
            state.epoch, state.batch = state.epoch + 1, 0
            if score >= state.best or not self.data.judged:
                state.best, state.best_epoch, state.stale = score, state.epoch, 0
                self.best = self._weights()
            else:
                state.stale += 1
            self._checkpoint()

    def _read_anew(self) -> None:
        """All items by the tower as it is now: a step reads a few, and serving reads all."""
        if self.tower is not None:
            fresh = torch.from_numpy(self.tower.all_features()).to(self.device)
            self.learner.items.features.copy_(self.learner.items.whitened(fresh))

    def _plan(self, epoch: int) -> list[tuple[Data, Ints, Ints]]:
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
                    "lower LEARN_RATE, and look for wild weights among the events"
                )
            log("train/loss", state.losses[-1], state.step)
            progress("train", state.epoch * len(plan) + state.batch, total)
            if state.step % self.settings.checkpoint_steps == 0:
                self._checkpoint()

    def _backward(
        self, data: Data, first: Ints, length: Ints, rng: np.random.Generator, parts: int
    ) -> float:
        with self._precision():
            batch = data.batch(first, length, rng, self.device)
            loss = self.loss(batch, rng) / parts
        loss.backward()  # type: ignore[no-untyped-call]
        return float(loss.detach())

    def _step(self, total: int) -> None:
        self.peers.add_up(self.parameters)
        nn.utils.clip_grad_norm_(self.parameters, self.settings.clip)
        steps = total // (self.settings.accumulate * self.peers.count)
        rate = learning_rate(self.state.step, steps, self.settings)
        for group in self.optimizer.param_groups:
            group["lr"] = group["share"] * rate
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def _precision(self) -> AbstractContextManager[Any]:
        if self.device.type == "cpu":
            return nullcontext()
        return torch.autocast(self.device.type, dtype=torch.bfloat16)

    # --- judging ----------------------------------------------------------------------------

    def _judge(self, learner: Learner) -> dict[str, float]:
        vectors, _ = learner.items.serving(self.counts, self.settings.residual_least)
        return self.data.judge(vectors, learner.window, self.settings.seed)

    def _fit_heads(self) -> tuple[Heads, dict[str, float]]:
        """Fitted to all windows, and their figures on those that they have not learned from."""
        how, windows = self.settings, self.data.windows
        if self.older is not None:  # a window reaches back beyond the newest days
            windows = joined(self.older.windows, windows)
        kinds = len(self.learner.window.shape.types)
        heads = fit_heads(windows, kinds, how.events, how.newest_share, how.seed)
        out: dict[str, float] = {}
        for name in HEADS:
            ends = judged(windows, heads, name, _JUDGED, how.seed)
            truth = getattr(windows, name)[ends]
            chance = chances(windows, heads, ends, how.events)[name]
            if len(np.unique(truth)) == 2 and np.isfinite(chance).all():
                out[f"{name}/auc"] = auc(chance, truth)
                out[f"{name}/calibration_error"] = calibration_error(chance, truth)
        return heads, out

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
                w = data.windows
                for column in (w.start, w.item, w.type, w.t_ms, w.weight, w.purchase, w.returns):
                    digest.update(np.ascontiguousarray(column).tobytes())
        if self.tower is not None:
            digest.update("\n".join(self.tower.state_dict()).encode())
        digest.update(self.catalogue.features.tobytes())
        digest.update(self.base.vectors(self.catalogue).tobytes())
        return digest.hexdigest()

    def _checkpoint(self) -> None:
        if not self.peers.first:
            return
        # Through memory: torch's own writer names no reason when a disk is full.
        packed = io.BytesIO()
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
            packed,
        )
        draft = self.folder / f".{CHECKPOINT}"
        draft.write_bytes(packed.getbuffer())
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
        learner = self.learner.cpu().eval()
        vectors, residual = learner.items.serving(self.counts, self.settings.residual_least)
        if not np.isfinite(vectors).all():
            raise NonFiniteVectors("training diverged; lower LEARN_RATE and train again")
        heads, figures = self._fit_heads()
        candidate = Candidate(
            path=self.folder,
            projection=learner.items.projection(),
            window=learner.window,
            heads=heads,
            item_ids=self.catalogue.item_ids,
            vectors=vectors,
            residual=residual,
            counts=self.counts,
            metrics=self._figures(vectors, figures),
        )
        if self.peers.first:
            if self.tower is not None:
                self.tower.save(self.folder / ENCODER)
            candidate.save()
            (self.folder / CHECKPOINT).unlink(missing_ok=True)
        return candidate

    def _figures(self, vectors: Floats, of_heads: dict[str, float]) -> dict[str, Any]:
        state, old = self.state, self.old.cpu().numpy()
        earlier = self.base.earlier
        before = self.data.judge(
            old, None if earlier is None else earlier.window, self.settings.seed
        )
        trained = int(self.data.useful.sum()) * state.epoch
        return {
            "newest": self._judge(self.learner) | of_heads,
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


# Features and whitening follow from the catalogue: no need to keep them with the weights.
_CONSTANT = ("items.centre", "items.whiten", "items.features")


def learning_rate(step: int, total: int, settings: TrainSettings) -> float:
    """Linear warm-up, then half a cosine down to a share of the peak."""
    peak, last = settings.learning_rate, settings.last_rate_share
    warm = min(settings.warmup_steps, max(total // 5, 1))
    if step < warm:
        return peak * (step + 1) / warm
    done = min((step - warm) / max(total - warm, 1), 1.0)
    return peak * (last + (1 - last) * (1 + math.cos(math.pi * done)) / 2)


def _mean(values: Sequence[float]) -> float:
    return float(np.mean(values)) if len(values) else 0.0


Log = Callable[[str, float, int], None]


@contextmanager
def _log(folder: Path | None) -> Iterator[Log]:
    if folder is None:
        yield lambda name, value, step: None
        return
    try:
        boards = importlib.import_module("torch.utils.tensorboard")
    except ImportError as error:
        raise PackageMissing(
            "TensorBoard logs were asked for and `tensorboard` is not installed; "
            "install it, or unset LEARN_TENSORBOARD"
        ) from error
    with boards.SummaryWriter(str(folder)) as writer:
        yield lambda name, value, step: writer.add_scalar(name, value, step)
