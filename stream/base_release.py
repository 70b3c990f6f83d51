"""The base release that the settings describe: the texts it is fitted on, building it, and whether
a live one is it.

It does not know where the texts come from, and never replaces a live release of other settings.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from datetime import UTC, datetime
from typing import TYPE_CHECKING

from .errors import UserError
from .events import Item
from .settings import ModelSettings

if TYPE_CHECKING:
    from model.releases import Release

# `model.releases` takes torch's two seconds, so it is imported where it is used.


def texts_of(items: Iterable[Item]) -> list[str]:
    """What the encoder reads of each item."""
    from model.text import item_text

    return [item_text(i.title, i.category, i.brand or "", i.description or "") for i in items]


def build_live(
    model: ModelSettings,
    texts: Sequence[str],
    progress: Callable[[int, int], None],
    item_ids: Sequence[str] = (),
) -> Release:
    """Build the base release and make it the live one; `progress` is told (done, total).
    `item_ids`, where given, are those of the texts: their vectors go into the release.

    Raises what `model.releases.build_base` raises.
    """
    from model.releases import make_current

    release = build(model, texts, progress, item_ids)
    make_current(release)
    return release


def build(
    model: ModelSettings,
    texts: Sequence[str],
    progress: Callable[[int, int], None],
    item_ids: Sequence[str] = (),
) -> Release:
    """Build the base release, or find it built; it does not go live."""
    from model.releases import build_base

    return build_base(
        model.releases,
        model.base,
        texts,
        model.dimensions,
        item_ids=item_ids,
        pooling=model.pooling,
        query_prefix=model.query_prefix,
        passage_prefix=model.passage_prefix,
        max_tokens=model.max_tokens,
        device=model.device,
        now=datetime.now(UTC),
        progress=progress,
    )


def require_as_set(release: Release, model: ModelSettings) -> None:
    """Raises UserError, naming the variables, where the settings describe another release."""
    differences = [
        f"MODEL_{name.upper()} is {getattr(model, name)!r}, the release has "
        f"{getattr(release, name)!r}"
        for name in (
            "base", "dimensions", "pooling", "query_prefix", "passage_prefix", "max_tokens",
        )
        if getattr(model, name) != getattr(release, name)
    ]  # fmt: skip
    if differences:
        raise UserError(
            f"{release.id} is live in {model.releases}, but {'; '.join(differences)}: restore the "
            "settings, or name another folder in MODEL_RELEASES to build there"
        )
