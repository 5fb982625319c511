"""A maker that repairs text which went through a wrong encoding."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from difflib import SequenceMatcher
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np
import pyarrow as pa

from ..rows import table
from ..steps import Corpus

if TYPE_CHECKING:
    from ..text.edits import Edit, Place


@dataclass(frozen=True)
class RepairEncoding:
    """Rows whose mojibake ("LÃ©opold", "âˆš3") is turned back into what was meant and whose control characters are
    gone, as ftfy repairs them (Speer 2019, zenodo.2591652).

    uncurl_quotes: also make curly quotes straight. unescape_html: also turn &amp; and the like into their characters;
    off, because code means them. Width, ligatures, normal form and line ends always stay. All turns' contents and
    reasoning are repaired, tool calls not; spans move with the text; source, position and meta stay. The old row leaves
    the set with reason `rewritten` and is the new one's parent; held-out rows are repaired too and stay held out.
    """

    uncurl_quotes: bool = False
    unescape_html: bool = False

    scope: ClassVar[Literal["maker"]] = "maker"
    consumes: ClassVar[str | None] = "rewritten"
    model: ClassVar[None] = None
    rewrites: ClassVar[bool] = True

    def make(self, corpus: Corpus) -> Iterator[pa.Table]:
        """Tables of new rows, one for each part that gave any."""
        from ..text.edits import Edit, edited_row

        done = 0
        for part in corpus.tables():
            found = self._repairs(part)
            hit = sorted(found)
            made = []
            for row, index in zip(part.take(np.array(hit, np.int64)).to_pylist(), hit, strict=True):
                edits = {
                    place: _differences(old, new) if _has_spans(row, place) else [Edit(0, len(old), new)]
                    for place, (old, new) in found[index].items()
                }
                made.append(edited_row(row, edits, repr(self)))
            done += part.num_rows
            corpus.progress(done, corpus.rows)
            if made:
                yield table(made)

    def _repairs(self, rows: pa.Table) -> "dict[int, dict[Place, tuple[str, str]]]":
        """Old and new text of each string that changes, by row and place."""
        from ..text.contents import said
        from ..text.encoding import repaired, suspicious
        from ..text.texts import matching

        found: dict[int, dict[Place, tuple[str, str]]] = {}
        pattern = suspicious(self.unescape_html, self.uncurl_quotes)
        for one in said(rows, ("content", "reasoning_content")):
            for index in np.flatnonzero(matching(one.strings, pattern)).tolist():
                old = one.strings[index].as_py()
                new = repaired(old, self.unescape_html, self.uncurl_quotes)
                if new != old:
                    place = (one.field, int(one.turns[index]), one.part)
                    found.setdefault(int(one.rows[index]), {})[place] = old, new
        return found


def _has_spans(row: Mapping[str, Any], place: "Place") -> bool:
    return any((span["field"], span["turn"], "content") == place for span in row["spans"] or ())


def _differences(old: str, new: str) -> "list[Edit]":
    """The edits that make `new` of `old`, character by character."""
    from ..text.edits import Edit

    matcher = SequenceMatcher(None, old, new, autojunk=False)
    return [Edit(i, j, new[k:m]) for what, i, j, k, m in matcher.get_opcodes() if what != "equal"]
