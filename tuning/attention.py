"""Per-document attention behind transformers' attention door, and what the losses need of a model: states and head.

`isolate` switches a loaded causal language model to `packed_attention`. No mask function is registered under our name,
so transformers builds no mask; the documents' lengths travel as a keyword through the model to every layer.
"""

from collections.abc import Sequence
from operator import add
from typing import Any

from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel

from ..curation.folder import HouseError
from ..kernels.attention import packed_attention

NAME = "gristmill"
# Decoders whose only mixing of tokens is causal softmax attention through the door, each layer naming its own window.
ARCHITECTURES = (
    "llama", "mistral", "ministral", "ministral3", "qwen2", "qwen3", "phi", "phi3", "gemma", "gemma2", "gemma3_text",
    "vaultgemma", "olmo", "olmo2", "olmo3", "granite", "smollm3", "starcoder2", "cohere", "cohere2", "glm", "glm4",
    "exaone4", "ernie4_5", "seed_oss", "apertus", "arcee", "cwm", "helium", "hunyuan_v1_dense",
)  # fmt: skip
EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
LAYERS = ("full_attention", "sliding_attention")


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    lengths: Sequence[int] | None = None,
    parents: Sequence[int] | None = None,
    softcap: float | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """transformers' attention function: q (1, Hq, T, D), k and v (1, Hkv, T, D) -> (1, T, Hq, D)."""
    if lengths is None:
        raise HouseError(
            "a model with isolated documents was called without `lengths`: call tuning.attention.hidden_states, or "
            "give it its own attention back by model.set_attn_implementation('sdpa') (to generate, for example)"
        )
    if dropout:
        raise HouseError("per-document attention knows no attention dropout: set attention_dropout to 0")
    output = packed_attention(
        query, key, value, lengths, parents, scale=scaling, window=sliding_window, softcap=softcap
    )
    return output, None


AttentionInterface.register(NAME, _attention)


def isolate(model: PreTrainedModel) -> None:
    """Switches `model` to per-document attention. HouseError, naming the reason, where its documents cannot be kept
    apart: experts, recurrent or linear layers, an unknown architecture, attention dropout."""
    config = model.config
    where = f"{type(model).__name__} (model_type {config.model_type!r})"
    if config.is_encoder_decoder:
        raise HouseError(f"{where} is an encoder-decoder; only decoder-only causal language models can be tuned")
    experts = next((name for name in EXPERTS if (getattr(config, name, None) or 0) > 1), None)
    if experts is not None:
        raise HouseError(
            f"{where} is a mixture of experts ({experts} {getattr(config, experts)}), whose experts and router are not "
            "trained here; choose a dense model"
        )
    other = sorted(set(getattr(config, "layer_types", None) or ()) - set(LAYERS))
    if other:
        raise HouseError(f"{where} has layers {other}, which carry state across the documents of a pack")
    if config.model_type not in ARCHITECTURES:
        raise HouseError(
            f"{where} is not known to keep the documents of a pack apart (recurrence, or attention of its own?). "
            f"Known: {', '.join(ARCHITECTURES)}"
        )
    if getattr(config, "attention_dropout", 0.0):
        raise HouseError(f"{where} has attention_dropout {config.attention_dropout}; set it to 0 in its config.json")
    if getattr(config, "use_bidirectional_attention", False):
        raise HouseError(f"{where} has use_bidirectional_attention: not a causal language model")
    model.set_attn_implementation(NAME)
    if config._attn_implementation != NAME:
        raise HouseError(f"{where} does not let its attention be replaced")


def _check_rope(config: Any, longest: int) -> None:
    """Rotary frequencies that depend on the longest document of the pack would let documents change each other."""
    parameters = getattr(config, "rope_parameters", None) or {}
    kind = parameters.get("rope_type", "default")
    if kind in ("dynamic", "longrope"):
        limit = parameters.get("original_max_position_embeddings") or config.max_position_embeddings
        if longest > limit:
            raise HouseError(
                f"rope_type {kind!r} changes all frequencies once a document exceeds {limit} tokens, and one has "
                f"{longest}: drop or cut documents beyond {limit} tokens"
            )


def hidden_states(
    model: PreTrainedModel,
    tokens: Tensor,
    positions: Tensor,
    lengths: Sequence[int],
    parents: Sequence[int] | None = None,
) -> Tensor:
    """Final hidden states (T, H), after the last norm, of one packed row in an isolated model.

    tokens, positions: int64 (T,); positions count within each document. lengths: of the segments, summing to T;
    parents: the segment that each continues, -1 for none (None: all of them).
    """
    if model.config._attn_implementation != NAME:
        raise HouseError("documents of a pack would see each other: call tuning.attention.isolate(model) first")
    above = None if parents is None or max(parents, default=-1) < 0 else tuple(parents)
    before = [0 if parent < 0 else lengths[parent] for parent in above or (-1,) * len(lengths)]
    _check_rope(model.config, max(map(add, before, lengths), default=0))
    output = model.base_model(
        input_ids=tokens[None],
        position_ids=positions[None],
        attention_mask=None,
        use_cache=False,
        lengths=tuple(lengths),
        parents=above,
    )
    states: Tensor = output.last_hidden_state[0]
    return states


def head(model: PreTrainedModel) -> Tensor:
    """Weight (V, H) of the output layer, tied or not."""
    return _output_layer(model).weight


def logit_form(model: PreTrainedModel) -> dict[str, Any]:
    """What the model's logits are besides states times the head's weight, as `kernels.logprob.target_logprobs` is told
    it: bias, scale (Cohere, Granite), softcap (Gemma 2); nothing for most."""
    config, form = model.config, dict[str, Any]()
    bias = _output_layer(model).bias
    if bias is not None:
        form["bias"] = bias
    scale = (getattr(config, "logit_scale", None) or 1.0) / (getattr(config, "logits_scaling", None) or 1.0)
    if scale != 1.0:
        form["scale"] = scale
    if getattr(config, "final_logit_softcapping", None) is not None:
        form["softcap"] = config.final_logit_softcapping
    return form


def _output_layer(model: PreTrainedModel) -> nn.Linear:
    layer: nn.Module = model.get_output_embeddings()  # type: ignore[no-untyped-call]
    if not isinstance(layer, nn.Linear):
        raise HouseError(f"{type(model).__name__} (model_type {model.config.model_type!r}) has no linear output layer")
    return layer
