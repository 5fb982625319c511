"""Curated shards and their manifest: all that training knows of curation. Needs numpy and pyarrow alone.

A curated folder holds `data/{split}-00000-of-00003.parquet` in TRL's column conventions plus `row_id`, so that
`datasets.load_dataset(folder)` and any trainer read it, and `manifest.json`, written last.
"""

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, get_args

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from .folder import HouseError, read_json, whole_folder, write_json
from .rows import MESSAGE, ROW

Kind = Literal["sft", "preference", "kto", "text"]
KINDS: tuple[str, ...] = get_args(Kind)
SCHEMA_VERSION = 1
SHARD_BYTES = 256 * 2**20  # of Arrow memory, some 60-100 MB on disk

# TRL's columns (trl docs, dataset_formats) <- ours
_COLUMNS: dict[str, dict[str, str]] = {
    "sft": {"messages": "messages"},
    "preference": {"prompt": "messages", "chosen": "chosen", "rejected": "rejected"},
    "kto": {"prompt": "messages", "completion": "chosen", "label": "label"},
    "text": {"text": "text"},
}
_OPTIONAL = ("tools", "spans")
# What some sets say besides, by kind: the source where there are several (tasks to balance); how good the answers are
# where the source told it (its columns of these names, as UltraFeedback's binarized sets call them)
_MORE: dict[str, tuple[str, ...]] = {"sft": ("source",), "preference": ("score_chosen", "score_rejected")}

Tables = Callable[[], Iterable[pa.Table]]
"""Makes an iterator over tables of schema ROW, again at each call."""


def shard_table(rows: pa.Table, kind: str, fields: Iterable[str], optional: Iterable[str]) -> pa.Table:
    """Rows (schema ROW) in TRL's columns. `fields`: the message fields to keep; `optional`: of tools, spans and what
    the kind may say besides, what to keep. Both are decided for the whole set, so that all shards have one schema."""
    fields = tuple(fields)
    columns: dict[str, pa.ChunkedArray | pa.Array] = {"row_id": rows["row_id"]}
    for theirs, ours in _COLUMNS[kind].items():
        column = rows[ours]
        columns[theirs] = _narrow(column, fields) if pa.types.is_list(column.type) else column
    for name in optional:
        columns[name] = _more(rows, name)
    return pa.table(columns)


def columns_of(kind: str) -> list[str]:
    """Columns of ROW that shards of this kind are made of."""
    more = ["source" if name == "source" else "meta" for name in _MORE.get(kind, ())]
    return list(dict.fromkeys(["row_id", *_COLUMNS[kind].values(), *_OPTIONAL, *more]))


def _more(rows: pa.Table, name: str) -> pa.ChunkedArray | pa.Array:
    """An optional column: of the row, or a number of that name in its meta."""
    if name in rows.column_names:
        return rows[name]
    said = pc.fill_null(pc.match_substring(rows["meta"], f'"{name}"'), False)
    if not pc.any(said).as_py():
        return pa.nulls(rows.num_rows, pa.float64())
    values = [
        json.loads(meta).get(name) if told else None
        for meta, told in zip(rows["meta"].to_pylist(), said.to_pylist(), strict=True)
    ]
    numbers = [float(x) if isinstance(x, int | float) and not isinstance(x, bool) else None for x in values]
    return pa.array(numbers, pa.float64())


class Survey:
    """What one split holds, learnt in one pass: rows, and of each column and message field its size and whether it is
    set anywhere."""

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self.rows = 0
        self.bits: dict[str, int] = {}  # of Arrow memory: by column, and by message field over all message columns
        self.set: set[str] = set()
        self.sources: set[str] = set()

    def of(self, tables: Iterable[pa.Table]) -> "Survey":
        for rows in tables:
            self.rows += rows.num_rows
            for name in ("row_id", *_COLUMNS[self.kind].values(), *_OPTIONAL):
                for chunk in rows[name].chunks:
                    self._look(name, chunk)
            for name in _MORE.get(self.kind, ()):
                values = _more(rows, name)
                self._add(name, _weight(values), name != "source" and values.null_count < len(values))
                if name == "source":
                    self.sources |= set(pc.unique(values).to_pylist())
        return self

    def _look(self, name: str, chunk: pa.Array) -> None:
        if name in _OPTIONAL or not pa.types.is_list(chunk.type):
            self._add(name, _weight(chunk), chunk.null_count < len(chunk))
            return
        self._add(name, 32 * len(chunk), True)
        turns = chunk.flatten()
        for field, said in zip(MESSAGE, turns.flatten(), strict=True):
            self._add(f"messages.{field.name}", _weight(said), said.null_count < len(said))

    def _add(self, name: str, bits: int, is_set: bool) -> None:
        self.bits[name] = self.bits.get(name, 0) + bits
        if is_set:
            self.set.add(name)

    def cuts(self, fields: Iterable[str], optional: Iterable[str]) -> tuple[int, int]:
        """Number of shards of about SHARD_BYTES and rows of each, by what the rows say alone."""
        wanted = ["row_id", *_COLUMNS[self.kind].values(), *optional, *(f"messages.{field}" for field in fields)]
        bits = sum(self.bits.get(name, 0) for name in wanted)
        if not self.rows:
            return 0, 1
        size = -(-self.rows // max(1, -(-bits // (8 * SHARD_BYTES))))
        return -(-self.rows // size), size


def used(surveys: Iterable[Survey]) -> tuple[list[str], list[str]]:
    """Message fields that are set anywhere, role and content always; and the optional columns that are, the source
    where there are several."""
    surveys = list(surveys)
    known = {name for survey in surveys for name in survey.set} | {"messages.role", "messages.content"}
    if len({source for survey in surveys for source in survey.sources}) > 1:
        known.add("source")
    fields = [field.name for field in MESSAGE if f"messages.{field.name}" in known]
    more = {name for survey in surveys for name in _MORE.get(survey.kind, ())}
    return fields, [name for name in (*_OPTIONAL, *sorted(more)) if name in known]


def _narrow(column: pa.ChunkedArray, fields: tuple[str, ...]) -> pa.ChunkedArray:
    chunks = []
    kind = pa.list_(pa.struct([pa.field(name, pa.string()) for name in fields]))
    for chunk in column.chunks:
        turns = chunk.values
        struct = pa.StructArray.from_arrays([turns.field(name) for name in fields], names=list(fields))
        chunks.append(pa.ListArray.from_arrays(chunk.offsets, struct, type=kind, mask=chunk.is_null()))
    return pa.chunked_array(chunks, type=kind)


def write_curated(
    folder: Path,
    kind: str,
    splits: Mapping[str, Tables | Iterable[pa.Table]],
    manifest: Mapping[str, Any],
    extra: Callable[[Mapping[str, Any]], Mapping[str, str]],
) -> dict[str, Any]:
    """Writes shards, then the files (name -> text) that `extra` makes of the whole manifest and `columns` (the shards'
    schema), then the manifest: `manifest` plus schema_version, kind, files and rows (of split train).

    splits: name -> tables of schema ROW, in order, or a function that gives them: they are read twice, and held one
    shard at a time. Equal rows give equal bytes, however they are parted among tables."""
    sources = {name: _again(tables) for name, tables in splits.items()}
    surveys = {name: Survey(kind).of(tables()) for name, tables in sources.items()}
    fields, optional = used(surveys.values())
    files = []
    with whole_folder(folder) as temporary:
        (temporary / "data").mkdir()
        for split, tables in sources.items():
            count, size = surveys[split].cuts(fields, optional)
            shards = _shards((shard_table(table, kind, fields, optional) for table in tables()), size)
            for index, shard in enumerate(shards):
                name = f"data/{split}-{index:05d}-of-{count:05d}.parquet"
                pq.write_table(shard, temporary / name, compression="zstd")
                files.append({"path": name, "split": split, "rows": shard.num_rows, **_bytes(temporary / name)})
        rows = sum(int(str(file["rows"])) for file in files if file["split"] == "train")
        whole = {"schema_version": SCHEMA_VERSION, **manifest, "kind": kind, "files": files, "rows": rows}
        columns = shard_table(ROW.empty_table(), kind, fields, optional).schema
        for name, text in extra(whole | {"columns": columns}).items():
            (temporary / name).write_text(text, encoding="utf-8")
        write_json(temporary / "manifest.json", whole)
    return whole


def _again(tables: Tables | Iterable[pa.Table]) -> Tables:
    if callable(tables):
        return tables
    held = list(tables)
    return lambda: held


def _bytes(path: Path) -> dict[str, Any]:
    return {"bytes": path.stat().st_size, "sha256": _sha256(path)}


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _weight(values: pa.Array) -> int:
    """Bits of Arrow memory that these values need, the same however they are sliced and padded."""
    kind = values.type
    if pa.types.is_string(kind):
        return 32 * len(values) + 8 * (pc.sum(pc.binary_length(values)).as_py() or 0)
    if pa.types.is_list(kind):
        return 32 * len(values) + _weight(values.flatten())
    if pa.types.is_struct(kind):
        return sum(_weight(field) for field in values.flatten())
    return len(values) * int(kind.bit_width)


def _shards(tables: Iterable[pa.Table], size: int) -> Iterator[pa.Table]:
    """`tables` regrouped into shards of `size` rows."""
    waiting: list[pa.Table] = []
    for table in tables:
        waiting.append(table)
        while sum(one.num_rows for one in waiting) >= size:
            whole = pa.concat_tables(waiting)
            yield whole.slice(0, size).combine_chunks()
            waiting = [whole.slice(size)]
    if waiting and (rest := pa.concat_tables(waiting)).num_rows:
        yield rest.combine_chunks()


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a curated folder; a HouseError where there is none or it is of another version."""
    path = folder / "manifest.json"
    if not path.is_file():
        raise HouseError(f"{folder} holds no manifest.json: not a curated set, or curation did not finish there")
    manifest = read_json(path)
    if manifest.get("schema_version") != SCHEMA_VERSION:
        raise HouseError(
            f"{path}: schema_version {manifest.get('schema_version')}, this gristmill reads {SCHEMA_VERSION}"
        )
    return manifest


def read_split(folder: Path, split: str = "train", *, verify: bool = True) -> pa.Table:
    """All rows of one split. verify: compare each file with the manifest's sha256 first."""
    manifest = read_manifest(folder)
    tables = []
    for file in manifest["files"]:
        if file["split"] != split:
            continue
        path = folder / file["path"]
        if verify and _sha256(path) != file["sha256"]:
            raise HouseError(
                f"{path} does not have the sha256 that the manifest states; curate again into a new folder"
            )
        tables.append(pq.read_table(path))
    if not tables:
        raise HouseError(f"{folder} has no split {split!r}; it has {sorted({f['split'] for f in manifest['files']})}")
    return pa.concat_tables(tables)


def plain_messages(value: list[dict[str, Any]] | None) -> list[dict[str, Any]]:
    """Messages as a chat template expects them: null fields left out, tool_calls parsed from JSON."""
    plain = []
    for turn in value or ():
        kept = {key: item for key, item in turn.items() if item is not None}
        if "tool_calls" in kept:
            kept["tool_calls"] = json.loads(kept["tool_calls"])
        plain.append(kept)
    return plain
