"""The fused paths inside real models: which layers run together, that nothing but speed changes, and what a step of
training costs and moves."""

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from gristmill.curation.folder import HouseError
from gristmill.kernels import workspace
from gristmill.kernels.nf4 import NF4, to_tensors
from gristmill.tuning.adapted import FrozenLinear, LoraLinear, LoraMlp
from gristmill.tuning.lora import adapter_off, add_lora, check_continued, load_adapter, save_adapter, trainable
from gristmill.tuning.settings import Lora

FUSED = ("llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text", "olmo2", "granite", "smollm3")
TOKENS = torch.randint(61, (2, 11), generator=torch.Generator().manual_seed(1))


def tiny(kind: str = "llama", width: int = 32) -> PreTrainedModel:
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        kind,
        hidden_size=width, intermediate_size=48 if width == 32 else 2 * width, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, head_dim=width // 4, vocab_size=61, max_position_embeddings=64,
        pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    return model


def adapted(kind: str = "llama", width: int = 32, **settings: Any) -> PreTrainedModel:
    """B is not zero, as after training."""
    model = tiny(kind, width)
    add_lora(model, Lora(**{"rank": 3, "base": "fp32"} | settings), seed=5)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in trainable(model).values():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return model


def layers(model: nn.Module) -> dict[str, LoraLinear]:
    return {name: module for name, module in model.named_modules() if isinstance(module, LoraLinear)}


def logits(model: nn.Module) -> Tensor:
    found: Tensor = model(TOKENS, use_cache=False).logits
    return found


def gradients(model: PreTrainedModel) -> dict[str, Tensor]:
    model.zero_grad()
    model(TOKENS, labels=TOKENS, use_cache=False).loss.backward()
    return {name: p.grad.clone() for name, p in trainable(model).items() if p.grad is not None}


@pytest.mark.parametrize("kind", FUSED)
def test_known_decoders_take_the_fused_path_and_compute_peft_s_values(kind: str) -> None:
    """Logits and every gradient of A and B against PEFT over the same weights."""
    ours = adapted(kind)
    blocks = ours.base_model.layers
    assert all(isinstance(block.mlp, LoraMlp) for block in blocks)
    assert all(block.self_attn.q_proj.shared.members[2] is block.self_attn.v_proj for block in blocks)
    config = LoraConfig(r=3, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")
    theirs = get_peft_model(tiny(kind), config).eval()
    equal_gradients(ours, theirs)


def equal_gradients(ours: PreTrainedModel, theirs: Any) -> None:
    """Gives PEFT's model the weights of ours, and compares logits and the gradient of every A and B."""
    named = dict(theirs.named_parameters())
    pairs = {
        f"{name}.{letter}": named[f"base_model.model.{name}.lora_{letter}.default.weight"]
        for name in layers(ours)
        for letter in "AB"
    }
    with torch.no_grad():
        for name, parameter in pairs.items():
            parameter.copy_(trainable(ours)[name])
    torch.testing.assert_close(logits(ours), logits(theirs), rtol=1e-4, atol=1e-4)
    found = gradients(ours)
    theirs(TOKENS, labels=TOKENS, use_cache=False).loss.backward()
    assert set(found) == set(pairs)
    for name, parameter in pairs.items():
        assert parameter.grad is not None
        scale = parameter.grad.abs().max()
        torch.testing.assert_close(found[name] / scale, parameter.grad / scale, rtol=1e-4, atol=1e-4)


def four_bit(model: PreTrainedModel, quantised: PreTrainedModel) -> PreTrainedModel:
    """`model` with bitsandbytes' layers over the very bytes of `quantised`, as transformers loads our files."""
    bnb = pytest.importorskip("bitsandbytes")
    for name, layer in layers(quantised).items():
        parent, _, leaf = name.rpartition(".")
        tensors = to_tensors(cast(NF4, layer.base))
        packed = tensors.pop("weight")
        linear = bnb.nn.Linear4bit(layer.in_features, layer.out_features, bias=False, compute_dtype=torch.float32)
        linear.weight = bnb.nn.Params4bit.from_prequantized(
            packed, {key.removeprefix("weight."): value for key, value in tensors.items()}, device="cpu"
        )
        linear.quant_state = linear.weight.quant_state
        setattr(model.get_submodule(parent), leaf, linear)
    model.is_loaded_in_4bit = True
    return model


@pytest.mark.parametrize("base", ["nf4", "nf4-single"])
@pytest.mark.parametrize("kind", ["llama", "qwen3", "gemma"])
def test_logits_and_gradients_are_those_of_peft_over_bitsandbytes(kind: str, base: str) -> None:
    ours = adapted(kind, 64, base=base)  # bitsandbytes 0.50 decodes rows narrower than a block of 64 wrongly on a CPU
    config = LoraConfig(r=3, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")
    theirs = get_peft_model(four_bit(tiny(kind, 64), ours), config).eval()
    assert "Linear4bit" in str(type(theirs.base_model.model.model.layers[0].mlp.up_proj))
    equal_gradients(ours, theirs)


@pytest.mark.parametrize("kind", ["llama", "gemma", "qwen2"])
@pytest.mark.parametrize("base", ["fp32", "nf4"])
def test_off_is_the_base_bit_for_bit_on_the_fused_path(kind: str, base: str) -> None:
    model, plain = adapted(kind, base=base, dropout=0.5).train(), tiny(kind)
    for name, layer in layers(model).items():
        copy = workspace.plain_weight(layer.base, torch.float32).clone()
        plain.get_submodule(name).weight.data = copy
    with adapter_off(model):
        assert torch.equal(logits(model), logits(plain))
    assert not torch.equal(logits(model.eval()), logits(plain))


def test_layers_of_a_group_called_alone_or_on_other_inputs_are_right() -> None:
    model = adapted()
    attention = model.base_model.layers[0].self_attn
    one, two = torch.randn(2, 5, 32), torch.randn(2, 5, 32)
    alone = {name: getattr(attention, name).alone(one) for name in ("q_proj", "k_proj", "v_proj")}
    others = {name: getattr(attention, name).alone(two) for name in alone}
    assert torch.equal(attention.v_proj(one), alone["v_proj"])  # no q before it
    torch.testing.assert_close(attention.q_proj(one), alone["q_proj"])
    torch.testing.assert_close(attention.k_proj(two), others["k_proj"])  # what waits is of another input
    torch.testing.assert_close(attention.k_proj(one), alone["k_proj"])
    torch.testing.assert_close(attention.k_proj(one), alone["k_proj"])  # twice
    torch.testing.assert_close(attention.v_proj(one), alone["v_proj"])
    assert attention.q_proj.shared.waiting is None


def test_an_mlp_of_another_formula_keeps_its_own_forward() -> None:
    model = tiny()
    mlp = type(model.base_model.layers[0].mlp)

    class Twice(mlp):  # type: ignore[misc, valid-type]
        def forward(self, x: Tensor) -> Tensor:
            found: Tensor = 2 * super().forward(x)
            return found

    for block in model.base_model.layers:
        block.mlp.__class__ = Twice
    right = logits(model)
    add_lora(model, Lora(base="fp32"), seed=0)
    assert all(type(block.mlp) is Twice for block in model.base_model.layers)
    assert model.base_model.layers[0].mlp.gate_proj.shared is not None
    torch.testing.assert_close(logits(model), right)


@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "checkpointing"])
def test_every_base_is_dequantised_twice_a_step(checkpointing: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    model = adapted(base="nf4").train()
    right = gradients(model)
    if checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    seen: list[int] = []
    dequantise = workspace.dequantise

    def counted(q: NF4, *rest: Any, **named: Any) -> Tensor:
        seen.append(q.packed.data_ptr())
        return dequantise(q, *rest, **named)

    monkeypatch.setattr(workspace, "dequantise", counted)
    found = gradients(model)
    # q, k and v of the first block: nothing before them learns, so no dX without checkpointing
    assert len(seen) == 2 * len(layers(model)) - (0 if checkpointing else 3)
    assert all(torch.equal(found[name], right[name]) for name in right)


@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "checkpointing"])
def test_dropout_is_one_mask_a_group_and_repeats_by_seed(checkpointing: bool) -> None:
    model = adapted(dropout=0.5).train()
    attention = model.base_model.layers[0].self_attn
    with torch.no_grad():
        for layer in (attention.q_proj, attention.k_proj):
            layer.A.copy_(torch.ones(3, 32))
            layer.B.zero_()
            layer.B[:, 0] = 1
    x = torch.randn(1, 4, 32)
    q, k = attention.q_proj(x), attention.k_proj(x)
    plain = [x @ layer.base.t() for layer in (attention.q_proj, attention.k_proj)]
    torch.testing.assert_close((q - plain[0])[..., :1], (k - plain[1])[..., :1], rtol=1e-4, atol=1e-4)
    torch.manual_seed(7)
    first = gradients(model)
    second = gradients(model)
    if checkpointing:  # the recomputation draws the very masks again
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    torch.manual_seed(7)
    third = gradients(model)
    assert all(torch.equal(first[name], third[name]) for name in first)
    assert not all(torch.equal(first[name], second[name]) for name in first)


def test_trap_a_tiny_learning_rate_still_moves_fp32_master_weights() -> None:
    """In bf16 the same update would be lost: half of bf16's spacing at 0.1 is 2.4e-4."""
    model = adapted("llama", base="bf16")
    before = {name: p.detach().clone() for name, p in trainable(model).items()}
    optimizer = torch.optim.AdamW(trainable(model).values(), lr=1e-6, weight_decay=0.0)
    gradients(model)
    optimizer.step()
    for name, parameter in trainable(model).items():
        assert parameter.dtype == torch.float32
        large = before[name].abs() > 0.01
        moved = (parameter != before[name]) & large
        assert moved.sum() > 0.9 * large.sum(), name
        narrow = parameter.detach().bfloat16() != before[name].bfloat16()
        assert (narrow & large).sum() < 0.1 * large.sum()


def test_targets_choose_layers_and_the_rest_is_frozen_in_the_same_base(tmp_path: Path) -> None:
    settings = Lora(rank=3, base="nf4", targets=("q_proj", "v_proj", "mlp.up_proj"))
    model = tiny("qwen3")
    add_lora(model, settings, seed=5)
    assert {name.rpartition(".")[2] for name in layers(model)} == {"q_proj", "v_proj", "up_proj"}
    assert all(
        isinstance(module, FrozenLinear) and isinstance(module.base, NF4)
        for block in model.base_model.layers
        for module in (block.self_attn.k_proj, block.self_attn.o_proj, block.mlp.gate_proj, block.mlp.down_proj)
    )
    attention = model.base_model.layers[0].self_attn
    assert attention.q_proj.shared.members == [attention.q_proj, attention.v_proj]
    save_adapter(model, tmp_path / "adapter", settings, "base")
    config = json.loads((tmp_path / "adapter/adapter_config.json").read_text())
    assert config["target_modules"] == ["q_proj", "up_proj", "v_proj"]
    again = tiny("qwen3")
    found = load_adapter(again, tmp_path / "adapter")
    assert (found.targets, found.base) == (("q_proj", "up_proj", "v_proj"), "nf4")
    assert torch.equal(logits(again), logits(model)) and set(layers(again)) == set(layers(model))
    with pytest.raises(HouseError, match=r"no linear layer is called c_attn; the model has down_proj, gate_proj"):
        add_lora(tiny(), Lora(targets=("q_proj", "c_attn")), seed=0)


def test_some_layers_of_a_name_are_named_whole(tmp_path: Path) -> None:
    settings = Lora(rank=3, base="fp32", targets=("layers.1.self_attn.q_proj",))
    model = tiny()
    add_lora(model, settings, seed=5)
    assert list(layers(model)) == ["model.layers.1.self_attn.q_proj"]
    save_adapter(model, tmp_path / "adapter", settings, "base")
    assert torch.equal(logits(PeftModel.from_pretrained(tiny(), str(tmp_path / "adapter")).eval()), logits(tiny()))
    again = tiny()
    load_adapter(again, tmp_path / "adapter")
    assert list(layers(again)) == ["model.layers.1.self_attn.q_proj"]


@pytest.mark.parametrize("rslora", [False, True], ids=["lora", "rslora"])
def test_peft_s_rank_and_alpha_patterns_are_read_and_written(rslora: bool, tmp_path: Path) -> None:
    config = LoraConfig(
        r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM", use_rslora=rslora,
        rank_pattern={"q_proj": 2, r"layers\.1\.mlp\.up_proj": 6}, alpha_pattern={"down_proj": 3},
    )  # fmt: skip
    theirs = get_peft_model(tiny(), config).eval()
    torch.manual_seed(3)
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if "lora_" in name:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    theirs.save_pretrained(str(tmp_path / "theirs"))
    ours = tiny()
    settings = load_adapter(ours, tmp_path / "theirs")
    torch.testing.assert_close(logits(ours), logits(theirs), rtol=1e-4, atol=1e-4)
    found = layers(ours)
    assert found["model.layers.0.self_attn.q_proj"].rank == 2 and found["model.layers.1.mlp.up_proj"].rank == 6
    down = found["model.layers.0.mlp.down_proj"]
    assert down.alpha == 3 and down.scale == 3 / (math.sqrt(4) if rslora else 4)
    save_adapter(ours, tmp_path / "ours", settings, "base")
    again = PeftModel.from_pretrained(tiny(), str(tmp_path / "ours")).eval()
    assert torch.equal(logits(again), logits(theirs))


def test_a_continued_adapter_must_be_what_the_stage_asks_for(tmp_path: Path) -> None:
    settings = Lora(rank=3, base="fp32", targets=("q_proj", "mlp.up_proj"), rslora=True)
    model = tiny()
    add_lora(model, settings, seed=5)
    save_adapter(model, tmp_path / "adapter", settings, "base")
    again = tiny()
    found = load_adapter(again, tmp_path / "adapter", trainable=True)
    check_continued(again, found, replace(settings, dropout=0.1, lora_plus_ratio=4.0), tmp_path)
    for change, message in (
        ({"rank": 4}, "has rank 3, the stage that continues it 4"),
        ({"rslora": False}, "has rslora True"),
        ({"targets": ()}, r"adapts q_proj, up_proj, the stage that continues it all linear layers"),
    ):
        with pytest.raises(HouseError, match=message):
            check_continued(again, found, replace(settings, **change), tmp_path)


def test_gaussian_start_is_peft_s_and_is_written(tmp_path: Path) -> None:
    model = tiny()
    settings = Lora(rank=8, base="fp32", init="gaussian")
    add_lora(model, settings, seed=5)
    drawn = torch.cat([layer.A.detach().flatten() for layer in layers(model).values()])
    assert abs(float(drawn.std()) - 1 / 8) < 0.01 and float(drawn.abs().max()) > 2.5 / 8
    save_adapter(model, tmp_path / "adapter", settings, "base")
    assert load_adapter(tiny(), tmp_path / "adapter") == settings


def test_a_training_step_compiles() -> None:
    """torch.compile of the whole model (aot_eager: no compiler needed), forward and backward, without a graph break."""
    model = adapted("qwen3", base="nf4").train()
    right = gradients(model)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    model.zero_grad()
    loss = compiled(TOKENS, labels=TOKENS, use_cache=False).loss
    loss.backward()
    for name, parameter in trainable(model).items():
        assert parameter.grad is not None
        torch.testing.assert_close(parameter.grad, right[name], rtol=1e-4, atol=1e-6)
