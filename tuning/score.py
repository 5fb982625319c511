"""Log-probabilities of responses under a causal LM: the ResponseScorer that curation's perplexity judges ask for.

Every pack is padded to its capacity, the last included, so that a row meets the same matrix sizes whatever lies
beside it: a row alone against the same row in a pack otherwise differs by up to 2e-4 in bf16.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedModel

from ..curation.door import Progress
from ..kernels.logprob import CHUNK_LOGITS, target_logprobs
from .attention import head, hidden_states
from .chat import Tokens, tokenise_responses
from .forward import context_of
from .models import load_model, load_tokenizer, model_digest
from .packing import Pack, build_pack, pack_plan, target_tokens

CAPACITY = 4096  # tokens of one pack; a longer response has a pack of its own, of the next power of two
BATCH_ROWS = 10_000  # rows tokenised and packed together

TILE = 64  # rows: a matrix product's last, uneven rows go through other instructions, and round otherwise

SCORES = pa.schema(
    [
        pa.field("tokens", pa.int32()),
        pa.field("nll", pa.float64()),
        pa.field("mean_prob", pa.float64()),
        pa.field("min_prob", pa.float64()),
    ]
)


class PackedScorer:
    """ResponseScorer by packed scoring with a local model.

    A row's scores do not depend on the rows beside it: in fp32 on a CPU they are equal to the last bit (tested).
    """

    def __init__(
        self, model: Path, adapter: Path | None = None, *, dtype: str = "auto", device: str | None = None
    ) -> None:
        """model: folder of the model; adapter: folder of a LoRA adapter on it. The folders are read at once."""
        self.digest = model_digest(model) + ("" if adapter is None else "+" + model_digest(adapter))
        self._tokenizer = load_tokenizer(model)
        self._model = load_model(model, dtype=dtype, device=device, adapter=adapter)
        self._context = context_of(self._model.config)

    def response_scores(self, rows: pa.Table, progress: Progress | None = None) -> pa.Table:
        """Scores (schema SCORES) of each row (schema ROW), in order: of `chosen` where there is one, else of the last
        assistant turn, end-of-turn token included. Null where there is none, where the chat template refuses the
        conversation, and where prompt and response are longer than the model's context."""
        parts = []
        for start in range(0, rows.num_rows, BATCH_ROWS):
            batch = rows.slice(start, BATCH_ROWS)
            parts.append(self._scores(batch, progress, start, rows.num_rows))
        return pa.concat_tables(parts) if parts else SCORES.empty_table()

    def _scores(self, rows: pa.Table, progress: Progress | None, before: int, total: int) -> pa.Table:
        found = tokenise_responses(self._tokenizer, rows)
        longest = self._context or np.inf
        usable = [
            index
            for index, item in enumerate(found)
            if isinstance(item, Tokens) and len(item.ids) <= longest and target_tokens(item)
        ]
        examples = [item for item in found if isinstance(item, Tokens)]
        places = np.cumsum([isinstance(item, Tokens) for item in found]) - 1
        values: list[tuple[int, float, float, float] | None] = [None] * rows.num_rows
        done = rows.num_rows - len(usable)
        for packed, capacity in _plan([len(examples[places[index]].ids) for index in usable]):
            members = [usable[place] for place in packed]
            scored = self._pack([examples[places[index]] for index in members], capacity)
            for index, value in zip(members, scored, strict=True):
                values[index] = value
            done += len(members)
            if progress is not None:
                progress(before + done, total)
        columns = list(zip(*(value or (None,) * 4 for value in values), strict=True))
        return pa.table([pa.array(column, field.type) for column, field in zip(columns, SCORES, strict=True)], SCORES)

    def _pack(self, examples: Sequence[Tokens], capacity: int) -> list[tuple[int, float, float, float]]:
        pack = build_pack(examples, range(len(examples)), pad_to=capacity)
        with torch.inference_mode():
            logps = _logps(self._model, pack)
        return _by_document(logps.double().cpu().numpy(), pack.owners[pack.targets])


def _logps(model: PreTrainedModel, pack: Pack) -> Tensor:
    """(N,) log-probabilities of the pack's N targets, projected in blocks of whole TILEs."""
    matrix = head(model)
    tokens = torch.from_numpy(pack.tokens).to(matrix.device)
    hidden = hidden_states(model, tokens, torch.from_numpy(pack.positions).to(matrix.device), pack.lengths.tolist())
    targets = pack.targets
    tiled = torch.from_numpy(np.pad(targets, (0, -len(targets) % TILE), mode="edge")).to(matrix.device)
    chunk = max(1, CHUNK_LOGITS.get(matrix.device.type, 2**24) // (matrix.shape[0] * TILE)) * TILE
    return target_logprobs(hidden[tiled - 1], matrix, tokens[tiled], chunk_tokens=chunk)[: len(targets)]


def _plan(lengths: Sequence[int]) -> list[tuple[list[int], int]]:
    """Packs as (places in `lengths`, capacity). A document's capacity depends on its own length alone."""
    sizes = np.asarray(lengths, np.int64)
    capacities = np.asarray([max(CAPACITY, 1 << (length - 1).bit_length()) for length in lengths], np.int64)
    plan = []
    for capacity in np.unique(capacities).tolist():
        places = np.flatnonzero(capacities == capacity)
        plan += [(places[pack].tolist(), capacity) for pack in pack_plan(sizes[places], capacity)]
    return plan


def _by_document(logps: NDArray[np.float64], owners: NDArray[np.int64]) -> list[tuple[int, float, float, float]]:
    """(tokens, nll, mean_prob, min_prob) of each document; the targets of one lie together."""
    starts = np.flatnonzero(np.diff(owners, prepend=-1))
    counts = np.diff(starts, append=len(owners))
    probs = np.exp(logps)
    sums = -np.add.reduceat(logps, starts)
    means = np.add.reduceat(probs, starts) / counts
    worst = np.minimum.reduceat(probs, starts)
    return list(zip(counts.tolist(), sums.tolist(), means.tolist(), worst.tolist(), strict=True))
