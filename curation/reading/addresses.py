"""Addresses that stand for more than a path: data sets of the Hugging Face hub by name, and entries of a LLaMA-Factory
dataset_info.json."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..folder import HouseError
from .convert import OURS, Naming
from .files import DataFile, find_files

HUB, FACTORY = "hub:", "factory:"

# LLaMA-Factory's name of a column's role -> our column name (its data/README.md)
_ALPACA = {"prompt": "instruction", "query": "input", "response": "output", "system": "system", "history": "history"}
_SHAREGPT = {"messages": "conversations", "system": "system", "tools": "tools"}
_BOTH = {"chosen": "chosen", "rejected": "rejected", "kto_tag": "label"}
_DEFAULTS = {"alpaca": {"prompt": "instruction", "query": "input", "response": "output"},
             "sharegpt": {"messages": "conversations"}}  # fmt: skip
_TAGS = {"user_tag": "user", "assistant_tag": "assistant", "observation_tag": "tool", "function_tag": "function_call",
         "system_tag": "system"}  # fmt: skip


@dataclass(frozen=True)
class Entry:
    """What an address stands for. naming: how the entry calls columns, turns and roles. note: what else decides on the
    rows, for the digest."""

    files: list[DataFile]
    naming: Naming = OURS
    note: str = ""


def find(address: str) -> Entry:
    """The files behind an address, and how an entry of dataset_info.json names their columns."""
    if address.startswith(HUB):
        return Entry(hub_files(address))
    if address.startswith(FACTORY):
        return _factory(address)
    return Entry(find_files(address))


def hub_files(address: str) -> list[DataFile]:
    """The Arrow files into which `datasets` has put `hub:ORG/NAME[@REVISION][:CONFIG[:SPLIT]]`, downloaded by it where
    they are not in its cache yet. An empty CONFIG is the only one."""
    import fsspec

    name, config, split, *rest = [*address.removeprefix(HUB).split(":"), "", ""]
    name, _, revision = name.partition("@")
    if not name or any(rest):
        raise HouseError(f"{address}: say hub:ORG/NAME[@REVISION][:CONFIG[:SPLIT]]")
    try:
        import datasets
    except ImportError as error:
        raise HouseError(f"{address}: sources of the hub need pip install 'gristmill[hub]'") from error
    try:
        found = datasets.load_dataset(name, config or None, split=split or None, revision=revision or None)
    except (OSError, ValueError, KeyError, datasets.exceptions.DatasetsError) as error:
        said = " ".join(str(error).split())[:500]
        raise HouseError(
            f"cannot load {address} with `datasets`: {type(error).__name__}: {said}. Check the name, the split and the"
            " network; offline, what was loaded once is in its cache (HF_HOME)"
        ) from error
    splits = {split: found} if split else dict(found)
    local = fsspec.filesystem("file")
    return [
        DataFile(local, item["filename"], f"{address} {Path(item['filename']).name}", "arrow", None if split else name)
        for name, one in splits.items()
        for item in one.cache_files
    ]


def _factory(address: str) -> Entry:
    """`factory:FOLDER:NAME`: the entry NAME of FOLDER/dataset_info.json (LLaMA-Factory's data folder)."""
    where, _, name = address.removeprefix(FACTORY).rpartition(":")
    path = Path(where) if where.endswith(".json") else Path(where) / "dataset_info.json"
    if not where or not name:
        raise HouseError(f"{address}: say factory:FOLDER:NAME, FOLDER being where dataset_info.json lies")
    try:
        known = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise HouseError(f"{address}: cannot read {path}: {error}") from error
    if not isinstance(known, dict) or name not in known:
        raise HouseError(f"{address}: {path} has no entry {name!r}; it has {', '.join(sorted(known)) or 'none'}")
    entry = known[name]
    given = entry.get("formatting", "alpaca")
    if given not in _DEFAULTS:
        raise HouseError(f"{address}: formatting {given!r}; known are {', '.join(_DEFAULTS)}")
    return _entry(address, path, entry, _columns(entry, given))


def _columns(entry: Mapping[str, Any], formatting: str) -> dict[str, str]:
    """Our column name -> theirs."""
    ours = _BOTH | (_ALPACA if formatting == "alpaca" else _SHAREGPT)
    named = _DEFAULTS[formatting] | dict(entry.get("columns", {}))
    if entry.get("ranking"):
        named = {role: theirs for role, theirs in named.items() if role != "response"}
        named = {"chosen": "chosen", "rejected": "rejected"} | named
    return {ours[role]: theirs for role, theirs in named.items() if role in ours}


def _entry(address: str, path: Path, entry: Mapping[str, Any], columns: dict[str, str]) -> Entry:
    if entry.get("file_name"):
        files = find_files(str(path.parent / entry["file_name"]))
    elif entry.get("hf_hub_url"):
        files = hub_files(f"{HUB}{entry['hf_hub_url']}:{entry.get('subset') or ''}:{entry.get('split') or 'train'}")
    else:
        raise HouseError(f"{address}: the entry names neither file_name nor hf_hub_url")
    tags = entry.get("tags", {})
    roles = {tags[tag]: role for tag, role in _TAGS.items() if tag in tags}
    naming = Naming(columns, (tags.get("role_tag", "from"), tags.get("content_tag", "value")) if tags else None, roles)
    return Entry(files, naming, json.dumps(entry, sort_keys=True, ensure_ascii=False))
