"""A door whose last answer waits for the first verdict: who verifies only when all have come is found out."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from threading import Event
from typing import Any, ClassVar

from gristmill.curation.beside import BATCH
from gristmill.curation.door import ChatAnswer, ChatRequest
from gristmill.curation.verifying import Case, Finding

DEADLINE = 60.0  # seconds that the last answer waits before it gives up


@dataclass(frozen=True)
class Telling:
    """A verifier: right is what holds `good`. told: set with its first verdict."""

    good: str
    told: Event = field(default_factory=Event, compare=False, repr=False)

    model: ClassVar[None] = None

    def verify(self, cases: Sequence[Case], tools: Any) -> list[Finding]:
        found = [Finding(self.good in case.answer, "read", case.answer) for case in cases]
        self.told.set()
        return found


class Late:
    """Tools of one streaming model. waited: the streams whose last answer came after a verdict, all of them."""

    name, digest, licence, price = "late", "d", "MIT", (0.0, 0.0)

    def __init__(self, answer: Callable[[ChatRequest], str], verifier: Telling) -> None:
        self.answer, self.told, self.waited = answer, verifier.told, 0

    def chat(self, model: str) -> "Late":
        return self

    def complete(self, requests: Sequence[ChatRequest], progress: Any = None) -> Any:
        raise AssertionError("a model that streams is streamed")

    def stream(self, requests: Sequence[ChatRequest]) -> Iterator[tuple[int, ChatAnswer]]:
        assert len(requests) > BATCH, "too few for verification to begin"
        self.told.clear()
        for place, request in enumerate(requests):
            if place == len(requests) - 1:
                assert self.told.wait(DEADLINE), "the last answer was waited for before anything was verified"
                self.waited += 1
            yield place, ChatAnswer(self.answer(request), 10, 10, True)
