from __future__ import annotations

import threading
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import pytest
import torch

from model.encoder import TextEncoder
from model.engine import Engine
from model.errors import WeightsUnavailable
from model.releases import Release, build_base
from model.window_encoder import WINDOW
from tests.foretelling import build_foretelling_release

torch.set_num_threads(1)  # on a busy machine, threads spend their time waiting for each other

TEXTS = [f"{colour} {thing}" for colour in ("red", "blue") for thing in ("scarf", "mug", "lamp")]
NOW = datetime(2026, 3, 1, tzinfo=UTC)


@pytest.fixture(scope="module")
def release(tmp_path_factory: pytest.TempPathFactory) -> Release:
    folder = tmp_path_factory.mktemp("releases")
    return build_base(folder, "bundled", TEXTS, 32, query_prefix="query: ", now=NOW, device="cpu")


@pytest.fixture
def engine(release: Release) -> Engine:
    return Engine(release, device="cpu", item_rows=1_000)


@pytest.fixture
def encoded(monkeypatch: pytest.MonkeyPatch, engine: Engine) -> list[str]:
    """The texts that reach the encoder from here on, in order."""
    seen: list[str] = []
    encode = TextEncoder.encode

    def watched(self: TextEncoder, texts: list[str], *args: object, **kwargs: object) -> object:
        seen.extend(texts)
        return encode(self, texts, *args, **kwargs)  # type: ignore[arg-type]

    monkeypatch.setattr(TextEncoder, "encode", watched)
    return seen


def test_an_engine_gives_the_vectors_of_its_release(engine: Engine, release: Release) -> None:
    expected = release.load_encoder(device="cpu").encode(TEXTS)
    np.testing.assert_allclose(engine.encode(TEXTS), expected, atol=1e-5)
    assert (engine.space, engine.dimensions) == (release.space, 32)
    assert engine.table.dimensions == 32
    assert engine.table.capacity == 1_000


def test_an_engine_foretells_where_its_release_has_learned_to(
    engine: Engine, release: Release
) -> None:
    assert engine.foreteller is None
    learned = build_foretelling_release(release, 1, events=8)
    assert learned.space == release.space
    foreteller = Engine(learned, device="cpu").foreteller
    assert foreteller is not None
    assert foreteller.events == 8
    (learned.path / WINDOW).write_bytes(b"no weights")
    with pytest.raises(WeightsUnavailable):
        Engine(learned, device="cpu")


def test_a_text_given_twice_is_encoded_once(engine: Engine, encoded: list[str]) -> None:
    vectors = engine.encode(["red mug", "blue lamp", "red mug"])
    assert encoded == ["red mug", "blue lamp"]
    np.testing.assert_array_equal(vectors[0], vectors[2])
    np.testing.assert_allclose(vectors[1], engine.encode(["blue lamp"])[0], atol=1e-5)


def test_a_query_is_remembered_and_is_no_passage(engine: Engine, encoded: list[str]) -> None:
    first = engine.encode(["red mug", "\ud800"], "query")
    again = engine.encode(["blue lamp", "red mug"], "query")
    passage = engine.encode(["red mug"])
    assert encoded == ["red mug", "\ud800", "blue lamp", "red mug"]
    np.testing.assert_array_equal(again[1], first[0])
    assert passage[0] @ first[0] < 0.999


def test_no_texts_give_no_rows(engine: Engine) -> None:
    assert engine.encode([]).shape == (0, 32)
    assert engine.encode([], "query").shape == (0, 32)


def test_threads_get_their_own_vectors(engine: Engine) -> None:
    expected = engine.encode(TEXTS)
    answers: dict[int, object] = {}

    def ask(turn: int) -> None:
        order = np.random.default_rng(turn).permutation(len(TEXTS))
        vectors = engine.encode([TEXTS[i] for i in order], "query" if turn % 2 else "passage")
        answers[turn] = vectors[np.argsort(order)]

    threads = [threading.Thread(target=ask, args=(turn,)) for turn in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    queries = engine.encode(TEXTS, "query")
    for turn in range(8):
        np.testing.assert_allclose(answers[turn], queries if turn % 2 else expected, atol=1e-5)


def test_threads_of_torch_are_set_when_asked_for(release: Release) -> None:
    before = torch.get_num_threads()
    try:
        Engine(release, device="cpu", threads=1)
        assert torch.get_num_threads() == 1
    finally:
        torch.set_num_threads(before)


def test_an_engine_reads_no_file_once_it_runs(tmp_path: Path) -> None:
    own = build_base(tmp_path, "bundled", TEXTS, 8, now=NOW, device="cpu")
    engine = Engine(own, device="cpu")
    own.path.rename(tmp_path / "gone")
    assert engine.encode(["red mug"]).shape == (1, 8)
