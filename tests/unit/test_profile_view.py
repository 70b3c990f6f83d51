"""What a person sees of text that somebody else wrote."""

from __future__ import annotations

from stream.profile_view import _cell, printable
from stream.terminal import plain


def test_control_characters_are_shown_in_words() -> None:
    assert printable("a\x1b[2Jb\x07\x9b\n") == "a\\x1b[2Jb\\x07\\x9b\\x0a"
    assert printable("Blåbær 蓝莓 [bold]") == "Blåbær 蓝莓 [bold]"


def test_dead_letters_and_profile_cells_cannot_move_the_cursor() -> None:
    assert "\x1b" not in plain("x\x1b[2J")
    assert "\x1b" not in _cell("x\x1b[2J").plain
