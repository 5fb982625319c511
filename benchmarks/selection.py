"""Selection over vectors that are already there: k-means-quality, k-centre, facility location, DEITA, GOT-D.

    python benchmarks/selection.py [--rows 100000] [--dims 384] [--only kmq] [--repeats 3] [--json PATH]

Vectors are those of an uneven mixture of Gaussians on the sphere (`--spread` 0.7, close to what sentence models make
of instructions: the nearest neighbour's cosine is about 0.7), or with `--spread inf` random, the worst case for
pruning. kMQ takes a tenth of the rows from k = rows / 98 clusters (1,024 of 100,000), k-centre and facility location
a twentieth, GOT-D a tenth by 1,000 targets in four rounds. All that a judge does after its measures are read is
counted: ranks, verdicts and evidence too. Prints the median of the wall-clock and of the processor seconds, and the
peak memory. `--sklearn` adds scikit-learn's KMeans on the same rows, with the ratio of the inertias.
"""

import argparse
import json
import platform
import resource
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from gristmill.curation.duplicates.shingles import processors
from gristmill.curation.judges.deita import Deita
from gristmill.curation.judges.facility_location import FacilityLocation
from gristmill.curation.judges.k_center import KCenter
from gristmill.curation.judges.kmeans_quality import KMeansQuality
from gristmill.curation.judges.optimal_transport import GotD
from gristmill.curation.judges.random_sample import RandomSample
from gristmill.curation.measures.length import Length
from gristmill.curation.selecting.kmeans import kmeans

TARGETS = {
    "kmq": 20.0,
    "k_center": 120.0,
    "facility_location": 120.0,
    "got_d": 60.0,
}  # seconds, 100,000 rows on two processors


@dataclass(frozen=True)
class Given:
    """An embedding model that has the targets' vectors already (protocols Tools and Embedder)."""

    targets: np.ndarray

    def embedder(self, model: str) -> "Given":
        return self

    def embed(self, texts: Sequence[str]) -> np.ndarray:
        return self.targets[: len(texts)]


@dataclass(frozen=True)
class Rows:
    """A corpus whose measures are there."""

    ids: pa.Array
    measured: pa.Table
    rows: int
    kept: Path
    tools: Given

    def progress(self, done: int, total: int) -> None:
        pass

    def tables(self, columns: Sequence[str]) -> Iterator[pa.Table]:
        for start in range(0, self.rows, 50_000):
            yield pa.table({"row_id": self.ids.slice(start, 50_000)}).select(list(columns))

    def values(self, columns: Sequence[str]) -> pa.Table:
        return self.measured.select(list(columns))


def mixture(rows: int, dims: int, spread: float) -> np.ndarray:
    random = np.random.default_rng(0)
    found = random.standard_normal((rows, dims), np.float32)
    if np.isfinite(spread):
        groups = max(rows // 50, 1)
        share = 1 / np.arange(1, groups + 1)
        found *= np.float32(spread)
        found += random.standard_normal((groups, dims), np.float32)[random.choice(groups, rows, p=share / share.sum())]
    found /= np.linalg.norm(found, axis=1, keepdims=True)
    return found


def corpus(rows: int, dims: int, spread: float, kept: Path) -> Rows:
    random = np.random.default_rng(1)
    raw = random.bytes(16 * rows).hex()
    ids = pa.array([raw[i * 32 : i * 32 + 32] for i in range(rows)])
    flat = pa.array(mixture(rows, dims, spread).astype(np.float16).reshape(-1))
    vectors = pa.ListArray.from_arrays(pa.array(np.arange(rows + 1, dtype=np.int32) * dims), flat)
    words = pa.array(random.lognormal(4, 1, rows).astype(np.int32))
    wanted = flat.to_numpy().reshape(rows, dims)[random.permutation(rows // 10)[:1000]].astype(np.float32)
    (kept / "targets.jsonl").write_text('{"prompt": "p", "completion": "c"}\n' * len(wanted))
    return Rows(ids, pa.table({"embedding": vectors, "response_words": words}), rows, kept, Given(wanted))


def contenders(rows: int, targets: Path) -> dict[str, Any]:
    return {
        "random": RandomSample(rows // 10),
        "kmq": KMeansQuality(rows // 10, k=max(rows * 1024 // 100_000, 1), embedding="e"),
        "k_center": KCenter(rows // 20, embedding="e"),
        "facility_location": FacilityLocation(rows // 20, embedding="e"),
        "got_d": GotD(rows // 10, targets=(str(targets),), embedding="e"),
        "deita": Deita(rows // 10, of=Length(), column="response_words", embedding="e"),
    }


def timed(work: Callable[[], Any], repeats: int) -> dict[str, float]:
    wall, busy = [], []
    for _ in range(repeats):
        began, used = time.perf_counter(), time.process_time()
        work()
        wall.append(time.perf_counter() - began)
        busy.append(time.process_time() - used)
    return {"seconds": statistics.median(wall), "processor_seconds": statistics.median(busy)}


def against_sklearn(rows: Rows, k: int) -> dict[str, float]:
    from sklearn.cluster import KMeans

    vectors = np.asarray(rows.measured["embedding"].combine_chunks().flatten(), np.float32).reshape(rows.rows, -1)
    ours, began = kmeans(vectors, k), time.perf_counter()
    theirs = KMeans(k, n_init=1, random_state=0, max_iter=100).fit(vectors)
    return {"seconds": time.perf_counter() - began, "inertia_ratio": ours.inertia / float(theirs.inertia_)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=100_000)
    parser.add_argument("--dims", type=int, default=384)
    parser.add_argument("--spread", type=float, default=0.7)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--only", nargs="*", default=[])
    parser.add_argument("--sklearn", action="store_true")
    parser.add_argument("--json", type=Path)
    asked = parser.parse_args()
    results: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as kept:
        rows = corpus(asked.rows, asked.dims, asked.spread, Path(kept))
        contenders(64, Path())["facility_location"].judge(corpus(64, 8, 0.7, Path(kept)))  # compiles
        for name, judge in contenders(asked.rows, Path(kept) / "targets.jsonl").items():
            if asked.only and name not in asked.only:
                continue
            found = results[name] = timed(lambda judge=judge: judge.judge(rows), asked.repeats)
            found["peak_gb"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
            target = f"  (target {TARGETS[name]:.0f} s)" if name in TARGETS and asked.rows == 100_000 else ""
            print(
                f"{name:18s} {judge.budget:>8,} of {asked.rows:,}: {found['seconds']:8.2f} s,"
                f" {found['processor_seconds']:8.2f} s of processors, peak {found['peak_gb']:.2f} GB{target}",
                flush=True,
            )
        if asked.sklearn:
            found = results["sklearn_kmeans"] = against_sklearn(rows, contenders(asked.rows, Path())["kmq"].k)
            print(f"scikit-learn KMeans: {found['seconds']:.2f} s, our inertia {found['inertia_ratio']:.4f} of its")
    if asked.json:
        machine = {"processors": processors(), "platform": platform.platform(), "date": time.strftime("%Y-%m-%d")}
        text = json.dumps({"command": sys.argv, **machine, "results": results}, indent=2)
        asked.json.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
