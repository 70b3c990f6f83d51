"""What a person at the command line is told instead of a traceback."""

from __future__ import annotations


class UserError(Exception):
    """One line: what is wrong, and what to do about it. The CLI prints it and exits with 1."""
