"""Cases say what a reader would have seen; a fitted ranker is kept only where it is better."""

from __future__ import annotations

import random
from dataclasses import replace

import numpy as np
import pytest
import torch

from model import training_rows as tr
from model.foreteller import Foreteller
from model.heads import Heads
from model.training_data import window_inputs
from model.window_encoder import WindowEncoder, WindowShape
from model.windows import Labelled
from profiles.arithmetic import Floats
from profiles.schema import EVENT_TYPES
from stream import ranker_learning
from stream.ranker_cases import Timed, make_cases, of_release
from stream.ranker_learning import fit_ranker
from tests import neighbour_oracle
from tests.oracle import Event

ITEMS, USERS, DAY_MS, T0_MS = 8, 5, 86_400_000, 1_700_000_000_000
HALF_LIVES_S = (1_800.0, 86_400.0, 2_592_000.0)
_drawn = np.random.default_rng(4).standard_normal((ITEMS, 6))
VECTORS = (_drawn / np.linalg.norm(_drawn, axis=1, keepdims=True)).astype(np.float32)


def shop(events: int, users: int = USERS, seed: int = 1) -> Labelled:
    """Shoppers whose events fall on days of their own, some disliked, some without item."""
    chance = random.Random(seed)
    n = users * events
    item = np.array([chance.choice([-1, *range(ITEMS), *range(ITEMS)]) for _ in range(n)], np.int32)
    weight = np.array([chance.choice([1.0, 1.0, 0.5, 0.0, -0.4]) for _ in range(n)], np.float32)
    t_ms = np.array(
        [T0_MS + k * DAY_MS + j * 1000 for j in range(users) for k in range(events)], np.int64
    )
    none = np.full(n, -1, np.int8)
    return Labelled(
        start=np.arange(users + 1, dtype=np.int64) * events,
        user=[f"u{j}" for j in range(users)],
        item=item,
        type=np.zeros(n, np.uint8),
        t_ms=t_ms,
        weight=weight,
        purchase=none,
        returns=none,
    )


def history(windows: Labelled, before_ms: int) -> list[Event]:
    """All events before a time, as the oracle takes them; the key of item i is i + 1."""
    owner = tr.owners(windows)
    order = np.argsort(windows.t_ms, kind="stable")
    return [
        Event(
            f"u{owner[i]}", 1, at, None, int(windows.t_ms[i]), "impression",
            float(windows.weight[i]), int(windows.item[i]) + 1,
        )
        for at, i in enumerate(order.tolist())
        if windows.t_ms[i] < before_ms
    ]  # fmt: skip


def test_a_case_has_the_signals_of_the_stream_before_it() -> None:
    windows = shop(events=8)
    timed = make_cases(windows, VECTORS, HALF_LIVES_S, cut_ms=T0_MS + 6 * DAY_MS)
    assert 0 < len(timed.t_ms) <= 2 * USERS
    for row, (user, t_ms) in enumerate(zip(timed.user.tolist(), timed.t_ms.tolist(), strict=True)):
        tallies = neighbour_oracle.fold(history(windows, t_ms))
        now_ms = max(t for tally in tallies.values() for _, t in tally.own)

        def mass(
            weights: list[tuple[float, int]],
            now_ms: int = now_ms,
            half_life_s: float = HALF_LIVES_S[-1],
        ) -> float:
            return sum(w * 2.0 ** ((t - now_ms) / (1000 * half_life_s)) for w, t in weights)

        count = {k: mass(tally.own) for k, tally in tallies.items()}
        first = int(windows.start[user])
        end = first + int(np.searchsorted(windows.t_ms[first : first + 8], t_ms))
        at = np.arange(first, end + 1)
        mine = at[(windows.weight[at] > 0) & (windows.item[at] >= 0)]
        want = np.zeros(ITEMS + 1)
        for age, i in enumerate(reversed(mine.tolist())):
            key = int(windows.item[i]) + 1
            for other, weights in tallies[key].near.items() if key in tallies else ():
                want[other] += 0.8**age * mass(weights) / (count[key] + 1) ** 0.5
        for key in range(1, ITEMS + 1):
            want[key] /= (count.get(key, 0.0) + 1) ** 0.3
        got = timed.cases.signals[row]
        np.testing.assert_allclose(got[:, 2], want[1:], rtol=1e-4, atol=1e-6)
        items = timed.cases.items[row]
        logs = [np.log1p(count.get(key, 0.0)) for key in range(1, ITEMS + 1)]
        np.testing.assert_allclose(items[:, 0], logs, rtol=1e-4, atol=1e-6)
        recent = {k: mass(tally.own, half_life_s=259_200.0) for k, tally in tallies.items()}
        logs = [np.log1p(recent.get(key, 0.0)) for key in range(1, ITEMS + 1)]
        np.testing.assert_allclose(items[:, 1], logs, rtol=1e-4, atol=1e-6)
        own = np.zeros(ITEMS)
        for i in at[windows.item[at] >= 0].tolist():
            days = (windows.t_ms[end] - windows.t_ms[i]) / DAY_MS
            own[windows.item[i]] += windows.weight[i] * 2.0 ** (-days / 90)
        np.testing.assert_allclose(got[:, 3], np.maximum(own, 0), rtol=1e-5, atol=1e-6)
        assert (got[:, 0] == 0).all()  # nobody foretells
        later = np.arange(end + 1, first + 8)
        good = later[(windows.weight[later] > 0) & (windows.item[later] >= 0)]
        assert np.flatnonzero(timed.cases.target[row]).tolist() == [windows.item[good[0]]]
        days = np.zeros(ITEMS)  # since the shopper had an item, when they are back
        for i in mine.tolist():
            days[windows.item[i]] = (windows.t_ms[good[0]] - windows.t_ms[i]) / DAY_MS
        np.testing.assert_allclose(items[:, 2], np.log1p(days), rtol=1e-5)


def test_a_case_knows_own_items_from_before_the_window_but_no_more_than_a_profile_keeps() -> None:
    windows = shop(events=12)
    cut_ms = T0_MS + 9 * DAY_MS
    long = make_cases(windows, VECTORS, HALF_LIVES_S, cut_ms=cut_ms)
    short = make_cases(windows, VECTORS, HALF_LIVES_S, cut_ms=cut_ms, window=2)
    np.testing.assert_array_equal(short.cases.signals[..., 3], long.cases.signals[..., 3])
    few = make_cases(windows, VECTORS, HALF_LIVES_S, cut_ms=cut_ms, window=1, own_items=2)
    assert (long.cases.signals[..., 3] > 0).sum(axis=1).max() > 3
    assert (few.cases.signals[..., 3] > 0).sum(axis=1).max() <= 3


def test_a_case_knows_the_own_items_of_its_window_that_its_tally_is_too_small_for() -> None:
    windows = shop(events=12)
    cut_ms = T0_MS + 9 * DAY_MS
    kept = make_cases(windows, VECTORS, HALF_LIVES_S, cut_ms=cut_ms, window=12)
    for own_items in (0, 2):
        cases = make_cases(
            windows, VECTORS, HALF_LIVES_S, cut_ms=cut_ms, window=12, own_items=own_items
        ).cases
        np.testing.assert_array_equal(cases.signals[..., 3], kept.cases.signals[..., 3])
    lately = make_cases(windows, VECTORS, HALF_LIVES_S, cut_ms=cut_ms, window=1, own_items=0).cases
    assert (lately.signals[..., 3] > 0).sum(axis=1).max() == 1


def foreteller(seed: int = 1) -> Foreteller:
    """Of random weights; 6 events of a window."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        window = WindowEncoder(WindowShape(6, 6, EVENT_TYPES, layers=1))
    return Foreteller(window, Heads(len(EVENT_TYPES)))


def test_the_next_interest_of_a_case_is_of_the_window_that_its_profile_had() -> None:
    windows, told = shop(events=12), foreteller()
    timed = make_cases(windows, VECTORS, HALF_LIVES_S, cut_ms=T0_MS + 6 * DAY_MS, foreteller=told)
    kept = windows.as_kept()
    for row, (user, t_ms) in enumerate(zip(timed.user.tolist(), timed.t_ms.tolist(), strict=True)):
        mine = slice(kept.start[user], kept.start[user + 1])
        end = kept.start[user] + np.searchsorted(kept.t_ms[mine], t_ms, side="right") - 1
        rows = window_inputs(kept, np.array([end]), VECTORS, 6)
        want = VECTORS @ told(*rows).next_interest[0]
        np.testing.assert_allclose(timed.cases.signals[row, :, 0], want, atol=1e-5)
    assert np.abs(timed.cases.signals[:, :, 0]).max() > 0.1


def test_the_cases_of_another_release_are_those_that_its_own_vectors_and_networks_make() -> None:
    windows, other = shop(events=12), VECTORS[::-1].copy()

    def made(vectors: Floats, seed: int) -> Timed:
        return make_cases(
            windows, vectors, HALF_LIVES_S, cut_ms=T0_MS + 6 * DAY_MS, foreteller=foreteller(seed)
        )

    mine, want = made(VECTORS, seed=1), made(other, seed=2)
    got = of_release(mine, windows, other, HALF_LIVES_S, foreteller=foreteller(2))
    np.testing.assert_array_equal(got.cases.signals, want.cases.signals)
    assert np.abs(got.cases.signals - mine.cases.signals)[..., :2].max(axis=(0, 1)).min() > 0.1
    silent = of_release(mine, windows, other, HALF_LIVES_S)
    assert (silent.cases.signals[..., 0] == 0).all()


def test_no_case_knows_what_came_after_it() -> None:
    told = shop(events=12)
    later = (told.t_ms >= T0_MS + 9 * DAY_MS) & (told.item >= 0)
    changed = replace(told, item=np.where(later, (told.item + 3) % ITEMS, told.item))
    cases = [
        make_cases(w, VECTORS, HALF_LIVES_S, cut_ms=T0_MS + 6 * DAY_MS, foreteller=foreteller())
        for w in (told, changed)
    ]
    early = [c.t_ms < T0_MS + 9 * DAY_MS for c in cases]
    assert early[0].sum() > USERS
    np.testing.assert_array_equal(*(c.t_ms[e] for c, e in zip(cases, early, strict=True)))
    np.testing.assert_array_equal(*(c.cases.signals[e] for c, e in zip(cases, early, strict=True)))


def planted(n: int, seed: int = 0) -> Timed:
    """What comes next is an own item, and co-visitation, strong as it is, misleads."""
    rng = np.random.default_rng(seed)
    timed = make_cases(shop(events=3), VECTORS, HALF_LIVES_S, cut_ms=T0_MS)
    items = 60
    signals = np.zeros((n, items, 4), np.float32)
    signals[:, :, 2] = rng.exponential(1.0, (n, items))
    target = np.zeros((n, items), np.float32)
    for row in range(n):
        own = rng.choice(items, 12, replace=False)
        signals[row, own, 3] = rng.uniform(0.2, 1, 12)
        target[row, own[0]] = 1.0
    cases = replace(
        timed.cases,
        signals=signals,
        items=np.tile(np.float32([3.0, 1.0, 0.0]), (n, items, 1)),
        shopper=np.zeros((n, 3), np.float32),
        target=target,
        log_chance=np.zeros((n, items), np.float32),
    )
    return Timed(cases, np.arange(n), np.arange(n), np.arange(n))


def test_a_ranker_is_kept_where_it_is_better_beyond_noise() -> None:
    fitted = fit_ranker(planted(1_500), None, margin=0.0)
    assert fitted.weights is not None
    assert fitted.figure.low > 0
    assert fitted.figure.count == 500
    again = fit_ranker(planted(1_500, seed=1), fitted.weights, margin=0.0)
    assert again.weights is None  # nothing is left to gain
    assert fit_ranker(planted(1_500), None, margin=1.0).weights is None


def test_few_cases_leave_the_live_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    fitted = fit_ranker(planted(300), None, margin=0.0)
    assert (fitted.weights, fitted.figure.count) == (None, 0)
    monkeypatch.setattr(ranker_learning, "LEAST_CASES", 100)
    assert fit_ranker(planted(300), None, margin=0.0).weights is not None
