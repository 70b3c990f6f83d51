from __future__ import annotations

from dataclasses import dataclass, field

from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from stream.offsets import OffsetTracker

HERE, THERE = ("events", 0), ("events", 1)


def test_slices_may_finish_in_any_order_but_only_the_contiguous_ones_count() -> None:
    tracker = OffsetTracker()
    for end in (10, 20, 30):
        tracker.handed_out(HERE, end)
        tracker.begun(HERE, end)
    tracker.finished(HERE, 30)
    tracker.finished(HERE, 20)
    assert tracker.committable() == {}
    tracker.finished(HERE, 10)
    assert tracker.committable() == {HERE: 30}


def test_a_position_is_where_the_partition_was_taken_up_until_something_is_finished() -> None:
    tracker = OffsetTracker()
    tracker.starts(HERE, 5)
    tracker.handed_out(HERE, 10)
    tracker.handed_out(THERE, 10)
    assert tracker.positions() == {HERE: 5}
    tracker.finished(HERE, 10)
    tracker.finished(THERE, 10)
    assert tracker.positions() == {HERE: 10, THERE: 10}
    tracker.starts(THERE, 10)
    tracker.forget({HERE, THERE})
    assert tracker.positions() == {}


def test_an_offset_is_offered_once_unless_the_broker_did_not_take_it() -> None:
    tracker = OffsetTracker()
    tracker.handed_out(HERE, 10)
    tracker.finished(HERE, 10)
    tracker.committed(tracker.committable())
    assert tracker.committable() == {}
    tracker.answered({}, {HERE: 10})
    assert tracker.committable() == {HERE: 10}
    tracker.committed(tracker.committable())
    tracker.answered({HERE: 10}, {})
    assert tracker.committable() == {}


def test_an_offset_waits_for_the_answer_to_the_one_before_unless_it_is_the_last() -> None:
    tracker = OffsetTracker()
    for end in (10, 20):
        tracker.handed_out(HERE, end)
        tracker.finished(HERE, end)
        tracker.committed(tracker.committable())
    assert tracker.committable() == {}
    tracker.answered({HERE: 10}, {})
    assert tracker.committable() == {HERE: 20}

    tracker.committed({HERE: 20})
    tracker.handed_out(HERE, 30)
    tracker.finished(HERE, 30)
    tracker.wait_no_longer({THERE})
    assert tracker.committable() == {}
    tracker.wait_no_longer({HERE})
    assert tracker.committable() == {HERE: 30}
    tracker.committed({HERE: 30})
    tracker.answered({}, {HERE: 20})  # late, and of no interest any more
    tracker.answered({HERE: 30}, {})
    assert tracker.committable() == {}


def test_nothing_behind_a_slice_that_was_never_begun_is_committable() -> None:
    tracker = OffsetTracker()
    tracker.handed_out(HERE, 10)
    tracker.handed_out(HERE, 20)
    tracker.begun(HERE, 20)
    tracker.finished(HERE, 20)
    assert tracker.committable() == {}


def test_only_what_is_begun_and_not_finished_is_in_hand() -> None:
    tracker = OffsetTracker()
    for place in (HERE, THERE):
        tracker.handed_out(place, 10)
        tracker.handed_out(place, 20)
        tracker.begun(place, 10)
    assert (tracker.in_hand(), tracker.in_hand({HERE})) == (2, 1)
    tracker.finished(HERE, 10)
    assert (tracker.in_hand(), tracker.in_hand({HERE})) == (1, 0)


def test_what_was_forgotten_is_neither_committable_nor_in_hand_when_it_ends() -> None:
    tracker = OffsetTracker()
    tracker.handed_out(HERE, 10)
    tracker.begun(HERE, 10)
    tracker.forget({HERE})
    tracker.finished(HERE, 10)
    assert tracker.committable() == {}
    assert tracker.in_hand() == 0


@dataclass
class _Partition:
    """What really happened to the slices of one assignment."""

    ends: list[int] = field(default_factory=list)
    begun: set[int] = field(default_factory=set)
    saved: set[int] = field(default_factory=set)
    on_record: int = 0  # what the broker took last
    sent: list[int] = field(default_factory=list)  # and not answered

    @property
    def first_unsaved(self) -> int:
        start = 0
        for end in self.ends:
            if end not in self.saved:
                return start
            start = end
        return start


class AnyInterleaving(RuleBasedStateMachine):
    """Whatever happens in whatever order, no commit passes a record that is not saved, and in the
    end everything saved without a gap is committed."""

    places = st.sampled_from([HERE, THERE])

    def __init__(self) -> None:
        super().__init__()
        self.tracker = OffsetTracker()
        self.truth = {HERE: _Partition(), THERE: _Partition()}

    @rule(place=places, size=st.integers(1, 3))
    def hand_out(self, place: tuple[str, int], size: int) -> None:
        truth = self.truth[place]
        truth.ends.append((truth.ends[-1] if truth.ends else 0) + size)
        self.tracker.handed_out(place, truth.ends[-1])

    @rule(place=places, pick=st.integers(0, 5))
    def begin(self, place: tuple[str, int], pick: int) -> None:
        truth = self.truth[place]
        if waiting := [end for end in truth.ends if end not in truth.begun]:
            end = waiting[pick % len(waiting)]
            truth.begun.add(end)
            self.tracker.begun(place, end)

    @rule(place=places, pick=st.integers(0, 5))
    def save(self, place: tuple[str, int], pick: int) -> None:
        truth = self.truth[place]
        if unsaved := sorted(truth.begun - truth.saved):
            end = unsaved[pick % len(unsaved)]
            truth.saved.add(end)
            self.tracker.finished(place, end)

    @rule()
    def commit(self) -> None:
        offsets = self.tracker.committable()
        self.tracker.committed(offsets)
        for place, offset in offsets.items():
            assert offset <= self.truth[place].first_unsaved
            self.truth[place].sent.append(offset)

    @rule(place=places, taken=st.booleans(), pick=st.integers(0, 5))
    def answer(self, place: tuple[str, int], taken: bool, pick: int) -> None:
        """What was sent earlier may come later."""
        truth = self.truth[place]
        if truth.sent:
            offset = truth.sent.pop(pick % len(truth.sent))
            if taken:
                truth.on_record = offset
            self.tracker.answered(*({place: offset}, {})[:: 1 if taken else -1])

    @rule(place=places)
    def lose_the_partition(self, place: tuple[str, int]) -> None:
        self.tracker.forget({place})
        self.truth[place] = _Partition()

    @rule(place=places, offset=st.integers(1, 9))
    def a_slice_of_a_lost_assignment_ends(self, place: tuple[str, int], offset: int) -> None:
        if offset not in self.truth[place].ends:
            self.tracker.begun(place, offset)
            self.tracker.finished(place, offset)

    @invariant()
    def in_hand_is_what_is_begun_and_unsaved(self) -> None:
        for place, truth in self.truth.items():
            assert self.tracker.in_hand({place}) == len(truth.begun - truth.saved)

    def teardown(self) -> None:
        for place, truth in self.truth.items():
            while truth.sent:
                self.answer(place, taken=True, pick=len(truth.sent) - 1)  # the earliest last
        self.commit()
        for truth in self.truth.values():
            on_record = truth.sent[-1] if truth.sent else truth.on_record
            assert on_record == truth.first_unsaved


TestAnyInterleaving = AnyInterleaving.TestCase


def test_where_it_resumes_is_committed_though_nothing_follows() -> None:
    tracker = OffsetTracker()
    tracker.handed_out(("events", 0), 30)
    tracker.finished(("events", 0), 30)
    tracker.forget({("events", 0)})
    tracker.resumes(("events", 0), 20)
    assert tracker.committable() == {("events", 0): 20}
    tracker.committed({("events", 0): 20})
    assert tracker.committable() == {}
