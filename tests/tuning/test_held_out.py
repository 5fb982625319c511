import math
from dataclasses import replace
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch

from gristmill.curation.folder import HouseError
from gristmill.curation.rows import message
from gristmill.curation.shards import read_split
from gristmill.tuning import held_out, loop
from gristmill.tuning.evaluate import evaluate_sft, evaluate_unpaired
from gristmill.tuning.held_out import measure
from gristmill.tuning.loop import train
from gristmill.tuning.lora import load_adapter
from gristmill.tuning.models import load_model, load_tokenizer
from gristmill.tuning.stage import Seen

from .small_stage import SMALL, WEIGHTS, adapter_of, curate, make_home, metrics, rows_of, stage_of


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    return make_home(tmp_path_factory.mktemp("home"))


def test_the_weights_that_did_best_on_held_out_rows_are_kept_beside_the_last(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = replace(SMALL, schedule="constant", warmup=0.0, checkpoint_every=2, max_steps=4)
    train("sft", home / "sft", home / "model", tmp_path / "two", replace(settings, max_steps=2))
    real, seen = loop.measure, []

    def measured(held):
        seen.append(real(held)["held_out_loss"])
        return {"held_out_loss": [3.0, 1.0, 2.0, 4.0][len(seen) - 1]}

    monkeypatch.setattr(loop, "measure", measured)
    out = tmp_path / "out"
    run = train("sft", home / "sft", home / "model", out, replace(settings, evaluate_every=1))
    assert run["best"] == {"step": 2, "loss": 1.0}
    assert [path.name for path in (out / "checkpoints" / "best").iterdir()] == ["step-000002"]
    assert (out / "best" / Path(WEIGHTS).name).read_bytes() == adapter_of(tmp_path / "two") != adapter_of(out)
    rows, tokenizer = read_split(home / "sft", "test"), load_tokenizer(home / "model")
    for folder, loss in (("best", seen[1]), ("adapter", seen[3])):
        model = load_model(home / "model", dtype="fp32", device="cpu")
        load_adapter(model, out / folder)
        assert evaluate_sft(model, tokenizer, rows, 150)["loss"] == pytest.approx(loss, rel=1e-5)


def test_a_measurement_that_is_no_number_is_not_the_best(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing is below NaN: a first measurement of NaN once stayed the best to the end."""
    losses = iter([math.nan, 2.0, math.inf, 1.0, math.nan])
    monkeypatch.setattr(loop, "measure", lambda held: {"held_out_loss": next(losses)})
    settings = replace(SMALL, max_steps=5, evaluate_every=1)
    assert train("sft", home / "sft", home / "model", tmp_path / "out", settings)["best"] == {"step": 4, "loss": 1.0}
    monkeypatch.setattr(loop, "measure", lambda held: {"held_out_loss": math.nan})
    run = train("sft", home / "sft", home / "model", tmp_path / "none", replace(settings, max_steps=2))
    assert run["best"] is None and not (tmp_path / "none" / "best").exists()


def test_held_out_answers_with_labels_are_measured_as_evaluation_does(home: Path, tmp_path: Path) -> None:
    rows, tokenizer = read_split(home / "kto", "test"), load_tokenizer(home / "model")
    out = tmp_path / "kto"
    train("kto", home / "kto", home / "model", out, replace(SMALL, max_steps=3, evaluate_every=3))
    *_, last = metrics(out)
    start, model = (load_model(home / "model", dtype="fp32", device="cpu") for _ in range(2))
    load_adapter(model, out / "adapter")
    found = evaluate_unpaired(model, start, tokenizer, rows, 0.1, 150)
    assert last["held_out_auc"] == found["reward_auc"] != 0.5
    held = [row for row in rows_of("kto", 9, seed=1) if row["label"]]
    held[0] |= {"messages": [message("user", "mill " * 300)]}
    ones = curate(tmp_path / "one", "kto", rows_of("kto", 6), held)
    run = train("kto", ones, home / "model", tmp_path / "ones", replace(SMALL, max_steps=1, evaluate_every=1))
    assert run["plan"]["held_out"] == {"rows": 5, "excluded": {"too_long": 1}}
    (line,) = metrics(tmp_path / "ones")
    assert "held_out_loss" in line and "held_out_auc" not in line


def test_a_held_out_margin_that_is_no_number_is_no_wrong_answer(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stage = stage_of(home, "dpo", SMALL)
    units = len(stage.plan.units_of(0))
    values = torch.ones(3, units)
    monkeypatch.setattr(held_out, "step_values", lambda stage, step: Seen(values, None))
    assert measure(stage) == {"held_out_loss": pytest.approx(1.0), "held_out_accuracy": 1.0}
    values[1, 0], values[1, 1] = 0.0, -1.0
    assert measure(stage)["held_out_accuracy"] == pytest.approx((units - 1.5) / units)
    values[1, 0] = math.nan
    assert math.isnan(measure(stage)["held_out_accuracy"])


def test_evaluation_wants_held_out_rows(home: Path, tmp_path: Path) -> None:
    data = curate(tmp_path / "none", "sft", rows_of("sft", 6))
    with pytest.raises(HouseError, match=r"evaluate_every: .*Hold rows out"):
        train("sft", data, home / "model", tmp_path / "out", replace(SMALL, evaluate_every=1))


def test_another_stage_finds_the_reference_and_one_without_needs_none(home: Path, tmp_path: Path) -> None:
    settings, shared = replace(SMALL, max_steps=1), tmp_path / "references"
    seen = {}
    for name in ("dpo", "ipo", "simpo"):
        events = []
        more = {"references": shared if name != "simpo" else tmp_path / "none", "progress": events.append}
        train("dpo", home / "preference", home / "model", tmp_path / name, replace(settings, loss=name), **more)
        seen[name] = [event["event"] for event in events].count("reference")
    (kept,) = shared.iterdir()
    assert seen["dpo"] > 0 == seen["ipo"] == seen["simpo"] and not (tmp_path / "none").exists()
    table = pq.read_table(kept)
    assert table.column_names == ["row_id", "answer", "logp"] and table["answer"].to_pylist()[:4] == [0, 1, 0, 1]
    events = []
    other = replace(settings, capacity=200)  # other packs, other last bits: its own reference
    train("dpo", home / "preference", home / "model", tmp_path / "c", other, references=shared, progress=events.append)
    assert len(list(shared.iterdir())) == 2
