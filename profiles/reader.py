"""What other teams import: profiles as Redis has them now, and the items nearest to them.

    with ProfileReader("redis://localhost:6379/0") as reader:
        profile = reader.get("u1")
        for item in reader.nearest_items("u1", k=10):
            print(item.cosine, item.title)

`AsyncProfileReader` has the same methods as coroutines. Neither writes anything, and neither
needs torch or faust. What they ask, and what the answers mean, stands in `plans.py`.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator, Sequence
from typing import TYPE_CHECKING, Any, Self, TypeVar

from . import recommend
from .arithmetic import Floats, Profile
from .connection import Connection, redis_errors
from .outlook import Outlook
from .plans import Command, Interest, NearestItem, Plan, Plans
from .recommend import Recommendation
from .schema import ItemRecord

if TYPE_CHECKING:
    import redis
    import redis.asyncio

T = TypeVar("T")


class ProfileReader(Plans):
    """Blocking reader of one namespace; safe to share between threads."""

    def __init__(
        self,
        connection: Connection | str = "redis://localhost:6379/0",
        namespace: str = "penchant",
    ) -> None:
        """`connection`: a URL, or a Connection for ACL users, TLS and time-outs. Connects at
        the first call."""
        super().__init__(connection, namespace)
        self._client: redis.Redis = self._connection.open()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Give the connections back."""
        self._client.close()

    def get(self, user_id: str) -> Profile:
        """One profile. Raises ProfileNotFound, SchemaTooNew, StateCorrupt, RedisUnavailable."""
        return self._answer(self._get(user_id))

    def outlook(self, user_id: str) -> Outlook | None:
        """What may come next: next-interest vector, purchase intent and churn, with the release
        that says so and how old it is; `get` has it too. None: no release that can tell was live
        when they acted, or it is still to be computed. Raises as `get`."""
        return self._answer(self._outlook(user_id))

    def get_many(self, user_ids: Sequence[str]) -> dict[str, Profile]:
        """The profiles of those that have one, in one round trip. Raises as `get`, but for
        ProfileNotFound."""
        return self._answer(self._get_many(user_ids))

    def exists(self, user_id: str) -> bool:
        """Whether `get` would find a profile."""
        return self._answer(self._exists(user_id))

    def interests(self, user_id: str, scale: int) -> Floats:
        """(D,) unit vector of one time scale (0 = shortest); zeros where nothing is known."""
        return self._answer(self._interests(user_id, scale))

    def multi_interests(self, user_id: str, count: int = 4, scale: int = -1) -> list[Interest]:
        """Up to `count` centroids of the recent window's items, heaviest first; their masses
        are decayed on one time scale (-1 = longest)."""
        return self._answer(self._multi_interests(user_id, count, scale))

    def nearest_items(
        self, user_id: str, k: int = 10, scale: int | None = None
    ) -> list[NearestItem]:
        """The k items nearest to a shopper's interest, by one time scale or by all together;
        none where no interest is known yet.

        Profile and items are of one space. Raises ProfileNotFound, SpaceMismatch where no items
        of the profile's space are stored, RedisUnavailable.
        """
        return self._answer(self._nearest_items(user_id, k, scale))

    def items_near(self, vector: Floats, space: str, k: int = 10) -> list[NearestItem]:
        """The k items of `space` nearest to a (D,) unit vector of that space. Raises
        SpaceMismatch where no items of that space are stored, RedisUnavailable."""
        return self._answer(self._items_near(vector, space, k))

    def recommend(
        self, user_id: str, k: int = 10, *, exclude_seen: bool = False
    ) -> list[Recommendation]:
        """What to show next, best first: what others did next to the shopper's latest items, their
        own items (unless `exclude_seen`) and the items nearest to their interests, ranked by the
        live release's ranker. Neighbours need LEARN_NEIGHBOURS; without them the rest is ranked.

        Profile, items and ranker are of one space. Raises as `nearest_items`.
        """
        return self._answer(recommend.plan(self, user_id, k, exclude_seen))

    def items(self, profile: Profile) -> dict[int, ItemRecord]:
        """item key -> record of the items in a profile's window."""
        return self._answer(self._items(profile))

    def top_categories(self, profile: Profile, count: int = 5) -> list[tuple[str, float]]:
        """(category, decayed mass) of a profile's heaviest categories."""
        return self._answer(self._top_categories(profile, count))

    def user_ids(self) -> Iterator[str]:
        """All users with a record, erased ones too, in no order and some perhaps twice, by SCAN:
        for tools, not for serving."""
        cursor = -1
        while cursor != 0:
            cursor, page = self._answer(self._user_page(max(cursor, 0)))
            yield from page

    def similar_users(self, user_id: str, k: int = 10, scale: int = -1) -> list[tuple[str, float]]:
        """(user, cosine) of the k shoppers most like this one. Reads every profile: for tools."""
        return self._answer(self._similar_users(user_id, k, scale))

    def _answer(self, plan: Plan[T]) -> T:
        try:
            commands = next(plan)
            while True:
                with redis_errors(self._where):
                    replies = _piped(self._client.pipeline(transaction=False), commands).execute()
                commands = plan.send(replies)
        except StopIteration as done:
            answer: T = done.value
            return answer


class AsyncProfileReader(Plans):
    """Reader for asyncio programs; use it in one event loop. Its methods answer what those of
    ProfileReader do, and raise the same."""

    def __init__(
        self,
        connection: Connection | str = "redis://localhost:6379/0",
        namespace: str = "penchant",
    ) -> None:
        """See ProfileReader."""
        super().__init__(connection, namespace)
        self._client: redis.asyncio.Redis = self._connection.open_async()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def close(self) -> None:
        """Give the connections back."""
        await self._client.aclose()

    async def get(self, user_id: str) -> Profile:
        """See ProfileReader.get."""
        return await self._answer(self._get(user_id))

    async def outlook(self, user_id: str) -> Outlook | None:
        """See ProfileReader.outlook."""
        return await self._answer(self._outlook(user_id))

    async def get_many(self, user_ids: Sequence[str]) -> dict[str, Profile]:
        """See ProfileReader.get_many."""
        return await self._answer(self._get_many(user_ids))

    async def exists(self, user_id: str) -> bool:
        """See ProfileReader.exists."""
        return await self._answer(self._exists(user_id))

    async def interests(self, user_id: str, scale: int) -> Floats:
        """See ProfileReader.interests."""
        return await self._answer(self._interests(user_id, scale))

    async def multi_interests(
        self, user_id: str, count: int = 4, scale: int = -1
    ) -> list[Interest]:
        """See ProfileReader.multi_interests."""
        return await self._answer(self._multi_interests(user_id, count, scale))

    async def nearest_items(
        self, user_id: str, k: int = 10, scale: int | None = None
    ) -> list[NearestItem]:
        """See ProfileReader.nearest_items."""
        return await self._answer(self._nearest_items(user_id, k, scale))

    async def items_near(self, vector: Floats, space: str, k: int = 10) -> list[NearestItem]:
        """See ProfileReader.items_near."""
        return await self._answer(self._items_near(vector, space, k))

    async def recommend(
        self, user_id: str, k: int = 10, *, exclude_seen: bool = False
    ) -> list[Recommendation]:
        """See ProfileReader.recommend."""
        return await self._answer(recommend.plan(self, user_id, k, exclude_seen))

    async def items(self, profile: Profile) -> dict[int, ItemRecord]:
        """See ProfileReader.items."""
        return await self._answer(self._items(profile))

    async def top_categories(self, profile: Profile, count: int = 5) -> list[tuple[str, float]]:
        """See ProfileReader.top_categories."""
        return await self._answer(self._top_categories(profile, count))

    async def user_ids(self) -> AsyncIterator[str]:
        """See ProfileReader.user_ids."""
        cursor = -1
        while cursor != 0:
            cursor, page = await self._answer(self._user_page(max(cursor, 0)))
            for user_id in page:
                yield user_id

    async def similar_users(
        self, user_id: str, k: int = 10, scale: int = -1
    ) -> list[tuple[str, float]]:
        """See ProfileReader.similar_users."""
        return await self._answer(self._similar_users(user_id, k, scale))

    async def _answer(self, plan: Plan[T]) -> T:
        try:
            commands = next(plan)
            while True:
                with redis_errors(self._where):
                    pipeline = self._client.pipeline(transaction=False)
                    replies = await _piped(pipeline, commands).execute()
                commands = plan.send(replies)
        except StopIteration as done:
            answer: T = done.value
            return answer


def _piped(pipeline: Any, commands: Sequence[Command]) -> Any:
    for command in commands:
        pipeline.execute_command(*command)
    return pipeline


# --- the plans -----------------------------------------------------------------------------
