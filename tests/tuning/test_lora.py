"""LoRA in real transformers models: PEFT reads our adapters and we read PEFT's, off is off, only A and B learn."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from gristmill.curation.folder import HouseError
from gristmill.kernels.nf4 import NF4, dequantise, quantise
from gristmill.tuning.lora import LoraLinear, adapter_off, add_lora, load_adapter, save_adapter, trainable, unpack
from gristmill.tuning.settings import Lora

KINDS = ("llama", "qwen3", "qwen2", "phi3")  # qwen2: with biases; phi3: fused projections
BASES = ("fp32", "nf4", "nf4-single")
TOKENS = torch.randint(61, (2, 11), generator=torch.Generator().manual_seed(1))


def tiny(kind: str = "llama", seed: int = 0) -> PreTrainedModel:
    torch.manual_seed(seed)
    config = AutoConfig.for_model(
        kind,
        hidden_size=32, intermediate_size=42, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        head_dim=8, vocab_size=61, max_position_embeddings=64, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config).eval()
    return model


def disturb(model: PreTrainedModel, seed: int = 2) -> None:
    """As training would: an update that is not zero."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in trainable(model).values():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(TOKENS, use_cache=False).logits
    return found


def layers(model: nn.Module) -> dict[str, LoraLinear]:
    return {name: module for name, module in model.named_modules() if isinstance(module, LoraLinear)}


def rounded(model: PreTrainedModel, base: str) -> PreTrainedModel:
    """`model` with the weights of its decoder blocks as this base keeps them."""
    if base != "fp32":
        for module in model.base_model.layers.modules():
            if isinstance(module, nn.Linear):
                module.weight.data = dequantise(quantise(module.weight, double=base == "nf4"))
    return model


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("kind", KINDS)
def test_peft_loads_our_adapter(kind: str, base: Any, tmp_path: Path) -> None:
    model, settings = tiny(kind), Lora(rank=3, alpha=7.0, dropout=0.25, base=base)
    add_lora(model, settings, seed=5)
    disturb(model)
    save_adapter(model, tmp_path / "adapter", settings, "some/base")
    base_model = rounded(tiny(kind), base)
    bare = logits(base_model)
    theirs = PeftModel.from_pretrained(base_model, str(tmp_path / "adapter")).eval()
    torch.testing.assert_close(logits(model), logits(theirs), rtol=1e-5, atol=1e-5)
    assert (logits(theirs) - bare).abs().max() > 1e-2
    config = theirs.peft_config["default"]
    assert (config.r, config.lora_alpha, config.lora_dropout, config.bias) == (3, 7.0, 0.25, "none")
    assert config.base_model_name_or_path == "some/base" and config.task_type == "CAUSAL_LM"


@pytest.mark.parametrize("rslora", [False, True], ids=["lora", "rslora"])
@pytest.mark.parametrize("targets", ["all-linear", ["q_proj", "v_proj"]], ids=["all", "some"])
def test_we_load_an_adapter_that_peft_made(targets: Any, rslora: bool, tmp_path: Path) -> None:
    config = LoraConfig(r=4, lora_alpha=8, target_modules=targets, task_type="CAUSAL_LM", use_rslora=rslora)
    theirs = get_peft_model(tiny("qwen3"), config).eval()
    torch.manual_seed(3)
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if "lora_" in name:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    theirs.save_pretrained(str(tmp_path))
    ours = tiny("qwen3")
    settings = load_adapter(ours, tmp_path)
    torch.testing.assert_close(logits(ours), logits(theirs), rtol=1e-5, atol=1e-5)
    chosen = () if targets == "all-linear" else ("q_proj", "v_proj")
    assert settings == Lora(rank=4, alpha=8.0, dropout=0.0, base="fp32", rslora=rslora, targets=chosen)
    assert not trainable(ours)


@pytest.mark.parametrize("base", [*BASES, "bf16"])
def test_saved_and_loaded_again_is_the_same_model(base: Any, tmp_path: Path) -> None:
    model, settings = tiny(), Lora(rank=3, base=base, dropout=0.1)
    add_lora(model, settings, seed=5)
    disturb(model)
    save_adapter(model, tmp_path / "adapter", settings, "base")
    again = tiny()
    assert load_adapter(again, tmp_path / "adapter", trainable=True) == settings
    assert torch.equal(logits(again), logits(model))
    for (name, one), (other_name, other) in zip(trainable(model).items(), trainable(again).items(), strict=True):
        assert name == other_name and torch.equal(one, other)


def test_equal_weights_give_equal_bytes(tmp_path: Path) -> None:
    for name in ("one", "two"):
        model = tiny()
        add_lora(model, Lora(), seed=5)
        disturb(model)
        save_adapter(model, tmp_path / name, Lora(), "base")
    files = sorted(path.name for path in (tmp_path / "one").iterdir())
    assert files == ["adapter_config.json", "adapter_model.safetensors", "gristmill.json"]
    assert all((tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes() for name in files)
    assert json.loads((tmp_path / "one/gristmill.json").read_text()) == {"base": "nf4"}
    targets = json.loads((tmp_path / "one/adapter_config.json").read_text())["target_modules"]
    assert targets == sorted(["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"])


@pytest.mark.parametrize("base", BASES)
def test_adapter_off_is_the_base_bit_for_bit(base: Any) -> None:
    model = tiny("qwen2")
    add_lora(model, Lora(base=base, dropout=0.5), seed=5)
    fresh = logits(model)
    disturb(model)
    tuned = logits(model)
    with adapter_off(model.train()):
        off = logits(model)
    assert torch.equal(off, logits(rounded(tiny("qwen2"), base)))
    assert torch.equal(fresh, off)  # B starts at zero
    assert torch.equal(logits(model.eval()), tuned) and not torch.equal(tuned, off)


def test_adapter_comes_back_after_an_error() -> None:
    model = tiny()
    add_lora(model, Lora(), seed=5)
    with pytest.raises(RuntimeError, match="inside"), adapter_off(model):
        raise RuntimeError("inside")
    assert all(layer.active for layer in layers(model).values())


@pytest.mark.parametrize("base", BASES)
def test_gradients_flow_to_a_and_b_alone_and_are_peft_s(base: Any) -> None:
    model = tiny()
    add_lora(model, Lora(rank=4, alpha=8.0, base=base), seed=5)
    disturb(model)
    frozen = {name: tensor.clone() for name, tensor in model.state_dict().items() if name not in trainable(model)}
    model(TOKENS, labels=TOKENS).loss.backward()
    learning = {name for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert learning == set(trainable(model)) == {f"{n}.{letter}" for n in layers(model) for letter in "AB"}
    config = LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM")
    theirs = get_peft_model(rounded(tiny(), base), config)
    named = dict(theirs.named_parameters())
    pairs = {
        f"{name}.{letter}": named[f"base_model.model.{name}.lora_{letter}.default.weight"]
        for name in layers(model)
        for letter in "AB"
    }
    with torch.no_grad():
        for name, parameter in pairs.items():
            parameter.copy_(trainable(model)[name])
    theirs(TOKENS, labels=TOKENS).loss.backward()
    for name, parameter in pairs.items():
        torch.testing.assert_close(trainable(model)[name].grad, parameter.grad, rtol=1e-4, atol=1e-6)
    torch.optim.AdamW(trainable(model).values(), lr=0.1).step()
    assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in frozen.items())


def test_start_depends_on_seed_and_layer_alone() -> None:
    one, two, three = tiny(), tiny(), tiny()
    torch.manual_seed(0)
    add_lora(one, Lora(rank=4), seed=5)
    torch.manual_seed(99)
    torch.rand(3)
    add_lora(two, Lora(rank=4), seed=5)
    add_lora(three, Lora(rank=4), seed=6)
    for name, layer in layers(one).items():
        assert torch.equal(layer.A, layers(two)[name].A) and not layer.B.any()
        assert not torch.equal(layer.A, layers(three)[name].A)
        bound = layer.in_features**-0.5  # kaiming_uniform with a = √5
        assert bound * 0.9 < layer.A.abs().max() <= bound
    first, second = list(layers(one).values())[:2]
    assert not torch.equal(first.A, second.A)
    assert all(parameter.dtype == torch.float32 for parameter in trainable(one).values())


def test_what_is_adapted() -> None:
    model = tiny("phi3")
    add_lora(model, Lora(), seed=0)
    inside = [n for n, m in model.named_modules() if isinstance(m, nn.Linear)]
    assert inside == ["lm_head"]
    assert {name.rpartition(".")[2] for name in layers(model)} == {"qkv_proj", "o_proj", "gate_up_proj", "down_proj"}
    packed = sum(tensor.numel() for layer in layers(model).values() for tensor in layer.base.tensors().values())
    plain = sum(layer.in_features * layer.out_features * 4 for layer in layers(model).values())
    assert packed < plain / 5


def test_dropout_draws_from_the_global_generator_in_training_only() -> None:
    model = tiny()
    add_lora(model, Lora(dropout=0.5), seed=0)
    disturb(model)
    assert torch.equal(logits(model), logits(model))
    model.train()
    torch.manual_seed(7)
    state, first, second = torch.get_rng_state(), logits(model), logits(model)
    assert not torch.equal(first, second)
    torch.set_rng_state(state)
    assert torch.equal(logits(model), first)


def test_unpacked_base_gives_the_same_bits() -> None:
    model = tiny()
    add_lora(model, Lora(), seed=0)
    disturb(model)
    before, names = logits(model), list(trainable(model))
    unpack(model)
    assert torch.equal(logits(model), before) and list(trainable(model)) == names
    assert not any(isinstance(layer.base, NF4) for layer in layers(model).values())


def test_what_cannot_be_adapted_or_loaded_says_so(tmp_path: Path) -> None:
    model = tiny()
    with pytest.raises(HouseError, match="carries no adapter"):
        save_adapter(model, tmp_path / "none", Lora(), "base")
    for wrong in (Lora(rank=0), Lora(dropout=1.0), Lora(lora_plus_ratio=0.0)):
        with pytest.raises(HouseError, match="rank >= 1"):
            add_lora(model, wrong, seed=0)
    add_lora(model, Lora(rank=4), seed=0)
    with pytest.raises(HouseError, match="already"):
        add_lora(model, Lora(), seed=0)
    save_adapter(model, tmp_path / "adapter", Lora(rank=4), "base")
    with pytest.raises(HouseError, match="does not fit this model"):
        load_adapter(tiny("phi3"), tmp_path / "adapter")
    with pytest.raises(HouseError, match="'nf5'"):
        load_adapter(tiny(), tmp_path / "adapter", base="nf5")
    with pytest.raises(HouseError, match=r"no adapter_model\.safetensors"):
        load_adapter(tiny(), tmp_path)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"use_dora": True}, "use_dora=True"),
        ({"bias": "all"}, "bias='all'"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights='pissa'"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_foreign_adapters_that_would_be_computed_wrongly_are_refused(
    settings: dict[str, Any], message: str, tmp_path: Path
) -> None:
    config = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    get_peft_model(tiny(), config).save_pretrained(str(tmp_path))
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | settings))
    with pytest.raises(HouseError, match=message):
        load_adapter(tiny(), tmp_path)
