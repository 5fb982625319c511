"""What a training stage needs of a device's memory, told before the first step, and what to change where it is short.

An estimate from shapes alone: no weight is loaded. Activations are what autograd keeps of transformers' decoder layers
with our LoRA layers in them; tests hold the sum against measured peaks, within FACTOR.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from ..kernels.logprob import logits_bytes
from .roofline import Flop, Load, Peak, Recompute, Roofline, Shape, decoder_shape, flop, load_of, machine_peak
from .settings import Lora, Training

FACTOR = 1.35  # between an estimate and the measured peak, either way
BITS = {"nf4": 4 + 8 / 64 + 32 / 64 / 256, "nf4-single": 4 + 32 / 64, "bf16": 16.0, "fp32": 32.0}  # of a stored weight
STATES = {"adamw": 2, "lion": 1}  # fp32 numbers that an optimizer keeps of each parameter


@dataclass(frozen=True)
class Needs:
    """What a stage asks for. tokens, targets: of the largest pack. base: how frozen weights are stored; None: all
    weights learn, in fp32. dtype: of the computation. recompute: `none`, `full` (activation checkpointing of each
    decoder layer) or `offload` (the same, its inputs kept on the host)."""

    shape: Shape
    tokens: int
    targets: int
    rank: int | None
    base: str | None
    dtype: torch.dtype
    device: str
    recompute: Recompute = "none"
    optimizer: str = "adamw"


@dataclass(frozen=True)
class Memory:
    """Bytes on the device, by part."""

    weights: int
    trained: int  # parameters that learn, in fp32, where they are not the weights themselves
    gradients: int
    optimizer: int
    activations: int
    logits: int
    buffer: int  # one dequantised matrix

    @property
    def total(self) -> int:
        return (
            self.weights + self.trained + self.gradients + self.optimizer + self.activations + self.logits + self.buffer
        )

    def record(self) -> dict[str, int]:
        """For plan.json: bytes by part, and `total`."""
        return {**{name: int(value) for name, value in vars(self).items()}, "total": self.total}


def memory(needs: Needs) -> Memory:
    """The peak of a training step, the allocator's own losses and the driver's context left out."""
    shape, size = needs.shape, needs.dtype.itemsize
    head = 0 if shape.tied else shape.hidden * shape.vocabulary
    frozen = needs.rank is not None and needs.base is not None
    learning = shape.adapters(needs.rank) if needs.rank is not None else shape.matrices + shape.others + head
    matrices = shape.matrices * BITS[needs.base] / 8 if needs.base is not None else 4.0 * shape.matrices
    widest = max(out * width for out, width in shape.linears)
    converted = frozen and needs.base != {2: "bf16", 4: "fp32"}[size]
    step = activations(needs)
    logits = logits_bytes(needs.targets, shape.vocabulary, needs.dtype, needs.device)
    return Memory(
        weights=int(matrices + (shape.others + head) * (size if frozen else 4)),
        trained=4 * learning if frozen else 0,
        gradients=4 * learning,
        optimizer=4 * learning * STATES[needs.optimizer],
        activations=step,
        logits=logits,
        buffer=widest * size if converted else 0,
    )


def activations(needs: Needs) -> int:
    """Bytes that autograd keeps until the backward of a pack, and what one layer's backward works with."""
    shape, size, tokens = needs.shape, needs.dtype.itemsize, needs.tokens
    layer, transient = layer_bytes(needs), 3 * shape.intermediate * size * tokens
    if needs.recompute == "none":
        kept = shape.layers * layer
    else:
        kept = layer + (shape.layers * shape.hidden * size * tokens if needs.recompute == "full" else 0)
    # the embeddings, the last norm's input in fp32 and its output; states at the targets and their gradients
    ends = tokens * shape.hidden * (2 * size + 4) + 2 * needs.targets * shape.hidden * size
    return kept + transient + ends


def layer_bytes(needs: Needs) -> int:
    """Bytes that one decoder layer keeps for its backward, per pack: two norms (their input in fp32), the input of
    q, k and v, these three and the heads' output, the input of gate and up, and four tensors of the MLP's width."""
    shape, size = needs.shape, needs.dtype.itemsize
    wide = 4 if size < 4 else 0  # a norm's fp32 copy of its input; in fp32 that is the input itself
    per_token = shape.hidden * (4 * size + 2 * wide) + 4 * shape.intermediate * size
    per_token += (2 * shape.attention + 2 * shape.keys) * size + 4 * shape.heads
    if shape.normed_heads:
        per_token += (shape.attention + shape.keys) * (size + wide)
    if needs.rank is not None:
        per_token += needs.rank * size * len(shape.linears) // shape.layers
    return per_token * needs.tokens


def needs_of(
    config: Any,
    numbers: Mapping[str, Any],
    settings: Training,
    *,
    device: str,
    dtype: torch.dtype,
    recompute: Recompute,
) -> Needs:
    """From a model's configuration, a plan's numbers (plan.json) and the stage's settings. A pack is taken as full, its
    targets in the plan's proportion."""
    lora: Lora | None = settings.lora
    share = numbers["target_tokens"] / max(numbers["tokens"], 1)
    return Needs(
        shape=decoder_shape(config),
        tokens=settings.capacity,
        targets=round(settings.capacity * share),
        rank=None if lora is None else lora.rank,
        base=None if lora is None else lora.base,
        dtype=dtype,
        device=device,
        recompute=recompute,
        optimizer=getattr(settings, "optimizer", "adamw"),
    )


def plan_estimate(
    config: Any,
    numbers: Mapping[str, Any],
    settings: Training,
    *,
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
    recompute: Recompute = "none",
    load: Load | None = None,
    reference: bool = False,
    devices: int = 1,
    peak: Peak | None = None,
) -> dict[str, Any]:
    """Memory and roofline of a stage, for the plan's table; needs no weights.

    config: of the model. numbers: the plan's (data.summary): tokens, target_tokens, units, steps, packs, longest are
    read. load: of one epoch (roofline.load_of over all its packs); None: documents of equal length are assumed, the
    least that attention can cost, and `attention` says so. reference: the objective takes a reference pass. peak: where
    it is known already; else machine_peak, which on an unknown device measures for 0.3 s.

    Returns {"memory": bytes by part with total, "roofline": gflop_per_token, tokens_per_s, peak_tflops, peak, formula,
    …, "seconds": the least time of all steps, "reference_seconds", "attention": how documents' lengths were known}.
    """
    needs = needs_of(config, numbers, settings, device=device, dtype=dtype, recompute=recompute)
    line = roofline_of(needs, numbers, load, devices, peak)
    packs = max(int(numbers["packs"]), 1)
    epochs = numbers["steps"] * settings.packs_per_step / packs
    rate = line.devices * line.peak.rate
    return {
        "memory": memory(needs).record(),
        "roofline": dict(line.record()),
        "seconds": round(line.seconds * epochs, 3),
        "reference_seconds": round(line.flop.reference / rate, 3) if reference else 0.0,
        "attention": "documents of equal length assumed" if load is None else "by each document's length",
    }


def roofline_of(
    needs: Needs, numbers: Mapping[str, Any], load: Load | None = None, devices: int = 1, peak: Peak | None = None
) -> Roofline:
    """The roofline of a stage: of one epoch's load (plan_estimate says what None means)."""
    if load is None:
        documents = max(int(numbers.get("units", 1)), 1)
        load = Load(
            int(numbers["tokens"]),
            int(numbers["target_tokens"]),
            np.zeros(documents, np.int64),
            np.full(documents, round(numbers["tokens"] / documents), np.int64),
        )
    found: Flop = flop(needs.shape, load, rank=needs.rank, recompute=needs.recompute)
    peak = peak or machine_peak(needs.shape, device=needs.device, dtype=needs.dtype, tokens=needs.tokens)
    return Roofline(found, peak, needs.rank, needs.recompute, devices)


def out_of_memory(needs: Needs, available: int, longest: int = 1) -> str:
    """What to tell where a step did not fit `available` bytes: the estimate by part, and the three changes that fit
    best (those that cost least speed first), each with its own figure.

    longest: tokens of the longest unit, below which `capacity` cannot go.
    """
    now = memory(needs)
    parts = ", ".join(f"{name} {_size(value)}" for name, value in now.record().items() if value and name != "total")
    found = [(text, memory(changed)) for text, changed in _changes(needs, available, longest)]
    fitting = [item for item in found if item[1].total <= available]
    shown = (fitting + sorted((item for item in found if item not in fitting), key=lambda item: item[1].total))[:3]
    lines = [
        f"  {text}: about {_size(then.total)}{'' if then.total <= available else ', still more than there is'}"
        for text, then in shown
    ]
    return (
        f"out of memory: the step needs about {_size(now.total)} ({parts}) and {_size(available)} are there. "
        "What would fit:\n" + "\n".join(lines)
    )


def _changes(needs: Needs, available: int, longest: int) -> list[tuple[str, Needs]]:
    """Changes that save memory, those that cost least speed first."""
    changes = []
    smaller = _smallest_cut(needs, available, longest)
    if smaller is not None:
        changes.append((f"capacity: {smaller.tokens} (with packs_per_step raised to match)", smaller))
    if needs.recompute == "none":
        full = replace(needs, recompute="full")
        changes.append(("recompute: full (activation checkpointing, about 1.4 times the work)", full))
    if needs.recompute != "offload" and needs.device.startswith("cuda"):
        offload = replace(needs, recompute="offload")
        changes.append(("recompute: offload (checkpoints on the host)", offload))
    if needs.rank is None:
        base = "bf16" if needs.dtype == torch.bfloat16 else "nf4"
        changes.append(
            (f"lora: {{base: {base}}} (adapters in place of all weights)", replace(needs, rank=16, base=base))
        )
    elif needs.base != "nf4":
        changes.append(("lora.base: nf4", replace(needs, base="nf4")))
    if needs.rank is not None and needs.rank > 8:
        changes.append(("lora.rank: 8", replace(needs, rank=8)))
    if needs.optimizer == "adamw":
        changes.append(("optimizer: lion (one state instead of two)", replace(needs, optimizer="lion")))
    least = replace(changes[0][1] if smaller is not None else needs, recompute="full")
    if needs.rank is not None:
        least = replace(least, base="nf4")
    changes.append((f"capacity: {least.tokens}, recompute: full{', lora.base: nf4' * (needs.rank is not None)}", least))
    return changes


def _smallest_cut(needs: Needs, available: int, longest: int) -> Needs | None:
    """The largest pack, by halving, that fits; else the smallest one allowed; None where none is smaller."""
    cut: Callable[[int], Needs] = lambda tokens: replace(  # noqa: E731
        needs, tokens=tokens, targets=max(1, needs.targets * tokens // max(needs.tokens, 1))
    )
    tokens, best = needs.tokens // 2, None
    while tokens >= max(longest, 1):
        best = cut(tokens)
        if memory(best).total <= available:
            return best
        tokens //= 2
    return best


def _size(count: float) -> str:
    for unit, scale in (("GB", 1e9), ("MB", 1e6)):
        if count >= scale:
            return f"{count / scale:.3g} {unit}"
    return f"{count / 1e3:.3g} kB"
