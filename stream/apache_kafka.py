"""Apache Kafka itself on this machine, for the tests, the benchmark and `penchant up`.

Maven puts the jars into the user's cache once, as `apache_kafka.pom.xml` pins them. Needs
Java 17. Knows nothing of topics, events or profiles.
"""

from __future__ import annotations

import base64
import fcntl
import hashlib
import json
import os
import re
import shutil
import subprocess
import tempfile
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Self
from xml.etree import ElementTree

from .errors import UserError
from .local_servers import LOOPBACK, kafka_answers, on_a_port, wait_ready
from .processes import ServerProcess, end, free_ports

JVM_READY_S = 90.0  # 2.5 s on two idle cores; three nodes on a busy machine take their time
KAFKA_STOP_S = 20.0

APACHE_POM = Path(__file__).with_name("apache_kafka.pom.xml")
JAVA_AND_MAVEN = (
    "type `apt-get install openjdk-17-jre-headless maven` as root "
    "(Debian 13 and later: `openjdk-21-jre-headless maven`)"
)


class ApacheKafka:
    """Apache Kafka in KRaft mode: nodes 1 to N, each a broker and a controller.

    The jars come from the user's cache, where Maven puts them once.
    """

    def __init__(
        self,
        data_dir: Path,
        *,
        nodes: int = 1,
        port: int = 0,
        fast_start: bool = True,
        heap_mb: int = 768,
        properties: Mapping[str, str] | None = None,
    ) -> None:
        """`port` 0 takes free ones; a given one is node 1's.

        `fast_start` compiles in one tier only: right for tests, wrong for measuring.
        `properties` are added to every node's server.properties. Raises UserError without
        Java or, where the jars are not in the cache yet, Maven.
        """
        self.ports = [port] + [0] * (nodes - 1)
        self._controller_ports: list[int] = []
        self._given_port = port
        self._has_started = False
        self._data_dir = data_dir.absolute()
        self._extra = dict(properties or {})
        jars = apache_kafka_jars()
        collector = "-XX:+UseSerialGC" if fast_start else "-XX:+UseG1GC"
        self._java = [
            *[_java(), collector, f"-Xmx{heap_mb}m", "-Xshare:auto"],
            *(["-XX:TieredStopAtLevel=1"] if fast_start else []),
            f"-Dlog4j2.configurationFile={(self._data_dir / 'log4j2.properties').as_uri()}",
            *["-cp", f"{jars}/*"],
        ]
        self.processes = tuple(
            ServerProcess(
                f"Apache Kafka node {node}",
                [*self._java, "kafka.Kafka", str(self._folder(node) / "server.properties")],
                self._folder(node) / "kafka.log",
            )
            for node in self.node_ids
        )

    @property
    def node_ids(self) -> range:
        return range(1, len(self.ports) + 1)

    @property
    def port(self) -> int:
        return self.ports[0]

    @property
    def bootstrap(self) -> str:
        return ",".join(f"{LOOPBACK}:{port}" for port in self.ports)

    @property
    def version(self) -> str:
        return apache_kafka_version()

    def start(self) -> Self:
        """Starts the nodes that do not run; returns when every node answers and all are there."""
        on_a_port(self, self._has_started or self._given_port != 0, self._launch)
        self._has_started = True
        return self

    def stop(self) -> None:
        """Stops all nodes at once: one after another would wait for a quorum that has gone."""
        end([p.identity for p in self.processes if p.identity is not None], KAFKA_STOP_S)
        for process in self.processes:
            process.stop()

    def kill(self, node: int | None = None) -> None:
        """SIGKILL for one node, or for all."""
        for process in self.processes if node is None else [self.processes[node - 1]]:
            process.kill()

    def restart(self) -> None:
        """Stops what runs and starts all nodes; the same ports and folders."""
        self.stop()
        self.start()

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(self, *failure: object) -> None:
        self.stop()

    def _launch(self) -> None:
        self._choose_ports()
        for node in self.node_ids:
            self._write_config(node)
        self._format()
        for process in self.processes:
            if not process.alive:
                process.start()
        addresses = self.bootstrap.split(",")
        wait_ready(self.processes, lambda: kafka_answers(addresses), JVM_READY_S)

    def _choose_ports(self) -> None:
        if not self._has_started:
            free = iter(free_ports(2 * len(self.ports)))
            self.ports = [next(free) for _ in self.ports]
            self.ports[0] = self._given_port or self.ports[0]
            self._controller_ports = list(free)[: len(self.ports)]

    def _folder(self, node: int) -> Path:
        return self._data_dir / f"node-{node}"

    def _write_config(self, node: int) -> None:
        folder = self._folder(node)
        folder.mkdir(parents=True, exist_ok=True)
        lines = [f"{key}={_java_escaped(value)}" for key, value in self._properties(node).items()]
        (folder / "server.properties").write_text("\n".join(lines) + "\n", encoding="ascii")
        (self._data_dir / "log4j2.properties").write_text(LOG4J, encoding="ascii")

    def _properties(self, node: int) -> dict[str, str]:
        voters = zip(self.node_ids, self._controller_ports, strict=True)
        broker = f"PLAINTEXT://{LOOPBACK}:{self.ports[node - 1]}"
        controller = f"CONTROLLER://{LOOPBACK}:{self._controller_ports[node - 1]}"
        copies = str(min(3, len(self.ports)))
        return {
            "node.id": str(node),
            "process.roles": "broker,controller",
            "controller.quorum.voters": ",".join(f"{n}@{LOOPBACK}:{port}" for n, port in voters),
            "listeners": f"{broker},{controller}",
            "advertised.listeners": broker,
            "inter.broker.listener.name": "PLAINTEXT",
            "controller.listener.names": "CONTROLLER",
            "listener.security.protocol.map": "PLAINTEXT:PLAINTEXT,CONTROLLER:PLAINTEXT",
            "log.dirs": str(self._folder(node) / "data"),
            "offsets.topic.replication.factor": copies,
            "transaction.state.log.replication.factor": copies,
            "transaction.state.log.min.isr": "1",
            "share.coordinator.state.topic.replication.factor": copies,
            "share.coordinator.state.topic.min.isr": "1",
            **SERVER_PROPERTIES,
            **self._extra,
        }

    def _format(self) -> None:
        """Writes the cluster id into folders that have none yet; the nodes side by side."""
        new = [n for n in self.node_ids if not (self._folder(n) / "data/meta.properties").exists()]
        cluster_id = base64.urlsafe_b64encode(uuid.uuid4().bytes).decode("ascii").rstrip("=")
        tools = {}
        for node in new:
            command = [
                "kafka.tools.StorageTool",
                "format",
                f"--cluster-id={cluster_id}",
                "--config",
            ]
            tools[node] = ServerProcess(
                f"Formatting the storage of Apache Kafka node {node}",
                [*self._java, *command, str(self._folder(node) / "server.properties")],
                self._folder(node) / "format.log",
            )
            tools[node].start()
        for node, tool in tools.items():
            if tool.wait(JVM_READY_S) != 0:
                tool.kill()
                raise tool.failure(f"failed in {self._folder(node)}")


# Small, quick and sure to be noticed: what a broker on one machine for one person needs.
SERVER_PROPERTIES = {
    "auto.create.topics.enable": "false",  # a misspelt topic is an error, not a topic
    "offsets.topic.num.partitions": "4",
    "transaction.state.log.num.partitions": "4",
    "share.coordinator.state.topic.num.partitions": "4",
    "group.initial.rebalance.delay.ms": "0",
    # A dead worker's partitions move after 6 s, not 45; tests may go down to 1 s. The first
    # belongs to the classic group protocol, the rest to the consumer protocol (KIP-848).
    "group.min.session.timeout.ms": "1000",
    "group.consumer.min.session.timeout.ms": "1000",
    "group.consumer.session.timeout.ms": "6000",
    "group.consumer.min.heartbeat.interval.ms": "500",
    "group.consumer.heartbeat.interval.ms": "1000",
    # A killed node may come back only when its old session has ended: 3 s, not 9.
    "broker.session.timeout.ms": "3000",
    "broker.heartbeat.interval.ms": "500",
    "log.cleaner.dedupe.buffer.size": str(16 * 1024 * 1024),  # 128 MB of the heap otherwise
    "num.network.threads": "2",
    "num.io.threads": "4",
    "log.initial.task.delay.ms": "1000",  # retention looks for old segments soon, then
    "log.retention.check.interval.ms": "10000",  # every 10 s, not 5 minutes
}

LOG4J = """\
status = warn
appender.out.type = Console
appender.out.name = out
appender.out.layout.type = PatternLayout
appender.out.layout.pattern = %d{ISO8601} %p %m (%c{1})%n
rootLogger.level = info
rootLogger.appenderRef.out.ref = out
# Hundreds of lines of settings at each start.
logger.config.name = org.apache.kafka.common.config
logger.config.level = warn
logger.server.name = kafka.server.KafkaConfig
logger.server.level = warn
"""


def apache_kafka_version() -> str:
    """As the pom pins it."""
    space = {"m": "http://maven.apache.org/POM/4.0.0"}
    pom = ElementTree.parse(APACHE_POM)
    for dependency in pom.iterfind("m:dependencies/m:dependency", space):
        if dependency.findtext("m:groupId", namespaces=space) == "org.apache.kafka":
            return dependency.findtext("m:version", "", space)
    raise RuntimeError(f"{APACHE_POM} names no Apache Kafka")


def apache_kafka_jars() -> Path:
    """The folder of Apache Kafka's jars, fetched with Maven if the cache lacks them.

    Raises UserError without Java or Maven, or if Maven fails.
    """
    _java()
    # Where each user's caches go by convention: beside pip's, outside the checkout.
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "penchant"
    # Named by the whole pom, so that another log4j is another folder, and another checkout that
    # pins other jars keeps its own.
    digest = hashlib.sha256(APACHE_POM.read_bytes()).hexdigest()[:8]
    jars = cache / f"kafka-{apache_kafka_version()}-{digest}"
    if jars.exists():
        return jars
    cache.mkdir(parents=True, exist_ok=True)
    with (cache / "kafka.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # two test runs at once: the second finds it done
        if not jars.exists():
            _fetch_jars(jars)
    return jars


def _fetch_jars(jars: Path) -> None:
    maven = shutil.which("mvn")
    if maven is None:
        raise UserError(f"Apache Kafka is fetched with Maven, which is missing: {JAVA_AND_MAVEN}")
    with tempfile.TemporaryDirectory(dir=jars.parent, prefix="kafka-") as temporary:
        folder = Path(temporary) / "jars"
        command = [maven, "--batch-mode", "--quiet", "--file", str(APACHE_POM)]
        goal = ["dependency:copy-dependencies", f"-DoutputDirectory={folder}"]
        answer = subprocess.run([*command, *goal], capture_output=True, text=True, check=False)
        if answer.returncode != 0:
            tail = "\n".join(answer.stdout.splitlines()[-10:])
            raise UserError(f"Maven could not fetch Apache Kafka; its last lines:\n{tail}")
        folder.rename(jars)


def _java() -> str:
    java = shutil.which("java")
    if java is None:
        raise UserError(f"Apache Kafka needs Java 17, which is missing: {JAVA_AND_MAVEN}")
    answer = subprocess.run([java, "-version"], capture_output=True, text=True, check=False)
    found = re.search(r'version "(\d+)', answer.stderr)
    if found is None or int(found[1]) < 17:
        version = found[1] if found else "of an unknown version"
        raise UserError(f"Apache Kafka needs Java 17, {java} is {version}: {JAVA_AND_MAVEN}")
    return java


def _java_escaped(value: str) -> str:
    """As a properties file wants it: ASCII, with backslashes doubled."""
    return json.dumps(value)[1:-1]
