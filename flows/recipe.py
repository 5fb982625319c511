"""YAML -> recipe, strictly: an unknown key, class, type or reference is an error with file, line and nearest name.

One mechanism builds every frozen dataclass (sources, steps, settings, stages) from its type hints. Scalars are read as
their hint says (`version: 1.0` stays "1.0", `1e-3` is a number). `${VAR}` and `${VAR:-default}` are expanded, `$${` is
a literal `${`. Relative paths are relative to the current directory.

Overrides, `key=value` with a YAML value, address
    seed  version  name  licences  decontaminate     the recipe's own keys
    sources.NAME.KEY  models.NAME.KEY                 models.base={path: DIR} replaces a whole entry
    sets.SET.KEY                                      held_out, kind, sources of a curated set
    sets.SET.CLASS.KEY  sets.SET.CLASS.2.KEY          a field of its step CLASS (of the second one, where there are two)
    stages.NAME.KEY                                   sft, dpo, kto, evaluate, or the stage's own name
    rounds.count  rounds.2.count                      how many rounds (of the second block, where there are two)
Of what stands in `rounds`, sets.NAME and stages.NAME address all rounds, sets.NAME-2 and stages.NAME-2 the second.
"""

import types
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, fields, is_dataclass
from pathlib import Path as File
from typing import Any, Literal, TypeVar, Union, cast, get_args, get_origin, get_type_hints

import yaml

from ..curation.folder import HouseError
from ..curation.reading.source import Source
from ..curation.rows import digest as digest_of
from ..curation.steps import CorpusJudge, Maker, Measure, RowJudge, find_steps
from ..curation.verifying import Verifier
from ..tuning.settings import NewModel, Training
from .nodes import Mismatch, Pair, choice, compose, get, is_null, mapping, pairs, place, put, scalar, shown, wanted
from .rounds import blocks_of, expand, settle
from .stages import TRAINS_ON, Curate, Evaluate, Model, Path, Recipe, Stage, Train, check, nearest, problems

__all__ = ["Curate", "Evaluate", "Model", "Recipe", "Source", "Stage", "Train", "check", "digest", "dump",
           "load_recipe", "load_text", "plain", "shipped"]  # fmt: skip

T = TypeVar("T")
RECIPES = File(__file__).with_name("recipes")
STAGES = ("curate", "sft", "dpo", "kto", "evaluate")


def shipped() -> dict[str, File]:
    """Recipes that ship, by name."""
    return {path.stem: path for path in sorted(RECIPES.glob("*.yaml"))}


def load_recipe(name_or_path: str | File, overrides: Sequence[str] = ()) -> Recipe:
    """The recipe of a YAML file, or the one that ships under that name, with `key=value` overrides applied.

    Raises HouseError, with file and line, for anything that is not understood."""
    path = File(name_or_path)
    if not path.is_file():
        known = shipped()
        if path.suffix in (".yaml", ".yml") or len(path.parts) > 1:
            raise HouseError(f"there is no recipe file {path}; recipes that ship: {', '.join(known)}")
        if str(name_or_path) not in known:
            raise HouseError(f"no recipe is called {str(name_or_path)!r}; {nearest(str(name_or_path), list(known))}")
        path = known[str(name_or_path)]
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise HouseError(f"cannot read the recipe {path}: {error}") from error
    return load_text(text, str(path), overrides)


def load_text(text: str, name: str = "recipe", overrides: Sequence[str] = ()) -> Recipe:
    """The recipe that the YAML `text` holds; `name` stands for it in messages."""
    root = compose(text, name)
    if not isinstance(root, yaml.MappingNode):
        raise HouseError(f"{name}: a recipe is a mapping that begins with `name:`")
    for override in overrides:
        if _is_of_rounds(override):
            root = _override(root, override)
    root, blocks = expand(root)
    for override in overrides:
        if not _is_of_rounds(override):
            root = _override(root, override)
    builder = _Builder(root)
    recipe = settle(builder.recipe(), blocks)
    for path, message in problems(recipe):
        raise HouseError(f"{builder.where(path)}: {message}")
    return recipe


def build_settings(kind: type[T], overrides: Sequence[str]) -> T:
    """Training or NewModel from `key=value` alone."""
    root = cast(yaml.Node, compose("{}", "overrides"))
    for override in overrides:
        key, node = _key_value(override)
        root = put(root, _in_settings(key.split(".")), node)
    return cast(T, _Builder(root).dataclass(root, kind, ()))


# ---- overrides


def _in_settings(parts: list[str]) -> Path:
    """The path of a stage's setting: a loss of the user's own has dots in its name, loss.my_package.my_loss.beta."""
    if parts[0] == "loss" and len(parts) > 3:
        return ("loss", ".".join(parts[1:-1]), parts[-1])
    return tuple(parts)


def _override(root: yaml.Node, text: str) -> yaml.Node:
    key, node = _key_value(text)
    for path in _resolve(root, key.split("."), text):
        root = put(root, path, node)
    return root


def _is_of_rounds(text: str) -> bool:
    return text.strip().startswith("rounds.")


def _key_value(text: str) -> tuple[str, yaml.Node]:
    key, equals, value = text.partition("=")
    if not equals or not key.strip():
        raise HouseError(f"{text!r} is not an override: write key=value, such as seed=7 or stages.sft.max_steps=10")
    node = compose(value or "null", f"override {text}")
    assert node is not None
    return key.strip(), node


def _resolve(root: yaml.Node, parts: list[str], text: str) -> list[Path]:
    """The paths of nodes that a dotted key addresses: one, or one in each round."""
    head, *rest = parts
    if head == "sets" and len(rest) > 1:
        found = _stage(root, rest[0], text, sets=True)
        return [("stages", i, key, *_in_set(_stages(root)[i][1], rest[1:], text)) for i, key in found]
    if head == "stages" and len(rest) > 1:
        return [("stages", i, key, *_in_settings(rest[1:])) for i, key in _stage(root, rest[0], text, sets=False)]
    if head == "rounds":
        return [_of_rounds(root, rest, text)]
    if head in ("sources", "models") and rest:
        known = [str(name.value) for name, _ in pairs(get(root, head))]
        if rest[0] not in known and len(rest) > 1:
            raise HouseError(f"override {text}: no {head[:-1]} {rest[0]!r}; {nearest(rest[0], known)}")
        return [tuple(parts)]
    known = [item.name for item in fields(Recipe)]
    if rest or head not in known:
        forms = [*known, "sets.SET.KEY", "stages.NAME.KEY", "rounds.count"]
        raise HouseError(f"override {text}: unknown key {'.'.join(parts)!r}; {nearest(head, [*forms, 'sets'])}")
    return [(head,)]


def _of_rounds(root: yaml.Node, rest: list[str], text: str) -> Path:
    blocks = [index for index, _ in blocks_of(root)]
    which = int(rest.pop(0)) if rest and rest[0].isdigit() else None
    if not blocks:
        raise HouseError(f"override {text}: this recipe has no `rounds` (in a run's recipe.yaml they are written out)")
    if which is None and len(blocks) > 1:
        raise HouseError(f"override {text}: there are {len(blocks)} blocks of rounds: say rounds.1.count for the first")
    if which is not None and not 1 <= which <= len(blocks):
        raise HouseError(f"override {text}: there is no block {which} of rounds, they are 1 to {len(blocks)}")
    if rest != ["count"]:
        raise HouseError(f"override {text}: of rounds `count` can be set; stages in them by sets.SET and stages.NAME")
    return ("stages", blocks[(which or 1) - 1], "rounds", "count")


def _stages(root: yaml.Node) -> list[tuple[str, yaml.Node | None]]:
    """(kind, body) of each stage."""
    listed = get(root, "stages")
    nodes = listed.value if isinstance(listed, yaml.SequenceNode) else []
    return [(str(pairs(node)[0][0].value), pairs(node)[0][1]) if pairs(node) else ("", None) for node in nodes]


def _stage(root: yaml.Node, name: str, text: str, *, sets: bool) -> list[tuple[int, str]]:
    """Places and kinds of the stages of that name; a name without its round's number is that of all rounds."""
    known: dict[str, list[tuple[int, str]]] = {}
    of_rounds: dict[str, list[tuple[int, str]]] = {}
    for index, (kind, body) in enumerate(_stages(root)):
        if (kind == "curate") == sets:
            own, number = get(body, "set" if sets else "name"), get(body, "round")
            said = kind if own is None else str(own.value)
            known[said] = [(index, kind)]
            if number is not None and not is_null(number):
                of_rounds.setdefault(said.removesuffix(f"-{number.value}"), []).append((index, kind))
    found = of_rounds | known
    if name not in found:
        raise HouseError(f"override {text}: no {'set' if sets else 'stage'} {name!r}; {nearest(name, list(found))}")
    return found[name]


def _in_set(body: yaml.Node | None, parts: list[str], text: str) -> Path:
    known = [item.name for item in fields(Curate)]
    if parts[0] in known:
        return tuple(parts)
    listed = get(body, "steps")
    nodes = listed.value if isinstance(listed, yaml.SequenceNode) else []
    names = [str(pairs(node)[0][0].value) if pairs(node) else str(node.value) for node in nodes]
    found = [index for index, name in enumerate(names) if name == parts[0]]
    if not found:
        raise HouseError(f"override {text}: no key or step {parts[0]!r} here; {nearest(parts[0], [*known, *names])}")
    rest = parts[1:]
    which = int(rest.pop(0)) if rest and rest[0].isdigit() else None
    if which is None and len(found) > 1:
        raise HouseError(f"override {text}: there are {len(found)} {parts[0]} steps: say {parts[0]}.1 for the first")
    if which is not None and not 1 <= which <= len(found):
        raise HouseError(f"override {text}: there is no {parts[0]}.{which}, they are {parts[0]}.1 to .{len(found)}")
    if not rest:
        raise HouseError(f"override {text}: name a field of {parts[0]}, such as {parts[0]}.KEY=…")
    return ("steps", found[(which or 1) - 1], parts[0], *rest)


# ---- building


class _Builder:
    """Builds values from nodes, and keeps the line of each for errors found later."""

    def __init__(self, root: yaml.Node) -> None:
        self.root = root
        self.steps = find_steps()
        self.nodes: dict[Path, yaml.Node] = {(): root}
        self.seed = 0

    def where(self, path: Path) -> str:
        while path not in self.nodes:
            path = path[:-1]
        return place(self.nodes[path])

    def recipe(self) -> Recipe:
        seed = get(self.root, "seed")
        self.seed = 0 if seed is None else self.value(seed, int, ("seed",))
        return cast(Recipe, self.dataclass(self.root, Recipe, ()))

    def value(self, node: yaml.Node, hint: Any, path: Path) -> Any:
        """The value of `node`, of the type `hint`."""
        self.nodes[path] = node
        if path == ("sources",):
            return tuple(self.named(node, Source, path).values())
        if path == ("models",):
            return self.named(node, Model, path)
        if len(path) == 2 and path[0] == "stages":
            return self.stage(node, path)
        options = get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)
        if type(None) in options and is_null(node):
            return None
        if set(options) & {Measure, RowJudge, CorpusJudge, Maker, Verifier}:
            mark = "measure" if Measure in options else "verify" if Verifier in options else "scope"
            return self.step(node, path, mark)
        if len(options) > 1:
            return self.first(node, options, path)
        if is_dataclass(hint):
            return self.dataclass(node, cast(type[Any], hint), path)
        return self.container(node, hint, path) if get_origin(hint) or hint is tuple else scalar(node, hint)

    def first(self, node: yaml.Node, options: tuple[Any, ...], path: Path) -> Any:
        """The first of a union's types that fits; with one besides None, its own error stands."""
        rest = [option for option in options if option is not type(None)]
        for option in rest[:-1]:
            try:
                return self.value(node, option, path)
            except Mismatch:
                continue
        words = [str(word) for option in rest[:-1] if get_origin(option) is Literal for word in get_args(option)]
        try:
            return self.value(node, rest[-1], path)
        except Mismatch as error:
            if not words or not isinstance(node, yaml.ScalarNode):
                raise
            raise Mismatch(
                f"{place(node)}: {node.value!r} is none of {', '.join(words)}, nor {wanted(rest[-1])}"
            ) from error

    def container(self, node: yaml.Node, hint: Any, path: Path) -> Any:
        origin, inner = get_origin(hint), get_args(hint)
        if origin is Literal:
            return choice(node, inner)
        if origin is not None and issubclass(origin, Mapping):
            found = self.keys(node, None, "a mapping")
            return {key: self.value(item, inner[1], (*path, key)) for key, (_, item) in found.items()}
        if not isinstance(node, yaml.SequenceNode):
            raise Mismatch(f"{place(node)}: a list belongs here, as in [a, b], not {shown(node)}")
        if origin is tuple and Ellipsis not in inner:
            if len(inner) != len(node.value):
                raise Mismatch(f"{place(node)}: a list of {len(inner)} belongs here, not of {len(node.value)}")
            kinds: Sequence[Any] = inner
        else:
            kinds = [inner[0]] * len(node.value)
        items = [self.value(item, kinds[i], (*path, i)) for i, item in enumerate(node.value)]
        return items if origin is list else tuple(items)

    def keys(self, node: yaml.Node, known: Sequence[str] | None, what: str) -> dict[str, Pair]:
        """The node's pairs by key: a mapping, no key twice, none unknown."""
        if is_null(node):
            return {}
        if not isinstance(node, yaml.MappingNode):
            raise Mismatch(f"{place(node)}: {what} is a mapping of keys, not {shown(node)}")
        found: dict[str, Pair] = {}
        for key, item in pairs(node):
            name = str(key.value)
            if name in found:
                raise HouseError(f"{place(key)}: key {name!r} is there twice")
            if known is not None and name not in known:
                raise HouseError(f"{place(key)}: unknown key {name!r} in {what}; {nearest(name, list(known))}")
            found[name] = (key, item)
        return found

    def dataclass(self, node: yaml.Node, kind: type[Any], path: Path, **given: Any) -> Any:
        """A frozen dataclass from its fields; `given` ones do not stand in the YAML."""
        hints = get_type_hints(kind)
        open_fields = {item.name: item for item in fields(kind) if item.init and item.name not in given}
        found = self.keys(node, list(open_fields), kind.__name__)
        values = {name: self.value(item, hints[name], (*path, name)) for name, (_, item) in found.items()}
        if kind in (NewModel, Training):  # the recipe's seed rules where a part states none
            values.setdefault("seed", self.seed)
        for name, item in open_fields.items():
            if name not in values and item.default is MISSING and item.default_factory is MISSING:
                raise HouseError(f"{place(node)}: {kind.__name__} needs the key {name!r}")
        try:
            return kind(**given, **values)
        except (ValueError, TypeError, HouseError) as error:
            said = str(error).removeprefix(f"{kind.__name__}: ")
            raise HouseError(f"{place(node)}: {kind.__name__}: {said}") from error

    def named(self, node: yaml.Node, kind: type[Any], path: Path) -> dict[str, Any]:
        """A mapping of names to dataclasses; a source knows its own name."""
        made = {}
        for name, (key, item) in self.keys(node, None, path[0]).items():  # type: ignore[arg-type]
            given = {"name": name} if kind is Source else {}
            self.nodes[(*path, name)] = key
            made[name] = self.dataclass(item, kind, (*path, name), **given)
        return made

    def one_key(self, node: yaml.Node, what: str) -> Pair:
        if isinstance(node, yaml.MappingNode) and len(node.value) == 1:
            return pairs(node)[0]
        names = [str(key.value) for key, _ in pairs(node)] if isinstance(node, yaml.MappingNode) else []
        found = f"{len(names)} ({', '.join(names)})" if names else shown(node)
        raise HouseError(f"{place(node)}: {what} is one name with its settings, `Name: {{…}}`, not {found}")

    def stage(self, node: yaml.Node, path: Path) -> Any:
        key, body = self.one_key(node, "a stage")
        kind = str(key.value)
        if kind not in STAGES:
            raise HouseError(f"{place(key)}: unknown stage {kind!r}; {nearest(kind, [*STAGES, 'rounds'])}")
        if kind in TRAINS_ON:
            return self.train(body, kind, path)
        return self.dataclass(body, Curate if kind == "curate" else Evaluate, path)

    def train(self, node: yaml.Node, objective: str, path: Path) -> Any:
        """A training stage: its own keys and those of Training side by side."""
        own = [item.name for item in fields(Train) if item.name not in ("objective", "settings")]
        settings = [item.name for item in fields(Training)]
        found = self.keys(node, [*own, *settings], objective)
        training = self.dataclass(mapping([found[n] for n in found if n in settings], node), Training, path)
        mine = mapping([found[n] for n in found if n in own], node)
        return self.dataclass(mine, Train, path, objective=objective, settings=training)

    def step(self, node: yaml.Node, path: Path, attribute: str) -> Any:
        """A judge, maker, measure or verifier: its bare class name, or the name with its fields."""
        if isinstance(node, yaml.ScalarNode):
            key, body = node, mapping([], node)
        else:
            key, body = self.one_key(node, "a step")  # type: ignore[assignment]
        known = {name: kind for name, kind in self.steps.items() if hasattr(kind, attribute)}
        name = str(key.value)
        if name not in known:
            raise HouseError(f"{place(key)}: unknown step {name!r}; {nearest(name, list(known))}")
        return self.dataclass(body, known[name], path)


# ---- and back


def plain(value: Any) -> Any:
    """`value` as the dicts, lists and scalars that its YAML holds, every field written out."""
    if isinstance(value, Recipe):
        body = _fields(value)
        body["sources"] = {source.name: _fields(source, leave="name") for source in value.sources}
        body["stages"] = [_plain_stage(stage) for stage in value.stages]
        return body
    if is_dataclass(value):
        inside = {item.name: plain(getattr(value, item.name)) for item in fields(value) if item.init}
        is_step = any(hasattr(value, mark) for mark in ("scope", "measure", "verify"))
        return {type(value).__name__: inside} if is_step else inside
    if isinstance(value, Mapping):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if isinstance(value, str):
        return value.replace("${", "$${")  # else it would be expanded when read back
    return value if value is None or isinstance(value, bool | int | float) else str(value)


def _fields(value: Any, leave: str = "") -> dict[str, Any]:
    return {item.name: plain(getattr(value, item.name)) for item in fields(value) if item.name != leave}


def _plain_stage(stage: Stage) -> dict[str, Any]:
    body = _fields(stage, leave="objective")
    if body.get("round", 0) is None:
        body.pop("round")
    if isinstance(stage, Train):
        return {stage.objective: body | body.pop("settings")}
    return {type(stage).__name__.lower(): body}


def dump(recipe: Recipe) -> str:
    """The resolved recipe as YAML: every default written out; loads back equal."""
    return yaml.safe_dump(plain(recipe), sort_keys=False, allow_unicode=True, width=120)


def digest(recipe: Recipe) -> str:
    """128-bit digest of the resolved recipe."""
    return digest_of(dump(recipe))
