"""Every error a reader or writer of profiles can meet, named by what the caller should do.

ProfilesError
├── ProfileNotFound     unknown or erased user: fall back to what you show a newcomer
├── SchemaTooNew        written by a later Penchant: upgrade this reader
├── StateCorrupt        bytes that are no profile: rebuild this user
├── SpaceMismatch       vectors of two embedding spaces: fetch both again
├── LayoutMismatch      written under other settings: restore them, or rebuild
├── WritesLost          Redis went back behind what it had acknowledged: read again from the marks
│   └── GenerationRetired  other profiles are live now: go on in those, from their marks
├── RedisIsCluster      keys spread over slots: name a Redis without cluster mode
└── RedisUnavailable    no answer from Redis: retry later, or serve without a profile
"""

from __future__ import annotations


class ProfilesError(Exception):
    """Root of the tree above."""


class ProfileNotFound(ProfilesError):
    """The user has no profile: never seen, expired, or erased by `forget`."""


class SchemaTooNew(ProfilesError):
    """The record has a schema version this reader does not know; upgrade penchant."""


class StateCorrupt(ProfilesError):
    """The stored bytes are no profile of a known layout."""


class SpaceMismatch(ProfilesError):
    """Two vectors of different embedding spaces were about to be compared or added."""


class LayoutMismatch(ProfilesError):
    """Stored profiles have another dimension or other half-lives than the settings ask for."""


class WritesLost(ProfilesError):
    """Redis does not have what it had acknowledged to this writer: it failed over to a replica
    that was behind, or started from an older file. Nothing was saved on top of that."""


class GenerationRetired(WritesLost):
    """Another generation of profiles is live than the one that this writer works on. Nothing was
    saved in the one that was."""


class RedisIsCluster(ProfilesError):
    """Redis runs in cluster mode; scripts on many profiles at once need all keys in one place."""


class RedisUnavailable(ProfilesError):
    """Redis cannot be reached, refused the login, or is still loading."""
