"""What a stage is worth on the held-out rows while it trains, and the weights that did best there."""

import math
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
from transformers import PreTrainedTokenizerBase

from ..curation.folder import HouseError
from ..curation.shards import read_split
from .checkpoint import Checkpoint, find_latest, save_checkpoint, step_folders
from .data import Plan, counted, read_units
from .evaluate import auc
from .forward import inference
from .packing import pack_plan
from .ranks import World
from .reference import Reference
from .sharded import Spread
from .stage import Stage, shares_of, step_values
from .units import Family

Best = dict[str, Any]
"""{"step": …, "loss": …} of the best measurement so far."""


def held_out_plan(
    family: Family, tokenizer: PreTrainedTokenizerBase, data: Path, capacity: int, context: int | None
) -> Plan:
    """The held-out rows as one step over all their packs. HouseError where there is none to measure."""
    try:
        rows: pa.Table = read_split(data, "test")
    except HouseError as error:
        raise HouseError(f"evaluate_every: {error}. Hold rows out (held_out), or leave evaluate_every at 0") from error
    units = read_units(family, tokenizer, rows, capacity, "drop", context)
    if not units.row_ids:
        raise HouseError(f"evaluate_every: none of the {rows.num_rows} held-out rows of {data} can be measured")
    packs = pack_plan(units.lengths, capacity)
    return Plan(units, packs, [(0, list(range(len(packs))))], "held out")


def held_out_record(plan: Plan | None) -> dict[str, Any]:
    """What a stage's plan says of the held-out rows: how many are measured, and how many are not, by reason."""
    if plan is None:
        return {}
    rows = set(plan.units.rows_of(plan.units_of(0))[0])
    return {"held_out": {"rows": len(rows), "excluded": counted(plan.units.excluded)}}


def measure(stage: Stage) -> dict[str, float]:
    """held_out_loss: as the stage's own, over the held-out rows; for pairs and lists also held_out_accuracy, and for
    single answers with labels held_out_auc (evaluate.auc), where both labels are there: of the answers' rewards, or
    without a reference of their mean log-probabilities."""
    with inference(stage.policy):
        values = step_values(stage, 0).values.double()
    found = {"held_out_loss": float(values[0].sum()) * float(shares_of(stage, 0)[0])}
    if stage.loss.family in ("pairs", "lists"):
        right = (values[1] > 0).double() + 0.5 * (values[1] == 0)
        found["held_out_accuracy"] = float(right.where(~values[1].isnan(), math.nan).mean())
    units = stage.plan.units
    if stage.loss.family == "unpaired" and units.labels is not None:
        order = stage.plan.units_of(0)
        gains = values[1].numpy() / (units.weights[order] if stage.reference is None else 1.0)
        area = auc(gains, units.labels[order])
        found |= {} if area is None else {"held_out_auc": area}
    return found


def with_plan(stage: Stage, plan: Plan, reference: Reference | None) -> Stage:
    """The stage over other rows."""
    return replace(stage, plan=plan, reference=reference)


def keep_best(folder: Path, best: Best, weights: dict[str, Any], spread: Spread) -> None:
    """Keeps the weights of the best measurement in `folder`, beside those of earlier ones: a run that resumes from an
    older checkpoint finds what was best then."""
    save_checkpoint(folder, Checkpoint(best["step"], weights, {}), 10**9, spread.here, spread.pieces(weights))


def prune_best(folder: Path, best: Best | None) -> None:
    """Leaves the weights of `best` alone, once a checkpoint that knows of it is whole."""
    for path in step_folders(folder):
        if best is None or path.name != f"step-{best['step']:06d}":
            shutil.rmtree(path)


def read_best(folder: Path, best: Best | None, say: Callable[[str], None], here: World) -> Checkpoint | None:
    """The weights that were best, or None where none were kept."""
    found = find_latest(folder, say, here) if best is not None else None
    return found if found is not None and best is not None and found.step == best["step"] else None
