"""What a language model says when it is asked to judge: scores of a row, and which answer of a pair is better."""

import re
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np
import pyarrow as pa

from ..asking import Exchange, ask, exchange, seed_of
from ..door import ChatAnswer, ChatRequest, Progress, Sampling
from ..folder import HouseError
from ..steps import Tools

Rubric = Literal["quality", "difficulty", "deita_complexity", "deita_quality"]


@dataclass(frozen=True)
class _Question:
    """form: with {question}, {response}, {low} and {high}. expected: the answer is a bare number, whose expectation is
    wanted where the door tells the numbers' probabilities."""

    form: str
    low: int
    high: int
    expected: bool = False


RUBRICS: dict[Rubric, _Question] = {
    "quality": _Question(
        """\
An assistant was given this instruction:

{question}

and gave this response:

{response}

Rate the response for accuracy: is what it says true, complete, and what the instruction asks for? Use a score from \
{low} to {high}, where a higher score is a more accurate response.
Answer with one line "score: NUMBER" first, then explain it in a sentence or two.""",
        0,
        5,
    ),
    "difficulty": _Question(
        """\
Here is an instruction for an assistant:

{question}

Rate how difficult it is to answer well: how much knowledge, reasoning and how many steps or constraints it takes. Use \
a score from {low} to {high}, where a higher score is a more difficult instruction. Do not answer the instruction.
Answer with one line "score: NUMBER" first, then explain it in a sentence.""",
        1,
        10,
    ),
    "deita_complexity": _Question(
        """\
Please identify the complexity score of the following user query, from {low} to {high}. Answer with the number alone.
##Query: {question}
##Complexity: """,
        1,
        6,
        expected=True,
    ),
    "deita_quality": _Question(
        """\
Please identify the quality score of the response to the question, from {low} to {high}. Answer with the number alone.
#Question#: {question}
#Response#: {response}
##Quality: """,
        1,
        6,
        expected=True,
    ),
}
COMPARE = """\
Question: {question}

Answer A:
{first}

Answer B:
{second}

Which answer is better: more correct, more helpful, more to the point? Neither their order nor their length matters.
Say in one sentence why, then end with one line that says "better: A", "better: B" or "better: tie"."""

_NUMBER = r"(-?\d+(?:\.\d+)?)"
_NAMED = re.compile(r"(?i:score|rating|quality|complexity|difficulty)\W{0,8}(?:is\W{1,4})?" + _NUMBER)
_ANY = re.compile(r"(?<![\w.])" + _NUMBER + r"(?![\w%])")
_BETTER = re.compile(r"(?i:better|winner|verdict|answer is)\W{0,8}(?i:answer\W{0,3})?([AB]|(?i:tie))\b|\[\[([ABC])\]\]")


@dataclass(frozen=True)
class JudgeScores:
    """A score that the chat model `model` gives to each row by a `rubric`.

    quality: accuracy of the response, 0 to 5 (AlpaGasus, arXiv 2307.08701, which keeps 4.5 and above). difficulty: of
    the instruction, 1 to 10. deita_complexity of the instruction and deita_quality of the response, 1 to 6 (DEITA,
    arXiv 2312.15685): where the model's door tells the probabilities of the six numbers as the answer's beginning,
    their expectation; else the number it says. low, high: another scale than the rubric's own.

    judge_score: null where the row has no prompt or response, and where no number on the scale could be read, neither
    in the first answer (temperature 0) nor in a second one with another seed; a warning counts these. max_tokens: of an
    answer. seed: a request's seed is a hash of it and the row's content.
    """

    model: str
    rubric: Rubric = "quality"
    low: int | None = None
    high: int | None = None
    max_tokens: int = 96
    seed: int = 0

    version: ClassVar[int] = 1
    columns: ClassVar[dict[str, pa.DataType]] = {"judge_score": pa.float64()}

    def __post_init__(self) -> None:
        if self.rubric not in RUBRICS:
            raise HouseError(f"{self}: no rubric is called {self.rubric!r}; there are {', '.join(RUBRICS)}")
        low, high = self.scale
        if not 0 <= low < high or self.max_tokens < 1:
            raise HouseError(f"{self}: give 0 <= low < high and max_tokens of at least 1")

    @property
    def models(self) -> tuple[str, ...]:
        return (self.model,)

    @property
    def scale(self) -> tuple[int, int]:
        """The lowest and the highest score."""
        own = RUBRICS[self.rubric]
        return (own.low if self.low is None else self.low), (own.high if self.high is None else self.high)

    def measure(self, rows: pa.Table, tools: Tools, progress: Progress) -> pa.Table:
        """One row of `columns` for each row, in order."""
        asked = [exchange(row) for row in rows.select(["messages", "chosen", "rejected"]).to_pylist()]
        places = [place for place, item in enumerate(asked) if item is not None]
        names = rows["content_id"].take(pa.array(places, pa.int64())).to_pylist()
        items = [item for item in asked if item is not None]
        requests = [self._request(item, name) for item, name in zip(items, names, strict=True)]
        scores = ask(tools.chat(self.model), requests, self._read, progress) if requests else []
        _warn(f"JudgeScores({self.rubric})", scores)
        values: list[float | None] = [None] * rows.num_rows
        for place, score in zip(places, scores, strict=True):
            values[place] = score
        return pa.table({"judge_score": pa.array(values, pa.float64())})

    def _request(self, item: Exchange, name: str) -> ChatRequest:
        low, high = self.scale
        rubric = RUBRICS[self.rubric]
        text = rubric.form.format(question=item.question, response=item.response, low=low, high=high)
        options = tuple(map(str, range(low, high + 1))) if rubric.expected else ()
        sampling = Sampling(temperature=0.0, max_tokens=self.max_tokens, options=options)
        return ChatRequest((("user", text),), seed_of("judge", self.seed, self.rubric, name), sampling)

    def _read(self, answer: ChatAnswer) -> float | None:
        low, high = self.scale
        if RUBRICS[self.rubric].expected and answer.options is not None:
            return expectation(answer.options, low)
        return rating(answer.text, low, high)


@dataclass(frozen=True)
class PairPreference:
    """Which answer of a preference row the chat model `model` finds better, asked twice with the answers swapped, so
    that a taste for the first or the second place shows (Zheng et al., arXiv 2306.05685).

    preference: 1 where both verdicts are for `chosen`, 0 where both are for `rejected`, 0.5 for a tie, which two
    verdicts that contradict each other are too; consistent: whether the two agree. Null for other rows than preference
    rows, and where a verdict could not be read twice; a warning counts these. max_tokens: of an answer. seed: a
    request's seed is a hash of it and the row's content.
    """

    model: str
    max_tokens: int = 128
    seed: int = 0

    version: ClassVar[int] = 1
    columns: ClassVar[dict[str, pa.DataType]] = {"preference": pa.float64(), "consistent": pa.bool_()}

    @property
    def models(self) -> tuple[str, ...]:
        return (self.model,)

    def measure(self, rows: pa.Table, tools: Tools, progress: Progress) -> pa.Table:
        """One row of `columns` for each row, in order."""
        requests, places = [], []
        for place, row in enumerate(rows.select(["content_id", "messages", "chosen", "rejected"]).to_pylist()):
            both = (
                None if row["chosen"] is None or row["rejected"] is None else (exchange(row), exchange(row, "rejected"))
            )
            if both is not None and both[0] is not None and both[1] is not None:
                requests += self._requests(both[0], both[1].response, row["content_id"])
                places.append(place)
        told = ask(tools.chat(self.model), requests, lambda answer: better(answer.text), progress) if requests else []
        _warn("PairPreference", told)
        preference: list[float | None] = [None] * rows.num_rows
        consistent: list[bool | None] = [None] * rows.num_rows
        for place, first, swapped in zip(places, told[::2], told[1::2], strict=True):
            if first is not None and swapped is not None:
                consistent[place] = first == 1 - swapped
                preference[place] = first if consistent[place] else 0.5
        return pa.table(
            {"preference": pa.array(preference, pa.float64()), "consistent": pa.array(consistent, pa.bool_())}
        )

    def _requests(self, chosen: Exchange, rejected: str, name: str) -> list[ChatRequest]:
        sampling = Sampling(temperature=0.0, max_tokens=self.max_tokens)
        return [
            ChatRequest(
                (("user", COMPARE.format(question=chosen.question, first=first, second=second)),),
                seed_of("compare", self.seed, name, order),
                sampling,
            )
            for order, (first, second) in enumerate(((chosen.response, rejected), (rejected, chosen.response)))
        ]


def expectation(logprobs: Sequence[float], low: int) -> float | None:
    """Mean of low, low + 1, … under the probabilities given by their logarithms, made to sum to 1; None where the model
    gives none of them any probability."""
    logs = np.asarray(logprobs, np.float64)
    if np.isnan(logs).any() or not np.isfinite(logs.max(initial=-np.inf)):
        return None
    weights = np.exp(logs - logs.max())
    return float(weights @ np.arange(low, low + len(logs)) / weights.sum())


def rating(text: str, low: float, high: float) -> float | None:
    """The number that an answer gives as its score: after the word score (or what is rated), else its first number;
    None where there is none or it lies off the scale."""
    found = _NAMED.search(text) or _ANY.search(text)
    if found is None:
        return None
    value = float(found[1])
    return value if low <= value <= high else None


def better(text: str) -> float | None:
    """1 where an answer to COMPARE prefers A, 0 for B, 0.5 for a tie, by its last verdict; None without one."""
    found = list(_BETTER.finditer(text))
    if not found:
        return {"a": 1.0, "b": 0.0, "tie": 0.5}.get(text.strip(" .\n*[]()").lower())
    return {"a": 1.0, "b": 0.0, "c": 0.5, "tie": 0.5}[(found[-1][1] or found[-1][2]).lower()]


def _warn(who: str, values: Sequence[float | None]) -> None:
    lost = sum(value is None for value in values)
    if lost:
        warnings.warn(f"{who}: {lost} of {len(values)} answers failed or could not be read, twice", stacklevel=3)
