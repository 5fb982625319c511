"""Running Python that a model wrote: one process for each program, held by the kernel, from a pool of forking servers.

What holds, and on which system, is what `guarantees` says; tests/curation/test_sandbox.py tries the escapes. On Linux
with Landlock (5.13 and later) and seccomp, without any privilege: no network, no file but the Python installation for
reading and a scratch folder for writing, no other process (no fork, no exec, no signal to others), limits that cannot
be raised. What remains open: names, sizes and times of files elsewhere can be looked up (stat), and a program can
always lie about itself. Elsewhere an audit hook stops what Python code does, but not what machine code does.
"""

import atexit
import json
import os
import struct
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import cache
from pathlib import Path, PurePosixPath
from typing import Literal

from .folder import HouseError

Status = Literal["ok", "failed", "timeout", "memory", "output", "killed", "error"]
SERVER = Path(__file__).with_name("sandbox_server.py")


@dataclass(frozen=True)
class Limits:
    """Of one program. cpu: seconds of processor time, whole. seconds: of wall-clock time, more than cpu because a busy
    machine must not make a right program wrong. memory: bytes of address space. output: bytes of stdout and of stderr.
    file_size: bytes of one file. disk: bytes of the scratch folder, looked at ten times a second."""

    cpu: int = 10
    seconds: float = 60.0
    memory: int = 1 << 30
    output: int = 1 << 20
    file_size: int = 16 << 20
    disk: int = 64 << 20
    open_files: int = 64

    def __post_init__(self) -> None:
        if min(asdict(self).values()) <= 0 or self.cpu != int(self.cpu) or self.open_files < 8:
            raise HouseError(f"{self}: limits are above 0, cpu is in whole seconds, open_files at least 8")


@dataclass(frozen=True)
class Program:
    """source: Python, run as `__main__`. stdin: what it reads. files: texts by relative path in the scratch folder, in
    which it starts."""

    source: str
    stdin: str = ""
    files: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Outcome:
    """status: ok (exit status 0), failed (another), timeout (of either clock), memory (ended by MemoryError), output
    (too much of it, or too much on disk), killed (by a signal), error (the sandbox's own fault). returncode: the exit
    status, of a signal its negative number. finished: the last line was reached, which sys.exit(0) before the tests
    is not. seconds: wall clock; cpu: processor seconds."""

    status: Status
    returncode: int = 0
    stdout: str = ""
    stderr: str = ""
    seconds: float = 0.0
    cpu: float = 0.0
    finished: bool = False


DEFAULT = Limits()


def run(program: str, *, stdin: str = "", files: Mapping[str, str] | None = None, limits: Limits = DEFAULT) -> Outcome:
    """What becomes of one program."""
    return _send(Program(program, stdin, files or {}), limits)


def run_many(programs: Sequence[Program], limits: Limits = DEFAULT, workers: int | None = None) -> list[Outcome]:
    """What becomes of each, in order; `workers` (default: one a processor) run side by side. Safe from any thread."""
    count = min(workers or len(_processors()), len(programs))
    if count <= 1:
        return [_send(program, limits) for program in programs]
    with ThreadPoolExecutor(count) as pool:
        return list(pool.map(lambda program: _send(program, limits), programs))


@cache
def layers() -> dict[str, bool]:
    """Which of the kernel's layers this system has: files (Landlock) and calls (seccomp)."""
    if sys.platform != "linux":
        return {"files": False, "calls": False}
    from .sandbox_kernel import has_seccomp, landlock_version

    return {"files": landlock_version() > 0, "calls": has_seccomp()}


def guarantees() -> dict[str, str]:
    """What is held, and by what, on this system."""
    files, calls = layers()["files"], layers()["calls"]
    hook = "an audit hook: Python code alone is held, machine code (ctypes, extensions) is not"
    memory = "RLIMIT_AS" if sys.platform == "linux" else "not held"
    return {
        "network": "seccomp" if calls else hook,
        "files": "Landlock" if files else hook,
        "processes and signals": "seccomp: one process" if calls else f"RLIMIT_NPROC, not for root; {hook}",
        "memory": memory,
        "time, output, file size, open files": "limits of the kernel, and a server that watches",
        "secrets": "a clean environment, closed descriptors" + (", Landlock" if files else f", {hook}"),
    }


class _Server:
    """A forking server and the pipes to it."""

    def __init__(self) -> None:
        environment = {
            "PATH": "/usr/bin:/bin",
            "LANG": "C.UTF-8",
            "PYTHONHASHSEED": "0",  # the same order of sets in every run
            "PYTHONDONTWRITEBYTECODE": "1",
            "PYTHONUTF8": "1",
            "TMPDIR": tempfile.gettempdir(),
            "OMP_NUM_THREADS": "1",
            "OPENBLAS_NUM_THREADS": "1",
        }
        command = [sys.executable, "-s", "-P", str(SERVER)]
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env=environment,
            start_new_session=True, cwd="/",
        )  # fmt: skip

    def ask(self, program: Program, limits: Limits) -> Outcome | None:
        """None where the server is gone."""
        said = json.dumps(asdict(program) | {"program": program.source, "limits": asdict(limits), "layers": layers()})
        given, told = self.process.stdin, self.process.stdout
        assert given is not None and told is not None
        try:
            given.write(struct.pack("<Q", len(said)) + said.encode())
            given.flush()
            head = told.read(8)
            body = told.read(struct.unpack("<Q", head)[0]) if len(head) == 8 else b""
            return Outcome(**json.loads(body)) if body else None
        except (OSError, ValueError):
            return None

    def close(self) -> None:
        """Ends it; its input's end is what ends a program that it watches."""
        self.process.kill()
        self.process.communicate()


_idle: list[_Server] = []
_lock = threading.Lock()


@contextmanager
def _server() -> Iterator[_Server]:
    with _lock:
        server = _idle.pop() if _idle else None
    server = server or _Server()
    try:
        yield server
    except BaseException:
        server.close()
        raise
    with _lock:
        _idle.append(server)
        spare = _idle.pop(0) if len(_idle) > len(_processors()) else None
    if spare is not None:
        spare.close()


def _send(program: Program, limits: Limits) -> Outcome:
    """Asks an idle server, or a new one. A server that is gone is replaced; the program is not tried again."""
    for name in program.files:
        path = PurePosixPath(name)
        if path.is_absolute() or ".." in path.parts or not path.parts:
            raise HouseError(f"sandbox: {name!r} is no path inside the scratch folder")
    try:
        with _server() as server:
            outcome = server.ask(program, limits)
            if outcome is None:
                raise ConnectionError("the sandbox's server ended while it ran this program")
            return outcome
    except OSError as error:
        return Outcome("error", stderr=str(error))


def _processors() -> list[int]:
    return sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else list(range(os.cpu_count() or 1))


def _close_all() -> None:
    with _lock:
        left = list(_idle)
        _idle.clear()
    for server in left:
        server.close()


def _forget() -> None:
    """A forked copy of this process must not share its servers' pipes."""
    global _lock
    _lock = threading.Lock()
    _idle.clear()


atexit.register(_close_all)
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget)
