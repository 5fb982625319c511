"""The sandbox: escapes that are tried and fail, limits that hold, programs that run as they would elsewhere."""

import os
import socket
import time
from pathlib import Path

import pytest

from gristmill.curation import sandbox
from gristmill.curation.folder import HouseError
from gristmill.curation.sandbox import Limits, Program, guarantees, layers, run, run_many

QUICK = Limits(cpu=2, seconds=60)
kernel = pytest.mark.skipif(not all(layers().values()), reason="this kernel has no Landlock or no seccomp")


def test_a_program_runs_as_main_with_its_input_and_files() -> None:
    source = "import sys\nif __name__ == '__main__':\n    print(input(), open('a/b.txt').read(), sys.argv)"
    found = run(source, stdin="given\n", files={"a/b.txt": "held ü\u2028"})
    assert (found.status, found.finished, found.stdout) == ("ok", True, "given held ü\u2028 ['program.py']\n")
    assert run("import os; os.close(1); os.close(2)").status == "ok"
    assert run("open('x', 'w').write('y'); import os; os.chmod('x', 0o600); print(os.listdir())").stdout == "['x']\n"
    assert run("import threading\nthreading.Thread(target=print, args=('t',)).start()").stdout == "t\n"
    assert run("import asyncio\nprint(asyncio.run(asyncio.sleep(0, 'done')))").stdout == "done\n"
    with pytest.raises(HouseError, match="no path inside"):
        run("", files={"../x": ""})


def test_how_a_program_ended_is_told() -> None:
    early = run("import sys; sys.exit(0)\nassert False")
    assert early.status == "ok" and not early.finished
    failed = run("def f():\n    assert 1 == 2, 'not so'\nf()")
    assert (failed.status, failed.returncode) == ("failed", 1)
    assert "assert 1 == 2" in failed.stderr and failed.stderr.endswith("AssertionError: not so\n")
    assert "sandbox" not in failed.stderr
    assert run("import sys; sys.exit('bye')").stderr == "bye\n" and run("def").status == "failed"
    assert run("import os; os._exit(3)").returncode == 3
    assert run("import os, signal; os.kill(os.getpid(), signal.SIGSEGV)").status == "killed"
    deep = run("def f(): f()\nf()")
    assert deep.status == "failed" and "RecursionError" in deep.stderr


def test_limits_hold() -> None:
    loop = run("import signal\nsignal.signal(signal.SIGXCPU, signal.SIG_IGN)\nwhile True: pass", limits=Limits(cpu=1))
    assert loop.status == "timeout" and loop.cpu < 3
    assert run("import time; time.sleep(100)", limits=Limits(seconds=0.3)).status == "timeout"
    assert run("x = bytearray(2 << 30)").status == "memory"
    assert run("x = []\nwhile True: x.append(' ' * 10_000_000)", limits=Limits(memory=200 << 20)).status == "memory"
    loud = run("while True: print('x' * 1000)", limits=QUICK)
    assert loud.status == "output" and len(loud.stdout) == QUICK.output
    assert run("open('f', 'wb').write(bytes(20 << 20))").status in ("failed", "killed")
    files = "n = 0\nwhile True:\n    open(str(n), 'wb').write(bytes(4 << 20)); n += 1"
    assert run(files, limits=Limits(disk=32 << 20)).status == "output"
    assert "Too many open files" in run("x = [open('/dev/null') for _ in range(100)]").stderr


@kernel
@pytest.mark.parametrize(
    "source",
    [
        "import os\nwhile True: os.fork()",
        "import os; os.posix_spawn('/bin/sh', ['sh', '-c', 'sleep 99 &'], {})",
        "import os; os.execv('/bin/sh', ['sh'])",
        "import subprocess; subprocess.Popen(['sleep', '99'], start_new_session=True)",
        "import socket; socket.socket().connect(('127.0.0.1', 80))",
        "import socket; socket.socket(socket.AF_UNIX).bind('s')",
        "import socket; socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)",
        "import os; os.kill(os.getppid(), 9)",
        "import os; os.kill(-1, 0)",  # signal 0 asks for the same right and harms nobody
        "import os; os.kill(1, 0)",
        "import os; os.killpg(os.getpgid(os.getppid()), 9)",
        "import resource; resource.setrlimit(resource.RLIMIT_CPU, (99, 99))",
        "import os; os.listdir(os.path.expanduser('~root'))",
        "open('/etc/passwd').read()",
        "open('/proc/self/environ').read()",
        "import os; os.symlink('/etc', 'e'); open('e/passwd').read()",
        "import os; os.link('/etc/passwd', 'p'); open('p').read()",
        "import ctypes; l = ctypes.CDLL(None); assert l.ptrace(16, __import__('os').getppid(), 0, 0) == 0",
        "import ctypes; l = ctypes.CDLL(None); assert l.unshare(0x10000000) == 0",
        "import os; os.memfd_create('x')",
        "import os; os.mkfifo('/tmp/sandbox-fifo')",
        "import os; os.open(os.__file__, os.O_RDONLY | os.O_TRUNC)",
    ],
)
def test_escapes_fail(source: str) -> None:
    found = run(source, limits=QUICK)
    assert found.status == "failed" and not found.finished
    refusals = ("PermissionError", "AssertionError", "ValueError: not allowed", "cross-device")
    assert any(said in found.stderr for said in refusals), found


@kernel
def test_secrets_and_other_files_stay_out_of_reach(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    secret = tmp_path / "secret"
    secret.write_text("s3cret")
    secret.chmod(0o644)
    monkeypatch.setenv("API_TOKEN", "s3cret")
    with secret.open() as held:
        os.set_inheritable(held.fileno(), True)
        tried = run(
            f"import os\nprint(dict(os.environ))\nos.chmod({str(secret)!r}, 0o777)\nprint(os.read({held.fileno()}, 9))"
        )
    assert "s3cret" not in tried.stdout and "Bad file descriptor" in tried.stderr
    assert secret.stat().st_mode & 0o777 == 0o644  # said to be done, and not
    for source in (
        f"open({str(secret)!r})",
        f"open({str(secret)!r}, 'w')",
        f"__import__('os').remove({str(secret)!r})",
    ):
        assert "PermissionError" in run(source).stderr
    assert run("import os; print(os.environ['HOME'] == os.getcwd(), os.listdir())").stdout == "True []\n"
    assert secret.read_text() == "s3cret"


@kernel
def test_a_listening_server_hears_nothing() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(0.2)
        port = server.getsockname()[1]
        asked = f"socket.create_connection(('127.0.0.1', {port}))"
        source = f"import socket\ntry:\n    {asked}\nexcept OSError as e: print(e.errno)"
        assert run(source).stdout == "1\n"
        with pytest.raises(TimeoutError):
            server.accept()


def test_many_programs_keep_their_order_and_leave_nothing() -> None:
    programs = [Program(f"print({n})" if n % 7 else "raise SystemExit(2)") for n in range(40)]
    found = run_many(programs, workers=3)
    assert [one.stdout for one in found] == [f"{n}\n" if n % 7 else "" for n in range(40)]
    assert [one.returncode for one in found] == [0 if n % 7 else 2 for n in range(40)]
    where = Path(run("import os; print(os.getcwd())").stdout.strip())
    assert where.name.startswith("sandbox-") and not where.exists()


def test_a_server_that_died_is_replaced() -> None:
    assert run("print(1)").status == "ok"
    for server in sandbox._idle:
        server.process.kill()
        server.process.wait()
    dead = len(sandbox._idle)
    assert [run("print(1)").status for _ in range(dead + 1)] == ["error"] * dead + ["ok"]


def test_where_the_kernel_has_no_layers_python_code_is_held(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sandbox, "layers", lambda: {"files": False, "calls": False})
    assert "audit hook" in guarantees()["files"] and "audit hook" in guarantees()["network"]
    for source in (
        "import os; os.fork()",
        "import subprocess; subprocess.run(['true'])",
        "import socket; socket.socket()",
        "open('/etc/passwd')",
        "open('/tmp/x-of-sandbox', 'w')",
        "import os; os.listdir('/root')",
        "import os; os.kill(os.getppid(), 9)",
        "import os; os.rename('/etc/passwd', 'x')",
    ):
        assert "PermissionError" in run(source).stderr, source
    assert run("import json; open('a', 'w').write('x'); print(open('a').read())").stdout == "x\n"


def test_time_spent_is_told() -> None:
    started = time.monotonic()
    found = run("sum(range(3_000_000))")
    assert 0 < found.cpu < 5 and 0 < found.seconds <= time.monotonic() - started
