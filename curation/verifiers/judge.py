"""Answers that a language model judges right."""

import re
from collections.abc import Sequence
from dataclasses import dataclass

from ..asking import seed_of
from ..door import ChatRequest, Sampling
from ..rows import digest
from ..steps import Tools
from ..synthesis import prompt
from ..verifying import Case, Finding, hear

VERDICT = re.compile(r"\bverdict\b[\s:*`_]*(yes|no|unsure)\b", re.IGNORECASE)
UNREAD = ("no_verdict", "several_verdicts")
ALONE = re.compile(r"^[\s*`\"']*(yes|no|unsure)\b", re.IGNORECASE)


@dataclass(frozen=True)
class JudgedRight:
    """Right where `model` finds the answer equivalent to the reference, whichever of the two it reads first.

    Each case is asked twice, the answer and the reference in swapped places (judges favour a place, arXiv 2305.17926).
    Abstains where the two verdicts differ, where one is UNSURE or cannot be read, and where there is no reference; an
    answer that says what the reference says, spaces and case aside, is right unasked. judge: the prompt's file, with
    {question}, {first} and {second}. max_tokens: of a verdict with its reasons; greedy.
    """

    model: str
    judge: str = "judge_right"
    max_tokens: int = 256

    def verify(self, cases: Sequence[Case], tools: Tools) -> list[Finding]:
        """One finding a case. detail: both verdicts, or the error of the door."""
        from ..text.view import normal

        found: dict[int, Finding] = {}
        asked = []
        for place, case in enumerate(cases):
            if case.reference is None or not case.reference.strip():
                found[place] = Finding(None, "no reference to judge by")
            elif not case.answer.strip():
                found[place] = Finding(None, "an empty answer")
            elif normal(case.answer) == normal(case.reference):
                found[place] = Finding(True, "the reference's own words")
            else:
                asked.append(place)
        requests = [self._request(cases[place], swapped) for place in asked for swapped in (False, True)]
        told = hear(tools, self.model, requests, parse_verdict, UNREAD)
        for at, place in enumerate(asked):
            found[place] = finding(told[2 * at], told[2 * at + 1])
        return [found[place] for place in range(len(cases))]

    def _request(self, case: Case, swapped: bool) -> ChatRequest:
        pair = (case.reference or "", case.answer)
        first, second = pair[::-1] if swapped else pair
        turns = prompt(self.judge).turns(question=case.prompt, first=first, second=second)
        seed = seed_of("judge", digest(case.prompt, first, second))
        return ChatRequest(turns, seed, Sampling(temperature=0.0, max_tokens=self.max_tokens))


def parse_verdict(text: str) -> bool | str:
    """True or False, or why the verdict is neither: unsure, no_verdict, several_verdicts."""
    said = {match.lower() for match in VERDICT.findall(text)}
    if not said:
        alone = ALONE.match(text)
        said = {alone[1].lower()} if alone else set()
    if len(said) != 1:
        return "several_verdicts" if said else "no_verdict"
    (one,) = said
    return "unsure" if one == "unsure" else one == "yes"


def finding(one: bool | str, other: bool | str) -> Finding:
    """What two verdicts in swapped places come to, each as `parse_verdict` reads it or the kind of an error."""
    detail = ", ".join(said if isinstance(said, str) else "yes" if said else "no" for said in (one, other))
    if one is True and other is True:
        return Finding(True, f"judged {detail}")
    if one is False and other is False:
        return Finding(False, f"judged {detail}")
    return Finding(None, f"judged {detail}")
