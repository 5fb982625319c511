"""Near-duplicate judging of real instruction rows: Parquet in, verdicts out, beside rensa and datasketch.

    python benchmarks/near_duplicates.py [--rows 212000] [--repeats 5] [--json PATH]

Reads the data sets of GRISTMILL_DATA (default: ../shared/data beside the repository), plants exact and edited copies,
and prints rows per second, recall of the planted pairs whose Jaccard (words of `text.words`, counted in plain Python)
reaches the threshold, and peak memory. Each contender runs in a process of its own, three of the judge's.
"""

import argparse
import json
import os
import platform
import random
import resource
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from importlib.metadata import version
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from gristmill.curation.folder import write_parquet
from gristmill.curation.judges.duplicates import NearDuplicate
from gristmill.curation.rows import PART_ROWS, digest, message, table
from gristmill.curation.text import view, words

# data set -> (columns of the prompt, columns of the answer)
SOURCES = {
    "alpaca_raw_partial": (["instruction", "input"], ["output"]),
    "alpaca_gpt4_partial": (["instruction", "input"], ["output"]),
    "codealpaca_new4535": (["instruction", "input"], ["output"]),
    "dolly_sample2000": (["instruction", "input"], ["output"]),
    "dolly_alpagasus_2996": (["instruction", "input"], ["output"]),
    "flan_cot": (["question"], ["rationale", "answer"]),
    "gpteacher_roleplay": (["instruction", "input"], ["response"]),
    "gsm8k_train": (["question"], ["answer"]),
    "gsm8k_test": (["question"], ["answer"]),
    "math_test5000": (["problem"], ["solution"]),
    "mmlu": (["question", "A", "B", "C", "D"], ["answer"]),
    "t0_templates_sample": (["prompt"], ["completion"]),
    "bbh": (["input"], ["target"]),
    "mbpp974": (["text"], ["code"]),
}
PLANTED, EDITS = 0.28, (0.0, 0.01, 0.02, 0.04, 0.08)  # share of planted copies; shares of their words replaced
NOTE = (
    "rows_per_s: by the median of all warm runs of three processes; Parquet parts in, Parquet verdicts out. cpu_s:"
    " processor seconds of all threads of a run, the median likewise. The peers, medians of three processes: Parquet"
    " in, Python word 5-grams, signatures, LSH query and insert; nothing is verified or written."
)
SMALL, SMALLEST = 40_000, 8_000  # rows that rensa and datasketch get
Text = tuple[str, str]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=212_000)
    parser.add_argument("--repeats", type=int, default=5, help="timed runs of each of three processes")
    parser.add_argument("--json", type=Path, help="write the result here")
    options = parser.parse_args()
    data = Path(os.environ.get("GRISTMILL_DATA", Path(__file__).parents[1] / "../shared/data")).resolve()
    if not data.is_dir():
        sys.exit(f"no real data at {data}: set GRISTMILL_DATA")
    with tempfile.TemporaryDirectory() as scratch:
        result = measured(Path(scratch), data, options.rows, options.repeats)
    print(json.dumps(result, indent=2))
    if options.json:
        options.json.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


def measured(scratch: Path, data: Path, count: int, repeats: int) -> dict[str, Any]:
    rows = scratch / "rows"
    facts, copies = alone(build, rows, data, count)
    runs = [alone(ours, rows, repeats) for _ in range(3)]
    cold = cold_compile(scratch, rows)
    beside = [typical(rensa, rows, min(count, SMALL)), typical(datasketch, rows, min(count, SMALLEST))]
    seconds = statistics.median(second for run in runs for second in run["seconds"])
    cpu_seconds = statistics.median(run["cpu_s"] for run in runs)
    rate, worked = count / seconds, count / cpu_seconds
    return {
        "rows": count,
        **facts,
        "judge": repr(NearDuplicate()),
        "rows_per_s": round(rate),
        "rows_per_cpu_s": round(worked),
        "median_s": round(seconds, 3),
        "cpu_s": round(cpu_seconds, 3),
        "all_runs_s": [[round(second, 3) for second in run["seconds"]] for run in runs],
        "first_run_with_empty_cache_s": round(cold, 1),
        "dropped": runs[0]["dropped"],
        **alone(recall, rows, runs[0]["verdicts"], copies),
        "peak_rss_mb": max(run["peak_rss_mb"] for run in runs),
        "beside": [
            peer
            | {
                "times_slower": round(rate / peer["rows_per_s"], 1),
                "times_the_cpu": round(worked / peer["rows_per_cpu_s"], 1),
            }
            for peer in beside
        ],
        "machine": {"processor": processor(), "processors": os.cpu_count(), "load_average": os.getloadavg()[0]},
        "versions": {"python": platform.python_version()}
        | {name: version(name) for name in ("numba", "numpy", "pyarrow", "rensa", "datasketch")},
        "note": NOTE,
    }


def alone(function: Callable[..., Any], *arguments: Any) -> Any:
    """`function` in a fresh process, so that its peak memory and its caches are its own."""
    with ProcessPoolExecutor(1, get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


def typical(peer: Callable[..., dict[str, Any]], *arguments: Any) -> dict[str, Any]:
    """Of three runs in processes of their own, the one of median speed."""
    return sorted((alone(peer, *arguments) for _ in range(3)), key=lambda run: run["rows_per_s"])[1]


# ---------------------------------------------------------------- rows


def build(rows: Path, data: Path, count: int) -> tuple[dict[str, Any], list[tuple[int, int]]]:
    """Writes `count` canonical rows; gives facts about them and the planted pairs (original, copy)."""
    rng = random.Random(0)
    real = list(dict.fromkeys(real_rows(data)))
    rng.shuffle(real)
    planted = round(PLANTED * count)
    texts = real[: count - planted]
    originals, strangers = len(texts), count - planted - len(texts)
    vocabulary = [word for prompt, _ in texts[:5000] for word in prompt.split()]
    texts += [edited(rng.choice(real), 0.5, vocabulary, rng) for _ in range(strangers)]
    pairs = [(rng.randrange(originals), originals + strangers + k) for k in range(planted)]
    texts += [edited(texts[original], rng.choice(EDITS), vocabulary, rng) for original, _ in pairs]
    places = rng.sample(range(count), count)
    at = dict(zip(places, range(count), strict=True))
    size = sum(len(prompt) + len(answer) for prompt, answer in texts)
    for part in range(0, count, PART_ROWS):
        said = [texts[places[i]] for i in range(part, min(part + PART_ROWS, count))]
        write_parquet(rows / f"all-{part // PART_ROWS:05d}.parquet", table(map(row, said, range(part, count))))
    facts = {
        "real_rows": originals,
        "half_rewritten_rows": strangers,
        "planted_copies": planted,
        "characters_a_row": round(size / count),
    }
    return facts, [(at[a], at[b]) for a, b in pairs]


def real_rows(data: Path) -> Iterator[Text]:
    for name, (asked, told) in SOURCES.items():
        for found in pq.read_table(data / f"{name}.parquet", columns=[*asked, *told]).to_pylist():
            yield "\n".join(found[c] or "" for c in asked), "\n".join(found[c] or "" for c in told)


def edited(said: Text, share: float, vocabulary: Sequence[str], rng: random.Random) -> Text:
    if not share:
        return said
    prompt, answer = (
        " ".join(rng.choice(vocabulary) if rng.random() < share else word for word in text.split(" ")) for text in said
    )
    return prompt, answer


def row(said: Text, position: int) -> dict[str, Any]:
    turns = [message("user", said[0]), message("assistant", said[1])]
    return {
        "row_id": digest(str(position)),
        "content_id": digest(*said),
        "source": "all",
        "position": position,
        "messages": turns,
    }


class Corpus:
    """The live rows as the engine hands them over: columns of the parts on disk."""

    seed, scratch, tools = 0, Path(), None

    def __init__(self, rows: Path) -> None:
        self.parts = sorted(rows.glob("*.parquet"))
        self.rows = sum(pq.read_metadata(part).num_rows for part in self.parts)

    def progress(self, done: int, total: int) -> None:
        pass

    def tables(self, columns: Sequence[str] | None = None) -> Iterator[pa.Table]:
        for part in self.parts:
            yield pq.read_table(part, columns=list(columns or ()) or None)


# ---------------------------------------------------------------- contenders


def ours(rows: Path, repeats: int) -> dict[str, Any]:
    seconds, worked = [], []
    for _ in range(repeats + 1):
        start, start_work = time.perf_counter(), time.process_time()
        corpus: Any = Corpus(rows)
        found = NearDuplicate().judge(corpus)
        write_parquet(rows.parent / "verdicts.parquet", found)
        seconds.append(time.perf_counter() - start)
        worked.append(time.process_time() - start_work)
    warm = seconds[1:]
    return {
        "seconds": warm,
        "cpu_s": statistics.median(worked[1:]),
        "dropped": found["keep"].to_pylist().count(False),
        "peak_rss_mb": peak(),
        "verdicts": rows.parent / "verdicts.parquet",
    }


def cold_compile(scratch: Path, rows: Path) -> float:
    """Seconds of a first run whose machine code has to be made."""
    os.environ["NUMBA_CACHE_DIR"] = str(scratch / "numba")
    try:
        return float(alone(first_run, rows))
    finally:
        del os.environ["NUMBA_CACHE_DIR"]


def first_run(rows: Path) -> float:
    start = time.perf_counter()
    corpus: Any = Corpus(rows)
    NearDuplicate().judge(corpus)
    return time.perf_counter() - start


def rensa(rows: Path, count: int) -> dict[str, Any]:
    from rensa import RMinHash, RMinHashLSH

    start, start_work = time.perf_counter(), time.process_time()
    sets = shingled(rows, count)
    index, found = RMinHashLSH(0.7, 125, 25), 0
    for key, shingles in enumerate(sets):
        sketch = RMinHash(125, 0)
        sketch.update(shingles)
        found += bool(index.query(sketch))
        index.insert(key, sketch)
    return peer("rensa", count, time.perf_counter() - start, time.process_time() - start_work, found)


def datasketch(rows: Path, count: int) -> dict[str, Any]:
    from datasketch import MinHash, MinHashLSH

    start, start_work = time.perf_counter(), time.process_time()
    sets = shingled(rows, count)
    index, found = MinHashLSH(num_perm=125, params=(25, 5)), 0
    for key, shingles in enumerate(sets):
        sketch = MinHash(125)
        sketch.update_batch([shingle.encode() for shingle in shingles])
        found += bool(index.query(sketch))
        index.insert(key, sketch)
    return peer("datasketch", count, time.perf_counter() - start, time.process_time() - start_work, found)


def peer(name: str, count: int, seconds: float, worked: float, found: int) -> dict[str, Any]:
    speed = {"rows_per_s": round(count / seconds), "rows_per_cpu_s": round(count / worked)}
    return {"name": name, "rows": count, **speed, "flagged": found, "peak_rss_mb": peak()}


def shingled(rows: Path, count: int) -> Iterator[list[str]]:
    for text in some_texts(rows, count):
        said = text.lower().split()
        yield [" ".join(said[i : i + 5]) for i in range(max(1, len(said) - 4))]


def some_texts(rows: Path, count: int) -> Iterator[str]:
    for rows_of in Corpus(rows).tables(["messages"]):
        for turns in rows_of["messages"].slice(0, count).to_pylist():
            yield "\n\n".join(turn["content"] for turn in turns)
        count -= rows_of.num_rows
        if count <= 0:
            return


# ---------------------------------------------------------------- judging the judge


def recall(rows: Path, verdicts: Path, copies: list[tuple[int, int]]) -> dict[str, Any]:
    """Share of the planted pairs of Jaccard >= threshold that ended in one cluster."""
    texts = [text for part in Corpus(rows).tables() for text in view(part, "pair")]
    owner = [json.loads(e)["duplicate_of"] if e else None for e in pq.read_table(verdicts)["evidence"].to_pylist()]
    names = [digest(str(position)) for position in range(len(texts))]
    near = {"0.70": [], "0.75": []}  # type: dict[str, list[bool]]
    for a, b in copies:
        one, two = shingle_set(texts[a]), shingle_set(texts[b])
        similarity = len(one & two) / len(one | two) if one | two else 0.0
        for limit, found in near.items():
            if similarity >= float(limit):
                found.append((owner[a] or names[a]) == (owner[b] or names[b]))
    return {f"recall_at_{limit}": {"pairs": len(found), "found": sum(found), "share": round(sum(found) / len(found), 5)}
            for limit, found in near.items()}  # fmt: skip


def shingle_set(text: str) -> set[tuple[str, ...]]:
    said = words(text)
    return {tuple(said[i : i + 5]) for i in range(max(1, len(said) - 4))} if said else set()


def peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024


def processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(": ")[1] for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor()


if __name__ == "__main__":
    main()
