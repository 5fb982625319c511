"""How long a row is: words, characters, turns."""

from dataclasses import dataclass
from typing import ClassVar

import pyarrow as pa
import pyarrow.compute as pc

from ..door import Progress
from ..steps import Tools


@dataclass(frozen=True)
class Length:
    r"""Length of prompt and response (curation.text.view; of a preference row the response is `chosen`, of a raw
    document its text).

    prompt_words, response_words: runs of \w characters. response_chars: code points. turns: messages of the row, those
    of `chosen` included; 0 for a raw document. No nulls: what is absent has length 0.
    """

    version: ClassVar[int] = 1
    columns: ClassVar[dict[str, pa.DataType]] = {
        "prompt_words": pa.int32(),
        "response_words": pa.int32(),
        "response_chars": pa.int32(),
        "turns": pa.int32(),
    }
    models: ClassVar[tuple[str, ...]] = ()

    def measure(self, rows: pa.Table, tools: Tools, progress: Progress) -> pa.Table:
        """One row of `columns` for each row, in order."""
        from ..text.texts import texts
        from ..text.word_counts import word_counts

        prompt_words, _ = word_counts(texts(rows, "prompt"))
        response_words, response_chars = word_counts(texts(rows, "response"))
        turns = [pc.fill_null(pc.list_value_length(rows[name]), 0) for name in ("messages", "chosen")]
        values = [pa.array(found) for found in (prompt_words, response_words, response_chars)]
        progress(rows.num_rows, rows.num_rows)
        columns = [column.cast(pa.int32()) for column in (*values, pc.add(*turns))]
        return pa.table(columns, schema=pa.schema(self.columns))
