"""The numbers of a writer's writes, and a dictionary that may go back in time in Redis' place."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest

from profiles.errors import WritesLost
from profiles.trail import Tail, Trail


class Numbers:
    """What the guard does with them; the script itself is tested on Redis."""

    def __init__(self) -> None:
        self.at: dict[str, int] = {}

    def takes(self, tail: Tail) -> bool:
        thread, number, known = tail
        for place, least in enumerate(known.split(",")):
            if self.at.get(str(place), 0) < int(least):
                return False
        self.at[thread] = max(self.at.get(thread, 0), int(number))
        return True


def write(trail: Trail, redis: Numbers, count: int = 1) -> bool:
    """Whether all of them were taken, and acknowledged."""
    with trail.steps(count) as steps:
        taken = all(redis.takes(tail) for tail in steps.tails)
        steps.made = count if taken else 0
    return taken


def unanswered(trail: Trail, redis: Numbers, *, arrived: bool) -> None:
    """Two writes of which the first arrives, or neither; the connection breaks."""
    with trail.steps(2) as steps:
        if arrived:
            assert redis.takes(steps.tails[0])
        raise ConnectionError


def test_a_write_is_refused_where_an_acknowledged_one_is_missing() -> None:
    trail, redis = Trail("trail"), Numbers()
    assert write(trail, redis)
    before = dict(redis.at)
    assert write(trail, redis, count=3)
    redis.at = before
    assert not write(trail, redis)
    assert not write(trail, redis)  # nor later


def test_another_threads_write_is_missed_as_well() -> None:
    trail, redis = Trail("trail"), Numbers()
    with ThreadPoolExecutor(1) as other:
        assert write(trail, redis)
        before = dict(redis.at)
        assert other.submit(write, trail, redis).result()
        redis.at = before
        assert not write(trail, redis)
        assert not other.submit(write, trail, redis).result()


def test_a_write_without_an_answer_is_neither_missed_nor_taken_for_a_later_one() -> None:
    for arrived in (True, False):
        trail, redis = Trail("trail"), Numbers()
        assert write(trail, redis)
        with pytest.raises(ConnectionError):
            unanswered(trail, redis, arrived=arrived)
        before = dict(redis.at)
        assert write(trail, redis)
        redis.at = before
        assert not write(trail, redis)


def test_a_read_misses_what_a_write_would_and_raises_no_number() -> None:
    trail, redis = Trail("trail"), Numbers()
    assert write(trail, redis)
    before = dict(redis.at)
    with trail.looks(2) as looks:
        assert [redis.takes(tail) for tail in looks.tails] == [True] * 2
    assert redis.at == before
    assert write(trail, redis)
    redis.at = before
    with trail.looks(1) as looks:
        assert not redis.takes(looks.tails[0])


def test_a_loss_is_remembered() -> None:
    trail = Trail("trail")
    with pytest.raises(WritesLost), trail.looks(1):
        raise WritesLost("some")
    with pytest.raises(WritesLost, match="some"), trail.steps(1):
        pytest.fail("begun")
    with pytest.raises(WritesLost, match="some"), trail.looks(1):
        pytest.fail("begun")


def test_the_same_writes_may_be_sent_twice() -> None:
    trail, redis = Trail("trail"), Numbers()
    with trail.steps(2) as steps:
        assert [redis.takes(tail) for tail in [*steps.tails, *steps.tails]] == [True] * 4
    assert write(trail, redis)


def test_writes_of_one_pipeline_miss_each_other() -> None:
    trail, redis = Trail("trail"), Numbers()
    with trail.steps(2) as steps:
        assert not redis.takes(steps.tails[1])
        assert redis.takes(steps.tails[0])
        assert redis.takes(steps.tails[1])
