"""`train`: the one loop, for SFT and DPO, for adapters and for all weights.

A stage's folder holds run.json (inputs, plan, place; status `running`, at the end `complete`), the plan's tables
(data.py), metrics.jsonl, checkpoints/, for DPO reference.parquet, row_losses/train.parquet, and adapter/ or model/.
A run that was killed anywhere continues by the same call and ends in the same bytes on the same kind of machine: the
plan is a function of the inputs, each step seeds its own dropout, and a checkpoint holds the rest.
"""

import hashlib
import json
import logging
import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import AutoConfig, PreTrainedModel

from ..curation.folder import HouseError, read_json, whole_folder, write_json
from .checkpoint import Checkpoint, find_latest, optimizer_tensors, remove_torn, restore_optimizer, save_checkpoint
from .data import Objective, Plan, make_plan, read_rows, read_units, write_plan
from .forward import answer_logps, context_of, inference, pack_logps
from .lora import LoraLinear, add_lora, load_adapter, save_adapter, trainable
from .losses import dpo_loss, sft_loss, sums_by_document
from .models import load_model, load_tokenizer
from .packing import Pack
from .place import Place, training_place
from .records import (
    INPUTS,
    begun,
    cut_metrics,
    folder_digest,
    read_reference,
    run_inputs,
    write_reference,
    write_row_losses,
)
from .settings import Training

Progress = Callable[[dict[str, Any]], None]
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Stage:
    """What the steps of one stage share. key: digest of its inputs and plan. reference: (U, 2) log-probabilities of
    DPO's answers, on the policy's device; None for SFT."""

    key: str
    objective: Objective
    plan: Plan
    policy: PreTrainedModel
    parameters: dict[str, nn.Parameter]
    reference: torch.Tensor | None
    settings: Training
    out: Path


def train(
    objective: Objective,
    data: Path,
    model: Path,
    out: Path,
    settings: Training,
    *,
    adapter: Path | None = None,
    name: str = "",
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Trains one stage into `out` and returns its run.json.

    data: a curated folder of kind sft or preference. model: a transformers folder. adapter: a PEFT folder to continue,
    of the rank and alpha of `settings.lora`. name: what the recipe calls the stage. progress: is given {"event":
    "plan", …} (plan.json), "reference" (done, total), "resume" (step), "step" (the line of metrics.jsonl, total).

    A finished `out` of the same inputs is returned at once; one of other inputs is a HouseError that names them. Also a
    HouseError: data of the wrong kind, no row left, over-long rows (as settings.overlong says), a loss that is not
    finite (with the step's rows; the last checkpoint stays).
    """
    tell = progress or (lambda event: None)
    inputs = run_inputs(objective, data, model, adapter, settings)
    past = begun(out, inputs)
    if past is not None and past["status"] == "complete":
        return past
    with continuable(out), training_place(settings, past) as place:
        tokenizer, context = load_tokenizer(model), context_of(AutoConfig.from_pretrained(model, local_files_only=True))
        rows = read_rows(objective, data)
        units = read_units(objective, tokenizer, rows, settings.capacity, settings.overlong, context)
        plan = make_plan(units, settings)
        numbers = write_plan(plan, settings.capacity, out)
        policy, parameters = _policy(model, adapter, settings, place)
        run = {"status": "running", "name": name, **inputs, **place.record(), "plan": numbers}
        write_json(out / "run.json", run)
        tell({"event": "plan", **numbers})
        reference = _reference(policy, plan, out, _key(run), tell) if objective == "dpo" else None
        stage = Stage(_key(run), objective, plan, policy, parameters, reference, settings, out)
        _steps(stage, tell)
        if settings.lora is None:
            with whole_folder(out / "model") as folder:
                policy.set_attn_implementation("sdpa")
                policy.save_pretrained(folder)
                tokenizer.save_pretrained(folder)
        else:
            save_adapter(policy, out / "adapter", settings.lora, str(model))
    return _complete(out, run)


@contextmanager
def continuable(out: Path) -> Iterator[None]:
    """Says, where a person stops the run, how it goes on."""
    try:
        yield
    except KeyboardInterrupt:
        log.warning("stopped; the same command continues %s from its last checkpoint", out)
        raise


def pack_loss(stage: Stage, pack: Pack, units: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The loss of one pack in sum form, and (2, U) values of each of its units.

    units: the pack's units. SFT: weighted sum of -log p over the unit's targets, and the sum of their probabilities;
    DPO: the pair's loss and its margin.
    """
    if stage.reference is None:
        logps, weights, owners = pack_logps(stage.policy, pack)
        seen = torch.stack([-logps * weights, logps.exp()]).detach()
        sums = [sums_by_document(values, owners, len(pack.lengths)) for values in seen]
        return sft_loss(logps, weights), torch.stack(sums)
    (chosen, rejected), (ref_chosen, ref_rejected) = answer_logps(stage.policy, pack).t(), stage.reference[units].t()
    losses, margins = dpo_loss(chosen, rejected, ref_chosen, ref_rejected, stage.settings.beta)
    return losses.sum(), torch.stack([losses.detach(), margins])


def accumulate(stage: Stage, step: int) -> torch.Tensor:
    """Gradients of one optimizer step, pack by pack, as of one big batch: divided by the target weight (SFT) or the
    pairs (DPO) of all its packs. Returns (2, U) values (pack_loss) in the order of `plan.units_of(step)`."""
    plan = stage.plan
    seen = []
    divisor = share_of(stage, step)
    for index in plan.steps[step][1]:
        units = plan.packs[index]
        loss, values = pack_loss(stage, plan.units.pack(units), torch.from_numpy(units))
        torch.autograd.backward(loss / divisor)
        seen.append(values)
    return torch.cat(seen, 1).cpu()


def share_of(stage: Stage, step: int) -> float:
    """What the step's summed loss is divided by."""
    units = stage.plan.units_of(step)
    return float(stage.plan.units.weights[units].sum()) if stage.objective == "sft" else float(len(units))


def learning_rate(settings: Training, step: int, steps: int) -> float:
    """Of step `step` (from 0) of `steps`: rises linearly over the warm-up steps, then falls linearly, to be zero after
    the last one."""
    warm = math.ceil(settings.warmup * steps)
    return settings.learning_rate * ((step + 1) / (warm + 1) if step < warm else (steps - step) / (steps - warm))


def _steps(stage: Stage, tell: Progress) -> None:
    """Every optimizer step that is still to do."""
    plan, settings, out = stage.plan, stage.settings, stage.out
    optimizer = _adamw(stage.parameters, settings)
    values, last = torch.zeros(2, len(plan.units.row_ids)), torch.zeros(len(plan.units.row_ids), dtype=torch.int32)
    start = _resume(stage, optimizer, values, last, tell)
    cut_metrics(out / "metrics.jsonl", start)
    stage.policy.train()
    saved, total = start, len(plan.steps)
    with (out / "metrics.jsonl").open("a", encoding="utf-8") as metrics:
        for step in range(start, total):
            began = time.perf_counter()
            torch.manual_seed(_step_seed(settings.seed, step))
            rate = learning_rate(settings, step, total)
            for group in optimizer.param_groups:
                group["lr"] = rate
            units = plan.units_of(step)
            values[:, units] = accumulate(stage, step)
            last[units] = step + 1
            norm = float(nn.utils.clip_grad_norm_(stage.parameters.values(), settings.max_grad_norm))
            loss = float(values[0, units].double().sum()) / share_of(stage, step)
            _check_finite(stage, step, loss, norm, saved)
            optimizer.step()
            optimizer.zero_grad()
            line = {"step": step + 1, "epoch": plan.steps[step][0] + 1, "loss": loss, "grad_norm": norm, "lr": rate}
            line |= _numbers(stage, values, units, time.perf_counter() - began)
            metrics.write(json.dumps(line) + "\n")
            metrics.flush()
            tell({"event": "step", **line, "total": total})
            if (step + 1) % settings.checkpoint_every == 0 and step + 1 < total:
                weights = {f"weights/{name}": p.detach() for name, p in stage.parameters.items()}
                seen = {"seen/values": values, "seen/last": last}
                tensors = weights | optimizer_tensors(optimizer, stage.parameters) | seen
                save_checkpoint(
                    out / "checkpoints", Checkpoint(step + 1, tensors, {"key": stage.key}), settings.keep_checkpoints
                )
                saved = step + 1
    write_row_losses(out / "row_losses" / "train.parquet", stage.objective, plan, values.numpy(), last.numpy())


def _numbers(stage: Stage, values: torch.Tensor, units: np.ndarray, seconds: float) -> dict[str, Any]:
    tokens = int(stage.plan.units.lengths[units].sum())
    line = {
        "tokens": tokens,
        "target_tokens": int(stage.plan.units.targets[units].sum()),
        "tokens_per_s": round(tokens / seconds, 1),
        "seconds": round(seconds, 4),
    }
    if stage.objective == "dpo":
        margins = values[1, units].double()
        accuracy = (margins > 0).double() + 0.5 * (margins == 0)
        line |= {"margin": float(margins.mean()), "accuracy": float(accuracy.mean())}
    return line


def _policy(
    model: Path, adapter: Path | None, settings: Training, place: Place
) -> tuple[PreTrainedModel, dict[str, nn.Parameter]]:
    """The model that is trained and its trainable parameters by name."""
    if settings.lora is None and adapter is not None:
        raise HouseError(f"lora: null tunes all weights of {model} and cannot continue the adapter {adapter}")
    policy = load_model(model, dtype=place.dtype, device=place.device)
    if settings.lora is None:
        policy.requires_grad_(True)
        return policy, dict(policy.named_parameters())
    if adapter is None:
        add_lora(policy, settings.lora, settings.seed)
        return policy, trainable(policy)
    found = load_adapter(policy, adapter, settings.lora.base, trainable=True)
    for field in ("rank", "alpha"):
        ours, theirs = getattr(settings.lora, field), getattr(found, field)
        if ours != theirs:
            raise HouseError(f"{adapter} has {field} {theirs}, the stage that continues it {ours}: set it to {theirs}")
    for module in policy.modules():
        if isinstance(module, LoraLinear):
            module.dropout = settings.lora.dropout
    return policy, trainable(policy)


def _reference(policy: PreTrainedModel, plan: Plan, out: Path, key: str, tell: Progress) -> torch.Tensor:
    """(U, 2) log-probabilities of the answers under the weights that the stage starts from, on the very packs of
    training, so that the loss of the first step is ln 2; read where they are stored."""
    path = out / "reference.parquet"
    found = read_reference(path, key)
    if found is None:
        found = np.zeros((len(plan.units.row_ids), 2), np.float32)
        with inference(policy):
            for done, units in enumerate(plan.packs):
                found[units] = answer_logps(policy, plan.units.pack(units)).float().cpu().numpy()
                tell({"event": "reference", "done": done + 1, "total": len(plan.packs)})
        write_reference(path, key, plan, found)
    return torch.from_numpy(found).to(next(policy.parameters()).device)


def _resume(
    stage: Stage, optimizer: torch.optim.Optimizer, values: torch.Tensor, last: torch.Tensor, tell: Progress
) -> int:
    """Puts the latest whole checkpoint's state into place and returns the number of steps done."""
    remove_torn(stage.out / "checkpoints")
    found = find_latest(stage.out / "checkpoints", log.warning)
    if found is None:
        return 0
    if found.values["key"] != stage.key:
        raise HouseError(f"{stage.out / 'checkpoints'} holds checkpoints of another run; choose another folder")
    with torch.no_grad():
        for name, parameter in stage.parameters.items():
            parameter.copy_(found.tensors[f"weights/{name}"])
        values.copy_(found.tensors["seen/values"])
        last.copy_(found.tensors["seen/last"])
    restore_optimizer(optimizer, stage.parameters, found.tensors)
    tell({"event": "resume", "step": found.step})
    return found.step


def _adamw(parameters: dict[str, nn.Parameter], settings: Training) -> torch.optim.AdamW:
    """AdamW (arXiv 1711.05101) that decays matrices alone."""
    groups = [
        {"params": [p for p in parameters.values() if p.ndim > 1], "weight_decay": settings.weight_decay},
        {"params": [p for p in parameters.values() if p.ndim < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW([group for group in groups if group["params"]], lr=settings.learning_rate, fused=True)


def _check_finite(stage: Stage, step: int, loss: float, norm: float, saved: int) -> None:
    if math.isfinite(loss) and math.isfinite(norm):
        return
    row_ids = list(dict.fromkeys(stage.plan.units.row_ids[unit] for unit in stage.plan.units_of(step)))
    shown = ", ".join(row_ids[:20]) + (f" and {len(row_ids) - 20} more (steps.parquet)" if len(row_ids) > 20 else "")
    raise HouseError(
        f"step {step + 1} of {stage.out}: loss {loss}, gradient norm {norm}. The weights before it are untouched; the "
        f"last checkpoint is of step {saved}. Lower the learning rate or look at the step's rows: {shown}"
    )


def _step_seed(seed: int, step: int) -> int:
    """A seed of its own for each step's dropout, so that a checkpoint needs no generator's state."""
    return int.from_bytes(hashlib.blake2b(f"{seed} {step}".encode(), digest_size=7).digest())


def _key(run: dict[str, Any]) -> str:
    """Of all that the weights of each step depend on, the place aside."""
    inputs = [run[name] for name in INPUTS]
    return hashlib.sha256(json.dumps([inputs, run["plan"]["digest"]], sort_keys=True).encode()).hexdigest()


def _complete(out: Path, run: dict[str, Any]) -> dict[str, Any]:
    """Writes run.json for good, the marker of a finished stage."""
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    seconds = sum(line["seconds"] for line in lines)
    result = "model" if run["settings"]["lora"] is None else "adapter"
    whole = run | {
        "status": "complete",
        "result": result,
        "result_digest": folder_digest(out / result),
        "loss": lines[-1]["loss"],
        "seconds": round(seconds, 3),
        "tokens_per_s": round(sum(line["tokens"] for line in lines) / seconds, 1),
    }
    write_json(out / "run.json", whole)
    return read_json(out / "run.json")
