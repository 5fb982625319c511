"""Judges of perplexity: a fixed range, and a share of the corpus."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, ClassVar, Literal

import pyarrow as pa

from ..folder import HouseError
from ..measures.perplexity import ResponsePerplexity
from ..steps import Corpus, Measure, verdicts

NOT_SCORABLE = "not_scorable"


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
        scores = values["perplexity"].to_pylist()
        reasons = [self._reason(score) for score in scores]
        return verdicts([reason is None for reason in reasons], reasons, scores)

    def _reason(self, score: float | None) -> str | None:
        if score is None or math.isnan(score):
            return NOT_SCORABLE
        if score < self.low:
            return "perplexity_low"
        return "perplexity_high" if score > self.high else None


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
        if not (self.drop_lowest >= 0 and self.drop_highest >= 0 and self.drop_lowest + self.drop_highest < 1):
            raise HouseError(f"{self}: give shares of at least 0 whose sum is below 1")

    @property
    def needs(self) -> tuple[Measure, ...]:
        return (ResponsePerplexity(self.model),)

    def limits(self) -> tuple[float | None, float | None]:
        return None, None  # the cuts follow from the corpus and stand in the evidence

    def judge(self, corpus: Corpus) -> pa.Table:
        """Verdicts for all live rows, in the order of `corpus.tables()`."""
        scores = corpus.values(["perplexity"])["perplexity"].to_pylist()
        names = [name for table in corpus.tables(["row_id"]) for name in table["row_id"].to_pylist()]
        reasons: list[str | None] = [NOT_SCORABLE] * len(scores)
        evidence: list[dict[str, Any] | None] = [None] * len(scores)
        order = ranked(scores, names)
        low = int(Fraction(str(self.drop_lowest)) * len(order))
        high = len(order) - int(Fraction(str(self.drop_highest)) * len(order))
        for rank, index in enumerate(order):
            reasons[index] = "perplexity_low" if rank < low else "perplexity_high" if rank >= high else None
            proof: dict[str, Any] = {"rank": rank + 1, "rows": len(order)}
            if reasons[index] is not None:
                cut = scores[order[low if rank < low else high - 1]]
                proof["cut"] = cut if cut is not None and math.isfinite(cut) else str(cut)
            evidence[index] = proof
        return verdicts([reason is None for reason in reasons], reasons, scores, evidence)


def ranked(scores: Sequence[float | None], names: Sequence[str]) -> list[int]:
    """Indices of the scores that are numbers, ascending, ties by name."""
    known = [(score, name, i) for i, (score, name) in enumerate(zip(scores, names, strict=True)) if score is not None]
    return [index for score, _, index in sorted(entry for entry in known if not math.isnan(entry[0]))]
