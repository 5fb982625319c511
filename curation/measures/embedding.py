"""What a row is about, as a vector."""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import pyarrow as pa

from ..door import Progress
from ..steps import Tools
from ..text.view import View, view


@dataclass(frozen=True)
class Embedding:
    """Vector of unit length of the row's `view` under the embedding model `model` of the recipe: any
    sentence-transformers model (Reimers and Gurevych, arXiv 1908.10084) or a static model distilled from one.

    embedding: `dims` numbers in float16, whose rounding moves a cosine by less than 0.001. Text beyond the model's
    longest input is not seen.
    """

    model: str
    view: View = "prompt"

    version: ClassVar[int] = 1
    columns: ClassVar[dict[str, pa.DataType]] = {"embedding": pa.list_(pa.float16())}

    @property
    def models(self) -> tuple[str, ...]:
        return (self.model,)

    def measure(self, rows: pa.Table, tools: Tools, progress: Progress) -> pa.Table:
        """One row of `columns` for each row, in order."""
        made = tools.embedder(self.model).embed(view(rows, self.view), progress)
        if made.shape[0] != rows.num_rows or not np.isfinite(made).all():
            raise ValueError(f"{self.model} gave an array of shape {made.shape} for {rows.num_rows} rows, or NaN in it")
        found = made.astype(np.float16)
        offsets = pa.array(np.arange(len(found) + 1, dtype=np.int32) * found.shape[1])
        flat = pa.array(np.ascontiguousarray(found).reshape(-1))
        return pa.table({"embedding": pa.ListArray.from_arrays(offsets, flat)})
