"""Naming the bytes of a model's folder, without torch: `gristmill decide` asks for no more of a model."""

import hashlib
import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from ..curation.folder import HouseError

RECORD = "make_model.json"  # how a made model was made, with times: no part of what it is
_DIGESTED = frozenset({".safetensors", ".bin", ".json", ".jinja", ".model", ".txt"})


def model_digest(folder: Path) -> str:
    """SHA-256 (its first 32 hexadecimal digits) of names and bytes of a model's or adapter's files: configuration,
    weights, tokenizer, chat template; also of the modules of a sentence-transformers model. Reads every byte, the files
    in parallel; keeps nothing."""
    if not folder.is_dir():
        raise HouseError(f"there is no model folder {folder}")
    files = [file for home in (folder, *_modules(folder)) for file in home.iterdir()]
    named = (file for file in files if file.suffix in _DIGESTED and file.is_file() and file.name != RECORD)
    names = sorted(str(file.relative_to(folder)) for file in named)
    with ThreadPoolExecutor() as pool:
        digests = list(pool.map(lambda name: _file_digest(folder / name), names))
    pieces = "".join(f"{name} {digest}\n" for name, digest in zip(names, digests, strict=True))
    return hashlib.sha256(pieces.encode()).hexdigest()[:32]


def _modules(folder: Path) -> list[Path]:
    """Subfolders that modules.json of a sentence-transformers model names."""
    listed = folder / "modules.json"
    try:
        paths = [module["path"] for module in json.loads(listed.read_text())] if listed.is_file() else []
    except (ValueError, KeyError, TypeError) as error:
        raise HouseError(f"{listed} cannot be read ({error}): get the model again") from error
    return sorted({folder / path for path in paths if path not in ("", ".") and (folder / path).is_dir()})


def _file_digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
