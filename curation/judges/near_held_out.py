"""Training rows that are near a held-out row go, so that evaluation measures what was not trained on."""

from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np
import pyarrow as pa

from ..folder import HouseError
from ..steps import Corpus, Unmeasured
from ..survivors import drops, json_column, row_ids
from ..text import VIEW_COLUMNS, View

_VIEWS: tuple[View, ...] = ("pair", "prompt")


@dataclass(frozen=True)
class NearHeldOut(Unmeasured):
    """Drops training rows whose pair or whose prompt shares most word n-grams with that of a held-out row; never a
    held-out row.

    threshold: Jaccard similarity of the sets of word n-grams from which on a row goes; candidates by MinHash-LSH whose
    bands are chosen so that a pair at the threshold is found with probability 0.989, each verified. ngram: words of a
    shingle; shorter texts are one shingle, near only to the same words. Reason `near_held_out`, score the similarity,
    evidence {held_out: row_id, similarity, view: pair or prompt, whichever is nearer}. Without held-out rows all stay.
    Holds some 16 bytes a word and 450 a row.
    """

    threshold: float = 0.7
    ngram: int = 5

    scope: ClassVar[Literal["corpus"]] = "corpus"

    def __post_init__(self) -> None:
        if not 0 < self.threshold <= 1:
            raise HouseError(f"NearHeldOut: threshold is {self.threshold}; a Jaccard similarity lies in (0, 1]")
        if self.ngram < 1:
            raise HouseError(f"NearHeldOut: ngram is {self.ngram}; it must be at least 1")

    def limits(self) -> tuple[float | None, float | None]:
        return None, self.threshold

    def judge(self, corpus: Corpus) -> pa.Table:
        from ..minhash import banding, near_pairs_between
        from ..shingles import joined, shingle_sets

        held = list(corpus.held_out(VIEW_COLUMNS))
        nearest = np.full(corpus.rows, -1, np.int64)
        view, similarity = np.zeros(corpus.rows, np.int64), np.zeros(corpus.rows)
        if held:
            parts, seen = [], 0
            for rows in corpus.tables(VIEW_COLUMNS):
                parts.append([shingle_sets(rows, which, self.ngram) for which in _VIEWS])
                seen += rows.num_rows
                corpus.progress(seen, corpus.rows)
            for index, which in enumerate(_VIEWS):
                train = joined([part[index] for part in parts])
                test = shingle_sets(held, which, self.ngram)
                out, row, near = near_pairs_between(test, train, self.threshold, *banding(self.threshold))
                best = np.lexsort((out, -near, row))
                best = best[np.unique(row[best], return_index=True)[1]]
                best = best[near[best] > similarity[row[best]]]
                nearest[row[best]], similarity[row[best]], view[row[best]] = out[best], near[best], index
        dropped = np.flatnonzero(nearest >= 0)
        evidence = json_column(
            {
                "held_out": row_ids(corpus.held_out(["row_id"]), nearest[dropped]),
                "similarity": pa.array(similarity[dropped]),
                "view": pa.array(_VIEWS).take(pa.array(view[dropped])),
            }
        )
        return drops(corpus.rows, dropped, "near_held_out", similarity[dropped], evidence)
