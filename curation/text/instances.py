"""Worked examples of a task, as answers write them down: inputs with outputs, or labels with inputs."""

import re
from collections import Counter
from collections.abc import Sequence

from .view import normal

Instance = tuple[str, str]
"""Input, which may be empty, and output."""


def parse_yes(text: str) -> bool | None:
    """Yes or no, whichever is said first."""
    found = re.search(r"\b(yes|no)\b", text, re.IGNORECASE)
    return None if found is None else found[1].lower() == "yes"


_FIELD = re.compile(
    r"^[ \t]*[*#_>-]*[ \t]*(?:(?P<example>example)[ \t]*\d+[*_]*[ \t]*[:.)]?"
    r"|(?P<field>input|output|(?:class[ \t]+)?label)[ \t]*\d*[*_]*[ \t]*:)[*_]*[ \t]*",
    re.IGNORECASE | re.MULTILINE,
)
_NOTHING = re.compile(r"[<\[(]?(?:none|n/a|no ?input|not needed|empty)[>\])]?\.?", re.IGNORECASE)


def parse_instances(text: str, finished: bool = True) -> list[Instance] | str:
    """(input, output) of each example in an answer, labels first or inputs first; a reason where there is none. The
    last example of an answer that was cut off is none."""
    marks = list(_FIELD.finditer(text))
    if not marks:
        return "no_instance" if text.strip() else "empty"
    ends = [mark.start() for mark in marks[1:]] + [len(text)]
    fields = [
        ("example" if mark["example"] else mark["field"].lower().split()[-1], text[mark.end() : end].strip())
        for mark, end in zip(marks, ends, strict=True)
    ]
    labels = any(name == "label" for name, _ in fields)
    found = _labels_first(fields) if labels else _inputs_first(fields)
    if found and not finished:
        found.pop()
    return found or "no_instance"


def _inputs_first(fields: Sequence[tuple[str, str]]) -> list[Instance]:
    found, given = [], ""
    for name, said in fields:
        if name == "output":
            found.append((given, said))
        else:
            given = "" if name == "example" or _NOTHING.fullmatch(said) else said
    return found


def _labels_first(fields: Sequence[tuple[str, str]]) -> list[Instance]:
    found: list[Instance] = []
    label: str | None = None
    for name, said in [*fields, ("label", "")]:
        if name == "label":
            if label:
                found.append(("", label))
            label = said
        elif name == "input" and label:
            found.append(("" if _NOTHING.fullmatch(said) else said, label))
            label = None
    return found


def fitting(instances: Sequence[Instance]) -> tuple[list[Instance], Counter[str]]:
    """The instances that are kept, and how many are not, by reason."""
    outputs: dict[str, set[str]] = {}
    for given, output in instances:
        outputs.setdefault(normal(given), set()).add(normal(output))
    refused: Counter[str] = Counter()
    kept: dict[tuple[str, str], Instance] = {}
    for given, output in instances:
        name = normal(given), normal(output)
        problem = instance_problem(given, output)
        if problem is None and given and len(outputs[name[0]]) > 1:
            problem = "same_input"
        if problem is None and name in kept:
            problem = "duplicate"
        if problem is None:
            kept[name] = given, output
        else:
            refused[problem] += 1
    return list(kept.values()), refused


def instance_problem(given: str, output: str) -> str | None:
    """Why an instance by itself is turned down, or None."""
    if not output:
        return "no_output"
    if normal(given) == normal(output):
        return "echo"
    return "colon" if given.endswith(":") or output.endswith(":") else None
