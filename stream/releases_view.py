"""What `penchant releases …` shows: releases, moves of CURRENT and verdicts of the gate, as JSON
values and as tables. It reads the releases folder and nothing else."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, Final

from rich.console import Group
from rich.table import Table

from model.releases import PRUNED, Listed, Release, decisions, held, history, list_releases

_ID_CELLS: Final = {"release": 24, "space": 16, "from": 24}
_WIDE: Final = 120  # columns
NEWEST: Final = 20
"""Of releases, and of verdicts on what became none, that a table shows."""


def listing(releases_dir: Path) -> dict[str, Any]:
    """Releases, oldest first; moves and decisions likewise; the hold, if there is one; and the ids
    of releases of which only the maps are left."""
    verdicts, hold = decisions(releases_dir), held(releases_dir)
    return {
        "releases": [_listed(x, _verdict(verdicts, x.id)) for x in list_releases(releases_dir)],
        "moves": [asdict(move) for move in history(releases_dir)],
        "decisions": verdicts,
        "hold": None if hold is None else asdict(hold),
        "pruned": [x.id for x in list_releases(releases_dir / PRUNED)],
    }


def _verdict(verdicts: list[dict[str, Any]], release_id: str) -> dict[str, Any] | None:
    """The latest on a release."""
    return next((v for v in reversed(verdicts) if v.get("candidate") == release_id), None)


def _listed(listed: Listed, verdict: Mapping[str, Any] | None) -> dict[str, Any]:
    shown: dict[str, Any] = {"id": listed.id, "current": listed.current}
    if listed.release is None:
        return shown | {"problem": listed.problem}
    release = listed.release
    return shown | {
        "created_at": release.created_at,
        "space": release.space,
        "parent": release.parent,
        "decision": verdict.get("decision", "") if verdict else "",
    }


def newest(shown: Mapping[str, Any], most: int = NEWEST) -> tuple[dict[str, Any], int]:
    """A listing without what is older than the newest `most` releases and as many verdicts on what
    became none, but with the live release; and how many rows of its table that leaves out."""
    releases, known = shown["releases"], {row["id"] for row in shown["releases"]}
    lone = [v["id"] for v in shown["decisions"] if v.get("candidate") not in known]
    kept = {row["id"] for row in releases[-most:]}
    few = [row for row in releases if row["current"] or row["id"] in kept]
    old = set(lone[:-most])
    decisions = [v for v in shown["decisions"] if v["id"] not in old]
    decisions = [v for v in decisions if v.get("candidate") not in known - {r["id"] for r in few}]
    return {**shown, "releases": few, "decisions": decisions}, len(releases) - len(few) + len(old)


def listing_table(shown: Mapping[str, Any], width: int) -> Table:
    """One row per release; below them a row per verdict on what became none. Ids are never cut;
    where `width`, in columns, leaves room, spaces and parents are shown, too."""
    wide = width >= _WIDE
    table = Table(box=None, pad_edge=False)
    for name in ("", "release", "made", *(("space", "from") if wide else ())):
        table.add_column(name, no_wrap=True, min_width=_ID_CELLS.get(name))
    table.add_column("gate", overflow="fold")
    known = set()
    for row in shown["releases"]:
        known.add(row["id"])
        mark = "live" if row["current"] else ""
        said = f"[red]{_first(row['problem'])}[/red]" if "problem" in row else row["decision"]
        links = (row.get("space", ""), row.get("parent", "")) if wide else ()
        table.add_row(mark, row["id"], _minute(row.get("created_at", "")), *links, said)
    for verdict in shown["decisions"]:
        if verdict.get("candidate") not in known:
            links = ("", str(verdict.get("parent", ""))) if wide else ()
            at = _minute(str(verdict.get("at", "")))
            table.add_row("", verdict["id"], at, *links, verdict_words(verdict))
    return table


def verdict_words(verdict: Mapping[str, Any]) -> str:
    """What was decided, the figure that counts most, and the reasons."""
    newest = _figures(verdict).get("newest", {})
    words = f"{verdict.get('decision')}: "
    if newest:
        words += f"{newest['name']} {_short(newest['current'])} -> {_short(newest['candidate'])}; "
    return words + "; ".join(verdict.get("reasons", []))


def verdict_tables(verdict: Mapping[str, Any]) -> Group:
    """A verdict with everything it was reached on."""
    compared = _figures(verdict)
    about = {k: v for k, v in verdict.items() if k not in ("figures", "reasons")}
    reasons = {f"reason {n}": r for n, r in enumerate(verdict.get("reasons", []), 1)}
    table = Table(box=None, pad_edge=False)
    for name in ("figure", "live", "candidate", "interval", "targets"):
        table.add_column(name, overflow="fold")
    rest = {}
    for part, value in compared.items():
        figures = value if isinstance(value, list) else [value]
        if not all(isinstance(f, Mapping) and "candidate" in f and "low" in f for f in figures):
            rest[part] = value
            continue
        for f in figures:
            table.add_row(
                f"{part}: {f['name']}", _short(f["current"]), _short(f["candidate"]),
                f"{_short(f['low'])} to {_short(f['high'])}", str(f["count"]),
            )  # fmt: skip
    bounds = verdict.get("figures", {}).get("bounds", {})
    return Group(pairs_table(about | reasons), "", table, "", pairs_table(rest | bounds))


def _figures(verdict: Mapping[str, Any]) -> Mapping[str, Any]:
    found: Mapping[str, Any] = verdict.get("figures", {}).get("comparison", {})
    return found


def _minute(at: str) -> str:
    """`2026-03-01T12:00:00+00:00` -> `2026-03-01 12:00`."""
    return at[:16].replace("T", " ")


def _first(text: str) -> str:
    return text.partition(";")[0]


def described(release: Release, releases_dir: Path) -> dict[str, Any]:
    """One release: its manifest, parts, figures, transition and verdicts."""
    about = {k: v for k, v in asdict(release).items() if k != "path"}
    transition = release.load_transition()
    return about | {
        "path": str(release.path),
        "parts": list(release.parts),
        "metrics": release.metrics(),
        "transition": None
        if transition is None
        else {
            "from_space": transition.from_space,
            "kind": transition.kind,
            "errors": {kind: asdict(error) for kind, error in transition.errors.items()},
        },
        "decisions": [d for d in decisions(releases_dir) if d.get("candidate") == release.id],
        "moves": [asdict(m) for m in history(releases_dir) if release.id in (m.before, m.release)],
    }


def compared(one: Release, other: Release) -> list[dict[str, Any]]:
    """Where two releases differ: {name, one, other}, and the difference of two numbers."""
    sides = []
    for release in (one, other):
        about = {k: v for k, v in asdict(release).items() if k not in ("path", "id", "parts")}
        about["parts"] = ", ".join(release.parts)
        sides.append(flat(about) | flat(release.metrics(), "metrics"))
    rows = []
    for name in dict.fromkeys([*sides[0], *sides[1]]):
        a, b = sides[0].get(name), sides[1].get(name)
        if a == b:
            continue
        row: dict[str, Any] = {"name": name, "one": a, "other": b}
        if _is_number(a) and _is_number(b):
            row["difference"] = b - a  # type: ignore[operator]
        rows.append(row)
    return rows


def flat(values: Any, name: str = "") -> dict[str, Any]:
    """Nested mappings and lists as one: {"metrics.recall": 0.1}."""
    if isinstance(values, Mapping):
        pairs = [(str(k), v) for k, v in values.items()]
    elif isinstance(values, list):
        pairs = [(str(i), v) for i, v in enumerate(values)]
    else:
        return {name: values}
    found: dict[str, Any] = {}
    for key, value in pairs:
        found |= flat(value, f"{name}.{key}" if name else key)
    return found


def pairs_table(values: Mapping[str, Any]) -> Table:
    """Names and values."""
    table = Table(show_header=False, box=None)
    table.add_column(overflow="fold")
    table.add_column(overflow="fold", min_width=_ID_CELLS["release"])
    for name, value in flat(values).items():
        table.add_row(name, _short(value))
    return table


def compared_table(rows: list[dict[str, Any]], one: str, other: str) -> Table:
    """What `compared` found."""
    table = Table(box=None, pad_edge=False)
    table.add_column(overflow="fold")
    for name in (one, other):
        table.add_column(name, overflow="fold", min_width=_ID_CELLS["release"])
    table.add_column("difference")
    for row in rows:
        change = f"{row['difference']:+.4g}" if "difference" in row else ""
        table.add_row(row["name"], _short(row["one"]), _short(row["other"]), change)
    return table


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _short(value: Any) -> str:
    if value is None:
        return ""
    return f"{value:.4g}" if isinstance(value, float) else str(value)
