"""`train`: the one loop, for every objective and loss, for adapters and for all weights, on one process or many.

A stage's folder holds run.json (inputs, plan, place; status `running`, at the end `complete`), the plan's tables
(data.py), metrics.jsonl, checkpoints/, references/, row_losses/train.parquet, and adapter/ or model/ (with held-out
rows measured also best/). A run that was killed anywhere continues by the same call and ends in the same bytes on the
same kind of machine: the plan is a function of the inputs, each pack of each step seeds its own dropout, and a
checkpoint holds the rest.
"""

import json
import logging
import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any, TextIO

import numpy as np
import pyarrow as pa
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..curation.folder import HouseError, read_json, room_for, whole_folder, write_json
from .adapted import LoraLinear
from .checkpoint import Checkpoint, find_latest, optimizer_tensors, remove_torn, restore_optimizer, save_checkpoint
from .data import Family, Objective, Plan, make_plan, read_rows, read_units, write_plan
from .forward import context_of
from .held_out import Best, held_out_plan, held_out_record, keep_best, measure, prune_best, read_best, with_plan
from .lora import add_lora, check_continued, load_adapter, save_adapter
from .models import load_config, load_model, load_tokenizer, no_bars
from .noise import mask_token_of
from .objectives import Loss, find_loss
from .optim import learning_rate, make_optimizer, set_rate
from .outlook import Outlook, enough_memory, outlook
from .place import Place, training_place
from .ranks import world
from .recompute import recompute
from .records import begun, cut_metrics, folder_digest, run_inputs, run_key, write_row_losses
from .reference import Reference, reference_of
from .settings import Training
from .sharded import Spread, spread
from .stage import VALUES, Seen, Stage, accumulate, shares_of
from .trackers import Track, check_trackers, trackers

Progress = Callable[[dict[str, Any]], None]
log = logging.getLogger(__name__)


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
    references: Path | None = None,
) -> dict[str, Any]:
    """Trains one stage into `out` and returns its run.json.

    data: a curated folder of the objective's kind. model: a transformers folder. adapter: a PEFT folder to continue, of
    the rank and alpha of `settings.lora`. name: what the recipe calls the stage. references: where log-probabilities
    under the start's weights are kept and looked for (default: in `out`). progress: is given {"event": "plan", …}
    (plan.json, with `excluded_rows`), "reference" (done, total), "resume" (step), "step" (the line of metrics.jsonl,
    total, eta in seconds).

    Under torchrun all processes train the one stage together; the first one writes and reports. A finished `out` of the
    same inputs is returned at once; one of other inputs is a HouseError that names them. Also a HouseError: data of the
    wrong kind, no row left, over-long rows (as settings.overlong says), a loss or gradient that is not finite (with
    the step's rows; the last checkpoint stays), memory that does not suffice (with what would fit).
    """
    loss = find_loss(settings.loss, objective)
    _suits(settings, loss)
    with world() as here:
        tell = progress if progress is not None and here.main else _silent
        inputs = run_inputs(objective, loss, data, model, adapter, settings)
        past = here.first(lambda: begun(out, inputs))
        if past is not None and past["status"] == "complete":
            return past
        with continuable(out), training_place(settings, past) as place:
            config = load_config(model)
            tokenizer, context = load_tokenizer(model), context_of(config)
            plan = _plan(read_rows(objective, data), loss.family, tokenizer, settings, context)
            held = None
            if settings.evaluate_every:
                held = held_out_plan(loss.family, tokenizer, data, settings.capacity, context)
            for read in (plan,) if held is None else (plan, held):
                _embeddable(read, config)
            policy = _policy(model, adapter, settings, place)
            view = outlook(config, plan, settings, place.device, policy.dtype, loss.reference, here.size)
            run = {"status": "running", "name": name, **inputs, **place.record(), "processes": here.size}
            if here.main:
                run["plan"] = write_plan(plan, settings.capacity, out) | view.record | held_out_record(held)
                write_json(out / "plan.json", run["plan"])
                write_json(out / "run.json", run)
            run = here.told(run)
            tell({"event": "plan", **run["plan"], "excluded_rows": _excluded(plan)})
            weights = {key: run[key] for key in ("model_digest", "adapter_digest", "device", "dtype")}
            weights["base"] = None if settings.lora is None else settings.lora.base
            with enough_memory(view, plan):
                parts = _Parts(loss, settings, context, weights, references or out / "references", tell)
                spreaded = spread(policy, here, settings.parallel)
                reference = _reference(spreaded, plan, parts, policy_of="train")
                aside = None if held is None else (held, _reference(spreaded, held, parts, policy_of="held out"))
                recompute(policy, settings)
                mask = mask_token_of(tokenizer) if settings.masked_thought else 0
                stage = Stage(run_key(run), loss, plan, spreaded, reference, settings, out, mask)
                trained = _Run(stage, None if aside is None else with_plan(stage, *aside), view, tell, run)
                best = _steps(trained)
            _export(stage, tokenizer, model, out / _result(settings))
            _export_best(trained, best, tokenizer, model)
        return here.first(lambda: _complete(out, run, view, best))


def _embeddable(plan: Plan, config: Any) -> None:
    """HouseError where a row says a token that the model's embedding has no row for."""
    rows, units = config.get_text_config().vocab_size, plan.units
    highest = np.asarray([document.ids.max(initial=0) for document in units.documents])
    if highest.max(initial=0) >= rows:
        beyond = np.logical_or.reduceat(highest >= rows, units.first[:-1])
        found = [row for row, one in zip(units.row_ids, beyond, strict=True) if one]
        raise HouseError(
            f"the model's embedding has {rows} rows and none for token id {highest.max()} of {len(found)} rows, such as"
            f" {', '.join(found[:3])}: a special token written out in their text. Drop these rows or that text"
        )


def _silent(event: dict[str, Any]) -> None:
    pass


@contextmanager
def continuable(out: Path) -> Iterator[None]:
    """Says, where a person stops the run, how it goes on."""
    try:
        yield
    except KeyboardInterrupt:
        log.warning("stopped; the same command continues %s from its last checkpoint", out)
        raise


def _suits(settings: Training, loss: Loss) -> None:
    """HouseError for settings that cannot be, before anything is read."""
    check_trackers(settings.track)
    if settings.compile:
        raise HouseError(
            "compile: attention is guarded by the lengths of each pack's documents, so torch.compile would compile "
            "every pack anew; the steps are made of operations that are fused already. Leave it out"
        )
    for key in ("neftune_alpha", "masked_thought"):
        if getattr(settings, key) and loss.family != "tokens":
            raise HouseError(
                f"{key} is noise on supervised inputs; {loss.name} is a loss of {loss.family}: leave it out"
            )


def _plan(
    rows: pa.Table, family: Family, tokenizer: PreTrainedTokenizerBase, settings: Training, context: int | None
) -> Plan:
    return make_plan(read_units(family, tokenizer, rows, settings.capacity, settings.overlong, context), settings)


def _excluded(plan: Plan) -> dict[str, list[str]]:
    """The first rows left out, by reason."""
    found: dict[str, list[str]] = {}
    for row in plan.units.excluded.to_pylist():
        found.setdefault(row["reason"], []).append(row["row_id"])
    if plan.units.truncated.num_rows:
        found["truncated"] = plan.units.truncated["row_id"].to_pylist()
    return {reason: row_ids[:5] for reason, row_ids in found.items()}


@dataclass(frozen=True)
class _Parts:
    """What a reference is computed with."""

    loss: Loss
    settings: Training
    context: int | None
    weights: dict[str, Any]
    folder: Path
    tell: Progress


def _reference(policy: Spread, plan: Plan, parts: _Parts, *, policy_of: str) -> Reference | None:
    def tell(done: int, total: int) -> None:
        parts.tell({"event": "reference", "rows": policy_of, "done": done, "total": total})

    return reference_of(
        policy, plan, parts.loss, parts.settings.capacity, parts.context, parts.weights, parts.folder, tell
    )


@dataclass(frozen=True)
class _Run:
    """A stage with what its steps are told to and measured on."""

    stage: Stage
    held: Stage | None
    view: Outlook
    tell: Progress
    run: dict[str, Any]


@dataclass
class _State:
    """What changes from step to step besides weights and moments. values: (3, U) as the last epoch saw each unit; last:
    (U,) the step that did; done: steps; saved: those of the last checkpoint."""

    values: torch.Tensor
    last: torch.Tensor
    best: Best | None = None
    done: int = 0
    saved: int = 0


def _steps(run: _Run) -> Best | None:
    """Every optimizer step that is still to do. Returns the best measurement on the held-out rows."""
    stage, total = run.stage, len(run.stage.plan.steps)
    units = len(stage.plan.units.row_ids)
    optimizer = make_optimizer(stage.spread.parameters, stage.settings)
    state = _State(torch.zeros(len(VALUES), units), torch.zeros(units, dtype=torch.int32))
    _resume(stage, optimizer, state, run.tell)
    main = stage.spread.here.main
    if main:
        cut_metrics(stage.out / "metrics.jsonl", state.done)
    stage.policy.train()
    record = {**run.run, "key": stage.key}
    track_to = stage.settings.track if main else ()
    with _metrics(stage.out, main) as metrics, trackers(track_to, stage.out, record) as track:
        for step in range(state.done, total):
            line = _step(run, optimizer, state, step)
            if run.held is not None and ((step + 1) % stage.settings.evaluate_every == 0 or step + 1 == total):
                line |= _measured(run.held, state)
            _report(run, line, metrics, track)
            if (step + 1) % stage.settings.checkpoint_every == 0 and step + 1 < total:
                _save(stage, optimizer, state)
    if main:
        path = stage.out / "row_losses" / "train.parquet"
        write_row_losses(path, stage.loss.family, stage.plan, state.values.numpy(), state.last.numpy())
    return state.best


def _step(run: _Run, optimizer: torch.optim.Optimizer, state: _State, step: int) -> dict[str, Any]:
    """One optimizer step, and its line of metrics.jsonl."""
    stage, began = run.stage, time.perf_counter()
    rate = learning_rate(stage.settings, step, len(stage.plan.steps))
    set_rate(optimizer, rate)
    units = stage.plan.units_of(step)
    seen = accumulate(stage, step)
    state.values[:, units] = seen.values
    state.last[units] = step + 1
    norm = stage.spread.clip(stage.settings.max_grad_norm)
    loss = float(seen.values[0].double().sum()) * float(shares_of(stage, step)[0])
    _check_finite(stage, step, loss, norm, seen, state)
    optimizer.step()
    optimizer.zero_grad()
    state.done = step + 1
    line = {"step": step + 1, "epoch": stage.plan.steps[step][0] + 1, "loss": loss, "grad_norm": norm, "lr": rate}
    return line | _gains(stage, seen, units) | _costs(run, units, time.perf_counter() - began)


def _gains(stage: Stage, seen: Seen, units: np.ndarray) -> dict[str, float]:
    """What the step's answers gained on the reference."""
    gains = seen.values[1].double()
    if stage.loss.family in ("pairs", "lists"):
        accuracy = (gains > 0).double() + 0.5 * (gains == 0)
        return {"margin": float(gains.mean()), "accuracy": float(accuracy.mean())}
    labels = stage.plan.units.labels
    if stage.loss.family != "unpaired" or labels is None:
        return {}
    good = torch.from_numpy(labels[units])
    found = {"reward_desirable": gains[good], "reward_undesirable": gains[~good]}
    line = {name: float(values.mean()) for name, values in found.items() if len(values)}
    return line | ({} if seen.kl is None else {"kl": seen.kl})


def _costs(run: _Run, units: np.ndarray, seconds: float) -> dict[str, Any]:
    of = run.stage.plan.units
    tokens = int(of.lengths[units].sum())
    return {
        "tokens": tokens,
        "target_tokens": int(of.targets[units].sum()),
        "tokens_per_s": round(tokens / seconds, 1),
        "roofline_share": round(run.view.roofline.share(tokens / seconds), 6),
        "memory": run.view.peak_memory(),
        "seconds": round(seconds, 4),
    }


def _measured(held: Stage, state: _State) -> dict[str, Any]:
    """The held-out rows, now; the weights are kept where they are the best so far."""
    found = measure(held)
    loss = found["held_out_loss"]
    if math.isfinite(loss) and (state.best is None or loss < state.best["loss"]):
        state.best = {"step": state.done, "loss": loss}
        keep_best(held.out / "checkpoints" / "best", state.best, _weights(held), held.spread)
    return found


def _report(run: _Run, line: dict[str, Any], metrics: TextIO | None, track: Track) -> None:
    if metrics is not None:
        metrics.write(json.dumps(line) + "\n")
        metrics.flush()
    track(line["step"], line)
    total = len(run.stage.plan.steps)
    eta = run.view.eta(line["seconds"], total - line["step"])
    run.tell({"event": "step", **line, "total": total, "eta": eta})


@contextmanager
def _metrics(out: Path, main: bool) -> Iterator[TextIO | None]:
    if not main:
        yield None
        return
    path = out / "metrics.jsonl"
    with room_for(path), path.open("a", encoding="utf-8") as file:
        yield file


# ---- weights


def _policy(model: Path, adapter: Path | None, settings: Training, place: Place) -> PreTrainedModel:
    """The model that is trained, with gradients where it learns."""
    if settings.lora is None and adapter is not None:
        raise HouseError(f"lora: null tunes all weights of {model} and cannot continue the adapter {adapter}")
    base = None if settings.lora is None else settings.lora.base
    policy = load_model(model, dtype=place.dtype, device=place.device, base=base)
    if settings.lora is None:
        policy.requires_grad_(True)
        return policy
    if adapter is None:
        add_lora(policy, settings.lora, settings.seed)
        return policy
    found = load_adapter(policy, adapter, settings.lora.base, trainable=True)
    check_continued(policy, found, settings.lora, adapter)
    for module in policy.modules():
        if isinstance(module, LoraLinear):
            module.dropout = settings.lora.dropout
    return policy


def _weights(stage: Stage) -> dict[str, torch.Tensor]:
    return {f"weights/{name}": p.detach() for name, p in stage.spread.parameters.items()}


def _save(stage: Stage, optimizer: torch.optim.Optimizer, state: _State) -> None:
    """A checkpoint of the steps done."""
    seen = {"seen/values": state.values, "seen/last": state.last}
    tensors = _weights(stage) | optimizer_tensors(optimizer, stage.spread.parameters) | seen
    folder = stage.out / "checkpoints"
    checkpoint = Checkpoint(state.done, tensors, {"key": stage.key, "best": state.best})
    pieces = stage.spread.pieces(tensors)
    save_checkpoint(folder, checkpoint, stage.settings.keep_checkpoints, stage.spread.here, pieces)
    if stage.spread.here.main:
        prune_best(folder / "best", state.best)
    state.saved = state.done


def _resume(stage: Stage, optimizer: torch.optim.Optimizer, state: _State, tell: Progress) -> None:
    """Puts the latest whole checkpoint's state into place."""
    folder = stage.out / "checkpoints"
    if stage.spread.here.main:
        remove_torn(folder)
        remove_torn(folder / "best")
    found = find_latest(folder, log.warning, stage.spread.here)
    if found is None:
        return
    if found.values["key"] != stage.key:
        raise HouseError(f"{folder} holds checkpoints of another run; choose another folder")
    _put(stage, found)
    state.values.copy_(found.tensors["seen/values"])
    state.last.copy_(found.tensors["seen/last"])
    restore_optimizer(optimizer, stage.spread.parameters, found.tensors, stage.spread.own)
    state.done = state.saved = found.step
    state.best = found.values["best"]
    if stage.spread.here.main:
        prune_best(folder / "best", state.best)
    tell({"event": "resume", "step": found.step})


@torch.no_grad()
def _put(stage: Stage, checkpoint: Checkpoint) -> None:
    for name, parameter in stage.spread.parameters.items():
        parameter.copy_(stage.spread.own(name, checkpoint.tensors[f"weights/{name}"]))


def _check_finite(stage: Stage, step: int, loss: float, norm: float, seen: Seen, state: _State) -> None:
    """Stops before weights are touched by what is not a number, and names the rows of the step: those whose own loss is
    none, where there are such; or the weights that are none already."""
    if math.isfinite(loss) and math.isfinite(norm):
        return
    units = stage.plan.units_of(step)
    odd = ~torch.isfinite(seen.values[0]).numpy()
    row_ids = list(dict.fromkeys(stage.plan.units.rows_of(units[odd] if odd.any() else units)[0]))
    shown = ", ".join(row_ids[:20]) + (f" and {len(row_ids) - 20} more (steps.parquet)" if len(row_ids) > 20 else "")
    whose = "rows whose loss is not finite" if odd.any() else "step's rows"
    kept = f"the last checkpoint is of step {state.saved}" if state.saved else "no checkpoint was due before it"
    harmed = _not_finite(stage.policy)
    cause = f"These weights hold what is no number: {', '.join(harmed[:3])} ({len(harmed)} in all)." if harmed else ""
    todo = "Lower the learning rate" if state.done or not harmed else "Get the model again"
    raise HouseError(
        f"step {step + 1} of {stage.out}: loss {loss}, gradient norm {norm}. The weights before it are untouched; "
        f"{kept}. {cause and cause + ' '}{todo} or look at the {whose}: {shown}"
    )


def _not_finite(model: PreTrainedModel) -> list[str]:
    """Names of the weights that hold a NaN or an infinity."""

    def finite(value: Any) -> bool:
        own = value.to_local() if hasattr(value, "to_local") else value  # of a sharded model, this process's share
        return not own.is_floating_point() or bool(torch.isfinite(own).all())

    return [name for name, value in chain(model.named_parameters(), model.named_buffers()) if not finite(value)]


# ---- the end


def _result(settings: Training) -> str:
    return "model" if settings.lora is None else "adapter"


def _export(stage: Stage, tokenizer: PreTrainedTokenizerBase, model: Path, folder: Path) -> None:
    """The weights as they are now: an adapter, or the whole model with its tokenizer."""
    with stage.spread.whole():
        if not stage.spread.here.main:
            return
        if stage.settings.lora is not None:
            save_adapter(stage.policy, folder, stage.settings.lora, str(model))
            return
        with whole_folder(folder) as temporary, no_bars():
            stage.policy.set_attn_implementation("sdpa")
            stage.policy.save_pretrained(temporary)
            tokenizer.save_pretrained(temporary)


def _export_best(run: _Run, best: Best | None, tokenizer: PreTrainedTokenizerBase, model: Path) -> None:
    """The weights that did best on the held-out rows, in `best/`."""
    found = read_best(run.stage.out / "checkpoints" / "best", best, log.warning, run.stage.spread.here)
    if found is not None:
        _put(run.stage, found)
        _export(run.stage, tokenizer, model, run.stage.out / "best")


def _complete(out: Path, run: dict[str, Any], view: Outlook, best: Best | None) -> dict[str, Any]:
    """Writes run.json for good, the marker of a finished stage."""
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    seconds = sum(line["seconds"] for line in lines)
    rate = sum(line["tokens"] for line in lines) / seconds
    result = "model" if run["settings"]["lora"] is None else "adapter"
    whole = run | {
        "status": "complete",
        "result": result,
        "result_digest": folder_digest(out / result),
        "loss": lines[-1]["loss"],
        "best": best,
        "seconds": round(seconds, 3),
        "tokens_per_s": round(rate, 1),
        "roofline_share": round(view.roofline.share(rate), 6),
        "roofline_formula": view.roofline.formula,
        "memory": max(line["memory"] for line in lines),
    }
    write_json(out / "run.json", whole)
    return read_json(out / "run.json")
