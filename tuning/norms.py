"""The norms of a transformers decoder computed by kernels.rms_norm, each under its old name with its old weight."""

import copy
from typing import cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..kernels.rms_norm import FORMS, Form, naive_rms_norm, rms_norm

EPSILONS = ("variance_epsilon", "eps")  # what norms call the number beside the mean square
TRIED = (torch.float32, torch.bfloat16)  # in fp32 alone two forms could not be told apart


class RmsNorm(nn.Module):
    """A root mean square norm over the last dimension; weight (width,), form: where it rounds."""

    def __init__(self, weight: nn.Parameter, eps: float, form: Form) -> None:
        super().__init__()
        self.weight, self.eps, self.form = weight, eps, form

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight, self.eps, self.form)

    def extra_repr(self) -> str:
        return f"{self.weight.shape[0]}, eps={self.eps}, {self.form}"


def fuse_norms(model: PreTrainedModel) -> int:
    """Replaces the norms of `model` that compute one of FORMS, and returns how many.

    One module of each class is tried on numbers, in fp32 and bf16: a name says nothing of a forward. Others (Cohere's
    and Phi's layer norms, norms without a weight) stay as they are.
    """
    forms: dict[type[nn.Module], Form | None] = {}
    count = 0
    for name, module in list(model.named_modules()):
        eps = _epsilon(module)
        if eps is None:
            continue
        if type(module) not in forms:
            forms[type(module)] = _form(module, eps)
        form = forms[type(module)]
        if form is not None:
            fused = RmsNorm(cast(nn.Parameter, module.weight), eps, form).train(module.training)
            model.set_submodule(name, fused)
            count += 1
    return count


def _epsilon(module: nn.Module) -> float | None:
    """Of a module that may be such a norm: one weight of one dimension, and nothing else."""
    held = dict(module.named_parameters())
    more = [*module.named_children(), *module.named_buffers()]
    if list(held) != ["weight"] or held["weight"].ndim != 1 or more:
        return None
    found = [getattr(module, name, None) for name in EPSILONS]
    return next((value for value in found if isinstance(value, float)), None)


def _form(module: nn.Module, eps: float) -> Form | None:
    width = cast(Tensor, module.weight).shape[0]
    numbers = torch.linspace(-2, 3, 3 * width).sin().view(3, width) * 5
    weight = torch.linspace(0.3, 2.1, width)
    for form in FORMS:
        if all(_computes(module, numbers.to(dtype), weight.to(dtype), eps, form) for dtype in TRIED):
            return form
    return None


def _computes(module: nn.Module, x: Tensor, weight: Tensor, eps: float, form: Form) -> bool:
    """Whether a copy of `module` with this weight gives what the form says, bit for bit."""
    tried = copy.deepcopy(module)
    tried.weight = nn.Parameter(weight, requires_grad=False)
    with torch.no_grad():
        found = tried(x)
    return isinstance(found, Tensor) and torch.equal(found, naive_rms_norm(x, weight, eps, form))
