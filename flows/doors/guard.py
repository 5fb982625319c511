"""Runs a command that must not outlive who started it: `python -m gristmill.flows.doors.guard COMMAND…`.

The guard's standard input is a pipe that its parent holds open. When the pipe ends, because the parent closed it or
died, however it died, the command's whole process group is ended. `… guard --kill PID…` kills those processes then,
where they were started by somebody else. Imports nothing but the standard library.
"""

import contextlib
import os
import select
import signal
import subprocess
import sys
import time
from types import FrameType

GRACE = 10.0  # seconds between SIGTERM and SIGKILL


def main(command: list[str]) -> int:
    """Waits for the command or for the end of the parent; the command's exit code."""
    ending: list[int] = []

    def end(number: int, frame: FrameType | None) -> None:
        ending.append(number)

    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, end)
    process = subprocess.Popen(command, stdin=subprocess.DEVNULL, start_new_session=True)
    try:
        while process.poll() is None and not ending:
            ready, _, _ = select.select([sys.stdin], [], [], 0.2)
            if ready and not os.read(0, 1024):
                break
    finally:
        end_group(process)
    return process.returncode


def kill_after(pids: list[int]) -> int:
    """Waits for the end of the parent, then kills."""
    for number in (signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    while os.read(0, 1024):
        pass
    for pid in pids:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.kill(pid, signal.SIGKILL)
    return 0


def end_group(process: "subprocess.Popen[bytes]") -> None:
    """Ends the process and all that it started, gently first: what it leaves behind is killed."""
    signal_group(process.pid, signal.SIGTERM)
    deadline = time.monotonic() + GRACE
    while process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.05)
    signal_group(process.pid, signal.SIGKILL)
    process.wait()


def signal_group(group: int, number: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(group, number)


if __name__ == "__main__":
    first, *rest = sys.argv[1:]
    raise SystemExit(kill_after(list(map(int, rest))) if first == "--kill" else main([first, *rest]))
