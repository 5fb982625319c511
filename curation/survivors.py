"""Which row of a group of duplicates stays, and verdicts made as arrays: 60,000 drops take milliseconds."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from .spans import Ints
from .steps import VERDICT

Survivor = Literal["first", "longest"]
PLACE = ("row_id", "source", "position")


@dataclass(frozen=True)
class Places:
    """row_id, source and position of the rows seen so far, in corpus order."""

    row_ids: list[pa.ChunkedArray] = field(default_factory=list)
    sources: list[pa.ChunkedArray] = field(default_factory=list)
    positions: list[pa.ChunkedArray] = field(default_factory=list)

    def add(self, rows: pa.Table) -> None:
        self.row_ids.append(rows["row_id"])
        self.sources.append(rows["source"])
        self.positions.append(rows["position"])

    def __len__(self) -> int:
        return sum(map(len, self.row_ids))

    def ids(self, rows: Ints, only: npt.NDArray[np.bool_] | None = None) -> pa.Array:
        """The row_ids of these rows; null where `only` is false."""
        every = pa.chunked_array([chunk for ids in self.row_ids for chunk in ids.chunks], pa.string())
        return every.take(pa.array(rows, mask=None if only is None else ~only)).combine_chunks()

    def preference(self, survivor: Survivor, lengths: Ints) -> Ints:
        """Rank of each row, 0 the first to survive: source (in the order of first appearance), then position, then
        place in the corpus; for `longest` the greater length before all these."""
        if not len(self):
            return np.zeros(0, np.int64)
        chunks = [chunk for sources in self.sources for chunk in sources.chunks]
        source = pa.chunked_array(chunks, pa.string()).combine_chunks().dictionary_encode().indices.to_numpy()
        position = np.concatenate([positions.to_numpy() for positions in self.positions])
        keys = [position, source, *([-lengths] if survivor == "longest" else [])]
        rank = np.empty(len(self), np.int64)
        rank[np.lexsort(keys)] = np.arange(len(self))
        return rank


def survivors(groups: Ints, rank: Ints) -> Ints:
    """For each row the row of smallest rank in its group. groups: any number below the number of rows."""
    best = np.full(len(groups), len(groups), np.int64)
    np.minimum.at(best, groups, rank)
    by_rank = np.empty(len(rank), np.int64)
    by_rank[rank] = np.arange(len(rank))
    return by_rank[best[groups]]


def json_column(fields: Mapping[str, pa.Array]) -> pa.Array:
    """One JSON object a row with these keys in sorted order; a null leaves its key out. Strings are taken to need no
    escapes (ids, names of views)."""
    pieces = []
    for name, values in sorted(fields.items()):
        quote = '"' if pa.types.is_string(values.type) else ""
        text = values if quote else values.cast(pa.string())
        pieces.append(pc.binary_join_element_wise(f'"{name}": {quote}', text, quote, ""))
    return pc.binary_join_element_wise("{", pc.binary_join_element_wise(*pieces, ", ", null_handling="skip"), "}", "")


def drops(
    rows: int,
    dropped: Ints,
    reason: str | Sequence[str],
    score: Sequence[float | None] | npt.NDArray[np.float64],
    evidence: pa.Array,
) -> pa.Table:
    """Verdicts (schema VERDICT) of `rows` rows of which `dropped` (ascending) go, with their reasons (one for all, or
    one each), scores and evidence."""
    reasons = [reason] * len(dropped) if isinstance(reason, str) else list(reason)
    keep = np.ones(rows, np.bool_)
    keep[dropped] = False
    where = np.zeros(rows, np.int64)
    where[dropped] = np.arange(len(dropped))
    pick = pa.array(where, mask=keep)
    columns: Sequence[pa.Array] = [
        pa.array(keep),
        pa.array(reasons, pa.string()).take(pick),
        pa.array(score, pa.float64()).take(pick),
        evidence.cast(pa.string()).take(pick),
    ]
    return pa.Table.from_arrays(columns, schema=VERDICT)
