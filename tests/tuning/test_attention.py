"""Packed rows through real transformers models: logits of each document alone, windows, leaks, refusals."""

from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from gristmill.curation.folder import HouseError
from gristmill.tuning.attention import ARCHITECTURES, head, hidden_states, isolate

LENGTHS = (5, 17, 1, 5, 9)
WINDOWS = {  # sliding windows shorter than the longest document, on all layers or some
    "mistral": {"sliding_window": 4},
    "phi3": {"sliding_window": 4},
    "starcoder2": {"sliding_window": 4},
    "gemma3_text": {"sliding_window": 4, "layer_types": ["sliding_attention", "full_attention"]},
    "olmo3": {"sliding_window": 4, "layer_types": ["sliding_attention", "full_attention"]},
    "qwen2": {"sliding_window": 4, "use_sliding_window": True, "max_window_layers": 1},
    "qwen3": {"sliding_window": 4, "layer_types": ["full_attention", "sliding_attention"], "use_sliding_window": True},
    "gemma2": {
        "sliding_window": 4,
        "layer_types": ["sliding_attention", "full_attention"],
        "attn_logit_softcapping": None,
        "final_logit_softcapping": None,
    },
    "granite": {"embedding_multiplier": 3.0, "attention_multiplier": 0.2, "residual_multiplier": 0.5},
}


def tiny(kind: str, **more: Any) -> PreTrainedModel:
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        kind,
        **{
            "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
            "num_key_value_heads": 2, "head_dim": 8, "vocab_size": 61, "max_position_embeddings": 64,
            "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
        }
        | WINDOWS.get(kind, {}) | more,
    )  # fmt: skip
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    with torch.no_grad():  # the default of 0.02 leaves attention nearly uniform, and mistakes nearly invisible
        for name, parameter in model.named_parameters():
            if parameter.ndim == 2 and "norm" not in name:
                parameter.mul_(8)
    return model


def row(lengths: tuple[int, ...] = LENGTHS) -> tuple[Tensor, Tensor]:
    tokens = torch.randint(61, (sum(lengths),), generator=torch.Generator().manual_seed(1))
    return tokens, torch.cat([torch.arange(length) for length in lengths])


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_packed_equals_each_document_alone(kind: str) -> None:
    model = tiny(kind)
    tokens, positions = row()
    with torch.no_grad():
        alone = [model(document[None], use_cache=False).logits[0] for document in tokens.split(list(LENGTHS))]
        isolate(model)
        states = hidden_states(model, tokens, positions, LENGTHS)
        packed = states @ model.get_output_embeddings().weight.t()
    expected = torch.cat(alone) * getattr(model.config, "logits_scaling", 1.0)
    torch.testing.assert_close(packed, expected, rtol=1e-5, atol=1e-5 * float(expected.abs().max()))


@pytest.mark.parametrize("kind", ["mistral", "qwen2", "qwen3", "gemma3_text", "phi3"])
def test_the_window_matters_here(kind: str) -> None:
    """The comparison above would see an ignored window."""
    model = tiny(kind)
    tokens, positions = row()
    isolate(model)
    with torch.no_grad():
        narrow = hidden_states(model, tokens, positions, LENGTHS)
        for module in model.modules():
            if hasattr(module, "sliding_window"):
                module.sliding_window = None
        model.config.sliding_window = None
        wide = hidden_states(model, tokens, positions, LENGTHS)
    assert (narrow - wide).abs().max() > 1e-2


def test_no_gradient_crosses_documents() -> None:
    model = tiny("qwen3")
    isolate(model)
    tokens, positions = row()
    edges = [sum(LENGTHS[:index]) for index in range(len(LENGTHS) + 1)]
    seen: list[Tensor] = []
    model.get_input_embeddings().register_forward_hook(lambda _module, _inputs, output: seen.append(output))
    for start, stop in pairwise(edges):
        seen.clear()
        states = hidden_states(model, tokens, positions, LENGTHS)
        (gradient,) = torch.autograd.grad(states[start:stop].square().sum(), seen)
        assert not gradient[0, :start].any() and not gradient[0, stop:].any()
        assert gradient[0, start:stop].any()


def test_gradients_through_activation_checkpointing() -> None:
    tokens, positions = row()
    found = []
    for checkpointing in (False, True):
        model = tiny("llama").train()
        isolate(model)
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        hidden_states(model, tokens, positions, LENGTHS).square().sum().backward()
        found.append([parameter.grad for parameter in model.base_model.parameters()])
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))


def test_the_models_own_attention_comes_back() -> None:
    model = tiny("llama")
    tokens, _ = row()
    with torch.no_grad():
        before = model(tokens[None]).logits
        isolate(model)
        with pytest.raises(HouseError, match="set_attn_implementation"):
            model(tokens[None])
        model.set_attn_implementation("eager")
        assert torch.equal(model(tokens[None]).logits, before)


def test_states_of_a_model_that_is_not_isolated_are_refused() -> None:
    with pytest.raises(HouseError, match="isolate"):
        hidden_states(tiny("llama"), *row(), LENGTHS)


@pytest.mark.parametrize(
    ("kind", "settings", "message"),
    [
        ("mixtral", {"num_local_experts": 2}, "mixtral.*mixture of experts .num_experts 2"),
        ("qwen3_moe", {"num_experts": 2, "moe_intermediate_size": 8}, "qwen3_moe.*mixture of experts"),
        ("mamba", {"state_size": 4}, "linear_attention.*carry state"),
        ("lfm2", {"layer_types": ["conv", "full_attention"]}, "conv.*carry state"),
        ("llama", {"attention_dropout": 0.1}, "attention_dropout 0.1"),
        ("gemma3_text", {"use_bidirectional_attention": True}, "use_bidirectional_attention"),
    ],
    ids=lambda value: value if isinstance(value, str) and " " not in value and "." not in value else "",
)
def test_models_that_cannot_be_isolated_are_refused_by_name(kind: str, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(HouseError, match=message):
        isolate(tiny(kind, **settings))


def test_an_encoder_decoder_is_refused() -> None:
    model = tiny("llama")
    model.config.is_encoder_decoder = True
    with pytest.raises(HouseError, match="encoder-decoder"):
        isolate(model)


def test_frequencies_that_depend_on_the_pack_are_refused() -> None:
    rope = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}
    model = tiny("llama", rope_parameters=rope, max_position_embeddings=8)
    isolate(model)
    hidden_states(model, *row((8, 3)), (8, 3))
    with pytest.raises(HouseError, match="8 tokens, and one has 9"):
        hidden_states(model, *row((9, 3)), (9, 3))


def test_head_is_the_output_layers_weight() -> None:
    model = tiny("llama", tie_word_embeddings=True)
    assert head(model) is model.get_input_embeddings().weight
    assert head(tiny("llama")).shape == (61, 32)
    for kind, settings, name in (
        ("granite", {"logits_scaling": 4.0}, "logits_scaling 4.0"),
        ("gemma2", {"final_logit_softcapping": 30.0}, "final_logit_softcapping 30.0"),
    ):
        with pytest.raises(HouseError, match=name):
            head(tiny(kind, **settings))
