"""Preference pairs of the reference against a model's own answers: the reference is chosen, what the model says instead
is rejected."""

import heapq
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import pyarrow as pa

from ..door import ChatAnswer, Sampling
from ..folder import HouseError
from ..preferring import distinct, grouped, matched
from ..rows import Row, digest, message, table
from ..steps import Corpus
from ..synthesis import Ask, Session, asking
from ..text.view import normal


@dataclass(frozen=True)
class PreferenceFromModel:
    """The tuned model against the reference: preference rows from the curated set `set_name` of this run, prompt = all
    turns before the last assistant turn, chosen = that turn, rejected = an answer sampled from `model` (as in SPIN,
    arXiv 2401.01335).

    model: a training stage (its final model answers) or a model of the recipe. prompts, test_prompts: rows taken of
    the split `train` and of the held-out split `test`, the lowest by hash of (seed, row_id). answers: sampled of each
    prompt; pairs: made of them at most, drawn by a hash among those that say different things. length_ratio: the
    longer of chosen and rejected has at most so many times the characters of the shorter one (None: any). max_tokens,
    temperature: of the sampling; each request's seed is a hash of (seed, row_id, which answer), so an answer depends on
    no other. A row without an assistant turn, and an answer that failed, is empty or equals the reference, gives no
    pair; their numbers are in the step's record. meta: {sampled_tokens, finished, model, made}; finished is false where
    max_tokens cut the answer.
    """

    model: str
    set_name: str = "sft"
    prompts: int = 400
    test_prompts: int = 100
    max_tokens: int = 64
    temperature: float = 1.0
    seed: int = 0
    answers: int = 1
    pairs: int = 1
    length_ratio: float | None = None

    scope: ClassVar[Literal["maker"]] = "maker"
    consumes: ClassVar[str | None] = None

    def __post_init__(self) -> None:
        if min(self.prompts, self.test_prompts) < 0 or self.max_tokens < 1 or self.temperature < 0:
            raise HouseError(f"{self}: prompts and temperature are at least 0, max_tokens at least 1")
        if min(self.answers, self.pairs) < 1 or (self.length_ratio is not None and self.length_ratio < 1):
            raise HouseError(f"{self}: answers, pairs and length_ratio are at least 1")

    def make(self, corpus: Corpus) -> Iterator[pa.Table]:
        """One table of new rows."""
        rows = [*self._drawn(corpus, "train", self.prompts), *self._drawn(corpus, "test", self.test_prompts)]
        made: list[Row] = []
        with Session(self, corpus, self.model, "preference_from_model") as session:
            asks = []
            for row in rows:
                parts = prompt_and_reference(row["messages"])
                if parts is None:
                    session.refused("no_reference")
                else:
                    asks += [self._ask(row["row_id"], draw, *parts) for draw in range(self.answers)]
            found: list[tuple[Ask, ChatAnswer]] = []
            for ask, answer in session.ask(asks):
                problem = unusable(answer, ask.about[1]["content"])
                if problem is None:
                    session.tally.parsed += 1
                    found.append((ask, answer))
                else:
                    session.unparsed(problem)
            for own in grouped(found, lambda one: one[0].parents[0]).values():
                made += self._rows(session, distinct(own, lambda one: one[1].text))
        if made:
            yield table(made)

    def _rows(self, session: Session, own: list[tuple[Ask, ChatAnswer]]) -> list[Row]:
        """The pairs of one prompt."""
        prompt, reference = own[0][0].about
        said = [answer.text for _, answer in own]
        seed = ("against_reference", self.seed, own[0][0].parents[0])
        drawn = matched([reference["content"]], said, self.pairs, seed, self.length_ratio)
        if not drawn:
            session.refused("length")
        rows = []
        for ask, answer in (own[place] for _, place in drawn):
            about = {"sampled_tokens": answer.tokens, "finished": answer.finished, "model": session.chat.name}
            rejected = [message("assistant", answer.text)]
            rows.append(session.row(ask, answer, about, messages=prompt, chosen=[reference], rejected=rejected))
        return rows

    def _drawn(self, corpus: Corpus, split: str, count: int) -> list[Row]:
        """`count` rows of a split, the lowest by hash, in the order of the hash."""
        if count == 0:
            return []
        parts = corpus.tools.curated(self.set_name, split)
        rows = (row for part in parts for row in part.select(["row_id", "messages"]).to_pylist())
        return heapq.nsmallest(count, rows, key=lambda row: digest(str(self.seed), row["row_id"]))

    def _ask(self, name: str, draw: int, prompt: list[dict[str, Any]], reference: dict[str, Any]) -> Ask:
        turns = tuple((turn["role"], turn["content"] or "") for turn in prompt)
        sampling = Sampling(temperature=self.temperature, max_tokens=self.max_tokens)
        return asking(None, turns, sampling, ("sample", self.seed, name, draw), (name,), (prompt, reference))


def prompt_and_reference(messages: list[dict[str, Any]] | None) -> tuple[list[dict[str, Any]], dict[str, Any]] | None:
    """The turns before the last assistant turn, and that turn; None where one of them is missing or empty."""
    messages = messages or []
    last = max((i for i, turn in enumerate(messages) if turn["role"] == "assistant"), default=0)
    if last == 0 or not (messages[last]["content"] or "").strip():
        return None
    return messages[:last], messages[last]


def unusable(answer: ChatAnswer, reference: str) -> str | None:
    """Why an answer cannot be the rejected side of a pair, or None."""
    if not answer.text.strip():
        return "empty"
    return "equal" if normal(answer.text) == normal(reference) else None
