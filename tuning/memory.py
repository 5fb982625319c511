"""What a training stage needs of a device's memory, told before the first step, and what to change where it is short.

An estimate from shapes alone: no weight is loaded. Activations are what autograd keeps of transformers' decoder layers
with our LoRA layers in them; tests hold the sum against measured peaks, within FACTOR.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from ..kernels.logprob import logits_bytes
from .roofline import Flop, Load, Peak, Roofline, Shape, decoder_shape, flop, machine_peak
from .settings import Lora, Training

FACTOR = 1.35  # between an estimate and the measured peak, either way
BITS = {"nf4": 4 + 8 / 64 + 32 / 64 / 256, "nf4-single": 4 + 32 / 64, "bf16": 16.0, "fp32": 32.0}  # of a stored weight
QUANTISED = ("nf4", "nf4-single")
STATES = {"adamw": 2, "lion": 1}  # fp32 numbers that an optimizer keeps of each parameter


@dataclass(frozen=True)
class Needs:
    """What a stage asks for. tokens, targets: of the largest pack. rank, adapters: of LoRA, and its parameters; None:
    all weights learn, in fp32. base: how frozen matrices are stored. dtype: of the computation. checkpointed: decoder
    layers that keep their input alone; offload: what autograd keeps lies on the host. shards: processes over which fsdp
    spreads the decoder blocks; accumulates: each has several packs in a step."""

    shape: Shape
    tokens: int
    targets: int
    rank: int | None
    adapters: int | None
    base: str | None
    dtype: torch.dtype
    device: str
    checkpointed: int = 0
    offload: bool = False
    optimizer: str = "adamw"
    shards: int = 1
    accumulates: bool = False


@dataclass(frozen=True)
class Memory:
    """Bytes on the device, by part; under fsdp on that of each process."""

    weights: int
    trained: int  # parameters that learn, in fp32, where they are not the weights themselves
    gradients: int
    optimizer: int
    activations: int  # what autograd keeps
    logits: int  # a chunk of them
    layer: int  # what the backward of one decoder layer works with
    buffer: int  # one dequantised matrix
    gathered: int  # under fsdp: the block that is computed and the one fetched meanwhile

    @property
    def total(self) -> int:
        """Logits are gone when the layers' backward begins."""
        parts = (self.weights, self.trained, self.gradients, self.optimizer, self.activations)
        return sum(parts) + self.buffer + self.gathered + max(self.logits, self.layer)

    def record(self) -> dict[str, int]:
        """For plan.json: bytes by part, and `total`."""
        return {**{name: int(value) for name, value in vars(self).items()}, "total": self.total}


def memory(needs: Needs) -> Memory:
    """The peak of a training step, the allocator's own losses and the driver's context left out."""
    shape, size = needs.shape, needs.dtype.itemsize
    frozen = needs.adapters is not None
    matrices, rest = _stored(needs)
    # numbers that learn in the decoder blocks, which fsdp spreads, and outside them
    inside, outside = (shape.matrices, _rest(shape)) if needs.adapters is None else (needs.adapters, 0)
    learning = inside / needs.shards + outside
    block = (matrices + (4 * inside if frozen else 0)) / shape.layers
    converted = frozen and needs.base != {2: "bf16", 4: "fp32"}[size]
    logits = logits_bytes(needs.targets, shape.vocabulary, needs.dtype, needs.device)
    return Memory(
        weights=int(matrices / needs.shards + rest),
        trained=int(4 * learning) if frozen else 0,
        # fsdp sums them after a step's last pack, and holds them whole until then
        gradients=int(4 * (inside + outside if needs.accumulates else learning)),
        optimizer=int(4 * learning * STATES[needs.optimizer]),
        activations=activations(needs),
        logits=logits,
        layer=working_bytes(needs),
        buffer=_widest(shape) * size if converted else 0,
        gathered=int(min(2, shape.layers) * block) if needs.shards > 1 else 0,
    )


def loading(needs: Needs) -> dict[str, int]:
    """Bytes that reading the model peaks at, in each process: `host`, and of a GPU `device`.

    In NF4 each matrix is quantised as it is read; otherwise the model lies whole on the host first. fsdp spreads it
    only then: loading peaks alike with and without.
    """
    matrices, rest = _stored(needs)
    size, gpu = needs.dtype.itemsize, needs.device.startswith("cuda")
    widest = _widest(needs.shape)
    waiting = 2 * widest * size  # one matrix as it was read and as it is computed with
    if needs.base in QUANTISED:
        whole = int(matrices + rest)
        return {"host": rest + waiting, "device": whole + widest * size} if gpu else {"host": whole + waiting}
    host = needs.shape.matrices * size + rest
    then = max(host, int(matrices + rest)) + waiting
    return {"host": host + waiting, "device": then} if gpu else {"host": then}


def _stored(needs: Needs) -> tuple[float, int]:
    """Bytes of the decoder's matrices as they are stored, and of all other weights."""
    matrices = needs.shape.matrices * BITS[needs.base] / 8 if needs.base is not None else 4.0 * needs.shape.matrices
    return matrices, _rest(needs.shape) * (4 if needs.adapters is None else needs.dtype.itemsize)


def _rest(shape: Shape) -> int:
    """Numbers of all weights that are no matrix of the decoder's."""
    return shape.others + (0 if shape.tied else shape.hidden * shape.vocabulary)


def _widest(shape: Shape) -> int:
    return max(out * width for _, out, width in shape.linears)


def activations(needs: Needs) -> int:
    """Bytes that autograd keeps until the backward of a pack."""
    shape, size, tokens = needs.shape, needs.dtype.itemsize, needs.tokens
    layer = layer_bytes(needs)
    kept = (shape.layers - needs.checkpointed) * layer + needs.checkpointed * shape.hidden * size * tokens
    if needs.offload:
        kept = layer
    elif needs.checkpointed:
        kept += layer  # one that is computed again
    # the last norm's input and output; the states at the targets and their gradients
    return kept + 2 * tokens * shape.hidden * size + 2 * needs.targets * shape.hidden * size


def layer_bytes(needs: Needs) -> int:
    """Bytes that one decoder layer keeps for its backward, per pack.

    The inputs of its two norms and their outputs, which are the inputs of q, k, v and of gate, up; q, k, v and the
    heads' output; the outputs of gate and up; of adapters the narrow products. Where all weights learn, also of the MLP
    the activation and the product that goes down.
    """
    shape, size, learns = needs.shape, needs.dtype.itemsize, needs.adapters is None
    per_token = 4 * shape.hidden * size
    per_token += 2 * (shape.attention + shape.keys) * size + 4 * shape.heads
    per_token += (4 if learns else 2) * shape.intermediate * size
    if shape.normed_heads:
        per_token += (shape.attention + shape.keys) * size
    if needs.rank is not None:
        per_token += needs.rank * size * len(shape.linears) // shape.layers
    return per_token * needs.tokens


def working_bytes(needs: Needs) -> int:
    """Bytes that the backward of one decoder layer works with: three tensors of the MLP's width and four of the
    hidden one."""
    shape = needs.shape
    return (3 * shape.intermediate + 4 * shape.hidden) * needs.dtype.itemsize * needs.tokens


def needs_of(
    config: Any,
    numbers: Mapping[str, Any],
    settings: Training,
    *,
    device: str,
    dtype: torch.dtype,
    devices: int = 1,
) -> Needs:
    """From a model's configuration, a plan's numbers (plan.json) and the stage's settings. A pack is taken as full, its
    targets in the plan's proportion. devices: the processes that train."""
    lora: Lora | None = settings.lora
    shape = decoder_shape(config)
    share = numbers["target_tokens"] / max(numbers["tokens"], 1)
    layers = {"none": 0, "layers": shape.layers}.get(str(settings.checkpointing))
    checkpointed = min(int(settings.checkpointing), shape.layers) if layers is None else layers
    return Needs(
        shape=shape,
        tokens=settings.capacity,
        targets=round(settings.capacity * share),
        rank=None if lora is None else lora.rank,
        adapters=None if lora is None else shape.adapters(lora.rank, lora.targets),
        base=None if lora is None else lora.base,
        dtype=dtype,
        device=device,
        checkpointed=checkpointed,
        offload=settings.offload,
        optimizer=settings.optimizer,
        shards=devices if settings.parallel == "fsdp" else 1,
        accumulates=settings.packs_per_step > devices,
    )


def plan_estimate(
    config: Any,
    numbers: Mapping[str, Any],
    settings: Training,
    *,
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
    load: Load | None = None,
    reference: bool = False,
    devices: int = 1,
    peak: Peak | None = None,
) -> dict[str, Any]:
    """Memory and roofline of a stage, for the plan's table; needs no weights.

    config: of the model. numbers: the plan's (data.summary): tokens, target_tokens, units, steps and packs are read.
    load: of one epoch (roofline.load_of over all its packs); None: documents of equal length are assumed, the least
    that attention can cost, and `attention` says so. reference: the objective takes a reference pass. peak: where it is
    known already; else machine_peak, which on an unknown device measures for 0.3 s.

    Returns {"memory": bytes by part with total, "loading": as `loading` says, "roofline": gflop_per_token,
    tokens_per_s, peak_tflops, peak, formula, …, "seconds": the least time of all steps, "reference_seconds",
    "attention": how documents' lengths were known}.
    """
    needs = needs_of(config, numbers, settings, device=device, dtype=dtype, devices=devices)
    line = roofline_of(needs, numbers, load, devices, peak)
    epochs = numbers["steps"] * settings.packs_per_step / max(int(numbers["packs"]), 1)
    rate = line.devices * line.peak.rate
    return {
        "memory": memory(needs).record(),
        "loading": loading(needs),
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
    found: Flop = flop(needs.shape, load, adapters=needs.adapters, checkpointed=needs.checkpointed)
    peak = peak or machine_peak(needs.shape, device=needs.device, dtype=needs.dtype, tokens=needs.tokens)
    return Roofline(found, peak, needs.adapters is not None, needs.checkpointed, devices)


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
    changes: list[tuple[str, Needs]] = []
    layers, adapters = needs.shape.layers, needs.adapters
    smaller = _smaller_packs(needs, available, longest)
    if smaller is not None:
        changes.append((f"capacity: {smaller.tokens} (more packs_per_step keep the step's size)", smaller))
    if needs.checkpointed < layers:
        every = replace(needs, checkpointed=layers)
        some = _fewest_layers(needs, available)
        if some is not None:
            changes.append((f"checkpointing: {some.checkpointed} (of {layers} layers)", some))
        changes.append(("checkpointing: layers (up to 1.5 times the work)", every))
    if not needs.offload and needs.device.startswith("cuda"):
        changes.append(("offload: true", replace(needs, offload=True)))
    if adapters is None:
        low = replace(needs, rank=16, adapters=needs.shape.adapters(16), base="nf4")
        changes.append(("lora: {base: nf4} (adapters in place of all weights)", low))
    elif needs.base != "nf4":
        changes.append(("lora: {base: nf4}", replace(needs, base="nf4")))
    if needs.optimizer == "adamw":
        changes.append(("optimizer: lion (one state in place of two)", replace(needs, optimizer="lion")))
    least = replace(smaller or needs, checkpointed=layers)
    if adapters is not None and (smaller is not None or needs.checkpointed < layers or needs.base != "nf4"):
        least = replace(least, base="nf4")
        changes.append((f"capacity: {least.tokens}, checkpointing: layers, lora: {{base: nf4}}", least))
    return changes


def _fewest_layers(needs: Needs, available: int) -> Needs | None:
    """The fewest checkpointed layers that fit, where that is not all of them."""
    for count in range(needs.checkpointed + 1, needs.shape.layers):
        some = replace(needs, checkpointed=count)
        if memory(some).total <= available:
            return some
    return None


def _smaller_packs(needs: Needs, available: int, longest: int) -> Needs | None:
    """The largest pack, by halving, that fits; else the smallest one allowed; None where none is smaller."""
    tokens, best = needs.tokens // 2, None
    while tokens >= max(longest, 1):
        best = replace(needs, tokens=tokens, targets=max(1, needs.targets * tokens // needs.tokens))
        if memory(best).total <= available:
            return best
        tokens //= 2
    return best


def _size(count: float) -> str:
    for unit, scale in (("GB", 1e9), ("MB", 1e6)):
        if count >= scale:
            return f"{count / scale:.3g} {unit}" if count < 1000 * scale else f"{count / scale:.0f} {unit}"
    return f"{count / 1e3:.3g} kB"
