"""Documents said again in set styles, to be trained on beside the documents themselves: WRAP."""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, ClassVar, Literal

import pyarrow as pa

from ..documents import Section, cut
from ..door import ChatAnswer
from ..folder import HouseError
from ..preferring import usable
from ..rows import Row, digest, message, table
from ..steps import Corpus
from ..synthesis import Ask, Session, asking, prompt, sampling_of
from ..text.view import words

STYLES = ("easy", "medium", "hard", "qa")
GRAM = 5  # words
_OPENING = re.compile(
    r"\A[^\n]{0,120}\b(?:paraphras|rephras|rewrit|rewor|simpl|version|conversation|text)\w*\b[^\n]{0,80}:[ \t]*\n+",
    re.IGNORECASE,
)
_PAIR = re.compile(
    r"^[ \t>*#\-]*(?:\d+[.)][ \t]*)?\**(question|q|answer|a)[ \t]*\d{0,3}\**[ \t]*[:：]\**[ \t]*", re.I | re.M
)


@dataclass(frozen=True)
class Rephrase:
    """Sections of documents rewritten in one or several styles, as WRAP does (arXiv 2401.16380), which trains on the
    documents and on what was made of them.

    styles: easy (for a small child), medium (as an encyclopedia), hard (terse and learned), qa (questions and answers).
    Each section is asked for in each style; limit: at most so many sections of a style, the lowest by hash of (seed,
    style, document, place); None: all. set_name: documents of an earlier set, its split train; None: of this set.
    window: characters of a section at most (1,200 are some 300 tokens of English, beyond which the paper saw facts
    lost); sections of less than `least` are not asked about.

    Refused: `copied`, where more than `most_copied` of the answer's word 5-grams stand in the section; `too_short` and
    `too_long`, where its words are fewer than `shortest` or more than `longest` times the section's. A line that only
    announces the text is taken off. Answers cut by max_tokens count as unparsed, and so do q/a answers without a
    question and its answer (no_pairs).

    Rows: easy, medium and hard give documents (`text`), for sets of kind text; qa gives one conversation of a section,
    question by question, for sets of kind sft, or with qa_text a document with lines Question: and Answer:, as the
    paper has it. Parent the document; meta: style, section, copied (the share). Parents stay. The prompts are in our
    own words.
    """

    model: str
    styles: tuple[Literal["easy", "medium", "hard", "qa"], ...] = ("medium",)
    set_name: str | None = None
    limit: int | None = None
    qa_text: bool = False
    window: int = 1200
    least: int = 200
    most_copied: float = 0.6
    shortest: float = 0.3
    longest: float = 2.5
    temperature: float = 0.7
    top_p: float = 0.95
    max_tokens: int = 768
    seed: int = 0

    scope: ClassVar[Literal["maker"]] = "maker"
    consumes: ClassVar[str | None] = None

    def __post_init__(self) -> None:
        if not self.styles or set(self.styles) - set(STYLES) or len(set(self.styles)) < len(self.styles):
            raise HouseError(f"{self}: styles are one or several of {', '.join(STYLES)}, each once")
        if min(self.window, self.least, self.max_tokens) < 1 or self.least > self.window:
            raise HouseError(f"{self}: window, least and max_tokens are at least 1, least at most window")
        if not 0 <= self.most_copied <= 1 or not 0 <= self.shortest < self.longest:
            raise HouseError(f"{self}: most_copied lies in 0..1, shortest is at least 0 and below longest")
        if self.limit is not None and self.limit < 0:
            raise HouseError(f"{self}: limit is at least 0, or null")

    def make(self, corpus: Corpus) -> Iterator[pa.Table]:
        """One table of new rows."""
        found = cut(corpus, self.set_name, self.window, self.least)
        made: list[Row] = []
        with Session(self, corpus, self.model, "rephrase") as session:
            asks = []
            for style in self.styles:
                form = prompt(f"rephrase_{style}")
                for one in self._drawn(found, style):
                    key = ("rephrase", self.seed, style, one.row_id, one.start)
                    turns = form.turns(text=one.text)
                    asks.append(asking(form, turns, sampling_of(self), key, (one.row_id,), (style, one)))
            for ask, answer in session.ask(asks):
                row = self._row(session, ask, answer)
                made += [row] if row is not None else []
        if made:
            yield table(made)

    def _drawn(self, found: Sequence[Section], style: str) -> Sequence[Section]:
        if self.limit is None:
            return found

        def rank(one: Section) -> str:
            return digest("rephrase", str(self.seed), style, one.row_id, str(one.start))

        return sorted(found, key=rank)[: self.limit]

    def _row(self, session: Session, ask: Ask, answer: ChatAnswer) -> Row | None:
        """The row of an answer, or None, counted."""
        style, section = ask.about
        said = _OPENING.sub("", answer.text.strip(), count=1).strip()
        pairs = parse_pairs(said) if style == "qa" else []
        if style == "qa" and said and answer.finished and not pairs:
            session.unparsed("no_pairs")
            return None
        if not usable(session, answer):
            return None
        if pairs:
            said = "\n".join(f"Question: {question}\nAnswer: {reply}" for question, reply in pairs)
        share = copied_share(said, section.text)
        ratio = len(words(said)) / max(1, len(words(section.text)))
        if share > self.most_copied or not self.shortest <= ratio <= self.longest:
            problem = "too_short" if ratio < self.shortest else "too_long"
            session.refused("copied" if share > self.most_copied else problem)
            return None
        about = {"style": style, "section": [section.start, section.end], "copied": round(share, 4)}
        content: dict[str, Any] = {"text": said}
        if pairs and not self.qa_text:
            turns = [(message("user", question), message("assistant", reply)) for question, reply in pairs]
            content = {"messages": [turn for pair in turns for turn in pair]}
        return session.row(ask, answer, about, **content)


def copied_share(said: str, source: str) -> float:
    """Which share of the word 5-grams of a text stands in its source; of a shorter text, all or nothing."""
    own, given = words(said), words(source)
    size = max(1, min(GRAM, len(own)))
    known = {tuple(given[at : at + size]) for at in range(len(given) - size + 1)}
    grams = [tuple(own[at : at + size]) for at in range(len(own) - size + 1)]
    return sum(gram in known for gram in grams) / len(grams) if grams else 0.0


def parse_pairs(said: str) -> list[tuple[str, str]]:
    """(question, answer) of each `Question:` that an `Answer:` follows; others are left out."""
    marks = list(_PAIR.finditer(said))
    ends = [*(mark.start() for mark in marks[1:]), len(said)]
    told = [(mark[1][0].lower(), said[mark.end() : end].strip()) for mark, end in zip(marks, ends, strict=False)]
    return [(first, second) for (q, first), (a, second) in pairwise(told) if (q, a) == ("q", "a") and first and second]
