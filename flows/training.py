"""The training and evaluation stages of a run."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from ..curation.door import Progress
from ..curation.folder import HouseError, RunFolder, read_json, write_json
from ..curation.shards import read_split
from ..tuning.evaluate import evaluate_preference, evaluate_sft
from ..tuning.models import load_tokenizer
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
    from transformers import AutoConfig

    found = check_servable(AutoConfig.from_pretrained(base), stage.settings.lora)
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
    total = len(stage.sets) * len(stage.models)
    for at, set_name in enumerate(stage.sets):
        try:
            rows = read_split(folder.curated(set_name), "test")
        except HouseError as error:
            raise HouseError(f"nothing to evaluate on: {error}. Raise held_out, or give the set more rows") from error
        preference = shop.recipe.sets()[set_name].kind == "preference"
        pairs = _pairs(shop, stage) if preference else [(name, None) for name in stage.models]
        for done, (name, start) in enumerate(pairs):
            progress(at * len(stage.models) + done, total)
            found = _preference(shop, name, start, rows) if start else _loss(shop, name, rows)
            yield from ({"model": name, "set": set_name, **row} for row in found)
    progress(total, total)


def _pairs(shop: Workshop, stage: Evaluate) -> list[tuple[str, str]]:
    """(policy, reference) for a preference set: each dpo or kto stage against its start, and that against itself."""
    pairs: list[tuple[str, str]] = []
    trained = shop.recipe.trained()
    for name in stage.models:
        if name in trained and trained[name].objective in ("dpo", "kto"):
            start = trained[name].start or trained[name].model
            pairs += [pair for pair in ((start, start), (name, start)) if pair not in pairs]
    return pairs


def _capacity(shop: Workshop, name: str) -> int:
    """The largest pack of any stage on the same base model, so that all of them are measured on the same rows."""
    base = shop.base(name)
    users = [stage.settings.capacity for stage in shop.recipe.trained().values() if stage.model == base]
    return max(users, default=Training().capacity)


def _loss(shop: Workshop, name: str, rows: Any) -> list[Row]:
    tokenizer = load_tokenizer(shop.base_folder(name))
    found = evaluate_sft(shop.load(name), tokenizer, rows, _capacity(shop, name))
    return [{"metric": "loss", "value": found["loss"], "rows": found["rows"]}]


def _preference(shop: Workshop, name: str, start: str, rows: Any) -> list[Row]:
    tokenizer = load_tokenizer(shop.base_folder(name))
    policy = shop.load(name)
    reference = policy if start == name else shop.load(start)
    stage = shop.recipe.trained().get(name)
    beta = find_loss(None, "dpo").beta
    if stage is not None and stage.objective in ("dpo", "kto"):
        beta = find_loss(stage.settings.loss, stage.objective).beta
    found = evaluate_preference(policy, reference, tokenizer, rows, beta, _capacity(shop, name))
    return [{"metric": m, "value": found[m], "rows": found["pairs"]} for m in ("accuracy", "margin")]
