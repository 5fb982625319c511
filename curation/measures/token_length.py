"""How long a row is under the tokenizer of a model."""

from dataclasses import dataclass
from typing import ClassVar

import pyarrow as pa

from ..door import Progress
from ..steps import Tools


@dataclass(frozen=True)
class TokenLength:
    """Tokens of a row as the trainer counts them: under the tokenizer and the chat template of the recipe's model
    `model`.

    response_tokens: of the last assistant turn (of a preference row `chosen`, of a raw document all of it), the token
    that ends the turn included. prompt_tokens: of all that comes before, the template's own tokens included.
    total_tokens: what the row takes in a pack: of a conversation its longest example, of a preference row prompt and
    `chosen` and prompt and `rejected`. Null where the template refuses the conversation or there is no assistant turn.
    Only the tokenizer is loaded, not the weights; 0.1 to 0.3 ms a row.
    """

    model: str

    version: ClassVar[int] = 1
    columns: ClassVar[dict[str, pa.DataType]] = {
        "prompt_tokens": pa.int32(),
        "response_tokens": pa.int32(),
        "total_tokens": pa.int32(),
    }

    @property
    def models(self) -> tuple[str, ...]:
        return (self.model,)

    def measure(self, rows: pa.Table, tools: Tools, progress: Progress) -> pa.Table:
        """One row of `columns` for each row, in order."""
        found = tools.token_counts(self.model, rows)
        progress(rows.num_rows, rows.num_rows)
        return found.select(list(self.columns)).cast(pa.schema(self.columns))
