"""Losses of single answers against TRL's KTOTrainer or the paper's formula, and KTO's reference point."""

import math
from collections import defaultdict
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from gristmill.tuning.losses import LOSSES
from gristmill.tuning.losses_unpaired import apo_zero_unpaired, fdpo, kto, kto_kl, kto_mismatch

ROWS, WIDTH = 7, 5
DESIRABLE = torch.tensor([True, False, True, True, False, True, False])


def answers(seed: int) -> torch.Tensor:
    return -4 * torch.rand(ROWS, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def trl_kto(
    loss_type: str, logps: torch.Tensor, ref: torch.Tensor, kl: torch.Tensor, ref_kl: torch.Tensor, **options: float
) -> Any:
    """KTOTrainer's mean loss of a batch whose forward gave these log-probabilities, and the KL it found."""
    trainer = pytest.importorskip("trl.trainer.kto_trainer").KTOTrainer
    stand_in = SimpleNamespace(
        model=SimpleNamespace(training=True), loss_type=loss_type, beta=options["beta"],
        accelerator=SimpleNamespace(device="cpu", gather_for_metrics=lambda x: x),
        desirable_weight=options.get("desirable_weight", 1), undesirable_weight=options.get("undesirable_weight", 1),
        aux_loss_enabled=False, precompute_ref_logps=True, calculate_KL=loss_type == "kto",
        _compute_kl_logps=lambda model, batch: kl, _total_train_tokens=0, _tp_size=1,
        _metrics=defaultdict(lambda: defaultdict(list)),
    )  # fmt: skip
    tokens = torch.cat([logps[:, None], torch.zeros(ROWS, WIDTH - 1, dtype=logps.dtype)], 1)
    outputs = SimpleNamespace(log_probs=tokens, entropy=tokens.detach(), mean_logits=tokens.detach())
    ones = torch.ones(ROWS, WIDTH + 1, dtype=torch.long)
    batch = {"input_ids": ones, "attention_mask": ones, "completion_mask": ones, "label": DESIRABLE,
             "ref_logps": ref, "ref_KL_logps": ref_kl}  # fmt: skip
    loss = trainer._compute_loss(stand_in, lambda **kwargs: outputs, batch, False)
    return loss, stand_in._metrics["train"]["kl"][0]


@pytest.mark.parametrize("name", ["kto", "apo_zero_unpaired"])
@pytest.mark.parametrize("shift", [-1.0, 1.0], ids=["kl-clamped", "kl-positive"])
def test_trl_agrees(name: str, shift: float) -> None:
    logps, ref = answers(0).requires_grad_(), answers(1)
    kl_logps, ref_kl = answers(2) + shift, answers(3)
    options = {"beta": 0.3} | ({"desirable_weight": 1.2, "undesirable_weight": 0.8} if name == "kto" else {})
    expected, their_kl = trl_kto(name, logps, ref, kl_logps, ref_kl, **options)
    kl = kto_kl(kl_logps, ref_kl)
    given = {"logps": logps, "ref_logps": ref, "desirable": DESIRABLE, "kl": kl}
    loss = LOSSES[name]
    found = loss(*(given[key] for key in loss.__code__.co_varnames[: loss.__code__.co_argcount]), **options)
    torch.testing.assert_close(found.mean(), expected)
    gradients = [torch.autograd.grad(value, logps)[0] for value in (found.mean(), expected)]
    torch.testing.assert_close(*gradients)
    if name == "kto":
        assert kl.item() == pytest.approx(their_kl) and (kl.item() > 0) == (shift > 0)


@pytest.mark.parametrize("name", ["fdpo"])
def test_fp64_formula(name: str) -> None:
    logps, ref = answers(0), answers(1)
    found = fdpo(logps, ref, DESIRABLE, beta=0.5).tolist()
    for i, good in enumerate(DESIRABLE.tolist()):
        gain = 0.5 * (logps[i] - ref[i]).item()
        assert found[i] == pytest.approx(math.log(1 + math.exp(-gain if good else gain)))


def test_kto_of_equal_models_is_half_its_weight() -> None:
    logps = answers(0)
    losses = kto(logps, logps, DESIRABLE, torch.zeros(()), desirable_weight=1.5)
    assert losses[DESIRABLE].tolist() == [0.75] * 4 and losses[~DESIRABLE].tolist() == [0.5] * 3
    assert (apo_zero_unpaired(logps, logps, DESIRABLE) == 0.5).all()


def test_kto_moves_good_answers_up_and_bad_ones_down_and_gives_the_kl_no_gradient() -> None:
    logps, kl = answers(0).requires_grad_(), torch.tensor(0.7, dtype=torch.float64, requires_grad=True)
    losses = kto(logps, answers(1), DESIRABLE, kl)
    gradient = torch.autograd.grad(losses.sum(), logps, retain_graph=True)[0]
    assert (gradient[DESIRABLE] < 0).all() and (gradient[~DESIRABLE] > 0).all()
    assert torch.autograd.grad(losses.sum(), kl, allow_unused=True) == (None,)


def test_kto_kl_of_a_step_does_not_depend_on_packs_and_ranks() -> None:
    """The clamp comes after the mean over the whole step: clamped by pack, packs of opposite sign would not cancel."""
    logps, ref = answers(0).requires_grad_(), answers(1)
    whole = kto_kl(logps, ref)
    assert not whole.requires_grad and whole.item() == max(0.0, (logps - ref).mean().item())
    cuts = (slice(0, 4), slice(4, 5), slice(5, 7))
    sums: list[torch.Tensor] = []

    def collect(values: torch.Tensor) -> torch.Tensor:
        sums.append(values)
        return values

    for cut in cuts:
        kto_kl(logps[cut], ref[cut], collect)
    everywhere = torch.stack(sums).sum(0)
    for cut in cuts:  # each rank, its own part in hand and the sum over all of them
        torch.testing.assert_close(kto_kl(logps[cut], ref[cut], lambda values: everywhere), whole)
    assert kto_kl(logps[:0], ref[:0]).item() == 0.0
    assert kto_kl(ref, ref + 1).item() == 0.0
    assert kto_kl(logps * math.nan, ref).isnan()


@pytest.mark.parametrize("units", [0, 1, 2, 3, 8, 101])
def test_kto_mismatch_gives_no_prompt_its_own_answer(units: int) -> None:
    others = kto_mismatch(units)
    if units < 2:
        assert len(others) == 0
    else:
        assert sorted(others.tolist()) == list(range(units))
        assert all(other != unit for unit, other in enumerate(others.tolist()))
        if units > 3:
            assert all(abs(other - unit) > 1 for unit, other in enumerate(others.tolist()))
