"""Every setting of every Penchant process, and the only reader of the environment.

A setting `kafka.bootstrap` is the environment variable `KAFKA_BOOTSTRAP`: the group,
an underscore, the field. Settings are frozen; a process reads them once at start.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, SecretStr
from pydantic_settings import BaseSettings, SettingsConfigDict

from profiles import Connection

from .errors import UserError


class _Group(BaseModel):
    model_config = ConfigDict(frozen=True, extra="ignore")


class KafkaSettings(_Group):
    """How to reach the brokers (`KAFKA_…`)."""

    bootstrap: str = "localhost:9092"
    security_protocol: Literal["PLAINTEXT", "SSL", "SASL_PLAINTEXT", "SASL_SSL"] = "PLAINTEXT"
    sasl_mechanism: Literal["PLAIN", "SCRAM-SHA-256", "SCRAM-SHA-512"] = "PLAIN"
    sasl_username: str = ""
    sasl_password: SecretStr = SecretStr("")
    ssl_ca_location: str = ""
    group_protocol: Literal["auto", "classic", "consumer"] = "auto"
    """`consumer` is KIP-848; `auto` takes it where the brokers offer it."""
    session_timeout_s: Annotated[float, Field(ge=1)] = 45.0
    instance_id: str = ""
    """Static membership: one per worker, kept over restarts (a StatefulSet's pod name)."""
    partitions: Annotated[int, Field(ge=1)] = 12
    """For topics that Penchant creates."""
    replication: Annotated[int, Field(ge=1)] = 1
    retention_days: Annotated[float, Field(gt=0)] = 7.0

    def client_config(self) -> dict[str, Any]:
        """The librdkafka properties that any client of these brokers needs."""
        config: dict[str, Any] = {
            "bootstrap.servers": self.bootstrap,
            "security.protocol": self.security_protocol,
        }
        if self.security_protocol.startswith("SASL"):
            config |= {
                "sasl.mechanism": self.sasl_mechanism,
                "sasl.username": self.sasl_username,
                "sasl.password": self.sasl_password.get_secret_value(),
            }
        if self.ssl_ca_location:
            config["ssl.ca.location"] = self.ssl_ca_location
        return config


class RedisSettings(_Group):
    """How to reach Redis (`REDIS_…`). `rediss://` in the URL turns TLS on."""

    url: str = "redis://localhost:6379/0"
    username: str = ""
    password: SecretStr = SecretStr("")
    tls_ca: str = ""
    patience_s: Annotated[float, Field(ge=0)] = 60.0
    """How long a worker waits for a Redis that went away before it stops, uncommitted."""

    def connection(self) -> Connection:
        """What is described here, tried as far as goes without a server. Raises UserError."""
        password = self.password.get_secret_value()
        connection = Connection(self.url, self.username, password, self.tls_ca)
        try:
            connection.open().close()
        except ValueError as error:
            # A URL that cannot be read may show parts of its password in redis-py's message.
            raise UserError(
                str(error)
                if str(error).startswith("REDIS_TLS_CA")
                else "REDIS_URL is no Redis URL: write it as redis://HOST:6379/0 (rediss:// for "
                "TLS), and the password in REDIS_PASSWORD"
            ) from error
        return connection


class StreamSettings(_Group):
    """The worker's intake and micro-batches (`STREAM_…`)."""

    repartition: bool = False
    """Forward events that arrived on another partition than murmur2(user_id) names."""
    batch_records: Annotated[int, Field(ge=1, le=100_000)] = 4096
    batch_tokens: Annotated[int, Field(ge=256)] = 65_536
    """A micro-batch also closes when its records hold about this many tokens of text."""
    batch_deadline_ms: Annotated[float, Field(gt=0)] = 20.0
    batch_grow_ms: Annotated[float, Field(ge=0)] = 500.0
    """A micro-batch grows on for this long while the updater is busy with others: no record waits
    longer for its batch than for both."""
    buffered_batches: Annotated[int, Field(ge=1)] = 4
    """Micro-batches waiting for the updater before partitions are paused."""
    cached_profiles: Annotated[int, Field(ge=0)] = 100_000
    """Profiles of active shoppers kept in the worker's memory, up to 5 KB each, so that they need
    not be loaded for their next event; 0 keeps none."""
    max_ahead_s: Annotated[float, Field(ge=0)] = 300.0
    """How far an event's time may lie ahead of the broker's timestamp."""
    max_reject_share: Annotated[float, Field(gt=0, le=1)] = 0.5
    reject_window: Annotated[int, Field(ge=1)] = 10_000
    """Records over which the share of rejects is taken (and the fewest before it counts)."""
    drain_s: Annotated[float, Field(gt=0)] = 5.0
    sweep_per_s: Annotated[float, Field(ge=0)] = 5000.0
    """Untouched profiles moved to a new release's space per second; 0: on touch only."""
    outlook_share: Annotated[float, Field(ge=0, le=1)] = 0.1
    """Of one core, for outlooks (next interest, purchase intent, churn) where the encoder has no
    GPU; while the worker has nothing to fold, the rest of a core too. 0: none are computed."""
    outlook_waiting: Annotated[int, Field(ge=1)] = 10_000
    """Shoppers waiting for an outlook at most; whoever does not fit keeps the one they have."""
    metrics_port: Annotated[int, Field(ge=0, le=65_535)] = 0
    """Port of /metrics and /healthz; 0 turns them off."""
    data_dir: Path = Path(".penchant")
    """Where a process keeps what may be lost without loss: Faust's files, caches, logs."""


class ModelSettings(_Group):
    """The encoder and its releases (`MODEL_…`)."""

    base: str = "bundled"
    """Folder or hub id of the base encoder; `bundled` is all-MiniLM-L6-v2 of the extra `local`."""
    pooling: Literal["mean", "cls"] = "mean"
    query_prefix: str = ""
    passage_prefix: str = ""
    """Prefixes that the base model was trained with (E5: `query: ` and `passage: `)."""
    releases: Path = Path(".penchant/releases")
    dimensions: Annotated[int, Field(ge=8, le=4096)] = 128
    device: str = "auto"
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    max_tokens: Annotated[int, Field(ge=8, le=8192)] = 128
    batch_tokens: Annotated[int, Field(ge=64)] = 16_384
    threads: Annotated[int, Field(ge=0)] = 0
    """CPU threads of the encoder; 0 is one fewer than the cores: the worker needs one itself."""
    item_rows: Annotated[int, Field(ge=1)] = 1_000_000
    """Item vectors held on the device at most."""
    watch_s: Annotated[float, Field(ge=0)] = 1.0
    """How often a worker looks for another live release; 0: only at its start."""


class ProfileSettings(_Group):
    """What a profile keeps (`PROFILE_…`)."""

    half_lives_s: tuple[float, ...] = (1_800.0, 86_400.0, 2_592_000.0)
    window: Annotated[int, Field(ge=1, le=1000)] = 50
    dedupe: Annotated[int, Field(ge=0, le=4096)] = 64
    """Event ids remembered per shopper, to count a producer's repeats once."""
    categories: Annotated[int, Field(ge=1, le=1000)] = 32
    own_items: Annotated[int, Field(ge=0, le=1000)] = 64
    """Items that a shopper had, the heaviest; 0: none."""
    ttl_days: Annotated[float, Field(gt=0)] = 90.0
    currency: Annotated[str, Field(pattern="^[A-Z]{3}$")] = "USD"
    weights: dict[str, float] = Field(default_factory=dict)
    """Event weights by type (JSON); what is not named keeps its default."""


class ArchiveSettings(_Group):
    """Where the trainer keeps events, and for how long (`ARCHIVE_…`)."""

    url: str = ".penchant/archive"
    """A folder, or any fsspec URL such as `s3://bucket/folder`. One trainer at a time writes."""
    retention_days: Annotated[float, Field(gt=0)] = 365.0
    """By event time, before the newest event."""
    max_gb: Annotated[float, Field(gt=0)] = 50.0
    """The oldest events go when segments take more (10^9 bytes)."""
    flush_s: Annotated[float, Field(gt=0)] = 30.0
    flush_rows: Annotated[int, Field(ge=1)] = 200_000
    """Segments are written after so long, or so many events."""
    user_events: Annotated[int, Field(ge=1)] = 2_000
    """The newest so many events of a shopper are learned from; more is a bot or a flood."""


class LearnSettings(_Group):
    """How the side worker fine-tunes (`LEARN_…`)."""

    every_s: Annotated[float, Field(ge=0)] = 0.0
    """The trainer fine-tunes this often; 0 leaves it to `penchant learn`."""
    epochs: Annotated[int, Field(ge=1)] = 8
    window: Annotated[int, Field(ge=2, le=1000)] = 50
    """Events of a window."""
    newest_days: Annotated[float, Field(gt=0)] = 90.0
    """Days of events that are gone through in full; of older ones each pass takes a few."""
    most_events: Annotated[int, Field(ge=1)] = 3_000_000
    """Events that a turn reads at most, for the memory that it takes; of more, those of a part of
    the shoppers, drawn anew for each turn, and more of the newest days than of older ones."""
    compatibility: Annotated[float, Field(ge=0)] = 1.0
    """Weight of the term that keeps item vectors near the live release's."""
    rate: Annotated[float, Field(gt=0)] = 2e-3
    """The highest learning rate; a tuned tower takes a part of it."""
    hard_negatives: Annotated[int, Field(ge=0)] = 0
    """Items nearest to each target that count as its negatives, too."""
    accumulate: Annotated[int, Field(ge=1)] = 1
    """Batches whose gradients are added up before a step."""
    tower: Literal["frozen", "lora", "last", "full"] = "frozen"
    """What of the text tower learns along: nothing, LoRA, its last layers, all of it."""
    tower_layers: Annotated[int, Field(ge=1)] = 1
    """Layers that `last` sets free."""
    distributed: bool = False
    """Share each step out among processes that `accelerate launch` started."""
    tensorboard: str = ""
    """Folder of TensorBoard logs; none are written without."""
    margin: Annotated[float, Field(ge=0)] = 0.0
    """How much better a candidate must be on the newest windows, beyond noise (Recall@20)."""
    least_targets: Annotated[int, Field(ge=1)] = 100
    """Targets of the newest windows below which nothing is shown."""
    older_tolerance: Annotated[float, Field(ge=0)] = 0.005
    """How much worse on older windows, beyond noise (Recall@20)."""
    slice_tolerance: Annotated[float, Field(ge=0)] = 0.01
    """On new shoppers, rare items, rare categories, each script, beyond noise (Recall@20)."""
    least_slice_targets: Annotated[int, Field(ge=1)] = 200
    """Targets of such a slice below which it has no say."""
    served_tolerance: Annotated[float, Field(ge=0)] = 0.005
    """By what readers rank (Recall@20)."""
    head_tolerance: Annotated[float, Field(ge=0)] = 0.01
    """In a head's AUC."""
    calibration_tolerance: Annotated[float, Field(ge=0)] = 0.02
    """In a head's calibration error."""
    norm_ratio: Annotated[float, Field(gt=1)] = 4.0
    """Between the lengths of a release's weights and its successor's."""
    transition_cosine: Annotated[float, Field(ge=-1, le=1)] = 0.7
    """Least mean cosine of mapped and true vectors of held-out items."""
    purchase_days: Annotated[float, Field(gt=0)] = 7.0
    """The horizon of the label "purchase"."""
    return_days: Annotated[float, Field(gt=0)] = 30.0
    """The horizon of the label "returns"."""
    keep_releases: Annotated[int, Field(ge=2)] = 10
    """The releases that were made or live last; of older ones the trainer keeps only the maps."""
    neighbours: bool = False
    """Keep items' neighbours: what shoppers did next to each, with every event."""
    seed: int = 0


class Settings(BaseSettings):
    """All settings of a process, read from the environment."""

    model_config = SettingsConfigDict(
        frozen=True, extra="ignore", env_nested_delimiter="_", env_nested_max_split=1
    )

    namespace: Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9._-]{0,63}$")] = "penchant"
    kafka: KafkaSettings = KafkaSettings()
    redis: RedisSettings = RedisSettings()
    stream: StreamSettings = StreamSettings()
    model: ModelSettings = ModelSettings()
    profile: ProfileSettings = ProfileSettings()
    archive: ArchiveSettings = ArchiveSettings()
    learn: LearnSettings = LearnSettings()

    def environment(self) -> dict[str, str]:
        """The variables that these settings are read from, every one, secrets in the clear."""
        variables: dict[str, str] = {}
        for group, value in self:
            if isinstance(value, BaseModel):
                variables |= {f"{group}_{name}".upper(): _as_text(field) for name, field in value}
            else:
                variables[group.upper()] = _as_text(value)
        return variables

    def topic(self, name: str) -> str:
        """`events` -> `penchant.events`: every topic and group carries the namespace."""
        return f"{self.namespace}.{name}"


def _as_text(value: Any) -> str:
    """A setting as the environment holds it."""
    if isinstance(value, SecretStr):
        return value.get_secret_value()
    if isinstance(value, str | Path):
        return str(value)
    if isinstance(value, tuple):
        return f"[{', '.join(map(_as_text, value))}]"
    if isinstance(value, float) and value.is_integer():
        return f"{value:.0f}"  # 45, not 45.0
    return json.dumps(value)
