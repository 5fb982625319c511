"""A run's folder: where things lie, and how a file or folder appears whole or not at all."""

import errno
import fcntl
import json
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq


class HouseError(Exception):
    """An error whose message is for the user: what was wrong, where, and what to do. Shown without a traceback."""


@contextmanager
def about(what: str) -> Iterator[None]:
    """Puts `what` before the message of a HouseError inside the block: a path alone does not say whose it is."""
    try:
        yield
    except HouseError as error:
        raise HouseError(f"{what}: {error}") from error


class RunFolder:
    """The paths below one OUT (DESIGN.md, "A run's folder"). Making one touches nothing on disk."""

    def __init__(self, root: str | Path, cache: str | Path | None = None) -> None:
        self.root = Path(root)
        self.rows = self.root / "rows"
        self.quarantine = self.root / "quarantine"
        shared = self.root if cache is None else Path(cache)  # what outlives one release
        self.measures = shared / "measures"
        self.models = shared / "models"
        self.ledger = self.root / "ledger"
        self.recipe = self.root / "recipe.yaml"
        self.report = self.root / "report.html"

    def curated(self, set_name: str) -> Path:
        return self.root / "curated" / set_name

    def stage(self, name: str) -> Path:
        """Folder of one training stage: run.json, metrics.jsonl, checkpoints/, adapter/, row_losses/."""
        return self.root / name


def stored_folder(out: str | Path) -> RunFolder:
    """The folder of a run, with the cache that the run was given."""
    path = Path(out) / "started.json"
    shared = read_json(path).get("cache") if path.is_file() else None
    return RunFolder(out, None if shared is None else Path(os.path.normpath(Path(out) / shared)))


FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}  # no room, no quota, larger than a file may be
GROUP_ROWS = 2**20  # rows of a row group of a long Parquet file; pyarrow's own measure


@contextmanager
def room_for(path: Path) -> Iterator[None]:
    """Turns a full disk inside the block into a HouseError that names `path`."""
    try:
        yield
    except Exception as error:
        number = _error_number(error)
        if number not in FULL:
            raise
        raise HouseError(
            f"cannot write {path}: {os.strerror(number)}. Make room on that disk and run the same command again"
            " (what is finished stands), or choose another --out"
        ) from error


def _error_number(error: Exception) -> int:
    """The system's number of an error, 0 where it states none. Libraries in Rust (safetensors, tokenizers) raise types
    of their own that end in "(os error 28)"."""
    said = re.search(r"\(os error (\d+)\)", str(error))
    return (error.errno or 0) if isinstance(error, OSError) else int(said[1]) if said else 0


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """Yields a temporary path beside `path`, moved into place when the block ends well and removed when it does not. A
    HouseError where the disk is full."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent)
    except OSError as error:
        raise HouseError(f"cannot write in {path.parent}: {error.strerror}. Choose another --out.") from error
    os.close(handle)
    temporary = Path(name)
    try:
        with room_for(path):
            yield temporary
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def whole_folder(path: Path) -> Iterator[Path]:
    """Yields a temporary folder beside `path`, moved into place (replacing an old one) when the block ends well. A
    HouseError where the disk is full."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent))
    except OSError as error:
        raise HouseError(f"cannot write in {path.parent}: {error.strerror}. Choose another --out.") from error
    try:
        with room_for(path):
            yield temporary
        os.chmod(temporary, 0o755)
        if path.exists():
            shutil.rmtree(path)
        os.replace(temporary, path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


LOCK = ".lock"
_HELD: ContextVar[frozenset[Path]] = ContextVar("held", default=frozenset())  # by this thread's run


@contextmanager
def sole(root: Path) -> Iterator[None]:
    """Holds `root` for one run at a time, and sweeps it first; what holds it already may hold it again inside. The
    operating system lets go of it when the run dies; a HouseError while another run holds it."""
    here = root.resolve()
    if here in _HELD.get():
        yield
        return
    with ExitStack() as stack:
        try:
            root.mkdir(parents=True, exist_ok=True)
            lock = stack.enter_context((root / LOCK).open("w"))
        except OSError as error:
            raise HouseError(f"cannot write in {root}: {error.strerror}. Choose another --out.") from error
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise HouseError(f"another run is writing in {root}: wait for it, or choose another --out") from error
        stack.callback(_HELD.reset, _HELD.set(_HELD.get() | {here}))
        sweep(root)
        yield


def sweep(root: Path) -> None:
    """Removes what a killed run left half-written anywhere below `root`. No other run may be writing there."""
    for path in sorted(root.rglob(".*.tmp")):
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """`value` as indented JSON, whole or not at all."""
    with whole_file(path) as temporary:
        temporary.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def read_json(path: Path) -> dict[str, Any]:
    value: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return value


def read_parquet(path: Path, names: Sequence[str], mend: str) -> pa.Table:
    """The Parquet file at `path`. A HouseError ending with `mend` where it is damaged or lacks a column of `names`."""
    try:
        found = pq.read_table(path)
    except (OSError, pa.ArrowException) as error:
        raise HouseError(f"{path} cannot be read: {str(error).splitlines()[0]}. {mend}") from error
    lacking = [name for name in names if name not in found.column_names]
    if lacking:
        raise HouseError(f"{path} has no column {', '.join(lacking)}; it has {', '.join(found.column_names)}. {mend}")
    return found


def write_parquet(path: Path, table: pa.Table, group_rows: int = GROUP_ROWS) -> None:
    """`table` as zstd Parquet, whole or not at all; equal tables give equal bytes."""
    with whole_file(path) as temporary:
        pq.write_table(table, temporary, compression="zstd", row_group_size=group_rows)


@contextmanager
def parquet_writer(path: Path, schema: pa.Schema) -> Iterator[Callable[[pa.Table], None]]:
    """Yields a function that takes tables of `schema`; together they become `path`, the same bytes however the rows
    were parted among them. Holds at most GROUP_ROWS rows and one table."""
    waiting: list[pa.Table] = []

    with whole_file(path) as temporary, pq.ParquetWriter(temporary, schema, compression="zstd") as writer:

        def flush(least: int) -> None:
            whole = pa.concat_tables(waiting)
            while whole.num_rows >= least and whole.num_rows:
                writer.write_table(whole.slice(0, GROUP_ROWS).combine_chunks(), row_group_size=GROUP_ROWS)
                whole = whole.slice(GROUP_ROWS)
            waiting[:] = [whole]

        def write(table: pa.Table) -> None:
            waiting.append(table)
            if sum(one.num_rows for one in waiting) >= GROUP_ROWS:
                flush(GROUP_ROWS)

        yield write
        if waiting:
            flush(1)
