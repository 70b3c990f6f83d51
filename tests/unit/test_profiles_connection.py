"""What a connection is made of, and what its failures are called."""

from __future__ import annotations

import pytest
import redis.exceptions

from profiles import Connection
from profiles.connection import address, redis_errors
from profiles.errors import RedisUnavailable


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("redis://localhost:6379/0", "redis://localhost:6379/0"),
        ("redis://:secret@host:1/2", "redis://host:1/2"),
        ("rediss://user:se@cret@host:1/2", "rediss://host:1/2"),
        ("redis://host/0?username=u&password=secret", "redis://host/0"),
    ],
)
def test_an_address_in_a_message_holds_no_login(url: str, shown: str) -> None:
    assert address(url) == shown


def options(connection: Connection) -> dict[str, object]:
    return dict(connection.open().connection_pool.connection_kwargs)


def test_a_login_beside_the_url_is_used_and_one_in_it_wins() -> None:
    apart = options(Connection("redis://host:1/2", username="ann", password="secret"))
    assert (apart["username"], apart["password"]) == ("ann", "secret")
    within = options(Connection("redis://bob:word@host:1/2", username="ann", password="secret"))
    assert (within["username"], within["password"]) == ("bob", "word")


def test_a_ca_without_tls_is_a_mistake_and_not_ignored() -> None:
    with pytest.raises(ValueError, match=r"REDIS_TLS_CA.*redis://host:1.*rediss://"):
        Connection("redis://:secret@host:1", tls_ca="/ca.pem").open()
    assert options(Connection("rediss://host:1", tls_ca="/ca.pem"))["ssl_ca_certs"] == "/ca.pem"


def test_a_script_that_is_missing_again_is_a_server_to_wait_for() -> None:
    """It was just loaded: another server took over in between, and may do so once more."""
    with pytest.raises(RedisUnavailable), redis_errors("redis://host:1"):
        raise redis.exceptions.NoScriptError("No matching script. Please use EVAL.")
