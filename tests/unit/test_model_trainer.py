from __future__ import annotations

import multiprocessing
import os
import shutil
import signal
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from model import training_rows as tr
from model.catalogue_vectors import CatalogueVectors
from model.errors import NothingToLearn, PackageMissing, WeightsUnavailable
from model.projection import unit_rows
from model.trainer import Base, Candidate, Catalogue, TrainSettings, learning_rate, train
from model.training_data import Floats, Ints, next_interests
from model.windows import Labelled
from tests.learnable_shop import (
    DAY_MS,
    DIMENSIONS,
    SMALL,
    TYPES,
    base,
    catalogue,
    circle,
    labelled,
    trained,
)


@pytest.fixture(scope="module")
def candidate(tmp_path_factory: pytest.TempPathFactory) -> Candidate:
    return trained(tmp_path_factory.mktemp("candidate"))


def scores_after(found: Candidate, windows: Labelled, ends: Ints) -> Floats:
    """(k, n) cosines of all items to the next interests after events `ends` (k,)."""
    events = found.window.shape.events
    return next_interests(windows, ends, found.vectors, found.window, events) @ found.vectors.T


def test_the_planted_pattern_is_learned(candidate: Candidate) -> None:
    newest = candidate.metrics["newest"]
    assert newest["mrr"] > 0.9
    assert candidate.metrics["newest_base"]["mrr"] < 0.5
    assert candidate.metrics["last_loss"] < 0.5 * candidate.metrics["first_loss"]


def test_what_comes_next_is_nearest_to_the_next_interest(candidate: Candidate) -> None:
    windows = circle()
    ends = np.flatnonzero(windows.t_ms >= candidate.metrics["cut_ms"])
    assert 0 < len(ends) < 0.12 * len(windows)
    nearest = scores_after(candidate, windows, ends).argmax(axis=1)
    assert (nearest == (windows.item[ends] + 1) % 12).mean() > 0.9


def test_a_head_learns_who_comes_often_and_keeps_its_promises(tmp_path: Path) -> None:
    """Also where what is older is replayed, and windows reach into it."""
    rng = np.random.default_rng(0)
    item = (rng.integers(0, 12, 200)[:, None] + np.arange(20)) % 12
    often = rng.random(200)[:, None] < 0.5
    t_ms = np.cumsum(rng.integers(1, np.where(often, 4, 20), (200, 20)) * DAY_MS, axis=1)
    t_ms += t_ms.max() - t_ms[:, -1:]  # the newest windows are of both kinds
    soon = rng.random((200, 20)) < np.where(often, 0.9, 0.2)
    windows = labelled(item, t_ms, purchase=soon.astype(np.int8))
    newest = windows.t_ms > np.median(windows.t_ms)
    shop = catalogue()
    found = train(
        windows.take_events(newest), shop, base(shop), TYPES, tmp_path,
        replace(SMALL, epochs=1), replay=windows.take_events(~newest),
    ).metrics["newest"]  # fmt: skip
    assert found["purchase/auc"] > 0.75
    assert found["purchase/calibration_error"] < 0.12


def test_a_head_without_labels_is_left_out_of_judgement(candidate: Candidate) -> None:
    assert "returns/auc" not in candidate.metrics["newest"]
    assert "NaN" not in (candidate.path / "metrics.json").read_text()


def test_the_folder_holds_the_candidate(candidate: Candidate, tmp_path: Path) -> None:
    loaded = Candidate.load(candidate.path)
    np.testing.assert_array_equal(loaded.vectors, candidate.vectors)
    assert loaded.item_ids == candidate.item_ids
    shop = catalogue()
    text = loaded.projection.apply(shop.features)
    np.testing.assert_allclose(unit_rows(text + loaded.residual), loaded.vectors, atol=1e-4)
    with pytest.raises(WeightsUnavailable, match="train again"):
        Candidate.load(candidate.path / "nowhere")
    cut = tmp_path / "cut"
    shutil.copytree(candidate.path, cut)
    (cut / "items.safetensors").write_bytes((cut / "items.safetensors").read_bytes()[:99])
    with pytest.raises(WeightsUnavailable, match="train again"):
        Candidate.load(cut)


def test_a_release_holds_vectors_once_and_older_ones_held_them_twice(
    candidate: Candidate, tmp_path: Path
) -> None:
    shutil.copytree(candidate.path, tmp_path / "new")
    (tmp_path / "new" / "vectors.safetensors").unlink()
    versions = ["0" * 16] * len(candidate.item_ids)
    shipped = CatalogueVectors(candidate.item_ids, versions, candidate.vectors)
    shipped.save(tmp_path / "new" / "item_vectors.safetensors")
    shutil.copytree(tmp_path / "new", tmp_path / "old")
    (tmp_path / "old" / "item_vectors.safetensors").unlink()
    items = load_file(tmp_path / "new" / "items.safetensors")
    assert set(items) == {"residual", "counts"}
    save_file(items | {"vectors": candidate.vectors}, tmp_path / "old" / "items.safetensors")
    for folder in ("new", "old"):
        loaded = Candidate.load(tmp_path / folder)
        np.testing.assert_array_equal(loaded.vectors, candidate.vectors)


def test_the_same_seed_gives_the_same_weights(candidate: Candidate, tmp_path: Path) -> None:
    np.testing.assert_array_equal(trained(tmp_path).vectors, candidate.vectors)


def test_items_met_too_seldom_are_served_from_their_text(tmp_path: Path) -> None:
    shop, windows = catalogue(13), circle(items=12)  # item 12 never happens
    windows.item[5] = 12
    seldom = replace(SMALL, epochs=1, residual_least=1)
    candidate = train(windows, shop, base(shop), TYPES, tmp_path, seldom)
    assert candidate.counts[12] == 1
    assert not candidate.residual[12].any()
    assert candidate.residual[:12].any(axis=1).all()
    np.testing.assert_allclose(
        candidate.vectors[12], candidate.projection.apply(shop.features)[12], atol=1e-4
    )


def test_training_continues_an_earlier_candidate(candidate: Candidate, tmp_path: Path) -> None:
    shop = catalogue()
    again = Base(candidate.projection, candidate)
    np.testing.assert_allclose(again.vectors(shop), candidate.vectors, atol=1e-4)
    settings = replace(SMALL, epochs=1, learning_rate=1e-4)
    longer = train(circle(seed=5), shop, again, TYPES, tmp_path, settings)
    assert longer.metrics["newest_base"]["mrr"] > 0.9
    assert longer.metrics["newest"]["mrr"] > 0.9
    assert longer.metrics["cosine_to_base"] > 0.99


def test_the_compatibility_term_keeps_vectors_near_the_base(
    candidate: Candidate, tmp_path: Path
) -> None:
    near = trained(tmp_path, replace(SMALL, compatibility=20.0))
    assert near.metrics["cosine_to_base"] > candidate.metrics["cosine_to_base"] + 0.1


@pytest.mark.parametrize("option", [{"full_below": 0}, {"hard_negatives": 3}])
def test_other_negatives_are_other_losses_and_teach_as_well(
    option: dict[str, int], candidate: Candidate, tmp_path: Path
) -> None:
    found = trained(tmp_path, replace(SMALL, negatives=6, **option)).metrics
    assert found["newest"]["mrr"] > 0.8
    more = found["first_loss"] - candidate.metrics["first_loss"]
    assert abs(more) > 0.05


def test_accumulated_batches_are_one_step(candidate: Candidate, tmp_path: Path) -> None:
    found = trained(tmp_path, replace(SMALL, accumulate=3, epochs=10)).metrics
    each = candidate.metrics["steps"] / candidate.metrics["epochs"]
    assert found["steps"] / found["epochs"] == pytest.approx(-(-each // 3))
    assert found["newest"]["mrr"] > 0.8


def test_replay_keeps_what_older_windows_taught(candidate: Candidate, tmp_path: Path) -> None:
    """The newest shoppers go back and forth between two items; the older went round."""
    item = np.tile(np.array([0, 1]), (40, 5))
    t_ms = np.tile(np.arange(10) * DAY_MS, (40, 1))
    shop, older = catalogue(), circle()
    before = Base(candidate.projection, candidate)
    ends = np.flatnonzero(tr.find_targets(older).first < tr.find_targets(older).stop)

    def remembered(folder: Path, share: float) -> float:
        settings = replace(SMALL, epochs=4, replay_share=share)
        after = train(labelled(item, t_ms), shop, before, TYPES, folder, settings, replay=older)
        nearest = scores_after(after, older, ends).argmax(axis=1)
        return float((nearest == (older.item[ends] + 1) % 12).mean())

    forgetful, mindful = remembered(tmp_path / "a", 0.0), remembered(tmp_path / "b", 1.0)
    assert mindful > forgetful + 0.3


@pytest.mark.parametrize(("worthy", "cheap"), [(1, 2), (2, 1)])
def test_what_a_target_is_worth_decides_between_equals(
    worthy: int, cheap: int, tmp_path: Path
) -> None:
    """After item 0 half go to item 1 and half to item 2, and one of them is worth five times as
    much as the other."""
    after = np.random.default_rng(0).permuted(np.tile([1, 2], (60, 3)), axis=1)
    item = np.stack([np.zeros_like(after), after], axis=2).reshape(60, 12)
    windows = labelled(item, np.tile(np.arange(12) * DAY_MS, (60, 1)))
    windows.weight[windows.item == cheap] = 0.2
    shop = catalogue()
    found = train(windows, shop, base(shop), TYPES, tmp_path, replace(SMALL, epochs=8))
    ends = np.arange(0, len(windows), 12)
    scores = scores_after(found, windows, ends)
    assert (scores[:, worthy] > scores[:, cheap]).all()


def _train_and_die(folder: Path, step: int) -> None:
    def progress(stage: str, done: int, total: int) -> None:
        if done == step:
            os.kill(os.getpid(), signal.SIGKILL)

    trained(folder, replace(SMALL, checkpoint_steps=3), progress=progress)


@pytest.mark.parametrize("step", [2, 31])
def test_a_killed_and_resumed_run_gives_the_weights_of_an_uninterrupted_one(
    step: int, tmp_path: Path
) -> None:
    settings = replace(SMALL, checkpoint_steps=3)
    whole = trained(tmp_path / "whole", settings)
    process = multiprocessing.get_context("spawn").Process(
        target=_train_and_die, args=(tmp_path / "killed", step)
    )
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    seen: list[int] = []
    resumed = trained(
        tmp_path / "killed", settings, progress=lambda stage, done, total: seen.append(done)
    )
    assert seen[0] == step // 3 * 3 + 1
    np.testing.assert_array_equal(resumed.vectors, whole.vectors)
    for name, value in whole.window.state_dict().items():
        np.testing.assert_array_equal(resumed.window.state_dict()[name].numpy(), value.numpy())
    assert not (tmp_path / "killed" / "checkpoint.pt").exists()


def test_a_checkpoint_of_other_settings_is_not_gone_on_with(tmp_path: Path) -> None:
    class Stop(Exception):
        pass

    def stop(stage: str, done: int, total: int) -> None:
        if done == 8:
            raise Stop

    with pytest.raises(Stop):
        trained(tmp_path, replace(SMALL, checkpoint_steps=3), progress=stop)
    assert (tmp_path / "checkpoint.pt").exists()
    seen: list[int] = []
    trained(
        tmp_path,
        replace(SMALL, epochs=1, seed=1),
        progress=lambda stage, done, total: seen.append(done),
    )
    assert seen[0] == 1


def test_a_checkpoint_cut_short_is_begun_again(tmp_path: Path) -> None:
    (tmp_path / "checkpoint.pt").write_bytes(b"PK\x03\x04 half of it")
    assert trained(tmp_path, replace(SMALL, epochs=1)).metrics["epochs"] == 1


def test_training_stops_when_the_newest_slice_says_so(tmp_path: Path) -> None:
    item = np.random.default_rng(0).integers(0, 12, (40, 12))
    t_ms = np.tile(np.arange(12) * DAY_MS, (40, 1))
    shop = catalogue()
    settings = replace(SMALL, epochs=30, patience=2)
    noise = train(labelled(item, t_ms), shop, base(shop), TYPES, tmp_path, settings)
    assert noise.metrics["epochs"] < 30
    assert noise.metrics["best_epoch"] == noise.metrics["epochs"] - 2


def test_a_catalogue_of_one_item_and_one_class_is_trained_without_a_fuss(tmp_path: Path) -> None:
    item = np.zeros((8, 5), dtype=np.int64)
    t_ms = np.tile(np.arange(5) * DAY_MS, (8, 1))
    windows = labelled(item, t_ms, purchase=np.ones((8, 5), dtype=np.int8))
    shop = catalogue(1)
    candidate = train(windows, shop, base(shop), TYPES, tmp_path, replace(SMALL, epochs=2))
    assert candidate.vectors.shape == (1, DIMENSIONS)
    assert np.isfinite(candidate.vectors).all()
    one = np.ones((3, 1), dtype=np.int64)
    chances = candidate.heads.read(one.astype(np.uint8), one, one[:, 0], 8)
    assert np.isnan(chances["purchase"]).all()


def test_nothing_to_learn_from_says_what_would_help(tmp_path: Path) -> None:
    shop = catalogue()
    none = labelled(np.zeros((0, 1), dtype=np.int64), np.zeros((0, 1), dtype=np.int64))
    with pytest.raises(NothingToLearn, match="let the archive fill"):
        train(none, shop, base(shop), TYPES, tmp_path, SMALL)
    once = labelled(np.arange(5)[:, None], np.arange(5)[:, None])
    with pytest.raises(NothingToLearn, match="wait for shoppers"):
        train(once, shop, base(shop), TYPES, tmp_path, SMALL)
    empty = Catalogue([], np.zeros((0, 24), dtype=np.float32))
    with pytest.raises(NothingToLearn, match="catalogue is empty"):
        train(circle(), empty, base(shop), TYPES, tmp_path, SMALL)


def test_logs_hold_losses_of_all_steps_and_a_figure_of_each_epoch(tmp_path: Path) -> None:
    board = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    found = trained(tmp_path / "candidate", tensorboard=tmp_path / "logs").metrics
    logs = board.EventAccumulator(str(tmp_path / "logs"))
    logs.Reload()
    losses = [event.value for event in logs.Scalars("train/loss")]
    assert len(losses) == found["steps"]
    assert np.mean(losses[-20:]) == pytest.approx(found["last_loss"], rel=1e-4)
    figures = [event.value for event in logs.Scalars("newest/ndcg@20")]
    assert len(figures) == found["epochs"]
    assert max(figures) == pytest.approx(found["newest"]["ndcg@20"], rel=1e-4)


def test_logs_without_tensorboard_say_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(PackageMissing, match="install it"):
        trained(tmp_path, tensorboard=tmp_path / "logs")


def test_items_beyond_the_catalogue_are_refused(tmp_path: Path) -> None:
    shop = catalogue(3)
    with pytest.raises(ValueError, match="beyond the catalogue's 3 items"):
        train(circle(), shop, base(shop), TYPES, tmp_path, SMALL)


def test_the_rate_warms_up_and_falls_to_a_tenth() -> None:
    settings = TrainSettings(learning_rate=1.0, warmup_steps=10, last_rate_share=0.1)
    rates = [learning_rate(step, 100, settings) for step in range(101)]
    assert rates[0] == pytest.approx(0.1)
    assert max(rates) == pytest.approx(1.0)
    assert rates[100] == pytest.approx(0.1)
    assert np.all(np.diff(rates[10:]) <= 0)
