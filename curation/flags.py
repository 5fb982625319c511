"""Verdicts made as arrays: of the few rows that a judge found something in, and of a column of scores.

A judge of text that costs 1 µs a row must not spend 3 µs on a Python object for each row that it keeps.
"""

import json
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from .steps import VERDICT

NOT_SCORABLE = "not_scorable"

Found = Mapping[int, tuple[str, Mapping[str, Any] | None]]
"""Reason and evidence of each row that goes, by its index."""


def flagged(size: int, found: Found) -> pa.Table:
    """Verdicts (schema VERDICT) of `size` rows of which those in `found` go."""
    rows = sorted(found)
    keep = np.ones(size, np.bool_)
    keep[rows] = False
    where = np.zeros(size, np.int64)
    where[rows] = np.arange(len(rows))
    pick = pa.array(where, mask=keep)
    proofs = [None if proof is None else json.dumps(proof, ensure_ascii=False, sort_keys=True)
              for proof in (found[row][1] for row in rows)]  # fmt: skip
    columns = [
        pa.array(keep),
        pa.array([found[row][0] for row in rows], pa.string()).take(pick),
        pa.nulls(size, pa.float64()),
        pa.array(proofs, pa.string()).take(pick),
    ]
    return pa.Table.from_arrays(columns, schema=VERDICT)


def coded(codes: npt.NDArray[np.integer[Any]], reasons: tuple[str, ...], evidence: pa.Array | None = None) -> pa.Table:
    """Verdicts of rows of which `codes` says why they go: the index of the reason, or -1 for those that stay."""
    keep = codes < 0
    columns = [
        pa.array(keep),
        pa.array(reasons, pa.string()).take(pa.array(codes.astype(np.int64), mask=keep)),
        pa.nulls(len(codes), pa.float64()),
        pa.nulls(len(codes), pa.string()) if evidence is None else evidence.cast(pa.string()),
    ]
    return pa.Table.from_arrays(columns, schema=VERDICT)


def ranged(
    scores: pa.Array | pa.ChunkedArray, low: float | None, high: float | None, below: str, above: str
) -> pa.Table:
    """Verdicts by `scores`, both limits included (None: no limit); a null or NaN goes as not_scorable."""
    numbers = floats(scores)
    codes = np.full(len(numbers), -1, np.int8)
    codes[numbers < (-np.inf if low is None else low)] = 0
    codes[numbers > (np.inf if high is None else high)] = 1
    unknown = np.isnan(numbers)
    codes[unknown] = 2
    return coded(codes, (below, above, NOT_SCORABLE)).set_column(
        2, VERDICT.field("score"), pa.array(numbers, mask=unknown)
    )


def floats(scores: pa.Array | pa.ChunkedArray) -> npt.NDArray[np.float64]:
    """Numbers as float64, NaN where there is none."""
    return np.asarray(scores.cast(pa.float64()).to_numpy(), np.float64)
