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
from dataclasses import dataclass, field
from difflib import get_close_matches
from typing import Any, Literal, get_args

from ..curation.folder import HouseError
from ..curation.judges.decontaminate import Decontaminate
from ..curation.reading.source import Source
from ..curation.shards import Kind
from ..curation.steps import Step
from ..curation.text.benchmark_sets import EvaluationSet
from ..tuning.settings import NewModel, Training

Objective = Literal["sft", "dpo", "kto"]
Path = tuple[str | int, ...]
"""Where a value stands in a recipe: ("stages", 2, "steps", 0, "model")."""

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]*")
RESERVED = ("cache", "curated", "ledger", "measures", "models", "quarantine", "references", "rows")  # folders of OUT
TRAINS_ON: dict[str, tuple[str, ...]] = {"sft": ("sft",), "dpo": ("preference",), "kto": ("kto",)}


@dataclass(frozen=True)
class Model:
    """A model of the recipe: a folder in Hugging Face's format, one made on the spot, or one distilled from another.

    path: the folder, or a name on the Hugging Face hub. new: what to make. corpus: the set whose rows a new model's
    tokenizer and weights are trained on: those still live when the model is first needed (held-out rows never are).
    distil: the model of the recipe (an encoder of the BERT family) that a static embedding model is distilled from
    when it is first needed.
    """

    path: str | None = None
    new: NewModel | None = None
    corpus: str | None = None
    distil: str | None = None


@dataclass(frozen=True)
class Curate:
    """A stage that makes the curated set `set` from `sources` through `steps` (judges and makers, in order).

    kind: sft | preference | kto | text. held_out: the share of the rows kept for evaluation, chosen by a hash of the
    prompt before any judge looks.
    """

    set: str
    kind: Kind = "sft"
    sources: tuple[str, ...] = ()
    held_out: float = 0.02
    steps: tuple[Step, ...] = ()


@dataclass(frozen=True)
class Train:
    """A stage that trains `model` on the curated set `set` (split train).

    name: the stage's name and folder, by default the objective. start: an earlier stage of the same model whose
    adapter (or weights) this one continues; for dpo and kto it is also the reference.
    """

    objective: Objective
    set: str
    model: str
    name: str = ""
    start: str | None = None
    settings: Training = field(default_factory=Training)

    def __post_init__(self) -> None:
        object.__setattr__(self, "name", self.name or self.objective)


@dataclass(frozen=True)
class Evaluate:
    """A stage that measures `models` (models of the recipe and training stages) on the held-out rows of `sets`."""

    models: tuple[str, ...]
    sets: tuple[str, ...]


Stage = Curate | Train | Evaluate


@dataclass(frozen=True)
class Recipe:
    """A whole run. licences: those that sources may have; None: any. decontaminate: evaluation sets; every set that a
    stage trains on, and that has no Decontaminate after its last maker, gets one there, before the judges. None: such a
    set is named in a warning; empty: it is meant so. Stages run in order."""

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
    if not recipe.decontaminate or stage.set not in _open_to_evaluation_sets(recipe):
        return stage.steps
    start = _made_by(stage)
    return (*stage.steps[:start], Decontaminate(recipe.decontaminate), *stage.steps[start:])


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
        kinds = [f"`{kind}`" for kind in ("path", "new", "distil") if getattr(model, kind) is not None]
        if len(kinds) != 1:
            said = f"both {' and '.join(kinds)}" if kinds else "none of `path`, `new` and `distil`"
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
    if stage.start is None:
        return
    if stage.start not in trained:
        yield (*at, "start"), f"no earlier stage {stage.start!r}; {nearest(stage.start, list(trained))}"
    elif trained[stage.start].model != stage.model:
        yield (*at, "start"), f"stage {stage.start!r} trains {trained[stage.start].model!r}, not {stage.model!r}"


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
    for index, name in enumerate(stage.sets):
        if name not in sets:
            yield (*at, "sets", index), f"unknown set {name!r}; {nearest(name, list(sets))}"
        elif sets[name].kind not in ("sft", "preference"):
            yield (*at, "sets", index), f"set {name!r} holds {sets[name].kind}: sft and preference can be evaluated"
        elif sets[name].held_out == 0:
            yield (*at, "sets", index), f"set {name!r} holds no rows out (held_out: 0): nothing to evaluate on"


def models_of(step: Any) -> list[str]:
    """Names of the models that a step needs: its measures' own, and a maker's."""
    if step.scope == "maker":
        return [] if step.model is None else [step.model]
    return list(dict.fromkeys(name for measure in getattr(step, "needs", ()) for name in measure.models))
