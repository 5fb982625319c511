"""A Prefect server of our own on 127.0.0.1, where PREFECT_API_URL (environment or Prefect profile) names none.

Prefect's own embedded server dies with the terminal's Ctrl-C before the run could report to it (its client then retries
for two minutes), and outlives a killed run. This one is out of the terminal's reach and ends with the run.
"""

import ctypes
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import IO
from urllib.error import URLError
from urllib.request import urlopen

from ..curation.folder import HouseError

STARTUP = 240.0  # seconds that the server may take to answer; 5-10 on an idle machine
QUIET = {
    "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
    "PREFECT_LOGGING_LEVEL": "CRITICAL",
    "PREFECT_LOGGING_TO_API_ENABLED": "false",
    "PREFECT_CLI_PROMPT": "false",
    "DO_NOT_TRACK": "1",
}


def prefect_environment(**more: str) -> None:
    """Prefect's settings where the user has set none: quiet, no telemetry. Before Prefect's first import."""
    for name, value in (QUIET | more).items():
        os.environ.setdefault(name, value)


@contextmanager
def prefect_server(*, services: bool) -> Iterator[str]:
    """The address of the Prefect API. services: with scheduler and UI, as schedules need them."""
    from prefect.settings import PREFECT_API_URL, temporary_settings

    named = PREFECT_API_URL.value()
    if named:
        yield str(named)
        return
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    url = f"http://127.0.0.1:{port}/api"
    command = [sys.executable, "-m", "prefect", "server", "start", "--host", "127.0.0.1", "--port", str(port)]
    command += [] if services else ["--no-ui", "--no-scheduler", "--no-late-runs"]
    environment = os.environ | {"PREFECT_UI_API_URL": url} | ({} if services else {"PREFECT__SERVER_EPHEMERAL": "1"})
    with tempfile.TemporaryFile() as said:
        server = subprocess.Popen(
            command,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=said,
            stderr=said,
            start_new_session=True,
            preexec_fn=end_with_parent,
        )
        try:
            _wait(server, said, f"{url}/health")
            with temporary_settings({PREFECT_API_URL: url}):
                yield url
        finally:
            server.terminate()
            try:
                server.wait(timeout=10)
            except subprocess.TimeoutExpired:
                server.kill()


def end_with_parent() -> None:
    """For a child, before it becomes its program: on Linux it gets SIGTERM when its parent dies, however that dies
    (prctl's PR_SET_PDEATHSIG)."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGTERM)


def _wait(server: "subprocess.Popen[bytes]", said: IO[bytes], url: str) -> None:
    deadline = time.monotonic() + STARTUP
    while time.monotonic() < deadline:
        if server.poll() is not None:
            said.seek(0)
            last = " ".join(said.read().decode(errors="replace").split())[-500:]
            raise HouseError(f"Prefect's server ended while starting: {last}. Go on without it: --plain")
        try:
            with urlopen(url, timeout=5):
                return
        except (URLError, OSError):
            time.sleep(0.1)
    raise HouseError(f"Prefect's server did not answer within {STARTUP:.0f} s. Set PREFECT_API_URL, or use --plain")
