"""Where an event is folded, and whose offset its watermark counts. That forwarded events arrive
and count once is tested with a broker, in tests/integration."""

from __future__ import annotations

import struct

import numpy as np
import pytest

from stream import events as ev
from stream.errors import UserError
from stream.forwarding import Forwarder, origin_of
from stream.intake import Slice
from stream.processes import free_port
from stream.producer import partition_for
from stream.settings import KafkaSettings, Settings

ORIGIN = "penchant.origin"
Headers = list[tuple[str, bytes | None]] | None


def _slice(
    headers: list[Headers], topic: str = "penchant.events-by-user", partition: int = 0
) -> Slice:
    n = len(headers)
    return Slice(
        topic,
        partition,
        epoch=1,
        source=77,
        offsets=list(range(100, 100 + n)),
        keys=[None] * n,
        values=[b"{}"] * n,
        timestamps_ms=[1] * n,
        headers=headers,
    )


def _origin(source: int, offset: int) -> tuple[str, bytes]:
    return ORIGIN, struct.pack("<Qq", source, offset)


def _origins(piece: Slice, index: list[int], forwarded: bool) -> tuple[list[int], list[int]]:
    sources, offsets = origin_of(piece, np.array(index), forwarded)
    return sources.tolist(), offsets.tolist()


def test_a_forwarded_event_counts_by_the_partition_and_offset_it_came_from() -> None:
    piece = _slice([[_origin(2**64 - 1, 5)], None, [("trace", b"x"), _origin(9, 2**40)]])
    assert _origins(piece, [0, 2], forwarded=True) == ([2**64 - 1, 9], [5, 2**40])


def test_events_of_other_topics_count_by_their_own_offset_whatever_header_they_bear() -> None:
    piece = _slice([[_origin(9, 5)], None], topic="penchant.events")
    assert _origins(piece, [0, 1], forwarded=False) == ([77, 77], [100, 101])


@pytest.mark.parametrize("headers", [None, [], [(ORIGIN, None)], [(ORIGIN, b"short")]])
def test_an_event_that_somebody_else_put_into_the_forwarded_topic_counts_by_its_offset(
    headers: Headers,
) -> None:
    assert _origins(_slice([headers]), [0], forwarded=True) == ([77], [100])


def test_rejected_records_leave_no_hole_in_the_positions() -> None:
    piece = _slice([None, None, None], topic="penchant.events")
    assert _origins(piece, [0, 2], forwarded=False) == ([77, 77], [100, 102])


@pytest.fixture
def forwarder() -> Forwarder:
    """One whose broker is not there: it can send nothing."""
    kafka = KafkaSettings(bootstrap=f"127.0.0.1:{free_port()}")
    return Forwarder(Settings(kafka=kafka), partitions=4)


def _views(*users: str) -> list[ev.Event]:
    return [ev.View(user_id=user, ts=1_760_000_000_000, item_id="i") for user in users]


def _users_of(partition: int) -> list[str]:
    users = [f"u{i}" for i in range(40)]
    return [user for user in users if partition_for(user.encode(), 4) == partition]


def test_events_in_the_partition_of_their_user_stay(forwarder: Forwarder) -> None:
    users = _users_of(2)
    events = _views(*users)
    piece = _slice([None] * len(events), topic="penchant.events", partition=2)
    assert forwarder.keep_local(piece, events, range(len(events))) == (
        events,
        list(range(len(events))),
    )
    forwarder.flush()  # nothing is on its way


def test_events_of_the_forwarded_topic_are_not_sent_on_again(forwarder: Forwarder) -> None:
    events = _views(*_users_of(2))
    piece = _slice([None] * len(events), partition=3)
    kept, _ = forwarder.keep_local(piece, events, range(len(events)))
    assert kept == events
    forwarder.flush()


def test_strays_are_taken_out_and_the_others_keep_their_positions() -> None:
    kafka = KafkaSettings(bootstrap=f"127.0.0.1:{free_port()}")
    forwarder = Forwarder(Settings(kafka=kafka), partitions=4)
    home, stray = _users_of(1)[0], _users_of(3)[0]
    events = _views(home, stray, home)
    piece = _slice([None] * 5, topic="penchant.events", partition=1)
    kept, index = forwarder.keep_local(piece, events, [0, 2, 4])
    assert [event.user_id for event in kept] == [home, home]
    assert index == [0, 4]
    with pytest.raises(UserError, match="1 record"):
        forwarder._producer.flush(0.2)  # it waits for its broker, and will not be given up
