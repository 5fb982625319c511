"""Decontamination of real instruction rows: Parquet in, verdicts out, beside plain Python and datatrove.

    python benchmarks/decontamination.py [--rows 100000] [--peer-rows 5000] [--repeats 3] [--json PATH]

Reads the data sets of GRISTMILL_DATA (default: ../shared/data beside the repository), repeats the training rows up to
`--rows` with items of the evaluation sets planted in every hundredth, and prints rows per second and per processor
second, memory, and how far the contenders agree on the same rows. Each contender runs in a process of its own.
"""

import argparse
import json
import os
import platform
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
from types import SimpleNamespace
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from gristmill.curation.folder import write_parquet
from gristmill.curation.judges.decontaminate import Decontaminate
from gristmill.curation.reading.source import Source, iter_rows
from gristmill.curation.rows import PART_ROWS, digest, message, table
from gristmill.curation.text.benchmark_sets import EvaluationSet, items
from gristmill.curation.text.view import view, words

TRAINING = ("alpaca_raw_partial", "dolly_sample2000", "codealpaca_2k")
AGAINST = ("gsm8k_test", "humaneval164", "mbpp974", "ifeval541", "math500")
PLANTED = 100  # one row in so many holds an item of an evaluation set
NOTE = (
    "ours: Parquet parts in, verdicts with evidence out; index_s is within the runs. plain Python: the same coverage"
    " rule by dicts of word tuples. datatrove: its NGramsDecontFilter on 13-grams of the same items; its English"
    " tokenizer (spaCy) is replaced by str.split, which is faster. The peers write nothing; their index is not counted."
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=100_000)
    parser.add_argument("--peer-rows", type=int, default=5_000)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", type=Path, help="write the result here")
    options = parser.parse_args()
    data = Path(os.environ.get("GRISTMILL_DATA", Path(__file__).parents[1] / "../shared/data")).resolve()
    if not data.is_dir():
        sys.exit(f"no real data at {data}: set GRISTMILL_DATA")
    with tempfile.TemporaryDirectory() as scratch:
        result = measured(Path(scratch), data, options.rows, min(options.peer_rows, options.rows), options.repeats)
    print(json.dumps(result, indent=2))
    if options.json:
        options.json.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


def measured(scratch: Path, data: Path, count: int, peer_count: int, repeats: int) -> dict[str, Any]:
    alone(build, scratch / "rows", data, count)
    mine = alone(ours, scratch, data, repeats)
    peers = [alone(peer, scratch, data, peer_count) for peer in (plain_python, datatrove)]
    verdicts = pq.read_table(scratch / "verdicts.parquet")
    reasons = verdicts["reason"].to_pylist()
    ngrams = pq.read_table(scratch / "ngrams.parquet")["keep"].to_pylist()
    truth = {
        "plain Python": [reason == "contaminated" for reason in reasons],
        "datatrove": [not keep for keep in ngrams],
    }
    for peer in peers:
        peer |= {"times_the_cpu": round(mine["rows_per_cpu_s"] / peer["rows_per_cpu_s"], 1)}
        peer |= {"agreement": agreement(truth[peer["name"]][:peer_count], peer.pop("flags"))}
    return {
        "rows": count,
        "against": list(AGAINST),
        "judge": repr(Decontaminate()),
        **mine,
        "dropped": {reason: reasons.count(reason) for reason in sorted({r for r in reasons if r})},
        "beside": peers,
        "machine": {"processors": os.cpu_count(), "load_average": os.getloadavg()[0]},
        "versions": {"python": platform.python_version()}
        | {name: version(name) for name in ("numba", "numpy", "pyarrow", "datatrove")},
        "note": NOTE,
    }


def agreement(mine: Sequence[bool], theirs: Sequence[bool]) -> dict[str, int]:
    pairs = list(zip(mine, theirs, strict=True))
    return {
        "both": pairs.count((True, True)),
        "only_ours": pairs.count((True, False)),
        "only_theirs": pairs.count((False, True)),
        "neither": pairs.count((False, False)),
    }


def alone(function: Callable[..., Any], *arguments: Any) -> Any:
    """`function` in a fresh process, so that its peak memory and its caches are its own."""
    with ProcessPoolExecutor(1, get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


def sets(data: Path) -> tuple[EvaluationSet, ...]:
    return tuple(EvaluationSet(str(data / f"{name}.parquet")) for name in AGAINST)


def build(rows: Path, data: Path, count: int) -> None:
    """Writes `count` rows in parts; every PLANTED-th has an item's prompt in the middle of its own."""
    planted = [item.fields[0].text for one in sets(data) for item in items(one)]
    real = [row["messages"] for name in TRAINING for row in iter_rows(Source(name, str(data / f"{name}.parquet"), ""))
            if isinstance(row, dict)]  # fmt: skip
    for part in range(0, count, PART_ROWS):
        made = []
        for position in range(part, min(part + PART_ROWS, count)):
            asked, *rest = real[position % len(real)]
            if position % PLANTED == 0:
                asked = message("user", f"{asked['content']}\n{planted[position // PLANTED % len(planted)]}\nThanks.")
            name = digest(str(position))
            made.append({"row_id": name, "content_id": name, "source": "all", "position": position,
                         "messages": [asked, *rest]})  # fmt: skip
        write_parquet(rows / f"all-{part // PART_ROWS:05d}.parquet", table(made))


class Corpus:
    """The live rows as the engine hands them over: columns of the parts on disk."""

    seed, tools = 0, None

    def __init__(self, scratch: Path) -> None:
        self.parts = sorted((scratch / "rows").glob("*.parquet"))
        self.rows = sum(pq.read_metadata(part).num_rows for part in self.parts)
        self.kept = self.scratch = scratch / "kept"
        self.kept.mkdir(exist_ok=True)

    def progress(self, done: int, total: int) -> None:
        pass

    def tables(self, columns: Sequence[str] | None = None) -> Iterator[pa.Table]:
        for part in self.parts:
            yield pq.read_table(part, columns=list(columns or ()) or None)


def ours(scratch: Path, data: Path, repeats: int) -> dict[str, Any]:
    from gristmill.curation.text.overlap import read_index

    corpus: Any = Corpus(scratch)
    judge, seconds, worked = Decontaminate(sets(data)), [], []
    for _ in range(repeats + 1):
        start, start_work = time.perf_counter(), time.process_time()
        write_parquet(scratch / "verdicts.parquet", judge.judge(corpus))
        seconds.append(time.perf_counter() - start)
        worked.append(time.process_time() - start_work)
    start_work = time.process_time()
    index = read_index(sets(data), judge.n)
    indexing = time.process_time() - start_work
    ngrams = Decontaminate(sets(data), coverage=1.0)
    write_parquet(scratch / "ngrams.parquet", ngrams.judge(corpus))
    second, work = statistics.median(seconds[1:]), statistics.median(worked[1:])
    return {
        "rows_per_s": round(corpus.rows / second),
        "rows_per_cpu_s": round(corpus.rows / work),
        "rows_per_cpu_s_without_index": round(corpus.rows / (work - indexing)),
        "median_s": round(second, 3),
        "cpu_s": round(work, 3),
        "index_s": round(indexing, 3),
        "evaluation_items": len(index.items),
        "evaluation_words": len(index.table.words),
        "peak_rss_mb": peak(),
    }


def texts(scratch: Path, count: int) -> list[str]:
    found: list[str] = []
    for part in Corpus(scratch).tables(["messages", "chosen", "rejected", "text"]):
        found += view(part.slice(0, count - len(found)), "pair")
    return found[:count]


def plain_python(scratch: Path, data: Path, count: int) -> dict[str, Any]:
    """TÜLU 3's coverage as it is defined, by an inverted index of word n-grams."""
    n, fields, kinds, places = 8, [], {}, {}  # type: ignore[var-annotated]
    everything = [item for one in sets(data) for item in items(one)]
    for number, item in enumerate(everything):
        for one in item.fields:
            said = words(one.text)
            if len(said) >= max(one.least, 4):
                kinds.setdefault(number, set()).add(one.kind)
                for at in range(len(said) - min(n, len(said)) + 1):
                    gram = tuple(said[at : at + n])
                    places.setdefault(gram, []).append((len(fields), at))
                fields.append((number, one.kind, len(said)))
    sizes = sorted({len(gram) for gram in places})

    def most(text: str) -> float:
        said, covered = words(text), {}  # type: ignore[var-annotated]
        for size in sizes:
            for at in range(len(said) - size + 1):
                for field, there in places.get(tuple(said[at : at + size]), ()):
                    covered.setdefault(field, set()).update(range(there, there + size))
        shares: dict[int, dict[int, float]] = {}
        for field, met in covered.items():
            number, kind, length = fields[field]
            of = shares.setdefault(number, {})
            of[kind] = max(of.get(kind, 0.0), len(met) / length)
        both = [max(of.get(0, 0.0), sum(of.values()) / len(kinds[number])) for number, of in shares.items()]
        return max(both, default=0.0)

    return timed("plain Python", texts(scratch, count), lambda text: most(text) > 0.5)


def datatrove(scratch: Path, data: Path, count: int) -> dict[str, Any]:
    from datatrove.pipeline.decont import n_grams

    n_grams.load_word_tokenizer = lambda language: SimpleNamespace(word_tokenize=str.split)
    config = n_grams.NGramsDecontConfig(n_grams=13)
    judge = n_grams.NGramsDecontFilter(str(scratch), config)
    hashed = judge.hash_func
    judge.hash_func = lambda text: hashed(text.encode())  # xxhash 4 takes bytes alone
    judge._index_hashes = {
        judge.hash_func(" ".join(gram)): one.title
        for one in sets(data)
        for item in items(one)
        for field in item.fields
        for gram in n_grams.ngrams(n_grams.simplify_text(field.text, config.norm_config).split(), 13)
    }
    documents = n_grams.Document
    return timed("datatrove", texts(scratch, count),
                 lambda text: judge.filter(documents(text=text, id="")) is not True)  # fmt: skip


def timed(name: str, said: list[str], flagged: Callable[[str], bool]) -> dict[str, Any]:
    start, start_work = time.perf_counter(), time.process_time()
    flags = [flagged(text) for text in said]
    second, work = time.perf_counter() - start, time.process_time() - start_work
    speed = {"rows_per_s": round(len(said) / second), "rows_per_cpu_s": round(len(said) / work)}
    return {"name": name, "rows": len(said), **speed, "peak_rss_mb": peak(), "flags": flags}


def peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024


if __name__ == "__main__":
    main()
