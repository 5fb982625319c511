"""A scheduled recipe: a real Prefect server, a cron-born run that ends, a release that it leaves behind."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any
from urllib.request import Request, urlopen

import pytest

from gristmill.curation.folder import HouseError, read_json
from gristmill.curation.shards import read_manifest


def test_a_wrong_cron_is_refused_before_any_server_starts(shared: Path, tmp_path: Path) -> None:
    from gristmill.flows.recipe import load_recipe
    from gristmill.flows.schedule import serve

    with pytest.raises(HouseError, match="'every night' is no cron expression"):
        serve(load_recipe(shared / "curation.yaml"), "every night", tmp_path)


@pytest.mark.server
def test_a_cron_born_run_finishes(shared: Path, tmp_path: Path) -> None:
    environment = {**os.environ, "PREFECT_HOME": str(tmp_path / "prefect"), "OMP_NUM_THREADS": "1"}
    environment.pop("PREFECT_API_URL", None)
    releases = tmp_path / "releases"
    command = [sys.executable, "-m", "gristmill.flows.cli", "schedule", str(shared / "curation.yaml")]
    with (tmp_path / "said").open("w") as said:
        process = subprocess.Popen(
            [*command, "--cron", "* * * * *", "--out", str(releases)], stdout=said, stderr=said, env=environment
        )
    try:
        api = _address(process, tmp_path / "said") + "/api"
        states = _wait_for_run(process, api, tmp_path / "said")
    finally:
        process.send_signal(signal.SIGINT)
        process.wait(60)
    assert states["Completed"] >= 1
    (release, *_) = sorted(path for path in releases.iterdir() if path.name != "cache")
    assert re.fullmatch(r"\d{8}T\d{6}Z", release.name)
    manifest = read_manifest(release / "curated/clean")
    assert manifest["rows"] > 0 and manifest["previous"] is None
    assert read_json(release / "run.json")["parts"] == "all"


def _address(process: "subprocess.Popen[bytes]", said: Path) -> str:
    """The UI's address, as the command prints it."""
    for _ in range(1200):
        found = re.search(r"Prefect's UI: (http://127\.0\.0\.1:\d+)", said.read_text())
        if found:
            return found[1]
        assert process.poll() is None, said.read_text()
        time.sleep(0.2)
    raise AssertionError(f"no server within 4 minutes: {said.read_text()}")


def _wait_for_run(process: "subprocess.Popen[bytes]", api: str, said: Path) -> dict[str, int]:
    """Runs by state, once one that the schedule made has ended."""
    query = {"flow_runs": {"start_time": {"is_null_": False}}}
    for _ in range(480):
        runs = _post(f"{api}/flow_runs/filter", query)
        ended = [run for run in runs if run["state_type"] in ("COMPLETED", "FAILED", "CRASHED")]
        if ended:
            assert all(run["auto_scheduled"] for run in ended)
            assert ended[0]["state_type"] == "COMPLETED", said.read_text()
            return {run["state_name"]: sum(r["state_name"] == run["state_name"] for r in ended) for run in ended}
        assert process.poll() is None, said.read_text()
        time.sleep(0.5)
    raise AssertionError(f"no run ended within 4 minutes: {said.read_text()}")


def _post(url: str, body: dict[str, Any]) -> list[dict[str, Any]]:
    request = Request(url, json.dumps(body).encode(), {"Content-Type": "application/json"})
    with urlopen(request, timeout=30) as answer:
        found: list[dict[str, Any]] = json.load(answer)
    return found
