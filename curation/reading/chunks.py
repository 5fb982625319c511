"""Files in chunks of some thousand records, still as they lie in the file: what one worker parses at a time."""

import itertools
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import IO, Any

import pyarrow as pa

from ..folder import HouseError
from .files import DataFile, opened
from .formats import (
    READERS,
    Record,
    Records,
    Unreadable,
    arrow_batches,
    arrow_records,
    begins_array,
    json_lines,
    parquet_batches,
    peekable,
)

LINE_BYTES = 4 << 20  # of JSON Lines in a chunk
ROWS = 4096  # records of any other chunk

Found = tuple[str, str | None, Record | Unreadable]  # file, split, record


@dataclass(frozen=True)
class Chunk:
    """Consecutive records of one file: lines of JSON, one record batch as an Arrow stream, or records that had to be
    parsed to be found. first: line (or number) of the first."""

    file: str
    split: str | None
    first: int
    lines: list[bytes] | None = None
    batch: bytes | None = None
    parsed: list[Found] | None = None

    def records(self) -> Iterator[Found]:
        """Its records with file and split."""
        if self.parsed is not None:
            return iter(self.parsed)
        return ((self.file, self.split, record) for record in self._parse())

    def _parse(self) -> Records:
        if self.lines is not None:
            return json_lines(self.lines, self.file, self.first)
        assert self.batch is not None
        return arrow_records(iter(pa.ipc.open_stream(self.batch)), self.file, self.first)


def file_chunks(file: DataFile) -> Iterator[Chunk]:
    """The chunks of a file. A HouseError where the file as a whole is damaged."""
    done = 0
    try:
        with opened(file) as stream:
            for chunk, size in _chunks(file, stream):
                yield chunk
                done += size
    except (EOFError, OSError, zlib.error, pa.ArrowException) as error:
        raise HouseError(
            f"{file.name} is damaged or not of its format, after {done} readable records: {error}. Get it again."
        ) from error


def listed(found: Iterable[Found], rows: int = ROWS) -> Iterator[Chunk]:
    """Parsed records as chunks."""
    found = iter(found)
    while some := list(itertools.islice(found, rows)):
        yield Chunk("", None, 0, parsed=some)


def _chunks(file: DataFile, stream: IO[bytes]) -> Iterator[tuple[Chunk, int]]:
    """Each chunk, and how many records it has (blank lines counted)."""
    if file.format == "json":
        stream = peekable(stream)
    if file.format == "jsonl" or (file.format == "json" and not begins_array(stream)):
        yield from _of_lines(file, stream)
    elif file.format in ("parquet", "arrow"):
        batches = parquet_batches(stream, ROWS) if file.format == "parquet" else arrow_batches(stream)
        yield from _of_batches(file, batches)
    else:
        for chunk in listed((file.name, file.split, record) for record in READERS[file.format](stream, file.name)):
            assert chunk.parsed is not None
            yield chunk, len(chunk.parsed)


def _of_lines(file: DataFile, stream: IO[bytes]) -> Iterator[tuple[Chunk, int]]:
    first, size, lines = 1, 0, []
    for line in stream:
        lines.append(line)
        size += len(line)
        if size >= LINE_BYTES:
            yield Chunk(file.name, file.split, first, lines=lines), len(lines)
            first, size, lines = first + len(lines), 0, []
    if lines:
        yield Chunk(file.name, file.split, first, lines=lines), len(lines)


def _of_batches(file: DataFile, batches: Iterator[Any]) -> Iterator[tuple[Chunk, int]]:
    first = 1
    for batch in batches:
        for start in range(0, batch.num_rows, ROWS):
            part = batch.slice(start, ROWS)
            sink = pa.BufferOutputStream()
            with pa.ipc.new_stream(sink, part.schema) as writer:
                writer.write_batch(part)
            yield Chunk(file.name, file.split, first, batch=sink.getvalue().to_pybytes()), part.num_rows
            first += part.num_rows
