"""A maker of tasks, and of worked examples of each, out of a handful of seed tasks."""

import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import pyarrow as pa

from ..door import ChatAnswer, Sampling
from ..folder import HouseError
from ..instructing import Instruction, Seed, drawn, lists, seeds
from ..rows import Row, message, table
from ..steps import Corpus
from ..synthesis import Ask, Session, asking, prompt, sampling_of
from ..text.instances import Instance, fitting, parse_instances, parse_yes
from ..text.rouge import Alike
from ..text.view import words

KEYWORDS = (
    "image", "images", "graph", "graphs", "picture", "pictures", "photo", "file", "files", "map", "maps", "draw",
    "plot", "video", "audio", "go to", "click",
)  # fmt: skip
GREEDY = Sampling(temperature=0.0, top_p=1.0, max_tokens=16)  # of the question whether a task is a classification


@dataclass(frozen=True)
class SelfInstruct:
    """New tasks with inputs and outputs, from the tasks that a set has (Self-Instruct, arXiv 2212.10560).

    In each of `rounds`, `requests` prompts show `examples` tasks, `made_examples` of them made here in earlier rounds,
    and ask for `tasks` more. A new task is turned down if it is like one that is known (ROUGE-L of at least
    `similarity`: similar), asks for what text cannot do (`keywords`), is only "write a program" (program), has fewer
    than `low` or more than `high` words, or begins with punctuation. The model then says whether the task is a
    classification: if so labels come first and an input for each (else one label would prevail), if not inputs come
    first; at most `instances` of each task. Instances without output, whose output is the input, that end with a colon,
    that stand there twice, or whose input has another output too are turned down, and what is more than was asked for
    (too_many).

    Seeds are the rows of one user turn of the earlier set `set_name` (its train split; None: the live rows of this
    set), at most `limit`; their first paragraph is the task. Seeds stay. A row says the task, its input after a blank
    line, and the output; its parents are the rows whose tasks the prompt showed. meta: task, input, classification,
    round, instruction_made (the origin of the task).

    Unlike the paper's, prompts are made for chat models, tasks without any instance are not shown as examples, and
    tasks that do not begin with an ASCII letter are kept.
    """

    model: str
    set_name: str | None = None
    limit: int | None = None
    rounds: int = 4
    requests: int = 8
    examples: int = 8
    made_examples: int = 2
    tasks: int = 8
    instances: int = 5
    similarity: float = 0.7
    low: int = 4
    high: int = 150
    keywords: tuple[str, ...] = KEYWORDS
    temperature: float = 0.7
    top_p: float = 0.95
    max_tokens: int = 1024
    seed: int = 0

    scope: ClassVar[Literal["maker"]] = "maker"
    consumes: ClassVar[str | None] = None

    def __post_init__(self) -> None:
        if min(self.rounds, self.requests, self.tasks, self.instances) < 1:
            raise HouseError("SelfInstruct: rounds, requests, tasks and instances are at least 1")
        if not 0 <= self.made_examples < self.examples:
            raise HouseError("SelfInstruct: made_examples is at least 0 and less than examples, of which they are part")
        if not 0 < self.similarity <= 1 or not 0 <= self.low <= self.high:
            raise HouseError("SelfInstruct: similarity is above 0 and at most 1, low at most high")

    def make(self, corpus: Corpus) -> Iterator[pa.Table]:
        """A table of new rows for each round that gave any; step.json says how many tasks there were, under `tasks`."""
        with Session(self, corpus, self.model, "self_instruct") as session:
            given, lost = seeds(corpus, self.set_name, self.limit, self.seed)
            known = Alike(self.similarity, (one.task for one in given))
            own: list[tuple[str, str]] = []  # tasks made here that have a row, with that row's id
            accepted = 0
            for turn in range(self.rounds if given else 0):
                fresh = list(self._tasks(session, self._asks(given, own, turn), known))
                accepted += len(fresh)
                rows = []
                for one, row in self._rows(session, fresh):
                    if not own or own[-1][0] != one.text:
                        own.append((one.text, row["row_id"]))
                    rows.append(row)
                if rows:
                    yield table(rows)
            corpus.record(
                not_asked=dict(sorted(lost.items())),
                tasks={"seeds": len(given), "accepted": accepted, "with_rows": len(own)},
            )

    def _asks(self, given: Sequence[Seed], own: Sequence[tuple[str, str]], turn: int) -> list[Ask]:
        said = prompt("self_instruct_tasks")
        asks = []
        for request in range(self.requests):
            key = ("self_instruct", self.seed, turn, request)
            made = [own[place] for place in drawn(len(own), self.made_examples, *key, "made")]
            human = [given[place] for place in drawn(len(given), self.examples - len(made), *key, "given")]
            shown = [(one.task, one.row_id) for one in human] + made
            shown = [shown[place] for place in drawn(len(shown), len(shown), *key, "order")]
            lines = "\n".join(f"{number}. {' '.join(task.split())}" for number, (task, _) in enumerate(shown, 1))
            turns = said.turns(known=len(shown), tasks=lines, wanted=self.tasks, first=len(shown) + 1)
            parents = [row_id for _, row_id in shown]
            asks.append(asking(said, turns, sampling_of(self), (*key, *parents), parents, turn))
        return asks

    def _tasks(self, session: Session, asks: Sequence[Ask], known: Alike) -> Iterator[Instruction]:
        """The new tasks that pass; `known` grows by them."""
        for ask, answer, items in lists(session, asks):
            for place, task in enumerate(items):
                problem = task_problem(task, self.low, self.high, self.keywords)
                if place >= self.tasks:
                    problem = "too_many"
                if problem is None and known.nearest(task) is not None:
                    problem = "similar"
                if problem is not None:
                    session.refused(problem)
                    continue
                known.add(task)
                yield Instruction(task, ask, answer, ask.parents, {"round": ask.about})

    def _rows(self, session: Session, tasks: Sequence[Instruction]) -> Iterator[tuple[Instruction, Row]]:
        classes = self._classifications(session, tasks)
        asks = []
        for one in tasks:
            said = prompt("self_instruct_output_first" if classes.get(one.text) else "self_instruct_input_first")
            turns = said.turns(task=one.text, count=self.instances)
            asks.append(asking(said, turns, sampling_of(self), ("instances", self.seed, one.text), one.parents, one))
        for ask, answer in session.ask(asks):
            found = parse_instances(answer.text, answer.finished)
            if isinstance(found, str):
                session.unparsed(found)
                continue
            session.tally.parsed += 1
            kept, refused = fitting(found)
            refused["too_many"] = max(0, len(kept) - self.instances)
            for reason in refused.elements():
                session.refused(reason)
            for given, output in kept[: self.instances]:
                yield ask.about, self._row(session, ask, answer, (given, output), classes.get(ask.about.text))

    def _classifications(self, session: Session, tasks: Sequence[Instruction]) -> dict[str, bool]:
        """Whether each task is a classification; a task of which the model does not say is taken for none."""
        said = prompt("self_instruct_classify")
        asks = [asking(said, said.turns(task=one.text), GREEDY, ("class", self.seed, one.text), (), one.text)
                for one in tasks]  # fmt: skip
        found = {}
        for ask, answer in session.ask(asks):
            told = parse_yes(answer.text)
            if told is None:
                session.unparsed("no_class")
            else:
                session.tally.parsed += 1
                found[ask.about] = told
        return found

    def _row(
        self, session: Session, ask: Ask, answer: ChatAnswer, instance: Instance, classification: bool | None
    ) -> Row:
        one: Instruction = ask.about
        given, output = instance
        about = {"task": one.text, "input": given, "classification": classification, **one.meta}
        about["instruction_made"] = session.origin(one.ask, one.answer)
        asked = f"{one.text}\n\n{given}" if given else one.text
        return session.row(ask, answer, about, messages=[message("user", asked), message("assistant", output)])


def task_problem(task: str, low: int, high: int, keywords: Sequence[str]) -> str | None:
    """Why a task is turned down by how it looks, or None."""
    said = task.split()
    if not said or unicodedata.category(said[0][0])[0] in "PSC":
        return "punctuation"
    if not low <= len(said) <= high:
        return "too_short" if len(said) < low else "too_long"
    whole = _worded(task)
    if any(_worded(keyword) in whole for keyword in keywords):
        return "keyword"
    return "program" if whole.startswith(" write a program ") else None


def _worded(text: str) -> str:
    """Words between single spaces, so that one text holds another only by whole words."""
    return f" {' '.join(words(text))} "
