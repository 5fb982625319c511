"""A maker of instructions that need several skills at once."""

import random
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations, product
from math import comb
from typing import Any, ClassVar, Literal

import pyarrow as pa

from ..asking import seed_of
from ..door import Sampling
from ..folder import HouseError
from ..instructing import Instruction, instruction_row, seeds
from ..listing import listings, lone_instructions
from ..preferring import usable
from ..rows import Row, digest, table
from ..steps import Corpus
from ..synthesis import Ask, Session, asking, prompt
from ..text.outlines import distinct_names, name_key, names, outline

QUERY_TYPES = (
    "asking for information",
    "asking for advice",
    "solving a problem",
    "writing a text",
    "explaining something",
    "making a plan",
    "improving a text or a thing that exists",
    "deciding between possibilities",
)
Mix = tuple[tuple[str, ...], str]


@dataclass(frozen=True)
class InstructSkillMix:
    """SFT rows whose instruction needs `k` randomly chosen skills at once, and a type of request besides
    (Instruct-SkillMix, arXiv 2408.14774): `model` names the skills, writes the instruction, then the answer.

    skills: those to mix; where none are given they are extracted. extract: `model` asks for `topics` topics, then for
    `per_topic` skills of each; `rows` asks which skills (at most `per_row`) each of `rows` rows takes, of the earlier
    set `set_name` or of this set's live rows. Names of the same words, whatever their order and endings, are one skill;
    group: the model also sorts the names, `batch` at a time, into groups that stand for them. query_types: of requests;
    () asks the model for eight.

    count: instructions wanted: different mixes of k skills and a type, drawn by a hash of `seed`, as many as there are.
    temperature, top_p: of everything; max_tokens: of instructions and answers; list_tokens: of lists. An answer is
    asked for with the skills in sight; its row has the bare instruction. Parents are, where skills come from rows, one
    row of each skill, and stay; skills that come from nowhere leave parents empty. meta: skills, query_type. The step's
    record: `skills` with the number of rows or topics that named each, and `query_types`.

    The prompts are ours. Answers that shirk, of which 20 % spoil a set in the paper, are for the judges after this step
    to find.
    """

    model: str
    skills: tuple[str, ...] = ()
    extract: Literal["model", "rows"] = "model"
    set_name: str | None = None
    rows: int = 200
    per_row: int = 3
    topics: int = 20
    per_topic: int = 8
    group: bool = False
    batch: int = 60
    query_types: tuple[str, ...] = QUERY_TYPES
    k: int = 2
    count: int = 400
    temperature: float = 1.0
    top_p: float = 0.95
    max_tokens: int = 768
    list_tokens: int = 384
    seed: int = 0

    scope: ClassVar[Literal["maker"]] = "maker"
    consumes: ClassVar[str | None] = None

    def __post_init__(self) -> None:
        sizes = (self.rows, self.per_row, self.topics, self.per_topic, self.k, self.count, self.batch)
        if min(*sizes, self.max_tokens, self.list_tokens) < 1:
            raise HouseError(f"{self}: all its numbers of things are at least 1")
        if self.extract not in ("model", "rows"):
            raise HouseError(f"{self}: extract is model or rows, not {self.extract!r}")
        if self.set_name is not None and (self.skills or self.extract == "model"):
            raise HouseError(f"{self}: no row of {self.set_name} would be read; say extract: rows, and no skills")
        if self.skills and len({name_key(skill) for skill in self.skills}) < self.k:
            raise HouseError(f"{self}: it takes at least k = {self.k} different skills to mix")

    def make(self, corpus: Corpus) -> Iterator[pa.Table]:
        """One table of new rows."""
        with Session(self, corpus, self.model, "instruct_skill_mix") as session:
            named = self._named(session)
            if self.group and len(named) > 1:
                named = self._grouped(session, named)
            types = list(self.query_types) or self._types(session)
            told = {skill: len(rows) for skill, rows in sorted(named.items())}
            corpus.record(skills=told, query_types=types)
            mixed = mixes(sorted(named), types, self.k, self.count, self.seed)
            asks = [self._query(mix, named) for mix in mixed]
            rows = list(self._rows(session, lone_instructions(session, asks)))
            if rows:
                yield table(rows)

    def _ask(self, name: str, about: Any, parents: Sequence[str] = (), **values: object) -> Ask:
        lists = name not in ("skill_mix_query", "skill_mix_answer")
        tokens = self.list_tokens if lists else self.max_tokens
        form = prompt(name)
        key = (name, self.seed, *values.values())
        return asking(form, form.turns(**values), Sampling(self.temperature, self.top_p, tokens), key, parents, about)

    def _named(self, session: Session) -> dict[str, list[str]]:
        """The rows (or topics) that named each skill, by its name."""
        if self.skills:
            return {skill: [] for skill in by_key((skill, "") for skill in self.skills)}
        asks = self._of_rows(session) if self.extract == "rows" else self._of_topics(session)
        said = [(name, ask.about) for ask, found in listings(session, asks, names, "no_skills") for name in found]
        return by_key(said)

    def _of_rows(self, session: Session) -> list[Ask]:
        found, lost = seeds(session.corpus, self.set_name, self.rows, self.seed)
        session.corpus.record(not_asked=dict(sorted(lost.items())))
        asks = []
        for one in found:
            exchange = one.text if one.answer is None else f"{one.text}\n\nAnswer:\n{one.answer}"
            asks.append(self._ask("skill_mix_label", one.row_id, (one.row_id,), exchange=exchange, count=self.per_row))
        return asks

    def _of_topics(self, session: Session) -> list[Ask]:
        first = [self._ask("skill_mix_topics", None, count=self.topics)]
        told = [topic for _, found in listings(session, first, names, "no_topics") for topic in found]
        topics = distinct_names(told)[: self.topics]
        return [self._ask("skill_mix_skills", topic, topic=topic, count=self.per_topic) for topic in topics]

    def _types(self, session: Session) -> list[str]:
        asks = [self._ask("skill_mix_types", None, count=len(QUERY_TYPES))]
        return [name for _, found in listings(session, asks, names, "no_types") for name in found]

    def _grouped(self, session: Session, named: Mapping[str, list[str]]) -> dict[str, list[str]]:
        """Skills under the names of their groups; those that the model puts into none stay themselves."""
        ordered = sorted(named, key=name_key)
        batches = [ordered[start : start + self.batch] for start in range(0, len(ordered), self.batch)]
        asks = [self._ask("skill_mix_group", batch, skills="\n".join(f"- {one}" for one in batch)) for batch in batches]
        group_of: dict[str, str] = {}
        for ask, items in listings(session, asks, outline, "no_groups"):
            known = {name_key(name): name for name in ask.about}
            for item in items:
                members = [known[name_key(name)] for name in item.below or [item.rest] if name_key(name) in known]
                for member in members if len(members) > 1 else ():
                    group_of.setdefault(member, item.name)
        return by_key((group_of.get(name, name), row) for name, rows in named.items() for row in rows or [""])

    def _query(self, mix: Mix, named: Mapping[str, list[str]]) -> Ask:
        chosen, query_type = mix
        parents = []
        if self.extract == "rows":
            of_each = (named[skill] for skill in chosen)
            parents = [min(rows, key=lambda row: digest(str(self.seed), row, *chosen)) for rows in of_each if rows]
        about = {"skills": list(chosen), "query_type": query_type}
        listed = "\n".join(f"- {skill}" for skill in chosen)
        return self._ask(
            "skill_mix_query", about, tuple(dict.fromkeys(parents)), query_type=query_type or "any", skills=listed
        )

    def _rows(self, session: Session, made: Sequence[Instruction]) -> Iterator[Row]:
        asks = [
            self._ask("skill_mix_answer", one, one.parents, instruction=one.text, skills=", ".join(one.meta["skills"]))
            for one in made
        ]
        for ask, answer in session.ask(asks):
            if usable(session, answer):
                yield instruction_row(session, ask.about, ask, answer)


def by_key(said: "Iterator[tuple[str, str]] | Sequence[tuple[str, str]]") -> dict[str, list[str]]:
    """What names each skill, under the commonest of the names that say the same (name_key); of equally common ones the
    first in the alphabet. Rows of each once, in their order."""
    spelt: dict[str, Counter[str]] = {}
    rows: dict[str, dict[str, None]] = {}
    for name, row in said:
        spelt.setdefault(name_key(name), Counter())[name] += 1
        rows.setdefault(name_key(name), {}).update({row: None} if row else {})
    return {min(names_, key=lambda one: (-names_[one], one)): list(rows[key]) for key, names_ in spelt.items()}


def mixes(skills: Sequence[str], types: Sequence[str], k: int, count: int, seed: int) -> list[Mix]:
    """`count` different pairs of k skills and a type (all there are, where they are fewer), in an order drawn by a hash
    of `seed`. Types come in turn, so that each gets its share. Without types they have none."""
    types = list(types) or [""]
    if len(skills) < k:
        return []
    total = comb(len(skills), k) * len(types)
    if total <= 4 * count:
        every = product(combinations(skills, k), types)
        return sorted(every, key=lambda mix: digest("mix", str(seed), *mix[0], mix[1]))[:count]
    found: dict[Mix, None] = {}
    draw = 0
    while len(found) < count:
        chosen = random.Random(seed_of("mix", seed, draw)).sample(range(len(skills)), k)
        found.setdefault((tuple(skills[place] for place in sorted(chosen)), types[draw % len(types)]))
        draw += 1
    return list(found)
