"""`penchant demo` as a process without a terminal: what it prints, and that nothing is left."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from profiles import ProfileReader
from stream.demo import AFTER_SWAP_S
from stream.processes import free_port

SECONDS = 3
STATUS = re.compile(r"^ *\d+\.\d s  \d\d Sep 1997  ([\d,]+) events  [\d,]+ events/s  lag \d+", re.M)
STATUS_LINE = re.compile(r"^ *\d+\.\d s  ", re.M)
SHOPPER = re.compile(
    r"^ +shopper (\w+): \d+ events; last (purchase|click|review) .+; likes \w.+; near .+ \d\.\d\d",
    re.M,
)
SUMMARY = re.compile(r"^([\d,]+) events sent, ([\d,]+) counted in ([\d,]+) profiles", re.M)


def environment(releases: Path) -> dict[str, str]:
    """As wide as the base, so that there is nothing to fit; few tokens, for speed."""
    groups = ("KAFKA_", "REDIS_", "STREAM_", "MODEL_", "PROFILE_", "DEMO_", "NAMESPACE")
    inherited = {k: v for k, v in os.environ.items() if not k.startswith(groups)}
    return inherited | {
        "MODEL_RELEASES": str(releases),
        "MODEL_DIMENSIONS": "384",
        "MODEL_MAX_TOKENS": "8",
    }


@pytest.fixture(scope="module")
def releases(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("releases")


def running_in(folder: Path) -> list[str]:
    """Every process that was started below a folder: all of the demo's keep its folder."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            at, command = (process / "cwd").readlink(), (process / "cmdline").read_bytes()
        except OSError:
            continue
        if at.is_relative_to(folder) and command:
            found.append(f"{process.name} {command.replace(bytes(1), b' ').decode()}")
    return found


def wait_until(is_so: Callable[[], bool], patience_s: float = 60.0) -> None:
    deadline_s = time.monotonic() + patience_s
    while not is_so():
        assert time.monotonic() < deadline_s, "it did not happen in time"
        time.sleep(0.05)


@dataclass
class Demo:
    """A demo that runs, with its output in a file."""

    process: subprocess.Popen[bytes]
    folder: Path

    @property
    def output(self) -> str:
        return (self.folder / "output").read_text(encoding="utf-8")

    def wait_for(self, text: str) -> None:
        wait_until(lambda: text in self.output or self.process.poll() is not None)
        assert text in self.output

    def end(self, patience_s: float = 60.0) -> int:
        return self.process.wait(patience_s)


@contextmanager
def demo_in(folder: Path, releases: Path, seconds: float | None, *options: str) -> Iterator[Demo]:
    command = [sys.executable, "-m", "stream.cli", "demo", *options]
    variables = environment(releases)
    if seconds is not None:
        variables["DEMO_SECONDS"] = str(seconds)
    with (folder / "output").open("wb") as output:
        process = subprocess.Popen(
            command, cwd=folder, env=variables, stdout=output, stderr=subprocess.STDOUT
        )
    try:
        yield Demo(process, folder)
    finally:
        process.kill()  # process_guard does the rest
        process.wait()


@pytest.fixture(scope="module")
def ended(tmp_path_factory: pytest.TempPathFactory, releases: Path) -> Demo:
    """A demo that came to its own end."""
    folder = tmp_path_factory.mktemp("demo")
    with demo_in(folder, releases, SECONDS) as demo:
        assert demo.end() == 0, demo.output
        return demo


def test_without_a_terminal_it_prints_lines_and_ends_by_itself(ended: Demo) -> None:
    counts = [int(count.replace(",", "")) for count in STATUS.findall(ended.output)]
    assert len(counts) >= SECONDS - 1, ended.output
    assert counts == sorted(counts)
    assert counts[-1] > 0
    assert SHOPPER.search(ended.output), ended.output
    assert "\x1b" not in ended.output


def test_every_event_that_it_sent_is_counted(ended: Demo) -> None:
    summary = SUMMARY.search(ended.output)
    assert summary is not None, ended.output
    sent, counted, profiles = (int(number.replace(",", "")) for number in summary.groups())
    assert sent == counted > profiles > 0


def test_at_its_end_nothing_runs_and_no_stack_is_on_record(ended: Demo) -> None:
    wait_until(lambda: not running_in(ended.folder), patience_s=2.0)
    assert {path.name for path in ended.folder.iterdir()} == {".penchant", "output"}
    assert not (ended.folder / ".penchant" / "stack.json").exists()


def test_the_commands_it_ends_with_work_as_printed(ended: Demo, releases: Path) -> None:
    # Free ports: somebody may use the usual ones here.
    redis_url = f"redis://127.0.0.1:{free_port()}/0"
    variables = environment(releases) | {
        "KAFKA_BOOTSTRAP": f"127.0.0.1:{free_port()}",
        "REDIS_URL": redis_url,
        "KAFKA_SESSION_TIMEOUT_S": "2",
    }

    def shell(line: str) -> str:
        done = subprocess.run(
            line, shell=True, cwd=ended.folder, env=variables, capture_output=True, text=True
        )
        assert done.returncode == 0, f"{line}\n{done.stdout}{done.stderr}"
        return done.stdout

    printed = ended.output.split("To go on by hand")[1].splitlines()[1:]
    up, show, produce, updater, down = (line.split("  # ")[0].strip() for line in printed)
    user_id = show.split()[-1]
    try:
        shell(up)
        with ProfileReader(redis_url) as reader:
            before = reader.get(user_id).events
            assert f"{user_id}  {before:,} events" in shell(show)
            assert "1 sent" in shell(produce)
            worker = subprocess.Popen(
                ["/bin/sh", "-c", f"exec {updater}"],
                cwd=ended.folder, env=variables, stderr=subprocess.DEVNULL,
            )  # fmt: skip
            wait_until(lambda: reader.get(user_id).events == before + 1)
            worker.send_signal(signal.SIGINT)
            worker.wait(30)
    finally:
        shell(down)
    assert running_in(ended.folder) == []


def test_ctrl_c_while_events_flow_ends_it_in_order(tmp_path: Path, releases: Path) -> None:
    with demo_in(tmp_path, releases, seconds=600) as demo:
        demo.wait_for(" events/s  lag ")
        demo.process.send_signal(signal.SIGINT)
        assert demo.end() == 0, demo.output
        assert SUMMARY.search(demo.output), demo.output
        assert "Traceback" not in demo.output
        assert running_in(tmp_path) == []
        assert not (tmp_path / ".penchant" / "stack.json").exists()


def test_ctrl_c_while_it_starts_ends_it_in_order(tmp_path: Path, releases: Path) -> None:
    with demo_in(tmp_path, releases, seconds=600) as demo:
        demo.wait_for("starting Redis, broker and topics: ")
        demo.process.send_signal(signal.SIGINT)
        assert demo.end() == 0, demo.output
        assert "stopped before the first event" in demo.output
        assert "Traceback" not in demo.output
        assert running_in(tmp_path) == []
        assert not (tmp_path / ".penchant" / "stack.json").exists()


def test_an_impatient_second_ctrl_c_leaves_nothing_either(tmp_path: Path, releases: Path) -> None:
    with demo_in(tmp_path, releases, seconds=600) as demo:
        demo.wait_for("starting Redis, broker and topics: ")
        for _ in range(2):
            demo.process.send_signal(signal.SIGINT)
            time.sleep(0.05)  # two signals at once would arrive as one
        assert demo.end() in (0, 128 + signal.SIGINT)
        assert "Traceback" not in demo.output
        wait_until(lambda: not running_in(tmp_path), patience_s=5.0)


def test_what_a_stack_kept_in_redis_is_set_aside(tmp_path: Path, releases: Path) -> None:
    kept = tmp_path / ".penchant" / "stack" / "redis" / "appendonlydir"
    kept.mkdir(parents=True)
    for _ in range(2):  # the second demo deletes what the first one left, and only that
        with demo_in(tmp_path, releases, seconds=600) as demo:
            demo.wait_for("starting Redis, broker and topics: ")
            demo.process.send_signal(signal.SIGINT)
            assert demo.end() == 0, demo.output
    aside = list((tmp_path / ".penchant" / "stack").glob("redis-until-*"))
    assert len(aside) == 1
    assert (aside[0] / "appendonlydir").is_dir()


def test_a_demo_that_is_killed_takes_its_parts_along(tmp_path: Path, releases: Path) -> None:
    with demo_in(tmp_path, releases, seconds=600) as demo:
        demo.wait_for("starting Redis, broker and topics: ")
        wait_until(lambda: any("updater" in process for process in running_in(tmp_path)))
        demo.process.kill()
        wait_until(lambda: not running_in(tmp_path), patience_s=5.0)


def test_it_refuses_to_start_beside_a_running_stack(tmp_path: Path, releases: Path) -> None:
    with demo_in(tmp_path, releases, seconds=600) as first:
        first.wait_for("starting Redis, broker and topics: ")
        second = subprocess.run(
            [sys.executable, "-m", "stream.cli", "demo"],
            cwd=tmp_path, env=environment(releases), capture_output=True, text=True,
        )  # fmt: skip
        assert second.returncode == 1
        assert "a stack runs here already (tansu at 127.0.0.1:" in second.stderr
        assert "Traceback" not in second.stderr


@pytest.mark.timeout(900)  # the demo gives a swap ten minutes, and starts before that
def test_with_learn_a_better_release_is_taken_while_events_flow(
    tmp_path: Path, releases: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LEARN_EVERY_S", "6")
    monkeypatch.setenv("LEARN_EPOCHS", "4")
    with demo_in(tmp_path, releases, None, "--learn", "--speed", "200000") as demo:
        assert demo.end(patience_s=840) == 0, demo.output
    _, swapped, after = demo.output.partition("swapped: ")
    assert swapped, demo.output
    assert 1 <= len(STATUS_LINE.findall(after)) <= AFTER_SWAP_S + 2
    assert re.search(r"learned: recall@20 .+: accepted; trained-\w+ goes live", demo.output)
    summary = SUMMARY.search(demo.output)
    assert summary is not None, demo.output
    assert summary[1] == summary[2]  # sent and counted
    assert running_in(tmp_path) == []
    assert not list(releases.glob("trained-*"))  # what it learns of films serves no shop


def test_a_learning_demo_that_ends_before_a_swap_says_why_none_came(
    tmp_path: Path, releases: Path
) -> None:
    with demo_in(tmp_path, releases, SECONDS, "--learn") as demo:
        assert demo.end() == 0, demo.output
    (log,) = re.findall(r"^no swap came: no fine-tune had ended.+\((.+)\)$", demo.output, re.M)
    assert (tmp_path / log).exists()
