"""Preference pairs by tests that a model wrote: PLUM."""

import ast
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import pyarrow as pa

from ..beside import verified
from ..door import ChatAnswer, Sampling
from ..folder import HouseError
from ..preferring import grouped
from ..rows import Row, digest, message, table
from ..steps import Corpus
from ..synthesis import Ask, Session, asking, prompt
from ..verifiers.unit_tests import UnitTests, code_of, meta_of, tests_of
from ..verifying import Case, Finding


@dataclass(frozen=True)
class TestedPreference:
    """Preference rows for programming tasks by PLUM (arXiv 2406.06887): `model` writes tests for a row's instruction,
    then `solutions` solutions are sampled from it and run; one that passes every test is chosen, one that fails is
    rejected. A suite that every solution passes, or none, tells nothing and is discarded (refused: all_pass,
    none_passes).

    tests: assert statements asked for; fewer than `min_tests` that parse are no suite. A row that carries tests
    (UnitTests says where) is tested by those, and none are asked for, unless own_tests is False. pairs: at most, of one
    instruction; solutions equal but for layout and comments count once. limits: of the sandbox. temperature,
    max_tokens: of the solutions. seed: of the requests.
    """

    __test__: ClassVar[bool] = False  # no test class of pytest

    model: str
    solutions: int = 8
    tests: int = 5
    min_tests: int = 2
    own_tests: bool = True
    pairs: int = 1
    temperature: float = 0.8
    max_tokens: int = 512
    seed: int = 0
    limits: UnitTests = field(default_factory=UnitTests)

    scope: ClassVar[Literal["maker"]] = "maker"
    consumes: ClassVar[str | None] = None

    def __post_init__(self) -> None:
        if self.solutions < 2 or min(self.tests, self.min_tests, self.pairs) < 1:
            raise HouseError(f"{self}: at least 2 solutions, 1 test and 1 pair")

    def make(self, corpus: Corpus) -> Iterator[pa.Table]:
        """One table of new rows."""
        with Session(self, corpus, self.model, "tested_preference") as session:
            rows = {row["row_id"]: row for part in corpus.tables() for row in part.to_pylist() if _task(row)}
            suites = self._suites(rows, session)
            tested = grouped(self._tested(rows, suites, session), lambda one: str(one[0].about))
            made: list[Row] = []
            for name, tried in tested.items():
                made += self._pairs(rows[name], suites[name], tried, session)
            if made:
                yield table(made)

    def _suites(self, rows: dict[str, Row], session: Session) -> dict[str, dict[str, Any]]:
        """Tests by row_id, as meta that UnitTests reads: the row's own, or what the model wrote."""
        suites: dict[str, dict[str, Any]] = {}
        told, asks = prompt("plum_tests"), []
        for name, row in rows.items():
            if self.own_tests and tests_of(Case(_task(row), "", None, meta_of(row))) is not None:
                suites[name] = meta_of(row)
                continue
            turns = told.turns(count=self.tests, named="", task=_task(row))
            sampling = Sampling(temperature=0.3, max_tokens=self.max_tokens)
            asks.append(asking(told, turns, sampling, ("plum_tests", self.seed, name), (name,), name))
        for ask, answer in session.ask(asks):
            suite = parse_asserts(answer.text)
            if isinstance(suite, str) or len(suite) < self.min_tests:
                session.unparsed(suite if isinstance(suite, str) else "too_few_tests")
                continue
            session.tally.parsed += 1
            suites[ask.about] = {"test_list": suite}
        return {name: suites[name] for name in rows if name in suites}

    def _tested(
        self, rows: dict[str, Row], suites: dict[str, dict[str, Any]], session: Session
    ) -> Iterator[tuple[Ask, ChatAnswer, Finding]]:
        """Solutions with what their tests say, which run while other solutions are still asked for."""
        sampling = Sampling(temperature=self.temperature, max_tokens=self.max_tokens)
        asks = []
        for name in suites:
            turns = tuple((turn["role"], turn["content"] or "") for turn in _before(rows[name]))
            for number in range(self.solutions):
                seed = ("plum", self.seed, name, number)
                asks.append(asking(None, turns, sampling, seed, (name,), name))
        cases = (
            ((ask, answer), Case(_task(rows[ask.about]), answer.text, None, suites[ask.about]))
            for ask, answer in session.ask(asks)
            if self._is_program(answer, session)
        )
        for (ask, answer), finding in verified(cases, self.limits, session.tools):
            yield ask, answer, finding

    def _is_program(self, answer: ChatAnswer, session: Session) -> bool:
        """Whether a solution has code; counted either way."""
        if code_of(answer.text) is None:
            session.unparsed("no_program")
            return False
        session.tally.parsed += 1
        return True

    def _pairs(
        self,
        row: Row,
        suite: dict[str, Any],
        tried: Sequence[tuple[Ask, ChatAnswer, Finding]],
        session: Session,
    ) -> list[Row]:
        """Rows out of the solutions of one instruction."""
        sides: dict[bool, list[tuple[Ask, ChatAnswer, str]]] = {True: [], False: []}
        seen = set()
        for ask, answer, finding in tried:
            same = finding.value or answer.text
            if finding.right is not None and same not in seen:
                seen.add(same)
                sides[finding.right].append((ask, answer, finding.detail))
                session.tally.verified += finding.right
        if not (sides[True] and sides[False]):
            session.refused("none_passes" if not sides[True] else "all_pass")
            return []
        for side in sides.values():
            side.sort(key=lambda one: digest("plum", str(one[0].request.seed)))
        made = []
        for (ask, good, _), (other, bad, why) in list(zip(sides[True], sides[False], strict=False))[: self.pairs]:
            about = {"tests": suite.get("test_list"), "failed": why, "rejected_seed": other.request.seed}
            sampled = {"chosen": [message("assistant", good.text)], "rejected": [message("assistant", bad.text)]}
            made.append(session.row(ask, good, about, messages=_before(row), **sampled))
        return made


def _before(row: Row) -> list[dict[str, Any]]:
    """The turns up to the last user turn."""
    turns = row["messages"] or []
    last = max((at for at, turn in enumerate(turns) if turn["role"] == "user"), default=-1)
    return list(turns[: last + 1])


def _task(row: Row) -> str:
    """The instruction: the last user turn, or nothing."""
    before = _before(row)
    return (before[-1]["content"] or "").strip() if before else ""


def parse_asserts(text: str) -> list[str] | str:
    """The assert statements of an answer, each once, or why there are none. One that calls nothing tests nothing."""
    code = code_of(text)
    if code is None:
        lines = [line.strip().lstrip("-*0123456789. ").strip("`") for line in text.split("\n")]
        code = "\n".join(line for line in lines if line.startswith("assert ") and _calls(line))
    try:
        found = [ast.unparse(one) for one in ast.walk(ast.parse(code)) if isinstance(one, ast.Assert)]
    except (SyntaxError, ValueError):
        return "no_tests"
    return list(dict.fromkeys(one for one in found if _calls(one))) or "no_tests"


def _calls(statement: str) -> bool:
    try:
        return any(isinstance(node, ast.Call) for node in ast.walk(ast.parse(statement)))
    except (SyntaxError, ValueError):
        return False
