"""Judging the live rows of a step: row judges block by block in the pool, corpus judges over all rows at once, and what
each verdict leaves in the ledger."""

import json
import pickle
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from .blocks import Block, blocks
from .cache import BROKEN, Taken, attempt, broken, take
from .folder import HouseError, RunFolder, parquet_writer
from .ledger import LEDGER, Mask, State, ledger_rows
from .pool import INLINE, Pool, fitting
from .steps import Corpus, CorpusJudge, Measure, RowJudge, Tools, columns_read, value_names, verdicts

KEPT, VALUES = "kept", "values.parquet"  # below a step's folder
Write = Callable[[pa.Table], None]
Fault = dict[str, Any]
Work = tuple[Block, pa.Table | None, dict[int, str]]  # rows, their values, tracebacks of measures by row


class Live(Corpus, Protocol):
    """What judging asks of the rows that reach a step (sift.LiveRows)."""

    folder: RunFolder
    state: State
    tools: Tools
    pool: Pool
    measured: pa.Table | None
    taken: list[Taken]


@dataclass(frozen=True)
class Judged:
    """What a worker says of one block. keep: of each row; ledger: the verdicts worth storing."""

    keep: Mask
    ledger: pa.Table
    faults: list[Fault]
    notes: list[str]


def judge(step: RowJudge | CorpusJudge, live: Live, write: Write, faults: list[Fault]) -> Mask:
    """Judges all live rows: hands ledger rows to `write` and tracebacks to `faults`, in the order of the rows; returns
    which of the live rows stay."""
    live.taken = [measure_of(live, measure) for measure in step.needs]
    keeps = _by_rows(step, live, write, faults) if step.scope == "row" else _by_corpus(step, live, write, faults)
    return np.concatenate([np.zeros(0, np.bool_), *keeps])


def measure_of(live: Live, measure: Measure) -> Taken:
    """Values of one measure for the live rows, those that lack measured now."""
    pool = fitting(live.pool, measure, live.rows)
    return take(live.folder, measure, live.state, live.tools, live.progress, pool)


# ---- row judges


def _by_rows(step: RowJudge, live: Live, write: Write, faults: list[Fault]) -> Iterator[Mask]:
    pool = fitting(live.pool, step, live.rows)
    keep_scores = step.score is None
    if pool is INLINE:
        work: Callable[[Work], Judged] = partial(judged, step, keep_scores)
    else:
        work = partial(judge_block, pickle.dumps(step), keep_scores, pool.apart)
    raised = done = 0
    first: list[Fault] = []
    with ExitStack() as stack:
        for found in pool.map(work, _works(live, stack)):
            write(found.ledger)
            first = first or found.faults
            faults += found.faults
            raised += len(found.faults)
            done += len(found.keep)
            for note in found.notes:
                warnings.warn(note, UserWarning, stacklevel=2)
            live.progress(done, live.rows)
            yield found.keep
    if raised == live.rows > 1:
        raise broken(type(step).__name__, raised, first[0]["raw"])


def _works(live: Live, stack: ExitStack) -> Iterator[Work]:
    """Blocks of live rows with their values, which are kept on the way."""
    keeper: Write | None = None
    for block in blocks(live.state):
        if not live.taken:
            yield block, None, {}
            continue
        values, errors = _values(live.taken, block.table(["content_id"])["content_id"])
        if plain := plain_columns(values.schema):
            if keeper is None:
                path = live.kept / VALUES
                keeper = stack.enter_context(parquet_writer(path, values.select(plain).schema))
            keeper(values.select(plain))
        yield block, values, errors


def judge_block(step: bytes, keep_scores: bool, apart: bool, work: Work) -> Judged:
    """What a worker does. apart: it is another process, whose warnings nobody would see."""
    if not apart:
        return judged(pickle.loads(step), keep_scores, work)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always", UserWarning)
        found = judged(pickle.loads(step), keep_scores, work)
    notes = [str(note.message) for note in said if note.category is UserWarning]
    return Judged(found.keep, found.ledger, found.faults, notes)


def judged(step: RowJudge, keep_scores: bool, work: Work) -> Judged:
    """Verdicts of a row judge on one block. A row on which it raises is dropped as judge_error, its neighbours not."""
    block, values, errors = work
    columns = columns_read(step)
    table = block.table(list(dict.fromkeys(["row_id", *columns])))
    rows = table.select(columns) if columns else pa.table({"_none": pa.nulls(table.num_rows)})
    if values is None:
        values = pa.table({"_none": pa.nulls(table.num_rows)})
    found, failed = tried(step, rows, values, BROKEN)
    faults: list[Fault] = []
    found = _with_errors(found, table["row_id"], {**errors, **failed}, step, faults)
    keep = np.asarray(found["keep"], np.bool_)
    return Judged(keep, ledger_rows(table["row_id"], found, keep_scores=keep_scores), faults, [])


def tried(step: RowJudge, rows: pa.Table, values: pa.Table, least: int = 2) -> tuple[pa.Table, dict[int, str]]:
    """`step.judge` of these rows and their values; rows on which it raises are nulls there, their tracebacks told by
    row. least: as in cache.attempt."""
    index = pa.table({"index": pa.array(np.arange(rows.num_rows))})

    def judge(piece: pa.Table) -> pa.Table:
        start = piece["index"][0].as_py()
        return step.judge(rows.slice(start, piece.num_rows), values.slice(start, piece.num_rows))

    return attempt(judge, index, type(step).__name__, least)


# ---- corpus judges


def _by_corpus(step: CorpusJudge, live: Live, write: Write, faults: list[Fault]) -> Iterator[Mask]:
    """Rows that a measure failed on come to the judge as nulls and are dropped as judge_error."""
    errors = _all_values(live) if live.taken else {}
    judged = step.judge(live) if live.rows else verdicts([])
    if judged.num_rows != live.rows:
        raise HouseError(f"{step!r} gave {judged.num_rows} verdicts for {live.rows} rows")
    start = 0
    for ids in live.tables(["row_id"]):
        size = ids.num_rows
        here = {index - start: trace for index, trace in errors.items() if start <= index < start + size}
        found = _with_errors(judged.slice(start, size), ids["row_id"], here, step, faults)
        write(ledger_rows(ids["row_id"], found, keep_scores=step.score is None))
        yield np.asarray(found["keep"], np.bool_)
        start += size


def _all_values(live: Live) -> dict[int, str]:
    """Puts the values of all live rows at the judge's hand, lists mapped from a file and not in memory; gives the
    tracebacks by row."""
    errors: dict[int, str] = {}
    plain: list[pa.Table] = []
    start = 0
    with ExitStack() as stack:
        keeper: Write | None = None
        lists: Any = None
        for table in live.tables(["content_id"]):
            values, failed = _values(live.taken, table["content_id"])
            errors |= {start + index: trace for index, trace in failed.items()}
            start += table.num_rows
            names = plain_columns(values.schema)
            plain.append(values.select(names))
            if names:
                keeper = keeper or stack.enter_context(parquet_writer(live.kept / VALUES, plain[0].schema))
                keeper(plain[-1])
            if len(names) < values.num_columns:
                nested = values.drop_columns(names)
                if lists is None:
                    lists = stack.enter_context(pa.ipc.new_file(live.scratch / "lists.arrow", nested.schema))
                lists.write_table(nested)
    if plain:
        columns = dict(zip(plain[0].column_names, pa.concat_tables(plain).columns, strict=True))
        if lists is not None:
            mapped = pa.ipc.open_file(pa.memory_map(str(live.scratch / "lists.arrow"))).read_all()
            columns |= dict(zip(mapped.column_names, mapped.columns, strict=True))
        live.measured = pa.table(columns)
    return errors


# ---- values and faults


def _values(taken: Sequence[Taken], contents: pa.ChunkedArray) -> tuple[pa.Table, dict[int, str]]:
    """Columns of all measures aligned with these contents, and tracebacks by row."""
    columns: dict[str, Any] = {}
    errors: dict[int, str] = {}
    for one, names in zip(taken, value_names([one.values.schema.names for one in taken]), strict=True):
        columns |= dict(zip(names, one.values.of(contents).columns, strict=True))
        if one.errors:
            hit = pc.is_in(contents, value_set=pa.array(sorted(one.errors), pa.string()))
            for index in np.flatnonzero(np.asarray(hit)).tolist():
                errors[index] = one.errors[contents[index].as_py()]
    return pa.table(columns), errors


def plain_columns(schema: pa.Schema) -> list[str]:
    """Numbers and names that a judge read: kept beside its verdicts, for deciding again without the rows' text."""
    return [field.name for field in schema if not (pa.types.is_nested(field.type) or pa.types.is_null(field.type))]


def _with_errors(
    judged: pa.Table,
    ids: pa.ChunkedArray,
    errors: Mapping[int, str],
    step: RowJudge | CorpusJudge,
    faults: list[Fault],
) -> pa.Table:
    """Verdicts in which rows that raised are dropped as judge_error; their tracebacks go to `faults`."""
    if not errors:
        return judged
    raised = np.zeros(len(ids), np.bool_)
    proof: list[str | None] = [None] * len(ids)
    for index, trace in sorted(errors.items()):
        last = trace.strip().splitlines()[-1]
        raised[index] = True
        proof[index] = json.dumps({"error": last})
        faults.append({"row_id": ids[index].as_py(), "step": repr(step), "error": last, "raw": trace})
    fate = {
        "keep": pa.scalar(False),
        "reason": pa.scalar("judge_error"),
        "score": pa.scalar(None, pa.float64()),
        "evidence": pa.array(proof, pa.string()),
    }
    columns = {}
    for name, instead in fate.items():
        kind = LEDGER.field(name).type
        said = judged[name].cast(kind) if name in judged.column_names else pa.nulls(len(ids), kind)
        columns[name] = pc.if_else(pa.array(raised), instead, said)
    return pa.table(columns)
