"""All that is fed with what others made up. The cases of a full run are ten million in all, most
of them where one takes microseconds."""

from __future__ import annotations

from typing import Final

from tests.fuzz import folders, records, sockets, stored
from tests.fuzz.harness import Target

TARGETS: Final = (
    Target("events", 2_500_000, records.event_parser, block=256),
    Target("items", 1_500_000, records.item_parser, block=64),
    Target("profile", 800_000, stored.profile_codec, block=64),
    Target("fold", 60_000, stored.compiled_fold, block=16),
    Target("fence", 1_600_000, stored.fence_codec, block=256),
    Target("outlook", 1_500_000, stored.outlook_codec, block=256),
    Target("neighbours", 600_000, stored.neighbours_codec, block=256),
    Target("pairs", 1_500_000, stored.pairs_codec, block=256),
    Target("releases", 20_000, folders.release_loader, limit_s=10.0),
    Target("http", 40_000, sockets.metrics_server, block=16, limit_s=5.0),
)
