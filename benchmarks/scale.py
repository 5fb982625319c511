"""The engine on many rows: reading, duplicates, row judges and a selection, with rows a second and peak memory.

    python benchmarks/scale.py [--rows 50000] [--workers 2] [--folder DIR] [--json PATH]

Makes rows of some 100 words from the real ones of GRISTMILL_DATA (default: ../shared/data beside the repository):
sentences put together anew by a seed, so that texts differ, and planted among them exact and near copies. They go as
Parquet files through the engine as a run would send them, without Prefect. Peak memory is of the largest single
process: this one, and of its workers the largest.
"""

import argparse
import json
import os
import platform
import re
import resource
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from datetime import UTC, datetime
from importlib.metadata import version
from itertools import pairwise
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from machine import processor

from gristmill.curation.folder import RunFolder
from gristmill.curation.pool import pool
from gristmill.curation.reading.source import Source, read_source
from gristmill.curation.release import finish
from gristmill.curation.sift import SetPlan, advance, begin, full_steps, step_name
from gristmill.curation.steps import find_steps

# data set -> column of the prompt, column of the answer
SOURCES = {
    "alpaca_raw_partial": ("instruction", "output"),
    "alpaca_gpt4_partial": ("instruction", "output"),
    "dolly_sample2000": ("instruction", "output"),
    "dolly_alpagasus_2996": ("instruction", "output"),
    "flan_cot": ("question", "rationale"),
    "gpteacher_roleplay": ("instruction", "response"),
    "gsm8k_train": ("question", "answer"),
    "math_test5000": ("problem", "solution"),
}
FILE_ROWS = 250_000
EXACT, NEAR = 0.05, 0.10  # shares of planted copies; a near copy has a sentence more
SENTENCES = 6  # of an answer, on average
# name and arguments, budgets as a share of the rows; those that this gristmill lacks are left out
STEPS: tuple[tuple[str, dict[str, Any]], ...] = (
    ("ExactDuplicate", {}),
    ("NearDuplicate", {}),
    ("Defects", {}),
    ("ResponseLength", {"low": 5, "high": 400}),
    ("Refusal", {}),
    ("Repetitive", {}),
    ("RandomSample", {"budget": 0.1}),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=50_000)
    parser.add_argument("--workers", type=int, help="default: every processor")
    parser.add_argument("--executor", help="processes, threads or ray")
    parser.add_argument("--folder", type=Path, help="where the run goes, and stays (default: a temporary folder)")
    parser.add_argument("--without", nargs="*", default=[], help="steps to leave out")
    parser.add_argument("--json", type=Path, help="write the result here")
    options = parser.parse_args()
    data = Path(os.environ.get("GRISTMILL_DATA", Path(__file__).parents[1] / "../shared/data")).resolve()
    if not data.is_dir():
        sys.exit(f"no real data at {data}: set GRISTMILL_DATA")
    with tempfile.TemporaryDirectory() as scratch:
        home = options.folder or Path(scratch)
        with ProcessPoolExecutor(1, get_context("spawn")) as alone:  # its memory is none of the engine's
            making = alone.submit(make, home / "source", data, options.rows)
            made = timed("make rows", options.rows, making.result)
        result = run(home, options, made)
    print(json.dumps({name: value for name, value in result.items() if name != "steps"}, indent=2))
    if options.json:
        options.json.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


def run(home: Path, options: argparse.Namespace, made: dict[str, Any]) -> dict[str, Any]:
    folder = RunFolder(home / "out")
    folder.root.mkdir(parents=True, exist_ok=True)
    plan = SetPlan("sft", "sft", ("synthetic",), steps(options.rows, options.without), 0.02)
    source = Source("synthetic", str(home / "source"), "unknown")
    done = []
    with pool(options.workers, options.executor) as crew:
        done.append(timed("read", options.rows, lambda: read_source(source, folder, pool=crew)))
        begin(folder, plan)
        for index, step in enumerate(full_steps(plan)):

            def work(index: int = index) -> dict[str, Any]:
                return advance(folder, plan, index, NoTools(), lambda done, total: None, crew)  # type: ignore[arg-type]

            came = done[-1].get("kept", done[0]["rows"])
            done.append(timed(step_name(index, step), came, work))
        release: dict[str, Any] = dict.fromkeys(("version", "previous"))
        release |= {"name": "scale", "created": "", "recipe": "", "recipe_digest": "", "seed": 0, "gristmill": ""}
        done.append(timed("shards", done[-1]["kept"], lambda: finish(folder, plan, release)))
        workers = crew.workers
    whole = [one for one in done if "came" in one]
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "rows": options.rows,
        "workers": workers,
        "executor": options.executor or "processes",
        "made": made,
        "conserved": all(one["came"] + one["made"] == one["kept"] + one["dropped"] for one in whole)
        and all(a["kept"] == b["came"] for a, b in pairwise(whole)),
        "kept": whole[-1]["kept"],
        "seconds": round(sum(one["seconds"] for one in done), 1),
        "cpu_s": round(sum(one["cpu_s"] for one in done), 1),
        "rows_per_s": round(options.rows / sum(one["seconds"] for one in done)),
        "peak_rss_mb": peak(resource.RUSAGE_SELF),
        "peak_rss_of_a_worker_mb": max((one["worker_peak_rss_mb"] for one in done), default=0),
        "steps": done,
        "machine": {"processor": processor(), "processors": os.cpu_count(), "load_average": os.getloadavg()[0]},
        "versions": {"python": platform.python_version()}
        | {name: version(name) for name in ("gristmill", "numba", "numpy", "pyarrow", "duckdb")},
    }


def timed(name: str, rows: int, work: Callable[[], Any]) -> dict[str, Any]:
    """What `work` took, and the counts of the record that it gives."""
    wall, cpu = time.monotonic(), cpu_seconds()
    record = work()
    seconds, used = time.monotonic() - wall, cpu_seconds() - cpu
    counts = {key: record[key] for key in ("came", "made", "kept", "dropped", "reasons", "rows") if key in record}
    found = {
        "step": name,
        "seconds": round(seconds, 2),
        "cpu_s": round(used, 2),
        "rows_per_s": round(rows / max(seconds, 1e-9)),
        "peak_rss_mb": peak(resource.RUSAGE_SELF),
        "worker_peak_rss_mb": max(map(worker_peak, living()), default=0),
        **counts,
    }
    shown = f"{counts['came']:,} -> {counts['kept']:,}  {counts['reasons']}" if "came" in counts else ""
    print(
        f"{name:<20} {seconds:8.1f} s  {used:8.1f} cpu s  {found['rows_per_s']:>10,} rows/s"
        f"  {found['peak_rss_mb']:>6,} MB  {shown}",
        flush=True,
    )
    return found


def cpu_seconds() -> float:
    """Of this process, and of workers that have ended: those still alive are counted when they end."""
    return sum(sum(resource.getrusage(who)[:2]) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)) + sum(
        map(worker_seconds, living())
    )


def living() -> list[int]:
    """Processes begun by this one that live."""
    path = Path(f"/proc/self/task/{os.getpid()}/children")
    return [int(pid) for pid in path.read_text().split()] if path.is_file() else []


def worker_seconds(pid: int) -> float:
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    except OSError:
        return 0.0
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def worker_peak(pid: int) -> int:
    try:
        said = re.search(r"VmHWM:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text())
    except OSError:
        return 0
    return int(said[1]) // 1024 if said else 0


def peak(who: int) -> int:
    return resource.getrusage(who).ru_maxrss // 1024


def steps(rows: int, without: list[str]) -> tuple[Any, ...]:
    known = find_steps()
    chosen = []
    for name, given in STEPS:
        if name in known and name not in without:
            more = {key: int(value * rows) if key == "budget" else value for key, value in given.items()}
            chosen.append(known[name](**more))
    return tuple(chosen)


class NoTools:
    """No models."""

    def digest(self, model: str) -> str:
        return model


def make(folder: Path, data: Path, count: int, seed: int = 0) -> dict[str, Any]:
    """Writes the rows, unless they lie there, and says how many were planted."""
    folder.mkdir(parents=True, exist_ok=True)
    prompts, sentences = real(data)
    rng = np.random.default_rng(seed)
    planted = {"exact": 0, "near": 0}
    for index, start in enumerate(range(0, count, FILE_ROWS)):
        size = min(FILE_ROWS, count - start)
        fresh = size - int(size * EXACT) - int(size * NEAR)
        prompt = joined(prompts, rng, np.full(fresh, 1))
        lengths = 1 + rng.poisson(SENTENCES - 1, fresh)
        answer = joined(sentences, rng, lengths)
        again = rng.integers(0, fresh, size - fresh)
        exact = int(size * EXACT)
        more = joined(sentences, rng, np.ones(len(again) - exact, np.int64))
        copies = answer.take(pa.array(again))
        near = pc.binary_join_element_wise(copies.slice(exact), more, " ")
        order = pa.array(rng.permutation(size))
        table = pa.table(
            {
                "prompt": pa.concat_arrays([prompt, prompt.take(pa.array(again))]).take(order),
                "completion": pa.concat_arrays([answer, copies.slice(0, exact), near]).take(order),
            }
        )
        pq.write_table(table, folder / f"part-{index:05d}.parquet", compression="zstd", row_group_size=10_000)
        planted["exact"] += exact
        planted["near"] += len(again) - exact
    return {"rows": count, "planted": planted}


def joined(pieces: pa.Array, rng: np.random.Generator, lengths: np.ndarray) -> pa.Array:
    """For each length that many pieces, drawn at random, with spaces between them."""
    offsets = pa.array(np.concatenate([[0], np.cumsum(lengths)]), pa.int32())
    drawn = pieces.take(pa.array(rng.integers(0, len(pieces), int(lengths.sum()))))
    return pc.binary_join(pa.ListArray.from_arrays(offsets, drawn), " ")


def real(data: Path) -> tuple[pa.Array, pa.Array]:
    """Real prompts, and the sentences of real answers."""
    prompts: dict[str, None] = {}
    sentences: dict[str, None] = {}
    for prompt, answer in pairs(data):
        prompts[prompt] = None
        for sentence in re.split(r"(?<=[.!?])\s+|\n+", answer):
            if 20 <= len(sentence) <= 400:
                sentences[sentence] = None
    return pa.array(list(prompts)), pa.array(list(sentences))


def pairs(data: Path) -> Iterator[tuple[str, str]]:
    for name, (asked, answered) in SOURCES.items():
        path = data / f"{name}.parquet"
        if path.is_file():
            table = pq.read_table(path, columns=[asked, answered])
            for prompt, answer in zip(table[asked].to_pylist(), table[answered].to_pylist(), strict=True):
                if prompt and answer:
                    yield str(prompt), str(answer)


if __name__ == "__main__":
    main()
