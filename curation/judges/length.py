"""Judges of length."""

from dataclasses import dataclass
from typing import ClassVar, Literal

import pyarrow as pa

from ..folder import HouseError
from ..measures.length import Length
from ..steps import Measure, verdicts


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
    reads: ClassVar[tuple[str, ...]] = ()
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
        counts = values["response_words"].to_pylist()
        reasons = ["too_short" if n < self.low else "too_long" if n > self.high else None for n in counts]
        return verdicts([reason is None for reason in reasons], reasons, counts)
