"""A judge of answers that repeat themselves."""

from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np
import pyarrow as pa

from ..duplicates.survivors import json_column
from ..flags import coded, floats
from ..folder import HouseError
from ..measures.repetition import Repetition
from ..steps import Measure
from ..text.view import View

_REASONS = ("loop", "repeated_lines", "repeated_ngrams", "frequent_ngram", "not_scorable")


@dataclass(frozen=True)
class Repetitive:
    """Drops rows whose response repeats itself (measure Repetition; Gopher, arXiv 2112.11446, has 0.18 and 0.10 where
    the defaults here are 0.6: web pages must not repeat, while tables, code and lists of an answer may).

    loop: highest share of the text that may be a loop at its end, 0.3 by default. lines: of repeated lines, 0.5.
    ngrams: of words in repeated 10-grams, 0.6. frequent: of words in the most frequent 3-gram, 0.6. min_words: shorter
    texts are judged by the loop alone, 50 by default. Reasons: loop, repeated_lines, repeated_ngrams, frequent_ngram.
    Evidence: {share, words}. All shares are kept beside the verdicts, so that other limits cost nothing.
    """

    loop: float = 0.3
    lines: float = 0.5
    ngrams: float = 0.6
    frequent: float = 0.6
    min_words: int = 50
    view: View = "response"

    scope: ClassVar[Literal["row"]] = "row"
    score: ClassVar[str | None] = "repeated_10gram"

    def __post_init__(self) -> None:
        if not all(0 <= share <= 1 for share in (self.loop, self.lines, self.ngrams, self.frequent)):
            raise HouseError(f"{self}: give shares from 0 to 1")

    @property
    def needs(self) -> tuple[Measure, ...]:
        return (Repetition(self.view),)

    def limits(self) -> tuple[float | None, float | None]:
        return None, self.ngrams

    def judge(self, rows: pa.Table, values: pa.Table) -> pa.Table:
        """Verdicts, aligned with `rows`; the first of the reasons that holds."""
        words = floats(values["words"])
        codes, share = np.full(len(words), -1, np.int8), np.zeros(len(words))
        rules = (("loop", self.loop), ("repeated_lines", self.lines), ("repeated_10gram", self.ngrams),
                 ("top_3gram", self.frequent))  # fmt: skip
        for code, (name, most) in reversed(list(enumerate(rules))):
            found = floats(values[name])
            over = (found > most) & ((words >= self.min_words) | (name == "loop"))
            codes[over], share[over] = code, found[over]
        codes[np.isnan(words)] = len(rules)
        dropped = np.flatnonzero(codes >= 0)
        where = np.zeros(len(codes), np.int64)
        where[dropped] = np.arange(len(dropped))
        proof = json_column(
            {"share": pa.array(np.round(share[dropped], 4)), "words": pa.array(words[dropped].astype(int))}
        )
        return coded(codes, _REASONS, proof.take(pa.array(where, mask=codes < 0)))
