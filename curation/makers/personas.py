"""A maker of instructions that different people would give."""

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import pyarrow as pa

from ..door import Sampling
from ..folder import HouseError
from ..inputs import files_inputs, read_text
from ..instructing import answered, drawn
from ..listing import listings, lone_instructions
from ..rows import ROW, digest, table
from ..steps import Corpus
from ..synthesis import Ask, Session, asking, prompt
from ..text.outlines import bare, outline
from ..text.view import VIEW_COLUMNS, normal, view

TASKS = ("instruction", "maths", "reasoning", "code")
NEAR = 0.9  # Jaccard of two personas' words from which they are one, as in the paper
MOST_CHARS = 4000  # of a text that a persona is read from
PERSONA_WORDS = (3, 120)


@dataclass(frozen=True)
class Personas:
    """SFT rows whose instruction is one that a certain person would bring (Persona Hub, arXiv 2406.20094): `model`
    turns a persona and a task into an instruction, and `answerer` (or the model itself) answers it.

    Personas are `given`, or those of the file `personas` (one a line, or JSON lines with the key `persona`, as Persona
    Hub is published), or read from texts: `model` says who would write, read or need each of `limit` texts, of the
    earlier set `set_name` or of this set's live rows, documents and conversations alike. rounds: each asks for
    `relatives` people who have to do with each newest persona (six rounds in the paper). Personas that share 90 % of
    their words are one, the earliest.

    tasks: of instruction (what the person would ask), maths, reasoning, code; each persona gets `per_persona` of them,
    drawn by a hash. most: personas, at most (None: all). temperature, top_p: of personas and instructions;
    answer_temperature: of answers; max_tokens: of instructions and answers; persona_tokens: of personas. Parents: the
    text's row, for relatives too, which stays; given personas have none. meta: persona, task, chain (the personas from
    which it comes). The step's record: `personas`, how many came in each round, and how many were near another.
    """

    model: str
    answerer: str | None = None
    given: tuple[str, ...] = ()
    personas: str | None = None
    set_name: str | None = None
    limit: int | None = 200
    rounds: int = 0
    relatives: int = 3
    most: int | None = None
    tasks: tuple[str, ...] = ("instruction",)
    per_persona: int = 1
    temperature: float = 1.0
    answer_temperature: float = 0.7
    top_p: float = 0.95
    max_tokens: int = 768
    persona_tokens: int = 192
    seed: int = 0

    scope: ClassVar[Literal["maker"]] = "maker"
    consumes: ClassVar[str | None] = None

    def __post_init__(self) -> None:
        if not self.tasks or not set(self.tasks) <= set(TASKS):
            raise HouseError(f"{self}: tasks are some of {', '.join(TASKS)}")
        if not 1 <= self.per_persona <= len(self.tasks):
            raise HouseError(f"{self}: per_persona is 1 to {len(self.tasks)}, the number of its tasks")
        if min(self.relatives, self.max_tokens, self.persona_tokens) < 1 or self.rounds < 0:
            raise HouseError(f"{self}: relatives and numbers of tokens are at least 1, rounds at least 0")
        if self.given and self.personas is not None:
            raise HouseError(f"{self}: personas come from one place: given, personas (a file), or texts")

    @property
    def models(self) -> tuple[str, ...]:
        """The model besides `model` whose answers become rows."""
        return () if self.answerer is None else (self.answerer,)

    def make(self, corpus: Corpus) -> Iterator[pa.Table]:
        """One table of new rows."""
        with Session(self, corpus, self.model, "personas") as session:
            people = self._people(session)
            made = lone_instructions(session, [ask for one in people for ask in self._tasks(one)])
            sampling = Sampling(self.answer_temperature, self.top_p, self.max_tokens)
            rows = answered(session, made, sampling, "personas", self.seed, answerer=self.answerer)
            if rows:
                yield table(rows)

    def _people(self, session: Session) -> list["_Persona"]:
        """All personas, in the order in which they came, near ones once."""
        found: list[_Persona] = []
        newest: list[_Persona] = []
        counts, near = [], 0
        for number in range(self.rounds + 1):
            new = self._relatives(session, newest) if number else self._first(session)
            newest = _apart(found, new, session.corpus)
            near += len(new) - len(newest)
            counts.append(len(newest))
            found += newest
        session.corpus.record(personas={"rounds": counts, "near": near})
        return found if self.most is None else found[: self.most]

    def _first(self, session: Session) -> list["_Persona"]:
        if self.given:
            return [_Persona((said.strip(),)) for said in self.given if said.strip()]
        if self.personas is not None:
            session.corpus.record(inputs=files_inputs([self.personas]))
            return [_Persona((said,)) for said in read_personas(self.personas)]
        form, sampling = prompt("personas_text"), Sampling(self.temperature, self.top_p, self.persona_tokens)
        asks = [
            asking(form, form.turns(text=text[:MOST_CHARS]), sampling, ("persona", self.seed, row_id), (row_id,))
            for row_id, text in self._texts(session.corpus)
        ]
        return [_Persona((said,), ask.parents) for ask, (said,) in listings(session, asks, parse_persona, "no_persona")]

    def _texts(self, corpus: Corpus) -> list[tuple[str, str]]:
        """(row_id, what the row says), the lowest by a hash of (seed, row_id)."""
        parts = corpus.tables() if self.set_name is None else corpus.tools.curated(self.set_name, "train")
        found = [pair for part in parts for pair in zip(part["row_id"].to_pylist(), view(part, "pair"), strict=True)]
        told = [(row_id, text.strip()) for row_id, text in found if text.strip()]
        return sorted(told, key=lambda pair: digest(str(self.seed), pair[0]))[: self.limit]

    def _relatives(self, session: Session, newest: Sequence["_Persona"]) -> list["_Persona"]:
        form = prompt("personas_relative")
        sampling = Sampling(self.temperature, self.top_p, self.persona_tokens * self.relatives)
        asks = [
            asking(
                form,
                form.turns(persona=one.said, count=self.relatives),
                sampling,
                ("relatives", self.seed, *one.chain),
                one.parents,
                one,
            )
            for one in newest
        ]
        found = listings(session, asks, parse_personas, "no_personas")
        return [
            _Persona((*ask.about.chain, said), ask.parents) for ask, told in found for said in told[: self.relatives]
        ]

    def _tasks(self, one: "_Persona") -> Iterator[Ask]:
        sampling = Sampling(self.temperature, self.top_p, self.max_tokens)
        for place in sorted(drawn(len(self.tasks), self.per_persona, "task", self.seed, one.said)):
            task = self.tasks[place]
            form = prompt(f"personas_{task}")
            about = {"persona": one.said, "task": task, "chain": list(one.chain[:-1])}
            key = ("task", self.seed, task, *one.chain)
            yield asking(form, form.turns(persona=one.said), sampling, key, one.parents, about)


@dataclass(frozen=True)
class _Persona:
    """chain: the personas from which it comes, itself last."""

    chain: tuple[str, ...]
    parents: tuple[str, ...] = ()

    @property
    def said(self) -> str:
        return self.chain[-1]


def parse_persona(text: str) -> list[str]:
    """The one persona that an answer describes, in a list of one or none."""
    said = bare(text)
    first, _, rest = said.partition("\n")
    if rest.strip() and first.rstrip().endswith(":"):
        said = rest
    entries = outline(said) if said.lstrip()[:1] in "[{" else []
    said = " ".join((entries[0].whole if entries else said).split("\n\n")[0].replace("**", "").split())
    said = said.removeprefix("Persona:").removeprefix("Description:").strip()
    return [said] if _is_persona(said) else []


def parse_personas(text: str) -> list[str]:
    """The personas that an answer lists."""
    said = ("; ".join([item.whole, *(point.whole for point in item.points)]) for item in outline(text))
    return [one for one in said if _is_persona(one)]


def _is_persona(said: str) -> bool:
    low, high = PERSONA_WORDS
    return low <= len(said.split()) <= high and any(letter.isalpha() for letter in said)


def read_personas(path: str) -> list[str]:
    """Personas of a file: JSON lines with the key `persona`, or plain lines."""
    found = []
    for number, line in enumerate(read_text(path).split("\n"), 1):
        said: Any = line.strip()
        if said.startswith("{"):
            try:
                said = json.loads(said).get("persona")
            except ValueError as error:
                raise HouseError(f"{path}, line {number} is no JSON: {error}") from error
            if not isinstance(said, str):
                raise HouseError(f"{path}, line {number} has no text under the key `persona`")
        if said.strip():
            found.append(said.strip())
    if not found:
        raise HouseError(f"{path} holds no persona: write one a line, or JSON lines with the key `persona`")
    return found


def _apart(known: Sequence[_Persona], new: Iterable[_Persona], corpus: Corpus) -> list[_Persona]:
    """Those of `new` that are near neither a known persona nor an earlier new one."""
    from ..duplicates.minhash import banding, near_pairs
    from ..duplicates.shingles import shingle_sets

    every = [*known, *new]
    if len(every) < 2:
        return list(every[len(known) :])
    said = pa.table({name: pa.nulls(len(every), ROW.field(name).type) for name in VIEW_COLUMNS if name != "text"})
    shingles = shingle_sets(said.append_column("text", pa.array([normal(one.said) for one in every])), "pair", 1)
    pairs = near_pairs(shingles, NEAR, *banding(NEAR), scratch=corpus.scratch)
    near: dict[int, set[int]] = {}
    for left, right in zip(pairs.left.tolist(), pairs.right.tolist(), strict=True):
        near.setdefault(left, set()).add(right)
        near.setdefault(right, set()).add(left)
    kept: set[int] = set()
    found = []
    for place, group in enumerate(pairs.group.tolist()):
        if place < len(known):
            kept.add(group)
        elif group < 0 or not ({group} | near.get(group, set())) & kept:
            kept.add(group)
            found.append(every[place])
    return found
