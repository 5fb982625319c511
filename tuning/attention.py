"""Per-document attention behind transformers' attention door, and what the losses need of a model: states and head.

`isolate` switches a loaded causal language model to `packed_attention`. No mask function is registered under our name,
so transformers builds no mask; the documents' lengths travel as a keyword through the model to every layer.
"""

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel

from ..curation.folder import HouseError
from ..kernels.attention import packed_attention

NAME = "gristmill"
# Decoders whose only mixing of tokens is causal softmax attention through the door, each layer naming its own window.
ARCHITECTURES = (
    "llama", "mistral", "ministral", "qwen2", "qwen3", "phi3", "gemma", "gemma2", "gemma3_text", "olmo2", "olmo3",
    "granite", "smollm3", "starcoder2",
)  # fmt: skip
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
    softcap: float | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """transformers' attention function: q (1, Hq, T, D), k and v (1, Hkv, T, D) -> (1, T, Hq, D)."""
    if lengths is None:
        raise HouseError(
            "a model with isolated documents was called without `lengths`: call tuning.attention.hidden_states, or "
            "give it its own attention back by model.set_attn_implementation('sdpa') (to generate, for example)"
        )
    if dropout or softcap is not None:
        raise HouseError("per-document attention knows neither attention dropout nor attention soft-capping")
    return packed_attention(query, key, value, lengths, scale=scaling, window=sliding_window), None


AttentionInterface.register(NAME, _attention)


def isolate(model: PreTrainedModel) -> None:
    """Switches `model` to per-document attention. HouseError, naming the reason, where its documents cannot be kept
    apart: an unknown architecture, experts, recurrent or linear layers, attention dropout or soft-capping."""
    config = model.config
    where = f"{type(model).__name__} (model_type {config.model_type!r})"
    if config.is_encoder_decoder:
        raise HouseError(f"{where} is an encoder-decoder; only decoder-only causal language models can be tuned")
    other = sorted(set(getattr(config, "layer_types", None) or ()) - set(LAYERS))
    if other:
        raise HouseError(f"{where} has layers {other}, which carry state across the documents of a pack")
    if config.model_type not in ARCHITECTURES:
        raise HouseError(
            f"{where} is not known to keep the documents of a pack apart (experts, recurrence or attention of its "
            f"own?). Known: {', '.join(ARCHITECTURES)}"
        )
    if getattr(config, "attention_dropout", 0.0):
        raise HouseError(f"{where} has attention_dropout {config.attention_dropout}; set it to 0 in its config.json")
    if getattr(config, "attn_logit_softcapping", None) is not None:
        raise HouseError(f"{where} soft-caps its attention scores, which per-document attention does not do")
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


def hidden_states(model: PreTrainedModel, tokens: Tensor, positions: Tensor, lengths: Sequence[int]) -> Tensor:
    """Final hidden states (T, H), after the last norm, of one packed row in an isolated model.

    tokens, positions: int64 (T,); positions count within each document. lengths: of the documents, summing to T.
    """
    if model.config._attn_implementation != NAME:
        raise HouseError("documents of a pack would see each other: call tuning.attention.isolate(model) first")
    _check_rope(model.config, max(lengths, default=0))
    output = model.base_model(
        input_ids=tokens[None],
        position_ids=positions[None],
        attention_mask=None,
        use_cache=False,
        lengths=tuple(lengths),
    )
    states: Tensor = output.last_hidden_state[0]
    return states


def head(model: PreTrainedModel) -> Tensor:
    """Weight (V, H) of the output layer, tied or not. HouseError where logits are more than states times weight."""
    where = f"{type(model).__name__} (model_type {model.config.model_type!r})"
    for name, neutral in (("final_logit_softcapping", None), ("logits_scaling", 1.0), ("logit_scale", 1.0)):
        value = getattr(model.config, name, neutral)
        if value is not None and value != neutral:
            raise HouseError(f"{where} has {name} {value}: its logits are not hidden states times the head's weight")
    layer: nn.Module = model.get_output_embeddings()  # type: ignore[no-untyped-call]
    if not isinstance(layer, nn.Linear):
        raise HouseError(f"{where} has no linear output layer")
    if layer.bias is not None:
        raise HouseError(f"{where} has a bias in its output layer")
    return layer.weight
