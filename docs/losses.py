"""Makes docs/losses.md from the losses' own docstrings and signatures and from the tests that hold them.

python docs/losses.py
"""

import inspect
import re
import runpy
from collections.abc import Callable
from pathlib import Path
from typing import Any

from gristmill.tuning.losses import LOSSES

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "losses.md"
TESTS = ROOT / "tests" / "tuning"
FAMILIES = {"pairs": "Pairs", "unpaired": "Single answers", "lists": "Lists", "tokens": "Supervised tokens"}


def page() -> str:
    """The whole page."""
    parts = [HEAD]
    for family, title in FAMILIES.items():
        rows = [row(loss, oracles(family)) for loss in LOSSES.values() if loss.__module__.endswith(f"losses_{family}")]
        parts.append(f"## {title}\n\n{INTRO[family]}\n\n{TOP}\n" + "\n".join(rows) + "\n")
    return "\n".join([*parts, TAIL])


def row(loss: Callable[..., Any], tests: dict[str, list[str]]) -> str:
    """A loss as a line of its family's table."""
    summary, formula, *_ = inspect.cleandoc(loss.__doc__ or "").split("\n\n")
    options = [p for p in inspect.signature(loss).parameters.values() if p.kind is p.KEYWORD_ONLY]
    after = re.sub(r"(?<=arXiv )\d{4}\.\d{5}", r"[\g<0>](https://arxiv.org/abs/\g<0>)", " ".join(summary.split()))
    cells = [
        f"`{loss.__name__}`",
        after,
        "<br>".join(f"`{line.strip()}`" for line in formula.splitlines()),
        ", ".join(f"`{option.name}` {option.default:g}" for option in options) or "none",
        ", ".join(f"`{test}`" for test in tests[loss.__name__]),
    ]
    return "| " + " | ".join(cell.replace("|", r"\|") for cell in cells) + " |"


def oracles(family: str) -> dict[str, list[str]]:
    """Of each loss the tests of its family's file that are parametrised by its name: those against another's code or a
    formula."""
    found: dict[str, list[str]] = {}
    for name, value in runpy.run_path(str(TESTS / f"test_losses_{family}.py")).items():
        for mark in getattr(value, "pytestmark", ()):
            names, values = mark.args[:2] if mark.name == "parametrize" else ("", ())
            if (names if isinstance(names, str) else names[0]) == "name":
                for case in dict.fromkeys(case if isinstance(case, str) else case[0] for case in values):
                    found.setdefault(case, []).append(name)
    return found


HEAD = """\
# Losses

A recipe or the command line names a loss, `loss: ipo`, a loss with options, `loss: {ipo: {beta: 0.2}}`, or a function
of your own by its dotted path, `loss: my_package.my_losses.mine`. Made from docstrings, signatures and tests by
`python docs/losses.py`; a test holds the page to them.

A loss is a plain function. What it needs is what its positional parameters are called; its keyword-only parameters are
its options. It returns one value for each pair, row, list or target; the sum over a whole optimizer step (all packs,
all processes) is divided by the number of them, for supervised tokens by their summed weights. So no loss depends on
what shares a pack with what. One that takes a `ref_…` parameter gets log-probabilities of the weights that the stage
started from; one that does not costs no reference.

```python
import torch


def mine(chosen, rejected, chosen_tokens, rejected_tokens, *, margin: float = 0.5) -> torch.Tensor:
    return torch.relu(margin - chosen / chosen_tokens + rejected / rejected_tokens)
```

In the formulas σ is the logistic function, w and l mark the chosen and the rejected answer, log π(y|x) is the sum over
an answer's tokens of their log-probabilities times their weights (1, or what a span says), ρ = log π/π_ref,
Δ = ρ_w - ρ_l, log p̄ = log π(y|x) / tokens, and tokens is the sum of those weights.

The last column names the tests in `tests/tuning/test_losses_….py` of the same family that compare with another's code
(TRL 1.16, called on the same numbers) or with the formula written again over Python numbers in fp64. All losses besides
pass the tests of `test_losses.py`: gradients against finite differences, finite losses and gradients at extremes, NaN
in is NaN out, fp32 against fp64, and independence of what else is in a pack.
"""

TOP = "| name | after | formula | options | compared in |\n|---|---|---|---|---|"

INTRO = {
    "pairs": "Preference rows: `chosen`, `rejected`, `ref_chosen`, `ref_rejected`, `chosen_tokens`, `rejected_tokens`.",
    "unpaired": """\
Rows with a label: `logps`, `ref_logps`, `tokens`, `desirable`, `kl`. KTO's `kl` is its reference point z of one
optimizer step: the mean of ρ over mismatched prompts and answers (`kto_mismatch`: each prompt of the step with the
answer half the step away), over all packs and processes, then clamped at 0, without gradient (`kto_kl`).""",
    "lists": """\
Any number of answers to a prompt, each with a reward: `logps`, `ref_logps`, `tokens`, `rewards`, `owners`, `lists`. v
is the reward brought to [0, 1] within its list, τ the place by s.""",
    "tokens": """\
Supervised rows: `logps`, `weights`, `owners`, `balance`; p_t is the probability of a target token, w_t its weight, b_t
the factor that makes tasks weigh the same (`task_weights`).""",
}

TAIL = """\
## By spans alone

Spans give characters of a turn a weight; weights enter every sum above, and a token of weight 0 never meets the head.

- Step-DPO (arXiv 2406.18629): the correct prefix in the prompt, or spans of weight 0 on all but the step; `dpo`.
  `test_step_dpo_after_an_empty_prefix_is_dpo_of_the_step`
- Mask-DPO (arXiv 2503.02846): spans of weight 0 on the wrong sentences of the chosen answer and the right ones of the
  rejected; `dpo`. `test_mask_dpo_with_masks_of_ones_is_dpo_and_masked_tokens_get_no_gradient`
- DDPO of RLHF-V (arXiv 2312.00849): spans of weight γ on corrected segments; `dpo_norm`.
  `test_ddpo_is_dpo_norm_with_a_weight_on_corrected_segments`
- TPO's adaptive step rewards (arXiv 2410.12854): spans of each step's weight; `tpo`.
  `test_tpos_adaptive_steps_are_token_weights`
- Distilling Step-by-Step (arXiv 2305.02301): spans of weight λ on the rationale; `nll`.
  `test_distilling_step_by_step_is_a_weight_on_the_rationale`
- FAIT's marks (arXiv 2503.16913): spans of a weight above 1 on differing tokens; `fait`.
  `test_fait_weighs_marked_tokens_alone_and_less_as_they_are_learnt`

## Noise on what the model reads

- Masked Thought (arXiv 2403.02178): each trained token is hidden as an input with the probability given; targets stay.
  `test_masked_thought_hides_a_share_of_trained_tokens_alone`
- NEFTune (arXiv 2310.05914): uniform noise in ±alpha / sqrt(L d) on embeddings, L the tokens of the document (not of
  the pack), d the width. `test_neftune_scales_by_the_document_and_not_by_the_pack`

Both are drawn by step and row, so that neither packing nor resuming changes them:
`test_masked_thought_is_the_same_however_rows_are_packed_and_differs_by_seed_and_row`,
`test_neftune_is_the_same_however_rows_are_packed`.

## Left out

AOT (arXiv 2406.05882) sorts the log-ratios of a batch, so that a pair's loss would depend on its neighbours. BCO
(arXiv 2404.04656) shifts rewards by a running mean over steps; without the shift it is `fdpo` on both answers. WPO
(arXiv 2406.11827), FIRST and SFTMix (arXiv 2410.05248) need more of the model than the log-probability of a target:
sums over the vocabulary, a teacher's distribution, mixed hidden states.
"""


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
