"""Arrays that grow beyond memory: kept there up to a limit, beyond it in files of a scratch folder, read by mmap. The
files have no name that another array could take, and go when nothing maps them any more."""

import mmap
import os
import tempfile
from pathlib import Path
from typing import Any, BinaryIO, cast

import numpy as np

from ..folder import HouseError

LIMIT = 128 << 20  # bytes of one array in memory; shingles of some 160,000 rows of 100 words, band keys of 670,000


class Spool:
    """An array that pieces are appended to. In memory only the pages that were written count, so that room for LIMIT
    bytes is asked for at once and nothing is copied twice."""

    def __init__(self, folder: Path | None, name: str, dtype: type[Any]) -> None:
        self.path, self.dtype, self.size = _path(folder, name), np.dtype(dtype), 0
        self.held = np.empty(LIMIT // self.dtype.itemsize, dtype)
        self.file: BinaryIO | None = None

    def append(self, piece: np.ndarray) -> None:
        end = self.size + len(piece)
        if self.file is None and end > len(self.held):
            self.file = _opened(self.path)
            self._write(self.held[: self.size])
            self.held = np.empty(0, self.dtype)  # a slice would hold on to the memory
        if self.file is None:
            self.held[self.size : end] = piece
        else:
            self._write(piece)
        self.size = end

    def array(self) -> np.ndarray:
        """All that was appended; a map of the file where it spilled. Nothing can be appended afterwards."""
        if self.file is None:
            return self.held[: self.size]
        try:
            self.file.flush()
        except OSError as error:
            raise _no_room(self.path, self.size * self.dtype.itemsize, error) from error
        with self.file:
            return np.memmap(self.file, self.dtype, "r+", shape=(self.size,))

    def _write(self, piece: np.ndarray) -> None:
        assert self.file is not None
        try:
            self.file.write(np.ascontiguousarray(piece).data)  # tofile passes over a full disk
        except OSError as error:
            raise _no_room(self.path, self.size * self.dtype.itemsize + piece.nbytes, error) from error


def matrix(folder: Path | None, name: str, shape: tuple[int, int], dtype: type[Any]) -> np.ndarray:
    """An uninitialised array of this shape, in a file where it is larger than LIMIT."""
    size = shape[0] * shape[1] * np.dtype(dtype).itemsize
    if size <= LIMIT:
        return np.empty(shape, dtype)
    path = _path(folder, name)
    with _opened(path) as file:
        try:
            if hasattr(os, "posix_fallocate"):  # a full disk must be an error here, not a SIGBUS later
                os.posix_fallocate(file.fileno(), 0, size)
            else:
                file.truncate(size)
        except OSError as error:
            raise _no_room(path, size, error) from error
        return np.memmap(file, dtype, "r+", shape=shape)


def let_go(array: np.ndarray) -> None:
    """Pages of a mapped file leave this process's memory (the file and what was written stay)."""
    mapped = getattr(array, "_mmap", None)
    if mapped is not None and hasattr(mmap, "MADV_DONTNEED"):
        mapped.madvise(mmap.MADV_DONTNEED)


def spilled(array: np.ndarray) -> bool:
    return isinstance(array, np.memmap)


def _path(folder: Path | None, name: str) -> Path:
    """Where an array spills; without a folder where the system keeps temporary files."""
    return (Path(tempfile.gettempdir()) if folder is None else folder) / name


def _opened(path: Path) -> BinaryIO:
    try:
        return cast(BinaryIO, tempfile.TemporaryFile("w+b", dir=path.parent))
    except OSError as error:
        raise HouseError(
            f"cannot write {path}: {error.strerror}. Free some space there, or choose another --out."
        ) from error


def _no_room(path: Path, size: int, error: OSError) -> HouseError:
    return HouseError(
        f"no room for what does not fit into memory: {path} needs at least {size / 1e6:,.0f} MB ({error.strerror})."
        " Free some space there, or choose another --out."
    )
