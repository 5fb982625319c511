"""Kills a run at random moments and starts it again until it ends; then compares its bytes with an undisturbed run's.

    python benchmarks/kill_and_resume.py alpaca-lite --kills 8 [key=value ...]

Compared: every curated shard, every ledger file but the step's clock (step.json), every adapter, every plan. Prints one
line a kill and a table of digests; exits 1 where a byte differs.
"""

import argparse
import hashlib
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

COMPARED = (
    "curated/*/data/*",
    "ledger/*/*/verdicts.parquet",
    "ledger/*/*/alive.npy",
    "rows/*.parquet",
    "*/adapter/*.safetensors",
)


def command(recipe: str, out: Path, overrides: list[str]) -> list[str]:
    return [sys.executable, "-m", "gristmill.flows.cli", "run", recipe, "--out", str(out), "--plain", *overrides]


def undisturbed(recipe: str, out: Path, overrides: list[str]) -> float:
    """Seconds that one whole run takes."""
    started = time.monotonic()
    subprocess.run(command(recipe, out, overrides), check=True, stdout=subprocess.DEVNULL)
    return time.monotonic() - started


def disturbed(recipe: str, out: Path, overrides: list[str], kills: int, seconds: float, seed: int) -> int:
    """Starts the run again and again, killing the first `kills` starts after a random time; the number killed."""
    dice = random.Random(seed)
    killed = 0
    while True:
        started = time.monotonic()
        process = subprocess.Popen(command(recipe, out, overrides), stdout=subprocess.PIPE, text=True)
        if killed == kills:
            process.communicate()
            return killed if process.returncode == 0 else -1
        try:
            lines, _ = process.communicate(timeout=dice.uniform(2, 2 + seconds / max(2, kills) * 1.5))
            return killed if process.returncode == 0 else -1
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
            lines, _ = process.communicate()
            killed += 1
            last = (lines.strip().splitlines() or ["nothing finished"])[-1]
            print(f"kill {killed} after {time.monotonic() - started:5.1f} s; last line: {last[:80]}", flush=True)


def digests(out: Path) -> dict[str, str]:
    files = sorted(path for pattern in COMPARED for path in out.glob(pattern) if path.is_file())
    return {str(path.relative_to(out)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe")
    parser.add_argument("overrides", nargs="*")
    parser.add_argument("--kills", type=int, default=8)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_intermixed_args()
    with tempfile.TemporaryDirectory() as scratch:
        whole, broken = Path(scratch) / "whole", Path(scratch) / "broken"
        seconds = undisturbed(args.recipe, whole, args.overrides)
        print(f"undisturbed: {seconds:.0f} s", flush=True)
        killed = disturbed(args.recipe, broken, args.overrides, args.kills, seconds, args.seed)
        first, second = digests(whole), digests(broken)
        different = sorted(name for name in first.keys() | second.keys() if first.get(name) != second.get(name))
        for name in different:
            print(f"differs: {name}")
        print(f"{killed} kills; {len(first)} files compared; {len(different)} differ")
        return 1 if different or killed < 0 else 0


if __name__ == "__main__":
    sys.exit(main())
