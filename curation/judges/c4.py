"""The rules of C4: made for web pages, offered for raw documents, never a default."""

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from ..steps import Unmeasured
from ..text.view import VIEW_COLUMNS, View

_CITATION = r"\[\d*\]|\[edit\]|\[citation needed\]"
_BOILERPLATE = (
    r"(?i)[^\n]*(?:javascript|terms of use|privacy policy|cookie policy|uses cookies|use of cookies|use cookies)[^\n]*"
)


@dataclass(frozen=True)
class C4Quality(Unmeasured):
    """Drops rows by the rules of C4 (Raffel et al., arXiv 1910.10683, section 2.2), made for English web pages: they
    drop all code, JSON and short answers, so use them on raw documents.

    sentences: how many must stand in the lines that C4 would keep, which end in a terminal mark (. ? ! " ' but not …),
    have at least `words` words, none of over `longest` characters, and mention neither JavaScript nor cookies, terms of
    use or privacy policies. curly: whether a curly bracket anywhere drops the row. A judge drops rows and never lines.
    A sentence ends at a mark before white space. The list of bad words is not applied.

    Reasons: curly_bracket, lorem_ipsum, too_few_sentences (evidence {sentences, limit}).
    """

    sentences: int = 5
    words: int = 3
    longest: int = 1000
    curly: bool = True
    view: View = "response"

    scope: ClassVar[Literal["row"]] = "row"
    reads: ClassVar[tuple[str, ...]] = VIEW_COLUMNS

    def judge(self, rows: pa.Table, values: pa.Table) -> pa.Table:
        """Verdicts, aligned with `rows`."""
        from ..flags import flagged
        from ..text.texts import matching, texts
        from ..text.webtext import sentences

        said = texts(rows, self.view)
        fates: dict[int, tuple[str, dict[str, Any] | None]] = {}
        if self.curly:
            fates |= dict.fromkeys(np.flatnonzero(matching(said, r"\{")).tolist(), ("curly_bracket", None))
        for row in np.flatnonzero(matching(said, "(?i)lorem ipsum")).tolist():
            fates.setdefault(row, ("lorem_ipsum", None))
        for pattern in (_CITATION, _BOILERPLATE):
            hit = pa.array(matching(said, pattern))
            said = pc.replace_with_mask(said, hit, pc.replace_substring_regex(said.filter(hit), pattern, ""))
        counts = sentences(said, self.words, self.longest)
        for row in np.flatnonzero(counts < self.sentences).tolist():
            proof = {"sentences": int(counts[row]), "limit": self.sentences}
            fates.setdefault(row, ("too_few_sentences", proof))
        return flagged(rows.num_rows, fates)
