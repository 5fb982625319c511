"""The sandbox's server: a small Python process that has loaded little, and forks once for each program.

It is started by sandbox.py as a script, with a clean environment and nothing of this package. On its standard input and
output go messages of 8 bytes of length and JSON. For each request it makes a scratch folder, forks, and watches the
child: time, output, and what fills the folder. The child gives up its rights (limits, Landlock, seccomp; where the
kernel has neither, an audit hook) and runs the program as `__main__`.
"""

import atexit
import contextlib
import gc
import importlib.util
import json
import linecache
import os
import resource
import select
import shutil
import signal
import struct
import sys
import sysconfig
import tempfile
import time
import traceback
from pathlib import Path
from typing import IO, Any

# What small programs import most: loaded once here, not once a program.
COMMON = "bisect collections copy datetime decimal fractions functools heapq itertools json math operator random re \
statistics string threading typing unittest"
NAME = "program.py"  # in tracebacks
ENDED = b"end"  # what the child says when the program ran to its end, which sys.exit() does not
FULL = b"full"  # when it ran out of memory
STEP = 0.1  # seconds between looks at the scratch folder, and at a child that cannot be waited for by descriptor


def _kernel() -> Any:
    path = Path(__file__).with_name("sandbox_kernel.py")
    spec = importlib.util.spec_from_file_location("sandbox_kernel", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


KERNEL: Any = _kernel() if sys.platform == "linux" else None


def layers() -> dict[str, bool]:
    """Which of the kernel's layers hold here."""
    return {"files": bool(KERNEL and KERNEL.landlock_version()), "calls": bool(KERNEL and KERNEL.has_seccomp())}


def readable() -> list[str]:
    """What a program may read besides its scratch folder: this Python, the libraries under it, time zones."""
    paths = sysconfig.get_paths()
    found = {os.path.realpath(paths[name]) for name in ("stdlib", "platstdlib", "purelib", "platlib")}
    shared = ("/usr/lib", "/usr/lib64", "/lib", "/lib64", "/usr/local/lib", "/usr/share/zoneinfo")
    single = ("/etc/ld.so.cache", "/etc/localtime", "/dev/urandom", "/dev/random", "/dev/zero")
    return sorted(found | {os.path.join(sys.base_prefix, "lib"), *shared, *single})


def serve() -> None:
    """Answers requests until its input ends."""
    for name in COMMON.split():
        __import__(name)
    asked, told = os.fdopen(os.dup(0), "rb", 0), os.fdopen(os.dup(1), "wb", 0)
    nothing = os.open(os.devnull, os.O_RDWR)
    os.dup2(nothing, 0)
    os.dup2(nothing, 1)
    gc.collect()
    gc.freeze()  # the collector of a child does not touch, and so not copy, what the server holds
    while (request := _receive(asked)) is not None:
        try:
            outcome = _one(request, asked.fileno())
        except OSError as error:
            outcome = {"status": "error", "stderr": f"the sandbox failed: {error}"}
        said = json.dumps(outcome).encode()
        told.write(struct.pack("<Q", len(said)) + said)


def _receive(stream: IO[bytes]) -> Any:
    head = _exactly(stream, 8)
    body = _exactly(stream, struct.unpack("<Q", head)[0]) if head else None
    return None if body is None else json.loads(body)


def _exactly(stream: IO[bytes], size: int) -> bytes | None:
    pieces = b""
    while len(pieces) < size:
        piece = stream.read(size - len(pieces))
        if not piece:
            return None
        pieces += piece
    return pieces


def _one(request: dict[str, Any], asked: int) -> dict[str, Any]:
    scratch = tempfile.mkdtemp(prefix="sandbox-")
    try:
        for name, text in request["files"].items():
            path = os.path.join(scratch, name)
            os.makedirs(os.path.dirname(path), exist_ok=True)
            Path(path).write_bytes(text.encode("utf-8", "surrogatepass"))
        return _Child(request, os.path.realpath(scratch)).watch(asked)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


class _Child:
    """A forked program and the pipes from it."""

    def __init__(self, request: dict[str, Any], scratch: str) -> None:
        self.limits, self.scratch = request["limits"], scratch
        self.kept: dict[int, bytearray] = {}
        with tempfile.TemporaryFile() as given:
            given.write(request["stdin"].encode("utf-8", "surrogatepass"))
            given.seek(0)
            pipes = [os.pipe() for _ in range(3)]  # stdout, stderr, what the wrapper says
            self.started = time.monotonic()
            self.pid = os.fork()
            if self.pid == 0:
                _child(request, scratch, given.fileno(), [write for _, write in pipes])
        for _, write in pipes:
            os.close(write)
        self.ends = [read for read, _ in pipes]
        self.kept = {read: bytearray() for read in self.ends}

    def watch(self, asked: int) -> dict[str, Any]:
        """Waits for the program's end, or ends it."""
        waiting = os.pidfd_open(self.pid) if hasattr(os, "pidfd_open") else None
        try:
            reason = self._until_end(asked, waiting)
        finally:
            self._kill()
            _, state, used = os.wait4(self.pid, 0)
            for read in self.ends:
                self._drain(read)
                os.close(read)
            if waiting is not None:
                os.close(waiting)
        seconds = time.monotonic() - self.started
        code = os.waitstatus_to_exitcode(state)
        out, err, said = (bytes(self.kept[read]) for read in self.ends)
        cpu = used.ru_utime + used.ru_stime
        limit = self.limits["output"]
        return {
            "status": reason or _status(code, said, cpu >= self.limits["cpu"]),
            "returncode": code,
            "stdout": out[:limit].decode("utf-8", "replace"),
            "stderr": err[:limit].decode("utf-8", "replace"),
            "seconds": seconds,
            "cpu": cpu,
            "finished": ENDED in said,
        }

    def _until_end(self, asked: int, waiting: int | None) -> str | None:
        """Why the program must be ended, or None where it ended by itself."""
        poll = select.poll()
        for one in (*self.ends, asked, *(() if waiting is None else (waiting,))):
            poll.register(one, select.POLLIN)
        deadline, looked = self.started + self.limits["seconds"], self.started
        while (left := deadline - time.monotonic()) > 0:
            for one, _ in poll.poll(min(left, STEP) * 1000):
                if one == waiting:
                    return None
                if one == asked:  # nobody asks while a program runs: whoever started us is gone
                    self._kill()
                    os._exit(0)
                if not self._read(one):
                    poll.unregister(one)
                if len(self.kept[one]) > self.limits["output"]:
                    return "output"
            if waiting is None and os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT):
                return None
            if time.monotonic() - looked > STEP:
                looked = time.monotonic()
                if _size(self.scratch) > self.limits["disk"]:
                    return "output"
        return "timeout"

    def _read(self, end: int) -> bool:
        piece = os.read(end, 1 << 16)
        self.kept[end] += piece
        return bool(piece)

    def _drain(self, end: int) -> None:
        """What is left in a pipe, up to the limit and without waiting: a descendant may hold its other end."""
        os.set_blocking(end, False)
        with contextlib.suppress(BlockingIOError):
            while len(self.kept[end]) <= self.limits["output"] and self._read(end):
                pass

    def _kill(self) -> None:
        for kill, whom in ((os.killpg, self.pid), (os.kill, self.pid)):
            with contextlib.suppress(ProcessLookupError, PermissionError):
                kill(whom, signal.SIGKILL)


def _size(folder: str) -> int:
    """Bytes on disk in a folder."""
    found = 0
    for at, _, names in os.walk(folder):
        for name in names:
            try:
                found += os.lstat(os.path.join(at, name)).st_blocks * 512
            except OSError:
                continue
    return found


def _status(code: int, said: bytes, spent: bool) -> str:
    if code == -signal.SIGXCPU or (code == -signal.SIGKILL and spent):
        return "timeout"
    if FULL in said:
        return "memory"
    return "ok" if code == 0 else "killed" if code < 0 else "failed"


def _child(request: dict[str, Any], scratch: str, given: int, pipes: list[int]) -> None:
    """Never returns."""
    code = 70
    try:
        _detach(scratch, given, pipes)
        _confine(request["limits"], scratch, request["layers"])
        code = _run(request["program"])
    except BaseException as error:
        os.write(2, f"the sandbox failed: {type(error).__name__}: {error}\n".encode())
    finally:
        os._exit(code)


def _detach(scratch: str, given: int, pipes: list[int]) -> None:
    """A session of its own, standard streams and the wrapper's pipe at 3, no other descriptor."""
    os.setsid()
    if KERNEL is not None:
        KERNEL.die_with_parent()
    moved = [os.dup(one) for one in (given, *pipes)]
    high = [os.dup2(one, 100 + place, inheritable=False) for place, one in enumerate(moved)]
    for place, one in enumerate(high):
        os.dup2(one, place)
    os.closerange(4, 4096)
    os.chdir(scratch)
    os.environ |= {"HOME": scratch, "TMPDIR": scratch, "PWD": scratch}
    tempfile.tempdir = scratch
    sys.stdin = open(0, encoding="utf-8", errors="replace", closefd=False)  # noqa: SIM115
    sys.stdout = open(1, "w", encoding="utf-8", errors="backslashreplace", closefd=False)  # noqa: SIM115
    sys.stderr = open(2, "w", encoding="utf-8", errors="backslashreplace", closefd=False)  # noqa: SIM115
    vars(sys).update(__stdin__=sys.stdin, __stdout__=sys.stdout, __stderr__=sys.stderr)


def _confine(limits: dict[str, Any], scratch: str, wanted: dict[str, bool]) -> None:
    bounds = {
        resource.RLIMIT_CPU: (limits["cpu"], limits["cpu"] + 1),  # SIGXCPU, which a program may ignore, then SIGKILL
        resource.RLIMIT_FSIZE: (limits["file_size"],) * 2,
        resource.RLIMIT_NOFILE: (limits["open_files"],) * 2,
        resource.RLIMIT_CORE: (0, 0),
    }
    if sys.platform != "darwin":  # whose kernel does not hold processes to it
        bounds[resource.RLIMIT_AS] = (limits["memory"],) * 2
    if not wanted["calls"]:
        bounds[resource.RLIMIT_NPROC] = (0, 0)  # no new process; not for root
    for what, bound in bounds.items():
        resource.setrlimit(what, bound)
    if not (wanted["files"] and wanted["calls"]):
        sys.addaudithook(_guard([scratch, *readable()], scratch))
    if wanted["files"]:
        KERNEL.confine_files([*readable(), "/dev/null"], [scratch, "/dev/null"])
    if wanted["calls"]:
        KERNEL.confine_calls()


_REFUSED = ("socket.", "subprocess.", "os.exec", "os.fork", "os.posix_spawn", "os.spawn", "os.system", "os.kill",
            "pty.", "os.startfile", "resource.", "ctypes.", "os.chmod", "os.chown", "os.utime", "os.setxattr",
            "signal.pthread", "shutil.chown")  # fmt: skip
_WRITES = ("os.remove", "os.rename", "os.rmdir", "os.mkdir", "os.link", "os.symlink", "os.truncate", "shutil.rmtree")


def _guard(allowed: list[str], scratch: str) -> Any:
    """The audit hook for kernels without the layers: it stops what Python does, not what machine code does."""

    def inside(path: object, folders: list[str]) -> bool:
        if isinstance(path, int):
            return True
        real = os.path.realpath(os.fsdecode(path))  # type: ignore[arg-type]
        return any(real == folder or real.startswith(folder.rstrip("/") + "/") for folder in folders)

    def guard(event: str, arguments: tuple[Any, ...]) -> None:
        if event.startswith(_REFUSED) and not event.startswith("socket.__new__"):
            raise PermissionError(1, f"the sandbox refuses {event}")
        if event == "socket.__new__" and arguments[1] != 1:
            raise PermissionError(1, "the sandbox refuses sockets")
        if event == "open":
            path, _, flags = arguments
            writes = (
                bool(flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC)) if isinstance(flags, int) else True
            )
            if path != os.devnull and not inside(path, [scratch] if writes else allowed):
                raise PermissionError(13, "the sandbox refuses it", path)
        elif event in ("os.listdir", "os.scandir") and arguments[0] is not None and not inside(arguments[0], allowed):
            raise PermissionError(13, "the sandbox refuses it", arguments[0])
        if event in _WRITES and not all(inside(one, [scratch]) for one in arguments if isinstance(one, str | bytes)):
            raise PermissionError(13, "the sandbox refuses it", arguments[0])

    return guard


def _run(source: str) -> int:
    """Runs the program as `__main__`; its exit status. What it prints goes through what sys.stdout is at its end."""
    module = type(sys)("__main__")
    module.__dict__["__builtins__"] = __builtins__
    sys.modules["__main__"], sys.argv = module, [NAME]
    linecache.cache[NAME] = (len(source), None, [line + "\n" for line in source.split("\n")], NAME)
    said, code = b"", 0
    gc.collect(0)
    try:
        exec(compile(source, NAME, "exec"), module.__dict__)
        said = ENDED
    except SystemExit as end:
        code = _exit_status(end.code)
    except MemoryError:
        said, code = FULL, 1
    except BaseException as error:
        code = 1
        _tell(error)
    for last in (_join_threads, atexit._run_exitfuncs, *(one.flush for one in (sys.stdout, sys.stderr))):
        try:
            last()
        except BaseException:
            continue
    with contextlib.suppress(OSError):  # the program closed it
        os.write(3, said)
    return code


def _join_threads() -> None:
    import threading

    threading._shutdown()  # type: ignore[attr-defined]


def _exit_status(code: object) -> int:
    if code is None or isinstance(code, int):
        return int(code or 0) & 0xFF
    sys.stderr.write(f"{code}\n")
    return 1


def _tell(error: BaseException) -> None:
    """The traceback without this file's own frame."""
    try:
        trace = error.__traceback__.tb_next if error.__traceback__ is not None else None
        traceback.print_exception(type(error), error, trace, limit=-20)
    except BaseException:
        os.write(2, type(error).__name__.encode())


if __name__ == "__main__":
    serve()
