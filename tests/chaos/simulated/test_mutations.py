"""The simulation can fail: each of these mistakes, planted into the code, is found.

A mistake is planted under the code that runs, never in the simulation. How many seeds each took
is told with `-rP`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import Any

import pytest

import stream.updater
from profiles import arithmetic, schema
from profiles.errors import RedisUnavailable
from profiles.marks import Marks
from profiles.store import FoldedHere, ProfileStore
from stream.intake import Intake, MicroBatch
from stream.offsets import OffsetTracker, TopicPartition
from stream.updater import Started, Updater
from stream.updater_app import Pipeline
from tests.chaos.simulated.world import play

# A plant that no longer fits the code raises one of these, which is no mistake found.
MISFITS = ("TypeError", "AttributeError", "AssertionError", "NameError")
WITHIN = 400  # seeds; most are found by the third, what needs a rare failover by the two hundredth

Patch = pytest.MonkeyPatch


def commit_before_save(patch: Patch) -> None:
    begin = Intake.begin

    def begun(intake: Intake, batch: MicroBatch) -> MicroBatch:
        current = begin(intake, batch)
        for piece in current.slices:
            intake._tracker.finished((piece.topic, piece.partition), piece.next_offset)
        return current

    patch.setattr(Intake, "begin", begun)


def tracker_off_by_one(patch: Patch) -> None:
    committable = OffsetTracker.committable

    def ahead(tracker: OffsetTracker) -> Mapping[TopicPartition, int]:
        return {place: offset + 1 for place, offset in committable(tracker).items()}

    patch.setattr(OffsetTracker, "committable", ahead)


def tracker_skips_a_gap(patch: Patch) -> None:
    def finished(tracker: OffsetTracker, place: TopicPartition, next_offset: int) -> None:
        for run in tracker._run(place, next_offset):
            run.done = True
        tracker._finished[place] = next_offset

    def handed_out(tracker: OffsetTracker, place: TopicPartition, next_offset: int) -> None:
        finished(tracker, place, next_offset)

    patch.setattr(OffsetTracker, "finished", finished)
    patch.setattr(OffsetTracker, "handed_out", handed_out)


def _in_scripts(patch: Patch, old: str, new: str) -> None:
    changed = 0
    for name, script in vars(schema).copy().items():
        if name.endswith("_SCRIPT") and old in script:
            patch.setattr(schema, name, script.replace(old, new))
            changed += 1
    assert changed


def no_fence(patch: Patch) -> None:
    _in_scripts(patch, "if stored == ARGV[at] then", "if true then")


def zombies_pass_the_fence(patch: Patch) -> None:
    # A fence is revision (8 bytes), writer (8, whose upper half is the process'), expiry.
    other = "string.sub(stored, 13, 16) ~= string.sub(ARGV[at + 1], 13, 16)"
    _in_scripts(
        patch,
        "if stored == ARGV[at] then",
        f"if stored == ARGV[at] or stored ~= '' and {other} then",
    )


def a_refused_save_counts(patch: Patch) -> None:
    patch.setattr("profiles.store._refused", lambda replies: [])


def replays_are_folded_again(patch: Patch) -> None:
    def all_again(store: ProfileStore, users: Any, *_: Any) -> FoldedHere:
        return FoldedHere(list(range(len(users))), 0, 0, 0)

    fold = arithmetic.fold

    def without_watermarks(profiles: Any, *rest: Any) -> Any:
        kept = profiles.watermarks
        profiles.watermarks = [{} for _ in kept]
        folded = fold(profiles, *rest)
        profiles.watermarks = [
            old | {s: max(at, old.get(s, 0)) for s, at in new.items()}
            for old, new in zip(kept, profiles.watermarks, strict=True)
        ]
        return folded

    patch.setattr(ProfileStore, "fold", all_again)
    patch.setattr(arithmetic, "fold", without_watermarks)


def no_rewind(patch: Patch) -> None:
    patch.setattr(Intake, "rewind", lambda intake, *, lost: None)


def what_was_begun_before_a_rewind_is_applied(patch: Patch) -> None:
    never = property(lambda pipeline: 0, lambda pipeline, count: None)
    patch.setattr(Pipeline, "_rewinds", never, raising=False)

    def applied(pipeline: Pipeline, mine: Any) -> None:
        if (started := mine.started) is not None:  # none: it was given up by the rewind
            pipeline._patience(lambda: pipeline._updater.finish(started))
        pipeline._patience(lambda: pipeline._marks.advance(mine.begun.ends()))

    patch.setattr(Pipeline, "_applied", applied)


def no_guard(patch: Patch) -> None:
    _in_scripts(patch, schema._GUARD, "local trail = KEYS[#KEYS]\n")


def marks_before_saves(patch: Patch) -> None:
    def applied(pipeline: Pipeline, mine: Any) -> None:
        pipeline._patience(lambda: pipeline._marks.advance(mine.begun.ends()))
        pipeline._patience(lambda: pipeline._updater.finish(mine.started))

    patch.setattr(Pipeline, "_applied", applied)


def marks_are_not_asked(patch: Patch) -> None:
    claim = Marks.claim
    patch.setattr(Marks, "claim", lambda marks, sources: ({}, claim(marks, sources) and True))


def a_batch_that_failed_is_passed(patch: Patch) -> None:
    finish = Updater.finish

    def careless(updater: Updater, started: Started) -> None:
        with suppress(RedisUnavailable):
            finish(updater, started)

    patch.setattr(Updater, "finish", careless)


def a_lane_passes_what_failed_in_it(patch: Patch) -> None:
    def careless(updater: Updater, started: Started, lane: int) -> None:
        started.work[lane]()
        started.left.discard(lane)

    patch.setattr(Updater, "_work_in_lane", careless)


def a_lane_does_not_wait_for_the_batch_before(patch: Patch) -> None:
    def set_to_work(updater: Updater, started: Started) -> None:
        def work(lane: int) -> None:
            started.work[lane]()
            started.left.discard(lane)

        lanes = sorted(started.left)
        threads = stream.updater.ThreadPoolExecutor(len(lanes), "of-its-own")
        started.at_work = [threads.submit(work, lane) for lane in lanes]

    patch.setattr(Updater, "_set_to_work", set_to_work)


LOSES_WRITES, STALLS, DIES = ("redis loses writes",), ("stall",), ("redis dies",)
# Which faults bring it to light; none: it needs no more than a world has anyway.
MISTAKES: Mapping[Callable[[Patch], None], Sequence[str]] = {
    commit_before_save: (),
    tracker_off_by_one: (),
    tracker_skips_a_gap: (),
    no_fence: STALLS,
    zombies_pass_the_fence: STALLS,
    a_refused_save_counts: STALLS,
    replays_are_folded_again: (),
    no_rewind: LOSES_WRITES,
    what_was_begun_before_a_rewind_is_applied: LOSES_WRITES,
    no_guard: LOSES_WRITES,
    marks_before_saves: (),
    marks_are_not_asked: (*LOSES_WRITES, "crash"),
    a_batch_that_failed_is_passed: DIES,
    a_lane_passes_what_failed_in_it: DIES,
    a_lane_does_not_wait_for_the_batch_before: (),
}


@pytest.mark.parametrize("plant", MISTAKES, ids=lambda plant: plant.__name__)
def test_a_planted_mistake_is_found(
    plant: Callable[[Patch], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    plant(monkeypatch)
    for seed in range(WITHIN):
        outcome = play(seed, MISTAKES[plant])
        if outcome.failure:
            assert not any(name in outcome.failure for name in MISFITS), outcome.failure
            print(f"{plant.__name__}: after {seed + 1} seeds: {outcome.failure:.150}")
            return
    pytest.fail(f"not found within {WITHIN} seeds")
