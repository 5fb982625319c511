"""A view of rows as byte spans of Arrow's own buffers: compiled kernels read text without a Python object a row.

The spans follow `text.prompt_of`, `response_of` and `pair_of` exactly; the blank lines between pieces are left out, and
each piece ends a word.
"""

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from ..rows import ROW
from .view import VIEW_COLUMNS, View

Units = Literal["pair", "prompt", "response", "turn"]  # what of a row is compared: a view of it, or each of its turns
Ints = npt.NDArray[np.int64]
Bytes = npt.NDArray[np.uint8]


@dataclass(frozen=True)
class Spans:
    """Row r says the turns of its three half-open ranges `ranges[r, 0:2], [2:4], [4:6]`, in this order (prompt,
    response, rejected); turn t is the UTF-8 `text[starts[t]:ends[t]]`. `sizes`: bytes of each row."""

    text: Bytes
    starts: Ints
    ends: Ints
    ranges: Ints  # (rows, 6)
    sizes: Ints

    def __len__(self) -> int:
        return len(self.ranges)

    def blocks(self, size: int = 1 << 20) -> list[tuple[int, int]]:
        """Consecutive row ranges of about `size` bytes of text each, at least one row; they depend on nothing else."""
        total = np.cumsum(self.sizes + 16)
        blocks, low = [], 0
        while low < len(self):
            high = max(low + 1, int(np.searchsorted(total, (total[low - 1] if low else 0) + size, "right")))
            blocks.append((low, high))
            low = high
        return blocks

    def capacity(self, low: int, high: int) -> tuple[int, int]:
        """The most letters, with a gap after each turn, that rows low:high can hold together, and one of them: folding
        makes at most 2 letters of a byte (U+3316, three bytes, becomes six kana)."""
        sizes = self.sizes[low:high]
        return 3 * int(sizes.sum()), 3 * int(sizes.max(initial=0))


@dataclass(frozen=True)
class _Turns:
    """One column: its text, its turns' spans, and for each row its turns and whether it is not null."""

    text: Bytes
    starts: Ints
    ends: Ints
    first: Ints
    last: Ints
    present: npt.NDArray[np.bool_]
    roles: pa.Array | None = None


def spans(rows: pa.RecordBatch, which: View) -> Spans:
    """The view `which` of `rows` (schema ROW, at least VIEW_COLUMNS). Copies text only where more than one of the
    columns holds any."""
    columns = [_turns(rows[name], ROW.field(name).type) for name in VIEW_COLUMNS]
    text, columns = _joined(columns)
    messages, chosen, rejected, raw = columns
    spoken = _last_assistant(messages)
    empty = np.zeros(len(spoken), np.int64)
    answered = spoken >= 0
    prompt_end = np.where(chosen.present | rejected.present | ~answered, messages.last, spoken)
    start = np.where(raw.present, raw.first, np.where(answered, spoken, 0))
    end = np.where(raw.present, raw.last, np.where(answered, spoken + 1, 0))
    start, end = np.where(chosen.present, chosen.first, start), np.where(chosen.present, chosen.last, end)
    prompt = [messages.first, prompt_end] if which != "response" else [empty, empty]
    response = [start, end] if which != "prompt" else [empty, empty]
    other = [rejected.first, rejected.last] if which == "pair" else [empty, empty]
    ranges = np.stack([*prompt, *response, *other], axis=1) if len(empty) else np.zeros((0, 6), np.int64)
    starts = np.concatenate([column.starts for column in columns])
    ends = np.concatenate([column.ends for column in columns])
    total = np.concatenate([np.zeros(1, np.int64), np.cumsum(ends - starts)])
    sizes = (total[ranges[:, 1::2]] - total[ranges[:, 0::2]]).sum(axis=1)
    return Spans(text, starts, ends, np.ascontiguousarray(ranges), sizes)


def turn_spans(rows: pa.RecordBatch, least: int) -> tuple[Spans, Ints]:
    """Each user and assistant turn (of messages, chosen, rejected) and each raw text of at least `least` bytes as a row
    of its own, in the order of the rows; and the row that each is of."""
    text, columns = _joined([_turns(rows[name], ROW.field(name).type) for name in VIEW_COLUMNS])
    starts = np.concatenate([column.starts for column in columns])
    ends = np.concatenate([column.ends for column in columns])
    spoken = np.ones(len(starts), np.bool_)
    owners, turns, before = [], [], 0
    for column in columns:
        sizes = column.last - column.first
        owners.append(np.repeat(np.arange(len(sizes)), sizes))
        turns.append(np.arange(len(owners[-1])) + np.repeat(column.first - (np.cumsum(sizes) - sizes), sizes))
        if column.roles is not None and len(column.roles):
            talk: Any = pc.fill_null(pc.is_in(column.roles, value_set=pa.array(["user", "assistant"])), False)
            spoken[before : before + len(column.roles)] = talk.to_numpy(zero_copy_only=False)
        before += len(column.starts)
    owner, turn = np.concatenate(owners), np.concatenate(turns)
    worth = spoken[turn] & (ends[turn] - starts[turn] >= least)
    owner, turn = owner[worth], turn[worth]
    order = np.argsort(owner, kind="stable")
    owner, turn = owner[order], turn[order]
    none = np.zeros(len(turn), np.int64)
    ranges = np.stack([turn, turn + 1, none, none, none, none], axis=1)
    return Spans(text, starts, ends, ranges, (ends - starts)[turn]), owner


def string_spans(strings: pa.Array) -> Spans:
    """One row a string; null is the empty text."""
    column = _strings(strings)
    none = np.zeros(len(strings), np.int64)
    ranges = np.stack([column.first, column.last, none, none, none, none], axis=1)
    return Spans(column.text, column.starts, column.ends, ranges, column.ends - column.starts)


def _turns(array: pa.Array, kind: pa.DataType) -> _Turns:
    """`array` cast to the type of the schema ROW where it comes in another (large_string, string_view)."""
    if array.type != kind:
        array = array.cast(kind)
    return _strings(array) if pa.types.is_string(kind) else _lists(array)


def _strings(array: pa.Array) -> _Turns:
    present = _valid(array)
    index = np.arange(len(array), dtype=np.int64)
    text, starts, ends = _buffers(array, present)
    return _Turns(text, starts, ends, index, np.where(present, index + 1, index), present)


def _lists(array: pa.Array) -> _Turns:
    present = _valid(array)
    if not present.any():
        none, text = np.zeros(len(array), np.int64), np.zeros(0, np.uint8)
        return _Turns(text, none[:0], none[:0], none, none, present)
    offsets = array.offsets.to_numpy().astype(np.int64)
    turns = array.values.slice(int(offsets[0]), int(offsets[-1] - offsets[0]))
    offsets -= offsets[0]
    contents = turns.field("content")
    text, starts, ends = _buffers(contents, _valid(contents))
    last = np.where(present, offsets[1:], offsets[:-1])
    return _Turns(text, starts, ends, offsets[:-1], last, present, turns.field("role"))


def _valid(array: pa.Array) -> npt.NDArray[np.bool_]:
    if array.null_count == 0:
        return np.ones(len(array), np.bool_)
    valid: npt.NDArray[np.bool_] = array.is_valid().to_numpy(zero_copy_only=False)
    return valid


def _buffers(array: pa.Array, present: npt.NDArray[np.bool_]) -> tuple[Bytes, Ints, Ints]:
    """Data, starts and ends of a string array, without a copy of the data; null is empty."""
    _, raw_offsets, raw_text = array.buffers()
    if len(array) == 0 or raw_offsets is None:
        none = np.zeros(len(array), np.int64)
        return np.zeros(0, np.uint8), none, none
    offsets = np.frombuffer(raw_offsets, np.int32)[array.offset : array.offset + len(array) + 1].astype(np.int64)
    text = np.zeros(0, np.uint8) if raw_text is None else np.frombuffer(raw_text, np.uint8)
    return text, offsets[:-1], np.where(present, offsets[1:], offsets[:-1])


def _joined(columns: list[_Turns]) -> tuple[Bytes, list[_Turns]]:
    """One text buffer for all columns, and the columns with their turns numbered through."""
    filled = [index for index, column in enumerate(columns) if len(column.text)]
    text = columns[filled[0]].text if len(filled) == 1 else np.concatenate([column.text for column in columns])
    joined, before, turns = [], 0, 0
    for column in columns:
        joined.append(
            _Turns(
                column.text,
                column.starts + before,
                column.ends + before,
                column.first + turns,
                column.last + turns,
                column.present,
                column.roles,
            )
        )
        before += 0 if len(filled) == 1 else len(column.text)
        turns += len(column.starts)
    return text, joined


def _last_assistant(messages: _Turns) -> Ints:
    """For each row the number of its last assistant turn, or -1."""
    if messages.roles is None or not len(messages.starts):
        return np.full(len(messages.first), -1, np.int64)
    spoke: Any = pc.fill_null(pc.equal(messages.roles, "assistant"), False)
    numbers = np.where(spoke.to_numpy(zero_copy_only=False), np.arange(len(spoke)), -1)
    latest = np.concatenate([np.full(1, -1), np.maximum.accumulate(numbers)])
    before_end = latest[messages.last]
    return np.where(before_end >= messages.first, before_end, -1).astype(np.int64)
