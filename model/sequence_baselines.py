"""SASRec and GRU4Rec as scorers: yardsticks of the literature, small and after their papers.

SASRec: Kang and McAuley, "Self-Attentive Sequential Recommendation", ICDM 2018. As in the authors'
code, queries are normalised and keys are not, the feed-forward layer keeps the width, and input
and output share the item embeddings. `loss="bce"` is theirs, one negative per position;
`"softmax"` is cross-entropy over sampled items, which makes the same network much stronger
(Klenitskiy and Vasilev, RecSys 2023).

GRU4Rec: Hidasi et al., "Session-based Recommendations with Recurrent Neural Networks", ICLR 2016,
with the cross-entropy and shared negatives of Hidasi and Karatzoglou, CIKM 2018.

Where we differ from both: Adam and batches of 32 for each; negatives are uniform, with the log
correction; and items that were bought at once have no order, so the item to foresee is drawn from
the *basket* that follows. Where every basket holds one item, that is the next item of the papers.

They are trained on the past only: whenever `every_ms` of event time have passed, on everything
told so far, going on from the weights they have.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Final, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from .baselines import DAY_MS, baskets
from .evaluate import Floats, Int32s, Ints
from .prequential import NO_ITEM, Events, Scorer

Loss = Literal["bce", "softmax"]

_BATCH = 32  # small batches and more steps learn faster here than the 128 of the papers
_NEGATIVES = 512
_CLIP = 5.0
_EVERY_MS: Final = 28 * DAY_MS
_FIRST_EPOCHS, _EPOCHS = 10, 2


def networks(n_items: int, *, only_order: bool) -> dict[str, Callable[[], Scorer]]:
    """Name -> what makes the scorer; trained every four weeks of event time. `only_order`: a set
    without times, where all is told at once, and that is when they are trained."""
    schedule = Schedule(0.0 if only_order else _EVERY_MS, _FIRST_EPOCHS, _EPOCHS)
    dropout = 0.5 if only_order else 0.2

    def sasrec(loss: Loss) -> Neural:
        return Neural(partial(SASRec, dropout=dropout), n_items, schedule, loss=loss)

    return {
        "GRU4Rec": lambda: Neural(partial(GRU4Rec, dropout=dropout), n_items, schedule),
        "SASRec (BCE, as published)": lambda: sasrec("bce"),
        "SASRec (sampled softmax)": lambda: sasrec("softmax"),
    }


class _Block(nn.Module):
    def __init__(self, width: int, dropout: float) -> None:
        super().__init__()
        self.norm_query, self.norm_forward = nn.LayerNorm(width), nn.LayerNorm(width)
        self.query, self.key, self.value = (nn.Linear(width, width) for _ in range(3))
        self.forward_in, self.forward_out = nn.Linear(width, width), nn.Linear(width, width)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:  # (b, l, d) -> (b, l, d)
        q = self.norm_query(x)
        seen = F.scaled_dot_product_attention(
            self.query(q),
            self.key(x),
            self.value(x),
            is_causal=True,
            dropout_p=self.dropout.p if self.training else 0.0,
        )
        x = self.norm_forward(q + seen)
        inner = self.dropout(torch.relu(self.forward_in(x)))
        out: Tensor = x + self.dropout(self.forward_out(inner))
        return out


class SASRec(nn.Module):
    """Items (b, l), right-padded, and their number (b,) -> states (b, l, d). One head."""

    def __init__(
        self, n_items: int, width: int = 64, blocks: int = 2, length: int = 50, dropout: float = 0.2
    ) -> None:
        super().__init__()
        self.items = nn.Embedding(n_items, width)
        self.positions = nn.Embedding(length, width)
        nn.init.normal_(self.items.weight, std=0.02)
        nn.init.normal_(self.positions.weight, std=0.02)
        self.blocks = nn.ModuleList([_Block(width, dropout) for _ in range(blocks)])
        self.norm = nn.LayerNorm(width)
        self.dropout = nn.Dropout(dropout)

    def forward(self, items: Tensor, count: Tensor) -> Tensor:
        # Positions count from the end, so that the latest item always has the same one.
        end = self.positions.num_embeddings
        place = (end - count)[:, None] + torch.arange(items.shape[1])
        x = self.items(items) * self.items.embedding_dim**0.5
        x = self.dropout(x + self.positions(place.clamp(max=end - 1)))
        for block in self.blocks:
            x = block(x)
        out: Tensor = self.norm(x)
        return out


class GRU4Rec(nn.Module):
    """Items (b, l), right-padded, and their number (b,) -> states (b, l, d)."""

    def __init__(self, n_items: int, width: int = 100, dropout: float = 0.2) -> None:
        super().__init__()
        self.items = nn.Embedding(n_items, width)
        nn.init.normal_(self.items.weight, std=0.1)
        self.gru = nn.GRU(width, width, batch_first=True)
        self.dropout = nn.Dropout(dropout)

    def forward(self, items: Tensor, count: Tensor) -> Tensor:
        states, _ = self.gru(self.dropout(self.items(items)))
        out: Tensor = self.dropout(states)
        return out


@dataclass(frozen=True)
class Schedule:
    """When a network is trained, and for how long."""

    every_ms: float
    first_epochs: int
    epochs: int  # of each later training


class Neural:
    """A sequence network as a `Scorer`. It knows nothing before its first training."""

    def __init__(
        self,
        make: Callable[[int], nn.Module],
        n_items: int,
        schedule: Schedule,
        *,
        loss: Loss = "softmax",
        length: int = 50,
        learning_rate: float = 1e-3,
        seed: int = 0,
    ) -> None:
        torch.manual_seed(seed)
        self._net = make(n_items)
        self._n_items, self._schedule, self._loss, self._length = n_items, schedule, loss, length
        self._optimizer = torch.optim.Adam(
            self._net.parameters(), lr=learning_rate, betas=(0.9, 0.98)
        )
        self._rng = np.random.default_rng(seed)
        self._histories: dict[int, list[tuple[int, Int32s]]] = {}  # user -> baskets
        self._next_ms: float | None = None
        self.trainings = 0

    def scores(self, users: Ints, t_ms: Ints) -> Floats:
        scores = np.zeros((len(users), self._n_items), dtype=np.float32)
        pasts = [self._past(user) for user in users.tolist()]
        known = [row for row, past in enumerate(pasts) if len(past)]
        if not known or not self.trainings:
            return scores
        count = torch.tensor([len(pasts[row]) for row in known])
        items = torch.zeros(len(known), int(count.max()), dtype=torch.int64)
        for at, row in enumerate(known):
            items[at, : len(pasts[row])] = torch.from_numpy(pasts[row].astype(np.int64))
        self._net.eval()
        with torch.inference_mode():
            last = self._net(items, count)[torch.arange(len(known)), count - 1]  # (k, d)
            scores[known] = (last @ self._net.items.weight.T).numpy()  # type: ignore[union-attr]
        return scores

    def update(self, events: Events) -> None:
        events = events.take((events.item != NO_ITEM) & (events.weight > 0))
        if not len(events):
            return
        if self._next_ms is None:
            self._next_ms = float(events.t_ms.min()) + self._schedule.every_ms
        for user, t_ms, basket in baskets(events):
            self._histories.setdefault(user, []).append((t_ms, basket))
        if float(events.t_ms.max()) >= self._next_ms:
            self.train()
            self._next_ms = float(events.t_ms.max()) + self._schedule.every_ms

    def train(self) -> None:
        """Go through everything told so far."""
        examples = _Examples(self._histories, self._length)
        epochs = self._schedule.epochs if self.trainings else self._schedule.first_epochs
        self._net.train()
        for _ in range(epochs):
            for items, count, target in examples.batches(self._rng):
                loss = self._loss_of(items, count, target)
                self._optimizer.zero_grad(set_to_none=True)
                loss.backward()  # type: ignore[no-untyped-call]
                nn.utils.clip_grad_norm_(self._net.parameters(), _CLIP)
                self._optimizer.step()
        self.trainings += 1

    def _loss_of(self, items: Tensor, count: Tensor, target: Tensor) -> Tensor:
        wanted = target >= 0
        state, target = self._net(items, count)[wanted], target[wanted]  # (p, d), (p,)
        embedding: nn.Embedding = self._net.items  # type: ignore[assignment]
        right = (state * embedding(target)).sum(dim=-1)  # (p,)
        if self._loss == "bce":
            other = torch.randint(self._n_items, target.shape)
            wrong = (state * embedding(other)).sum(dim=-1)
            return F.softplus(-right).mean() + F.softplus(wrong).mean()
        others = torch.randint(self._n_items, (_NEGATIVES,))
        wrongs = state @ embedding(others).T + np.log(self._n_items / _NEGATIVES)  # (p, S)
        wrongs = wrongs.masked_fill(others[None] == target[:, None], float("-inf"))
        every = torch.logsumexp(torch.cat([right[:, None], wrongs], dim=1), dim=1)  # (p,)
        loss: Tensor = (every - right).mean()
        return loss

    def _past(self, user: int) -> Int32s:
        latest = self._histories.get(user, [])[-self._length :]
        joined = np.concatenate([items for _, items in latest]) if latest else np.zeros(0, np.int32)
        return joined[-self._length :]


class _Examples:
    """Histories cut into windows, and for every place the basket that follows."""

    def __init__(self, histories: dict[int, list[tuple[int, Int32s]]], length: int) -> None:
        items, begin, end, windows = [], [], [], []
        at = 0
        for history in histories.values():
            sizes = np.asarray([len(basket) for _, basket in history])
            ends = at + np.cumsum(sizes)
            items += [basket for _, basket in history]
            begin.append(np.repeat(ends, sizes))
            end.append(np.repeat(np.append(ends[1:], ends[-1]), sizes))  # empty after the last
            stops = np.arange(ends[-1], at, -length)
            windows += [(max(stop - length, at), stop) for stop in stops.tolist()]
            at = int(ends[-1])
        self._items: NDArray[np.int64] = np.concatenate(items).astype(np.int64)
        self._begin, self._end = np.concatenate(begin), np.concatenate(end)
        self._windows = np.asarray(windows)  # (w, 2)

    def batches(self, rng: np.random.Generator) -> list[tuple[Tensor, Tensor, Tensor]]:
        """One epoch: items (b, l), their number (b,), the item to foresee (b, l), -1 for none."""
        size = self._windows[:, 1] - self._windows[:, 0]
        # Windows of about one length together, so that little is padding.
        order = np.argsort(size + rng.uniform(0, 3, len(size)))
        parts = [order[i : i + _BATCH] for i in range(0, len(order), _BATCH)]
        rng.shuffle(parts)
        return [batch for part in parts if (batch := self._batch(part, rng)) is not None]

    def _batch(self, part: Ints, rng: np.random.Generator) -> tuple[Tensor, Tensor, Tensor] | None:
        start, stop = self._windows[part, 0], self._windows[part, 1]
        place = start[:, None] + np.arange(int((stop - start).max()))
        held = place < stop[:, None]
        place = np.where(held, place, start[:, None])
        room = self._end[place] - self._begin[place]
        drawn = self._begin[place] + (rng.uniform(size=place.shape) * room).astype(np.int64)
        has = held & (room > 0)
        if not has.any():
            return None
        target = np.where(has, self._items[np.where(has, drawn, 0)], -1)
        items = np.where(held, self._items[place], 0)
        return torch.from_numpy(items), torch.from_numpy(stop - start), torch.from_numpy(target)
