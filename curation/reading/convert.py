"""Records to rows, a chunk at a time: all of reading that does not depend on what came before, so that workers can."""

import json
import pickle
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import pyarrow as pa

from ..rows import ROW, Row, content_id, counted_row_id, source_row_id, table
from .chunks import Chunk
from .formats import Record, Unreadable, shown
from .shapes import Shape, recognise
from .turns import Unfit

_TURNS = ("messages", "conversations", "chosen", "rejected")
_encode = json.JSONEncoder(ensure_ascii=False, allow_nan=False, default=str).encode


@dataclass(frozen=True)
class Naming:
    """How a source calls things. columns: our column name -> theirs. turn: their keys of a turn's role and content,
    where they are not among ours. roles: their name of a role -> ours."""

    columns: Mapping[str, str] | None = None
    turn: tuple[str, str] | None = None
    roles: Mapping[str, str] | None = None

    def renamed(self, fields: dict[str, Any]) -> dict[str, Any]:
        """A record under our names. Another column that already has such a name is kept as NAME_unmapped."""
        columns = self.columns
        if columns:
            taken = set(columns.values())
            rest = {f"{n}_unmapped" if n in columns else n: value for n, value in fields.items() if n not in taken}
            fields = rest | {ours: fields[theirs] for ours, theirs in columns.items() if theirs in fields}
        if self.turn is not None:
            fields = fields | {name: self._turns(fields[name]) for name in _TURNS if name in fields}
        return fields

    def _turns(self, value: Any) -> Any:
        """Turns (or one turn) with our keys and roles; whatever else it is stays."""
        if isinstance(value, list):
            return [self._turns(item) for item in value]
        assert self.turn is not None
        role, content = self.turn
        if not isinstance(value, Mapping) or role not in value:
            return value
        rest = {key: item for key, item in value.items() if key not in (role, content)}
        return rest | {"role": (self.roles or {}).get(value[role], value[role]), "content": value.get(content)}


OURS = Naming()


@dataclass(frozen=True)
class Read:
    """A chunk as rows. rows: positions count from the chunk's begin, ids as if nothing came before. bad: what became
    no row, by position. size: records. given: for sources with ids of their own, file, record and id by position."""

    rows: pa.Table
    bad: list[tuple[int, Unreadable]]
    size: int
    given: dict[int, tuple[str, Record, Any]]


def rows_of_chunk(source: str, naming: Naming, own_id: str | None, shape: bytes | None, chunk: Chunk) -> Read:
    """The rows of a chunk. shape: pickled arguments of `recognise`, None where no record is readable."""
    known = None if shape is None else _shape(shape)
    base: Row = dict.fromkeys(ROW.names) | {"source": source}
    rows: list[Row] = []
    bad: list[tuple[int, Unreadable]] = []
    given: dict[int, tuple[str, Record, Any]] = {}
    position = -1
    for position, (file, split, record) in enumerate(chunk.records()):
        if isinstance(record, Unreadable):
            bad.append((position, record))
            continue
        assert known is not None  # there was a readable record to recognise it by
        try:
            row = base | _content(record.fields, naming, known, split)
            row["position"] = position
            row["content_id"] = content_id(row)
            if own_id is None:
                row["row_id"] = counted_row_id(source, row["content_id"], 0)
            else:
                row["row_id"] = source_row_id(source, _own(record.fields, own_id))
                given[position] = file, record, record.fields[own_id]
        except Unfit as error:
            bad.append((position, _unfit(file, record, str(error))))
        else:
            rows.append(row)
    return Read(table(rows), bad, position + 1, given)


@lru_cache(4)
def _shape(raw: bytes) -> Shape:
    return recognise(*pickle.loads(raw))


def _content(given: dict[str, Any], naming: Naming, shape: Shape, split: str | None) -> Row:
    """Content and meta of one record; Unfit where it does not have the source's shape."""
    fields = naming.renamed(given)
    content = shape.convert(fields)
    used = shape.used
    more = {name: value for name, value in fields.items() if value is not None and name not in used}
    more |= content.pop("meta", {})
    if split is not None:
        more.setdefault("split", split)
    content["meta"] = _meta(more) if more else None
    return content


def _own(fields: Mapping[str, Any], name: str) -> str:
    own = fields.get(name)
    if isinstance(own, bool) or not isinstance(own, str | int):
        raise Unfit(f"no id in column {name}" if own is None else f"the id {own!r} is no text or integer")
    return str(own)


def used_before(chunk: Read, place: int) -> Unreadable:
    """What stands in the quarantine for the second record of one id."""
    file, record, own = chunk.given[place]
    return _unfit(file, record, f"the id {own!r} was used before")


def _unfit(file: str, record: Record, why: str) -> Unreadable:
    raw = json.dumps(record.fields, ensure_ascii=False, default=str) if record.raw is None else record.raw
    return Unreadable(file, record.line, why, shown(raw))


def _meta(more: dict[str, Any]) -> str:
    """JSON that any reader takes: NaN and infinities as null, other values as text."""
    try:
        return _encode(more)
    except ValueError:
        plain = json.loads(json.dumps(more, default=str), parse_constant=lambda _: None)
        return json.dumps(plain, ensure_ascii=False)
