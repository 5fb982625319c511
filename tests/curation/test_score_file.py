"""ScoreFile reads what scoring or training wrote, by content or row, and is measured anew when the file changes."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from gristmill.curation.folder import HouseError
from gristmill.curation.measures.score_file import ScoreFile
from gristmill.curation.rows import table

Make = Callable[..., dict[str, Any]]


def measured(path: Path, rows: list[dict[str, Any]]) -> dict[str, list[Any]]:
    found: dict[str, list[Any]] = (
        ScoreFile(str(path)).measure(table(rows), None, lambda done, total: None).to_pydict()  # type: ignore[arg-type]
    )
    return found


def test_a_training_run_s_rows_are_found_by_row_id(make_row: Make, tmp_path: Path) -> None:
    rows = [make_row("a", i, f"question {i}", "answer") for i in range(4)]
    losses = {"row_id": [rows[2]["row_id"], rows[0]["row_id"]], "epoch": [1, 1], "loss": [2.5, 0.5], "tokens": [7, 9]}
    (tmp_path / "sft/row_losses").mkdir(parents=True)
    pq.write_table(pa.table(losses | {"mean_prob": [0.1, 0.6]}), tmp_path / "sft/row_losses/train.parquet")
    found = measured(tmp_path / "sft", rows)
    assert found["loss"] == [0.5, None, 2.5, None] and found["scored_tokens"] == [9, None, 7, None]
    assert found["mean_prob"] == [0.6, None, 0.1, None] and found["perplexity"] == [None] * 4


def test_scores_are_found_by_content_whatever_the_source(make_row: Make, tmp_path: Path) -> None:
    scored = [make_row("elsewhere", i, f"question {i}", "answer") for i in (1, 0)]
    columns = {name: [row[name] for row in scored] for name in ("row_id", "content_id")}
    columns |= {"loss": [1.0, 2.0], "perplexity": [2.7, 7.4], "logp": [-3.0, -4.0], "rejected_logp": [-5.0, None]}
    pq.write_table(pa.table(columns), tmp_path / "scores.parquet")
    found = measured(tmp_path, [make_row("a", i, f"question {i}", "answer") for i in range(3)])
    assert found["loss"] == [2.0, 1.0, None] and found["perplexity"] == [7.4, 2.7, None]
    assert found["margin"] == [None, 2.0, None]


def test_another_file_at_the_same_path_is_another_measure(make_row: Make, tmp_path: Path) -> None:
    row, path = make_row("a", 0, "question", "answer"), tmp_path / "scores.parquet"
    seen = []
    for loss in (1.0, 2.0):
        pq.write_table(pa.table({"row_id": [row["row_id"]], "loss": [loss]}), path)
        seen.append((ScoreFile(str(path)).inputs(), measured(path, [row])["loss"]))
    assert seen[0][0] != seen[1][0] and [loss for _, loss in seen] == [[1.0], [2.0]]


def test_what_is_wrong_with_the_file_is_said(make_row: Make, tmp_path: Path) -> None:
    row, path = make_row("a", 0, "question", "answer"), tmp_path / "scores.parquet"
    with pytest.raises(HouseError, match=r"is no file and no folder with scores\.parquet, .*gristmill score"):
        measured(tmp_path, [row])
    pq.write_table(pa.table({"id": ["x"], "loss": [1.0]}), path)
    with pytest.raises(HouseError, match="has the columns id, loss; it needs row_id or content_id"):
        measured(path, [row])
    pq.write_table(pa.table({"row_id": ["x"], "loss": [1.0]}), path)
    with pytest.raises(HouseError, match="not gristmill's"):
        measured(path, [row])
    path.write_bytes(b"PAR1 torn")
    with pytest.raises(HouseError, match="cannot be read"):
        measured(path, [row])
