"""Near-duplicate judging of real instruction rows: Parquet in, verdicts out, beside rensa, datasketch and datatrove.

    python benchmarks/near_duplicates.py [--rows 212000] [--repeats 5] [--peers 40000] [--json PATH]

Reads the data sets of GRISTMILL_DATA (default: ../shared/data beside the repository) and plants exact and edited
copies. Truth is the Jaccard similarity of sets of word 5-grams, counted in plain Python, of all pairs within a planted
family (an original and its copies): linked at 0.7, directly or through others. Each contender runs in a process of its
own, three of the judge's, on the same rows; rensa on --peers rows, datasketch and datatrove (which needs spacy) on a
fifth of them. Above 300,000 rows the rows are sentences of real ones put together anew (benchmarks/scale.py), nothing
is planted by us and no peer runs: speed, memory and the time of deciding again.
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
from contextlib import redirect_stderr
from datetime import UTC, datetime
from importlib.util import find_spec
from io import StringIO
from itertools import combinations
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from machine import installed, processor

from gristmill.curation.folder import write_parquet
from gristmill.curation.judges.duplicates import NearDuplicate
from gristmill.curation.rows import PART_ROWS, ROW, digest, message, table
from gristmill.curation.text.view import view, words

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
    "rows_per_s: by the median of all warm runs of three processes; Parquet parts in, Parquet verdicts and kept pairs"
    " out. cpu_s: processor seconds of all threads of a run, the median likewise. rensa and datasketch: Parquet in,"
    " Python word 5-grams, signatures, LSH query and insert; nothing is verified or written. datatrove: its four stages"
    " (signatures, buckets, cluster, filter) by LocalPipelineExecutor, 14 bands of 8, SHA-1, JSON lines in and out."
    " F1 is over all pairs within planted families."
)
SCALE = 300_000  # rows beyond which nothing is planted
Text = tuple[str, str]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=212_000)
    parser.add_argument("--repeats", type=int, default=5, help="timed runs of each process of the judge")
    parser.add_argument(
        "--peers", type=int, default=40_000, help="rows for rensa; datasketch and datatrove get a fifth"
    )
    parser.add_argument("--json", type=Path, help="write the result here")
    options = parser.parse_args()
    data = Path(os.environ.get("GRISTMILL_DATA", Path(__file__).parents[1] / "../shared/data")).resolve()
    if not data.is_dir():
        sys.exit(f"no real data at {data}: set GRISTMILL_DATA")
    with tempfile.TemporaryDirectory() as scratch:
        result = measured(Path(scratch), data, options)
    print(shown(result))
    if options.json:
        options.json.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


def measured(scratch: Path, data: Path, options: argparse.Namespace) -> dict[str, Any]:
    count = options.rows
    known = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": " ".join(["python", *sys.argv]),
        "machine": {"processor": processor(), "processors": os.cpu_count(), "load_average": os.getloadavg()[0]},
        "versions": {"python": platform.python_version()} | installed(*PACKAGES),
        "judge": repr(NearDuplicate()),
        "note": NOTE,
    }
    if count > SCALE:
        facts = alone(build_scale, scratch / "rows", data, count)
        return known | {"contenders": [facts | alone(ours, scratch / "rows", options.repeats)]}
    contenders = []
    few = min(count, options.peers)
    for size, peers in ((count, []), (few, [rensa]), (max(few // 5, 100), [datasketch, datatrove])):
        rows = scratch / str(size)
        facts, families = alone(build, rows, data, size)
        truth = alone(truth_of, rows, families)
        runs = [alone(ours, rows, options.repeats) for _ in range(3 if size == count else 1)]
        best = sorted(runs, key=lambda run: run["rows_per_s"])[len(runs) // 2]
        best |= {"cpu_s": statistics.median(run["cpu_s"] for run in runs)}
        best |= {"peak_rss_mb": max(run["peak_rss_mb"] for run in runs)}
        best |= judged(best.pop("labels"), truth)
        contenders.append(facts | best)
        for peer in peers:
            found = typical(peer, rows)
            if "labels" in found:
                found |= judged(found.pop("labels"), truth)
                found["times_slower"] = round(best["rows_per_s"] / found["rows_per_s"], 1)
                found["times_the_cpu"] = round(best["rows_per_cpu_s"] / found["rows_per_cpu_s"], 1)
            contenders.append(found)
    return known | {"contenders": contenders}


PACKAGES = ("numba", "numpy", "pyarrow", "rensa", "datasketch", "datatrove", "spacy")


def shown(result: dict[str, Any]) -> str:
    """The result as a table."""
    columns = ("name", "rows", "rows_per_s", "rows_per_cpu_s", "peak_rss_mb", "precision", "recall", "f1",
               "times_slower", "times_the_cpu", "again_s")  # fmt: skip
    lines = [columns, *([str(one.get(name, one.get("skipped", "")) if name == "rows_per_s" else one.get(name, ""))
                         for name in columns] for one in result["contenders"])]  # fmt: skip
    widths = [max(len(line[k]) for line in lines) for k in range(len(columns))]
    table = "\n".join("  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)) for line in lines)
    return f"{result['date']}  {result['machine']}\n{result['judge']}\n{table}"


def alone(function: Callable[..., Any], *arguments: Any) -> Any:
    """`function` in a fresh process, so that its peak memory and its caches are its own."""
    with ProcessPoolExecutor(1, get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


def typical(peer: Callable[..., dict[str, Any]], *arguments: Any) -> dict[str, Any]:
    """Of three runs in processes of their own, the one of median speed."""
    return sorted((alone(peer, *arguments) for _ in range(3)), key=lambda run: run.get("rows_per_s", 0))[1]


# ---------------------------------------------------------------- rows


def build(rows: Path, data: Path, count: int) -> tuple[dict[str, Any], list[list[int]]]:
    """Writes `count` canonical rows; gives facts about them and the planted families: an original and its copies."""
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
    families: dict[int, list[int]] = {}
    for original, copy in pairs:
        families.setdefault(original, [at[original]]).append(at[copy])
    return facts, list(families.values())


def build_scale(rows: Path, data: Path, count: int) -> dict[str, Any]:
    """Writes `count` rows put together anew from the sentences of real ones, part by part."""
    from scale import make

    made = make(rows.parent / "made", data, count)
    position = 0
    for file in sorted((rows.parent / "made").glob("*.parquet")):
        texts = pq.read_table(file)
        size = texts.num_rows
        numbers = np.arange(position, position + size)
        names = pa.array([f"{number:032x}" for number in numbers.tolist()])
        asked, told = (texts[name].combine_chunks().cast(pa.string()) for name in ("prompt", "completion"))
        order = pa.array(np.arange(2 * size).reshape(2, size).T.ravel())
        said = pa.concat_arrays([asked, told]).take(order)
        roles = pa.array(["user", "assistant"] * size)
        turn = ROW.field("messages").type.value_type
        nothing = pa.nulls(2 * size, pa.string())
        fields = {"role": roles, "content": said}
        turns = pa.StructArray.from_arrays([fields.get(f.name, nothing) for f in turn], fields=list(turn))
        messages = pa.ListArray.from_arrays(pa.array(np.arange(0, 2 * size + 1, 2), pa.int32()), turns)
        known = {"row_id": names, "content_id": names, "source": pa.array(["all"] * size), "messages": messages,
                 "position": pa.array(numbers)}  # fmt: skip
        columns = [known.get(f.name, pa.nulls(size, f.type)).cast(f.type) for f in ROW]
        whole = pa.Table.from_arrays(columns, schema=ROW)
        for low in range(0, size, PART_ROWS):
            name = f"all-{(position + low) // PART_ROWS:05d}.parquet"
            write_parquet(rows / name, whole.slice(low, PART_ROWS))
        position += size
        file.unlink()
    return made


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

    seed, tools = 0, None

    def __init__(self, rows: Path) -> None:
        self.kept = self.scratch = rows.parent / f"{rows.name}-kept"
        self.kept.mkdir(exist_ok=True)
        self.parts = sorted(rows.glob("*.parquet"))
        self.rows = sum(pq.read_metadata(part).num_rows for part in self.parts)

    def progress(self, done: int, total: int) -> None:
        pass

    def tables(self, columns: Sequence[str] | None = None) -> Iterator[pa.Table]:
        for part in self.parts:
            yield pq.read_table(part, columns=list(columns or ()) or None)


# ---------------------------------------------------------------- contenders


def ours(rows: Path, repeats: int) -> dict[str, Any]:
    """One run more than `repeats`: the first may compile. Then the same decision from what the last one kept."""
    seconds, worked = [], []
    corpus: Any = Corpus(rows)
    for _ in range(repeats + 1):
        start, start_work = time.perf_counter(), time.process_time()
        found = NearDuplicate().judge(corpus)
        write_parquet(corpus.kept / "verdicts.parquet", found)
        seconds.append(time.perf_counter() - start)
        worked.append(time.process_time() - start_work)
    most = peak()
    start = time.perf_counter()
    again = NearDuplicate(threshold=0.8).rejudge(corpus, corpus.kept, np.ones(corpus.rows, np.bool_))
    again_s = time.perf_counter() - start
    assert again is not None and again["keep"].to_pylist().count(False) < corpus.rows
    speed = rates("gristmill", corpus.rows, statistics.median(seconds[1:]), statistics.median(worked[1:]))
    more = {"all_runs_s": [round(second, 3) for second in seconds], "again_s": round(again_s, 3), "peak_rss_mb": most}
    if corpus.rows > SCALE:
        return speed | more
    return speed | more | {"labels": owners(corpus, found)}


def owners(corpus: Corpus, found: pa.Table) -> list[int]:
    names = [name for part in corpus.tables(["row_id"]) for name in part["row_id"].to_pylist()]
    at = {name: index for index, name in enumerate(names)}
    proofs = found["evidence"].to_pylist()
    return [at[json.loads(proof)["duplicate_of"]] if proof else index for index, proof in enumerate(proofs)]


def rensa(rows: Path) -> dict[str, Any]:
    from rensa import RMinHash, RMinHashLSH

    def sketch(shingles: list[str]) -> Any:
        made = RMinHash(125, 0)
        made.update(shingles)
        return made

    return by_index("rensa", rows, RMinHashLSH(0.7, 125, 25), sketch)


def datasketch(rows: Path) -> dict[str, Any]:
    from datasketch import MinHash, MinHashLSH

    def sketch(shingles: list[str]) -> Any:
        made = MinHash(125)
        made.update_batch([shingle.encode() for shingle in shingles])
        return made

    return by_index("datasketch", rows, MinHashLSH(num_perm=125, params=(25, 5)), sketch)


def by_index(name: str, rows: Path, index: Any, sketch: Callable[[list[str]], Any]) -> dict[str, Any]:
    """A library whose users ask an index about each row, then put the row into it."""
    start, start_work = time.perf_counter(), time.process_time()
    links = []
    for key, shingles in enumerate(shingled(rows)):
        made = sketch(shingles)
        links += [(key, other) for other in index.query(made)]
        index.insert(key, made)
    speed = rates(name, key + 1, time.perf_counter() - start, time.process_time() - start_work)
    return speed | {"labels": united(key + 1, links)}


def datatrove(rows: Path) -> dict[str, Any]:
    """The four stages of its example, two tasks at a time; JSON lines lie there before the clock starts."""
    if not find_spec("spacy"):
        return {"name": "datatrove", "skipped": "needs spacy (its English word tokenizer)"}
    from datatrove.executor import LocalPipelineExecutor
    from datatrove.pipeline.dedup import MinhashDedupSignature
    from datatrove.pipeline.dedup.minhash import (
        MinhashConfig,
        MinhashDedupBuckets,
        MinhashDedupCluster,
        MinhashDedupFilter,
    )
    from datatrove.pipeline.readers import JsonlReader
    from datatrove.pipeline.writers import JsonlWriter
    from datatrove.utils.hashing import HashConfig

    with tempfile.TemporaryDirectory() as home, redirect_stderr(StringIO()):  # a page of its log for every stage
        count, tasks = jsonl(rows, Path(home) / "in"), 2
        config = MinhashConfig(hash_config=HashConfig(hash_fc="sha1"))  # its xxhash hands xxhash 4 text: a TypeError
        reader = JsonlReader(f"{home}/in")
        stages = [
            (tasks, [reader, MinhashDedupSignature(f"{home}/signatures", config)]),
            (config.num_buckets, [MinhashDedupBuckets(f"{home}/signatures", f"{home}/buckets", config=config)]),
            (1, [MinhashDedupCluster(f"{home}/buckets", f"{home}/ids", config=config, save_cluster_id=True)]),
            (tasks, [reader, MinhashDedupFilter(f"{home}/ids", JsonlWriter(f"{home}/removed"), load_cluster_ids=True),
                     JsonlWriter(f"{home}/out")]),
        ]  # fmt: skip
        start, start_work = time.perf_counter(), children_s()
        for number, (some, pipeline) in enumerate(stages):
            logs = f"{home}/logs/{number}"
            LocalPipelineExecutor(pipeline, tasks=some, workers=2, logging_dir=logs, start_method="fork").run()
        seconds, worked = time.perf_counter() - start, children_s() - start_work
        labels = list(range(count))
        clusters: dict[int, int] = {}
        for folder in ("out", "removed"):
            for line in read_jsonl(Path(home) / folder):
                cluster = line["metadata"].get("minhash_cluster_id", -1)
                if cluster != -1:
                    labels[int(line["id"])] = clusters.setdefault(cluster, int(line["id"]))
    return rates("datatrove", count, seconds, worked) | {"labels": labels}


def jsonl(rows: Path, folder: Path) -> int:
    """The rows as two files of JSON lines; gives their number."""
    folder.mkdir()
    texts = list(all_texts(rows))
    for part in range(2):
        with (folder / f"{part}.jsonl").open("w", encoding="utf-8") as file:
            file.writelines(
                json.dumps({"id": str(i), "text": text}) + "\n" for i, text in enumerate(texts) if i % 2 == part
            )
    return len(texts)


def read_jsonl(folder: Path) -> Iterator[dict[str, Any]]:
    import gzip

    for path in sorted(folder.rglob("*.jsonl.gz")):
        with gzip.open(path, "rt", encoding="utf-8") as file:
            yield from map(json.loads, file)


def rates(name: str, count: int, seconds: float, worked: float) -> dict[str, Any]:
    return {
        "name": name, "rows": count, "rows_per_s": round(count / seconds), "rows_per_cpu_s": round(count / worked),
        "median_s": round(seconds, 3), "cpu_s": round(worked, 3), "peak_rss_mb": peak(),
    }  # fmt: skip


def children_s() -> float:
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(some.ru_utime + some.ru_stime for some in used)


def shingled(rows: Path) -> Iterator[list[str]]:
    for text in all_texts(rows):
        said = text.lower().split()
        yield [" ".join(said[i : i + 5]) for i in range(max(1, len(said) - 4))]


def all_texts(rows: Path) -> Iterator[str]:
    for part in Corpus(rows).tables(["messages"]):
        for turns in part["messages"].to_pylist():
            yield "\n\n".join(turn["content"] for turn in turns)


# ---------------------------------------------------------------- judging the judges


def truth_of(rows: Path, families: list[list[int]]) -> list[tuple[int, int, bool]]:
    """All pairs within a family, and whether they are linked at Jaccard 0.7, directly or through others."""
    texts = [text for part in Corpus(rows).tables() for text in view(part, "pair")]
    found = []
    for family in families:
        sets = [shingle_set(texts[i]) for i in family]
        pairs = list(combinations(range(len(family)), 2))
        near = [(a, b) for a, b in pairs if 10 * len(sets[a] & sets[b]) >= 7 * len(sets[a] | sets[b]) > 0]
        label = united(len(family), near)
        found += [(family[a], family[b], label[a] == label[b]) for a, b in pairs]
    return found


def judged(labels: Sequence[int], truth: Sequence[tuple[int, int, bool]]) -> dict[str, Any]:
    """Precision, recall and F1 of `labels` (equal: duplicates) over the pairs of `truth`."""
    said = [(labels[a] == labels[b], same) for a, b, same in truth]
    hits, told, true = sum(a and b for a, b in said), sum(a for a, _ in said), sum(b for _, b in said)
    precision, recall = hits / max(told, 1), hits / max(true, 1)
    f1 = 2 * precision * recall / max(precision + recall, 1e-9)
    return {"pairs": len(said), "true_pairs": true,
            "precision": round(precision, 5), "recall": round(recall, 5), "f1": round(f1, 5)}  # fmt: skip


def united(count: int, links: Sequence[tuple[int, int]]) -> list[int]:
    """For each of `count` things the label of its cluster."""
    root = list(range(count))

    def top(a: int) -> int:
        while root[a] != a:
            root[a] = root[root[a]]
            a = root[a]
        return a

    for a, b in links:
        root[top(a)] = top(b)
    return [top(a) for a in range(count)]


def shingle_set(text: str) -> set[tuple[str, ...]]:
    said = words(text)
    return {tuple(said[i : i + 5]) for i in range(max(1, len(said) - 4))} if said else set()


def peak() -> int:
    """Of this process, or of the largest of its children."""
    return max(resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)) // 1024


if __name__ == "__main__":
    main()
