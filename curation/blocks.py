"""Live rows in blocks of some 10,000: what one worker judges or measures at a time, named and not carried."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from .ledger import Mask, State
from .rows import ROW

BLOCK_ROWS = 8192


@dataclass(frozen=True)
class Piece:
    """The live rows of one row group of a part. live: a bit for each of its `size` rows."""

    part: str
    group: int
    size: int
    live: bytes

    def table(self, columns: Sequence[str]) -> pa.Table:
        rows = pq.ParquetFile(self.part).read_row_group(self.group, columns=list(columns))
        mask = np.unpackbits(np.frombuffer(self.live, np.uint8), count=self.size).astype(np.bool_)
        return rows if mask.all() else rows.filter(pa.array(mask))


@dataclass(frozen=True)
class Block:
    """At least BLOCK_ROWS live rows (the last block fewer), in the order of the set."""

    pieces: tuple[Piece, ...]
    rows: int

    def table(self, columns: Sequence[str] | None = None) -> pa.Table:
        """Its rows, with these columns of ROW (default: all)."""
        return pa.concat_tables([piece.table(columns or ROW.names) for piece in self.pieces])


def blocks(state: State) -> Iterator[Block]:
    """The live rows of a set in blocks, whose cuts depend on the parts and the live rows alone."""
    pieces: list[Piece] = []
    rows = 0
    for part, mask in state.masks():
        for group, live in _groups(part, mask):
            count = int(live.sum())
            if count:
                pieces.append(Piece(str(part), group, len(live), np.packbits(live).tobytes()))
                rows += count
            if rows >= BLOCK_ROWS:
                yield Block(tuple(pieces), rows)
                pieces, rows = [], 0
    if pieces:
        yield Block(tuple(pieces), rows)


def _groups(part: Path, mask: Mask) -> Iterator[tuple[int, Mask]]:
    start = 0
    for group, size in enumerate(group_sizes(part)):
        yield group, mask[start : start + size]
        start += size


def group_sizes(part: Path) -> tuple[int, ...]:
    """Rows of each row group of a part."""
    facts = pq.read_metadata(part)
    return tuple(facts.row_group(index).num_rows for index in range(facts.num_row_groups))
