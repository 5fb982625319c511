"""Checkpoints: whole folders with a hash of each file, of which one that was cut short or altered is never resumed.

`checkpoints/step-000050/` holds state.safetensors (trainable weights, optimizer moments, row statistics), state.json
(step and other small values) and, written last, COMPLETE with the SHA-256 of each; then it is moved into place. Of a
sharded model every rank writes a file: state.safetensors, state-1.safetensors, … hold the rows of the tensors that
state.json lists as `pieces`, in the order of ranks. Tensors are read whole, so that any number of ranks can go on.
"""

import hashlib
import json
import shutil
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from ..curation.folder import HouseError, whole_folder
from .ranks import ALONE, World

MARKER = "COMPLETE"
FORMAT = 2  # of run.json and checkpoints; another one cannot be continued


@dataclass(frozen=True)
class Checkpoint:
    """The state after optimizer step `step` (the number of steps done). values: what JSON holds."""

    step: int
    tensors: Mapping[str, torch.Tensor]
    values: Mapping[str, Any]


def save_checkpoint(
    folder: Path, checkpoint: Checkpoint, keep: int, here: World = ALONE, pieces: Collection[str] = ()
) -> Path:
    """Writes `folder`/step-NNNNNN whole or not at all, then removes all but the `keep` latest (at least this one).

    Every rank of `here` calls it; the first writes all, the others their rows of the tensors that `pieces` names, each
    on the storage that all share.
    """
    path = folder / f"step-{checkpoint.step:06d}"
    with _shared_folder(path, here) as temporary:
        named = {name: tensor for name, tensor in checkpoint.tensors.items() if here.main or name in pieces}
        if named or here.main:
            tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in named.items()}
            save_file(tensors, temporary / _file(here.rank))
        here.barrier()
        if here.main:
            values = {"step": checkpoint.step, **version(), "pieces": sorted(pieces), **checkpoint.values}
            (temporary / "state.json").write_text(json.dumps(values, indent=2, sort_keys=True), encoding="utf-8")
            hashes = {file.name: _sha256(file) for file in sorted(temporary.iterdir())}
            (temporary / MARKER).write_text(json.dumps(hashes, indent=2), encoding="utf-8")
    if here.main:
        for old in step_folders(folder)[max(keep, 1) :]:
            shutil.rmtree(old)
    here.barrier()
    return path


def _file(rank: int) -> str:
    return f"state-{rank}.safetensors" if rank else "state.safetensors"


@contextmanager
def _shared_folder(path: Path, here: World) -> Iterator[Path]:
    """`whole_folder` of the first rank, in which all ranks write."""
    if not here.main:
        yield path.parent / here.told("")
        return
    with whole_folder(path) as temporary:
        here.told(temporary.name)
        yield temporary


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


def find_latest(folder: Path, say: Callable[[str], None], here: World = ALONE) -> Checkpoint | None:
    """The latest checkpoint that is whole, or None. say: is told of each later one that is skipped, and why. HouseError
    for one of another format. The first rank looks; every rank reads what it found."""
    found = here.first(lambda: _latest(folder, say))
    return None if found is None else load_checkpoint(found)


def _latest(folder: Path, say: Callable[[str], None]) -> Path | None:
    for path in step_folders(folder):
        fault = _fault(path)
        if fault is None:
            try:
                load_checkpoint(path)
                return path
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
    optimizer: torch.optim.Optimizer,
    parameters: Mapping[str, torch.Tensor],
    tensors: Mapping[str, torch.Tensor],
    own: Callable[[str, torch.Tensor], torch.Tensor] = lambda name, whole: whole,
) -> None:
    """Puts back what `optimizer_tensors` gave. Moments go to their parameter's device, counts stay fp32. own: what this
    rank holds of a whole tensor."""
    for full in tensors:
        if full.startswith("optimizer/"):
            _, key, name = full.split("/", 2)
            kept = own(full, tensors[full])
            optimizer.state[parameters[name]][key] = kept.to(parameters[name].device, copy=True)


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
    """The checkpoint in this folder, whole as it is; its tensors are read one by one, as they are asked for.
    HouseError where it is of another format."""
    values = json.loads((path / "state.json").read_text(encoding="utf-8"))
    check_version(path, values)
    for name in version():
        values.pop(name)
    return Checkpoint(values.pop("step"), Stored(path, frozenset(values.pop("pieces"))), values)


class Stored(Mapping[str, torch.Tensor]):
    """The tensors of a checkpoint, whole, whichever files hold them. pieces: names of those in rows over all files."""

    def __init__(self, folder: Path, pieces: frozenset[str]) -> None:
        self.pieces = pieces
        self.files: list[Any] = [safe_open(folder / "state.safetensors", "pt")]
        while (folder / _file(len(self.files))).is_file():
            self.files.append(safe_open(folder / _file(len(self.files)), "pt"))
        self.names: list[str] = list(self.files[0].keys())

    def __getitem__(self, name: str) -> torch.Tensor:
        if name not in self.pieces:
            tensor: torch.Tensor = self.files[0].get_tensor(name)
            return tensor
        return torch.cat([file.get_tensor(name) for file in self.files])

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.names)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
