"""Losses of lists against formulas written over Python numbers, list by list and pair by pair."""

import math
from itertools import combinations

import pytest
import torch

from gristmill.tuning.losses import LOSSES
from gristmill.tuning.losses_lists import copg, plackett_luce, rrhf, tpo
from gristmill.tuning.losses_pairs import dpo, ipo

OWNERS = torch.tensor([0, 0, 0, 0, 1, 2, 2, 2, 3, 3])
REWARDS = torch.tensor([3.0, 9, 1, 6, 4, 0.5, 0.2, 0.9, 2, 2], dtype=torch.float64)
TOKENS = torch.tensor([3.0, 8, 1, 4, 5, 2, 6, 7, 3, 9], dtype=torch.float64)
LISTS = 4


def answers(seed: int) -> torch.Tensor:
    return -40 * torch.rand(len(OWNERS), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def by_hand(name: str, scores: list[float], rewards: list[float], means: list[float], sums: list[float]) -> float:
    """One list. scores: β ρ."""
    size = len(scores)
    if name == "plackett_luce":
        order = sorted(range(size), key=lambda i: -rewards[i])
        left = [sum(math.exp(scores[j]) for j in order[k:]) for k in range(size)]
        return -sum(math.log(math.exp(scores[i]) / total) for i, total in zip(order, left, strict=True))
    if name == "copg":
        pairs = list(combinations(range(size), 2))
        gaps = [rewards[i] - rewards[j] - (scores[i] - scores[j]) for i, j in pairs]
        return sum(gap**2 for gap in gaps) / 2 / len(pairs) if pairs else 0.0
    ordered = [(i, j) for i in range(size) for j in range(size) if rewards[i] > rewards[j]]
    if name == "rrhf":
        best = max(range(size), key=lambda i: rewards[i])
        return sum(max(0.0, means[j] - means[i]) for i, j in ordered) - sums[best]
    low, high = min(rewards), max(rewards)
    values = [(reward - low) / (high - low) if high > low else 0.0 for reward in rewards]
    places = [1 + sorted(range(size), key=lambda i: -scores[i]).index(i) for i in range(size)]
    total = 0.0
    for i, j in ordered:
        gain = abs(2 ** values[i] - 2 ** values[j])
        discount = abs(1 / math.log(1 + places[i]) - 1 / math.log(1 + places[j]))
        gap = scores[i] - scores[j] - 0.3 * (values[i] - values[j])
        total += gain * discount * math.log(1 + math.exp(-gap))
    return total


@pytest.mark.parametrize("name", ["tpo", "plackett_luce", "copg", "rrhf"])
def test_fp64_formula(name: str) -> None:
    logps, ref = answers(0), answers(1)
    rest = (REWARDS, OWNERS, LISTS)
    found = {
        "tpo": lambda: tpo(logps, ref, *rest, beta=0.2, margin=0.3),
        "plackett_luce": lambda: plackett_luce(logps, ref, *rest, beta=0.2),
        "copg": lambda: copg(logps, ref, *rest, beta=0.2),
        "rrhf": lambda: rrhf(logps, TOKENS, *rest),
    }[name]()
    for index in range(LISTS):
        at = index == OWNERS
        scores, means = (0.2 * (logps - ref))[at].tolist(), (logps / TOKENS)[at].tolist()
        expected = by_hand(name, scores, REWARDS[at].tolist(), means, logps[at].tolist())
        assert found[index].item() == pytest.approx(expected, rel=1e-9, abs=1e-12)
    assert (found[:3] != 0).sum() >= 2


def test_lists_need_not_lie_together() -> None:
    order = torch.randperm(len(OWNERS), generator=torch.Generator().manual_seed(3))
    order = order[torch.argsort(OWNERS[order], stable=True)]  # shuffled within lists, whose ties go by order
    mixed = torch.tensor([0, 5, 8, 1, 4, 6, 2, 7, 9, 3])  # lists interleaved, order within a list kept
    logps, ref = answers(0), answers(1)
    for name in ("tpo", "plackett_luce", "copg"):
        whole = LOSSES[name](logps, ref, REWARDS, OWNERS, LISTS)
        torch.testing.assert_close(LOSSES[name](logps[mixed], ref[mixed], REWARDS[mixed], OWNERS[mixed], LISTS), whole)
        shuffled = LOSSES[name](logps[order], ref[order], REWARDS[order], OWNERS[order], LISTS)
        torch.testing.assert_close(shuffled[:3], whole[:3])


def test_plackett_luce_of_two_answers_is_dpo() -> None:
    logps, ref = answers(0).requires_grad_(), answers(1)
    owners = torch.arange(10) // 2
    lists = plackett_luce(logps, ref, torch.arange(10.0).flip(0), owners, 5, beta=0.3)
    pairs = dpo(logps[::2], logps[1::2], ref[::2], ref[1::2], beta=0.3)
    torch.testing.assert_close(lists, pairs)
    torch.testing.assert_close(*(torch.autograd.grad(found.sum(), logps)[0] for found in (lists, pairs)))


def test_copg_of_two_answers_half_a_reward_apart_is_ipo() -> None:
    logps, ref = answers(0), answers(1)
    rewards = torch.tensor([0.5, 0.0] * 5, dtype=torch.float64)
    lists = copg(logps, ref, rewards, torch.arange(10) // 2, 5, beta=0.3)
    one = torch.ones(5, dtype=torch.float64)
    pairs = ipo(logps[::2], logps[1::2], ref[::2], ref[1::2], one, one, beta=0.3)
    torch.testing.assert_close(lists, pairs * 0.3**2 / 2)


def test_tpo_of_two_answers_is_weighted_dpo_whatever_the_unit_of_rewards() -> None:
    logps, ref, owners = answers(0), answers(1), torch.arange(10) // 2
    rewards = torch.tensor([1.0, 0.0] * 5, dtype=torch.float64)
    weight = 1 / math.log(2) - 1 / math.log(3)
    found = tpo(logps, ref, rewards, owners, 5, beta=0.3)
    torch.testing.assert_close(found, weight * dpo(logps[::2], logps[1::2], ref[::2], ref[1::2], beta=0.3))
    torch.testing.assert_close(tpo(logps, ref, 1e6 * rewards - 5e5, owners, 5, beta=0.3), found)


def test_tpo_of_equal_models_still_has_a_gradient() -> None:
    """All scores are 0 at the first step: places by order, so that weights are not all 0."""
    logps = answers(0).requires_grad_()
    losses = tpo(logps, logps.detach(), REWARDS, OWNERS, LISTS)
    gradient = torch.autograd.grad(losses.sum(), logps)[0]
    assert gradient[OWNERS == 0].abs().min() > 0 and gradient[OWNERS == 0].argmin() == 1  # of the highest reward


def test_tpos_adaptive_steps_are_token_weights() -> None:
    """r = β Σ_steps w_step log-ratio(step): the sums that the loss is given, weighted by spans."""
    steps = -torch.rand(10, 3, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    ref, weights = steps.roll(1, 0), torch.tensor([1.0, 1.6, 0.4], dtype=torch.float64)
    found = tpo((steps * weights).sum(1), (ref * weights).sum(1), REWARDS, OWNERS, LISTS)
    by_step = tpo(((steps - ref) * weights).sum(1), torch.zeros(10).double(), REWARDS, OWNERS, LISTS)
    torch.testing.assert_close(found, by_step)


def test_a_list_with_nothing_to_rank_costs_nothing() -> None:
    logps, ref = answers(0), answers(1)
    for name in ("tpo", "copg"):
        losses = LOSSES[name](logps, ref, REWARDS, OWNERS, LISTS)
        assert losses[1] == 0  # one answer
    assert tpo(logps, ref, REWARDS, OWNERS, LISTS)[3] == 0  # equal rewards
    assert plackett_luce(logps, ref, REWARDS, OWNERS, LISTS)[1] == 0
    assert rrhf(logps, TOKENS, REWARDS, OWNERS, LISTS, alpha=0.0)[[1, 3]].tolist() == [0.0, 0.0]
