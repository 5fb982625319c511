"""Checkpoints: whole folders with a hash of each file, of which one that was cut short or altered is never resumed.

`checkpoints/step-000050/` holds state.safetensors (trainable weights, optimizer moments, row statistics), state.json
(step and other small values) and, written last, COMPLETE with the SHA-256 of both; then it is moved into place.
"""

import hashlib
import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from ..curation.folder import HouseError, whole_folder

MARKER = "COMPLETE"
FORMAT = 2  # of run.json and checkpoints; another one cannot be continued


@dataclass(frozen=True)
class Checkpoint:
    """The state after optimizer step `step` (the number of steps done). values: what JSON holds."""

    step: int
    tensors: Mapping[str, torch.Tensor]
    values: Mapping[str, Any]


def save_checkpoint(folder: Path, checkpoint: Checkpoint, keep: int) -> Path:
    """Writes `folder`/step-NNNNNN whole or not at all, then removes all but the `keep` latest (at least this one)."""
    path = folder / f"step-{checkpoint.step:06d}"
    with whole_folder(path) as temporary:
        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in checkpoint.tensors.items()}
        save_file(tensors, temporary / "state.safetensors")
        values = {"step": checkpoint.step, **version(), **checkpoint.values}
        (temporary / "state.json").write_text(json.dumps(values, indent=2, sort_keys=True), encoding="utf-8")
        hashes = {file.name: _sha256(file) for file in sorted(temporary.iterdir())}
        (temporary / MARKER).write_text(json.dumps(hashes, indent=2), encoding="utf-8")
    for old in step_folders(folder)[max(keep, 1) :]:
        shutil.rmtree(old)
    return path


def version() -> dict[str, Any]:
    """The format of what a stage writes, and which gristmill writes it."""
    return {"format": FORMAT, "gristmill": metadata.version("gristmill")}


def check_version(where: Path, values: Mapping[str, Any]) -> None:
    """HouseError where another format of run.json or a checkpoint lies in `where`."""
    if values.get("format", 1) != FORMAT:
        raise HouseError(
            f"{where} was written by gristmill {values.get('gristmill', 'of an earlier version')} in format "
            f"{values.get('format', 1)}; this is gristmill {version()['gristmill']}, which writes format {FORMAT}. "
            "Continue it with the version that began it, or choose another folder"
        )


def find_latest(folder: Path, say: Callable[[str], None]) -> Checkpoint | None:
    """The latest checkpoint that is whole, or None. say: is told of each later one that is skipped, and why. HouseError
    for one of another format."""
    for path in step_folders(folder):
        fault = _fault(path)
        if fault is None:
            try:
                return load_checkpoint(path)
            except (SafetensorError, ValueError, KeyError, OSError) as error:
                fault = str(error)
        say(f"checkpoint {path} skipped: {fault}")
    return None


def remove_torn(folder: Path) -> None:
    """Removes what a run that was killed while it saved has left of its temporary folders."""
    for path in folder.glob(".step-*.tmp"):
        shutil.rmtree(path)


def optimizer_tensors(
    optimizer: torch.optim.Optimizer, parameters: Mapping[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """The optimizer's state as `optimizer/KEY/NAME` tensors. parameters: name -> parameter of the optimizer."""
    return {
        f"optimizer/{key}/{name}": value
        for name, parameter in parameters.items()
        for key, value in optimizer.state[parameter].items()
    }


def restore_optimizer(
    optimizer: torch.optim.Optimizer, parameters: Mapping[str, torch.Tensor], tensors: Mapping[str, torch.Tensor]
) -> None:
    """Puts back what `optimizer_tensors` gave. Moments go to their parameter's device, counts stay fp32."""
    for full, tensor in tensors.items():
        if full.startswith("optimizer/"):
            _, key, name = full.split("/", 2)
            optimizer.state[parameters[name]][key] = tensor.to(parameters[name].device, copy=True)


def step_folders(folder: Path) -> list[Path]:
    """Checkpoint folders, latest first."""
    return sorted((path for path in folder.glob("step-*") if path.is_dir()), key=_step, reverse=True)


def _step(path: Path) -> int:
    number = path.name.removeprefix("step-")
    return int(number) if number.isdigit() else -1


def _fault(path: Path) -> str | None:
    """Why the checkpoint cannot be trusted, or None."""
    marker = path / MARKER
    if not marker.is_file():
        return f"it has no {MARKER} marker"
    try:
        hashes = json.loads(marker.read_text(encoding="utf-8"))
        missing = [name for name in hashes if not (path / name).is_file()]
        if missing:
            return f"{missing[0]} is missing"
        altered = [name for name, expected in hashes.items() if _sha256(path / name) != expected]
    except (ValueError, AttributeError):
        return f"its {MARKER} marker cannot be read"
    return f"{altered[0]} does not have the SHA-256 that {MARKER} states" if altered else None


def load_checkpoint(path: Path) -> Checkpoint:
    """The checkpoint in this folder, whole as it is. HouseError where it is of another format."""
    values = json.loads((path / "state.json").read_text(encoding="utf-8"))
    check_version(path, values)
    for name in version():
        values.pop(name)
    return Checkpoint(values.pop("step"), load_file(path / "state.safetensors"), values)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
