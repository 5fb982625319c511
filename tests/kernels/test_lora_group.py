"""Groups of LoRA layers and the fused MLP against their definitions: values, every gradient, odd shapes, dropout,
biases, mixed ranks, NF4, half precision; and torch's own checks of custom operators."""

from typing import Any

import pytest
import torch
from torch import Tensor

from gristmill.kernels import glu as glu_module
from gristmill.kernels import lora_linear as linear_module
from gristmill.kernels import lora_mlp as mlp_module
from gristmill.kernels import rows as rows_module
from gristmill.kernels.lora_linear import Projection, lora_group, naive_lora_linear
from gristmill.kernels.lora_mlp import lora_mlp, naive_lora_mlp
from gristmill.kernels.nf4 import dequantise, quantise

SCALES = (1.7, 0.5, 2.0)
# leading sides of x, width, outputs of the three layers, their ranks
GROUPS = [((7,), 42, (123, 5, 64), (5, 1, 3)), ((2, 3), 33, (17, 8, 8), (4, 4, 4)), ((1, 1), 8, (8, 8, 8), (8, 8, 8))]
ACTS = ("silu", "gelu_tanh", "gelu")


class Values:
    """Three layers on numbers that only the seed decides; in order "a0 a1 a2 b0 b1 b2" after x, biases last."""

    def __init__(
        self, lead: tuple[int, ...], width: int, outs: tuple[int, ...], ranks: tuple[int, ...], dtype: torch.dtype,
        *, bias: bool = True, widths: tuple[int, ...] | None = None,
    ) -> None:  # fmt: skip
        generator = torch.Generator().manual_seed(3)

        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)

        ins = widths or (width,) * len(outs)
        self.x = normal(*lead, width).requires_grad_()
        self.weights = [normal(out, wide) / wide**0.5 for out, wide in zip(outs, ins, strict=True)]
        self.a = [(normal(rank, wide) / wide**0.5).requires_grad_() for rank, wide in zip(ranks, ins, strict=True)]
        self.b = [normal(out, rank).requires_grad_() for out, rank in zip(outs, ranks, strict=True)]
        self.bias = [normal(out).requires_grad_() if bias else None for out in outs]
        self.keep = torch.rand(*lead, width, generator=generator) < 0.7
        self.keep_h = torch.rand(*lead, outs[0], generator=generator) < 0.7
        self.dys = [normal(*lead, out) for out in outs]

    @property
    def leaves(self) -> list[Tensor]:
        return [self.x, *self.a, *self.b, *(one for one in self.bias if one is not None)]

    def projections(self, bases: Any = None) -> list[Projection]:
        parts = zip(bases or self.weights, self.a, self.b, SCALES, self.bias, strict=True)
        return [Projection(*part) for part in parts]


def mlp_values(dtype: torch.dtype = torch.float32, *, bias: bool = True) -> Values:
    return Values((2, 7), 33, (42, 42, 33), (5, 1, 3), dtype, bias=bias, widths=(33, 33, 42))


def close(ours: list[Tensor], theirs: list[Tensor]) -> None:
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("dropout", [False, True], ids=["plain", "dropout"])
@pytest.mark.parametrize("bias", [False, True], ids=["nobias", "bias"])
@pytest.mark.parametrize(("lead", "width", "outs", "ranks"), GROUPS, ids=str)
def test_a_group_equals_its_layers_one_by_one(
    lead: tuple[int, ...], width: int, outs: tuple[int, ...], ranks: tuple[int, ...], bias: bool, dropout: bool
) -> None:
    v = Values(lead, width, outs, ranks, torch.float64, bias=bias)
    mask = (v.keep, 0.7) if dropout else (None, 1.0)
    ours = lora_group(v.x, v.projections(), *mask)
    naive = [
        naive_lora_linear(v.x, w, a, b, scale, one, *mask)
        for w, a, b, scale, one in zip(v.weights, v.a, v.b, SCALES, v.bias, strict=True)
    ]
    close([y.detach() for y in ours], [y.detach() for y in naive])
    close(list(torch.autograd.grad(ours, v.leaves, v.dys)), list(torch.autograd.grad(naive, v.leaves, v.dys)))


def test_an_output_that_nothing_uses_costs_no_gradient() -> None:
    v = Values((7,), 42, (123, 5, 64), (5, 1, 3), torch.float64, bias=False)
    ours = torch.autograd.grad(lora_group(v.x, v.projections())[0], [v.x, *v.a], v.dys[0])
    naive = naive_lora_linear(v.x, v.weights[0], v.a[0], v.b[0], SCALES[0])
    right = torch.autograd.grad(naive, [v.x, v.a[0]], v.dys[0])
    close(list(ours[:2]), list(right))
    assert not ours[2].any() and not ours[3].any()


@pytest.mark.parametrize("dropout", [False, True], ids=["plain", "dropout"])
@pytest.mark.parametrize("bias", [False, True], ids=["nobias", "bias"])
@pytest.mark.parametrize("act", ACTS)
def test_mlp_equals_the_definition(act: str, bias: bool, dropout: bool) -> None:
    v = mlp_values(torch.float64, bias=bias)
    masks = (v.keep, v.keep_h, 0.7) if dropout else (None, None, 1.0)
    ours = lora_mlp(v.x, *v.projections(), act, *masks)
    naive = naive_lora_mlp(v.x, v.weights, v.a, v.b, SCALES, act, v.bias, *masks)
    close([ours.detach()], [naive.detach()])
    close(list(torch.autograd.grad(ours, v.leaves, v.dys[2])), list(torch.autograd.grad(naive, v.leaves, v.dys[2])))


@pytest.mark.parametrize("which", ["group", *ACTS])
def test_gradcheck(which: str) -> None:
    """In fp64, every gradient against finite differences."""
    if which == "group":
        v = Values((2, 2), 4, (5, 3, 2), (2, 1, 2), torch.float64)
    else:
        v = Values((2, 2), 3, (4, 4, 3), (2, 1, 2), torch.float64, widths=(3, 3, 4))

    def run(x: Tensor, *rest: Tensor) -> Any:
        parts = zip(v.weights, rest[:3], rest[3:6], SCALES, rest[6:], strict=True)
        projections = [Projection(*part) for part in parts]
        if which == "group":
            return lora_group(x, projections, v.keep, 0.7)
        return lora_mlp(x, *projections, which, v.keep, v.keep_h, 0.7)

    assert torch.autograd.gradcheck(run, tuple(v.leaves))


@pytest.mark.parametrize("double", [False, True], ids=["single", "double"])
@pytest.mark.parametrize("which", ["group", "mlp"])
def test_nf4_bases_are_their_dequantised_weights(which: str, double: bool) -> None:
    v = mlp_values() if which == "mlp" else Values((3, 7), 42, (123, 5, 64), (5, 1, 3), torch.float32)
    packed = [quantise(weight, double=double) for weight in v.weights]

    def run(bases: Any) -> list[Tensor]:
        if which == "mlp":
            y = lora_mlp(v.x, *v.projections(bases), "silu")
            return [y.detach(), *torch.autograd.grad(y, v.leaves, v.dys[2])]
        ys = lora_group(v.x, v.projections(bases))
        return [*(y.detach() for y in ys), *torch.autograd.grad(ys, v.leaves, v.dys)]

    ours, plain = run(packed), run([dequantise(q) for q in packed])
    assert all(torch.equal(one, other) for one, other in zip(ours, plain, strict=True))


@pytest.mark.parametrize("which", ["group", "mlp"])
def test_half_precision_errs_no_more_than_plain_torch(which: str) -> None:
    """bf16 input and bases, fp32 a and b: error against fp64 at most 3 times that of plain torch in bf16."""
    shape = ((64,), 96, (80, 80, 96), (8, 8, 8))
    v = Values(*shape, torch.float64, bias=False, widths=(96, 96, 80) if which == "mlp" else None)
    x, weights = v.x.detach().bfloat16(), [w.bfloat16() for w in v.weights]
    dys = [dy.bfloat16() for dy in v.dys]

    def run(fused: bool, dtype: torch.dtype, master: torch.dtype) -> list[Tensor]:
        leaf = x.to(dtype).requires_grad_()
        a, b = ([m.detach().float().to(master).requires_grad_() for m in group] for group in (v.a, v.b))
        bases = [w.to(dtype) for w in weights]
        projections = [Projection(*part) for part in zip(bases, a, b, SCALES, strict=True)]
        if which == "mlp":
            one = lora_mlp(leaf, *projections, "silu") if fused else naive_lora_mlp(leaf, bases, a, b, SCALES, "silu")
            ys, ends = [one], [dys[2].to(dtype)]
        else:
            naive = [naive_lora_linear(leaf, *part) for part in zip(bases, a, b, SCALES, strict=True)]
            ys, ends = list(lora_group(leaf, projections)) if fused else naive, [dy.to(dtype) for dy in dys]
        grads = torch.autograd.grad(ys, [leaf, *a, *b], ends)
        assert [grad.dtype for grad in grads] == [dtype, *[master] * 6]
        return [tensor.detach().double() for tensor in (*ys, *grads)]

    truth = run(False, torch.float64, torch.float64)
    plain = run(False, torch.bfloat16, torch.float32)
    ours = run(True, torch.bfloat16, torch.float32)
    for place, (mine, theirs, right) in enumerate(zip(ours, plain, truth, strict=True)):
        assert (mine - right).abs().max() <= 3 * (theirs - right).abs().max() + 1e-5, place


def test_torch_checks_the_operators() -> None:
    """opcheck: schema, fake tensors, autograd registration, AOT dispatch; all over NF4, with dropout and bias."""
    v = mlp_values()
    of = linear_module.flat(v.projections([quantise(weight) for weight in v.weights]))
    gate_up = linear_module.flat(v.projections([quantise(weight) for weight in v.weights])[:2])
    x = v.x.detach().reshape(-1, 33).requires_grad_()
    masks = [mask.reshape(-1, mask.shape[-1]) for mask in (v.keep, v.keep_h)]
    for mask in (None, masks[0]):
        arguments = (
            x, gate_up.base, gate_up.layout, gate_up.a, gate_up.b, gate_up.scales, gate_up.bias, gate_up.biased,
            mask, 0.7,
        )  # fmt: skip
        torch.library.opcheck(linear_module._lora, arguments)
    torch.library.opcheck(
        mlp_module._lora_mlp,
        (x, of.base, of.layout, of.a, of.b, of.scales, of.bias, of.biased, *masks, 0.7, "silu"),
    )


@pytest.mark.parametrize("act", ACTS)
def test_gated_product_by_rows_is_the_whole(act: str, monkeypatch: pytest.MonkeyPatch) -> None:
    gate, up, dh = (torch.randn(13, 42, dtype=torch.float64) for _ in range(3))
    whole = glu_module.glu_backward(dh.clone(), gate, up, act)
    monkeypatch.setattr(rows_module, "BYTES", 42 * 8 * 3)
    rows = glu_module.glu_backward(dh.clone(), gate, up, act)
    close(list(whole), list(rows))
    assert torch.equal(rows[0], glu_module.glu(gate, up, act))
    assert glu_module.path_of(gate, act) == "torch"


def test_activations_are_known_by_what_they_compute() -> None:
    named = {"silu": torch.nn.SiLU(), "gelu": torch.nn.GELU(), "gelu_tanh": torch.nn.GELU(approximate="tanh")}
    assert {name: glu_module.activation_of(act) for name, act in named.items()} == {name: name for name in named}
    assert glu_module.activation_of(torch.nn.ReLU()) is None


def test_what_does_not_fit_says_so() -> None:
    v = mlp_values()
    gate, up, down = v.projections()
    with pytest.raises(ValueError, match="of all layers of a group or of none"):
        lora_group(v.x, [gate, Projection(v.weights[1])])
    with pytest.raises(ValueError, match="'relu' is none of"):
        lora_mlp(v.x, gate, up, down, "relu")
    with pytest.raises(ValueError, match="must all be adapted"):
        lora_mlp(v.x, gate, up, Projection(v.weights[2]), "silu")
    with pytest.raises(ValueError, match="do not fit"):
        lora_mlp(v.x, gate, up, gate, "silu")
    with pytest.raises(ValueError, match="keep"):
        lora_mlp(v.x, gate, up, down, "silu", None, v.keep[:1], 0.7)
