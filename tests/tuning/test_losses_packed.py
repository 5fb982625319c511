"""Trap 20, through a real model: each loss of ragged packs with shared prompts is the loss of every answer alone."""

import inspect
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel, Qwen3Config

from gristmill.tuning.attention import isolate
from gristmill.tuning.chat import Tokens
from gristmill.tuning.forward import pack_logps
from gristmill.tuning.losses import LOSSES
from gristmill.tuning.losses_math import sums_by_document
from gristmill.tuning.packing import build_pack

UNITS = 5
ANSWERS = 2 * UNITS
REFERENCE = -torch.linspace(5, 60, ANSWERS)
PACKS = ((0, 1, 2), (3,), (4,))  # units


def answers() -> list[Tokens]:
    """Two answers to each of five prompts, of 1 to 12 tokens; some begin alike, some tokens weigh more or nothing."""
    draw, found = np.random.default_rng(0), []
    for unit in range(UNITS):
        prompt, alike = draw.integers(0, 50, 4 + unit), draw.integers(0, 50, unit)
        for answer in range(2):
            own = draw.integers(0, 50, 1 + (5 * unit + 3 * answer) % 8)
            ids = np.concatenate([prompt, alike, [50 + answer], own]).astype(np.int32)
            weights = np.where(np.arange(len(ids)) < len(prompt), 0, draw.choice([0.0, 1, 1, 1, 2.5], len(ids)))
            weights[len(prompt) + len(alike)] = 1.0
            found.append(Tokens(ids, weights.astype(np.float32)))
    return found


Scored = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


@pytest.fixture(scope="module")
def scored() -> Iterator[tuple[PreTrainedModel, list[Scored], list[Scored]]]:
    """A tiny model, and its log-probabilities, weights and owners in packs of trees and of each answer alone; owners
    count over all answers."""
    torch.manual_seed(0)
    config = Qwen3Config(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        head_dim=8, vocab_size=61, max_position_embeddings=128,
    )  # fmt: skip
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    isolate(model)
    examples = answers()
    packed, alone = [], []
    for units in PACKS:
        documents = [2 * unit + answer for unit in units for answer in range(2)]
        pack = build_pack(examples, documents, pad_to=120, trees=[2] * len(units))
        assert len(pack.tokens) - pack.padding < sum(len(examples[index].ids) for index in documents)
        logps, weights, owners = pack_logps(model, pack)
        packed.append((logps, weights, owners + documents[0]))
    for index in range(ANSWERS):
        logps, weights, owners = pack_logps(model, build_pack(examples, [index]))
        alone.append((logps, weights, owners + index))
    yield model, packed, alone


def mean_loss(name: str, parts: list[Scored]) -> torch.Tensor:
    """As a step takes it: pack by pack, divided by what there is in the whole step."""
    total = torch.zeros(())
    weight = sum(float(weights.sum()) for _, weights, _ in parts)
    names = [p.name for p in inspect.signature(LOSSES[name]).parameters.values() if p.kind is p.POSITIONAL_OR_KEYWORD]
    for logps, weights, owners in parts:
        here, inverse = owners.unique(return_inverse=True)
        sums = sums_by_document(logps * weights, inverse, len(here))
        tokens, ref = sums_by_document(weights, inverse, len(here)), REFERENCE[here]
        given: dict[str, Any] = {
            "kl": torch.tensor(0.3), "desirable": here % 3 > 0, "rewards": ((here * 7) % 10).float(),
            "logps": sums, "ref_logps": ref, "tokens": tokens, "owners": here // 2 - here[0] // 2,
            "lists": len(here) // 2, "chosen": sums[::2], "rejected": sums[1::2], "ref_chosen": ref[::2],
            "ref_rejected": ref[1::2], "chosen_tokens": tokens[::2], "rejected_tokens": tokens[1::2],
        }  # fmt: skip
        if "weights" in names:
            given |= {"logps": logps, "weights": weights, "owners": owners, "balance": (1 + owners % 3).float()}
        losses = LOSSES[name](*(given[key] for key in names))
        total = total + losses.sum() / (weight if "weights" in names else ANSWERS if "desirable" in names else UNITS)
    return total


def joined(first: Scored, second: Scored) -> Scored:
    logps, weights, owners = (torch.cat(parts) for parts in zip(first, second, strict=True))
    return logps, weights, owners


@pytest.mark.parametrize("name", LOSSES)
def test_trap_20_packed_loss_and_gradients_are_those_of_every_answer_alone(
    name: str, scored: tuple[PreTrainedModel, list[Scored], list[Scored]]
) -> None:
    model, packed, alone = scored
    if {"rejected", "lists"} & set(inspect.signature(LOSSES[name]).parameters):  # a unit is both of its answers
        alone = [joined(*alone[at : at + 2]) for at in range(0, ANSWERS, 2)]
    together, apart = mean_loss(name, packed), mean_loss(name, alone)
    torch.testing.assert_close(together, apart, rtol=1e-5, atol=1e-6)
    weights = list(model.parameters())
    gradients = [torch.autograd.grad(loss, weights, retain_graph=True) for loss in (together, apart)]
    largest = max(float(gradient.abs().max()) for gradient in gradients[1])
    for ours, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-5 * largest)
    assert largest > 0
