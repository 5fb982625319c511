"""How sure a language model is that a row's response is right, by asking it: the confidence behind CLEAR."""

import re
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import pyarrow as pa

from ..asking import Exchange, ask, exchange, seed_of
from ..door import ChatAnswer, ChatModel, ChatRequest, Progress, Sampling
from ..folder import HouseError
from ..steps import Tools
from ..text.view import normal

REFLECT = """\
Question: {question}

Proposed answer: {response}

Is the proposed answer (A) correct, (B) incorrect, or (C) are you not sure?
Give a short explanation, then end with one line that says "answer: A", "answer: B" or "answer: C"."""

REFLECT_AGAIN = """\
Question: {question}

Proposed answer: {response}

Are you really sure that the proposed answer is correct? Check it once more and choose:
(A) correct, (B) incorrect, (C) not sure.
Give a short explanation, then end with one line that says "answer: A", "answer: B" or "answer: C"."""

CERTAINTY = {"A": 1.0, "B": 0.0, "C": 0.5}
# a letter after the word "answer" or "choice", or in brackets, or all alone; upper case, since "a" is a word
_CHOICE = re.compile(r"(?i:answer|choice|option)(?i:\s+is)?\W{0,8}([ABC])\b|\(([ABC])\)|^\W*([ABC])\W*$", re.MULTILINE)


@dataclass(frozen=True)
class Confidence:
    """Confidence of the chat model `model` that the row's response is a right answer to its prompt: the score of CLEAR
    (arXiv 2403.12776), by BSDetector (arXiv 2308.16175).

    confidence = beta · consistency + (1 - beta) · reflection, each from 0 to 1. consistency: mean over `samples`
    answers that the model gives to the prompt of alpha · (1 - contradiction) + (1 - alpha) · (answer and response are
    equal after NFKC, case folding and white space); contradiction by the NLI model `nli`, mean of both orders of the
    texts.
    reflection: mean of two questions about the proposed answer, answered (A) correct 1, (B) incorrect 0, (C) not sure
    0.5, at temperature 0; an answer that cannot be read is asked for once more with another seed.

    temperature, max_tokens: of the sampled answers; reflect_tokens: of the reflections. seed: an answer's own seed is a
    hash of it and the row's content. sampled, reflected: answers that came, out of samples and 2; consistency and
    reflection are means over those, null without any, and confidence with them. Failures are counted in a warning.
    """

    model: str
    nli: str
    samples: int = 5
    alpha: float = 0.8
    beta: float = 0.7
    temperature: float = 1.0
    max_tokens: int = 128
    reflect_tokens: int = 128
    seed: int = 0

    version: ClassVar[int] = 1
    columns: ClassVar[dict[str, pa.DataType]] = {
        "confidence": pa.float64(),
        "consistency": pa.float64(),
        "reflection": pa.float64(),
        "sampled": pa.int32(),
        "reflected": pa.int32(),
    }

    def __post_init__(self) -> None:
        if self.samples < 1 or not 0 <= self.alpha <= 1 or not 0 <= self.beta <= 1:
            raise HouseError(f"{self}: samples is at least 1, alpha and beta lie in 0..1")
        if min(self.max_tokens, self.reflect_tokens) < 1 or self.temperature < 0:
            raise HouseError(f"{self}: max_tokens and reflect_tokens are at least 1, temperature at least 0")

    @property
    def models(self) -> tuple[str, ...]:
        return (self.model, self.nli)

    def measure(self, rows: pa.Table, tools: Tools, progress: Progress) -> pa.Table:
        """One row of `columns` for each row, in order."""
        asked = [exchange(row) for row in rows.select(["messages", "chosen", "rejected"]).to_pylist()]
        names = rows["content_id"].to_pylist()
        places = [place for place, item in enumerate(asked) if item is not None]
        items = [item for item in asked if item is not None]
        named = [names[place] for place in places]
        answers, reflected = self._heard(tools.chat(self.model), items, named, progress) if items else ([], [])
        agreement = self._agreement(tools, items, answers)
        self._warn(answers, reflected)
        values: dict[str, list[Any]] = {name: [None] * rows.num_rows for name in self.columns}
        for place, agreed, sure in zip(places, agreement, reflected, strict=True):
            told = [value for value in sure if value is not None]
            values["sampled"][place], values["reflected"][place] = len(agreed), len(told)
            values["consistency"][place] = float(np.mean(agreed)) if agreed else None
            values["reflection"][place] = float(np.mean(told)) if told else None
            if agreed and told:
                share = self.beta * np.mean(agreed) + (1 - self.beta) * np.mean(told)
                values["confidence"][place] = float(share)
        return pa.table({name: pa.array(values[name], kind) for name, kind in self.columns.items()})

    def _heard(
        self, chat: ChatModel, items: Sequence[Exchange], names: Sequence[str], progress: Progress
    ) -> tuple[list[list[str]], list[list[float | None]]]:
        """Of each row the answers that came, and what its two reflections say (None: unreadable)."""
        sampling = Sampling(temperature=self.temperature, top_p=1.0, max_tokens=self.max_tokens)
        requests = [
            ChatRequest(item.turns, seed_of("confidence", self.seed, name, draw), sampling)
            for item, name in zip(items, names, strict=True)
            for draw in range(self.samples)
        ]
        came = chat.complete(requests, progress)
        texts = [answer.text if isinstance(answer, ChatAnswer) else None for answer in came]
        greedy = Sampling(temperature=0.0, max_tokens=self.reflect_tokens)
        questions = [
            ChatRequest(
                (("user", form.format(question=item.question, response=item.response)),),
                seed_of("reflect", self.seed, name, form),
                greedy,
            )
            for item, name in zip(items, names, strict=True)
            for form in (REFLECT, REFLECT_AGAIN)
        ]
        sure = ask(chat, questions, lambda answer: certainty(answer.text), progress)
        size = self.samples
        answers = [[text for text in texts[at : at + size] if text is not None] for at in range(0, len(texts), size)]
        return answers, [sure[at : at + 2] for at in range(0, len(sure), 2)]

    def _agreement(
        self, tools: Tools, items: Sequence[Exchange], answers: Sequence[Sequence[str]]
    ) -> list[list[float]]:
        """alpha · (1 - contradiction) + (1 - alpha) · equality of each answer with its row's response. An answer that
        equals the response in every letter contradicts nothing, and costs no inference."""
        ours = [(item.response, text) for item, own in zip(items, answers, strict=True) for text in own]
        pairs = sorted({pair for one, two in ours if one != two for pair in ((one, two), (two, one))})
        told = tools.entailment(self.nli).probabilities(pairs)[:, 0].tolist() if pairs else []
        contradiction = dict(zip(pairs, told, strict=True))

        def agrees(response: str, answer: str) -> float:
            against = contradiction.get((response, answer), 0.0) + contradiction.get((answer, response), 0.0)
            same = float(normal(response) == normal(answer))
            return self.alpha * (1 - float(against) / 2) + (1 - self.alpha) * same

        return [[agrees(item.response, text) for text in own] for item, own in zip(items, answers, strict=True)]

    def _warn(self, answers: Sequence[Sequence[str]], reflected: Sequence[Sequence[float | None]]) -> None:
        lost = self.samples * len(answers) - sum(map(len, answers))
        unread = sum(value is None for own in reflected for value in own)
        if lost or unread:
            warnings.warn(
                f"Confidence: {lost} of {self.samples * len(answers)} sampled answers failed, and {unread} of"
                f" {2 * len(reflected)} reflections could not be read, of {len(answers)} rows",
                stacklevel=3,
            )


def certainty(text: str) -> float | None:
    """What an answer to a reflection says, by the last letter that it chooses; None where it chooses none, or lists
    several in its last line."""
    found = list(_CHOICE.finditer(text))
    if not found:
        return None
    line = text.rfind("\n", 0, found[-1].start()) + 1
    last = {next(filter(None, match.groups())) for match in found if match.start() >= line}
    return CERTAINTY[last.pop()] if len(last) == 1 else None
