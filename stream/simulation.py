"""The simulated shop's rows as events: JSON lines, a recording to replay, and the truth in a file.

It knows the form of events and of files; what happens in the shop is in `simulated_shop.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Final, Literal, Self, TextIO

import pyarrow as pa
import pyarrow.parquet as pq

from profiles.arithmetic import FORGET
from profiles.schema import EVENT_TYPES, TYPE_CODE

from . import simulated_words as words
from .errors import UserError
from .events import EVENT_ADAPTER, Event, Item
from .simulated_shop import GUEST, Block, K, Shop
from .tables import Skip

CURRENCY: Final = "USD"

TRUTH: Final = pa.schema(
    [
        ("kind", pa.dictionary(pa.int8(), pa.string())),  # item, visit, churn, label
        ("t_ms", pa.int64()),  # a visit's begin, the end of the last one, a review's event time
        ("user_id", pa.string()),
        ("item_id", pa.string()),
        ("topic", pa.int16()),  # of an item; what a visit was for, null for a bot
        ("interest", pa.list_(pa.float32(), K)),  # of a visit's shopper, shares that add to 1
        ("event_id", pa.string()),  # of a review or a message
        ("label", pa.string()),
        ("rating", pa.uint8()),
        ("quality", pa.float32()),  # of an item
    ],
    metadata={
        "simulated": "true",
        "topics": "\n".join(" > ".join(t.category) for t in words.TOPICS),
    },
)

_NAME: Final = "sim"  # in every id, so that nobody takes one for a person


def user_id(user: int) -> str:
    """The id of a user number."""
    return f"{_NAME}-{user}" if user < GUEST else f"{_NAME}-guest-{user - GUEST}"


def item_id(item: int) -> str:
    """The id of an item's row."""
    return f"{_NAME}-item-{item}"


def event_id(seed: int, n: int) -> str:
    """The id of an event's number."""
    return f"{_NAME}-{seed}-{n}"


def items(shop: Shop) -> Iterator[Item]:
    """The catalogue."""
    for item, price in enumerate(shop.price.tolist()):
        text = shop.words(item)
        yield Item(
            item_id=item_id(item),
            title=text.title,
            category=text.category,
            brand=text.brand,
            price=price,
            currency=CURRENCY,
            description=text.description,
        )


_SEARCH, _REVIEW, _MESSAGE, _PURCHASE, _IMPRESSION = (
    TYPE_CODE[name] for name in ("search", "review", "message", "purchase", "impression")
)


class _Teller:
    """Rows as the JSON of events. By hand: at a hundred thousand events a second, a model for each
    would cost more than the shop."""

    def __init__(self, shop: Shop) -> None:
        self._shop = shop
        self._topic = shop.topic.tolist()
        self._noun = shop.noun.tolist()
        self._goods = [
            f',"item_id":"{item_id(item)}","price":{price},"currency":"{CURRENCY}"'
            for item, price in enumerate(shop.price.tolist())
        ]

    def line(self, row: tuple[int, ...]) -> str:
        """`row`: of simulated_shop.ROW. No text of ours needs an escape."""
        _, ts, n, user, session, item, seed, type_, topic, quantity, rating, label, told, found = (
            row
        )
        kind = "forget" if type_ == FORGET else EVENT_TYPES[type_]
        head = (
            f'{{"type":"{kind}","event_id":"{event_id(self._shop.spec.seed, n)}",'
            f'"user_id":"{user_id(user)}","ts":{ts}'
        )
        if session >= 0:
            head += f',"session_id":"{_NAME}-{session}"'
        if type_ == FORGET:
            return head + "}"
        if type_ == _SEARCH:
            return f'{head},"query":"{words.query(topic, seed)}"}}'
        if type_ == _MESSAGE:
            text = words.message(self._topic[item], self._noun[item], label, seed)
            channel = words.CHANNELS[seed % len(words.CHANNELS)]
            known = f',"label":"{words.LABELS[label]}"' if told else ""
            return f'{head},"text":"{text}","channel":"{channel}"{known}}}'
        head += self._goods[item]
        if type_ == _IMPRESSION:
            return f'{head},"placement":"{"search" if found else "home"}"}}'
        if type_ == _PURCHASE:
            return f'{head},"quantity":{quantity}}}'
        if type_ == _REVIEW:
            text = words.review(self._topic[item], self._noun[item], label, seed)
            return f'{head},"rating":{rating},"text":"{text}"}}'
        return head + "}"


class Events:
    """The events of a shop, made while they are read; see `replay.EventSource`."""

    invalid: Mapping[str, Skip] = {}

    def __init__(self, shop: Shop, on_block: Callable[[Block], None] | None = None) -> None:
        self._shop, self._on_block = shop, on_block

    def lines(self) -> Iterator[list[str]]:
        """JSON lines, a tick at a time."""
        tell = _Teller(self._shop)
        for block in self._shop.blocks():
            if self._on_block is not None:
                self._on_block(block)
            yield [tell.line(row) for row in block.rows.tolist()]

    def __iter__(self) -> Iterator[Event]:
        validate = EVENT_ADAPTER.validator.validate_json
        for lines in self.lines():
            for line in lines:
                yield validate(line)


class Simulated:
    """A simulated shop in the form of a recorded set; see `replay.Recording`."""

    name = "the simulated shop"

    def __init__(self, shop: Shop, on_block: Callable[[Block], None] | None = None) -> None:
        self._shop = shop
        self.events = Events(shop, on_block)
        self.skipped: dict[str, Skip] = {}

    @property
    def items(self) -> Iterable[Item]:
        """The catalogue, anew each time."""
        return items(self._shop)

    @property
    def last_ms(self) -> int:
        """No event lies after this time."""
        return self._shop.spec.end_ms - 1


def write_lines(
    simulated: Simulated,
    out: TextIO,
    *,
    only: Literal["both", "items", "events"] = "both",
    limit: int | None = None,
    on_events: Callable[[int], None] = lambda events: None,
) -> tuple[int, int]:
    """Write items and then events as JSON lines; how many of each. `limit`: events at most."""
    n_items = n_events = 0
    if only != "events":
        for item in simulated.items:
            out.write(item.to_json().decode() + "\n")
            n_items += 1
    if only != "items" and limit != 0:
        for lines in simulated.events.lines():
            kept = lines if limit is None else lines[: limit - n_events]
            n_events += len(kept)
            out.writelines(line + "\n" for line in kept)
            on_events(n_events)
            if n_events == limit:
                break
    return n_items, n_events


class TruthFile:
    """Writes what the shop knows and the events do not say to a Parquet file, as it comes. The
    file is whole after `close`."""

    def __init__(self, path: Path, shop: Shop) -> None:
        """Raises UserError."""
        self._shop = shop
        try:
            self._writer = pq.ParquetWriter(path, TRUTH, compression="zstd")
        except OSError as error:
            raise UserError(
                f"cannot write {path}: {error.strerror}; name a file for --truth"
            ) from error
        n = shop.spec.items
        self._add(
            "item", n,
            item_id=[item_id(item) for item in range(n)], topic=shop.topic, quality=shop.quality,
        )  # fmt: skip

    def add(self, block: Block) -> None:
        """The truth of one tick."""
        visits, labels, seed = block.visits, block.labels, self._shop.spec.seed
        users = [user_id(user) for user in visits.user.tolist()]
        topic = pa.array(visits.topic, pa.int16(), mask=visits.topic < 0)
        shares = pa.array(visits.interest.reshape(-1), pa.float32())
        interest = pa.FixedSizeListArray.from_arrays(shares, K)
        self._add(
            "visit", len(users), t_ms=visits.t_ms, user_id=users, topic=topic, interest=interest
        )
        gone = [user_id(user) for user in block.churned.tolist()]
        self._add("churn", len(gone), t_ms=block.churned_ms, user_id=gone)
        rating = labels["rating"]
        self._add(
            "label",
            len(labels),
            t_ms=labels["ts"],
            user_id=[user_id(user) for user in labels["user"].tolist()],
            item_id=[item_id(item) for item in labels["item"].tolist()],
            event_id=[event_id(seed, n) for n in labels["n"].tolist()],
            label=[words.LABELS[label] for label in labels["label"].tolist()],
            rating=pa.array(rating, pa.uint8(), mask=rating == 0),
        )

    def close(self) -> None:
        """Write the foot of the file."""
        self._writer.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _add(self, kind: str, n: int, **columns: object) -> None:
        if not n:
            return
        given = {"kind": pa.array([kind] * n).dictionary_encode(), **columns}
        arrays = [
            pa.array(given[f.name], f.type) if f.name in given else pa.nulls(n, f.type)
            for f in TRUTH
        ]
        self._writer.write_table(pa.Table.from_arrays(arrays, schema=TRUTH))
