"""Verification beside generation: answers are verified in batches by threads while others are still asked."""

from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

from .steps import Tools
from .verifying import Case, Finding, Verifier

T = TypeVar("T")
BATCH = 32  # answers verified at once: enough to keep a verifier's own processes busy, few enough to begin early
THREADS = 2


def verified(
    said: Iterable[tuple[T, Case]], verifier: Verifier, tools: Tools, batch: int = BATCH
) -> Iterator[tuple[T, Finding]]:
    """Each thing with what the verifier finds of its case, in order. `said` is read as fast as it comes; findings
    follow as they are made, whether or not the caller is quick to take them. A verifier that asks a model itself begins
    when `said` has ended: its model may not be loaded beside the one that answers."""
    if verifier.model is not None:
        said = list(said)
    waiting: deque[tuple[list[T], Future[list[Finding]]]] = deque()
    with ThreadPoolExecutor(THREADS, thread_name_prefix="verify") as threads:

        def start(group: list[tuple[T, Case]]) -> None:
            things, cases = [thing for thing, _ in group], [case for _, case in group]
            waiting.append((things, threads.submit(verifier.verify, cases, tools)))

        group: list[tuple[T, Case]] = []
        for pair in said:
            group.append(pair)
            if len(group) == batch:
                start(group)
                group = []
            while waiting and waiting[0][1].done():
                yield from _findings(*waiting.popleft())
        if group:
            start(group)
        while waiting:
            yield from _findings(*waiting.popleft())


def _findings(things: list[T], found: "Future[list[Finding]]") -> Iterator[tuple[T, Finding]]:
    yield from zip(things, found.result(), strict=True)
