"""Root mean square norm, forward and backward: ours beside transformers' own module and torch's rms_norm.

    python benchmarks/rms_norm.py [--device cuda] [--tokens N] [--width H] [--dtype D] [--repeats 15] [--json PATH]

Each contender takes the same rows through forward and backward with a frozen weight, as under LoRA, in turns after two
to warm up; milliseconds are medians. kept MB: what autograd keeps until the backward. share: of a copy's speed, for the
least that must move, x, y, dy and dx once and x once more. Defaults: 16,384 x 4,096 in bf16 on CUDA, 1,024 x 768 in
fp32 on a CPU.
"""

import argparse
import json
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from machine import installed, processor
from nf4 import medians
from tables import show
from torch import Tensor

from gristmill.kernels.rms_norm import naive_rms_norm, path_of, rms_norm

DEFAULTS = {"cuda": (16_384, 4_096, "bfloat16"), "cpu": (1_024, 768, "float32")}
EPS = 1e-6
WAYS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "ours": lambda x, weight: rms_norm(x, weight, EPS, "rounded"),
    "transformers": lambda x, weight: naive_rms_norm(x, weight, EPS, "rounded"),
    "torch": lambda x, weight: F.rms_norm(x, weight.shape, weight, EPS),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=tuple(DEFAULTS), default="cpu")
    parser.add_argument("--tokens", type=int)
    parser.add_argument("--width", type=int)
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"))
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--json", type=Path, help="write the result here")
    options = parser.parse_args()
    tokens, width, dtype = DEFAULTS[options.device]
    shape = (options.tokens or tokens, options.width or width)
    x = torch.randn(shape).to(options.device, getattr(torch, options.dtype or dtype)).requires_grad_()
    weight, dy = torch.ones(shape[1]).to(x), torch.randn(shape).to(x)
    rows = measured(x, weight, dy, options.repeats)
    show(rows)
    if options.json:
        result = {
            "benchmark": "rms_norm",
            "date": datetime.now(UTC).date().isoformat(),
            "command": f"benchmarks/rms_norm.py --device {options.device} --tokens {shape[0]} --width {shape[1]}",
            "hardware": torch.cuda.get_device_name() if x.is_cuda else processor(),
            "threads": torch.get_num_threads(),
            "versions": installed("torch", "transformers", "triton"),
            "path": path_of(x),
            "dtype": str(x.dtype).removeprefix("torch."),
            "rows": rows,
        }
        options.json.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


def measured(x: Tensor, weight: Tensor, dy: Tensor, repeats: int) -> list[dict[str, Any]]:
    calls: dict[str, Callable[[], Any]] = {"copy": lambda: dy.copy_(x.detach())}
    for name, way in WAYS.items():
        calls[name] = lambda way=way: torch.autograd.grad(way(x, weight), x, dy)
    seconds = medians(calls, x.device, repeats)
    return [
        {
            "contender": name,
            "ms": round(seconds[name] * 1e3, 3),
            "theirs/ours": round(seconds[name] / seconds["ours"], 2),
            "kept MB": round(kept(way, x, weight) / 1e6, 2),
            "share": round(2.5 * seconds["copy"] / seconds[name], 2),
        }
        for name, way in WAYS.items()
    ]


def kept(way: Callable[[Tensor, Tensor], Tensor], x: Tensor, weight: Tensor) -> int:
    """Bytes, each storage counted once."""
    found: dict[int, int] = {}

    def note(one: Tensor) -> Tensor:
        found[one.untyped_storage().data_ptr()] = one.untyped_storage().nbytes()
        return one

    with torch.autograd.graph.saved_tensors_hooks(note, lambda one: one):
        way(x, weight)
    return sum(found.values())


if __name__ == "__main__":
    main()
