"""The neural yardsticks learn what there is to learn, and only from the past."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import nn

from model.prequential import Events
from model.sequence_baselines import GRU4Rec, Loss, Neural, SASRec, Schedule

torch.set_num_threads(1)  # on a busy machine, threads spend their time waiting for each other

ITEMS = 12
DAY = 86_400_000


def walks(users: int, steps: int, seed: int = 0) -> Events:
    """Everybody goes round the catalogue, one item a day, from an item of their own."""
    rng = np.random.default_rng(seed)
    start = rng.integers(0, ITEMS, users)
    step, user = np.divmod(np.arange(users * steps), users)
    return Events(
        user,
        ((start[user] + step) % ITEMS).astype(np.int32),
        np.zeros(len(user), dtype=np.uint8),
        step * DAY,
        np.ones(len(user), dtype=np.float32),
    )


@pytest.mark.parametrize(
    ("make", "loss"), [(SASRec, "softmax"), (SASRec, "bce"), (GRU4Rec, "softmax")]
)
def test_a_network_learns_what_follows_what(make: Callable[[int], nn.Module], loss: Loss) -> None:
    log = walks(users=40, steps=20)
    scorer = Neural(make, ITEMS, Schedule(0, 30, 1), loss=loss, learning_rate=1e-2)
    scorer.update(log)
    last = log.item[-40:]
    scores = scorer.scores(log.user[-40:], np.full(40, 99 * DAY))
    assert (scores.argmax(axis=1) == (last + 1) % ITEMS).mean() > 0.9


def test_nothing_is_known_before_the_first_training_and_of_strangers() -> None:
    scorer = Neural(SASRec, ITEMS, Schedule(10 * DAY, 1, 1))
    log = walks(users=4, steps=20)
    scorer.update(log.take(log.t_ms < 5 * DAY))
    assert scorer.trainings == 0
    assert not scorer.scores(np.arange(4), np.zeros(4, dtype=np.int64)).any()
    scorer.update(log.take((log.t_ms >= 5 * DAY) & (log.t_ms < 11 * DAY)))
    assert scorer.trainings == 1
    scores = scorer.scores(np.asarray([0, 77]), np.zeros(2, dtype=np.int64))
    assert scores[0].any()
    assert not scores[1].any()


def test_a_network_is_trained_on_schedule_in_event_time() -> None:
    scorer = Neural(GRU4Rec, ITEMS, Schedule(5 * DAY, 1, 1))
    log = walks(users=3, steps=21)
    for day in range(21):
        scorer.update(log.take(log.t_ms == day * DAY))
    assert scorer.trainings == 4  # days 5, 10, 15, 20
