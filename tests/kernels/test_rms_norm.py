"""The root mean square norm against transformers' own modules: forward bit for bit on a CPU, gradients by fp64."""

import math

import pytest
import torch
from torch import Tensor, nn
from transformers.models.gemma.modeling_gemma import GemmaRMSNorm
from transformers.models.helium.modeling_helium import HeliumRMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.models.olmo2.modeling_olmo2 import Olmo2RMSNorm

from gristmill.kernels import rms_norm as module
from gristmill.kernels import rows as rows_module
from gristmill.kernels.rms_norm import FORMS, Form, naive_rms_norm, rms_norm

EPS = 1e-5
PEERS: list[tuple[Form, type[nn.Module]]] = [
    ("rounded", LlamaRMSNorm), ("plain", Olmo2RMSNorm), ("plain", HeliumRMSNorm), ("shifted", GemmaRMSNorm),
]  # fmt: skip
SHAPES = ((1, 1), (7, 42), (33, 257), (2, 5, 3, 16), (0, 8))


@pytest.fixture(autouse=True)
def _however_small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "LEAST", 0)


def drawn(shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    """x, weight and a gradient of y."""
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(shape, generator=generator) * 3
    weight = 1 + torch.randn(shape[-1], generator=generator)
    return x.to(dtype), weight.to(dtype), torch.randn(shape, generator=generator).to(dtype)


def exact(x: Tensor, weight: Tensor, dy: Tensor, form: Form) -> list[Tensor]:
    """y and the gradients of x and weight in fp64, written down again: no rounding, no fp32."""
    x, weight = x.double().requires_grad_(), weight.double().requires_grad_()
    hat = x / torch.sqrt((x * x).mean(-1, keepdim=True) + EPS)
    y = hat * (weight + 1 if form == "shifted" else weight)
    return [y.detach(), *torch.autograd.grad(y, (x, weight), dy.double())]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("form", "peer"), PEERS)
def test_forward_is_that_of_transformers_bit_for_bit(
    form: Form, peer: type[nn.Module], dtype: torch.dtype, shape: tuple[int, ...]
) -> None:
    x, weight, _ = drawn(shape, dtype)
    norm = peer(shape[-1], eps=EPS).to(dtype)
    with torch.no_grad():
        norm.weight.copy_(weight)
        theirs = norm(x)
    for learning in (False, True):
        ours = rms_norm(x.clone().requires_grad_(learning), weight, EPS, form)
        assert ours.dtype == theirs.dtype and torch.equal(ours, theirs)
    assert torch.equal(naive_rms_norm(x, weight, EPS, form), theirs)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("form", FORMS)
def test_gradients_are_as_good_as_autograds(form: Form, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    """Error against fp64 at most twice that of the definition by autograd in the same dtype."""
    x, weight, dy = drawn(shape, dtype)
    right = exact(x, weight, dy, form)[1:]
    found = []
    for run in (rms_norm, naive_rms_norm):
        leaves = (x.clone().requires_grad_(), weight.clone().requires_grad_())
        found.append(torch.autograd.grad(run(*leaves, EPS, form), leaves, dy))
    for mine, theirs, true in zip(*found, right, strict=True):
        assert mine.dtype == dtype and mine.isfinite().all()
        if mine.numel():
            error, accepted = ((one.double() - true).abs().max() for one in (mine, theirs))
            assert error <= 2 * accepted + 1e-6 * max(1.0, float(true.abs().max()))


def test_a_swapped_form_is_seen() -> None:
    x, weight, dy = drawn((7, 42))
    leaves = (x.requires_grad_(), weight)
    found = {form: torch.autograd.grad(rms_norm(*leaves, EPS, form), x, dy)[0] for form in FORMS}
    assert (found["shifted"] - found["plain"]).abs().max() > 0.1
    assert torch.equal(found["rounded"], found["plain"])  # in fp32 there is nothing to round


@pytest.mark.parametrize("form", FORMS)
def test_opcheck(form: Form) -> None:
    x, weight, dy = drawn((5, 12))
    torch.library.opcheck(module._rms_norm, (x.requires_grad_(), weight.requires_grad_(), EPS, form))
    inverse = module._forward(x.detach(), weight.detach(), EPS, form)[1]
    for want in ([1, 1], [1, 0], [0, 1]):
        inputs = (dy, x.detach(), weight.detach(), inverse, form, want)
        torch.library.opcheck(module._rms_norm_backward, inputs, test_utils=("test_schema", "test_faketensor"))


@pytest.mark.parametrize("learns", [(True, False), (False, True)])
def test_only_what_learns_gets_a_gradient(learns: tuple[bool, bool]) -> None:
    x, weight, dy = drawn((6, 10))
    leaves = [one.requires_grad_(wanted) for one, wanted in zip((x, weight), learns, strict=True)]
    rms_norm(*leaves, EPS, "rounded").backward(dy)
    right = exact(x.detach(), weight.detach(), dy, "rounded")[1:]
    for one, wanted, true in zip(leaves, learns, right, strict=True):
        assert (one.grad is not None) == wanted
        if one.grad is not None:
            torch.testing.assert_close(one.grad.double(), true, rtol=1e-5, atol=1e-5)


def test_strided_input() -> None:
    x, weight, dy = drawn((12, 9, 16))
    turned = x.transpose(0, 1).requires_grad_()
    right = exact(x.transpose(0, 1), weight, dy.transpose(0, 1), "plain")
    y = rms_norm(turned, weight, EPS, "plain")
    torch.testing.assert_close(y.double(), right[0], rtol=1e-5, atol=1e-6)
    (dx,) = torch.autograd.grad(y, turned, dy.transpose(0, 1))
    torch.testing.assert_close(dx.double(), right[1], rtol=1e-5, atol=1e-5)


def test_pieces_of_rows_are_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    x, weight, dy = drawn((50, 8))
    results = []
    for size in (1 << 18, 3 * 8 * 4):
        monkeypatch.setattr(rows_module, "BYTES", size)
        leaves = (x.clone().requires_grad_(), weight.clone().requires_grad_())
        y = rms_norm(*leaves, EPS, "rounded")
        results.append([y.detach(), *torch.autograd.grad(y, leaves, dy)])
    assert torch.equal(results[0][0], results[1][0]) and torch.equal(results[0][1], results[1][1])
    torch.testing.assert_close(results[0][2], results[1][2])  # another order of summing


def test_mixed_dtypes_come_out_as_in_transformers() -> None:
    """An fp32 weight on bf16 rows, as under autocast."""
    x, _, dy = drawn((4, 24), torch.bfloat16)
    weight = drawn((4, 24))[1]
    for form in FORMS:
        leaf = x.clone().requires_grad_()
        y = rms_norm(leaf, weight, EPS, form)
        theirs = naive_rms_norm(x, weight, EPS, form)
        assert y.dtype == theirs.dtype and torch.equal(y, theirs)
        y.backward(dy.to(y.dtype))
        assert leaf.grad is not None and leaf.grad.dtype == torch.bfloat16


def test_what_is_kept_for_the_backward_is_the_input_and_a_number_a_row() -> None:
    x, weight, _ = drawn((64, 32), torch.bfloat16)
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda one: kept.append(one) or one, lambda one: one):
        rms_norm(x.requires_grad_(), weight, EPS, "plain")
    assert sum(one.nbytes for one in kept) == x.nbytes + weight.nbytes + 4 * 64


def test_rows_of_zeros_and_of_huge_numbers() -> None:
    weight = torch.ones(8)
    zeros = torch.zeros(3, 8, requires_grad=True)
    (dx,) = torch.autograd.grad(rms_norm(zeros, weight, EPS, "plain").sum(), zeros)
    torch.testing.assert_close(dx, torch.full((3, 8), 1 / math.sqrt(EPS)))
    huge = torch.full((2, 8), 1e18)
    torch.testing.assert_close(rms_norm(huge, weight, EPS, "plain"), torch.ones(2, 8))


def test_what_fits_the_cache_takes_the_definition(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    small, weight, _ = drawn((512, 192))
    large, _, dy = drawn((4096, 192))
    assert (module.path_of(small), module.path_of(large)) == ("naive", "rows")
    assert torch.equal(rms_norm(small, weight, EPS, "plain"), naive_rms_norm(small, weight, EPS, "plain"))
    leaf = large.requires_grad_()
    (dx,) = torch.autograd.grad(rms_norm(leaf, weight, EPS, "plain"), leaf, dy)
    (theirs,) = torch.autograd.grad(naive_rms_norm(leaf, weight, EPS, "plain"), leaf, dy)
    torch.testing.assert_close(dx, theirs)


def test_refusals() -> None:
    x, weight, _ = drawn((4, 24))
    with pytest.raises(ValueError, match="none of rounded, plain, shifted"):
        rms_norm(x, weight, EPS, "other")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="rows of 24 numbers"):
        rms_norm(x, weight[:-1], EPS, "plain")
