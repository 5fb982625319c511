"""What a recipe is made of, and what makes one wrong. `recipe.py` reads it from YAML; Python makes it directly.

Recipe(
    name="mine",
    sources=(Source("chats", "chats.jsonl", licence="MIT"),),
    models={"base": Model(path="models/base")},
    stages=(
        Curate("clean", kind="sft", sources=("chats",), steps=(Refusal(), ExactDuplicate(view="pair"))),
        Train("sft", set="clean", model="base", settings=Training(epochs=2)),
        Evaluate(models=("base", "sft"), sets=("clean",)),
    ),
)
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields, replace
from difflib import get_close_matches
from typing import Any, Literal, get_args

from ..curation.folder import HouseError
from ..curation.judges.decontaminate import Decontaminate
from ..curation.reading.source import Source
from ..curation.shards import Kind
from ..curation.steps import Step
from ..curation.text.benchmark_sets import EvaluationSet
from ..tuning.settings import NewModel, Training
from .doors.settings import Budget, Serve, Server, Vllm

Objective = Literal["sft", "dpo", "kto"]
Path = tuple[str | int, ...]
"""Where a value stands in a recipe: ("stages", 2, "steps", 0, "model")."""

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]*")
RESERVED = (
    "answers",
    "cache",
    "curated",
    "ledger",
    "measures",
    "models",
    "quarantine",
    "references",
    "rows",
)  # folders of OUT
TRAINS_ON: dict[str, tuple[str, ...]] = {"sft": ("sft",), "dpo": ("preference",), "kto": ("kto",)}


@dataclass(frozen=True)
class Model:
    """A model of the recipe: a folder in Hugging Face's format, one made on the spot, one distilled from another, or
    one that is only asked: behind a server, or on a cassette.

    path: the folder, or a name on the Hugging Face hub. new: what to make. corpus: the set whose rows a new model's
    tokenizer and weights are trained on: those still live when the model is first needed (held-out rows never are).
    distil: the model of the recipe (an encoder of the BERT family) that a static embedding model is distilled from
    when it is first needed.

    server: an OpenAI-compatible server. cassette: a JSONL file of recorded answers; beside a server or a path, what it
    lacks is asked there and recorded. vllm: a model with weights, or the stage that trains it, is asked through vLLM in
    process; serve: through a vLLM server that the run starts. licence: under which its answers may be used; price: of a
    million prompt tokens and of a million new ones; budget: what a run may spend on its server.
    """

    path: str | None = None
    new: NewModel | None = None
    corpus: str | None = None
    distil: str | None = None
    server: Server | None = None
    cassette: str | None = None
    vllm: Vllm | None = None
    serve: Serve | None = None
    licence: str | None = None
    price: tuple[float, float] | None = None
    budget: Budget | None = None

    @property
    def has_weights(self) -> bool:
        """Whether it can be loaded, trained and measured, and not only asked."""
        return any(part is not None for part in (self.path, self.new, self.distil))


@dataclass(frozen=True)
class Curate:
    """A stage that makes the curated set `set` from `sources` through `steps` (judges and makers, in order).

    kind: sft | preference | kto | text. held_out: the share of the rows kept for evaluation, chosen by a hash of the
    prompt before any judge looks. round: which round of a loop it belongs to (`rounds`), from 1.
    """

    set: str
    kind: Kind = "sft"
    sources: tuple[str, ...] = ()
    held_out: float = 0.02
    steps: tuple[Step, ...] = ()
    round: int | None = None


@dataclass(frozen=True)
class Train:
    """A stage that trains `model` on the curated set `set` (split train).

    name: the stage's name and folder, by default the objective. start: an earlier stage of the same model whose
    adapter (or weights) this one continues; for dpo and kto it is also the reference. round: as of a set.
    """

    objective: Objective
    set: str
    model: str
    name: str = ""
    start: str | None = None
    round: int | None = None
    settings: Training = field(default_factory=Training)

    def __post_init__(self) -> None:
        object.__setattr__(self, "name", self.name or self.objective)


@dataclass(frozen=True)
class Evaluate:
    """A stage that measures `models` (models of the recipe and training stages) on the held-out rows of `sets`.

    sft: loss per target token. preference: accuracy and margin of dpo and kto stages against their start. kto:
    log-probability per token of desirable and undesirable answers, and how well it, or the reward of a dpo or kto stage
    against its start, parts them (AUC).
    """

    models: tuple[str, ...]
    sets: tuple[str, ...]


Stage = Curate | Train | Evaluate


@dataclass(frozen=True)
class Recipe:
    """A whole run. licences: those that sources may have; None: any. decontaminate: evaluation sets; every set that a
    stage trains on, and that has no Decontaminate after its last maker, gets one there, before the judges; a step
    Decontaminate that names no set takes these. None: such a set is named in a warning; empty: it is meant so. Stages
    run in order."""

    name: str
    version: str = "1.0.0"
    seed: int = 0
    licences: tuple[str, ...] | None = None
    decontaminate: tuple[str | EvaluationSet, ...] | None = None
    sources: tuple[Source, ...] = ()
    models: Mapping[str, Model] = field(default_factory=dict)
    stages: tuple[Stage, ...] = ()

    def sets(self) -> dict[str, Curate]:
        return {stage.set: stage for stage in self.stages if isinstance(stage, Curate)}

    def trained(self) -> dict[str, Train]:
        return {stage.name: stage for stage in self.stages if isinstance(stage, Train)}

    def source(self, name: str) -> Source:
        return next(source for source in self.sources if source.name == name)


def steps_of(recipe: Recipe, stage: Curate) -> tuple[Step, ...]:
    """The steps of a set, with the gate that the recipe's `decontaminate` asks for."""
    if not recipe.decontaminate:
        return stage.steps
    steps = tuple(_with_sets(step, recipe.decontaminate) for step in stage.steps)
    if stage.set not in _open_to_evaluation_sets(recipe):
        return steps
    start = _made_by(stage)
    return (*steps[:start], Decontaminate(recipe.decontaminate), *steps[start:])


def _with_sets(step: Step, against: tuple[str | EvaluationSet, ...]) -> Step:
    """A Decontaminate that names no evaluation set, with those of the recipe; any other step as it is."""
    if isinstance(step, Decontaminate) and not step.against and not step.sets:
        return replace(step, against=against)
    return step


def cautions(recipe: Recipe) -> Iterator[str]:
    """What is no error, and yet to be said loudly before a run and after it."""
    if recipe.decontaminate is None:
        for name in _open_to_evaluation_sets(recipe):
            yield (
                f"set {name} trains a model, and no step Decontaminate looks at all its rows: what the model is"
                " measured on may be among them. Name your evaluation sets, in the recipe by"
                " `decontaminate: [gsm8k_test.parquet]` (`[]` if there are none) or in the set by a step"
                " `Decontaminate: {sets: {gsm8k: PATH}}`."
            )

    gated = (step for stage in recipe.sets().values() for step in steps_of(recipe, stage))
    if recipe.decontaminate and not any(isinstance(step, Decontaminate) for step in gated):
        yield (
            "the recipe names evaluation sets (`decontaminate`), and no set is compared with them: no stage trains, and"
            " no set has a step `Decontaminate`. Put one after its last maker."
        )

    for name, stage in recipe.sets().items():
        poor = [said for model in _authors(stage) if stage.kind == "sft" and (said := made_on_the_spot(recipe, model))]
        if poor:
            yield f"set {name}: {poor[0]}. It shows the machinery; for rows to use, ask a model with a `path`."


def _authors(stage: Curate) -> list[str]:
    """Models whose answers the makers of a set turn into rows."""
    return [model for step in stage.steps if step.scope == "maker" for model in answering(step)]


def made_on_the_spot(recipe: Recipe, name: str) -> str | None:
    """What is to be expected of a model or stage that stands on a new model; None of any other."""
    base = recipe.trained()[name].model if name in recipe.trained() else name
    new = recipe.models[base].new if base in recipe.models else None
    if new is None:
        return None
    return f"{name} stands on a model of {new.params} parameters made on the spot: it writes in form, with little sense"


def _open_to_evaluation_sets(recipe: Recipe) -> list[str]:
    """Sets that a stage trains on, and that have no Decontaminate after their last maker."""
    trained = {stage.set for stage in recipe.trained().values()}
    return [
        name
        for name, stage in recipe.sets().items()
        if name in trained and not any(isinstance(step, Decontaminate) for step in stage.steps[_made_by(stage) :])
    ]


def _made_by(stage: Curate) -> int:
    """The number of steps after which no row is made any more."""
    return max((place for place, step in enumerate(stage.steps, 1) if step.scope == "maker"), default=0)


def nearest(word: str, known: Iterator[str] | tuple[str, ...] | list[str]) -> str:
    """The end of an error message: the known word closest to `word`, or all of them."""
    names = sorted(known)
    close = get_close_matches(word, names, n=1, cutoff=0.5)
    if close:
        return f"did you mean {close[0]!r}?"
    return f"known: {', '.join(names)}" if names else "there are none"


def check(recipe: Recipe) -> None:
    """Raises HouseError for the first thing in `recipe` that refers to nothing or cannot work."""
    for _, message in problems(recipe):
        raise HouseError(f"recipe {recipe.name!r}: {message}")


def problems(recipe: Recipe) -> Iterator[tuple[Path, str]]:
    """Everything in `recipe` that refers to nothing or cannot work: where it stands, and what is wrong."""
    yield from _bad_names(recipe)
    yield from _bad_sources(recipe)
    yield from _bad_models(recipe)
    sets: dict[str, Curate] = {}
    trained: dict[str, Train] = {}
    for index, stage in enumerate(recipe.stages):
        at: Path = ("stages", index)
        if isinstance(stage, Curate):
            yield from _bad_curate(recipe, stage, at, sets, trained)
            sets[stage.set] = stage
        elif isinstance(stage, Train):
            yield from _bad_train(recipe, stage, at, sets, trained)
            trained[stage.name] = stage
        else:
            yield from _bad_evaluate(recipe, stage, at, sets, trained)


def _bad_names(recipe: Recipe) -> Iterator[tuple[Path, str]]:
    """Names become files and folders: they are plain, and none is used twice."""
    named: list[tuple[Path, str, str]] = [(("name",), "recipe", recipe.name)]
    named += [(("sources", source.name), "source", source.name) for source in recipe.sources]
    named += [(("models", name), "model", name) for name in recipe.models]
    for index, stage in enumerate(recipe.stages):
        if isinstance(stage, Curate):
            named.append((("stages", index, "set"), "set", stage.set))
        elif isinstance(stage, Train):
            named.append((("stages", index, "name"), "stage", stage.name))
    seen: set[tuple[str, str]] = set()
    for path, what, name in named:
        group = "model" if what == "stage" else what  # a judge or maker may name either
        if not NAME.fullmatch(name):
            yield path, f"{what} name {name!r}: letters, digits, - and _ only, beginning with a letter or digit"
        if what == "stage" and name in RESERVED:
            yield path, f"stage name {name!r} is a folder of every run; choose another name"
        if (group, name) in seen:
            yield path, f"{what} {name!r} is there twice; stages and models share one name space"
        seen.add((group, name))


def _bad_sources(recipe: Recipe) -> Iterator[tuple[Path, str]]:
    if recipe.licences is None:
        return
    for source in recipe.sources:
        if source.licence not in recipe.licences:
            yield (
                ("sources", source.name, "licence"),
                f"source {source.name!r} has the licence {source.licence!r}; this recipe allows "
                f"{', '.join(recipe.licences) or 'none'}. Leave the source out, or add its licence to `licences`",
            )


def _bad_models(recipe: Recipe) -> Iterator[tuple[Path, str]]:
    for name, model in recipe.models.items():
        at: Path = ("models", name)
        kinds = [f"`{kind}`" for kind in ("path", "new", "distil", "server") if getattr(model, kind) is not None]
        if len(kinds) > 1 or not (kinds or model.cassette):
            said = (
                f"both {' and '.join(kinds)}" if kinds else "none of `path`, `new`, `distil`, `server` and `cassette`"
            )
            yield at, f"model {name!r} has {said}: give one of them"
        elif model.new is not None and model.corpus is None:
            yield at, f"model {name!r} is new: name the set that it learns from, as `corpus`"
        elif model.new is None and model.corpus is not None:
            yield (*at, "corpus"), f"model {name!r} is not new and learns from no set: leave `corpus` out"
        elif model.distil is not None and getattr(recipe.models.get(model.distil), "path", None) is None:
            known = [other for other, found in recipe.models.items() if found.path is not None]
            yield (*at, "distil"), f"{name!r} is distilled from a model that has a path; {nearest(model.distil, known)}"
        if model.corpus is not None and model.corpus not in recipe.sets():
            yield (*at, "corpus"), f"unknown set {model.corpus!r}; {nearest(model.corpus, list(recipe.sets()))}"
        yield from _bad_asking(name, model, at)


def _bad_asking(name: str, model: Model, at: Path) -> Iterator[tuple[Path, str]]:
    """What a model says of how it is asked must fit what it is."""
    if model.vllm is not None and model.path is None and model.new is None:
        yield (*at, "vllm"), f"model {name!r} has no `path`: vLLM in process serves a model on this machine"
    if model.serve is not None and model.path is None and model.new is None:
        yield (*at, "serve"), f"model {name!r} has no `path`: a server is started for a model on this machine"
    if model.serve is not None and model.vllm is not None:
        yield (*at, "serve"), f"model {name!r} has both `vllm` and `serve`: give one of them"
    if model.budget is not None and model.server is None and model.serve is None:
        yield (*at, "budget"), f"model {name!r} has no server: a budget is of what a server is asked"
    if model.budget is not None and model.budget.money is not None and not any(model.price or ()):
        yield (
            (*at, "budget"),
            f"model {name!r} has a budget of money and no `price`: give [PROMPT, ANSWER] a million tokens",
        )
    if model.price is not None and min(model.price) < 0:
        yield (*at, "price"), f"the price of model {name!r} is at least 0, not {list(model.price)}"


def _bad_curate(
    recipe: Recipe, stage: Curate, at: Path, sets: Mapping[str, Curate], trained: Mapping[str, Train]
) -> Iterator[tuple[Path, str]]:
    sources = [source.name for source in recipe.sources]
    for index, name in enumerate(stage.sources):
        if name not in sources:
            yield (*at, "sources", index), f"unknown source {name!r}; {nearest(name, sources)}"
    if not 0 <= stage.held_out < 1:
        yield (*at, "held_out"), f"held_out is a share of the rows, at least 0 and below 1, not {stage.held_out}"
    if not stage.sources and not any(getattr(step, "scope", None) == "maker" for step in stage.steps):
        yield (*at, "sources"), f"set {stage.set!r} has no sources and no maker: nothing can come in"
    for index, step in enumerate(stage.steps):
        here: Path = (*at, "steps", index)
        for model in models_of(step):
            later = model in recipe.trained() and model not in trained
            if later:
                yield here, f"{type(step).__name__} needs stage {model!r}, which comes after this set"
            elif model not in recipe.models and model not in trained:
                yield here, f"unknown model {model!r}; {nearest(model, [*recipe.models, *trained])}"
        wanted = getattr(step, "set_name", None)
        if wanted is not None and wanted not in sets:
            yield here, f"{type(step).__name__} needs the set {wanted!r} before this one; {nearest(wanted, list(sets))}"


def _bad_train(
    recipe: Recipe, stage: Train, at: Path, sets: Mapping[str, Curate], trained: Mapping[str, Train]
) -> Iterator[tuple[Path, str]]:
    if stage.objective not in get_args(Objective):
        yield at, f"unknown objective {stage.objective!r}; {nearest(stage.objective, get_args(Objective))}"
    if stage.set not in sets:
        yield (*at, "set"), f"unknown set {stage.set!r}; {nearest(stage.set, list(sets))}"
    elif sets[stage.set].kind not in TRAINS_ON.get(stage.objective, ()):
        kinds = " or ".join(TRAINS_ON.get(stage.objective, ()))
        yield (*at, "set"), f"{stage.objective} trains on {kinds} rows; set {stage.set!r} holds {sets[stage.set].kind}"
    if stage.settings.loss is not None:
        yield from _bad_loss(stage, at)
    if stage.settings.evaluate_every and stage.set in sets and not sets[stage.set].held_out:
        yield (*at, "evaluate_every"), f"set {stage.set!r} holds no rows out (held_out: 0): nothing to evaluate on"
    if stage.model not in recipe.models:
        yield (*at, "model"), f"unknown model {stage.model!r}; {nearest(stage.model, list(recipe.models))}"
    elif not recipe.models[stage.model].has_weights:
        yield (*at, "model"), f"model {stage.model!r} can only be asked: what is trained needs a `path`, or is `new`"
    yield from _bad_licences(recipe, stage, sets)
    if stage.start is None:
        return
    if stage.start not in trained:
        yield (*at, "start"), f"no earlier stage {stage.start!r}; {nearest(stage.start, list(trained))}"
    elif trained[stage.start].model != stage.model:
        yield (*at, "start"), f"stage {stage.start!r} trains {trained[stage.start].model!r}, not {stage.model!r}"
    else:
        yield from _bad_continued(stage, trained[stage.start], at)


def _bad_continued(stage: Train, start: Train, at: Path) -> Iterator[tuple[Path, str]]:
    """An adapter goes on as it is; told before any set is made."""
    own, theirs = stage.settings.lora, start.settings.lora
    if own is None or theirs is None:
        return
    for key in ("rank", "alpha", "rslora"):
        if getattr(own, key) != getattr(theirs, key):
            said = f"continues {start.name!r}, whose lora.{key} is {getattr(theirs, key)}, not {getattr(own, key)}"
            yield (*at, "lora"), f"stage {stage.name!r} {said}: write the same"


def _bad_licences(recipe: Recipe, stage: Train, sets: Mapping[str, Curate]) -> Iterator[tuple[Path, str]]:
    """Models whose licence the recipe does not allow, and whose answers the stage trains on."""
    if recipe.licences is None:
        return
    for name in makers_models(recipe, stage.set, sets):
        model = recipe.models.get(recipe.trained()[name].model if name in recipe.trained() else name)
        if model is None or (model.licence is None and model.has_weights) or model.licence in recipe.licences:
            continue
        said = "no `licence`" if model.licence is None else f"the licence {model.licence!r}"
        yield (
            ("models", name, "licence"),
            f"stage {stage.name!r} trains on what model {name!r} made, which has {said}; this recipe allows "
            f"{', '.join(recipe.licences) or 'none'}. Say its licence, add it to `licences`, or ask another model",
        )


def makers_models(recipe: Recipe, set_name: str, sets: Mapping[str, Curate]) -> list[str]:
    """Models whose answers may be in a set: of its makers, and of the sets that those take rows from."""
    found: dict[str, None] = {}
    waiting, seen = [set_name], set()
    while waiting:
        name = waiting.pop()
        if name in seen or name not in sets:
            continue
        seen.add(name)
        for step in sets[name].steps:
            if getattr(step, "scope", None) == "maker":
                found |= dict.fromkeys(answering(step))
                waiting += [getattr(step, "set_name", None) or ""]
    return list(found)


def _bad_loss(stage: Train, at: Path) -> Iterator[tuple[Path, str]]:
    """A loss that is not the default is looked up before the run's first step (which loads torch)."""
    from ..tuning.objectives import find_loss

    try:
        find_loss(stage.settings.loss, stage.objective)
    except HouseError as error:
        yield (*at, "loss"), str(error)


def _bad_evaluate(
    recipe: Recipe, stage: Evaluate, at: Path, sets: Mapping[str, Curate], trained: Mapping[str, Train]
) -> Iterator[tuple[Path, str]]:
    known = [*recipe.models, *trained]
    for index, name in enumerate(stage.models):
        if name not in known:
            yield (*at, "models", index), f"unknown model or earlier stage {name!r}; {nearest(name, known)}"
        elif name in recipe.models and not recipe.models[name].has_weights:
            yield (*at, "models", index), f"model {name!r} can only be asked: it has no weights to evaluate"
    for index, name in enumerate(stage.sets):
        if name not in sets:
            yield (*at, "sets", index), f"unknown set {name!r}; {nearest(name, list(sets))}"
        elif sets[name].kind == "text":
            yield (*at, "sets", index), f"set {name!r} holds text: sft, preference and kto can be evaluated"
        elif sets[name].held_out == 0:
            yield (*at, "sets", index), f"set {name!r} holds no rows out (held_out: 0): nothing to evaluate on"


def models_of(step: Any) -> list[str]:
    """Names of the models that a step needs: its measures' own, a maker's, those that it asks besides (`asked`: such as
    a judge) and those of its verifiers."""
    if step.scope != "maker":
        return list(dict.fromkeys(name for measure in getattr(step, "needs", ()) for name in measure.models))
    parts = [getattr(step, item.name) for item in fields(step)]
    verifiers = [part.model for part in parts if hasattr(part, "verify") and part.model is not None]
    return list(dict.fromkeys([*answering(step), *getattr(step, "asked", ()), *verifiers]))


def answering(maker: Any) -> list[str]:
    """Names of the models whose answers a maker turns into rows: `model`, and `models` where it has several."""
    return [name for name in (maker.model, *getattr(maker, "models", ())) if name is not None]
