"""What a model is worth on held-out rows: loss per target token, and preference accuracy with its margin.

Rows are packed and padded to one capacity, so that a row's value depends neither on its pack nor on the model compared.
"""

from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from .data import Units, counted, read_units
from .forward import answer_logps, context_of, inference, pack_logps
from .losses import sft_loss
from .packing import pack_plan


def evaluate_sft(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, rows: pa.Table, capacity: int
) -> dict[str, Any]:
    """Mean negative log-likelihood, in nats, of the target tokens of `rows` (columns of a curated sft set).

    Returns loss (weighted by the rows' own weights; None where nothing could be scored), tokens (targets), rows, and
    excluded (reason -> rows: longer than `capacity` or the model's context, or without a target).
    """
    units = read_units("sft", tokenizer, rows, capacity, "drop", context_of(model.config))
    total = 0.0
    with inference(model):
        for pack in pack_plan(units.lengths, capacity):
            logps, weights, _ = pack_logps(model, units.pack(pack, pad_to=capacity))
            total += sft_loss(logps, weights).item()
    weight = float(units.weights.sum())
    return {
        "loss": total / weight if weight else None,
        "tokens": int(units.targets.sum()),
        "rows": len(set(units.row_ids)),
        "excluded": counted(units.excluded),
    }


def evaluate_preference(
    policy: PreTrainedModel,
    reference: PreTrainedModel | None,
    tokenizer: PreTrainedTokenizerBase,
    rows: pa.Table,
    beta: float,
    capacity: int,
) -> dict[str, Any]:
    """Share of pairs (columns of a curated preference set) whose implicit reward margin is positive, ties one half.

    margin = beta * [log π(chosen)/π_ref(chosen) - log π(rejected)/π_ref(rejected)] (arXiv 2305.18290). reference: None
    where it is the policy itself, of which every pair is a tie. Returns accuracy and mean margin (None without pairs),
    pairs, and excluded (reason -> rows).
    """
    units = read_units("dpo", tokenizer, rows, capacity, "drop", context_of(policy.config))
    margins = np.zeros(len(units.row_ids))
    if reference is not None:
        ratios = answers(policy, units, capacity) - answers(reference, units, capacity)
        margins = beta * (ratios[:, 0] - ratios[:, 1])
    pairs = len(margins)
    return {
        "accuracy": float(((margins > 0) + 0.5 * (margins == 0)).mean()) if pairs else None,
        "margin": float(margins.mean()) if pairs else None,
        "pairs": pairs,
        "excluded": counted(units.excluded),
    }


def answers(model: PreTrainedModel, units: Units, capacity: int) -> NDArray[np.float64]:
    """(U, 2) log-probabilities of the chosen and rejected answer of each pair."""
    found = np.zeros((len(units.row_ids), 2))
    with inference(model):
        for pack in pack_plan(units.lengths, capacity):
            padded = units.pack(pack, pad_to=capacity)
            found[pack] = answer_logps(model, padded)[: len(pack)].double().cpu().numpy()
    return found
