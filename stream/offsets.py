"""Which offsets may be committed: per partition, everything up to the first unfinished slice.

PURE. It knows neither Kafka nor threads; `intake.py` holds the lock.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field

TopicPartition = tuple[str, int]


@dataclass
class _Run:
    """One slice on its way."""

    next_offset: int
    begun: bool = False
    done: bool = False


@dataclass
class OffsetTracker:
    """Slices handed out, begun and finished, per assigned partition.

    A slice that was handed out and is never begun (its partition is being given away) stays
    where it is, so that nothing behind it can be committed.
    """

    _starts: dict[TopicPartition, int] = field(default_factory=dict)
    _runs: dict[TopicPartition, deque[_Run]] = field(default_factory=dict)
    _finished: dict[TopicPartition, int] = field(default_factory=dict)
    _committed: dict[TopicPartition, int] = field(default_factory=dict)
    _unanswered: dict[TopicPartition, int] = field(default_factory=dict)

    def starts(self, partition: TopicPartition, offset: int) -> None:
        """Everything before this offset was finished by somebody else."""
        self._starts[partition] = offset

    def resumes(self, partition: TopicPartition, offset: int) -> None:
        """Everything before this offset is saved, and may not be committed yet."""
        self._finished[partition] = offset

    def positions(self) -> dict[TopicPartition, int]:
        """Partition -> the offset before which everything is finished, where that is known."""
        return self._starts | self._finished

    def handed_out(self, partition: TopicPartition, next_offset: int) -> None:
        """A slice that ends before `next_offset` is on its way to the updater."""
        self._runs.setdefault(partition, deque()).append(_Run(next_offset))

    def begun(self, partition: TopicPartition, next_offset: int) -> None:
        """The updater has taken up the slice that ends before `next_offset`."""
        for run in self._run(partition, next_offset):
            run.begun = True

    def finished(self, partition: TopicPartition, next_offset: int) -> None:
        """The slice that ends before `next_offset` is saved."""
        for run in self._run(partition, next_offset):
            run.done = True
        runs = self._runs.get(partition, deque())
        while runs and runs[0].done:
            self._finished[partition] = runs.popleft().next_offset

    def in_hand(self, partitions: set[TopicPartition] | None = None) -> int:
        """Slices begun and not finished, of the given partitions or of all."""
        return sum(
            sum(run.begun and not run.done for run in runs)
            for partition, runs in self._runs.items()
            if partitions is None or partition in partitions
        )

    def committable(self) -> dict[TopicPartition, int]:
        """Partition -> next offset, where that moved since `committed` and nothing is unanswered:
        a client that sends once more what a broker did not answer may do so after what came later,
        and the earlier offset would be the last word."""
        return {
            partition: offset
            for partition, offset in self._finished.items()
            if self._committed.get(partition) != offset and partition not in self._unanswered
        }

    def committed(self, offsets: Mapping[TopicPartition, int]) -> None:
        """These offsets are on their way to the broker."""
        self._committed.update(offsets)
        self._unanswered.update(offsets)

    def answered(
        self, taken: Mapping[TopicPartition, int], refused: Mapping[TopicPartition, int]
    ) -> None:
        """What the broker made of these. Where it refused, what is finished by now is committable
        again."""
        for partition, offset in {**taken, **refused}.items():
            if self._unanswered.get(partition) == offset:
                del self._unanswered[partition]
        for partition, offset in refused.items():
            if self._committed.get(partition) == offset:
                del self._committed[partition]

    def wait_no_longer(self, partitions: set[TopicPartition]) -> None:
        """The next commit is their last one, and nothing unanswered is a reason to put it off."""
        for partition in partitions:
            self._unanswered.pop(partition, None)

    def forget(self, partitions: set[TopicPartition]) -> None:
        """The partitions are no longer ours: nothing of them may be committed any more."""
        for partition in partitions:
            self._starts.pop(partition, None)
            self._runs.pop(partition, None)
            self._finished.pop(partition, None)
            self._committed.pop(partition, None)
            self._unanswered.pop(partition, None)

    def _run(self, partition: TopicPartition, next_offset: int) -> list[_Run]:
        """The slice that ends before `next_offset`, if it is known."""
        return [r for r in self._runs.get(partition, ()) if r.next_offset == next_offset]
