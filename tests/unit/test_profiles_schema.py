"""The layout that other languages rely on: its page, its examples, and who may not read it."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest

from profiles import (
    LayoutMismatch,
    SchemaTooNew,
    SpaceMismatch,
    StateCorrupt,
    arithmetic,
    schema,
    schema_doc,
)
from profiles.arithmetic import Layout
from profiles.schema import Keys, key64, source_key
from tests import golden_profiles
from tests.profile_events import LAYOUT, SPACE, Shelf, columns, in_topic, item_event

DOCS = Path(__file__).parents[2] / "docs"
GOLDEN = json.loads((DOCS / "golden" / "profiles.json").read_text())


def test_the_page_says_what_the_module_says() -> None:
    assert (DOCS / "schema.md").read_text() == schema_doc.markdown() + "\n", (
        "run: python -m profiles.schema_doc > docs/schema.md"
    )


def test_the_golden_profiles_are_still_written_this_way() -> None:
    assert golden_profiles.golden() == GOLDEN, (
        "run: python -m tests.golden_profiles > docs/golden/profiles.json"
    )


@pytest.mark.parametrize("example", GOLDEN, ids=lambda example: example["name"])
def test_golden_bytes_mean_what_the_file_says(example: dict[str, str]) -> None:
    state, fence = bytes.fromhex(example["state"]), bytes.fromhex(example["fence"])
    assert golden_profiles.contents(state, fence) == example["holds"]


def test_a_golden_outlook_means_what_the_file_says() -> None:
    example = GOLDEN[0]
    next_, heads = bytes.fromhex(example["next"]), json.dumps(example["heads"])
    space = example["holds"]["space"]
    assert golden_profiles.outlook_contents(next_, heads, space) == example["outlook_holds"]


def test_a_key_is_the_head_of_a_sha256() -> None:
    # printf %s A-1 | sha256sum | head -c 16, read from the last byte to the first
    assert f"{key64('A-1'):016x}" == "ec79ab82e97b4ebc"
    assert source_key("topic-id", 3) == key64("topic-id/3")


@pytest.mark.parametrize("user_id", ["u1", "a b", "ü-☃-🛒", "{x}", "a{b}c", "*?[a]"])
def test_a_profile_key_hash_tags_the_user(user_id: str) -> None:
    assert Keys("shop").profile(user_id) == f"shop:profile:{{{user_id}}}"


def test_a_header_is_packed_and_counts_have_room() -> None:
    for scales, dimensions in [(1, 1), (3, 128), (5, 384)]:
        assert schema.header_dtype(scales, dimensions).itemsize == 128 + scales * (
            8 + 4 * dimensions
        )
    assert len(schema.EVENT_TYPES) <= schema.COUNT_SLOTS


# --- who may not read it -------------------------------------------------------------------


def stored(layout: Layout = LAYOUT) -> tuple[bytes, bytes]:
    shelf = Shelf(layout)
    shelf.fold(in_topic([item_event(0)]))
    return shelf.states["u"], shelf.fences["u"]


def with_field(state: bytes, name: str, value: object) -> bytes:
    header = np.frombuffer(bytearray(state[: LAYOUT.header.itemsize]), dtype=LAYOUT.header)
    header[name] = value
    return header.tobytes() + state[LAYOUT.header.itemsize :]


def test_a_later_schema_asks_for_an_upgrade() -> None:
    state, fence = stored()
    later = with_field(state, "version", schema.SCHEMA_VERSION + 1)
    with pytest.raises(SchemaTooNew, match="upgrade"):
        arithmetic.unpack([state, later], [fence, fence], LAYOUT)
    # Whatever follows the version may mean anything, and be of any length.
    for bytes_ in (later, later[:7], later + b"more"):
        with pytest.raises(SchemaTooNew, match=r"user 'u'.*upgrade"):
            arithmetic.decode("u", bytes_, fence)


def test_a_schema_of_version_zero_is_corrupt() -> None:
    state, fence = stored()
    with pytest.raises(StateCorrupt, match="version 0"):
        arithmetic.unpack([with_field(state, "version", 0)], [fence], LAYOUT)


@pytest.mark.parametrize(
    "layout",
    [
        Layout(8, LAYOUT.half_lives_s),
        Layout(LAYOUT.dimensions, (60.0, 3_600.0)),
        Layout(LAYOUT.dimensions, (60.0, 3_600.0, 86_400.0)),
    ],
    ids=["dimensions", "fewer scales", "half-lives"],
)
def test_other_settings_are_told_apart_from_corruption(layout: Layout) -> None:
    state, fence = stored()
    with pytest.raises(LayoutMismatch, match="MODEL_DIMENSIONS or PROFILE_HALF_LIVES_S"):
        arithmetic.unpack([state], [fence], layout)


@pytest.mark.parametrize("half_life", [0.0, -1.0, math.nan, math.inf])
def test_impossible_half_lives_are_corrupt_to_a_reader(half_life: float) -> None:
    state, fence = stored()
    with pytest.raises(StateCorrupt, match="half-lives"):
        arithmetic.decode("u", with_field(state, "half_lives_s", half_life), fence)


@pytest.mark.parametrize("name", ["masses", "sums"])
def test_a_profile_of_nan_or_infinity_is_corrupt_to_a_reader(name: str) -> None:
    state, fence = stored()
    for number in (math.nan, -math.inf):
        with pytest.raises(StateCorrupt, match="user 'u': it holds NaN or infinity"):
            arithmetic.decode("u", with_field(state, name, number), fence)


def test_profiles_read_together_are_those_read_alone_whatever_their_layout() -> None:
    examples = [(bytes.fromhex(e["state"]), bytes.fromhex(e["fence"])) for e in GOLDEN]
    state, fence = stored()
    other = with_field(state, "half_lives_s", np.asarray(LAYOUT.half_lives_s) * 2)
    pairs = [(state, fence), *examples, (other, fence), (state, fence)]
    ids = [f"u{i}" for i in range(len(pairs))]
    alone = [arithmetic.decode(u, *pair) for u, pair in zip(ids, pairs, strict=True)]
    together = arithmetic.decode_many(ids, *map(list, zip(*pairs, strict=True)))
    assert len({profile.half_lives_s for profile in alone}) > 1
    for one, of_all in zip(alone, together, strict=True):
        np.testing.assert_equal(vars(of_all), vars(one))
    pairs[2] = with_field(pairs[2][0], "masses", math.nan), fence
    with pytest.raises(StateCorrupt, match="user 'u2': it holds NaN"):
        arithmetic.decode_many(ids, *map(list, zip(*pairs, strict=True)))


def test_a_half_life_of_nan_among_others_is_corrupt_to_a_reader() -> None:
    state, fence = stored()
    middle = [LAYOUT.half_lives_s[0], math.nan, LAYOUT.half_lives_s[-1]]
    with pytest.raises(StateCorrupt, match="half-lives"):
        arithmetic.decode("u", with_field(state, "half_lives_s", middle), fence)


@pytest.mark.parametrize(
    "half_lives_s", [(), (1.0, math.nan, 2.0), (0.0,), (-5.0, 1.0), (math.nan,), (86_400.0, 60.0)]
)
def test_impossible_half_lives_are_refused_as_settings(half_lives_s: tuple[float, ...]) -> None:
    with pytest.raises(ValueError, match="PROFILE_HALF_LIVES_S"):
        Layout(4, half_lives_s)


def test_a_profile_takes_no_vector_of_another_space() -> None:
    shelf = Shelf()
    shelf.fold(in_topic([item_event(0)]))
    profiles = shelf.load(["u"])
    other = SPACE + 1
    with pytest.raises(SpaceMismatch, match=f"{SPACE:016x}.*{other:016x}"):
        arithmetic.fold(profiles, columns(in_topic([item_event(1)]), ["u"]), LAYOUT, other)
    with pytest.raises(SpaceMismatch):
        arithmetic.resolve_pending(profiles, {}, {}, LAYOUT, other)
    stranger = shelf.load(["stranger"])
    arithmetic.fold(stranger, columns(in_topic([item_event(1)]), ["u"]), LAYOUT, other)
    with pytest.raises(SpaceMismatch, match="merged"):
        arithmetic.merge(profiles, stranger, LAYOUT)
    arithmetic.merge(profiles, shelf.load(["nobody"]), LAYOUT)


def test_similarity_is_a_cosine_within_one_space() -> None:
    shelf = Shelf()
    shelf.fold(in_topic([item_event(0, user_id="a"), item_event(0, weight=3, user_id="b")]))
    a, b = shelf.profile("a"), shelf.profile("b")
    assert a.similarity(b, 0) == pytest.approx(1)
    elsewhere = arithmetic.decode("c", with_field(shelf.states["b"], "space", SPACE + 1))
    with pytest.raises(SpaceMismatch, match="c in"):
        a.similarity(elsewhere, 0)
