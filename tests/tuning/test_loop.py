import json
import math
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file, save_file

from gristmill.curation.folder import HouseError
from gristmill.tuning import loop
from gristmill.tuning.loop import train
from gristmill.tuning.models import load_model, load_tokenizer
from gristmill.tuning.settings import Lora

from .small_stage import KINDS, SMALL, WEIGHTS, adapter_of, alone, make_home, metrics, plain, stage_of


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    return make_home(tmp_path_factory.mktemp("home"))


def test_sft_trains_records_and_answers_a_second_call_at_once(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    events = []
    run = train("sft", home / "sft", home / "model", tmp_path, SMALL, name="first", progress=events.append)
    lines = metrics(tmp_path)
    plan = run["plan"]
    assert run["status"] == "complete" and run["name"] == "first" and run["result"] == "adapter"
    assert (plan["rows"], plan["units"], plan["excluded"], plan["epochs"]) == (40, 40, {}, 2)
    assert [line["step"] for line in lines] == list(range(1, plan["steps"] + 1))
    assert sum(line["tokens"] for line in lines) == 2 * plan["tokens"]
    assert sum(line["target_tokens"] for line in lines) == 2 * plan["target_tokens"]
    assert lines[-1]["loss"] == run["loss"] < lines[0]["loss"]
    assert [event["event"] for event in events] == ["plan"] + ["step"] * len(lines)
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["step-000006", "step-000009"]
    steps = pq.read_table(tmp_path / "steps.parquet").to_pandas()
    assert sorted(steps.groupby("row_id").size().unique()) == [2]
    packs = pq.read_table(tmp_path / "plan.parquet").to_pandas()
    assert packs.groupby("pack").tokens.sum().max() <= 150 and packs.tokens.sum() == plan["tokens"]
    monkeypatch.setattr(loop, "load_model", None)
    monkeypatch.setattr(loop, "load_tokenizer", None)
    assert train("sft", home / "sft", home / "model", tmp_path, SMALL) == run
    with pytest.raises(HouseError, match=r"settings\.lora\.rank was 4, is now 8; settings\.seed was 0, is now 1"):
        train(
            "sft",
            home / "sft",
            home / "model",
            tmp_path,
            replace(SMALL, seed=1, lora=Lora(rank=8, alpha=8.0, dropout=0.1)),
        )
    with pytest.raises(HouseError, match=r"objective was sft, is now dpo; loss_function.*data_digest was"):
        train("dpo", home / "preference", home / "model", tmp_path, SMALL)


@pytest.mark.parametrize("objective", ["sft", "dpo", "kto"])
def test_row_losses_are_those_of_each_row_alone(home: Path, tmp_path: Path, objective: str) -> None:
    settings = replace(SMALL, learning_rate=0.0, lora=Lora(rank=2, base="fp32"), epochs=1)
    train(objective, home / KINDS[objective], home / "model", tmp_path, settings)
    found = {row["row_id"]: row for row in pq.read_table(tmp_path / "row_losses" / "train.parquet").to_pylist()}
    stage = stage_of(home, objective, settings)
    units, model = stage.plan.units, plain(home)
    assert sorted(found) == sorted(units.row_ids)
    steps = pq.read_table(tmp_path / "steps.parquet").to_pylist()
    assert all(found[row["row_id"]]["step"] == row["step"] for row in steps)
    for index, row_id in enumerate(units.row_ids):
        row = found[row_id]
        assert row["tokens"] == units.targets[index] and row["epoch"] == 1
        if objective == "sft":
            with torch.no_grad():
                logps = alone(model, units.documents[index])
            assert row["loss"] == pytest.approx(-logps.mean().item(), rel=1e-4)
        elif objective == "dpo":
            assert row["loss"] == pytest.approx(math.log(2)) and row["margin"] == 0
        else:
            assert row["loss"] == pytest.approx(0.5, abs=1e-5) and row["reward"] == pytest.approx(0, abs=1e-5)
        with torch.no_grad():
            places = units.documents_of(np.asarray([index]))
            probs = torch.cat([alone(model, units.documents[place]).exp() for place in places])
        assert row["mean_prob"] == pytest.approx(probs.mean().item(), rel=1e-4)


def test_trap_16_dpo_begins_at_ln_2_and_continues_an_adapter(home: Path, tmp_path: Path) -> None:
    train("sft", home / "sft", home / "model", tmp_path / "sft", SMALL)
    settings = replace(SMALL, lora=replace(SMALL.lora, dropout=0.0), max_steps=8)
    adapter = tmp_path / "sft" / "adapter"
    train("dpo", home / "preference", home / "model", tmp_path / "dpo", settings, adapter=adapter)
    lines = metrics(tmp_path / "dpo")
    assert np.float32(lines[0]["loss"]) == np.float32(math.log(2))
    assert (lines[0]["margin"], lines[0]["accuracy"], len(lines)) == (0, 0.5, 8)
    assert abs(lines[1]["loss"] - math.log(2)) > 1e-4
    # the reference is the SFT adapter's, not the bare model's
    train("dpo", home / "preference", home / "model", tmp_path / "bare", settings)
    ours, bare = (pq.read_table(next((tmp_path / name / "references").iterdir())) for name in ("dpo", "bare"))
    assert ours["row_id"] == bare["row_id"] and ours["logp"] != bare["logp"]
    assert np.float32(metrics(tmp_path / "bare")[0]["loss"]) == np.float32(math.log(2))
    with pytest.raises(HouseError, match=r"has rank 4, the stage that continues it 8: set it to 4"):
        other = replace(settings, lora=Lora(rank=8, alpha=8.0))
        train("dpo", home / "preference", home / "model", tmp_path / "other", other, adapter=adapter)
    assert not (tmp_path / "other" / "run.json").exists()  # so that the same folder takes the mended settings
    with pytest.raises(HouseError, match="cannot continue the adapter"):
        train(
            "dpo", home / "preference", home / "model", tmp_path / "full", replace(settings, lora=None), adapter=adapter
        )


class Killed(Exception):
    pass


def killer(event, step):
    def kill(told):
        if told["event"] == event and told.get("step", told.get("done")) == step:
            raise Killed

    return kill


HOW = {
    "sft": SMALL,
    "dpo": SMALL,
    "kto": replace(SMALL, optimizer="lion", learning_rate=2e-3, schedule="wsd", evaluate_every=2, max_steps=9),
}


@pytest.mark.parametrize("objective", ["sft", "dpo", "kto"])
def test_trap_13_a_run_stopped_at_several_steps_ends_the_same(home: Path, tmp_path: Path, objective: str) -> None:
    arguments, settings = (objective, home / KINDS[objective], home / "model"), HOW[objective]
    train(*arguments, tmp_path / "straight", settings)
    out = tmp_path / "stopped"
    for event, step in [("reference", 3), ("step", 2), ("step", 5), ("step", 7)]:
        if event == "step" or objective != "sft":
            with pytest.raises(Killed):
                train(*arguments, out, settings, progress=killer(event, step))
            assert json.loads((out / "run.json").read_text())["status"] == "running"
    with (out / "metrics.jsonl").open("a") as file:
        file.write('{"step": 10, "lo')  # a line that was being written
    events = []
    train(*arguments, out, settings, progress=events.append)
    kinds = [event["event"] for event in events]
    assert kinds[:3] == ["plan", "resume", "step"] and events[1]["step"] == 6
    same = ["plan.parquet", "steps.parquet", "row_losses/train.parquet", "adapter/adapter_config.json", WEIGHTS]
    kept = [path.relative_to(out).as_posix() for path in out.glob("references/*")]
    assert len(kept) == {"sft": 0, "dpo": 1, "kto": 2}[objective]  # KTO's held-out rows have one of their own
    best = [WEIGHTS.replace("adapter/", "best/")] if settings.evaluate_every else []
    for name in same + kept + best:
        assert (out / name).read_bytes() == (tmp_path / "straight" / name).read_bytes(), name
    timing = {"seconds", "tokens_per_s", "roofline_share", "memory"}
    ours, theirs = (
        [{k: line[k] for k in line.keys() - timing} for line in metrics(o)] for o in (out, tmp_path / "straight")
    )
    assert ours == theirs
    if objective == "kto":
        lines = [line for line in ours if "held_out_loss" in line]
        assert [line["step"] for line in lines] == [2, 4, 6, 8, 9]
        assert ours[0]["kl"] == pytest.approx(0, abs=1e-4) and max(line["kl"] for line in ours) > 1e-3
        assert ours[0]["loss"] == pytest.approx(0.5, abs=1e-4)  # 1 - σ(0) for good and bad alike
        assert [path.name for path in (out / "checkpoints" / "best").iterdir()]


KILLED = """
import os, signal, sys
from pathlib import Path
import torch
from gristmill.tuning.loop import train
from gristmill.tuning.settings import Lora, Training
torch.set_num_threads(2)
def kill(event):
    if event["event"] == "step" and event["step"] == 4:
        os.kill(os.getpid(), signal.SIGKILL)
train("sft", Path(sys.argv[1]) / "sft", Path(sys.argv[1]) / "model", Path(sys.argv[2]), {settings}, progress=kill)
"""


def test_a_process_killed_with_sigkill_continues_with_its_own_threads(home: Path, tmp_path: Path) -> None:
    settings = replace(SMALL, threads=0, max_steps=6)
    code = KILLED.format(settings=repr(settings))
    done = subprocess.run([sys.executable, "-c", code, home, tmp_path / "killed"], capture_output=True, timeout=300)
    assert done.returncode == -signal.SIGKILL, done.stderr.decode()[-2000:]
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        train("sft", home / "sft", home / "model", tmp_path / "straight", settings)
        torch.set_num_threads(1)
        seen = []
        run = train(
            "sft", home / "sft", home / "model", tmp_path / "killed", settings,
            progress=lambda event: seen.append((event["event"], torch.get_num_threads())),
        )  # fmt: skip
        assert torch.get_num_threads() == 1
    finally:
        torch.set_num_threads(before)
    assert run["threads"] == 2 and set(seen) == {("plan", 2), ("resume", 2), ("step", 2)}
    assert adapter_of(tmp_path / "killed") == adapter_of(tmp_path / "straight")


def test_a_harmed_checkpoint_is_passed_over(home: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    arguments = ("sft", home / "sft", home / "model")
    train(*arguments, tmp_path / "straight", SMALL)
    with pytest.raises(Killed):
        train(*arguments, tmp_path / "out", SMALL, progress=killer("step", 8))
    state = tmp_path / "out" / "checkpoints" / "step-000006" / "state.safetensors"
    state.write_bytes(state.read_bytes()[:-1])
    events = []
    train(*arguments, tmp_path / "out", SMALL, progress=events.append)
    assert {"event": "resume", "step": 3} in events
    assert "step-000006 skipped: state.safetensors does not have the SHA-256" in caplog.text
    assert adapter_of(tmp_path / "out") == adapter_of(tmp_path / "straight")


def test_checkpoints_of_another_run_are_refused(home: Path, tmp_path: Path) -> None:
    with pytest.raises(Killed):
        train("sft", home / "sft", home / "model", tmp_path, SMALL, progress=killer("step", 4))
    (tmp_path / "run.json").unlink()
    with pytest.raises(HouseError, match="checkpoints of another run"):
        train("sft", home / "sft", home / "model", tmp_path, replace(SMALL, seed=1))


def test_ctrl_c_says_how_to_go_on(home: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    def interrupt(event):
        if event["event"] == "step" and event["step"] == 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train("sft", home / "sft", home / "model", tmp_path, SMALL, progress=interrupt)
    assert "the same command continues" in caplog.text and str(tmp_path) in caplog.text
    assert not (tmp_path / "adapter").exists()


def test_all_weights_are_tuned_saved_and_resumed(home: Path, tmp_path: Path) -> None:
    settings = replace(SMALL, lora=None, weight_decay=0.1, learning_rate=3e-3)
    run = train("sft", home / "sft", home / "model", tmp_path / "straight", settings)
    assert run["result"] == "model" and run["loss"] < metrics(tmp_path / "straight")[0]["loss"] - 0.5
    with pytest.raises(Killed):
        train("sft", home / "sft", home / "model", tmp_path / "out", settings, progress=killer("step", 7))
    train("sft", home / "sft", home / "model", tmp_path / "out", settings)
    names = sorted(path.name for path in (tmp_path / "out" / "model").iterdir())
    assert {"model.safetensors", "config.json", "tokenizer.json"} <= set(names)
    for name in names:
        assert (tmp_path / "out" / "model" / name).read_bytes() == (tmp_path / "straight" / "model" / name).read_bytes()
    again = load_model(tmp_path / "out" / "model", dtype="fp32", device="cpu")
    load_tokenizer(tmp_path / "out" / "model")
    base = load_model(home / "model", dtype="fp32", device="cpu")
    changed = [name for (name, p), q in zip(again.named_parameters(), base.parameters(), strict=True) if not p.equal(q)]
    assert len(changed) == len(list(base.parameters()))


def test_a_loss_that_is_not_finite_stops_and_names_the_rows(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = loop.accumulate

    def broken(stage, step):
        seen = real(stage, step)
        return seen._replace(values=seen.values * math.nan) if step == 4 else seen

    monkeypatch.setattr(loop, "accumulate", broken)
    with pytest.raises(HouseError, match=r"step 5 of .*loss nan.*last checkpoint is of step 3") as error:
        train("sft", home / "sft", home / "model", tmp_path, SMALL)
    steps = pq.read_table(tmp_path / "steps.parquet").to_pylist()
    assert all(row["row_id"] in str(error.value) for row in steps if row["step"] == 5)
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-000003"]
    assert len(metrics(tmp_path)) == 4
    monkeypatch.undo()
    train("sft", home / "sft", home / "model", tmp_path, SMALL)


def test_weights_that_are_no_numbers_are_named(home: Path, tmp_path: Path) -> None:
    shutil.copytree(home / "model", tmp_path / "model")
    stored = load_file(tmp_path / "model" / "model.safetensors")
    stored["model.norm.weight"][3] = math.nan
    save_file(stored, tmp_path / "model" / "model.safetensors", metadata={"format": "pt"})
    said = r"step 1 of .*no checkpoint was due.*no number: model.norm.weight \(1 in all\). Get the model again"
    with pytest.raises(HouseError, match=said):
        train("sft", home / "sft", tmp_path / "model", tmp_path / "out", SMALL)


def test_refusals_name_what_is_wrong(home: Path, tmp_path: Path) -> None:
    with pytest.raises(HouseError, match=r"dpo trains on data of kind 'preference'.*is of kind 'sft'"):
        train("dpo", home / "sft", home / "model", tmp_path / "a", SMALL)
    with pytest.raises(HouseError, match=r"sft trains on data of kind 'sft'.*is of kind 'preference'"):
        train("sft", home / "preference", home / "model", tmp_path / "b", SMALL)
    with pytest.raises(HouseError, match="manifest"):
        train("sft", home, home / "model", tmp_path / "c", SMALL)
    with pytest.raises(HouseError, match="no model folder"):
        train("sft", home / "sft", home / "nothing", tmp_path / "d", SMALL)
    with pytest.raises(HouseError, match="has not finished"):
        train("sft", home / "sft", home / "model", tmp_path / "e", SMALL, adapter=home / "nothing")
    shutil.copytree(home / "model", tmp_path / "bare")
    (tmp_path / "bare" / "config.json").unlink()
    with pytest.raises(HouseError, match=r"bare holds no config\.json"):
        train("sft", home / "sft", tmp_path / "bare", tmp_path / "f", SMALL)
    shutil.rmtree(tmp_path / "bare")
    (tmp_path / "file").write_text("")
    with pytest.raises(HouseError, match="cannot write"):
        train("sft", home / "sft", home / "model", tmp_path / "file", SMALL)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
