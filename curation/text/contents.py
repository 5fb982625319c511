"""All that a row says, string by string, out of Arrow's own arrays: what looks at every turn and not at a view."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from .spans import Ints

TURNS = ("messages", "chosen", "rejected")
PARTS = ("content", "reasoning_content", "tool_calls")  # of a turn


@dataclass(frozen=True)
class Said:
    """Strings of one field: `strings[i]` is the `part` of turn `turns[i]` of row `rows[i]`, rows ascending. A raw
    document has the field `text`, turn 0 and the part `content`."""

    field: str
    part: str
    rows: Ints
    turns: Ints
    strings: pa.Array


def said(rows: pa.Table, parts: tuple[str, ...] = PARTS) -> Iterator[Said]:
    """The strings of `rows` (at least the columns of TURNS and text), without those of a kind that are all null."""
    for field in TURNS:
        column = rows[field].combine_chunks()
        if len(column) == column.null_count:
            continue
        sizes = pc.fill_null(pc.list_value_length(column), 0).to_numpy().astype(np.int64)
        owners = np.repeat(np.arange(len(sizes)), sizes)
        turns = np.arange(len(owners)) - np.repeat(np.cumsum(sizes) - sizes, sizes)
        values = column.flatten()
        for part in parts:
            strings = values.field(part) if values.null_count == 0 else pc.struct_field(values, part)
            if len(strings) > strings.null_count:
                yield Said(field, part, owners, turns, strings)
    text = rows["text"].combine_chunks()
    if len(text) > text.null_count:
        yield Said("text", "content", np.arange(len(text)), np.zeros(len(text), np.int64), text)
