"""`penchant produce`, `replay` and `simulate`: events into the topics, or a shop into a file."""

from __future__ import annotations

import os
import re
import sys
from contextlib import nullcontext
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from .errors import UserError
from .settings import Settings
from .terminal import console, errors, load_settings, open_to_read, plain, progress

if TYPE_CHECKING:
    from .replay import Plan
    from .simulation import Simulated


# How to read somebody's own file; wherever a data set is named.
Columns = Annotated[
    str, typer.Option(help="For csv and parquet: user_id=cust,item_id=sku,ts=when,title=name")
]
EventType = Annotated[
    str, typer.Option("--type", help="For csv and parquet: the type of every row.")
]
UtcOffset = Annotated[
    str, typer.Option(help="For csv and parquet: offset of times without one, as +02:00.")
]


def produce(
    file: Annotated[
        str, typer.Argument(help="JSON lines, one event each; - reads standard input.")
    ] = "-",
    items: Annotated[
        bool, typer.Option("--items", help="The lines are items, not events.")
    ] = False,
) -> None:
    """Produce events (or items) from JSON lines. Bad lines are named, and not sent."""
    from .producing import produce_lines
    from .topics import connect

    settings = load_settings()
    with nullcontext(sys.stdin.buffer) if file == "-" else open_to_read(Path(file)) as lines:
        connect(settings.kafka)  # the producer alone would be patient for half a minute
        if file == "-":  # a bar would be in the way of who types
            sent, bad = produce_lines(settings, lines, items=items)
        else:
            with progress("lines") as report:
                sent, bad = produce_lines(
                    settings, lines, items=items, on_line=lambda number: report(number, None)
                )
                report(sent + len(bad), sent + len(bad))
    for number, detail in bad:
        errors.print(f"line {number}: {plain(detail)}", highlight=False, soft_wrap=True)
    console.print(f"{sent:,} sent" + (f", {len(bad):,} refused" if bad else ""), highlight=False)
    if bad:
        raise typer.Exit(1)


def replay(
    dataset: Annotated[
        str, typer.Argument(help="movielens, online-retail, rees46, amazon, csv or parquet.")
    ],
    path: Annotated[
        list[Path] | None, typer.Option(help="File of the data set; movielens needs none.")
    ] = None,
    columns: Columns = "",
    event_type: EventType = "",
    utc_offset: UtcOffset = "",
    speed: Annotated[
        float, typer.Option(help="Times faster than it happened; 0: as fast as it goes.")
    ] = 3600.0,
    rate: Annotated[float, typer.Option(help="Events per second at most; 0: no limit.")] = 0.0,
    limit: Annotated[int | None, typer.Option(help="Stop after so many events.")] = None,
    start: Annotated[
        str, typer.Option(help="Events from here on: 1998-03-01 or 1998-03-01T12:00+02:00.")
    ] = "",
    end: Annotated[str, typer.Option(help="Events before this date or time.")] = "",
    shift_to_now: Annotated[
        bool, typer.Option("--shift-to-now", help="Move event times so that the last is now.")
    ] = False,
) -> None:
    """Replay recorded behaviour of real people: the items first, then events in event time."""
    from .datasets import load, parse_mapping
    from .producer import EventProducer
    from .replay import Plan, Replay
    from .replay import Progress as Sent
    from .topics import connect

    settings = load_settings()
    plan = Plan(
        speed=speed,
        rate=rate,
        limit=limit,
        start_ms=_time_ms(start, "--start"),
        end_ms=_time_ms(end, "--end"),
        shift_to_now=shift_to_now,
    )
    connect(settings.kafka)
    data = load(
        dataset,
        path,
        parse_mapping(columns) if columns else None,
        event_type=event_type or None,
        utc_offset=utc_offset or None,
    )
    console.print(f"{data.description}\nRule: {data.rule}", highlight=False)
    _note_profiles(settings, "events that are in them count again if the topic is new")
    with (
        EventProducer(settings.kafka.client_config(), settings.namespace) as sink,
        progress("sent") as report,
    ):

        def show(sent: Sent) -> None:
            report(sent.events, limit or len(data.events))

        summary = Replay(data, sink, plan, on_progress=show).run()
    by_type = ", ".join(f"{n:,} {name}" for name, n in summary.events.most_common())
    console.print(
        f"{summary.items:,} items, {by_type or 'no events'} in {summary.wall_s:.1f} s "
        f"({summary.speed_up:,.0f} times as fast as it happened)",
        highlight=False,
    )
    for reason, skip in summary.skipped.items():
        console.print(f"left out: {skip.rows:,} rows, {reason}", highlight=False)


def simulate(
    shoppers: Annotated[int, typer.Option(help="At a time; who leaves is followed.")] = 1_000,
    items: Annotated[int, typer.Option(help="Items of the catalogue.")] = 2_000,
    days: Annotated[float, typer.Option(help="Of event time; 0: without end.")] = 30.0,
    visits: Annotated[float, typer.Option(help="Of a shopper a day, on average.")] = 0.3,
    shown: Annotated[int, typer.Option(help="Items shown before each view: impressions.")] = 3,
    drift_days: Annotated[
        float, typer.Option(help="After so long an interest is mostly another.")
    ] = 45.0,
    churn: Annotated[float, typer.Option(help="Chance to leave for good after a visit.")] = 0.02,
    forgets: Annotated[float, typer.Option(help="Share of leavers who want to be erased.")] = 0.0,
    guests: Annotated[float, typer.Option(help="Visits of nobody known, per visit.")] = 0.1,
    bots: Annotated[float, typer.Option(help="Share of shoppers that are programs.")] = 0.0,
    duplicates: Annotated[float, typer.Option(help="Share of events that are sent twice.")] = 0.0,
    late: Annotated[float, typer.Option(help="Share of events that arrive late.")] = 0.0,
    seed: Annotated[int, typer.Option(help="The same seed, the same shop.")] = 0,
    start: Annotated[
        str,
        typer.Option(
            help="When it opens, as 2026-03-01. Without: 2026-01-01, and with --kafka the midnight "
            "that lets it end before now."
        ),
    ] = "",
    limit: Annotated[int | None, typer.Option(help="Stop after so many events.")] = None,
    out: Annotated[str, typer.Option(help="File for JSON lines; -: standard output.")] = "-",
    only: Annotated[
        Literal["both", "items", "events"],
        typer.Option(help="What lines to write; of both, items come first."),
    ] = "both",
    kafka: Annotated[bool, typer.Option("--kafka", help="Send to the topics instead.")] = False,
    speed: Annotated[
        float, typer.Option(help="With --kafka: times faster than time; 0: as fast as it goes.")
    ] = 0.0,
    rate: Annotated[
        float, typer.Option(help="With --kafka: events per second at most; 0: no limit.")
    ] = 0.0,
    live: Annotated[
        bool, typer.Option("--live", help="With --kafka: it opens now, and time is not sped up.")
    ] = False,
    truth: Annotated[
        Path | None,
        typer.Option(help="Parquet file for what events do not say: interests, churn, labels."),
    ] = None,
) -> None:
    """A simulated shop: shoppers with known interests that drift, and what they do.

    Writes JSON lines, or sends to Kafka with --kafka. Nothing measured on it is about people.
    """
    from .replay import Plan
    from .simulated_shop import Shop, Spec
    from .simulation import Simulated, TruthFile
    from .times import DAY_MS

    opens_ms = _time_ms(start, "--start") or Spec.start_ms
    now_ms = int(datetime.now(UTC).timestamp() * 1000)
    _check_simulation(days, kafka=kafka, live=live, start=start, paced=bool(speed or rate))
    if live:
        opens_ms, speed = now_ms, 1.0
    elif kafka and not start:
        opens_ms = (now_ms - int(days * DAY_MS)) // DAY_MS * DAY_MS
    try:
        spec = Spec(
            shoppers=shoppers, items=items, days=days, visits_per_day=visits,
            shown=shown, drift_days=drift_days, churn=churn, forgets=forgets,
            guests=guests, bots=bots, duplicates=duplicates, late=late, start_ms=opens_ms,
            seed=seed,
        )  # fmt: skip
    except ValueError as error:
        raise UserError(f"no such shop: {error}") from error
    plan = Plan(speed=speed, rate=rate, limit=limit, origin_ms=opens_ms if live else None)
    shop = Shop(spec)
    with TruthFile(truth, shop) if truth else nullcontext() as file:
        simulated = Simulated(shop, file.add if file else None)
        if kafka:
            _send_simulated(simulated, plan)
        else:
            _write_simulated(simulated, out, only, limit)


def _check_simulation(days: float, *, kafka: bool, live: bool, start: str, paced: bool) -> None:
    if (live or paced) and not kafka:
        raise UserError("--live, --speed and --rate pace what is sent: add --kafka")
    if live and start:
        raise UserError("a live shop opens now: leave --start or --live out")
    if kafka and not live and not start and not days:
        raise UserError("a shop without end has none before now: give --days, --start or --live")


def _send_simulated(simulated: Simulated, plan: Plan) -> None:
    from .producer import EventProducer
    from .replay import Progress as Sent
    from .replay import Replay
    from .topics import connect

    settings = load_settings()
    connect(settings.kafka)
    _note_profiles(settings, "simulated shoppers are put beside them")
    with (
        EventProducer(settings.kafka.client_config(), settings.namespace) as sink,
        progress("simulated") as report,
    ):

        def show(sent: Sent) -> None:
            report(sent.events, plan.limit)

        summary = Replay(simulated, sink, plan, on_progress=show).run()
    by_type = ", ".join(f"{n:,} {name}" for name, n in summary.events.most_common())
    console.print(
        f"simulated: {summary.items:,} items, {by_type or 'no events'} in {summary.wall_s:.1f} s "
        f"({summary.events.total() / max(summary.wall_s, 1e-9):,.0f} events/s)",
        highlight=False,
    )


def _write_simulated(
    simulated: Simulated, out: str, only: Literal["both", "items", "events"], limit: int | None
) -> None:
    from .simulation import write_lines

    try:
        with (
            nullcontext(sys.stdout) if out == "-" else _create(Path(out)) as file,
            progress("simulated") as report,
        ):
            items, events = write_lines(
                simulated, file, only=only, limit=limit, on_events=lambda n: report(n, limit)
            )
            file.flush()
    except BrokenPipeError:
        # `| head` has seen enough; Python would complain when it closes what is left.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return
    errors.print(f"simulated: {items:,} items, {events:,} events", highlight=False)


def _create(path: Path) -> Any:
    try:
        return path.open("w", encoding="utf-8")
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}") from error


def _time_ms(text: str, option: str) -> int | None:
    """An ISO date or time, in UTC unless it says otherwise; None for none."""
    from .tables import parse_time_ms

    if not text:
        return None
    try:
        if not re.match(r"\d{4}-", text):  # a bare number would be taken for seconds since 1970
            raise ValueError("is no date")
        return parse_time_ms(text, 0)
    except ValueError as error:
        raise UserError(
            f"cannot read {option} {text!r}: write 1998-03-01 or 1998-03-01T12:00+02:00"
        ) from error


def _note_profiles(settings: Settings, why: str) -> None:
    if _has_profiles(settings):
        console.print(
            f"Note: there are profiles in {settings.namespace} already, and {why}: "
            "`penchant up --fresh` or another NAMESPACE starts without them.",
            highlight=False,
        )


def _has_profiles(settings: Settings) -> bool:
    """Whether the namespace holds any; False where Redis does not answer."""
    from profiles import ProfileReader
    from profiles.errors import RedisUnavailable

    connection = replace(settings.redis.connection(), timeout_s=1.0)  # it is for a note, no more
    try:
        with ProfileReader(connection, settings.namespace) as reader:
            return next(reader.user_ids(), None) is not None
    except RedisUnavailable:
        return False
