"""Answers in lines of the form `Label: value`, read with patience: a weak model dresses its labels, leaves the first
one out, or goes on with a second exercise."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

_DRESS = r"[ \t>*_#\-`]*(?:\d+[.)][ \t]*)?[*_`]*"


@dataclass(frozen=True)
class Labelled:
    """values: of the labels found, stripped. last: the label whose value runs to the end of the text, so that an answer
    cut short may have cut it; None where a second exercise ended the reading."""

    values: Mapping[str, str]
    last: str | None


def labelled(text: str, names: Sequence[str]) -> Labelled:
    """Values by label (`names`, in any case). What stands before the first label is the first name's value, if that has
    no label of its own. A label that comes a second time ends the reading."""
    wanted = {name.casefold(): name for name in names}
    label = re.compile(rf"^{_DRESS}({'|'.join(map(re.escape, names))})[*_`]*[ \t]*[:：](?:\*\*)?[ \t]*", re.I | re.M)
    marks, values = list(label.finditer(text)), {}
    last: str | None = names[0]
    before = text[: marks[0].start()] if marks else text
    for place, mark in enumerate(marks):
        name = wanted[mark[1].casefold()]
        if name in values:
            last = None
            break
        values[name] = _bare(text[mark.end() : marks[place + 1].start() if place + 1 < len(marks) else len(text)])
        last = name
    if names[0] not in values and _bare(before):
        values[names[0]] = _bare(before)
    return Labelled(values, last)


def _bare(value: str) -> str:
    """Without white space and the emphasis that its label opened."""
    value = value.strip()
    return value[:-2].rstrip() if value.endswith("**") and value.count("**") % 2 else value


def first_line(value: str) -> str:
    """The first line, without quotation marks around all of it."""
    line = value.split("\n", 1)[0].strip()
    for opening, closing in ('""', "''", "“”", "``"):
        if len(line) > 2 and line[0] == opening and line[-1] == closing and closing not in line[1:-1]:
            return line[1:-1].strip()
    return line
