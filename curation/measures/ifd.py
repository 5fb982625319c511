"""How much a prompt helps a causal language model to say its response."""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import pyarrow as pa

from ..door import Progress
from ..steps import Tools


@dataclass(frozen=True)
class Ifd:
    """Instruction-following difficulty: how much the prompt lowers the loss of the response under the model `model`.

    ifd = loss_conditioned / loss_alone, both in nats per response token and over the very same tokens, end of turn
    included (Cherry LLM, arXiv 2308.12032); ifd_ppl is the ratio of the two perplexities, exp(loss_conditioned -
    loss_alone), by which Superfiltering ranks (arXiv 2402.00530). Conditioned: after the prompt, in the model's chat
    template. Alone: after the template's opening of an assistant turn and nothing else. Both are above 1 for the same
    rows: there the prompt misleads, and both papers drop the row; of the others they keep the highest. A model of
    GPT-2's size ranks much as a large one does. tokens: response tokens. Null where nothing could be scored, ifd also
    where the model is certain of the response alone (loss_alone 0).
    """

    model: str

    version: ClassVar[int] = 1
    columns: ClassVar[dict[str, pa.DataType]] = {
        "ifd": pa.float64(),
        "ifd_ppl": pa.float64(),
        "loss_conditioned": pa.float64(),
        "loss_alone": pa.float64(),
        "tokens": pa.int32(),
    }

    @property
    def models(self) -> tuple[str, ...]:
        return (self.model,)

    def measure(self, rows: pa.Table, tools: Tools, progress: Progress) -> pa.Table:
        """One row of `columns` for each row, in order."""
        scores = tools.scorer(self.model).response_scores(rows, progress, alone=True)
        tokens, given, alone = (scores[name].cast(pa.float64()).to_numpy() for name in ("tokens", "nll", "alone_nll"))
        with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
            given, alone = given / tokens, alone / tokens  # null has become NaN, and stays so
            values = [given / alone, np.exp(given - alone), given, alone]
        columns = [pa.array(value, mask=~np.isfinite(value)) for value in values]
        return pa.Table.from_arrays([*columns, scores["tokens"].combine_chunks()], names=list(self.columns))
