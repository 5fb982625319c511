import math

import pytest
import torch
import torch.nn.functional as F

from gristmill.tuning.losses import dpo_loss, sft_loss, sums_by_document


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


def test_dpo_loss_is_the_paper_formula_with_its_gradient() -> None:
    torch.manual_seed(0)
    chosen, rejected = (-20 * torch.rand(2, 6, dtype=torch.float64)).requires_grad_().unbind()
    ref_chosen, ref_rejected = -20 * torch.rand(2, 6, dtype=torch.float64)
    losses, margins = dpo_loss(chosen, rejected, ref_chosen, ref_rejected, beta=0.3)
    for i in range(6):
        ratio_w = math.exp(chosen[i].item()) / math.exp(ref_chosen[i].item())
        ratio_l = math.exp(rejected[i].item()) / math.exp(ref_rejected[i].item())
        inner = 0.3 * math.log(ratio_w) - 0.3 * math.log(ratio_l)
        assert margins[i].item() == pytest.approx(inner)
        assert losses[i].item() == pytest.approx(-math.log(1 / (1 + math.exp(-inner))))
    # equation below (7) of the paper: the gradient's weight is beta * sigmoid(-margin)
    gradient = torch.autograd.grad(losses.sum(), chosen)[0]
    torch.testing.assert_close(gradient, -0.3 * torch.sigmoid(-margins))


def test_dpo_loss_of_equal_models_is_ln_2_exactly() -> None:
    chosen, rejected = -100 * torch.rand(2, 9)
    losses, margins = dpo_loss(chosen, rejected, chosen, rejected, beta=0.1)
    assert (losses == torch.tensor(math.log(2.0))).all()
    assert not margins.any()


def test_dpo_loss_stays_finite_at_extreme_margins() -> None:
    zero, far = torch.zeros(1), torch.tensor([-1e6])
    assert dpo_loss(zero, far, zero, zero, 0.1)[0].item() == 0.0
    assert dpo_loss(far, zero, zero, zero, 0.1)[0].item() == pytest.approx(1e5)


def test_sums_by_document() -> None:
    values = torch.tensor([1.0, 2.0, 4.0, 8.0])
    assert sums_by_document(values, torch.tensor([0, 2, 2, 0]), 4).tolist() == [9.0, 0.0, 6.0, 0.0]
