"""Which row of a group of duplicates stays, and verdicts made as arrays: 60,000 drops take milliseconds."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from ..steps import VERDICT
from ..text.spans import Ints

Short = npt.NDArray[np.int32]
Ids = Callable[[Ints], pa.Array]
Survivor = Literal["first", "longest", "source", "measure"]
PLACE = ("source", "position")  # columns that say where a row stands


@dataclass(frozen=True)
class Rule:
    """Which row of a group stays; of rows that are equal by it the first: by source (in the order of first appearance),
    then position. longest: the one whose text is longest; source: the one whose source stands first in `sources`,
    sources not named there after all that are; measure: the one of the highest (prefer=high) or lowest value, rows
    without one after all others."""

    survivor: Survivor = "first"
    sources: tuple[str, ...] = ()
    prefer: Literal["high", "low"] = "high"


@dataclass
class Places:
    """Source and position of the rows seen so far, in corpus order: 12 bytes a row."""

    names: dict[str, int] = field(default_factory=dict)
    sources: list[Short] = field(default_factory=list)
    positions: list[Ints] = field(default_factory=list)
    rows: int = 0

    def add(self, rows: pa.Table) -> None:
        for chunk in rows["source"].chunks:
            coded = chunk.dictionary_encode()
            names = coded.dictionary.to_pylist()
            codes = np.array([self.names.setdefault(name, len(self.names)) for name in names], np.int32)
            self.sources.append(codes[coded.indices.to_numpy()])
        self.positions.append(rows["position"].to_numpy())
        self.rows += rows.num_rows

    def __len__(self) -> int:
        return self.rows

    def rank(self, rule: Rule, lengths: Ints, values: npt.NDArray[np.float64] | None, ids: Ids) -> Ints:
        """Rank of each row, 0 the first to survive. Rows of equal source and position stand in the order of their
        row_id, which is asked for only then."""
        if not len(self):
            return np.zeros(0, np.int64)
        source, position = np.concatenate(self.sources), np.concatenate(self.positions)
        keys: list[np.ndarray] = [position, source]
        if rule.survivor == "longest":
            keys.append(-np.asarray(lengths))
        elif rule.survivor == "source":
            named = {name: index for index, name in enumerate(rule.sources)}
            keys.append(np.array([named.get(name, len(named)) for name in self.names])[source])
        elif rule.survivor == "measure" and values is not None:
            keys.append(-values if rule.prefer == "high" else values)
        order = np.lexsort(keys)
        same = (source[order[1:]] == source[order[:-1]]) & (position[order[1:]] == position[order[:-1]])
        if same.any():
            names = ids(np.arange(len(self))).to_numpy(zero_copy_only=False).astype(str)
            order = np.lexsort([names, *keys])
        rank = np.empty(len(self), np.int64)
        rank[order] = np.arange(len(self))
        return rank


def row_ids(tables: Iterable[pa.Table], wanted: Ints) -> pa.Array:
    """The row_id of each wanted row (counted over all tables; -1 gives null), read once more: 36 bytes a row and their
    offsets need not be held while the text is."""
    asked, place = np.unique(wanted, return_inverse=True)
    found, start = [pa.nulls(int((asked < 0).sum()), pa.string())], 0
    for table in tables:
        low, high = np.searchsorted(asked, [max(start, 0), start + table.num_rows])
        if high > low:
            found.append(table["row_id"].take(pa.array(asked[low:high] - start)).combine_chunks())
        start += table.num_rows
    return pa.concat_arrays([_flat(chunk) for chunk in found]).take(pa.array(place))


def _flat(column: pa.Array | pa.ChunkedArray) -> pa.Array:
    return column.combine_chunks() if isinstance(column, pa.ChunkedArray) else column


def survivors(groups: Ints, rank: Ints) -> Ints:
    """For each row the row of smallest rank in its group. groups: any number below the number of rows."""
    best = np.full(len(groups), len(groups), np.int64)
    np.minimum.at(best, groups, rank)
    by_rank = np.empty(len(rank), np.int64)
    by_rank[rank] = np.arange(len(rank))
    return by_rank[best[groups]]


def json_column(fields: Mapping[str, pa.Array]) -> pa.Array:
    """One JSON object a row with these keys in sorted order; a null, or a number that is not finite,
    leaves its key out ({} where all are). Strings are taken to need no escapes (ids, names of views)."""
    pieces = []
    for name, values in sorted(fields.items()):
        quote = '"' if pa.types.is_string(values.type) else ""
        if pa.types.is_floating(values.type):  # JSON has no NaN and no infinity
            values = pc.if_else(pc.is_finite(values), values, pa.scalar(None, values.type))
        text = values if quote else values.cast(pa.string())
        pieces.append(pc.binary_join_element_wise(f'"{name}": {quote}', text, quote, ""))
    nothing = pc.is_null(pc.coalesce(*pieces))  # Arrow's join would leave such a row out altogether
    pieces[0] = pc.if_else(nothing, "", pieces[0])
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
