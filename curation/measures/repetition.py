"""How much of a response repeats itself."""

from dataclasses import dataclass
from typing import ClassVar

import pyarrow as pa

from ..door import Progress
from ..steps import Tools
from ..text.view import View


@dataclass(frozen=True)
class Repetition:
    """Shares of a text that repeat (the rules of Gopher, arXiv 2112.11446, on words instead of characters, and a loop).

    view: response (default), prompt or pair. words: how many there are. top_2gram, top_3gram, top_4gram: share of the
    words that lie in the most frequent n-gram, 0 where none occurs twice. repeated_5gram, repeated_10gram: share of the
    words in n-grams that occur more than once. repeated_lines: share of the bytes in lines that came before. loop:
    share of the bytes in the text's end that goes round in a circle of at most 400 bytes, four turns at least, as a
    model does that cannot stop. An answer that is a loop from the first word on has 1.0 in all. No nulls.
    """

    view: View = "response"

    version: ClassVar[int] = 1
    columns: ClassVar[dict[str, pa.DataType]] = {
        "words": pa.int32(),
        "top_2gram": pa.float32(),
        "top_3gram": pa.float32(),
        "top_4gram": pa.float32(),
        "repeated_5gram": pa.float32(),
        "repeated_10gram": pa.float32(),
        "repeated_lines": pa.float32(),
        "loop": pa.float32(),
    }
    models: ClassVar[tuple[str, ...]] = ()

    def measure(self, rows: pa.Table, tools: Tools, progress: Progress) -> pa.Table:
        """One row of `columns` for each row, in order."""
        from ..text.repeats import repeats

        found = repeats(rows, self.view)
        progress(rows.num_rows, rows.num_rows)
        return found.select(list(self.columns))
