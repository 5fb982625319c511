"""Judges of perplexity: a fixed range, and a share of the corpus."""

from dataclasses import dataclass
from typing import ClassVar, Literal

import pyarrow as pa

from ..flags import ranged
from ..folder import HouseError
from ..measures.perplexity import ResponsePerplexity
from ..selecting.quantiles import check_shares, quantile
from ..steps import Corpus, Measure


@dataclass(frozen=True)
class PerplexityRange:
    """Drops rows whose response has a perplexity outside [low, high] under `model`, given the prompt.

    low: below it the model already knows the answer by heart, or the answer repeats itself; 1.0 drops nothing. high:
    above it the answer does not follow from the prompt, or is noise, by this model's lights; 1000 is loose for a
    model of some billion parameters and tight for one of a few million. Reasons: perplexity_low, perplexity_high, and
    not_scorable where there is no finite-or-infinite number to judge by (null or NaN).
    """

    model: str
    low: float = 1.0
    high: float = 1000.0

    scope: ClassVar[Literal["row"]] = "row"
    reads: ClassVar[tuple[str, ...]] = ()
    score: ClassVar[str | None] = "perplexity"

    def __post_init__(self) -> None:
        if not 0 <= self.low <= self.high:
            raise HouseError(f"{self}: give 0 <= low <= high")

    @property
    def needs(self) -> tuple[Measure, ...]:
        return (ResponsePerplexity(self.model),)

    def limits(self) -> tuple[float | None, float | None]:
        return self.low, self.high

    def judge(self, rows: pa.Table, values: pa.Table) -> pa.Table:
        """Verdicts by `perplexity`, both limits included."""
        return ranged(values["perplexity"], self.low, self.high, "perplexity_low", "perplexity_high")


@dataclass(frozen=True)
class PerplexityQuantile:
    """Drops the shares `drop_lowest` and `drop_highest` of the rows, ranked by perplexity under `model`.

    Shares are of the rows that could be scored, rounded down to whole rows; equal perplexities rank by row_id, so the
    numbers of dropped rows are exact. Reasons: perplexity_low, perplexity_high; not_scorable (null or NaN). Evidence of
    each scored row: its rank from 1 (lowest perplexity), the rows ranked, and, for dropped rows, the perplexity at the
    cut (of the nearest row that is kept).
    """

    model: str
    drop_lowest: float = 0.0
    drop_highest: float = 0.05

    scope: ClassVar[Literal["corpus"]] = "corpus"
    score: ClassVar[str | None] = "perplexity"

    def __post_init__(self) -> None:
        check_shares(self, self.drop_lowest, self.drop_highest)

    @property
    def needs(self) -> tuple[Measure, ...]:
        return (ResponsePerplexity(self.model),)

    def limits(self) -> tuple[float | None, float | None]:
        return None, None  # the cuts follow from the corpus and stand in the evidence

    def judge(self, corpus: Corpus) -> pa.Table:
        """Verdicts for all live rows, in the order of `corpus.tables()`."""
        return quantile(corpus, "perplexity", self.drop_lowest, self.drop_highest)
