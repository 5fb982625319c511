"""ExactMaths against the labels that OpenAI published with four models' GSM8K solutions: agreement, every disagreement,
and answers verified per second of CPU time.

    python benchmarks/verifiers.py [--data DIR] [--limit N] [--json PATH]
"""

import argparse
import json
import os
import platform
import sys
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

MODELS = ("6b_finetuning", "6b_verification", "175b_finetuning", "175b_verification")


def measure(data: Path, limit: int | None) -> dict[str, Any]:
    import pyarrow.parquet as pq

    from gristmill.curation.verifiers.exact_maths import ExactMaths
    from gristmill.curation.verifying import Case

    rows = pq.read_table(data / "gsm8k_model_solutions.parquet").to_pylist()[:limit]
    said = [(model, row, json.loads(row[model])) for model in MODELS for row in rows]
    cases = [Case(row["question"], one["solution"], row["ground_truth"]) for _, row, one in said]
    began = time.process_time()
    found = ExactMaths().verify(cases, None)  # type: ignore[arg-type]
    seconds = time.process_time() - began
    apart = [
        {
            "model": model,
            "question": row["question"],
            "label": one["is_correct"],
            "found": told.right,
            "why": told.detail,
        }
        for (model, row, one), told in zip(said, found, strict=True)
        if one["is_correct"] != (told.right is True)
    ]
    return {
        "answers": len(said),
        "agreement": 1 - len(apart) / len(said),
        "disagreements": apart,
        "cpu_seconds": round(seconds, 3),
        "answers_per_cpu_second": round(len(said) / seconds),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, default=Path(os.environ.get("GRISTMILL_DATA", "../shared/data")))
    parser.add_argument("--limit", type=int, help="questions (default: all 1,319)")
    parser.add_argument("--json", type=Path, help="where the figures go")
    chosen = parser.parse_args()
    figures = measure(chosen.data, chosen.limit)
    about = {
        "date": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "versions": {"python": platform.python_version(), "pyarrow": version("pyarrow")},
        "command": " ".join(sys.argv),
    }
    for one in figures["disagreements"]:
        print(f"{one['model']}: label {one['label']}, found {one['found']}: {one['why']}\n  {one['question'][:100]}")
    speed = f"{figures['answers_per_cpu_second']:,} answers a CPU second"
    print(f"{figures['answers']:,} answers, agreement {figures['agreement']:.2%}, {speed}")
    if chosen.json is not None:
        chosen.json.write_text(json.dumps(about | figures, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
