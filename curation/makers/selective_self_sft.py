"""A maker of SFT rows in the words of the model that will be tuned, wherever those are right."""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import pyarrow as pa

from ..beside import verified
from ..door import ChatAnswer
from ..folder import HouseError
from ..rows import Row, message, table
from ..steps import Corpus
from ..synthesis import Ask, Session, asking, prompt, sampling_of
from ..verifying import Verifier

if TYPE_CHECKING:
    from ..sampling import Question


@dataclass(frozen=True)
class SelectiveSelfSft:
    """Each row's answer in the model's own words where they are right (S3FT, arXiv 2502.08130): what `model` answers
    to the row's question, where `verifier` finds it right; else the model's paraphrase of the reference, where the
    verifier finds that right (`paraphrase`); else the reference as it is. Such answers make a model forget less.

    model: the one that will be tuned. verifier: JudgedRight as in the paper, or one that needs no model. set_name,
    reference, limit, solve: as in RejectionSampling (`ask` is the bare question). tries: answers sampled until one is
    right. The row that a new one is made from leaves the set with reason `own_words`; a row whose reference stays
    stays itself, unless the rows come from another set (set_name), which gives all of them a new row.

    meta: words (own, paraphrase or reference), verdict.
    """

    model: str
    verifier: Verifier
    set_name: str | None = None
    reference: str | None = None
    limit: int | None = None
    tries: int = 1
    paraphrase: bool = True
    solve: str = "ask"
    temperature: float = 0.7
    top_p: float = 0.95
    max_tokens: int = 512
    seed: int = 0

    scope: ClassVar[Literal["maker"]] = "maker"
    consumes: ClassVar[str | None] = "own_words"
    say_again: ClassVar[str] = "paraphrase_answer"

    def __post_init__(self) -> None:
        if self.tries < 1:
            raise HouseError("SelectiveSelfSft: tries is at least 1")

    def make(self, corpus: Corpus) -> Iterator[pa.Table]:
        """One table of new rows; step.json says whose words they are, under `words`."""
        from ..sampling import questions

        with Session(self, corpus, self.model, "selective_self_sft") as session:
            asked, lost = questions(corpus, self.set_name, prompt(self.solve), self.reference, self.limit, self.seed)
            found = self._own(session, asked)
            words: Counter[str] = Counter(own=len(found))
            rest = [one for one in range(len(asked)) if one not in found]
            if self.paraphrase:
                again = self._paraphrased(session, asked, rest)
                words["paraphrase"] = len(again)
                found |= again
            words["reference"] = len(asked) - len(found)
            corpus.record(words=dict(words), not_asked=dict(sorted(lost.items())))
            rows = [row for place, one in enumerate(asked) if (row := self._row(session, one, found.get(place)))]
            if rows:
                yield table(rows)

    def _own(self, session: Session, asked: "list[Question]") -> "dict[int, _Said]":
        """The first right answer of each question in the model's own words, by its place; tries come in rounds."""
        from ..sampling import sample_ask

        found: dict[int, _Said] = {}
        said, sampling = prompt(self.solve), sampling_of(self)
        for attempt in range(self.tries):
            open_ones = [place for place in range(len(asked)) if place not in found]
            asks = [sample_ask(asked[place], place, attempt, said, sampling, self.seed) for place in open_ones]
            found |= self._right(session, asked, asks, "own")
        return found

    def _paraphrased(self, session: Session, asked: "list[Question]", places: list[int]) -> "dict[int, _Said]":
        again = prompt(self.say_again)
        asks = []
        for place in places:
            one = asked[place]
            turns = again.turns(question=one.messages[-1]["content"], reference=one.reference)
            key = ("paraphrase", self.seed, one.row_id)
            asks.append(asking(again, turns, sampling_of(self), key, (one.row_id,), (place, 0)))
        return self._right(session, asked, asks, "paraphrase")

    def _right(self, session: Session, asked: "list[Question]", asks: list[Ask], words: str) -> "dict[int, _Said]":
        said = (((ask, answer), asked[ask.about[0]].case(answer.text)) for ask, answer in session.ask(asks))
        found = {}
        for (ask, answer), told in verified(said, self.verifier, session.tools):
            if not answer.text.strip():
                session.unparsed("empty")
            elif told.right is None:
                session.unparsed("undecided")
            else:
                session.tally.parsed += 1
                if told.right:
                    session.tally.verified += 1
                    found[ask.about[0]] = _Said(words, ask, answer, told.detail)
                else:
                    session.refused("wrong")
        return found

    def _row(self, session: Session, one: "Question", said: "_Said | None") -> Row | None:
        if said is not None:
            turns = [*one.messages, message("assistant", said.answer.text.strip())]
            return session.row(said.ask, said.answer, {"words": said.words, "verdict": said.verdict}, messages=turns)
        if self.set_name is None:
            return None  # the row stays as it is
        from ..sampling import sample_ask

        ask = sample_ask(one, 0, 0, prompt(self.solve), sampling_of(self), self.seed)
        about: dict[str, Any] = {"words": "reference", "verdict": None}
        return session.row(ask, None, about, messages=[*one.messages, message("assistant", one.reference)])


@dataclass(frozen=True)
class _Said:
    words: str
    ask: Ask
    answer: ChatAnswer
    verdict: str
