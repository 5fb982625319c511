"""Scoring responses under a causal model: ours (packed) beside transformers one row at a time, on the same rows.

    python benchmarks/lm_measures.py [--rows 2000] [--one-by-one 200] [--sizes 3M 30M] [--threads N] [--json PATH]

Reads instruction rows of GRISTMILL_DATA (default: ../shared/data beside the repository) and makes a model of each size
with random weights, which score as fast as trained ones. Rates are per second of wall clock and of processor time (all
threads; the one to trust on a shared machine). The share is that of the matrix products' own rate, measured on the
model's linear layers at the size of one pack, in the dtype that the scorer runs in:

    flops = tokens · 2 · parameters (embeddings left out) + targets · 2 · hidden · vocabulary
          + layers · heads · head size · 2 · sum of squared document lengths     (causal: half of the full square)
"""

import argparse
import json
import os
import platform
import sys
import tempfile
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from machine import installed, processor
from transformers import AutoModelForCausalLM

from gristmill.curation.rows import message, table
from gristmill.tuning.chat import Tokens, tokenise_responses
from gristmill.tuning.models import load_tokenizer, make_model
from gristmill.tuning.score import CAPACITY, PackedScorer
from gristmill.tuning.settings import NewModel

SOURCES = ("alpaca_raw_random5000", "dolly_sample2000", "codealpaca_2k", "alpaca_raw_first5000")
COLUMNS = (("instruction", "prompt"), ("input", "context"), ("output", "response", "completion"))
VOCAB = {"3M": 4096}  # of other sizes 8192


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=2000)
    parser.add_argument("--one-by-one", type=int, default=200, help="rows that transformers scores one at a time")
    parser.add_argument("--sizes", nargs="+", default=["3M", "30M"])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=0, help="of torch; 0: its own choice")
    parser.add_argument("--json", type=Path, help="write the result here")
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    data = Path(os.environ.get("GRISTMILL_DATA", Path(__file__).parents[1] / "../shared/data")).resolve()
    if not data.is_dir():
        sys.exit(f"no real data at {data}: set GRISTMILL_DATA")
    rows = real_rows(data, options.rows)
    result: dict[str, Any] = {"machine": machine(), "rows": rows.num_rows, "sizes": {}}
    with tempfile.TemporaryDirectory() as scratch:
        for size in options.sizes:
            home = Path(scratch) / size
            spec = NewModel(params=size, vocab=VOCAB.get(size, 8192), tokens=0)
            make_model(home, spec, iter(rows["messages"].to_pylist()))
            result["sizes"][size] = measured(home, rows, options.one_by_one, options.repeats)
            print(size, json.dumps(result["sizes"][size], indent=2), flush=True)
    if options.json:
        options.json.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


def real_rows(data: Path, count: int) -> pa.Table:
    """At most `count` rows of the data sets that are there, evenly from each."""
    made: list[dict[str, Any]] = []
    files = [data / f"{name}.parquet" for name in SOURCES if (data / f"{name}.parquet").is_file()]
    for file in files:
        read = pq.read_table(file)
        names = [next((name for name in some if name in read.column_names), "") for some in COLUMNS]
        for row in read.slice(0, -(-count // len(files))).to_pylist():
            ask, more, answer = (str(row.get(name) or "") for name in names)
            turns = [message("user", f"{ask}\n\n{more}".strip()), message("assistant", answer)]
            place = len(made)
            made.append(
                {"row_id": str(place), "content_id": str(place), "source": "s", "position": place, "messages": turns}
            )
    return table(made[:count])


def measured(home: Path, rows: pa.Table, few: int, repeats: int) -> dict[str, Any]:
    scorer = PackedScorer(home)
    model = scorer._model
    tokenizer = load_tokenizer(home)
    found = tokenise_responses(tokenizer, rows)
    examples = [
        item for item in found if isinstance(item, Tokens) and len(item.ids) <= model.config.max_position_embeddings
    ]
    tokens, flops = cost(model, examples)
    ours: list[tuple[float, float]] = []
    products: list[tuple[float, float]] = []
    for _ in range(repeats):  # by turns, so that a machine's moods meet both
        products.append(matmul_rate(model))
        ours.append(timed(lambda: scorer.response_scores(rows), model))
    told = timed(lambda: tokenise_responses(tokenizer, rows), model)
    both = timed(lambda: scorer.response_scores(rows, alone=True), model)
    small = rows.slice(0, few)
    theirs = timed(lambda: one_by_one(home, tokenizer, small, model.dtype, str(model.device)), model)
    fits = [isinstance(item, Tokens) and len(item.ids) <= model.config.max_position_embeddings for item in found[:few]]
    few_tokens = sum(len(item.ids) for item, fit in zip(found, fits, strict=False) if fit and isinstance(item, Tokens))
    wall, cpu = (min(one[i] for one in ours) for i in (0, 1))
    return {
        "parameters": sum(p.numel() for p in model.parameters()),
        "dtype": str(model.dtype),
        "tokens_a_row": round(tokens / len(examples), 1),
        "capacity": CAPACITY,
        "tokens_per_s": round(tokens / wall),
        "tokens_per_cpu_s": round(tokens / cpu),
        "rows_per_s": round(rows.num_rows / wall, 1),
        "gflops_per_cpu_s": round(flops / cpu / 1e9, 1),
        "matmul_gflops_per_cpu_s": round(max(rate for _, rate in products) / 1e9, 1),
        "share_of_matmul_rate": round(flops / cpu / max(rate for _, rate in products), 3),
        "share_of_matmul_rate_wall": round(flops / wall / max(rate for rate, _ in products), 3),
        "ifd_rows_per_s": round(rows.num_rows / both[0], 1),
        "tokenised_rows_per_s": round(rows.num_rows / told[0]),
        "tokenised_rows_per_cpu_s": round(rows.num_rows / told[1]),
        "one_row_at_a_time_tokens_per_s": round(few_tokens / theirs[0]),
        "one_row_at_a_time_tokens_per_cpu_s": round(few_tokens / theirs[1]),
        "ratio_to_one_row_at_a_time": round(tokens / wall / (few_tokens / theirs[0]), 2),
        "ratio_to_one_row_at_a_time_cpu": round(tokens / cpu / (few_tokens / theirs[1]), 2),
    }


def cost(model: Any, examples: list[Tokens]) -> tuple[int, float]:
    """Tokens, and the floating-point operations that scoring them takes."""
    c = model.config
    sizes = np.asarray([len(item.ids) for item in examples], np.float64)
    targets = sum(int(np.count_nonzero(item.weights)) for item in examples)
    layers = sum(p.numel() for name, p in model.named_parameters() if "embed" not in name and "lm_head" not in name)
    attention = c.num_hidden_layers * c.num_attention_heads * c.head_dim * 2 * float((sizes**2).sum())
    return int(sizes.sum()), float(sizes.sum()) * 2 * layers + targets * 2 * c.hidden_size * c.vocab_size + attention


def matmul_rate(model: Any, reps: int = 5) -> tuple[float, float]:
    """Operations per second of wall clock and of processor time, of the products of one layer at one pack's size."""
    weights = [m.weight for m in model.base_model.layers[0].modules() if isinstance(m, torch.nn.Linear)]
    inputs = [torch.randn(CAPACITY, w.shape[1], dtype=w.dtype, device=w.device) for w in weights]

    def all_products() -> None:
        for x, w in zip(inputs, weights, strict=True):
            x @ w.t()

    with torch.inference_mode():
        all_products()
        times = [timed(all_products, model) for _ in range(reps)]
    work = sum(2 * CAPACITY * w.numel() for w in weights)
    return work / min(wall for wall, _ in times), work / min(cpu for _, cpu in times)


def one_by_one(home: Path, tokenizer: Any, rows: pa.Table, dtype: torch.dtype, device: str) -> float:
    """As the common scripts do it: the template, the tokenizer and the model for each row, logits of every token."""
    model = AutoModelForCausalLM.from_pretrained(home, dtype=dtype).to(device).eval()
    total = 0.0
    for turns in rows["messages"].to_pylist():
        messages = [{"role": turn["role"], "content": turn["content"]} for turn in turns]
        prompt = tokenizer.apply_chat_template(messages[:-1], add_generation_prompt=True, return_dict=False)
        ids = tokenizer.apply_chat_template(messages, return_dict=False, return_tensors="pt").to(device)
        if ids.shape[1] > model.config.max_position_embeddings:
            continue
        with torch.inference_mode():
            logps = model(ids).logits[0, :-1].float().log_softmax(-1)
            told = logps.gather(1, ids[0, 1:, None])[len(prompt) - 1 :, 0]
        total -= float(told.sum())
    return total


def timed(work: Callable[[], Any], model: Any) -> tuple[float, float]:
    """Seconds of wall clock and of processor time."""
    wall, cpu = time.perf_counter(), time.process_time()
    work()
    if model.device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - wall, time.process_time() - cpu


def machine() -> dict[str, Any]:
    return {
        "date": datetime.now(UTC).date().isoformat(),
        "cpu": processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "python": platform.python_version(),
        **installed("torch", "transformers", "tokenizers", "numpy", "pyarrow"),
    }


if __name__ == "__main__":
    main()
