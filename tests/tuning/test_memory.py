"""The estimate of memory against what a step really takes, and the advice where it does not fit."""

import re
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from gristmill.kernels.logprob import target_logprobs
from gristmill.tuning.attention import head, hidden_states, isolate
from gristmill.tuning.lora import add_lora
from gristmill.tuning.memory import FACTOR, Memory, Needs, loading, memory, needs_of, out_of_memory, plan_estimate
from gristmill.tuning.norms import fuse_norms
from gristmill.tuning.roofline import Peak, decoder_shape, load_of
from gristmill.tuning.settings import Lora, Training

LLAMA8B = {
    "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32,
    "num_key_value_heads": 8, "vocab_size": 128_256, "tie_word_embeddings": False,
}  # fmt: skip
NUMBERS = {"tokens": 1_638_400, "target_tokens": 819_200, "units": 4000, "packs": 100, "steps": 100, "longest": 4000}


def tiny(kind: str) -> Any:
    more = {"head_dim": 32} if kind == "qwen3" else {}
    return AutoConfig.for_model(
        kind, hidden_size=128, intermediate_size=512, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, vocab_size=1000, tie_word_embeddings=False, **more,
    )  # fmt: skip


def peak_of(step: Callable[[], None]) -> int:
    """Bytes on top of those at its start that a step has allocated at once, by torch's own record."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as record:
        step()
    now = top = 0
    events = [event for event in record.profiler.kineto_results.events() if event.name() == "[memory]"]
    for event in sorted(events, key=lambda event: event.start_ns()):
        now += event.nbytes()
        top = max(top, now)
    return top


def a_step(needs: Needs, config: Any, device: str = "cpu") -> tuple[Any, Callable[[], None]]:
    torch.manual_seed(0)
    model: Any = AutoModelForCausalLM.from_config(config, dtype=needs.dtype).to(device)
    isolate(model)
    fuse_norms(model)
    if needs.rank is None:
        model.requires_grad_(True)
    else:
        add_lora(model, Lora(rank=needs.rank, base=needs.base), 0)  # type: ignore[arg-type]
    model.train()
    if needs.checkpointed:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    tokens = torch.randint(1000, (needs.tokens,), device=device)
    positions = torch.arange(needs.tokens, device=device)
    sources = torch.arange(needs.targets, device=device)

    def step() -> None:
        hidden = hidden_states(model, tokens, positions, [needs.tokens])
        target_logprobs(hidden[sources], head(model), tokens[sources + 1]).sum().backward()

    return model, step


def needs_for(kind: str, base: str | None, checkpointed: int, dtype: torch.dtype, device: str = "cpu") -> Needs:
    shape = decoder_shape(tiny(kind))
    rank = None if base is None else 16
    adapters = None if rank is None else shape.adapters(rank)
    return Needs(shape, 512, 500, rank, adapters, base, dtype, device, checkpointed=checkpointed)


@pytest.mark.parametrize(
    ("kind", "base", "checkpointed", "dtype"),
    [
        ("llama", "nf4", 0, torch.float32),
        ("llama", "nf4", 4, torch.float32),
        ("qwen3", "fp32", 0, torch.float32),
        ("llama", "bf16", 0, torch.bfloat16),
        ("llama", None, 0, torch.float32),
    ],
    ids=str,
)
def test_a_step_takes_what_was_estimated(kind: str, base: str | None, checkpointed: int, dtype: torch.dtype) -> None:
    needs = needs_for(kind, base, checkpointed, dtype)
    model, step = a_step(needs, tiny(kind))
    step()  # buffers that stay are made
    model.zero_grad(set_to_none=True)
    told = memory(needs)
    moving = told.total - told.weights - told.trained - told.optimizer
    assert 1 / FACTOR < peak_of(step) / moving < FACTOR
    trained = 4 * sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert told.gradients == trained and told.optimizer == 2 * trained


@pytest.mark.parametrize("base", ["nf4", "nf4-single", "bf16", "fp32"])
def test_weights_are_counted_to_the_byte(base: str) -> None:
    needs = needs_for("llama", base, 0, torch.bfloat16)
    model, _ = a_step(needs, tiny("llama"))
    frozen = [*model.buffers(), *(p for p in model.parameters() if not p.requires_grad)]
    held = sum(tensor.numel() * tensor.element_size() for tensor in frozen)
    assert memory(needs).weights == pytest.approx(held, rel=0.03)  # code books and rotary frequencies are not counted


@pytest.mark.gpu
@pytest.mark.parametrize("base", ["nf4", "bf16", None], ids=str)
def test_a_step_on_a_gpu_takes_what_was_estimated(base: str | None) -> None:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    needs = replace(needs_for("llama", base, 0, torch.bfloat16 if base else torch.float32, "cuda"), tokens=16384)
    needs = replace(needs, targets=16000)
    model, step = a_step(needs, tiny("llama"), "cuda")
    step()
    model.zero_grad(set_to_none=True)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    step()
    told = memory(needs)
    moving = told.total - told.weights - told.trained - told.optimizer
    assert 1 / FACTOR < (torch.cuda.max_memory_allocated() - before) / moving < FACTOR


def test_llama_8b_in_figures() -> None:
    """5.7 GB of weights in NF4: 3.6 of matrices, 2.1 of embeddings and head in bf16."""
    settings = Training(capacity=16384, checkpointing="layers")
    needs = needs_of(AutoConfig.for_model("llama", **LLAMA8B), NUMBERS, settings, device="cuda", dtype=torch.bfloat16)
    told = memory(needs)
    assert told.weights == pytest.approx(6_979_321_856 * 4.127 / 8 + 2 * 1_050_939_392, rel=1e-3)
    assert (told.trained, told.optimizer) == (4 * 41_943_040, 8 * 41_943_040)
    assert told.buffer == 4096 * 14336 * 2
    assert 32 * 16384 * 4096 * 2 < told.activations < 10e9
    whole = memory(replace(needs, checkpointed=0))
    assert 5 < whole.activations / told.activations < 20
    assert memory(replace(needs, checkpointed=0, offload=True)).activations < told.activations
    assert set(told.record()) == {*Memory.__dataclass_fields__, "total"}


def llama_70b() -> tuple[Any, Training]:
    shape = {"hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80, "num_attention_heads": 64}
    config = AutoConfig.for_model("llama", **LLAMA8B | shape)
    settings = Training(capacity=16384, checkpointing="layers", parallel="fsdp")
    return config, settings


def test_a_70b_is_read_into_what_it_will_take() -> None:
    """141 GB in bf16: NF4 holds 35 GB of matrices; reading adds one of 470 MB, and embeddings and head wait on the
    host."""
    config, settings = llama_70b()
    needs = needs_of(config, NUMBERS, settings, device="cuda", dtype=torch.bfloat16)
    told, rest = loading(needs), 2 * 2 * 128_256 * 8192
    assert told["device"] == pytest.approx(memory(needs).weights + 2 * 8192 * 28672, rel=1e-3) and told["device"] < 42e9
    assert rest < told["host"] < rest + 1.1e9
    assert loading(replace(needs, device="cpu")).keys() == {"host"}
    whole = loading(replace(needs, base="bf16"))
    assert whole["host"] > 141e9 and whole["device"] > 141e9
    every = loading(replace(needs, base=None, adapters=None, rank=None, dtype=torch.float32))
    assert every["device"] == pytest.approx(282e9, rel=0.02)


def test_fsdp_spreads_the_blocks_of_an_estimate() -> None:
    config, settings = llama_70b()
    how: dict[str, Any] = {"device": "cuda", "dtype": torch.bfloat16}
    one, four = (needs_of(config, NUMBERS, settings, devices=count, **how) for count in (1, 4))
    alone, share = memory(one), memory(four)
    rest = 2 * 2 * 128_256 * 8192
    assert share.weights == pytest.approx((alone.weights - rest) / 4 + rest, rel=1e-3)
    assert share.optimizer == alone.optimizer // 4 and share.trained == alone.trained // 4
    assert share.gradients == alone.gradients  # eight packs a step: summed after the last
    assert memory(replace(four, accumulates=False)).gradients == alone.gradients // 4
    assert alone.gathered == 0 and share.gathered == pytest.approx(
        2 / 80 * (alone.weights - rest + alone.trained), rel=0.01
    )
    assert loading(four) == loading(one)
    ddp = needs_of(config, NUMBERS, replace(settings, parallel="ddp"), devices=4, **how)
    assert memory(ddp) == alone
    full = memory(replace(four, rank=None, adapters=None, base=None, dtype=torch.float32))
    assert full.weights == pytest.approx(4 * (68.5e9 / 4 + 2.1e9), rel=0.02) and full.optimizer == 2 * full.weights


def test_a_plan_in_figures() -> None:
    config = AutoConfig.for_model("llama", **LLAMA8B)
    settings = Training(capacity=16384, packs_per_step=2, max_steps=100)
    options: dict[str, Any] = {"device": "cuda", "dtype": torch.bfloat16, "peak": Peak(700e12, "said so")}
    told = plan_estimate(config, NUMBERS, settings, reference=True, **options)
    line = told["roofline"]
    assert told["loading"].keys() == {"host", "device"}
    assert line["tokens_per_s"] == pytest.approx(700e12 / (line["gflop_per_token"] * 1e9), rel=1e-3)
    assert told["seconds"] == pytest.approx(2 * NUMBERS["tokens"] / line["tokens_per_s"], rel=1e-3)  # two epochs
    assert told["reference_seconds"] == pytest.approx(told["seconds"] / 4, rel=0.1)
    assert "equal length" in told["attention"] and "said so" in line["formula"]
    exact = plan_estimate(config, NUMBERS, settings, load=load_of([4096] * 400, 819_200), **options)
    assert exact["roofline"]["gflop_per_token"] > line["gflop_per_token"]  # longer documents, the same tokens
    assert "each document" in exact["attention"] and exact["reference_seconds"] == 0


@pytest.mark.parametrize(("available", "fits"), [(80, True), (24, True), (2, False)])
def test_out_of_memory_names_three_changes_with_figures(available: int, fits: bool) -> None:
    config = AutoConfig.for_model("llama", **LLAMA8B)
    needs = needs_of(config, NUMBERS, Training(capacity=16384), device="cuda", dtype=torch.bfloat16)
    text = out_of_memory(needs, available * 10**9, longest=4000)
    first, *changes = text.splitlines()
    assert f"{available} GB are there" in first and "activations" in first
    assert len(changes) == 3 and len(set(changes)) == 3
    for change in changes:
        said = float(re.search(r"about ([\d.]+) GB", change)[1])  # type: ignore[index]
        assert (said <= available) is ("still more" not in change)
    assert any("still more" not in change for change in changes) is fits


def test_capacity_is_not_advised_below_the_longest_row() -> None:
    config = AutoConfig.for_model("llama", **LLAMA8B)
    needs = needs_of(config, NUMBERS, Training(capacity=16384), device="cuda", dtype=torch.bfloat16)
    assert "capacity: 8192" in out_of_memory(needs, 10**10, longest=8192)
    assert "capacity: 4096" not in out_of_memory(needs, 10**10, longest=8192)
