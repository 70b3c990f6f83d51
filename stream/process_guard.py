"""Kills the servers of a process that died without stopping them.

Run as a script, by path, on its own: it reads `+PID START` and `-PID START` lines from
standard input and, when the other end closes (the parent ended, however it ended), sends
SIGKILL to what is still listed. It knows no server and imports the standard library only.

Not PR_SET_PDEATHSIG: that fires when the *thread* that started the child ends, so a server
restarted from a helper thread would die with the thread. A pipe closes with the process.
"""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path


def start_ticks(pid: int) -> int | None:
    """When the process started, in clock ticks since boot; None if it is gone or a zombie.

    A pid is used again, a pid with its start time is not.
    """
    try:
        stat = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None
    # The command name is in brackets and may hold spaces and brackets itself.
    fields = stat.rpartition(")")[2].split()
    state, threads = fields[0], int(fields[17])
    # The first thread may be a zombie while others are still ending, and hold ports and files.
    is_gone = state == "X" or (state == "Z" and threads <= 1)
    return None if is_gone else int(fields[19])


def main() -> None:
    guarded: set[tuple[int, int]] = set()
    for line in sys.stdin:
        pid, ticks = (int(field) for field in line[1:].split())
        (guarded.add if line[0] == "+" else guarded.discard)((pid, ticks))
    for pid, ticks in guarded:
        if start_ticks(pid) == ticks:
            os.kill(pid, signal.SIGKILL)


if __name__ == "__main__":
    main()
