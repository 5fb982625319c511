"""The quality and repetition rules of Gopher: made for web pages, offered for raw documents, never a default."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np
import pyarrow as pa

from ..steps import Unmeasured
from ..text.view import VIEW_COLUMNS, View

_Rule = tuple[str, np.ndarray, float, bool]  # reason, values, limit, whether it is the highest that is kept


@dataclass(frozen=True)
class GopherQuality(Unmeasured):
    """Drops rows by the quality rules of Gopher (Rae et al., arXiv 2112.11446, section A1.1), made for English web
    pages: most instruction data fails them (a short answer has fewer than 50 words), so use them on raw documents.

    low, high: words. short, long: mean length of a word. symbols: hashes, or ellipses, by words. bullets: share of
    lines that begin with - or •. open_lines: share of lines that end in an ellipsis. alphabetic: share of words with a
    letter. stops: how many of the, be, to, of, and, that, have, with must occur. A word is a run without white space;
    those of punctuation alone count neither towards low and high nor towards the mean length.

    Reasons: too_few_words, too_many_words, short_words, long_words, hashes, ellipses, bullets, open_lines,
    few_alphabetic, few_stop_words, the first that applies; evidence {value, limit}.
    """

    low: int = 50
    high: int = 100_000
    short: float = 3
    long: float = 10
    symbols: float = 0.1
    bullets: float = 0.9
    open_lines: float = 0.3
    alphabetic: float = 0.8
    stops: int = 2
    view: View = "response"

    scope: ClassVar[Literal["row"]] = "row"
    reads: ClassVar[tuple[str, ...]] = VIEW_COLUMNS

    def judge(self, rows: pa.Table, values: pa.Table) -> pa.Table:
        """Verdicts, aligned with `rows`."""
        from ..text.texts import texts
        from ..text.webtext import quality

        n = quality(texts(rows, self.view))
        words, lines = np.maximum(n["words"], 1), np.maximum(n["lines"], 1)
        mean = n["letters"] / np.maximum(n["spoken"], 1)
        return by_rules(
            (
                ("too_few_words", n["spoken"], self.low, False),
                ("too_many_words", n["spoken"], self.high, True),
                ("short_words", mean, self.short, False),
                ("long_words", mean, self.long, True),
                ("hashes", n["hashes"] / words, self.symbols, True),
                ("ellipses", n["ellipses"] / words, self.symbols, True),
                ("bullets", n["bullets"] / lines, self.bullets, True),
                ("open_lines", n["open_lines"] / lines, self.open_lines, True),
                ("few_alphabetic", n["alphabetic"] / words, self.alphabetic, False),
                ("few_stop_words", n["stops"], self.stops, False),
            )
        )


@dataclass(frozen=True)
class GopherRepetition(Unmeasured):
    """Drops rows that repeat themselves by the rules of Gopher (Rae et al., arXiv 2112.11446, table A1).

    lines, paragraphs: share of those that stood before in the row; line_chars, paragraph_chars: the same in
    characters. top: of the commonest 2-, 3- and 4-gram of words, if it occurs twice, the share of the row's characters.
    repeated: the share of characters in 5- to 10-grams that occurred before. Short answers and code repeat more than
    web pages: look at the funnel before you trust the defaults there.

    Reasons: repeated_lines, repeated_paragraphs, repeated_line_chars, repeated_paragraph_chars, top_2_gram …
    top_4_gram, repeated_5_grams … repeated_10_grams, the first that applies; evidence {value, limit}.
    """

    lines: float = 0.3
    paragraphs: float = 0.3
    line_chars: float = 0.2
    paragraph_chars: float = 0.2
    top: tuple[float, ...] = (0.2, 0.18, 0.16)
    repeated: tuple[float, ...] = (0.15, 0.14, 0.13, 0.12, 0.11, 0.1)
    view: View = "response"

    scope: ClassVar[Literal["row"]] = "row"
    reads: ClassVar[tuple[str, ...]] = VIEW_COLUMNS

    def judge(self, rows: pa.Table, values: pa.Table) -> pa.Table:
        """Verdicts, aligned with `rows`."""
        import pyarrow.compute as pc

        from ..text.texts import texts
        from ..text.webtext import repetition

        said = texts(rows, self.view)
        n = repetition(said)
        chars = np.maximum(pc.utf8_length(said).to_numpy(), 1)
        rules: list[_Rule] = [
            ("repeated_paragraphs", _share(n, "again_paragraphs", "paragraphs"), self.paragraphs, True),
            ("repeated_paragraph_chars", n["again_paragraph_chars"] / chars, self.paragraph_chars, True),
            ("repeated_lines", _share(n, "again_lines", "lines"), self.lines, True),
            ("repeated_line_chars", n["again_line_chars"] / chars, self.line_chars, True),
        ]
        rules += [(f"top_{k}_gram", n[f"ngram_{k}"] / chars, most, True) for k, most in enumerate(self.top, 2)]
        rules += [
            (f"repeated_{k}_grams", n[f"ngram_{k}"] / chars, most, True) for k, most in enumerate(self.repeated, 5)
        ]
        return by_rules(rules)


def _share(counts: dict[str, np.ndarray], part: str, whole: str) -> np.ndarray:
    return np.asarray(counts[part] / np.maximum(counts[whole], 1))


def by_rules(rules: Sequence[_Rule]) -> pa.Table:
    """Verdicts by the first rule that a row breaks, with its value and the limit as evidence; limits are kept."""
    from ..flags import flagged

    fates: dict[int, tuple[str, dict[str, Any]]] = {}
    for reason, found, limit, highest in rules:
        for row in np.flatnonzero(found > limit if highest else found < limit).tolist():
            fates.setdefault(row, (reason, {"value": round(float(found[row]), 4), "limit": limit}))
    return flagged(len(rules[0][1]), fates)
