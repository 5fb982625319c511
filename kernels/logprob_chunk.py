"""What happens to a chunk of logits between two matrix products, in plain torch: the path of CPUs, and the meaning of
the kernels in logprob_triton.py.

`products` (C, V) holds hidden headᵀ of C tokens, in their dtype. The logits are z = cap(scale · (products + bias)),
cap(x) = softcap · tanh(x / softcap) where a softcap is given (Gemma 2, arXiv 2408.00118). Both functions leave in
`products` the gradient with respect to what was there, so that one more product ends the backward.

In bf16 and fp16 the target's own logit is computed again in fp32 (2H FLOP): the log-sum averages the rounding of many
products, but the target's enters log p alone.
"""

import torch
from torch import Tensor

BLOCK = {"cpu": 2**18, "cuda": 2**26}  # fp32 logits at work at once, a thread: 1 MB, so that six passes stay in cache


def wide(dtype: torch.dtype) -> torch.dtype:
    """The dtype of logits and of values: fp32, or fp64 of fp64."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def _rows(products: Tensor) -> int:
    kind = products.device.type
    threads = torch.get_num_threads() if kind == "cpu" else 1
    return max(1, BLOCK.get(kind, BLOCK["cpu"]) * threads // products.shape[1])


class _Logits:
    """fp32 (or fp64) logits of some rows after others, in one buffer; `slope` is d logits / d products."""

    def __init__(
        self,
        products: Tensor,
        hidden: Tensor,
        head: Tensor,
        targets: Tensor,
        bias: Tensor | None,
        scale: float,
        softcap: float | None,
    ) -> None:
        self.products, self.hidden, self.head, self.targets = products, hidden, head, targets
        self.bias, self.scale, self.softcap = bias, scale, softcap
        self.rows = min(_rows(products), products.shape[0])
        self.half = products.dtype != wide(products.dtype)
        self.buffer = products.new_empty((self.rows if self.half else 0, products.shape[1]), dtype=wide(products.dtype))
        self.slope: Tensor | float = scale

    def parts(self) -> list[slice]:
        count = self.products.shape[0]
        return [slice(start, min(start + self.rows, count)) for start in range(0, count, self.rows)]

    def of(self, part: slice) -> Tensor:
        z = self.products[part]
        places = self.targets[part, None]
        if self.half:
            z = self.buffer[: z.shape[0]].copy_(z)
            exact = (self.hidden[part].float() * self.head[places[:, 0]].float()).sum(dim=1, keepdim=True)
            z.scatter_(1, places, exact)
        if self.bias is not None:
            z.add_(self.bias)
        if self.scale != 1.0:
            z.mul_(self.scale)
        if self.softcap is not None:
            bent = z.div_(self.softcap).tanh_()
            self.slope = bent.square().neg_().add_(1.0).mul_(self.scale)
            z.mul_(self.softcap)
        return z

    def keep(self, part: slice, gradient: Tensor) -> None:
        """Writes the gradient with respect to these rows' logits as one with respect to their products."""
        if isinstance(self.slope, Tensor) or self.slope != 1.0:
            gradient.mul_(self.slope)
        if self.half:
            self.products[part].copy_(gradient)


def fold(
    products: Tensor,
    hidden: Tensor,
    head: Tensor,
    targets: Tensor,
    bias: Tensor | None,
    scale: float,
    softcap: float | None,
    values: Tensor,
    lse: Tensor,
    write: bool,
) -> None:
    """values (C,) <- log softmax(z)[targets], lse (C,) <- logsumexp(z); where `write`, products <- the gradient of
    `values` with respect to them, else they are left in any state."""
    logits = _Logits(products, hidden, head, targets, bias, scale, softcap)
    for part in logits.parts():
        z, places = logits.of(part), targets[part, None]
        picked = z.gather(1, places)
        highest = z.amax(dim=1, keepdim=True)
        share = z.sub_(highest).exp_()
        mass = share.sum(dim=1, keepdim=True)
        total = highest + mass.log()
        values[part], lse[part] = (picked - total)[:, 0], total[:, 0]
        if write:
            share.mul_(mass.reciprocal_().neg_()).scatter_add_(1, places, torch.ones_like(mass))
            logits.keep(part, share)


def spread(
    products: Tensor,
    hidden: Tensor,
    head: Tensor,
    targets: Tensor,
    bias: Tensor | None,
    scale: float,
    softcap: float | None,
    lse: Tensor,
    of_target: Tensor,
    of_share: Tensor,
) -> None:
    """products <- the gradient with respect to them whose part by the logits is of_target · onehot(targets) +
    of_share · softmax(z); of_target, of_share: (C,)."""
    logits = _Logits(products, hidden, head, targets, bias, scale, softcap)
    for part in logits.parts():
        share = logits.of(part).sub_(lse[part, None]).exp_().mul_(of_share[part, None])
        share.scatter_add_(1, targets[part, None], of_target[part, None])
        logits.keep(part, share)
