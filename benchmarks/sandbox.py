"""The sandbox on MBPP's programs: seconds, processor seconds, programs a second, beside a fresh Python for each.

    python benchmarks/sandbox.py [--rows 974] [--workers 2] [--plain 50] [--lint 0] [--json PATH]

Reads mbpp974 of GRISTMILL_DATA (default: ../shared/data beside the repository). --plain: programs that a fresh
`python -I` runs without any fence, for comparison. --lint: programs that LintSeq makes edit sequences of.
"""

import argparse
import json
import os
import platform
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from gristmill.curation import sandbox
from gristmill.curation.makers.lint_seq import _sequences, program
from gristmill.curation.verifiers.unit_tests import UnitTests, tests_of
from gristmill.curation.verifying import Case


def measured(work: Callable[[], Any], count: int) -> tuple[dict[str, float], Any]:
    """Wall and processor seconds of this process and of the ended ones under it."""
    started, before = time.perf_counter(), _processor()
    found = work()
    sandbox._close_all()  # so that the servers' own time, and their children's, is counted
    wall, cpu = time.perf_counter() - started, _processor() - before
    return {
        "seconds": wall,
        "cpu_seconds": cpu,
        "programs_per_second": count / wall,
        "cpu_ms_each": 1e3 * cpu / count,
    }, found


def _processor() -> float:
    both = (resource.getrusage(resource.RUSAGE_SELF), resource.getrusage(resource.RUSAGE_CHILDREN))
    return sum(one.ru_utime + one.ru_stime for one in both)


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=974)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--plain", type=int, default=50)
    parser.add_argument("--lint", type=int, default=0)
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    folder = Path(os.environ.get("GRISTMILL_DATA") or Path(__file__).parents[1] / "../shared/data")
    rows = pq.read_table(folder / "mbpp974.parquet").to_pylist()[: given.rows]
    cases = [Case(row["text"], row["code"], None, row) for row in rows]
    verifier = UnitTests(workers=given.workers)
    report: dict[str, Any] = {"sandbox": {}}
    report["sandbox"], found = measured(lambda: verifier.verify(cases, None), len(cases))  # type: ignore[arg-type]
    report["right"] = sum(one.right is True for one in found)
    report["not_right"] = {row["task_id"]: one.detail for row, one in zip(rows, found, strict=True) if not one.right}
    plain = [tests.program(case.answer).source for case in cases[: given.plain] if (tests := tests_of(case))]
    if plain:
        command = [sys.executable, "-I", "-"]
        run = lambda: [subprocess.run(command, input=one.encode(), capture_output=True) for one in plain]  # noqa: E731
        report["fresh_python"], _ = measured(run, len(plain))
    if given.lint:
        codes = [program(row["code"]) for row in rows[: given.lint]]
        report["lint_seq"], made = measured(lambda: [_sequences((code, (0,), 200)) for code in codes], len(codes))
        report["lint_seq"]["clean"] = sum(not isinstance(one, str) for one in made)
    report |= {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": " ".join(sys.argv),
        "python": platform.python_version(),
        "machine": platform.platform(),
        "processors": os.cpu_count(),
        "layers": sandbox.layers(),
    }
    print(json.dumps(report, indent=2))
    if given.json:
        given.json.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
