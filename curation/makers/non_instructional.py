"""Rows without an instruction: the first half of a text is the prompt, what comes next the response."""

import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import pyarrow as pa

from ..documents import Section, cut
from ..door import ChatAnswer
from ..folder import HouseError
from ..preferring import usable
from ..rows import Row, digest, made_row, message, table
from ..steps import Corpus
from ..synthesis import Ask, Session, asking, prompt, sampling_of
from ..text.sentences import sentences
from ..text_tasks import within


@dataclass(frozen=True)
class NonInstructional:
    """Rows whose user turn is the first half of a text and whose assistant turn goes on from there (Non-instructional
    Fine-tuning, arXiv 2409.00096).

    model: None: the assistant turn is the text's own second half, and the two turns together are the text, character by
    character; else a model of the recipe continues the text (prompts/continue_text.md; the paper's way), told to write
    as much again; where max_tokens cuts it, it ends with its last whole sentence. The halves meet at the border of two
    sentences nearest to the middle (of equally near ones the first); a text without a border between its characters
    `margin` and 1 - `margin` is refused (no_border).

    set_name: documents of an earlier set, its split train; None: of this set. window: characters of a text at most:
    longer documents are cut into sections of whole paragraphs; white space around a section is left out; sections of
    less than `least` characters are left out. limit: texts at most, the lowest by hash of (seed, document, place).
    A continuation that says the first half again, or is nothing but a piece of it, is refused (copied).

    Parent the document, which leaves the set with reason source_document; meta: section, border (where the second half
    begins, within the section's text), words_of (text or model).
    """

    model: str | None = None
    set_name: str | None = None
    limit: int | None = None
    window: int = 4000
    least: int = 400
    margin: float = 0.25
    temperature: float = 0.7
    top_p: float = 0.95
    max_tokens: int = 512
    seed: int = 0

    scope: ClassVar[Literal["maker"]] = "maker"
    consumes: ClassVar[str | None] = "source_document"

    def __post_init__(self) -> None:
        if min(self.window, self.least, self.max_tokens) < 1 or self.least > self.window:
            raise HouseError(f"{self}: window, least and max_tokens are at least 1, least at most window")
        if not 0 <= self.margin < 0.5:
            raise HouseError(f"{self}: margin is at least 0 and below 0.5")
        if self.limit is not None and self.limit < 0:
            raise HouseError(f"{self}: limit is at least 0, or null")

    def make(self, corpus: Corpus) -> Iterator[pa.Table]:
        """One table of new rows."""
        found = cut(corpus, self.set_name, self.window, self.least)
        if self.limit is not None:
            key = {one: digest("halves", str(self.seed), one.row_id, str(one.start)) for one in found}
            found = sorted(found, key=key.__getitem__)[: self.limit]
        halves = [(one, border(one.text, self.margin)) for one in found]
        made = list(self._own(corpus, halves) if self.model is None else self._asked(corpus, halves, self.model))
        if made:
            yield table(made)

    def _own(self, corpus: Corpus, halves: list[tuple[Section, int | None]]) -> Iterator[Row]:
        """Rows of both halves of a text."""
        lost = Counter(no_border=sum(place is None for _, place in halves))
        made = [(one, place) for one, place in halves if place is not None]
        for position, (one, place) in enumerate(made):
            about = _about(one, place, "text")
            turns = [message("user", one.text[:place]), message("assistant", one.text[place:])]
            yield made_row(
                repr(self), [one.row_id], position, "non_instructional", messages=turns, meta=json.dumps(about)
            )
        corpus.record(synthesis={"asked": len(halves), "made": len(made), "refused": dict(+lost)})

    def _asked(self, corpus: Corpus, halves: list[tuple[Section, int | None]], model: str) -> Iterator[Row]:
        """Rows whose second half a model wrote."""
        form = prompt("continue_text")
        with Session(self, corpus, model, "non_instructional") as session:
            asks = []
            for one, place in halves:
                if place is None:
                    session.refused("no_border")
                    continue
                key = ("halves", self.seed, one.row_id, one.start)
                turns = form.turns(text=one.text[:place].rstrip())
                asks.append(asking(form, turns, sampling_of(self), key, (one.row_id,), (one, place)))
            for ask, answer in session.ask(asks):
                if usable(session, answer, cut=True):
                    row = self._row(session, ask, answer)
                    if row is not None:
                        yield row

    def _row(self, session: Session, ask: Ask, answer: ChatAnswer) -> Row | None:
        one, place = ask.about
        first, said = one.text[:place], answer.text.strip()
        if not answer.finished:
            said = said[: sentences(said)[-1][0]].rstrip()
        if not said:
            session.refused("no_sentence")
            return None
        if within(first, said) or within(said, first):
            session.refused("copied")
            return None
        turns = [message("user", first), message("assistant", said)]
        return session.row(ask, answer, _about(one, place, "model"), messages=turns)


def _about(one: Section, place: int, whose: str) -> dict[str, Any]:
    return {"section": [one.start, one.end], "border": place, "words_of": whose}


def border(text: str, margin: float = 0.25) -> int | None:
    """Where the second half of a text begins: the start of a sentence, nearest to the middle."""
    starts = [start for start, _ in sentences(text) if margin * len(text) <= start <= (1 - margin) * len(text)]
    starts = [start for start in starts if start > 0]
    return min(starts, key=lambda start: abs(2 * start - len(text)), default=None)
