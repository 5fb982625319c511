"""What every loss must hold: right gradients, finite at extremes, no NaN that disappears, no neighbour felt."""

import inspect
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from gristmill.tuning.losses import LOSSES, sft_loss, sums_by_document
from gristmill.tuning.losses_math import log1mexp

SIZE, OWNERS = 7, [0, 0, 0, 1, 1, 2, 2]
DIFFERENTIABLE = ("chosen", "rejected", "logps")


def parameters(name: str) -> list[str]:
    found = inspect.signature(LOSSES[name]).parameters.values()
    return [parameter.name for parameter in found if parameter.kind is parameter.POSITIONAL_OR_KEYWORD]


def given(name: str, dtype: torch.dtype = torch.float64, scale: float = 6.0) -> dict[str, Any]:
    """Arguments by name, log-probabilities of whole answers evenly in [-scale, 0]."""
    draw = torch.Generator().manual_seed(len(name))
    values: dict[str, Any] = {}
    for key in parameters(name):
        if key in ("owners", "lists", "desirable", "rewards", "kl"):
            values[key] = {
                "owners": torch.tensor(OWNERS), "lists": 3, "kl": torch.tensor(0.4, dtype=dtype),
                "desirable": torch.arange(SIZE) % 3 > 0, "rewards": torch.tensor([2.0, 9, 4, 1, 7, 3, 3]).to(dtype),
            }[key]  # fmt: skip
        elif key.endswith("tokens"):
            values[key] = torch.randint(1, 9, (SIZE,), generator=draw).to(dtype)
        elif key in ("weights", "balance"):
            values[key] = 0.25 + 2 * torch.rand(SIZE, generator=draw, dtype=dtype)
        else:
            values[key] = -scale * (0.01 + 0.99 * torch.rand(SIZE, generator=draw, dtype=dtype))
    return values


@pytest.mark.parametrize("name", LOSSES)
def test_every_loss_has_the_shape_of_its_family_and_defaults_for_its_options(name: str) -> None:
    losses = LOSSES[name](*given(name).values())
    assert losses.shape == ((3,) if "lists" in parameters(name) else (SIZE,)) and losses.isfinite().all()
    options = [p for p in inspect.signature(LOSSES[name]).parameters.values() if p.kind is p.KEYWORD_ONLY]
    assert all(isinstance(option.default, float) for option in options)
    marks = [key for key in ("rejected", "desirable", "rewards", "weights") if key in parameters(name)]
    assert len(marks) == 1, "one parameter says the family"


@pytest.mark.parametrize("name", LOSSES)
def test_gradients_are_those_of_finite_differences(name: str) -> None:
    values = given(name)
    keys = [key for key in values if key in DIFFERENTIABLE]
    if name in ("fait", "dft", "tpo"):  # weights without a gradient: held fixed where the function is differenced
        return _frozen_weights(name, values)

    def loss(*inputs: torch.Tensor) -> torch.Tensor:
        return LOSSES[name](*(values | dict(zip(keys, inputs, strict=True))).values())

    assert torch.autograd.gradcheck(loss, [values[key].requires_grad_() for key in keys], atol=1e-7)
    return None


def _frozen_weights(name: str, values: dict[str, Any]) -> None:
    """These losses are weight times a plain loss; the gradient is the weight times that loss's gradient."""
    logps = values["logps"].requires_grad_()
    losses = LOSSES[name](*values.values())
    gradient = torch.autograd.grad(losses.sum(), logps)[0]
    if name == "tpo":
        numeric = torch.zeros_like(logps)
        for i in range(SIZE):  # a step that changes no order leaves the weights as they are
            step = torch.zeros_like(logps)
            step[i] = 1e-6
            ends = [LOSSES[name](*(values | {"logps": (logps + sign * step).detach()}).values()) for sign in (1, -1)]
            numeric[i] = (ends[0] - ends[1]).sum() / 2e-6
        torch.testing.assert_close(gradient, numeric, rtol=1e-6, atol=1e-8)
    else:
        torch.testing.assert_close(gradient, losses.detach() / logps.detach())


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("scale", [1e-9, 1e3, 1e6])
def test_losses_and_gradients_are_finite_at_extremes(name: str, scale: float) -> None:
    for sign in (1, -1):
        values = given(name, torch.float32, scale)
        keys = [key for key in values if key in DIFFERENTIABLE]
        for key in keys:
            values[key] = values[key].roll(sign).requires_grad_()
        if "logps" in values:
            values["logps"] = (values["logps"] * (torch.arange(SIZE) % 2)).detach().requires_grad_()
        losses = LOSSES[name](*values.values())
        losses.sum().backward()
        assert losses.isfinite().all()
        assert all(values[key].grad.isfinite().all() for key in keys)


@pytest.mark.parametrize("name", LOSSES)
def test_nan_in_is_nan_out(name: str) -> None:
    """Whichever tensor it comes in by, and in no other pair, row or list than its own."""
    for key, value in given(name).items():
        if not (isinstance(value, torch.Tensor) and value.is_floating_point() and value.ndim):
            continue
        bad = value.clone()
        bad[4] = math.nan
        losses = LOSSES[name](*(given(name) | {key: bad}).values())
        expected = torch.arange(3) == 1 if "lists" in parameters(name) else torch.arange(SIZE) == 4
        assert torch.equal(losses.isnan(), expected), key


@pytest.mark.parametrize("name", LOSSES)
def test_fp32_is_as_near_to_fp64_as_its_inputs(name: str) -> None:
    exact = LOSSES[name](*given(name).values())
    rounded = LOSSES[name](
        *(v.float() if isinstance(v, torch.Tensor) and v.is_floating_point() else v for v in given(name).values())
    )
    assert rounded.dtype == torch.float32
    torch.testing.assert_close(rounded.double(), exact, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("name", LOSSES)
def test_a_loss_does_not_depend_on_what_shares_its_pack(name: str) -> None:
    values = given(name)
    whole = LOSSES[name](*values.values())
    cut = 3 if "owners" in values else 2  # a list stays whole
    parts = []
    for rows in (slice(None, cut), slice(cut, None)):
        part = {key: value[rows] if isinstance(value, torch.Tensor) and value.ndim else value
                for key, value in values.items()}  # fmt: skip
        if "owners" in part:
            part["owners"] = part["owners"] - part["owners"].min()
            part["lists"] = len(part["owners"].unique())
        parts.append(LOSSES[name](*part.values()))
    torch.testing.assert_close(torch.cat(parts), whole, rtol=1e-12, atol=1e-12)


def test_log1mexp_is_accurate_over_the_whole_range_and_finite_at_zero() -> None:
    values = -torch.logspace(-6, 2, 400)
    exact = [math.log(-math.expm1(x)) if x > -0.7 else math.log1p(-math.exp(x)) for x in values.tolist()]
    for dtype, rounding in ((torch.float64, 1e-15), (torch.float32, 5e-7)):
        found, wanted = log1mexp(values.to(dtype)).double(), torch.tensor(exact, dtype=torch.float64)
        assert ((found - wanted).abs() <= rounding * wanted.abs() + torch.finfo(dtype).tiny).all()
    ends = torch.tensor([0.0, 1e-7, -1e-30, -torch.inf, torch.nan], requires_grad=True)
    found = log1mexp(ends)
    found[:4].sum().backward()
    assert found[:3].isfinite().all() and found[3] == 0 and found[4].isnan()
    assert ends.grad is not None and ends.grad[:4].isfinite().all() and (ends.grad[:3] < -1e6).all()


def test_sft_loss_is_cross_entropy_of_the_weighted_targets() -> None:
    torch.manual_seed(0)
    logits = torch.randn(17, 11, requires_grad=True)
    targets = torch.randint(0, 11, (17,))
    weights = torch.tensor([0.0, 1.0, 0.5] * 5 + [1.0, 0.0])
    logps = logits.log_softmax(-1).gather(1, targets[:, None])[:, 0]
    expected = (F.cross_entropy(logits, targets, reduction="none") * weights).sum()
    loss = sft_loss(logps, weights)
    torch.testing.assert_close(loss, expected)
    ours, theirs = torch.autograd.grad(loss, logits, retain_graph=True)[0], torch.autograd.grad(expected, logits)[0]
    torch.testing.assert_close(ours, theirs)
    assert not ours[weights == 0].any()


def test_sums_by_document() -> None:
    values = torch.tensor([1.0, 2.0, 4.0, 8.0])
    assert sums_by_document(values, torch.tensor([0, 2, 2, 0]), 4).tolist() == [9.0, 0.0, 6.0, 0.0]
