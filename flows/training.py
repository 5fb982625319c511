"""The training and evaluation stages of a run."""

import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from ..curation.door import Progress
from ..curation.folder import HouseError, RunFolder, read_json, write_json
from ..curation.shards import read_split
from ..tuning.evaluate import evaluate_preference, evaluate_sft, evaluate_unpaired
from ..tuning.models import load_config, load_tokenizer
from ..tuning.objectives import find_loss
from ..tuning.servable import check_servable
from ..tuning.settings import Training
from .launch import train_here
from .models import Workshop
from .progress import Bar, Done
from .recipe import Recipe, Train
from .stages import Evaluate, models_of
from .training_text import end_text, plan_text, step_text

Row = dict[str, Any]
UNPAIRED = ("logp_desirable", "logp_undesirable", "logp_auc", "reward_auc", "margin")


def train_stage(folder: RunFolder, shop: Workshop, stage: Train, progress: Progress) -> Done:
    """Trains one stage in its folder, or finds it trained."""
    out = folder.stage(stage.name)
    base, adapter = shop.base_folder(stage.model), None
    if stage.start is not None:
        base, adapter = shop.where(stage.start)
    record = out / "run.json"
    cached = record.is_file() and read_json(record)["status"] == "complete"
    if not cached and (asker := _asks_through_vllm(shop.recipe, stage)):
        _refuse_unservable(stage, asker, base)

    run = train_here(
        stage.objective,
        folder.curated(stage.set),
        base,
        out,
        stage.settings,
        adapter=adapter,
        name=stage.name,
        progress=told(progress),
        references=folder.root / "references",
    )
    return Done(end_text(run, out), cached, run)


def _asks_through_vllm(recipe: Recipe, stage: Train) -> str | None:
    """The set whose steps will ask the trained model through vLLM, if any will."""
    model = recipe.models[stage.model]
    if model.vllm is None and model.serve is None:
        return None
    asking = (one.set for one in recipe.sets().values() if any(stage.name in models_of(step) for step in one.steps))
    return next(asking, None)


def _refuse_unservable(stage: Train, asker: str, base: Path) -> None:
    """HouseError, before the first step, where vLLM would not take what the stage is about to train."""
    found = check_servable(load_config(base), stage.settings.lora)
    if found:
        raise HouseError(
            f"stage {stage.name}: the set {asker} will ask it through vLLM, which would not take it: {'; '.join(found)}"
        )


def told(progress: Progress) -> Callable[[Row], None]:
    """What training tells, as progress: the plan, packs of the reference, then optimizer steps with what they show."""
    bar = progress if isinstance(progress, Bar) else Bar()

    def tell(event: Row) -> None:
        if event["event"] == "plan":
            bar.say(plan_text(event))
        elif event["event"] == "reference":
            progress(event["done"], event["total"])
            bar.note(f"reference of the rows to {event['rows']}")
        elif event["event"] == "resume":
            bar.say(f"continues after step {event['step']:,}")
        elif event["event"] == "step":
            progress(event["step"], event["total"])
            bar.note(step_text(event))

    return tell


def evaluate_stage(folder: RunFolder, shop: Workshop, stage: Evaluate, index: int, progress: Progress) -> Done:
    """Measures the stage's models on its sets' held-out rows and adds what it finds to evaluation.json."""
    path = folder.root / "evaluation.json"
    before = read_json(path) if path.is_file() else {"rows": [], "done": []}
    cached = index in before["done"]
    if not cached:
        rows = list(_measured(folder, shop, stage, progress))
        write_json(path, {"rows": before["rows"] + rows, "done": [*before["done"], index]})
    return Done(f"{len(stage.models)} models on {', '.join(stage.sets)} -> {path}", cached)


def _measured(folder: RunFolder, shop: Workshop, stage: Evaluate, progress: Progress) -> Iterator[Row]:
    kinds = {name: shop.recipe.sets()[name].kind for name in stage.sets}
    compared = {name: _compared(shop, stage, kinds[name]) for name in stage.sets}
    done, total = 0, sum(len(pairs) for pairs in compared.values())
    for set_name, pairs in compared.items():
        try:
            rows = read_split(folder.curated(set_name), "test")
        except HouseError as error:
            raise HouseError(f"nothing to evaluate on: {error}. Raise held_out, or give the set more rows") from error
        for name, start in pairs:
            progress(done, total)
            found = {"preference": _preference, "kto": _unpaired}.get(kinds[set_name], _loss)(shop, name, start, rows)
            yield from ({"model": name, "set": set_name, **row} for row in found)
            done += 1
    progress(total, total)


def _compared(shop: Workshop, stage: Evaluate, kind: str) -> list[tuple[str, str | None]]:
    """(model, reference) of each measurement on a set, a model once. Where answers are compared (preference and kto)
    the reference of a dpo or kto stage is its start, and that is measured against itself where it has none of its own.
    A preference set compares nothing without a reference: other models are left out, unless all are such."""
    trained = shop.recipe.trained()
    found: dict[str, str | None] = {}
    for name in stage.models:
        if kind == "sft" or name not in trained or trained[name].objective == "sft":
            found.setdefault(name, None)
            continue
        start = trained[name].start or trained[name].model
        found[start] = found.get(start) or start
        found[name] = start
    if kind == "preference" and any(found.values()):
        found = {name: start for name, start in found.items() if start is not None}
    return list(found.items())


def _capacity(shop: Workshop, name: str) -> int:
    """The largest pack of any stage on the same base model, so that all of them are measured on the same rows."""
    base = shop.base(name)
    users = [stage.settings.capacity for stage in shop.recipe.trained().values() if stage.model == base]
    return max(users, default=Training().capacity)


def _loss(shop: Workshop, name: str, start: str | None, rows: Any) -> list[Row]:
    tokenizer = load_tokenizer(shop.base_folder(name))
    found = evaluate_sft(shop.load(name), tokenizer, rows, _capacity(shop, name))
    return _with_excluded([_row("loss", found["loss"], found["rows"])], found)


def _preference(shop: Workshop, name: str, start: str | None, rows: Any) -> list[Row]:
    if start is None:
        return [_row("accuracy", None, 0, "no reference: neither dpo nor kto trained it")]
    tokenizer = load_tokenizer(shop.base_folder(name))
    policy, reference = _loaded(shop, name, start)
    found = evaluate_preference(policy, reference, tokenizer, rows, _beta(shop, name), _capacity(shop, name))
    return _with_excluded([_row(metric, found[metric], found["pairs"]) for metric in ("accuracy", "margin")], found)


def _unpaired(shop: Workshop, name: str, start: str | None, held_out: Any) -> list[Row]:
    tokenizer = load_tokenizer(shop.base_folder(name))
    policy, reference = _loaded(shop, name, start)
    found = evaluate_unpaired(policy, reference, tokenizer, held_out, _beta(shop, name), _capacity(shop, name))
    good, bad = found["desirable"], found["undesirable"]
    counts = {"logp_desirable": good, "logp_undesirable": bad}
    why = f"all answers are {'desirable' if good else 'undesirable'}" if good or bad else None
    rows = [_row(name, found[name], counts.get(name, good + bad), why) for name in UNPAIRED if name in found]
    return _with_excluded(rows, found)


def _loaded(shop: Workshop, name: str, start: str | None) -> tuple[Any, Any]:
    """Policy and reference; None without one."""
    policy = shop.load(name)
    return policy, policy if start == name else None if start is None else shop.load(start)


def _beta(shop: Workshop, name: str) -> float:
    """Of the loss that trained a dpo or kto stage; else dpo's."""
    stage = shop.recipe.trained().get(name)
    if stage is not None and stage.objective in ("dpo", "kto"):
        return find_loss(stage.settings.loss, stage.objective).beta
    return find_loss(None, "dpo").beta


def _row(metric: str, value: float | None, rows: int, why: str | None = None) -> Row:
    """A line of evaluation.json. `note` says why there is no number."""
    if value is None or math.isfinite(value):
        note = {"note": why} if value is None and why else {}
        return {"metric": metric, "value": value, "rows": rows, **note}
    return {"metric": metric, "value": None, "rows": rows, "note": "not finite"}


def _with_excluded(rows: list[Row], found: Row) -> list[Row]:
    """With how many held-out rows were not measured, by reason, where some were not."""
    return [row | {"excluded": found["excluded"]} for row in rows] if found["excluded"] else rows
