"""What a verifier is: something that can tell whether an answer is right, without a language model where it can."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

from .steps import Tools


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
