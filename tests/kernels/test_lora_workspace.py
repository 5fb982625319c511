"""How often a frozen weight is made plain: once in forward, once in backward, activation checkpointing or not; and that
what a recomputation leaves behind is never taken for another weight."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from gristmill.kernels import workspace
from gristmill.kernels.lora_linear import Projection, lora_group, lora_linear
from gristmill.kernels.lora_mlp import lora_mlp
from gristmill.kernels.nf4 import NF4, dequantise, quantise


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Grows by the address of each base that is dequantised."""
    seen: list[int] = []
    dequantise = workspace.dequantise

    def counted(q: NF4, *rest: Any, **named: Any) -> Tensor:
        seen.append(q.packed.data_ptr())
        return dequantise(q, *rest, **named)

    monkeypatch.setattr(workspace, "dequantise", counted)
    return seen


def layer(seed: int, out: int = 16, width: int = 16) -> tuple[NF4, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    a, b = torch.randn(2, width, generator=generator), torch.randn(out, 2, generator=generator)
    return quantise(torch.randn(out, width, generator=generator)), a.requires_grad_(), b.requires_grad_()


class Block:
    """q and k of a group, then a gated MLP: five NF4 weights."""

    def __init__(self, seed: int) -> None:
        shapes = ((16, 16), (16, 16), (24, 16), (24, 16), (16, 24))
        self.layers = [layer(10 * seed + index, *shape) for index, shape in enumerate(shapes)]
        self.leaves = [leaf for _, a, b in self.layers for leaf in (a, b)]

    def __call__(self, x: Tensor) -> Tensor:
        projections = [Projection(base, a, b, 0.5) for base, a, b in self.layers]
        q, k = lora_group(x, projections[:2])
        return x + lora_mlp(torch.tanh(q * k), *projections[2:], "silu")


def gradients(blocks: list[Block], how: str) -> list[Tensor]:
    x = torch.randn(7, 16, generator=torch.Generator().manual_seed(0)).requires_grad_()
    y = x
    for block in blocks:
        y = block(y) if how == "plain" else checkpoint(block, y, use_reentrant=how == "reentrant")
    leaves = [x, *(leaf for block in blocks for leaf in block.leaves)]
    y.square().sum().backward()  # reentrant checkpointing knows no torch.autograd.grad
    found = []
    for leaf in leaves:
        assert leaf.grad is not None
        found.append(leaf.grad)
        leaf.grad = None
    return found


@pytest.mark.parametrize("how", ["plain", "checkpoint", "reentrant"])
def test_each_weight_is_made_twice_a_step(how: str, made: list[int]) -> None:
    blocks = [Block(1), Block(2)]
    right = gradients(blocks, "plain")
    made.clear()
    ours = gradients(blocks, how)
    assert len(made) == 2 * 10 and {made.count(address) for address in made} == {2}
    assert all(torch.equal(one, other) for one, other in zip(ours, right, strict=True))
    assert not workspace._local.buffers.kept and not workspace._local.buffers.free


def test_a_recomputed_weight_whose_backward_never_comes_is_dropped(made: list[int]) -> None:
    """x needs no gradient: dX is not computed, and the pass ends with nothing kept."""
    base, a, b = layer(1)
    x = torch.randn(7, 16)
    checkpoint(lambda x, a: lora_linear(x, base, a, b, 1.0), x, a, use_reentrant=False).sum().backward()
    assert len(made) == 2 and not workspace._local.buffers.kept


def test_what_is_kept_serves_its_own_weight_alone(made: list[int]) -> None:
    """Inside a backward pass: another weight, or another dtype, is made anew."""
    (one, _, _), (two, _, _) = layer(1), layer(2)

    class Probe(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx: Any, *grads: Tensor) -> Tensor:
            kept = workspace.forward_weight(one, torch.float32).clone()
            assert torch.equal(workspace.backward_weight(two, torch.float32), dequantise(two, torch.float32))
            assert torch.equal(workspace.backward_weight(one, torch.bfloat16), dequantise(one, torch.bfloat16))
            assert len(made) == 3
            assert torch.equal(workspace.backward_weight(one, torch.float32), kept) and len(made) == 3
            assert torch.equal(workspace.backward_weight(one, torch.float32), kept) and len(made) == 4
            return grads[0]

    Probe.apply(torch.ones(1, requires_grad=True)).backward()  # type: ignore[no-untyped-call]


def test_buffers_of_recomputation_are_reused_across_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ten blocks in one backward pass need no more buffers than one."""
    sizes: list[int] = []
    empty = workspace._empty

    def counted(n: int, dtype: torch.dtype, device: torch.device) -> Tensor:
        sizes.append(n)
        return empty(n, dtype, device)

    monkeypatch.setattr(workspace, "_empty", counted)
    gradients([Block(1)], "checkpoint")
    sizes.clear()
    gradients([Block(seed) for seed in range(10)], "checkpoint")
    assert len(sizes) <= 5
