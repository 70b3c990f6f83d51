"""The topics of a namespace, on both brokers: made once, right for their use, never changed."""

from __future__ import annotations

import time
from collections.abc import Callable
from itertools import pairwise

import pytest
from confluent_kafka.admin import NewTopic

from stream.errors import UserError
from stream.local_stack import ApacheKafka, Tansu
from stream.processes import free_port
from stream.settings import KafkaSettings, Settings, StreamSettings
from stream.topics import (
    TopicReport,
    admin_client,
    connect,
    create_topics,
    keeps_arrival_times,
    planned_topics,
    topic_ids,
)
from tests.integration.worker_process import eventually

PATIENCE_S = 10.0


@pytest.fixture(
    params=["tansu", pytest.param("apache_kafka", marks=pytest.mark.kafka)], name="bootstrap"
)
def _bootstrap(request: pytest.FixtureRequest) -> str:
    server: Tansu | ApacheKafka = request.getfixturevalue(request.param)
    return server.bootstrap


def _settings(
    bootstrap: str = "localhost:9092",
    namespace: str = "penchant",
    *,
    repartition: bool = False,
    partitions: int = 3,
    replication: int = 1,
    retention_days: float = 7.0,
) -> Settings:
    return Settings(
        namespace=namespace,
        kafka=KafkaSettings(
            bootstrap=bootstrap,
            partitions=partitions,
            replication=replication,
            retention_days=retention_days,
        ),
        stream=StreamSettings(repartition=repartition),
    )


def _by_use(reports: list[TopicReport]) -> dict[str, TopicReport]:
    return {report.name.partition(".")[2]: report for report in reports}


def test_the_topics_are_made_as_each_use_wants_them(bootstrap: str, namespace: str) -> None:
    reports = _by_use(create_topics(_settings(bootstrap, namespace, retention_days=2.5)))
    assert set(reports) == {"events", "items", "dead-letter"}
    assert all(report.created and not report.differences for report in reports.values())
    assert {report.partitions for report in reports.values()} == {3}
    days = 86_400_000
    assert reports["events"].config["message.timestamp.type"] == "LogAppendTime"
    events, items, rejects = reports["events"], reports["items"], reports["dead-letter"]
    assert (events.config["cleanup.policy"], events.config["retention.ms"]) == (
        "delete",
        str(int(2.5 * days)),
    )
    assert items.config["cleanup.policy"] == "compact"
    assert rejects.config["retention.ms"] == str(10 * days)
    assert {report.config["compression.type"] for report in reports.values()} == {"producer"}


def test_a_second_time_creates_nothing_and_finds_no_difference(
    bootstrap: str, namespace: str
) -> None:
    settings = _settings(bootstrap, namespace)
    first, second = create_topics(settings), create_topics(settings)
    assert [report.created for report in first] == [True, True, True]
    assert [report.created for report in second] == [False, False, False]
    assert [report.differences for report in second] == [(), (), ()]


def test_an_existing_topic_is_reported_on_and_not_changed(bootstrap: str, namespace: str) -> None:
    create_topics(_settings(bootstrap, namespace))
    other = _settings(bootstrap, namespace, partitions=6, retention_days=1)
    for report in (_by_use(create_topics(other))["events"] for _ in range(2)):
        assert report.differences == (
            "partitions is 3, the settings say 6",
            "retention.ms is 604800000, the settings say 86400000",
        )


@pytest.mark.kafka
def test_a_topic_that_keeps_the_producers_times_is_told_from_one_that_does_not(
    apache_kafka: ApacheKafka, namespace: str
) -> None:
    settings = _settings(apache_kafka.bootstrap, namespace)
    create_topics(settings)
    admin, _ = connect(settings.kafka)
    theirs = NewTopic(f"{namespace}.theirs", 1, config={"message.timestamp.type": "CreateTime"})
    admin.create_topics([theirs])[theirs.topic].result(30)
    assert keeps_arrival_times(admin, settings.topic("events"))
    deadline_s = time.monotonic() + 30
    while keeps_arrival_times(admin, theirs.topic):  # nodes hear of a new topic a little later
        assert time.monotonic() < deadline_s
        time.sleep(0.1)


def test_where_the_broker_does_not_say_whose_times_a_topic_keeps_nothing_is_told(
    tansu: Tansu, namespace: str
) -> None:
    admin, _ = connect(KafkaSettings(bootstrap=tansu.bootstrap))
    assert keeps_arrival_times(admin, f"{namespace}.nowhere")


def test_repartitioning_adds_a_topic_with_the_events_partitions(
    bootstrap: str, namespace: str
) -> None:
    create_topics(_settings(bootstrap, namespace))
    reports = _by_use(create_topics(_settings(bootstrap, namespace, repartition=True)))
    assert [use for use, report in reports.items() if report.created] == ["events-by-user"]
    assert reports["events-by-user"].partitions == reports["events"].partitions


def test_a_topic_made_again_has_another_id(bootstrap: str, namespace: str) -> None:
    settings = _settings(bootstrap, namespace)
    name, missing = settings.topic("events"), settings.topic("nothing")
    admin = admin_client({"bootstrap.servers": bootstrap})
    seen = []
    for _ in range(2):
        create_topics(settings)
        ids = topic_ids(admin, [name, missing])
        assert ids[missing] is None
        assert ids == topic_ids(admin, [name, missing])
        seen.append(ids[name])
        admin.delete_topics([name])[name].result()
        # It is told later than it is done.
        eventually("the topic is gone", lambda: name not in admin.list_topics(timeout=10).topics)
    assert None not in seen
    assert all(before != after for before, after in pairwise(seen))


@pytest.mark.kafka
def test_more_copies_than_brokers_is_one_plain_line(
    apache_kafka: ApacheKafka, namespace: str
) -> None:
    with pytest.raises(UserError, match=r"events could not be created: KAFKA_REPLICATION is more"):
        create_topics(_settings(apache_kafka.bootstrap, namespace, replication=3))


@pytest.mark.kafka
def test_on_three_brokers_two_copies_must_acknowledge(
    start_apache_kafka: Callable[..., ApacheKafka], namespace: str
) -> None:
    cluster = start_apache_kafka(nodes=3, heap_mb=384)
    reports = create_topics(_settings(cluster.bootstrap, namespace, replication=3))
    assert {report.replication for report in reports} == {3}
    assert {report.config["min.insync.replicas"] for report in reports} == {"2"}
    assert {report.differences for report in reports} == {()}


@pytest.mark.parametrize(("replication", "acknowledging"), [(1, "1"), (2, "1"), (3, "2"), (5, "2")])
def test_one_copy_may_be_away_only_where_two_others_are_left(
    replication: int, acknowledging: str
) -> None:
    plans = planned_topics(_settings(replication=replication))
    assert {plan.config["min.insync.replicas"] for plan in plans} == {acknowledging}


def test_brokers_that_do_not_answer_are_one_plain_line_and_nothing_else(
    capfd: pytest.CaptureFixture[str],
) -> None:
    nobody = f"127.0.0.1:{free_port()}"
    with pytest.raises(UserError, match=f"No Kafka broker answered at {nobody} within 1 s"):
        create_topics(_settings(nobody), patience_s=1.0)
    assert capfd.readouterr() == ("", "")


def test_settings_that_librdkafka_refuses_are_one_plain_line() -> None:
    kafka = KafkaSettings(security_protocol="SSL", ssl_ca_location="/no/such/file.pem")
    with pytest.raises(UserError, match=r"The Kafka settings \(KAFKA_…\) cannot be used"):
        connect(kafka, PATIENCE_S)
