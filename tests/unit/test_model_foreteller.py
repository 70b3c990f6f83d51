from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from model.foreteller import Foreteller
from model.trainer import Candidate
from model.training_data import window_inputs
from tests.learnable_shop import circle, trained


@pytest.fixture(scope="module")
def candidate(tmp_path_factory: pytest.TempPathFactory) -> Candidate:
    return trained(Path(tmp_path_factory.mktemp("candidate")))


def test_one_pass_says_what_encoder_and_heads_say(candidate: Candidate) -> None:
    windows = circle(users=5)
    rows = window_inputs(windows, np.arange(7, len(windows), 9), candidate.vectors, 8)
    told = Foreteller(candidate.window, candidate.heads)(*rows)
    np.testing.assert_allclose(told.next_interest, candidate.window.encode(*rows), atol=1e-6)
    chances = candidate.heads.read(*rows[1:], 8)
    np.testing.assert_allclose(told.heads["purchase"], chances["purchase"], atol=1e-6)
    assert set(told.heads) == {"purchase", "churn"}
    np.testing.assert_allclose(told.heads["churn"], 1 - chances["returns"], atol=1e-6)
    assert np.isfinite(told.heads["purchase"]).all()
    assert np.isnan(told.heads["churn"]).all()  # nobody has learned who returns


def test_the_next_item_is_nearest_to_the_next_interest(candidate: Candidate) -> None:
    windows = circle(users=40, seed=5)
    ends = np.arange(10, len(windows), 20)
    told = Foreteller(candidate.window, candidate.heads)(
        *window_inputs(windows, ends, candidate.vectors, 8)
    )
    nearest = (told.next_interest @ candidate.vectors.T).argmax(axis=1)
    assert (nearest == (windows.item[ends] + 1) % 12).mean() > 0.9
