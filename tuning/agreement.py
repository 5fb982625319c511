"""Do two models say the same? Their logits on a few probes, and how far apart they lie."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedTokenizerBase

from .chat import conversation_ids
from .lora import load_adapter
from .models import load_config, no_bars
from .quantised import is_nf4, load_nf4

# Of the logits' spread. fp32: sums in another order. fp16, bf16: one rounding of each weight, through the layers. nf4:
# quantised again, which costs some tenths; swapped nibbles or lost constants cost 1.4.
TOLERANCES = {torch.float32: 1e-3, torch.float16: 1e-2, torch.bfloat16: 5e-2}
NF4_TOLERANCE = 0.6
_ASKED = [
    {"role": "user", "content": "Why does bread rise? Answer in two sentences."},
    {
        "role": "assistant",
        "content": "Yeast eats sugar and gives off gas. The gluten of the dough holds it.",
    },
]


def tolerance_of(nf4: bool, dtypes: Iterable[torch.dtype]) -> float:
    """The largest `difference` (compare) that rounding to these dtypes explains."""
    return NF4_TOLERANCE if nf4 else max(TOLERANCES[dtype] for dtype in dtypes)


def probes(tokenizer: PreTrainedTokenizerBase) -> list[Tensor]:
    """Token ids: a conversation in the model's own template, and two rows of tokens drawn from its vocabulary."""
    draw = torch.randint(len(tokenizer), (2, 48), generator=torch.Generator().manual_seed(0))
    asked = [item for item in conversation_ids(tokenizer, [_ASKED]) if not isinstance(item, Exception)]
    return [*(torch.from_numpy(ids).long() for ids in asked), *draw]


def logits_of(
    model: Path, adapter: Path | None, dtype: torch.dtype, device: str, ids: Iterable[Tensor]
) -> list[Tensor]:
    """Logits (T, V), in fp32 on the CPU, of each row of ids under a model's folder and maybe an adapter. The weights
    are kept and computed with in `dtype`; the attention is transformers' own."""
    config = load_config(model)
    with no_bars():
        if is_nf4(config):
            loaded: Any = load_nf4(model, config, dtype)
        else:
            loaded = AutoModelForCausalLM.from_pretrained(model, local_files_only=True, dtype=dtype)
    loaded = loaded.to(device)
    loaded.set_attn_implementation("eager")
    if adapter is not None:
        load_adapter(loaded, adapter)
    loaded.eval()
    with torch.inference_mode():
        return [loaded(row[None].to(device), use_cache=False).logits[0].float().cpu() for row in ids]


def compare(ours: list[Tensor], theirs: list[Tensor]) -> dict[str, float]:
    """difference: root mean square of the logits' difference over that of the first ones, both about each place's
    mean; largest: absolute; kl: mean Kullback-Leibler divergence of the next token's distribution, in nats; top1: share
    of places with the same likeliest token."""
    first, second = torch.cat(ours).double(), torch.cat(theirs).double()
    centred = [logits - logits.mean(-1, keepdim=True) for logits in (first, second)]
    logs = [logits.log_softmax(-1) for logits in (first, second)]
    return {
        "difference": float((centred[1] - centred[0]).pow(2).mean().sqrt() / centred[0].pow(2).mean().sqrt()),
        "largest": float((second - first).abs().max()),
        "kl": float((logs[0].exp() * (logs[0] - logs[1])).sum(-1).mean()),
        "top1": float((first.argmax(-1) == second.argmax(-1)).double().mean()),
    }
