"""A view of rows as one Arrow string a row, written by a compiled kernel: what regular expressions of Arrow read."""

from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from ..duplicates.shingles import compiled, in_threads
from ..pool import processors
from .spans import Spans, spans
from .view import VIEW_COLUMNS, View

VISIBLE = "[!-~]"  # a visible ASCII character: almost every string that says something has one
MATCHED_ROWS = 2048  # fewer are not worth a thread


def texts(rows: pa.Table | pa.RecordBatch, which: View) -> pa.Array:
    """`text.view(rows, which)` as a large_string array, some 50 times as fast. `rows` carries at least VIEW_COLUMNS."""
    batches = rows.select(VIEW_COLUMNS).to_batches() if isinstance(rows, pa.Table) else [rows]
    arrays = [_strings(spans(batch, which)) for batch in batches]
    return pa.concat_arrays(arrays) if arrays else pa.array([], pa.large_string())


def matching(strings: pa.Array, *patterns: str) -> npt.NDArray[np.bool_]:
    r"""Which strings have a match of any of the patterns (RE2: \w, \s and \b know ASCII alone), null as false.

    The cheap first look of a judge: let the patterns find more than is wanted, and decide in Python on what they find.
    One pass costs some 1 ns a byte, however many words a pattern lists. Patterns with gaps between words go by
    themselves.
    """
    step = max(MATCHED_ROWS, -(-len(strings) // processors()))
    pieces = [strings.slice(start, step) for start in range(0, len(strings), step)]

    def look(piece: pa.Array) -> npt.NDArray[np.bool_]:
        found = np.zeros(len(piece), np.bool_)
        for pattern in patterns:
            found |= np.asarray(pc.fill_null(pc.match_substring_regex(piece, pattern), False))
        return found

    return np.concatenate([np.zeros(0, np.bool_), *in_threads(look, pieces)])


def blank(strings: pa.Array) -> npt.NDArray[np.bool_]:
    """Which strings hold nothing but what `str.strip` takes away; null is blank."""
    found = ~matching(strings, VISIBLE)
    for row in np.flatnonzero(found).tolist():
        found[row] = not (strings[row].as_py() or "").strip()
    return found


def at(strings: pa.Array, rows: npt.NDArray[np.integer[Any]]) -> list[str]:
    """The strings of some rows as Python strings; null is empty."""
    return [text or "" for text in strings.take(pa.array(rows)).to_pylist()]


def _strings(said: Spans) -> pa.Array:
    offsets = np.zeros(len(said) + 1, np.int64)
    _write(said.text, said.starts, said.ends, said.ranges, offsets, np.empty(0, np.uint8))
    offsets = np.cumsum(offsets)
    data = np.empty(int(offsets[-1]), np.uint8)
    _write(said.text, said.starts, said.ends, said.ranges, offsets.copy(), data)
    return pa.Array.from_buffers(pa.large_string(), len(said), [None, pa.py_buffer(offsets), pa.py_buffer(data)])


@compiled
def _write(text, starts, ends, ranges, offsets, data):  # type: ignore[no-untyped-def]
    """Without `data`: the bytes of row r into offsets[r + 1]. With it: the bytes of row r from offsets[r] on. Turns
    of a piece, and pieces that say something, are parted by a blank line, as in text.py."""
    writing = data.size > 0
    for row in range(ranges.shape[0]):
        at = offsets[row] if writing else 0
        begin = at
        for part in range(3):
            first, last = ranges[row, 2 * part], ranges[row, 2 * part + 1]
            size = 2 * max(last - first - 1, 0)
            for turn in range(first, last):
                size += ends[turn] - starts[turn]
            if size == 0:
                continue
            for turn in range(first, last):
                if turn > first or at > begin:
                    if writing:
                        data[at], data[at + 1] = 10, 10
                    at += 2
                for byte in range(starts[turn], ends[turn]):
                    if writing:
                        data[at] = text[byte]
                    at += 1
        if not writing:
            offsets[row + 1] = at
