"""How long a row is: words, characters, turns."""

from dataclasses import dataclass
from typing import ClassVar

import pyarrow as pa

from ..door import Progress
from ..steps import Tools
from ..text import VIEW_COLUMNS, prompt_of, response_of, words


@dataclass(frozen=True)
class Length:
    r"""Length of prompt and response (curation.text; of a preference row the response is `chosen`, of a raw document
    its text).

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
        values: dict[str, list[int]] = {name: [] for name in self.columns}
        for row in rows.select(VIEW_COLUMNS).to_pylist():
            response = response_of(row)
            values["prompt_words"].append(len(words(prompt_of(row))))
            values["response_words"].append(len(words(response)))
            values["response_chars"].append(len(response))
            values["turns"].append(len(row["messages"] or ()) + len(row["chosen"] or ()))
        progress(rows.num_rows, rows.num_rows)
        return pa.table(values, schema=pa.schema(self.columns))
