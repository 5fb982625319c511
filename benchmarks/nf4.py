"""NF4: our paths beside bitsandbytes and a copy of the same bytes.

    python benchmarks/nf4.py [--device cpu|cuda] [--sizes 2048 4096] [--repeats 21] [--threads N] [--json PATH]

Dequantises a square matrix of each size, doubly quantised in blocks of 64, into a buffer that is there already
(bitsandbytes has no way to take one: it allocates its own), for each dtype; the paths take turns, and times are medians
of wall-clock milliseconds. `copy` is copy_ of a tensor of the result's size and dtype. `bitsandbytes/ours` and
`copy/ours` are ratios of times: above 1, ours is faster. `share` is the bytes that dequantising must move (0.516 read
and the result written, for each weight) per second, over the bytes per second of `copy` (read and written). Quantising
(doubly) is in seconds for a billion weights. Every result is compared bit for bit before the clock starts.
"""

import argparse
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from machine import installed, processor
from tables import show

from gristmill.kernels import nf4

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
READ = 0.5 + 1 / 64 + 4 / 64 / 256  # bytes of a doubly quantised weight
TARGETS = {"cpu": {"bitsandbytes/ours": 1.0}, "cuda": {"share": 0.75}}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--sizes", type=int, nargs="+", default=None, help="2048 4096, on CUDA 4096 8192 14336")
    parser.add_argument("--repeats", type=int, default=21)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--json", type=Path, help="write the result here")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    sizes = options.sizes or ([2048, 4096] if options.device == "cpu" else [4096, 8192, 14336])
    rows = [measured(size, dtype, torch.device(options.device), options.repeats) for size in sizes for dtype in DTYPES]
    result = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": " ".join(["python", *sys.argv]),
        "hardware": hardware(options.device),
        "threads": torch.get_num_threads(),
        "versions": {"python": platform.python_version()} | installed("torch", "bitsandbytes", "numba", "triton"),
        "targets": TARGETS[options.device],
        "rows": rows,
    }
    show(rows)
    if options.json:
        options.json.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


def measured(size: int, name: str, device: torch.device, repeats: int) -> dict[str, Any]:
    """One line of the table: dequantising and quantising a (size, size) matrix of dtype `name`."""
    dtype = DTYPES[name]
    weight = (torch.randn(size, size, device=device) * 0.02).to(dtype)
    ours = nf4.path_of(device)
    q = nf4.quantise(weight)
    out, source = torch.empty_like(weight), nf4.dequantise(q, path="torch")
    ways: dict[str, Callable[[], Any]] = {
        "ours": lambda: nf4.dequantise(q, out=out),
        "torch": lambda: nf4.dequantise(q, out=out, path="torch"),
        "copy": lambda: out.copy_(source),
    }
    nf4.dequantise(q, out=out)
    assert torch.equal(out, source), "the paths differ"
    make: dict[str, Callable[[], Any]] = {"ours": lambda: nf4.quantise(weight)}
    peer = bitsandbytes()
    if peer is not None:
        packed, state = peer.quantize_4bit(weight, compress_statistics=True, quant_type="nf4")
        theirs = nf4.dequantise(read_from(packed, state, weight))
        assert torch.equal(theirs, peer.dequantize_4bit(packed, state)), "bitsandbytes differs"
        ways["bitsandbytes"] = lambda: peer.dequantize_4bit(packed, state)
        make["bitsandbytes"] = lambda: peer.quantize_4bit(weight, compress_statistics=True, quant_type="nf4")
    times, making = medians(ways, device, repeats), medians(make, device, max(3, repeats // 4))
    moved, copied = READ + dtype.itemsize, 2 * dtype.itemsize
    row: dict[str, Any] = {"size": size, "dtype": name, "path": ours}
    row |= {f"{way} ms": round(1e3 * seconds, 4) for way, seconds in times.items()}
    row |= {f"{way}/ours": round(times[way] / times["ours"], 2) for way in times if way != "ours"}
    row["GB/s"] = round(moved * size * size / times["ours"] / 1e9, 1)
    row["share"] = round(moved / times["ours"] / (copied / times["copy"]), 3)
    return row | {f"quantise {way} s/1e9": round(s / size / size * 1e9, 2) for way, s in making.items()}


def bitsandbytes() -> Any:
    try:
        from bitsandbytes import functional
    except ImportError:
        return None
    return functional


def read_from(packed: torch.Tensor, state: Any, weight: torch.Tensor) -> nf4.NF4:
    """What bitsandbytes quantised, as ours."""
    tensors = {"w": packed} | {f"w.{key}": value for key, value in state.as_dict(packed=True).items()}
    return nf4.from_tensors({key: value.to(weight.device) for key, value in tensors.items()}, "w")


def medians(ways: dict[str, Callable[[], Any]], device: torch.device, repeats: int) -> dict[str, float]:
    """Seconds of each way; one after the other in every round, so that a busy moment meets all of them."""
    taken: dict[str, list[float]] = {way: [] for way in ways}
    for turn in range(repeats + 2):
        for way, call in ways.items():
            seconds = timed_cuda(call) if device.type == "cuda" else timed(call)
            if turn >= 2:  # the first two warm up
                taken[way].append(seconds)
    return {way: statistics.median(seconds) for way, seconds in taken.items()}


def timed(call: Callable[[], Any]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def timed_cuda(call: Callable[[], Any], inside: int = 10) -> float:
    """Seconds of one of `inside` calls by the GPU's clock, all queued while it sleeps: Python's time is not counted."""
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda._sleep(20_000_000)  # cycles: about 10 ms
    start.record()
    for _ in range(inside):
        call()
    end.record()
    end.synchronize()
    return float(start.elapsed_time(end)) / 1e3 / inside


def hardware(device: str) -> str:
    if device == "cuda":
        return torch.cuda.get_device_name()
    return f"{processor()}, {os.cpu_count()} processors"


if __name__ == "__main__":
    main()
