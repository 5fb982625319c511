"""Measure once: value columns on disk, keyed by what a row says, the measure's configuration and its model."""

import traceback
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from .door import Progress
from .folder import HouseError, RunFolder, write_json, write_parquet
from .inputs import Informed
from .rows import digest
from .steps import Measure, Tools

BLOCK_ROWS = 4096  # rows measured between two writes: what a kill can cost


def measure_key(measure: Measure, tools: Tools) -> str:
    """Folder name of a measure's values: its class and a digest of repr, version, models and input files."""
    weights = [tools.digest(model) for model in measure.models]
    weights += [measure.inputs()] if isinstance(measure, Informed) else []
    return f"{type(measure).__name__}-{digest(repr(measure), str(measure.version), *weights)[:12]}"


def measured(
    folder: RunFolder, measure: Measure, rows: pa.Table, tools: Tools, progress: Progress
) -> tuple[pa.Table, dict[str, str]]:
    """Values aligned with `rows`, measuring only contents that the cache lacks, and tracebacks by content_id of those
    on which the measure raised (their values are null)."""
    home = folder.measures / measure_key(measure, tools)
    if not (home / "measure.json").exists():
        columns = {name: str(kind) for name, kind in measure.columns.items()}
        write_json(home / "measure.json", {"name": type(measure).__name__, "repr": repr(measure), "columns": columns})
    known = stored(home, measure)
    missing = _missing(rows, known)
    errors: dict[str, str] = {}
    for start in range(0, missing.num_rows, BLOCK_ROWS):
        block = missing.slice(start, BLOCK_ROWS)
        values, failed = attempt(lambda piece: measure.measure(piece, tools, _silent), block, type(measure).__name__)
        ids = block["content_id"].to_pylist()
        errors |= {ids[index]: trace for index, trace in failed.items()}
        if len(failed) == block.num_rows:
            continue
        good = np.setdiff1d(np.arange(block.num_rows), np.array(list(failed), dtype=np.int64))
        table = pa.table(
            {"content_id": block["content_id"].take(good), **{n: values[n].take(good) for n in values.column_names}}
        )
        name = digest(*table["content_id"].to_pylist())[:16]
        write_parquet(home / f"{name}.parquet", table)
        known = pa.concat_tables([known, table])
        progress(min(start + BLOCK_ROWS, missing.num_rows), missing.num_rows)
    index = pc.index_in(rows["content_id"], value_set=known["content_id"].combine_chunks())
    return known.drop_columns(["content_id"]).take(index), errors


def stored(home: Path, measure: Measure) -> pa.Table:
    """All values of one measure that lie on disk: content_id and the value columns."""
    schema = pa.schema([("content_id", pa.string()), *measure.columns.items()])
    files = sorted(home.glob("*.parquet"))
    return pa.concat_tables([schema.empty_table(), *(pq.read_table(file, schema=schema) for file in files)])


def _missing(rows: pa.Table, known: pa.Table) -> pa.Table:
    """Rows whose content has no value yet, the first of each content."""
    absent = rows.filter(pc.invert(pc.is_in(rows["content_id"], value_set=known["content_id"].combine_chunks())))
    ids = absent["content_id"].to_numpy(zero_copy_only=False)
    first = np.sort(np.unique(ids.astype(str), return_index=True)[1]) if len(ids) else np.array([], dtype=np.int64)
    return absent.take(pa.array(first, pa.int64()))


def attempt(work: Callable[[pa.Table], pa.Table], rows: pa.Table, name: str) -> tuple[pa.Table, dict[int, str]]:
    """`work(rows)`, a table aligned with rows; where it raises, the rows on which it raises are found by halving and
    come back as nulls, with their tracebacks by index. Errors for the user pass through, and so does work that fails on
    every one of several rows: then the step is broken, not the rows."""
    pieces = list(_halve(work, rows, 0))
    errors = {start: trace for start, _, trace in pieces if trace is not None}
    if errors and len(errors) == rows.num_rows and rows.num_rows > 1:
        raise HouseError(
            f"{name} raised on every one of {rows.num_rows} rows; the first time:\n{next(iter(errors.values()))}"
        )
    good = [table for _, table, _ in pieces if table is not None]
    if not good:
        return pa.table({}), errors
    whole = pa.concat_tables(good)
    index = np.full(rows.num_rows, -1, dtype=np.int64)
    index[np.setdiff1d(np.arange(rows.num_rows), np.array(list(errors), dtype=np.int64))] = np.arange(whole.num_rows)
    return whole.take(pa.array(index, mask=index < 0)), errors


def _halve(
    work: Callable[[pa.Table], pa.Table], rows: pa.Table, start: int
) -> Iterator[tuple[int, pa.Table | None, str | None]]:
    try:
        table = work(rows)
        if table.num_rows != rows.num_rows:
            raise ValueError(f"{table.num_rows} results for {rows.num_rows} rows")
        yield start, table, None
    except (HouseError, MemoryError):
        raise
    except Exception:
        if rows.num_rows == 1:
            yield start, None, traceback.format_exc()
            return
        half = rows.num_rows // 2
        yield from _halve(work, rows.slice(0, half), start)
        yield from _halve(work, rows.slice(half), start + half)


def _silent(done: int, total: int) -> None:
    """Progress of one block is too fine to show."""
