"""What a training stage keeps on disk besides weights: run.json's inputs, metrics, losses by row."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from ..curation.folder import HouseError, read_json, whole_file, write_parquet
from .checkpoint import check_version, version
from .data import Family, Objective, Plan
from .digests import model_digest
from .objectives import Loss
from .settings import Training

INPUTS = ("objective", "loss_function", "data_digest", "model_digest", "adapter_digest", "settings")
FREE = ("checkpointing", "offload", "parallel", "processes", "track", "keep_checkpoints")
"""Settings that may change while a stage is continued: its steps stay what they are."""
GAINS: dict[str, str] = {"pairs": "margin", "lists": "margin", "unpaired": "reward"}


def run_inputs(
    objective: Objective, loss: Loss, data: Path, model: Path, adapter: Path | None, settings: Training
) -> dict[str, Any]:
    """All that a stage's result depends on besides the place, as JSON holds it; and where it was read."""
    manifest = data / "manifest.json"
    if not manifest.is_file():
        raise HouseError(f"{data} holds no manifest.json: not a curated set, or curation did not finish there")
    return {
        **version(),
        "objective": objective,
        "loss_function": {"name": loss.name, **loss.options},
        "data": str(data),
        "data_digest": hashlib.sha256(manifest.read_bytes()).hexdigest(),
        "model": str(model),
        "model_digest": model_digest(model),
        "adapter": None if adapter is None else str(adapter),
        "adapter_digest": None if adapter is None else folder_digest(adapter),
        "settings": json.loads(json.dumps(asdict(settings))),
    }


def run_key(run: Mapping[str, Any]) -> str:
    """Of all that the weights of each step depend on, the place aside."""
    inputs = [_bound(run[name]) for name in INPUTS]
    return hashlib.sha256(json.dumps([inputs, run["plan"]["digest"]], sort_keys=True).encode()).hexdigest()


def _bound(value: Any) -> Any:
    return {key: value[key] for key in value if key not in FREE} if isinstance(value, dict) else value


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
    try:
        past = read_json(path)
    except ValueError as error:
        raise HouseError(
            f"{path} is damaged, so nothing says what began here: {error}. Choose another folder, or remove this one"
        ) from error
    check_version(path, past)
    differing = [text for key in INPUTS for text in _differences(key, _bound(past.get(key)), _bound(inputs[key]))]
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
    try:
        lines = [line for line in whole if json.loads(line)["step"] <= step]
    except (ValueError, KeyError, TypeError) as error:
        raise HouseError(f"{path} holds a line that is no step's metrics: {error}. Remove that line") from error
    with whole_file(path) as temporary:
        temporary.write_text("".join(lines), encoding="utf-8")
    return [json.loads(line) for line in lines]


def write_row_losses(path: Path, family: Family, plan: Plan, values: NDArray[np.float32], step: Any) -> None:
    """One row for each trained row, as its last epoch saw it: row_id, epoch, step, loss, tokens (targets of all its
    answers), mean_prob (the mean probability of a target token) and, where there is one, what the answer gained on the
    reference: margin (pairs, lists: of the best answer over the worst) or reward (unpaired).

    The loss is per target token (tokens), pair, row or list; all rows of a list have that of their list. values: (3, U)
    stage.VALUES of each unit; step: (U,) the step, from 1, that gave them, 0 for none.
    """
    units, seen = plan.units, np.flatnonzero(step)
    row_ids, places = units.rows_of(seen)
    seen = seen[places]
    epochs = np.asarray([0, *(epoch + 1 for epoch, _ in plan.steps)])
    sums = ("loss", "gain", "prob", "weight", "tokens")
    numbers = (*values[:, seen].astype(np.float64), units.weights[seen], units.targets[seen])
    table = pa.table(
        {
            "row_id": pa.array(row_ids, pa.string()),
            "epoch": pa.array(epochs[step[seen]], pa.int32()),
            "step": pa.array(step[seen], pa.int32()),
            **dict(zip(sums, numbers, strict=True)),
        }
    )
    found = table.group_by("row_id", use_threads=False).aggregate(
        [("epoch", "max"), ("step", "max"), *((name, "sum") for name in sums)]
    )
    loss, gain, prob, weight, tokens = (found[f"{name}_sum"].to_numpy() for name in sums)
    losses = {"row_id": found["row_id"], "epoch": found["epoch_max"], "step": found["step_max"]}
    losses |= {"loss": loss / weight if family == "tokens" else loss, "tokens": tokens, "mean_prob": prob / tokens}
    write_parquet(path, pa.table(losses | ({GAINS[family]: gain} if family in GAINS else {})))
