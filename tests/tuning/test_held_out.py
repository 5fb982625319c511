from dataclasses import replace
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from gristmill.curation.folder import HouseError
from gristmill.curation.shards import read_split
from gristmill.tuning.evaluate import evaluate_sft
from gristmill.tuning.loop import train
from gristmill.tuning.lora import load_adapter
from gristmill.tuning.models import load_model, load_tokenizer

from .small_stage import SMALL, WEIGHTS, curate, make_home, metrics, rows_of


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    return make_home(tmp_path_factory.mktemp("home"))


def test_the_weights_that_did_best_on_held_out_rows_are_kept_beside_the_last(home: Path, tmp_path: Path) -> None:
    settings = replace(SMALL, learning_rate=0.3, schedule="constant", warmup=0.0, evaluate_every=1, max_steps=4)
    run = train("sft", home / "sft", home / "model", tmp_path, settings)
    losses = [line["held_out_loss"] for line in metrics(tmp_path)]
    assert len(losses) == 4 and run["best"]["loss"] == min(losses)
    best = losses.index(min(losses)) + 1
    assert run["best"]["step"] == best < 4  # so high a rate overshoots
    assert [path.name for path in (tmp_path / "checkpoints" / "best").iterdir()] == [f"step-{best:06d}"] or best > 3
    assert (tmp_path / "best" / Path(WEIGHTS).name).read_bytes() != (tmp_path / WEIGHTS).read_bytes()
    rows, tokenizer = read_split(home / "sft", "test"), load_tokenizer(home / "model")
    for folder, loss in (("best", min(losses)), ("adapter", losses[-1])):
        model = load_model(home / "model", dtype="fp32", device="cpu")
        load_adapter(model, tmp_path / folder)
        assert evaluate_sft(model, tokenizer, rows, 150)["loss"] == pytest.approx(loss, rel=1e-5)


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
