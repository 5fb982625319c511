"""Encoders of the BERT family over packed texts: no padding, fused query-key-value, attention by groups of one length.

Texts come sorted by length, so that those of one length lie together: such a group needs no mask, and nothing is
computed for padding. Everything else works on tokens and does not know where a text ends.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor
from transformers import AutoModel

from .models import no_bars

FAMILY = ("bert", "roberta", "xlm-roberta")  # equal layers, learned absolute positions, exact GELU, post-norm
FIRST_POSITION = {"bert": 0}  # the others count from the padding's id + 1


@dataclass(frozen=True)
class Linear:
    weight: Tensor  # (out, in)
    bias: Tensor

    def __call__(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias)


@dataclass(frozen=True)
class Norm:
    weight: Tensor
    bias: Tensor
    eps: float

    def __call__(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, self.bias.shape, self.weight, self.bias, self.eps)


@dataclass(frozen=True)
class Layer:
    qkv: Linear
    out: Linear
    norm: Norm
    up: Linear
    down: Linear
    last_norm: Norm


@dataclass(frozen=True)
class Encoder:
    """Weights of an encoder. words, positions: embedding tables, the latter from the first position used on and with
    the type embedding added."""

    words: Tensor
    positions: Tensor
    norm: Norm
    layers: tuple[Layer, ...]
    heads: int

    @property
    def dims(self) -> int:
        return int(self.words.shape[1])

    @property
    def longest(self) -> int:
        return int(self.positions.shape[0])

    def embedded(self, ids: Tensor, positions: Tensor) -> Tensor:
        return self.norm(self.words[ids] + self.positions[positions])


Watch = Callable[[int, str, Tensor], None]


def load_encoder(folder: Path, dtype: torch.dtype, device: str) -> Encoder | None:
    """The encoder in `folder`, or None where it is not of the family (then sentence-transformers itself serves)."""
    with no_bars():
        model: Any = AutoModel.from_pretrained(folder, local_files_only=True, dtype=dtype).to(device).eval()
    config = model.config
    plain = (
        config.model_type in FAMILY
        and config.hidden_act == "gelu"
        and getattr(config, "position_embedding_type", "absolute") == "absolute"
        and not getattr(config, "is_decoder", False)
        and not getattr(config, "add_cross_attention", False)
    )
    if not plain:
        return None
    first = FIRST_POSITION.get(config.model_type, (config.pad_token_id or 0) + 1)
    tables = model.embeddings
    return Encoder(
        tables.word_embeddings.weight.detach(),
        (tables.position_embeddings.weight[first:] + tables.token_type_embeddings.weight[0]).detach(),
        _norm(tables.LayerNorm),
        tuple(map(_layer, model.encoder.layer)),
        config.num_attention_heads,
    )


def _layer(layer: Any) -> Layer:
    inner = layer.attention.self
    parts = (inner.query, inner.key, inner.value)
    return Layer(
        Linear(torch.cat([p.weight for p in parts]).detach(), torch.cat([p.bias for p in parts]).detach()),
        _linear(layer.attention.output.dense),
        _norm(layer.attention.output.LayerNorm),
        _linear(layer.intermediate.dense),
        _linear(layer.output.dense),
        _norm(layer.output.LayerNorm),
    )


def _linear(module: Any) -> Linear:
    return Linear(module.weight.detach(), module.bias.detach())


def _norm(module: Any) -> Norm:
    return Norm(module.weight.detach(), module.bias.detach(), module.eps)


def packed(texts: Sequence[NDArray[np.int32]]) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
    """Token ids one text after the other, positions within each text, and lengths."""
    lengths = np.array([len(text) for text in texts], np.int64)
    starts = np.cumsum(lengths) - lengths
    ids = np.concatenate(texts).astype(np.int64)
    return ids, np.arange(len(ids)) - np.repeat(starts, lengths), lengths


def states(
    encoder: Encoder, texts: Sequence[NDArray[np.int32]], watch: Watch | None = None
) -> tuple[Tensor, NDArray[np.int64]]:
    """(last hidden states (T, dims), lengths) of texts that come sorted by length. watch: called with the layer's
    number, the linear's name and its input."""
    ids, positions, lengths = packed(texts)
    device = encoder.words.device
    hidden = encoder.embedded(torch.from_numpy(ids).to(device), torch.from_numpy(positions).to(device))
    for number, layer in enumerate(encoder.layers):
        context = attention(layer.qkv(hidden), lengths, encoder.heads)
        middle = layer.norm(layer.out(context) + hidden)
        wide = F.gelu(layer.up(middle))
        if watch is not None:
            for name, seen in (("qkv", hidden), ("out", context), ("up", middle), ("down", wide)):
                watch(number, name, seen)
        hidden = layer.last_norm(layer.down(wide) + middle)
    return hidden, lengths


def attention(qkv: Tensor, lengths: NDArray[np.int64], heads: int) -> Tensor:
    """(T, dims) from fused queries, keys and values (T, 3 dims); one call for each run of equal lengths."""
    dims = qkv.shape[1] // 3
    found = qkv.new_empty(len(qkv), dims)
    starts = np.cumsum(lengths) - lengths
    runs = np.flatnonzero(np.diff(lengths, prepend=-1))
    for first, end in zip(runs.tolist(), [*runs[1:].tolist(), len(lengths)], strict=True):
        count, length, start = end - first, int(lengths[first]), int(starts[first])
        block = qkv[start : start + count * length].view(count, length, 3, heads, dims // heads)
        query, key, value = block.permute(2, 0, 3, 1, 4)
        context = F.scaled_dot_product_attention(query, key, value)
        found[start : start + count * length].view(count, length, heads, -1).copy_(context.transpose(1, 2))
    return found


def pooled(hidden: Tensor, lengths: NDArray[np.int64], how: str) -> NDArray[np.float32]:
    """One vector a text: the mean of its states, or the first (cls)."""
    starts = np.cumsum(lengths) - lengths
    if how == "cls":
        return np.asarray(hidden[torch.from_numpy(starts).to(hidden.device)].float().cpu().numpy())
    return np.asarray(np.add.reduceat(hidden.float().cpu().numpy(), starts) / lengths[:, None], np.float32)
