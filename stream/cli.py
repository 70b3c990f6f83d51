"""`penchant …`: every process and tool starts here.

Only arguments, settings and words for a person; the work is in the modules. Heavy imports
(torch, faust) are made in the commands that need them, so that the others answer at once.
"""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from pydantic import BaseModel, ValidationError
from pydantic_settings import SettingsError
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Column, Table

from .errors import UserError
from .releases_cli import releases_app
from .settings import Settings

if TYPE_CHECKING:
    from profiles import Profile, ProfileReader

    from .local_stack import Stack
    from .replay import Plan
    from .simulation import Simulated

app = typer.Typer(
    help="Live profiles of shoppers: Kafka events through a text encoder into Redis. "
    "Settings come from the environment (KAFKA_BOOTSTRAP, REDIS_URL, …: docs/operations.md); "
    "without them the local stack of `penchant up` is used, if it runs.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
topics_app = typer.Typer(help="The Kafka topics of this namespace.", no_args_is_help=True)
release_app = typer.Typer(help="Releases of the encoder.", no_args_is_help=True)
profile_app = typer.Typer(help="Read profiles.", no_args_is_help=True)
dlq_app = typer.Typer(
    help="The dead-letter topic: records that were rejected.", no_args_is_help=True
)
archive_app = typer.Typer(help="The trainer's archive of events.", no_args_is_help=True)
schema_app = typer.Typer(help="Schemas of events and items.", no_args_is_help=True)
for name, group in (
    ("topics", topics_app),
    ("release", release_app),
    ("releases", releases_app),
    ("profile", profile_app),
    ("dlq", dlq_app),
    ("archive", archive_app),
    ("schema", schema_app),
):
    app.add_typer(group, name=name)

console = Console()
# A join takes the embedded broker half the session time-out.
_TANSU_SESSION_TIMEOUT_S = "6"
_errors = Console(stderr=True)


def main() -> None:
    """Run the command line; failures a person can mend are one line and exit code 1."""
    debug = "--debug" in sys.argv
    if debug:
        sys.argv.remove("--debug")
    logging.basicConfig(
        level=logging.DEBUG if debug else logging.WARNING,
        format="%(asctime)s %(levelname)s %(message)s",
    )
    try:
        app(prog_name="penchant")
    except KeyboardInterrupt:
        sys.exit(130)
    except Exception as error:
        if debug:
            raise
        sys.exit(_explain(error))


def _explain(error: Exception) -> int:
    from model.errors import ModelError
    from profiles.errors import ProfilesError

    known = isinstance(error, UserError | ModelError | ProfilesError | ValidationError)
    if isinstance(error, ValidationError):
        message = "; ".join(
            f"{'_'.join(str(part) for part in e['loc']).upper()}: {e['msg']}"
            for e in error.errors()
        )
        message = f"bad settings: {message}"
    elif known:
        message = str(error)
    else:
        message = _words_for(error)
        known = bool(message)
        message = message or f"{type(error).__name__}: {error}"
    _errors.print(f"[red]penchant:[/red] {_plain(message)}", highlight=False, soft_wrap=True)
    if not known:
        _errors.print("This is not an error we foresaw; run again with --debug for a traceback.")
    return 1


def _words_for(error: Exception) -> str:
    """What to do about a failure of a setting that comes without words of ours, or ""."""
    if isinstance(error, SettingsError):
        return f"bad settings: {'; '.join(_not_json()) or error}"
    if isinstance(error, OSError) and isinstance(error.filename, str):
        path = Path(error.filename).absolute()
        data_dir = Path(os.environ.get("STREAM_DATA_DIR", ".penchant")).absolute()
        if path.is_relative_to(data_dir) or data_dir.is_relative_to(path):
            return (
                f"cannot use {error.filename}: {error.strerror}; make {data_dir} a folder that can "
                "be written to, or name another in STREAM_DATA_DIR"
            )
    return ""


def _not_json() -> list[str]:
    """The variables that hold a list or a mapping, and are not JSON, in words."""
    problems = []
    for group, field in Settings.model_fields.items():
        if not isinstance(field.default, BaseModel):
            continue
        examples = {group.upper(): "{}"} | {
            f"{group}_{name}".upper(): "[1800, 86400]"
            if isinstance(value, tuple)
            else '{"view": 1}'
            for name, value in field.default
            if isinstance(value, tuple | dict)
        }
        for variable, example in examples.items():
            try:
                json.loads(os.environ.get(variable, "null"))
            except ValueError:
                problems.append(f"{variable} is not JSON: write it as {example}")
    return problems


def _plain(text: str) -> str:
    """Text as it is, brackets and all, in rich markup and on one line; control characters in
    words."""
    from rich.markup import escape

    from .profile_view import printable

    return escape(printable(" ".join(text.splitlines()).strip()))


def load_settings() -> Settings:
    """Settings of the environment; what it leaves open comes from a running local stack."""
    from .local_stack import status as recorded

    stack = recorded(Settings())
    is_ours = "KAFKA_BOOTSTRAP" not in os.environ
    for variable, record in (("KAFKA_BOOTSTRAP", stack.kafka), ("REDIS_URL", stack.redis)):
        if record is not None and (record.running or record.kind == "external"):
            os.environ.setdefault(variable, record.address)
    if is_ours and stack.kafka is not None and stack.kafka.kind == "tansu":
        os.environ.setdefault("KAFKA_SESSION_TIMEOUT_S", _TANSU_SESSION_TIMEOUT_S)
    return Settings()


@app.callback()
def _options(
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks and debug logs.")] = False,
) -> None:
    """The option is read in `main`, before any command runs; it stands here for --help."""


# --- the local stack -----------------------------------------------------------------------


@app.command()
def up(
    kafka: Annotated[
        str, typer.Option(help="tansu (embedded), apache (needs Java 17), or host:port of yours.")
    ] = "tansu",
    redis: Annotated[str, typer.Option(help="bundled, or the URL of yours.")] = "bundled",
    fresh: Annotated[
        bool, typer.Option("--fresh", help="Set aside the profiles of earlier runs.")
    ] = False,
) -> None:
    """Start a broker and a Redis on this machine, and create the topics. `down` stops them."""
    from .local_stack import up as start
    from .topics import create_topics

    with console.status("starting broker and Redis"):
        stack = start(Settings(), kafka=kafka, redis=redis, fresh=fresh)
    create_topics(load_settings())
    _show_stack(stack)
    console.print(
        "Commands run here find them by themselves. Next: penchant release build, "
        "penchant updater, penchant replay movielens; penchant down stops."
    )


@app.command()
def down() -> None:
    """Stop what `up` started. Data of the embedded broker is gone with it."""
    from .local_stack import down as stop

    stopped = stop(Settings())
    for record in stopped:
        console.print(f"stopped {record.kind} at {record.address}", highlight=False)
    if not stopped:
        console.print("nothing was running")


@app.command()
def status() -> None:
    """What of the local stack runs, and where."""
    from .local_stack import status as look

    _show_stack(look(Settings()))


def _show_stack(stack: Stack) -> None:
    records = stack.records()
    for role, record in records.items():
        state = "running" if record.running else "not running"
        state = "not ours" if record.kind == "external" else state
        console.print(f"{role}  {record.kind}  {record.address}  {state}", highlight=False)
    if not records:
        console.print("no local stack: start one with `penchant up`")


@topics_app.command("create")
def topics_create() -> None:
    """Create the topics that are missing; say where existing ones differ from the settings."""
    from .topics import create_topics

    table = Table(
        Column("topic", no_wrap=True),
        *("partitions", "replication", "cleanup", "retention", "state"),
    )
    for report in create_topics(load_settings()):
        retention = report.config.get("retention.ms", "")
        days = f"{int(retention) / 86_400_000:g} d" if retention.lstrip("-").isdigit() else ""
        state = "created" if report.created else "; ".join(report.differences) or "there, as set"
        table.add_row(
            report.name,
            str(report.partitions),
            str(report.replication),
            report.config.get("cleanup.policy", ""),
            days if report.config.get("cleanup.policy") == "delete" else "kept",
            state,
        )
    console.print(table)


# --- releases and the worker ---------------------------------------------------------------


@release_app.command("build")
def release_build(
    dataset: Annotated[
        str, typer.Option(help="Fit the projection on this data set's items (see `replay`).")
    ] = "",
    path: Annotated[
        list[Path] | None, typer.Option(help="File of the data set, or a text per line.")
    ] = None,
) -> None:
    """Build the base release from MODEL_BASE, if MODEL_RELEASES has no live one."""
    from .datasets import NAMES

    model = load_settings().model
    if dataset not in ("", *NAMES):
        raise UserError(f"no data set {dataset!r}: choose one of {', '.join(NAMES)}")

    from model.errors import ReleaseMissing
    from model.releases import load_current

    from .base_release import build_live, require_as_set

    try:
        release = load_current(model.releases)
        require_as_set(release, model)
        console.print(f"{release.id} is live already", highlight=False)
    except ReleaseMissing:
        texts = catalogue_texts(dataset, path or [])
        with _progress("encoding the catalogue") as report:
            release = build_live(model, texts, report)
        console.print(f"{release.id} is live now", highlight=False)
    console.print(f"{release.path}  {release.dimensions} dimensions, space {release.space}")


def catalogue_texts(dataset: str, paths: list[Path]) -> list[str]:
    """The texts to fit the base release's projection on."""
    from .base_release import texts_of
    from .datasets import load

    if not dataset:
        return [line for p in paths for line in _read_text(p).splitlines() if line.strip()]
    return texts_of(load(dataset, paths or None).items)


@app.command()
def updater() -> None:
    """Run a worker: events and items in, profiles out. SIGTERM or Ctrl-C drains and leaves."""
    logging.getLogger().setLevel(logging.INFO)
    settings = load_settings()
    settings.redis.connection()

    from model.errors import ReleaseMissing

    from .updater_app import Worker

    try:
        worker = Worker(settings)
    except ReleaseMissing as error:
        what = str(error).partition(";")[0]
        raise UserError(
            f"{what}; type `penchant release build`, or set MODEL_RELEASES to the folder that has "
            "a live release"
        ) from error
    worker.run()


@app.command()
def trainer() -> None:
    """Run the side worker: events into the archive, and with LEARN_EVERY_S a fine-tune every so
    often. SIGTERM or Ctrl-C writes what waits first."""
    logging.getLogger().setLevel(logging.INFO)
    from .trainer_app import Trainer, schedule

    settings = load_settings()
    Trainer(settings, schedule(settings)).run()


@app.command()
def learn() -> None:
    """Fine-tune once on the archive; what the gate accepts goes live, and workers swap to it."""
    from profiles.items import ItemStore
    from profiles.schema import Keys

    from .learning import learn as turn

    settings = load_settings()
    items = ItemStore(settings.redis.connection().open(), Keys(settings.namespace))
    with _progress("learning") as report:
        outcome = turn(settings, items, datetime.now(UTC), lambda _, done, of: report(done, of))
    newest = outcome.decision.figures["comparison"]["newest"]
    console.print(
        f"{outcome.windows:,} windows; {newest['name']} on the newest {newest['count']:,} targets: "
        f"{newest['current']:.4f} -> {newest['candidate']:.4f} "
        f"({newest['low']:+.4f} to {newest['high']:+.4f})",
        highlight=False,
    )
    if outcome.release is None:
        for reason in outcome.decision.reasons:
            console.print(f"rejected: {_plain(reason)}", highlight=False)
        console.print(f"{outcome.parent.id} stays live", highlight=False)
    else:
        console.print(f"accepted: {outcome.release.id} is live now", highlight=False)


@archive_app.command("stats")
def archive_stats(
    as_json: Annotated[bool, typer.Option("--json", help="For programs.")] = False,
) -> None:
    """What the archive holds: events, their time, segments, bytes."""
    from .archive import Archive, open_store

    url = Settings().archive.url
    stats = Archive(open_store(url)).stats()
    if as_json:
        print(json.dumps({"url": url, **asdict(stats)}))
        return
    if stats.first_ms is None or stats.end_ms is None:
        console.print(f"{url} holds no events", highlight=False, soft_wrap=True)
        return
    first, end = (
        f"{datetime.fromtimestamp(ms / 1000, UTC):%Y-%m-%d %H:%M}"
        for ms in (stats.first_ms, stats.end_ms)
    )
    console.print(
        f"{url}\n{stats.rows:,} events, {first} to {end} UTC ({stats.days:,} days with events)\n"
        f"{stats.segments:,} segments ({stats.small_segments:,} small) of {stats.sources:,} "
        f"partitions, {stats.size_bytes / 1e6:,.1f} MB\n"
        f"{stats.receipts:,} receipts of erased shoppers",
        highlight=False,
        soft_wrap=True,
    )


# --- events in -----------------------------------------------------------------------------


@app.command()
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
    with nullcontext(sys.stdin.buffer) if file == "-" else _open(Path(file)) as lines:
        connect(settings.kafka)  # the producer alone would be patient for half a minute
        sent, bad = produce_lines(settings, lines, items=items)
    for number, detail in bad:
        _errors.print(f"line {number}: {_plain(detail)}", highlight=False, soft_wrap=True)
    console.print(f"{sent:,} sent" + (f", {len(bad):,} refused" if bad else ""), highlight=False)
    if bad:
        raise typer.Exit(1)


@app.command()
def replay(
    dataset: Annotated[
        str, typer.Argument(help="movielens, online-retail, rees46, amazon, csv or parquet.")
    ],
    path: Annotated[
        list[Path] | None, typer.Option(help="File of the data set; movielens needs none.")
    ] = None,
    columns: Annotated[
        str, typer.Option(help="For csv and parquet: user_id=cust,item_id=sku,ts=when,title=name")
    ] = "",
    event_type: Annotated[
        str, typer.Option("--type", help="For csv and parquet: the type of every row.")
    ] = "",
    utc_offset: Annotated[
        str, typer.Option(help="For csv and parquet: offset of times without one, as +02:00.")
    ] = "",
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
        _progress("sent") as report,
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


@app.command()
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
    from .simulated_shop import DAY_MS, Shop, Spec
    from .simulation import Simulated, TruthFile

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
    shop = Shop(spec)
    with TruthFile(truth, shop) if truth else nullcontext() as file:
        simulated = Simulated(shop, file.add if file else None)
        if kafka:
            plan = Plan(speed=speed, rate=rate, limit=limit, origin_ms=opens_ms if live else None)
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
        _progress("simulated") as report,
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
            _progress("simulated") as report,
        ):
            items, events = write_lines(
                simulated, file, only=only, limit=limit, on_events=lambda n: report(n, limit)
            )
            file.flush()
    except BrokenPipeError:
        # `| head` has seen enough; Python would complain when it closes what is left.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return
    _errors.print(f"simulated: {items:,} items, {events:,} events", highlight=False)


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


# --- profiles out --------------------------------------------------------------------------


@profile_app.command("show")
def profile_show(
    user: Annotated[str, typer.Argument(help="The user id, as the shop's events carry it.")],
    as_json: Annotated[bool, typer.Option("--json", help="For programs.")] = False,
    vectors: Annotated[bool, typer.Option(help="With --json: the interest vectors too.")] = False,
) -> None:
    """One shopper: what they did, what they like, what lies nearest to that."""
    from .profile_view import profile_json, render_profile

    with _reader() as reader:
        profile = reader.get(user)
        if as_json:
            print(json.dumps(profile_json(reader, profile, vectors), ensure_ascii=False))
        else:
            console.print(render_profile(reader, profile))


@profile_app.command("similar")
def profile_similar(
    user: Annotated[str, typer.Argument(help="The user id.")],
    k: Annotated[int, typer.Option(min=1, help="How many.")] = 10,
) -> None:
    """Shoppers whose long-term interest lies nearest. Reads every profile: a tool, not an API."""
    with _reader() as reader, console.status("reading all profiles"):
        similar = reader.similar_users(user, k)
        rows = [(other, cosine, _tastes(reader, reader.get(other))) for other, cosine in similar]
    table = Table("user", "cosine", "categories")
    for other, cosine, tastes in rows:
        table.add_row(other, f"{cosine:.3f}", tastes)
    console.print(table)


@profile_app.command("recommend")
def profile_recommend(
    user: Annotated[str, typer.Argument(help="The user id.")],
    k: Annotated[int, typer.Option(min=1, help="How many.")] = 10,
    new: Annotated[bool, typer.Option("--new", help="Leave out what they had.")] = False,
) -> None:
    """What to show next, and by which signals: neighbours of the latest items, own items, text."""
    from .profile_view import printable

    with _reader() as reader:
        found = reader.recommend(user, k, exclude_seen=new)
    table = Table("item", "title", "score", "neighbours", "own", "text")
    for item in found:
        of = item.signals
        table.add_row(
            printable(item.item_id),
            printable(item.title),
            f"{item.score:.3f}",
            *(f"{of[name]:.3f}" for name in ("covisitation", "own", "text")),
        )
    console.print(table if found else "nothing to recommend: no item that this user liked is known")


def _tastes(reader: ProfileReader, profile: Profile) -> str:
    return ", ".join(name for name, mass in reader.top_categories(profile, 3) if mass > 0)


@contextmanager
def _reader() -> Iterator[ProfileReader]:
    from profiles import ProfileReader

    settings = load_settings()
    with ProfileReader(settings.redis.connection(), settings.namespace) as reader:
        yield reader


# --- dead letters and schemas --------------------------------------------------------------


@dlq_app.command("show")
def dlq_show(
    limit: Annotated[int, typer.Option(min=1, help="The newest so many.")] = 20,
) -> None:
    """The newest rejected records: why, where they came from, and what they held."""
    from .dead_letter import read

    letters = read(load_settings(), limit)
    if not letters:
        console.print("no rejects")
        return
    for letter in letters:
        when = datetime.fromtimestamp(letter.rejected_ms / 1000, UTC).isoformat("T", "seconds")
        console.print(
            f"{when}  {letter.topic}[{letter.partition}] @ {letter.offset}  "
            f"[bold]{_plain(letter.reason)}[/bold]: {_plain(letter.detail)}",
            highlight=False,
        )
        value = (letter.value or b"").decode(errors="replace")
        console.print(f"    {_plain(value[:200])}", highlight=False, style="dim")


@schema_app.command("export")
def schema_export(
    folder: Annotated[Path, typer.Argument(help="Where to write the files.")] = Path(
        "docs/schemas"
    ),
) -> None:
    """Write the JSON Schemas of events and items, and the AsyncAPI document."""
    from .schemas import write

    for file in write(folder):
        console.print(str(file), highlight=False)


@app.command()
def demo(
    seconds: Annotated[
        float | None,
        typer.Option(envvar="DEMO_SECONDS", help="Stop after so long; without: at Ctrl-C."),
    ] = None,
    speed: Annotated[
        float, typer.Option(help="Times faster than it happened.", envvar="DEMO_SPEED")
    ] = 86_400.0,
    learn: Annotated[
        bool, typer.Option("--learn", help="Fine-tune on what streams by, and swap.")
    ] = False,
) -> None:
    """Watch profiles of real people change: a recorded data set through the whole system."""
    from .demo import run_demo

    run_demo(Settings(), seconds=seconds, speed=speed, console=console, learn=learn)


# --- evaluation ----------------------------------------------------------------------------


@app.command("eval")
def evaluate(
    dataset: Annotated[str, typer.Argument(help="movielens, online-retail, rees46 or amazon.")],
    path: Annotated[
        list[Path] | None, typer.Option(help="File of the data set; movielens needs none.")
    ] = None,
    text: Annotated[bool, typer.Option(help="With the baselines that need the encoder.")] = True,
    learn: Annotated[
        bool, typer.Option("--learn", help="With the whole profile, retrained every four weeks.")
    ] = False,
    plot: Annotated[
        Path | None, typer.Option(help="Draw Recall@20 over event time into this PNG.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="For programs.")] = False,
) -> None:
    """How well shoppers' next items are foreseen on a recorded set, with intervals."""
    from . import evaluation
    from .datasets import load
    from .evaluation_data import encoded, recorded
    from .evaluation_view import as_json as for_programs
    from .evaluation_view import plain, render

    settings = Settings()
    has_order_only = dataset == "amazon"  # its times are made up
    if has_order_only and (learn or plot):
        raise UserError(
            "--learn and --plot need a set with real times, and amazon has only an order"
        )
    if learn and not text:
        raise UserError("--learn needs the encoder: leave --no-text out")
    name = path[0].stem.removesuffix("_events") if path and has_order_only else dataset
    data = recorded(load(dataset, path), name)
    makers = (evaluation.counters_of_order if has_order_only else evaluation.counters)(data)
    if text:
        with _progress("encoding the catalogue") as report:
            texts = encoded(data.texts, settings.model, settings.stream.data_dir, report)
        vectors = texts.vectors
        if has_order_only:
            makers |= evaluation.steps_of_text(data, vectors)
            with _progress("choosing weights") as report:
                makers |= dict([evaluation.with_text(data, vectors, report)])
        else:
            makers |= evaluation.untrained_text(data, vectors)
    folder = settings.stream.data_dir / "evaluation" / "learned"
    shutil.rmtree(folder, ignore_errors=True)
    whole = evaluation.whole_profile(data, texts, folder) if learn else None
    if whole is not None:
        makers["whole profile, learning"] = lambda: whole
    with _progress("ranking") as report:
        run = evaluation.by_last_item if has_order_only else evaluation.in_event_time
        found = run(data, makers, progress=report)
    if whole is not None:
        found = evaluation.with_learning(data, found, whole)
    if plot is not None:
        from .evaluation_plot import draw

        draw(found, plot)
    if as_json:
        print(json.dumps(for_programs(found), ensure_ascii=False))
    elif console.is_terminal:
        console.print(render(found))
    else:
        print(plain(found))


# --- small helpers -------------------------------------------------------------------------


@contextmanager
def _progress(what: str) -> Iterator[Callable[[int, int | None], None]]:
    """A progress bar on a terminal, silence elsewhere; yields report(done, total or None)."""
    with Progress(
        TextColumn(what), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(),
        console=_errors, disable=not _errors.is_terminal,
    ) as bar:  # fmt: skip
        task = bar.add_task(what, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


def _open(path: Path) -> Any:
    try:
        return path.open("rb")
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from error


def _read_text(path: Path) -> str:
    with _open(path) as file:
        return str(file.read(), "utf-8", "replace")


if __name__ == "__main__":
    main()
