"""Kills training at random moments, goes on each time, and compares the bytes with those of runs that nobody disturbed.

    python benchmarks/kill_training.py --kills 20 [--objectives sft dpo kto] [--seed 0] [--json PATH]

For each objective a small model trains on made rows: once undisturbed, then again and again in a process that SIGKILL
ends at a random moment of its life, until that objective has had its kills; whatever ends is compared. A moment is a
random number of things that the run tells (its plan, packs of the reference, resumption, steps) and then a random wait
of up to the longest time between two of them, so that kills fall between and inside steps, checkpoints, measurements on
held-out rows and exports alike. Exit code 1 where a byte differs.
"""

import argparse
import hashlib
import json
import multiprocessing
import os
import platform
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
import transformers

from gristmill.curation.rows import content_id, counted_row_id, message, table
from gristmill.curation.shards import write_curated
from gristmill.tuning.loop import train
from gristmill.tuning.models import make_model
from gristmill.tuning.settings import Lora, NewModel, Training

WORDS = ("mill", "grist", "stone", "water", "wheel", "grain", "flour", "sack", "miller", "river", "sluice", "bread")
KINDS = {"sft": "sft", "dpo": "preference", "kto": "kto"}
SHARE = 0.4  # of the events of an undisturbed run: the last one that a kill waits for
LORA = Lora(rank=4, alpha=8.0, dropout=0.1)
BASE = Training(
    capacity=200, packs_per_step=2, learning_rate=1e-2, checkpoint_every=2, evaluate_every=3, threads=1, lora=LORA
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20, help="in all, over the objectives")
    parser.add_argument("--objectives", nargs="+", choices=list(KINDS), default=list(KINDS))
    parser.add_argument("--rows", type=int, default=60)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path)
    asked = parser.parse_args()
    draw = random.Random(asked.seed)
    with tempfile.TemporaryDirectory(prefix="gristmill-kills-") as scratch:
        home = Path(scratch)
        make_model(home / "model", NewModel(params="110K", vocab=300, context=256, tokens=0), iter([_talk(draw, 4000)]))
        results = []
        for place, objective in enumerate(asked.objectives):
            share = asked.kills // len(asked.objectives) + (place < asked.kills % len(asked.objectives))
            results.append(_objective(home, objective, share, asked.rows, draw))
            print(_line(results[-1]), flush=True)
    print(
        f"{sum(result['kills'] for result in results)} kills, {sum(result['differing'] for result in results)} differ"
    )
    if asked.json is not None:
        asked.json.write_text(json.dumps(_record() | {"results": results}, indent=2) + "\n", encoding="utf-8")
    sys.exit(any(result["differing"] for result in results))


def _objective(home: Path, objective: str, kills: int, rows: int, draw: random.Random) -> dict[str, Any]:
    data = home / KINDS[objective]
    splits = {"train": [table(_rows(objective, rows, draw))], "test": [table(_rows(objective, 8, draw))]}
    write_curated(data, KINDS[objective], splits, {}, lambda manifest: {})  # type: ignore[arg-type]
    settings = Training(**{**vars(BASE), "optimizer": "lion" if objective == "kto" else "adamw"})
    if objective == "kto":
        settings = Training(**{**vars(settings), "learning_rate": 1e-3})
    ended, _, events, longest = _attempt(objective, data, home, home / f"{objective}-straight", settings, None)
    assert ended, "the undisturbed run failed"
    straight = _bytes(home / f"{objective}-straight")
    done, compared, differing, moments = 0, 0, 0, Counter[str]()
    while done < kills:
        out = home / f"{objective}-{compared}"
        ended = False
        while not ended:
            moment = (draw.randint(0, int(SHARE * events)), draw.uniform(0, longest)) if done < kills else None
            ended, where, _, _ = _attempt(objective, data, home, out, settings, moment)
            if not ended:
                done += 1
                moments[where] += 1
        compared += 1
        differing += _bytes(out) != straight
        shutil.rmtree(out)
    found = {"kills": done, "runs": compared, "differing": differing, "moments": dict(sorted(moments.items()))}
    return {"objective": objective, **found, "files": len(straight)}


def _attempt(
    objective: str, data: Path, home: Path, out: Path, settings: Training, moment: tuple[int, float] | None
) -> tuple[bool, str, int, float]:
    """One process that trains, killed so many events and then seconds later; whether it ended by itself, what it had
    reached, its events, and the longest time between two of them."""
    fork = multiprocessing.get_context("fork")
    receiver, sender = fork.Pipe(duplex=False)

    def run() -> None:
        train(objective, data, home / "model", out, settings, progress=lambda event: sender.send(None))  # type: ignore[arg-type]

    process = fork.Process(target=run)
    process.start()
    sender.close()  # so that the pipe ends with the process
    events, longest, last = 0, 0.0, time.monotonic()
    while (moment is None or events < moment[0]) and _told(receiver):
        events, longest, last = events + 1, max(longest, time.monotonic() - last), time.monotonic()
    process.join(None if moment is None else moment[1])
    if process.is_alive():
        assert process.pid is not None
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        return False, _reached(out), events, longest
    assert process.exitcode == 0, f"{objective} failed with exit code {process.exitcode}"
    return True, "end", events, longest


def _told(receiver: Any) -> bool:
    """Whether the process told something more before it ended."""
    try:
        receiver.recv()
    except EOFError:
        return False
    return True


def _reached(out: Path) -> str:
    """What a killed run was at, by the files that it left."""
    if not (out / "run.json").is_file():
        return "1 before the plan"
    if list(out.glob("checkpoints/**/.step-*.tmp")):
        return "4 inside a checkpoint"
    if (out / "row_losses").is_dir():
        return "5 after the last step"
    return "3 steps" if (out / "metrics.jsonl").is_file() else "2 reference and model"


def _bytes(out: Path) -> dict[str, str]:
    """SHA-256 of everything that must not depend on kills; metrics without their times."""
    names = ["plan.parquet", "steps.parquet", "row_losses/train.parquet"]
    names += [f"{folder}/{name}" for folder in ("adapter", "best") for name in ("adapter_model.safetensors",)]
    found = {name: hashlib.sha256((out / name).read_bytes()).hexdigest() for name in names}
    timing = ("seconds", "tokens_per_s", "roofline_share", "memory")
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    plain = [{key: value for key, value in line.items() if key not in timing} for line in lines]
    return found | {"metrics": hashlib.sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()}


def _talk(draw: random.Random, most: int = 20) -> str:
    return " ".join(draw.choices(WORDS, k=draw.randint(max(1, most // 10), most)))


def _rows(objective: str, count: int, draw: random.Random) -> list[dict[str, Any]]:
    rows = []
    for position in range(count):
        row: dict[str, Any] = {"source": "made", "position": position, "messages": [message("user", _talk(draw))]}
        if objective == "sft":
            row["messages"].append(message("assistant", _talk(draw)))
        else:
            row |= {name: [message("assistant", _talk(draw))] for name in ("chosen", "rejected")}
            row["label"] = draw.random() < 0.6 if objective == "kto" else None
        row["content_id"] = content_id(row)
        row["row_id"] = counted_row_id("made", row["content_id"], position)
        rows.append(row)
    return rows


def _line(result: dict[str, Any]) -> str:
    moments = ", ".join(f"{name[2:]} {count}" for name, count in result["moments"].items())
    return (
        f"{result['objective']}: {result['kills']} kills ({moments}) over {result['runs']} runs; "
        f"{result['differing']} of them differ from the undisturbed run in any of {result['files']} files"
    )


def _record() -> dict[str, Any]:
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": " ".join(sys.argv),
        "hardware": f"{platform.machine()}, {os.cpu_count()} processors, {torch.backends.cpu.get_cpu_capability()}",
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
    }


if __name__ == "__main__":
    main()
