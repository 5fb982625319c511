"""CLEAR's filter: drop what the model is least sure is right."""

from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from ..duplicates.survivors import json_column
from ..folder import HouseError
from ..steps import VERDICT, Corpus, Measure


@dataclass(frozen=True)
class ConfidenceFilter:
    """Drops rows whose response has a confidence below `threshold`: the Auto-Filter of CLEAR (arXiv 2403.12776).

    of: the measure Confidence that gives the confidence, from 0 to 1. threshold: a number, or "median" of the rows
    that have a confidence. A row at the threshold or above it is never touched, a higher threshold drops all that a
    lower one does, and 0 drops no row that has a confidence. Reasons: low_confidence; not_scorable where there is none.
    Evidence of a dropped row: {threshold, consistency, reflection}.
    """

    of: Measure
    threshold: float | Literal["median"] = "median"

    scope: ClassVar[Literal["corpus"]] = "corpus"
    score: ClassVar[str | None] = "confidence"

    def __post_init__(self) -> None:
        if not {"confidence", "consistency", "reflection"} <= self.of.columns.keys():
            raise HouseError(f"{self}: `of` is the measure Confidence; {type(self.of).__name__} measures no confidence")
        if self.threshold != "median" and not 0 <= self.threshold <= 1:
            raise HouseError(f'{self}: threshold is a number from 0 to 1, or "median"')

    @property
    def needs(self) -> tuple[Measure, ...]:
        return (self.of,)

    def limits(self) -> tuple[float | None, float | None]:
        return (None if self.threshold == "median" else self.threshold), None

    def judge(self, corpus: Corpus) -> pa.Table:
        """Verdicts for all live rows, in the order of `corpus.tables()`."""
        values = corpus.values(["confidence", "consistency", "reflection"])
        sure = values["confidence"].cast(pa.float64()).to_numpy()  # null has become NaN
        scored = ~np.isnan(sure)
        limit = self.threshold
        if limit == "median":
            limit = float(np.median(sure[scored])) if scored.any() else 0.0
        low = scored & (sure < limit)
        kept = scored & ~low
        reason = pc.if_else(pa.array(low), "low_confidence", "not_scorable")
        proof = json_column(
            {
                "threshold": pa.array(np.full(len(sure), limit)),
                "consistency": values["consistency"].combine_chunks(),
                "reflection": values["reflection"].combine_chunks(),
            }
        )
        nothing = pa.scalar(None, pa.string())
        columns = [
            pa.array(kept),
            pc.if_else(pa.array(kept), nothing, reason),
            pa.array(sure, from_pandas=True),
            pc.if_else(pa.array(low), proof, nothing),
        ]
        return pa.Table.from_arrays(columns, schema=VERDICT)
