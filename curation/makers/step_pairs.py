"""Pairs of one step of a solution: the first wrong one, and a right one in its place (Step-DPO)."""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

import pyarrow as pa

from ..beside import verified
from ..door import Sampling
from ..folder import HouseError
from ..preferring import (
    Question,
    Said,
    distinct,
    grouped,
    heard,
    matched,
    pair_row,
    questions,
    sampled,
    samples,
    usable,
)
from ..rows import Row, message, table
from ..steps import Corpus
from ..synthesis import Ask, Session, asking, prompt
from ..text.sentences import steps
from ..unfolding import unfolded
from ..verifying import Case, Verifier


@dataclass(frozen=True)
class _Fault:
    """A wrong solution of a question; step `wrong` (from 0) is the first wrong one."""

    said: Said
    parts: tuple[str, ...]
    wrong: int

    @property
    def prefix(self) -> str:
        return "".join(self.parts[: self.wrong])


@dataclass(frozen=True)
class StepPairs:
    """Step-DPO's data (arXiv 2406.18629): the first wrong step of a solution that the policy gave is rejected; chosen
    is the first step of a continuation from the right steps before it, sampled from the policy itself, that ends in the
    right answer.

    model: the policy. verifier: whether a final answer is right. set_name, prompts, test_prompts: questions of an
    earlier set, the lowest by hash of (seed, row_id). answers: solutions sampled of each question; those whose answer
    is wrong go on. separator: between steps.

    judge: the model that names the first wrong step (temperature 0, judge_tokens; asked once more where it cannot be
    read). None: by rollouts of the policy, as Math-Shepherd estimates steps (arXiv 2312.08935): a step is wrong where
    none of `rollouts` continuations after it ends right, and one before it did; found by bisection, in about
    log2(steps) rounds. continuations: sampled from the right prefix; those whose answer is right count, their first
    steps once each. pairs: at most of one solution. length_ratio: of the two steps, in characters (None: any).

    Rows: prompt the question; chosen and rejected are the right steps and then the step, and spans give what is not the
    step, the prefix and the end of the turn, weight 0: only the step's tokens carry loss. Parent: the question's row.
    meta: step (its number, from 1), score_chosen 1, score_rejected 0, where both come from. Parents stay.
    """

    model: str
    verifier: Verifier
    judge: str | None = None
    set_name: str = "sft"
    prompts: int = 400
    test_prompts: int = 0
    answers: int = 2
    rollouts: int = 4
    continuations: int = 8
    pairs: int = 1
    separator: str = "\n"
    temperature: float = 0.8
    max_tokens: int = 512
    judge_tokens: int = 256
    length_ratio: float | None = None
    seed: int = 0

    scope: ClassVar[Literal["maker"]] = "maker"
    consumes: ClassVar[str | None] = None

    def __post_init__(self) -> None:
        least = min(self.answers, self.rollouts, self.continuations, self.pairs, self.max_tokens, self.judge_tokens)
        if min(self.prompts, self.test_prompts) < 0 or least < 1 or not self.separator:
            raise HouseError(f"{self}: numbers are at least 1 (prompts: 0), and separator is some text")

    @property
    def asked(self) -> tuple[str, ...]:
        """Models that it needs besides the one whose answers become rows."""
        return () if self.judge is None else (self.judge,)

    @property
    def sampling(self) -> Sampling:
        return Sampling(self.temperature, 1.0, self.max_tokens)

    def make(self, corpus: Corpus) -> Iterator[pa.Table]:
        """One table of new rows."""
        counts = {"train": self.prompts, "test": self.test_prompts}
        asked = list(questions(corpus, self.set_name, counts, self.seed))
        made: list[Row] = []
        with Session(self, corpus, self.model, "step_pairs") as session:
            solved = sampled(session, samples(asked, self.answers, self.sampling, self.seed), self.verifier)
            wrong = []
            for said, finding in solved:
                if finding.right is False:
                    wrong.append(said)
                else:
                    session.refused("verifier_abstains" if finding.right is None else "solved")
            own = grouped(wrong, lambda one: one.ask.about.row_id).values()
            alone = [one for group in own for one in distinct(group, lambda said: said.text)]
            faults = self._judged(session, alone) if self.judge else self._rolled(session, alone)
            made = self._rows(session, faults)
        if made:
            yield table(made)

    def _judged(self, session: Session, wrong: Sequence[Said]) -> list[_Fault]:
        """Where the judge sees the first mistake."""
        form = prompt("first_wrong_step")
        asks, parts = [], []
        for one in wrong:
            own = steps(one.text, self.separator)
            listed = "\n".join(f"{number}. {step.strip()}" for number, step in enumerate(own, 1))
            question: Question = one.ask.about
            turns = form.turns(question=question.said, reference=question.reference or "not known", steps=listed)
            greedy = Sampling(temperature=0.0, max_tokens=self.judge_tokens)
            asks.append(asking(form, turns, greedy, ("step", self.seed, question.row_id, one.text), one.ask.parents))
            parts.append(tuple(own))
        assert self.judge is not None
        told = heard(session.beside(self.judge), asks, lambda answer: parse_step(answer.text))
        faults = []
        for one, own_parts, number in zip(wrong, parts, told, strict=True):
            if number is None or number > len(own_parts):
                session.refused("judge_abstains")
            elif number == 0:
                session.refused("no_wrong_step")
            else:
                faults.append(_Fault(one, own_parts, number - 1))
        return faults

    def _rolled(self, session: Session, wrong: Sequence[Said]) -> list[_Fault]:
        """Where rollouts stop to end right: by bisection of all solutions at once. Before the first step the policy is
        taken to be able to solve the question; whether it is, its continuations show."""
        parts = [tuple(steps(one.text, self.separator)) for one in wrong]
        low, high = [0] * len(wrong), [len(own) for own in parts]  # after low steps it can be solved, after high not
        while open_ := [place for place in range(len(wrong)) if high[place] - low[place] > 1]:
            middle = {place: (low[place] + high[place]) // 2 for place in open_}
            prefixes = [(wrong[place], "".join(parts[place][: middle[place]])) for place in open_]
            rights = self._continued(session, prefixes, self.rollouts, "roll")
            for place, right in zip(open_, rights, strict=True):
                if right:
                    low[place] = middle[place]
                else:
                    high[place] = middle[place]
        return [_Fault(one, own, end - 1) for one, own, end in zip(wrong, parts, high, strict=True)]

    def _continued(
        self, session: Session, prefixes: Sequence[tuple[Said, str]], count: int, name: str
    ) -> list[list[Said]]:
        """Of each (solution, its first steps) the continuations that end in the right answer; an answer says the
        continuation alone."""
        asks: list[Ask] = []
        for place, (one, prefix) in enumerate(prefixes):
            question: Question = one.ask.about
            for draw in range(count):
                asks.append(
                    continuation(question, prefix, self.sampling, (name, self.seed, question.row_id, draw), place)
                )

        def came() -> Iterator[tuple[tuple[int, Said], Case]]:
            for ask, answer in session.ask(asks):
                if usable(session, answer):
                    one, prefix = prefixes[ask.about]
                    rest = without_prefix(answer.text, prefix)
                    said = Said(replace(ask, about=one.ask.about), replace(answer, text=rest), session)
                    yield (ask.about, said), one.ask.about.case(prefix + rest)

        found: list[list[Said]] = [[] for _ in prefixes]
        for (place, said), finding in verified(came(), self.verifier, session.tools):
            session.tally.verified += finding.right is not None
            if finding.right and said.text:
                found[place].append(said)
        return found

    def _rows(self, session: Session, faults: Sequence[_Fault]) -> list[Row]:
        prefixes = [(fault.said, fault.prefix) for fault in faults]
        rows = []
        for fault, right in zip(faults, self._continued(session, prefixes, self.continuations, "on"), strict=True):
            bad = fault.parts[fault.wrong]
            firsts = [(said, steps(said.text, self.separator)[0]) for said in right]
            good = [one for one in distinct(firsts, lambda one: one[1]) if one[1].split() != bad.split()]
            drawn = matched(
                [step for _, step in good],
                [bad],
                self.pairs,
                ("step", self.seed, fault.said.ask.about.row_id, fault.said.text),
                self.length_ratio,
            )
            if not drawn:
                session.refused("no_right_continuation" if not right else "same_step" if not good else "length")
            for place, _ in drawn:
                said, step = good[place]
                about = {"step": fault.wrong + 1, "score_chosen": 1.0, "score_rejected": 0.0}
                rows.append(pair_row(said, fault.said, about, **step_sides(fault.prefix, step, bad)))
        return rows


@dataclass(frozen=True)
class StatedSteps:
    """Preference rows of a data set that states steps already, as Math-Step-DPO-10K does (arXiv 2406.18629), in the
    form that StepPairs makes: chosen and rejected are single steps, and their meta holds the right steps before them.

    prefix: where in meta those lie; rows that have none there, or more than one turn in an answer, stay as they are.
    The text is put together as it is, with `between` between prefix and step. Spans give all but the step weight 0. The
    old row leaves with reason `rewritten` and is the new one's parent; held-out rows are rewritten too and stay held
    out.
    """

    prefix: str = "initial_reason_steps"
    between: str = ""

    scope: ClassVar[Literal["maker"]] = "maker"
    consumes: ClassVar[str | None] = "rewritten"
    model: ClassVar[None] = None
    rewrites: ClassVar[bool] = True

    def make(self, corpus: Corpus) -> Iterator[pa.Table]:
        """Tables of new rows, one for each part that gave any."""
        wanted = f"it wants the steps before chosen and rejected as a text in meta, under {self.prefix!r}"
        return unfolded(self, corpus, self._contents, "stated_steps", wanted)

    def _contents(self, row: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
        sides = self._sides(row)
        if sides is not None:
            yield {"messages": row["messages"], "tools": row["tools"], "meta": row["meta"], **sides}

    def _sides(self, row: Mapping[str, Any]) -> dict[str, Any] | None:
        meta = json.loads(row["meta"] or "{}")
        prefix = meta.get(self.prefix) if isinstance(meta, dict) else None
        answers = [row["chosen"], row["rejected"]]
        if not isinstance(prefix, str) or any(answer is None or len(answer) != 1 for answer in answers):
            return None
        good, bad = (answer[0]["content"] or "" for answer in answers)
        before = prefix + self.between if prefix.strip() else ""
        return step_sides(before, good, bad) if good.strip() and bad.strip() else None


def continuation(question: Question, prefix: str, sampling: Sampling, seed: Sequence[object], about: Any = None) -> Ask:
    """A request for the rest of a solution; without a prefix, the question as it is."""
    name = (*seed, prefix)
    if not prefix.strip():
        return asking(None, question.turns, sampling, name, (question.row_id,), about)
    form = prompt("continue_solution")
    (turn,) = form.turns(question=question.turns[-1][1], prefix=prefix.strip())
    return asking(form, (*question.turns[:-1], turn), sampling, name, (question.row_id,), about)


def without_prefix(text: str, prefix: str) -> str:
    """A continuation without the steps that it repeats of its prefix, where it begins with all of them or with some of
    the last of them."""
    lines = [line.strip() for line in prefix.splitlines() if line.strip()]
    said = text.strip()
    for start in range(len(lines)):
        rest = said
        for line in lines[start:]:
            if not rest.startswith(line):
                break
            rest = rest[len(line) :].lstrip()
        else:
            return rest
    return said


def step_sides(prefix: str, good: str, bad: str) -> dict[str, Any]:
    """chosen, rejected and spans of a pair of steps after `prefix`: all but the step weighs 0."""
    sides: dict[str, Any] = {"spans": []}
    for name, step in (("chosen", good), ("rejected", bad)):
        text = prefix + step.rstrip()
        sides[name] = [message("assistant", text)]
        if prefix:
            sides["spans"].append({"field": name, "turn": 0, "start": 0, "end": len(prefix), "weight": 0.0})
        tail = {"field": name, "turn": 0, "start": len(text), "end": len(text), "weight": 0.0}
        sides["spans"].append(tail)  # a step is no end of an answer
    return sides


_STEP = re.compile(
    r"(?:first\s+(?:wrong|incorrect|mistaken|erroneous)\s+step|first\s+mistake|first\s+error)\W{0,6}(?:is\W{1,4})?"
    r"(?:in\W{1,4})?(?:step\W{0,3})?(\d+|none|no\b)",
    re.IGNORECASE,
)
_ALONE = re.compile(r"\W*(?:step\W{0,3})?(\d+|none)\W*", re.IGNORECASE)


def parse_step(text: str) -> int | None:
    """The number of the first wrong step that an answer names last; 0 where it says that there is none, None where it
    says neither."""
    found = [match[1] for match in _STEP.finditer(text)]
    if not found:
        lines = [line for line in text.splitlines() if line.strip()]
        alone = _ALONE.fullmatch(lines[-1]) if lines else None
        found = [alone[1]] if alone else []
    if not found:
        return None
    number = 0 if found[-1].lower() in ("none", "no") else int(found[-1])
    return number if number or found[-1].lower() in ("none", "no") else None
