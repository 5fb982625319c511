import json
import math
import random
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from gristmill.curation.folder import HouseError
from gristmill.curation.rows import content_id, counted_row_id, message, table
from gristmill.curation.shards import write_curated
from gristmill.tuning import loop
from gristmill.tuning.data import make_plan, read_rows, read_units
from gristmill.tuning.loop import train
from gristmill.tuning.models import load_model, load_tokenizer, make_model
from gristmill.tuning.objectives import find_loss
from gristmill.tuning.ranks import World
from gristmill.tuning.reference import Reference
from gristmill.tuning.settings import Lora, NewModel, Training
from gristmill.tuning.sharded import spread
from gristmill.tuning.stage import Stage, accumulate, shares_of

WORDS = ("mill", "grist", "stone", "water", "wheel", "grain", "flour", "sack", "miller", "river", "sluice", "bread")
SMALL = Training(
    capacity=150, packs_per_step=3, epochs=2, learning_rate=1e-2, warmup=0.2, checkpoint_every=3, threads=1,
    lora=Lora(rank=4, alpha=8.0, dropout=0.1),
)  # fmt: skip
WEIGHTS = "adapter/adapter_model.safetensors"


def talk(draw, most=18):
    return " ".join(draw.choices(WORDS, k=draw.randint(1, most)))


KINDS = {"sft": "sft", "dpo": "preference", "kto": "kto"}


def rows_of(kind, count, seed=0):
    draw = random.Random(seed)
    rows = []
    for position in range(count):
        row = {"source": "made", "position": position, "messages": [message("user", talk(draw))]}
        if kind == "kto":
            row |= {"completion": [message("assistant", talk(draw))], "label": position % 3 != 0}
        elif kind == "sft":
            row["messages"].append(message("assistant", talk(draw)))
        else:
            row |= {"chosen": [message("assistant", talk(draw))], "rejected": [message("assistant", talk(draw, 8))]}
        row["content_id"] = content_id(row)
        row["row_id"] = counted_row_id("made", row["content_id"], 0)
        rows.append(row)
    return rows


def curate(folder, kind, rows):
    write_curated(folder, kind, {"train": [table(rows)]}, {}, lambda manifest: {})
    return folder


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A model of some 20,000 parameters and a curated set of each kind."""
    home = tmp_path_factory.mktemp("home")
    spec = NewModel(params="60K", vocab=300, context=256, tokens=0)
    make_model(home / "model", spec, iter([talk(random.Random(1), 400) for _ in range(20)]))
    curate(home / "sft", "sft", rows_of("sft", 40))
    curate(home / "preference", "preference", rows_of("preference", 24))
    curate(home / "kto", "kto", rows_of("kto", 30))
    return home


def metrics(out):
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def adapter_of(out):
    return (out / WEIGHTS).read_bytes()


def stage_of(home, objective, settings, reference=None):
    """A Stage over all weights, on the fixture's data."""
    policy = load_model(home / "model", dtype="fp32", device="cpu")
    policy.requires_grad_(True)
    loss = find_loss(settings.loss, objective)
    rows = read_rows(objective, home / KINDS[objective])
    units = read_units(loss.family, load_tokenizer(home / "model"), rows, settings.capacity, "refuse", 256)
    plan = make_plan(units, settings)
    return Stage("", loss, plan, spread(policy, World(), "ddp"), reference, settings, home / "none")


def parameters_of(stage):
    return stage.spread.parameters


def alone(model, document):
    """Log-probabilities of the targets of one document, by transformers' own forward pass."""
    ids = torch.from_numpy(document.ids.astype(np.int64))
    logits = model(input_ids=ids[None], use_cache=False).logits[0]
    targets = np.flatnonzero(document.weights)
    return logits[targets - 1].log_softmax(-1).gather(1, ids[targets, None])[:, 0]


def plain(home):
    """The model with transformers' own attention."""
    model = load_model(home / "model", dtype="fp32", device="cpu")
    model.set_attn_implementation("eager")
    return model.requires_grad_(True)


def close(ours, theirs):
    for name, parameter in theirs.items():
        scale = parameter.grad.abs().max().item()
        torch.testing.assert_close(ours[name].grad, parameter.grad, rtol=1e-4, atol=2e-6 * max(scale, 1e-3), msg=name)


def test_a_step_of_packs_equals_one_batch_of_documents_alone(home: Path) -> None:
    settings = replace(SMALL, packs_per_step=5, lora=None)
    stage = stage_of(home, "sft", settings)
    units, plan = stage.plan.units, stage.plan
    last = len(plan.packs) // 5  # of the first epoch: the partial one
    assert len(plan.steps[last][1]) == len(plan.packs) % 5 > 0
    for step in (0, last):
        naive = plain(home)
        documents = [units.documents[unit] for unit in plan.units_of(step)]
        assert len({len(document.ids) for document in documents}) > 3
        losses = [-alone(naive, document).sum() for document in documents]
        loss = sum(losses) / sum(int(document.weights.sum()) for document in documents)
        loss.backward()
        stage.policy.zero_grad()
        values = accumulate(stage, step).values
        torch.testing.assert_close(values[0], torch.stack(losses).detach(), rtol=1e-5, atol=1e-5)
        close(parameters_of(stage), dict(naive.named_parameters()))


def test_a_dpo_step_of_packs_equals_one_batch_of_pairs_alone(home: Path) -> None:
    settings = replace(SMALL, packs_per_step=6, lora=None, loss={"dpo": {"beta": 0.2}})
    pairs = 24
    reference = -30 * torch.rand(pairs, 2, generator=torch.Generator().manual_seed(0))
    stage = stage_of(home, "dpo", settings, Reference(reference.reshape(-1).numpy()))
    units, plan = stage.plan.units, stage.plan
    assert len({len(plan.packs[pack]) for pack in plan.steps[0][1]}) > 1  # packs of unequal numbers of pairs
    naive = plain(home)
    margins = []
    for unit in plan.units_of(0):
        chosen, rejected = (alone(naive, units.documents[2 * unit + i]).sum() - reference[unit, i] for i in (0, 1))
        margins.append(0.2 * (chosen - rejected))
    margins = torch.stack(margins)
    torch.log1p(torch.exp(-margins)).mean().backward()
    values = accumulate(stage, 0).values
    torch.testing.assert_close(values[1], margins.detach(), rtol=1e-4, atol=2e-5)
    torch.testing.assert_close(values[0], torch.log1p(torch.exp(-margins)).detach(), rtol=1e-4, atol=2e-5)
    close(parameters_of(stage), dict(naive.named_parameters()))


def test_weights_of_the_rows_normalise_the_step(home: Path) -> None:
    """Half the weight on every target changes neither loss nor gradient; on one row it halves that row's share."""
    stage = stage_of(home, "sft", replace(SMALL, lora=None))
    halved = [replace(document, weights=document.weights / 2) for document in stage.plan.units.documents]
    other = replace(stage, plan=replace(stage.plan, units=replace(stage.plan.units, documents=halved)))
    accumulate(stage, 0)
    before = {name: parameter.grad.clone() for name, parameter in parameters_of(stage).items()}
    stage.policy.zero_grad()
    values = accumulate(other, 0).values
    torch.testing.assert_close({n: p.grad for n, p in parameters_of(stage).items()}, before)
    assert shares_of(other, 0)[0] == 2 * shares_of(stage, 0)[0] > 0
    assert values[0].sum() > 0


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
    with pytest.raises(HouseError, match="objective was sft, is now dpo; data_digest was"):
        train("dpo", home / "preference", home / "model", tmp_path, SMALL)


@pytest.mark.parametrize("objective", ["sft", "dpo"])
def test_row_losses_are_those_of_each_row_alone(home: Path, tmp_path: Path, objective: str) -> None:
    settings = replace(SMALL, learning_rate=0.0, lora=Lora(rank=2, base="fp32"), epochs=1)
    kind = "sft" if objective == "sft" else "preference"
    train(objective, home / kind, home / "model", tmp_path, settings)
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
            assert row["mean_prob"] == pytest.approx(logps.exp().mean().item(), rel=1e-4)
        else:
            assert row["loss"] == pytest.approx(math.log(2)) and row["margin"] == 0


def test_dpo_begins_at_ln_2_and_continues_an_adapter(home: Path, tmp_path: Path) -> None:
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


@pytest.mark.parametrize("objective", ["sft", "dpo"])
def test_a_run_stopped_at_several_steps_ends_in_the_same_bytes(home: Path, tmp_path: Path, objective: str) -> None:
    arguments = (objective, home / KINDS[objective], home / "model")
    train(*arguments, tmp_path / "straight", SMALL)
    out = tmp_path / "stopped"
    for event, step in [("reference", 3), ("step", 2), ("step", 5), ("step", 7)]:
        if event == "step" or objective != "sft":
            with pytest.raises(Killed):
                train(*arguments, out, SMALL, progress=killer(event, step))
            assert json.loads((out / "run.json").read_text())["status"] == "running"
    with (out / "metrics.jsonl").open("a") as file:
        file.write('{"step": 10, "lo')  # a line that was being written
    events = []
    train(*arguments, out, SMALL, progress=events.append)
    kinds = [event["event"] for event in events]
    assert kinds[:3] == ["plan", "resume", "step"] and events[1]["step"] == 6
    same = ["plan.parquet", "steps.parquet", "row_losses/train.parquet", "adapter/adapter_config.json", WEIGHTS]
    kept = [path.relative_to(out).as_posix() for path in out.glob("references/*")]
    assert len(kept) == (objective != "sft")
    for name in same + kept:
        assert (out / name).read_bytes() == (tmp_path / "straight" / name).read_bytes(), name
    timing = {"seconds", "tokens_per_s", "roofline_share", "memory"}
    ours, theirs = (
        [{k: line[k] for k in line.keys() - timing} for line in metrics(o)] for o in (out, tmp_path / "straight")
    )
    assert ours == theirs


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
    (tmp_path / "file").write_text("")
    with pytest.raises(HouseError, match="cannot write"):
        train("sft", home / "sft", home / "model", tmp_path / "file", SMALL)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
