"""The row: one Arrow schema for everything that flows, and the two ids that name it.

`row_id` names one row of one source, stable under reordering; `content_id` names what the row says, and keys every
cache of measures. Both are 128-bit BLAKE2b digests in hexadecimal (32 characters).
"""

import hashlib
import json
from collections.abc import Iterable, Mapping
from typing import Any

import pyarrow as pa

Row = dict[str, Any]

MESSAGE = pa.struct(
    [
        pa.field("role", pa.string()),
        pa.field("content", pa.string()),
        pa.field("reasoning_content", pa.string()),
        pa.field("name", pa.string()),
        pa.field("tool_calls", pa.string()),  # JSON
        pa.field("tool_call_id", pa.string()),
    ]
)
MESSAGES = pa.list_(MESSAGE)
SPAN = pa.struct(
    [
        pa.field("field", pa.string()),  # messages | chosen | rejected
        pa.field("turn", pa.int32()),
        pa.field("start", pa.int32()),  # characters, end exclusive
        pa.field("end", pa.int32()),
        pa.field("weight", pa.float32()),
    ]
)
ROW = pa.schema(
    [
        pa.field("row_id", pa.string(), nullable=False),
        pa.field("content_id", pa.string(), nullable=False),
        pa.field("source", pa.string(), nullable=False),
        pa.field("position", pa.int64(), nullable=False),  # 0-based, within the source
        pa.field("messages", MESSAGES),
        pa.field("chosen", MESSAGES),
        pa.field("rejected", MESSAGES),
        pa.field("label", pa.bool_()),
        pa.field("text", pa.string()),
        pa.field("tools", pa.string()),  # JSON
        pa.field("spans", pa.list_(SPAN)),
        pa.field("meta", pa.string()),  # JSON of what the source had besides
        pa.field("parents", pa.list_(pa.string())),
        pa.field("maker", pa.string()),  # repr of the maker, null for rows that were read
    ]
)
CONTENT = ("messages", "chosen", "rejected", "label", "text", "tools", "spans")
_NO_TURN: dict[str, str | None] = {field.name: None for field in MESSAGE}
_SORTED_CONTENT = sorted(CONTENT)
_LISTS = {"messages", "chosen", "rejected"}
_SORTED_TURN = sorted(field.name for field in MESSAGE)
_TURN_KEYS = set(_SORTED_TURN)
_quoted = json.encoder.encode_basestring
_dumped = json.JSONEncoder(sort_keys=True, ensure_ascii=False, separators=(",", ":")).encode
PART_ROWS = 50_000
PART_GROUP = 10_000  # rows of a row group: what one worker reads at a time


def digest(*pieces: str) -> str:
    """128-bit BLAKE2b of length-prefixed pieces, so that ("ab", "c") and ("a", "bc") differ."""
    state = hashlib.blake2b(digest_size=16)
    for piece in pieces:
        raw = piece.encode("utf-8", "surrogatepass")
        state.update(b"%d:" % len(raw))
        state.update(raw)
    return state.hexdigest()


def message(role: str, content: str | None, **more: str | None) -> dict[str, str | None]:
    """One turn with every field of MESSAGE present (absent ones null)."""
    return {**_NO_TURN, "role": role, "content": content, **more}


def _bare(value: Any) -> Any:
    """`value` without null fields, so that a later optional field leaves old content ids alone."""
    if isinstance(value, str):
        return value
    if isinstance(value, Mapping):
        return {key: _bare(item) for key, item in value.items() if item is not None}
    if isinstance(value, list | tuple):
        return [_bare(item) for item in value]
    return value


def content_id(row: Mapping[str, Any]) -> str:
    """Digest of the canonical content: every field of CONTENT that is not null, keys sorted, nulls left out."""
    return digest(_canonical(row))


def _canonical(row: Mapping[str, Any]) -> str:
    """The content as JSON. Of messages and texts it is put together here, in a third of json.dumps' time."""
    pieces = []
    for name in _SORTED_CONTENT:
        value = row.get(name)
        if value is None:
            continue
        if name in _LISTS and isinstance(value, list):
            said = "[" + ",".join([_turn(turn) for turn in value]) + "]"
        elif type(value) is str:
            said = _quoted(value)
        else:
            said = _dumped(_bare(value))
        pieces.append(f'"{name}":{said}')
    return "{" + ",".join(pieces) + "}"


def _turn(turn: Any) -> str:
    if type(turn) is not dict or not turn.keys() <= _TURN_KEYS:
        return _dumped(_bare(turn))
    said = []
    for name in _SORTED_TURN:
        value = turn.get(name)
        if value is not None:
            said.append(f'"{name}":{_quoted(value) if type(value) is str else _dumped(_bare(value))}')
    return "{" + ",".join(said) + "}"


def source_row_id(source: str, own_id: str) -> str:
    """Id of a row whose source carries ids of its own."""
    return digest("id", source, own_id)


def counted_row_id(source: str, content: str, occurrence: int) -> str:
    """Id of a row without an id of its own: the `occurrence`-th (from 0) row of this content in the source."""
    return digest("content", source, content, str(occurrence))


def made_row(maker: str, parents: Iterable[str], position: int, source: str, **content: Any) -> Row:
    """A new row made by `maker` (its repr) from `parents`; equal parents and content give an equal id."""
    parents = list(parents)
    row: Row = dict.fromkeys(ROW.names) | content
    row |= {"source": source, "position": position, "parents": parents, "maker": maker}
    row["content_id"] = content_id(row)
    row["row_id"] = digest("made", maker, *parents, row["content_id"])
    return row


def table(rows: Iterable[Row]) -> pa.Table:
    """Rows as one table of the schema ROW; a missing field is null."""
    return pa.Table.from_pylist(list(rows), schema=ROW)
