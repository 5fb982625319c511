"""The pool: order in is order out, equal bytes for any number of workers, clear errors when a worker dies."""

import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from gristmill.curation import pool as pools
from gristmill.curation.folder import HouseError, RunFolder
from gristmill.curation.judges.defects import Defects
from gristmill.curation.judges.duplicates import ExactDuplicate
from gristmill.curation.judges.length import ResponseLength
from gristmill.curation.judges.refusal import Refusal
from gristmill.curation.ledger import ledger_digest, records
from gristmill.curation.pool import INLINE, Pool, fitting, pool
from gristmill.curation.sift import SetPlan, advance, begin, full_steps

Write = Callable[..., list[str]]
Make = Callable[..., dict[str, Any]]
STEPS = (ExactDuplicate(), Defects(), Refusal(), ResponseLength(2, 40))


class NoTools:
    def digest(self, model: str) -> str:
        return "0"


@pytest.fixture
def eager(monkeypatch: pytest.MonkeyPatch) -> None:
    """However few the rows, the pool is used."""
    monkeypatch.setattr(pools, "SMALL", 0)


@pytest.fixture(scope="module")
def two() -> Iterator[Pool]:
    with pool(2, "processes") as crew:
        yield crew


def corpus(make_row: Make) -> list[dict[str, Any]]:
    said = [
        "a fine answer",
        "I'm sorry, but as an AI language model I cannot do that.",
        "word " * 60,
        "<nooutput>",
        "x",
    ]
    return [make_row("a", i, f"question {i % 70}?", said[i % 5] + " again" * (i % 3)) for i in range(240)]


def curated(folder: RunFolder, source: RunFolder, crew: Pool) -> tuple[str, list[dict[str, Any]]]:
    folder.root.mkdir(parents=True)
    folder.rows.symlink_to(source.rows)
    plan = SetPlan("sft", "sft", ("a",), STEPS, 0.1)
    begin(folder, plan)
    for index in range(len(full_steps(plan))):
        advance(folder, plan, index, NoTools(), lambda done, total: None, crew)  # type: ignore[arg-type]
    stable = [{k: v for k, v in one.items() if k != "seconds"} for one in records(folder, "sft")]
    return ledger_digest(folder, "sft"), stable


def test_the_ledger_is_the_same_for_any_workers(
    eager: None, two: Pool, folder: RunFolder, write_source: Write, make_row: Make, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    from gristmill.curation import blocks

    monkeypatch.setattr(blocks, "BLOCK_ROWS", 25)
    write_source("a", corpus(make_row), part_rows=31)
    alone = curated(RunFolder(tmp_path / "alone"), folder, INLINE)
    assert [one["dropped"] > 0 for one in alone[1]][2:] != [False] * 5
    assert curated(RunFolder(tmp_path / "two"), folder, two) == alone
    with pool(3, "threads") as crew:
        assert curated(RunFolder(tmp_path / "threads"), folder, crew) == alone
    kept = [pq.read_table(p) for p in sorted(tmp_path.glob("*/ledger/sft/*-ResponseLength/kept/values.parquet"))]
    assert len(kept) == 3 and kept[0].num_rows and all(table.equals(kept[0]) for table in kept)


@pytest.mark.server
def test_ray_gives_the_same_ledger(
    eager: None, folder: RunFolder, write_source: Write, make_row: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("ray", reason="Ray is not installed (extra: cluster)")
    from gristmill.curation import blocks

    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr(blocks, "BLOCK_ROWS", 25)
    write_source("a", corpus(make_row), part_rows=31)
    alone = curated(RunFolder(tmp_path / "alone"), folder, INLINE)
    with pool(2, "ray") as crew:
        assert curated(RunFolder(tmp_path / "ray"), folder, crew) == alone
        assert list(crew.map(abs, range(-20, 20))) == [abs(number) for number in range(-20, 20)]
        with pytest.raises(ValueError, match="invalid literal"):
            list(crew.map(int, ["x"]))


@pytest.mark.parametrize("kind", ["processes", "threads"])
def test_results_come_in_order_and_errors_as_they_were_raised(kind: str) -> None:
    with pool(2, kind) as crew:
        assert list(crew.map(abs, range(-20, 20))) == [abs(number) for number in range(-20, 20)]
        with pytest.raises(ValueError, match="invalid literal"):
            list(crew.map(int, ["1", "x", "2"]))
        assert list(crew.map(int, ["1", "2"])) == [1, 2]


def test_a_pool_starts_with_its_first_work_and_ends_with_its_block(eager: None) -> None:
    with pool(2, "processes") as crew:
        assert crew.running is None  # type: ignore[attr-defined]
        assert fitting(crew, Defects(), 1) is crew
        workers = [process.pid for process in crew.running._processes.values()]  # type: ignore[attr-defined]
        assert workers and os.getpid() not in workers
    assert not any(alive(pid) for pid in workers)


def test_small_work_and_steps_that_only_live_here_stay_in_place() -> None:
    class Here:
        pass

    with pool(2, "processes") as crew:
        assert fitting(crew, Defects(), pools.SMALL - 1) is INLINE
        assert fitting(crew, Here(), pools.SMALL) is INLINE


def test_a_worker_that_dies_is_an_error_for_the_user_and_the_pool_starts_again() -> None:
    with pool(2, "processes") as crew:
        said = r"worker processes died.*run the same command again, with fewer --workers"
        with pytest.raises(HouseError, match=said):
            list(crew.map(os._exit, [9]))
        assert list(crew.map(abs, [-1])) == [1]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_no_worker_outlives_the_run(number: signal.Signals, tmp_path: Path) -> None:
    script = tmp_path / "waits.py"
    script.write_text(
        textwrap.dedent("""
            import os, signal, time
            from gristmill.curation.pool import pool
            if __name__ == "__main__":
                signal.signal(signal.SIGINT, signal.default_int_handler)
                with pool(2, "processes") as crew:
                    list(crew.map(abs, [1, 2, 3]))
                    print(*[process.pid for process in crew.running._processes.values()], flush=True)
                    list(crew.map(time.sleep, [60, 60]))
        """)
    )
    ran = subprocess.Popen(
        [sys.executable, script], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    assert ran.stdout is not None and ran.stderr is not None
    workers = [int(pid) for pid in ran.stdout.readline().split()]
    assert workers
    if number is signal.SIGINT:
        os.killpg(ran.pid, number)  # as a terminal does
    else:
        ran.kill()
    ran.wait(60)
    said = ran.stderr.read()
    assert number is signal.SIGKILL or (said.count("Traceback") == 1 and "KeyboardInterrupt" in said), said
    end = time.monotonic() + 30
    while any(alive(pid) for pid in workers) and time.monotonic() < end:
        time.sleep(0.1)
    assert not any(alive(pid) for pid in workers)


def alive(pid: int) -> bool:
    """Whether a process runs; one that only waits to be buried does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_how_many_and_which_workers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GRISTMILL_WORKERS", "3")
    monkeypatch.setenv("GRISTMILL_EXECUTOR", "threads")
    with pool() as crew:
        assert (crew.workers, crew.apart) == (3, False)
    with pool(1) as crew:
        assert crew is INLINE
    for workers, kind, says in ((0, None, "at least 1"), (2, "slurm", "unknown executor 'slurm'; known: processes")):
        with pytest.raises(HouseError, match=says), pool(workers, kind):
            pass
    monkeypatch.setenv("GRISTMILL_WORKERS", "many")
    with pytest.raises(HouseError, match="GRISTMILL_WORKERS is 'many'"), pool():
        pass
