"""DuckDB views over a run's Parquet files, and SQL for strangers that can read them and do nothing else.

On disk the ledger holds only drops, changes, scores and evidence; the view `verdicts` derives the plain keeps, so that
it answers for every row at every step it reached. Nothing here loops over rows: files are named, DuckDB reads them.
"""

import json
import os
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import yaml

from .folder import HouseError, RunFolder, read_json
from .rows import ROW

Json = dict[str, Any]

# view -> columns with their DuckDB types; what a stranger may rely on, also where the run has no such files yet
COLUMNS: dict[str, dict[str, str]] = {
    "verdicts": {
        "set": "VARCHAR",
        "step": "INTEGER",
        "judge": "VARCHAR",
        "row_id": "VARCHAR",
        "keep": "BOOLEAN",
        "reason": "VARCHAR",
        "score": "DOUBLE",
        "evidence": "VARCHAR",
    },
    "measures": {"content_id": "VARCHAR", "measure": "VARCHAR", "column": "VARCHAR", "value": "DOUBLE"},
    "curated": {"set": "VARCHAR", "split": "VARCHAR", "row_id": "VARCHAR", "file": "VARCHAR"},
    "quarantine": {
        "source": "VARCHAR",
        "file": "VARCHAR",
        "line": "BIGINT",
        "error": "VARCHAR",
        "raw": "VARCHAR",
        "row_id": "VARCHAR",
        "step": "VARCHAR",
    },
    "funnel": {
        "set": "VARCHAR",
        "step": "INTEGER",
        "judge": "VARCHAR",
        "came": "BIGINT",
        "made": "BIGINT",
        "kept": "BIGINT",
        "dropped": "BIGINT",
        "seconds": "DOUBLE",
    },
    "reasons": {"set": "VARCHAR", "step": "INTEGER", "judge": "VARCHAR", "reason": "VARCHAR", "rows": "BIGINT"},
    "makers": {  # each maker of each set: its requests, its rows, what they cost
        "set": "VARCHAR",
        "step": "INTEGER",
        "maker": "VARCHAR",
        "model": "VARCHAR",  # null, as all that follows up to refused, where it asked none
        "licence": "VARCHAR",
        "asked": "BIGINT",
        "answered": "BIGINT",
        "failed": "BIGINT",
        "parsed": "BIGINT",
        "unparsed": "BIGINT",
        "verified": "BIGINT",
        "refused": "BIGINT",
        "made": "BIGINT",
        "kept": "BIGINT",  # live at the end of the set, or of its last finished step
        "held_out": "BIGINT",
        "dropped": "BIGINT",
        "cached": "BIGINT",
        "prompt_tokens": "BIGINT",
        "tokens": "BIGINT",
        "cost": "DOUBLE",
        "tokens_per_row": "DOUBLE",  # of prompts and answers, judged ones too, by rows kept; null where none was
        "cost_per_row": "DOUBLE",
        "judged_model": "VARCHAR",  # what the maker's verifier asked of a model itself; null where it asked none
        "judged_asked": "BIGINT",
        "judged_answered": "BIGINT",
        "judged_failed": "BIGINT",
        "judged_parsed": "BIGINT",
        "judged_unparsed": "BIGINT",
        "judged_cached": "BIGINT",
        "judged_prompt_tokens": "BIGINT",
        "judged_tokens": "BIGINT",
        "judged_cost": "DOUBLE",
    },
    "maker_reasons": {  # what: failed, unparsed, refused, dropped, judged_failed, judged_unparsed; judge: who dropped
        "set": "VARCHAR",
        "step": "INTEGER",
        "maker": "VARCHAR",
        "what": "VARCHAR",
        "reason": "VARCHAR",
        "judge": "VARCHAR",
        "rows": "BIGINT",
    },
    "sources": {
        "source": "VARCHAR",
        "path": "VARCHAR",
        "shape": "VARCHAR",
        "licence": "VARCHAR",
        "read": "BIGINT",
        "rows": "BIGINT",
        "quarantined": "BIGINT",
    },
    "runs": {
        "stage": "VARCHAR",
        "objective": "VARCHAR",
        "status": "VARCHAR",
        "loss": "DOUBLE",
        "tokens_per_s": "DOUBLE",
        "steps": "BIGINT",
        "rows": "BIGINT",
        "seconds": "DOUBLE",
        "record": "VARCHAR",
    },
    "evaluation": {"model": "VARCHAR", "set": "VARCHAR", "metric": "VARCHAR", "value": "DOUBLE", "rows": "BIGINT"},
    "trained": {"stage": "VARCHAR", "step": "BIGINT", "row_id": "VARCHAR"},
    "excluded": {"stage": "VARCHAR", "row_id": "VARCHAR", "reason": "VARCHAR"},  # curated rows a stage left out
    "row_losses": {"stage": "VARCHAR", "row_id": "VARCHAR"},  # and whatever the stage wrote of each row
}


def sources(folder: RunFolder) -> list[Json]:
    """The records of every source that was read to its end, by name."""
    return [record for path in sorted(folder.rows.glob("*.json")) if "parts" in (record := read_json(path))]


def sets(folder: RunFolder) -> list[Json]:
    """set.json of every set that was begun, in the recipe's order."""
    place = _places(folder)
    return sorted((read_json(path) for path in folder.ledger.glob("[!.]*/set.json")), key=lambda one: place(one["set"]))


def steps(folder: RunFolder) -> list[Json]:
    """step.json of every finished step, by set and step, each with its `folder` (a Path)."""
    place = _places(folder)
    found = [{**read_json(path), "folder": path.parent} for path in folder.ledger.glob("[!.]*/[0-9]*/step.json")]
    return sorted(found, key=lambda step: (place(step["set"]), step["step"]))


def stages(folder: RunFolder) -> list[Json]:
    """run.json of every training stage in the recipe's order, each with its `stage` (the folder's name)."""
    place = _places(folder)
    found = [{**read_json(path), "stage": path.parent.name} for path in folder.root.glob("[!.]*/run.json")]
    return sorted(found, key=lambda run: place(run["stage"]))


def _places(folder: RunFolder) -> Callable[[str], tuple[int, str]]:
    """Sort key of the names of sets and stages: as the stages of recipe.yaml first name them, others after them by
    name."""
    names: list[str] = []
    if folder.recipe.is_file():
        for event in yaml.parse(folder.recipe.read_text(encoding="utf-8"), Loader=yaml.SafeLoader):
            if isinstance(event, yaml.ScalarEvent):
                names.append(event.value)
    if "stages" in names:  # a model may name its corpus before
        names = names[names.index("stages") :]
    return lambda name: (names.index(name) if name in names else len(names), name)


def evaluations(folder: RunFolder) -> list[Json]:
    """The rows of evaluation.json."""
    path = folder.root / "evaluation.json"
    return list(read_json(path).get("rows", [])) if path.is_file() else []


def connect(folder: RunFolder, scratch: str | Path | None = None) -> Any:
    """A DuckDB connection (in memory) with the views of COLUMNS and `rows`, and a schema `measure` with one view per
    measure, named as its folder. scratch: where large sorts and joins spill (default: the system's temporary folder).
    Needs the extra `curate`."""
    if not folder.root.is_dir():
        raise HouseError(f"{folder.root} is no folder. Give the OUT of a run.")
    duckdb = _duckdb()
    con = duckdb.connect(":memory:")
    con.execute("SET temp_directory = ?", [str(scratch or Path(tempfile.gettempdir()) / "gristmill-duckdb")])
    _rows(con, folder)
    _measures(con, folder)
    _tables(con, folder)
    _verdicts(con, folder)
    _makers(con, folder)
    _outputs(con, folder)
    return con


def _duckdb() -> Any:
    try:
        import duckdb
    except ImportError as error:
        raise HouseError("looking into a run needs DuckDB: pip install 'gristmill[curate]'") from error
    return duckdb


# --- the views -------------------------------------------------------------------------------------------------------


def row_files(folder: RunFolder) -> list[Path]:
    """The parts of every source read to its end and of every finished maker."""
    files = [folder.rows / part for record in sources(folder) for part in record["parts"]]
    return files + [file for step in steps(folder) for file in made_files(folder, step)]


def made_files(folder: RunFolder, step: Mapping[str, Any]) -> list[Path]:
    """The parts of `rows` that a step made."""
    return [folder.rows / name for name in step.get("made_parts", ())]


def _rows(con: Any, folder: RunFolder) -> None:
    files = row_files(folder)
    if files:
        con.execute(f"CREATE VIEW rows AS SELECT {', '.join(ROW.names)} FROM {_read(files)}")
    else:
        con.register("empty_rows", ROW.empty_table())
        con.execute("CREATE TABLE rows AS FROM empty_rows")
        con.unregister("empty_rows")


def _measures(con: Any, folder: RunFolder) -> None:
    con.execute("CREATE SCHEMA measure")
    long = []
    for path in sorted(folder.measures.glob("[!.]*/measure.json")):
        files = sorted(path.parent.glob("*.parquet"))
        if not files:
            continue
        key = path.parent.name
        con.execute(f"CREATE VIEW measure.{_name(key)} AS FROM {_read(files)}")
        for column in _numeric(pq.read_schema(files[0])):
            long.append(
                f'SELECT content_id, {_text(key)} AS measure, {_text(column)} AS "column",'
                f" {_name(column)}::DOUBLE AS value FROM measure.{_name(key)}"
            )
    _union(con, "measures", long)


def _numeric(schema: pa.Schema) -> list[str]:
    types = pa.types
    return [
        field.name
        for field in schema
        if types.is_integer(field.type) or types.is_floating(field.type) or types.is_boolean(field.type)
    ]


def _tables(con: Any, folder: RunFolder) -> None:
    """What the run's JSON files say, as small tables."""
    done = steps(folder)
    _table(con, "funnel", done)
    reasons = [{**step, "reason": why, "rows": n} for step in done for why, n in step.get("reasons", {}).items()]
    _table(con, "reasons", reasons)
    _table(con, "sources", [{**record, "source": record["name"]} for record in sources(folder)])
    _table(con, "runs", [_run(run) for run in stages(folder)])
    _table(con, "evaluation", evaluations(folder))


def _run(run: Mapping[str, Any]) -> Json:
    record = json.dumps(run, ensure_ascii=False, default=str)
    return {**run.get("plan", {}), **run, "record": record}


def _verdicts(con: Any, folder: RunFolder) -> None:
    """`lives` says at which step a row came into a set and at which it left; `verdicts` follows from it."""
    entered = [
        f"{_head(record)}, row_id, content_id, 0 AS entry FROM rows WHERE maker IS NULL AND source IN"
        f" ({', '.join(_text(name) for name in record['sources'])})"
        for record in sets(folder)
        if record["sources"]
    ]
    stored, scores = [], []
    done = steps(folder)
    for step in done:
        number = int(step["step"])
        judged = _read([step["folder"] / "verdicts.parquet"])
        stored.append(f"{_head(step)}, {number} AS step, row_id, keep, reason, score, evidence FROM {judged}")
        if made := made_files(folder, step):
            entered.append(f"{_head(step)}, row_id, content_id, {number} AS entry FROM {_read(made)}")
        if step["scope"] == "overrides":
            back = f"row_id IN (SELECT row_id FROM {judged} WHERE keep AND reason = 'override_keep')"
            ids = f"row_id, any_value(content_id) AS content_id, {number} AS entry"
            entered.append(f"{_head(step)}, {ids} FROM rows WHERE {back} GROUP BY 2")
        if key := measure_of(folder, step):
            value = f"any_value({_name(step['score'])})::DOUBLE AS score"
            scores.append(f"{_head(step)}, {number} AS step, content_id, {value} FROM measure.{_name(key)} GROUP BY 3")
    _table(con, "steps", done, {"set": "VARCHAR", "step": "INTEGER", "judge": "VARCHAR", "name": "VARCHAR"})
    verdict = COLUMNS["verdicts"]
    _union(con, "stored", stored, {name: verdict[name] for name in verdict if name != "judge"})
    _union(
        con, "entered", entered, {"set": "VARCHAR", "row_id": "VARCHAR", "content_id": "VARCHAR", "entry": "INTEGER"}
    )
    _union(con, "scores", scores, {"set": "VARCHAR", "step": "INTEGER", "content_id": "VARCHAR", "score": "DOUBLE"})
    con.execute(_LIVES)
    con.execute(_JUDGED)
    con.execute(_VERDICTS)


def _head(record: Mapping[str, Any]) -> str:
    return f'SELECT {_text(record["set"])} AS "set"'


# A row leaves a set once; one that a person brought back comes in again at the step Overrides, after its drop.
_LIVES = """
CREATE VIEW lives AS
SELECT e."set", e.row_id, e.content_id, e.entry, d.step AS dropped_at
FROM entered e
LEFT JOIN (SELECT "set", row_id, min(step) AS step FROM stored WHERE NOT keep GROUP BY ALL) d
  ON d."set" = e."set" AND d.row_id = e.row_id AND d.step >= e.entry"""

# Without the scores of plain keeps, which lie in the measures
_JUDGED = """
CREATE VIEW judged AS
SELECT s."set", s.step, s.judge, l.row_id, l.content_id, coalesce(v.keep, true) AS keep, v.reason, v.score, v.evidence
FROM lives l
JOIN steps s ON s."set" = l."set" AND s.step >= l.entry AND s.step <= coalesce(l.dropped_at, s.step)
LEFT JOIN stored v ON v."set" = s."set" AND v.step = s.step AND v.row_id = l.row_id"""

_VERDICTS = """
CREATE VIEW verdicts AS
SELECT j."set", j.step, j.judge, j.row_id, j.keep, j.reason, coalesce(j.score, m.score) AS score, j.evidence
FROM judged j
LEFT JOIN scores m ON m."set" = j."set" AND m.step = j.step AND m.content_id = j.content_id"""


def _makers(con: Any, folder: RunFolder) -> None:
    """What each maker says of its requests (step.json), beside what the ledger says of its rows."""
    done = [step for step in steps(folder) if step["scope"] == "maker"]
    made = [
        f"{_head(step)}, {int(step['step'])} AS step, row_id FROM {_read(files)}"
        for step in done
        if (files := made_files(folder, step))
    ]
    _union(con, "made_rows", made, {"set": "VARCHAR", "step": "INTEGER", "row_id": "VARCHAR"})
    counted = [name for name in COLUMNS["makers"] if name not in ("kept", "held_out", "dropped")]
    told = {name: COLUMNS["makers"][name] for name in counted if not name.endswith("_per_row")}
    _table(con, "maker_steps", [_told(step) for step in done], told)
    _table(con, "maker_told", [one for step in done for one in _told_reasons(step)], COLUMNS["maker_reasons"])
    con.execute(_MADE_FATES)
    con.execute(_MAKERS)
    con.execute(_MAKER_REASONS)


def _told(step: Mapping[str, Any]) -> Json:
    told = dict(step.get("synthesis", {}))
    told |= {f"judged_{name}": value for name, value in told.pop("judged", {}).items()}
    said = {name: sum(v.values()) if isinstance(v, dict) else v for name, v in told.items()}
    if told.get("model") is None:  # a maker that looks at rows as others ask: nobody answered
        said.pop("asked", None)
    return said | {"set": step["set"], "step": step["step"], "maker": step["name"], "made": step["made"]}


def _told_reasons(step: Mapping[str, Any]) -> Iterator[Json]:
    head = {"set": step["set"], "step": step["step"], "maker": step["name"]}
    told = step.get("synthesis", {})
    groups = {what: told.get(what, {}) for what in ("failed", "unparsed", "refused")}
    groups |= {f"judged_{what}": told.get("judged", {}).get(what, {}) for what in ("failed", "unparsed")}
    for what, reasons in groups.items():
        for reason, rows in reasons.items():
            yield head | {"what": what, "reason": reason, "rows": rows}


# A made row that a person brought back is kept: Overrides come last.
_MADE_FATES = """
CREATE VIEW made_fates AS
SELECT f."set", f.step, f.row_id, v.step AS dropped_at, v.reason
FROM (
  SELECT m."set", m.step, m.row_id, min(d.step) AS dropped_at
  FROM made_rows m
  LEFT JOIN stored d ON d."set" = m."set" AND d.row_id = m.row_id AND d.step >= m.step AND NOT d.keep
  GROUP BY ALL
) f
LEFT JOIN stored b ON b."set" = f."set" AND b.row_id = f.row_id AND b.keep AND b.reason = 'override_keep'
LEFT JOIN stored v ON v."set" = f."set" AND v.row_id = f.row_id AND v.step = f.dropped_at AND b.row_id IS NULL"""

_MAKERS = """
CREATE VIEW makers AS
SELECT t."set", t.step, t.maker, t.model, t.licence, t.asked, t.answered, t.failed, t.parsed, t.unparsed, t.verified,
  t.refused, t.made, coalesce(f.kept, 0) AS kept, coalesce(f.held_out, 0) AS held_out,
  coalesce(f.dropped, 0) AS dropped, t.cached, t.prompt_tokens, t.tokens, t.cost,
  (t.prompt_tokens + t.tokens + coalesce(t.judged_prompt_tokens + t.judged_tokens, 0)) / nullif(f.kept, 0)
    AS tokens_per_row,
  (t.cost + coalesce(t.judged_cost, 0)) / nullif(f.kept, 0) AS cost_per_row,
  t.judged_model, t.judged_asked, t.judged_answered, t.judged_failed, t.judged_parsed, t.judged_unparsed,
  t.judged_cached, t.judged_prompt_tokens, t.judged_tokens, t.judged_cost
FROM maker_steps t
LEFT JOIN (
  SELECT "set", step, count(*) FILTER (WHERE dropped_at IS NULL) AS kept,
    count(*) FILTER (WHERE reason = 'held_out') AS held_out,
    count(*) FILTER (WHERE dropped_at IS NOT NULL AND reason IS DISTINCT FROM 'held_out') AS dropped
  FROM made_fates GROUP BY ALL
) f ON f."set" = t."set" AND f.step = t.step"""

_MAKER_REASONS = """
CREATE VIEW maker_reasons AS
SELECT "set", step, maker, what, reason, judge, rows FROM maker_told
UNION ALL BY NAME
SELECT f."set", f.step, t.maker, 'dropped' AS what, f.reason, s.name AS judge, count(*) AS rows
FROM made_fates f
JOIN maker_steps t ON t."set" = f."set" AND t.step = f.step
JOIN steps s ON s."set" = f."set" AND s.step = f.dropped_at
WHERE f.reason IS DISTINCT FROM 'held_out'
GROUP BY ALL"""


def measure_of(folder: RunFolder, step: Mapping[str, Any]) -> str | None:
    """Folder name of the measure whose column a step judged by; None where it judged by none that is stored."""
    for key in step.get("measures") or () if step.get("score") else ():
        path = folder.measures / key / "measure.json"
        if path.is_file() and step["score"] in read_json(path)["columns"] and any(path.parent.glob("*.parquet")):
            return str(key)
    return None


def _outputs(con: Any, folder: RunFolder) -> None:
    """What came out of the run: curated rows, training, and what could not be used."""
    curated = []
    for path in sorted((folder.root / "curated").glob("[!.]*/manifest.json")):
        for file in read_json(path)["files"]:
            curated.append(
                f'SELECT {_text(path.parent.name)} AS "set", {_text(file["split"])} AS split, row_id,'
                f" {_text(file['path'])} AS file FROM {_read([path.parent / file['path']])}"
            )
    _union(con, "curated", curated)
    quarantine = [_only(file, COLUMNS["quarantine"]) for file in sorted(folder.quarantine.glob("*.parquet"))]
    _union(con, "quarantine", quarantine)
    losses, trained, excluded = [], [], []
    for run in stages(folder):
        stage = folder.stage(run["stage"])
        head = f"SELECT {_text(run['stage'])} AS stage"
        losses += [f"{head}, * FROM {_read([f])}" for f in sorted((stage / "row_losses").glob("train*.parquet"))]
        if (file := stage / "steps.parquet").is_file():
            trained.append(f"{head}, step::BIGINT AS step, row_id FROM {_read([file])}")
        if (file := stage / "excluded.parquet").is_file():
            excluded.append(f"{head}, row_id, reason FROM {_read([file])}")
    _union(con, "row_losses", losses)
    _union(con, "trained", trained)
    _union(con, "excluded", excluded)


def _only(file: Path, columns: Mapping[str, str]) -> str:
    """`file` with exactly these columns; those it lacks are null."""
    has = set(pq.read_schema(file).names)
    picked = [f"{_name(n) if n in has else 'NULL'}::{kind} AS {_name(n)}" for n, kind in columns.items()]
    return f"SELECT {', '.join(picked)} FROM {_read([file])}"


def _union(con: Any, name: str, selects: Sequence[str], columns: Mapping[str, str] | None = None) -> None:
    if not selects:
        empty = ", ".join(f"NULL::{kind} AS {_name(n)}" for n, kind in (columns or COLUMNS[name]).items())
        selects = [f"SELECT {empty} WHERE false"]
    con.execute(f"CREATE VIEW {name} AS {' UNION ALL BY NAME '.join(selects)}")


def _table(con: Any, name: str, records: Iterable[Mapping[str, Any]], columns: Mapping[str, str] | None = None) -> None:
    columns = columns or COLUMNS[name]
    con.execute(f"CREATE TABLE {name} ({', '.join(f'{_name(n)} {kind}' for n, kind in columns.items())})")
    values = [record.get(column) for record in records for column in columns]
    if values:
        marks = f"({', '.join('?' * len(columns))})"
        con.execute(f"INSERT INTO {name} VALUES {', '.join([marks] * (len(values) // len(columns)))}", values)


def _read(files: Sequence[Path]) -> str:
    for file in files:
        if not file.is_file():
            raise HouseError(
                f"{file} is missing, though the run's records name it: restore it, or run into a new folder"
            )
    return f"read_parquet([{', '.join(_text(os.path.abspath(file)) for file in files)}])"


def _text(value: str) -> str:
    return "'" + str(value).replace("'", "''") + "'"


def _name(value: str) -> str:
    return '"' + str(value).replace('"', '""') + '"'


# --- SQL for strangers -----------------------------------------------------------------------------------------------

# Query nodes that only read. DuckDB 2.0 also takes INSERT, UPDATE, DELETE and COPY TO as the body of a CTE, and calls
# the whole a SELECT: `WITH x AS (COPY … TO 'rows.parquet' (use_tmp_file false)) SELECT …` passes every setting below.
_NODES = {"SELECT_NODE", "SET_OPERATION_NODE", "RECURSIVE_CTE_NODE", "CTE_NODE"}
# Table functions over values alone. `query` and `json_execute_serialized_sql` would hide a statement from the check.
_FUNCTIONS = {
    *("unnest", "range", "generate_series", "json_each", "json_tree", "repeat", "repeat_row", "summary", "histogram"),
    *("histogram_values", "generate_subscripts", "regexp_split_to_table", "query_table", "pragma_table_info"),
    *("duckdb_columns", "duckdb_tables", "duckdb_views", "duckdb_functions", "duckdb_types", "duckdb_schemas"),
}


def query(folder: RunFolder, sql: str, most: int | None = None) -> tuple[list[str], list[tuple[Any, ...]]]:
    """Answer to one SELECT over the views: column names and rows (`most` of them at most).

    The statement is read, not trusted: one statement, of reading nodes only, in a connection that sees the run's
    Parquet files, writes nothing and cannot be reconfigured. HouseError with DuckDB's words otherwise."""
    duckdb = _duckdb()
    with tempfile.TemporaryDirectory(prefix="gristmill-sql-") as scratch, connect(folder, scratch) as con:
        try:
            _lock(con, folder)
            con.execute(_one_select(con, sql))
            rows = con.fetchall() if most is None else con.fetchmany(most)
        except duckdb.Error as error:
            raise HouseError(f"DuckDB could not answer: {error}\nViews: {', '.join(_names())}.") from error
        return [column[0] for column in con.description], rows


def _names() -> list[str]:
    return sorted({"rows", *COLUMNS})


def _lock(con: Any, folder: RunFolder) -> None:
    """Only the run's Parquet files, no network, no extensions, no Python variables; the lock itself comes last."""
    files = [*folder.root.rglob("*.parquet"), *folder.measures.rglob("*.parquet")]
    con.execute("SET python_enable_replacements = false")
    con.execute("SET autoinstall_known_extensions = false")
    con.execute("SET autoload_known_extensions = false")
    con.execute("SET allow_community_extensions = false")
    con.execute("SET allowed_paths = ?", [sorted({os.path.abspath(file) for file in files})])
    con.execute("SET enable_external_access = false")
    con.execute("SET lock_configuration = true")


def _one_select(con: Any, sql: str) -> Any:
    """The one statement in `sql`, if it only reads."""
    found = con.extract_statements(sql)
    if len(found) != 1 or found[0].type.name != "SELECT":
        kinds = ", ".join(statement.type.name for statement in found) or "nothing"
        raise HouseError(f"sql takes exactly one SELECT; this is {kinds}.")
    tree = json.loads(con.execute("SELECT json_serialize_sql(?::VARCHAR)", [found[0].query]).fetchone()[0])
    if tree["error"]:
        raise HouseError(f"sql takes a plain SELECT; this one cannot be checked: {tree.get('error_message')}.")
    for node in _walk(tree["statements"]):
        if "cte_map" in node and node["type"] not in _NODES:
            raise HouseError(f"sql only reads; this statement holds a {node['type'].removesuffix('_QUERY_NODE')}.")
        if node.get("type") == "TABLE_FUNCTION" and node["function"]["function_name"].lower() not in _FUNCTIONS:
            name = node["function"]["function_name"]
            raise HouseError(f"sql does not call {name}(): read the views instead, {', '.join(_names())}.")
    return found[0]


def _walk(tree: Any) -> Iterator[Json]:
    if isinstance(tree, dict):
        yield tree
    for item in tree.values() if isinstance(tree, dict) else tree if isinstance(tree, list) else ():
        yield from _walk(item)
