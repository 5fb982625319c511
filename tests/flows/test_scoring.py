"""gristmill score and gristmill export from the command line; a recipe's ids are those of the scores."""

import json
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from typer.testing import CliRunner

from gristmill.curation.measures.score_file import ScoreFile
from gristmill.curation.rows import content_id, counted_row_id, message, table
from gristmill.curation.shards import write_curated
from gristmill.flows.cli import app
from gristmill.flows.progress import Silent
from gristmill.flows.scoring import curated_rows, score_command
from gristmill.tuning.lora import add_lora, save_adapter
from gristmill.tuning.models import load_model, make_model
from gristmill.tuning.settings import Lora, NewModel

PAIRS = [("Why does bread rise?", "The yeast."), ("What grinds the grain?", "The mill."), ("And?", "Flour.")]


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, an adapter on it, raw rows, and the same rows curated."""
    home = tmp_path_factory.mktemp("scoring")
    spec = NewModel(params="40K", vocab=300, context=128, tokens=0)
    make_model(home / "model", spec, iter([" ".join(word for pair in PAIRS for word in pair)] * 9))
    model = load_model(home / "model", dtype="fp32", device="cpu")
    add_lora(model, Lora(rank=2), seed=0)
    save_adapter(model, home / "adapter", Lora(rank=2), str(home / "model"))
    lines = [json.dumps({"instruction": ask, "output": say}) for ask, say in PAIRS]
    (home / "raw.jsonl").write_text("\n".join(lines))
    rows = []
    for ask, say in PAIRS:
        row = {"source": "raw", "position": 0, "messages": [message("user", ask), message("assistant", say)]}
        row["content_id"] = content_id(row)
        rows.append(row | {"row_id": counted_row_id("raw", row["content_id"], 0)})
    write_curated(home / "curated", "sft", {"train": [table(rows[:2])], "test": [table(rows[2:])]}, {}, lambda m: {})
    return home


def test_raw_data_and_a_curated_folder_score_alike_under_a_recipe_s_ids(home: Path, tmp_path: Path) -> None:
    told = score_command(
        str(home / "model"), str(home / "raw.jsonl"), None, tmp_path / "a.parquet", False, "raw", Silent()
    )
    score_command(str(home / "model"), str(home / "curated"), None, tmp_path / "b", True, "data", Silent())
    raw, curated = pq.read_table(tmp_path / "a.parquet"), pq.read_table(tmp_path / "b/scores.parquet")
    assert raw.to_pylist() == curated.drop_columns(["token_ids", "token_logps"]).to_pylist()
    assert told["rows"] == told["scored"] == 3 and told["worst"][0]["loss"] == max(raw["loss"].to_pylist())
    assert told["loss"] == pytest.approx(-sum(raw["logp"].to_pylist()) / sum(raw["tokens"].to_pylist()))
    rows = curated_rows(home / "curated")
    assert rows["row_id"].to_pylist() == raw["row_id"].to_pylist()
    found = ScoreFile(str(tmp_path / "b")).measure(rows, None, lambda done, total: None)  # type: ignore[arg-type]
    assert found["loss"].to_pylist() == raw["loss"].to_pylist()


def test_score_from_the_command_line(home: Path, tmp_path: Path) -> None:
    line = ["score", str(home / "model"), str(home / "raw.jsonl"), "--out", str(tmp_path), "--adapter"]
    ran = CliRunner().invoke(app, [*line, str(home / "adapter")], catch_exceptions=False)
    assert ran.exit_code == 0 and "3 of 3 rows" in ran.stdout and "highest loss" in ran.stdout
    assert pq.read_table(tmp_path / "scores.parquet").num_rows == 3


@pytest.mark.parametrize("kind", ["adapter", "merged", "nf4"])
def test_export_from_the_command_line(kind: str, home: Path, tmp_path: Path) -> None:
    line = ["export", str(home / "adapter"), "--to", str(tmp_path / "out"), "--as", kind]
    ran = CliRunner().invoke(app, line, catch_exceptions=False)
    assert ran.exit_code == 0 and "tolerance" in ran.stdout and "generation stops at <|im_end|>" in ran.stdout
    assert json.loads((tmp_path / "out/manifest.json").read_text())["kind"] == kind
