"""`penchant rebuild`, `diff`, `generations …`, `snapshot …`: profiles made anew, compared, kept.

Only arguments and words; the work is in `rebuild.py`, `profile_diff.py` and `snapshots.py`. Workers
go on meanwhile, and nothing here talks to them.
"""

from __future__ import annotations

from contextlib import closing
from datetime import UTC, datetime
from enum import StrEnum
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from .errors import UserError
from .settings import Settings
from .terminal import console, load_settings, plain, progress, progresses

if TYPE_CHECKING:
    from profiles.generations import Generations
    from profiles.schema import Keys

    from .profile_diff import Difference
    from .rebuild import Outcome

generations_app = typer.Typer(
    help="Generations of profiles: which is live, flip to another, remove the others.",
    no_args_is_help=True,
)
snapshot_app = typer.Typer(
    help="Snapshots of all profiles, in a folder or object store.", no_args_is_help=True
)

Generation = Annotated[int, typer.Argument(help="Its number, as `generations list` has it.")]
PerS = Annotated[float, typer.Option(min=0, help="At most so many a second; 0: as many as go.")]
Flip = Annotated[bool, typer.Option(help="Let the new profiles be live, if nothing would be lost.")]
Url = Annotated[str, typer.Argument(help="A folder, or any fsspec URL (s3://bucket/folder).")]


class From(StrEnum):
    """Where a rebuild begins."""

    topic = "topic"
    archive = "archive"


def rebuild(
    user: Annotated[str, typer.Option(help="Only this shopper, put in place at once.")] = "",
    source: Annotated[
        From, typer.Option("--from", help="archive: where the topic lacks the beginning.")
    ] = From.topic,
    incomplete: Annotated[
        bool, typer.Option("--incomplete", help="archive: without what damaged segments held.")
    ] = False,
    flip: Flip = True,
    per_s: PerS = 0.0,
) -> None:
    """Make all profiles anew beside the live ones, compare, and let them be live. Run again, it
    goes on where it was."""
    if user:
        from .rebuild import Rebuild

        with (
            progresses() as begin,
            Rebuild(
                load_settings(), source.value, begin, per_s=per_s, incomplete=incomplete
            ) as one,
        ):
            one.one(user)
        console.print(f"the profile of {plain(user)} is rebuilt", highlight=False)
        return
    _make(source.value, flip=flip, per_s=per_s, incomplete=incomplete)


def _make(source: str, *, flip: bool, per_s: float, incomplete: bool = False) -> None:
    from .rebuild import Rebuild

    with (
        progresses() as begin,
        Rebuild(load_settings(), source, begin, per_s=per_s, incomplete=incomplete) as making,
    ):
        outcome = making.everybody(flip=flip)
    _show_outcome(outcome, wanted=flip)


def _show_outcome(outcome: Outcome, *, wanted: bool) -> None:
    number, lacking = outcome.generation, outcome.lacking
    _show_difference(outcome.difference, f"{outcome.before} (live)", str(number))
    if lacking.rows:
        console.print(
            f"[yellow]{lacking.rows:,} archived events are of before currencies and items' texts "
            f"were kept: {lacking.purchases:,} purchases among them count in PROFILE_CURRENCY, and "
            "items that events alone had told of stay unknown until they are told again[/yellow]",
            highlight=False,
        )  # fmt: skip
    if outcome.flipped:
        console.print(
            f"generation {number} is live now; {outcome.before} is kept, `penchant generations "
            f"flip {outcome.before}` goes back, and `penchant generations sweep` removes it",
            highlight=False,
        )
    elif wanted:
        raise UserError(
            f"generation {number} lacks what the live profiles have and was not made live: look at "
            f"`penchant diff`, and rebuild from a fuller source, or `penchant generations flip "
            f"{number}` all the same"
        )
    else:
        console.print(
            f"generation {number} is ready: `penchant diff` compares, `penchant generations flip "
            f"{number}` makes it live",
            highlight=False,
        )


def diff(
    left: Annotated[
        str, typer.Argument(help="live, shadow (being made, or ready), a number, or a NAMESPACE.")
    ] = "live",
    right: Annotated[str, typer.Argument(help="The same.")] = "shadow",
) -> None:
    """Compare profiles of two generations, or namespaces, field by field; exit code 1 where they
    differ. Floats may differ as rounding does. Who was folded further on one side is left out."""
    from .profile_diff import compare

    settings = load_settings()
    with closing(settings.redis.connection().open()) as client:
        one, other = _side(settings, left), _side(settings, right)
        with progress("comparing") as report:
            found = compare(
                client,
                one,
                other,
                settings.profile.own_items,
                on_page=lambda count: report(count, None),
            )
    _show_difference(found, left, right)
    if not found.equal:
        raise typer.Exit(1)


def _side(settings: Settings, name: str) -> Keys:
    from profiles.generations import BUILDING, READY
    from profiles.schema import Keys

    generations = _generations(settings)
    if name == "live":
        return Keys(settings.namespace, generations.live())
    states = generations.states()
    if name == "shadow":
        found = [number for number, state in states.items() if state in (BUILDING, READY)]
        if not found:
            raise UserError("nothing is being made: `penchant rebuild --no-flip` makes a shadow")
        return Keys(settings.namespace, found[-1])
    if name.isdigit():
        if int(name) not in states:
            raise UserError(f"no generation {name}: `penchant generations list` has what there is")
        return Keys(settings.namespace, int(name))
    other = settings.model_copy(update={"namespace": name})
    return Keys(name, _generations(other).live())


def _show_difference(found: Difference, left: str, right: str) -> None:
    console.print(
        f"{left} beside {right}: {found.compared:,} profiles compared, {found.same:,} the same, "
        f"{found.differ:,} differ; {found.apart:,} not compared, as one side has folded more; "
        f"{found.only_left:,} only in {left}, {found.only_right:,} only in {right}",
        highlight=False,
        soft_wrap=True,
    )
    counts = {**found.fields, **{f"lacks {what}": n for what, n in found.lost.items()}}
    if counts:
        table = Table("what differs", "profiles", "such as")
        for what, count in sorted(counts.items(), key=lambda pair: -pair[1]):
            users = found.examples[what.removeprefix("lacks ")]
            table.add_row(what, f"{count:,}", plain(", ".join(users)))
        console.print(table, highlight=False)


@generations_app.command("list")
def list_() -> None:
    """All generations there are."""
    table = Table("generation", "state")
    for number, state in _generations(load_settings()).states().items():
        table.add_row(str(number), state)
    console.print(table, highlight=False)


@generations_app.command("flip")
def flip_(number: Generation) -> None:
    """Make a generation live: one that is ready, or was live before. Workers read on from where it
    stands."""
    from .rebuild import require_readable

    settings = load_settings()
    require_readable(settings, number)
    generations = _generations(settings)
    live = generations.live()
    if not generations.flip(number, live):
        raise UserError(
            f"generation {number} is not ready: `penchant generations list` has what there is"
        )
    console.print(f"generation {number} is live now, in place of {live}", highlight=False)


@generations_app.command()
def sweep(per_s: PerS = 5_000.0) -> None:
    """Remove all profiles but the live ones, and those that a rebuild is making: there is no way
    back after that."""
    from profiles.generations import BUILDING, LIVE, READY

    generations = _generations(load_settings())
    for number, state in generations.states().items():
        if state in (LIVE, BUILDING, READY) or not generations.give_up(number):
            continue
        with progress(f"removing generation {number}") as report:
            removed = 0
            for removed in generations.remove(number, per_s):
                report(removed, None)
        console.print(f"removed generation {number}, {removed:,} keys", highlight=False)


@snapshot_app.command()
def create(url: Url) -> None:
    """Write all profiles as they are now, while workers go on."""
    from .snapshots import create_snapshot

    settings = load_settings()
    with closing(settings.redis.connection().open()) as client, progress("writing") as report:
        made = create_snapshot(client, settings.namespace, url, datetime.now(UTC), report)
    console.print(f"{made.url}  {made.users:,} profiles", highlight=False, soft_wrap=True)


@snapshot_app.command("list")
def list_snapshots_(url: Url) -> None:
    """The complete snapshots below an address."""
    from .snapshots import list_snapshots

    table = Table("snapshot", "taken", "profiles")
    for found in list_snapshots(url):
        table.add_row(plain(found.url), found.created, f"{found.users:,}")
    console.print(table, highlight=False)


@snapshot_app.command()
def restore(url: Url, flip: Flip = True, per_s: PerS = 0.0) -> None:
    """Make profiles from a snapshot beside the live ones, fold what came after it from the topic,
    and let them be live."""
    from .rebuild import SNAPSHOT

    _make(f"{SNAPSHOT}{url}", flip=flip, per_s=per_s)


def _generations(settings: Settings) -> Generations:
    from profiles.generations import Generations

    return Generations(settings.redis.connection().open(), settings.namespace, settings.redis.url)
