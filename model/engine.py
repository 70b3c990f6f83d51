"""Owns the device: the encoder of one release, what foretells, the table of item vectors, whose
turn it is.

Texts come in from any thread; batches take turns on the device. Knows nothing of events
or of when a release changes: a new release is a new engine.
"""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch

from .encoder import BATCH_TOKENS, DType, Kind
from .foreteller import Foreteller
from .item_table import ItemTable
from .releases import Release

Floats = npt.NDArray[np.float32]

# Searches repeat far more than reviews do; at 128 dimensions this is 8 MiB at most.
QUERY_ROWS = 16_384


class Engine:
    """One release on one device. Every method may be called from any thread."""

    def __init__(
        self,
        release: Release,
        *,
        device: str = "auto",
        dtype: DType = "auto",
        batch_tokens: int = BATCH_TOKENS,
        threads: int = 0,
        item_rows: int = 1_000_000,
    ) -> None:
        """Load `release` and run it once, so that a release that cannot encode fails here.

        `threads` is the CPU threads of torch in this whole process; 0 leaves its default.
        `item_rows` bounds the item table. Raises WeightsUnavailable,
        EncoderSettingsInvalid and NonFiniteVectors.
        """
        if threads:
            torch.set_num_threads(threads)
        self.release = release
        self._encoder = release.load_encoder(device=device, dtype=dtype)
        self._batch_tokens = batch_tokens
        self._turn = threading.Lock()
        self._queries = ItemTable(QUERY_ROWS, release.dimensions)
        self.table = ItemTable(item_rows, release.dimensions, self._encoder.device)
        self.foreteller = Foreteller.load(release, self._encoder.device)
        """What comes next of a window; None where the release has not learned to tell."""
        self._encoder.encode(["warm up"])
        if self.foreteller is not None:
            self.foreteller.warm_up()

    @property
    def space(self) -> str:
        """The id of the space of all vectors from this engine: 16 hexadecimal digits."""
        return self.release.space

    @property
    def dimensions(self) -> int:
        return self.release.dimensions

    @property
    def device(self) -> torch.device:
        return self._encoder.device

    def encode(self, texts: Sequence[str], kind: Kind = "passage") -> Floats:
        """Texts to unit rows (n, D), float32, in order; a text given twice is encoded once.

        Queries are remembered, passages are not: their vectors belong in `table`, under
        the key that the caller gives an item. Raises NonFiniteVectors.
        """
        unique = {text: i for i, text in enumerate(dict.fromkeys(texts))}
        encode = self._encode_queries if kind == "query" else self._encode
        vectors = encode(list(unique), kind)  # (u, D)
        if len(unique) == len(texts):
            return vectors
        return vectors[[unique[text] for text in texts]]

    def _encode(self, texts: list[str], kind: Kind) -> Floats:
        return self._encoder.encode(texts, kind, batch_tokens=self._batch_tokens, turn=self._turn)

    def _encode_queries(self, texts: list[str], kind: Kind) -> Floats:
        keys = [_digest(text) for text in texts]
        vectors, found = self._queries.lookup(keys)
        missing = np.flatnonzero(~found)
        if len(missing):
            vectors[missing] = self._encode([texts[i] for i in missing], kind)
            self._queries.put([keys[i] for i in missing], vectors[missing])
        return vectors


def _digest(text: str) -> int:
    """64 bits of a hash: among 16,384 texts two collide once in 10^11 fillings."""
    digest = hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()
    return int.from_bytes(digest[:8], "little")
