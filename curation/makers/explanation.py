"""Two of the three makers of OpenBezoar (arXiv 2404.12195): instructions from examples and topics, and answers that
explain. The third is EvolInstruct."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import pyarrow as pa

from ..beside import verified
from ..door import ChatAnswer
from ..folder import HouseError
from ..instructing import Instruction, Seed, answered, drawn, lists, seeds
from ..preferring import usable
from ..rows import Row, message, table
from ..steps import Corpus
from ..synthesis import Ask, Session, asking, prompt, sampling_of
from ..text.view import normal
from ..verifying import Case, Finding, Verifier


@dataclass(frozen=True)
class LaMini:
    """Instructions from examples and topics, and their answers (LaMini-LM, arXiv 2304.14402; the first scheme of
    OpenBezoar, arXiv 2404.12195).

    Each of `requests` prompts shows `examples` instructions and asks for `wanted` more; where `topics` are given, the
    prompts in turn are guided by examples alone and by examples with `topics_each` topics. The paper draws topics from
    Wikipedia's categories. Instructions that repeat one that is there, but for case and white space, are turned down
    (duplicate). Each is answered by the same model, with nothing before it.

    Examples are drawn by (seed, request) from the rows of one user turn of the earlier set `set_name` (its train
    split; None: the live rows of this set), at most `limit`. These stay, and those that a prompt showed are the parents
    of its rows. meta: topics, instruction_made (the origin of the instruction).
    """

    model: str
    set_name: str | None = None
    limit: int | None = None
    requests: int = 10
    examples: int = 3
    wanted: int = 20
    topics: tuple[str, ...] = ()
    topics_each: int = 3
    temperature: float = 0.8
    top_p: float = 0.95
    max_tokens: int = 1024
    seed: int = 0

    scope: ClassVar[Literal["maker"]] = "maker"
    consumes: ClassVar[str | None] = None

    def __post_init__(self) -> None:
        if min(self.requests, self.examples, self.wanted, self.topics_each) < 1:
            raise HouseError("LaMini: requests, examples, wanted and topics_each are at least 1")

    def make(self, corpus: Corpus) -> Iterator[pa.Table]:
        """One table of new rows."""
        with Session(self, corpus, self.model, "lamini") as session:
            given, lost = seeds(corpus, self.set_name, self.limit, self.seed)
            corpus.record(not_asked=dict(sorted(lost.items())))
            made = list(self._instructions(session, given)) if given else []
            rows = answered(session, made, sampling_of(self), "lamini", self.seed)
            if rows:
                yield table(rows)

    def _instructions(self, session: Session, given: Sequence[Seed]) -> Iterator[Instruction]:
        seen = {normal(one.text) for one in given}
        asks = [self._ask(given, request) for request in range(self.requests)]
        for ask, answer, items in lists(session, asks):
            for place, text in enumerate(items):
                if place >= self.wanted or normal(text) in seen:
                    session.refused("too_many" if place >= self.wanted else "duplicate")
                    continue
                seen.add(normal(text))
                yield Instruction(text, ask, answer, ask.parents, {"topics": list(ask.about)})

    def _ask(self, given: Sequence[Seed], request: int) -> Ask:
        key = ("lamini", self.seed, request)
        shown = [given[place] for place in drawn(len(given), self.examples, *key, "examples")]
        lines = "\n".join(f"- {' '.join(one.text.split())}" for one in shown)
        topics = [self.topics[place] for place in drawn(len(self.topics), self.topics_each, *key, "topics")]
        if request % 2 == 0 or not topics:
            topics, said = [], prompt("lamini_examples")
            turns = said.turns(examples=lines, wanted=self.wanted)
        else:
            said = prompt("lamini_topics")
            turns = said.turns(examples=lines, wanted=self.wanted, topics="; ".join(topics))
        parents = [one.row_id for one in shown]
        return asking(said, turns, sampling_of(self), (*key, *parents), parents, topics)


@dataclass(frozen=True)
class OrcaExplanation:
    """Rows whose answer is explained as a system turn asks for it (Orca, arXiv 2306.02707; the third scheme of
    OpenBezoar, arXiv 2404.12195): the question of a row, under one of the system turns of
    curation/prompts/orca_system.md (a line each), drawn by (seed, row_id), is answered by `model`.

    known: the row's own answer is told to the model, which explains how one comes to it; the new row does not say so
    (the paper tells nothing). verifier: keeps what it finds right, with the row's answer as the reference; None: all.
    each: explanations of a row, each under another system turn. Rows of one user turn are taken from the earlier set
    `set_name` (its train split; None: the live rows of this set), at most `limit`; they stay. meta: verdict.
    """

    model: str
    verifier: Verifier | None = None
    set_name: str | None = None
    limit: int | None = None
    each: int = 1
    known: bool = False
    temperature: float = 0.7
    top_p: float = 0.95
    max_tokens: int = 1024
    seed: int = 0

    scope: ClassVar[Literal["maker"]] = "maker"
    consumes: ClassVar[str | None] = None

    def __post_init__(self) -> None:
        if not 1 <= self.each <= len(system_turns()):
            raise HouseError(f"OrcaExplanation: each is 1 to {len(system_turns())}, the number of system turns")

    def make(self, corpus: Corpus) -> Iterator[pa.Table]:
        """One table of new rows."""
        with Session(self, corpus, self.model, "orca_explanation") as session:
            given, lost = seeds(corpus, self.set_name, self.limit, self.seed)
            if self.known or self.verifier is not None:
                lost["no_reference"] += sum(not (one.answer or "").strip() for one in given)
                given = [one for one in given if (one.answer or "").strip()]
            corpus.record(not_asked={reason: count for reason, count in sorted(lost.items()) if count})
            asks = [self._ask(one, system) for one in given for system in self._drawn(one)]
            rows = [self._row(session, ask, answer, told) for (ask, answer), told in self._explained(session, asks)]
            if rows:
                yield table(rows)

    def _drawn(self, one: Seed) -> list[str]:
        lines = system_turns()
        return [lines[place] for place in drawn(len(lines), self.each, "orca", self.seed, one.row_id)]

    def _ask(self, one: Seed, system: str) -> Ask:
        said = prompt("orca_known" if self.known else "ask")
        turns = said.turns(question=one.text, reference=one.answer) if self.known else said.turns(question=one.text)
        key = ("orca", self.seed, one.row_id, system)
        return asking(said, (("system", system), *turns), sampling_of(self), key, (one.row_id,), (one, system))

    def _explained(
        self, session: Session, asks: Sequence[Ask]
    ) -> Iterator[tuple[tuple[Ask, ChatAnswer], Finding | None]]:
        """The explanations that are kept, with what the verifier says of them."""
        came = ((ask, answer) for ask, answer in session.ask(asks) if usable(session, answer))
        if self.verifier is None:
            yield from ((pair, None) for pair in came)
            return
        cases = ((pair, _case(*pair)) for pair in came)
        for pair, told in verified(cases, self.verifier, session.tools):
            session.tally.verified += told.right is True
            if told.right:
                yield pair, told
            else:
                session.refused("undecided" if told.right is None else "wrong")

    def _row(self, session: Session, ask: Ask, answer: ChatAnswer, told: Finding | None) -> Row:
        one, system = ask.about
        turns = [message("system", system), message("user", one.text), message("assistant", answer.text.strip())]
        return session.row(ask, answer, {"verdict": None if told is None else told.detail}, messages=turns)


def _case(ask: Ask, answer: ChatAnswer) -> Case:
    one: Seed = ask.about[0]
    return Case(one.text, answer.text, one.answer, one.meta)


def system_turns() -> list[str]:
    """The system turns that ask for explanations, one a line of their file."""
    return [line.strip() for line in prompt("orca_system").text.splitlines() if line.strip()]
