"""Feed a recorded (or simulated) set to the topics: the catalogue first, then events in event time.

Knows when an event is due and what was sent. Does not know where the events come from, how they
reach Kafka, or what time it is: data set, sink and clock are given.

`Pacer` is PURE: recorded times and the clock's reading in, moments to send at out.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Final, Protocol

from .errors import UserError
from .events import Event, Item
from .tables import Skip

DEFAULT_SPEED: Final = 3600.0
"""An hour a second: MovieLens' 214 days last 86 minutes."""

# An event this close to its moment goes out at once: sleeping for less costs more than it orders.
_TICK_S: Final = 0.002
# How much of a capped rate may be caught up after a pause; 50 ms at 1,000 events/s are 50 events.
_RATE_SLACK_S: Final = 0.05
# A wait is cut into naps, so that a stop is heeded and progress shown within them.
_NAP_S: Final = 0.25
_PROGRESS_S: Final = 0.5


class Sink(Protocol):
    """Where a replay goes; `stream.producer.EventProducer` is one."""

    def send(self, event: Event) -> None: ...
    def send_item(self, item: Item) -> None: ...
    def flush(self) -> None: ...


class EventSource(Protocol):
    """Events in the order in which they are to be sent; `stream.datasets.Records` is one."""

    @property
    def invalid(self) -> Mapping[str, Skip]: ...
    def __iter__(self) -> Iterator[Event]: ...


class Recording(Protocol):
    """What can be replayed; `stream.datasets.Dataset` is one."""

    @property
    def name(self) -> str: ...
    @property
    def items(self) -> Iterable[Item]: ...
    @property
    def events(self) -> EventSource: ...
    @property
    def last_ms(self) -> int: ...
    @property
    def skipped(self) -> dict[str, Skip]: ...


class Clock(Protocol):
    """The only way a replay learns the time, or lets it pass."""

    def monotonic_s(self) -> float: ...
    def now_ms(self) -> int: ...
    def sleep(self, seconds: float) -> None: ...


class SystemClock:
    """The machine's own clock."""

    def monotonic_s(self) -> float:
        return time.monotonic()

    def now_ms(self) -> int:
        return time.time_ns() // 1_000_000

    def sleep(self, seconds: float) -> None:
        time.sleep(seconds)


@dataclass(frozen=True)
class Plan:
    """Which events, and how fast. Raises UserError where the values contradict themselves."""

    speed: float | None = DEFAULT_SPEED
    """Event seconds per second; 0 or None: as fast as the sink takes them."""
    rate: float | None = None
    """Events per second at most; 0 or None: no cap."""
    limit: int | None = None
    """Events at most."""
    start_ms: int | None = None
    """Recorded times from here on (inclusive) ..."""
    end_ms: int | None = None
    """... up to here (exclusive)."""
    origin_ms: int | None = None
    """With a speed: the recorded time that stands for the start; None: the first event's."""
    shift_to_now: bool = False
    """Move all event times by one amount, so that the last lies at the start of the replay.

    The last and not the first: a replay faster than time would otherwise run ahead of the
    clock, and events from the future are rejected. Distances between events stay as they are.
    """

    def __post_init__(self) -> None:
        for name in ("speed", "rate", "limit"):
            value = getattr(self, name)
            if value is not None and not value >= 0:
                raise UserError(f"a {name} of {value} is not possible: give 0 or more")
        if self.start_ms is not None and self.end_ms is not None and self.start_ms >= self.end_ms:
            raise UserError("the replay would end before it starts: swap start and end")


@dataclass(frozen=True)
class Progress:
    """Where a replay is."""

    items: int
    events: int
    ts_ms: int | None
    """Recorded time of the latest event."""
    lag_s: float
    """How far the sending is behind its schedule; 0 without a speed."""
    wall_s: float
    """Since the first event was due."""


@dataclass(frozen=True)
class Summary:
    """What a replay did."""

    items: int
    events: Counter[str]
    """Sent, by type."""
    span_s: float
    """Recorded time from the first event sent to the last."""
    wall_s: float
    """What that took, with the last acknowledgement; the catalogue is not counted."""
    stopped: bool
    """Stopped before the end, by `stop` or Ctrl-C."""
    skipped: dict[str, Skip] = field(default_factory=dict)
    """Rows of the set that are not in the events, by reason."""

    @property
    def speed_up(self) -> float:
        """Event seconds per second, as achieved."""
        return self.span_s / self.wall_s if self.wall_s > 0 else 0.0


class Pacer:
    """PURE. When each event is due, in seconds of the caller's clock.

    With a speed, the first event (or one of `origin_ms`) is due at once, and the others keep their
    recorded distances, divided by the speed. Whoever is late sends what is overdue at once, which
    is as much as was missed. A rate is a cap on top: in any t seconds at most rate * (t + 0.05) + 1
    events are due, so a pause is not followed by a burst.
    """

    def __init__(
        self, speed: float | None, rate: float | None, origin_ms: int | None = None
    ) -> None:
        self._speed, self._gap_s = speed or None, 1 / rate if rate else 0.0
        self._origin_ms = origin_ms
        self._origin: tuple[int, float] | None = None  # first ts in ms, clock at that time
        self._slot_s = float("-inf")
        self.lag_s = 0.0
        """How far behind its schedule the latest event was when asked for."""

    def due_s(self, ts_ms: int, now_s: float) -> float:
        """The clock's reading at which the next event, of that recorded time, is to be sent."""
        if self._origin is None:
            self._origin = ts_ms if self._origin_ms is None else self._origin_ms, now_s
        due_s = now_s
        if self._speed:
            first_ms, origin_s = self._origin
            due_s = origin_s + (ts_ms - first_ms) / 1000 / self._speed
            self.lag_s = max(0.0, now_s - due_s)
        if self._gap_s:
            # Slots lie a gap apart; those of a pause are lost but for the slack.
            self._slot_s = max(self._slot_s + self._gap_s, max(due_s, now_s) - _RATE_SLACK_S)
            due_s = max(due_s, self._slot_s)
        return due_s


class Replay:
    """One replay of one data set into one sink. Not to be run twice."""

    def __init__(
        self,
        dataset: Recording,
        sink: Sink,
        plan: Plan,
        on_progress: Callable[[Progress], None] | None = None,
        clock: Clock | None = None,
    ) -> None:
        self._dataset, self._sink, self._plan = dataset, sink, plan
        self._on_progress = on_progress
        self._clock = clock or SystemClock()
        self._pacer = Pacer(plan.speed, plan.rate, plan.origin_ms)
        self._stopping = False
        self._items = 0
        self._events: Counter[str] = Counter()
        self._first_ms: int | None = None
        self._last_ms: int | None = None
        self._began_s: float | None = None
        self._reported_s = float("-inf")

    def stop(self) -> None:
        """Let `run` end after the event in hand; may be called from another thread."""
        self._stopping = True

    def run(self) -> Summary:
        """Send everything, flush, and say what was done. Ctrl-C ends it early, also with a flush.

        Raises what the sink raises, and UserError if the plan left nothing to send.
        """
        try:
            self._send_items()
            self._send_events()
        except KeyboardInterrupt:
            self._stopping = True
        self._sink.flush()
        self._report(always=True)
        if not self._events and not self._stopping and self._plan.limit != 0:
            raise UserError(self._why_nothing())
        return Summary(
            items=self._items,
            events=self._events,
            span_s=((self._last_ms or 0) - (self._first_ms or 0)) / 1000,
            wall_s=self._wall_s(),
            stopped=self._stopping,
            skipped=self._dataset.skipped,
        )

    def _send_items(self) -> None:
        for item in self._dataset.items:
            if self._stopping:
                return
            self._sink.send_item(item)
            self._items += 1
            self._report()
        # The catalogue is in its topic before the first event that needs it.
        self._sink.flush()

    def _send_events(self) -> None:
        shift_ms = self._shift_ms()
        for sent, event in enumerate(self._chosen()):
            if sent == self._plan.limit or not self._wait_for(event.ts):
                return
            moved = event.model_copy(update={"ts": event.ts + shift_ms}) if shift_ms else event
            self._sink.send(moved)
            self._events[event.type] += 1
            self._first_ms = event.ts if self._first_ms is None else self._first_ms
            self._last_ms = event.ts
            self._report()

    def _chosen(self) -> Iterator[Event]:
        """The events between the plan's start and end, in order."""
        start_ms, end_ms = self._plan.start_ms, self._plan.end_ms
        for event in self._dataset.events:
            if end_ms is not None and event.ts >= end_ms:
                return
            if start_ms is None or event.ts >= start_ms:
                yield event

    def _shift_ms(self) -> int:
        if not self._plan.shift_to_now:
            return 0
        last_ms, end_ms = self._dataset.last_ms, self._plan.end_ms
        return self._clock.now_ms() - (last_ms if end_ms is None else min(last_ms, end_ms - 1))

    def _wait_for(self, ts_ms: int) -> bool:
        """Let the time pass until an event of that recorded time is due; False: stop instead."""
        now_s = self._clock.monotonic_s()
        self._began_s = now_s if self._began_s is None else self._began_s
        due_s = self._pacer.due_s(ts_ms, now_s)
        while not self._stopping and due_s - now_s > _TICK_S:
            self._clock.sleep(min(due_s - now_s, _NAP_S))
            self._report()
            now_s = self._clock.monotonic_s()
        return not self._stopping

    def _wall_s(self) -> float:
        return 0.0 if self._began_s is None else self._clock.monotonic_s() - self._began_s

    def _report(self, always: bool = False) -> None:
        if self._on_progress is None:
            return
        now_s = self._clock.monotonic_s()
        if always or now_s - self._reported_s >= _PROGRESS_S:
            self._reported_s = now_s
            sent = self._events.total()
            lag_s, wall_s = self._pacer.lag_s, self._wall_s()
            self._on_progress(Progress(self._items, sent, self._last_ms, lag_s, wall_s))

    def _why_nothing(self) -> str:
        skipped = self._dataset.events.invalid
        if not skipped:
            return f"no event of {self._dataset.name} lies between start and end: widen them"
        reason, skip = max(skipped.items(), key=lambda pair: pair[1].rows)
        return f"no row of {self._dataset.name} is an event; most often {reason} ({skip.example})"
