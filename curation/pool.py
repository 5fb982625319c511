"""Work spread over processors, threads or a Ray cluster: order in is order out, so results do not depend on how many.

A pool is cheap until its first work; then it starts once and stays for the run. What it runs is a plain function of
picklable arguments, which reads and writes the run's folder itself: on a cluster that folder lies on shared storage.
"""

import logging
import os
import pickle
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, Literal, Protocol, TypeVar, get_args

from .folder import HouseError

Kind = Literal["processes", "threads", "ray"]
KINDS: tuple[str, ...] = get_args(Kind)
SMALL = 20_000  # rows: fewer are judged sooner than worker processes start (0.5 s each)
AHEAD = 2  # tasks given to each worker beyond the one whose result is awaited
LIMITS = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "NUMBA_NUM_THREADS", "GRISTMILL_THREADS")

Task = TypeVar("Task")
Result = TypeVar("Result")


class Pool(Protocol):
    """How a step's blocks are worked on."""

    workers: int
    apart: bool  # the workers are other processes

    def map(self, work: Callable[[Task], Result], tasks: Iterable[Task]) -> Iterator[Result]:
        """`work` of each task, in order; tasks are drawn a few ahead."""

    def carries(self, value: object) -> bool:
        """Whether the workers can load `value`: a class typed at a prompt, say, exists here alone."""


class Inline:
    """Everything in this process, one task after the other."""

    workers, apart = 1, False

    def map(self, work: Callable[[Task], Result], tasks: Iterable[Task]) -> Iterator[Result]:
        return map(work, tasks)

    def carries(self, value: object) -> bool:
        del value
        return True


INLINE = Inline()


def fitting(pool: Pool, value: object, rows: int) -> Pool:
    """`pool`, or INLINE where there are too few rows for it, or its workers could not load `value` (a step)."""
    return pool if pool.workers > 1 and rows >= SMALL and pool.carries(value) else INLINE


class Executor:
    """A pool over an executor (concurrent.futures), started when there is work enough."""

    def __init__(self, start: Callable[[int], Any], workers: int, apart: bool) -> None:
        self.start, self.workers, self.apart = start, workers, apart
        self.running: Any = None

    def map(self, work: Callable[[Task], Result], tasks: Iterable[Task]) -> Iterator[Result]:
        waiting: deque[Any] = deque()
        try:
            for task in tasks:
                waiting.append(self._submit(work, task))
                if len(waiting) > self.workers * AHEAD:
                    yield self._result(waiting.popleft())
            while waiting:
                yield self._result(waiting.popleft())
        finally:
            for future in waiting:
                future.cancel()

    def carries(self, value: object) -> bool:
        if not self.apart:
            return True
        try:
            self._result(self._submit(_loads, pickle.dumps(value)))
        except HouseError:
            raise
        except Exception:  # whatever unpickling may raise there
            return False
        return True

    def close(self) -> None:
        """Ends the workers, those at work too: what they have not finished is done again by the next run."""
        running, self.running = self.running, None
        if running is not None:
            busy = list((getattr(running, "_processes", None) or {}).values())
            running.shutdown(wait=False, cancel_futures=True)
            for process in busy:
                with suppress(OSError, ValueError):
                    process.terminate()
            for process in busy:
                with suppress(OSError, ValueError, AssertionError):
                    process.join()

    def _submit(self, work: Callable[[Task], Result], task: Task) -> Any:
        from concurrent.futures import BrokenExecutor

        try:
            if self.running is None:
                self.running = self.start(self.workers)
            with _interrupts_held():  # any task may start another worker
                return self.running.submit(work, task)
        except BrokenExecutor as error:
            raise self._broken() from error

    def _result(self, future: Any) -> Any:
        from concurrent.futures import BrokenExecutor

        try:
            return future.result()
        except BrokenExecutor as error:
            raise self._broken() from error

    def _broken(self) -> HouseError:
        self.close()
        return HouseError(
            f"one of {self.workers} worker processes died at its work, most likely killed because memory ran out (see"
            " `dmesg`). Finished steps stand: run the same command again, with fewer --workers or more memory"
        )


class Ray:
    """A pool over a Ray cluster: the one that RAY_ADDRESS names, else one on this machine. Every node must reach the
    run's folder under the same path, and have gristmill installed."""

    apart = True

    def __init__(self, workers: int) -> None:
        self.workers, self.ours = workers, False
        self.remote: Any = None

    def map(self, work: Callable[[Task], Result], tasks: Iterable[Task]) -> Iterator[Result]:
        waiting: deque[Any] = deque()
        for task in tasks:
            waiting.append(self._submit(work, task))
            if len(waiting) > self.workers * AHEAD:
                yield self._get(waiting.popleft())
        while waiting:
            yield self._get(waiting.popleft())

    def carries(self, value: object) -> bool:
        try:
            self._get(self._submit(_loads, pickle.dumps(value)))
        except HouseError:
            raise
        except Exception:  # whatever unpickling may raise there
            return False
        return True

    def close(self) -> None:
        """Leaves the cluster; ends it where this pool began it."""
        self.remote = None
        if self.ours:
            import ray

            ray.shutdown()
            self.ours = False

    def _submit(self, work: Callable[[Task], Result], task: Task) -> Any:
        import ray

        if not ray.is_initialized():
            address = os.environ.get("RAY_ADDRESS")
            here: dict[str, Any] = {} if address else {"num_cpus": self.workers, "include_dashboard": False}
            try:
                ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR, **here)
            except (ConnectionError, ValueError, RuntimeError) as error:
                raise HouseError(f"cannot reach the Ray cluster at {address or 'this machine'}: {error}") from error
            self.ours = True
        self.remote = self.remote or ray.remote(num_cpus=1, max_retries=1)(_do)
        return self.remote.remote(work, task)

    def _get(self, reference: Any) -> Any:
        import ray

        try:
            return ray.get(reference)
        except ray.exceptions.RayTaskError as error:
            raise error.cause from error  # as it was raised there
        except ray.exceptions.RayError as error:
            raise HouseError(
                f"a Ray worker was lost: {type(error).__name__}: {error}. Finished steps stand: run the same command"
                " again"
            ) from error


@contextmanager
def pool(workers: int | None = None, kind: str | None = None) -> Iterator[Pool]:
    """A pool for the length of the block. workers: None is GRISTMILL_WORKERS, else every processor; 1 is no pool at
    all. kind: processes, threads or ray; None is GRISTMILL_EXECUTOR, else processes."""
    count = workers if workers is not None else _from_environment()
    kind = kind or os.environ.get("GRISTMILL_EXECUTOR") or "processes"
    if kind not in KINDS:
        raise HouseError(f"unknown executor {kind!r}; known: {', '.join(KINDS)}")
    if count < 1:
        raise HouseError(f"{count} workers; there is at least 1")
    if kind == "ray":
        _ray_is_there()
        made: Any = Ray(count)
    elif count == 1:
        yield INLINE
        return
    else:
        made = Executor(_processes if kind == "processes" else _threads, count, kind == "processes")
    try:
        yield made
    finally:
        made.close()


def processors() -> int:
    """How many processors this process may use: GRISTMILL_THREADS where it is set, as in a pool's workers."""
    said = os.environ.get("GRISTMILL_THREADS", "")
    if said.isdecimal() and int(said):
        return int(said)
    return len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1


def _from_environment() -> int:
    said = os.environ.get("GRISTMILL_WORKERS")
    if not said:
        return processors()
    if not said.isdecimal():
        raise HouseError(f"GRISTMILL_WORKERS is {said!r}, not a number of workers")
    return int(said)


def _ray_is_there() -> None:
    try:
        import ray  # noqa: F401
    except ImportError as error:
        raise HouseError("the executor ray needs Ray: pip install 'gristmill[cluster]'") from error


def _threads(workers: int) -> Any:
    from concurrent.futures import ThreadPoolExecutor

    return ThreadPoolExecutor(workers, "gristmill")


def _processes(workers: int) -> Any:
    """Fresh processes: a fork of one with Arrow's and numba's threads may hang."""
    from concurrent.futures import ProcessPoolExecutor
    from multiprocessing import get_context

    return ProcessPoolExecutor(workers, get_context("spawn"), initializer=_begin)


@contextmanager
def _interrupts_held() -> Iterator[None]:
    """Ctrl-C waits. A worker born meanwhile does not see it before `_begin` says that it is not its business: else one
    that is still importing would print a traceback of its own."""
    import signal

    if not hasattr(signal, "pthread_sigmask"):  # not on Windows
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _begin() -> None:
    """In a new worker process: one thread, no Ctrl-C of its own (the run ends it), no life after the run's."""
    import multiprocessing
    import signal

    _one_thread()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if hasattr(signal, "pthread_sigmask"):
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
    parent = multiprocessing.parent_process()
    if parent is not None:
        threading.Thread(target=_end_with, args=(parent,), daemon=True).start()


def _end_with(parent: Any) -> None:
    parent.join()
    os._exit(1)


def _one_thread() -> None:
    """Each worker is one processor's."""
    import pyarrow as pa

    os.environ.update(dict.fromkeys(LIMITS, "1"))
    pa.set_cpu_count(1)
    if "torch" in sys.modules:
        sys.modules["torch"].set_num_threads(1)


def _do(work: Callable[[Task], Result], task: Task) -> Result:
    """What Ray runs."""
    if "GRISTMILL_THREADS" not in os.environ:
        _one_thread()
    return work(task)


def _loads(raw: bytes) -> bool:
    pickle.loads(raw)
    return True
