"""Whether two results are one, by math-verify (sympy's algebra over a LaTeX grammar): fractions, roots, sets,
intervals, matrices, equations.

Algebra on what a model wrote may take for ever, or all memory: `9^{9^{9^9}}` does. So it is done in processes of its
own, each with a limit of CPU seconds and memory that the kernel holds. A pair that meets the limit is undecided (None),
and a new process takes the next. CPU seconds, not seconds on the clock: a busy machine must not change a verdict.
"""

import atexit
import json
import os
import queue
import subprocess
import sys
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from importlib.util import find_spec
from typing import Any

from .folder import HouseError

SECONDS = 2  # of CPU time for one pair; MATH's results take some 0.05
MEMORY = 3 << 30  # bytes of address space of one process
WORKERS = max(1, min(4, os.cpu_count() or 1))


def equal_results(pairs: Sequence[tuple[str, str]]) -> list[bool | None]:
    """For each (reference, answer) whether they are one result; None where that could not be decided within the limits.
    Safe to call from several threads. HouseError where math-verify is not installed."""
    if not pairs:
        return []
    if find_spec("math_verify") is None:
        raise HouseError(
            "comparing results that are no plain numbers needs math-verify: pip install 'gristmill[curate]'"
        )
    with ThreadPoolExecutor(min(WORKERS, len(pairs))) as threads:
        return list(threads.map(_equal, pairs))


def _equal(pair: tuple[str, str]) -> bool | None:
    return _workers().equal(pair)


@dataclass
class _Workers:
    """Processes that are started when first needed and kept."""

    idle: "queue.LifoQueue[subprocess.Popen[str] | None]" = field(default_factory=queue.LifoQueue)

    def __post_init__(self) -> None:
        for _ in range(WORKERS):
            self.idle.put(None)

    def equal(self, pair: tuple[str, str]) -> bool | None:
        process = self.idle.get()
        if process is None or process.poll() is not None:
            process = _start()
        said = ""
        try:
            assert process.stdin is not None and process.stdout is not None
            process.stdin.write(json.dumps(pair) + "\n")
            process.stdin.flush()
            said = process.stdout.readline()
        except (OSError, ValueError):
            pass  # it died: the same as no answer
        finally:
            if said.endswith("\n"):
                self.idle.put(process)
            else:
                process.kill()
                process.wait()
                self.idle.put(None)
        found: bool | None = json.loads(said) if said.endswith("\n") else None
        return found

    def close(self) -> None:
        while not self.idle.empty():
            process = self.idle.get_nowait()
            if process is not None:
                process.kill()


_kept: list[_Workers] = []
_lock = threading.Lock()


def _workers() -> _Workers:
    with _lock:
        if not _kept:
            _kept.append(_Workers())
            atexit.register(_kept[0].close)
        return _kept[0]


def _start() -> "subprocess.Popen[str]":
    """A process that reads pairs as lines and answers each with a line."""
    command = [sys.executable, "-c", f"from {__name__} import serve; serve()"]
    quiet = subprocess.DEVNULL
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=quiet, text=True)


def serve() -> None:
    """The other side: pairs from standard input until it ends. Runs in a process of its own alone."""
    import logging
    import resource
    import signal

    logging.disable(logging.CRITICAL)
    sys.set_int_max_str_digits(10_000)
    from math_verify import LatexExtractionConfig, parse, verify

    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    signal.signal(signal.SIGPROF, _too_long)
    parse("$\\frac{x}{2}$", parsing_timeout=0)  # the grammar is built at the first call: not on a pair's time
    for line in sys.stdin:
        used = resource.getrusage(resource.RUSAGE_SELF)
        spent = int(used.ru_utime + used.ru_stime)
        # Python code is interrupted; what sits in one long C call is killed by the kernel a second or two later
        resource.setrlimit(resource.RLIMIT_CPU, (spent + SECONDS + 2, resource.RLIM_INFINITY))
        signal.setitimer(signal.ITIMER_PROF, SECONDS)
        found: Any = None
        try:
            sides = [
                parse(f"${text}$", [LatexExtractionConfig()], parsing_timeout=0, raise_on_error=True)
                for text in json.loads(line)
            ]
            if all(sides):
                found = bool(verify(*sides, timeout_seconds=0, raise_on_error=True))
        except Exception:  # whatever a grammar makes of what a model wrote; MemoryError and _TooLong too
            found = None
        finally:
            signal.setitimer(signal.ITIMER_PROF, 0)
        sys.stdout.write(json.dumps(found) + "\n")
        sys.stdout.flush()


class _TooLong(Exception):
    pass


def _too_long(*_: object) -> None:
    raise _TooLong
