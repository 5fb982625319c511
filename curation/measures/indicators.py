"""Indicators of a row that need no model: how long it is and how varied its words are."""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import pyarrow as pa

from ..door import Progress
from ..steps import Tools


@dataclass(frozen=True)
class Indicators:
    """Length and lexical diversity of a row, as InstructMining reads them (Cao et al., arXiv 2307.06290).

    input_length, output_length: words of prompt and response; a letter of Chinese, Japanese or Thai is a word. mtld:
    of the response, the mean number of words in a row before their type-token ratio falls to 0.72, forwards and
    backwards (McCarthy and Jarvis, 2010); null without words. A response of fewer than some 50 words has too few of
    them for mtld to mean much; one in which no word comes twice has its length.
    """

    version: ClassVar[int] = 1
    columns: ClassVar[dict[str, pa.DataType]] = {
        "input_length": pa.int32(),
        "output_length": pa.int32(),
        "mtld": pa.float64(),
    }
    models: ClassVar[tuple[str, ...]] = ()

    def measure(self, rows: pa.Table, tools: Tools, progress: Progress) -> pa.Table:
        """One row of `columns` for each row, in order."""
        from ..duplicates.shingles import shingle_sets
        from ..text.lexical import mtld

        prompt, response = shingle_sets(rows, "prompt", 1), shingle_sets(rows, "response", 1)
        found = mtld(response.hashes, response.offsets)
        progress(rows.num_rows, rows.num_rows)
        lengths = {"input_length": prompt.words.astype(np.int32), "output_length": response.words.astype(np.int32)}
        return pa.table({**lengths, "mtld": pa.array(found, mask=np.isnan(found))})
