"""A maker of reasoning paths that begin with no example: from general guidelines to a path for one question."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

import pyarrow as pa

from ..asking import seed_of
from ..beside import verified
from ..folder import HouseError
from ..rows import Row, message, table
from ..steps import Corpus
from ..synthesis import Ask, Session, asking, prompt, sampling_of
from ..text.view import normal
from ..verifying import Verifier

if TYPE_CHECKING:
    from ..sampling import Question


@dataclass(frozen=True)
class ReGenesis:
    """SFT rows whose reasoning goes from abstract to concrete (ReGenesis, arXiv 2410.02108): a general guideline is
    adapted to the question, becomes a plan without the result, and the plan is followed to an answer; the answers that
    `verifier` finds right are kept, different ones once.

    paths: of each question, each from another guideline of curation/prompts/regenesis_guidelines.md (a line each),
    drawn by (seed, row_id). set_name, reference, limit: as in RejectionSampling. The row says the question and the
    path; meta has guideline, adapted, structure, verdict.
    """

    model: str
    verifier: Verifier
    set_name: str | None = None
    reference: str | None = None
    limit: int | None = None
    paths: int = 2
    temperature: float = 0.8
    top_p: float = 0.95
    max_tokens: int = 512
    seed: int = 0

    scope: ClassVar[Literal["maker"]] = "maker"
    consumes: ClassVar[str | None] = None

    def __post_init__(self) -> None:
        if not 1 <= self.paths <= len(guidelines()):
            raise HouseError(f"ReGenesis: paths is 1 to {len(guidelines())}, the number of guidelines")

    def make(self, corpus: Corpus) -> Iterator[pa.Table]:
        """One table of new rows."""
        from ..sampling import questions

        with Session(self, corpus, self.model, "re_genesis") as session:
            asked, lost = questions(corpus, self.set_name, prompt("ask"), self.reference, self.limit, self.seed)
            corpus.record(not_asked=dict(sorted(lost.items())))
            plans = [_Plan(one, guideline) for one in asked for guideline in self._drawn(one)]
            for name in ("adapted", "structure"):
                plans = self._step(session, plans, name)
            rows = list(self._paths(session, plans))
            if rows:
                yield table(rows)

    def _drawn(self, one: "Question") -> list[str]:
        lines = guidelines()
        return sorted(lines, key=lambda line: seed_of("guideline", self.seed, one.row_id, line))[: self.paths]

    def _step(self, session: Session, plans: "list[_Plan]", name: str) -> "list[_Plan]":
        """Plans with one more step; those whose step came back empty or not at all are gone."""
        asks = [self._ask(plan, name) for plan in plans]
        grown = []
        for ask, answer in session.ask(asks):
            if not answer.text.strip():
                session.unparsed(f"empty_{name}")
                continue
            session.tally.parsed += 1
            plan: _Plan = ask.about
            said = answer.text.strip()
            adapted, structure = (said, "") if name == "adapted" else (plan.adapted, said)
            grown.append(_Plan(plan.question, plan.guideline, adapted, structure))
        return grown

    def _ask(self, plan: "_Plan", name: str) -> Ask:
        question = plan.question.messages[-1]["content"]
        if name == "adapted":
            said = prompt("regenesis_adapt")
            turns = said.turns(guideline=plan.guideline, question=question)
        elif name == "structure":
            said = prompt("regenesis_structure")
            turns = said.turns(guideline=plan.adapted, question=question)
        else:
            said = prompt("regenesis_path")
            turns = said.turns(question=question, structure=plan.structure)
        key = (name, self.seed, plan.question.row_id, plan.guideline)
        return asking(said, turns, sampling_of(self), key, (plan.question.row_id,), plan)

    def _paths(self, session: Session, plans: "list[_Plan]") -> Iterator[Row]:
        seen = set()
        asks = [self._ask(plan, "path") for plan in plans]
        said = (((ask, answer), ask.about.question.case(answer.text)) for ask, answer in session.ask(asks))
        for (ask, answer), told in verified(said, self.verifier, session.tools):
            plan: _Plan = ask.about
            if not answer.text.strip() or told.right is None:
                session.unparsed("undecided" if answer.text.strip() else "empty")
                continue
            session.tally.parsed += 1
            session.tally.verified += told.right
            same = (plan.question.row_id, normal(answer.text))
            if not told.right or same in seen:
                session.refused("duplicate" if told.right else "wrong")
                continue
            seen.add(same)
            about = {"guideline": plan.guideline, "adapted": plan.adapted, "structure": plan.structure}
            turns = [*plan.question.messages, message("assistant", answer.text.strip())]
            yield session.row(ask, answer, about | {"verdict": told.detail}, messages=turns)


@dataclass(frozen=True)
class _Plan:
    question: "Question"
    guideline: str
    adapted: str = ""
    structure: str = ""


def guidelines() -> list[str]:
    """The general guidelines, one a line of their file."""
    return [line.strip() for line in prompt("regenesis_guidelines").text.splitlines() if line.strip()]
