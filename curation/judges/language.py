"""A judge of the language a row is written in."""

from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from ..duplicates.survivors import drops, json_column
from ..folder import HouseError
from ..measures.language import LABELS, Language
from ..steps import Measure
from ..text.view import View


@dataclass(frozen=True)
class LanguageIs:
    """Drops rows that are written in another language than one of `languages`.

    languages: codes as in the measure Language (ISO 639-1). min_prob: a row goes where another language has at least
    this probability; below it nothing is sure (code, names, a translation's two languages), and the row is kept or,
    with unsure = drop, goes too. unsure also decides on rows of a listed language below min_prob. Rows of which no
    language can be told (fewer than some 20 letters besides code and addresses) are always kept. view, file: as in
    Language.

    Reasons: other_language, unsure_language. Score: the probability of the language found, of dropped rows. Evidence
    {language, prob}. Leave it out of sets with translations between languages, or list both.
    """

    languages: tuple[str, ...] = ("en",)
    min_prob: float = 0.5
    unsure: Literal["keep", "drop"] = "keep"
    view: View = "pair"
    file: str | None = None

    scope: ClassVar[Literal["row"]] = "row"
    reads: ClassVar[tuple[str, ...]] = ()
    score: ClassVar[str | None] = None

    def __post_init__(self) -> None:
        if not self.languages or not 0 <= self.min_prob <= 1:
            raise HouseError(f"{self}: give at least one language and 0 <= min_prob <= 1")
        unknown = sorted(set(self.languages) - LABELS) if self.file is None else []
        if unknown:
            raise HouseError(f"{self}: no language {', '.join(unknown)}; known are {', '.join(sorted(LABELS))}")

    @property
    def needs(self) -> tuple[Measure, ...]:
        return (Language(self.view, file=self.file),)

    def limits(self) -> tuple[float | None, float | None]:
        return None, None

    def judge(self, rows: pa.Table, values: pa.Table) -> pa.Table:
        """Verdicts, aligned with `rows`."""
        names = values["language"]
        probs = values["language_prob"].to_numpy()
        listed = pc.is_in(names, value_set=pa.array(self.languages, pa.string())).to_numpy()
        told = pc.is_valid(names).to_numpy()
        sure = probs >= self.min_prob
        other, unsure = told & sure & ~listed, told & ~sure & (self.unsure == "drop")
        gone = np.flatnonzero(other | unsure)
        reasons = np.where(other[gone], "other_language", "unsure_language").tolist()
        score = probs[gone].astype(np.float64)
        evidence = json_column({"language": names.take(gone).combine_chunks(), "prob": pa.array(score.round(4))})
        return drops(rows.num_rows, gone, reasons, score, evidence)
