"""A profile as a person reads it on a terminal, and as a program reads it in JSON."""

from __future__ import annotations

import re
from datetime import UTC, datetime
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from profiles import NearestItem, Outlook, Profile, ProfileReader, SpaceMismatch
from profiles.schema import EVENT_TYPES

_SHOWN_EVENTS = 8
_SHOWN_ITEMS = 8
_BAR_CELLS = 20
_HEADS = {"purchase": "purchase intent", "churn": "churn"}
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f]")


def printable(text: str) -> str:
    """Control characters in words (`\\x1b`): a hostile record must not move the cursor."""
    return _CONTROL.sub(lambda found: f"\\x{ord(found[0]):02x}", text)


def render_profile(reader: ProfileReader, profile: Profile) -> RenderableType:
    """Counters, outlook, interests by time scale, categories, last events, nearest items."""
    tables = (
        _scales(reader, profile),
        _categories(reader, profile),
        _recent(reader, profile),
        _nearest(reader, profile),
    )
    parts: list[RenderableType] = [_heading(profile)]
    if profile.outlook is not None:
        parts.append(_foretold(profile.outlook))
    parts.extend(table for table in tables if table.row_count)
    return Group(*parts)


def profile_json(reader: ProfileReader, profile: Profile, vectors: bool) -> dict[str, Any]:
    """The same for programs; `vectors` adds the unit interest vector of each time scale, and that
    of the next interest."""
    records = reader.items(profile)
    scales: list[dict[str, Any]] = [
        {"half_life_s": half_life, "mass": round(float(mass), 6)}
        for half_life, mass in zip(profile.half_lives_s, profile.masses, strict=True)
    ]
    if vectors:
        for k, scale in enumerate(scales):
            scale["interest"] = [round(float(x), 6) for x in profile.interest(k)]
    return {
        "user_id": profile.user_id,
        "space": profile.space,
        "first_ms": profile.first_ms,
        "updated_ms": profile.updated_ms,
        "events": profile.events,
        "counts": {name: n for name, n in profile.counts.items() if n},
        "spend": profile.spend,
        "pending": profile.pending,
        "scales": scales,
        "outlook": _outlook_json(profile.outlook, vectors) if profile.outlook else None,
        "categories": dict(reader.top_categories(profile, 10)),
        "window": [
            {
                "t_ms": int(entry["t_ms"]),
                "type": EVENT_TYPES[entry["type"]],
                "weight": round(float(entry["weight"]), 6),
                "item_id": records[item].item_id
                if (item := int(entry["item"])) in records
                else None,
            }
            for entry in profile.window
        ],
        "nearest_items": [
            {"item_id": i.item_id, "cosine": round(i.cosine, 4), "title": i.title}
            for i in _nearest_or_none(reader, profile)
        ],
    }


def _heading(profile: Profile) -> Text:
    counts = ", ".join(f"{n:,} {name}" for name, n in profile.counts.items() if n)
    spend = f", spent {profile.spend:,.2f}" if profile.spend else ""
    pending = f", {profile.pending} waiting for their item's text" if profile.pending else ""
    return Text.assemble(
        (printable(profile.user_id), "bold"),
        f"  {profile.events:,} events, {_day(profile.first_ms)} to {_time(profile.updated_ms)}\n"
        f"{counts}{spend}{pending}\n",
    )


def _foretold(outlook: Outlook) -> Text:
    """`purchase intent 23 %, churn 41 %`, who says so and when."""
    said = ", ".join(
        f"{_HEADS.get(name, name)} {chance:.0%}".replace("%", " %")
        for name, chance in outlook.heads.items()
    )
    by = f"foretold by {outlook.release} at {_time(outlook.computed_ms)}"
    since = f", {outlook.saves_since:,} saves ago" if outlook.saves_since else ""
    return Text(printable(f"{said or 'next interest'}, {by}{since}") + "\n")


def _outlook_json(outlook: Outlook, vectors: bool) -> dict[str, Any]:
    found: dict[str, Any] = {
        "release": outlook.release,
        "heads": outlook.heads,
        "updated_ms": outlook.updated_ms,
        "computed_ms": outlook.computed_ms,
        "saves_since": outlook.saves_since,
    }
    if vectors and outlook.next_interest is not None:
        found["next_interest"] = [round(float(x), 6) for x in outlook.next_interest]
    return found


def _scales(reader: ProfileReader, profile: Profile) -> Table:
    table = Table("half life", "mass", "nearest item", box=None, pad_edge=False)
    for scale, half_life_s in enumerate(profile.half_lives_s):
        items = _nearest_or_none(reader, profile, 1, scale)
        title = (items[0].title or items[0].item_id) if items else "–"
        table.add_row(_span(float(half_life_s)), f"{profile.masses[scale]:.2f}", _cell(title))
    return table


def _categories(reader: ProfileReader, profile: Profile) -> Table:
    table = Table("category", "", "weight", box=None, pad_edge=False)
    top = [(name, mass) for name, mass in reader.top_categories(profile, 6) if mass > 0]
    for name, mass in top:
        table.add_row(
            _cell(name), "█" * max(1, round(_BAR_CELLS * mass / top[0][1])), f"{mass:.2f}"
        )
    return table


def _recent(reader: ProfileReader, profile: Profile) -> Table:
    table = Table("last events", "", "item", box=None, pad_edge=False)
    records = reader.items(profile)
    for entry in profile.window[::-1][:_SHOWN_EVENTS]:
        record = records.get(int(entry["item"]))
        title = (record.title or record.item_id) if record else "–"
        table.add_row(_time(int(entry["t_ms"])), EVENT_TYPES[entry["type"]], _cell(title))
    return table


def _nearest(reader: ProfileReader, profile: Profile) -> Table:
    table = Table("nearest items", "cosine", "category", box=None, pad_edge=False)
    for item in _nearest_or_none(reader, profile):
        name = item.title or item.item_id
        category = _cell(" > ".join(item.category))
        table.add_row(_cell(name), f"{item.cosine:.3f}", category)
    return table


def _cell(text: str) -> Text:
    """As `Text`, so that rich reads no markup in it either."""
    return Text(printable(text))


def _nearest_or_none(
    reader: ProfileReader, profile: Profile, k: int = _SHOWN_ITEMS, scale: int | None = None
) -> list[NearestItem]:
    try:
        return reader.nearest_items(profile.user_id, k, scale)
    except SpaceMismatch:  # no item with a text yet: the rest of the profile is still worth seeing
        return []


def _span(seconds: float) -> str:
    """1800 -> `30 minutes`, in the largest unit that it is one or more of."""
    for unit, length_s in (("day", 86_400), ("hour", 3_600), ("minute", 60)):
        if seconds >= length_s:
            count = seconds / length_s
            return f"{count:g} {unit}" + ("" if count == 1 else "s")
    return f"{seconds:g} s"


def _time(ms: int) -> str:
    return datetime.fromtimestamp(ms / 1000, UTC).strftime("%Y-%m-%d %H:%M")


def _day(ms: int) -> str:
    return datetime.fromtimestamp(ms / 1000, UTC).strftime("%Y-%m-%d")
