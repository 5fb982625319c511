"""The LoRA linear operation against its definition: values, every gradient, dropout, NF4, half precision, threads."""

import threading
from typing import Any

import pytest
import torch
from torch import Tensor

from gristmill.kernels.lora_linear import frozen_linear, lora_linear, naive_lora_linear, plain_weight
from gristmill.kernels.nf4 import NF4, dequantise, quantise

SCALE = 1.7
SHAPES = [((7,), 42, 123, 5), ((2, 7), 64, 48, 1), ((2, 3, 5), 33, 17, 16), ((1, 1), 8, 8, 8)]


def drawn(
    lead: tuple[int, ...], width: int, out: int, rank: int, *, dtype: torch.dtype = torch.float32, bias: bool = True
) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(1)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)

    return {
        "x": normal(*lead, width).requires_grad_(),
        "weight": normal(out, width) / width**0.5,
        "a": (normal(rank, width) / width**0.5).requires_grad_(),
        "b": normal(out, rank).requires_grad_(),
        "bias": normal(out).requires_grad_() if bias else None,
        "keep": torch.rand(*lead, width, generator=generator) < 0.7,
        "dy": normal(*lead, out),
    }


def grads(y: Tensor, dy: Tensor, leaves: list[Tensor]) -> list[Tensor]:
    return [y.detach(), *torch.autograd.grad(y, leaves, dy)]


@pytest.mark.parametrize("dropout", [False, True], ids=["plain", "dropout"])
@pytest.mark.parametrize("bias", [False, True], ids=["nobias", "bias"])
@pytest.mark.parametrize(("lead", "width", "out", "rank"), SHAPES, ids=str)
def test_equals_the_definition(
    lead: tuple[int, ...], width: int, out: int, rank: int, bias: bool, dropout: bool
) -> None:
    v = drawn(lead, width, out, rank, bias=bias)
    mask = (v["keep"], 0.7) if dropout else (None, 1.0)
    leaves = [v[name] for name in ("x", "a", "b", "bias") if v[name] is not None]
    ours = lora_linear(v["x"], v["weight"], v["a"], v["b"], SCALE, v["bias"], *mask)
    naive = naive_lora_linear(v["x"], v["weight"], v["a"], v["b"], SCALE, v["bias"], *mask)
    for one, other in zip(grads(ours, v["dy"], leaves), grads(naive, v["dy"], leaves), strict=True):
        torch.testing.assert_close(one, other, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("dropout", [False, True], ids=["plain", "dropout"])
def test_gradcheck(dropout: bool) -> None:
    v = drawn((2, 3), 5, 4, 2, dtype=torch.float64)
    mask = (v["keep"], 0.7) if dropout else (None, 1.0)
    assert torch.autograd.gradcheck(
        lambda x, a, b, bias: lora_linear(x, v["weight"], a, b, SCALE, bias, *mask),
        (v["x"], v["a"], v["b"], v["bias"]),
    )


@pytest.mark.parametrize("double", [False, True], ids=["single", "double"])
def test_nf4_base_is_its_dequantised_weight(double: bool) -> None:
    v = drawn((3, 7), 42, 123, 5)
    q = quantise(v["weight"], double=double)
    leaves = [v["x"], v["a"], v["b"], v["bias"]]
    packed = grads(lora_linear(v["x"], q, v["a"], v["b"], SCALE, v["bias"]), v["dy"], leaves)
    plain = grads(lora_linear(v["x"], dequantise(q), v["a"], v["b"], SCALE, v["bias"]), v["dy"], leaves)
    assert all(torch.equal(one, other) for one, other in zip(packed, plain, strict=True))


def test_layers_share_the_buffer_without_mixing_weights() -> None:
    """Two layers of one shape, both forward before either goes backward."""
    one, two = drawn((6,), 16, 16, 2), drawn((6,), 16, 16, 2)
    two["weight"] = two["weight"].flip(0)
    first, second = quantise(one["weight"]), quantise(two["weight"])

    def both(w1: Tensor | NF4, w2: Tensor | NF4) -> list[Tensor]:
        middle = lora_linear(one["x"], w1, one["a"], one["b"], SCALE)
        y = frozen_linear(lora_linear(middle, w2, two["a"], two["b"], SCALE), w1)
        return grads(y, one["dy"], [one["x"], one["a"], one["b"], two["a"], two["b"]])

    packed, plain = both(first, second), both(dequantise(first), dequantise(second))
    assert all(torch.equal(a, b) for a, b in zip(packed, plain, strict=True))


def test_frozen_linear_is_linear_bit_for_bit() -> None:
    v = drawn((3, 7), 42, 123, 5)
    q = quantise(v["weight"])
    ours = grads(frozen_linear(v["x"], q, v["bias"]), v["dy"], [v["x"], v["bias"]])
    theirs = grads(torch.nn.functional.linear(v["x"], dequantise(q), v["bias"]), v["dy"], [v["x"], v["bias"]])
    assert torch.equal(ours[0], theirs[0])
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other)


def test_half_precision_errs_no_more_than_plain_torch() -> None:
    """bf16 input and base, fp32 a and b: error against fp64 at most 3 times that of plain torch in bf16."""
    v = drawn((64,), 96, 80, 8)
    exact = {name: v[name].detach().double() for name in ("x", "weight", "a", "b", "bias", "dy")}
    for name in ("x", "weight", "bias", "dy"):
        exact[name] = exact[name].bfloat16().double()
    names = ["x", "a", "b", "bias"]

    def run(function: Any, dtype: torch.dtype, master: torch.dtype) -> list[Tensor]:
        leaf = {n: exact[n].to(master if n in "ab" else dtype).requires_grad_() for n in names}
        y = function(leaf["x"], exact["weight"].to(dtype), leaf["a"], leaf["b"], SCALE, leaf["bias"])
        found = grads(y, exact["dy"].to(dtype), [leaf[n] for n in names])
        assert [tensor.dtype for tensor in found] == [dtype, dtype, master, master, dtype]
        return [tensor.double() for tensor in found]

    truth = run(naive_lora_linear, torch.float64, torch.float64)
    plain = run(naive_lora_linear, torch.bfloat16, torch.float32)
    ours = run(lora_linear, torch.bfloat16, torch.float32)
    for name, mine, theirs, right in zip(["y", *names], ours, plain, truth, strict=True):
        assert (mine - right).abs().max() <= 3 * (theirs - right).abs().max() + 1e-5, name


def test_plain_base_of_another_dtype_is_converted() -> None:
    v = drawn((7,), 42, 123, 5)
    narrow = v["weight"].bfloat16()
    ours = lora_linear(v["x"], narrow, v["a"], v["b"], SCALE)
    torch.testing.assert_close(ours, naive_lora_linear(v["x"], narrow.float(), v["a"], v["b"], SCALE))


def test_base_never_gets_a_gradient_and_unasked_ones_are_skipped() -> None:
    v = drawn((7,), 42, 123, 5)
    weight = v["weight"].requires_grad_()
    y = lora_linear(v["x"].detach(), weight, v["a"], v["b"].detach(), SCALE)
    y.backward(v["dy"])
    assert weight.grad is None and v["x"].grad is None and v["b"].grad is None
    assert v["a"].grad is not None


def test_buffer_born_in_inference_mode_serves_training() -> None:
    q = quantise(torch.randn(300, 300))
    with torch.inference_mode():
        plain_weight(q, torch.float32)
    x = torch.randn(2, 300, requires_grad=True)
    frozen_linear(x, q).sum().backward()
    expected = dequantise(q).sum(dim=0).expand(2, -1)
    torch.testing.assert_close(x.grad, expected, rtol=0, atol=3e-4)  # 300 terms x 6e-8 x partial sums of up to 17


def test_threads_do_not_share_the_buffer() -> None:
    weights = [quantise(torch.full((64, 64), float(value))) for value in (1, 2)]
    wrong = []

    def work(q: NF4, value: float) -> None:
        for _ in range(200):
            if not bool((frozen_linear(torch.ones(1, 64), q) == 64 * value).all()):
                wrong.append(value)

    threads = [threading.Thread(target=work, args=(q, value)) for q, value in zip(weights, (1.0, 2.0), strict=True)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_no_tokens() -> None:
    v = drawn((0,), 42, 123, 5)
    y = lora_linear(v["x"], quantise(v["weight"]), v["a"], v["b"], SCALE, v["bias"])
    y.sum().backward()
    assert y.shape == (0, 123) and not v["a"].grad.any() and not v["b"].grad.any()


def test_nan_passes_through() -> None:
    v = drawn((7,), 42, 123, 5)
    x = v["x"].detach().clone()
    x[3, 5] = float("nan")
    y = lora_linear(x, v["weight"], v["a"], v["b"], SCALE)
    assert y[3].isnan().all() and not y[[0, 1, 2, 4, 5, 6]].isnan().any()


def test_shapes_that_do_not_fit_say_so() -> None:
    v = drawn((7,), 42, 123, 5)
    with pytest.raises(ValueError, match="do not fit"):
        lora_linear(v["x"], v["weight"], v["b"], v["a"], SCALE)
    with pytest.raises(ValueError, match="keep"):
        lora_linear(v["x"], v["weight"], v["a"], v["b"], SCALE, None, v["keep"][:3])
