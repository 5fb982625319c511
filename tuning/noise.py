"""Noise on what the model reads while it is trained: masked input tokens and noisy embeddings.

Each draw is keyed by seed and document, not by the pack or the process: a step gives the same noise however its rows
are packed, accumulated and spread over ranks, and a resumed run repeats it. `seed` is of one optimizer step.
"""

import hashlib
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..curation.folder import HouseError
from .losses_math import between, positive
from .packing import Ints, Pack


def masked_thought(
    pack: Pack, seed: int, share: float, *, mask_token: int | None = None, vocabulary: int | None = None
) -> Pack:
    """The pack with a random share of its trained tokens replaced as inputs (Masked Thought, arXiv 2403.02178).

    Each token that the loss is on is hidden from what follows it with probability `share` (from 0 to below 1), by
    `mask_token` (mask_token_of), or, without one, by a token drawn evenly from `vocabulary`. Targets, their weights and
    all tokens of prompts stay. A token that several documents share is drawn with the first of them.
    """
    between(0.0, 1.0, masked_thought=share)
    if mask_token is None and vocabulary is None:
        raise ValueError("either a mask token or a vocabulary to draw from")
    first = np.full(len(pack.targets), len(pack.entries), np.int64)
    np.minimum.at(first, pack.entries, np.arange(len(pack.entries)))
    owners = pack.owners[first]
    tokens = pack.tokens.copy()
    for owner in np.unique(owners).tolist():
        places = pack.targets[owners == owner]
        draw = np.random.default_rng([seed, int(pack.documents[owner])])
        hidden = places[draw.random(len(places)) < share]
        tokens[hidden] = mask_token if mask_token is not None else draw.integers(0, vocabulary, len(hidden))
    return replace(pack, tokens=tokens)


def masked_share(step: int, steps: int, share: float, warmup: float = 0.66) -> float:
    """The share of step `step` (from 0) of `steps`: rises linearly to `share` over the first `warmup` of all steps, as
    the authors of Masked Thought train (to 0.4 on GSM8K)."""
    return share * min(1.0, (step + 1) / max(1.0, warmup * steps))


def mask_token_of(tokenizer: PreTrainedTokenizerBase) -> int:
    """What stands for a hidden token: the tokenizer's mask token, else its padding (as the authors have it), else its
    unknown token. HouseError where it has none of them."""
    for found in (tokenizer.mask_token_id, tokenizer.pad_token_id, tokenizer.unk_token_id):
        if found is not None:
            return int(found)
    raise HouseError("masked_thought: the tokenizer has no mask, padding or unknown token to put in place of a token")


@contextmanager
def neftune(model: PreTrainedModel, pack: Pack, seed: int, alpha: float) -> Iterator[None]:
    """Inside, a forward of `pack` in training mode has noise on its embeddings (NEFTune, arXiv 2310.05914).

    Uniform in ±alpha / sqrt(L d), L the tokens of the token's own document (not of the pack), d the width; the paper
    tries alpha 5, 10 and 15. A prompt that several answers share counts its own tokens, an answer its prompt too. A
    forward that is run again (activation checkpointing) draws the same noise.
    """
    positive(neftune_alpha=alpha)
    embedding: nn.Module = model.get_input_embeddings()

    def noisy(module: nn.Module, inputs: Any, embedded: torch.Tensor) -> torch.Tensor:
        return embedded + _uniform(pack, seed, alpha, embedded) if module.training else embedded

    handle = embedding.register_forward_hook(noisy)
    try:
        yield
    finally:
        handle.remove()


def _uniform(pack: Pack, seed: int, alpha: float, embedded: torch.Tensor) -> torch.Tensor:
    """The noise for `embedded` (1, T, d), segment by segment."""
    if embedded.shape[:-1].numel() != len(pack.tokens):
        raise ValueError(f"{tuple(embedded.shape)} embeddings of a pack of {len(pack.tokens)} tokens")
    noise = torch.zeros(len(pack.tokens), embedded.shape[-1], dtype=torch.float32, device=embedded.device)
    generator = torch.Generator(embedded.device)
    ends = np.cumsum(pack.lengths)
    keys = _segment_keys(pack)
    for segment, (stop, length) in enumerate(zip(ends.tolist(), pack.lengths.tolist(), strict=True)):
        if keys[segment] is None:
            continue
        parent = int(pack.parents[segment])
        tokens = length + (int(pack.lengths[parent]) if parent >= 0 else 0)
        bound = alpha / math.sqrt(tokens * embedded.shape[-1])
        generator.manual_seed(_seed_of(f"{seed} {keys[segment]}"))
        noise[stop - length : stop].uniform_(-bound, bound, generator=generator)
    return noise.view_as(embedded).to(embedded.dtype)


def _segment_keys(pack: Pack) -> list[str | None]:
    """What each segment's noise is keyed by: its document; for one that others continue, the first of theirs; padding
    has none. Documents are the segments that none continues, in order."""
    parents: Ints = pack.parents
    continued = set(parents[parents >= 0].tolist())
    segments = len(pack.lengths) - (1 if pack.padding else 0)
    keys: list[str | None] = [None] * len(pack.lengths)
    documents = iter(pack.documents.tolist())
    for segment in range(segments):
        if segment not in continued:
            document = next(documents)
            keys[segment] = str(document)
            parent = int(parents[segment])
            if parent >= 0 and keys[parent] is None:
                keys[parent] = f"before {document}"
    return keys


def _seed_of(key: str) -> int:
    return int.from_bytes(hashlib.blake2b(key.encode(), digest_size=7).digest())
