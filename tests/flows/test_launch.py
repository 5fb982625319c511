import json
import logging
import random
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from gristmill.curation.folder import HouseError
from gristmill.curation.rows import content_id, counted_row_id, message, table
from gristmill.curation.shards import write_curated
from gristmill.flows import launch
from gristmill.flows.launch import refuse_torchrun, train_here
from gristmill.tuning.models import make_model
from gristmill.tuning.settings import Lora, NewModel, Training

SMALL = Training(capacity=150, packs_per_step=3, learning_rate=1e-2, threads=1, max_steps=2, lora=Lora(rank=4))
WORDS = ("mill", "grist", "stone", "water", "wheel", "grain", "flour", "sack", "miller", "river")


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    home, draw = tmp_path_factory.mktemp("home"), random.Random(0)
    texts = [" ".join(draw.choices(WORDS, k=400)) for _ in range(20)]
    make_model(home / "model", NewModel(params="60K", vocab=300, context=256, tokens=0), iter(texts))
    rows = []
    for position in range(24):
        turns = [message("user", " ".join(draw.choices(WORDS, k=9))), message("assistant", "grist for the mill")]
        row: dict[str, Any] = {"source": "made", "position": position, "messages": turns}
        row["content_id"] = content_id(row)
        rows.append(row | {"row_id": counted_row_id("made", row["content_id"], position)})
    write_curated(home / "sft", "sft", {"train": [table(rows)]}, {}, lambda manifest: {})
    return home


def test_a_stage_starts_its_own_processes_and_tells_what_one_process_tells(home: Path) -> None:
    told: dict[int, list[dict[str, Any]]] = {1: [], 2: []}
    for processes, events in told.items():
        settings = replace(SMALL, processes=processes, parallel="fsdp")
        out = home / str(processes)
        run = train_here("sft", home / "sft", home / "model", out, settings, progress=events.append, name="small")
        assert run["status"] == "complete" and run["processes"] == processes and run["name"] == "small"
        assert run == json.loads((out / "run.json").read_text())
    one, two = told.values()
    assert [event["event"] for event in one] == [event["event"] for event in two] == ["plan", "step", "step"]
    assert [event["loss"] for event in one[1:]] == pytest.approx([event["loss"] for event in two[1:]], rel=2e-5)


def spoken(*lines: str, then: int = 0) -> subprocess.Popen[str]:
    code = f"print({chr(10).join(lines)!r}); raise SystemExit({then})"
    return subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)


def test_what_processes_say_is_passed_on(caplog: pytest.LogCaptureFixture) -> None:
    seen: list[dict[str, Any]] = []
    with caplog.at_level(logging.WARNING):
        lines = ('{"event": "step", "step": 1}', "chatter", '{"event": "warning", "told": "step-2 skipped"}')
        found = launch._listen(spoken(*lines, '{"event": "error", "told": "no"}'), seen.append)
    assert seen == [{"event": "step", "step": 1}]
    assert found == {"error": "no"} and "step-2 skipped" in caplog.text


def test_processes_that_fail_are_a_message(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*lines: str) -> list[str]:
        code = f"import sys; print({chr(10).join(lines)!r}); sys.exit('Traceback: nothing works')"
        return [sys.executable, "-c", code]

    def go() -> None:
        settings = replace(SMALL, processes=2)
        train_here("sft", home / "sft", home / "model", home / "none", settings, progress=lambda event: None)

    monkeypatch.setattr(launch, "_command", lambda *_: broken('{"event": "error", "told": "rows are too long"}'))
    with pytest.raises(HouseError, match=r"^rows are too long$"):
        go()
    monkeypatch.setattr(launch, "_command", lambda *_: broken())
    with pytest.raises(HouseError, match=r"2 processes for .*none ended with 1:\nTraceback: nothing works"):
        go()


def test_a_recipe_is_not_started_by_torchrun(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    refuse_torchrun("a recipe's run")
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    with pytest.raises(HouseError, match="`processes: N`"):
        refuse_torchrun("a recipe's run")
    monkeypatch.setattr(launch.time, "sleep", lambda seconds: None)
    monkeypatch.setenv("RANK", "1")
    with pytest.raises(SystemExit):
        refuse_torchrun("a recipe's run")


@pytest.mark.skipif(sys.platform != "linux", reason="prctl is Linux's")
def test_processes_end_with_a_parent_that_is_killed(tmp_path: Path) -> None:
    code = """
import sys
from pathlib import Path
from gristmill.flows import launch
from gristmill.tuning.settings import Training

launch._command = lambda *_: [sys.executable, "-c", "import os, time; print(os.getpid()); time.sleep(600)"]
launch._listen = lambda process, progress: print(process.stdout.readline(), flush=True) or process.wait()
launch.train_here("sft", Path("a"), Path("b"), Path("c"), Training(processes=2), progress=print)
"""
    parent = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    state = Path("/proc") / parent.stdout.readline().strip() / "stat"
    assert state.is_file()
    parent.kill()
    parent.wait()
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and state.is_file() and state.read_text().split()[2] != "Z":
        time.sleep(0.05)
    assert not state.is_file() or state.read_text().split()[2] == "Z"
