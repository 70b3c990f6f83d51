"""`penchant demo`: the whole system on this machine, and a screen to watch it on.

It replays the recorded behaviour of real people through a broker, a worker and a Redis of its
own, shows what becomes of their profiles, and leaves nothing running, however it ends. The
parts are in `demo_parts.py`, what is measured in `demo_watch.py`, its looks in `live_view.py`.
"""

from __future__ import annotations

import json
import shlex
import shutil
import sys
import time
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

from rich.console import Console
from rich.live import Live

from . import live_view
from .demo_learning import learning
from .demo_parts import Parts, Steps, start
from .demo_signals import Signals, Stopped
from .demo_watch import Gallery, Meter, Sample, Slot, next_slots
from .replay import Plan
from .settings import Settings

PLAIN_S: Final = 20.0
"""How long the demo lasts where nobody watches who could press Ctrl-C."""
LEARNING_S: Final = 600.0
"""The same, with the learning loop, where no swap comes: on two busy cores a turn takes minutes."""
AFTER_SWAP_S: Final = 10.0
"""How long it goes on after a swap: long enough to see profiles move to the new space."""

_TICK_S: Final = 0.5
_STATUS_EVERY_S: Final = 1.0
_SHOPPER_EVERY_S: Final = 3.0
_SETTLE_S: Final = 3.0
_SETTLE_POLL_S: Final = 0.1
_FILM: Final = "50"  # Star Wars (1977), the best-known of the set


def run_demo(
    settings: Settings,
    *,
    seconds: float | None,
    speed: float,
    console: Console,
    learn: bool = False,
) -> None:
    """Run the demo until Ctrl-C, the end of the data set, or `seconds` after the first event.
    `learn`: with the learning loop, and releases of the demo's own.

    speed: event seconds per second; 0 is as fast as it goes. Where `console` is no terminal it
    prints lines, and `seconds` is 20 if not given; with `learn` it ends soon after the first swap,
    or says after ten minutes why none came. Of the settings it takes the model's, the
    profiles' and the stream's, not the addresses: broker and Redis are its own.
    Ctrl-C, SIGTERM and SIGHUP end it in order, a second one at once.
    Raises UserError and what its parts raise; nothing it started is running then.
    """
    plan = Plan(speed=speed)  # refuses what is not possible before anything starts
    with_screen = console.is_terminal and not console.is_dumb_terminal
    until_swap = seconds is None and learn and not console.is_terminal
    if seconds is None and not console.is_terminal:
        seconds = LEARNING_S if learn else PLAIN_S
    with Signals(on_terminal=with_screen) as signals, ExitStack() as running:
        try:
            with Steps(console, with_bars=with_screen) as steps:
                parts, first = start(settings, plan, steps, signals, running, learn=learn)
        except Stopped:
            _say(console, "stopped before the first event")
            return
        _say(console, f"{parts.dataset.description}\n{parts.dataset.rule}")
        watch = _Watch(parts, first, plan.speed or 0.0, learns=learn, until_swap=until_swap)
        parts.feed.begin.set()
        try:
            show = _show_screen if with_screen else _show_lines
            show(watch, seconds, console, signals)
        except Stopped:
            pass  # the first Ctrl-C is the usual end
        with console.status("draining and stopping"):
            outcome = _settle(watch)
            running.close()
        _print_outcome(console, outcome)


# --- watching ------------------------------------------------------------------------------


class _Watch:
    """Puts together what is shown, tick by tick."""

    def __init__(
        self, parts: Parts, first: Sample, speed: float, *, learns: bool, until_swap: bool
    ) -> None:
        self.parts = parts
        self._learns = learns
        self._until_swap = until_swap
        self._swapped_s: float | None = None  # when the first swap was seen
        self.meter = Meter(first)
        self._began_s = time.monotonic()
        self._gallery = Gallery(parts.reader)
        self._slots: list[Slot] = []
        self._view = live_view.View(dataset=parts.dataset.description, speed=speed)

    def measure(self) -> None:
        """Take a sample of the worker's metrics, if it answers."""
        sample = self.parts.sample()
        if sample is not None:
            self.meter.add(sample)
        if self._swapped_s is None and self.meter.latest.swaps > self.meter.first.swaps:
            self._swapped_s = time.monotonic()

    def tick(self, places: int) -> live_view.View:
        """Look at everything once. Raises what went wrong in any part."""
        self.parts.check()
        self.measure()
        now_s = time.monotonic()
        activity, sent, at_ms = self.parts.crowd.look()
        self._slots = next_slots(self._slots, activity, now_s, places)
        shoppers = self._gallery.read([slot.user_id for slot in self._slots], now_s)
        self._view = replace(
            self._view,
            elapsed_s=now_s - self._began_s,
            at_ms=at_ms,
            share_sent=sent / len(self.parts.dataset.events),
            figures=self.meter.now(),
            shoppers=shoppers,
            commands=_commands(shoppers[0]) if shoppers else (),
            learning=self.learning(),
        )
        return self._view

    def learning(self) -> live_view.Learning | None:
        """The state of the learning loop; None where nothing is learned."""
        if not self._learns:
            return None
        return learning(self.parts.releases, self.meter.first, self.meter.latest)

    def over(self, seconds: float | None) -> bool:
        """The data set has ended, is counted and learned from, or the time is up; where the aim is
        a swap, it was seen for long enough, or the time is up."""
        now_s, swapped_s = time.monotonic(), self._swapped_s
        is_late = seconds is not None and now_s - self._began_s >= seconds
        if self._until_swap:
            return is_late or (swapped_s is not None and now_s - swapped_s >= AFTER_SWAP_S)
        if is_late or self.parts.feed.is_alive():
            return is_late
        return self.caught_up() and (swapped_s is not None or not self._learns)

    def caught_up(self) -> bool:
        """All that was sent has gone through the worker, as of the latest sample."""
        _, sent, _ = self.parts.crowd.look()
        return self.meter.latest.settled - self.meter.first.settled >= sent


def _show_screen(watch: _Watch, seconds: float | None, console: Console, signals: Signals) -> None:
    with Live(console=console, screen=True, auto_refresh=False) as live:
        while not watch.over(seconds):
            view = watch.tick(live_view.fitting(console.height)[0])
            live.update(live_view.render(view, console.width, console.height), refresh=True)
            signals.pause(_TICK_S)


def _show_lines(watch: _Watch, seconds: float | None, console: Console, signals: Signals) -> None:
    shopper_due_s, shown = 0.0, 0
    told = live_view.Learning()
    while not watch.over(seconds):
        signals.pause(_STATUS_EVERY_S)
        view = watch.tick(live_view.MOST_SHOPPERS)
        _say(console, live_view.plain_status(view))
        if view.learning is not None:
            for news in live_view.plain_learning(told, view.learning):
                _say(console, news)
            told = view.learning
        if view.shoppers and view.elapsed_s >= shopper_due_s:
            _say(console, live_view.plain_shopper(view.shoppers[shown % len(view.shoppers)]))
            shown += 1
            shopper_due_s = view.elapsed_s + _SHOPPER_EVERY_S


# --- the end -------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Outcome:
    """What is told when all has stopped."""

    figures: live_view.Figures
    sent: int
    wall_s: float
    profiles: int
    shopper: live_view.Shopper | None
    learning: live_view.Learning | None
    releases: Path
    trainer_log: Path


def _settle(watch: _Watch) -> _Outcome:
    """End the replay, let the worker finish what was sent, and take the last figures."""
    parts, meter = watch.parts, watch.meter
    parts.feed.end()
    deadline_s = time.monotonic() + _SETTLE_S
    while not watch.caught_up() and time.monotonic() < deadline_s:
        time.sleep(_SETTLE_POLL_S)
        watch.measure()
    shoppers = watch.tick(live_view.MOST_SHOPPERS).shoppers
    return _Outcome(
        figures=meter.whole(),
        sent=parts.crowd.look()[1],
        wall_s=meter.latest.at_s - meter.first.at_s,
        profiles=sum(1 for _ in parts.reader.user_ids()),
        shopper=max(shoppers, key=lambda shopper: shopper.events, default=None),
        learning=watch.learning(),
        releases=parts.releases,
        trainer_log=parts.trainer_log,
    )


def _print_outcome(console: Console, outcome: _Outcome) -> None:
    _say(
        console,
        live_view.summary(
            outcome.figures, sent=outcome.sent, wall_s=outcome.wall_s, profiles=outcome.profiles
        ),
    )
    of_its_own = ""
    if outcome.learning is not None:
        _say(console, live_view.learning_words(outcome.learning))
        if not outcome.learning.swaps:
            _say(console, f"{live_view.no_swap_words(outcome.learning)} ({outcome.trainer_log})")
        of_its_own = f"MODEL_RELEASES={shlex.quote(str(outcome.releases))} "
    _say(console, "Everything has stopped. To go on by hand, with the profiles as they are now:")
    steps = [(f"{_penchant()} up", "a broker and a Redis that stay")]
    if outcome.shopper is not None:
        show, produce = _commands(outcome.shopper)
        steps += [(show, "read one profile"), (produce, "produce one event")]
    steps += [
        (f"{of_its_own}{_penchant()} updater", "a worker, which counts it (Ctrl-C ends it)"),
        (f"{_penchant()} down", "stop broker and Redis"),
    ]
    if of_its_own:
        steps.append((f"{of_its_own}{_penchant()} releases list", "what was learned, and judged"))
    for command, meaning in steps:
        _say(console, f"  {command}  # {meaning}")


def _commands(shopper: live_view.Shopper) -> tuple[str, str]:
    """To read this shopper's profile, and to produce an event of theirs: one at the time of
    their latest, for profiles age in event time, and today lies decades after it."""
    event = {
        "type": "purchase",
        "user_id": shopper.user_id,
        "item_id": _FILM,
        "ts": shopper.updated_ms,
    }
    line = json.dumps(event, separators=(",", ":"))
    return (
        f"{_penchant()} profile show {shlex.quote(shopper.user_id)}",
        f"echo {shlex.quote(line)} | {_penchant()} produce",
    )


def _penchant() -> str:
    """How this installation's `penchant` is called from a shell in this folder."""
    script = Path(sys.executable).with_name("penchant")
    on_path = shutil.which("penchant")
    if on_path is not None and Path(on_path) == script:
        return "penchant"
    if not script.exists():
        return f"{shlex.quote(sys.executable)} -m stream.cli"
    here = Path.cwd()
    return shlex.quote(str(script.relative_to(here) if script.is_relative_to(here) else script))


def _say(console: Console, text: str) -> None:
    console.print(text, markup=False, highlight=False, soft_wrap=True)
