"""Tasks that documents hold already, found by patterns: no model is asked."""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import pyarrow as pa

from ..documents import Section, cut
from ..folder import HouseError
from ..instructing import drawn
from ..rows import Row, digest, made_row, message, table
from ..steps import Corpus
from ..text.sentences import sentences
from ..text_tasks import TASKS, exercise, read
from .document_tasks import task_prompt

MINED = ("exqa", "qa", "ynqa", "qg", "sent_comp", "topic_class", "text_gen")
_TITLE = re.compile(r"\A(?:---\n)?(?:.*\n){0,3}?(?:#[ ]+|[Tt]itle:[ ]*[\"']?)(?P<title>\S.{3,70}?)[\"']?[ ]*\n")
_NO_NAME = "It|This|That|These|Those|There|Here|He|She|They|We|You|My|Your|Our|What|Which|While|If|One|Each|All|Note"
_DEFINED = re.compile(
    rf"(?P<what>(?:The |An? )?(?!(?:{_NO_NAME})\b)[A-Z`][\w`.-]*(?: [\w`-]+){{0,2}}) (?P<verb>is|are) "
    r"(?P<said>(?:an?|the) (?!same\b)[^.,;:()|]{12,110})(?:, [^|]*)?\."
)


@dataclass(frozen=True)
class MinedTasks:
    """Tasks that documents hold already, as in "Adapting Large Language Models via Reading Comprehension" (AdaptLLM,
    arXiv 2309.09530), found by patterns in their sections: a definition (`X is a …`) is a question of the types exqa,
    qa, qg and ynqa (with no for an answer where it is another document's definition), a sentence of at least ten words
    is one to complete (sent_comp), a document's title is its topic among those of three others (topic_class), or asks
    for its longest paragraph (text_gen). Types and their names are those of DocumentTasks, and so are the checks; the
    patterns are ours, fewer than the paper's.

    asks: each row is, instead of the task itself, DocumentTasks' request for a task of that type (form `lines`) and the
    lines that answer it: what a small model is tuned on before it writes tasks itself, as Bonito was
    (arXiv 2402.18334). rows: at most of every type, or a mapping of types to rows; the sections lowest by hash of
    (seed, type, document, place), one task of each. set_name, window, least: as in DocumentTasks.

    Rows: one exchange (asks: after a system turn), parent the document; meta: task, section. Documents that something
    was made from leave the set with reason source_document.
    """

    rows: int | Mapping[str, int] = 500
    asks: bool = False
    set_name: str | None = None
    window: int = 2000
    least: int = 200
    seed: int = 0

    scope: ClassVar[Literal["maker"]] = "maker"
    consumes: ClassVar[str | None] = "source_document"
    model: ClassVar[None] = None

    def __post_init__(self) -> None:
        unknown = sorted(self.quotas.keys() - set(MINED))
        if unknown:
            raise HouseError(f"MinedTasks: {', '.join(unknown)} cannot be mined; there are {', '.join(MINED)}")
        if min(self.quotas.values(), default=0) < 0 or not 1 <= self.least <= self.window:
            raise HouseError(f"{self}: rows is at least 0, least at least 1 and at most window")

    @property
    def quotas(self) -> Mapping[str, int]:
        """Rows of each type at most."""
        return self.rows if isinstance(self.rows, Mapping) else dict.fromkeys(MINED, self.rows)

    def make(self, corpus: Corpus) -> Iterator[pa.Table]:
        """One table of new rows."""
        found = _Mined(cut(corpus, self.set_name, self.window, self.least), self.seed)
        made: list[Row] = []
        for short, count in self.quotas.items():
            rows = self._rows(found, short)
            for _, one in zip(range(count), rows, strict=False):
                section, turns = one
                about = json.dumps({"task": short, "section": [section.start, section.end]})
                made.append(
                    made_row(repr(self), [section.row_id], len(made), "mined_tasks", messages=turns, meta=about)
                )
        corpus.record(mined=dict(found.counts))
        if made:
            yield table(made)

    def _rows(self, found: "_Mined", short: str) -> Iterator[tuple[Section, list[dict[str, Any]]]]:
        """Sections that hold a task of that type, in the order of their hash, with the turns of its row."""
        task = TASKS[short]
        for section in sorted(found.sections, key=lambda one: found.key(short, one)):
            values = found.task(short, section)
            if values is None or task.check(values, section.text) is not None:
                continue
            lines = "\n".join(f"{label}: {values[label]}" for label in task.labels)
            if read(task, lines, finished=True) != values:  # a value that would be read otherwise
                continue
            if self.asks:
                asked = [message(role, said) for role, said in task_prompt(short).turns(context=section.text)]
                yield section, [*asked, message("assistant", lines)]
            else:
                told = exercise(task, values, section.text, (self.seed, section.row_id, section.start))
                yield section, [message("user", told.instruction), message("assistant", told.response)]


class _Mined:
    """What patterns find in sections."""

    def __init__(self, found: Sequence[Section], seed: int) -> None:
        self.sections, self.seed = found, seed
        self.titles = {one.row_id: title for one in found if one.start == 0 and (title := _title(one.text))}
        self.defined = {place: said for place, one in enumerate(found) if (said := _definition(one.text))}
        self.places = {(one.row_id, one.start): place for place, one in enumerate(found)}
        self.counts = {"titles": len(self.titles), "definitions": len(self.defined)}

    def key(self, short: str, one: Section) -> str:
        return digest("mined", str(self.seed), short, one.row_id, str(one.start))

    def task(self, short: str, one: Section) -> dict[str, str] | None:
        """The fields of a task of that type (text_tasks.TASKS), or None where the section holds none."""
        if short == "sent_comp":
            return _halves(one.text, self.key(short, one))
        if short in ("topic_class", "text_gen"):
            title = self.titles.get(one.row_id)
            if title is None:
                return None
            return self._topics(title, one) if short == "topic_class" else _writing(title, one.text)
        found = self.defined.get(self.places[one.row_id, one.start])
        return None if found is None else self._question(short, found, one)

    def _question(self, short: str, found: re.Match[str], one: Section) -> dict[str, str]:
        what, verb, said = found["what"], found["verb"], found["said"]
        what = what[0].lower() + what[1:] if what.split()[0] in ("The", "A", "An") else what
        question = f"What {verb} {what}?"
        if short == "ynqa":
            return self._yes_or_no(what, verb, said, one)
        if short == "qg":
            return {"Question": question}
        return {"Question": question, "Answer": said if short == "exqa" else found[0]}

    def _yes_or_no(self, what: str, verb: str, said: str, one: Section) -> dict[str, str]:
        """A question whose answer is yes, or no where what it asks is said of another thing in another document."""
        key = self.key("ynqa", one)
        others = [place for place in self.defined if self.sections[place].row_id != one.row_id]
        wrong = others and int(key[:2], 16) % 2
        if wrong:
            said = self.defined[others[drawn(len(others), 1, key)[0]]]["said"]
        return {"Question": f"{verb.capitalize()} {what} {said}?", "Answer": "No" if wrong else "Yes"}

    def _topics(self, title: str, one: Section) -> dict[str, str] | None:
        others = sorted({said for said in self.titles.values() if said != title})
        if len(others) < 3 or "," in title:
            return None
        key = self.key("topic_class", one)
        offered = [title, *(others[place].replace(",", "") for place in drawn(len(others), 3, key))]
        return {"Topics": ", ".join(offered[place] for place in drawn(4, 4, key, "order")), "Answer": title}


def _title(text: str) -> str | None:
    found = _TITLE.match(text)
    return None if found is None else " ".join(found["title"].split())


def _definition(text: str) -> re.Match[str] | None:
    """The first sentence that says what something is."""
    said = (" ".join(text[start:end].split()) for start, end in sentences(text))
    return next((found for one in said if (found := _DEFINED.fullmatch(one))), None)


def _halves(text: str, key: str) -> dict[str, str] | None:
    """A sentence of ten to forty words in two parts."""
    said = (" ".join(text[start:end].split()) for start, end in sentences(text))
    plain = [one for one in said if 10 <= one.count(" ") + 1 <= 40 and re.fullmatch(r"[A-Z][^|{}<>=\\]*[a-z]\.", one)]
    if not plain:
        return None
    chosen = plain[int(key[:8], 16) % len(plain)].split()
    where = 2 * len(chosen) // 3
    return {"Beginning": " ".join(chosen[:where]), "Ending": " ".join(chosen[where:])}


def _writing(title: str, text: str) -> dict[str, str] | None:
    """The longest paragraph of plain sentences, asked for by the document's title."""
    pieces = (" ".join(piece.split()) for piece in re.split(r"\n\s*\n", text))
    plain = [one for one in pieces if re.fullmatch(r"[A-Z][^|{}<>=\\]{80,600}\.", one)]
    return {"Instruction": f"Write a paragraph about {title}.", "Text": max(plain, key=len)} if plain else None
