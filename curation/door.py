"""The door to language models: what curation asks of one. Implementations live elsewhere and are handed in by flows."""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt
import pyarrow as pa

Progress = Callable[[int, int], None]
"""Called with (done, total)."""


@dataclass(frozen=True)
class Sampling:
    """How to sample. temperature 0 is greedy; `max_tokens` counts new tokens; top_p is nucleus sampling. options: short
    texts, such as digits, whose log-probabilities as the answer's beginning are wanted. stop: texts before which the
    answer ends. schema: JSON of a JSON schema that the answer is held to where the door offers structured output (else
    it is no more than a wish: parse with care)."""

    temperature: float = 0.8
    top_p: float = 0.95
    max_tokens: int = 128
    logprobs: bool = False
    options: tuple[str, ...] = ()
    stop: tuple[str, ...] = ()
    schema: str | None = None


@dataclass(frozen=True)
class ChatRequest:
    """One conversation to continue. `seed` makes this request's answer independent of its batch."""

    messages: tuple[tuple[str, str], ...]  # (role, content)
    seed: int
    sampling: Sampling = Sampling()


@dataclass(frozen=True)
class ChatAnswer:
    text: str
    prompt_tokens: int
    tokens: int
    finished: bool  # ended by its own end-of-turn token, not cut by max_tokens
    logprobs: tuple[float, ...] | None = None
    options: tuple[float, ...] | None = None  # of the request's options, in order; None where the door cannot tell
    cached: bool = False  # asked and paid for before


KINDS = (
    "too_long",  # the prompt leaves no room in the model's context; found before it is sent where that can be
    "refused",  # by the chat template, or by the server (a 4xx that no retry mends)
    "timeout",  # no answer by the request's deadline, retries included
    "server",  # 5xx, retries included
    "rate_limited",  # 429, retries included
    "connection",  # reset, refused or cut off, retries included
    "malformed",  # an answer that is no chat completion
    "budget",  # not asked: the run's budget of tokens or money is spent
)


@dataclass(frozen=True)
class ChatError:
    """A typed failure of one request: `kind` is one of KINDS."""

    kind: str
    detail: str


class ChatModel(Protocol):
    """Batched chat completion."""

    name: str
    digest: str  # of weights, tokenizer and chat template; of a server that tells neither, of its address and model
    licence: str  # or terms, under which its answers may be used; "unknown" where nobody said
    price: tuple[float, float]  # of a million prompt tokens and of a million new ones, in the user's currency

    def complete(
        self, requests: Sequence[ChatRequest], progress: Progress | None = None
    ) -> list[ChatAnswer | ChatError]:
        """One answer or error per request, in order; never raises for one bad request."""


@runtime_checkable
class StreamingChat(Protocol):
    """A ChatModel that can hand out answers as they come."""

    def stream(self, requests: Sequence[ChatRequest]) -> Iterator[tuple[int, ChatAnswer | ChatError]]:
        """(place in `requests`, answer or error), each place once, in the order in which answers come."""


def cost(price: tuple[float, float], prompt_tokens: int, tokens: int) -> float:
    """Money, in the currency of a ChatModel's price."""
    return (prompt_tokens * price[0] + tokens * price[1]) / 1e6


@dataclass
class Requests:
    """What became of requests: asked = answered + failed (by kind of error); answered = parsed + unparsed (by reason).
    cached: answers paid for before; tokens are of all answers, cost of those that were not."""

    asked: int = 0
    answered: int = 0
    failed: Counter[str] = field(default_factory=Counter)
    parsed: int = 0
    unparsed: Counter[str] = field(default_factory=Counter)
    cached: int = 0
    prompt_tokens: int = 0
    tokens: int = 0
    cost: float = 0.0

    def count(self, answer: ChatAnswer | ChatError, price: tuple[float, float]) -> None:
        """What came for one request. price: as a ChatModel's."""
        if isinstance(answer, ChatError):
            self.failed[answer.kind] += 1
            return
        self.answered += 1
        self.prompt_tokens += answer.prompt_tokens
        self.tokens += answer.tokens
        self.cached += answer.cached
        if not answer.cached:
            self.cost += cost(price, answer.prompt_tokens, answer.tokens)

    def record(self) -> dict[str, Any]:
        """As the step's record holds it."""
        return {name: dict(sorted(v.items())) if isinstance(v, Counter) else v for name, v in vars(self).items()}


class ResponseScorer(Protocol):
    """Log-probabilities of responses under a causal LM, given their prompts, with the model's own chat template."""

    digest: str

    def response_scores(self, rows: pa.Table, progress: Progress | None = None, *, alone: bool = False) -> pa.Table:
        """For each row, in order: `tokens` (int32, trained assistant tokens), `nll` (float64, sum of their negative
        log-probabilities in nats), `mean_prob` and `min_prob` (float64), `prompt_tokens` (int32, before the first of
        them); all null where nothing could be scored (no assistant turn; longer than the model's context).

        alone: also `alone_nll` (float64): the same tokens after nothing but the opening of an assistant's turn."""


class Embedder(Protocol):
    """Texts as vectors."""

    digest: str
    dims: int

    def embed(self, texts: Sequence[str], progress: Progress | None = None) -> npt.NDArray[np.float32]:
        """Shape (len(texts), dims), each of unit length; an empty text may be all zeros. A text's vector does not
        depend on the texts beside it beyond rounding."""


class EntailmentModel(Protocol):
    """Natural language inference: does the second text follow from the first?"""

    digest: str

    def probabilities(
        self, pairs: Sequence[tuple[str, str]], progress: Progress | None = None
    ) -> npt.NDArray[np.float32]:
        """Shape (len(pairs), 3): contradiction, entailment, neutral; each row sums to 1."""
