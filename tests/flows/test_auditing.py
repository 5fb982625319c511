"""`audit`: labels from a terminal, a sheet or a judge model; overrides; the regression check of a later run."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from gristmill.curation.audit import read_labels
from gristmill.curation.door import ChatAnswer, ChatError
from gristmill.curation.folder import HouseError, RunFolder, read_json
from gristmill.curation.overrides import read_overrides
from gristmill.curation.shards import read_manifest
from gristmill.flows import cli
from gristmill.flows.auditing import Audit, ask, ask_model, begin, conclude, label, read_sheet, write_sheet
from gristmill.flows.progress import Silent
from gristmill.flows.recipe import Recipe, load_text
from gristmill.flows.run import Result, run

Whole = tuple[Recipe, Result, Silent]


@pytest.fixture
def folder(shared: Path, tmp_path: Path) -> RunFolder:
    recipe = load_text((shared / "curation.yaml").read_text(), "c", ["sets.clean.ResponseLength.low=9"])
    return run(recipe, tmp_path / "out", parts="curate", show=Silent()).folder


def call(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    monkeypatch.setattr(sys, "argv", ["gristmill", *map(str, arguments)])
    try:
        cli.main()
    except SystemExit as ended:
        return int(ended.code or 0)
    return 0


def truth(audit: Audit) -> dict[str, Any]:
    """Answers of fewer than 7 words are bad."""
    return {r["row_id"]: "bad" if r["score"] < 7 else "good" for r in audit.sample.to_pylist()}


def test_rows_are_labelled_blind_in_the_terminal(folder: RunFolder) -> None:
    audit = begin(folder, "ResponseLength", size=6)
    console = Console(record=True, width=100)
    keys = iter(["x", "g", "b", "u", "q"])
    audit = label(audit, ask(folder, audit, console, lambda: next(keys)), "ann")
    assert sorted(audit.labels.values()) == ["bad", "good", "unsure"] and len(audit.missing) == 3
    shown = console.export_text()
    assert "What is the meaning of" in shown and "2 of 6" in shown
    assert "dropped" not in shown and "too_short" not in shown  # blind
    again = begin(folder, "ResponseLength", size=6)
    assert again.labels == audit.labels and again.sample.equals(audit.sample)
    assert {said["who"] for said in read_labels(audit.home).values()} == {"ann"}


def test_a_sheet_is_written_filled_and_read(
    folder: RunFolder, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setattr(sys.stdin, "isatty", lambda: False, raising=False)
    assert call(monkeypatch, "audit", folder.root, "--judge", "ResponseLength", "--size", 20) == 0
    assert "Fill in" in capsys.readouterr().out
    audit = begin(folder, "ResponseLength", size=20)
    right = truth(audit)
    lines = [json.loads(line) for line in (audit.home / "to_label.jsonl").read_text().splitlines()]
    assert set(lines[0]) == {"row_id", "prompt", "response", "label", "note"} and len(lines) == 20
    sheet = tmp_path / "filled.jsonl"
    sheet.write_text("".join(json.dumps(line | {"label": right[line["row_id"]]}) + "\n" for line in lines))
    command = ["audit", folder.root, "--judge", "ResponseLength", "--size", 20, "--labels", sheet, "--apply"]
    assert call(monkeypatch, *command) == 0
    said = capsys.readouterr().out
    assert "precision" in said and "95 % interval" in said and "To lose at most 2%" in said
    told = read_json(audit.home / "report.json")
    mistakes = [r for r in audit.sample.to_pylist() if r["dropped"] and r["score"] >= 7]
    assert f"{len(mistakes)} overrides written" in said and len(read_overrides(folder)) == len(mistakes) > 0
    assert told["precision"]["value"] == 1 - len(mistakes) / told["dropped"]["labelled"]
    manifest = read_manifest(folder.curated("clean"))
    card = (folder.curated("clean") / "README.md").read_text()
    assert manifest["audits"] == [told] and "## Audits" in card and "stands under Audits" in card
    assert call(monkeypatch, "audit", folder.root, "--against", folder.root) == 1
    assert "20 labelled rows came in again" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"row_id": "zzz", "label": "good"}', r":1: row 'zzz' is not in this audit's sample"),
        ('{"row_id": "ROW", "label": "fine"}', ":1: label 'fine'; say good, bad or unsure"),
        ('{"row_id": ', ":1: not JSON"),
    ],
)
def test_a_bad_sheet_is_refused_with_its_line(folder: RunFolder, tmp_path: Path, line: str, message: str) -> None:
    audit = begin(folder, "ResponseLength", size=4)
    sheet = tmp_path / "s.jsonl"
    sheet.write_text(line.replace("ROW", audit.missing[0]))
    with pytest.raises(HouseError, match=message):
        read_sheet(sheet, audit)
    (tmp_path / "s.csv").write_text(f"row_id,label\n{audit.missing[0]},bad\n{audit.missing[1]},\n")
    assert read_sheet(tmp_path / "s.csv", audit) == [(audit.missing[0], "bad", None)]


class Judge:
    """Says bad of short answers, is silent once, and fails once."""

    name, digest = "j", "d"

    def __init__(self, right: dict[str, str], order: list[str]) -> None:
        self.right, self.order = right, order

    def complete(self, requests: Any, progress: Any = None) -> list[ChatAnswer | ChatError]:
        answers: list[ChatAnswer | ChatError] = [
            ChatAnswer(f"**{self.right[i].title()}.**", 9, 2, True) for i in self.order
        ]
        return [ChatError("timeout", "slow"), ChatAnswer("I cannot tell", 9, 2, True), *answers[2:]]


def test_a_judge_model_is_calibrated_by_people(folder: RunFolder) -> None:
    audit = begin(folder, "ResponseLength", size=40)
    right = truth(audit)
    model = ask_model(folder, audit, Judge(right, audit.sample["row_id"].to_pylist()))  # type: ignore[arg-type]
    assert list(model.values()).count("unsure") == 2
    audit = label(audit, [(i, right[i], None) for i in audit.sample["row_id"].to_pylist()[:24]], "ann")
    found = conclude(audit, model=model)
    assert found.labeller is not None and found.labeller["sensitivity"] == 1.0
    assert found.dropped.unsure + found.kept.unsure == 2
    share = sum(right[r["row_id"]] == "bad" for r in audit.sample.to_pylist() if r["dropped"]) / 20
    assert found.precision.low <= share <= found.precision.high
    assert write_sheet(folder, audit).read_text().count("\n") == 16
