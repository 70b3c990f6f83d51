"""Items and messages as the encoder reads them: text, its version, token ids.

Knows how an item's fields become one text and how a text becomes token ids, once per
text. Knows nothing of vectors, of Kafka or of where items come from. Importing it
pulls in neither torch nor transformers.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from itertools import starmap
from typing import Any

# Most telling part first, because a long text is cut at its end: at 128 tokens an
# English description of more than about 100 words loses its tail, never the title.
# The limits keep one overlong field from pushing the others out of the cut.
TITLE_CHARS = 512
CATEGORY_CHARS = 256
BRAND_CHARS = 128
DESCRIPTION_CHARS = 1024

# Tokenizers read a whole text before they cut it (1 MB takes about half a second), so
# the text is cut first. A token of running text has 1 (Chinese) to 6 (English)
# characters; 32 leaves room for runs that become one token.
CHARS_PER_TOKEN = 32


def item_text(title: str, category: Sequence[str], brand: str, description: str) -> str:
    """What the encoder reads for an item: title, category path, brand, description.

    Empty fields leave no trace, so an item with a title alone is its title. White space
    is collapsed and each field is cut to its limit; the result has at most 1,928
    characters. An item without any text gives the empty string.
    """
    fields = (
        (title, TITLE_CHARS),
        (" > ".join(filter(None, map(str.strip, category))), CATEGORY_CHARS),
        (brand, BRAND_CHARS),
        (description, DESCRIPTION_CHARS),
    )
    return ". ".join(filter(None, starmap(clean, fields)))


def text_version(text: str) -> str:
    """16 hexadecimal digits that change when the text does (the head of its SHA-256)."""
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:16]


def clean(text: str, max_chars: int) -> str:
    """`text` with white space collapsed and cut to `max_chars`, safe for any tokenizer.

    NUL becomes a space; half a surrogate pair (JSON can carry one) becomes `?`, because
    the tokenizers' UTF-8 cannot hold it.
    """
    # Four times the limit is looked at, so that a wide layout still leaves its words.
    text = " ".join(text[: 4 * max_chars].replace("\0", " ").split())[:max_chars].rstrip()
    return text if text.isascii() else text.encode("utf-8", "replace").decode("utf-8")


class Tokenizer:
    """Texts to token ids, special tokens included, at most `max_tokens` each.

    Wraps the Rust tokenizer alone: transformers' own wrapper builds a dictionary per
    call and pads, and padding belongs to the batch. Safe to call from several threads.
    """

    def __init__(self, backend: Any, max_tokens: int, pad_id: int) -> None:
        backend.enable_truncation(max_tokens)
        backend.no_padding()
        self._backend = backend
        self.max_tokens = max_tokens
        self.pad_id = pad_id

    def __call__(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of each text. None is empty: a text without tokens is one padding token."""
        max_chars = self.max_tokens * CHARS_PER_TOKEN
        encodings = self._backend.encode_batch_fast([clean(text, max_chars) for text in texts])
        return [encoding.ids or [self.pad_id] for encoding in encodings]
