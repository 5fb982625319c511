"""A recipe on a schedule: a served Prefect deployment whose every run is a new release that measures only new rows.

OUT/20250131T020000Z/ is one release; OUT/cache holds the measures and new models that all releases share.
"""

import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from urllib.error import URLError
from urllib.request import urlopen

from prefect import flow
from prefect.client.schemas.objects import State
from prefect.logging import get_run_logger
from prefect.states import Completed
from prefect.types.entrypoint import EntrypointType

from ..curation.folder import HouseError
from .flow import as_task
from .progress import Done, Silent, duration
from .recipe import Recipe, dump, load_text
from .run import run

STARTUP = 180.0  # seconds a Prefect server may take to answer; 10-20 on an idle machine


class Logged(Silent):
    """Shows each finished job in the flow run's log."""

    def finish(self, name: str, done: Done, seconds: float) -> None:
        super().finish(name, done, seconds)
        get_run_logger().info("%s: %s (%s)", name, done.text, "cached" if done.cached else duration(seconds))


@flow(name="gristmill release", persist_result=False)
def release(recipe: str, out: str) -> State[None]:
    """One release: `recipe` (resolved YAML) into a new folder of `out`."""
    home = Path(out) / datetime.now(UTC).strftime("%Y%m%dT%H%M%SZ")
    before = sorted(path.parent.name for path in Path(out).glob("*/run.json"))
    previous = before[-1] if before else None
    run(load_text(recipe), home, cache=Path(out) / "cache", previous=previous, show=Logged(), each=as_task)
    return Completed(message=str(home))


def serve(recipe: Recipe, cron: str, out: Path) -> None:
    """Serves the deployment until interrupted. A second run waits until the one before has ended."""
    _check_cron(cron)
    with _server():
        print(f"{recipe.name} runs at {cron!r} (UTC) into {out.resolve()}. Ctrl-C ends the schedule.", flush=True)
        release.serve(
            name=recipe.name,
            cron=cron,
            parameters={"recipe": dump(recipe), "out": str(out.resolve())},
            limit=1,
            print_starting_message=False,
            entrypoint_type=EntrypointType.MODULE_PATH,
        )


def _check_cron(cron: str) -> None:
    from prefect.client.schemas.schedules import CronSchedule

    try:
        CronSchedule(cron=cron)
    except ValueError as error:
        raise HouseError(
            f"{cron!r} is no cron expression: five fields, such as '0 2 * * *' for two at night"
        ) from error


@contextmanager
def _server() -> Iterator[None]:
    """The server that PREFECT_API_URL names, or one on 127.0.0.1 for as long as the schedule is served."""
    from prefect.settings import PREFECT_API_URL, temporary_settings

    if PREFECT_API_URL.value():
        print(f"Prefect: {PREFECT_API_URL.value()}", flush=True)
        yield
        return
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    address = f"http://127.0.0.1:{port}"
    command = [sys.executable, "-m", "prefect", "server", "start", "--host", "127.0.0.1", "--port", str(port)]
    environment = os.environ | {"PREFECT_UI_API_URL": f"{address}/api", "PREFECT_API_URL": f"{address}/api"}
    server = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    try:
        _wait(server, f"{address}/api/health")
        os.environ["PREFECT_API_URL"] = f"{address}/api"  # for the processes of the runs
        print(f"Prefect's UI: {address}", flush=True)
        with temporary_settings({PREFECT_API_URL: f"{address}/api"}):
            yield
    finally:
        server.terminate()
        server.wait(timeout=30)


def _wait(server: "subprocess.Popen[str]", url: str) -> None:
    deadline = time.monotonic() + STARTUP
    while time.monotonic() < deadline:
        if server.poll() is not None:
            said = server.stderr.read().strip().splitlines()[-3:] if server.stderr else []
            raise HouseError(f"Prefect's server ended while starting: {' '.join(said)}")
        try:
            with urlopen(url, timeout=5):
                return
        except (URLError, OSError):
            time.sleep(0.3)
    raise HouseError(
        f"Prefect's server did not answer within {STARTUP:.0f} s at {url}; start one and set PREFECT_API_URL"
    )
