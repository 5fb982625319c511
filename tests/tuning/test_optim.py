import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from gristmill.tuning.optim import Lion, learning_rate, make_optimizer, set_rate
from gristmill.tuning.settings import Lora, Training


def test_lion_takes_the_steps_of_its_paper() -> None:
    draw = torch.Generator().manual_seed(0)
    shapes = [(3, 5), (7,)]
    parameters = [nn.Parameter(torch.randn(shape, generator=draw)) for shape in shapes]
    weights = [p.detach().clone().double() for p in parameters]
    momenta = [torch.zeros_like(w) for w in weights]
    optimizer = Lion(parameters, lr=0.01, betas=(0.9, 0.99), weight_decay=0.1)
    for _ in range(4):
        for place, parameter in enumerate(parameters):
            gradient = torch.randn(parameter.shape, generator=draw)
            parameter.grad = gradient
            signs = torch.sign(0.9 * momenta[place] + 0.1 * gradient.double())
            weights[place] -= 0.01 * (signs + 0.1 * weights[place])
            momenta[place] = 0.99 * momenta[place] + 0.01 * gradient.double()
        optimizer.step()
    for parameter, weight, momentum in zip(parameters, weights, momenta, strict=True):
        torch.testing.assert_close(parameter.detach().double(), weight, rtol=0, atol=1e-6)
        torch.testing.assert_close(optimizer.state[parameter]["momentum"].double(), momentum, rtol=0, atol=1e-6)


def test_lion_leaves_parameters_without_gradients_alone() -> None:
    parameter = nn.Parameter(torch.ones(3))
    optimizer = Lion([parameter], lr=0.1, weight_decay=0.5)
    optimizer.step()
    assert torch.equal(parameter.detach(), torch.ones(3)) and not optimizer.state[parameter]


@pytest.mark.parametrize("optimizer", ["adamw", "lion"])
def test_matrices_alone_decay_and_b_learns_faster(optimizer: str) -> None:
    parameters = {
        "layer.A": nn.Parameter(torch.ones(2, 3)),
        "layer.B": nn.Parameter(torch.ones(3, 2)),
        "layer.bias": nn.Parameter(torch.ones(3)),
    }
    settings = Training(optimizer=optimizer, weight_decay=0.1, lora=Lora(lora_plus_ratio=16.0))
    made = make_optimizer(parameters, settings)
    set_rate(made, 0.5)
    found = {
        name: (group["lr"], group["weight_decay"])
        for group in made.param_groups
        for name, parameter in parameters.items()
        if any(parameter is one for one in group["params"])
    }
    assert found == {"layer.A": (0.5, 0.1), "layer.B": (8.0, 0.1), "layer.bias": (0.5, 0.0)}


def rates(**settings):
    return [learning_rate(replace(Training(learning_rate=1.0, warmup=0.2), **settings), step, 10) for step in range(10)]


def test_schedules_have_their_closed_forms() -> None:
    rising = [1 / 3, 2 / 3]
    assert rates() == pytest.approx([*rising, *(np.arange(8, 0, -1) / 8)])
    assert rates(schedule="constant") == pytest.approx([*rising, *[1.0] * 8])
    assert rates(schedule="cosine") == pytest.approx(
        [*rising, *(0.5 + 0.5 * math.cos(math.pi * k / 8) for k in range(8))]
    )
    assert rates(schedule="wsd", decay=0.3) == pytest.approx([*rising, *[1.0] * 5, 1.0, 2 / 3, 1 / 3])
    assert rates(schedule="wsd", decay=0.0) == rates(schedule="constant")
    short = [learning_rate(replace(Training(learning_rate=1.0), warmup=w), 0, 1) for w in (0.0, 1.0)]
    assert short == [1.0, 0.5]
