"""Log-probabilities of a pack's target tokens under a model: what training, reference and evaluation share."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from transformers import PreTrainedModel

from ..kernels.logprob import target_logprobs
from .attention import head, hidden_states
from .losses import sums_by_document
from .packing import Pack


def pack_logps(model: PreTrainedModel, pack: Pack) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(N,) fp32 log-probabilities of the pack's N target tokens, their weights and their documents' places in it.

    Only the hidden states that predict a target meet the head."""
    matrix = head(model)
    device = matrix.device
    tokens = torch.from_numpy(pack.tokens).to(device)
    hidden = hidden_states(model, tokens, torch.from_numpy(pack.positions).to(device), pack.lengths.tolist())
    targets = torch.from_numpy(pack.targets).to(device)
    logps = target_logprobs(hidden[targets - 1], matrix, tokens[targets])
    weights = torch.from_numpy(pack.weights).to(device)[targets]
    owners = torch.from_numpy(pack.owners).to(device)[targets]
    return logps, weights, owners


def answer_logps(model: PreTrainedModel, pack: Pack) -> torch.Tensor:
    """(P, 2) weighted log-probabilities of the chosen and rejected answer of each pair of the pack."""
    logps, weights, owners = pack_logps(model, pack)
    pairs = int((pack.documents >= 0).sum()) // 2
    return sums_by_document(logps * weights, owners, len(pack.lengths))[: 2 * pairs].view(-1, 2)


@contextmanager
def inference(model: PreTrainedModel) -> Iterator[None]:
    """Without dropout and gradients; the model's mode is put back at the end."""
    training = model.training
    model.train(False)
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(training)


def context_of(config: Any) -> int | None:
    """The longest sequence in tokens that a transformers configuration states."""
    found: int | None = getattr(config.get_text_config(), "max_position_embeddings", None)
    return found
