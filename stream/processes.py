"""One supervised server process: start, watch, stop, and die with its parent.

Knows nothing of Kafka or Redis. A process is named by its pid *and* its start time, so
that a pid used again by another program is never signalled. Linux only (reads /proc).
"""

from __future__ import annotations

import atexit
import os
import re
import secrets
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from .errors import UserError
from .process_guard import start_ticks

POLL_S = 0.02
TAIL_LINES = 15

_PORT_TAKEN = re.compile(r"Address (already )?in use", re.IGNORECASE)


@dataclass(frozen=True)
class ProcessIdentity:
    """A process that can still be recognised after its pid has been used again."""

    pid: int
    started_ticks: int
    boot_id: str
    """Ticks count from boot, so they mean nothing after another one."""

    @classmethod
    def of(cls, pid: int) -> ProcessIdentity | None:
        ticks = start_ticks(pid)
        return None if ticks is None else cls(pid, ticks, _boot_id())

    @property
    def alive(self) -> bool:
        """False for a zombie: nothing of it runs."""
        return self.boot_id == _boot_id() and start_ticks(self.pid) == self.started_ticks

    def send(self, signal_number: int) -> None:
        """Signals the process if it is still the same one."""
        if self.alive:
            try:
                os.kill(self.pid, signal_number)
            except ProcessLookupError:
                return

    def wait_gone(self, timeout_s: float) -> bool:
        """True as soon as it no longer runs."""
        deadline = time.monotonic() + timeout_s
        while self.alive:
            if time.monotonic() > deadline:
                return False
            time.sleep(POLL_S)
        return True


def end(processes: Sequence[ProcessIdentity], grace_s: float) -> None:
    """SIGTERM to all, then SIGKILL to those that are still there after the grace together."""
    for process in processes:
        process.send(signal.SIGTERM)
    deadline = time.monotonic() + grace_s
    for process in processes:
        if not process.wait_gone(max(0.0, deadline - time.monotonic())):
            process.send(signal.SIGKILL)
            process.wait_gone(grace_s)


class ServerProcess:
    """A child process that writes to a log file and ends no later than its parent.

    `start` may be called again after the process has ended: same command, log appended.
    """

    def __init__(self, name: str, command: Sequence[str | Path], log: Path) -> None:
        self.name = name
        self.log = log
        self.identity: ProcessIdentity | None = None
        self._command = [str(part) for part in command]
        self._child: subprocess.Popen[bytes] | None = None
        self._log_start = 0

    @property
    def alive(self) -> bool:
        return self.identity is not None and self.identity.alive

    def start(self) -> None:
        """Starts it and puts it under guard. Ready is another matter: ask its protocol."""
        if self.alive:
            raise RuntimeError(f"{self.name} is already running")
        self.log.parent.mkdir(parents=True, exist_ok=True)
        with self.log.open("ab") as log:
            self._log_start = log.tell()
            # A session of its own: Ctrl-C at the terminal is for the parent, which stops its
            # servers in order. An empty environment: a server's options are those it is given,
            # not those a stray variable sets (Tansu and Java both read many).
            self._child = subprocess.Popen(
                self._command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env={"LANG": "C.UTF-8"},
                start_new_session=True,
            )
        self.identity = ProcessIdentity.of(self._child.pid)
        if self.identity is not None:  # it may have ended already
            _guard.add(self.identity)

    def stop(self, grace_s: float = 10.0) -> None:
        """SIGTERM, and SIGKILL after the grace. Does nothing if it does not run."""
        if self.identity is not None:
            end([self.identity], grace_s)
        self._forget()

    def kill(self) -> None:
        """SIGKILL: no goodbye, no flush."""
        if self.identity is not None:
            self.identity.send(signal.SIGKILL)
        self._forget()

    def wait(self, timeout_s: float) -> int | None:
        """The exit status of a process that ends by itself; None if it does not in time."""
        assert self._child is not None
        try:
            return self._child.wait(timeout_s)
        except subprocess.TimeoutExpired:
            return None
        finally:
            if self._child.returncode is not None:
                self._forget()

    def detach(self) -> None:
        """Lets it outlive this process. It can still be stopped by its identity."""
        if self.identity is not None:
            _guard.remove(self.identity)
        if self._child is not None:
            # Somebody has to take the exit status of a child, or it stays as a zombie.
            threading.Thread(target=self._child.wait, daemon=True).start()
            self._child = None

    def failure(self, what: str) -> UserError:
        """The error to raise when it did not do what it should, with the end of its log."""
        return UserError(f"{self.name} {what}. The end of {self.log}:\n{self.log_tail()}")

    def log_tail(self, lines: int = TAIL_LINES) -> str:
        """The last lines it has written since its latest start."""
        with self.log.open("rb") as log:
            log.seek(self._log_start)
            text = log.read().decode("utf-8", errors="replace")
        return "\n".join(f"  {line}" for line in text.splitlines()[-lines:]) or "  (empty)"

    @property
    def port_was_taken(self) -> bool:
        """Whether its last words are that the port was in use (Redis, Tansu and Java alike)."""
        return not self.alive and _PORT_TAKEN.search(self.log_tail(60)) is not None

    def _forget(self) -> None:
        if self._child is not None:
            self._child.wait()
            self._child = None
        if self.identity is not None:
            _guard.remove(self.identity)


class _Guard:
    """The one helper process that outlives this one long enough to end its servers."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._helper: subprocess.Popen[str] | None = None
        self._owner_pid = 0

    def add(self, process: ProcessIdentity) -> None:
        self._tell("+", process)

    def remove(self, process: ProcessIdentity) -> None:
        self._tell("-", process)

    def _tell(self, sign: str, process: ProcessIdentity) -> None:
        with self._lock:
            # A fork has no claim on the helper of its parent.
            if self._helper is None or self._owner_pid != os.getpid():
                if sign == "-":
                    return
                self._launch()
            assert self._helper is not None
            assert self._helper.stdin is not None
            try:
                self._helper.stdin.write(f"{sign}{process.pid} {process.started_ticks}\n")
                self._helper.stdin.flush()
            except BrokenPipeError:
                # Somebody ended the helper. Stopping a server needs it no longer; starting one
                # does, for a server without a guard may stay behind.
                if sign == "+":
                    raise

    def _launch(self) -> None:
        script = Path(__file__).with_name("process_guard.py")
        self._helper = subprocess.Popen(
            [sys.executable, "-I", "-S", str(script)],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            text=True,
            start_new_session=True,
        )
        self._owner_pid = os.getpid()
        atexit.register(self._close, self._owner_pid)

    def _close(self, owner_pid: int) -> None:
        if self._helper is not None and os.getpid() == owner_pid:
            assert self._helper.stdin is not None
            self._helper.stdin.close()
            self._helper.wait()
            self._helper = None


_guard = _Guard()


def free_port() -> int:
    """A loopback port nobody listens on now; whoever takes it should be ready to try again.

    Below the range that the system hands out to outgoing connections. Inside it a client
    that keeps reconnecting to a stopped server can be given the server's own port, connect
    to itself, and keep the server from coming back.
    """
    lowest_outgoing = int(
        Path("/proc/sys/net/ipv4/ip_local_port_range").read_text(encoding="ascii").split()[0]
    )
    for _ in range(100):
        port = 10_000 + secrets.randbelow(max(1_000, lowest_outgoing - 10_000))
        if port_is_free(port):
            return port
    raise UserError("No free port found on 127.0.0.1 between 10000 and the outgoing range")


def free_ports(count: int) -> list[int]:
    """Distinct ones."""
    ports: set[int] = set()
    while len(ports) < count:
        ports.add(free_port())
    return list(ports)


def port_is_free(port: int) -> bool:
    with socket.socket() as probe:
        # As servers do: a port whose old connections linger in TIME_WAIT counts as free.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
    return True


def port_owner(port: int) -> int | None:
    """The pid that listens on a TCP port, if this user may see it."""
    sockets = _listening_inodes(port)
    for folder in Path("/proc").iterdir() if sockets else ():
        if folder.name.isdigit() and _holds(folder, sockets):
            return int(folder.name)
    return None


def _listening_inodes(port: int) -> set[str]:
    inodes = set()
    for table in ("/proc/net/tcp", "/proc/net/tcp6"):
        try:
            rows = Path(table).read_text(encoding="ascii").splitlines()[1:]
        except OSError:
            continue
        for row in rows:
            fields = row.split()  # sl local remote state … inode
            if fields[3] == "0A" and int(fields[1].rpartition(":")[2], 16) == port:
                inodes.add(f"socket:[{fields[9]}]")
    return inodes


def _holds(folder: Path, sockets: set[str]) -> bool:
    try:
        return any(str(fd.readlink()) in sockets for fd in (folder / "fd").iterdir())
    except OSError:
        return False


def _boot_id() -> str:
    return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
