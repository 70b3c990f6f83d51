"""JSON lines -> events or items on their topic: `penchant produce`."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from typing import Final

from pydantic import TypeAdapter, ValidationError

from . import events as ev
from .producer import EventProducer
from .settings import Settings

_ITEM = TypeAdapter(ev.Item)
_TELLS_EVERY: Final = 1_000  # lines: some thirty times a second


def produce_lines(
    settings: Settings,
    lines: Iterable[bytes],
    *,
    items: bool,
    on_line: Callable[[int], None] = lambda number: None,
) -> tuple[int, list[tuple[int, str]]]:
    """Send every good line; how many were sent, and (line number, what is wrong) of the others.
    `on_line` is told now and then how far it is. Raises DeliveryFailed."""
    bad: list[tuple[int, str]] = []
    sent = 0
    with EventProducer(settings.kafka.client_config(), settings.namespace) as producer:
        for number, line in enumerate(lines, 1):
            if number % _TELLS_EVERY == 0:
                on_line(number)
            value = line.strip()
            if not value:
                continue
            if items:
                problem = _send_item(producer, value)
            else:
                problem = _send_event(producer, value, int(settings.stream.max_ahead_s * 1000))
            if problem:
                bad.append((number, problem))
            else:
                sent += 1
    return sent, bad


def _send_event(producer: EventProducer, value: bytes, max_ahead_ms: int) -> str:
    """Send one event; what is wrong with it, or ""."""
    parsed = ev.parse([value], [time.time_ns() // 1_000_000], max_ahead_ms)
    if parsed.rejects:
        return parsed.rejects[0].detail
    # As it was written: `parse` fills in a time, which is the record's to say.
    producer.send(ev.EVENT_ADAPTER.validate_json(value))
    return ""


def _send_item(producer: EventProducer, value: bytes) -> str:
    try:
        producer.send_item(_ITEM.validate_json(value))
    except ValidationError as error:
        first = error.errors()[0]
        return f"{'.'.join(str(part) for part in first['loc'])}: {first['msg']}"
    return ""
