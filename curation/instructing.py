"""What makers of instructions share: seed rows, examples drawn from them, lists read out of answers, and instructions
that are answered and become rows."""

import heapq
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa

from .asking import seed_of
from .door import ChatAnswer, Sampling
from .preferring import question_of, usable
from .rows import Row, digest, message
from .steps import Corpus
from .synthesis import Ask, Session, asking, prompt
from .text.view import normal

SPARE = 1000  # seeds above twice the limit that are held before those that are too many are let go


@dataclass(frozen=True)
class Seed:
    """A row of one user turn that new instructions are made from; a system turn before it is left out. `text`
    is the whole turn; its first paragraph is the task and the others the task's input, as rows of an instruction and an
    input are read. answer: may be absent."""

    row_id: str
    text: str
    answer: str | None
    meta: Mapping[str, Any]

    @property
    def task(self) -> str:
        return self.text.strip().partition("\n\n")[0]


@dataclass(frozen=True)
class Instruction:
    """An instruction that a model made, before it is answered. ask, answer: by which it was made. parents: the rows
    that it is made from. meta: what its rows say of it. system: a turn before it."""

    text: str
    ask: Ask
    answer: ChatAnswer
    parents: tuple[str, ...]
    meta: Mapping[str, Any] = field(default_factory=dict)
    system: str = ""


def seeds(corpus: Corpus, set_name: str | None, limit: int | None, seed: int) -> tuple[list[Seed], Counter[str]]:
    """Rows that instructions can be made from, in the order of a hash of (seed, row_id), and how many rows cannot be
    used, by reason. set_name: an earlier set's train rows (its held-out rows must not shape what others train on);
    None: the live rows. limit: of seeds. Rows of one prompt are one seed, the row lowest by the hash."""
    lost: Counter[str] = Counter()
    prompts: set[str] = set()
    lowest: dict[str, tuple[str, Seed]] = {}  # prompt -> its row lowest by the hash
    for row in _rows(corpus, set_name):
        one = _seed_of(row)
        if isinstance(one, str):
            lost[one] += 1
            continue
        name = digest(normal(one.text))
        if name in prompts:
            lost["same_prompt"] += 1
        prompts.add(name)
        pair = digest(str(seed), one.row_id), one
        lowest[name] = min(lowest.get(name, pair), pair, key=_hash_of)
        if limit is not None and len(lowest) > 2 * limit + SPARE:
            lowest = dict(heapq.nsmallest(limit, lowest.items(), key=lambda item: item[1][0]))
    chosen = sorted(lowest.values(), key=_hash_of)
    return [one for _, one in chosen[:limit]], lost


def _hash_of(pair: tuple[str, Seed]) -> str:
    return pair[0]


def _rows(corpus: Corpus, set_name: str | None) -> Iterator[Row]:
    names = ["row_id", "messages", "chosen", "rejected", "meta"]
    parts: Iterable[pa.Table] = corpus.tables(names) if set_name is None else corpus.tools.curated(set_name, "train")
    return (row for part in parts for row in part.select(names).to_pylist())


def _seed_of(row: Mapping[str, Any]) -> Seed | str:
    question = question_of(row)
    if question is None:
        return "no_question"
    said = [turn for turn in question.prompt if turn["role"] != "system"]
    if len(said) != 1 or said[0]["role"] != "user" or not (said[0]["content"] or "").strip():
        return "several_turns"
    return Seed(question.row_id, said[0]["content"], question.reference, question.meta)


def drawn(size: int, count: int, *key: object) -> list[int]:
    """`count` different places below `size` (all of them, where there are no more), drawn by a hash of `key`."""
    if count >= size:
        return sorted(range(size), key=lambda place: seed_of(*key, place))
    places: dict[int, None] = {}
    attempt = 0
    while len(places) < count:
        places.setdefault(int(digest(*map(str, key), str(attempt))[:15], 16) % size)
        attempt += 1
    return list(places)


_NUMBER = re.compile(
    r"^[ \t]*[*#_ ]*(?:(?:task|instruction|question|example|topic)[ \t]*)?\d{1,3}[ \t]*[.:)\]]+[*_]*[ \t]*", re.I | re.M
)
_BULLET = re.compile(r"^[ \t]*[-*•][ \t]+", re.M)


def listed(text: str, finished: bool = True) -> list[str]:
    """The items of a numbered list, else of a list with bullets: each up to the next item or a blank line, white space
    as single spaces. What stands before the list is no item, and the last one of an answer that was cut off neither."""
    marks = list(_NUMBER.finditer(text)) or list(_BULLET.finditer(text))
    ends = [*(mark.start() for mark in marks[1:]), *([len(text)] if marks else [])]
    items = [text[mark.end() : end] for mark, end in zip(marks, ends, strict=True)]
    if items and not finished:
        items.pop()
    told = (" ".join(re.split(r"\n[ \t]*\n", item.strip())[0].split()) for item in items)
    return [item for item in told if item]


def lists(session: Session, asks: Sequence[Ask]) -> Iterator[tuple[Ask, ChatAnswer, list[str]]]:
    """The items that each answer lists, with it and its request. Answers that list nothing are counted as unparsed."""
    for ask, answer in session.ask(asks):
        items = listed(answer.text, answer.finished)
        if items:
            session.tally.parsed += 1
            yield ask, answer, items
        else:
            session.unparsed("no_list" if answer.text.strip() else "empty")


def answers(
    session: Session, made: Sequence[Instruction], sampling: Sampling, *seed: object
) -> Iterator[tuple[Instruction, Ask, ChatAnswer]]:
    """Asks each instruction as it stands; those whose answer says something and came to its end, in order."""
    bare, asks = prompt("ask"), []
    for one in made:
        turns = (*((("system", one.system),) if one.system else ()), *bare.turns(question=one.text))
        asks.append(asking(bare, turns, sampling, (*seed, "answer", one.system, one.text), one.parents, one))
    for ask, answer in session.ask(asks):
        if usable(session, answer):
            yield ask.about, ask, answer


def instruction_row(
    session: Session,
    one: Instruction,
    ask: Ask,
    answer: ChatAnswer,
    meta: Mapping[str, Any] | None = None,
    asker: Session | None = None,
) -> Row:
    """The instruction and its answer as a row: `made` in meta is the answer's origin, `instruction_made` the
    instruction's. asker: the session that made the instruction, where another model answers it."""
    turns = [message("system", one.system)] if one.system else []
    turns += [message("user", one.text), message("assistant", answer.text.strip())]
    about = {**one.meta, **(meta or {}), "instruction_made": (asker or session).origin(one.ask, one.answer)}
    return session.row(ask, answer, about, messages=turns)


def answered(
    session: Session, made: Sequence[Instruction], sampling: Sampling, *seed: object, answerer: str | None = None
) -> list[Row]:
    """The rows of instructions and their answers, in order. answerer: the model that answers; None: the session's."""
    author = session if answerer is None else session.beside(answerer)
    told = answers(author, made, sampling, *seed)
    return [instruction_row(author, one, ask, answer, asker=session) for one, ask, answer in told]
