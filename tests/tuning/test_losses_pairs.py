"""Losses of pairs against TRL's own code where it has them, else against the paper's formula in fp64."""

import math
from collections import defaultdict
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from gristmill.curation.folder import HouseError
from gristmill.tuning.losses import LOSSES
from gristmill.tuning.losses_pairs import asft, cpo, dpo, dpo_norm, orpo, robust_dpo, simpo

PAIRS, WIDTH = 6, 9
LENGTHS = torch.tensor([[1, 3], [8, 2], [5, 5], [4, 8], [7, 1], [2, 6]])  # tokens of chosen and rejected: ragged


def token_logps(scale: float = 2.0, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """(2P, W) policy log-probabilities of tokens, zero behind each answer's end, with gradients; (2P, W) mask."""
    generator = torch.Generator().manual_seed(seed)
    mask = torch.arange(WIDTH)[None, :] < LENGTHS.t().reshape(-1, 1)
    logps = -scale * torch.rand(2 * PAIRS, WIDTH, dtype=torch.float64, generator=generator)
    return (logps * mask).requires_grad_(), mask


def ours(name: str, logps: torch.Tensor, ref: torch.Tensor, mask: torch.Tensor, **options: Any) -> torch.Tensor:
    """Our loss of the same tokens, called by the names of its parameters as the loop does."""
    (chosen, rejected), (ref_chosen, ref_rejected) = logps.sum(1).chunk(2), ref.sum(1).chunk(2)
    chosen_tokens, rejected_tokens = mask.sum(1).to(logps.dtype).chunk(2)
    given = {
        "chosen": chosen, "rejected": rejected, "ref_chosen": ref_chosen, "ref_rejected": ref_rejected,
        "chosen_tokens": chosen_tokens, "rejected_tokens": rejected_tokens,
    }  # fmt: skip
    loss = LOSSES[name]
    return loss(*(given[key] for key in loss.__code__.co_varnames[: loss.__code__.co_argcount]), **options)


def trl_dpo_trainer(loss_type: str, beta: float, label_smoothing: float) -> Any:
    """As much of a DPOTrainer as its method _compute_loss touches."""
    return SimpleNamespace(
        model=SimpleNamespace(training=True),
        accelerator=SimpleNamespace(device="cpu", gather=lambda x: x, gather_for_metrics=lambda x: x),
        loss_types=[loss_type], loss_weights=[1.0], beta=beta, label_smoothing=label_smoothing,
        args=SimpleNamespace(discopop_tau=0.05), f_divergence_type="reverse_kl", precompute_ref_logps=True,
        aux_loss_enabled=False, ld_alpha=None, use_weighting=False, _total_train_tokens=0, _tp_size=1,
        _metrics=defaultdict(lambda: defaultdict(list)),
    )  # fmt: skip


def trl_dpo(loss_type: str, logps: torch.Tensor, ref: torch.Tensor, mask: torch.Tensor, **options: float) -> Any:
    """DPOTrainer's mean loss of a batch whose forward gave these log-probabilities."""
    trainer = pytest.importorskip("trl.trainer.dpo_trainer").DPOTrainer
    completion = torch.cat([torch.zeros(len(mask), 1, dtype=torch.long), mask.long()], 1)
    seen = torch.zeros_like(logps.detach())
    outputs = SimpleNamespace(log_probs=logps, entropy=seen, mean_logits=seen, is_top1=seen.bool())
    ref_chosen, ref_rejected = ref.sum(1).chunk(2)
    inputs = {
        "input_ids": torch.zeros_like(completion), "attention_mask": torch.ones_like(completion),
        "completion_mask": completion, "ref_chosen_logps": ref_chosen, "ref_rejected_logps": ref_rejected,
    }  # fmt: skip
    stand_in = trl_dpo_trainer(loss_type, options.get("beta", 0.1), options.get("label_smoothing", 0.0))
    return trainer._compute_loss(stand_in, lambda **kwargs: outputs, inputs, False)


TRL = [
    ("dpo", "sigmoid", {"beta": 0.3}),
    ("robust_dpo", "robust", {"beta": 0.3, "label_smoothing": 0.2}),
    ("ipo", "ipo", {"beta": 0.2}),
    ("hinge", "hinge", {"beta": 0.3}),
    ("exo_pair", "exo_pair", {"beta": 0.4, "label_smoothing": 1e-2}),
    ("nca_pair", "nca_pair", {"beta": 0.3}),
    ("sppo_hard", "sppo_hard", {"beta": 0.2}),
    ("apo_zero", "apo_zero", {"beta": 0.3}),
    ("apo_down", "apo_down", {"beta": 0.3}),
    ("discopop", "discopop", {"beta": 0.05}),
    ("dpo_norm", "sigmoid_norm", {"beta": 5.0}),
]


@pytest.mark.parametrize(("name", "loss_type", "options"), TRL, ids=[name for name, *_ in TRL])
def test_trl_agrees(name: str, loss_type: str, options: dict[str, float]) -> None:
    logps, mask = token_logps()
    ref = token_logps(seed=1)[0].detach()
    expected = trl_dpo(loss_type, logps, ref, mask, **options)
    found = ours(name, logps, ref, mask, **options).mean()
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-9)  # TRL takes exo's epsilon in fp32
    gradients = [torch.autograd.grad(loss, logps)[0] for loss in (found, expected)]
    torch.testing.assert_close(*gradients, rtol=1e-6, atol=1e-9)
    assert gradients[0].abs().max() > 1e-4


CONTRASTIVE = [
    ("simpo", {"beta": 2.0, "gamma": 0.7}, {"loss_type": "simpo", "simpo_gamma": 0.7, "cpo_alpha": 0.0}),
    ("cpo", {"beta": 0.3, "alpha": 0.0}, {"loss_type": "sigmoid"}),
    ("cpo", {"beta": 0.3, "alpha": 0.0, "label_smoothing": 0.2}, {"loss_type": "sigmoid"}),
]


@pytest.mark.parametrize(("name", "options", "theirs"), CONTRASTIVE, ids=["simpo", "cpo", "cpo-smoothed"])
def test_trls_cpo_trainer_agrees(name: str, options: dict[str, float], theirs: dict[str, Any]) -> None:
    trainer = pytest.importorskip("trl.experimental.cpo.cpo_trainer").CPOTrainer
    logps, mask = token_logps()
    sums = logps.sum(1)
    answers = sums / mask.sum(1) if name == "simpo" else sums  # as its forward gives them: average_log_prob for simpo
    stand_in = SimpleNamespace(
        alpha=0.0, accelerator=SimpleNamespace(device="cpu"), beta=options["beta"],
        label_smoothing=options.get("label_smoothing", 0.0), **theirs,
    )  # fmt: skip
    expected = trainer.cpo_loss(stand_in, *answers.chunk(2))[0]
    torch.testing.assert_close(ours(name, logps, logps, mask, **options), expected)


@pytest.mark.parametrize("name", ["orpo"])
def test_trls_orpo_trainer_agrees(name: str) -> None:
    trainer = pytest.importorskip("trl.experimental.orpo.orpo_trainer").ORPOTrainer
    logps, mask = token_logps()
    likely, unlikely = (logps.sum(1) / mask.sum(1)).chunk(2)
    stand_in = SimpleNamespace(beta=0.4, accelerator=SimpleNamespace(device="cpu"))
    ratios = trainer.odds_ratio_loss(stand_in, likely, unlikely)[0]  # in fp32; the loss is the likelihood minus these
    found = ours(name, logps, logps, mask, beta=0.4)
    torch.testing.assert_close(found.float(), (-likely - ratios).float(), rtol=2e-6, atol=2e-6)


def probabilities(scale: float = 2.0) -> list[tuple[list[float], list[float]]]:
    logps, mask = token_logps(scale)
    rows = [[math.exp(x) for x, kept in zip(row, keep, strict=True) if kept]
            for row, keep in zip(logps.tolist(), mask.tolist(), strict=True)]  # fmt: skip
    return list(zip(rows[:PAIRS], rows[PAIRS:], strict=True))


def geometric(token_probabilities: list[float]) -> float:
    return float(math.prod(token_probabilities) ** (1 / len(token_probabilities)))


def log_sigmoid(x: float) -> float:
    return -math.log1p(math.exp(-x))


@pytest.mark.parametrize("name", ["orpo", "simpo", "cpo", "asft"])
def test_fp64_formula_without_a_reference(name: str) -> None:
    """Written from the papers over probabilities, token by token."""
    logps, mask = token_logps()
    found = ours(name, logps, logps, mask, beta=0.7).tolist()
    for loss, (chosen, rejected) in zip(found, probabilities(), strict=True):
        p_w, p_l = geometric(chosen), geometric(rejected)
        odds_w, odds_l = p_w / (1 - p_w), p_l / (1 - p_l)
        joint = math.log(math.prod(chosen)) - math.log(math.prod(rejected))
        expected = {
            "orpo": -math.log(p_w) - 0.7 * log_sigmoid(math.log(odds_w / odds_l)),
            "simpo": -log_sigmoid(0.7 * math.log(p_w / p_l) - 1.0),
            "cpo": -log_sigmoid(0.7 * joint) - math.log(p_w),
            "asft": -math.log(p_w) - 0.7 * (log_sigmoid(math.log(odds_w)) + log_sigmoid(-math.log(odds_l))),
        }[name]
        assert loss == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("name", ["rpo"])
def test_fp64_formula_with_a_reference(name: str) -> None:
    logps, mask = token_logps()
    ref = token_logps(seed=1)[0].detach()
    found = ours(name, logps, ref, mask, beta=0.4, alpha=0.6).tolist()
    gaps = (logps - ref).sum(1)
    for i, (chosen, _) in enumerate(probabilities()):
        margin = 0.4 * (gaps[i] - gaps[PAIRS + i]).item()
        assert found[i] == pytest.approx(-log_sigmoid(margin) - 0.6 * math.log(geometric(chosen)), rel=1e-9)


def test_conservative_dpo_is_the_mean_over_flipped_labels() -> None:
    logps, mask = token_logps()
    ref = token_logps(seed=1)[0].detach()
    right = ours("dpo", logps, ref, mask)
    flipped = ours("dpo", logps.roll(PAIRS, 0), ref.roll(PAIRS, 0), mask.roll(PAIRS, 0))
    torch.testing.assert_close(ours("dpo", logps, ref, mask, label_smoothing=0.2), 0.8 * right + 0.2 * flipped)
    normed = ours("dpo_norm", logps, ref, mask, label_smoothing=0.2)
    assert (normed != ours("dpo_norm", logps, ref, mask)).all()


def test_robust_dpo_is_unbiased_under_flips() -> None:
    """The mean over labels flipped with probability ε is DPO on the true labels."""
    logps, mask = token_logps()
    ref = token_logps(seed=1)[0].detach()
    as_labelled = ours("robust_dpo", logps, ref, mask, label_smoothing=0.2)
    flipped = ours("robust_dpo", logps.roll(PAIRS, 0), ref.roll(PAIRS, 0), mask.roll(PAIRS, 0), label_smoothing=0.2)
    torch.testing.assert_close(0.8 * as_labelled + 0.2 * flipped, ours("dpo", logps, ref, mask))


def test_trap_16_dpo_of_equal_models_is_ln_2_exactly() -> None:
    answers = -300 * torch.rand(2, 50)
    assert (dpo(*answers, *answers) == torch.tensor(math.log(2.0))).all()
    assert (dpo_norm(*answers, *answers, torch.ones(50), 3 * torch.ones(50)) == torch.tensor(math.log(2.0))).all()


def test_trap_20_ipo_divides_by_the_tokens_of_its_own_answer() -> None:
    """Not by those of the whole pack, as a padding-free forward makes of a mask summed over its last dimension."""
    logps, mask = token_logps()
    ref = token_logps(seed=1)[0].detach()
    whole = ours("ipo", logps, ref, mask)
    (chosen, rejected), tokens = (logps - ref).sum(1).chunk(2), mask.sum(1).double()
    by_pack = (chosen / tokens.sum() - rejected / tokens.sum() - 5.0) ** 2
    assert (whole - by_pack).abs().min() > 1e-3
    for pair in range(PAIRS):  # one pair alone gives what it gives among others
        alone = [logps[[pair, PAIRS + pair]], ref[[pair, PAIRS + pair]], mask[[pair, PAIRS + pair]]]
        assert ours("ipo", *alone).item() == whole[pair].item()


def test_trap_20_the_mean_over_a_steps_pairs_does_not_depend_on_their_packs() -> None:
    """Every loss of pairs: packs of 4, 1 and 1 pairs, divided by the step's pairs, give the batch's loss and
    gradient; the mean of the packs' means does not."""
    for name, loss in LOSSES.items():
        if "rejected" not in loss.__code__.co_varnames[: loss.__code__.co_argcount]:
            continue
        logps, mask = token_logps()
        ref = token_logps(seed=1)[0].detach()
        whole = ours(name, logps, ref, mask).sum() / PAIRS
        packs = [[0, 1, 2, 3], [4], [5]]
        rows = [torch.tensor([*pack, *(PAIRS + pair for pair in pack)]) for pack in packs]
        parts = [ours(name, logps[at], ref[at], mask[at]) for at in rows]
        packed = torch.stack([part.sum() for part in parts]).sum() / PAIRS
        torch.testing.assert_close(packed, whole, rtol=1e-12, atol=1e-12)
        gradients = [torch.autograd.grad(value, logps, retain_graph=True)[0] for value in (packed, whole)]
        torch.testing.assert_close(*gradients, rtol=1e-12, atol=1e-12)
        assert abs(torch.stack([part.mean() for part in parts]).mean() - whole) > 1e-4, name


def test_mask_dpo_with_masks_of_ones_is_dpo_and_masked_tokens_get_no_gradient() -> None:
    """Mask-DPO (arXiv 2503.02846) and Step-DPO (2406.18629) are DPO over weighted sums."""
    logps, mask = token_logps()
    ref = token_logps(seed=1)[0].detach()
    ones = torch.ones_like(logps) * mask
    torch.testing.assert_close(
        ours("dpo", logps * ones, ref * ones, mask), ours("dpo", logps, ref, mask), rtol=0, atol=1e-6
    )
    kept = mask & (torch.rand(mask.shape, generator=torch.Generator().manual_seed(2)) < 0.5)
    losses = ours("dpo", logps * kept, ref * kept, mask)
    gradient = torch.autograd.grad(losses.sum(), logps)[0]
    assert not gradient[~kept].any() and gradient[kept].all() and 0 < kept.sum() < mask.sum()


def test_step_dpo_after_an_empty_prefix_is_dpo_of_the_step() -> None:
    logps, mask = token_logps()
    ref = token_logps(seed=1)[0].detach()
    step = torch.arange(WIDTH) < 2  # tokens of the one step; the prefix before it is part of the prompt
    cut = ours("dpo", logps[:, :2], ref[:, :2], mask[:, :2])
    torch.testing.assert_close(ours("dpo", logps * step, ref * step, mask), cut)


def test_ddpo_is_dpo_norm_with_a_weight_on_corrected_segments() -> None:
    """RLHF-V (arXiv 2312.00849): log π = (Σ_unchanged + γ Σ_corrected) / (n_unchanged + γ n_corrected)."""
    logps, mask = token_logps()
    ref = token_logps(seed=1)[0].detach()
    corrected = mask & (torch.arange(WIDTH) % 3 == 0)
    weights = mask * (1.0 + 4.0 * corrected)  # γ = 5
    found = ours("dpo_norm", logps * weights, ref * weights, weights, beta=0.5)
    gaps = logps - ref
    parts = (gaps * (mask & ~corrected)).sum(1) + 5 * (gaps * corrected).sum(1)
    scores = parts / ((mask & ~corrected).sum(1) + 5 * corrected.sum(1))
    expected = -torch.nn.functional.logsigmoid(0.5 * (scores[:PAIRS] - scores[PAIRS:]))
    torch.testing.assert_close(found, expected)


def test_a_wholly_masked_answer_gives_no_nan_and_no_gradient() -> None:
    logps, mask = token_logps()
    mask = mask & (torch.arange(2 * PAIRS) < PAIRS)[:, None]
    for name in ("ipo", "orpo", "simpo", "cpo", "rpo", "dpo_norm", "asft"):
        losses = ours(name, logps * mask, logps.detach() * mask, mask)
        gradient = torch.autograd.grad(losses.sum(), logps, allow_unused=True)[0]
        assert losses.isfinite().all() and gradient.isfinite().all() and not gradient[PAIRS:].any(), name


def test_odds_of_answers_of_probability_near_one_stay_finite() -> None:
    """ORPO and ASFT take log(1 - p̄): naive fp32 gives infinity from p̄ = 1 - 6e-8 on."""
    logps = -torch.tensor([0.0, 1e-12, 1e-9, 1e-7, 1e-5, 1e-3, 1.0, 50.0, 1e4])
    one = torch.ones(len(logps))
    assert torch.log1p(-logps.exp())[:3].isinf().all()
    for loss in (orpo, asft):
        for pair in ((logps, logps.flip(0)), (logps, logps), (logps.flip(0), logps)):
            chosen, rejected = (answer.clone().requires_grad_() for answer in pair)
            losses = loss(chosen, rejected, one, one)
            losses.sum().backward()
            assert losses.isfinite().all() and chosen.grad.isfinite().all() and rejected.grad.isfinite().all()
    rejected = torch.zeros(1, requires_grad=True)  # certain to be given, and to be pushed down
    asft(-torch.ones(1), rejected, torch.ones(1), torch.ones(1)).backward()
    assert rejected.grad is not None and rejected.grad.item() > 1e6


def test_options_out_of_range_are_refused_by_name() -> None:
    pair = tuple(torch.zeros(4, 1))
    for wrong in (lambda: dpo(*pair, beta=0.0), lambda: simpo(*pair, beta=float("nan"))):
        with pytest.raises(HouseError, match="beta"):
            wrong()
    for wrong in (lambda: robust_dpo(*pair, label_smoothing=0.5), lambda: cpo(*pair[:3], label_smoothing=-0.1)):
        with pytest.raises(HouseError, match="label_smoothing"):
            wrong()
