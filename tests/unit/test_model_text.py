from __future__ import annotations

import subprocess
import sys

from hypothesis import given
from hypothesis import strategies as st

from model.text import clean, item_text, text_version


def test_item_text_goes_title_category_brand_description() -> None:
    assert (
        item_text("Silk scarf", ["Women", "Accessories"], "Lumière", "Hand-rolled edges")
        == "Silk scarf. Women > Accessories. Lumière. Hand-rolled edges"
    )


def test_empty_fields_leave_no_trace() -> None:
    assert item_text("Silk scarf", [], "", "") == "Silk scarf"
    assert item_text("", ["", "Women", "  "], "", "") == "Women"
    assert item_text("", [], "", "") == ""


def test_an_endless_field_pushes_no_other_out() -> None:
    text = item_text("t" * 10**6, ["c" * 10**6], "b" * 10**6, "d" * 10**6)
    assert len(text) == 1_926
    assert all(letter in text for letter in "tcbd")


@given(st.text(alphabet=st.characters(), max_size=200), st.integers(1, 50))
def test_cleaned_text_is_short_valid_utf8_and_stays_as_it_is(text: str, max_chars: int) -> None:
    cleaned = clean(text, max_chars)
    assert len(cleaned) <= max_chars
    assert cleaned.encode("utf-8").decode("utf-8") == cleaned
    assert "\0" not in cleaned
    assert clean(cleaned, max_chars) == cleaned


def test_half_a_surrogate_pair_becomes_a_question_mark() -> None:
    assert clean("a\ud800b", 10) == "a?b"


def test_text_version_is_16_hex_digits_that_follow_the_text() -> None:
    assert text_version("Silk scarf") == "4d1f4ebdde0ef5ab"
    assert text_version("Silk scarf") != text_version("Silk scarf ")
    assert len(text_version("\ud800")) == 16


def test_reading_items_needs_no_torch() -> None:
    code = (
        "import sys, model.text; sys.exit(any(m in sys.modules for m in ('torch', 'transformers')))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
