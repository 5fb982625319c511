"""Sources: where rows come from, and reading one into a run's folder with every record accounted for.

Memory: PART_ROWS rows as Arrow, and some 100 bytes a row for the counts that make row ids.
"""

import hashlib
import itertools
import json
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from difflib import get_close_matches
from typing import Any

import pyarrow as pa

from ..folder import HouseError, RunFolder, read_json, write_json, write_parquet
from ..rows import PART_GROUP, PART_ROWS, ROW, Row, content_id, counted_row_id, source_row_id, table
from .docstrings import PREFIX, docstrings, module_files, modules_digest
from .files import files_digest, find_files
from .formats import Record, Unreadable, records, shown
from .shapes import Shape, recognise
from .turns import Unfit

__all__ = ["QUARANTINE", "Source", "Unreadable", "iter_rows", "read_source"]

QUARANTINE = pa.schema(
    [
        pa.field("source", pa.string(), nullable=False),
        pa.field("file", pa.string()),
        pa.field("line", pa.int64()),  # of a line format its line, else the record's number in the file; from 1
        pa.field("error", pa.string()),
        pa.field("raw", pa.string()),
    ]
)
_encode = json.JSONEncoder(ensure_ascii=False, allow_nan=False, default=str).encode
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
_SAMPLE = 100  # records that decide on the shape
_PATIENCE = 1000  # unreadable records before the first readable one
_BATCH = 1000  # rows that are Python objects at a time

_Found = tuple[str, str | None, Record | Unreadable]  # file, split, record


@dataclass(frozen=True)
class Source:
    """One source of rows.

    name: names the rows' parts and their ids. path: a file, folder, glob pattern or saved `datasets` folder on any file
    system that fsspec knows, or `docstrings:stdlib`, `docstrings:all`. licence: as it goes to the data card. shape: one
    of reading.shapes, or auto. columns: our column name -> theirs. id: the source's own id column (unique); without one
    a row's id comes from its content. limit: records that are read at most, from the beginning.
    """

    name: str
    path: str
    licence: str
    shape: str = "auto"
    columns: Mapping[str, str] | None = None
    id: str | None = None
    limit: int | None = None

    def __post_init__(self) -> None:
        if not _NAME.fullmatch(self.name) or re.search(r"-\d{5}$", self.name):
            raise HouseError(
                f"source {self.name!r}: a name is letters, digits, `.`, `_` and `-`, without -00000 at its end"
            )
        if self.limit is not None and self.limit < 1:
            raise HouseError(f"source {self.name}: limit {self.limit}; it is at least 1")


def read_source(source: Source, folder: RunFolder, progress: Callable[[int], None] | None = None) -> dict[str, Any]:
    """Reads `source` into rows/NAME-*.parquet and quarantine/NAME.parquet; the record rows/NAME.json is written last.

    A record of the same source and digest is answered at once; a HouseError where it is of another one (a run's rows
    never change), where not one row could be read, or where no shape fits. progress: called with the rows read so far.
    """
    wanted = json.loads(json.dumps(asdict(source)))
    marker = folder.rows / f"{source.name}.json"
    digest, found = _open(source)
    if marker.is_file():
        return _same(read_json(marker), wanted, digest, folder)
    _clear(source, folder)
    shape, rows = _rows(source, found)
    parts, bad, contents = _write(source, folder, rows, progress)
    count = sum(size for _, size in parts)
    if bad:
        write_parquet(folder.quarantine / f"{source.name}.parquet", pa.concat_tables(bad))
    quarantined = sum(part.num_rows for part in bad)
    if count == 0:
        why = f"all {quarantined} records are unreadable, the first: {bad[0]['error'][0]}" if bad else "it is empty"
        raise HouseError(f"source {source.name}: no row in {source.path}: {why}")
    if rows.read != count + quarantined:
        raise HouseError(
            f"source {source.name}: read {rows.read} records, but {count} rows and {quarantined} quarantined"
        )
    record = {
        "name": source.name, "path": source.path, "shape": shape, "licence": source.licence,
        "digest": contents if source.path.startswith(PREFIX) else digest, "rows": count, "quarantined": quarantined,
        "read": rows.read, "parts": [name for name, _ in parts], "source": wanted, "files_digest": digest,
    }  # fmt: skip
    write_json(marker, record)
    return record


def iter_rows(source: Source) -> Iterator[Row | Unreadable]:
    """The rows of a source in order, and what could not be read; writes nothing."""
    return iter(_rows(source, _open(source)[1])[1])


def _same(record: dict[str, Any], wanted: dict[str, Any], digest: str, folder: RunFolder) -> dict[str, Any]:
    before = record.get("source", {}) | {"digest": record.get("files_digest")}
    for key, value in (wanted | {"digest": digest}).items():
        if before.get(key) != value:
            raise HouseError(
                f"source {wanted['name']} was read into {folder.root} with {key} {before.get(key)!r}, now {value!r}. "
                "The rows of a run never change: choose another --out."
            )
    return record


def _clear(source: Source, folder: RunFolder) -> None:
    """Removes what a reading that was cut short left behind."""
    part = re.compile(re.escape(source.name) + r"-\d{5,}\.parquet")
    for path in folder.rows.glob(f"{source.name}-*.parquet"):
        if part.fullmatch(path.name):
            path.unlink()
    with suppress(FileNotFoundError, NotADirectoryError):
        (folder.quarantine / f"{source.name}.parquet").unlink()


def _open(source: Source) -> tuple[str, Iterator[_Found]]:
    """Digest of the source's files, and their records."""
    if source.path.startswith(PREFIX):
        modules = module_files(source.path)
        return modules_digest(modules), ((name, None, record) for name, record in docstrings(modules))
    files = find_files(source.path)
    found = ((file.name, file.split, record) for file in files for record in records(file))
    return files_digest(files), found


def _rows(source: Source, found: Iterator[_Found]) -> tuple[str, "_Rows"]:
    """The shape of a source, and its rows."""
    found = itertools.islice(found, source.limit)
    head: list[_Found] = []
    sample: list[dict[str, Any]] = []
    for item in found:
        head.append(item)
        if isinstance(item[2], Record):
            sample.append(item[2].fields)
        if len(sample) == _SAMPLE or (not sample and len(head) == _PATIENCE):
            break
    if not sample and head:
        first = head[0][2]
        if len(head) == _PATIENCE and isinstance(first, Unreadable):
            raise HouseError(
                f"source {source.name}: the first {_PATIENCE} records of {source.path} are unreadable; "
                f"line {first.line} of {first.file}: {first.error}"
            )
        return "none", _Rows(source, None, iter(head))
    if not sample:
        raise HouseError(f"source {source.name}: {source.path} is empty: no row in it")
    _check_columns(source, sample)
    shape = recognise(source.shape, [_renamed(fields, source.columns) for fields in sample], source.name)
    return shape.name, _Rows(source, shape, itertools.chain(head, found))


def _check_columns(source: Source, sample: list[dict[str, Any]]) -> None:
    seen = dict.fromkeys(name for fields in sample for name in fields)
    named = list((source.columns or {}).values()) + ([source.id] if source.id is not None else [])
    for name in named:
        if name not in seen:
            close = get_close_matches(name, seen, n=1, cutoff=0.0)
            raise HouseError(
                f"source {source.name}: no column {name!r} in {source.path}; the nearest is {close[0]!r}. "
                f"Columns seen: {', '.join(seen)}."
            )


def _renamed(fields: dict[str, Any], columns: Mapping[str, str] | None) -> dict[str, Any]:
    """A record under our column names. Another column that already has such a name is kept as NAME_unmapped."""
    if not columns:
        return fields
    taken = set(columns.values())
    rest = {f"{name}_unmapped" if name in columns else name: v for name, v in fields.items() if name not in taken}
    return rest | {ours: fields[theirs] for ours, theirs in columns.items() if theirs in fields}


class _Rows:
    """Rows and unreadable records of a source, one for each record that was found; `read` counts them."""

    def __init__(self, source: Source, shape: Shape | None, found: Iterator[_Found]) -> None:
        self.source, self.shape, self.found = source, shape, found
        self.read = 0
        self.base: Row = dict.fromkeys(ROW.names) | {"source": source.name}
        self.seen: dict[int, int] = {}  # first 60 bits of a content id or own id -> rows that have it

    def __iter__(self) -> Iterator[Row | Unreadable]:
        for file, split, record in self.found:
            position = self.read
            self.read += 1
            if isinstance(record, Unreadable):
                yield record
                continue
            try:
                yield self.row(record.fields, split, position)
            except Unfit as error:
                raw = json.dumps(record.fields, ensure_ascii=False, default=str) if record.raw is None else record.raw
                yield Unreadable(file, record.line, str(error), shown(raw))

    def row(self, given: dict[str, Any], split: str | None, position: int) -> Row:
        """The row of one record; Unfit where it does not have the source's shape."""
        assert self.shape is not None  # there was a readable record to recognise it by
        fields = _renamed(given, self.source.columns)
        content = self.shape.convert(fields)
        used = self.shape.used
        more = {name: value for name, value in fields.items() if value is not None and name not in used}
        more |= content.pop("meta", {})
        if split is not None:
            more.setdefault("split", split)
        row = self.base | content
        row["position"] = position
        row["meta"] = _meta(more) if more else None
        row["content_id"] = content_id(row)
        row["row_id"] = self.row_id(given, row["content_id"])
        return row

    def row_id(self, given: dict[str, Any], content: str) -> str:
        name = self.source.name
        if self.source.id is None:
            key = int(content[:15], 16)
            occurrence = self.seen.get(key, 0)
            self.seen[key] = occurrence + 1
            return counted_row_id(name, content, occurrence)
        own = given.get(self.source.id)
        if isinstance(own, bool) or not isinstance(own, str | int):
            raise Unfit(f"no id in column {self.source.id}" if own is None else f"the id {own!r} is no text or integer")
        row_id = source_row_id(name, str(own))
        if self.seen.setdefault(int(row_id[:15], 16), 0):
            raise Unfit(f"the id {own!r} was used before")
        self.seen[int(row_id[:15], 16)] = 1
        return row_id


def _meta(more: dict[str, Any]) -> str:
    """JSON that any reader takes: NaN and infinities as null, other values as text."""
    try:
        return _encode(more)
    except ValueError:
        plain = json.loads(json.dumps(more, default=str), parse_constant=lambda _: None)
        return json.dumps(plain, ensure_ascii=False)


def _write(
    source: Source, folder: RunFolder, rows: _Rows, progress: Callable[[int], None] | None
) -> tuple[list[tuple[str, int]], list[pa.Table], str]:
    """Writes parts of PART_ROWS rows. Gives their names and sizes, the quarantine, and a digest of the content ids."""
    parts: list[tuple[str, int]] = []
    bad: list[pa.Table] = []
    waiting: list[pa.Table] = []
    contents = hashlib.sha256()

    def flush(least: int) -> None:
        whole = pa.concat_tables(waiting) if waiting else ROW.empty_table()
        while whole.num_rows >= least and whole.num_rows:
            name = f"{source.name}-{len(parts):05d}.parquet"
            part = whole.slice(0, PART_ROWS).combine_chunks()
            write_parquet(folder.rows / name, part, PART_GROUP)
            parts.append((name, part.num_rows))
            whole = whole.slice(PART_ROWS)
        waiting[:] = [whole]

    stream = iter(rows)
    while batch := list(itertools.islice(stream, _BATCH)):
        good = [row for row in batch if not isinstance(row, Unreadable)]
        if len(good) < len(batch):
            faults = [{"source": source.name, **row._asdict()} for row in batch if isinstance(row, Unreadable)]
            bad.append(pa.Table.from_pylist(faults, schema=QUARANTINE))
        contents.update("".join(row["content_id"] for row in good).encode())
        waiting.append(table(good))
        if len(waiting) * _BATCH >= PART_ROWS + _BATCH:
            flush(PART_ROWS)
        if progress is not None:
            progress(rows.read - sum(part.num_rows for part in bad))
    flush(1)
    return parts, bad, contents.hexdigest()
