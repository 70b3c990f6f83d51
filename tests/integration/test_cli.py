"""The command line: failures are one line that says what to do, and what it shows is there."""

from __future__ import annotations

import io
import json
import logging
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import typer
from rich.console import Console

from model.releases import Release
from profiles import Connection, ProfileReader
from stream import cli, terminal
from stream.base_release import require_as_set
from stream.dead_letter import DeadLetters
from stream.errors import UserError
from stream.local_stack import ApacheKafka, RedisServer, ServerRecord, Stack, Tansu
from stream.processes import ProcessIdentity, free_ports
from stream.settings import KafkaSettings, ModelSettings, Settings
from stream.topics import create_topics
from tests.integration.shop_traffic import read_back
from tests.integration.test_profile_reader import fill

pytestmark = pytest.mark.redis

NOBODY = "127.0.0.1:1"  # a port where nothing listens
CLICK = {"type": "click", "user_id": "u1", "item_id": "i1", "ts": 1_772_366_400_000}


@dataclass(frozen=True)
class Ran:
    code: int
    out: str
    err: str


Run = Callable[..., Ran]


@pytest.fixture
def run(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    namespace: str,
) -> Iterator[Run]:
    """`run("status", KAFKA_BOOTSTRAP="…")`: `penchant status` in this process, without a stack."""
    for group in ("KAFKA", "REDIS", "STREAM", "MODEL", "PROFILE"):
        for name in [n for n in os.environ if n.startswith(group + "_")]:
            monkeypatch.delenv(name)
    monkeypatch.setenv("NAMESPACE", namespace)
    monkeypatch.setenv("STREAM_DATA_DIR", str(tmp_path / "data"))
    monkeypatch.setenv("MODEL_RELEASES", str(tmp_path / "releases"))
    monkeypatch.setattr(cli.console, "width", 200)
    level = logging.getLogger().level

    def call(*arguments: str, **environment: str) -> Ran:
        with monkeypatch.context() as patch:
            for name, value in environment.items():
                patch.setenv(name, value)
            patch.setattr(sys, "argv", ["penchant", *arguments])
            with pytest.raises(SystemExit) as ended:
                cli.main()
        said = capsys.readouterr()
        return Ran(int(ended.value.code or 0), said.out, said.err)

    yield call
    logging.getLogger().setLevel(level)


def fails(ran: Ran, fix: str) -> None:
    assert ran.code == 1
    assert ran.err.startswith("penchant: ")
    assert ran.err.count("\n") == 1
    assert ran.err.endswith("\n")
    assert "Traceback" not in ran.err
    assert fix in ran.err


@pytest.mark.parametrize(
    ("arguments", "environment", "fix"),
    [
        ("topics create", {"KAFKA_PARTITIONS": "x"}, "KAFKA_PARTITIONS: Input should be"),
        ("topics create", {"PROFILE_WEIGHTS": "x"}, 'PROFILE_WEIGHTS is not JSON: write it as {"'),
        ("status", {"PROFILE_HALF_LIVES_S": "1,2"}, "PROFILE_HALF_LIVES_S is not JSON: write"),
        ("profile show u1", {"REDIS_URL": "foo"}, "write it as redis://HOST:6379/0"),
        ("up --redis foo", {}, "foo is no Redis URL"),
        ("updater", {"REDIS_URL": "foo"}, "write it as redis://HOST:6379/0"),
        ("profile show u1", {"REDIS_TLS_CA": "ca.pem"}, "let REDIS_URL begin with rediss://"),
        ("profile show u1", {"REDIS_URL": f"redis://{NOBODY}"}, "start it, or set REDIS_URL"),
        ("releases build", {"MODEL_BASE": "/nowhere"}, "/nowhere"),
        ("releases build --dataset nothing", {}, "choose one of movielens"),
        ("produce missing.jsonl", {}, "cannot read missing.jsonl"),
        ("replay movielens --speed -1", {}, "give 0 or more"),
        ("replay movielens --start 2024", {}, "write 1998-03-01 or"),
        ("replay movielens --start 1998-03-02 --end 1998-03-01", {}, "swap start and end"),
    ],
)
def test_what_can_be_mended_is_one_line_that_says_how(
    run: Run, arguments: str, environment: dict[str, str], fix: str
) -> None:
    fails(run(*arguments.split(), **environment), fix)


def test_no_password_of_an_unreadable_url_is_shown(run: Run) -> None:
    ran = run("profile", "show", "u1", REDIS_URL="redis://:se/cret@localhost")
    fails(ran, "REDIS_PASSWORD")
    assert "'se'" not in ran.err
    assert "cret" not in ran.err


def test_producing_without_a_broker_does_not_wait_for_the_producer(
    run: Run, tmp_path: Path
) -> None:
    (tmp_path / "events.jsonl").write_text(json.dumps(CLICK) + "\n")
    ran = run("produce", str(tmp_path / "events.jsonl"), KAFKA_BOOTSTRAP=NOBODY)
    fails(ran, "name yours in KAFKA_BOOTSTRAP")


def test_a_wrong_redis_password_names_the_setting(
    run: Run, start_redis: Callable[..., RedisServer]
) -> None:
    server = start_redis(password="right")
    url = f"redis://127.0.0.1:{server.port}/0"
    fails(run("profile", "show", "u1", REDIS_URL=url, REDIS_PASSWORD="wrong"), "REDIS_PASSWORD")


@pytest.mark.kafka
def test_a_wrong_kafka_password_names_the_settings(
    run: Run, start_apache_kafka: Callable[..., ApacheKafka]
) -> None:
    module = "org.apache.kafka.common.security.plain.PlainLoginModule"
    plain, controller, login = free_ports(3)
    plain_and_login = f"PLAINTEXT://127.0.0.1:{plain},LOGIN://127.0.0.1:{login}"
    start_apache_kafka(
        port=plain,
        properties={
            "listeners": f"{plain_and_login},CONTROLLER://127.0.0.1:{controller}",
            "advertised.listeners": plain_and_login,
            "controller.quorum.voters": f"1@127.0.0.1:{controller}",
            "listener.security.protocol.map": "PLAINTEXT:PLAINTEXT,CONTROLLER:PLAINTEXT,"
            "LOGIN:SASL_PLAINTEXT",
            "listener.name.login.sasl.enabled.mechanisms": "PLAIN",
            "listener.name.login.plain.sasl.jaas.config": f'{module} required user_shop="right";',
        },
    )
    where = {
        "KAFKA_BOOTSTRAP": f"127.0.0.1:{login}",
        "KAFKA_SECURITY_PROTOCOL": "SASL_PLAINTEXT",
        "KAFKA_SASL_USERNAME": "shop",
        "KAFKA_PARTITIONS": "1",
    }
    ran = run("topics", "create", KAFKA_SASL_PASSWORD="wrong", **where)
    fails(ran, "check KAFKA_SASL_USERNAME, KAFKA_SASL_PASSWORD and KAFKA_SASL_MECHANISM")
    assert "wrong" not in ran.err
    assert run("topics", "create", KAFKA_SASL_PASSWORD="right", **where).code == 0


@pytest.mark.kafka
def test_tls_to_a_broker_that_has_none_names_the_settings(
    run: Run, apache_kafka: ApacheKafka
) -> None:
    where = {"KAFKA_BOOTSTRAP": apache_kafka.bootstrap, "KAFKA_SECURITY_PROTOCOL": "SSL"}
    ran = run("topics", "create", **where)
    fails(ran, "check KAFKA_SECURITY_PROTOCOL and KAFKA_SSL_CA_LOCATION")


def test_a_user_without_a_profile_is_named(run: Run, redis_url: str) -> None:
    fails(run("profile", "show", "nobody", REDIS_URL=redis_url), "no profile of user 'nobody'")


def test_a_taken_port_is_named(run: Run, tansu: Tansu) -> None:
    ran = run("up", KAFKA_BOOTSTRAP=tansu.bootstrap)
    port = tansu.bootstrap.rpartition(":")[2]
    fails(ran, f"Port {port} of this machine is taken by process ")


def test_a_data_folder_that_cannot_be_one_names_the_setting(run: Run, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for folder in (tmp_path / "file", tmp_path / "file" / "below"):
        fails(run("up", STREAM_DATA_DIR=str(folder)), "name another in STREAM_DATA_DIR")


def test_a_worker_without_a_release_says_how_to_build_one(
    run: Run, tansu: Tansu, redis_url: str, tmp_path: Path, namespace: str
) -> None:
    where = {"KAFKA_BOOTSTRAP": tansu.bootstrap, "REDIS_URL": redis_url}
    assert run("topics", "create", **where).code == 0
    # In a process of its own: Faust changes the signal handlers and loggers of this one.
    ended = subprocess.run(
        [sys.executable, "-m", "stream.cli", "updater"],
        env=dict(os.environ) | where,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    fails(Ran(ended.returncode, ended.stdout, ended.stderr), "penchant releases build")


def test_a_failure_that_was_not_foreseen_points_to_the_traceback(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken() -> Settings:
        raise RuntimeError("[odd]")

    monkeypatch.setattr(cli, "load_settings", broken)
    ran = run("topics", "create")
    assert (ran.code, ran.err.splitlines()[0]) == (1, "penchant: RuntimeError: [odd]")
    assert "--debug" in ran.err
    with pytest.raises(RuntimeError):
        run("topics", "create", "--debug")


def test_a_live_release_of_other_settings_is_not_taken_for_theirs(tmp_path: Path) -> None:
    live = Release(
        path=tmp_path / "base-1",
        id="base-1",
        space="0" * 16,
        base="bundled",
        width=384,
        dimensions=128,
        pooling="mean",
        query_prefix="",
        passage_prefix="",
        max_tokens=128,
        fitted_on=0,
        created_at="2026-01-01T00:00:00+00:00",
    )
    require_as_set(live, ModelSettings(releases=tmp_path))
    other = ModelSettings(releases=tmp_path, dimensions=64, query_prefix="query: ")
    with pytest.raises(UserError, match="another folder in MODEL_RELEASES") as raised:
        require_as_set(live, other)
    assert "MODEL_DIMENSIONS is 64, the release has 128" in str(raised.value)
    assert "MODEL_QUERY_PREFIX is 'query: ', the release has ''" in str(raised.value)
    assert "MODEL_POOLING" not in str(raised.value)


def test_the_embedded_brokers_time_out_is_for_the_embedded_broker_alone(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    this = ProcessIdentity.of(os.getpid())
    assert this is not None
    stack = Stack(kafka=ServerRecord(kind="tansu", address="127.0.0.1:2", processes=(this,)))
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "stack.json").write_text(stack.model_dump_json())
    for variable, expected in (("10.0.0.1:9092", 45.0), ("", 6.0)):
        with monkeypatch.context() as patch:
            patch.setattr(os, "environ", dict(os.environ))
            if variable:
                os.environ["KAFKA_BOOTSTRAP"] = variable
            kafka = cli.load_settings().kafka
        assert (kafka.bootstrap, kafka.session_timeout_s) == (variable or "127.0.0.1:2", expected)


def test_a_profile_is_shown_by_time_scale(run: Run, redis_url: str, namespace: str) -> None:
    fill(redis_url, namespace)
    shown = run("profile", "show", "ann", REDIS_URL=redis_url).out
    lines = [line.strip() for line in shown.splitlines()]
    scales = [re.split(" {2,}", line) for line in lines if re.match(r"\d+ (minutes|days?) ", line)]
    assert [row[0] for row in scales] == ["30 minutes", "1 day", "30 days"]
    with ProfileReader(Connection(redis_url), namespace) as reader:
        nearest = [reader.nearest_items("ann", 1, scale)[0].title for scale in range(3)]
    assert len(set(nearest)) > 1
    assert [row[-1] for row in scales] == nearest


def test_a_profile_for_programs_is_the_readers(run: Run, redis_url: str, namespace: str) -> None:
    fill(redis_url, namespace)
    plain, full = (
        json.loads(run("profile", "show", "ann", "--json", *more, REDIS_URL=redis_url).out)
        for more in ((), ("--vectors",))
    )
    with ProfileReader(Connection(redis_url), namespace) as reader:
        profile = reader.get("ann")
        nearest = [item.item_id for item in reader.nearest_items("ann")]
    assert (plain["user_id"], plain["events"]) == ("ann", profile.events)
    assert [entry["t_ms"] for entry in plain["window"]] == profile.window["t_ms"].tolist()
    assert [item["item_id"] for item in plain["nearest_items"]] == nearest[:8]
    for k, scale in enumerate(full["scales"]):
        assert scale.pop("interest") == pytest.approx(profile.interest(k).tolist(), abs=1e-6)
    assert full == plain


def test_similar_shoppers_are_listed_with_what_they_like(
    run: Run, redis_url: str, namespace: str
) -> None:
    fill(redis_url, namespace)
    with ProfileReader(Connection(redis_url), namespace) as reader:
        similar = reader.similar_users("ann", 2)
        liked = {user: reader.top_categories(reader.get(user), 1)[0][0] for user, _ in similar}
    assert len(similar) == 2
    shown = run("profile", "similar", "ann", "--k", "2", REDIS_URL=redis_url).out
    rows = [re.split(r" *[│┃] *", line)[1:4] for line in shown.splitlines() if "│" in line]
    assert [row[:2] for row in rows] == [[user, f"{cosine:.3f}"] for user, cosine in similar]
    assert all(row[2].startswith(liked[row[0]]) for row in rows)


def test_a_profile_without_an_item_has_no_empty_tables(
    run: Run, redis_url: str, namespace: str
) -> None:
    fill(redis_url, namespace)
    shown = run("profile", "show", "looker", REDIS_URL=redis_url)
    assert shown.code == 0
    assert "1 impression" in shown.out
    assert "category" not in shown.out


def test_a_replay_keeps_to_its_dates_and_warns_of_profiles_that_are_there(
    run: Run, tansu: Tansu, redis_url: str, namespace: str
) -> None:
    where = {
        "KAFKA_BOOTSTRAP": tansu.bootstrap,
        "KAFKA_PARTITIONS": "2",
        "REDIS_URL": redis_url,
    }
    assert run("topics", "create", **where).code == 0
    replay = ("replay", "movielens", "--speed", "0", "--start", "1998-03-01", "--end", "1998-03-02")
    first = run(*replay, **where)
    assert first.code == 0
    assert "Note:" not in first.out
    in_a_day = sum(int(n) for n in re.findall(r"(\d+) (?:purchase|click|review)", first.out))
    assert 0 < in_a_day < 2_000  # of 100,000 in seven months

    fill(redis_url, namespace)
    again = run(*replay, "--limit", "1", **where).out
    assert "penchant up --fresh" in again


def _commands() -> list[str]:
    def below(command: Any, path: str) -> Iterator[str]:
        yield path
        for name, child in getattr(command, "commands", {}).items():
            yield from below(child, f"{path} {name}".strip())

    return list(below(typer.main.get_command(cli.app), ""))


@pytest.mark.parametrize("command", _commands())
def test_every_command_explains_itself(run: Run, command: str) -> None:
    ran = run(*command.split(), "--help")
    assert (ran.code, ran.err) == (0, "")
    assert "Usage: penchant" in ran.out


def test_topic_names_are_shown_whole(
    run: Run, tansu: Tansu, namespace: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cli.console, "width", 80)
    ran = run("topics", "create", KAFKA_BOOTSTRAP=tansu.bootstrap, KAFKA_PARTITIONS="2")
    assert ran.code == 0
    for topic in ("events", "items", "dead-letter"):
        assert f"{namespace}.{topic} " in ran.out


def test_good_lines_are_sent_and_bad_ones_named(run: Run, tansu: Tansu, tmp_path: Path) -> None:
    where = {"KAFKA_BOOTSTRAP": tansu.bootstrap, "KAFKA_PARTITIONS": "2"}
    assert run("topics", "create", **where).code == 0
    lines = [json.dumps(CLICK), "", "{", json.dumps(CLICK | {"type": "wishlist"})]
    file = tmp_path / "events.jsonl"
    file.write_text("\n".join(lines) + "\n")
    ran = run("produce", str(file), **where)
    assert (ran.code, ran.out) == (1, "1 sent, 2 refused\n")
    assert [line.partition(":")[0] for line in ran.err.splitlines()] == ["line 3", "line 4"]

    file.write_text(json.dumps({"item_id": "i1", "title": "A lamp"}) + "\n")
    assert run("produce", "--items", str(file), **where) == Ran(0, "1 sent\n", "")


def test_a_person_sees_how_far_a_file_is(
    run: Run, tansu: Tansu, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    where = {"KAFKA_BOOTSTRAP": tansu.bootstrap, "KAFKA_PARTITIONS": "2"}
    assert run("topics", "create", **where).code == 0
    (tmp_path / "events.jsonl").write_text(f"{json.dumps(CLICK)}\n" * 3)
    screen = io.StringIO()
    monkeypatch.setattr(terminal, "errors", Console(file=screen, force_terminal=True))
    assert run("produce", str(tmp_path / "events.jsonl"), **where).out == "3 sent\n"
    assert "lines" in screen.getvalue()
    assert "3/3" in screen.getvalue()


@pytest.mark.kafka
def test_an_event_without_a_time_is_sent_without_one(
    run: Run, apache_kafka: ApacheKafka, tmp_path: Path, namespace: str
) -> None:
    where = {"KAFKA_BOOTSTRAP": apache_kafka.bootstrap, "KAFKA_PARTITIONS": "1"}
    assert run("topics", "create", **where).code == 0
    written = {"type": "click", "user_id": "u1", "item_id": "i1"}
    file = tmp_path / "events.jsonl"
    file.write_text(f"{json.dumps(written)}\n{json.dumps(CLICK)}\n")
    assert run("produce", str(file), **where) == Ran(0, "2 sent\n", "")
    kafka = KafkaSettings(bootstrap=apache_kafka.bootstrap, partitions=1)
    stored = read_back(Settings(namespace=namespace, kafka=kafka), "events")
    values = [json.loads(record.value or b"") for record in stored]
    assert [value.pop("event_id", None) is not None for value in values] == [True, True]
    assert values == [{**event, "schema_version": 1} for event in (written, CLICK)]


def test_all_rejects_of_a_batch_are_shown_newest_first(
    run: Run, tansu: Tansu, namespace: str
) -> None:
    where = {"KAFKA_BOOTSTRAP": tansu.bootstrap, "KAFKA_PARTITIONS": "2"}
    settings = Settings(
        namespace=namespace, kafka=KafkaSettings(bootstrap=tansu.bootstrap, partitions=2)
    )
    create_topics(settings)
    assert run("dlq", "show", **where) == Ran(0, "no rejects\n", "")
    letters = DeadLetters(settings)
    for offset in range(4):  # one key, so one partition, and one flush, so one batch
        letters.put(
            key=b"u1",
            value=b"[/bold]{",
            headers=None,
            topic="shop.events",
            partition=0,
            offset=offset,
            timestamp_ms=0,
            reason="json",
            detail="no JSON",
        )
    letters.flush()
    shown = run("dlq", "show", **where).out.splitlines()
    assert [line.split()[3] for line in shown[::2]] == ["3", "2", "1", "0"]
    assert set(shown[1::2]) == {"    [/bold]{"}
    newest = run("dlq", "show", "--limit", "2", **where).out.splitlines()
    assert newest == shown[:4]


def test_a_reject_that_was_sent_again_is_shown_once(run: Run, tansu: Tansu, namespace: str) -> None:
    where = {"KAFKA_BOOTSTRAP": tansu.bootstrap, "KAFKA_PARTITIONS": "2"}
    settings = Settings(
        namespace=namespace, kafka=KafkaSettings(bootstrap=tansu.bootstrap, partitions=2)
    )
    create_topics(settings)
    for _ in range(3):  # a worker that ends before it commits, and is started anew
        letters = DeadLetters(settings)
        for offset in (7, 8):
            letters.put(
                key=b"u1",
                value=b"{",
                headers=None,
                topic="shop.events",
                partition=offset % 2,
                offset=offset,
                timestamp_ms=0,
                reason="json",
                detail="no JSON",
            )
        letters.flush()
    shown = run("dlq", "show", **where).out.splitlines()
    assert [line.split()[1:] for line in shown[::2]] == [
        ["shop.events[0]", "@", "8", "json:", "no", "JSON", "(3", "copies)"],
        ["shop.events[1]", "@", "7", "json:", "no", "JSON", "(3", "copies)"],
    ]


def test_the_schemas_in_docs_are_those_of_the_code(run: Run, tmp_path: Path) -> None:
    assert run("schema", "export", str(tmp_path / "schemas")).code == 0
    docs = Path(cli.__file__).parents[1] / "docs" / "schemas"
    written = {file.name: file.read_text() for file in (tmp_path / "schemas").iterdir()}
    assert written == {file.name: file.read_text() for file in docs.iterdir()}
