"""Groups of a catalogue that a candidate may lose without the whole showing it.

PURE. Knows texts, categories and how often items happened; knows no figure.

Languages are told apart by their letters alone: a script each, by the names that Unicode gives
them, and Japanese by its kana. German and English are one group, Russian and Bulgarian another.
"""

from __future__ import annotations

import unicodedata
from collections import Counter
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Final

import numpy as np
import numpy.typing as npt

Bools = npt.NDArray[np.bool_]
Ints = npt.NDArray[np.int64]

RARE_SHARE: Final = 0.1
"""Of all events: so much the rarest categories may hold together."""
_READ: Final = 400  # characters of a text: a title and more
_KANA: Final = ("HIRAGANA", "KATAKANA")


def script(text: str) -> str:
    """Of most letters: "latin", "cyrillic", "cjk", …; "kana" where there is any; "" without."""
    found = Counter(name for sign in text[:_READ] if (name := _script(sign)))
    if any(name in found for name in _KANA):
        return "kana"
    # Of equally many letters the one that is first by name, whatever the order in the text.
    return min(found, key=lambda name: (-found[name], name)).lower() if found else ""


def item_slices(
    texts: Sequence[str], categories: Sequence[str], item_events: Ints
) -> Mapping[str, Bools]:
    """Name -> (n,) whether an item is in it. `categories` are "" where there is none;
    `item_events` (n,): training events. A single script is no slice: it is the whole."""
    slices = {"rare categories": _rare(categories, item_events)}
    scripts = np.array([script(text) for text in texts])
    names = [str(name) for name in np.unique(scripts) if name]
    if len(names) > 1:
        slices |= {f"{name} texts": scripts == name for name in names}
    return slices


def _rare(categories: Sequence[str], item_events: Ints) -> Bools:
    names, group = np.unique(np.array(categories, dtype=object), return_inverse=True)
    events = np.bincount(group, item_events, minlength=len(names))
    order = np.argsort(events, kind="stable")
    together = np.empty(len(names))
    together[order] = np.cumsum(events[order])
    rare = together <= RARE_SHARE * max(float(events.sum()), 1.0)
    return np.asarray(rare[group] & np.array([bool(name) for name in categories]))


@lru_cache(maxsize=65_536)
def _script(sign: str) -> str:
    """The first word of a letter's name; "" for what is no letter."""
    return unicodedata.name(sign, "").partition(" ")[0] if sign.isalpha() else ""
