"""What tests of several processes share: `together` runs a test's function in some that find each other as those that
torchrun starts do. As the file of such a process, it runs the function."""

import json
import multiprocessing
import os
import runpy
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from gristmill.curation.folder import HouseError

PRELOADED = ["gristmill.tuning.loop", "pytest"]  # imported once, in the server that every process is forked from


def run_together(size: int, folder: Path, work: Callable[..., Any], *args: Any) -> list[Any]:
    """What `work(*args)` returned, or {"exit": …, "said": …}, of each of `size` processes. Makes `folder`.

    work: a function of a test's file that is found there by its name. args and result: what JSON holds.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    folder.mkdir(parents=True)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    where = {"WORLD_SIZE": size, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    processes = []
    for rank in range(size):
        found = folder / f"{rank}.json"
        job = (where | {"RANK": rank, "LOCAL_RANK": rank}, found, work.__code__.co_filename, work.__name__, args)
        run = (__file__, {"JOB": job}, "rank")
        processes.append(context.Process(target=runpy.run_path, args=run, daemon=True))
    for process in processes:
        process.start()
    for process in processes:
        process.join(600)
    return [_found(folder / f"{rank}.json", process) for rank, process in enumerate(processes)]


def _found(path: Path, process: Any) -> Any:
    return json.loads(path.read_text()) if path.is_file() else {"exit": process.exitcode, "said": None}


def _run(where: dict[str, Any], path: Path, file: str, name: str, args: tuple[Any, ...]) -> None:
    os.environ |= {key: str(value) for key, value in where.items()}
    try:
        found = runpy.run_path(file, run_name="rank")[name](*args)
    except HouseError as error:
        found = {"exit": 1, "said": str(error)}
    except SystemExit as error:
        found = {"exit": error.code, "said": None}
    path.write_text(json.dumps(found))


@pytest.fixture(scope="session")
def together() -> Callable[..., list[Any]]:
    return run_together


if __name__ == "rank":
    _run(*globals()["JOB"])
