"""Sampling answers to questions with a known right answer until a budget is met (DART, arXiv 2407.13690).

A `Question` gathers what was tried. Trials come in rounds: the first `trials` of every question tell its fail rate, the
fail rate how many right answers are wanted, and later rounds ask for what is missing, until a cap. A request's seed is
a hash of (seed, the prompt's turns, which try): makers that sample alike share their answers, and pay for them once.
"""

import heapq
import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from json import loads
from typing import Any, Literal

import pyarrow as pa

from .asking import Turns
from .beside import verified
from .door import ChatAnswer, Sampling
from .folder import HouseError
from .rows import Row, digest
from .steps import Corpus
from .synthesis import Ask, Prompt, Session, asking
from .text.view import normal
from .verifying import Case, Finding, Verifier

Rule = Literal["vanilla", "uniform", "prop2diff"]


@dataclass(frozen=True)
class Budget:
    """How many trials a question gets. rule: vanilla (`trials` and no more; every right answer is wanted), uniform
    (until there are `k` right answers), prop2diff (until there are k · fail rate, rounded up, at least `least`).
    most_trials: of one question, ever."""

    rule: Rule
    k: int
    trials: int
    most_trials: int
    least: int = 0

    def __post_init__(self) -> None:
        if self.rule not in ("vanilla", "uniform", "prop2diff"):
            raise HouseError(f"no budget {self.rule!r}: vanilla, uniform and prop2diff are known")
        if min(self.k, self.trials) < 1 or self.least < 0 or self.most_trials < self.trials:
            raise HouseError(
                f"k {self.k} and trials {self.trials} are at least 1, most_trials {self.most_trials} at least trials,"
                f" least {self.least} at least 0"
            )

    def wanted(self, trials: int, fails: int) -> int:
        """Right answers wanted of a question of whose first `trials` answers `fails` were not right."""
        if self.rule == "vanilla":
            return trials
        if self.rule == "uniform":
            return self.k
        return max(self.least, -(-self.k * fails // trials)) if trials else 0


@dataclass
class Tried:
    """One sampled answer and what the verifier found."""

    ask: Ask
    answer: ChatAnswer
    finding: Finding


@dataclass
class Question:
    """A row that is asked: its turns, its reference and what was answered so far."""

    row_id: str
    messages: list[dict[str, Any]]  # turns before the answer, as made rows carry them
    turns: Turns  # as asked
    reference: str | None
    meta: Mapping[str, Any]
    asked: int = 0
    tried: list[Tried] = field(default_factory=list)
    first: tuple[int, int] = (0, 0)  # answered and failed of the first trials
    _seen: set[str] = field(default_factory=set)
    right: list[Tried] = field(default_factory=list)  # different right answers
    wrong: list[Tried] = field(default_factory=list)  # different wrong ones, abstentions left out

    @property
    def fail_rate(self) -> float | None:
        """Of the first trials; None where none of them was answered."""
        answered, failed = self.first
        return failed / answered if answered else None

    def add(self, one: Tried) -> str | None:
        """Takes an answer in; why it is of no use, or None."""
        self.tried.append(one)
        if one.finding.right is None:
            return "undecided"
        same = normal(one.answer.text)
        if same in self._seen:
            return "duplicate"
        self._seen.add(same)
        (self.right if one.finding.right else self.wrong).append(one)
        return None if one.finding.right else "wrong"

    def case(self, answer: str) -> Case:
        """The answer as a verifier takes it."""
        return Case(self.messages[-1]["content"], answer, self.reference, self.meta)

    def missing(self, budget: Budget) -> int:
        return max(0, budget.wanted(*self.first) - len(self.right))

    def next_trials(self, budget: Budget) -> int:
        """Trials of the next round: what the pass rate so far makes likely to do, never more than were tried before."""
        if self.asked == 0:
            return budget.trials
        missing = self.missing(budget)
        if budget.rule == "vanilla" or missing == 0 or not self.tried:
            return 0
        rate = (len(self.right) + 1) / (len(self.tried) + 2)
        return min(math.ceil(missing / rate), self.asked, budget.most_trials - self.asked)


def questions(
    corpus: Corpus, set_name: str | None, prompt: Prompt, reference: str | None, limit: int | None, seed: int
) -> tuple[list[Question], Counter[str]]:
    """The rows that can be asked, and how many cannot, by reason. set_name: rows of an earlier set, both splits; None:
    the live rows. reference: where in meta the right answer stands; None: it is the last assistant turn. limit: of the
    rows, the lowest by hash of (seed, row_id). A question that several rows ask is asked once, for the first of
    them."""
    lost: Counter[str] = Counter()
    found: dict[Turns, Question] = {}
    rows = _rows(corpus, set_name)
    if limit is not None:
        rows = iter(heapq.nsmallest(limit, rows, key=lambda row: digest(str(seed), row["row_id"])))
    for row in rows:
        one = question_of(row, prompt, reference)
        if isinstance(one, str):
            lost[one] += 1
        elif one.turns in found:
            lost["same_question"] += 1
        else:
            found[one.turns] = one
    return list(found.values()), lost


def _rows(corpus: Corpus, set_name: str | None) -> Iterator[Row]:
    names = ["row_id", "messages", "meta"]
    parts: Iterable[pa.Table]
    if set_name is None:
        parts = corpus.tables(names)
    else:
        parts = (part for split in ("train", "test") for part in corpus.tools.curated(set_name, split))
    return (row for part in parts for row in part.select(names).to_pylist())


def question_of(row: Row, prompt: Prompt, reference: str | None) -> Question | str:
    """A row as a question, or why it is none. The last user turn goes into the prompt's {question}."""
    turns = list(row["messages"] or ())
    meta = loads(row["meta"]) if row["meta"] else {}
    last = max((at for at, turn in enumerate(turns) if turn["role"] == "assistant"), default=None)
    if reference is not None:
        right = meta.get(reference)
        before = turns if last is None else turns[:last]
    else:
        right = None if last is None else turns[last]["content"]
        before = [] if last is None else turns[:last]
    if not before or before[-1]["role"] != "user" or not (before[-1]["content"] or "").strip():
        return "no_question"
    if right is None or not str(right).strip():
        return "no_reference"
    own = prompt.turns(question=before[-1]["content"])
    earlier = tuple((turn["role"], turn["content"] or "") for turn in before[:-1])
    asked = (own[0], *earlier, *own[1:]) if len(own) == 2 else (*earlier, *own)
    return Question(row["row_id"], before, asked, str(right), meta)


def sample_ask(question: Question, place: int, attempt: int, prompt: Prompt, sampling: Sampling, seed: int) -> Ask:
    """The request of the `attempt`-th try (from 0)."""
    said = [piece for turn in question.turns for piece in turn]
    key = ("sample", seed, digest(*said), attempt)
    return asking(prompt, question.turns, sampling, key, (question.row_id,), (place, attempt))


def sample(
    session: Session,
    asked: list[Question],
    verifier: Verifier,
    budget: Budget,
    prompt: Prompt,
    sampling: Sampling,
    seed: int,
) -> None:
    """Fills `asked` with answers, round by round, and counts them in the session's tally."""
    while True:
        asks = []
        for place, one in enumerate(asked):
            trials = one.next_trials(budget)
            asks += [sample_ask(one, place, one.asked + t, prompt, sampling, seed) for t in range(trials)]
            one.asked += trials
        if not asks:
            return
        said = (((ask, answer), asked[ask.about[0]].case(answer.text)) for ask, answer in session.ask(asks))
        for (ask, answer), finding in verified(said, verifier, session.tools):
            _count(session, asked[ask.about[0]], Tried(ask, answer, finding), budget)


def _count(session: Session, question: Question, one: Tried, budget: Budget) -> None:
    problem = question.add(one)
    if one.ask.about[1] < budget.trials:
        answered, failed = question.first
        question.first = answered + 1, failed + (one.finding.right is not True)
    if not one.answer.text.strip():
        session.unparsed("empty")
    elif problem == "undecided":
        session.unparsed("undecided")
    else:
        session.tally.parsed += 1
        session.tally.verified += one.finding.right is True
        if problem is not None:
            session.refused(problem)


def budget_report(asked: list[Question], lost: Counter[str], budget: Budget) -> dict[str, Any]:
    """What the budget bought: questions, trials, questions without any right answer, tokens spent on them."""
    answered = [one for one in asked if one.tried]
    unsolved = [one for one in answered if not one.right]
    short = [one for one in answered if budget.rule != "vanilla" and one.missing(budget)]
    tokens = sum(tried.answer.tokens for one in asked for tried in one.tried)
    histogram = Counter(one.asked for one in asked)
    return {
        "rule": budget.rule,
        "questions": len(asked),
        "not_asked": dict(sorted(lost.items())),
        "unanswered": len(asked) - len(answered),
        "without_right_answer": len(unsolved),
        "short_of_wanted": len(short),
        "trials": sum(one.asked for one in asked),
        "trials_per_question": {str(count): histogram[count] for count in sorted(histogram)},
        "right_answers": sum(len(one.right) for one in asked),
        "tokens": tokens,
        "tokens_without_right_answer": sum(tried.answer.tokens for one in unsolved for tried in one.tried),
        "mean_fail_rate": sum(one.fail_rate or 0.0 for one in answered) / len(answered) if answered else None,
    }
