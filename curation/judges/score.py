"""Judges of any number that a measure gives: a fixed range, and a share of the corpus."""

from dataclasses import dataclass
from typing import ClassVar, Literal

import pyarrow as pa

from ..flags import ranged
from ..folder import HouseError
from ..selecting.quantiles import check_shares, quantile
from ..steps import Corpus, Measure


@dataclass(frozen=True)
class ScoreRange:
    """Drops rows whose `column` of the measure `of` lies below `low` or above `high` (None: no limit; both are kept).

    of: a measure with its settings, as `of: {Ifd: {model: small}}` in a recipe. column: one of its number columns.
    Reasons: COLUMN_low, COLUMN_high, and not_scorable (null or NaN), also where no limit is given.
    """

    of: Measure
    column: str
    low: float | None = None
    high: float | None = None

    scope: ClassVar[Literal["row"]] = "row"

    def __post_init__(self) -> None:
        check_column(self, self.of, self.column)
        low, high = self.low, self.high
        if any(limit is not None and limit != limit for limit in (low, high)) or (
            low is not None and high is not None and low > high
        ):
            raise HouseError(f"{self}: give low <= high")

    @property
    def score(self) -> str | None:
        return self.column

    @property
    def needs(self) -> tuple[Measure, ...]:
        return (self.of,)

    def limits(self) -> tuple[float | None, float | None]:
        return self.low, self.high

    def judge(self, rows: pa.Table, values: pa.Table) -> pa.Table:
        """Verdicts by `column`, both limits included."""
        return ranged(values[self.column], self.low, self.high, f"{self.column}_low", f"{self.column}_high")


@dataclass(frozen=True)
class ScoreQuantile:
    """Drops the shares `drop_lowest` and `drop_highest` of the rows, ranked by `column` of the measure `of`.

    of, column: as of ScoreRange. Shares (default 0) are of the rows that have a number, rounded down to whole rows;
    equal scores rank by row_id, so the numbers of dropped rows are exact. Reasons: COLUMN_low, COLUMN_high;
    not_scorable (null or NaN). Evidence of each ranked row: its rank from 1 (lowest), the rows ranked, and, for dropped
    rows, the score at the cut (of the nearest row that is kept). Holds some 100 bytes a row.
    """

    of: Measure
    column: str
    drop_lowest: float = 0.0
    drop_highest: float = 0.0

    scope: ClassVar[Literal["corpus"]] = "corpus"

    def __post_init__(self) -> None:
        check_column(self, self.of, self.column)
        check_shares(self, self.drop_lowest, self.drop_highest)

    @property
    def score(self) -> str | None:
        return self.column

    @property
    def needs(self) -> tuple[Measure, ...]:
        return (self.of,)

    def limits(self) -> tuple[float | None, float | None]:
        return None, None  # the cuts follow from the corpus and stand in the evidence

    def judge(self, corpus: Corpus) -> pa.Table:
        """Verdicts for all live rows, in the order of `corpus.tables()`."""
        return quantile(corpus, self.column, self.drop_lowest, self.drop_highest)


def check_column(judge: object, of: Measure, column: str) -> None:
    """A HouseError unless `column` is a number column of the measure."""
    numbers = [name for name, kind in of.columns.items() if pa.types.is_integer(kind) or pa.types.is_floating(kind)]
    if column not in numbers:
        known = ", ".join(numbers) or "none"
        raise HouseError(f"{type(judge).__name__}: {type(of).__name__} has no number column {column!r}; it has {known}")
