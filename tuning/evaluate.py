"""What a model is worth on held-out rows: loss per target token; preference accuracy with its margin; of single answers
with a label, their log-probability per target token and how well the good ones stand above the bad ones.

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
    where it is the policy itself, of which every pair is a tie. Returns accuracy and mean margin (None without pairs,
    NaN where a margin is), pairs, and excluded (reason -> rows).
    """
    units = read_units("dpo", tokenizer, rows, capacity, "drop", context_of(policy.config))
    margins = np.zeros(len(units.row_ids))
    if reference is not None:
        ratios = (answers(policy, units, capacity) - answers(reference, units, capacity)).reshape(-1, 2)
        margins = beta * (ratios[:, 0] - ratios[:, 1])
    pairs = len(margins)
    right = np.where(np.isnan(margins), np.nan, (margins > 0) + 0.5 * (margins == 0))
    return {
        "accuracy": float(right.mean()) if pairs else None,
        "margin": float(margins.mean()) if pairs else None,
        "pairs": pairs,
        "excluded": counted(units.excluded),
    }


def evaluate_unpaired(
    policy: PreTrainedModel,
    reference: PreTrainedModel | None,
    tokenizer: PreTrainedTokenizerBase,
    rows: pa.Table,
    beta: float,
    capacity: int,
) -> dict[str, Any]:
    """Single answers with a label (columns of a curated kto set), and whether the model tells good from bad ones.

    logp_desirable, logp_undesirable: log-probability per target token, in nats, over all answers of that label.
    logp_auc: `auc` of the answers' own mean log-probabilities. With a reference also reward_auc and margin, of the
    implicit rewards beta * log π/π_ref (arXiv 2402.01306): their `auc`, and their mean over desirable answers minus
    that over undesirable ones; a policy that is its own reference rewards every answer with 0. None where a label that
    it takes has no answer. desirable, undesirable: answers; excluded: reason -> rows.
    """
    units = read_units("kto", tokenizer, rows, capacity, "drop", context_of(policy.config))
    logps, tokens, good = answers(policy, units, capacity), units.weights, units.labels
    assert good is not None
    found = {
        "logp_desirable": _ratio(logps[good], tokens[good]),
        "logp_undesirable": _ratio(logps[~good], tokens[~good]),
        "logp_auc": auc(logps / tokens, good),
    }
    if reference is not None:
        before = logps if reference is policy else answers(reference, units, capacity)
        rewards = beta * (logps - before)
        both = good.any() and not good.all()
        found["reward_auc"] = auc(rewards, good)
        found["margin"] = float(rewards[good].mean() - rewards[~good].mean()) if both else None
    counts = {"desirable": int(good.sum()), "undesirable": int((~good).sum())}
    return {**found, **counts, "excluded": counted(units.excluded)}


def auc(scores: NDArray[np.float64], good: NDArray[np.bool_]) -> float | None:
    """How often a good one's score is above a bad one's, over all such pairs, ties one half: the area under the ROC
    curve (Mann-Whitney's U over its greatest value). None where one of the kinds is missing; NaN where a score is."""
    above, below = scores[good], np.sort(scores[~good])
    if not len(above) or not len(below):
        return None
    if np.isnan(scores).any():
        return float("nan")
    wins = np.searchsorted(below, above, "left") + np.searchsorted(below, above, "right")
    return float(wins.mean() / (2 * len(below)))


def answers(model: PreTrainedModel, units: Units, capacity: int) -> NDArray[np.float64]:
    """(D,) weighted sums of log-probabilities of the units' documents."""
    found = np.zeros(len(units.documents))
    with inference(model):
        for pack in pack_plan(units.lengths, capacity):
            padded = units.pack(pack, pad_to=capacity)
            found[padded.documents] = answer_logps(model, padded).double().cpu().numpy()
    return found


def _ratio(sums: NDArray[np.float64], tokens: NDArray[np.float64]) -> float | None:
    return float(sums.sum() / tokens.sum()) if len(sums) else None
