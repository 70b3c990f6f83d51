from __future__ import annotations

import numpy as np
import pytest

from model.item_slices import item_slices, script


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Wool scarf, 2 m", "latin"),
        ("Schöner Schal für Ärzte", "latin"),
        ("шерстяной шарф USB", "cyrillic"),
        ("羊毛围巾", "cjk"),
        ("ウール の 手袋 M", "kana"),
        ("양모 스카프", "hangul"),
        ("وشاح صوفي", "arabic"),
        ("42 / 7 !", ""),
        ("", ""),
    ],
)
def test_a_text_is_of_the_script_of_most_of_its_letters(text: str, expected: str) -> None:
    assert script(text) == expected


def test_a_catalogue_of_one_script_has_no_slice_of_it() -> None:
    slices = item_slices(["hat", "coat"], ["a", "b"], np.array([1, 1]))
    assert set(slices) == {"rare categories"}


def test_each_script_of_a_mixed_catalogue_is_a_slice() -> None:
    slices = item_slices(["hat", "шарф", "coat", "7"], ["", "", "", ""], np.ones(4, np.int64))
    assert slices["latin texts"].tolist() == [True, False, True, False]
    assert slices["cyrillic texts"].tolist() == [False, True, False, False]


def test_categories_are_rare_until_they_hold_a_tenth_of_the_events() -> None:
    categories = ["big", "small", "small", "tiny", "never", ""]
    slices = item_slices(["x"] * 6, categories, np.array([90, 3, 2, 4, 0, 1]))
    # never 0, none 1 (no category is no slice), tiny 4 and small 5 make ten of a hundred
    assert slices["rare categories"].tolist() == [False, True, True, True, True, False]
