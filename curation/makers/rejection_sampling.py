"""Makers that sample answers to questions with a known right answer, and keep what a verifier finds right."""

import random
import warnings
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import pyarrow as pa

from ..asking import seed_of
from ..folder import HouseError
from ..rows import Row, message, table
from ..steps import Corpus
from ..synthesis import Prompt, Session, prompt, sampling_of
from ..verifying import Verifier

if TYPE_CHECKING:
    from ..sampling import Budget, Question, Tried

ROWS = 10_000  # made rows of one table


@dataclass(frozen=True)
class RejectionSampling:
    """SFT rows: sampled answers that `verifier` finds right, more of them for harder questions (DART, arXiv
    2407.13690).

    Questions are rows with a right answer: the last assistant turn, or `reference` in meta. set_name: a finished set of
    this run, both of its splits (the held-out rule falls on the same prompts again); None: the live rows of this set.
    limit: questions, the lowest by hash; None: all.

    budget: vanilla keeps every different right answer of `trials` trials. uniform samples until each question has `k`.
    prop2diff samples until it has k · fail rate (rounded up, at least `least`), the fail rate being that of its first
    `trials` trials: k is what a question gets that never succeeds, if it ever does. An answer that the verifier cannot
    decide is a failed trial. most_trials: of one question, the cap. Answers that say the same count once.

    solve: the prompt's file in curation/prompts, with {question}. temperature, top_p, max_tokens: of the sampling.
    keep: "question" puts the bare question into the row, "prompt" what was asked. replaces: whether a question's own
    row leaves the set, with reason `sampled`, where it got an answer.

    meta: fail_rate, trials, right (of the trials), verdict and value of the verifier, try. step.json: `budget`.
    """

    model: str
    verifier: Verifier
    set_name: str | None = None
    reference: str | None = None
    limit: int | None = None
    budget: Literal["vanilla", "uniform", "prop2diff"] = "prop2diff"
    k: int = 4
    trials: int = 4
    most_trials: int = 32
    least: int = 0
    solve: str = "solve"
    keep: Literal["question", "prompt"] = "question"
    temperature: float = 1.0
    top_p: float = 0.95
    max_tokens: int = 512
    seed: int = 0
    replaces: bool = False

    scope: ClassVar[Literal["maker"]] = "maker"

    def __post_init__(self) -> None:
        _check(self, self.budget, self.k, self.trials, self.most_trials, self.least)

    @property
    def consumes(self) -> str | None:
        return "sampled" if self.replaces else None

    def make(self, corpus: Corpus) -> Iterator[pa.Table]:
        """Tables of new rows; the budget's report goes into the step's record."""
        from ..sampling import Budget

        budget = Budget(self.budget, self.k, self.trials, self.most_trials, self.least)
        with Session(self, corpus, self.model, "rejection_sampling") as session:
            asked = _sampled(self, session, budget)
            rows = (row for one in asked for row in self._rows(session, one, budget))
            yield from _tables(rows)

    def _rows(self, session: Session, one: "Question", budget: "Budget") -> Iterator[Row]:
        kept = one.right[: budget.wanted(*one.first)]
        for _ in one.right[len(kept) :]:
            session.refused("over_budget")
        for tried in kept:
            answer = message("assistant", tried.answer.text.strip())
            yield session.row(tried.ask, tried.answer, _about(one, tried), messages=[*_said(one, self.keep), answer])


@dataclass(frozen=True)
class RightAgainstWrong:
    """Preference rows of sampled answers: chosen is one that `verifier` finds right, rejected one to the same question
    that it finds wrong. Answers that it cannot decide are on neither side.

    The fields are those of RejectionSampling, and so are the requests: with equal fields the answers of one maker serve
    the other, and are paid for once. pairs: of one question at most; each right and each wrong answer is used once
    before one is used again, in an order drawn by (seed, question). reference_chosen: where no sampled answer is right,
    the reference is chosen (its own row's words), against each wrong one.

    meta: fail_rate, trials, verdicts and tries of both sides.
    """

    model: str
    verifier: Verifier
    set_name: str | None = None
    reference: str | None = None
    limit: int | None = None
    budget: Literal["vanilla", "uniform", "prop2diff"] = "vanilla"
    k: int = 4
    trials: int = 4
    most_trials: int = 32
    least: int = 0
    pairs: int = 2
    reference_chosen: bool = False
    solve: str = "solve"
    keep: Literal["question", "prompt"] = "question"
    temperature: float = 1.0
    top_p: float = 0.95
    max_tokens: int = 512
    seed: int = 0

    scope: ClassVar[Literal["maker"]] = "maker"
    consumes: ClassVar[str | None] = None

    def __post_init__(self) -> None:
        _check(self, self.budget, self.k, self.trials, self.most_trials, self.least)
        if self.pairs < 1:
            raise HouseError(f"{type(self).__name__}: pairs is at least 1")

    def make(self, corpus: Corpus) -> Iterator[pa.Table]:
        """Tables of new rows; the budget's report goes into the step's record."""
        from ..sampling import Budget

        budget = Budget(self.budget, self.k, self.trials, self.most_trials, self.least)
        with Session(self, corpus, self.model, "right_against_wrong") as session:
            asked = _sampled(self, session, budget)
            lost: Counter[str] = Counter()
            rows = (row for one in asked for row in self._rows(session, one, lost))
            yield from _tables(rows)
            corpus.record(without_pair=dict(sorted(lost.items())))

    def _rows(self, session: Session, one: "Question", lost: Counter[str]) -> Iterator[Row]:
        if not one.wrong or not (one.right or self.reference_chosen):
            lost["no_wrong_answer" if one.tried and not one.wrong else "no_right_answer"] += 1
            return
        draw = random.Random(seed_of("pairs", self.seed, one.row_id))
        wrong = draw.sample(one.wrong, len(one.wrong))
        right: list[Tried | None] = [*draw.sample(one.right, len(one.right))] or [None]
        most = min(self.pairs, len(right) * len(wrong))
        for good, bad in _crossed(right, wrong)[:most]:
            said = one.reference if good is None else good.answer.text
            about = _about(one, bad) | {"chosen_try": None if good is None else good.ask.about[1]}
            about |= {"rejected_try": bad.ask.about[1], "rejected_verdict": bad.finding.detail}
            about |= {"chosen_verdict": "the reference" if good is None else good.finding.detail}
            about = {name: value for name, value in about.items() if name not in ("try", "verdict", "value")}
            content: dict[str, Any] = {"messages": _said(one, self.keep)}
            content["chosen"] = [message("assistant", (said or "").strip())]
            content["rejected"] = [message("assistant", bad.answer.text.strip())]
            yield session.row(bad.ask, bad.answer, about, **content)


Sampled = RejectionSampling | RightAgainstWrong


def _sampled(maker: Sampled, session: Session, budget: "Budget") -> "list[Question]":
    """The questions with their answers; the report is recorded, and what could not be asked is told."""
    from ..sampling import budget_report, questions, sample

    said: Prompt = prompt(maker.solve)
    asked, lost = questions(session.corpus, maker.set_name, said, maker.reference, maker.limit, maker.seed)
    if lost:
        told = ", ".join(f"{count} {reason}" for reason, count in sorted(lost.items()))
        warnings.warn(f"{type(maker).__name__}: rows that ask nothing new: {told}", stacklevel=2)
    sample(session, asked, maker.verifier, budget, said, sampling_of(maker), maker.seed)
    session.corpus.record(budget=budget_report(asked, lost, budget))
    return asked


def _about(one: "Question", tried: "Tried") -> dict[str, Any]:
    return {
        "fail_rate": one.fail_rate,
        "trials": len(one.tried),
        "right": sum(tried.finding.right is True for tried in one.tried),
        "try": tried.ask.about[1],
        "verdict": tried.finding.detail,
        "value": tried.finding.value,
    }


def _said(one: "Question", keep: str) -> list[dict[str, Any]]:
    """The turns before the answer, as the row has them."""
    return one.messages if keep == "question" else [message(role, content) for role, content in one.turns]


def _crossed(right: "list[Tried | None]", wrong: "list[Tried]") -> "list[tuple[Tried | None, Tried]]":
    """All pairs, ordered so that every answer is used once before one is used again."""
    pairs = [(a, b) for a in range(len(right)) for b in range(len(wrong))]
    order = list(pairs)
    used_right: Counter[int] = Counter()
    used_wrong: Counter[int] = Counter()
    chosen = []
    while order:
        best = min(order, key=lambda pair: (used_right[pair[0]] + used_wrong[pair[1]], pair))
        order.remove(best)
        used_right[best[0]] += 1
        used_wrong[best[1]] += 1
        chosen.append((right[best[0]], wrong[best[1]]))
    return chosen


def _tables(rows: Iterator[Row]) -> Iterator[pa.Table]:
    group: list[Row] = []
    for row in rows:
        group.append(row)
        if len(group) == ROWS:
            yield table(group)
            group = []
    if group:
        yield table(group)


def _check(maker: object, rule: Any, k: int, trials: int, most_trials: int, least: int) -> None:
    from ..sampling import Budget

    try:
        Budget(rule, k, trials, most_trials, least)
    except HouseError as error:
        raise HouseError(f"{type(maker).__name__}: {error}") from error
