"""Rows and megabytes a second of every row judge that needs no model, beside datatrove's filters on the same texts.

    python benchmarks/row_judges.py [--rows 80000] [--repeats 3] [--only NAME …] [--peers] [--json PATH]

Reads the data sets of GRISTMILL_DATA (default: ../shared/data beside the repository). Each judge is called as the
engine calls it, on parts of PART_ROWS rows, its measures included and not cached. `cpu`: per second of processor time
of all threads; `wall`: by the clock, in this one process. The last lines are all judges one after the other: those that
fit instruction data (no web rules, no language library), those without a language library, all; then the first of them
again by as many worker processes as there are processors, each with parts of its own (`wall` alone counts there).
"""

import argparse
import contextlib
import dataclasses
import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow as pa
from machine import installed, processor

from gristmill.curation.reading.source import Source, iter_rows
from gristmill.curation.rows import PART_ROWS, table
from gristmill.curation.steps import find_steps
from gristmill.curation.text.view import view

SETS = ("alpaca_raw_partial", "alpaca_gpt4_partial", "dolly_sample2000", "flan_cot", "gsm8k_train",
        "codealpaca_new4535", "gpteacher_roleplay", "hh_rlhf_harmless_test", "ultrafeedback_sample1000")  # fmt: skip
LANGUAGE = {"LanguageIs"}  # judges that load a language library, with their measures
WEB = {"C4Quality", "GopherQuality", "GopherRepetition"}  # rules for web pages, in no default
GATES = {"HeldOut", "Trainable"}  # put before every set by the engine
PEERS = ("GopherRepetitionFilter", "GopherQualityFilter", "C4QualityFilter", "FineWebQualityFilter")


def real_rows(data: Path, most: int) -> pa.Table:
    """At most `most` rows, of each set in turn a share of its size."""
    parts = []
    for name in SETS:
        path = data / f"{name}.parquet"
        if path.is_file():
            parts.append(table(islice(iter_rows(Source(name, str(path), "benchmark")), most)))
    whole = pa.concat_tables(parts)
    step = max(1, whole.num_rows // most)
    return whole.take(list(range(0, whole.num_rows, step))[:most]).combine_chunks()


def row_judges() -> Iterator[Any]:
    """Every row judge whose fields have defaults and whose measures need no model."""
    for name, kind in sorted(find_steps().items()):
        needed = any(
            field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
            for field in dataclasses.fields(kind)
        )
        if getattr(kind, "scope", None) == "row" and not needed:
            judge = kind()
            if not any(measure.models for measure in judge.needs):
                yield name, judge


def judged(judge: Any, parts: list[pa.Table]) -> int:
    """Rows that the judge drops."""
    dropped = 0
    for rows in parts:
        columns: dict[str, Any] = {"_none": pa.nulls(rows.num_rows)}
        for measure in judge.needs:
            found = measure.measure(rows, None, lambda done, total: None)
            columns |= {name: found[name] for name in found.column_names}
        verdicts = judge.judge(rows, pa.table(columns))
        dropped += verdicts.num_rows - sum(filter(None, verdicts["keep"].to_pylist()))
    return dropped


def timed(work: Callable[[], int], repeats: int) -> tuple[int, float, float]:
    """Result, and medians of processor and clock seconds, after one run that compiles and loads."""
    result, cpu, wall = work(), [], []
    for _ in range(repeats):
        start, clock = time.process_time(), time.perf_counter()
        work()
        cpu.append(time.process_time() - start)
        wall.append(time.perf_counter() - clock)
    return result, statistics.median(cpu), statistics.median(wall)


def judged_by_all(parts: list[pa.Table]) -> int:
    return sum(judged(judge, parts) for name, judge in row_judges() if name not in GATES | WEB | LANGUAGE)


def side_by_side(parts: list[pa.Table], repeats: int) -> tuple[int, float]:
    """Rows dropped, and the median of clock seconds, of the instruction judges on all processors."""
    small = [part.slice(at, 5_000) for part in parts for at in range(0, part.num_rows, 5_000)]
    with ProcessPoolExecutor(len(os.sched_getaffinity(0))) as crew:

        def work() -> int:
            return sum(crew.map(judged_by_all, [[part] for part in small]))

        dropped, _, wall = timed(work, repeats)
    return dropped, wall


def peers(texts: list[str], repeats: int) -> Iterator[tuple[str, tuple[int, float, float]]]:
    """datatrove's filters over the same texts, one document a time as it has them."""
    from datatrove.data import Document
    from datatrove.pipeline import filters

    documents = [Document(text=text, id=str(n)) for n, text in enumerate(texts)]
    for name in PEERS:
        filter_ = getattr(filters, name)()

        def run(filter_: Any = filter_) -> int:
            with contextlib.redirect_stderr(None):
                return sum(filter_.filter(document) is not True for document in documents)

        yield f"datatrove {name}", timed(run, repeats)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=80_000)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--only", nargs="*", default=[])
    parser.add_argument("--peers", action="store_true")
    parser.add_argument("--json", type=Path)
    asked = parser.parse_args()
    data = Path(os.environ.get("GRISTMILL_DATA", Path(__file__).parents[1] / "../shared/data")).resolve()
    rows = real_rows(data, asked.rows)
    parts = [rows.slice(start, PART_ROWS) for start in range(0, rows.num_rows, PART_ROWS)]
    megabytes = sum(len(text.encode()) for text in view(rows, "pair")) / 1e6
    print(f"{rows.num_rows} rows, {megabytes:.1f} MB of text, {len(os.sched_getaffinity(0))} processors")
    heads = ("dropped", "µs/row", "rows/s cpu", "MB/s cpu", "rows/s wall", "MB/s wall")
    print(f"{'judge':34} {heads[0]:>8} {heads[1]:>7} {heads[2]:>11} {heads[3]:>9} {heads[4]:>12} {heads[5]:>10}")
    lines: dict[str, dict[str, float]] = {}

    def show(name: str, dropped: int, cpu: float, wall: float) -> None:
        size = rows.num_rows
        cpu, wall = max(cpu, 1e-9), max(wall, 1e-9)
        line = {"dropped": dropped, "us_per_row": cpu / size * 1e6, "rows_per_cpu_s": size / cpu,
                "mb_per_cpu_s": megabytes / cpu, "rows_per_s": size / wall, "mb_per_s": megabytes / wall}  # fmt: skip
        lines[name] = line
        rates = f"{size / cpu:11,.0f} {megabytes / cpu:9.1f} {size / wall:12,.0f} {megabytes / wall:10.1f}"
        print(f"{name:34} {dropped:8} {line['us_per_row']:7.2f} {rates}", flush=True)

    left_out = {
        "instruction judges": GATES | WEB | LANGUAGE,
        "all without a language library": GATES | LANGUAGE,
        "all": GATES,
    }
    totals = {kind: [0.0, 0.0] for kind in left_out}
    for name, judge in row_judges():
        if asked.only and name not in asked.only:
            continue
        dropped, cpu, wall = timed(lambda judge=judge: judged(judge, parts), asked.repeats)  # type: ignore[misc]
        show(name, dropped, cpu, wall)
        for kind, total in totals.items():
            if name not in left_out[kind]:
                total[0] += cpu
                total[1] += wall
    for kind, (cpu, wall) in totals.items():
        show(kind, 0, cpu, wall)
    if not asked.only:
        dropped, wall = side_by_side(parts, asked.repeats)
        show("instruction judges, all processors", dropped, wall * len(os.sched_getaffinity(0)), wall)
    if asked.peers:
        for name, figures in peers(view(rows, "pair"), asked.repeats):
            show(name, *figures)
    if asked.json:
        about = {
            "date": time.strftime("%Y-%m-%d"), "python": platform.python_version(), "processor": processor(),
            "processors": len(os.sched_getaffinity(0)), **installed("pyarrow", "numba", "numpy", "datatrove"),
        }  # fmt: skip
        result = {"rows": rows.num_rows, "megabytes": megabytes, "machine": about, "figures": lines}
        asked.json.write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()
