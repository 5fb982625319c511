"""What a training stage keeps on disk besides weights: run.json's inputs, metrics, the reference, losses by row."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from ..curation.folder import HouseError, read_json, whole_file, write_parquet
from .data import Objective, Plan
from .digests import model_digest
from .settings import Training

INPUTS = ("objective", "data_digest", "model_digest", "adapter_digest", "settings")


def run_inputs(
    objective: Objective, data: Path, model: Path, adapter: Path | None, settings: Training
) -> dict[str, Any]:
    """All that a stage's result depends on besides the place, as JSON holds it; and where it was read."""
    manifest = data / "manifest.json"
    if not manifest.is_file():
        raise HouseError(f"{data} holds no manifest.json: not a curated set, or curation did not finish there")
    return {
        "objective": objective,
        "data": str(data),
        "data_digest": hashlib.sha256(manifest.read_bytes()).hexdigest(),
        "model": str(model),
        "model_digest": model_digest(model),
        "adapter": None if adapter is None else str(adapter),
        "adapter_digest": None if adapter is None else folder_digest(adapter),
        "settings": json.loads(json.dumps(asdict(settings))),
    }


def folder_digest(folder: Path) -> str:
    """SHA-256 of the names and bytes of the files in a folder."""
    if not folder.is_dir():
        raise HouseError(f"{folder} is no folder: the stage that makes it has not finished")
    state = hashlib.sha256()
    for path in sorted(path for path in folder.iterdir() if path.is_file()):
        with path.open("rb") as file:
            state.update(f"{path.name} {hashlib.file_digest(file, 'sha256').hexdigest()} ".encode())
    return state.hexdigest()


def begun(out: Path, inputs: Mapping[str, Any]) -> dict[str, Any] | None:
    """run.json of `out`, or None where no run began there. HouseError where it began with other inputs."""
    path = out / "run.json"
    if not path.is_file():
        return None
    past = read_json(path)
    differing = [text for key in INPUTS for text in _differences(key, past.get(key), inputs[key])]
    if differing:
        raise HouseError(f"{out} holds a run of other inputs: {'; '.join(differing)}. Choose another folder")
    return past


def _differences(key: str, old: Any, new: Any) -> list[str]:
    if isinstance(old, dict) and isinstance(new, dict):
        return [t for k in sorted({*old, *new}) for t in _differences(f"{key}.{k}", old.get(k), new.get(k))]
    return [] if old == new else [f"{key} was {old}, is now {new}"]


def cut_metrics(path: Path, step: int) -> list[dict[str, Any]]:
    """Cuts metrics.jsonl back to its lines of the first `step` steps, and returns them."""
    if not path.is_file():
        return []
    whole = [line for line in path.read_text(encoding="utf-8").splitlines(keepends=True) if line.endswith("\n")]
    lines = [line for line in whole if json.loads(line)["step"] <= step]
    with whole_file(path) as temporary:
        temporary.write_text("".join(lines), encoding="utf-8")
    return [json.loads(line) for line in lines]


def read_reference(path: Path, key: str) -> NDArray[np.float32] | None:
    """(U, 2) stored log-probabilities of chosen and rejected, or None where none of this key are stored."""
    if not path.is_file() or (pq.read_schema(path).metadata or {}).get(b"key") != key.encode():
        return None
    table = pq.read_table(path)
    return np.stack([table[name].to_numpy() for name in ("chosen", "rejected")], 1)


def write_reference(path: Path, key: str, plan: Plan, logps: NDArray[np.float32]) -> None:
    columns = {"row_id": pa.array(plan.units.row_ids, pa.string()), "chosen": logps[:, 0], "rejected": logps[:, 1]}
    write_parquet(path, pa.table(columns).replace_schema_metadata({"key": key}))


def write_row_losses(path: Path, objective: Objective, plan: Plan, values: NDArray[np.float32], step: Any) -> None:
    """One row for each trained row, as its last epoch saw it: row_id, epoch, step, loss, tokens (targets), and
    mean_prob (SFT: mean probability of a target token) or margin (DPO).

    values: (2, U) what `loop.pack_loss` gives of each unit; step: (U,) the step, from 1, that gave it, 0 for none.
    """
    units, seen = plan.units, np.flatnonzero(step)
    epochs = np.asarray([0, *(epoch + 1 for epoch, _ in plan.steps)])
    table = pa.table(
        {
            "row_id": pa.array(units.row_ids, pa.string()).take(pa.array(seen)),
            "epoch": pa.array(epochs[step[seen]], pa.int32()),
            "step": pa.array(step[seen], pa.int32()),
            "first": values[0, seen].astype(np.float64),
            "second": values[1, seen].astype(np.float64),
            "weight": units.weights[seen],
            "tokens": units.targets[seen],
        }
    )
    sums = table.group_by("row_id", use_threads=False).aggregate(
        [("epoch", "max"), ("step", "max"), *((name, "sum") for name in ("first", "second", "weight", "tokens"))]
    )
    first, second, weight, tokens = (sums[f"{name}_sum"].to_numpy() for name in ("first", "second", "weight", "tokens"))
    losses = {"row_id": sums["row_id"], "epoch": sums["epoch_max"], "step": sums["step_max"]}
    if objective == "sft":
        losses |= {"loss": first / weight, "tokens": tokens, "mean_prob": second / tokens}
    else:
        losses |= {"loss": first, "tokens": tokens, "margin": second}
    write_parquet(path, pa.table(losses))
