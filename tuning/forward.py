"""Log-probabilities of a pack's target tokens under a model: what training, reference and evaluation share."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from transformers import PreTrainedModel

from ..kernels.logprob import target_logprobs
from .attention import head, hidden_states, logit_form
from .losses import sums_by_document
from .packing import Pack


def pack_logps(model: PreTrainedModel, pack: Pack) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(M,) fp32 log-probabilities of the pack's M entries, their weights, and their documents' places in it (0 to D-1).

    Only the hidden states that predict a target meet the head, once for each of the N targets."""
    matrix = head(model)
    device = matrix.device
    places = [pack.tokens, pack.positions, pack.sources, pack.ids, pack.weights, pack.owners]
    tokens, positions, sources, ids, weights, owners = (torch.from_numpy(place).to(device) for place in places)
    hidden = hidden_states(model, tokens, positions, pack.lengths.tolist(), pack.parents.tolist())
    logps = target_logprobs(hidden[sources], matrix, ids, **logit_form(model))
    if len(pack.entries) > len(pack.targets):
        logps = logps[torch.from_numpy(pack.entries).to(device)]
    return logps, weights, owners


def answer_logps(model: PreTrainedModel, pack: Pack) -> torch.Tensor:
    """(D,) weighted sums of log-probabilities of the pack's documents."""
    logps, weights, owners = pack_logps(model, pack)
    return sums_by_document(logps * weights, owners, len(pack.documents))


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
