"""The two streams of events that pipelines are measured on, both out of MovieLens-100K.

    bursty   its events in recorded order: real shoppers, several events of each in a slice
    spread   the same events, each given to another shopper in turn, so that hardly two events
             of a slice belong to one shopper: the hardest case for a pipeline that folds per user

Every stream ends with one event per partition of a shopper who has no other (`ends`): events of
a partition are saved in order, shoppers by lanes that are a micro-batch apart at most, so a stream
is through when the last of these can be read, or a hundredth of it later.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import count, islice
from typing import Final

from model.text import item_text
from stream.datasets import Dataset
from stream.events import EVENT_ADAPTER, Event, Item
from stream.producer import partition_for

# More shoppers than a micro-batch has records, times the partitions: a slice that came from one
# partition alone still holds hardly anybody twice.
SPREAD_SHOPPERS: Final = 60_000

Record = tuple[bytes, bytes]  # key, value


@dataclass(frozen=True)
class Workload:
    """`n` events, ready to be produced."""

    name: str
    records: list[Record]
    starts: list[str]
    """The shoppers of each partition's first event."""
    ends: list[str]
    """The shoppers of each partition's last event."""


def make(name: str, data: Dataset, events: int, partitions: int) -> Workload:
    """`events` events of the workload of this name, and the ends."""
    records = list(islice(stream(name, data), events))
    starts: dict[int, str] = {}
    for key, _ in records[: 100 * partitions]:
        starts.setdefault(partition_for(key, partitions), key.decode())
    ends = add_ends(records, "end", partitions)
    return Workload(name, records, list(starts.values()), ends)


def add_ends(records: list[Record], name: str, partitions: int) -> list[str]:
    """Let each partition end with an event of a shopper of its own; these."""
    ends = one_per_partition(name, partitions)
    last = EVENT_ADAPTER.validate_json(records[-1][1])
    for user in ends:
        event = last.model_copy(update={"user_id": user, "event_id": user})
        records.append((user.encode(), event.to_json()))
    return ends


def texts(data: Dataset) -> dict[str, str]:
    """Item id -> what the encoder reads."""
    return {item.item_id: _text(item) for item in data.items}


def one_per_partition(name: str, partitions: int) -> list[str]:
    """A made-up shopper for each partition."""
    found: dict[int, str] = {}
    for i in count():
        user = f"{name}-{i}"
        found.setdefault(partition_for(user.encode(), partitions), user)
        if len(found) == partitions:
            return list(found.values())
    raise AssertionError("unreachable")


def _text(item: Item) -> str:
    return item_text(item.title, item.category, item.brand or "", item.description or "")


def stream(name: str, data: Dataset, first: int = 0) -> Iterator[Record]:
    """Records without end, from a position on: the recording over and over, each round after
    the one before."""
    recorded = [(event, _form(event)) for event in data.events]
    span_ms = data.last_ms - data.first_ms + 1
    for i in count(first):
        round_, at = divmod(i, len(recorded))
        event, form = recorded[at]
        user = b"shopper-%d" % (i % SPREAD_SHOPPERS) if name == "spread" else event.user_id.encode()
        event_id = f"{event.event_id}-{round_}".encode()
        ts = event.ts + round_ * span_ms
        yield user, form % {b"user": user, b"id": event_id, b"ts": ts}


def _form(event: Event) -> bytes:
    """An event's JSON with gaps for what differs from round to round. To make each anew would be
    slower than what it is to load."""
    blank = event.model_copy(update={"user_id": "@user", "event_id": "@id", "ts": 1})
    form = blank.to_json().replace(b"%", b"%%")
    for given, gap in (
        (b'"@user"', b'"%(user)b"'), (b'"@id"', b'"%(id)b"'), (b'"ts":1', b'"ts":%(ts)d')
    ):  # fmt: skip
        assert form.count(given) == 1, f"{event.event_id} has no place for {gap!r}"
        form = form.replace(given, gap)
    return form
