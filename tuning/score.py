"""Log-probabilities of responses under a causal LM: the ResponseScorer that curation's perplexity judges ask for.

Every pack is padded to its capacity, the last included, so that a row meets the same matrix sizes whatever lies
beside it: a row alone against the same row in a pack otherwise differs by up to 2e-4 in bf16.
"""

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..curation.door import Progress
from ..curation.folder import HouseError
from ..kernels.logprob import CHUNK_LOGITS, LEAST_ROWS, target_logprobs
from .attention import head, hidden_states, logit_form
from .chat import Tokens, tokenise_each, tokenise_responses, turn_opening
from .digests import model_digest
from .forward import context_of
from .models import load_model, load_tokenizer
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
        pa.field("prompt_tokens", pa.int32()),
    ]
)
ALONE = pa.field("alone_nll", pa.float64())


class Scorer:
    """ResponseScorer, but for the log-probabilities themselves: which tokens are scored after what, and the table."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, context: float, digest: str) -> None:
        """context: the most tokens that prompt and response may have."""
        self.digest = digest
        self._tokenizer, self._context = tokenizer, context
        self._opening: NDArray[np.int32] | None = None

    def response_scores(self, rows: pa.Table, progress: Progress | None = None, *, alone: bool = False) -> pa.Table:
        """Scores (schema SCORES) of each row (schema ROW), in order: of `chosen` where there is one, else of the last
        assistant turn, end-of-turn token included. Null where there is none, where the chat template refuses the
        conversation, and where prompt and response are longer than the model's context.

        alone: adds `alone_nll`, of the same response tokens after `chat.turn_opening` instead of their prompt."""
        schema = SCORES.append(ALONE) if alone else SCORES
        parts = []
        for start in range(0, rows.num_rows, BATCH_ROWS):
            batch = rows.slice(start, BATCH_ROWS)
            parts.append(self._scores(batch, schema, progress, start, rows.num_rows))
        return pa.concat_tables(parts) if parts else schema.empty_table()

    def _measured(self, documents: Sequence[Tokens], told: Callable[[Sequence[int]], None]) -> NDArray[np.float64]:
        """(D, 4) tokens, nll, mean_prob and min_prob of each document's targets. told: is called with the places of
        those that are done."""
        raise NotImplementedError

    def _scores(
        self, rows: pa.Table, schema: pa.Schema, progress: Progress | None, before: int, total: int
    ) -> pa.Table:
        alone = ALONE.name in schema.names
        documents, owners = self._documents(tokenise_responses(self._tokenizer, rows), alone)
        left = np.bincount(owners, minlength=rows.num_rows)  # documents of each row that are still to be scored

        def told(places: Sequence[int]) -> None:
            np.subtract.at(left, owners[places], 1)
            if progress is not None:
                progress(before + int((left == 0).sum()), total)

        found = self._measured(documents, told)
        if progress is not None and not documents:
            progress(before + rows.num_rows, total)
        whole = found[::2] if alone else found
        firsts = [int(np.flatnonzero(document.weights)[0]) for document in (documents[::2] if alone else documents)]
        values = [*whole.T, np.asarray(firsts), *([found[1::2, 1]] if alone else [])]
        place = np.zeros(rows.num_rows, np.int64)
        scored = owners[::2] if alone else owners
        place[scored] = np.arange(len(scored))
        pick = pa.array(place, mask=np.isin(np.arange(rows.num_rows), scored, invert=True))
        columns = [pa.array(value).cast(kind.type).take(pick) for value, kind in zip(values, schema, strict=True)]
        return pa.Table.from_arrays(columns, schema=schema)

    def _documents(self, found: Sequence[Tokens | HouseError], alone: bool) -> tuple[list[Tokens], NDArray[np.int64]]:
        """What is to be scored, and of which row each document is: a row's response after its prompt and, with `alone`,
        right after it, the response alone."""
        documents: list[Tokens] = []
        owners: list[int] = []
        for row, item in enumerate(found):
            if isinstance(item, Tokens) and len(item.ids) <= self._context and target_tokens(item):
                own = [item, self._alone(item)] if alone else [item]
                documents += own
                owners += [row] * len(own)
        return documents, np.asarray(owners, np.int64)

    def _alone(self, tokens: Tokens) -> Tokens:
        if self._opening is None:
            self._opening = turn_opening(self._tokenizer)
        start = int(np.flatnonzero(tokens.weights)[0])
        weights = np.concatenate([np.zeros(len(self._opening), np.float32), tokens.weights[start:]])
        return Tokens(np.concatenate([self._opening, tokens.ids[start:]]), weights)


class PackedScorer(Scorer):
    """ResponseScorer by packed scoring with a local model.

    A row's scores do not depend on the rows beside it: in fp32 on a CPU they are equal to the last bit (tested).
    """

    def __init__(
        self, model: Path, adapter: Path | None = None, *, dtype: str = "auto", device: str | None = None
    ) -> None:
        """model: folder of the model; adapter: folder of a LoRA adapter on it. The folders are read at once."""
        self._model = load_model(model, dtype=dtype, device=device, adapter=adapter)
        digest = model_digest(model) + ("" if adapter is None else "+" + model_digest(adapter))
        super().__init__(load_tokenizer(model), context_of(self._model.config) or np.inf, digest)

    def each(self, rows: pa.Table) -> list[list[Tokens] | HouseError]:
        """The documents of each row (chat.tokenise_each); a HouseError too where one is longer than the model's context
        or has nothing to predict."""
        found = tokenise_each(self._tokenizer, rows)
        return [item if isinstance(item, HouseError) else self._checked(item) for item in found]

    def _checked(self, documents: list[Tokens]) -> list[Tokens] | HouseError:
        longest = max((len(document.ids) for document in documents), default=0)
        if longest > self._context:
            return HouseError(f"{longest} tokens, more than the model's context of {self._context:g}")
        empty = not documents or any(not target_tokens(document) for document in documents)
        return HouseError("no target token") if empty else documents

    def target_logps(
        self, documents: Sequence[Tokens], progress: Callable[[int], None] | None = None
    ) -> list[NDArray[np.float32]]:
        """Log-probability of each target token of each document. progress: is told the documents done."""
        found: list[NDArray[np.float32]] = [np.zeros(0, np.float32)] * len(documents)
        done = 0
        for places, capacity in _plan([len(document.ids) for document in documents]):
            pack = build_pack([documents[place] for place in places], range(len(places)), pad_to=capacity)
            with torch.inference_mode():
                logps = _logps(self._model, pack).float().cpu().numpy()
            edges = np.searchsorted(pack.owners, np.arange(1, len(places)))
            for place, own in zip(places, np.split(logps, edges), strict=True):
                found[place] = own
            done += len(places)
            if progress is not None:
                progress(done)
        return found

    def _measured(self, documents: Sequence[Tokens], told: Callable[[Sequence[int]], None]) -> NDArray[np.float64]:
        found = np.full((len(documents), 4), np.nan)
        for places, capacity in _plan([len(document.ids) for document in documents]):
            found[places] = self._pack([documents[place] for place in places], capacity)
            told(places)
        return found

    def _pack(self, examples: Sequence[Tokens], capacity: int) -> NDArray[np.float64]:
        pack = build_pack(examples, range(len(examples)), pad_to=capacity)
        with torch.inference_mode():
            logps = _logps(self._model, pack)
        return _by_document(logps.double().cpu().numpy(), pack.owners)


def _logps(model: PreTrainedModel, pack: Pack) -> Tensor:
    """(N,) log-probabilities of the pack's N targets (no document shares any), projected in blocks of whole TILEs."""
    matrix = head(model)
    tokens = torch.from_numpy(pack.tokens).to(matrix.device)
    hidden = hidden_states(model, tokens, torch.from_numpy(pack.positions).to(matrix.device), pack.lengths.tolist())
    padding = (0, -len(pack.targets) % TILE)
    sources, ids = (
        torch.from_numpy(np.pad(places, padding, mode="edge")).to(matrix.device) for places in (pack.sources, pack.ids)
    )
    most = CHUNK_LOGITS.get(matrix.device.type, CHUNK_LOGITS["cpu"]) // matrix.shape[0]
    chunk = max(LEAST_ROWS, most // TILE * TILE)
    logps = target_logprobs(hidden[sources], matrix, ids, chunk_tokens=chunk, **logit_form(model))
    return logps[: len(pack.targets)]


def _plan(lengths: Sequence[int]) -> list[tuple[list[int], int]]:
    """Packs as (places in `lengths`, capacity). A document's capacity depends on its own length alone."""
    sizes = np.asarray(lengths, np.int64)
    capacities = np.asarray([max(CAPACITY, 1 << (length - 1).bit_length()) for length in lengths], np.int64)
    plan = []
    for capacity in np.unique(capacities).tolist():
        places = np.flatnonzero(capacities == capacity)
        plan += [(places[pack].tolist(), capacity) for pack in pack_plan(sizes[places], capacity)]
    return plan


def _by_document(logps: NDArray[np.float64], owners: NDArray[np.int64]) -> NDArray[np.float64]:
    """(D, 4) tokens, nll, mean_prob and min_prob of each document; the targets of one lie together."""
    starts = np.flatnonzero(np.diff(owners, prepend=-1))
    counts = np.diff(starts, append=len(owners))
    probs = np.exp(logps)
    sums = -np.add.reduceat(logps, starts)
    means = np.add.reduceat(probs, starts) / counts
    return np.stack([counts, sums, means, np.minimum.reduceat(probs, starts)], axis=1)
