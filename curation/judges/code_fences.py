"""A judge of Markdown code fences: each one that is opened is closed."""

import re
from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np
import pyarrow as pa

from ..flags import flagged
from ..steps import Unmeasured

_FENCE = re.compile(r"^[ \t>]*(?P<mark>`{3,}|~{3,})(?P<info>[^\n]*)$", re.MULTILINE)


@dataclass(frozen=True)
class CodeFences(Unmeasured):
    """Drops rows whose response opens a Markdown code fence and never closes it: a cut answer, or one whose prose a
    reader sees as code.

    Fences as CommonMark has them: at least three backticks or tildes at a line's start (any indentation, so that lists
    may hold code); the closing one is of the same kind, at least as long and bare. Reason: open_fence; evidence:
    {fence, line (from 1)}. Of a preference row `chosen` is judged, of a raw document its text.
    """

    scope: ClassVar[Literal["row"]] = "row"

    def judge(self, rows: pa.Table, values: pa.Table) -> pa.Table:
        """Verdicts, aligned with `rows`."""
        from ..text.texts import at, matching, texts

        said = texts(rows, "response")
        look = np.flatnonzero(matching(said, "```|~~~"))
        found = {}
        for row, text in zip(look.tolist(), at(said, look), strict=True):
            fence = open_fence(text)
            if fence is not None:
                found[row] = "open_fence", {"fence": fence[0], "line": fence[1]}
        return flagged(rows.num_rows, found)


def open_fence(text: str) -> tuple[str, int] | None:
    """The fence that is left open at the end of a text and its line, or None."""
    opened: re.Match[str] | None = None
    for match in _FENCE.finditer(text):
        mark, info = match["mark"], match["info"].strip()
        if opened is None:
            if not (mark[0] == "`" and "`" in info):  # ```inline``` is no fence
                opened = match
        elif not info and mark.startswith(opened["mark"]):
            opened = None
    return None if opened is None else (opened[0].strip()[:100], text.count("\n", 0, opened.start()) + 1)
