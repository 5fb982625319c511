"""What a model makes of each row, as training would see the row: loss, perplexity, log-probabilities, by row_id."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from ..curation.door import Progress
from ..curation.folder import HouseError
from .chat import Tokens
from .score import BATCH_ROWS, PackedScorer

ROW_SCORES = pa.schema(
    [
        pa.field("row_id", pa.string(), nullable=False),
        pa.field("content_id", pa.string(), nullable=False),
        pa.field("tokens", pa.int32()),  # that are predicted: all assistant turns, or the preferred answer, or the text
        pa.field("loss", pa.float64()),  # nats a token, by the tokens' weights
        pa.field("perplexity", pa.float64()),  # exp(loss)
        pa.field("logp", pa.float64()),  # weighted sum over the tokens
        pa.field("mean_prob", pa.float64()),
        pa.field("min_prob", pa.float64()),
        pa.field("rejected_tokens", pa.int32()),
        pa.field("rejected_logp", pa.float64()),
        pa.field("problem", pa.string()),  # why there are no numbers
    ]
)
NO_NUMBER = "its log-probabilities are no numbers: the model's weights hold NaN or infinity, or overflow in this dtype"
PER_TOKEN = (pa.field("token_ids", pa.list_(pa.int32())), pa.field("token_logps", pa.list_(pa.float32())))


def schema_of(per_token: bool) -> pa.Schema:
    """ROW_SCORES, with the tokens' ids and log-probabilities where they are wanted."""
    return pa.schema([*ROW_SCORES, *PER_TOKEN]) if per_token else ROW_SCORES


def row_scores(
    scorer: PackedScorer, rows: pa.Table, *, per_token: bool = False, progress: Progress | None = None
) -> Iterator[pa.Table]:
    """Scores (schema_of) of rows (schema ROW), in order, some BATCH_ROWS at a time.

    A conversation is scored on every assistant turn, a preference row on `chosen` (loss, logp, …) and on `rejected`. A
    row that cannot be scored says why in `problem`, and its numbers are null. progress: (rows done, rows in all)."""
    for start in range(0, rows.num_rows, BATCH_ROWS):
        batch = rows.slice(start, BATCH_ROWS)
        items = scorer.each(batch)
        documents = [document for item in items if isinstance(item, list) for document in item]

        def told(done: int, start: int = start, of: int = len(documents), size: int = batch.num_rows) -> None:
            if progress is not None:
                progress(start + size * done // of, rows.num_rows)

        found = iter(zip(documents, scorer.target_logps(documents, told), strict=True))
        names = zip(
            batch["row_id"].to_pylist(), batch["content_id"].to_pylist(), batch["rejected"].is_valid(), strict=True
        )
        made = []
        for item, (row_id, content_id, preference) in zip(items, names, strict=True):
            row: dict[str, Any] = {"row_id": row_id, "content_id": content_id}
            if isinstance(item, HouseError):
                made.append(row | {"problem": str(item)})
            else:
                own = [next(found) for _ in item]
                odd = not all(np.isfinite(logps).all() for _, logps in own)
                made.append(row | ({"problem": NO_NUMBER} if odd else _numbers(own, preference, per_token)))
        if progress is not None and not documents:
            progress(start + batch.num_rows, rows.num_rows)
        yield pa.Table.from_pylist(made, schema=schema_of(per_token))


def _numbers(found: list[tuple[Tokens, NDArray[np.float32]]], preference: bool, per_token: bool) -> dict[str, Any]:
    """Of a row's documents: all of them together, or chosen and rejected apart."""
    first, second = (found[:1], found[1:]) if preference else (found, [])
    weights, ids, logps = _joined(first)
    loss = -float(weights @ logps) / float(weights.sum())
    with np.errstate(over="ignore"):
        row: dict[str, Any] = {"perplexity": float(np.exp(loss))}
    row |= {"tokens": len(logps), "loss": loss, "logp": float(weights @ logps)}
    row |= {"mean_prob": float(np.exp(logps).mean()), "min_prob": float(np.exp(logps.min()))}
    if second:
        other, _, theirs = _joined(second)
        row |= {"rejected_tokens": len(theirs), "rejected_logp": float(other @ theirs)}
    return row | ({"token_ids": ids, "token_logps": logps.astype(np.float32)} if per_token else {})


def _joined(
    found: list[tuple[Tokens, NDArray[np.float32]]],
) -> tuple[NDArray[np.float64], NDArray[np.int32], NDArray[np.float64]]:
    """Weights, ids and log-probabilities of the targets, in order."""
    places = [np.flatnonzero(document.weights) for document, _ in found]
    weights = [document.weights[own].astype(np.float64) for (document, _), own in zip(found, places, strict=True)]
    ids = [document.ids[own] for (document, _), own in zip(found, places, strict=True)]
    return (
        np.concatenate(weights),
        np.concatenate(ids),
        np.concatenate([logps for _, logps in found]).astype(np.float64),
    )
