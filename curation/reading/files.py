"""Addresses and the files behind them: which files an address names, how their bytes are opened, and their digest."""

import gzip
import hashlib
import io
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import IO, Any

from ..folder import HouseError

FORMATS = {
    ".json": "json",
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".csv": "csv",
    ".tsv": "tsv",
    ".parquet": "parquet",
    ".arrow": "arrow",
    ".feather": "arrow",
}
COMPRESSED = (".gz", ".zst")
NOT_DATA = {"dataset_info.json", "dataset_dict.json", "state.json", "manifest.json", "croissant.json"}
_BLOCK = 1 << 20


@dataclass(frozen=True)
class DataFile:
    """One file: `path` within its file system, `name` as messages show it, the split of a saved DatasetDict."""

    fs: Any
    path: str
    name: str
    format: str
    split: str | None = None


def find_files(address: str) -> list[DataFile]:
    """The files of an address (a file, a folder, a glob pattern or a saved `datasets` folder, on any file system that
    fsspec knows), in sorted order. A HouseError where there are none."""
    fs, path = _file_system(address)
    try:
        if fs.isfile(path):
            return [DataFile(fs, path, address, _format(path, address))]
        if fs.isdir(path):
            return _in_folder(fs, path, address)
        found = sorted(fs.glob(path)) if any(mark in path for mark in "*?[") else []
    except OSError as error:
        raise HouseError(f"cannot look at {address}: {error}") from error
    if not found:
        raise HouseError(f"{address}: no such file or folder. Check the path.")
    return [DataFile(fs, each, each, _format(each, each)) for each in found if fs.isfile(each)]


def _file_system(address: str) -> tuple[Any, str]:
    import fsspec

    try:
        fs, path = fsspec.core.url_to_fs(address)
    except (ImportError, ValueError) as error:
        raise HouseError(f"cannot read from {address}: {error}") from error
    return fs, path


def _suffix(path: str) -> str:
    """The suffix that names the format, without that of a compression."""
    name = path.lower()
    for ending in COMPRESSED:
        name = name.removesuffix(ending)
    return name[name.rfind(".") :] if "." in name else ""


def _format(path: str, name: str) -> str:
    kind = FORMATS.get(_suffix(path))
    if kind is None:
        known = ", ".join(FORMATS)
        raise HouseError(f"{name}: unknown format. Known endings: {known}; JSON, CSV and TSV also with .gz or .zst.")
    return kind


def _in_folder(fs: Any, path: str, address: str) -> list[DataFile]:
    path = path.rstrip("/")
    if fs.isfile(f"{path}/dataset_dict.json"):
        splits = json.loads(fs.cat_file(f"{path}/dataset_dict.json"))["splits"]
        return [file for split in splits for file in _saved(fs, f"{path}/{split}", f"{address}/{split}", split)]
    if fs.isfile(f"{path}/state.json"):
        return _saved(fs, path, address, None)
    files = []
    for each in sorted(fs.find(path)):
        inner = each[len(path) + 1 :]
        hidden = any(piece.startswith((".", "_")) for piece in inner.split("/"))
        if not hidden and _suffix(each) in FORMATS and inner.rsplit("/", 1)[-1] not in NOT_DATA:
            files.append(DataFile(fs, each, f"{address.rstrip('/')}/{inner}", _format(each, each)))
    if not files:
        raise HouseError(f"{address}: no data file in this folder. Known endings: {', '.join(FORMATS)}.")
    return files


def _saved(fs: Any, path: str, name: str, split: str | None) -> list[DataFile]:
    """The files of a folder that `Dataset.save_to_disk` wrote, in the order of its state."""
    try:
        listed = json.loads(fs.cat_file(f"{path}/state.json"))["_data_files"]
    except (OSError, ValueError, KeyError) as error:
        raise HouseError(f"{name}: not a whole saved dataset (state.json: {error}). Save it again.") from error
    return [DataFile(fs, f"{path}/{item['filename']}", f"{name}/{item['filename']}", "arrow", split) for item in listed]


@contextmanager
def opened(file: DataFile) -> Iterator[IO[bytes]]:
    """The file's bytes, decompressed."""
    try:
        handle = file.fs.open(file.path, "rb")
    except OSError as error:
        raise HouseError(f"cannot open {file.name}: {error}") from error
    with handle:
        if file.path.lower().endswith(".gz"):
            with io.BufferedReader(gzip.GzipFile(fileobj=handle)) as stream:
                yield stream
        elif file.path.lower().endswith(".zst"):
            import pyarrow as pa

            with io.BufferedReader(pa.CompressedInputStream(handle, "zstd"), _BLOCK) as stream:
                yield stream
        else:
            yield handle


def files_digest(files: list[DataFile]) -> str:
    """sha256 of a file's bytes; of several files, of their digests in order."""
    each = [_sha256(file) for file in files]
    return each[0] if len(each) == 1 else hashlib.sha256("\n".join(each).encode()).hexdigest()


def _sha256(file: DataFile) -> str:
    state = hashlib.sha256()
    try:
        with file.fs.open(file.path, "rb") as handle:
            while block := handle.read(_BLOCK):
                state.update(block)
    except OSError as error:
        raise HouseError(f"cannot read {file.name}: {error}") from error
    return state.hexdigest()
