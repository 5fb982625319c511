"""A share of the corpus by its rank on a score, with exact counts."""

import json
import math
from fractions import Fraction

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from ..duplicates.survivors import json_column
from ..flags import NOT_SCORABLE, coded, floats
from ..folder import HouseError
from ..steps import VERDICT, Corpus
from ..text.spans import Ints


def check_shares(judge: object, lowest: float, highest: float) -> None:
    """A HouseError unless the shares leave something."""
    if not (lowest >= 0 and highest >= 0 and lowest + highest < 1):
        raise HouseError(f"{judge}: give shares of at least 0 whose sum is below 1")


def quantile(corpus: Corpus, column: str, lowest: float, highest: float) -> pa.Table:
    """Verdicts that drop the shares `lowest` and `highest` of the rows ranked by `column`, ties by row_id.

    Shares are of the rows that have a number, rounded down to whole rows. Reasons: COLUMN_low, COLUMN_high;
    not_scorable (null or NaN). Evidence of each ranked row: its rank from 1 (lowest), the rows ranked, and, for dropped
    rows, `cut`: the score of the nearest row that is kept. Holds some 100 bytes a row.
    """
    values = corpus.values([column])[column]
    scores = floats(values)
    names = [table["row_id"] for table in corpus.tables(["row_id"])]
    ids = pa.chunked_array([chunk for name in names for chunk in name.chunks], pa.string())
    order = ranked(scores, ids)
    low = int(Fraction(str(lowest)) * len(order))
    high = len(order) - int(Fraction(str(highest)) * len(order))
    rank = np.full(len(scores), -1, np.int64)
    rank[order] = np.arange(len(order))
    codes = np.full(len(scores), -1, np.int8)
    codes[rank < 0], codes[rank >= high] = 2, 1
    codes[(rank >= 0) & (rank < low)] = 0
    cuts = [_cut(scores[order[low]]) if low else "0", _cut(scores[order[high - 1]]) if high < len(order) else "0"]
    cut = pa.array(cuts, pa.string()).take(pa.array(codes, mask=(codes < 0) | (codes > 1)))
    unranked = rank < 0
    proof = json_column({"rank": pa.array(rank + 1), "rows": pa.array(np.full(len(rank), len(order)))})
    with_cut = pc.binary_join_element_wise('{"cut": ', cut, ", ", pc.utf8_slice_codeunits(proof, 1), "")
    proof = pc.if_else(pa.array(unranked), pa.scalar(None, pa.string()), pc.coalesce(with_cut, proof))
    judged = coded(codes, (f"{column}_low", f"{column}_high", NOT_SCORABLE), proof)
    return judged.set_column(2, VERDICT.field("score"), pa.array(scores, mask=np.isnan(scores)))


def ranked(scores: np.ndarray, ids: pa.ChunkedArray) -> Ints:
    """Rows whose score is a number, ascending, ties by row_id."""
    known = np.flatnonzero(~np.isnan(scores))
    table = pa.table({"score": scores[known], "row_id": ids.take(pa.array(known))})
    order = pc.sort_indices(table, sort_keys=[("score", "ascending"), ("row_id", "ascending")])
    return np.asarray(known[order.to_numpy()], np.int64)


def _cut(score: float) -> str:
    return json.dumps(float(score) if math.isfinite(score) else str(float(score)))
