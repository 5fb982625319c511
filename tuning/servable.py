"""Will vLLM serve what a run is about to train? Asked before the first step, of settings alone: imports nothing heavy.

The rules are those of vLLM 0.32 (lora/peft_helper.py, config/lora.py, its model registry), tried by `make test-vllm`.
"""

from collections.abc import Mapping
from typing import Any

MAX_RANK = 512
RANKS = (1, 8, 16, 32, 64, 128, 256, 320, MAX_RANK)  # that --max-lora-rank may be; its default is 16
# Of the architectures that we train, those in vLLM's registry, all of them with LoRA; some through transformers.
ARCHITECTURES = (
    "LlamaForCausalLM", "MistralForCausalLM", "Ministral3ForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM",
    "PhiForCausalLM", "Phi3ForCausalLM", "GemmaForCausalLM", "Gemma2ForCausalLM", "Gemma3ForCausalLM",
    "VaultGemmaForCausalLM", "OlmoForCausalLM", "Olmo2ForCausalLM", "Olmo3ForCausalLM", "GraniteForCausalLM",
    "SmolLM3ForCausalLM", "Starcoder2ForCausalLM", "CohereForCausalLM", "Cohere2ForCausalLM", "GlmForCausalLM",
    "Glm4ForCausalLM", "Exaone4ForCausalLM", "Ernie4_5ForCausalLM", "SeedOssForCausalLM", "ApertusForCausalLM",
    "ArceeForCausalLM", "CwmForCausalLM", "HunYuanDenseV1ForCausalLM",
)  # fmt: skip
TARGETS = frozenset({"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "qkv_proj"})
TARGETS |= {"gate_up_proj", "c_fc", "c_proj", "dense", "fc1", "fc2"}  # of Phi3, GLM, Starcoder2 and Phi
_REFUSED = (
    "modules_to_save", "layer_replication", "lora_bias", "use_qalora", "use_bdlora", "alora_invocation_tokens",
    "trainable_token_indices", "target_parameters",
)  # fmt: skip
_INITS = (True, False, "gaussian", "eva", "orthogonal", "mica", "lora_ga")  # the others change the base's weights


def needed_rank(rank: int) -> int | None:
    """The smallest --max-lora-rank under which vLLM takes an adapter of this rank; None where there is none."""
    return next((choice for choice in RANKS if rank <= choice), None)


def check_servable(config: Any, lora: Any | None) -> list[str]:
    """Why vLLM would not serve the result, each with what to do; empty where it would.

    config: a transformers configuration. lora: settings.Lora, or a mapping as PEFT's adapter_config.json holds it; None
    where all weights are tuned, or where the adapter will be merged."""
    problems = []
    names = list(getattr(config, "architectures", None) or ())
    if not set(names) & set(ARCHITECTURES):
        said = ", ".join(names) or f"model_type {getattr(config, 'model_type', None)!r}"
        problems.append(f"vLLM is not known to serve {said}; known: {', '.join(ARCHITECTURES)}")
    if lora is None:
        return problems
    return problems + _adapter_problems(lora if isinstance(lora, Mapping) else vars(lora))


def _adapter_problems(fields: Mapping[str, Any]) -> list[str]:
    problems = []
    ranks = [fields.get("r", fields.get("rank", 0)), *(fields.get("rank_pattern") or {}).values()]
    if max(ranks) > MAX_RANK:
        problems.append(f"rank {max(ranks)} is more than vLLM's largest max_lora_rank {MAX_RANK}: lower it, or merge")
    if fields.get("use_dora", fields.get("dora", False)):
        problems.append("vLLM takes no DoRA adapter: export it merged")
    if (bias := fields.get("bias", "none")) not in ("none", None, False):
        problems.append(f"vLLM takes no adapter with bias {bias!r}: set it to none, or export it merged")
    for name in _REFUSED:
        if fields.get(name):
            problems.append(f"vLLM takes no adapter with {name}: export it merged")
    if (init := fields.get("init_lora_weights", True)) not in _INITS:
        problems.append(f"vLLM takes no adapter with init_lora_weights {init!r}, which changes the base's weights")
    targets = fields.get("target_modules", fields.get("targets"))
    named = {str(name).rpartition(".")[2] for name in targets} if isinstance(targets, list | tuple | set) else set()
    if other := sorted(named - TARGETS):
        problems.append(f"vLLM adapts no module called {', '.join(other)}: leave it out, or export the adapter merged")
    return problems
