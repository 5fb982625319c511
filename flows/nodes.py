"""YAML nodes, which know their file and line: composing, replacing, and reading scalars by type hint."""

import io
import os
import re
import typing
from pathlib import Path as File
from typing import Any, cast

import yaml

from ..curation.folder import HouseError
from .stages import Path

VARIABLE = re.compile(r"\$\$\{|\$\{(\w+)(?::-([^}]*))?\}")
INTEGER = re.compile(r"[+-]?\d[\d_]*")
BOOLEANS = {"true": True, "yes": True, "on": True, "false": False, "no": False, "off": False}
NULLS = ("", "~", "null")
Pair = tuple[yaml.Node, yaml.Node]


class Mismatch(HouseError):
    """The node is of another type than the hint."""


def compose(text: str, name: str) -> yaml.Node | None:
    stream = io.StringIO(text)
    stream.name = name
    try:
        return yaml.compose(stream, Loader=yaml.SafeLoader)
    except yaml.MarkedYAMLError as error:
        line = "" if error.problem_mark is None else f":{error.problem_mark.line + 1}"
        raise HouseError(f"{name}{line}: not YAML: {error.problem or error.context}") from error
    except yaml.YAMLError as error:
        raise HouseError(f"{name}: not YAML: {error}") from error


def place(node: yaml.Node) -> str:
    mark = node.start_mark
    return str(mark.name) if mark.name.startswith("override") else f"{mark.name}:{mark.line + 1}"


def pairs(node: yaml.Node | None) -> list[Pair]:
    return cast(list[Pair], node.value) if isinstance(node, yaml.MappingNode) else []


def get(node: yaml.Node | None, key: str) -> yaml.Node | None:
    return next((value for name, value in pairs(node) if name.value == key), None)


def is_null(node: yaml.Node) -> bool:
    return isinstance(node, yaml.ScalarNode) and node.style is None and node.value.lower() in NULLS


def mapping(items: list[Pair], like: yaml.Node) -> yaml.MappingNode:
    return yaml.MappingNode("tag:yaml.org,2002:map", items, like.start_mark, like.end_mark)


def put(node: yaml.Node | None, path: Path, value: yaml.Node) -> yaml.Node:
    """`node` with `value` at `path`, nodes on the way copied (an anchor's other uses stay as they are)."""
    if not path:
        return value
    head, rest = path[0], path[1:]
    if isinstance(head, int):
        assert isinstance(node, yaml.SequenceNode)
        listed = [put(item, rest, value) if index == head else item for index, item in enumerate(node.value)]
        return yaml.SequenceNode(node.tag, listed, node.start_mark, node.end_mark)
    if isinstance(node, yaml.ScalarNode) and node.value == head:  # a step without fields, written as its bare name
        return mapping([(node, put(None, rest, value))], node)
    if node is not None and not isinstance(node, yaml.MappingNode) and not is_null(node):
        raise HouseError(f"{value.start_mark.name}: what stands before {head!r} has no keys ({place(node)})")
    items: list[Pair] = [(key, put(item, rest, value) if key.value == head else item) for key, item in pairs(node)]
    if get(node, head) is None:
        key = yaml.ScalarNode("tag:yaml.org,2002:str", head, value.start_mark, value.end_mark)
        items.append((key, put(None, rest, value)))
    return mapping(items, node or value)


def scalar(node: yaml.Node, hint: Any) -> Any:
    if hint in (Any, object):
        return yaml.SafeLoader("").construct_object(node, deep=True)
    if not isinstance(node, yaml.ScalarNode):
        raise Mismatch(f"{place(node)}: {wanted(hint)} belongs here, not {shown(node)}")
    text = expanded(node)
    bare = node.style is None
    if hint in (str, File) and not (bare and text.lower() in NULLS):
        return hint(text)
    if hint is bool and bare and text.lower() in BOOLEANS:
        return BOOLEANS[text.lower()]
    if hint is int and bare and INTEGER.fullmatch(text):
        return int(text)
    if hint is float and bare:
        try:
            return float(text)
        except ValueError:
            pass
    raise Mismatch(f"{place(node)}: {wanted(hint)} belongs here, not {shown(node)}")


def choice(node: yaml.Node, allowed: tuple[Any, ...]) -> Any:
    text = expanded(node) if isinstance(node, yaml.ScalarNode) else shown(node)
    for choice in allowed:
        if text == str(choice):
            return choice
    raise Mismatch(f"{place(node)}: {text!r} is none of {', '.join(map(str, allowed))}")


def expanded(node: yaml.ScalarNode) -> str:
    """The scalar's text with ${VAR} and ${VAR:-default} replaced."""

    def value(match: re.Match[str]) -> str:
        name, default = match.groups()
        if name is None:
            return "${"
        found = os.environ.get(name) or default
        if found is None:
            raise HouseError(
                f"{place(node)}: the environment variable {name} is not set; set it, or write a default: ${{{name}:-…}}"
            )
        return found

    return VARIABLE.sub(value, str(node.value))


def wanted(hint: Any) -> str:
    names = {str: "text", int: "a whole number", float: "a number", bool: "true or false", File: "a path"}
    return names.get(hint, typing.cast(str, getattr(hint, "__name__", str(hint))))


def shown(node: yaml.Node) -> str:
    if isinstance(node, yaml.ScalarNode):
        return "nothing" if is_null(node) else repr(node.value)
    return "a list" if isinstance(node, yaml.SequenceNode) else "a mapping"
