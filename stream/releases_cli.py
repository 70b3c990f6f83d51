"""`penchant releases …`: building the base, what is there, what is live, and moving between them.

A running worker follows CURRENT by itself; nothing here talks to it. How far its sweep is stands in
Redis, which need not be there.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from contextlib import closing
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .errors import UserError
from .settings import Settings
from .terminal import console, load_settings, open_to_read, progress

if TYPE_CHECKING:
    from model.releases import Release

# `model.releases` takes torch's two seconds, so it is imported where it is used.

releases_app = typer.Typer(
    help="Releases: build the base, list them, compare them, make one live.", no_args_is_help=True
)

_ON_HOLD = "the trainer makes nothing live until `penchant releases promote` or `resume`"

_VERDICT = "verdict-"

AsJson = Annotated[bool, typer.Option("--json", help="For programs.")]
Name = Annotated[str, typer.Argument(help="The release's id, or its first letters.")]


@releases_app.command()
def build(
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
        texts, item_ids = _catalogue(dataset, path or [])
        with progress("encoding the catalogue") as report:
            release = build_live(model, texts, report, item_ids)
        console.print(f"{release.id} is live now", highlight=False)
    console.print(f"{release.path}  {release.dimensions} dimensions, space {release.space}")


def _catalogue(dataset: str, paths: list[Path]) -> tuple[list[str], list[str]]:
    """The texts to fit the base release's projection on, and the ids of their items, if any."""
    from .base_release import texts_of
    from .datasets import load

    if not dataset:
        return [line for p in paths for line in _lines(p) if line.strip()], []
    items = load(dataset, paths or None).items
    return texts_of(items), [item.item_id for item in items]


def _lines(path: Path) -> list[str]:
    with open_to_read(path) as file:
        return file.read().decode(errors="replace").splitlines()


@releases_app.command("list")
def list_(
    every: Annotated[bool, typer.Option("--all", help="However old; --json has all.")] = False,
    as_json: AsJson = False,
) -> None:
    """The newest releases, which one is live, and what the gate said of each."""
    from .releases_view import listing, listing_table, newest

    folder = _folder()
    shown = listing(folder) | {"sweep": _sweep(folder)}
    if as_json:
        _print_json(shown)
    elif not shown["releases"] and not shown["decisions"]:
        console.print(f"no releases in {folder}: type `penchant releases build`", highlight=False)
    else:
        few, more = (shown, 0) if every else newest(shown)
        console.print(listing_table(few, console.width), highlight=False)
        if more:
            console.print(f"{more:,} older ones are not shown: `penchant releases list --all`")
        if shown["pruned"]:
            console.print(f"{len(shown['pruned']):,} older ones pruned, but for their maps")
        if (hold := shown["hold"]) is not None:
            console.print(f"on hold since {hold['at']}: {hold['why']}; {_ON_HOLD}", highlight=False)
        if (sweep := shown["sweep"]) is not None:
            state = "done" if sweep["done"] else "going on"
            console.print(
                f"sweep into {sweep['space']}: {state}, {sweep['seen']:,} profiles seen, "
                f"{sweep['moved']:,} moved",
                highlight=False,
            )


@releases_app.command()
def show(
    name: Annotated[str, typer.Argument(help="The id of a release or verdict, or its beginning.")],
    as_json: AsJson = False,
) -> None:
    """One release: files checked, figures, transition, verdicts of the gate, when it was live; or
    one verdict, also on what became no release: all figures, and why."""
    from model.releases import decisions

    from .releases_view import described, pairs_table, verdict_tables

    folder = _folder()
    verdicts = {d["id"]: d for d in decisions(folder)}
    if name.startswith(_VERDICT):
        verdict = verdicts[_one_of(verdicts, name, "verdict")]
        if as_json:
            _print_json(verdict)
        else:
            console.print(verdict_tables(verdict), highlight=False)
        return
    shown = described(_release(name), folder)
    if as_json:
        _print_json(shown)
    else:
        console.print(pairs_table(shown), highlight=False)


@releases_app.command()
def diff(name: Name, other: Name, as_json: AsJson = False) -> None:
    """Where two releases differ, figure by figure."""
    from .releases_view import compared, compared_table

    one, two = _release(name), _release(other)
    rows = compared(one, two)
    if as_json:
        _print_json({"one": one.id, "other": two.id, "differences": rows})
    else:
        console.print(compared_table(rows, one.id, two.id), highlight=False)


@releases_app.command()
def promote(name: Name, as_json: AsJson = False) -> None:
    """Make a release the live one, once its files are checked. Workers follow by themselves, and a
    hold ends."""
    from model.releases import make_current
    from model.releases import resume as take_hold_away

    release = _release(name)
    make_current(release)
    take_hold_away(_folder())
    _say_live(release, as_json)


@releases_app.command()
def rollback(as_json: AsJson = False) -> None:
    """Make the release live that was before this one; again: the one before that. The trainer makes
    nothing live from then on, until `promote` or `resume`."""
    from model.releases import rollback as roll_back

    _say_live(roll_back(_folder()), as_json)
    if not as_json:
        console.print(f"on hold: {_ON_HOLD}", highlight=False)


@releases_app.command()
def resume(as_json: AsJson = False) -> None:
    """End the hold that `rollback` left: what the trainer learns may go live again."""
    from model.releases import resume as take_hold_away

    hold = take_hold_away(_folder())
    if as_json:
        _print_json({"hold": None if hold is None else asdict(hold)})
    elif hold is None:
        console.print("nothing was on hold")
    else:
        console.print(f"on hold no more, after {hold.why} at {hold.at}", highlight=False)


def _say_live(release: Release, as_json: bool) -> None:
    if as_json:
        _print_json({"live": release.id, "space": release.space})
    else:
        console.print(f"{release.id} is live now, space {release.space}", highlight=False)


def _release(name: str) -> Release:
    """The verified release that a name, or the beginning of one, means."""
    from model.releases import list_releases, load

    folder = _folder()
    return load(folder / _one_of([listed.id for listed in list_releases(folder)], name, "release"))


def _one_of(ids: Iterable[str], name: str, kind: str) -> str:
    found = [i for i in ids if i == name] or [i for i in ids if name and i.startswith(name)]
    if len(found) != 1:
        what = f"{len(found)} {kind}s begin with" if found else f"there is no {kind}"
        raise UserError(f"{what} {name!r} in {_folder()}: `penchant releases list` has their names")
    return found[0]


def _sweep(releases_dir: Path) -> dict[str, Any] | None:
    """How far profiles have been moved into the live space; None where no sweep into it began, or
    Redis cannot be asked."""
    from model.errors import ModelError
    from model.releases import current_name, peek
    from profiles.connection import redis_errors
    from profiles.errors import ProfilesError
    from profiles.generations import follow
    from profiles.schema import Keys

    from .sweeper import progress

    settings = Settings()
    try:
        space = peek(releases_dir / current_name(releases_dir)).space
        with closing(settings.redis.connection().open()) as client:
            keys = Keys(settings.namespace)
            with redis_errors(settings.redis.url):
                follow(client, keys)
            found = progress(client, keys, space)
    except (ModelError, ProfilesError):
        return None
    return None if found is None else {"space": space, **asdict(found)}


def _folder() -> Path:
    return Settings().model.releases


def _print_json(value: Any) -> None:
    print(json.dumps(value, ensure_ascii=False))
