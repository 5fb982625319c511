"""An encoder in int8 on a CPU: weights by column, activations by token, int32 sums by the CPU's own instructions.

SmoothQuant's migration (arXiv 2211.10438) is calibrated on random sequences of the vocabulary, so that no data is
needed: mean cosine to fp32 is 0.9995 for all-MiniLM-L6-v2. Integer sums are exact and everything else works on one
token or one text, so that a text's vector is equal to the last bit whatever lies beside it.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .encoder import Encoder, Linear, packed, states

ALPHA = 0.5  # how much of the activations' range goes to the weights
CALIBRATION = (64, 24)  # sequences, tokens each

Vectors = NDArray[np.float32]


def native() -> bool:
    """Whether this CPU multiplies int8 natively (VNNI), and numba is there to compile what lies between."""
    flags: Mapping[str, Any] = torch.cpu.get_capabilities() if find_spec("numba") else {}
    return bool(flags.get("avx512_vnni") or flags.get("avx_vnni") or flags.get("amx_int8"))


def fits(encoder: Encoder) -> bool:
    """Whether all sizes are whole vectors of 16 numbers, as the kernels want them."""
    sizes = [encoder.dims, encoder.dims // encoder.heads, *(len(layer.up.bias) for layer in encoder.layers)]
    return bool(encoder.layers) and all(size % 16 == 0 for size in sizes)


@dataclass(frozen=True)
class Quantised:
    """A linear layer. weight: int8 (in, out). scale, column, bias: of each output; inverse: of each input."""

    weight: Tensor
    scale: Vectors
    column: Vectors
    bias: Vectors
    inverse: Vectors

    def sums(self, rows: NDArray[np.int8]) -> NDArray[np.int32]:
        found: NDArray[np.int32] = torch._int_mm(torch.from_numpy(rows), self.weight).numpy()
        return found

    @property
    def numbers(self) -> tuple[Vectors, Vectors, Vectors]:
        return self.scale, self.column, self.bias


class Int8Encoder:
    """The encoder's forward with all linear layers in int8, on one thread; several may call it at once."""

    def __init__(self, encoder: Encoder) -> None:
        """encoder: in fp32 on the CPU, of sizes that fit."""
        from ..kernels import int8

        self._kernels = int8
        self._encoder = encoder
        self._tables = encoder.words.numpy(), encoder.positions.numpy()
        ranges = _ranges(encoder)
        self._layers = [
            tuple(
                _quantised(linear, ranges[number, name])
                for name, linear in (("qkv", layer.qkv), ("out", layer.out), ("up", layer.up), ("down", layer.down))
            )
            for number, layer in enumerate(encoder.layers)
        ]

    def states(self, texts: Sequence[NDArray[np.int32]]) -> tuple[Tensor, NDArray[np.int64]]:
        """(last hidden states (T, dims), lengths)."""
        ids, positions, lengths = packed(texts)
        starts = np.concatenate([[0], np.cumsum(lengths)])
        hidden = self._encoder.embedded(torch.from_numpy(ids), torch.from_numpy(positions)).numpy()
        rows = _Rows(*hidden.shape)
        self._kernels.quantise(hidden, self._layers[0][0].inverse, rows.q, rows.scale, rows.shift)
        ones = np.ones(hidden.shape[1], np.float32)
        for number, (qkv, out, up, down) in enumerate(self._layers):
            layer = self._encoder.layers[number]
            after = self._layers[number + 1][0].inverse if number + 1 < len(self._layers) else ones
            self._kernels.attend(
                qkv.sums(rows.q), rows.scale, rows.shift, *qkv.numbers, starts, self._encoder.heads,
                out.inverse, rows.q, rows.scale, rows.shift,
            )  # fmt: skip
            rows.add_norm(self._kernels, out, hidden, layer.norm, up.inverse)
            wide = _Rows(len(hidden), len(up.scale))
            sums = up.sums(rows.q)
            self._kernels.gelu(sums, rows.scale, rows.shift, *up.numbers, down.inverse, wide.q, wide.scale, wide.shift)
            rows = wide.add_norm(self._kernels, down, hidden, layer.last_norm, after, rows)
        return torch.from_numpy(hidden), lengths


class _Rows:
    """Quantised activations, one row a token."""

    def __init__(self, tokens: int, size: int) -> None:
        self.q = np.empty((tokens, size), np.int8)
        self.scale, self.shift = np.empty(tokens, np.float32), np.empty(tokens, np.float32)

    def add_norm(
        self, kernels: Any, linear: Quantised, hidden: Vectors, norm: Any, inverse: Vectors, into: "_Rows | None" = None
    ) -> "_Rows":
        into = into or self
        kernels.add_norm(
            linear.sums(self.q), self.scale, self.shift, *linear.numbers, hidden, norm.weight.numpy(),
            norm.bias.numpy(), np.float32(norm.eps), inverse, into.q, into.scale, into.shift,
        )  # fmt: skip
        return into


def _ranges(encoder: Encoder) -> dict[tuple[int, str], Tensor]:
    """Largest magnitude of each input channel of each linear layer, over random sequences of the vocabulary."""
    draw = np.random.default_rng(0)
    texts = [draw.integers(0, len(encoder.words), CALIBRATION[1]).astype(np.int32) for _ in range(CALIBRATION[0])]
    found: dict[tuple[int, str], Tensor] = {}

    def watch(number: int, name: str, seen: Tensor) -> None:
        found[number, name] = seen.abs().amax(0)

    with torch.inference_mode():
        states(encoder, texts, watch)
    return found


def _quantised(linear: Linear, ranges: Tensor) -> Quantised:
    weight = linear.weight
    smooth = (ranges.clamp_min(1e-5) ** ALPHA / weight.abs().amax(0).clamp_min(1e-5) ** (1 - ALPHA)).clamp_min(1e-5)
    moved = weight * smooth
    scale = (moved.abs().amax(1) / 127).clamp_min(1e-12)
    whole = (moved / scale[:, None]).round().to(torch.int8)
    column = whole.sum(1, dtype=torch.int64).float() * scale
    return Quantised(
        whole.t().contiguous(), scale.numpy(), column.numpy(), linear.bias.numpy().copy(), (1 / smooth).numpy()
    )
