"""Dead letters through a broker (librdkafka's own, inside a client), and the reject window."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from confluent_kafka import Producer

from stream import dead_letter
from stream.dead_letter import DeadLetters, RejectWindow, TooManyRejects, read
from stream.errors import UserError
from stream.events import Rejected
from stream.producer import DeliveryFailed, FlushTimedOut
from stream.settings import KafkaSettings, Settings

NOBODY = "127.0.0.1:1"  # a port where nothing listens


@pytest.fixture(scope="module")
def bootstrap() -> Iterator[str]:
    owner = Producer({"bootstrap.servers": NOBODY, "test.mock.num.brokers": 1, "log_level": 0})
    (broker,) = owner.list_topics(timeout=10).brokers.values()
    yield f"{broker.host}:{broker.port}"
    owner.flush(0)


def settings(bootstrap: str, namespace: str) -> Settings:
    return Settings(namespace=namespace, kafka=KafkaSettings(bootstrap=bootstrap))


def record(**fields: Any) -> dict[str, Any]:
    return {
        "key": b"u1",
        "value": b"{",
        "headers": None,
        "topic": "penchant.events",
        "partition": 3,
        "offset": 41,
        "timestamp_ms": 1_772_366_400_000,
        "reason": "json",
        "detail": "Invalid JSON",
    } | fields


def test_a_reject_is_kept_whole_with_reason_and_origin(bootstrap: str) -> None:
    where = settings(bootstrap, "whole")
    letters = DeadLetters(where)
    headers = [("trace", b"\x00\xff"), ("empty", None), ("trace", b"again")]
    letters.put(**record(key=b"\xff", value=b"\x00{\xff", headers=headers, detail="naïve 用户"))
    letters.flush()
    (letter,) = read(where, 10)
    assert (letter.key, letter.value, letter.headers) == (b"\xff", b"\x00{\xff", tuple(headers))
    assert (letter.reason, letter.detail) == ("json", "naïve 用户")
    assert (letter.topic, letter.partition, letter.offset) == ("penchant.events", 3, 41)
    assert letter.timestamp_ms == 1_772_366_400_000
    assert letter.rejected_ms > letter.timestamp_ms
    assert letter.original_bytes is None


def test_null_keys_and_values_stay_null(bootstrap: str) -> None:
    where = settings(bootstrap, "nulls")
    letters = DeadLetters(where)
    letters.put(**record(key=None, value=None, reason="null_value"))
    letters.flush()
    (letter,) = read(where, 10)
    assert (letter.key, letter.value, letter.headers) == (None, None, ())


def test_a_detail_that_is_no_utf8_does_not_stop_the_letter(bootstrap: str) -> None:
    where = settings(bootstrap, "surrogate")
    letters = DeadLetters(where)
    letters.put(**record(detail="broken \ud800"))
    letters.flush()
    assert read(where, 1)[0].detail == r"broken \ud800"


def test_the_newest_are_read_and_come_first(bootstrap: str) -> None:
    where = settings(bootstrap, "newest")
    letters = DeadLetters(where)
    for offset in range(30):
        letters.put(**record(key=b"same", offset=offset))
    letters.flush()
    letters.put(**record(key=b"later", offset=99))
    letters.flush()
    assert [letter.offset for letter in read(where, 4)] == [99, 29, 28, 27]
    assert len(read(where, 1000)) == 31


def test_a_dead_letter_that_dies_again_tells_its_last_reason(bootstrap: str) -> None:
    where = settings(bootstrap, "again")
    letters = DeadLetters(where)
    letters.put(**record(headers=[("h", b"1")]))
    letters.flush()
    (first,) = read(where, 1)
    carried = [("h", b"1"), ("penchant.reason", first.reason.encode())]
    letters.put(**record(headers=carried, reason="type:price", offset=42))
    letters.flush()
    again = read(where, 1)[0]
    assert (again.reason, again.offset, again.headers) == ("type:price", 42, tuple(carried))


def test_a_record_of_somebody_else_is_shown_as_it_is(bootstrap: str) -> None:
    where = settings(bootstrap, "foreign")
    other = Producer({"bootstrap.servers": bootstrap, "log_level": 0})
    other.produce("foreign.dead-letter", b"v", b"k", headers=[("penchant.offset", b"x")])
    assert other.flush(10) == 0
    (letter,) = read(where, 10)
    assert (letter.reason, letter.offset, letter.value) == ("", -1, b"v")
    assert letter.headers == (("penchant.offset", b"x"),)


def test_a_record_that_is_too_large_is_cut_and_says_so(
    bootstrap: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dead_letter, "_MESSAGE_MAX_BYTES", 100_000)
    where = settings(bootstrap, "large")
    letters = DeadLetters(where)
    letters.put(**record(value=b"x" * 200_000, headers=[("h", b"y" * 10)], offset=7))
    letters.put(**record(value=b"small", offset=8))
    letters.flush()
    small, large = sorted(read(where, 10), key=lambda letter: -letter.offset)
    assert (small.value, small.original_bytes) == (b"small", None)
    assert large.value == b"x" * 65_536
    assert large.original_bytes is not None
    assert large.original_bytes > 200_000
    assert (large.reason, large.topic, large.offset) == ("json", "penchant.events", 7)
    assert large.headers == ()


def test_flush_raises_while_a_reject_is_not_in_the_topic() -> None:
    letters = DeadLetters(settings(NOBODY, "down"))
    letters.put(**record())
    for _ in range(2):
        with pytest.raises(FlushTimedOut, match="1 record"):
            letters.flush(0.2)


def test_a_reject_that_was_given_up_is_never_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    impatient = {"bootstrap.servers": NOBODY, "message.timeout.ms": 200}
    monkeypatch.setattr(KafkaSettings, "client_config", lambda self: impatient)
    letters = DeadLetters(settings(NOBODY, "down"))
    letters.put(**record())
    for _ in range(2):  # a second flush must not pass: the updater would commit
        with pytest.raises(DeliveryFailed, match="1 record"):
            letters.flush()


def test_flush_of_nothing_asks_no_broker() -> None:
    DeadLetters(settings(NOBODY, "idle")).flush(0)


def test_reading_without_a_broker_is_one_line() -> None:
    with pytest.raises(UserError, match="KAFKA_BOOTSTRAP") as raised:
        read(settings(NOBODY, "down"), 10, timeout_s=0.5)
    assert "\n" not in str(raised.value)


def rejects(*indices: int, reason: str = "json", detail: str = "d") -> list[Rejected]:
    return [Rejected(i, reason, detail) for i in indices]


def test_a_window_that_is_not_full_never_stops_the_worker() -> None:
    window = RejectWindow(10, 0.5)
    window.add(9, rejects(*range(9)))
    assert window.share == 1.0
    with pytest.raises(TooManyRejects):
        window.add(1, [])


def test_a_share_at_the_limit_is_allowed_and_above_it_is_not() -> None:
    window = RejectWindow(10, 0.5)
    window.add(10, rejects(0, 1, 2, 3, 4))
    assert window.share == 0.5
    with pytest.raises(TooManyRejects) as stopped:
        RejectWindow(10, 0.5).add(10, rejects(0, 1, 2, 3, 4, 5))
    assert stopped.value.share == 0.6


def test_old_rejects_leave_the_window_record_by_record() -> None:
    window = RejectWindow(10, 0.5)
    window.add(10, rejects(0, 1, 9))
    shares = []
    for _ in range(10):
        window.add(1, [])
        shares.append(window.share)
    assert shares == [0.2, *[0.1] * 8, 0.0]


def test_a_slice_longer_than_the_window_counts_by_its_end() -> None:
    window = RejectWindow(10, 0.5)
    window.add(100, rejects(*range(90)))
    assert window.share == 0.0
    with pytest.raises(TooManyRejects):
        window.add(100, rejects(*range(94, 100)))


def test_the_message_names_the_commonest_reason_and_its_detail() -> None:
    bad = rejects(0, 1, reason="json") + rejects(2, 3, 4, reason="type:price", detail="price is x")
    with pytest.raises(TooManyRejects, match=r"5 of the last 6 records .*type:price: price is x"):
        RejectWindow(6, 0.5).add(6, bad)


def test_the_message_is_one_line_that_tells_how_to_get_past_the_bad_records() -> None:
    with pytest.raises(TooManyRejects, match=r"STREAM_MAX_REJECT_SHARE=1 to get past") as raised:
        RejectWindow(2, 0.5).add(2, rejects(0, 1))
    assert "\n" not in str(raised.value)


def test_an_empty_slice_changes_nothing() -> None:
    window = RejectWindow(10, 0.5)
    window.add(0, [])
    assert window.share == 0.0
