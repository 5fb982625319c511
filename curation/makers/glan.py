"""A maker of instructions out of a taxonomy of what can be known, and nothing else."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

import pyarrow as pa

from ..asking import seed_of
from ..door import Sampling
from ..folder import HouseError
from ..inputs import files_inputs
from ..instructing import answered, drawn
from ..listing import listings, lone_instructions
from ..rows import digest, table
from ..steps import Corpus
from ..synthesis import Ask, Session, asking, prompt
from ..taxonomy import Place, distinct_places, places_of_rows, read_taxonomy
from ..text.outlines import names, outline
from ..text.view import normal

MOST_CONCEPTS = 5  # of one question
KINDS = ("The question is a basic one.", "The question is a challenging one, which needs both sessions together.")


@dataclass(frozen=True)
class Glan:
    """SFT rows from a taxonomy instead of seeds (GLAN, arXiv 2402.13064): `model` lists the subjects of each
    discipline, designs a syllabus of each, and writes homework questions on one or two of its class sessions and one to
    five of their key concepts; they are answered in a second request, by `answerer` where one is named.

    Disciplines are `disciplines`, those of the file `taxonomy` (nested YAML or JSON whose leaves are disciplines, or
    text with one a line, as `Field > Part > Discipline`), or the different values of `column` in the meta of live rows;
    where none of these is given, the model is asked for `fields` fields, `parts` parts of each and `parts` disciplines
    of each part (the authors had annotators vote on theirs: look through the step's record, and give the good ones as
    `disciplines`). subjects: of a discipline, asked for in each of `lists` requests; sessions, concepts: of a syllabus,
    about.

    questions: of each subject; `two_sessions` is the share of those on two sessions. A single session gives one to five
    concepts, two together two to five, of each at least one; no subject has the same concepts twice. temperature,
    top_p: of lists and questions; answer_temperature: of answers; max_tokens: of questions and answers; list_tokens: of
    lists. meta: path (of the discipline), discipline, subject, details (its level and subtopics), sessions, concepts.
    The step's record: `taxonomy` with the number of subjects and questions of each discipline.

    Such rows come from nothing and have no parents, but for disciplines out of `column`: one row of that value, which
    stays. The prompts are ours, and lists are read as they are written where the authors have GPT-4 bring them into
    JSON.
    """

    model: str
    answerer: str | None = None
    disciplines: tuple[str, ...] = ()
    taxonomy: str | None = None
    column: str | None = None
    fields: int = 6
    parts: int = 4
    subjects: int = 10
    lists: int = 1
    sessions: int = 10
    concepts: int = 5
    questions: int = 4
    two_sessions: float = 0.5
    temperature: float = 1.0
    answer_temperature: float = 0.7
    top_p: float = 0.95
    max_tokens: int = 768
    list_tokens: int = 1024
    seed: int = 0

    scope: ClassVar[Literal["maker"]] = "maker"
    consumes: ClassVar[str | None] = None

    def __post_init__(self) -> None:
        sizes = (self.fields, self.parts, self.subjects, self.lists, self.sessions, self.concepts, self.questions)
        if min(*sizes, self.max_tokens, self.list_tokens) < 1:
            raise HouseError(f"{self}: all its numbers of things are at least 1")
        if not 0 <= self.two_sessions <= 1:
            raise HouseError(f"{self}: two_sessions is a share, 0 to 1")
        if sum(map(bool, (self.disciplines, self.taxonomy, self.column))) > 1:
            raise HouseError(f"{self}: disciplines come from one place: disciplines, taxonomy or column")

    @property
    def models(self) -> tuple[str, ...]:
        """The model besides `model` whose answers become rows."""
        return () if self.answerer is None else (self.answerer,)

    def make(self, corpus: Corpus) -> Iterator[pa.Table]:
        """One table of new rows."""
        with Session(self, corpus, self.model, "glan") as session:
            places = self._disciplines(session)
            subjects = self._subjects(session, places)
            asks = [ask for syllabus in self._syllabi(session, subjects) for ask in self._questions(syllabus)]
            corpus.record(taxonomy=_told(places, subjects, asks))
            made = lone_instructions(session, asks)
            sampling = Sampling(self.answer_temperature, self.top_p, self.max_tokens)
            rows = answered(session, made, sampling, "glan", self.seed, answerer=self.answerer)
            if rows:
                yield table(rows)

    def _ask(self, name: str, about: Any, place: Place | None = None, *key: object, **values: object) -> Ask:
        form = prompt(name)
        tokens = self.max_tokens if name == "glan_question" else self.list_tokens
        sampling = Sampling(self.temperature, self.top_p, tokens)
        parents = place.parents if place is not None else ()
        return asking(form, form.turns(**values), sampling, (name, self.seed, *key, *values.values()), parents, about)

    def _disciplines(self, session: Session) -> list[Place]:
        if self.disciplines:
            return distinct_places(Place((name,)) for name in self.disciplines)
        if self.taxonomy is not None:
            session.corpus.record(inputs=files_inputs([self.taxonomy]))
            return read_taxonomy(self.taxonomy)
        if self.column is not None:
            return places_of_rows(session.corpus, self.column, self.seed)
        asks = [self._ask("glan_fields", Place(()), count=self.fields)]
        places = self._parts(session, asks, self.fields)
        for parts in ("parts", "disciplines that one can study"):
            asks = [
                self._ask("glan_parts", one, one, path=" > ".join(one.path), parts=parts, count=self.parts)
                for one in places
            ]
            places = self._parts(session, asks, self.parts)
        return places

    def _parts(self, session: Session, asks: list[Ask], most: int) -> list[Place]:
        found = listings(session, asks, names, "no_disciplines")
        return distinct_places(Place((*ask.about.path, name)) for ask, told in found for name in told[:most])

    def _subjects(self, session: Session, places: list[Place]) -> list["_Subject"]:
        """Subjects of each discipline, each once; one that several disciplines have stays in all of them."""
        asks = [
            self._ask("glan_subjects", one, one, *one.path, draw, discipline=one.name, count=self.subjects)
            for one in places
            for draw in range(self.lists)
        ]
        found: dict[tuple[str, ...], _Subject] = {}
        for ask, items in listings(session, asks, outline, "no_subjects"):
            for item in items[: self.subjects]:
                details = "; ".join([item.rest, *(point.whole for point in item.points)]).strip("; ")
                one = _Subject(ask.about, item.name, details)
                found.setdefault((*one.place.path, normal(one.name)), one)
        return list(found.values())

    def _syllabi(self, session: Session, subjects: list["_Subject"]) -> Iterator["_Subject"]:
        """The subjects with their class sessions."""
        asks = [
            self._ask(
                "glan_syllabus",
                one,
                one.place,
                *one.place.path,
                discipline=one.place.name,
                subject=one.name,
                details=f"What belongs to it: {one.details}" if one.details else "",
                sessions=self.sessions,
                concepts=self.concepts,
            )
            for one in subjects
        ]
        for ask, sessions in listings(session, asks, parse_syllabus, "no_syllabus"):
            yield replace(ask.about, sessions=tuple(sessions))

    def _questions(self, one: "_Subject") -> Iterator[Ask]:
        taken = set()
        for draw in range(4 * self.questions):
            key = ("glan", self.seed, *one.place.path, one.name, draw)
            chosen = sample_concepts(one.sessions, self.two_sessions, key)
            if chosen in taken:
                continue
            taken.add(chosen)
            titles, concepts = chosen
            about = {"path": list(one.place.path), "discipline": one.place.name, "subject": one.name}
            about |= {"details": one.details, "sessions": list(titles), "concepts": list(concepts)}
            yield self._ask(
                "glan_question",
                about,
                one.place,
                discipline=one.place.name,
                subject=one.name,
                syllabus=one.syllabus,
                sessions=" and ".join(f'"{title}"' for title in titles),
                concepts="; ".join(concepts),
                kind=KINDS[len(titles) - 1],
            )
            if len(taken) == self.questions:
                return


Session_ = tuple[str, tuple[str, ...]]  # the title of a class session, and its key concepts


@dataclass(frozen=True)
class _Subject:
    place: Place
    name: str
    details: str
    sessions: tuple[Session_, ...] = ()

    @property
    def syllabus(self) -> str:
        return "\n".join(f"{n}. {title}: {'; '.join(below)}" for n, (title, below) in enumerate(self.sessions, 1))


def parse_syllabus(text: str) -> list[Session_]:
    """Class sessions with their key concepts; those without any are left out."""
    return [(item.name, tuple(item.below)) for item in outline(text) if item.below]


def sample_concepts(
    sessions: tuple[Session_, ...], two_sessions: float, key: tuple[object, ...]
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Titles and key concepts of one question, drawn by a hash of `key`: one session and one to five of its concepts,
    or (in a share `two_sessions` of all draws) two sessions and two to five concepts, of each at least one."""
    both = len(sessions) > 1 and seed_of("two", *key) < two_sessions * 16**8
    places = sorted(drawn(len(sessions), 2 if both else 1, "session", *key))
    pools = [sessions[place][1] for place in places]
    every = [(side, concept) for side, pool in enumerate(pools) for concept in pool]
    most = min(MOST_CONCEPTS, len(every))
    count = len(pools) + seed_of("count", *key) % (most - len(pools) + 1)
    shuffled = sorted(range(len(every)), key=lambda place: digest("concept", *map(str, key), str(place)))
    firsts = [next(place for place in shuffled if every[place][0] == side) for side in range(len(pools))]
    others = [place for place in shuffled if place not in firsts]
    chosen = sorted([*firsts, *others[: count - len(firsts)]])
    return tuple(sessions[place][0] for place in places), tuple(every[place][1] for place in chosen)


def _told(places: list[Place], subjects: list[_Subject], asks: list[Ask]) -> dict[str, dict[str, int]]:
    """Subjects and questions of each discipline, as the step's record says them."""
    counts = {" > ".join(one.path): {"subjects": 0, "questions": 0} for one in places}
    for subject in subjects:
        counts[" > ".join(subject.place.path)]["subjects"] += 1
    for ask in asks:
        counts[" > ".join(ask.about["path"])]["questions"] += 1
    return counts
