"""The roofline's FLOP against those that torch counts, against published figures, and against masks drawn out."""

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import set_checkpoint_early_stop
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig, AutoModelForCausalLM

from gristmill.tuning import roofline
from gristmill.tuning.roofline import Load, Peak, Roofline, decoder_shape, flop, load_of, machine_peak

TINY = {
    "hidden_size": 64, "intermediate_size": 192, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": 300, "tie_word_embeddings": False,
}  # fmt: skip


def config(kind: str = "llama", **more: Any) -> Any:
    return AutoConfig.for_model(kind, **(TINY | more))


class Adapted(nn.Module):
    """LoRA by its definition, in operations that torch counts."""

    def __init__(self, linear: nn.Linear, rank: int) -> None:
        super().__init__()
        self.linear = linear
        self.a = nn.Parameter(torch.randn(rank, linear.in_features))
        self.b = nn.Parameter(torch.randn(linear.out_features, rank))

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.linear(x) + (x @ self.a.t()) @ self.b.t()
        return y


def counted(config: Any, tokens: int, targets: int, rank: int | None, checkpointed: bool) -> tuple[int, int]:
    """FLOP of forward and backward of one document, by torch's counter. Attention is computed in full squares."""
    model: Any = AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    if rank is not None:
        model.requires_grad_(False)
        for name, linear in [(n, m) for n, m in model.model.layers.named_modules() if isinstance(m, nn.Linear)]:
            parent, _, leaf = name.rpartition(".")
            setattr(model.model.layers.get_submodule(parent), leaf, Adapted(linear, rank))
    model.train()
    if checkpointed:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    states = torch.randn(1, tokens, config.hidden_size, requires_grad=True)
    with FlopCounterMode(display=False) as forward, set_checkpoint_early_stop(False):
        hidden = model.model(inputs_embeds=states, use_cache=False).last_hidden_state[0]
        loss = (hidden[:targets] @ model.get_output_embeddings().weight.t()).logsumexp(1).sum()
    with FlopCounterMode(display=False) as backward:
        loss.backward()
    return forward.get_total_flops(), backward.get_total_flops()


@pytest.mark.parametrize("kind", ["llama", "qwen3", "starcoder2"])
@pytest.mark.parametrize(("rank", "checkpointed"), [(8, False), (8, True), (None, False)], ids=str)
def test_equals_what_torch_counts(kind: str, rank: int | None, checkpointed: bool) -> None:
    """Of attention torch counts full squares, twice the area under the mask, and a backward of twice the forward."""
    tokens, targets = 48, 20
    this = config(kind, **({"head_dim": 16} if kind == "qwen3" else {}))
    shape = decoder_shape(this)
    adapters = None if rank is None else shape.adapters(rank)
    ours = flop(shape, load_of([tokens], targets), adapters=adapters, checkpointed=2 * checkpointed)
    area = 4 * shape.attention * shape.layers * tokens**2 / 2
    again = 2 * shape.hidden * shape.vocabulary * targets if rank is None else 0  # by our operation, not by this one
    forward, backward = counted(this, tokens, targets, rank, checkpointed)
    assert forward == pytest.approx(ours.forward + area, rel=1e-3)
    assert backward == pytest.approx(
        ours.backward + 1.5 * area + ours.recompute - again + area * checkpointed, rel=1e-3
    )


def llama8b() -> Any:
    return config(
        hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32, num_key_value_heads=8,
        vocab_size=128_256,
    )  # fmt: skip


def test_llama_8b_golden() -> None:
    """N 6.98e9, HV 0.525e9, P 41.9e6; 34.0 GFLOP a token at T = 4,096, 49.1 with activation checkpointing."""
    shape = decoder_shape(llama8b())
    assert (shape.matrices, shape.hidden * shape.vocabulary) == (6_979_321_856, 525_336_576)
    assert shape.adapters(16) == 41_943_040 and shape.others == 525_602_816
    load = load_of([4096] * 4, 4 * 4096)
    found = [flop(shape, load, adapters=shape.adapters(16), checkpointed=n).per_token / 1e9 for n in (0, 16, 32)]
    assert found == pytest.approx([34.03, (34.03 + 49.14) / 2, 49.14], abs=0.01)
    line = Roofline(flop(shape, load, adapters=shape.adapters(16)), Peak(989e12, "H200"), True)
    assert line.tokens_per_s == pytest.approx(29_064, abs=1)
    assert line.share(14_532) == pytest.approx(0.5, abs=1e-4)
    assert Roofline(line.flop, line.peak, True, devices=8).share(8 * 14_532) == pytest.approx(0.5, abs=1e-4)


@pytest.mark.parametrize(
    ("kind", "sizes", "plain", "checkpointed"),
    [
        ("qwen2", (896, 4864, 24, 14, 2, 151_936), 2.64, 3.55),
        ("qwen2", (3584, 18944, 28, 28, 4, 152_064), 31.4, 45.4),
        ("qwen3", (5120, 25600, 64, 64, 8, 151_936), 143.8, 210.7),
        ("llama", (8192, 28672, 80, 64, 8, 128_256), 298, 441),
    ],
    ids=["qwen2.5-0.5b", "qwen2.5-7b", "qwen3-32b", "llama-70b"],
)
def test_published_table(kind: str, sizes: tuple[int, ...], plain: float, checkpointed: float) -> None:
    names = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")
    this = config(kind, **dict(zip((*names, "vocab_size"), sizes, strict=True)))
    shape = decoder_shape(this)
    load = load_of([4096], 4096)
    adapters = shape.adapters(16)
    assert flop(shape, load, adapters=adapters).per_token / 1e9 == pytest.approx(plain, rel=2.5e-3)
    again = flop(shape, load, adapters=adapters, checkpointed=shape.layers)
    assert again.per_token / 1e9 == pytest.approx(checkpointed, rel=2.5e-3)


def test_masked_tokens_skip_the_head_and_named_layers_alone_are_adapted() -> None:
    shape = decoder_shape(config())
    some, all_ = (flop(shape, load_of([32], n), adapters=0).forward for n in (8, 32))
    assert all_ - some == 2 * 64 * 300 * 24
    assert shape.adapters(4, ("q_proj", "mlp.up_proj")) == 2 * 4 * ((64 + 64) + (64 + 192))
    assert shape.adapters(4) == sum(4 * (out + width) for _, out, width in shape.linears) and len(shape.linears) == 14


def test_tied_weights_count_once() -> None:
    tied, untied = decoder_shape(config(tie_word_embeddings=True)), decoder_shape(config())
    assert tied.tied and not untied.tied
    assert tied.others == untied.others == 300 * 64 + 5 * 64


@pytest.mark.parametrize("window", [None, 1, 5, 16, 40])
def test_area_under_the_mask_of_a_tree(window: int | None) -> None:
    """A prompt of 9 with branches of 6 and 11, the second with two branches of its own, and a document beside it."""
    lengths, parents = [9, 6, 11, 3, 4, 21], [-1, 0, 0, 2, 2, -1]
    load = load_of(lengths, 0, parents)
    pairs = 0.0
    for start, end in zip(load.starts.tolist(), load.ends.tolist(), strict=True):
        for place in range(start, end):
            seen = min(place + 1, window or 10**9)
            pairs += seen - 0.5 * (place + 1 <= (window or 10**9))  # a token's pair with itself is half under the mask
    assert load.starts.tolist() == [0, 9, 9, 20, 20, 0] and load.tokens == 54
    assert load.area(window) == pytest.approx(pairs)


def test_windows_are_those_of_the_layers() -> None:
    assert decoder_shape(config("mistral", sliding_window=7)).windows == (7, 7)
    kinds = ["sliding_attention", "full_attention"]
    mixed = decoder_shape(config("gemma3_text", sliding_window=7, layer_types=kinds, head_dim=16))
    assert mixed.windows == (7, None)
    assert decoder_shape(config("qwen2", sliding_window=7, use_sliding_window=False)).windows == (None, None)
    near, far = (flop(mixed, load_of([n], 0), adapters=0).forward for n in (7, 70))
    assert far - 10 * near == pytest.approx(4 * 64 * ((70**2 / 2 - 10 * 7**2 / 2) + (7 * 63 + 24.5 - 245)))


def test_shared_prompts_cost_less_than_twice() -> None:
    shape = decoder_shape(config())
    shared = load_of([100, 20, 20], 40, [-1, 0, 0])
    apart = load_of([120, 120], 40)
    assert (shared.tokens, apart.tokens) == (140, 240)
    both = [flop(shape, load, adapters=shape.adapters(8)).total for load in (shared, apart)]
    assert 140 / 240 < both[0] / both[1] < 1
    assert flop(shape, shared, adapters=8).reference < flop(shape, shared, adapters=8).forward


def test_a_known_gpu_is_taken_at_its_word(monkeypatch: pytest.MonkeyPatch) -> None:
    shape = decoder_shape(config())
    for name, rate in (
        ("NVIDIA H200", 989.4), ("NVIDIA H100 80GB HBM3", 989.4), ("NVIDIA H100 PCIe", 756.5),
        ("NVIDIA A100-SXM4-80GB", 311.9), ("NVIDIA L40S", 362.1), ("NVIDIA GeForce RTX 4090", 165.2),
    ):  # fmt: skip
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda name=name: name)
        peak = machine_peak(shape, device="cuda", dtype=torch.bfloat16)
        assert peak.rate == pytest.approx(rate * 1e12) and "data sheet" in peak.source and name in peak.source


def test_an_unknown_machine_is_measured_once(monkeypatch: pytest.MonkeyPatch) -> None:
    shape = decoder_shape(config())
    monkeypatch.setattr(roofline, "MEASURED_SECONDS", 0.0)
    roofline._measured.cache_clear()
    first = machine_peak(shape, device="cpu", dtype=torch.float32)
    assert machine_peak(shape, device="cpu", dtype=torch.float32) == first
    assert roofline._measured.cache_info().misses == 1
    assert 1e7 < first.rate < 1e14 and "measured: fp32 products of 1024 x" in first.source


def test_the_formula_in_words() -> None:
    shape = decoder_shape(config())
    load = Load(10, 5, np.zeros(1, np.int64), np.full(1, 10, np.int64))
    adapted = Roofline(flop(shape, load, adapters=8, checkpointed=2), Peak(5e12, "a machine"), True, 2).formula
    assert "2N+2HV+4P+2.5A backward, 2N+2P+A again for 2 checkpointed layers" in adapted and "5 TFLOP/s" in adapted
    whole = Roofline(flop(shape, load, adapters=None), Peak(5e12, "a machine"), False).formula
    assert "4N+4HV+2.5A backward, 2HV logits again, no activation checkpointing" in whole
