"""`penchant …`: every process and tool starts here, large commands in modules of their own
(`…_cli.py`).

Only arguments, settings and words for a person; the work is in the modules. Heavy imports
(torch, faust) are made in the commands that need them, so that the others answer at once.
"""

from __future__ import annotations

import json
import logging
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from pydantic import BaseModel, ValidationError
from pydantic_settings import SettingsError
from rich.table import Column, Table

from .errors import UserError
from .eval_cli import evaluate
from .feeding_cli import produce, replay, simulate
from .rebuild_cli import diff, generations_app, rebuild, snapshot_app
from .releases_cli import releases_app
from .settings import Settings
from .terminal import console, errors, load_settings, plain, progress

if TYPE_CHECKING:
    from profiles import Profile, ProfileReader

    from .local_stack import Stack

app = typer.Typer(
    help="Live profiles of shoppers: Kafka events through a text encoder into Redis. "
    "Settings come from the environment (KAFKA_BOOTSTRAP, REDIS_URL, …: docs/operations.md); "
    "without them the local stack of `penchant up` is used, if it runs.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
topics_app = typer.Typer(help="The Kafka topics of this namespace.", no_args_is_help=True)
profile_app = typer.Typer(help="Read profiles.", no_args_is_help=True)
dlq_app = typer.Typer(
    help="The dead-letter topic: records that were rejected.", no_args_is_help=True
)
archive_app = typer.Typer(help="The trainer's archive of events.", no_args_is_help=True)
schema_app = typer.Typer(help="Schemas of events and items.", no_args_is_help=True)
for name, group in (
    ("topics", topics_app),
    ("releases", releases_app),
    ("profile", profile_app),
    ("generations", generations_app),
    ("snapshot", snapshot_app),
    ("dlq", dlq_app),
    ("archive", archive_app),
    ("schema", schema_app),
):
    app.add_typer(group, name=name)
for command in (produce, replay, simulate, rebuild, diff):
    app.command()(command)
app.command("eval")(evaluate)

_DLQ_LOOKED_AT = 1_000  # of these records copies are found


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
    errors.print(f"[red]penchant:[/red] {plain(message)}", highlight=False, soft_wrap=True)
    if not known:
        errors.print("This is not an error we foresaw; run again with --debug for a traceback.")
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
        "Commands run here find them by themselves. Next: penchant releases build, "
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


# --- worker and trainer ---------------------------------------------------------------------


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
            f"{what}; type `penchant releases build`, or set MODEL_RELEASES to the folder that has "
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
    with progress("learning") as report:
        outcome = turn(settings, items, datetime.now(UTC), lambda _, done, of: report(done, of))
    if outcome is None:
        return
    newest = outcome.decision.figures["comparison"]["newest"]
    console.print(
        f"{outcome.windows:,} windows; {newest['name']} on the newest {newest['count']:,} targets: "
        f"{newest['current']:.4f} -> {newest['candidate']:.4f} "
        f"({newest['low']:+.4f} to {newest['high']:+.4f})",
        highlight=False,
    )
    if outcome.release is not None:
        console.print(f"accepted: {outcome.release.id} is live now", highlight=False)
        return
    if outcome.hold is not None:
        console.print(
            f"held: the gate accepts it, but releases are on hold since {outcome.hold.at} "
            f"({outcome.hold.why}); `penchant releases resume` ends that",
            highlight=False,
        )
    for reason in outcome.decision.reasons:
        console.print(f"rejected: {plain(reason)}", highlight=False)
    console.print(
        f"{outcome.parent.id} stays live; all figures: penchant releases show {outcome.verdict}",
        highlight=False,
    )


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
    for name in stats.damaged:
        console.print(f"damaged: {plain(name)}", highlight=False, soft_wrap=True)
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
    """The newest rejected records: why, where they came from, and what they held. One that was
    rejected again and again stands there once."""
    from .dead_letter import distinct, read

    letters = distinct(read(load_settings(), max(limit, _DLQ_LOOKED_AT)))
    if not letters:
        console.print("no rejects")
        return
    for letter, copies in letters[:limit]:
        when = datetime.fromtimestamp(letter.rejected_ms / 1000, UTC).isoformat("T", "seconds")
        console.print(
            f"{when}  {letter.topic}[{letter.partition}] @ {letter.offset}  "
            f"[bold]{plain(letter.reason)}[/bold]: {plain(letter.detail)}"
            + (f"  ({copies:,} copies)" if copies > 1 else ""),
            highlight=False,
        )
        value = (letter.value or b"").decode(errors="replace")
        console.print(f"    {plain(value[:200])}", highlight=False, style="dim")


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


if __name__ == "__main__":
    main()
