"""What the settings say about reaching Redis, in the words of `profiles`."""

from __future__ import annotations

from profiles import Connection

from .settings import Settings


def redis_connection(settings: Settings) -> Connection:
    """The Redis connection that the settings describe."""
    return Connection(
        settings.redis.url,
        settings.redis.username,
        settings.redis.password.get_secret_value(),
        settings.redis.tls_ca,
    )
