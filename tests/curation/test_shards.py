"""Curated shards: TRL's columns, one schema for all shards, equal bytes for equal rows, a manifest that is checked."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from gristmill.curation import shards
from gristmill.curation.folder import HouseError
from gristmill.curation.rows import message, table
from gristmill.curation.shards import plain_messages, read_manifest, read_split, write_curated

Make = Callable[..., dict[str, Any]]


def write(
    folder: Path, kind: str, rows: list[dict[str, Any]], test: list[dict[str, Any]] | None = None
) -> dict[str, Any]:
    splits = {"train": [table(rows[:1]), table(rows[1:])], "test": [table(test or [])]}
    return write_curated(folder, kind, splits, {"name": "x"}, lambda whole: {"README.md": f"{whole['rows']} rows"})


def test_sft_shards_read_back_with_row_ids(tmp_path: Path, make_row: Make) -> None:
    rows = [make_row("a", i, f"q{i}", f"r{i}") for i in range(5)]
    manifest = write(tmp_path / "s", "sft", rows, [make_row("a", 9, "q9", "r9")])
    assert manifest["rows"] == 5 and [f["split"] for f in manifest["files"]] == ["train", "test"]
    back = read_split(tmp_path / "s")
    assert back.column_names == ["row_id", "messages"] and back["row_id"].to_pylist() == [r["row_id"] for r in rows]
    assert back["messages"][1].as_py() == [{"role": "user", "content": "q1"}, {"role": "assistant", "content": "r1"}]
    assert (tmp_path / "s" / "README.md").read_text() == "5 rows"


def test_preference_shards_have_trl_columns(tmp_path: Path, make_row: Make) -> None:
    good, bad = [message("assistant", "good")], [message("assistant", "bad", name="n")]
    write(tmp_path / "p", "preference", [make_row("a", i, "q", None, chosen=good, rejected=bad) for i in range(2)])
    back = read_split(tmp_path / "p")
    assert back.column_names == ["row_id", "prompt", "chosen", "rejected"]
    assert back["rejected"][0].as_py() == [{"role": "assistant", "content": "bad", "name": "n"}]
    assert plain_messages(back["chosen"][0].as_py()) == [{"role": "assistant", "content": "good"}]


def test_sources_are_named_where_there_are_several(tmp_path: Path, make_row: Make) -> None:
    rows = [make_row(name, i, f"q{i}", "r") for i, name in enumerate("abb")]
    write(tmp_path / "several", "sft", rows)
    back = read_split(tmp_path / "several")
    assert back.column_names == ["row_id", "messages", "source"] and back["source"].to_pylist() == ["a", "b", "b"]
    write(tmp_path / "one", "sft", rows[1:], [make_row("b", 7, "q7", "r7")])
    assert read_split(tmp_path / "one").column_names == ["row_id", "messages"]
    write(tmp_path / "split", "sft", rows[1:], [rows[0]])  # the other source only among the held-out rows
    assert read_split(tmp_path / "split")["source"].to_pylist() == ["b", "b"]
    good, bad = [message("assistant", "good")], [message("assistant", "bad")]
    pairs = [make_row(name, i, "q", None, chosen=good, rejected=bad) for i, name in enumerate("ab")]
    write(tmp_path / "pairs", "preference", pairs)
    assert read_split(tmp_path / "pairs").column_names == ["row_id", "prompt", "chosen", "rejected"]


def test_scores_of_answers_are_kept_where_the_source_told_them(tmp_path: Path, make_row: Make) -> None:
    good, bad = [message("assistant", "good")], [message("assistant", "bad")]
    metas = ['{"score_chosen": 8.5, "score_rejected": 3}', None, '{"score_chosen": "high", "other": 1}']
    rows = [make_row("a", i, "q", None, chosen=good, rejected=bad, meta=meta) for i, meta in enumerate(metas)]
    write(tmp_path / "scored", "preference", rows)
    back = read_split(tmp_path / "scored")
    assert back.column_names == ["row_id", "prompt", "chosen", "rejected", "score_chosen", "score_rejected"]
    assert back["score_chosen"].to_pylist() == [8.5, None, None]
    assert back["score_rejected"].to_pylist() == [3.0, None, None]


def test_a_field_used_in_one_part_is_in_every_shard(tmp_path: Path, make_row: Make) -> None:
    call = json.dumps([{"type": "function", "function": {"name": "f", "arguments": {}}}])
    rows = [make_row("a", 0, "q", "r"), make_row("a", 1, "q", "r", tools="[]")]
    rows[1]["messages"][1]["tool_calls"] = call
    write(tmp_path / "t", "sft", rows)
    back = read_split(tmp_path / "t")
    assert back["tools"].to_pylist() == [None, "[]"]
    assert plain_messages(back["messages"][1].as_py())[1]["tool_calls"] == json.loads(call)
    assert plain_messages(back["messages"][0].as_py())[1] == {"role": "assistant", "content": "r"}


def test_equal_rows_give_equal_bytes(tmp_path: Path, make_row: Make) -> None:
    rows = [make_row("a", i, f"q{i}", f"r{i}") for i in range(5)]
    write(tmp_path / "one", "sft", rows)
    splits = {"train": [table(rows)], "test": [table([])]}
    write_curated(tmp_path / "two", "sft", splits, {"name": "x"}, lambda whole: {"README.md": f"{whole['rows']} rows"})
    files = [
        sorted(p.relative_to(tmp_path / n) for p in (tmp_path / n).rglob("*") if p.is_file()) for n in ("one", "two")
    ]
    assert files[0] == files[1]
    assert all((tmp_path / "one" / f).read_bytes() == (tmp_path / "two" / f).read_bytes() for f in files[0])


def test_shards_are_cut_by_what_rows_say_however_they_come(
    tmp_path: Path, make_row: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shards, "SHARD_BYTES", 10_000)
    rows = [make_row("a", i, f"q{i}", "word " * (i % 30), tools="[]" if i % 2 else None) for i in range(400)]
    manifests = []
    for size in (7, 100, 400):
        pieces = [table(rows[start : start + size]) for start in range(0, len(rows), size)]
        folder = tmp_path / str(size)
        manifests.append(write_curated(folder, "sft", {"train": pieces.copy}, {"name": "x"}, lambda whole: {}))
    assert manifests[0] == manifests[1] == manifests[2]
    files = manifests[0]["files"]
    assert len(files) > 5 and {file["path"][-8:] for file in files} == {".parquet"}
    assert [file["path"][5:] for file in files] == [
        f"train-{i:05d}-of-{len(files):05d}.parquet" for i in range(len(files))
    ]
    assert len({file["rows"] for file in files[:-1]}) == 1 and 0 < files[-1]["rows"] <= files[0]["rows"]
    back = read_split(tmp_path / "7")
    assert back["row_id"].to_pylist() == [row["row_id"] for row in rows]
    assert [turns[1]["content"] for turns in back["messages"].to_pylist()] == ["word " * (i % 30) for i in range(400)]


def test_datasets_reads_the_folder(tmp_path: Path, make_row: Make) -> None:
    datasets = pytest.importorskip("datasets")
    write(tmp_path / "s", "sft", [make_row("a", 0, "q", "r")], [make_row("a", 1, "held", "out")])
    found = datasets.load_dataset(str(tmp_path / "s"), cache_dir=str(tmp_path / "cache"))
    assert {name: split.num_rows for name, split in found.items()} == {"train": 1, "test": 1}
    assert found["train"][0]["messages"][0] == {"role": "user", "content": "q"}


def test_a_changed_shard_a_missing_split_and_no_manifest_are_named(tmp_path: Path, make_row: Make) -> None:
    with pytest.raises(HouseError, match=r"holds no manifest\.json"):
        read_manifest(tmp_path)
    manifest = write(tmp_path / "s", "sft", [make_row("a", 0, "q", "r")])
    with pytest.raises(HouseError, match="no split 'dev'; it has"):
        read_split(tmp_path / "s", "dev")
    path = tmp_path / "s" / manifest["files"][0]["path"]
    pq.write_table(pq.read_table(path).slice(0, 0), path)
    with pytest.raises(HouseError, match="does not have the sha256"):
        read_split(tmp_path / "s")
