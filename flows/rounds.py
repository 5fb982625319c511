"""`rounds`: stages that a recipe says once and a run does several times over, each time with the model of the time
before: generate with the newest adapter, verify, judge, curate, tune, and again.

    - rounds:
        count: 3
        stages:
          - curate: {set: made, sources: [documents], steps: [DocumentTasks: {model: previous, seed: "${round}"}, …]}
          - sft: {set: made, model: small, start: previous}

When the recipe is loaded this becomes ordinary stages, sets made-1, made-2, made-3 and stages sft-1, sft-2, sft-3, each
with its number as `round`. Inside the block

    made, sft     are this round's set and stage
    previous      is the model as the round before left it: the newest stage, before this round, of the model that the
                  block trains; in the first round that may be a stage before the block, else the model itself
    ${round}      is this round's number

After the block a bare name stands in a list, such as those of `evaluate`, for those of all rounds, and elsewhere for
the last round's; as `corpus` of a new model for the first round's. made-2 is always the second round's.
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any, Literal, cast, get_origin, get_type_hints

import yaml

from ..curation.folder import HouseError
from .nodes import get, mapping, pairs, place, put, scalar, shown
from .stages import TRAINS_ON, Evaluate, Recipe, Stage, Train, models_of, nearest

PREVIOUS = "previous"
KEYS = ("count", "stages")
NUMBER = re.compile(r"(?<!\$)\$\{round\}")


@dataclass(frozen=True)
class Block:
    """A block of rounds in the list of stages that it became. first: the place there of its first stage; size: stages
    of one round; sets, trained: the names that it gives, without the round's number."""

    first: int
    size: int
    count: int
    sets: tuple[str, ...]
    trained: tuple[str, ...]

    def round_of(self, place: int) -> int:
        """The round of the stage at `place`, from 1; 0 before the block, count + 1 after it."""
        return min(max((place - self.first) // self.size + 1, 0), self.count + 1)


def blocks_of(root: yaml.Node | None) -> list[tuple[int, yaml.Node]]:
    """The blocks of rounds of a recipe that is not expanded yet: their places among its stages, and their bodies."""
    listed = get(root, "stages")
    nodes = listed.value if isinstance(listed, yaml.SequenceNode) else []
    return [(i, pairs(node)[0][1]) for i, node in enumerate(nodes) if _kind(node) == "rounds"]


# ---- before the recipe is built: nodes


def expand(root: yaml.Node) -> tuple[yaml.Node, tuple[Block, ...]]:
    """The recipe's nodes with each block's stages written out once a round, and what the blocks were."""
    if not blocks_of(root):
        return root, ()
    listed = cast(yaml.SequenceNode, get(root, "stages"))
    stages: list[yaml.Node] = []
    blocks: list[Block] = []
    for node in listed.value:
        if _kind(node) != "rounds":
            stages.append(node)
            continue
        count, inside = _body(pairs(node)[0][1], node)
        named = [one for stage in inside for one in _named(stage)]
        sets, trained = (tuple(str(said.value) for what, said in named if what == kind) for kind in ("set", "stage"))
        if not trained:
            raise HouseError(
                f"{place(node)}: rounds without a stage that trains ({', '.join(TRAINS_ON)}) repeat nothing"
            )
        blocks.append(Block(len(stages), len(inside), count, sets, trained))
        stages += [_of_round(stage, number) for number in range(1, count + 1) for stage in inside]
    _refuse_shadows(root, listed.value)
    whole = yaml.SequenceNode(listed.tag, stages, listed.start_mark, listed.end_mark)
    return put(root, ("stages",), whole), tuple(blocks)


def _kind(node: yaml.Node) -> str:
    return str(pairs(node)[0][0].value) if pairs(node) else ""


def _named(stage: yaml.Node) -> Iterator[tuple[str, yaml.Node]]:
    """What a stage gives a name to, set or stage, with the node that says the name."""
    for key, body in pairs(stage)[:1]:
        if key.value == "curate" and (said := get(body, "set")) is not None:
            yield "set", said
        elif key.value in TRAINS_ON:
            yield "stage", get(body, "name") or key


def _body(body: yaml.Node, block: yaml.Node) -> tuple[int, list[yaml.Node]]:
    """How many rounds, and the stages of one."""
    for key, _ in pairs(body):
        if key.value not in KEYS:
            raise HouseError(f"{place(key)}: unknown key {key.value!r} in rounds; {nearest(str(key.value), KEYS)}")
    count, listed = get(body, "count"), get(body, "stages")
    if count is None:
        raise HouseError(f"{place(block)}: rounds needs the key 'count'")
    if scalar(count, int) < 1:
        raise HouseError(f"{place(count)}: the count of rounds is at least 1, not {shown(count)}")
    if not isinstance(listed, yaml.SequenceNode) or not listed.value:
        raise HouseError(f"{place(block)}: rounds needs the key 'stages', a list of what each round does")
    for stage in listed.value:
        if _kind(stage) == "rounds":
            raise HouseError(f"{place(stage)}: rounds inside of rounds: write one block with all their stages")
    return scalar(count, int), listed.value


def _of_round(stage: yaml.Node, number: int) -> yaml.Node:
    """The stage as it is in one round: the name that it gives and `round` with its number, ${round} filled in."""
    filled = _filled(stage, str(number))
    for what, said in _named(stage):
        kind, body = pairs(filled)[0]
        key = "set" if what == "set" else "name"
        body = put(body, (key,), _scalar(f"{said.value}-{number}", said))
        filled = mapping([(kind, put(body, ("round",), _scalar(str(number), said)))], filled)
    return filled


def _filled(node: yaml.Node, number: str) -> yaml.Node:
    if isinstance(node, yaml.ScalarNode):
        value = NUMBER.sub(number, node.value)
        if value == number:
            return _scalar(value, node) if node.value != number else node
        return yaml.ScalarNode(node.tag, value, node.start_mark, node.end_mark, node.style)
    if isinstance(node, yaml.SequenceNode):
        items = [_filled(item, number) for item in node.value]
        return yaml.SequenceNode(node.tag, items, node.start_mark, node.end_mark)
    return mapping([(key, _filled(item, number)) for key, item in pairs(node)], node)


def _scalar(value: str, like: yaml.Node) -> yaml.ScalarNode:
    """A bare scalar, so that a number is one."""
    tag = "tag:yaml.org,2002:int" if value.isdigit() else "tag:yaml.org,2002:str"
    return yaml.ScalarNode(tag, value, like.start_mark, like.end_mark)


def _refuse_shadows(root: yaml.Node, listed: list[yaml.Node]) -> None:
    """A name that a block gives may stand nowhere else, and none is `previous`: the bare name would be two things."""
    seen = {("stage", str(key.value)): False for key, _ in pairs(get(root, "models"))}  # whether a block gives it
    for node in listed:
        looped = _kind(node) == "rounds"
        for stage in _body(pairs(node)[0][1], node)[1] if looped else [node]:
            for what, said in _named(stage):
                name = str(said.value)
                if name == PREVIOUS:
                    raise HouseError(f"{place(said)}: {PREVIOUS!r} is the model before a round: choose another name")
                if (what, name) in seen and (looped or seen[what, name]):
                    raise HouseError(
                        f"{place(said)}: the {what} {name!r} of the rounds is named elsewhere too: rename it"
                    )
                seen[what, name] = looped


# ---- after it is built: names


@dataclass(frozen=True)
class _Names:
    """What names mean at one stage. models, sets: the names that stand for others."""

    models: Mapping[str, tuple[str, ...]]
    sets: Mapping[str, tuple[str, ...]]


def settle(recipe: Recipe, blocks: tuple[Block, ...]) -> Recipe:
    """The recipe with every name that is meant for one round, or for all, put in its place."""
    if not blocks:
        return recipe
    stages = tuple(_settled(stage, _names(recipe, blocks, index)) for index, stage in enumerate(recipe.stages))
    first = {name: f"{name}-1" for block in blocks for name in block.sets}
    models = {
        name: replace(model, corpus=first.get(model.corpus or "", model.corpus))
        for name, model in recipe.models.items()
    }
    return replace(recipe, stages=stages, models=models)


def _names(recipe: Recipe, blocks: tuple[Block, ...], index: int) -> _Names:
    models: dict[str, tuple[str, ...]] = {}
    sets: dict[str, tuple[str, ...]] = {}
    for block in blocks:
        number = block.round_of(index)
        if number == 0:
            continue
        rounds = range(1, block.count + 1) if number > block.count else (number,)
        models |= {name: tuple(f"{name}-{one}" for one in rounds) for name in block.trained}
        sets |= {name: tuple(f"{name}-{one}" for one in rounds) for name in block.sets}
        if number <= block.count:
            models[PREVIOUS] = (_previous(recipe, block, number, recipe.stages[index]),)
    return _Names(models, sets)


def _previous(recipe: Recipe, block: Block, number: int, stage: Stage) -> str:
    """The newest stage, before this round, of the model that `stage` trains (else of the one that the block trains
    last), or that model itself where there is none."""
    here = block.first + (number - 1) * block.size
    trains = [one for one in recipe.stages[here : here + block.size] if isinstance(one, Train)]
    model = stage.model if isinstance(stage, Train) else trains[-1].model
    before = [one.name for one in recipe.stages[:here] if isinstance(one, Train) and one.model == model]
    return before[-1] if before else model


def _settled(stage: Stage, names: _Names) -> Stage:
    if isinstance(stage, Train):
        start = _one(stage.start, names.models)
        return replace(stage, set=_one(stage.set, names.sets), start=None if start == stage.model else start)
    if isinstance(stage, Evaluate):
        return replace(stage, models=_all(stage.models, names.models), sets=_all(stage.sets, names.sets))
    return replace(stage, steps=tuple(_in_step(step, set(models_of(step)), names) for step in stage.steps))


def _one(name: Any, names: Mapping[str, tuple[str, ...]]) -> Any:
    return names[name][-1] if name in names else name


def _all(said: tuple[str, ...], names: Mapping[str, tuple[str, ...]]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(found for name in said for found in names.get(name, (name,))))


def _in_step(part: Any, asked: set[str], names: _Names) -> Any:
    """A step, or a measure or verifier in it, with the names of sets and models that its fields hold put in place.
    asked: the models that the step needs."""
    hints = get_type_hints(type(part))
    changed: dict[str, Any] = {}
    for one in fields(part):
        value = getattr(part, one.name)
        if is_dataclass(value):
            changed[one.name] = _in_step(value, asked, names)
        elif one.name == "set_name":
            changed[one.name] = _one(value, names.sets)
        elif get_origin(hints[one.name]) is Literal:  # a choice, whatever stages are called
            continue
        elif isinstance(value, str) and value in asked:
            changed[one.name] = _one(value, names.models)
        elif isinstance(value, tuple) and asked.intersection(item for item in value if isinstance(item, str)):
            changed[one.name] = _all(value, names.models)
    changed = {name: value for name, value in changed.items() if value != getattr(part, name)}
    return replace(part, **changed) if changed else part
