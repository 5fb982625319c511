"""Preference pairs out of several answers to one prompt, ranked by a language model."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any, ClassVar, Literal

import pyarrow as pa

from ..asking import seed_of
from ..door import ChatAnswer, ChatRequest, Sampling
from ..folder import HouseError
from ..measures.judge_scores import COMPARE, RUBRICS, Rubric, better, expectation, rating
from ..preferring import Said, distinct, grouped, heard, of_length, pair_row, questions, samples, usable
from ..rows import Row, digest, table
from ..steps import Corpus
from ..synthesis import Ask, Session


@dataclass(frozen=True)
class BestAgainstWorst:
    """Several models answer, the policy among them; a judge ranks; the best answer is paired with the worst, as TÜLU 3
    does on-policy (arXiv 2411.15124), or with a random other one, as UltraFeedback's binarized set does (arXiv
    2310.01377, 2310.16944).

    model: the policy; models: further models of the recipe; each gives `answers` to each prompt. set_name, prompts,
    test_prompts: rows of an earlier set, the lowest by hash of (seed, row_id). temperature, max_tokens: of the answers.

    judge: the model that ranks, with max_tokens judge_tokens, temperature 0. how: `scores` asks for a score of each
    answer by `rubric` (measures.judge_scores); `pairs` asks of each two answers which is better, twice with their
    places swapped (a verdict that turns with the places is a tie), and an answer's score is the share of comparisons
    that it wins, ties half. An answer of the judge that cannot be read is asked for once more, then it abstains: that
    score, or that comparison, is missing, and counted.

    against: `worst` pairs the two answers of the widest gap, `random` the best with one drawn by a hash. margin: least
    gap of their scores, on the rubric's scale or 0 to 1; without any gap there is no pair. length_ratio: the longer has
    at most so many times the characters of the shorter (None: any); the gap is then the widest among pairs that fit.

    Rows: chosen and rejected, parent the prompt's row; meta: score_chosen, score_rejected, the judge, where both come
    from. Parents stay.
    """

    model: str
    judge: str
    models: tuple[str, ...] = ()
    set_name: str = "sft"
    prompts: int = 400
    test_prompts: int = 100
    answers: int = 2
    how: Literal["scores", "pairs"] = "scores"
    rubric: Rubric = "quality"
    against: Literal["worst", "random"] = "worst"
    margin: float = 0.5
    length_ratio: float | None = None
    temperature: float = 1.0
    max_tokens: int = 512
    judge_tokens: int = 128
    seed: int = 0

    scope: ClassVar[Literal["maker"]] = "maker"
    consumes: ClassVar[str | None] = None

    def __post_init__(self) -> None:
        if min(self.prompts, self.test_prompts) < 0 or min(self.answers, self.max_tokens, self.judge_tokens) < 1:
            raise HouseError(f"{self}: prompts is at least 0; answers, max_tokens and judge_tokens at least 1")
        if self.answers * (1 + len(self.models)) < 2:
            raise HouseError(f"{self}: one answer is nothing to rank; give answers: 2, or more models")
        if self.margin < 0 or (self.length_ratio is not None and self.length_ratio < 1):
            raise HouseError(f"{self}: margin is at least 0, length_ratio at least 1")
        if self.rubric not in RUBRICS:
            raise HouseError(f"{self}: no rubric is called {self.rubric!r}; there are {', '.join(RUBRICS)}")

    @property
    def asked(self) -> tuple[str, ...]:
        """Models that it needs besides those whose answers become rows."""
        return (self.judge,)

    def make(self, corpus: Corpus) -> Iterator[pa.Table]:
        """One table of new rows."""
        counts = {"train": self.prompts, "test": self.test_prompts}
        asked = list(questions(corpus, self.set_name, counts, self.seed))
        sampling = Sampling(self.temperature, 1.0, self.max_tokens)
        made: list[Row] = []
        with Session(self, corpus, self.model, "best_against_worst") as session:
            said: list[Said] = []
            for name in (self.model, *self.models):
                author = session if name == self.model else session.beside(name)
                asks = samples(asked, self.answers, sampling, (self.seed, name))
                said += [Said(ask, answer, author) for ask, answer in author.ask(asks) if usable(author, answer)]
            groups = [
                distinct(own, lambda one: one.text) for own in grouped(said, lambda one: one.ask.about.row_id).values()
            ]
            alone = sum(len(own) < 2 for own in groups)
            session.tally.refused.update({"one_answer": alone} if alone else {})
            groups = [own for own in groups if len(own) > 1]
            judge = session.beside(self.judge)
            scores = self._won(judge, groups) if self.how == "pairs" else self._scored(judge, groups)
            for own, worth in zip(groups, scores, strict=True):
                made += self._row(session, judge, own, worth)
        if made:
            yield table(made)

    def _row(self, session: Session, judge: Session, said: Sequence[Said], worth: Sequence[float | None]) -> list[Row]:
        """The pair of one prompt, or none."""
        session.tally.verified += sum(score is not None for score in worth)
        pair, problem = best_pair(
            [one.text for one in said],
            worth,
            margin=self.margin,
            ratio=self.length_ratio,
            against=self.against,
            seed=(self.seed, said[0].ask.about.row_id),
        )
        if pair is None:
            session.refused(problem)
            return []
        best, worst = pair
        form = COMPARE if self.how == "pairs" else RUBRICS[self.rubric].form
        about: dict[str, Any] = {"score_chosen": worth[best], "score_rejected": worth[worst], "answers": len(said)}
        told = {"model": judge.chat.name, "model_digest": judge.chat.digest, "licence": judge.chat.licence}
        rubric = "pairs" if self.how == "pairs" else self.rubric
        about["judge"] = told | {"rubric": rubric, "prompt_digest": digest("prompt", form)}
        return [pair_row(said[best], said[worst], about)]

    def _ask(self, one: Said, text: str, *names: object, options: tuple[str, ...] = ()) -> Ask:
        sampling = Sampling(temperature=0.0, max_tokens=self.judge_tokens, options=options)
        seed = seed_of("rank", self.seed, one.ask.about.row_id, *names)
        return Ask(ChatRequest((("user", text),), seed, sampling), None, one.ask.parents)

    def _scored(self, judge: Session, groups: Sequence[Sequence[Said]]) -> list[list[float | None]]:
        """Of each prompt the score of each answer by the rubric."""
        rubric = RUBRICS[self.rubric]
        low, high = rubric.low, rubric.high
        options = tuple(map(str, range(low, high + 1))) if rubric.expected else ()

        def read(answer: ChatAnswer) -> float | None:
            if rubric.expected and answer.options is not None:
                return expectation(answer.options, low)
            return rating(answer.text, low, high)

        asks = [
            self._ask(
                one,
                rubric.form.format(question=one.ask.about.said, response=one.text, low=low, high=high),
                one.text,
                options=options,
            )
            for own in groups
            for one in own
        ]
        told = iter(heard(judge, asks, read))
        return [[next(told) for _ in own] for own in groups]

    def _won(self, judge: Session, groups: Sequence[Sequence[Said]]) -> list[list[float | None]]:
        """Of each prompt the share of comparisons that each answer wins."""
        asks = []
        for own in groups:
            for one, other in combinations(own, 2):
                for first, second in ((one, other), (other, one)):
                    text = COMPARE.format(question=one.ask.about.said, first=first.text, second=second.text)
                    asks.append(self._ask(one, text, first.text, second.text))
        told = iter(heard(judge, asks, lambda answer: better(answer.text)))
        scores: list[list[float | None]] = []
        for own in groups:
            wins: list[list[float]] = [[] for _ in own]
            for i, j in combinations(range(len(own)), 2):
                before, swapped = next(told), next(told)
                if before is not None and swapped is not None:
                    value = before if before == 1 - swapped else 0.5
                    wins[i].append(value)
                    wins[j].append(1 - value)
            scores.append([sum(own_wins) / len(own_wins) if own_wins else None for own_wins in wins])
        return scores


def best_pair(
    texts: Sequence[str],
    scores: Sequence[float | None],
    *,
    margin: float,
    ratio: float | None = None,
    against: Literal["worst", "random"] = "worst",
    seed: Sequence[object] = (),
) -> tuple[tuple[int, int] | None, str]:
    """(place of the chosen answer, of the rejected one), and why there is none: judge_abstains (fewer than two scores),
    margin, length. Ties are drawn by a hash of `seed` and the texts."""
    known = [(place, score) for place, score in enumerate(scores) if score is not None]
    if len(known) < 2:
        return None, "judge_abstains"
    gaps = {(i, j): s - t for i, s in known for j, t in known if s - t >= margin and s > t}
    if not gaps:
        return None, "margin"
    fitting = [pair for pair in gaps if of_length(texts[pair[0]], texts[pair[1]], ratio)]
    if not fitting:
        return None, "length"

    def drawn(pair: tuple[int, int]) -> str:
        return digest(*map(str, seed), texts[pair[0]], texts[pair[1]])

    if against == "worst":
        return min(fitting, key=lambda pair: (-gaps[pair], drawn(pair))), ""
    worth = dict(known)
    top = max(worth[i] for i, _ in fitting)
    return min((pair for pair in fitting if worth[pair[0]] == top), key=drawn), ""
