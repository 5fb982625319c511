"""Log-probabilities of target tokens from hidden states and the output head, without the logits matrix.

The one primitive of every loss here. With V logits a token, those of a pack would dwarf the model; they are made
and dropped a chunk of tokens at a time. log p(t) depends on one hidden state only, so its gradient with respect to that
state, head[t] - softmax(logits) @ head, is complete in the forward pass: the backward only scales it, and the logits
are made again only where the head itself is trained.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

CHUNK_LOGITS = {"cpu": 2**23, "cuda": 2**27}  # in fp32: 32 MB, 512 MB; smaller ones slow the products down


def _chunks(tokens: int, chunk: int) -> Iterator[slice]:
    for start in range(0, tokens, chunk):
        yield slice(start, min(start + chunk, tokens))


def chunk_of(tokens: int, words: int, device: str) -> int:
    """Tokens whose logits exist at once."""
    return min(max(tokens, 1), max(16, CHUNK_LOGITS.get(device, CHUNK_LOGITS["cpu"]) // words))


def logits_bytes(tokens: int, words: int, dtype: torch.dtype, device: str) -> int:
    """Bytes of the buffers that a call over so many tokens makes and drops."""
    each = dtype.itemsize if dtype.itemsize >= 4 else dtype.itemsize + 4
    return chunk_of(tokens, words, device.partition(":")[0]) * words * each


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


class _Logits:
    """Makes the logits of one chunk after another in the same buffers."""

    def __init__(self, hidden: Tensor, head: Tensor, bias: Tensor | None, chunk: int) -> None:
        self.hidden, self.head, self.bias = hidden, head, bias
        size = (min(chunk, hidden.shape[0]), head.shape[0])
        self.narrow = torch.empty(size, dtype=hidden.dtype, device=hidden.device)
        wide = _wide(hidden.dtype)
        self.wide = self.narrow if wide == hidden.dtype else torch.empty(size, dtype=wide, device=hidden.device)

    def of(self, part: slice) -> Tensor:
        """fp32 (or fp64) logits of these tokens, free to be overwritten."""
        count = part.stop - part.start
        torch.mm(self.hidden[part], self.head.t(), out=self.narrow[:count])
        logits = self.wide[:count]
        if self.wide is not self.narrow:
            logits.copy_(self.narrow[:count])
        return logits if self.bias is None else logits.add_(self.bias)

    def rounded(self, values: Tensor) -> Tensor:
        """`values` in the head's dtype."""
        return values if self.wide is self.narrow else self.narrow[: values.shape[0]].copy_(values)


class _TargetLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, head: Tensor, targets: Tensor, bias: Tensor | None, chunk: int, learn: bool
    ) -> Tensor:
        ctx.trains_head = learn and (head.requires_grad or (bias is not None and bias.requires_grad))
        values = torch.empty(targets.shape, dtype=_wide(hidden.dtype), device=hidden.device)
        totals = torch.empty_like(values)  # log of the sum of exponentials
        gradient = torch.empty_like(hidden) if learn and hidden.requires_grad and not ctx.trains_head else None
        chunks = _Logits(hidden, head, bias, chunk)
        for part in _chunks(len(targets), chunk):
            logits, places = chunks.of(part), targets[part, None]
            picked = logits.gather(1, places)
            highest = logits.amax(dim=1, keepdim=True)
            share = logits.sub_(highest).exp_()
            mass = share.sum(dim=1, keepdim=True)
            total = highest + mass.log()
            values[part], totals[part] = (picked - total)[:, 0], total[:, 0]
            if gradient is not None:
                mean = (chunks.rounded(share) @ head).to(mass.dtype).div_(mass)  # dividing V columns would cost more
                gradient[part] = head[targets[part]] - mean
        ctx.save_for_backward(hidden, head, targets, bias, totals, gradient)
        ctx.chunk = chunk
        return values

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        hidden, head, targets, bias, totals, gradient = ctx.saved_tensors
        if not ctx.trains_head:
            return (grads[0][:, None] * gradient).to(hidden.dtype), None, None, None, None, None
        dhidden = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        dhead = torch.zeros_like(head, dtype=totals.dtype) if ctx.needs_input_grad[1] else None
        dbias = torch.zeros_like(bias, dtype=totals.dtype) if ctx.needs_input_grad[3] else None
        chunks = _Logits(hidden, head, bias, ctx.chunk)
        for part in _chunks(len(targets), ctx.chunk):
            weight = grads[0][part, None].to(totals.dtype)
            dlogits = chunks.of(part).sub_(totals[part, None]).exp_().mul_(-weight)
            dlogits.scatter_add_(1, targets[part, None], weight)
            if dbias is not None:
                dbias += dlogits.sum(dim=0)
            dlogits = chunks.rounded(dlogits)
            if dhidden is not None:
                torch.mm(dlogits, head, out=dhidden[part])
            if dhead is not None and dhead.dtype == head.dtype:
                dhead.addmm_(dlogits.t(), hidden[part])
            elif dhead is not None:
                dhead += dlogits.t() @ hidden[part]
        if dhead is not None:
            dhead = dhead.to(head.dtype)
        return dhidden, dhead, None, None if dbias is None else dbias.to(bias.dtype), None, None


def target_logprobs(
    hidden: Tensor, head: Tensor, targets: Tensor, *, bias: Tensor | None = None, chunk_tokens: int | None = None
) -> Tensor:
    """log softmax(hidden headᵀ + bias)[targets], fp32 (N,) (fp64 of fp64 input).

    hidden (N, H): only the states whose next token counts: leave masked tokens out before the call. head (V, H), of
    hidden's dtype. targets (N,): int64. chunk_tokens: tokens whose logits exist at once (default: by CHUNK_LOGITS).
    Gradients go to hidden, and to head and bias where they require one. NaN in a hidden state is NaN in its value and
    no other. ValueError where shapes do not fit; IndexError where a target is outside the vocabulary (on a CPU).
    """
    if hidden.ndim != 2 or head.ndim != 2 or hidden.shape[1] != head.shape[1] or targets.shape != hidden.shape[:1]:
        raise ValueError(
            f"hidden {tuple(hidden.shape)}, head {tuple(head.shape)} and targets {tuple(targets.shape)} do not fit: "
            "want (N, H), (V, H), (N,)"
        )
    if chunk_tokens is None:
        chunk_tokens = max(16, CHUNK_LOGITS.get(hidden.device.type, 2**23) // head.shape[0])
    if chunk_tokens < 1:
        raise ValueError(f"chunk_tokens must be at least 1, not {chunk_tokens}")
    learn = torch.is_grad_enabled()
    values: Tensor = _TargetLogprobs.apply(hidden, head, targets, bias, chunk_tokens, learn)  # type: ignore[no-untyped-call]
    return values


def naive_target_logprobs(hidden: Tensor, head: Tensor, targets: Tensor, *, bias: Tensor | None = None) -> Tensor:
    """The definition with the whole logits matrix: the oracle of `target_logprobs`."""
    logits = hidden @ head.t()
    logits = logits if logits.dtype == torch.float64 else logits.float()
    if bias is not None:
        logits = logits + bias
    return torch.log_softmax(logits, dim=1).gather(1, targets[:, None])[:, 0]
