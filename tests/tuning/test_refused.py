"""What a stage refuses or stops at, each as a user meets it; and what may change between two calls."""

import json
import math
import sys
from dataclasses import replace
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch

from gristmill.curation.folder import HouseError
from gristmill.tuning import loop
from gristmill.tuning.loop import train
from gristmill.tuning.settings import Training
from gristmill.tuning.sharded import Spread
from gristmill.tuning.trackers import trackers

from .small_stage import SMALL, adapter_of, make_home

SHORT = replace(SMALL, max_steps=2, checkpoint_every=1)


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    return make_home(tmp_path_factory.mktemp("home"))


@pytest.mark.parametrize(
    ("objective", "settings", "message"),
    [
        ("sft", {"compile": True}, "compile: attention is guarded by the lengths"),
        ("dpo", {"neftune_alpha": 5.0}, "neftune_alpha is noise on supervised inputs; dpo is a loss of pairs"),
        ("kto", {"masked_thought": 0.2}, "masked_thought is noise on supervised inputs; kto is a loss of unpaired"),
        ("sft", {"loss": "dpo"}, "loss dpo is one of pairs; sft trains on tokens: use dpo"),
        ("sft", {"offload": True}, "offload: .*checkpoints no layer"),
    ],
)
def test_settings_that_cannot_be_are_refused(home: Path, tmp_path: Path, objective, settings, message: str) -> None:
    kind = {"sft": "sft", "dpo": "preference", "kto": "kto"}[objective]
    with pytest.raises(HouseError, match=message):
        train(objective, home / kind, home / "model", tmp_path, replace(SHORT, **settings))
    assert not (tmp_path / "metrics.jsonl").exists()


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("warmup", 1.5, "from 0 to 1, not 1.5"),
        ("decay", -0.1, "from 0 to 1"),
        ("capacity", 1, "2 or more, not 1"),
        ("checkpoint_every", 0, "1 or more"),
        ("learning_rate", math.inf, "0 or more, not inf"),
        ("learning_rate", math.nan, "0 or more, not nan"),
        ("epochs", 0, "above 0 where max_steps"),
        ("threads", -1, "0 or more"),
        ("seed", -1, "0 or more"),
        ("keep_checkpoints", -2, "0 or more"),
        ("checkpointing", -1, "none, layers, or how many of them, not -1"),
    ],
)
def test_numbers_out_of_range_are_refused(key: str, value: float, said: str) -> None:
    with pytest.raises(ValueError, match=f"{key} is {said}"):
        Training(**{key: value})
    assert Training(epochs=0, max_steps=3).max_steps == 3


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory"),
        RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory: you tried 9"),
    ],
)
def test_memory_that_does_not_suffice_is_told_with_what_would_fit(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def full(stage, step):
        raise error

    monkeypatch.setattr(loop, "accumulate", full)
    monkeypatch.setattr(
        torch.cuda, "get_device_properties", lambda place: type("Card", (), {"total_memory": 1_000_000})
    )
    with pytest.raises(HouseError, match=r"out of memory: the step needs about .*\n(  .*\n){3}The last checkpoint"):
        train("sft", home / "sft", home / "model", tmp_path, SHORT)


def test_other_errors_of_torch_stay_what_they_are(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(stage, step):
        raise RuntimeError("shapes differ")

    monkeypatch.setattr(loop, "accumulate", wrong)
    with pytest.raises(RuntimeError, match="shapes differ"):
        train("sft", home / "sft", home / "model", tmp_path, SHORT)


def test_gradients_that_are_not_finite_stop_and_name_the_rows(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Spread, "clip", lambda self, largest: math.inf)
    with pytest.raises(HouseError, match=r"step 1 of .*gradient norm inf.*look at the step's rows: ") as error:
        train("sft", home / "sft", home / "model", tmp_path, SHORT)
    steps = pq.read_table(tmp_path / "steps.parquet").to_pylist()
    assert all(row["row_id"] in str(error.value) for row in steps if row["step"] == 1)


def test_a_row_whose_loss_is_not_finite_is_named_alone(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = loop.accumulate

    def broken(stage, step):
        seen = real(stage, step)
        seen.values[0, 1] = math.inf
        broken.row = stage.plan.units.row_ids[stage.plan.units_of(step)[1]]
        return seen

    monkeypatch.setattr(loop, "accumulate", broken)
    with pytest.raises(HouseError, match=r"loss inf.*look at the rows whose loss is not finite: ") as error:
        train("sft", home / "sft", home / "model", tmp_path, SHORT)
    assert str(error.value).endswith(f"not finite: {broken.row}")


def test_what_another_format_wrote_is_refused_and_free_settings_may_change(home: Path, tmp_path: Path) -> None:
    arguments = ("sft", home / "sft", home / "model")

    class Killed(Exception):
        pass

    def kill(event):
        if event["event"] == "step" and event["step"] == 2:
            raise Killed

    settings = replace(SHORT, max_steps=3)
    with pytest.raises(Killed):
        train(*arguments, tmp_path / "out", settings, progress=kill)
    record, state = tmp_path / "out" / "run.json", tmp_path / "out" / "checkpoints" / "step-000001" / "state.json"
    stored = record.read_text()
    record.write_text(json.dumps(json.loads(stored) | {"format": 7, "gristmill": "9.9"}))
    with pytest.raises(
        HouseError, match=r"run.json was written by gristmill 9.9 in format 7; this is .*writes format 2"
    ):
        train(*arguments, tmp_path / "out", settings)
    record.write_text(stored[:100])
    with pytest.raises(HouseError, match=r"run.json is damaged, so nothing says what began here"):
        train(*arguments, tmp_path / "out", settings)
    record.write_text(stored)
    metrics = tmp_path / "out" / "metrics.jsonl"
    known = metrics.read_text()
    metrics.write_text(known + "garbage\n")
    with pytest.raises(HouseError, match=r"metrics.jsonl holds a line that is no step's metrics: .*Remove that line"):
        train(*arguments, tmp_path / "out", settings)
    metrics.write_text(known)
    assert state.is_file()
    with pytest.raises(HouseError, match=r"settings.learning_rate was 0.01, is now 0.5"):
        train(*arguments, tmp_path / "out", replace(settings, learning_rate=0.5))
    with pytest.raises(HouseError, match=r"loss_function.name was nll, is now dft; settings.loss was None"):
        train(*arguments, tmp_path / "out", replace(settings, loss="dft"))
    train(*arguments, tmp_path / "out", replace(settings, checkpointing="layers", keep_checkpoints=5))
    train(*arguments, tmp_path / "straight", settings)
    assert adapter_of(tmp_path / "out") == adapter_of(tmp_path / "straight")


FAKE = """
import json, pathlib
lines = []
class Session:
    def log(self, numbers, step): lines.append((step, numbers))
    def finish(self): lines.append("finish")
def init(**how):
    assert how["mode"] == "offline" and how["resume"] == "allow"
    return Session()
"""


def test_trackers_get_the_numbers_of_each_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(HouseError, match=r"track: wandb is not installed. Install it \(pip install wandb\)"):
        monkeypatch.setitem(sys.modules, "wandb", None)
        with trackers(["wandb"], tmp_path, {}):
            pass
    monkeypatch.delitem(sys.modules, "wandb")
    (tmp_path / "wandb.py").write_text(FAKE)
    run = {"settings": {}, "name": "first", "key": "0123456789"}
    with trackers(["wandb"], tmp_path / "out", run) as track:
        track(3, {"step": 3, "loss": 0.5, "text": "no number"})
    import wandb

    assert wandb.lines == [(3, {"step": 3.0, "loss": 0.5}), "finish"]
    sys.modules.pop("wandb")
