"""What must hold of neighbours whatever happens: which batches, which crashes, how often."""

from __future__ import annotations

import random
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from profiles import SchemaTooNew, StateCorrupt, arithmetic, neighbours, schema
from profiles.neighbours import LANES, Neighbours, Pairs, TallyLayout, lane_of
from tests import neighbour_oracle
from tests.neighbour_oracle import compare
from tests.oracle import FORGET, Event
from tests.profile_events import (
    ITEM_KEYS,
    LAYOUT,
    NOW_MS,
    SPACE,
    Shelf,
    columns,
    histories,
    in_topic,
    item_event,
)

PARTITIONS = 3
TALLIES = TallyLayout()
cuts = st.lists(st.integers(0, 25), max_size=4)
quiet = histories(forgets=False)


class Shop:
    """Profiles, the pairs topic and items' tallies, as bytes between the steps of a worker."""

    def __init__(self, layout: TallyLayout = TALLIES) -> None:
        self.layout = layout
        self.shelf = Shelf()
        self.topic: list[list[bytes]] = [[] for _ in range(PARTITIONS)]
        self.stored: dict[int, tuple[bytes, bytes, bytes]] = {}

    def work(self, events: Sequence[Event], *, saved: bool = True) -> None:
        """A micro-batch, lane by lane; without `saved` the worker dies before its save."""
        for lane in range(LANES):
            mine = [event for event in events if lane_of(event.user_id) == lane]
            self._lane(mine, lane, saved)

    def _lane(self, events: Sequence[Event], lane: int, saved: bool) -> None:
        users = sorted({event.user_id for event in events})
        profiles, taken = self.shelf.load(users), columns(events, users)
        before = list(profiles.window)
        folded = arithmetic.fold(profiles, taken, LAYOUT, SPACE)
        counted = np.bincount(taken.row[folded.applied], minlength=len(users))
        began = profiles.header["events"] == counted
        entries, of = neighbours.arisen(before, taken, folded.applied, began, LAYOUT.window)
        origins = neighbours.origins([taken.source[i] for i in of], [lane] * len(of))
        for partition, value in neighbours.records(entries, origins, PARTITIONS):
            self.topic[partition].append(value)
        if saved:
            self.shelf.save(users, profiles)

    def fold(self, partition: int, begin: int, end: int) -> neighbours.Folded:
        """What the reader of a partition does with records that it read."""
        pairs, bad = neighbours.read_records(self.topic[partition][begin:end])
        assert bad == 0
        items, rows = np.unique(pairs.entries["item"], return_inverse=True)
        fields = [self.stored.get(item, (None, None, None)) for item in items.tolist()]
        tallies = neighbours.unpack(*([f[i] for f in fields] for i in range(3)), self.layout)
        folded = neighbours.fold(tallies, rows, pairs, self.layout)
        for row, tally in enumerate(neighbours.pack(tallies)):
            fence = arithmetic.write_fence(1, 2, 3, tallies.watermarks[row])
            self.stored[int(items[row])] = (tally, tallies.near[row], fence)
        return folded

    def fold_all(self) -> Shop:
        for partition, records in enumerate(self.topic):
            self.fold(partition, 0, len(records))
        return self

    def tallies(self) -> dict[int, Neighbours]:
        return {k: neighbours.decode(tally, near) for k, (tally, near, _) in self.stored.items()}


def after(events: Sequence[Event], cuts: Sequence[int] = ()) -> Shop:
    shop = Shop()
    ends = sorted(min(cut, len(events)) for cut in cuts)
    for begin, end in zip([0, *ends], [*ends, len(events)], strict=True):
        shop.work(events[begin:end])
    return shop.fold_all()


def expected(events: Sequence[Event]) -> dict[int, neighbour_oracle.Tally]:
    return neighbour_oracle.fold(events, LAYOUT.window, LAYOUT.seen)


# --- the oracle ----------------------------------------------------------------------------


@given(quiet, cuts)
def test_tallies_are_what_plain_python_computes_however_events_are_cut(
    events: list[Event], cuts: list[int]
) -> None:
    assert compare(after(events, cuts).tallies(), expected(events)) == []


@given(histories(ids=False), cuts)
def test_nothing_meets_what_was_forgotten(events: list[Event], cuts: list[int]) -> None:
    """Cut before each forget: then what came before it has left its pairs."""
    forgets = [i for i, event in enumerate(events) if event.type == FORGET]
    shop = after(events, [*cuts, *forgets])
    assert compare(shop.tallies(), expected(events)) == []


def test_the_oracle_tells_a_lost_pair_and_a_double_one() -> None:
    events = in_topic([item_event(i % 3, NOW_MS + i) for i in range(5)])
    good = after(events)
    lost, double = after(events), after(events)
    lost.stored.pop(ITEM_KEYS[1])
    pairs, _ = neighbours.read_records(double.topic[ITEM_KEYS[0] % PARTITIONS])
    item, (tally, near, fence) = ITEM_KEYS[0], double.stored[ITEM_KEYS[0]]
    again = neighbours.unpack([tally], [near], [b""], TALLIES)
    mine = pairs.entries["item"] == item
    more = Pairs(pairs.entries[mine], pairs.origin[mine], pairs.record[mine])
    neighbours.fold(again, np.zeros(mine.sum(), np.int64), more, TALLIES)
    double.stored[item] = (neighbours.pack(again)[0], again.near[0], fence)
    assert compare(good.tallies(), expected(events)) == []
    assert compare(lost.tallies(), expected(events)) != []
    assert compare(double.tallies(), expected(events)) != []


# --- once ----------------------------------------------------------------------------------


@given(quiet, st.data())
def test_pairs_count_once_whenever_the_worker_dies(
    events: list[Event], data: st.DataObject
) -> None:
    """Before its save or after it, and it begins again at any earlier commit."""
    shop, position = Shop(), 0
    while position < len(events):
        commit = data.draw(st.integers(max(0, position - 6), position), label="commit")
        end = data.draw(st.integers(position, len(events)), label="position")
        saved = data.draw(st.booleans(), label="saved")
        shop.work(events[commit:end], saved=saved)
        position = end if saved else commit
        if not saved:
            shop.work(events[commit : commit + 1])
            position = commit + 1
    shop.fold_all()
    assert compare(shop.tallies(), expected(events)) == []


@given(quiet, st.data())
def test_a_stalled_worker_that_sends_late_changes_nothing(
    events: list[Event], data: st.DataObject
) -> None:
    shop, stalled = Shop(), Shop()
    begin = data.draw(st.integers(0, len(events)), label="begin")
    end = data.draw(st.integers(begin, len(events)), label="end")
    for worker in (shop, stalled):
        worker.work(events[:begin])
    stalled.work(events[begin:end])
    for event in events[begin:]:
        shop.work([event])
    for partition, late in enumerate(stalled.topic):
        mine = shop.topic[partition]
        at = data.draw(st.integers(0, len(mine)), label="woken")
        mine[at:at] = late
    assert compare(shop.fold_all().tallies(), expected(events)) == []


@given(quiet, cuts, st.data())
def test_reading_the_topic_again_changes_nothing(
    events: list[Event], cuts: list[int], data: st.DataObject
) -> None:
    shop = after(events, cuts)
    stored = dict(shop.stored)
    partition = data.draw(st.integers(0, PARTITIONS - 1))
    begin = data.draw(st.integers(0, len(shop.topic[partition])))
    folded = shop.fold(partition, begin, len(shop.topic[partition]))
    assert (folded.applied, folded.touched) == (0, [])
    assert shop.stored == stored


@given(quiet, cuts, st.data())
def test_the_topic_may_be_read_in_any_batches(
    events: list[Event], cuts: list[int], data: st.DataObject
) -> None:
    shop = after(events, cuts)
    shop.stored.clear()
    for partition, records in enumerate(shop.topic):
        at = 0
        while at < len(records):
            end = data.draw(st.integers(at + 1, len(records)))
            shop.fold(partition, at, end)
            at = end
    assert compare(shop.tallies(), expected(events)) == []


@pytest.mark.parametrize("batches", [[[0, 1]], [[0], [1]]])
def test_what_lies_behind_is_left_out_however_it_is_read(batches: list[list[int]]) -> None:
    """An item that has a later offset of an origin takes no earlier one."""
    records = np.zeros(2, schema.PAIR_ENTRY)
    records["item"], records["neighbour"], records["weight"] = 1, [2, 3], 1.0
    records["offset"], records["t_ms"] = [5, 3], NOW_MS
    tallies = neighbours.unpack([None], [None], [None], TALLIES)
    for batch in batches:
        pairs = Pairs(records[batch], np.ones(len(batch), np.uint64), np.asarray(batch))
        neighbours.fold(tallies, np.zeros(len(batch), np.int64), pairs, TALLIES)
    assert neighbours.decode(neighbours.pack(tallies)[0], tallies.near[0]).near == {2: 1.0}
    assert tallies.watermarks == [{1: 6}]


def test_an_event_whose_pairs_fill_a_record_is_not_torn(monkeypatch: pytest.MonkeyPatch) -> None:
    events = in_topic([item_event(i % 2, NOW_MS + i) for i in range(40)])
    whole = after(events)
    monkeypatch.setattr(neighbours, "_RECORD_ENTRIES", 5)
    torn = after(events)
    assert sum(map(len, torn.topic)) > sum(map(len, whole.topic))
    assert torn.tallies() == whole.tallies()
    assert compare(torn.tallies(), expected(events)) == []


# --- bounds and bytes ----------------------------------------------------------------------


def test_beyond_the_bound_the_lightest_leave_and_no_weight_is_lost() -> None:
    chance = random.Random(3)
    events = in_topic([item_event(chance.randrange(6), NOW_MS + i) for i in range(200)])
    free, bounded = after(events), Shop(TallyLayout(most=2))
    bounded.work(events)
    bounded.fold_all()
    for item, got in bounded.tallies().items():
        full = free.tallies()[item]
        heaviest = sorted(full.near, key=lambda k: full.near[k], reverse=True)[:2]
        assert set(got.near) == set(heaviest)
        assert sum(got.near.values()) + got.other == pytest.approx(sum(full.near.values()))
        assert got.count == full.count


def test_counts_of_an_item_can_be_read_without_its_neighbours() -> None:
    shop = after(in_topic([item_event(i % 2, NOW_MS + i) for i in range(9)]))
    tally, near, _ = shop.stored[ITEM_KEYS[0]]
    assert neighbours.decode(tally).count == neighbours.decode(tally, near).count == 5
    assert neighbours.decode(None) is neighbours.NOTHING


def test_records_of_another_version_are_told() -> None:
    shop = Shop()
    shop.work(in_topic([item_event(0), item_event(1)]))
    (value,) = [v for part in shop.topic for v in part][:1]
    for bad in (None, b"", value[:-1], (2).to_bytes(8, "little") + value[8:]):
        assert neighbours.read_records([value, bad])[1] == 1


@pytest.mark.parametrize("name", ["half_life_s", "count", "other", "recent"])
def test_tallies_of_impossible_numbers_are_refused(name: str) -> None:
    tally, near, _ = next(iter(after(in_topic([item_event(0), item_event(1)])).stored.values()))
    for number in (np.nan, np.inf, *([0.0, -1.0] if name == "half_life_s" else [])):
        header = np.frombuffer(bytearray(tally), schema.TALLY_HEADER)
        header[name] = number
        with pytest.raises(StateCorrupt, match="impossible numbers"):
            neighbours.decode(header.tobytes(), near)
    entries = np.frombuffer(bytearray(near), schema.NEAR_ENTRY)
    entries["weight"] = np.nan
    with pytest.raises(StateCorrupt, match="impossible numbers"):
        neighbours.decode(tally, entries.tobytes())


def test_tallies_that_are_none_are_refused() -> None:
    tally, near, _ = next(iter(after(in_topic([item_event(0), item_event(1)])).stored.values()))
    newer = (schema.SCHEMA_VERSION + 1).to_bytes(2, "little") + tally[2:]
    for head, entries, error in [
        (newer, near, SchemaTooNew),
        (tally, near[:-1], StateCorrupt),
        (tally[:-1], near, StateCorrupt),
    ]:
        with pytest.raises(error):
            neighbours.decode(head, entries)
        with pytest.raises(error):
            neighbours.unpack([head], [entries], [None], TALLIES)
