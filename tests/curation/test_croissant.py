"""croissant.json: valid by MLCommons' own reader, true to the files, the same for the same set."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from gristmill.curation import shards
from gristmill.curation.croissant import croissant
from gristmill.curation.rows import message, table
from gristmill.curation.shards import read_split, write_curated

Make = Callable[..., dict[str, Any]]
ABOUT = {"name": "demo-sft", "created": "2026-01-02T03:04:05+00:00", "version": "2.1", "ledger_digest": "ab" * 32,
         "sources": [{"name": "a", "licence": "MIT", "rows": 3, "digest": "0"}]}  # fmt: skip


def write(folder: Path, kind: str, rows: list[dict[str, Any]], test: list[dict[str, Any]]) -> dict[str, Any]:
    def extra(whole: Any) -> dict[str, str]:
        return {"croissant.json": croissant(whole, whole["columns"])}

    write_curated(folder, kind, {"train": [table(rows)], "test": [table(test)]}, ABOUT, extra)
    found: dict[str, Any] = json.loads((folder / "croissant.json").read_text())
    return found


def kinds(make_row: Make) -> dict[str, list[dict[str, Any]]]:
    good, bad = [message("assistant", "good")], [message("assistant", "bad")]
    return {
        "sft": [make_row("a", i, f"q{i}", f"r{i}", tools="[]") for i in range(5)],
        "preference": [make_row("a", i, f"q{i}", None, chosen=good, rejected=bad) for i in range(5)],
        "kto": [make_row("a", i, f"q{i}", None, chosen=good, label=bool(i % 2)) for i in range(5)],
        "text": [make_row("a", i, "", None, messages=None, text=f"document {i}") for i in range(5)],
    }


@pytest.mark.parametrize("kind", ["sft", "preference", "kto", "text"])
def test_mlcroissant_reads_the_rows(kind: str, tmp_path: Path, make_row: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    mlc = pytest.importorskip("mlcroissant", reason="mlcroissant is not installed")
    monkeypatch.setenv("CROISSANT_CACHE", str(tmp_path / "cache"))
    rows = kinds(make_row)[kind]
    write(tmp_path / "set", kind, rows[:3], rows[3:])
    data = mlc.Dataset(jsonld=str(tmp_path / "set" / "croissant.json"))
    assert not data.metadata.ctx.issues.errors and not data.metadata.ctx.issues.warnings
    for split in ("train", "test"):
        given = read_split(tmp_path / "set", split).to_pylist()
        found = list(data.records(record_set=split))
        assert [one[f"{split}/row_id"].decode() for one in found] == [row["row_id"] for row in given]
        if kind == "text":
            assert [one[f"{split}/text"].decode() for one in found] == [row["text"] for row in given]
        if kind == "sft":
            said = [[turn["content"] for turn in row["messages"]] for row in given]
            assert [_contents(one[f"{split}/messages"]) for one in found] == said


def _contents(turns: Any) -> list[str]:
    return [next(v for k, v in turn.items() if k.endswith("content")).decode() for turn in turns]


def test_files_are_named_with_their_digests_and_shards_apart(
    tmp_path: Path, make_row: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = kinds(make_row)["sft"]
    one = write(tmp_path / "one", "sft", rows[:3], rows[3:])
    assert (tmp_path / "one" / "croissant.json").read_bytes() == _again(tmp_path / "two", rows)
    manifest = json.loads((tmp_path / "one" / "manifest.json").read_text())
    assert "columns" not in manifest
    assert [(f["@id"], f["sha256"], f["contentSize"]) for f in one["distribution"]] == [
        (f["path"], f["sha256"], f"{f['bytes']} B") for f in manifest["files"]
    ]
    assert [records["@id"] for records in one["recordSet"]] == ["train", "test"]
    assert one["license"] == ["MIT"] and one["version"] == "2.1.0" and "2026" in one["citeAs"]
    monkeypatch.setattr(shards, "SHARD_BYTES", 200)
    many = write(tmp_path / "many", "sft", rows, [])
    names = [records["@id"] for records in many["recordSet"]]
    assert len(names) > 1 and names[0] == f"train-00000-of-{len(names):05d}"
    assert {f["@id"].rsplit("/", 1)[-1] for f in many["recordSet"][0]["field"]} == {"row_id", "messages", "tools"}


def _again(folder: Path, rows: list[dict[str, Any]]) -> bytes:
    write(folder, "sft", rows[:3], rows[3:])
    return (folder / "croissant.json").read_bytes()
