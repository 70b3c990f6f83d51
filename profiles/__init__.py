"""The profile and where it is kept. Other teams import the names below; nothing here needs
torch, faust or a Kafka client."""

from __future__ import annotations

from .arithmetic import Profile
from .connection import Connection
from .errors import (
    LayoutMismatch,
    ProfileNotFound,
    ProfilesError,
    RedisIsCluster,
    RedisUnavailable,
    SchemaTooNew,
    SpaceMismatch,
    StateCorrupt,
)
from .outlook import Outlook
from .plans import Interest, NearestItem
from .reader import AsyncProfileReader, ProfileReader
from .recommend import Recommendation

__all__ = [
    "AsyncProfileReader",
    "Connection",
    "Interest",
    "LayoutMismatch",
    "NearestItem",
    "Outlook",
    "Profile",
    "ProfileNotFound",
    "ProfileReader",
    "ProfilesError",
    "Recommendation",
    "RedisIsCluster",
    "RedisUnavailable",
    "SchemaTooNew",
    "SpaceMismatch",
    "StateCorrupt",
]
