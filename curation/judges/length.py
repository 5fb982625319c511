"""Judges of length."""

from dataclasses import dataclass
from typing import ClassVar, Literal

import pyarrow as pa

from ..flags import ranged
from ..folder import HouseError
from ..measures.length import Length
from ..measures.token_length import TokenLength
from ..steps import Measure


@dataclass(frozen=True)
class ResponseLength:
    r"""Drops rows whose response has fewer than `low` or more than `high` words (runs of \w characters).

    low = 1 drops responses without any word, such as an empty or a purely typographic one; high = 2000 words is some
    2,700 tokens of English. Reasons: too_short, too_long. A one-word answer to a question is no defect: raise `low`
    only where long answers are wanted.
    """

    low: int = 1
    high: int = 2000

    scope: ClassVar[Literal["row"]] = "row"
    score: ClassVar[str | None] = "response_words"

    def __post_init__(self) -> None:
        if not 0 <= self.low <= self.high:
            raise HouseError(f"{self}: give 0 <= low <= high")

    @property
    def needs(self) -> tuple[Measure, ...]:
        return (Length(),)

    def limits(self) -> tuple[float | None, float | None]:
        return self.low, self.high

    def judge(self, rows: pa.Table, values: pa.Table) -> pa.Table:
        """Verdicts by `response_words`, both limits included."""
        return ranged(values["response_words"], self.low, self.high, "too_short", "too_long")


@dataclass(frozen=True)
class TokenLengthRange:
    """Drops rows that take fewer than `low` or more than `high` tokens under the tokenizer of `model`, as the trainer
    counts them (measure TokenLength).

    of: total_tokens (default: what must fit a pack), prompt_tokens or response_tokens. Reasons: too_short, too_long,
    and not_scorable where the chat template refuses the row.
    """

    model: str
    low: int = 1
    high: int = 4096
    of: Literal["total_tokens", "prompt_tokens", "response_tokens"] = "total_tokens"

    scope: ClassVar[Literal["row"]] = "row"

    def __post_init__(self) -> None:
        if not 0 <= self.low <= self.high:
            raise HouseError(f"{self}: give 0 <= low <= high")

    @property
    def score(self) -> str | None:
        return self.of

    @property
    def needs(self) -> tuple[Measure, ...]:
        return (TokenLength(self.model),)

    def limits(self) -> tuple[float | None, float | None]:
        return self.low, self.high

    def judge(self, rows: pa.Table, values: pa.Table) -> pa.Table:
        """Verdicts by the column `of`, both limits included."""
        return ranged(values[self.of], self.low, self.high, "too_short", "too_long")
