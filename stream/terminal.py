"""What the commands share: the terminal they write to, and the settings they run with."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from .errors import UserError
from .settings import Settings

console = Console()
errors = Console(stderr=True)

# A join takes the embedded broker half the session time-out.
_TANSU_SESSION_TIMEOUT_S = "6"


def load_settings() -> Settings:
    """Settings of the environment; what it leaves open comes from a running local stack."""
    from .local_stack import status as recorded

    stack = recorded(Settings())
    is_ours = "KAFKA_BOOTSTRAP" not in os.environ
    for variable, record in (("KAFKA_BOOTSTRAP", stack.kafka), ("REDIS_URL", stack.redis)):
        if record is not None and (record.running or record.kind == "external"):
            os.environ.setdefault(variable, record.address)
    if is_ours and stack.kafka is not None and stack.kafka.kind == "tansu":
        os.environ.setdefault("KAFKA_SESSION_TIMEOUT_S", _TANSU_SESSION_TIMEOUT_S)
    return Settings()


def plain(text: str) -> str:
    """Text as it is, brackets and all, in rich markup and on one line; control characters in
    words."""
    from .profile_view import printable

    return escape(printable(" ".join(text.splitlines()).strip()))


Report = Callable[[int, int | None], None]
"""What is told how much is done, of how much."""


@contextmanager
def progress(what: str) -> Iterator[Report]:
    """A progress bar on a terminal, silence elsewhere; yields its report."""
    with progresses() as begin:
        yield begin(what)


@contextmanager
def progresses() -> Iterator[Callable[[str], Report]]:
    """The same for several things, one below the other; yields what -> its report."""
    with Progress(
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(),
        console=errors, disable=not errors.is_terminal,
    ) as bar:  # fmt: skip

        def begin(what: str) -> Report:
            task = bar.add_task(what, total=None)
            return lambda done, total: bar.update(task, completed=done, total=total)

        yield begin


def open_to_read(path: Path) -> BinaryIO:
    """The file. Raises UserError."""
    try:
        return path.open("rb")
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from error
