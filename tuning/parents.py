"""What an exported model comes from: the base, the adapter, the run, and the licences that they state."""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..curation.folder import HouseError, read_json
from .digests import model_digest
from .models import check_model, load_config
from .quantised import is_nf4
from .weight_files import WeightFiles

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class Parents:
    """source: what was named. base: the model's folder, which is the result itself where all weights were tuned.
    adapter: on it. run: run.json's folder. dtype: that the run computed in. stored: how the base's linear layers were
    kept (nf4, nf4-single, bf16, fp32; empty: as they are). weights_dtype: of the base's files."""

    source: Path
    base: Path
    adapter: Path | None
    run: Path | None
    record: dict[str, Any]
    dtype: torch.dtype
    stored: str
    weights_dtype: torch.dtype


def find_parents(source: Path, model: Path | None) -> Parents:
    """What `source` (a run, an adapter or a model) is. HouseError where it is none of them, not finished, or the base
    is missing or another than the run's."""
    run, adapter = _run_of(source), None
    record = read_json(run / "run.json") if run is not None else {}
    if run is not None and "recipe" in record:
        raise HouseError(f"{run} holds a whole run: name one of its training stages, {_stages(run)}")
    if run is not None and record.get("status") != "complete":
        raise HouseError(f"the run in {run} is not finished: run the command that started it once more, then export")
    source_folder = run / str(record["result"]) if run is not None and source == run else source
    base: Path | None
    if (source_folder / "adapter_config.json").is_file():
        adapter = source_folder
        named = read_json(adapter / "adapter_config.json").get("base_model_name_or_path")
        base = model or next((Path(str(name)) for name in (record.get("model"), named) if name), None)
        if base is None:
            raise HouseError(f"{adapter} does not name its base: name it by --model")
    elif (source_folder / "config.json").is_file():
        base = source_folder
        if model is not None and model.resolve() != base.resolve():
            raise HouseError(f"{source} is a whole model, so it has no base: leave out --model {model}")
    else:
        raise HouseError(
            f"{source} is no finished run (run.json), no adapter (adapter_config.json) and no model (config.json)"
        )
    check_model(base)
    if adapter is not None and record and model_digest(base) != record["model_digest"]:
        raise HouseError(f"{base} is not the model that {run} was trained on: name that one by --model")
    kept = _weights_dtype(base)
    stored = _stored(adapter)
    said = record.get("dtype") or ("bf16" if kept == torch.bfloat16 else "fp32")
    return Parents(source, base, adapter, run, record, _DTYPES[said], stored, kept)


def parents_record(parents: Parents) -> dict[str, Any]:
    """The parents as manifest.json states them: paths, digests, and licences where they are known."""
    base = {"path": str(parents.base), "digest": model_digest(parents.base), "licence": licence_of(parents.base)}
    found: dict[str, Any] = {"base": base}
    if parents.adapter is not None:
        found["adapter"] = {
            "path": str(parents.adapter),
            "digest": model_digest(parents.adapter),
            "base_stored_as": parents.stored or str(parents.weights_dtype).removeprefix("torch."),
        }
    if parents.run is not None:
        keys = ("name", "objective", "data", "data_digest", "model_digest", "adapter_digest", "result_digest")
        found["run"] = {"path": str(parents.run), **{key: parents.record.get(key) for key in keys}}
        found["data"] = {"licences": _data_licences(parents.record)}
    return found


def licence_of(folder: Path) -> str | None:
    """The licence that a model's README.md states in its front matter, if any."""
    page = folder / "README.md"
    if not page.is_file():
        return None
    front = re.match(r"---\n(.*?)\n---", page.read_text(encoding="utf-8", errors="replace"), re.DOTALL)
    found = re.search(r"^license:\s*(\S+)", front[1], re.MULTILINE) if front else None
    return found[1] if found else None


def _stages(folder: Path) -> str:
    """The training stages of a whole run, in words."""
    found = sorted(path.parent for path in folder.glob("*/run.json") if "objective" in read_json(path))
    return " or ".join(map(str, found)) or "of which it has none yet"


def _run_of(source: Path) -> Path | None:
    """The folder of the training run that `source` is or lies in."""
    return next((path for path in (source, source.parent) if (path / "run.json").is_file()), None)


def _stored(adapter: Path | None) -> str:
    ours = None if adapter is None else adapter / "gristmill.json"
    return "" if ours is None or not ours.is_file() else str(read_json(ours)["base"])


def _weights_dtype(base: Path) -> torch.dtype:
    """Of the base's floating-point weights, the first; of an NF4 checkpoint, what it was quantised from."""
    config = load_config(base)
    if is_nf4(config) and isinstance(config.dtype, torch.dtype):
        return config.dtype
    return WeightFiles(base).floating_dtype()


def _data_licences(record: dict[str, Any]) -> dict[str, str] | None:
    path = Path(str(record.get("data", ""))) / "manifest.json"
    if not path.is_file():
        return None
    return {str(source["name"]): str(source["licence"]) for source in read_json(path).get("sources", [])}
