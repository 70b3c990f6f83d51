"""The topics of a namespace: what each is for, created once, checked ever after.

Creating is idempotent, and an existing topic is never changed: what differs from the
settings is reported, because fewer days of retention delete data and other partition
counts move shoppers. Knows no event; speaks to any broker through librdkafka's admin
client (Apache Kafka and Tansu alike).
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from confluent_kafka import KafkaError, KafkaException, TopicCollection
from confluent_kafka.admin import AdminClient, ConfigResource, NewTopic

from .errors import UserError
from .settings import KafkaSettings, Settings
from .times import DAY_MS

DEAD_LETTER_RETENTION = 4  # times the events': rejects are looked at after a holiday
DEAD_LETTER_MAX_BYTES = 2 * 1024 * 1024  # a record of the largest size, with our headers on top

# librdkafka writes its own lines to the terminal unless it is given somewhere else to put
# them; what matters of them is raised as an error here.
_client_log = logging.getLogger("penchant.librdkafka")
_client_log.addHandler(logging.NullHandler())
_client_log.propagate = False


@dataclass(frozen=True)
class TopicPlan:
    """A topic as the settings want it."""

    name: str
    partitions: int
    replication: int
    config: Mapping[str, str]


@dataclass(frozen=True)
class TopicReport:
    """A topic as the brokers have it."""

    name: str
    created: bool
    """False: it was there before."""
    partitions: int
    replication: int
    config: Mapping[str, str]
    """What the brokers answer for the options that Penchant chooses."""
    differences: tuple[str, ...]
    """What an existing topic has otherwise than the settings say, in words."""


def planned_topics(settings: Settings) -> list[TopicPlan]:
    """Every topic that these settings need."""
    kafka = settings.kafka
    retention_ms = int(kafka.retention_days * DAY_MS)
    shared = {
        "compression.type": "producer",  # brokers keep the batch as it came
        # With three copies one broker may be away and no acknowledged event can be lost.
        "min.insync.replicas": "2" if kafka.replication >= 3 else "1",
    }
    deleting = shared | {"cleanup.policy": "delete", "retention.ms": str(retention_ms)}
    plans = {
        # The time of arrival by the broker's clock: an event of 1998 replayed today is not past
        # its retention, and a producer whose clock is wrong cannot vouch for its own future.
        "events": deleting | {"message.timestamp.type": "LogAppendTime"},
        "items": shared | {"cleanup.policy": "compact"},
        "dead-letter": deleting
        | {
            "retention.ms": str(DEAD_LETTER_RETENTION * retention_ms),
            "max.message.bytes": str(DEAD_LETTER_MAX_BYTES),
        },
    }
    if settings.learn.neighbours:
        plans["pairs"] = deleting
    if settings.stream.repartition:
        # The forwarder passes the arrival time on, so this one keeps the time it is given.
        plans["events-by-user"] = deleting | {"message.timestamp.type": "CreateTime"}
    return [
        TopicPlan(settings.topic(name), kafka.partitions, kafka.replication, config)
        for name, config in plans.items()
    ]


def create_topics(settings: Settings, patience_s: float = 10.0) -> list[TopicReport]:
    """Creates the topics that are missing and reports on all of them.

    Raises UserError if no broker answers in time or the brokers refuse.
    """
    deadline = time.monotonic() + patience_s
    plans = planned_topics(settings)
    admin, metadata = connect(settings.kafka, patience_s)
    missing = [plan for plan in plans if plan.name not in metadata.topics]
    created: set[str] = set()
    if missing:
        created = _create(admin, missing, patience_s)
        metadata = _metadata_showing(admin, missing, deadline)
    configs = _configs(admin, plans, deadline)
    return [
        _report(plan, metadata.topics[plan.name], configs[plan.name], plan.name in created)
        for plan in plans
    ]


def topic_ids(
    admin: AdminClient, topics: Iterable[str], timeout_s: float = 10.0
) -> dict[str, str | None]:
    """The broker's id of each topic; a topic deleted and made again has another.

    None where the topic does not exist or the broker gives no ids.
    """
    futures = admin.describe_topics(TopicCollection(list(topics)), request_timeout=timeout_s)
    return {name: _topic_id(future) for name, future in futures.items()}


def partition_counts(
    admin: AdminClient, topics: Iterable[str], timeout_s: float = 10.0
) -> dict[str, int]:
    """How many partitions each topic has. Raises KafkaException where one does not exist."""
    futures = admin.describe_topics(TopicCollection(list(topics)), request_timeout=timeout_s)
    return {name: len(future.result().partitions) for name, future in futures.items()}


def keeps_arrival_times(admin: AdminClient, topic: str, timeout_s: float = 10.0) -> bool:
    """Whether records carry the broker's time; True where the broker does not say."""
    resource = ConfigResource(ConfigResource.Type.TOPIC, topic)
    try:
        (future,) = admin.describe_configs([resource], request_timeout=timeout_s).values()
        entry = future.result().get("message.timestamp.type")
    except KafkaException:
        return True
    return entry is None or entry.value != "CreateTime"


def admin_client(config: Mapping[str, Any]) -> AdminClient:
    """An admin client that writes nothing to the terminal."""
    return AdminClient(dict(config), logger=_client_log)


def connect(kafka: KafkaSettings, patience_s: float = 10.0) -> tuple[AdminClient, Any]:
    """An admin client and the cluster's metadata (`ClusterMetadata`).

    Raises UserError if no broker answers in time, saying why as far as librdkafka knows.
    """
    errors: list[KafkaError] = []
    try:
        admin = admin_client(kafka.client_config() | {"error_cb": errors.append})
    except (KafkaException, ValueError) as error:
        raise UserError(f"The Kafka settings (KAFKA_…) cannot be used: {error}") from error
    try:
        return admin, admin.list_topics(timeout=patience_s)
    except KafkaException as error:
        admin.poll(0)  # hands the errors of the attempts to the callback
        raise UserError(_unreachable(kafka, patience_s, error.args[0], errors)) from error


def _unreachable(
    kafka: KafkaSettings, patience_s: float, error: KafkaError, seen: Iterable[KafkaError]
) -> str:
    every = [error, *seen]
    codes = {each.code() for each in every}
    if KafkaError._AUTHENTICATION in codes:
        return (
            f"The Kafka brokers at {kafka.bootstrap} refused the user name or the password; "
            "check KAFKA_SASL_USERNAME, KAFKA_SASL_PASSWORD and KAFKA_SASL_MECHANISM"
        )
    # A broker that does not speak TLS hangs up, which has no code of its own.
    if KafkaError._SSL in codes or any("SSL handshake failed" in each.str() for each in every):
        return (
            f"No TLS connection to the Kafka brokers at {kafka.bootstrap}; "
            "check KAFKA_SECURITY_PROTOCOL and KAFKA_SSL_CA_LOCATION"
        )
    return (
        f"No Kafka broker answered at {kafka.bootstrap} within {patience_s:g} s; start one with "
        "`penchant up`, or name yours in KAFKA_BOOTSTRAP"
    )


def _create(admin: AdminClient, plans: list[TopicPlan], timeout_s: float) -> set[str]:
    """The names of those that it was this call that made."""
    created = set()
    wanted = [
        NewTopic(plan.name, plan.partitions, plan.replication, config=dict(plan.config))
        for plan in plans
    ]
    for name, future in admin.create_topics(wanted, request_timeout=timeout_s).items():
        try:
            future.result()
            created.add(name)
        except KafkaException as error:
            reason: KafkaError = error.args[0]
            # Two workers that start together both find it missing.
            if reason.code() != KafkaError.TOPIC_ALREADY_EXISTS:
                raise UserError(f"Topic {name} could not be created: {_advice(reason)}") from error
    return created


def _advice(error: KafkaError) -> str:
    if error.code() == KafkaError.INVALID_REPLICATION_FACTOR:
        return "KAFKA_REPLICATION is more than the brokers there are"
    if error.code() == KafkaError.TOPIC_AUTHORIZATION_FAILED:
        return "this user may not create topics; give it Create, or create the topic yourself"
    return f"{error.str()}"


def _metadata_showing(admin: AdminClient, plans: list[TopicPlan], deadline: float) -> Any:
    """The metadata, as soon as each partition of these topics has a leader in it."""
    while True:
        metadata = admin.list_topics(timeout=max(1.0, deadline - time.monotonic()))
        waiting = [plan.name for plan in plans if not _has_leaders(metadata.topics.get(plan.name))]
        if not waiting:
            return metadata
        if time.monotonic() > deadline:
            raise UserError(
                f"Created, but not yet led by any broker: {', '.join(waiting)}; try again"
            )
        time.sleep(0.05)


def _has_leaders(topic: Any) -> bool:
    return bool(topic and topic.partitions) and all(
        partition.leader >= 0 for partition in topic.partitions.values()
    )


def _configs(
    admin: AdminClient, plans: Iterable[TopicPlan], deadline: float
) -> dict[str, dict[str, str]]:
    """Topic -> its options, as soon as a broker knows it: the one that answers may learn of a new
    topic later than the one that made it."""
    configs: dict[str, dict[str, str]] = {}
    missing = {plan.name: plan for plan in plans}
    while missing:
        resources = {ConfigResource(ConfigResource.Type.TOPIC, name): name for name in missing}
        timeout_s = max(1.0, deadline - time.monotonic())
        for resource, future in admin.describe_configs(
            list(resources), request_timeout=timeout_s
        ).items():
            name = resources[resource]
            try:
                entries = future.result()
            except KafkaException as error:
                reason: KafkaError = error.args[0]
                unknown = reason.code() == KafkaError.UNKNOWN_TOPIC_OR_PART
                if unknown and time.monotonic() < deadline:
                    continue
                raise UserError(
                    f"The brokers do not show the options of topic {name}: {reason.str()}; "
                    "give this user DescribeConfigs"
                ) from error
            plan = missing.pop(name)
            configs[name] = {key: entries[key].value for key in plan.config if key in entries}
        if missing:
            time.sleep(0.05)
    return configs


def _report(plan: TopicPlan, topic: Any, config: Mapping[str, str], created: bool) -> TopicReport:
    partitions = len(topic.partitions)
    replication = min((len(part.replicas) for part in topic.partitions.values()), default=0)
    wanted = {"partitions": plan.partitions, "replication": plan.replication, **plan.config}
    found = {"partitions": partitions, "replication": replication, **config}
    # What a broker does not answer for (Tansu keeps no defaults) is not a difference.
    differences = tuple(
        f"{key} is {found[key]}, the settings say {value}"
        for key, value in wanted.items()
        if key in found and str(found[key]) != str(value)
    )
    return TopicReport(plan.name, created, partitions, replication, dict(config), differences)


def _topic_id(future: Any) -> str | None:
    try:
        topic_id = future.result().topic_id
    except KafkaException as error:
        if error.args[0].code() == KafkaError.UNKNOWN_TOPIC_OR_PART:
            return None
        raise
    # librdkafka writes the all-zero id, which means none, as 22 times A.
    text = "" if topic_id is None else str(topic_id)
    return text if text.strip("A=") else None
