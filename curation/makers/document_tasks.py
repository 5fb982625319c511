"""Instruction rows out of raw documents: tasks of the types of Bonito, with what can be checked checked."""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any, ClassVar, Literal

import pyarrow as pa

from ..documents import Section, cut
from ..door import ChatAnswer
from ..folder import HouseError
from ..rows import Row, digest, message, table
from ..steps import Corpus
from ..synthesis import Ask, Prompt, Session, asking, prompt, sampling_of
from ..text_tasks import TASKS, Exercise, TextTask, copied, exercise, one_of, read, within

PIPE = "<|pipe|>"  # between instruction and response, as the model Bonito writes them
CONTEXT = "{{context}}"  # where that model wants the text put in


@dataclass(frozen=True)
class DocumentTasks:
    """Tasks from documents, as Bonito makes them (arXiv 2402.18334): each section of a text and a task type become an
    instruction, most with the section as its context, and a response.

    rows: wanted of every type, or a mapping of types to rows; types that it does not name are not asked for. Types:
    exqa (extractive question answering), mcqa (multiple choice), qg (question generation), qa (without choices), ynqa
    (yes, no, maybe), coref (coreference), paraphrase, paraphrase_id (identification), sent_comp (sentence completion),
    sentiment, summarization, text_gen (text generation), topic_class (topic classification), wsd (word sense), te
    (textual entailment), nli. Of each type the sections lowest by hash of (seed, type, document, place) are asked for,
    as many as rows are missing, in rounds, until the rows are there or `tries` times as many were asked; a section is
    asked once for each type.

    set_name: the documents are those of an earlier set, its split train; None: those of this set. window: characters of
    a section at most: paragraphs that follow each other, cut between sentences only where one is longer; sections of
    less than `least` characters are not asked about. form: `lines` asks any chat model for labelled lines (prompts/
    document_tasks.md, of our own words); `bonito` is the input that the model Bonito was trained on, whose chat
    template has to pass it on as it is. temperature, top_p, max_tokens: of the sampling (the first two as Bonito's
    authors have them).

    Checked without a model, white space and case aside: extracted answers, referents and completions stand in the text,
    an answer with choices is one of them, sentences said to be copied are, nothing else is copied wholesale, a summary
    has at most half the words. Of what form `bonito` gives, whose instructions are free text, extraction, yes and no,
    options and copies are checked. What fails is refused by reason.

    Rows: one user and one assistant turn, parent the document; meta: task, section (its first and last character).
    Documents that something was made from leave the set with reason source_document.
    """

    model: str
    rows: int | Mapping[str, int] = 20
    set_name: str | None = None
    window: int = 2000
    least: int = 200
    tries: int = 2
    form: Literal["lines", "bonito"] = "lines"
    temperature: float = 0.5
    top_p: float = 0.95
    max_tokens: int = 256
    seed: int = 0

    scope: ClassVar[Literal["maker"]] = "maker"
    consumes: ClassVar[str | None] = "source_document"

    def __post_init__(self) -> None:
        wanted = self.quotas
        unknown = sorted(wanted.keys() - TASKS.keys())
        if unknown:
            raise HouseError(f"DocumentTasks: no task type {', '.join(unknown)}; there are {', '.join(TASKS)}")
        if min(wanted.values(), default=0) < 0:
            raise HouseError(f"{self}: rows is at least 0")
        if min(self.window, self.least, self.tries, self.max_tokens) < 1 or self.least > self.window:
            raise HouseError(f"{self}: window, least, tries and max_tokens are at least 1, least at most window")

    @property
    def quotas(self) -> dict[str, int]:
        """Rows wanted of each type."""
        if isinstance(self.rows, Mapping):
            return {short: self.rows[short] for short in (*TASKS, *self.rows) if short in self.rows}
        return dict.fromkeys(TASKS, self.rows)

    def make(self, corpus: Corpus) -> Iterator[pa.Table]:
        """One table of new rows."""
        found = cut(corpus, self.set_name, self.window, self.least)
        made: list[Row] = []
        with Session(self, corpus, self.model, "document_tasks") as session:
            queues = {short: self._drawn(found, short, count) for short, count in self.quotas.items()}
            missing = self.quotas
            while asks := [ask for short, queue in queues.items() for ask in self._round(short, queue, missing)]:
                for ask, answer in session.ask(asks):
                    row = self._row(session, ask, answer)
                    if row is not None:
                        made.append(row)
                        missing[ask.about[0].short] -= 1
            corpus.record(short_of_wanted={short: count for short, count in missing.items() if count})
        if made:
            yield table(made)

    def _drawn(self, found: list[Section], short: str, count: int) -> list[Section]:
        """Sections to ask of one type, the last first."""

        def rank(one: Section) -> str:
            return digest("task", str(self.seed), short, one.row_id, str(one.start))

        return sorted(found, key=rank)[: self.tries * count][::-1]

    def _round(self, short: str, queue: list[Section], missing: Mapping[str, int]) -> Iterator[Ask]:
        """Requests for the rows still missing of a type, taken off its queue."""
        task, sampling = TASKS[short], sampling_of(self)
        for _ in range(min(missing[short], len(queue))):
            one = queue.pop()
            key = ("task", self.seed, short, one.row_id, one.start)
            if self.form == "bonito":
                said = f"<|tasktype|>\n{task.name}\n<|context|>\n{one.text}\n<|task|>\n"
                yield asking(None, (("user", said),), sampling, key, (one.row_id,), (task, one))
            else:
                form = task_prompt(short)
                yield asking(form, form.turns(context=one.text), sampling, key, (one.row_id,), (task, one))

    def _row(self, session: Session, ask: Ask, answer: ChatAnswer) -> Row | None:
        """The row of an answer, or None, counted."""
        task, section = ask.about
        if self.form == "bonito":
            told = read_bonito(answer.text, section.text, answer.finished)
            problem = None if isinstance(told, str) else check_bonito(task, told, section.text)
        else:
            values = read(task, answer.text, answer.finished)
            if isinstance(values, str):
                told, problem = values, None
            else:
                problem = task.check(values, section.text)
                told = exercise(task, values, section.text, (self.seed, section.row_id, section.start))
        if isinstance(told, str):
            session.unparsed(told)
            return None
        session.tally.parsed += 1
        if problem is not None:
            session.refused(problem)
            return None
        session.tally.verified += task.proven
        turns = [message("user", told.instruction), message("assistant", told.response)]
        about: dict[str, Any] = {"task": task.short, "section": [section.start, section.end]}
        return session.row(ask, answer, about, messages=turns)


@cache
def task_prompt(short: str) -> Prompt:
    """The prompt of one task type: the frame of prompts/document_tasks.md with that type's section put in."""
    frame, *parts = re.split(r"^## ", prompt("document_tasks").text, flags=re.M)
    told = {name: said.strip() for name, _, said in (part.partition("\n") for part in parts)}
    return Prompt(f"document_tasks/{short}", frame.strip().replace("{task}", told[short]))


def read_bonito(said: str, context: str, finished: bool) -> Exercise | str:
    """Instruction and response out of what the model Bonito says, or why there is none."""
    if not said.strip():
        return "empty"
    pieces = [piece.strip() for piece in said.split(PIPE)]
    if len(pieces) != 2:
        return "no_pipe"
    if not finished:
        return "cut"
    if not all(pieces):
        return "no_instruction" if pieces[1] else "no_answer"
    return Exercise(pieces[0].replace(CONTEXT, context), pieces[1])


def check_bonito(task: TextTask, told: Exercise, context: str) -> str | None:
    """What is wrong with an exercise whose instruction is free text, as far as its type says what it must be."""
    if task.short == "exqa" and not within(told.response, context):
        return "not_in_text"
    if task.short == "ynqa" and one_of(told.response, ("yes", "no", "maybe", "true", "false")) is None:
        return "no_choice"
    if task.short == "mcqa" and not within(told.response, told.instruction):
        return "no_option"
    return "copied" if not task.proven and copied(told.response, context) else None
