"""`decide` shows another decision beside the one that stands and writes it when told; `override` overrules one row."""

import json
import shutil
import sys
from pathlib import Path

import pytest

from gristmill.curation.folder import HouseError, RunFolder, read_json, stored_folder
from gristmill.curation.look import why
from gristmill.curation.shards import read_manifest, read_split
from gristmill.flows import cli
from gristmill.flows.deciding import decide, stored_recipe, write_release
from gristmill.flows.overruling import overrule
from gristmill.flows.progress import Silent
from gristmill.flows.recipe import Recipe, load_text
from gristmill.flows.run import Result, run

Whole = tuple[Recipe, Result, Silent]
TIGHTER = "sets.clean.PerplexityQuantile.drop_highest=0.4"


def test_a_tighter_threshold_decided_and_written(shared: Path, whole: Whole, tmp_path: Path) -> None:
    out = shared / "whole"
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*") if path.is_file()}
    decision = decide(out, [TIGHTER])
    (clean,) = decision.sets
    assert decision.unsure == ("pairs",) and clean.lost > 0 and clean.gained == 0 and clean.waiting == 0
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*") if path.is_file()} == before  # nothing is written
    assert stored_folder(out).measures.parent.resolve() == (shared / "cache").resolve()
    show = Silent()
    write_release(out, decision, tmp_path / "next", show)
    manifest = read_manifest(tmp_path / "next" / "curated" / "clean")
    assert manifest["rows"] == clean.steps[-1].kept == read_manifest(out / "curated" / "clean")["rows"] - clean.lost
    assert manifest["previous"] == "whole" and "0.4" in manifest["recipe"]
    fresh = run(load_text(stored_recipe(RunFolder(out)), "r", [TIGHTER]), tmp_path / "fresh", parts="curate",
                cache=shared / "cache", show=Silent())  # fmt: skip
    written, made = (read_split(folder / "curated" / "clean") for folder in (tmp_path / "next", fresh.folder.root))
    assert written.equals(made)
    with pytest.raises(HouseError, match="is not empty"):
        write_release(out, decision, tmp_path / "next", show)


def test_the_command_shows_both_funnels(
    shared: Path, whole: Whole, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["gristmill", "decide", str(shared / "whole"), "sets.clean.ResponseLength.low=12"])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    said = capsys.readouterr().out
    assert not ended.value.code and "too_short" in said and "rows come in" in said and "no release was written" in said
    assert "ResponseLength(low=12, high=500)" in said


def test_another_kind_of_change_is_refused(shared: Path, whole: Whole, tmp_path: Path) -> None:
    with pytest.raises(HouseError, match="held_out was"):
        decide(shared / "whole", ["sets.clean.held_out=0.3"])
    with pytest.raises(HouseError, match=r"holds no recipe\.yaml"):
        decide(tmp_path, [])


def test_a_person_overrules(shared: Path, whole: Whole, tmp_path: Path) -> None:
    recipe = load_text((shared / "curation.yaml").read_text(), "curation")
    out = tmp_path / "out"
    run(recipe, out, parts="curate", show=Silent())
    first, second = read_split(out / "curated" / "clean")["row_id"].to_pylist()[:2]
    said = overrule(RunFolder(out), first[:20], "drop", "wrong by my reading", "ann")
    assert first in said
    edit = {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "mended by hand"}]}
    (tmp_path / "edit.json").write_text(json.dumps(edit))
    overrule(RunFolder(out), second, "edit", "a slip", "bob", f"@{tmp_path / 'edit.json'}")
    again = run(recipe, out, parts="curate", show=Silent())
    assert not again.cached
    rows = read_split(out / "curated" / "clean")
    assert first not in rows["row_id"].to_pylist() and second not in rows["row_id"].to_pylist()
    assert "mended by hand" in json.dumps(rows["messages"].to_pylist())
    last = why(RunFolder(out), first).verdicts[-1]
    assert (last.reason, last.evidence["who"], last.evidence["why"]) == ("override_drop", "ann", "wrong by my reading")
    decided = decide(out, ["sets.clean.ResponseLength.low=12"])
    assert decided.sets[0].steps[-1].reasons == {"override_drop": 1, "rewritten": 1}


@pytest.mark.parametrize(
    ("action", "reason", "content", "message"),
    [
        ("kep", "x", None, "did you mean 'keep'"),
        ("keep", " ", None, "--why is empty"),
        ("edit", "x", None, "`edit` needs the new fields"),
        ("edit", "x", "{", "not JSON"),
        ("edit", "x", "[1]", "JSON object"),
        ("edit", "x", "@/nowhere", "No such file"),
        ("edit", "x", '{"colour": 1}', "fields of"),
    ],
)
def test_an_override_that_says_nothing_is_refused(
    shared: Path, whole: Whole, tmp_path: Path, action: str, reason: str, content: str | None, message: str
) -> None:
    shutil.copytree(shared / "whole", tmp_path / "copy")
    folder = RunFolder(tmp_path / "copy")
    row = read_split(folder.curated("clean"))["row_id"][0].as_py()
    with pytest.raises(HouseError, match=message):
        overrule(folder, row, action, reason, None, content)
    assert not (folder.root / "overrides.parquet").exists()
    assert read_json(folder.root / "run.json")
