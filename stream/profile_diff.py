"""Two generations of profiles, or two namespaces, shopper by shopper.

Profiles are compared where both have folded the same events. Where one has folded more, that is
the stream going on, unless the other will never read what it lacks: then it has lost something.
It reads, and writes nothing.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

from profiles import arithmetic
from profiles.arithmetic import Profile, Profiles
from profiles.comparison import differing
from profiles.connection import redis_errors, scan_pages
from profiles.schema import FENCE, STATE, Keys

if TYPE_CHECKING:
    import redis

_PAGE: Final = 500
_EXAMPLES: Final = 3


@dataclass
class Difference:
    """What came of a comparison; users are counted."""

    compared: int = 0
    same: int = 0
    apart: int = 0  # one has folded more by now, and the other is still to read it
    only_left: int = 0
    only_right: int = 0
    fields: Counter[str] = field(default_factory=Counter)  # field -> profiles that differ in it
    lost: Counter[str] = field(default_factory=Counter)  # what the right one lacks, in words
    examples: dict[str, list[str]] = field(default_factory=dict)  # field or loss -> users

    @property
    def differ(self) -> int:
        """Users that are compared and not the same."""
        return self.compared - self.same

    @property
    def equal(self) -> bool:
        """Whether nothing differs, as far as could be compared."""
        return not (self.differ or self.only_left or self.only_right or self.lost)

    def note(self, tally: Counter[str], what: str, user_id: str) -> None:
        """Count it, and keep a few examples."""
        tally[what] += 1
        users = self.examples.setdefault(what, [])
        if len(users) < _EXAMPLES:
            users.append(user_id)


@dataclass(frozen=True)
class Coverage:
    """How far the right side is going to be read on: what is below a mark and not there is lost."""

    marks: Mapping[int, int]  # source -> next offset
    sources: Collection[int]  # that can still be read


def compare(
    client: redis.Redis,
    left: Keys,
    right: Keys,
    own_items: int,
    coverage: Coverage | None = None,
    on_page: Callable[[int], None] = lambda count: None,
) -> Difference:
    """Everybody of either side. `own_items`: that a profile keeps at most. `coverage`: of a right
    side that is to take the left one's place. `on_page` is told how many were looked at. Raises
    RedisUnavailable and what profiles' states raise."""
    found = Difference()
    seen = 0
    for users in pages(client, left):
        for user_id, one, other in _triples(client, left, right, users):
            if one is not None:
                _compare(found, user_id, one, other, coverage, own_items)
        on_page(seen := seen + len(users))
    for users in pages(client, right):
        found.only_right += sum(
            one is None and other is not None and other.events > 0
            for _, one, other in _triples(client, left, right, users)
        )
        on_page(seen := seen + len(users))
    return found


def _compare(
    found: Difference,
    user_id: str,
    one: Profile,
    other: Profile | None,
    of: Coverage | None,
    own_items: int,
) -> None:
    if other is None and one.events == 0:
        return  # erased: there or not is the same
    if of is not None:
        has, events = (other.watermark, other.events) if other is not None else ({}, 0)
        if words := _lacks(one.watermark, one.events, has, events, of):
            found.note(found.lost, words, user_id)
    if other is None:
        if of is None or _covers(of, one.watermark):
            found.only_left += 1
        else:
            found.apart += 1
    elif one.watermark != other.watermark or one.pending != other.pending:
        found.apart += 1  # as is who waits for an item's text on one side, and has it on the other
    else:
        found.compared += 1
        names = differing(one, other, own_items)
        found.same += not names
        for name in names:
            found.note(found.fields, name, user_id)


def _covers(of: Coverage, watermark: Mapping[int, int]) -> bool:
    """Whether all of that will not be read again."""
    return all(at <= of.marks.get(s, 0) or s not in of.sources for s, at in watermark.items())


def lacks(one: Profiles, other: Profiles, of: Coverage) -> str:
    """What the only profile of `other` lacks of the only one of `one` and will never read, in
    words, or ""."""
    events = [int(profiles.header["events"][0]) for profiles in (one, other)]
    return _lacks(one.watermarks[0], events[0], other.watermarks[0], events[1], of)


def _lacks(
    had: Mapping[int, int], events: int, has: Mapping[int, int], others: int, of: Coverage
) -> str:
    for source, at in had.items():
        if has.get(source, 0) >= at:
            continue
        if source not in of.sources:
            return "events of a topic that is no longer there"
        if at <= of.marks.get(source, 0):
            return "events that were read over"
    if had and had == has:
        if others < events:
            return "events of before what the topic or the archive holds"
        if others > 0 == events:
            return "that they are to be forgotten"
    return ""


def pages(client: redis.Redis, keys: Keys) -> Iterator[list[str]]:
    """All users of a generation; some perhaps twice."""
    prefix, suffix = (part.encode() for part in keys.profile("\0").split("\0"))
    for found in scan_pages(client, f"{prefix.decode()}*", _PAGE, "REDIS_URL"):
        yield [key.removeprefix(prefix).removesuffix(suffix).decode() for key in found]


def _triples(
    client: redis.Redis, left: Keys, right: Keys, users: Sequence[str]
) -> Iterator[tuple[str, Profile | None, Profile | None]]:
    both = (_profiles(client, keys, users) for keys in (left, right))
    return zip(users, *both, strict=True)


def _profiles(client: redis.Redis, keys: Keys, users: Sequence[str]) -> list[Profile | None]:
    with redis_errors("REDIS_URL"):
        pipe = client.pipeline(transaction=False)
        for user_id in users:
            pipe.hmget(keys.profile(user_id), STATE, FENCE)
        replies = pipe.execute()
    return [
        None if state is None else arithmetic.decode(user_id, state, fence or b"")
        for user_id, (state, fence) in zip(users, replies, strict=True)
    ]
