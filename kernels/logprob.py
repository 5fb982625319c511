"""Log-probabilities of target tokens from hidden states and the output head, without the logits matrix.

The one primitive of every loss here. With V logits a token, those of a pack would dwarf the model; they are made and
dropped a chunk of tokens at a time: one matrix product, one walk over the chunk (logprob_chunk.py in torch,
logprob_triton.py on CUDA) that takes the log-sum and leaves the logits' gradient in their place, one product back.

Where the head is frozen, log p(t) depends on one hidden state only, so its gradient with respect to that state is
complete in the forward pass: 2HV FLOP a token forward, 2HV for the gradient, nothing in the backward but a scaling.
What is kept is N x H, no larger than the states themselves. Where the head learns, its gradient needs each token's
weight in the loss, known only in the backward: the logits are made again there (2HV more; 2HV each for both gradients).
"""

import importlib.util
from collections.abc import Callable, Iterator
from typing import Any, Literal

import torch
from torch import Tensor

from . import logprob_chunk
from .logprob_chunk import wide

Path = Literal["torch", "triton"]

# Logits that exist at once. CPU: 64 MB in fp32; fewer than 256 rows slow the products down (75 GFLOP/s with 64, 106
# with 256, 119 with 512 at V = 151,936). CUDA: 2,048 rows of V = 128,256 (512 MB in bf16) fill its units 61 times over.
CHUNK_LOGITS = {"cpu": 2**24, "cuda": 2**28}
LEAST_ROWS = 256
_TRITON = importlib.util.find_spec("triton") is not None


def chunk_of(tokens: int, words: int, device: str) -> int:
    """Tokens whose logits exist at once: equal parts, so that no small product is left over."""
    most = max(LEAST_ROWS, CHUNK_LOGITS.get(device, CHUNK_LOGITS["cpu"]) // words)
    parts = -(-max(tokens, 1) // most)
    return -(-max(tokens, 1) // (parts * 64)) * 64 if parts > 1 else max(tokens, 1)


def logits_bytes(tokens: int, words: int, dtype: torch.dtype, device: str) -> int:
    """Bytes of the chunk of logits that a call over so many tokens makes and drops."""
    kind = device.partition(":")[0]
    rows = chunk_of(tokens, words, kind)
    block = 0 if dtype.itemsize >= 4 or path_of(kind, dtype) == "triton" else logprob_chunk.BLOCK["cpu"] * 4
    return rows * words * dtype.itemsize + block


def path_of(device: str, dtype: torch.dtype) -> Path:
    """Which code walks over a chunk of logits on this kind of device: Triton's on CUDA where Triton is installed (fp64
    aside), else torch's."""
    return "triton" if device == "cuda" and dtype != torch.float64 and _TRITON else "torch"


def _walk(path: str) -> tuple[Callable[..., None], Callable[..., None]]:
    if path == "torch":
        return logprob_chunk.fold, logprob_chunk.spread
    from . import logprob_triton

    return logprob_triton.fold, logprob_triton.spread


def _chunks(tokens: int, chunk: int) -> Iterator[slice]:
    for start in range(0, tokens, chunk):
        yield slice(start, min(start + chunk, tokens))


def _forward(
    hidden: Tensor,
    head: Tensor,
    targets: Tensor,
    bias: Tensor | None,
    scale: float,
    softcap: float | None,
    chunk: int,
    gradient: bool,
    path: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """values (N,), logsumexp (N,), and the gradient of values with respect to hidden (N, H), or (0, H)."""
    fold, _ = _walk(path)
    if targets.device.type == "cpu" and len(targets) and not 0 <= int(targets.min()) <= int(targets.max()) < len(head):
        raise IndexError(f"targets from {int(targets.min())} to {int(targets.max())} of a vocabulary of {len(head)}")
    values = torch.empty(targets.shape, dtype=wide(hidden.dtype), device=hidden.device)
    lse = torch.empty_like(values)
    back = torch.empty_like(hidden) if gradient else hidden.new_empty((0, hidden.shape[1]))
    products = hidden.new_empty((min(chunk, hidden.shape[0]), head.shape[0]))
    for part in _chunks(len(targets), chunk):
        rows = products[: part.stop - part.start]
        torch.mm(hidden[part], head.t(), out=rows)
        fold(rows, hidden[part], head, targets[part], bias, scale, softcap, values[part], lse[part], gradient)
        if gradient:
            torch.mm(rows, head, out=back[part])
    return values, lse, back


def _backward(
    hidden: Tensor,
    head: Tensor,
    targets: Tensor,
    bias: Tensor | None,
    scale: float,
    softcap: float | None,
    chunk: int,
    path: str,
    lse: Tensor,
    of_target: Tensor,
    of_share: Tensor,
    wanted: list[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of hidden, head and bias, of Σ of_target · z[target] + of_share · (what has gradient softmax(z)); empty
    where not wanted. The head's is summed over chunks in fp32."""
    _, spread = _walk(path)
    dhidden = torch.empty_like(hidden) if wanted[0] else hidden.new_empty(0)
    dhead = torch.zeros_like(head, dtype=lse.dtype) if wanted[1] else head.new_empty(0)
    dbias = torch.zeros_like(bias, dtype=lse.dtype) if wanted[2] and bias is not None else head.new_empty(0)
    products = hidden.new_empty((min(chunk, hidden.shape[0]), head.shape[0]))
    for part in _chunks(len(targets), chunk):
        rows = products[: part.stop - part.start]
        torch.mm(hidden[part], head.t(), out=rows)
        weights = of_target[part], of_share[part]
        spread(rows, hidden[part], head, targets[part], bias, scale, softcap, lse[part], *weights)
        if wanted[0]:
            torch.mm(rows, head, out=dhidden[part])
        if wanted[1]:
            _add_product(dhead, rows, hidden[part])
        if wanted[2]:
            dbias += rows.sum(dim=0, dtype=lse.dtype)
    narrow = dhead.to(head.dtype), dbias.to(head.dtype if bias is None else bias.dtype)
    return dhidden, *narrow


def _add_product(total: Tensor, rows: Tensor, hidden: Tensor) -> None:
    """total (V, H) += rowsᵀ (V, C) hidden (C, H). In half precision on CUDA the product comes in fp32, a slice of the
    vocabulary at a time; a CPU rounds it to the dtype of its factors."""
    if total.dtype == rows.dtype:
        total.addmm_(rows.t(), hidden)
    elif rows.is_cuda:
        for words in _chunks(len(total), 2**15):
            total[words] += torch.mm(rows[:, words].t(), hidden, out_dtype=torch.float32)
    else:
        total += rows.t() @ hidden


_logprob = torch.library.custom_op("gristmill::logprob", _forward, mutates_args=())


@_logprob.register_fake
def _(
    hidden: Tensor,
    head: Tensor,
    targets: Tensor,
    bias: Tensor | None,
    scale: float,
    softcap: float | None,
    chunk: int,
    gradient: bool,
    path: str,
) -> tuple[Tensor, Tensor, Tensor]:
    values = hidden.new_empty(targets.shape, dtype=wide(hidden.dtype))
    rows = hidden.shape[0] if gradient else 0
    return values, torch.empty_like(values), hidden.new_empty((rows, hidden.shape[1]))


_logprob_backward = torch.library.custom_op("gristmill::logprob_backward", _backward, mutates_args=())


@_logprob_backward.register_fake
def _(
    hidden: Tensor,
    head: Tensor,
    targets: Tensor,
    bias: Tensor | None,
    scale: float,
    softcap: float | None,
    chunk: int,
    path: str,
    lse: Tensor,
    of_target: Tensor,
    of_share: Tensor,
    wanted: list[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    return (
        torch.empty_like(hidden) if wanted[0] else hidden.new_empty(0),
        torch.empty_like(head) if wanted[1] else head.new_empty(0),
        head.new_empty(0) if bias is None or not wanted[2] else torch.empty_like(bias),
    )


@torch.library.custom_op("gristmill::logprob_scaled", mutates_args=())
def _logprob_scaled(
    gradient: Tensor,
    head: Tensor,
    targets: Tensor,
    scale: float,
    softcap: float | None,
    picked: Tensor,
    of_values: Tensor | None,
    of_lse: Tensor | None,
) -> Tensor:
    """The gradient of hidden where the head is frozen. Of the log-sum it is the target's row of the head (by the slope
    of its logit `picked`) less the gradient of the value."""
    if of_lse is None:
        assert of_values is not None
        return (gradient * of_values[:, None]).to(gradient.dtype)
    weight = -of_lse if of_values is None else of_values - of_lse
    slope = scale if softcap is None else (1 - (picked / softcap).square()) * scale
    return (gradient * weight[:, None] + head[targets] * (slope * of_lse)[:, None]).to(gradient.dtype)


@_logprob_scaled.register_fake
def _(
    gradient: Tensor,
    head: Tensor,
    targets: Tensor,
    scale: float,
    softcap: float | None,
    picked: Tensor,
    of_values: Tensor | None,
    of_lse: Tensor | None,
) -> Tensor:
    return torch.empty_like(gradient)


def _remember(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    hidden, head, targets, bias, scale, softcap, chunk, gradient, path = inputs
    values, lse, back = output
    ctx.mark_non_differentiable(back)
    ctx.set_materialize_grads(False)
    ctx.scale, ctx.softcap, ctx.chunk, ctx.complete, ctx.path = scale, softcap, chunk, gradient, path
    if gradient:
        ctx.save_for_backward(head, targets, values, lse, back)
    else:
        ctx.save_for_backward(hidden, head, targets, bias, lse)


def _learn(ctx: Any, of_values: Tensor | None, of_lse: Tensor | None, _: Tensor | None) -> tuple[Tensor | None, ...]:
    nothing = (None,) * 5
    if of_values is None and of_lse is None:
        return None, None, None, None, *nothing
    if ctx.complete:
        head, targets, values, lse, back = ctx.saved_tensors
        dhidden = _logprob_scaled(
            back, head, targets, ctx.scale, ctx.softcap, values + lse, of_values, of_lse
        )  # fmt: skip
        return dhidden, None, None, None, *nothing
    hidden, head, targets, bias, lse = ctx.saved_tensors
    of_target = torch.zeros_like(lse) if of_values is None else of_values.contiguous()
    of_share = -of_target if of_lse is None else of_lse - of_target
    wanted = [ctx.needs_input_grad[0], ctx.needs_input_grad[1], ctx.needs_input_grad[3]]
    found = _logprob_backward(
        hidden, head, targets, bias, ctx.scale, ctx.softcap, ctx.chunk, ctx.path, lse, of_target, of_share, wanted
    )
    dhidden, dhead, dbias = (one if asked else None for one, asked in zip(found, wanted, strict=True))
    return dhidden, dhead, None, dbias, *nothing


_logprob.register_autograd(_learn, setup_context=_remember)


def target_logprobs(
    hidden: Tensor,
    head: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    scale: float = 1.0,
    softcap: float | None = None,
    chunk_tokens: int | None = None,
    path: Path | None = None,
) -> Tensor:
    """log softmax(logits)[targets], fp32 (N,) (fp64 of fp64 input); logits = cap(scale · (hidden headᵀ + bias)), with
    cap(x) = softcap · tanh(x / softcap).

    hidden (N, H): only the states whose next token counts: leave masked tokens out before the call. head (V, H), of
    hidden's dtype. targets (N,): int64. scale: of all logits (Cohere's logit_scale, one over Granite's logits_scaling).
    softcap: Gemma 2's final_logit_softcapping. chunk_tokens: tokens whose logits exist at once (default: by
    CHUNK_LOGITS). path: which code walks over the logits (default: as path_of says).

    Gradients go to hidden, and to head and bias where they require one; second derivatives are refused by torch. NaN in
    a hidden state is NaN in its value and no other. ValueError where shapes or dtypes do not fit; IndexError where a
    target is outside the vocabulary (on CUDA its value is NaN, for want of a synchronisation).
    """
    return target_logprobs_lse(
        hidden, head, targets, bias=bias, scale=scale, softcap=softcap, chunk_tokens=chunk_tokens, path=path
    )[0]


def target_logprobs_lse(
    hidden: Tensor,
    head: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    scale: float = 1.0,
    softcap: float | None = None,
    chunk_tokens: int | None = None,
    path: Path | None = None,
) -> tuple[Tensor, Tensor]:
    """`target_logprobs` and the log-sum of exponentials of the logits, (N,) each, both with gradients: a z-loss is
    lse² (arXiv 2204.02311)."""
    _check(hidden, head, targets, softcap, chunk_tokens)
    kind = hidden.device.type
    learnt = head.requires_grad or (bias is not None and bias.requires_grad)
    complete = torch.is_grad_enabled() and hidden.requires_grad and not learnt
    values, lse, _ = _logprob(
        hidden.contiguous(),
        head.contiguous(),
        targets.contiguous(),
        bias,
        float(scale),
        softcap,
        chunk_tokens or chunk_of(hidden.shape[0], head.shape[0], kind),
        complete,
        path or path_of(kind, hidden.dtype),
    )
    return values, lse


def _check(hidden: Tensor, head: Tensor, targets: Tensor, softcap: float | None, chunk_tokens: int | None) -> None:
    if hidden.ndim != 2 or head.ndim != 2 or hidden.shape[1] != head.shape[1] or targets.shape != hidden.shape[:1]:
        raise ValueError(
            f"hidden {tuple(hidden.shape)}, head {tuple(head.shape)} and targets {tuple(targets.shape)} do not fit: "
            "want (N, H), (V, H), (N,)"
        )
    if hidden.dtype != head.dtype:
        raise ValueError(f"hidden is {hidden.dtype} and head {head.dtype}: cast one of them")
    if chunk_tokens is not None and chunk_tokens < 1:
        raise ValueError(f"chunk_tokens must be at least 1, not {chunk_tokens}")
    if softcap is not None and softcap <= 0:
        raise ValueError(f"softcap must be positive, not {softcap}; None: no cap")


def naive_target_logprobs(
    hidden: Tensor,
    head: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    scale: float = 1.0,
    softcap: float | None = None,
) -> Tensor:
    """The definition with the whole logits matrix: the oracle of `target_logprobs`."""
    logits = hidden @ head.t()
    logits = logits if logits.dtype == torch.float64 else logits.float()
    if bias is not None:
        logits = logits + bias
    logits = logits * scale
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    return torch.log_softmax(logits, dim=1).gather(1, targets[:, None])[:, 0]
