from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from model.errors import WeightsUnavailable
from model.head_training import fit_heads, judged
from model.heads import Heads
from model.training_rows import owners, stopping
from model.visits import FEATURES, visit_features
from model.windows import joined
from tests.learnable_shop import DAY_MS, circle, labelled

WIDTH = len(FEATURES) + 2


def fitted(labels: np.ndarray, features: np.ndarray) -> Heads:
    heads = Heads(2, ("purchase",))
    heads.fit(features, {"purchase": labels}, np.ones(len(labels), np.float32))
    return heads


def drawn(n: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Features, and the chance that each makes: one in twelve on average."""
    features = np.random.default_rng(seed).normal(size=(n, WIDTH)).astype(np.float32)
    return features, 1 / (1 + np.exp(3 - 1.5 * features[:, 0]))


def test_probabilities_are_those_that_happen() -> None:
    features, truth = drawn(4000)
    labels = (np.random.default_rng(1).random(4000) < truth).astype(np.int64)
    chances = fitted(labels, features).predict(features)["purchase"]
    assert chances.mean() == pytest.approx(labels.mean(), abs=0.02)
    assert np.abs(chances - truth).mean() < 0.04


def test_a_window_of_little_weight_says_little() -> None:
    labels = np.repeat([0, 1], 200)
    heads = Heads(2, ("purchase",))
    weight = np.where(labels == 1, 1.0, 0.25).astype(np.float32)
    same = np.zeros((400, WIDTH), np.float32)
    heads.fit(same, {"purchase": labels}, weight)
    assert heads.predict(same[:1])["purchase"][0] == pytest.approx(0.8, abs=0.01)


@pytest.mark.parametrize("label", [0, 1, -1])
def test_a_head_that_saw_one_class_says_that_it_does_not_know(label: int) -> None:
    heads = fitted(np.full(50, label), drawn(50)[0])
    assert np.isnan(heads.predict(np.zeros((2, WIDTH), np.float32))["purchase"]).all()


def test_what_was_saved_predicts_the_same_and_other_files_are_refused(tmp_path: Path) -> None:
    features, _ = drawn(60)
    heads, path = fitted(np.arange(60) % 3 // 2, features), tmp_path / "h.safetensors"
    heads.save(path)
    loaded = Heads.load(path).predict(features)["purchase"]
    np.testing.assert_array_equal(loaded, heads.predict(features)["purchase"])
    path.write_bytes(b"no")
    with pytest.raises(WeightsUnavailable, match="train again"):
        Heads.load(path)


def test_made_up_kinds_of_events_take_no_memory(tmp_path: Path) -> None:
    path = tmp_path / "h.safetensors"
    for kinds in ("10000000000", "-1", "many"):
        save_file({}, path, metadata={"names": '["purchase"]', "kinds": kinds})
        with pytest.raises(WeightsUnavailable, match="train again"):
            Heads.load(path)


def test_heads_of_an_older_release_load_and_are_silent(tmp_path: Path) -> None:
    path = tmp_path / "h.safetensors"
    old = {"hidden.weight": np.zeros((4, 4), np.float32), "shift": np.zeros(2, np.float32)}
    save_file(old, path, metadata={"names": json.dumps(["purchase", "returns"])})
    one = np.ones((1, 1), np.int64)
    told = Heads.load(path).read(one.astype(np.uint8), one, one[0], 8)
    assert set(told) == {"purchase", "returns"}
    assert np.isnan(list(told.values())).all()


def test_features_say_when_a_shopper_came() -> None:
    hours = np.array([0, 1, 72, 168, 169])  # visits after 71 and 96 hours
    t_ms = (hours * 3_600_000)[None]
    kind = np.array([[0, 0, 0, 1, 1]], np.uint8)
    (found,) = visit_features(kind, t_ms, np.array([5]), 5, 2)
    said = dict(zip(FEATURES, found.tolist(), strict=False))
    days = {name: np.expm1(said[name]) for name in ("last gap", "gap before", "median gap", "span")}
    assert days == pytest.approx(
        {"last gap": 4, "gap before": 71 / 24, "median gap": (4 + 71 / 24) / 2, "span": 169 / 24},
        rel=1e-5,
    )
    assert np.expm1(said["visits"]) == pytest.approx(2)
    assert np.expm1(said["events of a day"]) == pytest.approx(2)
    assert np.expm1(said["events of a week"]) == pytest.approx(4)
    assert said["window is full"] == 1
    assert found[len(FEATURES) :] == pytest.approx([0.6, 0.4])


def test_features_depend_neither_on_padding_nor_on_what_day_it_is() -> None:
    rng = np.random.default_rng(0)
    t_ms = np.cumsum(rng.integers(0, 3 * DAY_MS, (6, 9)), axis=1)
    kind = rng.integers(0, 2, (6, 9)).astype(np.uint8)
    lengths = np.array([1, 2, 3, 5, 8, 9])
    whole = visit_features(kind, t_ms + 400 * DAY_MS, lengths, 9, 2)
    for row, length in enumerate(lengths):
        cut = slice(row, row + 1), slice(0, length)
        (alone,) = visit_features(kind[cut], t_ms[cut], lengths[row : row + 1], 9, 2)
        np.testing.assert_allclose(whole[row], alone, rtol=1e-6)


def test_heads_are_judged_on_what_they_have_not_learned_from() -> None:
    windows = circle(users=40)
    heads = fit_heads(windows, 2, 8, 0.2, 0)
    ends = judged(windows, heads, "purchase", 10_000, 0)
    assert len(ends)
    assert not stopping(windows)[owners(windows)[ends]].any()
    turned = windows.purchase.copy()
    turned[ends] = 1 - turned[ends]
    other = fit_heads(
        labelled(windows.item.reshape(40, -1), windows.t_ms.reshape(40, -1), purchase=turned),
        2, 8, 0.2, 0,
    )  # fmt: skip
    for one, same in zip(heads.parameters(), other.parameters(), strict=True):
        np.testing.assert_array_equal(one.detach().numpy(), same.detach().numpy())


def test_older_and_newer_windows_joined_are_what_they_were_cut_from() -> None:
    windows = circle(users=7)
    late = windows.t_ms > np.median(windows.t_ms)
    again = joined(windows.take_events(~late), windows.take_events(late))
    assert again.user == windows.user
    for name in ("start", "item", "t_ms", "purchase"):
        np.testing.assert_array_equal(getattr(again, name), getattr(windows, name))
