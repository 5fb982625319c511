"""Bytes of a file to records (mappings of column to value), or, where that fails, to what stood there and why.

One bad record never costs its neighbours. Lines end at \\n alone: U+2028 and U+0085 are text.
"""

import codecs
import csv
import io
import json
import re
import sys
from collections.abc import Callable, Iterable, Iterator
from typing import IO, Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq


class Record(NamedTuple):
    """One readable record. line: of a line format its line, else its number in the file; both count from 1. raw: as it
    stood in the file, None where it was no text."""

    line: int
    fields: dict[str, Any]
    raw: str | bytes | None


class Unreadable(NamedTuple):
    """What could not be read as a row: where it stood, why, and its raw text (bytes that are no UTF-8 as \\xNN)."""

    file: str
    line: int
    error: str
    raw: str


Records = Iterator[Record | Unreadable]
_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]|[\ud800-\udfff]")
_BATCH = 1024  # records of a columnar file that are Python objects at a time
_CHUNK = 1 << 20  # characters


def shown(raw: str | bytes) -> str:
    """Raw text for the quarantine: valid UTF-8 whatever it was."""
    if isinstance(raw, str):
        raw = raw.encode("utf-8", "surrogateescape")
    return raw.decode("utf-8", "backslashreplace")


def _object(file: str, line: int, text: str, raw: str | bytes, value: Any) -> Record | Unreadable:
    if type(value) is not dict:
        return Unreadable(file, line, f"{_kind(value)}, not an object with columns", shown(raw))
    if _SURROGATE.search(text):
        try:
            json.dumps(value, ensure_ascii=False).encode()
        except UnicodeEncodeError:
            why = "invalid UTF-8" if _broken_bytes(text) else "half of a surrogate pair, which is no character"
            return Unreadable(file, line, why, shown(raw))
    return Record(line, value, raw)


def _broken_bytes(text: str) -> bool:
    """Whether `text` was decoded (surrogateescape) from bytes that are no UTF-8."""
    return any("\udc80" <= sign <= "\udcff" for sign in text)


def _kind(value: Any) -> str:
    names: dict[type, str] = {list: "a list", str: "text", bool: "true or false", type(None): "null"}
    return names.get(type(value), "an object" if isinstance(value, dict) else "a number")


def json_lines(lines: Iterable[bytes], file: str, first: int = 1) -> Records:
    """JSON Lines, of which these begin with line `first`; blank lines are passed over, CRLF and a byte order mark are
    met."""
    for number, line in enumerate(lines, first):
        raw = line.removeprefix(codecs.BOM_UTF8) if number == 1 else line
        raw = raw.strip(b" \t\r\n")
        if not raw:
            continue
        try:
            text = raw.decode()
            value = json.loads(text)
        except UnicodeDecodeError as error:
            yield Unreadable(file, number, f"invalid UTF-8 at byte {error.start}: {error.reason}", shown(raw))
        except (ValueError, RecursionError) as error:
            yield Unreadable(file, number, f"invalid JSON: {error}", shown(raw))
        else:
            yield _object(file, number, text, raw, value)


def peekable(stream: IO[bytes]) -> Any:
    """The stream with a method `peek`."""
    return stream if hasattr(stream, "peek") else io.BufferedReader(stream)


def begins_array(stream: Any) -> bool:
    """Whether a .json file, opened as peekable, is one array and not JSON Lines under that name."""
    head = stream.peek(64)[:64].removeprefix(codecs.BOM_UTF8).lstrip()
    return bool(head[:1] == b"[")


class _Window:
    """The part of a long text that is being parsed: `text` from position `at` on."""

    def __init__(self, stream: IO[bytes]) -> None:
        self.stream = stream
        self.decode = codecs.getincrementaldecoder("utf-8-sig")("surrogateescape").decode
        self.text, self.at, self.ended = "", 0, False

    def more(self) -> None:
        """Reads on, at least doubling what is still to be parsed."""
        block = self.stream.read(max(_CHUNK, len(self.text) - self.at))
        self.ended = not block
        self.text = self.text[self.at :] + self.decode(block, final=self.ended)
        self.at = 0

    def next_sign(self, skip: str) -> str:
        """The next character that is not in `skip`, '' at the end; `at` stands on it."""
        while True:
            while self.at < len(self.text) and self.text[self.at] in skip:
                self.at += 1
            if self.at < len(self.text) or self.ended:
                return self.text[self.at : self.at + 1]
            self.more()


def json_array(stream: IO[bytes], file: str) -> Records:
    """One array of objects, element by element: a megabyte of text in memory, or the longest element."""
    window = _Window(stream)
    window.next_sign(" \t\r\n")
    window.at += 1
    decoder = json.JSONDecoder()
    first_keys: dict[str, None] = {}
    number = 0
    while (sign := window.next_sign(" \t\r\n,")) not in ("", "]"):
        number += 1
        start = window.at
        try:
            value, end = _element(window, decoder)
        except (ValueError, RecursionError) as error:
            message = error.msg if isinstance(error, json.JSONDecodeError) else str(error)
            yield Unreadable(file, number, f"invalid JSON: {message}", shown(_skip_element(window, first_keys)))
            continue
        start, window.at = window.at, end
        raw = window.text[start:end]
        record = _object(file, number, raw, raw, value)
        if isinstance(record, Record) and value and len(first_keys) < 50:
            first_keys[next(iter(value))] = None
        yield record
    window.at += len(sign)
    if sign == "":
        yield Unreadable(file, number + 1, "the array is not closed: the file was cut short", "")
    elif window.next_sign(" \t\r\n"):
        while not window.ended:
            window.more()
        yield Unreadable(file, number + 1, "text after the end of the array", shown(window.text[window.at :]))


def _element(window: _Window, decoder: json.JSONDecoder) -> tuple[Any, int]:
    """The value at `window.at` and its end; reads on while the value may only be cut by the window's end."""
    while True:
        try:
            value, end = decoder.raw_decode(window.text, window.at)
            if end < len(window.text) or window.ended:
                return value, end
        except json.JSONDecodeError as error:
            cut = error.msg.startswith("Unterminated") or error.pos >= len(window.text) - 12
            if window.ended or not cut:
                raise
        window.more()


def _skip_element(window: _Window, first_keys: dict[str, None]) -> str:
    """Moves past a malformed element to the next object that begins with a key that elements begin with."""
    own = re.match(r'\{\s*"([^"\\]*)"\s*:', window.text[window.at : window.at + 1000])
    keys = [*first_keys, *([own[1]] if own else [])]
    begin = re.compile(r'\{\s*"(?:' + "|".join(map(re.escape, keys)) + r')"\s*:' if keys else r"\{")
    while not (found := begin.search(window.text, window.at + 1)) and not window.ended:
        window.more()
    start, window.at = window.at, found.start() if found else len(window.text)
    raw = window.text[start : window.at].rstrip(" \t\r\n,")
    if not found and raw.endswith("]"):  # the array's own end, not the element's
        window.at = start + len(raw) - 1
        raw = raw[:-1].rstrip()
    return raw


def csv_file(stream: IO[bytes], file: str) -> Records:
    return _table_text(stream, file, ",")


def tsv_file(stream: IO[bytes], file: str) -> Records:
    return _table_text(stream, file, "\t")


def _table_text(stream: IO[bytes], file: str, delimiter: str) -> Records:
    """Rows of a delimited file (RFC 4180 quoting), its first row the column names."""
    csv.field_size_limit(min(sys.maxsize, 2**31 - 1))
    lines: list[str] = []
    text = io.TextIOWrapper(stream, "utf-8-sig", "surrogateescape", newline="")
    reader = csv.reader(_remembered(text, lines), delimiter=delimiter, strict=True)
    names: list[str] | None = None
    while True:
        first = reader.line_num + 1
        lines.clear()
        try:
            cells = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            yield Unreadable(file, first, f"malformed row: {error}", shown("".join(lines)))
            continue
        raw = "".join(lines).rstrip("\r\n")
        if not cells:
            continue
        if names is None:
            names = cells
        elif len(cells) != len(names):
            yield Unreadable(file, first, f"{len(cells)} cells under {len(names)} columns", shown(raw))
        elif _broken_bytes(raw):
            yield Unreadable(file, first, "invalid UTF-8", shown(raw))
        else:
            yield Record(first, dict(zip(names, cells, strict=True)), raw)


def _remembered(text: io.TextIOWrapper, lines: list[str]) -> Iterator[str]:
    for line in text:
        lines.append(line)
        yield line


def parquet_batches(stream: IO[bytes], rows: int) -> Iterator[pa.RecordBatch]:
    return iter(pq.ParquetFile(stream).iter_batches(rows))


def arrow_batches(stream: IO[bytes]) -> Iterator[pa.RecordBatch]:
    """Arrow IPC, as a file or as a stream (what `datasets` saves)."""
    try:
        opened_file = pa.ipc.open_file(stream)
    except pa.ArrowInvalid:
        stream.seek(0)
        return iter(pa.ipc.open_stream(stream))
    return (opened_file.get_batch(i) for i in range(opened_file.num_record_batches))


def arrow_records(batches: Iterator[pa.RecordBatch], file: str, first: int = 1) -> Records:
    """The rows of record batches, the first of them number `first` of its file."""
    line = first - 1
    for batch in batches:
        for start in range(0, batch.num_rows, _BATCH):
            part = batch.slice(start, _BATCH)
            try:
                rows = part.to_pylist()
            except (ValueError, OverflowError):  # UnicodeDecodeError is a ValueError
                rows = [_one(part.slice(index, 1)) for index in range(part.num_rows)]
            for row in rows:
                line += 1
                if isinstance(row, dict):
                    yield Record(line, row, None)
                else:
                    yield Unreadable(file, line, *row)


def _one(part: pa.RecordBatch) -> dict[str, Any] | tuple[str, str]:
    """One record of a batch, or the error and what can be shown of it."""
    try:
        row: dict[str, Any] = part.to_pylist()[0]
        return row
    except (ValueError, OverflowError) as error:
        why = "invalid UTF-8" if isinstance(error, UnicodeDecodeError) else str(error)
        return why, str([column.cast(pa.binary())[0] if pa.types.is_string(column.type) else "…" for column in part])


READERS: dict[str, Callable[[IO[bytes], str], Records]] = {
    "json": json_array,
    "csv": csv_file,
    "tsv": tsv_file,
}  # formats whose records must be parsed to be parted
