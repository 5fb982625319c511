"""Training rows that are near a held-out row go, so that evaluation measures what was not trained on."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np
import pyarrow as pa

from ..duplicates.survivors import drops, json_column, row_ids
from ..folder import HouseError
from ..steps import Corpus, Unmeasured
from ..text.view import VIEW_COLUMNS, View

_VIEWS: tuple[View, ...] = ("pair", "prompt")
GROUP_ROWS = 25_000  # training rows looked at together, at least


@dataclass(frozen=True)
class NearHeldOut(Unmeasured):
    """Drops training rows whose pair or whose prompt shares most word n-grams with that of a held-out row; never a
    held-out row.

    threshold: Jaccard similarity of the sets of word n-grams from which on a row goes; candidates by MinHash-LSH whose
    bands are chosen so that a pair at the threshold is found with probability 0.989, each verified. ngram: words of a
    shingle; shorter texts are one shingle, near only to the same words. Reason `near_held_out`, score the similarity,
    evidence {held_out: row_id, similarity, view: pair or prompt, whichever is nearer}. Without held-out rows all stay.
    Holds the held-out rows, and of the training rows 25,000 at a time or as many as are held out, at some 4 kB a row.
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
        from ..duplicates.minhash import banding, near_pairs_between
        from ..duplicates.shingles import shingle_sets

        held = list(corpus.held_out(VIEW_COLUMNS))
        nearest = np.full(corpus.rows, -1, np.int64)
        view, similarity = np.zeros(corpus.rows, np.int64), np.zeros(corpus.rows)
        test = [shingle_sets(held, which, self.ngram, scratch=corpus.scratch) for which in _VIEWS] if held else []
        start = 0
        for group in _groups(corpus.tables(VIEW_COLUMNS), sum(rows.num_rows for rows in held)) if test else ():
            size = sum(rows.num_rows for rows in group)
            here = slice(start, start + size)
            for index, which in enumerate(_VIEWS):
                train = shingle_sets(group, which, self.ngram, scratch=corpus.scratch)
                how = (self.threshold, *banding(self.threshold))
                out, row, near = near_pairs_between(test[index], train, *how, scratch=corpus.scratch)
                best = np.lexsort((out, -near, row))
                best = best[np.unique(row[best], return_index=True)[1]]
                best = best[near[best] > similarity[here][row[best]]]
                at = start + row[best]
                nearest[at], similarity[at], view[at] = out[best], near[best], index
            start += size
            corpus.progress(start, corpus.rows)
        dropped = np.flatnonzero(nearest >= 0)
        evidence = json_column(
            {
                "held_out": row_ids(corpus.held_out(["row_id"]), nearest[dropped]),
                "similarity": pa.array(similarity[dropped]),
                "view": pa.array(_VIEWS).take(pa.array(view[dropped])),
            }
        )
        return drops(corpus.rows, dropped, "near_held_out", similarity[dropped], evidence)


def _groups(tables: Iterable[pa.Table], held: int) -> Iterator[list[pa.Table]]:
    """Consecutive tables of GROUP_ROWS rows, or of as many as are held out, all of which each group meets."""
    group: list[pa.Table] = []
    for table in tables:
        group.append(table)
        if sum(one.num_rows for one in group) >= max(GROUP_ROWS, held):
            yield group
            group = []
    if group:
        yield group
