"""A maker of harder and rarer instructions, generation by generation."""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

import pyarrow as pa

from ..asking import seed_of
from ..door import Sampling
from ..folder import HouseError
from ..instructing import Instruction, answers, instruction_row, seeds
from ..preferring import heard, usable
from ..rows import table
from ..steps import Corpus
from ..synthesis import Ask, Prompt, Session, asking, prompt, sampling_of
from ..text.view import normal, words

DEPTH = ("constrain", "deepen", "concretise", "reason", "complicate")
OPERATORS = (*DEPTH, "breadth")
_STOP = (
    "a about after again all also am an and any are as at be because been before but by can could did do does for from"
    " had has have he her here him his how i if in into is it its just me more most my no nor not of on only or"
    " other our out over she should so some such than that the their them then there these they this those to too under"
    " up very was we were what when where which while who why will with you your"
)
STOP_WORDS = frozenset(_STOP.split())
GREEDY = Sampling(temperature=0.0, top_p=1.0, max_tokens=16)  # of the judge


@dataclass(frozen=True)
class EvolInstruct:
    """Instructions that are evolved over `generations`, and their answers (Evol-Instruct of WizardLM, arXiv
    2304.12244).

    In each generation an operator, drawn by (seed, seed row, generation), rewrites every instruction of the pool: in
    depth by constrain, deepen, concretise, reason (more steps of thought) and complicate (an input to work on), in
    breadth by a new instruction on something rarer. What comes is eliminated if `judge` (None: `model` itself) says
    that nothing was gained (no_gain; a judge that says neither passes it), if it copies the words of the prompt
    (copied_prompt), repeats an instruction that is there (duplicate), or if the answer to it is "sorry" in less than
    80 words (sorry) or nothing but punctuation and stop words (stop_words). Then the instruction that it was made from
    stays in the pool and is evolved again, by another draw, in the next generation.

    Instructions of the first generation are made from the rows of one user turn of the earlier set `set_name` (its
    train split; None: the live rows of this set), at most `limit`. These stay. A row's parent is the row whose
    instruction it was made from: a seed, or a row of an earlier generation. meta: generation, operator, gain (the
    judge's word, or null), chain (generation, operator and instruction of each ancestor, the seed's first),
    instruction_made (the origin of the instruction).
    """

    model: str
    judge: str | None = None
    set_name: str | None = None
    limit: int | None = None
    generations: int = 4
    operators: tuple[str, ...] = OPERATORS
    temperature: float = 1.0
    top_p: float = 0.9
    max_tokens: int = 1024
    seed: int = 0

    scope: ClassVar[Literal["maker"]] = "maker"
    consumes: ClassVar[str | None] = None

    def __post_init__(self) -> None:
        unknown = sorted(set(self.operators) - set(OPERATORS))
        if unknown or not self.operators:
            raise HouseError(f"EvolInstruct: operators are of {', '.join(OPERATORS)}; given {list(self.operators)}")
        if self.generations < 1:
            raise HouseError("EvolInstruct: generations is at least 1")

    def make(self, corpus: Corpus) -> Iterator[pa.Table]:
        """A table of new rows for each generation that gave any; step.json says how many, under `generations`."""
        with Session(self, corpus, self.model, "evol_instruct") as session:
            given, lost = seeds(corpus, self.set_name, self.limit, self.seed)
            pool = [_Living(one.row_id, one.row_id, one.text.strip(), ()) for one in given]
            seen = {normal(one.text) for one in pool}
            report = []
            for generation in range(1, self.generations + 1):
                rows = []
                drafts = self._gained(session, self._evolved(session, pool, generation, seen), pool)
                for one, ask, answer in answers(session, drafts, sampling_of(self), "evol", self.seed, generation):
                    problem = answer_problem(answer.text)
                    if problem is not None:
                        session.refused(problem)
                        continue
                    rows.append(instruction_row(session, one, ask, answer))
                    pool[one.ask.about] = _grown(pool[one.ask.about], one, rows[-1]["row_id"])
                report.append({"generation": generation, "asked": len(pool), "made": len(rows)})
                if rows:
                    yield table(rows)
            corpus.record(not_asked=dict(sorted(lost.items())), generations=report)

    def _evolved(
        self, session: Session, pool: "Sequence[_Living]", generation: int, seen: set[str]
    ) -> Iterator[Instruction]:
        """The instructions of a generation that no rule eliminates; `seen` grows by them."""
        asks = [self._ask(one, place, generation) for place, one in enumerate(pool)]
        for ask, answer in session.ask(asks):
            if not usable(session, answer):
                continue
            parent, text = pool[ask.about], answer.text.strip()
            problem = draft_problem(text, parent.text)
            if problem is None and normal(text) in seen:
                problem = "duplicate"
            if problem is not None:
                session.refused(problem)
                continue
            seen.add(normal(text))
            operator = self._operator(parent, generation)
            about = {"generation": generation, "operator": operator, "chain": [*parent.chain, parent.link]}
            yield Instruction(text, ask, answer, ask.parents, about)

    def _operator(self, one: "_Living", generation: int) -> str:
        return self.operators[seed_of("operator", self.seed, one.seed_row, generation) % len(self.operators)]

    def _ask(self, one: "_Living", place: int, generation: int) -> Ask:
        said = operator_prompt(self._operator(one, generation))
        key = ("evolve", self.seed, one.seed_row, generation)
        return asking(said, said.turns(instruction=one.text), sampling_of(self), key, (one.row_id,), place)

    def _gained(self, session: Session, drafts: Iterator[Instruction], pool: "Sequence[_Living]") -> list[Instruction]:
        """Those that the judge does not call equal to what they were made from."""
        judging = session if self.judge is None else session.beside(self.judge)
        said, asks = prompt("evol_equal"), []
        for one in drafts:
            turns = said.turns(first=pool[one.ask.about].text, second=one.text)
            asks.append(asking(said, turns, GREEDY, ("equal", self.seed, one.text), one.parents, one))
        kept = []
        for ask, equal in zip(asks, heard(judging, asks, lambda answer: parse_equal(answer.text)), strict=True):
            if equal:
                session.refused("no_gain")
            else:
                one = ask.about
                kept.append(replace(one, meta={**one.meta, "gain": None if equal is None else True}))
        return kept


@dataclass(frozen=True)
class _Living:
    """An instruction of the pool. link: what later generations say of it in their chain."""

    seed_row: str
    row_id: str
    text: str
    chain: tuple[Mapping[str, Any], ...]
    generation: int = 0
    operator: str | None = None

    @property
    def link(self) -> dict[str, Any]:
        about = {"generation": self.generation, "operator": self.operator, "instruction": self.text}
        return about | {"row_id": self.row_id}


def _grown(parent: _Living, one: Instruction, row_id: str) -> _Living:
    chain = tuple(one.meta["chain"])
    return _Living(parent.seed_row, row_id, one.text, chain, one.meta["generation"], one.meta["operator"])


def operator_prompt(operator: str) -> Prompt:
    """The prompt of an operator: in depth all share one, with a sentence of curation/prompts/evol_operators.md."""
    if operator == "breadth":
        return prompt("evol_breadth")
    lines = (line.partition(": ") for line in prompt("evol_operators").text.splitlines())
    how = {name: sentence.strip() for name, _, sentence in lines}
    return Prompt(f"evol_depth:{operator}", prompt("evol_depth").text.replace("{how}", how[operator]))


_COPIED = re.compile(
    r"\b(?:given|original|rewritten|new|created|evolved)[ \t]+(?:prompt|instruction)\b|#\w*(?:prompt|instruction)\w*#",
    re.IGNORECASE,
)


def draft_problem(text: str, parent: str) -> str | None:
    """Why an evolved instruction is eliminated by its words, or None: it says what its prompt said (unless its parent
    does), or what its parent says."""
    known = {match.group().casefold() for match in _COPIED.finditer(parent)}
    if any(match.group().casefold() not in known for match in _COPIED.finditer(text)):
        return "copied_prompt"
    return "no_gain" if normal(text) == normal(parent) else None


def answer_problem(text: str) -> str | None:
    """Why an instruction is eliminated by the answer to it, or None."""
    said = words(text)
    if all(word in STOP_WORDS for word in said):
        return "stop_words"
    return "sorry" if len(said) < 80 and "sorry" in said else None


def parse_equal(text: str) -> bool | None:
    """Whether the judge calls two instructions equal: its last word on it."""
    found = re.findall(r"(\bnot[ \t]+|\bnon-?|\bun|\bin)?equal\b", text, re.IGNORECASE)
    return None if not found else not found[-1]
