"""Steps that read files of the user's: the digest of those files is part of what a measure's values are."""

import hashlib
from collections.abc import Iterable
from functools import lru_cache
from pathlib import Path
from typing import Protocol, runtime_checkable

from .folder import HouseError
from .rows import digest


@runtime_checkable
class Informed(Protocol):
    """A measure whose values depend on files besides rows and models."""

    def inputs(self) -> str:
        """Digest of all that it reads; part of the key of its cached values."""


def files_inputs(paths: Iterable[str]) -> str:
    """Digest of the contents of files, in order; a file is read again only where its size or time has changed."""
    pieces = []
    for path in paths:
        try:
            about = Path(path).stat()
            pieces.append(_contents(path, about.st_size, about.st_mtime_ns))
        except OSError as error:
            raise HouseError(f"cannot read {path}: {error.strerror}") from error
    return digest(*pieces)


def read_text(path: str) -> str:
    """A file of the user's as text."""
    try:
        return Path(path).read_text(encoding="utf-8")
    except OSError as error:
        raise HouseError(f"cannot read {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise HouseError(f"{path} is not text in UTF-8: {error}") from error


@lru_cache(maxsize=256)
def _contents(path: str, size: int, time: int) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
