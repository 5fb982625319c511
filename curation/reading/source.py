"""Sources: where rows come from, and reading one into a run's folder with every record accounted for.

Memory: PART_ROWS rows as Arrow, some chunks in work, and 12 bytes a row for the counts that make row ids.
"""

import hashlib
import itertools
import json
import pickle
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from difflib import get_close_matches
from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from ..folder import HouseError, RunFolder, read_json, write_json, write_parquet
from ..keys import keys_of
from ..pool import INLINE, SMALL, Pool, fitting
from ..rows import PART_GROUP, PART_ROWS, ROW, Row, counted_row_id
from .addresses import find
from .chunks import ROWS, Chunk, Found, file_chunks, listed
from .convert import OURS, Naming, Read, rows_of_chunk, used_before
from .docstrings import PREFIX, docstrings, module_files, modules_digest
from .files import files_digest
from .formats import Record, Unreadable
from .seen import Seen
from .shapes import recognise
from .trees import TREES, conversations, is_tree

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
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
_SAMPLE = 100  # records that decide on the shape
_PATIENCE = 1000  # unreadable records before the first readable one
LARGE = 8 << 20  # bytes of files from which on workers parse them


@dataclass(frozen=True)
class Source:
    """One source of rows.

    name: names the rows' parts and their ids. path: a file, folder, glob pattern or saved `datasets` folder on any file
    system that fsspec knows; `hub:ORG/NAME[@REVISION][:CONFIG[:SPLIT]]`, read through `datasets` and its cache;
    `factory:FOLDER:NAME`, an entry of LLaMA-Factory's FOLDER/dataset_info.json; `docstrings:stdlib`, `docstrings:all`.
    licence: as it goes to the data card. shape: one of reading.shapes, tree, tree_preference, or auto. columns: our
    column name -> theirs. id: the source's own id column (unique); without one a row's id comes from its content.
    limit: records that are read at most, from the beginning.
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


def read_source(
    source: Source, folder: RunFolder, progress: Callable[[int], None] | None = None, pool: Pool = INLINE
) -> dict[str, Any]:
    """Reads `source` into rows/NAME-*.parquet and quarantine/NAME.parquet; the record rows/NAME.json is written last.

    A record of the same source and digest is answered at once; a HouseError where it is of another one (a run's rows
    never change), where not one row could be read, or where no shape fits. progress: called with the rows read so far.
    """
    wanted = json.loads(json.dumps(asdict(source)))
    marker = folder.rows / f"{source.name}.json"
    opened = _open(source)
    digest = opened.digest
    if marker.is_file():
        return _same(read_json(marker), wanted, digest, folder)
    _clear(source, folder)
    shape, chunks, work = _recognised(source, opened)
    pool = fitting(pool, source, SMALL if opened.size >= LARGE else 0)
    rows = _Numbered(source, pool.map(work, chunks))
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
    _, chunks, work = _recognised(source, _open(source))
    for chunk in _Numbered(source, map(work, chunks)):
        bad = iter(chunk.bad)
        place, fault = next(bad, (-1, None))
        for row in chunk.rows.to_pylist():
            while fault is not None and place < row["position"]:
                yield fault
                place, fault = next(bad, (-1, None))
            yield row
        if fault is not None:
            yield fault
        yield from (fault for _, fault in bad)


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


@dataclass(frozen=True)
class _Opened:
    """A source before its shape is known. size: bytes of its files."""

    digest: str
    size: int
    chunks: Iterator[Chunk]
    naming: Naming


def _open(source: Source) -> _Opened:
    if source.path.startswith(PREFIX):
        modules = module_files(source.path)
        found: Iterator[Found] = ((name, None, record) for name, record in docstrings(modules))
        return _Opened(
            modules_digest(modules), 0, listed(itertools.islice(found, source.limit)), Naming(source.columns)
        )
    entry = find(source.path)
    chunks: Iterator[Chunk] = (chunk for file in entry.files for chunk in file_chunks(file))
    if source.limit is not None:
        chunks = listed(itertools.islice(_found(chunks), source.limit), min(ROWS, source.limit))
    digest = files_digest(entry.files)
    if entry.note:
        digest = hashlib.sha256(f"{digest}\n{entry.note}".encode()).hexdigest()
    naming = replace(entry.naming, columns={**(entry.naming.columns or {}), **(source.columns or {})})
    return _Opened(digest, sum(file.fs.size(file.path) or 0 for file in entry.files), chunks, naming)


def _found(chunks: Iterable[Chunk]) -> Iterator[Found]:
    return (found for chunk in chunks for found in chunk.records())


def _recognised(source: Source, opened: _Opened) -> tuple[str, Iterator[Chunk], Callable[[Chunk], Read]]:
    """The shape of a source, all its chunks, and what makes rows of one."""
    sample, bad, chunks = _sampled(opened.chunks)
    _check_patience(source, sample, bad)
    work = partial(rows_of_chunk, source.name, opened.naming, source.id)
    if not sample:
        return "none", chunks, partial(work, None)
    _check_columns(source, sample)
    wanted = source.shape
    if wanted in TREES or (wanted == "auto" and is_tree(sample[0])):
        tree = "tree" if wanted == "auto" else wanted
        drawn, bad, chunks = _sampled(listed(conversations(_found(chunks), tree)))
        if not drawn:
            return tree, chunks, partial(work, None)
        raw = pickle.dumps((TREES[tree], drawn, source.name))
        return tree, chunks, partial(rows_of_chunk, source.name, OURS, source.id, raw)
    named = [opened.naming.renamed(fields) for fields in sample]
    shape = recognise(wanted, named, source.name).name
    return shape, chunks, partial(work, pickle.dumps((shape, named, source.name)))


def _sampled(chunks: Iterator[Chunk]) -> tuple[list[dict[str, Any]], list[Unreadable], Iterator[Chunk]]:
    """Readable records from the beginning, enough to tell the shape, what was unreadable among them, and all chunks."""
    head: list[Chunk] = []
    sample: list[dict[str, Any]] = []
    bad: list[Unreadable] = []
    for item in _records(chunks, head):
        if isinstance(item, Record):
            sample.append(item.fields)
        else:
            bad.append(item)
        if len(sample) == _SAMPLE or (not sample and len(bad) == _PATIENCE):
            break
    return sample, bad, itertools.chain(head, chunks)


def _check_patience(source: Source, sample: list[dict[str, Any]], bad: list[Unreadable]) -> None:
    if not sample and len(bad) == _PATIENCE:
        raise HouseError(
            f"source {source.name}: the first {_PATIENCE} records of {source.path} are unreadable; "
            f"line {bad[0].line} of {bad[0].file}: {bad[0].error}"
        )
    if not sample and not bad:
        raise HouseError(f"source {source.name}: {source.path} is empty: no row in it")


def _records(chunks: Iterator[Chunk], drawn: list[Chunk]) -> Iterator[Record | Unreadable]:
    """Records of chunk after chunk, each of which goes to `drawn`."""
    for chunk in chunks:
        drawn.append(chunk)
        for _, _, record in chunk.records():
            yield record


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


class _Numbered:
    """Rows of chunks with their positions and ids, which depend on what came before. `read` counts records."""

    def __init__(self, source: Source, chunks: Iterable[Read]) -> None:
        self.source, self.chunks = source, chunks
        self.read = 0
        self.seen = Seen()

    def __iter__(self) -> Iterator[Read]:
        for chunk in self.chunks:
            start, self.read = self.read, self.read + chunk.size
            rows = chunk.rows
            keys = keys_of(rows["content_id" if self.source.id is None else "row_id"])[:, 0] >> np.uint64(4)
            again = self.seen.add(keys)
            repeated = np.flatnonzero(again)
            bad = chunk.bad
            if len(repeated) and self.source.id is None:
                ids = rows["row_id"].to_pylist()
                contents = rows["content_id"]
                for index in repeated.tolist():
                    ids[index] = counted_row_id(self.source.name, contents[index].as_py(), int(again[index]))
                rows = rows.set_column(0, ROW.field("row_id"), pa.array(ids, pa.string()))
            elif len(repeated):
                places = rows["position"].to_numpy()[repeated].tolist()
                bad = sorted([*bad, *((place, used_before(chunk, place)) for place in places)], key=lambda one: one[0])
                rows = rows.filter(pa.array(again == 0))
            position = pc.add(rows["position"], start).cast(pa.int64())
            rows = rows.set_column(3, ROW.field("position"), position)
            yield Read(rows, [(start + place, fault) for place, fault in bad], chunk.size, {})


def _write(
    source: Source, folder: RunFolder, chunks: Iterable[Read], progress: Callable[[int], None] | None
) -> tuple[list[tuple[str, int]], list[pa.Table], str]:
    """Writes parts of PART_ROWS rows. Gives their names and sizes, the quarantine, and a digest of the content ids."""
    parts: list[tuple[str, int]] = []
    bad: list[pa.Table] = []
    waiting: list[pa.Table] = []
    contents = hashlib.sha256()
    done = 0

    def flush(least: int) -> None:
        whole = pa.concat_tables(waiting) if waiting else ROW.empty_table()
        while whole.num_rows >= least and whole.num_rows:
            name = f"{source.name}-{len(parts):05d}.parquet"
            part = whole.slice(0, PART_ROWS).combine_chunks()
            write_parquet(folder.rows / name, part, PART_GROUP)
            parts.append((name, part.num_rows))
            whole = whole.slice(PART_ROWS)
        waiting[:] = [whole]

    for chunk in chunks:
        if chunk.bad:
            faults = [{"source": source.name, **fault._asdict()} for _, fault in chunk.bad]
            bad.append(pa.Table.from_pylist(faults, schema=QUARANTINE))
        contents.update("".join(chunk.rows["content_id"].to_pylist()).encode())
        waiting.append(chunk.rows)
        if sum(table.num_rows for table in waiting) >= PART_ROWS:
            flush(PART_ROWS)
        done += chunk.rows.num_rows
        if progress is not None:
            progress(done)
    flush(1)
    return parts, bad, contents.hexdigest()
