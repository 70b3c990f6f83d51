"""What must hold of profiles whatever happens: which events, in which batches, in which order,
how often."""

from __future__ import annotations

import itertools
import json
import random
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import assume, example, given
from hypothesis import strategies as st

from profiles import Profile, ProfilesError, StateCorrupt, arithmetic
from profiles.arithmetic import Layout, Profiles
from profiles.fates import ERASED, FORGOTTEN, REPLAYED
from profiles.schema import MAX_PENDING, OWN_ENTRY, SCHEMA_VERSION, WINDOW_ENTRY
from tests import oracle
from tests.oracle import FORGET, Event
from tests.profile_events import (
    DIMENSIONS,
    ITEM_KEYS,
    LAYOUT,
    NOW_MS,
    RULES,
    SOURCES,
    SPACE,
    VECTOR_OF,
    YEAR_1990_MS,
    YEAR_2100_MS,
    Shelf,
    after,
    any_time,
    columns,
    event_key,
    histories,
    in_topic,
    item_event,
    one_day,
)

cuts = st.lists(st.integers(0, 25), max_size=4)


def split(cuts: Sequence[int], events: Sequence[Event]) -> list[int]:
    return [min(cut, len(events)) for cut in cuts]


def assert_same(got: Profile, want: Profile, *, arrival: bool = True) -> None:
    """Equal up to float32 rounding; `arrival`: also in what remembers the order of arrival."""
    for name in ("events", "counts", "foreign_purchases", "first_ms", "updated_ms", "space"):
        assert getattr(got, name) == getattr(want, name), name
    assert (got.pending, got.pending_lost) == (want.pending, want.pending_lost)
    assert got.window.tobytes() == want.window.tobytes()
    if arrival:
        assert got.watermark == want.watermark
        assert got.seen.tolist() == want.seen.tolist()
    assert got.spend == pytest.approx(want.spend)
    np.testing.assert_allclose(got.masses, want.masses, rtol=1e-5, atol=1e-30)
    tolerance = 1e-5 * np.maximum(got.masses, want.masses).astype(float) + 1e-30  # (K,)
    assert (np.abs(got.sums - want.sums) <= tolerance[:, None]).all()
    assert got.categories.keys() == want.categories.keys()
    for key, mass in want.categories.items():
        assert got.categories[key] == pytest.approx(mass, rel=1e-5, abs=tolerance[-1])
    assert got.own.keys() == want.own.keys()
    # Fewer than 25 events, none heavier than 100.
    for key, mass in want.own.items():
        assert got.own[key] == pytest.approx(mass, rel=1e-5, abs=0.0025)


# --- the oracle ----------------------------------------------------------------------------


@given(histories(), cuts)
def test_every_field_is_what_plain_python_computes(events: list[Event], cuts: list[int]) -> None:
    got = after(events, cuts=split(cuts, events))
    want = oracle.fold(events, RULES)
    assert got.keys() == want.keys()
    for user_id in want:
        assert oracle.compare(got[user_id], want[user_id], rtol=1e-5) == []


@given(histories(forgets=False, ids=False, min_size=1), st.data())
def test_the_oracle_tells_a_lost_event(events: list[Event], data: st.DataObject) -> None:
    lost = data.draw(st.integers(0, len(events) - 1))
    user_id = events[lost].user_id
    got = after(events[:lost] + events[lost + 1 :])
    want = oracle.fold(events, RULES)[user_id]
    assert user_id not in got or oracle.compare(got[user_id], want, rtol=1e-5) != []


# --- once ----------------------------------------------------------------------------------


@given(histories(), st.data())
def test_replaying_what_is_in_changes_no_byte(events: list[Event], data: st.DataObject) -> None:
    shelf = Shelf()
    shelf.fold(events)
    states, fences = dict(shelf.states), dict(shelf.fences)
    replayed = data.draw(st.lists(st.sampled_from(events), max_size=40) if events else st.just([]))
    folded = shelf.fold(replayed)
    assert (shelf.states, shelf.fences) == (states, fences)
    assert (len(folded.applied), folded.touched, folded.count(REPLAYED)) == (0, [], len(replayed))


@given(histories(), st.data())
def test_falling_back_in_the_topic_counts_each_event_once(
    events: list[Event], data: st.DataObject
) -> None:
    """A worker that dies folds again from its last commit on."""
    shelf, position = Shelf(), 0
    while position < len(events):
        commit = data.draw(st.integers(max(0, position - 6), position), label="commit")
        position = data.draw(st.integers(position + 1, len(events)), label="position")
        shelf.fold(events[commit:position])
    for user_id, want in after(events).items():
        assert_same(shelf.profile(user_id), want)


@given(histories(), cuts)
def test_any_cut_into_batches_gives_the_same_profiles(events: list[Event], cuts: list[int]) -> None:
    whole = after(events)
    for user_id, got in after(events, cuts=split(cuts, events)).items():
        assert_same(got, whole[user_id])


@given(histories(forgets=False, ids=False), st.randoms(use_true_random=False), cuts)
def test_order_does_not_matter(
    events: list[Event], shuffler: random.Random, cuts: list[int]
) -> None:
    shuffled = list(events)
    shuffler.shuffle(shuffled)
    want = after(events)
    for user_id, got in after(in_topic(shuffled), cuts=split(cuts, events)).items():
        assert_same(got, want[user_id], arrival=False)


def test_events_of_one_millisecond_lie_in_one_order_however_they_come() -> None:
    events = [item_event(i, weight=w) for i in range(3) for w in (1.0, -0.4)]
    want = after(in_topic(events))["u"].window.tobytes()
    for order in itertools.permutations(events[:5]):
        arrived = in_topic([*order, events[5]])
        for cuts in ([], [3]):
            assert after(arrived, cuts=cuts)["u"].window.tobytes() == want


@given(st.lists(st.sampled_from("abcdef"), max_size=20), cuts)
def test_a_repeated_event_id_counts_once_while_it_is_remembered(
    ids: list[str], cuts: list[int]
) -> None:
    events = in_topic(replace(item_event(0), event_key=event_key(i)) for i in ids)
    remembered: list[str] = []
    counted = 0
    for event_id in ids:
        if event_id not in remembered:
            counted += 1
            remembered = [*remembered, event_id][-LAYOUT.seen :]
    for profile in after(events, cuts=split(cuts, events)).values():
        assert profile.events == profile.counts["view"] == counted
        assert profile.masses[-1] == pytest.approx(counted)


def test_with_no_ids_remembered_repeats_count() -> None:
    events = in_topic([replace(item_event(0), event_key=event_key("a"))] * 3)
    assert after(events, replace(LAYOUT, seen=0))["u"].events == 3


# --- decay ---------------------------------------------------------------------------------


def _tick(t_ms: int) -> Event:
    """Moves the clock of a profile, and adds nothing."""
    return item_event(0, t_ms, weight=0.0, type="impression")


@given(st.integers(0, 10**9), st.integers(0, 10**9))
def test_decaying_by_a_then_b_equals_decaying_by_both(a_ms: int, b_ms: int) -> None:
    start = [item_event(i, NOW_MS - 60_000 * i) for i in range(len(ITEM_KEYS))]
    steps = in_topic([*start, _tick(NOW_MS + a_ms), _tick(NOW_MS + a_ms + b_ms)])
    by_steps, at_once = Shelf(), Shelf()
    for event in steps:
        by_steps.fold([event])
    at_once.fold(steps[:-2])
    at_once.fold(steps[-2:])
    got, want = by_steps.profile("u"), at_once.profile("u")
    assert_same(got, want)
    ages_ms = a_ms + b_ms + 60_000 * np.arange(len(ITEM_KEYS))
    masses = np.exp2(-ages_ms[:, None] / LAYOUT.half_lives_ms).sum(axis=0)  # (K,)
    np.testing.assert_allclose(got.masses, masses, rtol=1e-5, atol=1e-37)


@given(one_day, st.floats(0.1, 20.0))
def test_after_a_half_life_half_is_left(t_ms: int, weight: float) -> None:
    for k, half_life_s in enumerate(LAYOUT.half_lives_s):
        later = t_ms + int(half_life_s * 1000)
        profile = after(in_topic([item_event(0, t_ms, weight), _tick(later)]))["u"]
        assert profile.masses[k] == pytest.approx(weight / 2, rel=1e-6)
        np.testing.assert_allclose(
            profile.sums[k], weight / 2 * VECTOR_OF[ITEM_KEYS[0]], rtol=1e-5, atol=1e-8
        )


# --- own items -----------------------------------------------------------------------------


@given(one_day, st.floats(0.1, 20.0))
def test_own_items_fade_three_times_as_slowly_as_the_longest_interest(
    t_ms: int, weight: float
) -> None:
    later = t_ms + int(3000 * LAYOUT.half_lives_s[-1])
    profile = after(in_topic([item_event(0, t_ms, weight), _tick(later)]))["u"]
    assert profile.own == {ITEM_KEYS[0]: pytest.approx(weight / 2, rel=1e-6)}


def test_the_lightest_own_items_are_forgotten_however_much_they_were_disliked() -> None:
    weights = [1.0, -3.0, 0.5, 2.0]
    layout = replace(LAYOUT, own_items=2)
    events = in_topic(item_event(i, NOW_MS, weight) for i, weight in enumerate(weights))
    assert after(events, layout)["u"].own == {ITEM_KEYS[1]: -3.0, ITEM_KEYS[3]: 2.0}
    assert after(events, replace(LAYOUT, own_items=0))["u"].own == {}


def test_an_own_item_counts_before_its_text_is_known_and_once() -> None:
    shelf = Shelf()
    shelf.fold(in_topic([replace(item_event(0), vector=None)]))
    assert shelf.profile("u").own == {ITEM_KEYS[0]: 1.0}
    shelf.resolve(ITEM_KEYS)
    assert shelf.profile("u").own == {ITEM_KEYS[0]: 1.0}


@given(histories(), st.integers(0, 25))
def test_a_profile_of_version_1_begins_with_the_own_items_of_its_window(
    events: list[Event], cut: int
) -> None:
    shelf = Shelf()
    shelf.fold(events[:cut])
    shelf.states = {user: as_version_1(state) for user, state in shelf.states.items()}
    for profile in shelf.profiles().values():
        assert profile.own == arithmetic.own_of(
            profile.window, profile.updated_ms, LAYOUT.half_lives_s, LAYOUT.own_items
        )
    shelf.fold(events[cut:])
    want = after(events, cuts=[min(cut, len(events))])
    for user, profile in shelf.profiles().items():
        if profile.events <= LAYOUT.window:
            assert_same(profile, want[user])


def as_version_1(state: bytes) -> bytes:
    """The same profile as the first version wrote it, which kept no own items."""
    size = LAYOUT.header.itemsize
    header = np.frombuffer(bytearray(state[:size]), LAYOUT.header)
    own_n, pending_n = int(header["own_n"][0]), int(header["pending_n"][0])
    header["version"], header["own_n"] = 1, 0
    end = len(state) - pending_n * WINDOW_ENTRY.itemsize
    return header.tobytes() + state[size : end - own_n * OWN_ENTRY.itemsize] + state[end:]


# --- hostile input -------------------------------------------------------------------------


@given(
    st.lists(
        st.tuples(st.integers(0, 5), any_time, st.floats(-100, 100, width=32)),
        min_size=1,
        max_size=40,
    ),
    cuts,
)
@example([(0, YEAR_2100_MS, 100.0), (1, YEAR_1990_MS, 100.0)], [1])
@example([(0, YEAR_1990_MS, 100.0), (1, YEAR_2100_MS, 1e-30)], [1])
def test_sums_are_finite_and_no_longer_than_their_mass(
    drawn: list[tuple[int, int, float]], cuts: list[int]
) -> None:
    events = in_topic(item_event(item, t_ms, weight) for item, t_ms, weight in drawn)
    profile = after(events, cuts=split(cuts, events))["u"]
    assert np.isfinite(profile.sums).all()
    assert np.isfinite(profile.masses).all()
    norms = np.linalg.norm(profile.sums.astype(np.float64), axis=1)  # (K,)
    assert (norms <= profile.masses * (1 + 1e-5) + 1e-30).all()
    assert (profile.masses <= sum(abs(w) for *_, w in drawn) * (1 + 1e-5)).all()
    for k in range(len(LAYOUT.half_lives_s)):
        length = np.linalg.norm(profile.interest(k))
        assert length == 0 or length == pytest.approx(1, rel=1e-5)


def test_ten_thousand_events_of_one_shopper_in_one_slice() -> None:
    rng = random.Random(3)
    events = in_topic(
        replace(
            item_event(
                rng.randrange(6), NOW_MS - rng.randrange(10**9), rng.choice([-100, 0.2, 100])
            ),
            event_key=event_key(str(rng.randrange(9_000))),
        )
        for _ in range(10_000)
    )
    got, want = after(events)["u"], oracle.fold(events, RULES)["u"]
    assert oracle.compare(got, want, rtol=1e-4) == []
    assert_same(after(events, cuts=range(0, 10_000, 997))["u"], got)


def test_a_slice_of_one_shoppers_forgets_is_no_burden() -> None:
    events = in_topic([item_event(0), Event("u", 0, 0, None, NOW_MS, FORGET)] * 5_000)
    shelf = Shelf()
    folded = shelf.fold(events)
    assert (folded.count(FORGOTTEN), folded.count(ERASED), len(folded.applied)) == (5_000, 5_000, 0)
    assert shelf.profile("u").events == 0


# --- forget --------------------------------------------------------------------------------


@given(histories(min_size=1), histories(forgets=False), cuts)
def test_forget_leaves_the_watermark_and_nothing_else(
    before: list[Event], later: list[Event], cuts: list[int]
) -> None:
    users = {event.user_id for event in before}
    forgets = [Event(user_id, 0, 0, None, NOW_MS, FORGET) for user_id in sorted(users)]
    erased = in_topic([*before, *forgets])
    blank = Shelf()
    blank.save(["nobody"], blank.load(["nobody"]))
    shelf = Shelf()
    shelf.fold(erased)
    for user_id in users:
        assert shelf.states[user_id] == blank.states["nobody"]
        last = max(event.offset for event in erased if event.user_id == user_id)
        assert shelf.profile(user_id).watermark == {SOURCES[0]: last + 1}
    everything = in_topic([*erased, *later])
    anew = after(in_topic(later))
    for user_id, got in after(everything, cuts=split(cuts, everything)).items():
        if user_id in anew:
            want = replace(anew[user_id], watermark=got.watermark)
            assert_same(got, want)


def test_the_repeat_of_a_forget_does_not_erase_what_came_in_between() -> None:
    forget = Event("u", 0, 0, b"forget-1", NOW_MS, FORGET)
    events = in_topic([item_event(0), forget, item_event(1), forget])
    for cut in ([], [1], [2], [3], [1, 2, 3]):
        assert after(events, cuts=cut)["u"].events == 1


# --- pending -------------------------------------------------------------------------------


@given(
    histories(forgets=False, unknown_items=False),
    st.sets(st.integers(0, 5)),
    st.integers(0, 25),
    cuts,
)
def test_events_before_their_items_text_count_as_if_it_had_been_there(
    events: list[Event], late_items: set[int], arrival: int, cuts: list[int]
) -> None:
    late = {ITEM_KEYS[item] for item in late_items}
    arrival = min(arrival, len(events))
    shelf = Shelf()
    for i, event in enumerate(events):
        if i == arrival:
            shelf.resolve(late)
        unknown = i < arrival and event.item_key in late
        shelf.fold([replace(event, vector=None)] if unknown else [event])
    shelf.resolve(late)
    for user_id, want in after(events, cuts=split(cuts, events)).items():
        assert_same(shelf.profile(user_id), want)


def test_items_may_arrive_one_by_one_and_in_any_order() -> None:
    events = in_topic(item_event(i % 6, NOW_MS + i * 1000) for i in range(24))
    for order in (ITEM_KEYS, ITEM_KEYS[::-1]):
        shelf = Shelf()
        shelf.fold([replace(event, vector=None) for event in events])
        assert shelf.profile("u").space == ""
        assert [shelf.resolve([key]) for key in order] == [4] * 6
        assert_same(shelf.profile("u"), after(events)["u"])


def test_beyond_the_bound_the_earliest_waiting_events_are_lost_and_counted() -> None:
    events = in_topic(
        replace(item_event(i % 2, NOW_MS + i), vector=None) for i in range(MAX_PENDING + 10)
    )
    for cuts in ([], [100, 260]):
        profile = after(events, cuts=cuts)["u"]
        assert (profile.pending, profile.pending_lost) == (MAX_PENDING, 10)
    shelf = Shelf()
    shelf.fold(events)
    shelf.resolve(ITEM_KEYS)
    assert shelf.profile("u").masses[-1] == pytest.approx(MAX_PENDING, rel=1e-4)


# --- merge ---------------------------------------------------------------------------------


def _of_one(events: Sequence[Event], source: int) -> list[Event]:
    return [replace(event, user_id="u", source=source, offset=i) for i, event in enumerate(events)]


def _profiles(events: Sequence[Event]) -> Profiles:
    shelf = Shelf()
    if events:
        shelf.fold(events)
    return shelf.load(["u"])


def _profile(profiles: Profiles) -> Profile:
    shelf = Shelf()
    shelf.save(["u"], profiles)
    return shelf.profile("u")


parts = histories(forgets=False, ids=False)


@given(parts, parts)
def test_merging_two_profiles_equals_folding_all_events(
    left: list[Event], right: list[Event]
) -> None:
    left, right = _of_one(left, SOURCES[0]), _of_one(right, SOURCES[1])
    merged = arithmetic.merge(_profiles(left), _profiles(right), LAYOUT)
    assert_same(_profile(merged), _profile(_profiles(left + right)))


@given(parts, parts, parts)
def test_merging_is_commutative_and_associative(
    one: list[Event], two: list[Event], three: list[Event]
) -> None:
    a, b, c = (
        _profiles(_of_one(events, source))
        for events, source in zip([one, two, three], SOURCES, strict=True)
    )
    ab_c = arithmetic.merge(arithmetic.merge(a, b, LAYOUT), c, LAYOUT)
    a_bc = arithmetic.merge(a, arithmetic.merge(b, c, LAYOUT), LAYOUT)
    assert_same(_profile(ab_c), _profile(a_bc))
    assert_same(_profile(arithmetic.merge(a, b, LAYOUT)), _profile(arithmetic.merge(b, a, LAYOUT)))


def test_merging_leaves_both_as_they_were() -> None:
    a = _profiles(_of_one(in_topic([item_event(0)]), SOURCES[0]))
    b = _profiles(_of_one(in_topic([item_event(1, NOW_MS + 10**8)]), SOURCES[1]))
    before = (_profile(a), _profile(b))
    arithmetic.merge(a, b, LAYOUT)
    assert_same(_profile(a), before[0])
    assert_same(_profile(b), before[1])


# --- categories ----------------------------------------------------------------------------


@given(
    st.lists(st.tuples(st.integers(1, 9), one_day, st.sampled_from([-1.0, 0.3, 2.0])), max_size=25),
    cuts,
)
@example([(i, NOW_MS, 2.0) for i in range(1, 6)] + [(1, NOW_MS + 30 * 86_400_000, 2.0)], [5])
def test_the_tally_of_categories_keeps_all_mass_beyond_its_bound(
    drawn: list[tuple[int, int, float]], cuts: list[int]
) -> None:
    events = in_topic(
        replace(item_event(0, t_ms, weight), category_key=category)
        for category, t_ms, weight in drawn
    )
    layout = replace(LAYOUT, categories=3)
    for profile in after(events, layout, split(cuts, events)).values():
        assert len(profile.categories) <= 3
        total = sum(profile.categories.values()) + profile.other_categories
        age_ms = np.array([profile.updated_ms - t_ms for _, t_ms, _ in drawn])
        mass = np.array([w for *_, w in drawn]) * np.exp2(-age_ms / LAYOUT.half_lives_ms[-1])
        assert total == pytest.approx(mass.sum(), rel=1e-5, abs=1e-5 * np.abs(mass).sum())


def test_the_heaviest_categories_stay() -> None:
    events = in_topic(
        replace(item_event(0, weight=weight), category_key=category)
        for category, weight in [(1, 1.0), (2, 5.0), (3, -3.0), (4, 0.5)]
    )
    profile = after(events, replace(LAYOUT, categories=2))["u"]
    assert profile.categories == {2: 5.0, 3: -3.0}
    assert profile.other_categories == 1.5


# --- bytes ---------------------------------------------------------------------------------


@given(histories())
def test_bytes_give_the_profile_and_the_profile_its_bytes(events: list[Event]) -> None:
    shelf = Shelf()
    shelf.fold(events)
    users = sorted(shelf.states)
    again = Shelf()
    again.save(users, shelf.load(users))
    assert (again.states, again.fences) == (shelf.states, shelf.fences)


@given(
    st.integers(0, 2**64 - 1),
    st.integers(0, 2**64 - 1),
    st.integers(0, 2**62),
    st.dictionaries(st.integers(0, 2**64 - 1), st.integers(0, 2**62), max_size=5),
)
def test_a_fence_gives_back_what_it_was_made_of(
    revision: int, writer: int, expires_s: int, watermark: dict[int, int]
) -> None:
    fence = arithmetic.write_fence(revision, writer, expires_s, watermark)
    assert arithmetic.read_fence(fence) == (revision, writer, expires_s, watermark)


@given(histories(min_size=1), st.data())
def test_bytes_cut_short_or_too_long_are_corrupt(events: list[Event], data: st.DataObject) -> None:
    shelf = Shelf()
    shelf.fold(events)
    user_id = sorted(shelf.states)[0]
    state, fence = shelf.states[user_id], shelf.fences[user_id]
    short = state[: data.draw(st.integers(0, len(state) - 1))]
    # The entries of a watermark are cut at their edges by no accident of storage.
    torn = fence[
        : data.draw(st.integers(1, len(fence) - 1).filter(lambda n: n < 24 or n % 16 != 8))
    ]
    for bad_state, bad_fence in [(short, fence), (state + b"\0", fence), (state, torn)]:
        with pytest.raises(StateCorrupt):
            arithmetic.unpack([state, bad_state], [fence, bad_fence], LAYOUT)
        with pytest.raises(StateCorrupt, match=user_id):
            arithmetic.decode(user_id, bad_state, bad_fence)


@given(st.binary(max_size=400), st.binary(max_size=60))
@example(b"\1\0\xff\xff\xff\xff" + bytes(300), b"")  # 16 GB of sums, to believe it
@example(b"\1\0\4\0\0\0" + bytes(300), b"")
@example(b"\x63\0\xff\xff\xff\xff", b"")
def test_arbitrary_bytes_raise_only_profile_errors(state: bytes, fence: bytes) -> None:
    for read in (
        lambda: arithmetic.decode("u", state, fence),
        lambda: arithmetic.unpack([state], [fence], LAYOUT),
    ):
        with pytest.raises(ProfilesError):
            read()


@given(histories(min_size=1), st.data())
def test_flipped_bytes_raise_only_profile_errors(events: list[Event], data: st.DataObject) -> None:
    shelf = Shelf()
    shelf.fold(events)
    user_id = sorted(shelf.states)[0]
    state = bytearray(shelf.states[user_id])
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.integers(0, min(len(state), 24 + 4 * 3) - 1))
        state[at] = data.draw(st.integers(0, 255))
    try:
        profile = arithmetic.decode(user_id, bytes(state), shelf.fences[user_id])
    except ProfilesError:
        return
    assert profile.sums.shape == (len(profile.half_lives_s), DIMENSIONS)


# --- glance --------------------------------------------------------------------------------


@given(histories(min_size=1), st.text(max_size=12))
def test_a_glance_is_json_and_agrees_with_the_profile(events: list[Event], name: str) -> None:
    shelf = Shelf()
    shelf.fold(events)
    users = sorted(shelf.states)
    names = {key: f"{name} {key:016x}" for key in oracle_categories(events)}
    for user_id, text in zip(users, arithmetic.glances(shelf.load(users), names), strict=True):
        glance, profile = json.loads(text), shelf.profile(user_id)
        assert (glance["v"], glance["updated_ms"]) == (SCHEMA_VERSION, profile.updated_ms)
        assert (glance["events"], glance["counts"]) == (profile.events, profile.counts)
        assert glance["spend"] == pytest.approx(profile.spend, abs=0.0051)
        liked = sorted((-m, key) for key, m in profile.categories.items() if m > 0)[:5]
        assert list(glance["categories"]) == [names[key] for _, key in liked]
        assert list(glance["categories"].values()) == pytest.approx(
            [-m for m, _ in liked], abs=0.00051
        )


def oracle_categories(events: Sequence[Event]) -> set[int]:
    return {event.category_key for event in events}


# --- several interests ---------------------------------------------------------------------


@given(st.lists(st.tuples(st.integers(0, 5), st.floats(-2, 2, width=32)), max_size=20), st.data())
def test_interests_are_unit_and_keep_the_liked_mass(
    drawn: list[tuple[int, float]], data: st.DataObject
) -> None:
    count = data.draw(st.integers(1, 5))
    vectors = np.array([VECTOR_OF[ITEM_KEYS[i]] for i, _ in drawn], dtype=np.float32)
    weights = np.array([w for _, w in drawn], dtype=np.float32)
    centroids, masses = arithmetic.interests(vectors.reshape(-1, DIMENSIONS), weights, count)
    liked = weights[weights > 0]
    assert len(centroids) == len(masses) == min(count, len(liked))
    assert masses.sum() == pytest.approx(liked.sum(), rel=1e-4)
    assert (np.diff(masses) <= 0).all()
    np.testing.assert_allclose(np.linalg.norm(centroids, axis=1), 1, rtol=1e-5)


def test_two_tastes_are_told_apart() -> None:
    east, north = np.eye(DIMENSIONS, dtype=np.float32)[:2]
    vectors = np.stack([east, north, east, east, north])
    weights = np.array([1, 1, 1, 1, 0.5], dtype=np.float32)
    centroids, masses = arithmetic.interests(vectors, weights, 2)
    np.testing.assert_allclose(centroids, [east, north])
    np.testing.assert_allclose(masses, [3, 1.5])


# --- an empty batch ------------------------------------------------------------------------


def test_no_events_and_no_users_are_no_special_case() -> None:
    profiles = arithmetic.unpack([], [], LAYOUT)
    folded = arithmetic.fold(profiles, columns([], []), LAYOUT, SPACE)
    assert (len(folded.applied), folded.touched) == (0, [])
    assert arithmetic.pack(profiles) == []
    assert arithmetic.glances(profiles, {}) == []
    assert arithmetic.resolve_pending(profiles, {}, {}, LAYOUT, SPACE) == 0


@given(histories())
def test_a_layout_with_one_scale_and_many_dimensions_is_no_special_case(
    events: list[Event],
) -> None:
    assume(all(event.type != FORGET for event in events))
    layout = Layout(DIMENSIONS, (86_400.0,), window=1, seen=4, categories=8)
    rules = oracle.Rules(layout.half_lives_s, layout.window, layout.seen, layout.categories)
    got, want = after(events, layout), oracle.fold(events, rules)
    for user_id in want:
        assert oracle.compare(got[user_id], want[user_id], rtol=1e-5) == []
