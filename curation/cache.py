"""Measure once: value columns on disk, keyed by what a row says, the measure's configuration and its model."""

import pickle
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from .blocks import Block, blocks
from .door import Progress
from .folder import FULL, HouseError, RunFolder, write_json, write_parquet
from .inputs import Informed
from .keys import Found, Places, Words, firsts, keys_of
from .ledger import State
from .pool import INLINE, Pool
from .rows import digest
from .steps import Measure, Tools

BLOCK_ROWS = 4096  # rows measured between two writes: what a kill can cost
BROKEN = 100  # rows of a block that all raise show that the step is broken, not the rows


def measure_key(measure: Measure, tools: Tools) -> str:
    """Folder name of a measure's values: its class and a digest of repr, version, models and input files."""
    weights = [tools.digest(model) for model in measure.models]
    weights += [measure.inputs()] if isinstance(measure, Informed) else []
    return f"{type(measure).__name__}-{digest(repr(measure), str(measure.version), *weights)[:12]}"


class Values:
    """The values of one measure that lie on disk, found by content. Holds 24 bytes a content and the plain columns;
    lists (embeddings) stay on disk and are read file by file."""

    def __init__(self, home: Path, measure: Measure) -> None:
        self.schema = pa.schema(list(measure.columns.items()))
        self.files = sorted(home.glob("*.parquet"))
        self.plain = [name for name, kind in measure.columns.items() if not pa.types.is_nested(kind)]
        schema = pa.schema([(name, measure.columns[name]) for name in self.plain])
        keys, columns = [np.zeros((0, 2), np.uint64)], [schema.empty_table()]
        for file in self.files:
            table = pq.read_table(file, columns=["content_id", *self.plain])
            keys.append(keys_of(table["content_id"]))
            columns.append(table.select(self.plain).cast(schema))
        self.starts = np.cumsum([0, *(len(each) for each in keys[1:])])
        self.found = Found.of(np.concatenate(keys))
        self.columns = pa.concat_tables(columns).combine_chunks()
        self.open: tuple[int, pa.Table] | None = None  # the last file whose lists were read

    def of(self, contents: pa.ChunkedArray) -> pa.Table:
        """Values aligned with content ids; null where there is none."""
        places = self.found.places(keys_of(contents))
        pick = pa.array(places, mask=places < 0)
        plain = self.columns.take(pick) if self.plain else None
        lists = [name for name in self.schema.names if name not in self.plain]
        nested = self._lists(lists, places) if lists else None
        return pa.table(
            {n: plain[n] if n in self.plain else nested[n] for n in self.schema.names},  # type: ignore[index]
            schema=self.schema,
        )

    def _lists(self, names: list[str], places: Places) -> pa.Table:
        """Nested columns at places, file by file: rows measured together are asked for together."""
        file = np.searchsorted(self.starts, places, side="right") - 1
        tables, where = [], np.full(len(places), -1, np.int64)
        total = 0
        for index in np.unique(file[places >= 0]).tolist():
            here = np.flatnonzero((file == index) & (places >= 0))
            if self.open is None or self.open[0] != index:
                self.open = index, pq.read_table(self.files[index], columns=names)
            tables.append(self.open[1].take(pa.array(places[here] - self.starts[index])))
            where[here] = np.arange(total, total + len(here))
            total += len(here)
        schema = pa.schema([self.schema.field(name) for name in names])
        found = pa.concat_tables([schema.empty_table(), *(table.cast(schema) for table in tables)])
        return found.take(pa.array(where, mask=where < 0))


@dataclass
class Taken:
    """What measuring the rows of a step came to. measured: contents that were measured now; reused: that lay on disk.
    errors: tracebacks by content_id of those on which the measure raised (their values are null)."""

    values: Values
    measured: int = 0
    reused: int = 0
    errors: dict[str, str] = field(default_factory=dict)


def take(
    folder: RunFolder, measure: Measure, state: State, tools: Tools, progress: Progress, pool: Pool = INLINE
) -> Taken:
    """Measures the live rows of `state` whose contents the cache lacks: with a model here, else in the pool."""
    home = _home(folder, measure, tools)
    values = Values(home, measure)
    keys = [np.zeros((0, 2), np.uint64), *(keys_of(table["content_id"]) for table in state.tables(["content_id"]))]
    missing, distinct = _missing(np.concatenate(keys), values.found)
    taken = Taken(values, len(missing), distinct - len(missing))
    if not len(missing):
        return taken
    absent = np.zeros(len(state.alive), np.bool_)
    absent[np.flatnonzero(state.alive)[missing]] = True
    wanted = State(state.parts, state.sizes, absent)
    done = 0
    for count, errors in _measuring(home, measure, wanted, tools, pool):
        taken.errors |= errors
        done += count
        progress(done, len(missing))
    if len(taken.errors) == distinct and distinct > 1:
        raise broken(type(measure).__name__, distinct, next(iter(taken.errors.values())))
    taken.values = Values(home, measure)
    return taken


def _missing(keys: Words, known: Found) -> tuple[Places, int]:
    """The first places of contents without a value, and the number of distinct contents."""
    first = firsts(keys)
    return first[known.places(keys[first]) < 0], len(first)


def _measuring(
    home: Path, measure: Measure, wanted: State, tools: Tools, pool: Pool
) -> Iterator[tuple[int, dict[str, str]]]:
    """Number of rows and errors, block by block."""
    if not measure.models and pool is not INLINE:
        yield from pool.map(partial(measure_block, str(home), pickle.dumps(measure)), blocks(wanted))
        return
    waiting: list[pa.Table] = []
    for block in blocks(wanted):
        waiting.append(block.table())
        while sum(table.num_rows for table in waiting) >= BLOCK_ROWS:
            whole = pa.concat_tables(waiting)
            yield BLOCK_ROWS, _measure(home, measure, whole.slice(0, BLOCK_ROWS), tools)
            waiting = [whole.slice(BLOCK_ROWS)]
    if waiting and (rest := pa.concat_tables(waiting)).num_rows:
        yield rest.num_rows, _measure(home, measure, rest, tools)


def measure_block(home: str, measure: bytes, block: Block) -> tuple[int, dict[str, str]]:
    """Measures one block and writes its values: what a worker does."""
    return block.rows, _measure(Path(home), pickle.loads(measure), block.table(), _NoTools())


class _NoTools:
    """What a measure without models gets in a worker."""

    def __getattr__(self, name: str) -> None:
        raise HouseError(f"a measure asks for a model ({name}) that it does not name in `models`")


def _measure(home: Path, measure: Measure, rows: pa.Table, tools: Tools | _NoTools) -> dict[str, str]:
    """Measures rows of distinct contents, writes their values, and gives tracebacks by content_id."""
    values, failed = attempt(
        lambda piece: measure.measure(piece, tools, _silent), rows, type(measure).__name__, BROKEN  # type: ignore[arg-type]
    )  # fmt: skip
    ids = rows["content_id"]
    errors = {ids[index].as_py(): trace for index, trace in failed.items()}
    if len(failed) < rows.num_rows:
        good = np.setdiff1d(np.arange(rows.num_rows), np.array(list(failed), dtype=np.int64))
        table = pa.table({"content_id": ids.take(good), **{n: values[n].take(good) for n in values.column_names}})
        write_parquet(home / f"{digest(*table['content_id'].to_pylist())[:16]}.parquet", table)
    return errors


def _home(folder: RunFolder, measure: Measure, tools: Tools) -> Path:
    home = folder.measures / measure_key(measure, tools)
    if not (home / "measure.json").exists():
        columns = {name: str(kind) for name, kind in measure.columns.items()}
        write_json(home / "measure.json", {"name": type(measure).__name__, "repr": repr(measure), "columns": columns})
    return home


def measured(
    folder: RunFolder, measure: Measure, rows: pa.Table, tools: Tools, progress: Progress
) -> tuple[pa.Table, dict[str, str]]:
    """Values aligned with `rows` (of a step's part, say), measuring only contents that the cache lacks, and tracebacks
    by content_id of those on which the measure raised. For all rows of a set, `take` reads the cache once."""
    home = _home(folder, measure, tools)
    values = Values(home, measure)
    missing, _ = _missing(keys_of(rows["content_id"]), values.found)
    errors: dict[str, str] = {}
    for start in range(0, len(missing), BLOCK_ROWS):
        errors |= _measure(home, measure, rows.take(pa.array(missing[start : start + BLOCK_ROWS])), tools)
        progress(min(start + BLOCK_ROWS, len(missing)), len(missing))
    return (Values(home, measure) if len(missing) else values).of(rows["content_id"]), errors


def stored(home: Path, measure: Measure) -> pa.Table:
    """All values of one measure that lie on disk: content_id and the value columns."""
    schema = pa.schema([("content_id", pa.string()), *measure.columns.items()])
    files = sorted(home.glob("*.parquet"))
    return pa.concat_tables([schema.empty_table(), *(pq.read_table(file, schema=schema) for file in files)])


def attempt(
    work: Callable[[pa.Table], pa.Table], rows: pa.Table, name: str, least: int = 2
) -> tuple[pa.Table, dict[int, str]]:
    """`work(rows)`, a table aligned with rows; where it raises, the rows on which it raises are found by halving and
    come back as nulls, with their tracebacks by index. Errors for the user pass through, and so does work that fails on
    every one of at least `least` rows: then the step is broken, not the rows."""
    pieces = list(_halve(work, rows, 0))
    errors = {start: trace for start, _, trace in pieces if trace is not None}
    if errors and len(errors) == rows.num_rows >= least:
        raise broken(name, rows.num_rows, next(iter(errors.values())))
    good = [table for _, table, _ in pieces if table is not None]
    if not good:
        return pa.table({}), errors
    whole = pa.concat_tables(good)
    if not errors:
        return whole, errors
    index = np.full(rows.num_rows, -1, dtype=np.int64)
    index[np.setdiff1d(np.arange(rows.num_rows), np.array(list(errors), dtype=np.int64))] = np.arange(whole.num_rows)
    return whole.take(pa.array(index, mask=index < 0)), errors


class Broken(HouseError):
    """A step that raised on every row it saw. trace: of the first time."""

    def __init__(self, message: str, trace: str) -> None:
        super().__init__(message, trace)  # both, so that it can be sent between processes
        self.trace = trace

    def __str__(self) -> str:
        return str(self.args[0])


def broken(name: str, rows: int, trace: str) -> Broken:
    """The error of a step that raised on every row it saw."""
    last = trace.strip().splitlines()[-1]
    return Broken(f"{name} raised on every one of {rows} rows; the first time: {last}", trace)


def _halve(
    work: Callable[[pa.Table], pa.Table], rows: pa.Table, start: int
) -> Iterator[tuple[int, pa.Table | None, str | None]]:
    try:
        table = work(rows)
        if table.num_rows != rows.num_rows:
            raise ValueError(f"{table.num_rows} results for {rows.num_rows} rows")
        yield start, table, None
        return
    except (HouseError, MemoryError):
        raise
    except Exception as error:
        if isinstance(error, OSError) and error.errno in FULL:
            raise
        if rows.num_rows == 1:
            yield start, None, traceback.format_exc()
            return
    half = rows.num_rows // 2  # outside the handler: else each traceback would hold those of all halvings above it
    yield from _halve(work, rows.slice(0, half), start)
    yield from _halve(work, rows.slice(half), start + half)


def _silent(done: int, total: int) -> None:
    """Progress of one block is too fine to show."""
