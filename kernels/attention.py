"""Causal attention over one packed row of documents that never see each other.

On CUDA in half precision one variable-length kernel serves the whole row. Elsewhere each document goes through torch's
scaled_dot_product_attention, documents of like length in one batch.
"""

from collections.abc import Sequence
from functools import lru_cache
from itertools import accumulate, groupby
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

try:
    from torch.nn.attention.varlen import varlen_attn
except ImportError:  # torch before 2.10, or a build without it
    varlen_attn = None  # type: ignore[assignment]


def _padded(length: int) -> int:
    """`length` rounded up to a multiple of an eighth of its power of two (at least 8), by itself alone.

    Documents of like length then share a batch: 22 short ones take 9 calls instead of 20, forward in half the time."""
    step: int = 1 << max(3, length.bit_length() - 3)
    return -(-length // step) * step


@lru_cache(maxsize=64)
def _plan(lengths: tuple[int, ...], device: torch.device) -> tuple[list[tuple[int, int]], Tensor | None, Tensor | None]:
    """Batches as (padded length, documents); the row's token for each of their slots; each token's slot.

    A document's padding lies after it, where causal attention never looks, and repeats its last token. None, None: the
    row is already so."""
    if len(set(lengths)) == 1:
        return [(lengths[0], len(lengths))], None, None
    starts = [0, *accumulate(lengths)]
    documents = sorted(range(len(lengths)), key=lambda index: (_padded(lengths[index]), index))
    sizes = [_padded(lengths[index]) for index in documents]
    batches = [(size, len(list(same))) for size, same in groupby(sizes)]
    offset = torch.tensor([starts[index] for index in documents]).repeat_interleave(torch.tensor(sizes))
    last = torch.tensor([lengths[index] - 1 for index in documents]).repeat_interleave(torch.tensor(sizes))
    place = torch.cat([torch.arange(size) for size in sizes])
    with torch.inference_mode(False):
        tokens = (offset + place.minimum(last)).to(device)
        slots = torch.empty(sum(lengths), dtype=torch.int64)
        real = place <= last
        slots[(offset + place)[real]] = real.nonzero()[:, 0]
        return batches, tokens, slots.to(device)


class _Arrange(torch.autograd.Function):
    """Tokens (T, …) -> slots (S, …). The padding's gradient is zero, so the way back is a gather too."""

    @staticmethod
    def forward(ctx: Any, row: Tensor, tokens: Tensor, slots: Tensor) -> Tensor:
        ctx.save_for_backward(slots)
        return row.index_select(0, tokens)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        return grads[0].index_select(0, ctx.saved_tensors[0]), None, None


@lru_cache(maxsize=64)
def _window_mask(size: int, window: int, device: torch.device) -> Tensor:
    """bool (size, size): query i sees keys i - window + 1 … i."""
    with torch.inference_mode(False):
        place = torch.arange(size, device=device)
        gap = place[:, None] - place[None, :]
        return (gap >= 0) & (gap < window)


def _check(q: Tensor, k: Tensor, v: Tensor, lengths: tuple[int, ...], window: int | None) -> None:
    if q.shape[0] != 1 or k.shape != v.shape or k.shape[2] != q.shape[2] or q.shape[1] % k.shape[1]:
        raise ValueError(
            f"q {tuple(q.shape)}, k {tuple(k.shape)} and v {tuple(v.shape)} do not fit: "
            "want (1, Hq, T, D) and twice (1, Hkv, T, D), Hq a multiple of Hkv"
        )
    if sum(lengths) != q.shape[2] or min(lengths, default=0) < 1:
        raise ValueError(f"document lengths {lengths} must be positive and sum to the row's {q.shape[2]} tokens")
    if window is not None and window < 1:
        raise ValueError(f"a sliding window of {window} tokens sees nothing")


def packed_attention(
    q: Tensor, k: Tensor, v: Tensor, lengths: Sequence[int], *, scale: float | None = None, window: int | None = None
) -> Tensor:
    """Causal attention within each document of a packed row: q (1, Hq, T, D), k and v (1, Hkv, T, D) -> (1, T, Hq, D).

    lengths: of the documents, in order, summing to T. Hq may be a multiple of Hkv (grouped queries). scale: of q kᵀ,
    default 1 / √D. window: a query sees itself and the window - 1 tokens before it; None: all of them. ValueError where
    shapes or lengths do not fit.
    """
    sizes = tuple(lengths)
    _check(q, k, v, sizes, window)
    if varlen_attn is not None and q.is_cuda and q.dtype in (torch.float16, torch.bfloat16):
        return _variable_length(q, k, v, sizes, scale, window)
    batches, tokens, slots = _plan(sizes, q.device)
    rows = [tensor[0].transpose(0, 1) for tensor in (q, k, v)]
    if tokens is not None:
        rows = [_Arrange.apply(tensor, tokens, slots) for tensor in rows]  # type: ignore[no-untyped-call]
    counts = [size * many for size, many in batches]
    parts = zip(batches, *(torch.split(tensor, counts) for tensor in rows), strict=True)
    outputs = [_equal(batch, q, k, v, scale, window) for batch, q, k, v in parts]
    whole = outputs[0] if len(outputs) == 1 else torch.cat(outputs)
    return (whole if slots is None else whole.index_select(0, slots))[None]


def _equal(batch: tuple[int, int], q: Tensor, k: Tensor, v: Tensor, scale: float | None, window: int | None) -> Tensor:
    """Attention of `many` documents of `size` tokens each: q, k, v (many * size, H, D) -> (many * size, Hq, D)."""
    size, many = batch
    q, k, v = (tensor.reshape(many, size, *tensor.shape[1:]).transpose(1, 2) for tensor in (q, k, v))
    sliding = window is not None and window < size
    output = F.scaled_dot_product_attention(
        q,
        k,
        v,
        attn_mask=_window_mask(size, window, q.device) if sliding and window is not None else None,
        is_causal=not sliding,
        scale=scale,
        enable_gqa=q.shape[1] != k.shape[1],
    )
    return output.transpose(1, 2).reshape(many * size, *output.shape[1::2])


@lru_cache(maxsize=64)
def _offsets(lengths: tuple[int, ...], device: torch.device) -> Tensor:
    with torch.inference_mode(False):
        return torch.tensor([0, *accumulate(lengths)], dtype=torch.int32).to(device, non_blocking=True)


def _variable_length(
    q: Tensor, k: Tensor, v: Tensor, lengths: tuple[int, ...], scale: float | None, window: int | None
) -> Tensor:
    offsets, longest = _offsets(lengths, q.device), max(lengths)
    q, k, v = (tensor[0].transpose(0, 1) for tensor in (q, k, v))
    left = -1 if window is None else window - 1  # theirs counts the tokens before the query
    output = varlen_attn(
        q, k, v, offsets, offsets, longest, longest,
        scale=scale, window_size=(left, 0), enable_gqa=q.shape[1] != k.shape[1],
    )  # fmt: skip
    assert isinstance(output, Tensor)  # a pair only where the normaliser is asked for too
    return output[None]


def naive_packed_attention(
    q: Tensor, k: Tensor, v: Tensor, lengths: Sequence[int], *, scale: float | None = None, window: int | None = None
) -> Tensor:
    """The definition with one dense (T, T) mask: the oracle of `packed_attention`."""
    many = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(many, dim=1), v.repeat_interleave(many, dim=1)
    place = torch.arange(q.shape[2], device=q.device)
    document = torch.repeat_interleave(torch.tensor(list(lengths), device=q.device))
    seen = (place[:, None] >= place[None, :]) & (document[:, None] == document[None, :])
    if window is not None:
        seen &= place[:, None] - place[None, :] < window
    scores = (q @ k.transpose(-1, -2)) * (q.shape[-1] ** -0.5 if scale is None else scale)
    return (torch.softmax(scores.masked_fill(~seen, float("-inf")), dim=-1) @ v).transpose(1, 2)
