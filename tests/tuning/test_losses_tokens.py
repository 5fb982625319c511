"""Losses of supervised tokens against torch's cross-entropy, TRL's SFTTrainer and formulas over Python numbers."""

import math
from collections import defaultdict
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from gristmill.curation.folder import HouseError
from gristmill.tuning.losses import LOSSES
from gristmill.tuning.losses_tokens import dft, fait, mft, nll, task_weights

TOKENS, VOCABULARY = 12, 7
TASKS = torch.tensor([0, 0, 0, 0, 0, 0, 0, 2, 2, 2, 3, 3])
WEIGHTS = torch.tensor([1.0, 1, 2, 1, 0.5, 1, 3, 1, 1, 2, 1, 1])


def made() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Logits with gradients, targets, and their log-probabilities."""
    draw = torch.Generator().manual_seed(0)
    logits = (3 * torch.randn(TOKENS, VOCABULARY, generator=draw)).requires_grad_()
    targets = torch.randint(0, VOCABULARY, (TOKENS,), generator=draw)
    return logits, targets, logits.log_softmax(-1).gather(1, targets[:, None])[:, 0]


@pytest.mark.parametrize("name", ["nll"])
def test_torch_cross_entropy_agrees(name: str) -> None:
    logits, targets, logps = made()
    expected = F.cross_entropy(logits, targets, reduction="none") * WEIGHTS
    torch.testing.assert_close(nll(logps, WEIGHTS), expected)


@pytest.mark.parametrize("name", ["nll", "dft"])
def test_trl_agrees(name: str) -> None:
    """SFTTrainer's loss of a batch whose forward gave these log-probabilities; it has no weights of tokens."""
    trainer = pytest.importorskip("trl.trainer.sft_trainer").SFTTrainer
    logits, _, logps = made()
    stand_in = SimpleNamespace(
        model=SimpleNamespace(training=True), aux_loss_enabled=False, compute_loss_func=None, label_smoother=None,
        accelerator=SimpleNamespace(parallelism_config=None, gather_for_metrics=lambda x: x),
        args=SimpleNamespace(loss_type=name, average_tokens_across_devices=False), _total_train_tokens=0, _tp_size=1,
        _metrics=defaultdict(lambda: defaultdict(list)),
    )  # fmt: skip
    seen = torch.zeros(1, TOKENS)
    outputs = SimpleNamespace(log_probs=logps[None], label_mask=seen == 0, entropy=seen, is_top1=seen == 0)
    inputs = {"labels": seen.long(), "attention_mask": seen.long()}
    theirs = trainer.compute_loss(stand_in, lambda **kwargs: outputs, inputs)
    ours = LOSSES[name](logps, torch.ones(TOKENS)).sum() / TOKENS
    torch.testing.assert_close(ours, theirs)
    torch.testing.assert_close(*(torch.autograd.grad(loss, logits, retain_graph=True)[0] for loss in (ours, theirs)))


@pytest.mark.parametrize("name", ["fait", "mft", "dft"])
def test_fp64_formula(name: str) -> None:
    logps = made()[2].detach().double()
    balance = task_weights(torch.tensor([9.5, 0.0, 4.0, 2.0]))[TASKS].double()
    weights = WEIGHTS.double()
    found = {
        "fait": fait(logps, weights, floor=0.25),
        "mft": mft(logps, weights, balance, gamma=2.0),
        "dft": dft(logps, weights),
    }[name].tolist()
    for i, logp in enumerate(logps.tolist()):
        p, w = math.exp(logp), WEIGHTS[i].item()
        marked = 1 + (w - 1) * (0.25 + 0.75 * (1 - p)) if w > 1 else w
        expected = {
            "fait": -marked * math.log(p),
            "mft": -balance[i].item() * w * (1 - p) ** 2 * math.log(p),
            "dft": -w * p * math.log(p),
        }[name]
        assert found[i] == pytest.approx(expected, rel=1e-9)


def test_fait_weighs_marked_tokens_alone_and_less_as_they_are_learnt() -> None:
    logps = torch.tensor([-5.0, -0.5, -1e-4, -5.0, -5.0])
    weights = torch.tensor([3.0, 3.0, 3.0, 1.0, 0.5])
    factors = fait(logps, weights) / -logps
    assert 3 > factors[0] > factors[1] > factors[2] >= 1 and factors[0] > 2.9 and factors[2] < 1.001
    assert factors[3:].tolist() == [1.0, 0.5]
    torch.testing.assert_close(fait(logps, weights.clamp(max=1)), nll(logps, weights.clamp(max=1)))


def test_task_weights_make_the_mean_over_tasks_of_each_tasks_mean() -> None:
    """MFTCoder's loss: not dominated by the task with most tokens; a task that is absent takes no part."""
    logps = made()[2].detach()
    totals = torch.zeros(5).index_add(0, TASKS, WEIGHTS)
    balance = task_weights(totals)
    assert balance[[1, 4]].tolist() == [0.0, 0.0]
    found = mft(logps, WEIGHTS, balance[TASKS]).sum() / WEIGHTS.sum()
    means = [(-logps * WEIGHTS)[task == TASKS].sum() / WEIGHTS[task == TASKS].sum() for task in (0, 2, 3)]
    torch.testing.assert_close(found, torch.stack(means).mean())
    assert task_weights(torch.zeros(3)).tolist() == [0.0] * 3
    assert task_weights(torch.tensor([7.0])).tolist() == [1.0]


def test_mft_without_focus_or_balance_is_nll() -> None:
    logps = made()[2]
    torch.testing.assert_close(mft(logps, WEIGHTS, torch.ones(TOKENS)), nll(logps, WEIGHTS))
    for gamma in (0.5, -1.0, math.nan):
        with pytest.raises(HouseError, match="gamma"):
            mft(logps, WEIGHTS, torch.ones(TOKENS), gamma=gamma)
    with pytest.raises(HouseError, match="floor"):
        fait(logps, WEIGHTS, floor=1.0)


def test_distilling_step_by_step_is_a_weight_on_the_rationale() -> None:
    """arXiv 2305.02301: label loss + λ rationale loss, by a span of weight λ."""
    logps = made()[2].detach()
    rationale = torch.arange(TOKENS) < 8
    found = nll(logps, torch.where(rationale, 0.3, 1.0)).sum()
    torch.testing.assert_close(found, -logps[~rationale].sum() - 0.3 * logps[rationale].sum())
