"""Packed rows through real transformers models: logits of each document alone, windows, leaks, refusals."""

from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from gristmill.curation.folder import HouseError
from gristmill.tuning.attention import ARCHITECTURES, head, hidden_states, isolate, logit_form

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
        "query_pre_attn_scalar": 1,
        "attn_logit_softcapping": 0.5,  # low ones, so that they matter to a tiny model
        "final_logit_softcapping": 5.0,
    },
    "vaultgemma": {
        "sliding_window": 4,
        "query_pre_attn_scalar": 1,
        "attn_logit_softcapping": 0.5,
        "final_logit_softcapping": 5.0,
    },
    "granite": {"embedding_multiplier": 3.0, "attention_multiplier": 0.2, "logits_scaling": 4.0},
    "cohere2": {"sliding_window": 4, "layer_types": ["sliding_attention", "full_attention"]},
    "exaone4": {"sliding_window": 4, "layer_types": ["sliding_attention", "full_attention"]},
    "cwm": {"sliding_window": 4, "layer_types": ["full_attention", "sliding_attention"]},
    "seed_oss": {"attention_dropout": 0.0},
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


def capped(model: PreTrainedModel, states: Tensor) -> Tensor:
    """Logits as `logit_form` says them."""
    form = logit_form(model)
    logits = (states @ head(model).t() + form.get("bias", 0.0)) * form.get("scale", 1.0)
    return torch.tanh(logits / form["softcap"]) * form["softcap"] if "softcap" in form else logits


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_packed_equals_each_document_alone(kind: str) -> None:
    model = tiny(kind)
    tokens, positions = row()
    with torch.no_grad():
        expected = torch.cat([model(document[None], use_cache=False).logits[0] for document in tokens.split(LENGTHS)])
        isolate(model)
        packed = capped(model, hidden_states(model, tokens, positions, LENGTHS))
    torch.testing.assert_close(packed, expected, rtol=1e-5, atol=1e-5 * float(expected.abs().max()))


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_answers_that_share_their_prompt_equal_each_document_alone(kind: str) -> None:
    model = tiny(kind)
    tokens, _ = row()
    prompt, *answers = tokens.split([9, 1, 11, 5, 11])
    lengths, parents = (9, 1, 11, 5, 11), (-1, 0, 0, 0, -1)
    positions = torch.cat(
        [torch.arange(n) + (9 if parent == 0 else 0) for n, parent in zip(lengths, parents, strict=True)]
    )
    alone = [torch.cat([prompt, answer]) for answer in answers[:3]] + [answers[3]]
    with torch.no_grad():
        expected = [model(document[None], use_cache=False).logits[0] for document in alone]
        isolate(model)
        packed = capped(model, hidden_states(model, tokens, positions, lengths, parents)).split(lengths)
    for ours, theirs in zip(
        packed, [expected[0][:9], *(logits[9:] for logits in expected[:3]), expected[3]], strict=True
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5 * float(theirs.abs().max()))


@pytest.mark.parametrize("kind", ["gemma2", "vaultgemma"])
def test_soft_caps_matter_here(kind: str) -> None:
    """The comparisons above would see a forgotten cap, of attention or of logits."""
    tokens, positions = row()
    found = []
    for cap in (0.5, None):
        model = tiny(kind, attn_logit_softcapping=cap)
        isolate(model)
        with torch.no_grad():
            found.append(hidden_states(model, tokens, positions, LENGTHS))
    assert (found[0] - found[1]).abs().max() > 1e-2
    with torch.no_grad():
        assert (capped(model, found[0]) - found[0] @ head(model).t()).abs().max() > 1e-2


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


def test_rope_counts_whole_documents_of_a_tree() -> None:
    rope = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}
    model = tiny("llama", rope_parameters=rope, max_position_embeddings=8)
    isolate(model)
    tokens, positions = torch.arange(9), torch.tensor([0, 1, 2, 3, 4, 5, 5, 6, 7])
    hidden_states(model, tokens, positions, (5, 1, 3), (-1, 0, 0))
    with pytest.raises(HouseError, match="8 tokens, and one has 9"):
        hidden_states(model, tokens, positions, (5, 4), (-1, 0))


def test_head_is_the_output_layers_weight() -> None:
    model = tiny("llama", tie_word_embeddings=True)
    assert head(model) is model.get_input_embeddings().weight
    assert head(tiny("llama")).shape == (61, 32)


def test_logit_form_says_what_logits_are_besides() -> None:
    assert logit_form(tiny("llama")) == {}
    assert logit_form(tiny("granite", logits_scaling=4.0)) == {"scale": 0.25}
    assert logit_form(tiny("cohere")) == {"scale": 0.0625}
    assert logit_form(tiny("gemma2", final_logit_softcapping=30.0)) == {"softcap": 30.0}
    assert logit_form(tiny("phi"))["bias"].shape == (61,)
