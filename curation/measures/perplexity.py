"""How surprising a response is to a causal language model."""

import math
from dataclasses import dataclass
from typing import ClassVar

import pyarrow as pa

from ..door import Progress
from ..steps import Tools


@dataclass(frozen=True)
class ResponsePerplexity:
    """Perplexity of the assistant's turns given all that precedes them, under the recipe's model `model`, with that
    model's own chat template.

    tokens: scored assistant tokens. nll: sum of their negative log-probabilities in nats. perplexity = exp(nll /
    tokens); 1 is certainty, the vocabulary's size is a uniform guess. mean_prob, min_prob: of the tokens'
    probabilities. All null where nothing could be scored: no assistant turn, or longer than the model's context.
    """

    model: str

    version: ClassVar[int] = 1
    columns: ClassVar[dict[str, pa.DataType]] = {
        "tokens": pa.int32(),
        "nll": pa.float64(),
        "perplexity": pa.float64(),
        "mean_prob": pa.float64(),
        "min_prob": pa.float64(),
    }

    @property
    def models(self) -> tuple[str, ...]:
        return (self.model,)

    def measure(self, rows: pa.Table, tools: Tools, progress: Progress) -> pa.Table:
        """One row of `columns` for each row, in order."""
        scores = tools.scorer(self.model).response_scores(rows, progress)
        counts, losses = scores["tokens"].to_pylist(), scores["nll"].to_pylist()
        values = {name: scores[name] for name in self.columns if name != "perplexity"}
        values["perplexity"] = pa.array(map(perplexity, counts, losses), pa.float64())
        return pa.table({name: values[name].cast(kind) for name, kind in self.columns.items()})


def perplexity(tokens: int | None, nll: float | None) -> float | None:
    """exp(nll / tokens); null without tokens, infinite where the exponential overflows a double."""
    if not tokens or nll is None:
        return None
    try:
        return math.exp(nll / tokens)
    except OverflowError:
        return math.inf
