"""Causal attention over one packed row of documents that never see each other, and of trees of them.

A row is made of segments. A segment without a parent is a document; one with a parent continues it: it sees its
parent's tokens and its own, and no other child of that parent. So a prompt lies once before all its answers.

On CUDA in half precision one variable-length kernel serves the whole row. Elsewhere each segment goes through torch's
scaled_dot_product_attention, segments of like shape in one batch. Both carry torch's own gradients, fakes and autocast,
which an op of ours around them would have to make again, so there is none. Soft-capped scores (Gemma 2) have no fused
kernel in torch: they are computed segment by segment with the score matrix in memory, which is several times slower.
"""

from collections.abc import Sequence
from dataclasses import dataclass
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

INT32 = 2**31  # the variable-length kernel's backward counts its scratch memory in 32 bits


@dataclass(frozen=True)
class _Slots:
    """Where the row's tokens go, copies and padding included, and where the way back finds them.

    tokens (S,): the row's token in each slot. own (T,): the slot of each token, where its gradient begins; None: every
    token in its own place. shared (P,): tokens of parents, which have further slots; copies: (index into shared, slot),
    each shared token at most once in each. Padding has no gradient."""

    tokens: Tensor | None
    own: Tensor | None
    shared: Tensor | None
    copies: tuple[tuple[Tensor, Tensor], ...]


class _Arrange(torch.autograd.Function):
    """Tokens (T, …) -> slots (S, …). The way back is gathers and sums in a fixed order: no atomic additions."""

    @staticmethod
    def forward(ctx: Any, row: Tensor, slots: _Slots) -> Tensor:
        ctx.slots = slots
        assert slots.tokens is not None
        return row.index_select(0, slots.tokens)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        slots: _Slots = ctx.slots
        assert slots.own is not None
        row = grads[0].index_select(0, slots.own)
        if slots.shared is not None:
            wide = torch.promote_types(row.dtype, torch.float32)
            total = row.index_select(0, slots.shared).to(wide)
            for index, slot in slots.copies:
                total.index_add_(0, index, grads[0].index_select(0, slot).to(wide))
            row.index_copy_(0, slots.shared, total.to(row.dtype))
        return row, None


def _arranged(row: Tensor, slots: _Slots) -> Tensor:
    if slots.tokens is None:
        return row
    moved: Tensor = _Arrange.apply(row, slots)  # type: ignore[no-untyped-call]
    return moved


@dataclass(frozen=True)
class _Batch:
    """Segments of like shape: `many` of `size` queries over `keys` keys, padding included. before and own: the tokens
    of each segment's parent and its own."""

    size: int
    keys: int
    before: tuple[int, ...]
    own: tuple[int, ...]

    @property
    def many(self) -> int:
        return len(self.own)


def _padded(length: int) -> int:
    """`length` rounded up to a multiple of an eighth of its power of two (at least 8), by itself alone.

    Documents of like length then share a batch: 22 short ones take 9 calls instead of 20, forward in half the time."""
    step: int = 1 << max(3, length.bit_length() - 3)
    return -(-length // step) * step


def _before(lengths: tuple[int, ...], parents: tuple[int, ...]) -> list[int]:
    return [0 if parent < 0 else lengths[parent] for parent in parents]


@lru_cache(maxsize=64)
def _plan(
    lengths: tuple[int, ...], parents: tuple[int, ...], device: torch.device
) -> tuple[list[_Batch], _Slots, _Slots]:
    """The row's batches, and how its queries and its keys are laid out for them.

    A segment's padding lies after it, where no query of its own looks, and repeats its last token."""
    if len(set(lengths)) == 1 and max(parents) < 0:
        same = _Slots(None, None, None, ())
        return [_Batch(lengths[0], lengths[0], (0,) * len(lengths), lengths)], same, same
    before = _before(lengths, parents)
    shapes = [(_padded(own) if first else 0, _padded(first + own)) for first, own in zip(before, lengths, strict=True)]
    order = sorted(range(len(lengths)), key=lambda index: (shapes[index], index))
    batches = []
    for (branch, keys), same_shape in groupby(order, key=lambda index: shapes[index]):
        some = list(same_shape)
        firsts, owns = tuple(before[index] for index in some), tuple(lengths[index] for index in some)
        batches.append(_Batch(branch or keys, keys, firsts, owns))
    sizes = [batch.size for batch in batches for _ in batch.own]
    keys = [batch.keys for batch in batches for _ in batch.own]
    with torch.inference_mode(False):
        queries = _slots(lengths, (-1,) * len(lengths), order, sizes, device)
        return batches, queries, _slots(lengths, parents, order, keys, device) if max(parents) >= 0 else queries


def _slots(
    lengths: tuple[int, ...], parents: tuple[int, ...], order: Sequence[int], sizes: Sequence[int], device: torch.device
) -> _Slots:
    """Segments in `order`, each after its parent's tokens and filled up with its last token to its of `sizes`."""
    starts = [0, *accumulate(lengths)]
    begins = dict(zip(order, accumulate(sizes, initial=0), strict=False))
    tokens = torch.empty(sum(sizes), dtype=torch.int64)
    own = torch.empty(starts[-1], dtype=torch.int64)
    children: dict[int, list[int]] = {}
    for index, size in zip(order, sizes, strict=True):
        parent, length, slot = parents[index], lengths[index], begins[index]
        stop = slot + size
        if parent >= 0:
            tokens[slot : slot + lengths[parent]] = torch.arange(starts[parent], starts[parent + 1])
            children.setdefault(parent, []).append(slot)
            slot += lengths[parent]
        own[starts[index] : starts[index + 1]] = torch.arange(slot, slot + length)
        tokens[slot : slot + length] = torch.arange(starts[index], starts[index + 1])
        tokens[slot + length : stop] = starts[index + 1] - 1
    if not children:
        return _Slots(tokens.to(device), own.to(device), None, ())
    families = sorted(children)
    shared = torch.cat([torch.arange(starts[parent], starts[parent + 1]) for parent in families])
    inside = dict(zip(families, accumulate((lengths[parent] for parent in families), initial=0), strict=False))
    copies = []
    for child in range(max(map(len, children.values()))):
        some = [(parent, children[parent][child]) for parent in families if len(children[parent]) > child]
        index_in = torch.cat([torch.arange(inside[parent], inside[parent] + lengths[parent]) for parent, _ in some])
        slot_of = torch.cat([torch.arange(slot, slot + lengths[parent]) for parent, slot in some])
        copies.append((index_in.to(device), slot_of.to(device)))
    return _Slots(tokens.to(device), own.to(device), shared.to(device), tuple(copies))


@lru_cache(maxsize=32)
def _mask(batch: _Batch, window: int | None, device: torch.device) -> Tensor:
    """bool (many, 1, size, keys): what each query sees. A padding query sees what the segment's last one does."""
    with torch.inference_mode(False):
        if not any(batch.before):
            place = torch.arange(batch.size)[None, :, None]
        else:
            first, own = (torch.tensor(numbers)[:, None] for numbers in (batch.before, batch.own))
            place = (first + torch.arange(batch.size).minimum(own - 1))[:, :, None]
        gap = place - torch.arange(batch.keys)
        seen = gap >= 0 if window is None else (gap >= 0) & (gap < window)
        return seen[:, None].to(device)


def _check(
    q: Tensor, k: Tensor, v: Tensor, lengths: tuple[int, ...], parents: tuple[int, ...], window: int | None
) -> None:
    if q.shape[0] != 1 or k.shape != v.shape or k.shape[2] != q.shape[2] or q.shape[1] % k.shape[1]:
        raise ValueError(
            f"q {tuple(q.shape)}, k {tuple(k.shape)} and v {tuple(v.shape)} do not fit: "
            "want (1, Hq, T, D) and twice (1, Hkv, T, D), Hq a multiple of Hkv"
        )
    if sum(lengths) != q.shape[2] or min(lengths, default=0) < 1:
        raise ValueError(f"document lengths {lengths} must be positive and sum to the row's {q.shape[2]} tokens")
    fits = len(parents) == len(lengths)
    if not fits or any(not (p == -1 or (0 <= p < i and parents[p] == -1)) for i, p in enumerate(parents)):
        raise ValueError(f"parents {parents} must name, for each of {len(lengths)} segments, -1 or a root before it")
    if window is not None and window < 1:
        raise ValueError(f"a sliding window of {window} tokens sees nothing")


def packed_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lengths: Sequence[int],
    parents: Sequence[int] | None = None,
    *,
    scale: float | None = None,
    window: int | None = None,
    softcap: float | None = None,
) -> Tensor:
    """Causal attention within each document of a packed row: q (1, Hq, T, D), k and v (1, Hkv, T, D) -> (1, T, Hq, D).

    lengths: of the segments, in order, summing to T. parents: for each segment the one before it that it continues, -1
    for none (None: all of them); a parent has none itself. Hq may be a multiple of Hkv (grouped queries). scale: of
    q kᵀ, default 1 / √D. window: a query sees itself and the window - 1 tokens before it in its document; None: all of
    them. softcap: scores s become softcap · tanh(s / softcap) (arXiv 2408.00118). ValueError where shapes, lengths or
    parents do not fit.
    """
    sizes = tuple(lengths)
    above = (-1,) * len(sizes) if parents is None else tuple(parents)
    _check(q, k, v, sizes, above, window)
    if path_of(q, softcap) == "variable_length":
        return _variable_length(q, k, v, sizes, above, scale, window)
    batches, queries, keys = _plan(sizes, above, q.device)
    q, k, v = (tensor[0].transpose(0, 1) for tensor in (q, k, v))
    q, k, v = _arranged(q, queries), _arranged(k, keys), _arranged(v, keys)
    counts, wider = [batch.size * batch.many for batch in batches], [batch.keys * batch.many for batch in batches]
    parts = zip(batches, torch.split(q, counts), torch.split(k, wider), torch.split(v, wider), strict=True)
    outputs = [_alike(batch, q, k, v, scale, window, softcap) for batch, q, k, v in parts]
    whole = outputs[0] if len(outputs) == 1 else torch.cat(outputs)
    return (whole if queries.own is None else whole.index_select(0, queries.own))[None]


def path_of(q: Tensor, softcap: float | None = None) -> str:
    """How packed_attention computes such queries: `variable_length` (one CUDA kernel for the row), `by_shape` (torch's
    scaled_dot_product_attention, segments of like shape together) or `scores` (the score matrix in memory)."""
    if softcap is not None:
        return "scores"
    half = q.is_cuda and q.dtype in (torch.float16, torch.bfloat16)
    fits = q.shape[-1] % 8 == 0 and q.shape[-1] <= 256  # head sizes of the kernel
    return "variable_length" if varlen_attn is not None and half and fits else "by_shape"


def _alike(
    batch: _Batch, q: Tensor, k: Tensor, v: Tensor, scale: float | None, window: int | None, softcap: float | None
) -> Tensor:
    """Attention of one batch: q (many * size, Hq, D), k and v (many * keys, Hkv, D) -> (many * size, Hq, D)."""
    many = batch.many
    q = q.reshape(many, batch.size, *q.shape[1:]).transpose(1, 2)
    k, v = (tensor.reshape(many, batch.keys, *tensor.shape[1:]).transpose(1, 2) for tensor in (k, v))
    if window is not None and window >= batch.keys:
        window = None
    causal = window is None and not any(batch.before)
    if softcap is not None:
        output = _capped(q, k, v, _mask(batch, window, q.device), scale, softcap)
    else:
        mask = None if causal else _mask(batch, window, q.device)
        output = F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, is_causal=causal, scale=scale, enable_gqa=q.shape[1] != k.shape[1]
        )
    return output.transpose(1, 2).reshape(many * batch.size, *output.shape[1::2])


def _capped(q: Tensor, k: Tensor, v: Tensor, seen: Tensor, scale: float | None, softcap: float) -> Tensor:
    """Soft-capped attention: q (N, Hq, Q, D), k and v (N, Hkv, K, D), seen (N or 1, 1, Q, K)."""
    many, heads, size, depth = q.shape
    grouped = q.reshape(many, k.shape[1], -1, depth)  # the queries of one key head side by side, so no key is repeated
    scores = grouped @ k.transpose(-1, -2) * (depth**-0.5 if scale is None else scale)
    scores = (torch.tanh(scores / softcap) * softcap).reshape(many, heads, size, -1).masked_fill(~seen, float("-inf"))
    wide = torch.promote_types(q.dtype, torch.float32)
    shares = torch.softmax(scores, dim=-1, dtype=wide).to(q.dtype)
    return (shares.reshape(many, k.shape[1], -1, k.shape[2]) @ v).reshape(many, heads, size, depth)


@lru_cache(maxsize=64)
def _offsets(lengths: tuple[int, ...], device: torch.device) -> Tensor:
    with torch.inference_mode(False):
        return torch.tensor([0, *accumulate(lengths)], dtype=torch.int32).to(device, non_blocking=True)


@lru_cache(maxsize=64)
def _keys(lengths: tuple[int, ...], parents: tuple[int, ...], device: torch.device) -> _Slots:
    """Keys of the variable-length kernel: each segment's own after its parent's."""
    with torch.inference_mode(False):
        sizes = [first + own for first, own in zip(_before(lengths, parents), lengths, strict=True)]
        return _slots(lengths, parents, range(len(lengths)), sizes, device)


def _calls(lengths: Sequence[int], heads: int, depth: int, limit: int = INT32) -> list[tuple[int, int]]:
    """Runs of segments (start, stop) for which (queries + 128 · segments) · heads · depth rounded up to 32 stays below
    `limit`: beyond it the kernel's backward writes outside its memory. One segment alone is never cut."""
    a_token = heads * -(-depth // 32) * 32
    calls, start, cost = [], 0, 0
    for index, length in enumerate(lengths):
        own = (length + 128) * a_token
        if index > start and cost + own >= limit:
            calls.append((start, index))
            start, cost = index, 0
        if own >= limit:
            raise ValueError(f"a document of {length} tokens exceeds one kernel call of {heads} heads of {depth}")
        cost += own
    return [*calls, (start, len(lengths))]


def _variable_length(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lengths: tuple[int, ...],
    parents: tuple[int, ...],
    scale: float | None,
    window: int | None,
) -> Tensor:
    q, k, v = (tensor[0].transpose(0, 1) for tensor in (q, k, v))
    over = lengths
    if max(parents) >= 0:
        slots = _keys(lengths, parents, q.device)
        k, v = _arranged(k, slots), _arranged(v, slots)
        over = tuple(first + own for first, own in zip(_before(lengths, parents), lengths, strict=True))
    left = -1 if window is None else window - 1  # theirs counts the tokens before the query
    outputs = []
    calls = _calls(lengths, q.shape[1], q.shape[2])
    for start, stop in calls:
        queries, keys = lengths[start:stop], over[start:stop]
        if len(calls) > 1:
            at, to = sum(lengths[:start]), sum(over[:start])
            some = q[at : at + sum(queries)], k[to : to + sum(keys)], v[to : to + sum(keys)]
        else:
            some = q, k, v
        output = varlen_attn(
            *some, _offsets(queries, q.device), _offsets(keys, q.device), max(queries), max(keys),
            scale=scale, window_size=(left, 0), enable_gqa=q.shape[1] != k.shape[1],
        )  # fmt: skip
        assert isinstance(output, Tensor)  # a pair only where the normaliser is asked for too
        outputs.append(output)
    return (outputs[0] if len(outputs) == 1 else torch.cat(outputs))[None]


def naive_packed_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lengths: Sequence[int],
    parents: Sequence[int] | None = None,
    *,
    scale: float | None = None,
    window: int | None = None,
    softcap: float | None = None,
) -> Tensor:
    """The definition with one dense (T, T) mask: the oracle of `packed_attention`."""
    many = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(many, dim=1), v.repeat_interleave(many, dim=1)
    sizes = torch.tensor(list(lengths), device=q.device)
    above = torch.full_like(sizes, -1) if parents is None else torch.tensor(list(parents), device=q.device)
    segment = torch.repeat_interleave(sizes)
    begin = torch.where(above < 0, 0, sizes[above])  # position of each segment's first token
    place = torch.arange(q.shape[2], device=q.device) + (begin - sizes.cumsum(0) + sizes)[segment]
    related = (segment[:, None] == segment[None, :]) | (above[segment][:, None] == segment[None, :])
    gap = place[:, None] - place[None, :]
    seen = related & (gap >= 0) & (gap < (q.shape[2] if window is None else window))
    scores = (q @ k.transpose(-1, -2)) * (q.shape[-1] ** -0.5 if scale is None else scale)
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    return (torch.softmax(scores.masked_fill(~seen, float("-inf")), dim=-1) @ v).transpose(1, 2)
