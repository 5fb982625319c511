"""Verification beside generation: answers are verified in batches by threads while others are still asked."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor

from .door import ChatAnswer
from .steps import Tools
from .synthesis import Ask
from .verifying import Case, Finding, Verifier

Said = tuple[Ask, ChatAnswer]
BATCH = 32  # answers verified at once
THREADS = 2


def verified(
    answers: Iterable[Said],
    case: Callable[[Ask, ChatAnswer], Case],
    verifier: Verifier,
    tools: Tools,
    batch: int = BATCH,
) -> Iterator[tuple[Ask, ChatAnswer, Finding]]:
    """What `session.ask` hands out, each with its finding, in order. `case` makes a case of an answer. The answers are
    read as fast as they come; findings follow as they are made, whether or not the caller is quick to take them."""
    waiting: deque[tuple[list[Said], Future[list[Finding]]]] = deque()
    with ThreadPoolExecutor(THREADS, thread_name_prefix="verify") as threads:

        def start(group: list[Said]) -> None:
            cases = [case(ask, answer) for ask, answer in group]
            waiting.append((group, threads.submit(verifier.verify, cases, tools)))

        group: list[Said] = []
        for said in answers:
            group.append(said)
            if len(group) == batch:
                start(group)
                group = []
            while waiting and waiting[0][1].done():
                yield from _findings(*waiting.popleft())
        if group:
            start(group)
        while waiting:
            yield from _findings(*waiting.popleft())


def _findings(group: list[Said], found: "Future[list[Finding]]") -> Iterator[tuple[Ask, ChatAnswer, Finding]]:
    for (ask, answer), finding in zip(group, found.result(), strict=True):
        yield ask, answer, finding
