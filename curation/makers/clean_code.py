"""Programs that a model cleans while their tests go on passing."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import ClassVar, Literal

import pyarrow as pa

from ..beside import verified
from ..door import ChatAnswer, Sampling
from ..folder import HouseError
from ..rows import Row, message, table
from ..steps import Corpus
from ..synthesis import Ask, Session, asking, prompt
from ..verifiers.unit_tests import UnitTests, code_of, meta_of, normal_code, tests_of
from ..verifying import Case, Verifier

STEPS = ("rename", "modularise", "plan")


@dataclass(frozen=True)
class CleanCode:
    """Rows whose answer is a program with tests are said again with the program cleaned (LLM-Assisted Code Cleaning,
    arXiv 2311.14904): names that speak, small functions, a plan in words, three steps by `model`, each accepted only
    where `verifier` still finds the program right; a step that is not accepted leaves the program as it was.

    Tests are read from the row's meta as UnitTests does. A program that fails its own tests is not asked about
    (refused: fails_its_tests). A row is made where a step was accepted: its meta has the steps accepted and the old
    program. max_tokens, temperature: of each request. seed: of the requests. replace: the old rows leave the set with
    reason rewritten (the default), and stay in its lineage as parents.
    """

    model: str
    steps: tuple[str, ...] = STEPS
    verifier: Verifier = field(default_factory=UnitTests)
    max_tokens: int = 1024
    temperature: float = 0.3
    seed: int = 0
    replace: bool = True

    scope: ClassVar[Literal["maker"]] = "maker"

    def __post_init__(self) -> None:
        if not self.steps or not set(self.steps) <= set(STEPS):
            raise HouseError(f"CleanCode: steps are some of {', '.join(STEPS)}, not {self.steps!r}")

    @property
    def consumes(self) -> str | None:
        """Reason with which the old rows leave the set."""
        return "rewritten" if self.replace else None

    def make(self, corpus: Corpus) -> Iterator[pa.Table]:
        """One table of new rows."""
        with Session(self, corpus, self.model, "clean_code") as session:
            work = self._right(corpus, session)
            accepted: dict[str, list[tuple[str, Ask, ChatAnswer]]] = {}
            for step in self.steps:
                self._round(step, work, session, accepted)
            made = [self._row(work[name], accepted[name], session) for name in work if name in accepted]
            if made:
                yield table(made)

    def _right(self, corpus: Corpus, session: Session) -> dict[str, "_Program"]:
        """The programs that pass their own tests, by row_id."""
        found: list[_Program] = []
        for part in corpus.tables(["row_id", "messages", "meta"]):
            for row in part.to_pylist():
                one = _read(row)
                if one is not None:
                    found.append(one)
        right: dict[str, _Program] = {}
        for one, finding in zip(found, self.verifier.verify([one.case() for one in found], session.tools), strict=True):
            if finding.right:
                right[one.row["row_id"]] = one
            else:
                session.refused("fails_its_tests" if finding.right is False else "no_tests")
        return right

    def _round(
        self,
        step: str,
        work: dict[str, "_Program"],
        session: Session,
        accepted: dict[str, list[tuple[str, Ask, ChatAnswer]]],
    ) -> None:
        """One step for every program: asked, parsed, tested while others are asked, accepted where still right."""
        told = prompt(f"clean_{step}")
        sampling = Sampling(temperature=self.temperature, max_tokens=self.max_tokens)
        asks = []
        for name, one in work.items():
            turns = told.turns(names=one.names, task=one.task, code=one.code)
            asks.append(asking(told, turns, sampling, ("clean_code", self.seed, step, name), (name,), name))
        for (ask, answer, code), finding in verified(
            self._tried(step, asks, work, session), self.verifier, session.tools
        ):
            if finding.right:
                session.tally.verified += 1
                work[ask.about].code = code
                accepted.setdefault(ask.about, []).append((step, ask, answer))
            else:
                session.refused(f"{step}_fails_tests")

    def _tried(
        self, step: str, asks: list[Ask], work: dict[str, "_Program"], session: Session
    ) -> Iterator[tuple[tuple[Ask, ChatAnswer, str], Case]]:
        """The programs that one step has to verify, as they come."""
        for ask, answer in session.ask(asks):
            one, code = work[ask.about], parse_program(answer.text)
            if code is None:
                session.unparsed(f"{step}_no_program")
                continue
            session.tally.parsed += 1
            if code.strip() == one.code.strip():
                session.refused(f"{step}_unchanged")
            elif step == "plan" and normal_code(_bare(code)) != normal_code(_bare(one.code)):
                session.refused("plan_changed_code")
            else:
                yield (ask, answer, code), one.case(code)

    def _row(self, one: "_Program", steps: list[tuple[str, Ask, ChatAnswer]], session: Session) -> Row:
        _, ask, answer = steps[-1]
        about = meta_of(one.row) | {"cleaned": [step for step, _, _ in steps], "before": one.before}
        turns = [*one.row["messages"][:-1], message("assistant", f"```python\n{one.code.strip()}\n```")]
        return session.row(ask, answer, about, messages=turns)


@dataclass
class _Program:
    """A row's program as it now is."""

    row: Row
    task: str
    before: str
    code: str
    names: str

    def case(self, code: str | None = None) -> Case:
        """To verify: fenced, so that it is read as it is."""
        return Case(self.task, f"```python\n{code or self.code}\n```", None, meta_of(self.row))


def _read(row: Row) -> _Program | None:
    """A row as a program with tests, or None."""
    turns = row["messages"] or []
    if len(turns) < 2 or turns[-1]["role"] != "assistant":
        return None
    task = next((turn["content"] or "" for turn in reversed(turns) if turn["role"] == "user"), "")
    tests = tests_of(Case(task, "", None, meta_of(row)))
    code = code_of(turns[-1]["content"] or "", tests) if tests is not None else None
    if tests is None or code is None:
        return None
    return _Program(row, task, code, code, tests.entry or "all that the task names")


def parse_program(text: str) -> str | None:
    """The program in an answer, or None."""
    return code_of(text)


def _bare(code: str) -> str:
    """The code without docstrings: what a plan may not change."""
    import ast

    try:
        tree = ast.parse(code)
    except (SyntaxError, ValueError):
        return code
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef | ast.Module) and ast.get_docstring(
            node
        ):
            node.body = node.body[1:] or [ast.Pass()]
    return ast.unparse(tree)
