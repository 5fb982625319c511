"""A maker of instructions to texts that people wrote: the answer comes first."""

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

import pyarrow as pa

from ..door import ChatAnswer, Sampling
from ..folder import HouseError
from ..instructing import Instruction, Seed, drawn, seeds
from ..measures.judge_scores import rating
from ..preferring import heard
from ..rows import Row, digest, message, table
from ..steps import Corpus
from ..synthesis import Ask, Session, asking, prompt
from ..text.outlines import lone_instruction
from ..text.sections import sections
from ..text.view import normal, words

FORMS = {
    "instruction": "an instruction",
    "question": "a question",
    "query": "a search query of a few words",
}
ECHO = 12  # words of an instruction from which on it must not stand in the text as it is


@dataclass(frozen=True)
class BackTranslation:
    """SFT rows whose answer is a text as somebody wrote it, byte for byte, and whose instruction `model` writes for it
    (instruction back-translation, arXiv 2308.06259; LongForm, arXiv 2304.08460).

    Texts are documents (rows with `text`) and rows with a lone assistant turn: live ones, or those of split train of
    the earlier set `set_name`; of `least` to `most` characters, others are not asked about; window: each text is first
    cut into sections of at most so many characters, at the borders of its paragraphs, and each section is a text of its
    own, without the white space around it (None: texts stay whole); limit: of them, the lowest by a hash. Rows with a
    text that came to a row leave the set with reason source_document and stay in its lineage as parents.

    form: `instruction`, or one of LongForm's other ways to ask: `question`, `query` (as into a search engine); several
    are drawn by a hash of the text's row_id. examples: rows of the earlier set `seeds_set` shown in each request, their
    answer first; the paper instead trains the model on such pairs turned around, which a recipe can do in a stage
    before. candidates: instructions asked for of each text; different ones count.

    at_least: self-curation: `judge` (None: `model` itself) rates each pair from 1 to 5, and the best of each text is
    kept where it reaches this (4 and 4.5 in the paper); None: nothing is rated, and the first
    candidate kept. A rating that cannot be read is asked for twice, then the pair is turned down (judge_abstains).
    margin: ours, against raters that like everything: the text is also rated as the answer to another text's
    instruction, and the rating has to be higher by this. An instruction of twelve words or more that the text itself
    holds is turned down (echo).

    system: a turn before the instruction, such as the paper's mark of text from the web. temperature, top_p,
    max_tokens: of instructions; judge_tokens: of ratings. meta: form, rating, contrast (under margin), examples,
    section (under window: its first character and the one after its last). The step's record: `not_asked`, by reason,
    and `ratings`.
    """

    model: str
    judge: str | None = None
    set_name: str | None = None
    seeds_set: str | None = None
    examples: int = 2
    limit: int | None = None
    least: int = 200
    most: int = 6000
    window: int | None = None
    form: tuple[str, ...] = ("instruction",)
    candidates: int = 1
    at_least: float | None = 4.0
    margin: float | None = None
    system: str = ""
    temperature: float = 0.7
    top_p: float = 0.9
    max_tokens: int = 192
    judge_tokens: int = 128
    seed: int = 0

    scope: ClassVar[Literal["maker"]] = "maker"
    consumes: ClassVar[str | None] = "source_document"

    def __post_init__(self) -> None:
        if not self.form or not set(self.form) <= FORMS.keys():
            raise HouseError(f"{self}: form is one or more of {', '.join(FORMS)}")
        if min(self.candidates, self.max_tokens, self.judge_tokens, self.least) < 1 or self.most < self.least:
            raise HouseError(f"{self}: candidates, tokens and least are at least 1, most at least `least`")
        if self.window is not None and self.window < self.least:
            raise HouseError(f"{self}: sections of at most window {self.window} are shorter than least {self.least}")
        if self.at_least is None and (self.margin is not None or self.judge is not None):
            raise HouseError(f"{self}: margin and judge belong to self-curation: give at_least too")
        if self.examples < 0 or (self.at_least is not None and not 1 <= self.at_least <= 5):
            raise HouseError(f"{self}: examples is at least 0, at_least 1 to 5")

    @property
    def asked(self) -> tuple[str, ...]:
        """Models that it needs besides the one whose instructions become rows."""
        return () if self.judge is None else (self.judge,)

    def make(self, corpus: Corpus) -> Iterator[pa.Table]:
        """One table of new rows."""
        with Session(self, corpus, self.model, "back_translation") as session:
            texts, lost = self._texts(corpus)
            corpus.record(not_asked=dict(sorted(lost.items())))
            pairs = self._pairs(session, texts)
            rated = [_Rated(one) for one in pairs] if self.at_least is None else self._rated(session, pairs)
            rows = [self._row(session, one) for one in self._chosen(session, rated)]
            if rows:
                yield table(rows)

    def _texts(self, corpus: Corpus) -> tuple[list["_Text"], Counter[str]]:
        lost: Counter[str] = Counter()
        found = []
        names = ["row_id", "messages", "chosen", "rejected", "text"]
        parts: Iterable[pa.Table]
        parts = corpus.tables(names) if self.set_name is None else corpus.tools.curated(self.set_name, "train")
        for part in parts:
            for row in part.select(names).to_pylist():
                text = text_of(row)
                pieces = [] if text is None else list(self._pieces(row["row_id"], text))
                fitting = [one for one in pieces if self.least <= len(one.text) <= self.most]
                found += fitting
                short = sum(len(one.text) < self.least for one in pieces)
                lost.update({"no_text": text is None, "short": short, "long": len(pieces) - len(fitting) - short})
        lost = +lost  # without what is 0
        ordered = sorted(found, key=lambda one: digest(str(self.seed), *map(str, one.key)))
        return ordered[: self.limit], lost

    def _pieces(self, row_id: str, text: str) -> Iterator["_Text"]:
        """The text, or its sections."""
        if self.window is None:
            yield _Text(row_id, text)
            return
        for start, end in sections(text, self.window):
            piece = text[start:end]
            start += len(piece) - len(piece.lstrip())
            if piece.strip():
                yield _Text(row_id, piece.strip(), (start, start + len(piece.strip())))

    def _pairs(self, session: Session, texts: Sequence["_Text"]) -> list[Instruction]:
        """Instructions, their texts in `ask.about`; of one text different ones."""
        shown = self._shown(session.corpus)
        asks = [self._ask(text, shown, draw) for text in texts for draw in range(self.candidates)]
        found: dict[tuple[object, ...], Instruction] = {}
        for ask, answer in session.ask(asks):
            text = ask.about.text
            said = parse_instruction(answer, text)
            if said in PROBLEMS:
                session.unparsed(said)
                continue
            session.tally.parsed += 1
            if len(words(said)) >= ECHO and normal(said) in normal(text):
                session.refused("echo")
            elif (*ask.about.key, normal(said)) in found:
                session.refused("same_instruction")
            else:
                about = {"form": ask.about.form} | ({"examples": list(ask.about.examples)} if shown else {})
                about |= {"section": list(ask.about.section)} if ask.about.section else {}
                found[*ask.about.key, normal(said)] = Instruction(said, ask, answer, ask.parents, about)
        return list(found.values())

    def _shown(self, corpus: Corpus) -> list[Seed]:
        if self.seeds_set is None or not self.examples:
            return []
        found, _ = seeds(corpus, self.seeds_set, None, self.seed)
        fitting = [one for one in found if one.answer is not None and len(one.answer) <= self.most]
        if len(fitting) < self.examples:
            raise HouseError(f"{self}: set {self.seeds_set!r} has {len(fitting)} answered rows to show as examples")
        return fitting

    def _ask(self, text: "_Text", shown: Sequence[Seed], draw: int) -> Ask:
        form = self.form[drawn(len(self.form), 1, "form", self.seed, *text.key)[0]]
        picked = [shown[at] for at in drawn(len(shown), self.examples, "show", self.seed, *text.key)] if shown else []
        examples = "".join(
            f"A text:\n\n<text>\n{one.answer}\n</text>\n\nWhat it answers: {one.text}\n\n" for one in picked
        )
        asked = prompt("back_instruction")
        turns = asked.turns(examples=examples, text=text.text, form=FORMS[form])
        sampling = Sampling(self.temperature, self.top_p, self.max_tokens)
        about = replace(text, form=form, examples=tuple(one.row_id for one in picked))
        return asking(asked, turns, sampling, ("back", self.seed, *text.key, draw), (text.row_id,), about)

    def _rated(self, session: Session, pairs: Sequence[Instruction]) -> list["_Rated"]:
        judge = session if self.judge is None else session.beside(self.judge)
        others = [other_text(pairs, place) if self.margin is not None else None for place in range(len(pairs))]
        asks = [self._rate(one, one) for one in pairs]
        asks += [self._rate(one, other) for one, other in zip(pairs, others, strict=True) if other is not None]
        told = iter(heard(judge, asks, lambda answer: rating(answer.text, 1, 5)))
        scores = [next(told) for _ in pairs]
        against = [None if other is None else next(told) for other in others]
        known = [score for score in scores if score is not None]
        session.tally.verified += len(known)
        session.corpus.record(ratings={str(score): count for score, count in sorted(Counter(known).items())})
        return [_Rated(*one) for one in zip(pairs, scores, against, strict=True)]

    def _rate(self, one: Instruction, other: Instruction) -> Ask:
        """Whether the text of `one` answers the instruction of `other`."""
        form = prompt("back_rate")
        turns = form.turns(instruction=other.text, response=one.ask.about.text)
        sampling = Sampling(temperature=0.0, max_tokens=self.judge_tokens)
        return asking(form, turns, sampling, ("rate", self.seed, *one.ask.about.key, other.text), one.parents)

    def _chosen(self, session: Session, rated: Sequence["_Rated"]) -> list["_Rated"]:
        """Of each text the best pair that is good enough."""
        best: dict[tuple[object, ...], _Rated] = {}
        for one in rated:
            problem = None if self.at_least is None else one.problem(self.at_least, self.margin)
            if problem is not None:
                session.refused(problem)
                continue
            held = best.setdefault(one.pair.ask.about.key, one)
            if held is not one:
                session.refused("other_candidate")
                if (one.score or 0.0) > (held.score or 0.0):
                    best[one.pair.ask.about.key] = one
        return list(best.values())

    def _row(self, session: Session, one: "_Rated") -> Row:
        pair = one.pair
        about: dict[str, Any] = dict(pair.meta)
        about |= {} if one.score is None else {"rating": one.score}
        about |= {} if one.contrast is None else {"contrast": one.contrast}
        turns = [message("system", self.system)] if self.system else []
        turns += [message("user", pair.text), message("assistant", pair.ask.about.text)]
        return session.row(pair.ask, pair.answer, about, messages=turns)


PROBLEMS = ("no_instruction", "cut")


@dataclass(frozen=True)
class _Text:
    row_id: str
    text: str
    section: tuple[int, ...] = ()  # its place in the row's text, where it is a part of it
    form: str = ""
    examples: tuple[str, ...] = ()

    @property
    def key(self) -> tuple[object, ...]:
        return (self.row_id, *self.section)


@dataclass(frozen=True)
class _Rated:
    """score: of the pair; contrast: of the text as the answer to another text's instruction."""

    pair: Instruction
    score: float | None = None
    contrast: float | None = None

    def problem(self, at_least: float, margin: float | None) -> str | None:
        """Why the pair is not kept."""
        if self.score is None:
            return "judge_abstains"
        if self.score < at_least:
            return "low_rating"
        if margin is None:
            return None
        if self.contrast is None:
            return "no_contrast"
        return "margin" if self.score - self.contrast < margin else None


def text_of(row: dict[str, Any]) -> str | None:
    """What a row says unasked: its `text`, or its lone assistant turn."""
    if (row["text"] or "").strip():
        return str(row["text"])
    turns = row["messages"] or []
    alone = len(turns) == 1 and turns[0]["role"] == "assistant" and row["chosen"] is None and row["rejected"] is None
    return turns[0]["content"] if alone and (turns[0]["content"] or "").strip() else None


def parse_instruction(answer: ChatAnswer, text: str) -> str:
    """The instruction of an answer, or one of PROBLEMS. One that is cut off asks for nothing."""
    said = lone_instruction(answer.text)
    return "no_instruction" if said is None else said if answer.finished else "cut"


def other_text(pairs: Sequence[Instruction], place: int) -> Instruction | None:
    """The next pair (from the front again after the last) that is about another text; None where all are about one."""
    own = pairs[place].ask.about.key
    following = (pairs[(place + step) % len(pairs)] for step in range(1, len(pairs)))
    return next((one for one in following if one.ask.about.key != own), None)
