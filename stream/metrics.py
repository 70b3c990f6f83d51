"""Every metric: name, type, unit, what a bad value means. And the port they are served on."""

from __future__ import annotations

import logging
import socket
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Final

from prometheus_client import (
    CONTENT_TYPE_LATEST,
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    generate_latest,
)

from .errors import UserError

log = logging.getLogger(__name__)

REGISTRY: Final = CollectorRegistry()

# Counters. Rates of the first three say what the worker does; the others should stay low.
EVENTS_APPLIED: Final = Counter(
    "penchant_events_applied", "Events that changed a profile", registry=REGISTRY
)
EVENTS_REPLAYED: Final = Counter(
    "penchant_events_replayed",
    "Events at or below the watermark. Bursts follow restarts and rebalances; a steady rate means "
    "offsets are not committed",
    registry=REGISTRY,
)
EVENTS_REPEATED: Final = Counter(
    "penchant_events_repeated",
    "Events whose id the shopper's profile remembers. A high share means a producer sends twice",
    registry=REGISTRY,
)
EVENTS_REJECTED: Final = Counter(
    "penchant_events_rejected", "Records sent to the dead-letter topic", ["reason"],
    registry=REGISTRY,
)  # fmt: skip
EVENTS_PENDING: Final = Counter(
    "penchant_events_pending",
    "Events on items without a text, kept until it comes. A steady rate means items are not "
    "produced to the items topic",
    registry=REGISTRY,
)
EVENTS_FORWARDED: Final = Counter(
    "penchant_events_forwarded",
    "Events forwarded to the partition of their user. High: producers use another partitioner",
    registry=REGISTRY,
)
USERS_SPLIT: Final = Counter(
    "penchant_users_on_two_partitions",
    "Times a user appeared on a further partition. Rising: producers disagree on the partitioner, "
    "set STREAM_REPARTITION=true",
    registry=REGISTRY,
)
USERS_FORGOTTEN: Final = Counter("penchant_users_forgotten", "Users erased", registry=REGISTRY)
ITEMS_STORED: Final = Counter("penchant_items_stored", "Item upserts stored", registry=REGISTRY)
SAVES: Final = Counter("penchant_profile_saves", "Profiles saved", registry=REGISTRY)
SAVES_REFUSED: Final = Counter(
    "penchant_profile_saves_refused",
    "Saves refused because another writer was there first, and folded anew. A steady rate means "
    "users on two partitions",
    registry=REGISTRY,
)
SLICES_STALE: Final = Counter(
    "penchant_slices_stale", "Slices dropped unread: their partition was given away",
    registry=REGISTRY,
)  # fmt: skip
RECORDS_EXPIRED: Final = Counter(
    "penchant_records_expired",
    "Records that the broker deleted before they were saved. Any: raise the retention",
    registry=REGISTRY,
)
REDIS_RETRIES: Final = Counter(
    "penchant_redis_retries", "Micro-batches tried again because Redis failed", registry=REGISTRY
)
GENERATION: Final = Gauge(
    "penchant_generation",
    "The generation of profiles that this worker writes. Another than other workers' for more than "
    "seconds: it hangs",
    registry=REGISTRY,
)
REDIS_WENT_BACK: Final = Counter(
    "penchant_redis_went_back",
    "Times that Redis lacked what it had acknowledged to this worker, or to the one before: a "
    "failover to a replica that was behind, or an older file. It is repaired; any: look at Redis",
    registry=REGISTRY,
)
READ_AGAIN: Final = Counter(
    "penchant_records_read_again",
    "Records that were committed, or finished here, and are read again because Redis went back",
    registry=REGISTRY,
)

PAIRS_SENT: Final = Counter(
    "penchant_pairs_sent", "Pairs of items sent to the pairs topic", registry=REGISTRY
)
PAIRS_APPLIED: Final = Counter(
    "penchant_pairs_applied", "Pairs that changed an item's neighbours", registry=REGISTRY
)
PAIRS_REPLAYED: Final = Counter(
    "penchant_pairs_replayed",
    "Copies of pairs that counted before. Bursts follow restarts and rebalances",
    registry=REGISTRY,
)
PAIRS_UNREADABLE: Final = Counter(
    "penchant_pairs_unreadable",
    "Records of the pairs topic of no known version, left out. Any: upgrade this worker",
    registry=REGISTRY,
)
PROFILES_MIGRATED: Final = Counter(
    "penchant_profiles_migrated",
    "Profiles moved to another embedding space, on touch or by the sweeper",
    ["by"], registry=REGISTRY,
)  # fmt: skip
OUTLOOKS_COMPUTED: Final = Counter(
    "penchant_outlooks_computed", "Outlooks written beside their profile", registry=REGISTRY
)
OUTLOOKS_OVERTAKEN: Final = Counter(
    "penchant_outlooks_overtaken",
    "Outlooks dropped because the shopper acted again meanwhile, and waits for another",
    registry=REGISTRY,
)
OUTLOOKS_LEFT_OUT: Final = Counter(
    "penchant_outlooks_left_out",
    "Shoppers who found no room in the queue for an outlook and keep the one they have. A steady "
    "rate: raise STREAM_OUTLOOK_SHARE, or give workers a GPU",
    registry=REGISTRY,
)
OUTLOOKS_WAITING: Final = Gauge(
    "penchant_outlooks_waiting", "Shoppers waiting for an outlook", registry=REGISTRY
)
SWEEP_SEEN: Final = Gauge(
    "penchant_sweep_seen",
    "Profiles that the sweep into the live space has looked at, in all its passes; set by the "
    "worker whose turn it is. Standing still before the sweep is done: look for its warnings",
    registry=REGISTRY,
)
SWEEP_MOVED: Final = Gauge(
    "penchant_sweep_moved",
    "Of those, profiles that it moved; others moved when their shopper did something",
    registry=REGISTRY,
)
SWEEP_SKIPPED: Final = Counter(
    "penchant_sweep_skipped",
    "Profiles that the sweep could not read and left as they are, in all its passes; its warnings "
    "name them and say what to do",
    registry=REGISTRY,
)
RELEASES_SWAPPED: Final = Counter(
    "penchant_releases_swapped", "Releases that this worker flipped to", registry=REGISTRY
)
RELEASES_REFUSED: Final = Counter(
    "penchant_releases_refused",
    "Releases that could not be used; the live one serves on. Any: see the log",
    registry=REGISTRY,
)

# The trainer's.
EVENTS_ARCHIVED: Final = Counter(
    "penchant_events_archived",
    "Events written to the archive; after a crash some again. Standing still while events flow: "
    "look at the lag",
    registry=REGISTRY,
)
ARCHIVE_REJECTED: Final = Counter(
    "penchant_archive_rejected",
    "Records that are no events and so not archived. The updater, which sends them to the "
    "dead-letter topic, counts more of a producer whose clock is ahead: the archive keeps those",
    ["reason"], registry=REGISTRY,
)  # fmt: skip
ARCHIVE_SEGMENTS: Final = Gauge(
    "penchant_archive_segments",
    "Segments of the archive, as of the last tidying. Rising by far more than a day's worth: "
    "merging does not keep up",
    registry=REGISTRY,
)
ARCHIVE_BYTES: Final = Gauge(
    "penchant_archive_bytes",
    "Size of the archive, as of the last tidying. At ARCHIVE_MAX_GB the oldest events go",
    registry=REGISTRY,
)
ARCHIVE_DAMAGED: Final = Gauge(
    "penchant_archive_damaged",
    "Damaged segments that were set aside, as of the last tidying. Any: `penchant archive stats` "
    "names them; look at the disk, and restore them from a copy",
    registry=REGISTRY,
)
LEARN_TURNS: Final = Counter(
    "penchant_learn_turns",
    "Turns of fine-tuning: accepted (live now), rejected (by the gate), held (accepted, "
    "but releases are on hold), failed (see the log; a young archive has nothing to learn from)",
    ["outcome"], registry=REGISTRY,
)  # fmt: skip
LEARN_LAST_S: Final = Gauge(
    "penchant_learn_last_seconds", "How long the last turn took, from start to verdict",
    registry=REGISTRY,
)  # fmt: skip
LEARN_ENDED_S: Final = Gauge(
    "penchant_learn_last_end_timestamp_seconds",
    "Unix time at which the last turn ended. Older than two or three LEARN_EVERY_S: it hangs",
    registry=REGISTRY,
)
RELEASE: Final = Gauge(
    "penchant_release", "1 for the release that is live, as the trainer sees it", ["release"],
    registry=REGISTRY,
)  # fmt: skip

# Gauges.
LAG: Final = Gauge(
    "penchant_lag_records",
    "Records of the assigned partitions that are not saved yet, as of about a second ago. Rising: "
    "the worker does not keep up",
    registry=REGISTRY,
)
PARTITIONS: Final = Gauge("penchant_partitions_assigned", "Partitions", registry=REGISTRY)


@dataclass(frozen=True)
class IntakeGauges:
    """What one consumer shows."""

    partitions: Gauge
    lag: Gauge


INTAKE_GAUGES: Final = IntakeGauges(PARTITIONS, LAG)
PAIRS_GAUGES: Final = IntakeGauges(
    Gauge("penchant_pairs_partitions_assigned", "Partitions of the pairs topic", registry=REGISTRY),
    Gauge(
        "penchant_pairs_lag_records",
        "Records behind the end of the assigned partitions of the pairs topic. Rising: neighbours "
        "grow stale, add workers or turn LEARN_NEIGHBOURS off",
        registry=REGISTRY,
    ),
)
ITEM_HITS: Final = Counter(
    "penchant_item_cache_hits", "Item vectors found in memory", registry=REGISTRY
)
ITEM_MISSES: Final = Counter(
    "penchant_item_cache_misses", "Item vectors not found in memory", registry=REGISTRY
)

_SECONDS: Final = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 60, 600)
FRESHNESS_S: Final = Histogram(
    "penchant_freshness_seconds",
    "From the record's timestamp until its profile is readable, per micro-batch's oldest record",
    buckets=_SECONDS, registry=REGISTRY,
)  # fmt: skip
STAGE_S: Final = Histogram(
    "penchant_stage_seconds", "Time of one stage of a micro-batch", ["stage"],
    buckets=_SECONDS, registry=REGISTRY,
)  # fmt: skip
BATCH_RECORDS: Final = Histogram(
    "penchant_batch_records", "Records in a micro-batch",
    buckets=(1, 4, 16, 64, 256, 1024, 4096, 16384), registry=REGISTRY,
)  # fmt: skip

FLIP_S: Final = Histogram(
    "penchant_release_flip_seconds",
    "Time of a flip to another release, made ready beforehand",
    buckets=_SECONDS, registry=REGISTRY,
)  # fmt: skip

Probe = Callable[[], tuple[bool, str]]


# Probes and Prometheus are done in a moment; who is not must not keep a thread.
_PATIENCE_S: Final = 10.0
_MOST_CONNECTIONS: Final = 128


class _BoundedServer(ThreadingHTTPServer):
    """A thread per connection: of bounded life, and not too many."""

    def __init__(self, *args: Any) -> None:
        self._since_s: dict[socket.socket, float] = {}
        super().__init__(*args)

    def verify_request(self, request: Any, client_address: Any) -> bool:
        self._since_s[request] = time.monotonic()
        return len(self._since_s) <= _MOST_CONNECTIONS

    def close_request(self, request: Any) -> None:
        self._since_s.pop(request, None)
        super().close_request(request)

    def service_actions(self) -> None:
        """Twice a second: a time-out of the socket would begin anew with every byte."""
        oldest_s = time.monotonic() - _PATIENCE_S
        for request, since_s in list(self._since_s.items()):
            if since_s < oldest_s:
                with suppress(OSError):  # it is just being closed
                    request.shutdown(socket.SHUT_RDWR)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Clients that leave are worth no traceback; of our own mistakes the log has to tell."""
        if not isinstance(sys.exc_info()[1], OSError):
            log.exception("the answer to %s failed", client_address)


class MetricsServer:
    """/metrics, /healthz/live and /healthz/ready over HTTP, on a thread of its own."""

    def __init__(self, port: int, live: Probe, ready: Probe) -> None:
        """Bind the port; OSError if it is taken."""
        probes = {"/healthz/live": live, "/healthz/ready": ready}

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                if self.path == "/metrics":
                    self._answer(200, generate_latest(REGISTRY), CONTENT_TYPE_LATEST)
                elif self.path in probes:
                    good, why = probes[self.path]()
                    self._answer(200 if good else 503, f"{why}\n".encode(), "text/plain")
                else:
                    self._answer(404, b"/metrics /healthz/live /healthz/ready\n", "text/plain")

            def _answer(self, status: int, body: bytes, content_type: str) -> None:
                self.send_response(status)
                self.send_header("Content-Type", content_type)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, format: str, *args: object) -> None:
                """Probes come every few seconds: not worth a log line each."""

        self._server = _BoundedServer(("", port), Handler)
        self.port = int(self._server.server_address[1])
        threading.Thread(target=self._server.serve_forever, name="metrics", daemon=True).start()

    def stop(self) -> None:
        """Close the port."""
        self._server.shutdown()
        self._server.server_close()


def serve(port: int, live: Probe, ready: Probe) -> MetricsServer | None:
    """A server on STREAM_METRICS_PORT; None where that is 0. UserError if the port is taken."""
    if not port:
        return None
    try:
        return MetricsServer(port, live, ready)
    except OSError as error:
        raise UserError(
            f"port {port} is taken ({error.strerror}): set STREAM_METRICS_PORT to another"
        ) from error
