"""Log-probabilities of target tokens: ours beside full logits with cross_entropy and TRL's chunked operation.

    python benchmarks/logprob.py [--device cuda] [--tokens N] [--width H] [--words V] [--train-head] [--repeats 5]
                                 [--contenders ours,full,trl] [--json PATH]

Each contender takes the same states, head and targets through forward and backward, after one run to warm up. Seconds
are medians: on CUDA between events, on a CPU of wall-clock, processor seconds (all threads) beside them. Memory is what
a contender allocates at once on top of its inputs: on CUDA by the allocator, on a CPU by torch's own record. The share
is of the machine's matrix products: FLOP that the task needs (4HV a token with a frozen head, 6HV with one that learns)
over seconds, over the rate of one product of the same sizes, measured here; `of_peak` is over the data sheet's rate of
a known GPU. Defaults are V = 128,256, H = 4,096, 16,384 tokens in bf16 on CUDA; a twentieth of that in fp32 on a CPU.
"""

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from machine import installed, processor
from torch import Tensor

from gristmill.kernels.logprob import chunk_of, path_of, target_logprobs
from gristmill.tuning.roofline import KNOWN

DEFAULTS = {"cuda": (16_384, 4_096, 128_256, "bfloat16"), "cpu": (1_024, 768, 32_768, "float32")}
TRL_CHUNK = 32_768  # words of a tile, TRL's default
TARGET = 0.6  # share of the matrix products' rate, ours on CUDA


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=tuple(DEFAULTS), default="cpu")
    parser.add_argument("--tokens", type=int)
    parser.add_argument("--width", type=int)
    parser.add_argument("--words", type=int)
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"))
    parser.add_argument("--train-head", action="store_true")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--contenders", default="ours,full,trl")
    parser.add_argument("--json", type=Path, help="write the result here")
    options = parser.parse_args()
    tokens, width, words, dtype = DEFAULTS[options.device]
    sizes = (options.tokens or tokens, options.width or width, options.words or words)
    result = measured(options, sizes, getattr(torch, options.dtype or dtype))
    print(json.dumps(result, indent=2))
    if options.json:
        options.json.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


def measured(options: argparse.Namespace, sizes: tuple[int, int, int], dtype: torch.dtype) -> dict[str, Any]:
    tokens, width, words = sizes
    torch.manual_seed(0)
    hidden = torch.randn(tokens, width).to(options.device, dtype).requires_grad_()
    head = (torch.randn(words, width) * width**-0.5).to(options.device, dtype).requires_grad_(options.train_head)
    targets = torch.randint(words, (tokens,), device=options.device)
    weights = torch.rand(tokens, device=options.device)
    rate = product_rate(hidden.detach(), head.detach(), options.repeats)
    work = (6.0 if options.train_head else 4.0) * tokens * width * words
    name = torch.cuda.get_device_name() if options.device == "cuda" else processor()
    peak = next((rate * 1e12 for part, rate in KNOWN.items() if part in name.replace("-", " ")), None)
    found: dict[str, Any] = {}
    for contender in options.contenders.split(","):
        step = STEPS[contender]
        try:
            found[contender] = of_step(lambda s=step: run(s, hidden, head, targets, weights), options, work, rate, peak)
        except (ImportError, torch.OutOfMemoryError, RuntimeError) as error:
            found[contender] = {"failed": f"{type(error).__name__}: {error}"[:300]}
    ours = found.get("ours", {})
    ratios = {
        other: {key: round(numbers[key] / ours[key], 2) for key in ("seconds", "bytes")}
        for other, numbers in found.items()
        if other != "ours" and "seconds" in numbers and "seconds" in ours
    }
    return {
        "benchmark": "logprob",
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        "command": f"benchmarks/logprob.py --device {options.device} --tokens {tokens} --width {width} --words {words}"
        f" --dtype {str(dtype).removeprefix('torch.')} --repeats {options.repeats}"
        + (" --train-head" if options.train_head else ""),
        "hardware": {"device": name, "threads": torch.get_num_threads(), "machine": platform.machine()},
        "versions": installed("torch", "triton", "trl", "transformers"),
        "path": path_of(options.device, dtype),
        "chunk_tokens": chunk_of(tokens, words, options.device),
        "product_tflops": round(rate / 1e12, 3),
        "contenders": found,
        "theirs_over_ours": ratios,
        "target": {"share": TARGET, "where": "ours on CUDA at V = 128,256 and H = 4,096, of_peak"},
    }


def ours(hidden: Tensor, head: Tensor, targets: Tensor) -> Tensor:
    return target_logprobs(hidden, head, targets)


def full(hidden: Tensor, head: Tensor, targets: Tensor) -> Tensor:
    return -F.cross_entropy((hidden @ head.t()).float(), targets, reduction="none")


def trl(hidden: Tensor, head: Tensor, targets: Tensor) -> Tensor:
    from trl.kernels.chunked_logprob import ChunkedLogProbFunction

    values: Tensor = ChunkedLogProbFunction.apply(hidden, head, None, targets, 1.0, TRL_CHUNK, None, 1.0, ())[0]
    return values


STEPS: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {"ours": ours, "full": full, "trl": trl}


def run(step: Callable[..., Tensor], hidden: Tensor, head: Tensor, targets: Tensor, weights: Tensor) -> None:
    """Forward and backward; the gradients are dropped."""
    leaves = [leaf for leaf in (hidden, head) if leaf.requires_grad]
    torch.autograd.grad((step(hidden, head, targets) * weights).sum(), leaves)


def of_step(
    step: Callable[[], None], options: argparse.Namespace, work: float, rate: float, peak: float | None
) -> dict[str, Any]:
    step()
    seconds, processor_seconds = zip(*(timed(step, options.device) for _ in range(options.repeats)), strict=True)
    median = statistics.median(seconds)
    line = {
        "seconds": round(median, 6),
        "processor_seconds": round(statistics.median(processor_seconds), 6),
        "bytes": allocated(step, options.device),
        "share": round(work / median / rate, 4),
    }
    return line | ({} if peak is None else {"of_peak": round(work / median / peak, 4)})


def timed(step: Callable[[], object], device: str) -> tuple[float, float]:
    cpu = time.process_time()
    if device == "cpu":
        wall = time.perf_counter()
        step()
        return time.perf_counter() - wall, time.process_time() - cpu
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    step()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end) / 1e3, time.process_time() - cpu


def allocated(step: Callable[[], None], device: str) -> int:
    """Bytes that a step has allocated at once, on top of those at its start."""
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step()
        return torch.cuda.max_memory_allocated() - before
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as record:
        step()
    now = top = 0
    results: Any = record.profiler
    events = [event for event in results.kineto_results.events() if event.name() == "[memory]"]
    for event in sorted(events, key=lambda event: event.start_ns()):
        now += event.nbytes()
        top = max(top, now)
    return top


def product_rate(hidden: Tensor, head: Tensor, repeats: int) -> float:
    """FLOP/s of hidden headᵀ in parts of the chunk's size, the median."""
    part = hidden[: chunk_of(len(hidden), len(head), hidden.device.type)]
    logits = part.new_empty(len(part), len(head))
    torch.mm(part, head.t(), out=logits)
    seconds = [timed(lambda: torch.mm(part, head.t(), out=logits), hidden.device.type)[0] for _ in range(repeats)]
    return 2.0 * part.numel() * len(head) / statistics.median(seconds)


if __name__ == "__main__":
    main()
