"""Preference pairs out of a model's own answers: the reference is chosen, what the model says instead is rejected."""

import heapq
import json
import warnings
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import pyarrow as pa

from ..door import ChatAnswer, ChatError, ChatRequest, Sampling
from ..folder import HouseError
from ..rows import Row, digest, made_row, table
from ..steps import Corpus
from ..text.view import normal


@dataclass(frozen=True)
class PreferenceFromModel:
    """Preference rows from the curated set `set_name` of this run: prompt = all turns before the last assistant turn,
    chosen = that turn, rejected = an answer sampled from `model` (as in SPIN, arXiv 2401.01335).

    model: a training stage (its final model answers) or a model of the recipe. prompts, test_prompts: rows taken of
    the split `train` and of the held-out split `test`, the lowest by hash of (seed, row_id). max_tokens, temperature:
    of the sampling; each request's seed is a hash of (seed, row_id), so an answer depends on no other. A row without
    an assistant turn, and an answer that failed, is empty or equals the reference, gives no pair; their numbers are
    told in a warning. meta: {sampled_tokens, finished, model}; finished is false where max_tokens cut the answer.
    """

    model: str
    set_name: str = "sft"
    prompts: int = 400
    test_prompts: int = 100
    max_tokens: int = 64
    temperature: float = 1.0
    seed: int = 0

    scope: ClassVar[Literal["maker"]] = "maker"
    consumes: ClassVar[str | None] = None

    def __post_init__(self) -> None:
        if min(self.prompts, self.test_prompts) < 0 or self.max_tokens < 1 or self.temperature < 0:
            raise HouseError(f"{self}: prompts and temperature are at least 0, max_tokens at least 1")

    def make(self, corpus: Corpus) -> Iterator[pa.Table]:
        """One table of new rows."""
        rows = [*self._drawn(corpus, "train", self.prompts), *self._drawn(corpus, "test", self.test_prompts)]
        lost: Counter[str] = Counter()
        asked = []
        for row in rows:
            parts = prompt_and_reference(row["messages"])
            if parts is None:
                lost["no_reference"] += 1
            else:
                asked.append((row["row_id"], *parts))
        chat = corpus.tools.chat(self.model)
        requests = [self._request(name, prompt) for name, prompt, _ in asked]
        answers = chat.complete(requests, corpus.progress) if requests else []
        made: list[Row] = []
        for (name, prompt, reference), answer in zip(asked, answers, strict=True):
            problem = unusable(answer, reference["content"])
            if problem is not None or isinstance(answer, ChatError):
                lost[problem or "error"] += 1
                continue
            about = {"sampled_tokens": answer.tokens, "finished": answer.finished, "model": chat.name}
            rejected = [{"role": "assistant", "content": answer.text}]
            content = {"messages": prompt, "chosen": [reference], "rejected": rejected, "meta": json.dumps(about)}
            made.append(made_row(repr(self), [name], len(made), "preference_from_model", **content))
        if lost:
            told = ", ".join(f"{count} {problem}" for problem, count in sorted(lost.items()))
            warnings.warn(
                f"PreferenceFromModel: {len(made)} pairs of {len(rows)} rows; without a pair: {told}", stacklevel=2
            )
        if made:
            yield table(made)

    def _drawn(self, corpus: Corpus, split: str, count: int) -> list[Row]:
        """`count` rows of a split, the lowest by hash, in the order of the hash."""
        if count == 0:
            return []
        parts = corpus.tools.curated(self.set_name, split)
        rows = (row for part in parts for row in part.select(["row_id", "messages"]).to_pylist())
        return heapq.nsmallest(count, rows, key=lambda row: digest(str(self.seed), row["row_id"]))

    def _request(self, name: str, prompt: list[dict[str, Any]]) -> ChatRequest:
        seed = int(digest("sample", str(self.seed), name)[:8], 16)
        sampling = Sampling(temperature=self.temperature, max_tokens=self.max_tokens)
        return ChatRequest(tuple((turn["role"], turn["content"] or "") for turn in prompt), seed, sampling)


def prompt_and_reference(messages: list[dict[str, Any]] | None) -> tuple[list[dict[str, Any]], dict[str, Any]] | None:
    """The turns before the last assistant turn, and that turn; None where one of them is missing or empty."""
    messages = messages or []
    last = max((i for i, turn in enumerate(messages) if turn["role"] == "assistant"), default=0)
    if last == 0 or not (messages[last]["content"] or "").strip():
        return None
    return messages[:last], messages[last]


def unusable(answer: ChatAnswer | ChatError, reference: str) -> str | None:
    """Why an answer cannot be the rejected side of a pair, or None."""
    if isinstance(answer, ChatError):
        return answer.kind
    if not answer.text.strip():
        return "empty"
    return "equal" if normal(answer.text) == normal(reference) else None
