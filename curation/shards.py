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
import pyarrow.parquet as pq

from .folder import HouseError, read_json, whole_folder, write_json
from .rows import MESSAGE

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


def shard_table(rows: pa.Table, kind: str, fields: Iterable[str], optional: Iterable[str]) -> pa.Table:
    """Rows (schema ROW) in TRL's columns. `fields`: the message fields to keep; `optional`: of tools and spans, those
    to keep. Both are decided for the whole set, so that all shards have one schema."""
    fields = tuple(fields)
    columns: dict[str, pa.ChunkedArray | pa.Array] = {"row_id": rows["row_id"]}
    for theirs, ours in _COLUMNS[kind].items():
        column = rows[ours]
        columns[theirs] = _narrow(column, fields) if pa.types.is_list(column.type) else column
    for name in optional:
        columns[name] = rows[name]
    return pa.table(columns)


def used_fields(tables: Iterable[pa.Table], kind: str) -> tuple[list[str], list[str]]:
    """Message fields, and of tools and spans those columns, that are set anywhere in `tables`."""
    fields, optional = {"role", "content"}, set()
    for rows in tables:
        for ours in _COLUMNS[kind].values():
            if pa.types.is_list(rows[ours].type):
                turns = rows[ours].combine_chunks().flatten()
                fields |= {f.name for i, f in enumerate(MESSAGE) if turns.field(i).null_count < len(turns)}
        optional |= {name for name in _OPTIONAL if rows[name].null_count < rows.num_rows}
    return [f.name for f in MESSAGE if f.name in fields], [name for name in _OPTIONAL if name in optional]


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
    splits: Mapping[str, list[pa.Table]],
    manifest: Mapping[str, Any],
    extra: Callable[[Mapping[str, Any]], Mapping[str, str]],
) -> dict[str, Any]:
    """Writes shards, then the files (name -> text) that `extra` makes of the whole manifest, then the manifest:
    `manifest` plus schema_version, kind, files and rows (of split train).

    splits: name -> tables of schema ROW, in order. Equal input gives equal bytes."""
    every = [table for tables in splits.values() for table in tables]
    fields, optional = used_fields(every, kind)
    files = []
    with whole_folder(folder) as temporary:
        (temporary / "data").mkdir()
        for split, tables in splits.items():
            shards = list(_shards([shard_table(table, kind, fields, optional) for table in tables if table.num_rows]))
            for index, shard in enumerate(shards):
                name = f"data/{split}-{index:05d}-of-{len(shards):05d}.parquet"
                pq.write_table(shard, temporary / name, compression="zstd")
                raw = (temporary / name).read_bytes()
                files.append(
                    {
                        "path": name,
                        "split": split,
                        "rows": shard.num_rows,
                        "bytes": len(raw),
                        "sha256": hashlib.sha256(raw).hexdigest(),
                    }
                )
        rows = sum(int(str(file["rows"])) for file in files if file["split"] == "train")
        whole = {"schema_version": SCHEMA_VERSION, **manifest, "kind": kind, "files": files, "rows": rows}
        for name, text in extra(whole).items():
            (temporary / name).write_text(text, encoding="utf-8")
        write_json(temporary / "manifest.json", whole)
    return whole


def _shards(tables: list[pa.Table]) -> Iterator[pa.Table]:
    """`tables` regrouped into shards of about SHARD_BYTES, the cuts depending on content alone."""
    if not tables:
        return
    whole = pa.concat_tables(tables).combine_chunks()
    count = max(1, -(-whole.nbytes // SHARD_BYTES))
    size = -(-whole.num_rows // count)
    for start in range(0, whole.num_rows, size):
        yield whole.slice(start, size)


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
        if verify and hashlib.sha256(path.read_bytes()).hexdigest() != file["sha256"]:
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
