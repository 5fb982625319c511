"""Targets replaced by the tuned model's own answers, where a judge is sure that they are better: CLEAR's correction."""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import pyarrow as pa

from ..asking import seed_of
from ..door import ChatRequest, Sampling
from ..folder import HouseError
from ..measures.confidence import certainty
from ..measures.judge_scores import COMPARE, better
from ..preferring import Question, heard, question_of, usable
from ..rows import Row, message, table
from ..steps import Corpus
from ..synthesis import Ask, Session, asking, prompt
from ..text.view import normal


@dataclass(frozen=True)
class ClearCorrection:
    """The correction of CLEAR (arXiv 2403.12776): a row's last answer is replaced by what the tuned model says, only
    where the judge prefers that with a confidence above `threshold`. No stronger model is needed.

    model: the tuned model (a training stage), which answers each prompt at temperature 0 with max_tokens new tokens.
    judge: the model that compares, in three rounds: both answers in both orders at temperature 0; where both verdicts
    are for the candidate, `samples` more verdicts in each order at temperature 1; and two reflections, one for each
    order, whether the verdict for the candidate is right. confidence = beta · consistency + (1 - beta) · reflection
    (BSDetector, arXiv 2308.16175): consistency is the mean of the sampled verdicts (candidate 1, tie 0.5, target 0),
    reflection the mean of (A) correct 1, (B) incorrect 0, (C) not sure 0.5. A verdict that cannot be read is asked for
    once more; where no sampled verdict or no reflection can be read, nothing is corrected. What is asked does not
    depend on the threshold: a higher one corrects a subset of what a lower one corrects, and 1 corrects nothing.

    threshold: lies in 0 to 1. judge_tokens: of a verdict. Rows: the conversations of this set, one new row for each
    that is corrected, parent the old one, which leaves with reason `corrected` and keeps its text; meta is the old
    one's with `corrected`: {old, confidence, consistency, reflection, reason, judge}. Spans of the replaced turn go.
    Held-out rows are never corrected: no model is measured on what it or its judge wrote.
    """

    model: str
    judge: str
    threshold: float = 0.8
    samples: int = 3
    beta: float = 0.7
    max_tokens: int = 512
    judge_tokens: int = 128
    seed: int = 0

    scope: ClassVar[Literal["maker"]] = "maker"
    consumes: ClassVar[str | None] = "corrected"

    def __post_init__(self) -> None:
        if not 0 <= self.threshold <= 1 or not 0 <= self.beta <= 1:
            raise HouseError(f"{self}: threshold and beta lie in 0..1")
        if min(self.samples, self.max_tokens, self.judge_tokens) < 1:
            raise HouseError(f"{self}: samples, max_tokens and judge_tokens are at least 1")

    @property
    def asked(self) -> tuple[str, ...]:
        """Models that it needs besides the one whose answers become rows."""
        return (self.judge,)

    def make(self, corpus: Corpus) -> Iterator[pa.Table]:
        """One table of new rows."""
        rows = {row["row_id"]: row for part in corpus.tables() for row in part.to_pylist() if _correctable(row)}
        found = {name: question_of(row) for name, row in rows.items()}
        asked = [one for one in found.values() if one is not None and one.reference is not None]
        made: list[Row] = []
        with Session(self, corpus, self.model, "clear_correction") as session:
            greedy = Sampling(temperature=0.0, max_tokens=self.max_tokens)
            asks = [asking(None, one.turns, greedy, (self.seed, one.row_id), (one.row_id,), one) for one in asked]
            came = [(ask, answer) for ask, answer in session.ask(asks) if usable(session, answer)]
            other = [one for one in came if normal(one[1].text) != normal(one[0].about.reference)]
            session.tally.refused.update({"equal": len(came) - len(other)} if len(came) > len(other) else {})
            judge = session.beside(self.judge)
            told = self._judged(judge, [(ask.about, answer.text.strip()) for ask, answer in other])
            for (ask, answer), verdict in zip(other, told, strict=True):
                if isinstance(verdict, str):
                    session.refused(verdict)
                    continue
                session.tally.verified += 1
                if verdict["confidence"] <= self.threshold:
                    session.refused("not_confident")
                    continue
                content, meta = corrected(rows[ask.about.row_id], answer.text.strip(), verdict)
                meta["corrected"]["judge"] = judge.chat.name
                made.append(session.row(ask, answer, meta, **content))
        if made:
            yield table(made)

    def _judged(self, judge: Session, pairs: Sequence[tuple[Question, str]]) -> list[dict[str, Any] | str]:
        """Of each (question, candidate) the confidence that the candidate is better than the target, or why it is not
        asked for."""
        told: list[dict[str, Any] | str] = ["judge_prefers_target"] * len(pairs)
        verdicts = heard(judge, [ask for pair in pairs for ask in self._compared(*pair, 0, 0.0)], _verdict)
        preferred = []
        for place, (first, second) in enumerate(zip(verdicts[::2], verdicts[1::2], strict=True)):
            if first is None or second is None:
                told[place] = "judge_abstains"
            elif first == 1 and second == 0:  # the candidate stands first, then second
                preferred.append(place)
        again = [
            ask
            for place in preferred
            for draw in range(1, self.samples + 1)
            for ask in self._compared(*pairs[place], draw, 1.0)
        ]
        sampled = heard(judge, again, _verdict)
        reflected = heard(judge, [ask for place in preferred for ask in self._reflections(*pairs[place])], _certainty)
        size = 2 * self.samples
        for at, place in enumerate(preferred):
            own = sampled[at * size : (at + 1) * size]
            votes = [v if n % 2 == 0 else 1 - v for n, v in enumerate(own) if v is not None]
            sure = [v for v in reflected[2 * at : 2 * at + 2] if v is not None]
            if not votes or not sure:
                told[place] = "judge_abstains"
                continue
            consistency, reflection = sum(votes) / len(votes), sum(sure) / len(sure)
            told[place] = {
                "confidence": self.beta * consistency + (1 - self.beta) * reflection,
                "consistency": consistency,
                "reflection": reflection,
            }
        return told

    def _compared(self, one: Question, candidate: str, draw: int, temperature: float) -> Iterator[Ask]:
        """The two orders of one comparison: the candidate first, then second."""
        for order, (first, second) in enumerate(((candidate, one.reference), (one.reference, candidate))):
            text = COMPARE.format(question=one.said, first=first, second=second)
            seed = seed_of("clear", self.seed, one.row_id, candidate, order, draw)
            sampling = Sampling(temperature=temperature, top_p=1.0, max_tokens=self.judge_tokens)
            yield Ask(ChatRequest((("user", text),), seed, sampling), None, (one.row_id,))

    def _reflections(self, one: Question, candidate: str) -> Iterator[Ask]:
        form = prompt("clear_reflect")
        for winner, (first, second) in (("A", (candidate, one.reference)), ("B", (one.reference, candidate))):
            turns = form.turns(question=one.said, first=first, second=second, winner=winner)
            sampling = Sampling(temperature=0.0, max_tokens=self.judge_tokens)
            yield asking(form, turns, sampling, ("reflect", self.seed, one.row_id, candidate, winner), (one.row_id,))


def _verdict(answer: Any) -> float | None:
    return better(answer.text)


def _certainty(answer: Any) -> float | None:
    return certainty(answer.text)


def _correctable(row: Mapping[str, Any]) -> bool:
    """Whether a row is a conversation that ends in an assistant's turn, without calls of tools in it."""
    turns = list(row["messages"] or ())
    plain = row["chosen"] is None and row["rejected"] is None and len(turns) > 1
    return plain and turns[-1]["role"] == "assistant" and not turns[-1]["tool_calls"]


def corrected(row: Mapping[str, Any], answer: str, verdict: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Content and meta of the row whose last turn says `answer`."""
    last = len(row["messages"]) - 1
    spans = [span for span in row["spans"] or () if span["turn"] != last] or None
    meta = json.loads(row["meta"] or "{}")
    told = dict(verdict) | {"old": row["messages"][last]["content"], "reason": "judge_prefers_candidate"}
    content = {"messages": [*row["messages"][:last], message("assistant", answer)], "tools": row["tools"]}
    about = meta if isinstance(meta, dict) else {"meta": meta}
    return content | {"spans": spans}, about | {"corrected": told}
