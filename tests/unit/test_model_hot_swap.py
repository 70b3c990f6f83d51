from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from model import hot_swap
from model.hot_swap import HotSwap
from model.releases import Release, make_current
from tests.integration.worker_process import (
    build_tiny_release,
    build_turned_release,
    eventually,
)

Make = Callable[..., HotSwap[str]]


@pytest.fixture
def base(tmp_path: Path) -> Release:
    return build_tiny_release(tmp_path)


class Seen:
    """What a watcher did."""

    def __init__(self) -> None:
        self.built: list[str] = []
        self.served: list[str] = []
        self.refused: list[str] = []


@pytest.fixture
def seen() -> Seen:
    return Seen()


@pytest.fixture
def make(base: Release, seen: Seen) -> Make:
    def watcher(build: Callable[[Release], str] = lambda release: release.id) -> HotSwap[str]:
        def note(release: Release) -> str:
            seen.built.append(release.id)
            return build(release)

        return HotSwap(
            base.path.parent,
            base.id,
            note,
            lambda release, ready: seen.served.append(ready),
            poll_s=0.01,
            refused=seen.refused.append,
        )

    return watcher


def test_the_release_that_serves_is_left_alone(make: Make, seen: Seen) -> None:
    assert not make().look()
    assert (seen.built, seen.refused) == ([], [])


def test_another_release_is_built_and_then_served(base: Release, make: Make, seen: Seen) -> None:
    second = build_turned_release(base, 2)
    make_current(second)
    watcher = make()
    assert watcher.look()
    assert (seen.built, seen.served, watcher.live) == ([second.id], [second.id], second.id)
    assert not watcher.look()


def test_what_is_broken_is_refused_once_and_tried_again_later(
    base: Release, make: Make, seen: Seen, monkeypatch: pytest.MonkeyPatch
) -> None:
    second = build_turned_release(base, 2)
    metrics = second.path / "metrics.json"
    whole = metrics.read_bytes()
    metrics.write_bytes(b"{}")
    make_current(second)
    watcher = make()
    for _ in range(3):
        assert not watcher.look()
    assert (len(seen.refused), seen.built, watcher.live) == (1, [], base.id)
    assert "metrics.json" in seen.refused[0]
    metrics.write_bytes(whole)  # it was still being copied
    later = hot_swap.time.monotonic() + hot_swap.RETRY_S + 1
    monkeypatch.setattr(hot_swap.time, "monotonic", lambda: later)
    assert watcher.look()


@pytest.mark.parametrize("content", ["trained-gone\n", "../elsewhere\n", "", "\xff"])
def test_a_pointer_to_nothing_is_refused_and_the_live_release_serves_on(
    base: Release, make: Make, seen: Seen, content: str
) -> None:
    (base.path.parent / "CURRENT").write_text(content)
    watcher = make()
    assert not watcher.look()
    assert (len(seen.refused), watcher.live) == (1, base.id)


def test_what_fails_to_load_is_refused_whatever_the_reason(
    base: Release, make: Make, seen: Seen
) -> None:
    def build(release: Release) -> str:
        raise MemoryError("no room")

    make_current(build_turned_release(base, 2))
    assert not make(build).look()
    assert seen.refused == ["MemoryError: no room"]


def test_a_release_that_was_taken_back_while_it_was_built_is_never_served(
    base: Release, make: Make, seen: Seen
) -> None:
    def build(release: Release) -> str:
        make_current(base)
        return release.id

    make_current(build_turned_release(base, 2))
    watcher = make(build)
    assert not watcher.look()
    assert not watcher.look()
    assert (seen.served, watcher.live) == ([], base.id)


def test_the_watcher_follows_on_its_own_thread_until_it_is_stopped(
    base: Release, make: Make, seen: Seen
) -> None:
    second, third = build_turned_release(base, 2), build_turned_release(base, 3)
    watcher = make(lambda release: threading.current_thread().name)
    watcher.start()
    make_current(second)
    eventually("it follows", lambda: watcher.live == second.id)
    watcher.stop()
    make_current(third)
    assert not watcher._thread.is_alive()
    assert (seen.served, watcher.live) == (["hot-swap"], second.id)
