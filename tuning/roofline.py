"""How fast the machine could train: the FLOP that a token costs, over the rate of its matrix units.

Counted are the products that the method needs: decoder matrices (N weights), head (H·V, only for the tokens that carry
a loss), adapters (P parameters), attention by the area under the causal mask, what activation checkpointing makes
again. With frozen weights (arXiv 2106.09685) no weight gradient is counted: 4N a token, not 6N. Padding is no token.
"""

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

# Dense bf16 rates of the makers' data sheets in TFLOP/s, by a part of the name that torch.cuda.get_device_name gives.
KNOWN = {
    "B200": 2250.0, "H200": 989.4, "H100 NVL": 835.5, "H100 PCIe": 756.5, "H100": 989.4, "GH200": 989.4,
    "A100": 311.9, "L40S": 362.1, "L40": 181.1, "L4": 121.0, "A10": 125.0, "RTX A6000": 154.8,
    "RTX 6000 Ada": 364.2, "RTX 5090": 209.5, "RTX 4090": 165.2, "RTX 3090": 71.2,
}  # fmt: skip
MEASURED_FLOP = 4e9  # of one product of the measurement: 40 ms at 100 GFLOP/s
MEASURED_SECONDS = 0.3


@dataclass(frozen=True)
class Shape:
    """What FLOP and memory of a decoder follow from.

    linears: name, out and in of every linear layer of the decoder blocks. others: parameters outside them and the head
    (embeddings, norms, biases). windows: for each layer the keys a token sees at most, or None for all before it.
    attention: query heads times their width; keys: key heads times their width.
    """

    layers: int
    hidden: int
    vocabulary: int
    intermediate: int
    linears: tuple[tuple[str, int, int], ...]
    others: int
    tied: bool
    heads: int
    attention: int
    keys: int
    windows: tuple[int | None, ...]
    normed_heads: bool

    @property
    def matrices(self) -> int:
        """N: weights of the decoder's linear layers."""
        return sum(out * width for _, out, width in self.linears)

    def adapters(self, rank: int, targets: Sequence[str] = ()) -> int:
        """P: parameters of adapters of this rank on the layers whose names end so; none named: on all."""
        ends = tuple(f".{target}" for target in targets)
        return sum(rank * (out + width) for name, out, width in self.linears if not ends or name.endswith(ends))


def decoder_shape(config: Any) -> Shape:
    """The shape of the causal language model of a transformers configuration; no weight is made."""
    config = config.get_text_config()
    return _shape(config.model_type, config.to_json_string(use_diff=False))


@lru_cache(maxsize=8)
def _shape(kind: str, text: str) -> Shape:
    values = json.loads(text)
    config: Any = AutoConfig.for_model(kind, **{key: value for key, value in values.items() if key != "model_type"})
    with torch.device("meta"):
        model: Any = AutoModelForCausalLM.from_config(config)  # type: ignore[no-untyped-call]
    inside = {id(module) for module in model.base_model.layers.modules()}
    linears = [(n, m) for n, m in model.named_modules() if isinstance(m, nn.Linear) and id(m) in inside]
    head = model.get_output_embeddings()
    parameters = {id(p): p.numel() for p in model.parameters()}
    tied = head.weight is model.get_input_embeddings().weight
    taken = [linear.weight for _, linear in linears] + ([] if tied else [head.weight])
    heads = config.num_attention_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // heads
    return Shape(
        layers=config.num_hidden_layers,
        hidden=config.hidden_size,
        vocabulary=head.weight.shape[0],
        intermediate=config.intermediate_size,
        linears=tuple((name, linear.out_features, linear.in_features) for name, linear in linears),
        others=sum(parameters.values()) - sum(weight.numel() for weight in taken),
        tied=tied,
        heads=heads,
        attention=heads * width,
        keys=(getattr(config, "num_key_value_heads", None) or heads) * width,
        windows=_windows(config),
        normed_heads=any(name.endswith("q_norm") for name, _ in model.named_modules()),
    )


def _windows(config: Any) -> tuple[int | None, ...]:
    kinds = getattr(config, "layer_types", None)
    window: int | None = getattr(config, "sliding_window", None)
    layers: int = config.num_hidden_layers
    if kinds is not None:
        return tuple(window if kind == "sliding_attention" else None for kind in kinds)
    return (window if getattr(config, "use_sliding_window", True) else None,) * layers


@dataclass(frozen=True)
class Load:
    """What a stage, step or pack puts through a model.

    tokens: padding left out, a shared prompt once. targets: hidden states that meet the head. starts, ends: (S,) for
    each segment the positions of its first token and past its last one; a document that shares nothing starts at 0.
    """

    tokens: int
    targets: int
    starts: NDArray[np.int64]
    ends: NDArray[np.int64]

    def area(self, window: int | None) -> float:
        """Pairs of query and key under the causal mask, l²/2 of a whole document."""
        return float((_area(self.ends, window) - _area(self.starts, window)).sum())


def _area(length: NDArray[np.int64], window: int | None) -> NDArray[np.float64]:
    """∫ min(x, window) dx from 0 to length."""
    full = length.astype(np.float64)
    near = full if window is None else np.minimum(full, window)
    return near * near / 2 + near * (full - near)


def load_of(lengths: Sequence[int] | NDArray[np.int64], targets: int, parents: Sequence[int] | None = None) -> Load:
    """The load of segments of these lengths. parents: for each the segment that it continues (one before it), or -1."""
    sizes = np.asarray(lengths, np.int64)
    starts = np.zeros(len(sizes), np.int64)
    for segment, parent in enumerate(() if parents is None else parents):
        if parent >= 0:
            starts[segment] = starts[parent] + sizes[parent]
    return Load(int(sizes.sum()), int(targets), starts, starts + sizes)


@dataclass(frozen=True)
class Flop:
    """FLOP of one pass of training over a load, by part. `reference` is one more forward pass, adapters off or on."""

    tokens: int
    forward: float
    backward: float
    recompute: float
    reference: float

    @property
    def total(self) -> float:
        """Of training, the reference left out: it is run once, whatever the epochs."""
        return self.forward + self.backward + self.recompute

    @property
    def per_token(self) -> float:
        return self.total / max(self.tokens, 1)


def flop(shape: Shape, load: Load, *, adapters: int | None, checkpointed: int = 0) -> Flop:
    """FLOP of training over `load`.

        forward    2N + 2HV + 2P + A
        backward   2N + 2HV + 4P + 2.5A       adapters (P parameters) on frozen weights: products with dY alone
                   4N + 4HV + 2.5A            adapters None: all weights learn
        recompute  2N + 2P + A                activation checkpointing, for its share of the layers
                   2HV                        adapters None: the head's gradient takes the logits again

    a token; HV for tokens with a loss alone; A = 4 · (heads · width) · area of each layer. Attention's backward is 2.5
    of its forward because flash attention makes the scores again (arXiv 2205.14135). checkpointed: decoder layers, the
    first ones, that are computed again in the backward.
    """
    matrices = 2.0 * shape.matrices * load.tokens
    head = 2.0 * shape.hidden * shape.vocabulary * load.targets
    low = 2.0 * (adapters or 0) * load.tokens
    areas = {window: load.area(window) for window in set(shape.windows)}
    scores = [4.0 * shape.attention * areas[window] for window in shape.windows]
    attention, learnt = sum(scores), 1 if adapters is not None else 2
    again = checkpointed / shape.layers * (matrices + low) + sum(scores[:checkpointed])
    return Flop(
        tokens=load.tokens,
        forward=matrices + head + low + attention,
        backward=learnt * (matrices + head) + 2 * low + 2.5 * attention,
        recompute=again + (head if adapters is None else 0.0),
        reference=matrices + head + attention,
    )


@dataclass(frozen=True)
class Peak:
    """A rate of matrix products in FLOP/s, and where it is from."""

    rate: float
    source: str


def machine_peak(shape: Shape, *, device: str, dtype: torch.dtype, tokens: int = 1024) -> Peak:
    """The data sheet's rate of a known GPU in bf16 or fp16, else what the machine does at the model's own widest layer
    with `tokens` rows: the best product of 0.3 s, measured once a process."""
    name = torch.cuda.get_device_name() if device.startswith("cuda") else ""
    if dtype in (torch.bfloat16, torch.float16):
        for part, rate in KNOWN.items():
            if part in name.replace("-", " "):
                return Peak(rate * 1e12, f"{name}, dense {_name(dtype)} by its data sheet")
    _, out, width = max(shape.linears, key=lambda linear: linear[1] * linear[2])
    rows = int(min(tokens, max(64, MEASURED_FLOP // (2 * out * width))))
    rate = _measured(device, dtype, rows, width, out, torch.get_num_threads())
    where = name or f"CPU with {torch.get_num_threads()} threads"
    return Peak(rate, f"{where}, measured: {_name(dtype)} products of {rows} x {width} x {out}")


@lru_cache(maxsize=16)
def _measured(device: str, dtype: torch.dtype, rows: int, width: int, out: int, threads: int) -> float:
    """The best rate of x Wᵀ in FLOP/s. `threads` is part of the key alone."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(rows, width, generator=generator).to(device, dtype)
    weight = torch.randn(out, width, generator=generator).to(device, dtype)
    best, began, tries = float("inf"), time.perf_counter(), 0
    while tries < 3 or time.perf_counter() - began < MEASURED_SECONDS:
        start = time.perf_counter()
        nn.functional.linear(x, weight)
        if device.startswith("cuda"):
            torch.cuda.synchronize()
        best, tries = min(best, time.perf_counter() - start), tries + 1
    return 2.0 * rows * width * out / best


def _name(dtype: torch.dtype) -> str:
    return {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}.get(dtype, str(dtype))


@dataclass(frozen=True)
class Roofline:
    """The tokens a second that a machine cannot exceed, and what share of them a run reaches."""

    flop: Flop
    peak: Peak
    frozen: bool
    checkpointed: int = 0  # decoder layers
    devices: int = 1

    @cached_property
    def tokens_per_s(self) -> float:
        return self.devices * self.peak.rate / max(self.flop.per_token, 1.0)

    def share(self, tokens_per_s: float) -> float:
        """Measured real tokens a second (of all devices together) over the roofline's."""
        return tokens_per_s / self.tokens_per_s

    @property
    def seconds(self) -> float:
        """The least time of one pass over the load."""
        return self.flop.total / (self.devices * self.peak.rate)

    @property
    def formula(self) -> str:
        """The count in words, for a training summary."""
        parts = "2N+2HV+2P+A forward, 2N+2HV+4P+2.5A backward"
        again = "2N+2P+A"
        if not self.frozen:
            parts, again = "2N+2HV+A forward, 4N+4HV+2.5A backward, 2HV logits again", "2N+A"
        if self.checkpointed:
            parts += f", {again} again for {self.checkpointed} checkpointed layers"
        else:
            parts += ", no activation checkpointing"
        machines = f", {self.devices} devices" if self.devices > 1 else ""
        return (
            f"share = tokens/s x FLOP a token / peak; {self.flop.per_token / 1e9:.4g} GFLOP a token = {parts}; A from "
            f"the documents' squared lengths, HV for tokens with a loss; peak {self.peak.rate / 1e12:.4g} TFLOP/s "
            f"({self.peak.source}{machines})"
        )

    def record(self) -> Mapping[str, Any]:
        """For plan.json and run.json."""
        return {
            "gflop_per_token": round(self.flop.per_token / 1e9, 4),
            "tokens_per_s": round(self.tokens_per_s, 1),
            "peak_tflops": round(self.peak.rate / 1e12, 4),
            "peak": self.peak.source,
            "checkpointed_layers": self.checkpointed,
            "formula": self.formula,
        }
