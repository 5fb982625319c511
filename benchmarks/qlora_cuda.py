"""The part of qlora.py for a GPU: QLoRA steps of large Llama shapes with random weights, ours and TRL's.

Rank 16 on all linear layers over NF4 with double quantisation, bf16, documents of 4096 tokens, `--tokens` of them in a
micro-batch, one micro-batch a step, AdamW. Weights are drawn layer by layer as they are quantised, so that a model of
70B never lies whole in bf16. No document is padded: TRL's batches of whole documents are what its packing would make.
Medians of `--steps` steps after `--warm`. The shape `tiny` also runs on a CPU, to try the script.
"""

import argparse
import importlib.util
import statistics
import tempfile
import time
import zlib
from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

SHAPES: dict[str, dict[str, Any]] = {
    "llama8b": {
        "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32,
        "num_key_value_heads": 8, "vocab_size": 128256, "rope_theta": 500000.0,
    },
    "llama70b": {
        "hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80, "num_attention_heads": 64,
        "num_key_value_heads": 8, "vocab_size": 128256, "rope_theta": 500000.0,
    },
    "tiny": {
        "hidden_size": 64, "intermediate_size": 160, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "vocab_size": 512,
    },
}  # fmt: skip
DOCUMENT = 4096
SUSTAINED = 700e12  # FLOP/s that published matrix products reach on Hopper


def contenders(shape: str) -> list[str]:
    if shape == "llama70b":
        return ["ours, checkpointing", "trl", "trl with liger"]
    return ["ours", "ours, checkpointing", "bare", "trl", "trl, no checkpointing", "trl with liger"]


def work(who: str, options: argparse.Namespace) -> dict[str, Any]:
    if not torch.cuda.is_available() and options.shape != "tiny":
        raise SystemExit("no CUDA device here: this measures one GPU")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    length = min(DOCUMENT, options.tokens)
    documents = options.tokens // length
    checkpointing = who in ("ours, checkpointing", "trl", "trl with liger")
    if who.startswith("trl"):
        seconds = _trl(who, options, device, documents, length, checkpointing)
    else:
        seconds = _timed(_step_of(who, options, device, documents, length, checkpointing), options, device)
    return _record(seconds, options, documents, length, checkpointing, device)


def _step_of(
    who: str, options: argparse.Namespace, device: torch.device, documents: int, length: int, checkpointing: bool
) -> Callable[[], None]:
    model = drawn_model(options.shape, device)
    tokens = torch.randint(model.config.vocab_size, (documents * length,), device=device)
    loss = (_bare if who == "bare" else _ours)(model, tokens, documents, length, checkpointing)
    learning = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(learning, lr=2e-4, fused=device.type == "cuda")

    def step() -> None:
        loss().backward()
        torch.nn.utils.clip_grad_norm_(learning, 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return step


def _ours(model: Any, tokens: Tensor, documents: int, length: int, checkpointing: bool) -> Callable[[], Tensor]:
    from gristmill.kernels.logprob import target_logprobs
    from gristmill.tuning.attention import head, hidden_states, isolate
    from gristmill.tuning.lora import add_lora
    from gristmill.tuning.norms import fuse_norms
    from gristmill.tuning.recompute import recompute
    from gristmill.tuning.settings import Lora, Training

    add_lora(model, Lora(rank=16, base="nf4"), seed=0)
    isolate(model)
    fuse_norms(model)
    recompute(model, Training(checkpointing="layers" if checkpointing else "none"))
    model.train()
    lengths, places = [length] * documents, torch.arange(length, device=tokens.device).repeat(documents)
    sources = (places != length - 1).nonzero()[:, 0]

    def loss() -> Tensor:
        states = hidden_states(model, tokens, places, lengths)[sources]
        return -target_logprobs(states, head(model), tokens[sources + 1]).mean()

    return loss


def _bare(model: Any, tokens: Tensor, documents: int, length: int, checkpointing: bool) -> Callable[[], Tensor]:
    adapted = _with_peft(model)
    batch = tokens.view(documents, length)
    on_gpu = tokens.device.type == "cuda"

    def loss() -> Tensor:
        with torch.autocast(tokens.device.type, torch.bfloat16, enabled=on_gpu):
            return cast(Tensor, adapted(input_ids=batch, labels=batch, use_cache=False).loss)

    return loss


def _with_peft(model: Any) -> Any:
    from peft import LoraConfig, get_peft_model

    _in_four_bits(model)
    config = LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")
    return get_peft_model(model, config).train()


def _in_four_bits(model: Any) -> None:
    """bitsandbytes' layers, as transformers would put them when it loads."""
    import bitsandbytes as bnb

    for name, linear in list(model.model.layers.named_modules()):
        if not isinstance(linear, nn.Linear):
            continue
        parent, _, leaf = name.rpartition(".")
        weight = linear.weight.detach()
        layer = bnb.nn.Linear4bit(
            linear.in_features, linear.out_features, bias=False, compute_dtype=weight.dtype, quant_type="nf4",
            compress_statistics=True, device="meta",
        )  # fmt: skip
        layer.weight = bnb.nn.Params4bit(
            weight.cpu(), requires_grad=False, quant_type="nf4", compress_statistics=True
        ).to(weight.device)
        setattr(model.model.layers.get_submodule(parent), leaf, layer)
    model.is_loaded_in_4bit = True


def _trl(
    who: str, options: argparse.Namespace, device: torch.device, documents: int, length: int, checkpointing: bool
) -> list[float]:
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import TrainerCallback
    from trl import SFTConfig, SFTTrainer

    if "liger" in who and importlib.util.find_spec("liger_kernel") is None:
        raise SystemExit("liger-kernel is not installed here")
    seconds: list[float] = []

    class Clock(TrainerCallback):  # type: ignore[misc]
        def on_step_begin(self, *_: Any, **__: Any) -> None:
            _wait(device)
            self.began = time.perf_counter()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            _wait(device)
            seconds.append(time.perf_counter() - self.began)

    model = drawn_model(options.shape, device)
    _in_four_bits(model)
    steps = options.warm + options.steps
    ids = torch.randint(model.config.vocab_size, (steps * documents, length)).tolist()
    settings = SFTConfig(
        output_dir=tempfile.mkdtemp(), max_steps=steps, per_device_train_batch_size=documents, max_length=length,
        gradient_checkpointing=checkpointing, use_liger_kernel="liger" in who, bf16=device.type == "cuda",
        use_cpu=device.type == "cpu", report_to="none", save_strategy="no", disable_tqdm=True, logging_steps=1000,
    )  # fmt: skip
    trainer = SFTTrainer(
        model=model, args=settings, train_dataset=Dataset.from_list([{"input_ids": row, "labels": row} for row in ids]),
        processing_class=_tokenizer(model.config.vocab_size), callbacks=[Clock()],
        peft_config=LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM"),
    )  # fmt: skip
    trainer.train()
    return seconds[options.warm :]


def _tokenizer(vocabulary: int) -> Any:
    """One that the trainer asks for and that no row passes through."""
    from gristmill.tuning.models import train_tokenizer

    return train_tokenizer(["a few words"], min(vocabulary, 512), DOCUMENT)


def _timed(step: Callable[[], None], options: argparse.Namespace, device: torch.device) -> list[float]:
    seconds = []
    for _ in range(options.warm + options.steps):
        _wait(device)
        began = time.perf_counter()
        step()
        _wait(device)
        seconds.append(time.perf_counter() - began)
    return seconds[options.warm :]


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def _record(
    seconds: list[float], options: argparse.Namespace, documents: int, length: int, checkpointing: bool,
    device: torch.device,
) -> dict[str, Any]:  # fmt: skip
    from gristmill.tuning.roofline import decoder_shape, flop, load_of, machine_peak

    shape = decoder_shape(_config(options.shape))
    load = load_of([length] * documents, documents * (length - 1))
    need = flop(shape, load, adapters=shape.adapters(16), checkpointed=shape.layers if checkpointing else 0)
    peak = machine_peak(shape, device=device.type, dtype=torch.bfloat16 if device.type == "cuda" else torch.float32)
    rate = documents * length / statistics.median(seconds)
    used = torch.cuda.max_memory_reserved() if device.type == "cuda" else 0
    return {
        "tokens_per_s": round(rate, 1), "median_s": statistics.median(seconds), "seconds": seconds,
        "peak_mb": round(used / 2**20), "checkpointing": checkpointing, "tflop_s": rate * need.per_token / 1e12,
        "share": {
            "of": peak.source,
            "share": round(rate * need.per_token / peak.rate, 3),
            "share_of_700_tflop_s": round(rate * need.per_token / SUSTAINED, 3),
        },
    }  # fmt: skip


def _config(shape: str) -> Any:
    return AutoConfig.for_model("llama", max_position_embeddings=DOCUMENT, tie_word_embeddings=False, **SHAPES[shape])


class Drawn(nn.Linear):
    """A layer without a weight: each time it is asked for, the same numbers are drawn on `place`."""

    place: torch.device
    seed: int
    kind: torch.dtype

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        generator = torch.Generator(self.place).manual_seed(self.seed)
        size = (self.out_features, self.in_features)
        return torch.randn(size, generator=generator, device=self.place, dtype=self.kind).mul_(0.02)


def drawn_model(shape: str, device: torch.device) -> Any:
    """A Llama on `device` whose decoder blocks hold `Drawn` layers: to be quantised one by one."""
    config, dtype = _config(shape), torch.bfloat16 if device.type == "cuda" else torch.float32
    with torch.device("meta"):
        model: Any = AutoModelForCausalLM.from_config(config, dtype=dtype)
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and name != "lm_head":
            module.__class__ = Drawn
            del module._parameters["weight"]
            module.place, module.seed, module.kind = device, zlib.crc32(name.encode()), dtype
    for name, parameter in list(model.named_parameters()):
        parent, _, leaf = name.rpartition(".")
        ones = "norm" in name
        value = torch.ones(parameter.shape) if ones else torch.randn(parameter.shape, dtype=dtype) * 0.02
        setattr(model.get_submodule(parent), leaf, nn.Parameter(value.to(device, dtype)))
    with device:
        model.model.rotary_emb = type(model.model.rotary_emb)(config=config)
    return model
