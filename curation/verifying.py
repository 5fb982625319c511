"""What a verifier is: something that can tell whether an answer is right, without a language model where it can."""

import threading
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar, runtime_checkable

from .door import ChatAnswer, ChatError, ChatModel, ChatRequest, Requests
from .steps import Tools

T = TypeVar("T")


@dataclass(frozen=True)
class Case:
    """One answer to verify. reference: the known right answer, where there is one. meta: what the row carries besides
    (unit tests, constraints, options)."""

    prompt: str
    answer: str
    reference: str | None = None
    meta: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Finding:
    """right: None where the verifier abstains (nothing to compare with, an answer that it cannot read). detail: what it
    saw, for the evidence: the values compared, the test that failed, the judge's words. value: what it read out of the
    answer, such as a number in normal form, by which equal answers are known."""

    right: bool | None
    detail: str
    value: str | None = None


@runtime_checkable
class Verifier(Protocol):
    """A frozen dataclass that says of each answer whether it is right. A recipe nests it in a maker by its class name:
    `verifier: {ExactMaths: {}}`."""

    @property
    def model(self) -> str | None:
        """The model of the recipe that it asks, or None."""

    def verify(self, cases: Sequence[Case], tools: Tools) -> list[Finding]:
        """One finding a case, in order; never raises for one bad case. Safe to call from several threads."""


class Bench:
    """Tools as a maker hands them to its verifier. requests: what became of what the verifier asked of language models;
    models: their names."""

    def __init__(self, tools: Tools) -> None:
        self.requests, self.models = Requests(), set[str]()
        self._tools, self._lock = tools, threading.Lock()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._tools, name)

    def count(self, chat: ChatModel, told: Sequence[ChatAnswer | ChatError], unread: Sequence[str]) -> None:
        """unread: of the answers that say nothing usable, why. Safe to call from several threads."""
        with self._lock:
            self.models.add(chat.name)
            self.requests.asked += len(told)
            for answer in told:
                self.requests.count(answer, chat.price)
            self.requests.parsed += sum(isinstance(answer, ChatAnswer) for answer in told) - len(unread)
            self.requests.unparsed.update(unread)


def hear(
    tools: Tools, model: str, requests: Sequence[ChatRequest], read: Callable[[str], T], unread: Collection[str] = ()
) -> list[T | str]:
    """What a verifier makes of a language model's answers, in order: what `read` says of each, and of a request that
    failed the kind of its error. unread: what `read` says of an answer that says nothing usable. Of a verifier that a
    maker called, the requests go into the maker's account."""
    if not requests:
        return []
    chat = tools.chat(model)
    told = chat.complete(requests)
    said = [answer if isinstance(answer, ChatError) else read(answer.text) for answer in told]
    if isinstance(tools, Bench):
        tools.count(chat, told, [str(value) for value in said if not isinstance(value, ChatError) and value in unread])
    return [value.kind if isinstance(value, ChatError) else value for value in said]
