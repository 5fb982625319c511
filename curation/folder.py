"""A run's folder: where things lie, and how a file or folder appears whole or not at all."""

import fcntl
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq


class HouseError(Exception):
    """An error whose message is for the user: what was wrong, where, and what to do. Shown without a traceback."""


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


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """Yields a temporary path beside `path`, moved into place when the block ends well and removed when it does not."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent)
    except OSError as error:
        raise HouseError(f"cannot write in {path.parent}: {error.strerror}. Choose another --out.") from error
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def whole_folder(path: Path) -> Iterator[Path]:
    """Yields a temporary folder beside `path`, moved into place (replacing an old one) when the block ends well."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent))
    except OSError as error:
        raise HouseError(f"cannot write in {path.parent}: {error.strerror}. Choose another --out.") from error
    try:
        yield temporary
        os.chmod(temporary, 0o755)
        if path.exists():
            shutil.rmtree(path)
        os.replace(temporary, path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


LOCK = ".lock"


@contextmanager
def sole(root: Path) -> Iterator[None]:
    """Holds `root` for one run at a time, and sweeps it first. The operating system lets go of it when the run dies; a
    HouseError while another run holds it."""
    root.mkdir(parents=True, exist_ok=True)
    with (root / LOCK).open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise HouseError(f"another run is writing in {root}: wait for it, or choose another --out") from error
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


def write_parquet(path: Path, table: pa.Table) -> None:
    """`table` as zstd Parquet, whole or not at all; equal tables give equal bytes."""
    with whole_file(path) as temporary:
        pq.write_table(table, temporary, compression="zstd")
